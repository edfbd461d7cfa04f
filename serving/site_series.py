"""A site's own DICOM series with labels for any heads of the protocol model, from a plain CSV.

    path,patient,body_part,orientation
    series/0001,P1,chest,axial
    series/0002,P1,,coronal

`path` is a folder of one series, absolute or from the CSV's own folder; `patient`, which may be left out, keeps series
of one patient on one side of the split. Columns named after heads hold a class or nothing: nothing is "not known" and
counts nothing in the loss. Other columns are ignored.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from herald.errors import ConfigError
from herald.heads import Heads
from herald.signatures import PROTOCOL_SLICES
from herald.volume import AIR_HOUNSFIELD, Volume, protocol_batch
from serving.public_sets import site_volume, table_rows

CACHED_CHUNKS = 8
"""So many times eight slices are kept of a series, from which training draws; the model sees four times eight."""
HELD_OUT_EVERY = 5
"""Every fifth patient is kept from training, for evaluation and calibration."""
SHIFT_PIXELS = 16


@dataclass(frozen=True)
class SiteRow:
    """One row of the CSV: `labels` by head, None where not known."""

    table: Path
    line: int
    cells: Mapping[str, str]
    labels: Mapping[str, str | None]

    @cached_property
    def folder(self) -> Path:
        """Where the series lies."""
        return self.table.parent / self.cells["path"]

    def volume(self) -> tuple[Volume, str]:
        """The series as the node makes a volume of it, and its patient; raises ConfigError."""
        return site_volume(self.table, self.line, self.cells)


@dataclass(frozen=True)
class SiteSeries:
    """One series ready for training: its row, a pseudonym of its patient, and slices (D, 256, 256) int16 on disk."""

    row: SiteRow
    patient: str
    pixels: Path

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """Eight slices, (8, 256, 256), of a random part of the scan, moved and with shifted values; and the labels.

        Nothing is interpolated, which would change the texture of the noise, nor mirrored, which would change sides.
        """
        stack = np.load(self.pixels, mmap_mode="r")
        share = 1.0 if rng.random() < 0.5 else rng.uniform(0.5, 1)
        first = rng.uniform(0, 1 - share) * (len(stack) - 1)
        last = first + share * (len(stack) - 1)
        chunks = int(rng.integers(1, 5))
        picks = np.linspace(first, last, PROTOCOL_SLICES * chunks)[rng.integers(chunks) :: chunks]
        image = np.full((PROTOCOL_SLICES, *stack.shape[1:]), AIR_HOUNSFIELD, np.float32)
        down, right = rng.integers(-SHIFT_PIXELS, SHIFT_PIXELS + 1, 2).tolist()
        rows, columns = stack.shape[1:]
        image[:, max(down, 0) : rows + min(down, 0), max(right, 0) : columns + min(right, 0)] = stack[
            picks.round().astype(int),
            max(-down, 0) : rows - max(down, 0),
            max(-right, 0) : columns - max(right, 0),
        ]
        inside = image > -500
        image[inside] = image[inside] * rng.uniform(0.98, 1.02) + rng.normal(0, 2.5)
        return np.clip(np.rint(image), AIR_HOUNSFIELD, 32767).astype(np.int16), self.row.labels


def read_labels(table: Path, heads: Heads) -> list[SiteRow]:
    """The rows of a CSV, checked against `heads`; raises ConfigError naming line, column and cure."""
    if not table.is_file():
        raise ConfigError(f"{table} is missing; name the CSV of your series")
    rows = []
    for line, cells in table_rows(table, ("path",)):
        known = [name for name in heads if name in cells]
        if not known:
            raise ConfigError(
                f"{table} has a column for none of the heads {', '.join(heads)}; add one, or name --heads"
            )
        labels = {name: _label(table, line, cells, name, heads) for name in known}
        for name, label in labels.items():
            for other, answer in heads[name].given.items() if label else ():
                if labels.get(other) not in (None, answer):
                    raise ConfigError(
                        f"{table}, line {line}: {name} is {label!r} where {other} is {labels[other]!r}; it is asked"
                        f" only where {other} is {answer!r}: leave it empty"
                    )
        if any(labels.values()):
            rows.append(SiteRow(table, line, cells, labels))
    if not rows:
        raise ConfigError(f"{table} labels no series; write a class of a head in at least one row")
    return rows


def _label(table: Path, line: int, cells: Mapping[str, str], name: str, heads: Heads) -> str | None:
    label = cells[name].strip()
    if label and label not in heads[name].classes:
        raise ConfigError(
            f"{table}, line {line}: {name} is {label!r}, none of {', '.join(heads[name].classes)}; correct it, or leave"
            " it empty where it is not known"
        )
    return label or None


def prepare_site(rows: Sequence[SiteRow], cache: Path) -> list[SiteSeries]:
    """Decode every series once into `cache`; raises ConfigError naming the row of one that cannot be read."""
    cache.mkdir(parents=True, exist_ok=True)
    prepared = []
    for row in track(rows, description="reading series", console=Console(stderr=True), transient=True):
        pixels = cache / f"{_fingerprint(row.folder)}.npy"
        facts = pixels.with_suffix(".json")
        if not facts.exists():
            volume, patient = row.volume()
            batch = protocol_batch(volume, CACHED_CHUNKS)  # (N, 8, 256, 256), interleaved
            np.save(pixels, batch.swapaxes(0, 1).reshape(-1, *batch.shape[2:]))
            facts.write_text(json.dumps({"patient": patient}), encoding="utf-8")
        own = (row.cells.get("patient") or "").strip()
        patient = own or json.loads(facts.read_text(encoding="utf-8"))["patient"]
        prepared.append(SiteSeries(row, hashlib.blake2b(patient.encode(), digest_size=6).hexdigest(), pixels))
    return prepared


def _fingerprint(folder: Path) -> str:
    """Tells a series that has changed from one that was decoded before."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()]
    decoded = (str(folder.resolve()), "means of pixels", files)  # other than how earlier versions decoded
    return hashlib.blake2b(repr(decoded).encode(), digest_size=12).hexdigest()


def held_out(series: Sequence[SiteSeries]) -> tuple[list[SiteSeries], list[SiteSeries]]:
    """Series to train on and series kept aside: a fifth of the patients, the same whoever else is there."""
    aside = {s.patient for s in series if int(s.patient, 16) % HELD_OUT_EVERY == 0}  # pseudonyms are digests
    return [s for s in series if s.patient not in aside], [s for s in series if s.patient in aside]

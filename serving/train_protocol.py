"""Train, calibrate and evaluate the protocol model: `python -m serving.train protocol [--calibrate] [--evaluate]`.

Samples are drawn anew for every step, from its number and the seed alone: simulated series, and real heads that are
turned, cropped, sharpened to bone kernels and given contrast medium. The real DICOM series are for evaluation only.
`--heads FILE --labels CSV` trains other heads from a site's own series (`serving.site_series`), `--start WEIGHTS` from
a trained trunk. A run that was cut short goes on when it is started again, to the weights that it would have had.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from scipy import ndimage

from herald.errors import ConfigError, SignatureMismatch
from herald.header import Claim, header_claim
from herald.heads import TRIAGE_HEADS, Head, Heads, aggregate, read_heads
from herald.signatures import PROTOCOL_IN_PLANE, PROTOCOL_SLICES
from herald.volume import AIR_HOUNSFIELD, Hounsfield, Volume, protocol_batch, read_datasets, volume_from_datasets
from serving import readers
from serving.calibration import LEAST, Scored, fit_temperature, measure, out_of_fold, tempered
from serving.evaluation import wilson
from serving.evaluation_report import Case, check_report_path, picture, report, write_report
from serving.phantom import (
    CONTRAST_PHASES,
    OTHER_REGIONS,
    acquire,
    draw_acquisition,
    draw_findings,
    make_subject,
    simulate,
)
from serving.phantom.anatomy import HEAD_ORIGIN, HEAD_SHAPE, Float, Subject, atlas
from serving.phantom.scanner import Acquisition, develop
from serving.site_series import SiteSeries, held_out, prepare_site, read_labels

# --- hyperparameters, each with its reason ---------------------------------------------------------------------------

SEED = 2026
CYCLES = ((1500, 2e-3),)  # (steps, peak rate): the loss falls when a cosine comes down
BATCH = 6  # small, for many steps in little time; large enough for batch normalisation over eight slices
STEPS = sum(steps for steps, _ in CYCLES)
WEIGHT_DECAY = 1e-4
LABEL_SMOOTHING = 0.02  # keeps the softmaxes from certainty on what the simulation makes too easy
HEAD_SUBJECTS, SERIES_PER_HEAD = 96, 6  # composing a head costs two seconds, scanning it a tenth
SKULL_SUBJECTS, SERIES_PER_SKULL = 4, 8  # plastic skulls, which quality assurance sends
OTHER_SUBJECTS, SERIES_PER_OTHER = 40, 5
PLANELESS = ("limb", "test_object")  # look much alike in every plane, so that their orientation is undefined
CRANIUM_VARIANTS, SERIES_PER_CRANIUM = 4, 12  # one real thin-slice head, so many warps of it
SERIES_PER_PATIENT = {"ct-ich": 8, "phe-sich": 2}  # PHE-SICH has lost what lies outside the brain window: fewer
WORKERS = 2  # cores
HELD_OUT_SUBJECTS = 32  # simulated, for evaluation ...
EVALUATION_SEED = 10_000_000
CALIBRATION_SUBJECTS = 64  # ... and others for calibration
CALIBRATION_SEED = 20_000_000
SAVE_EVERY = 50  # steps, about a minute: what an interruption costs
SHARES = {"head": 0.33, "other": 0.16, "skull": 0.10, "cranium": 0.11, "ct-ich": 0.25, "phe-sich": 0.05}
TRAINED_ON = {"ct-ich": (1, 2), "phe-sich": (0,)}  # patients by rank modulo 3; the others are held out

DATA = Path(os.environ.get("HERALD_DATA", "../shared/data"))
CACHE = Path(".work/protocol")
HERE = Path(__file__).parent
WEIGHTS = HERE / "weights" / "protocol.weights.h5"
HEADS_FILE = HERE / "heads" / "default.toml"


@dataclass(frozen=True, eq=False)
class Sample:
    """Eight slices before kernel and noise, (8, 256, 256), with what is known of them; None is not known."""

    image: NDArray[np.int16]
    contrast: str | None
    orientation: str
    region: str
    pixel_mm: float
    thickness_mm: float
    real: bool = False
    planeless: bool = False

    def labels(self, kernel: str) -> dict[str, str | None]:
        """The label of each head."""
        contrast = self.contrast if self.region == "head" else None  # of no interest in a body
        orientation = None if self.planeless else self.orientation
        return {"contrast": contrast, "orientation": orientation, "kernel": kernel, "region": self.region}

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """The slices with a kernel and noise of their own, and the label of each head, None where undefined."""
        kernel = "bone" if rng.random() < 0.42 else "soft"
        return finish(self, kernel, rng), self.labels(kernel)


# --- clean series, drawn once ----------------------------------------------------------------------------------------


def prepare(cache: Path = CACHE, data: Path = DATA) -> dict[str, list[Sample]]:
    """Clean training series by kind; drawn on the first call (some ten minutes), then read from `cache`."""
    plan: dict[str, tuple[int, Callable[[int], list[Sample]]]] = {
        "head": (HEAD_SUBJECTS, lambda i: _simulated_series("head", i, SERIES_PER_HEAD, _draw_head)),
        "other": (OTHER_SUBJECTS, lambda i: _simulated_series("other", i, SERIES_PER_OTHER, _draw_other)),
        "skull": (SKULL_SUBJECTS, lambda i: _simulated_series("skull", i, SERIES_PER_SKULL, _draw_skull)),
    }
    if (data / "volumes" / "cranium.nii.gz").exists():
        draw = partial(_draw_cranium, data / "volumes" / "cranium.nii.gz")
        plan["cranium"] = (CRANIUM_VARIANTS, lambda i: _simulated_series("cranium", i, SERIES_PER_CRANIUM, draw))
    for source, series in SERIES_PER_PATIENT.items():
        if names := patients_of(data, source, held_out=False):
            plan[source] = (len(names), partial(_real_series, data, source, names, series))
    cache.mkdir(parents=True, exist_ok=True)
    return {kind: _pool(cache, kind, count, draw) for kind, (count, draw) in plan.items()}


_draw: Callable[[int], list[Sample]]  # of the pool being made; workers are forked, so that they inherit it


def _pool(cache: Path, kind: str, count: int, draw: Callable[[int], list[Sample]]) -> list[Sample]:
    index, pixels = cache / f"{kind}.json", cache / f"{kind}.npy"
    if not index.exists():
        global _draw
        _draw = draw
        atlas()  # built before the fork, shared after it
        samples = []
        with progress_bar() as bar, get_context("fork").Pool(WORKERS) as workers:
            for some in bar.track(workers.imap(_run_draw, range(count)), total=count, description=f"drawing {kind}"):
                samples += some
        np.save(pixels, np.stack([sample.image for sample in samples]))
        facts = [{k: v for k, v in vars(sample).items() if k != "image"} for sample in samples]
        index.write_text(json.dumps(facts), encoding="utf-8")
    stored = np.load(pixels, mmap_mode="r")
    return [Sample(image, **fact) for image, fact in zip(stored, json.loads(index.read_text()), strict=True)]


def _run_draw(i: int) -> list[Sample]:
    return _draw(i)


def _simulated_series(
    kind: str, i: int, series: int, draw: Callable[[np.random.Generator, int], Subject]
) -> list[Sample]:
    """Some series of the i-th subject of a kind."""
    rng = np.random.default_rng((SEED, list(SHARES).index(kind), i))
    subject = replace(draw(rng, i), truth=None)
    planeless = kind == "other" and _other_region(i) in PLANELESS
    return [replace(_clean(rng, subject, kind), planeless=planeless) for _ in range(series)]


def _real_series(data: Path, source: str, names: Sequence[str], series: int, i: int) -> list[Sample]:
    """Some series drawn from the i-th patient of a real set."""
    rng = np.random.default_rng((SEED, list(SHARES).index(source), i))
    patient = read_patient(data, source, names[i])
    return [draw_real(patient, rng) for _ in range(series)]


def _draw_skull(rng: np.random.Generator, i: int) -> Subject:
    return make_subject(rng, region="skull")


def _draw_head(rng: np.random.Generator, i: int) -> Subject:
    if i % 2:
        return make_subject(rng, contrast=str(rng.choice(CONTRAST_PHASES, p=[0.45, 0.25, 0.3])))
    return make_subject(rng, findings=draw_findings(rng) if i % 4 else None)


def _draw_other(rng: np.random.Generator, i: int) -> Subject:
    return make_subject(rng, region=_other_region(i), contrast=str(rng.choice(["non_contrast", "venous"])))


def _other_region(i: int) -> str:
    """What the i-th subject that is no head is: trunks as often as everything else together."""
    return "trunk" if i % 2 else OTHER_REGIONS[1:][i // 2 % (len(OTHER_REGIONS) - 1)]


def _draw_cranium(path: Path, rng: np.random.Generator, i: int) -> Subject:
    cranium = read_cranium(path)
    if i % 2 == 0:
        return cranium
    hounsfield = cranium.hounsfield.astype(np.float32)
    hounsfield += iodine(rng, hounsfield, atlas().arteries, atlas().veins, atlas().depth < 0)
    return replace(cranium, hounsfield=np.clip(hounsfield, -1024, 3071).astype(np.int16), contrast="contrast")


def _clean(rng: np.random.Generator, subject: Subject, kind: str) -> Sample:
    """Scan without kernel and noise, which every later use draws anew."""
    orientation = str(rng.choice(["axial", "coronal", "sagittal"], p=[0.5, 0.25, 0.25]))
    drawn = draw_acquisition(rng, subject, orientation=orientation, slices=PROTOCOL_SLICES, matrix=PROTOCOL_IN_PLANE)
    drawn = replace(drawn, warp_mm=drawn.warp_mm + (2 if subject.region == "head" else 4), circle=False)
    image = acquire(subject, drawn, rng, noisy=False).volume.hounsfield
    return Sample(
        image=image,
        contrast=subject.contrast if kind != "skull" else None,
        orientation=orientation,
        region=subject.region,
        pixel_mm=drawn.field_mm / PROTOCOL_IN_PLANE,
        thickness_mm=drawn.thickness_mm,
    )


# --- real heads ------------------------------------------------------------------------------------------------------


def read_cranium(path: Path) -> Subject:
    """The thin-slice head of Debian's invesalius-examples on the head grid of the atlas, roughly aligned to it."""
    from nibabel.nifti1 import Nifti1Image

    image = Nifti1Image.from_filename(path)
    zyx = np.asarray(image.dataobj).astype(np.int16).transpose(2, 1, 0)[:, ::-1]  # stored with y towards the face
    dx, dy, dz = (float(v) for v in image.header.get_zooms())  # type: ignore[no-untyped-call]
    fit = fit_to_atlas(zyx, dz)
    scale = np.array([1 / dz, 1 / dy, 1 / dx])
    middle = np.array([(fit.top - 86.0 / dz), (fit.front + 99.0 / dy), (fit.left + fit.right) / 2])  # where mm are 0
    matrix = np.diag(scale)
    offset = middle + np.asarray(HEAD_ORIGIN) * scale
    grid = ndimage.affine_transform(zyx, matrix, offset, HEAD_SHAPE, order=1, cval=AIR_HOUNSFIELD)
    low = max(HEAD_ORIGIN[0], -middle[0] * dz)
    return Subject(grid, None, HEAD_ORIGIN, 1.0, (float(low) + 4, 86.0), 225.0, "head", "non_contrast")


@dataclass(frozen=True)
class Fit:
    """Where the skull lies in a stack, in voxels: vertex slice, front and back rows, left and right columns."""

    top: float
    front: float
    back: float
    left: float
    right: float


def fit_to_atlas(stack: NDArray[np.int16], spacing_mm: float) -> Fit:
    """Bounding box of the skull over the upper head, good to about a centimetre: enough to place vessels."""
    bone = ndimage.binary_opening(stack[:, ::3, ::3] > 250, structure=np.ones((1, 2, 2), bool))
    filled = bone.sum(axis=(1, 2))
    top = int(np.flatnonzero(filled > 0.15 * filled.max())[-1])
    upper = bone[max(0, top - int(75 / spacing_mm)) : max(1, top - int(20 / spacing_mm))]
    rows, columns = np.flatnonzero(upper.any((0, 2))) * 3.0, np.flatnonzero(upper.any((0, 1))) * 3.0
    ends = [float(np.percentile(v, q)) for v in (rows, columns) for q in (2, 98)]
    return Fit(float(top), *ends)


def iodine(
    rng: np.random.Generator, hounsfield: Float, arteries: Float, veins: Float, brain: NDArray[np.bool_]
) -> Float:
    """What contrast medium adds to a real head, from filling fractions of the atlas' vessels on the same grid."""
    phase = str(rng.choice(CONTRAST_PHASES, p=[0.45, 0.25, 0.3]))
    arterial, venous, tissue = (
        rng.uniform(*span)
        for span in {
            "arterial": ((150, 450), (10, 150), (1, 4)),
            "venous": ((80, 200), (110, 260), (3, 7)),
            "delayed": ((45, 110), (60, 130), (3, 8)),
        }[phase]
    )
    soft = (hounsfield > -40) & (hounsfield < 120)
    rise = np.where(brain, tissue, 3 * tissue).astype(np.float32)
    np.maximum(rise, arteries * np.float32(arterial), out=rise)
    np.maximum(rise, veins * np.float32(venous), out=rise)
    result: Float = np.where(soft, rise, 0)
    return result


@dataclass(frozen=True, eq=False)
class Patient:
    """A real stack of axial slices of a head without contrast: (D, H, W) and its fit to the atlas."""

    name: str
    stack: Hounsfield
    spacing_mm: float
    pixel_mm: float
    child: bool | None = None

    @cached_property
    def fit(self) -> Fit:
        """Where the skull lies."""
        return fit_to_atlas(self.stack, self.spacing_mm)


def patients_of(data: Path, source: str, held_out: bool) -> list[str]:
    """Names of the training patients of a real set, or of those kept from training; none where the set is absent."""
    folder, patients, _ = readers.SETS[source]
    if not (data / folder).exists():
        return []
    return [name for i, name in enumerate(patients(data / folder)) if (i % 3 not in TRAINED_ON[source]) == held_out]


def read_patient(data: Path, source: str, name: str) -> Patient:
    """One patient of a real set."""
    folder, _, read = readers.SETS[source]
    labelled = read(data / folder, name)
    volume = labelled.volume
    return Patient(name, volume.hounsfield, volume.slice_spacing_mm, volume.pixel_spacing_mm[0], labelled.child)


def draw_real(patient: Patient, rng: np.random.Generator) -> Sample:
    """Eight slices of a real head in one of three planes: turned, cropped and moved, half of them with contrast."""
    depth = len(patient.stack)
    orientation = str(rng.choice(["axial", "coronal", "sagittal"], p=[0.84, 0.08, 0.08]))
    fit = patient.fit
    field = max(fit.back - fit.front, fit.right - fit.left) * rng.uniform(1.12, 1.6)
    ramp = ((np.arange(PROTOCOL_IN_PLANE, dtype=np.float32) + 0.5) / PROTOCOL_IN_PLANE - 0.5) * np.float32(field)
    down, right = np.meshgrid(ramp, ramp, indexing="ij")
    angle = np.radians(np.clip(rng.normal(0, 9), -28, 28))
    down, right = (
        (np.cos(angle) * down + np.sin(angle) * right).astype(np.float32),
        (np.cos(angle) * right - np.sin(angle) * down).astype(np.float32),
    )
    if rng.random() < 0.5:
        right = -right
    middle = np.array([(fit.front + fit.back) / 2, (fit.left + fit.right) / 2]) + rng.normal(0, 0.03 * field, 2)
    per_slice = patient.spacing_mm / patient.pixel_mm  # in-plane pixels that one slice spans
    index = np.empty((3, PROTOCOL_SLICES, PROTOCOL_IN_PLANE, PROTOCOL_IN_PLANE), np.float32)
    if orientation == "axial":
        low = 0.0 if rng.random() < 0.5 else rng.uniform(0, 0.25)
        high = 1.0 if rng.random() < 0.6 else rng.uniform(0.75, 1)
        chunks = int(rng.integers(1, 5))
        picks = np.linspace(low * (depth - 1), high * (depth - 1), PROTOCOL_SLICES * chunks)
        index[0] = picks[rng.integers(chunks) :: chunks].round()[:, None, None]
        index[1], index[2] = middle[0] + down, middle[1] + right
    else:
        across = np.linspace(-0.42, 0.42, PROTOCOL_SLICES) * rng.uniform(0.6, 1)
        height = fit.top - 75 / patient.spacing_mm + down / np.float32(per_slice) * -1
        index[0] = height
        span, fixed, free = (fit.back - fit.front, 1, 2) if orientation == "coronal" else (fit.right - fit.left, 2, 1)
        centre = {1: middle[0], 2: middle[1]}
        index[fixed] = (centre[fixed] + across * span)[:, None, None]
        index[free] = centre[free] + right
    image = _lookup(patient.stack, index, AIR_HOUNSFIELD)
    contrast = "non_contrast"
    if rng.random() < 0.42:
        contrast = "contrast"
        image += _painted(patient, image, index, rng)
    return Sample(
        image=np.rint(image).astype(np.int16),
        contrast=contrast,
        orientation=orientation,
        region="head",
        pixel_mm=float(field * patient.pixel_mm / PROTOCOL_IN_PLANE),
        thickness_mm=patient.spacing_mm,
        real=True,
    )


def _lookup(grid: NDArray[np.int16 | np.float32], index: Float, outside: float) -> Float:
    out = np.empty(index.shape[1:], np.float32)
    for i in range(len(out)):
        ndimage.map_coordinates(grid, index[:, i], out[i], order=1, mode="constant", cval=outside, prefilter=False)
    return out


def _painted(patient: Patient, image: Float, index: Float, rng: np.random.Generator) -> Float:
    """Contrast for the sampled planes: the atlas' vessels where the patient's skull says they should be."""
    fit = patient.fit
    jitter = rng.normal(0, 4, 3).astype(np.float32)
    at = np.empty_like(index)
    at[0] = 86 - (fit.top - index[0]) * patient.spacing_mm
    at[1] = (index[1] - fit.front) / (fit.back - fit.front) * 194 - 82
    at[2] = (index[2] - fit.left) / (fit.right - fit.left) * 156 - 78
    for axis in range(3):
        at[axis] += jitter[axis] - np.float32(HEAD_ORIGIN[axis])
    arteries, veins = _lookup(atlas().arteries, at, 0), _lookup(atlas().veins, at, 0)
    return iodine(rng, image, arteries, veins, _lookup(atlas().depth, at, 50) < 0)


# --- from clean slices to training samples ---------------------------------------------------------------------------


def finish(sample: Sample, kernel: str, rng: np.random.Generator) -> NDArray[np.int16]:
    """Apply a kernel, its noise, and what scanners, archives and exports do to Hounsfield units."""
    image = sample.image.astype(np.float32)
    thickness = max(sample.thickness_mm, 0.75)
    already = 0.6 if sample.real else 1.0  # real slices bring noise of their own
    soft = kernel == "soft"
    low_dose = rng.random() < 0.15
    level = rng.uniform(1.2, 8 if low_dose else 5) * already if soft else rng.uniform(9, 45)
    image = develop(
        image,
        Acquisition(
            orientation=sample.orientation,
            kernel=kernel,
            matrix=PROTOCOL_IN_PLANE,
            field_mm=sample.pixel_mm * PROTOCOL_IN_PLANE,
            thickness_mm=thickness,
            noise=float(level * (5 / thickness) ** rng.uniform(0.25, 0.5)),
            blur_mm=float(rng.uniform(0, 0.8)) if soft else 0.0,
            sharpen=0.0 if soft else float(rng.uniform(0.2, 2.0)),
            streaks=float(rng.uniform(0, 8)),
        ),
        rng,
    )
    if soft and rng.random() < 0.25:  # mild edge enhancement of ordinary head kernels
        image += rng.uniform(0.1, 0.4) * (image - ndimage.uniform_filter(image, (0, 3, 3)))
    inside = image > -500
    image[inside] = image[inside] * rng.uniform(0.97, 1.03) + rng.normal(0, 2.5)
    if rng.random() < 0.25:  # outside the reconstruction circle
        ramp = np.linspace(-1, 1, PROTOCOL_IN_PLANE, dtype=np.float32)
        image[:, ramp[:, None] ** 2 + ramp[None, :] ** 2 > 1] = AIR_HOUNSFIELD
    if rng.random() < 0.12:  # 8-bit exports and clipped archives
        image = np.clip(image, *((-20, 100), (-1000, 1000), (0, 3071), (-200, 2000), (-20, 100))[rng.integers(5)])
        if rng.random() < 0.5:
            image[image <= -19] = AIR_HOUNSFIELD
    image = np.clip(np.rint(image), AIR_HOUNSFIELD, rng.choice([3071, 3071, 8000]))
    if rng.random() < 0.5:
        image = image[:, :, ::-1]
    if sample.orientation != "axial" and rng.random() < 0.5:  # reformats come in either order
        image = image[::-1]
    return np.ascontiguousarray(image).astype(np.int16)


Batch = tuple[NDArray[np.int16], dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]


class Drawable(Protocol):
    """A series from which training samples are drawn: a `Sample` or a `SiteSeries`."""

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """Eight slices, (8, 256, 256), and the labels that are known, by head."""


class Source:
    """All training series by kind; `batch(i)` draws the batch of step i from the seed and i alone."""

    def __init__(
        self,
        pools: Mapping[str, Sequence[Drawable]],
        heads: Heads = TRIAGE_HEADS,
        shares: Mapping[str, float] = SHARES,
        seed: int = SEED,
        batch: int = BATCH,
    ) -> None:
        """`shares` says how often each kind is drawn from; kinds without series are left out."""
        self.pools, self.heads, self.seed, self.size = pools, heads, seed, batch
        self.kinds = [kind for kind in shares if pools.get(kind)]
        of_kinds = np.array([shares[kind] for kind in self.kinds])
        self.shares = of_kinds / of_kinds.sum()

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """One training sample: eight slices and the label of each head, None where undefined."""
        pool = self.pools[str(rng.choice(self.kinds, p=self.shares))]
        return pool[int(rng.integers(len(pool)))].draw(rng)

    def batch(self, step: int) -> Batch:
        """Volumes (B, 8, 256, 256), one-hot labels and weights by head; weight 0 where a label is undefined."""
        drawn = [self.sample(np.random.default_rng((self.seed, 99, step, k))) for k in range(self.size)]
        targets = {name: np.zeros((self.size, len(head.classes)), np.float32) for name, head in self.heads.items()}
        weights = {name: np.zeros(self.size, np.float32) for name in self.heads}
        for row, (_, known) in enumerate(drawn):
            for name, head in self.heads.items():
                if (label := known.get(name)) in head.classes:
                    targets[name][row, head.classes.index(label)] = 1
                    weights[name][row] = 1
        return np.stack([volume for volume, _ in drawn]), targets, weights


# --- training --------------------------------------------------------------------------------------------------------


class Plan(msgspec.Struct, frozen=True):
    """What a training run is made of, besides its series; a run is taken up again only with the same plan."""

    heads: dict[str, Head]
    channels: tuple[int, ...] = ()  # of the stages, where they are not those of the start or the default
    cycles: tuple[tuple[int, float], ...] = CYCLES
    seed: int = SEED
    start: str = ""  # weights from which it was fine-tuned
    series: str = ""  # where they came from

    @property
    def steps(self) -> int:
        """Of all cycles."""
        return sum(steps for steps, _ in self.cycles)


def train(
    source: Source,
    weights: Path,
    plan: Plan,
    save_every: int = SAVE_EVERY,
    console: Console | None = None,
) -> None:
    """Train by AdamW, and write the weights and their description.

    Every `save_every` steps, all that the next one depends on is saved beside the weights, and a run that was cut short
    goes on from there. Raises ConfigError where the plan of that run was another.
    """
    import keras  # type: ignore[import-untyped]
    import tensorflow as tf  # type: ignore[import-untyped]

    from serving.protocol import SIZES, Description, build, describe, fine_tunable, write_description
    from serving.unfinished import UnfinishedRun

    console = console or Console(stderr=True)
    with suppress(RuntimeError):  # TensorFlow was already at work in this process
        tf.config.threading.set_intra_op_parallelism_threads(WORKERS)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    # saves no time here, and TensorFlow 2.21's fails now and then: the same run would round otherwise
    tf.config.optimizer.set_experimental_options({"remapping": False})
    keras.utils.set_random_seed(plan.seed)
    if plan.start:
        model, kept = fine_tunable(Path(plan.start), plan.heads)
        sizes = describe(Path(plan.start)).sizes
        anew = [name for name in plan.heads if name not in kept]
        console.print(f"kept of {plan.start}: {', '.join(['trunk', *kept])}; begun anew: {', '.join(anew) or 'none'}")
    else:
        sizes = msgspec.structs.replace(SIZES, channels=plan.channels) if plan.channels else SIZES
        model = build(plan.heads, sizes)
    model.compile(
        optimizer=keras.optimizers.AdamW(_rate(plan.cycles), weight_decay=WEIGHT_DECAY, clipnorm=1.0),
        loss={name: keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING) for name in plan.heads},
        loss_weights={name: head.loss_weight for name, head in plan.heads.items()},
        weighted_metrics={name: [keras.metrics.CategoricalAccuracy(name="accuracy")] for name in plan.heads},
        jit_compile=False,  # XLA is slower than oneDNN on a CPU
    )
    model.optimizer.build(model.trainable_variables)
    recipe: Mapping[str, object] = json.loads(msgspec.json.encode(plan))
    run = UnfinishedRun(weights, recipe, [*model.variables, *model.optimizer.variables])
    if run.resume():
        console.print(f"going on after step {run.done} of {plan.steps}")
    with progress_bar() as bar:
        task = bar.add_task("training", total=plan.steps, completed=run.done)
        while run.done < plan.steps:
            count = min(save_every, plan.steps - run.done)
            told = model.fit(_batches(source, run.done, count), epochs=1, shuffle=False, verbose=0).history
            run.save(run.done + count, told["loss"][-1])
            accuracy = ", ".join(f"{name} {told[_metric(told, name)][-1]:.2f}" for name in plan.heads)
            bar.console.print(f"step {run.done}: loss {told['loss'][-1]:.3f}, accuracy: {accuracy}")
            bar.update(task, completed=run.done)
    bare = build(plan.heads, sizes)  # without the optimizer's variables
    bare.set_weights(model.get_weights())
    weights.parent.mkdir(parents=True, exist_ok=True)
    bare.save_weights(weights)
    write_description(weights, Description(dict(plan.heads), sizes))
    run.finish()


def _rate(cycles: Sequence[tuple[int, float]]) -> Any:
    """One warm-up and cosine after another."""
    import keras

    class Cycles(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
        def __call__(self, step: Any) -> Any:
            rate, first = 0.0, 0
            for steps, peak in cycles:
                decay = keras.optimizers.schedules.CosineDecay(
                    peak / 10, steps - steps // 20, 0.01, warmup_target=peak, warmup_steps=steps // 20
                )
                rate = keras.ops.where(step >= first, decay(step - first), rate)
                first += steps
            return rate

        def get_config(self) -> dict[str, Any]:
            return {"cycles": cycles}

    return Cycles()


def _metric(told: Mapping[str, Any], name: str) -> str:
    """Keras leaves the name of an only output out."""
    return f"{name}_accuracy" if f"{name}_accuracy" in told else "accuracy"


def _batches(source: Source, first: int, steps: int) -> Any:
    """Batches `first` to `first + steps` as Keras reads them, drawn in a thread ahead of the training."""
    import keras

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return steps

        def __getitem__(self, step: int) -> Batch:
            return source.batch(first + step)

    return Batches(workers=1, max_queue_size=6)


# --- evaluation ------------------------------------------------------------------------------------------------------

HEAD_SCAN = {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}
DICOM_SERIES: Mapping[str, Mapping[str, str]] = {
    "ge-head": HEAD_SCAN,
    "philips-phantom/soft-5mm": {"orientation": "axial", "kernel": "soft", "region": "head"},
    "philips-phantom/bone-1mm": {"orientation": "axial", "kernel": "bone", "region": "head"},
    "lidc-body": {"orientation": "axial", "region": "other"},
}
EVALUATION_SETS = ("dicom", *readers.SETS, "simulated")
Predict = Callable[[NDArray[np.int16]], Mapping[str, NDArray[np.float32]]]


def scorer(weights: Path) -> Predict:
    """The trained model as a function of int16 (B, 8, 256, 256): softmaxes (B, C) by head, not calibrated."""
    from serving.protocol import load

    model = load(weights)
    return lambda batch: {name: np.asarray(scores) for name, scores in model.predict_on_batch(batch).items()}


def predictor(weights: Path) -> Predict:
    """As `scorer`, but calibrated, and the chunks of one series made one: (C,) by head, as the node has it."""
    from serving.protocol import describe

    score, described = scorer(weights), describe(weights)

    def predict(batch: NDArray[np.int16]) -> Mapping[str, NDArray[np.float32]]:
        return {
            name: aggregate(
                tempered(scores, described.calibration.temperature.get(name, 1.0)), described.heads[name].aggregation
            )
            for name, scores in score(batch).items()
        }

    return predict


Evaluated = tuple[str, str, Volume, Mapping[str, str], bool | None, Claim | None]
"""Set, name, volume, labels where known, child, claim of the header."""


def site_sets(site: Sequence[SiteSeries], aside_only: bool = False) -> Iterator[Evaluated]:
    """A site's own series, those kept aside first."""
    training, aside = held_out(site)
    for group, series in (("site, held out", aside), ("site, trained on", () if aside_only else training)):
        for one in series:
            labels = {name: label for name, label in one.row.labels.items() if label is not None}
            volume, _ = one.row.volume()
            yield group, f"{one.patient} line {one.row.line}", volume, labels, None, None


def evaluation_sets(data: Path, sets: Sequence[str], aside_only: bool = False) -> Iterator[Evaluated]:
    """Everything in `sets`, or only what of it was kept from training; labels only where known."""
    for name, labels in DICOM_SERIES.items():
        files = sorted((data / name).glob("*.dcm"))
        if files and "dicom" in sets:
            datasets = read_datasets(files)
            volume = volume_from_datasets(datasets)
            yield "dicom", name, volume, labels, None, header_claim(datasets[0], volume.orientation)
    for source in [source for source in readers.SETS if source in sets]:
        for aside in (True,) if aside_only else (True, False):
            for name in patients_of(data, source, aside):
                patient = read_patient(data, source, name)
                positions = np.arange(len(patient.stack)) * np.float64(patient.spacing_mm)
                volume = Volume(patient.stack, positions, (patient.pixel_mm, patient.pixel_mm))
                group = f"{source}, {'held out' if aside else 'trained on'}"
                yield group, patient.name, volume, HEAD_SCAN, patient.child, None
    for i in range(HELD_OUT_SUBJECTS if "simulated" in sets else 0):
        # our own writer's headers would be right by construction
        yield "simulated, held out", str(i), *_simulated(i), None, None


def _simulated(i: int, first: int = EVALUATION_SEED) -> tuple[Volume, Mapping[str, str]]:
    """The i-th simulated series for evaluation or, by another `first` seed, calibration; training uses neither."""
    rng = np.random.default_rng((SEED, 12345, i) if first == EVALUATION_SEED else (SEED, first, i))
    region = "head" if i % 4 else str(rng.choice(OTHER_REGIONS))
    series = simulate(
        first + i,
        region=region,
        contrast=str(rng.choice(["non_contrast", str(rng.choice(CONTRAST_PHASES))])),
        orientation=("axial", "axial", "coronal", "sagittal")[(i // 4) % 4],
        kernel=("soft", "bone")[i % 2],
        slices=16,
        matrix=512,
    )
    labels = dict(series.labels)
    if region != "head":
        labels.pop("contrast")
    if region in PLANELESS:
        labels.pop("orientation")
    return series.volume, labels


def evaluate(
    predict: Predict,
    data: Path,
    sets: Sequence[str],
    console: Console,
    heads: Heads = TRIAGE_HEADS,
    site: Sequence[SiteSeries] = (),
) -> list[Case]:
    """Print every DICOM series and every wrong decision, then right ones by set and head; returns all as cases.

    A label that a head does not know, as of a body part, is not counted.
    """
    right: dict[str, dict[str, list[float]]] = {}
    cases: list[Case] = []
    for group, name, volume, known, child, claim in chain(site_sets(site), evaluation_sets(data, sets)):
        labels = {h: label for h, label in known.items() if h in heads and label in heads[h].classes}
        if not labels:
            continue
        batch = protocol_batch(volume)
        answer = predict(batch)
        cases += _cases(group, name, volume, labels, child, claim, answer, _overview(batch[0]), heads)
        told, wrong = [], False
        for head, classes in ((h, head.classes) for h, head in heads.items()):
            best = int(np.argmax(answer[head]))
            told.append(f"{classes[best]} {answer[head][best]:.2f}")
            if head in labels:
                hit = classes[best] == labels[head]
                wrong |= not hit
                sure = float(answer[head][classes.index(labels[head])])
                right.setdefault(group, {}).setdefault(head, []).append(sure if hit else -sure)
                told[-1] += "" if hit else f" (WRONG: {labels[head]})"
        if wrong or group == "dicom":
            console.print(f"{group} {name}: {', '.join(told)}")
    table = Table("set", "head", "right", "95 % Wilson interval", "above 0.75", title="decisions of the protocol model")
    for group, of_heads in right.items():
        for head, outcomes in of_heads.items():
            k, n = sum(v > 0 for v in outcomes), len(outcomes)
            _, low, high = wilson(k, n)
            table.add_row(group, head, f"{k}/{n}", f"{low:.3f} to {high:.3f}", f"{sum(v > 0.75 for v in outcomes)}/{n}")
    console.print(table)
    return cases


def _cases(
    group: str,
    name: str,
    volume: Volume,
    labels: Mapping[str, str],
    child: bool | None,
    claim: Claim | None,
    answer: Mapping[str, NDArray[np.float32]],
    overview: bytes,
    heads: Heads,
) -> list[Case]:
    """One series as a case of each head whose label is known."""
    patient, _, row = name.partition(" line ")
    return [
        Case(
            task=head,
            source=name.partition("/")[0] if group == "dicom" else group,  # a head and a phantom are no set
            patient=patient,
            name=row,
            truth=labels[head],
            probability=dict(zip(classes, answer[head].tolist(), strict=True)),
            unit="series",
            simulated=group.startswith("simulated"),
            trained_on=group.endswith("trained on"),
            child=child,
            kernel=labels.get("kernel", "") if head != "kernel" else "",
            thickness_mm=volume.slice_spacing_mm,
            header=None if claim is None or head not in claim else claim[head] or "",
            picture=overview,
            picture_shows="eight slices, window 40/400",
        )
        for head, classes in ((name, head.classes) for name, head in heads.items())
        if head in labels
    ]


def calibrate(
    score: Predict, weights: Path, data: Path, site: Sequence[SiteSeries], series: int, console: Console
) -> None:
    """Fit a temperature for each head on series that training never saw, and store it beside the weights.

    Log loss and calibration error are those of temperatures fitted without the series that they are measured on.
    Real and simulated sets weigh the same. A head with fewer than `LEAST` series, or of a single class, keeps 1, and so
    does one whose log loss is not lower for it.
    """
    from serving.protocol import Calibration, describe, write_description

    described = describe(weights)
    cases: dict[str, list[Scored]] = {name: [] for name in described.heads}
    counts: dict[str, int] = {}
    with progress_bar() as bar:
        real = chain(site_sets(site, aside_only=True), evaluation_sets(data, tuple(readers.SETS), aside_only=True))
        simulated = (("simulated", str(i), *_simulated(i, CALIBRATION_SEED), None, None) for i in range(series))
        for group, _, volume, labels, _, _ in bar.track(chain(real, simulated), total=None, description="scoring"):
            scores = score(protocol_batch(volume))
            counts[group] = counts.get(group, 0) + 1
            for name, head in described.heads.items():
                if (label := labels.get(name)) in head.classes:
                    cases[name].append(Scored(scores[name], head.classes.index(label), group))
    temperature, measured = {}, {}
    table = Table(
        "head", "series", "temperature", "log loss", "calibration error", "", title="before, after out of fold"
    )
    for name, head in described.heads.items():
        of_head, how = cases[name], head.aggregation
        if len(of_head) < LEAST or len({case.truth for case in of_head}) < 2:
            table.add_row(name, str(len(of_head)), "1", "", "", "too few series, or of one class")
            continue
        fitted = fit_temperature(of_head, how)
        before = measure(of_head, [1.0] * len(of_head), how)
        after = measure(of_head, out_of_fold(of_head, how), how)
        kept = after.log_loss < before.log_loss
        if kept:
            temperature[name] = fitted
        measured[name] = {"fitted": fitted, "kept": kept, "before": asdict(before), "after": asdict(after)}
        table.add_row(
            name,
            str(before.series),
            f"{fitted:.2f}" if kept else "1",
            f"{before.log_loss:.4f}, {after.log_loss:.4f}",
            f"{before.calibration_error:.4f}, {after.calibration_error:.4f}",
            "" if kept else f"{fitted:.2f} would not be better",
        )
    console.print(table)
    obtained = ", ".join(f"{count} {group.partition(',')[0]}" for group, count in counts.items())
    calibration = Calibration(temperature, f"{obtained} series kept from training", measured)
    write_description(weights, msgspec.structs.replace(described, calibration=calibration))


def _overview(chunk: NDArray[np.int16]) -> bytes:
    """The eight slices that the model saw at once, three in a row."""
    tiles = np.full((9, PROTOCOL_IN_PLANE // 2, PROTOCOL_IN_PLANE // 2), AIR_HOUNSFIELD, np.int16)
    tiles[:PROTOCOL_SLICES] = chunk[:, ::2, ::2]
    return picture(np.block([list(row) for row in tiles.reshape(3, 3, *tiles.shape[1:])]), center=40, width=400)


def progress_bar() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def main(argv: Sequence[str]) -> int:
    """Train the protocol model, calibrate it, or evaluate its weights."""
    try:
        return _main(_options(argv))
    except (ConfigError, SignatureMismatch) as error:
        print(error, file=sys.stderr)
        return 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.train protocol", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data sets")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for prepared series")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="weights to write, to calibrate or to evaluate")
    parser.add_argument("--heads", type=Path, help="TOML of heads and classes (default: those of triage)")
    parser.add_argument(
        "--labels", type=Path, help="CSV of your own series: path, patient and columns named after heads"
    )
    parser.add_argument(
        "--site-share", type=float, default=1.0, help="of samples from --labels; others are the built-in"
    )
    parser.add_argument("--start", type=Path, help="weights to fine-tune; heads with other classes begin anew")
    parser.add_argument("--steps", type=int, help=f"of one cycle (default: {len(CYCLES)} cycles, {STEPS} steps)")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of --steps")
    parser.add_argument("--channels", type=int, nargs="+", help="of each stage (default: those of the shipped model)")
    parser.add_argument("--seed", type=int, default=SEED, help="same seed, same series: same weights")
    parser.add_argument("--prepare", action="store_true", help="only prepare the training series")
    parser.add_argument("--calibrate", action="store_true", help="only fit a temperature for each head of --weights")
    parser.add_argument(
        "--simulate", type=int, default=CALIBRATION_SUBJECTS, help="simulated series to calibrate on, besides real ones"
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate")
    parser.add_argument(
        "--report", type=Path, default=CACHE / "report.html", help="page of the evaluation, pictures too"
    )
    parser.add_argument(
        "--sets", nargs="*", choices=EVALUATION_SETS, help="what to evaluate on (default: all, none beside --labels)"
    )
    options = parser.parse_args(argv)
    if options.start and options.channels:
        parser.error("--channels are those of --start: leave one of the two out")
    if not 0 < options.site_share <= 1:
        parser.error("--site-share is above 0 and at most 1")
    if options.sets is None:
        options.sets = () if options.labels else EVALUATION_SETS
    return options


def _main(options: argparse.Namespace) -> int:
    from serving.protocol import describe

    console = Console(width=140)
    training = not (options.evaluate or options.calibrate)
    check_report_path(options.report)  # now, and not after an hour
    heads = read_heads(options.heads or HEADS_FILE) if training else dict(describe(options.weights).heads)
    rows = read_labels(options.labels, heads) if options.labels else []
    site = prepare_site(rows, options.cache / "site") if rows else []
    if training:
        series, _ = held_out(site)
        pools: dict[str, Sequence[Drawable]] = {"site": series}
        shares = {"site": options.site_share, **{k: v * (1 - options.site_share) for k, v in SHARES.items()}}
        if not site:
            shares = dict(SHARES)
        built_in = not site or options.site_share < 1
        unknown = [name for name in heads if not _labelled(name, heads, site, built_in)]
        if unknown:
            raise ConfigError(f"no series tells {', '.join(unknown)}; add a column of that name to the CSV of --labels")
        if built_in:
            pools |= prepare(options.cache, options.data)
        if options.prepare:
            return 0
        plan = Plan(
            heads=heads,
            channels=tuple(options.channels or ()),
            cycles=((options.steps, options.rate),) if options.steps else CYCLES,
            seed=options.seed,
            start=str(options.start or ""),
            series=_described(options, site),
        )
        train(Source(pools, heads, shares, options.seed), options.weights, plan)
    if options.calibrate:
        calibrate(scorer(options.weights), options.weights, options.data, site, options.simulate, console)
        return 0
    cases = evaluate(predictor(options.weights), options.data, options.sets, console, heads, site)
    about = {"Weights": options.weights.name, "Sets": ", ".join([*(["site"] if site else []), *options.sets])}
    write_report(options.report, *report(cases, "Protocol: evaluation", about))
    console.print(f"figures with pictures, not to be committed where they are of patients: {options.report}")
    return 0


def _labelled(name: str, heads: Heads, site: Sequence[SiteSeries], built_in: bool) -> bool:
    """Whether some training series has a label of a head."""
    known = name in TRIAGE_HEADS and set(TRIAGE_HEADS[name].classes) & set(heads[name].classes)
    return (built_in and bool(known)) or any(one.row.labels.get(name) for one in site)


def _described(options: argparse.Namespace, site: Sequence[SiteSeries]) -> str:
    """Which series a run draws from, so that it is not taken up again with others."""
    known = [(one.patient, one.pixels.name, dict(one.row.labels)) for one in site]
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    return f"site {digest}, share {options.site_share}" if site else "built-in"

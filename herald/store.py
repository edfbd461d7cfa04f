"""The study store: DICOM Part 10 files and predictions under one folder, durable.

Layout: `ROOT/STUDY/SERIES/SOP_INSTANCE.dcm` and `ROOT/STUDY/SERIES/predictions/REVISION.npz`. Files are the truth; the
ledger's index of them can be rebuilt. A file is written under a temporary name, fsynced, renamed, and its folder is
fsynced: a name without the temporary suffix is whole whatever happened.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from herald.config import StoreConfig
from herald.errors import DicomError, StoreError, StoreFullError

TEMPORARY_SUFFIX = ".partial"
INSTANCE_SUFFIX = ".dcm"
_UID = re.compile(r"[0-9][0-9.]{0,63}")  # PS3.5 9.1, with leading zeros tolerated


@dataclass(frozen=True)
class StoredInstance:
    """Where one instance lies, the SHA-256 of the whole file, and whether this write made the file."""

    path: Path
    sha256: str
    size_bytes: int
    new: bool
    conflict: bool
    """The same SOP Instance UID was stored before with other bytes; both are kept."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the haemorrhage model saw and said of one series revision.

    `hounsfield` (D, 256, 256) int16; `mask` (D, 256, 256, C) uint8, probability x 255; `slice_probability` (D, C);
    `probability` (C,); `placement` (5,) top, left, side, rows, columns of `herald.volume.Placement`; `first_source` and
    `last_source` (D,) 0-based original slices that each model slice averages; `sop_instance_uids` (D,);
    `pixel_spacing_mm` (2,) of the original matrix.
    """

    hounsfield: NDArray[np.int16]
    mask: NDArray[np.uint8]
    slice_probability: NDArray[np.float32]
    probability: NDArray[np.float32]
    placement: NDArray[np.int64]
    first_source: NDArray[np.int64]
    last_source: NDArray[np.int64]
    sop_instance_uids: NDArray[np.str_]
    pixel_spacing_mm: NDArray[np.float64]


class StudyStore:
    """Part 10 files by study, series and instance; every method raises StoreError when the disk refuses."""

    def __init__(self, config: StoreConfig) -> None:
        self.root = config.root
        self._min_free_bytes = int(config.min_free_gb * 1e9)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the store {self.root}: {error.strerror}; check store.root") from error

    def require_space(self) -> None:
        """Raise StoreFullError when less disk is free than `store.min_free_gb`."""
        free = self.free_bytes()
        if free < self._min_free_bytes:
            raise StoreFullError(
                f"{free / 1e9:.1f} GB free under {self.root}, the watermark is {self._min_free_bytes / 1e9:.1f} GB; "
                "free disk space or lower store.min_free_gb"
            )

    def free_bytes(self) -> int:
        """Bytes free on the store's disk."""
        try:
            return shutil.disk_usage(self.root).free
        except OSError as error:
            raise StoreError(f"cannot read the store {self.root}: {error.strerror}; check store.root") from error

    def series_folder(self, study_instance_uid: str, series_instance_uid: str) -> Path:
        """The folder of one series; raises DicomError when a UID is none, so that no path leaves the root."""
        for keyword, uid in (("StudyInstanceUID", study_instance_uid), ("SeriesInstanceUID", series_instance_uid)):
            _require_uid(keyword, uid)
        return self.root / study_instance_uid / series_instance_uid

    def write_instance(
        self,
        study_instance_uid: str,
        series_instance_uid: str,
        sop_instance_uid: str,
        parts: Iterable[bytes | memoryview],
    ) -> StoredInstance:
        """Write one Part 10 file durably from its consecutive parts.

        The same bytes again change nothing; other bytes under the same UID are kept beside the first, flagged.
        """
        _require_uid("SOPInstanceUID", sop_instance_uid)
        folder = self.series_folder(study_instance_uid, series_instance_uid)
        pieces = [memoryview(part) for part in parts]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        sha256, size = digest.hexdigest(), sum(piece.nbytes for piece in pieces)
        path = folder / (sop_instance_uid + INSTANCE_SUFFIX)
        try:
            conflict = False
            if path.exists():
                if _same(path, size, sha256):
                    return StoredInstance(path, sha256, size, new=False, conflict=False)
                conflict = True
                path = folder / f"{sop_instance_uid}.{sha256[:16]}{INSTANCE_SUFFIX}"
                if path.exists():
                    return StoredInstance(path, sha256, size, new=False, conflict=True)
            self._make_folder(folder)
            _write_durably(path, pieces)
        except OSError as error:
            raise StoreError(f"cannot write {path.name} under {self.root}: {error.strerror}") from error
        return StoredInstance(path, sha256, size, new=True, conflict=conflict)

    def series_paths(self, study_instance_uid: str, series_instance_uid: str) -> list[Path]:
        """The instance files of one series, by name."""
        folder = self.series_folder(study_instance_uid, series_instance_uid)
        return sorted(path for path in folder.glob("*" + INSTANCE_SUFFIX))

    def all_instances(self) -> Iterator[Path]:
        """Every instance file of the store."""
        yield from sorted(self.root.glob("*/*/*" + INSTANCE_SUFFIX))

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of writes that never finished and so were never acknowledged."""
        yield from self.root.glob("*/*/*" + TEMPORARY_SUFFIX)

    def prediction_path(self, study_instance_uid: str, series_instance_uid: str, revision: int) -> Path:
        """Where the prediction of one series revision lies."""
        return self.series_folder(study_instance_uid, series_instance_uid) / "predictions" / f"{revision}.npz"

    def write_prediction(
        self, study_instance_uid: str, series_instance_uid: str, revision: int, prediction: Prediction
    ) -> Path:
        """Write the prediction durably, replacing an earlier one of the same revision."""
        path = self.prediction_path(study_instance_uid, series_instance_uid, revision)
        try:
            self._make_folder(path.parent)
            with tempfile.SpooledTemporaryFile(max_size=1 << 28) as buffer:
                # not compressed: the page would wait half a second for it
                np.savez(buffer, **{f.name: getattr(prediction, f.name) for f in fields(Prediction)})
                buffer.seek(0)
                _write_durably(path, [memoryview(buffer.read())])
        except OSError as error:
            raise StoreError(f"cannot write the prediction {path}: {error.strerror}") from error
        return path

    def read_prediction(self, study_instance_uid: str, series_instance_uid: str, revision: int) -> Prediction | None:
        """The prediction of one series revision, or None when there is none."""
        path = self.prediction_path(study_instance_uid, series_instance_uid, revision)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Prediction(**{f.name: arrays[f.name] for f in fields(Prediction)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"cannot read the prediction {path}: {error}") from error

    def _make_folder(self, folder: Path) -> None:
        """Create the folder with every missing parent durable down to the root."""
        missing = []
        parent = folder
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            _sync_folder(path.parent)


def _require_uid(keyword: str, uid: str) -> None:
    if not _UID.fullmatch(uid):
        raise DicomError(f"{keyword} {uid!r} is not a UID (PS3.5 9.1); the sender must give one")


def _same(path: Path, size: int, sha256: str) -> bool:
    if path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _write_durably(path: Path, pieces: Iterable[memoryview]) -> None:
    descriptor, name = tempfile.mkstemp(suffix=TEMPORARY_SUFFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The study store: DICOM Part 10 files and predictions under one folder, durable.

Layout: `ROOT/STUDY/SERIES/SOP_INSTANCE.dcm` and `ROOT/STUDY/SERIES/predictions/REVISION.npz`. Files are the truth; the
ledger's index of them can be rebuilt. A file is written in `ROOT/incoming` while it comes, fsynced, renamed to its
place, and the folder is fsynced: a file in its place is whole whatever happened.
"""

import hashlib
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from herald.config import StoreConfig
from herald.errors import DicomError, StoreError, StoreFullError

log = logging.getLogger(__name__)

INCOMING = "incoming"
TEMPORARY_SUFFIX = ".partial"
LOOK_EVERY_S = 0.5
"""How often the disk is asked for its free space; what is written in between is far below any watermark."""
INSTANCE_SUFFIX = ".dcm"
_BLOCK_BYTES = 1 << 20
_SMALL_BYTES = 1 << 22
_TAG_LENGTH = 16  # hexadecimal digits that tell instances of one UID apart
_UID = re.compile(r"[0-9][0-9.]{0,63}")  # PS3.5 9.1, with leading zeros tolerated


@dataclass(frozen=True)
class StoredInstance:
    """Where one instance lies, and whether this write made the file."""

    path: Path
    size_bytes: int
    new: bool
    conflict: bool
    """The same SOP Instance UID was stored before with other bytes; both are kept."""

    @cached_property
    def sha256(self) -> str:
        """Of the whole file; taken when it is first asked for, so that no sender waits for it."""
        return file_sha256(self.path)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the haemorrhage model saw and said of one series revision, of N rows and columns.

    `hounsfield` (D, N, N) int16; `mask` (D, N, N, C) uint8, probability x 255; `slice_probability` (D, C);
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
        self._incoming = self.root / INCOMING
        self.placing = threading.RLock()
        """Held while a file changes its place, so that nobody removes the folder of a study to which one is added."""
        self._in_flight: dict[str, int] = defaultdict(int)
        self._looked_at, self._free_bytes = -math.inf, 0
        try:
            self._incoming.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot create the store {self.root}: {error.strerror}; check store.root") from error

    def require_space(self) -> None:
        """Raise StoreFullError when less disk is free than `store.min_free_gb`, as of half a second ago."""
        now = time.monotonic()
        if now > self._looked_at + LOOK_EVERY_S:
            self._looked_at, self._free_bytes = now, self.free_bytes()
        free = self._free_bytes
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
        _require_uids(study_instance_uid, series_instance_uid)
        return self.root / study_instance_uid / series_instance_uid

    def receive(self) -> "IncomingInstance":
        """A new file to write an instance to while it comes; it counts for nothing until it is placed."""
        try:
            return IncomingInstance(self._incoming)
        except OSError as error:
            raise self._unwritable("a new instance", error) from error

    @contextmanager
    def place(
        self, incoming: "IncomingInstance", study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str
    ) -> Iterator[StoredInstance]:
        """Make a received file durable in its place; inside the block its study counts as in flight.

        The same data set again changes nothing; another one under the same UID is kept beside the first, flagged.
        """
        _require_uids(study_instance_uid, series_instance_uid, sop_instance_uid)
        folder = f"{self.root}/{study_instance_uid}/{series_instance_uid}"
        try:
            incoming.flush()
            with self.placing:
                stored = self._into_place(incoming, folder, sop_instance_uid)
                self._in_flight[study_instance_uid] += 1
        except OSError as error:
            raise self._unwritable(sop_instance_uid, error) from error
        try:
            try:
                sync_folder(folder)  # of a repetition too: the first may still be on its way over another association
            except OSError as error:
                raise self._unwritable(sop_instance_uid, error) from error
            yield stored
        finally:
            with self.placing:
                self._in_flight[study_instance_uid] -= 1
                if not self._in_flight[study_instance_uid]:
                    del self._in_flight[study_instance_uid]

    def _into_place(self, incoming: "IncomingInstance", folder: str, sop_instance_uid: str) -> StoredInstance:
        name = f"{folder}/{sop_instance_uid}{INSTANCE_SUFFIX}"
        conflict = os.path.exists(name)  # noqa: PTH110 - on the way of every image, where pathlib costs
        if conflict:
            first = Path(name)
            others = first.parent.glob(f"{sop_instance_uid}.{'[0-9a-f]' * _TAG_LENGTH}{INSTANCE_SUFFIX}")
            for path in [first, *sorted(others)]:
                if incoming.repeats(path):
                    return StoredInstance(path, path.stat().st_size, new=False, conflict=path != first)
            name = f"{folder}/{sop_instance_uid}.{incoming.sha256()[:_TAG_LENGTH]}{INSTANCE_SUFFIX}"
        try:
            incoming.become(name)
        except FileNotFoundError:  # the first of its series
            self._make_folder(Path(folder))
            incoming.become(name)
        return StoredInstance(Path(name), incoming.size_bytes, new=True, conflict=conflict)

    def in_flight(self, study_instance_uid: str) -> bool:
        """Whether an instance of this study is being placed; ask with `placing` held."""
        return study_instance_uid in self._in_flight

    def write_instance(
        self,
        study_instance_uid: str,
        series_instance_uid: str,
        sop_instance_uid: str,
        parts: Iterable[bytes | memoryview],
    ) -> StoredInstance:
        """Write one whole Part 10 file durably; see `place`."""
        incoming = self.receive()
        try:
            for part in parts:
                incoming.write(part)
            with self.place(incoming, study_instance_uid, series_instance_uid, sop_instance_uid) as stored:
                return stored
        except OSError as error:
            raise self._unwritable(sop_instance_uid, error) from error
        finally:
            incoming.discard()

    def _unwritable(self, what: str, error: OSError) -> StoreError:
        return StoreError(f"cannot write {what} under {self.root}: {error.strerror}; check the disk and its rights")

    def series_paths(self, study_instance_uid: str, series_instance_uid: str) -> list[Path]:
        """The instance files of one series, by name."""
        folder = self.series_folder(study_instance_uid, series_instance_uid)
        return sorted(path for path in folder.glob("*" + INSTANCE_SUFFIX))

    def all_instances(self) -> Iterator[Path]:
        """Every instance file of the store."""
        # not of a study that is being removed, whose folder starts with a point
        yield from sorted(self.root.glob("[0-9]*/*/*" + INSTANCE_SUFFIX))

    def leftovers(self) -> Iterator[Path]:
        """Temporary files of writes that never finished and so were never acknowledged."""
        yield from self._incoming.glob("*" + TEMPORARY_SUFFIX)
        yield from self.root.glob("*/*/**/*" + TEMPORARY_SUFFIX)

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
            # opened here, since NumPy leaves a file open that is no whole archive
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return Prediction(**{f.name: arrays[f.name] for f in fields(Prediction)})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, BadZipFile) as error:
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
            sync_folder(path.parent)


def is_uid(value: object) -> bool:
    """Whether it is one UID, of digits and points and at most 64 of them, and so fit for a path."""
    return isinstance(value, str) and _UID.fullmatch(value) is not None


def _require_uids(*uids: str) -> None:
    """Study, Series and SOP Instance UID, or the first of them."""
    for keyword, uid in zip(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), uids, strict=False):
        if not is_uid(uid):
            raise DicomError(f"{keyword} {uid!r} is not a UID (PS3.5 9.1); the sender must give one")


class IncomingInstance:
    """A file in the making: written while its bytes come, then placed or discarded."""

    def __init__(self, folder: Path) -> None:
        self._name: str | None = f"{folder}/{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        self._descriptor = os.open(self._name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o640)
        self.size_bytes = 0

    def write(self, *parts: bytes | memoryview) -> None:
        """Append at most IOV_MAX parts; raises OSError when the disk refuses."""
        size = sum(map(len, parts))
        written = os.writev(self._descriptor, parts)
        self.size_bytes += size
        if written < size:  # the disk is about to refuse, which another attempt will say
            rest = memoryview(b"".join(parts))[written:]
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def sha256(self) -> str:
        """Of everything that was written."""
        assert self._name is not None, "it has been placed or discarded"
        return file_sha256(Path(self._name))

    def start_writing(self) -> None:
        """Have the kernel write out what it has, while the caller goes on; `flush` then waits for less."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """Bring the content to the disk and close the file; raises OSError."""
        if self._descriptor >= 0:
            os.fsync(self._descriptor)
            self._close()

    def repeats(self, path: Path) -> bool:
        """Whether another file holds the same data set; the File Meta before it names the sender and may differ."""
        with path.open("rb") as there, self.open() as here:
            there.seek(_data_set_start(there))
            here.seek(_data_set_start(here))
            while block := here.read(_BLOCK_BYTES):
                if block != there.read(_BLOCK_BYTES):
                    return False
            return not there.read(1)

    def open(self) -> BinaryIO:
        """What was written so far, for reading."""
        assert self._name is not None, "it has been placed or discarded"
        return Path(self._name).open("rb")

    def become(self, name: str) -> None:
        """Take its place; raises OSError."""
        assert self._name is not None, "it has been placed or discarded"
        os.rename(self._name, name)  # noqa: PTH104 - see StudyStore
        self._name = None

    def discard(self) -> None:
        """Remove it, unless it was placed; on a disk that refuses even that, the receiver's next start does."""
        name, self._name = self._name, None
        try:
            self._close()
            if name is not None:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot remove %s: %s; the receiver's next start does", name, error.strerror)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _data_set_start(file: BinaryIO) -> int:
    """Where the data set of a Part 10 file starts, from FileMetaInformationGroupLength (PS3.10 7.1); else 0."""
    head = file.read(144)
    if head[128:140] != b"DICM\x02\x00\x00\x00UL\x04\x00":
        return 0
    return 144 + int.from_bytes(head[140:144], "little")


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - see StudyStore
        if os.fstat(file.fileno()).st_size <= _SMALL_BYTES:
            return hashlib.sha256(file.read()).hexdigest()  # in two calls, where `file_digest` takes many
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    sync_folder(path.parent)


def sync_folder(folder: Path | str) -> None:
    """Bring the names in a folder to the disk; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Which versions of which models are served: version folders, hot reload, and leases that keep a version alive.

As in TensorFlow Serving, the highest version of each model is served, a new one is loaded before the old one is
retired, and a retired one goes when its last request has been answered. Unlike there, a version that cannot be loaded
is passed over for the next lower one, and is tried again when its files change.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from serving.executor import MODEL_FILE, Executor, ExecutorOptions, LoadError, load_executor, read_signatures

logger = logging.getLogger(__name__)

SETTLE_S = 0.5
"""Files changed more recently than this may still be on their way: the version waits for the next look."""


class State(IntEnum):
    """The states of a version, numbered as in get_model_status.proto."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True)
class Servable:
    """One loaded version of a model; hold `turn` while the executor runs, for it runs one request at a time."""

    name: str
    version: int
    signatures: Mapping[str, Any]
    executor: Executor
    turn: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class VersionStatus:
    """What GetModelStatus tells of one version; `error` is empty when all is well."""

    version: int
    state: State
    error: str = ""
    missing: bool = False


class NotServed(Exception):
    """Raised when no available version answers a request."""


@dataclass
class _Version:
    """One version that has been seen, loaded or not."""

    state: State = State.START
    error: str = ""
    missing: bool = False
    files: tuple[tuple[str, int, int], ...] = ()
    servable: Servable | None = None
    leases: int = 0


def load_servable(name: str, version: int, folder: Path, options: ExecutorOptions) -> Servable:
    """Load one version folder and log how long that took; raises LoadError."""
    begin = time.perf_counter()
    signatures = read_signatures(folder)
    executor = load_executor(folder, signatures, options)
    logger.info(
        "serving %s version %d with %s, loaded in %.2f s", name, version, executor.name, time.perf_counter() - begin
    )
    return Servable(name, version, signatures, executor)


class Repository:
    """The models under one folder, `NAME/VERSION/saved_model.pb`; safe for many threads, `poll` for one."""

    def __init__(self, root: Path, load: Callable[[str, int, Path], Servable], expected: Collection[str] = ()) -> None:
        """`load` makes a Servable of a version folder or raises LoadError; `expected` models are waited for aloud."""
        self._root = root
        self._load = load
        self._expected = tuple(expected)
        self._announced: set[str] = set()
        self._models: dict[str, dict[int, _Version]] = {}
        self._lock = threading.Lock()

    # --- requests ---

    @contextmanager
    def lease(self, name: str, version: int | None = None) -> Iterator[Servable]:
        """The version asked for, or the latest, kept alive inside the context; raises NotServed."""
        with self._lock:
            versions = self._models.get(name, {})
            available = [v for v, record in versions.items() if record.state is State.AVAILABLE]
            chosen = version if version is not None else max(available, default=None)
            record = versions[chosen] if chosen in available else None
            if record is None or record.servable is None:
                raise NotServed(f"Specific({name}, {version})" if version is not None else f"Latest({name})")
            record.leases += 1
            servable = record.servable
        try:
            yield servable
        finally:
            with self._lock:
                record.leases -= 1
                self._end_if_unused(record)

    def status(self, name: str) -> list[VersionStatus]:
        """Every version seen of a model, highest first."""
        with self._lock:
            versions = sorted(self._models.get(name, {}).items(), reverse=True)
            return [VersionStatus(number, v.state, v.error, v.missing) for number, v in versions]

    def missing(self) -> list[str]:
        """The expected models of which no version is available."""
        return [n for n in self._expected if all(v.state is not State.AVAILABLE for v in self.status(n))]

    # --- versions ---

    def poll(self) -> bool:
        """Look at the folder once, load what is new, retire what it replaces; false while files are still arriving."""
        settled = True
        for name, folders in self._folders().items():
            settled &= self._update(name, folders)
        for name in self.missing() if settled else ():
            if name not in self._announced:
                logger.warning(
                    "waiting for model %s: put VERSION/%s into %s and it is served", name, MODEL_FILE, self._root / name
                )
                self._announced.add(name)
        return settled

    def _folders(self) -> dict[str, dict[int, Path]]:
        """The version folders of each model; a model folder that cannot be listed counts as unchanged."""
        try:
            models = sorted(p for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
        except OSError:
            return {}
        folders: dict[str, dict[int, Path]] = {}
        for model in models:
            try:
                folders[model.name] = {int(p.name): p for p in model.iterdir() if p.name.isdecimal() and p.is_dir()}
            except OSError as error:
                logger.warning("cannot list the versions of model %s: %s", model.name, error.strerror)
        return folders

    def _update(self, name: str, folders: Mapping[int, Path]) -> bool:
        """Bring one model to its highest version that can be loaded; false while that one is still arriving."""
        settled = True
        for number in sorted(folders, reverse=True):
            with self._lock:
                record = self._models.setdefault(name, {}).setdefault(number, _Version())
                if record.state is State.AVAILABLE:
                    self._retire_all_but(name, number)
                    return settled
                if record.state is State.UNLOADING:  # asked for again before its last request was answered
                    record.state = State.AVAILABLE
                    self._retire_all_but(name, number)
                    return settled
            files = _files(folders[number])
            if record.error and files == record.files:
                continue
            if any(0 <= time.time_ns() - changed < SETTLE_S * 1e9 for _, _, changed in files):
                settled = False
                continue
            if self._try(name, number, folders[number], record, files):
                with self._lock:
                    self._retire_all_but(name, number)
                return settled
        return settled

    def _try(
        self, name: str, number: int, folder: Path, record: _Version, files: tuple[tuple[str, int, int], ...]
    ) -> bool:
        """Load a version; on failure note the reason where GetModelStatus finds it."""
        with self._lock:
            record.state, record.error, record.missing, record.files = State.LOADING, "", False, files
        try:
            servable = self._load(name, number, folder)
        except Exception as error:  # whatever a broken model makes a loader raise, the other versions are served on
            reason = str(error) or type(error).__name__
            logger.error(
                "cannot load %s version %d: %s", name, number, reason, exc_info=not isinstance(error, LoadError)
            )
            with self._lock:
                record.state, record.error = State.END, reason
                record.missing = not any(path == MODEL_FILE for path, _, _ in files)
            return False
        with self._lock:
            record.servable, record.state = servable, State.AVAILABLE
        return True

    def _retire_all_but(self, name: str, number: int) -> None:
        for other, record in self._models[name].items():
            if other != number and record.state is State.AVAILABLE:
                record.state = State.UNLOADING
                logger.info("retiring %s version %d after %d requests under way", name, other, record.leases)
                self._end_if_unused(record)

    @staticmethod
    def _end_if_unused(record: _Version) -> None:
        if record.state is State.UNLOADING and not record.leases:
            record.state, record.servable = State.END, None


def _files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Path, size and time of change of every file of a version, to tell whether it has been exported anew."""
    found = []
    for path in sorted(folder.rglob("*")):
        try:
            stat = path.stat()
        except OSError:  # renamed or removed between listing and looking
            continue
        if path.is_file():
            found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns))
    return tuple(found)


__all__ = ["NotServed", "Repository", "Servable", "State", "VersionStatus", "load_servable"]

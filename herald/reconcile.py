"""Where is every instance? Files on disk against the ledger's instances, series revisions and dispositions.

The files are the truth: `restore_index` makes the ledger's rows of the receiver again from them. They do not say from
which address an instance came, how often, and what retention has removed.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

from pydicom.filereader import read_file_meta_info
from sqlalchemy import Connection, RowMapping, Select, and_, func, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from herald.config import Config
from herald.errors import DicomError, StoreError
from herald.events import utc_now
from herald.instance import InstanceHeader, read_header
from herald.ledger import instances, open_ledger, rejections, results, series
from herald.store import INSTANCE_SUFFIX, StudyStore, file_sha256, is_uid

log = logging.getLogger(__name__)

REBUILT = "rebuilt"
REMOVING = ".removing-"
"""How the name of a study's folder starts while retention removes it."""
GRACE_S = 60.0
"""How much longer than its own limits a step may take before an instance that waits for it is unaccounted."""
ROWS_AT_ONCE = 500

SeriesKey = tuple[str, str]
Progress = Callable[[int, int], None]
Unreadable = Callable[[Path, StoreError], None]


@dataclass(frozen=True)
class Reconciliation:
    """What was found: `dispositions`, `waiting`, `removed` and `unaccounted` sum up to all instances ever stored."""

    instances_on_disk: int
    instances_in_ledger: int
    series_revisions: int
    dispositions: dict[str, int]
    """Instances by the disposition of their newest series revision."""
    waiting: int
    """Instances whose row or series is still on its way, within the time that this may take."""
    removed: int
    """Instances of finished studies whose files retention has removed."""
    rejected: int
    """Instances that were refused with a failure status; their sender knows."""
    unaccounted: int
    unreadable: int
    """Folders and files that cannot be read: what lies there and has no row is not known."""
    problems: tuple[str, ...]
    """Why an instance is unaccounted or a place unreadable, and what to do."""


def reconcile(
    config: Config, rebuild: bool = False, verify: bool = False, on_progress: Progress | None = None
) -> Reconciliation:
    """Account for every instance; `rebuild` first restores the ledger's rows from the files.

    `verify` also computes every file's SHA-256 and calls `on_progress(done, total)` after each file. A folder or file
    that cannot be read is a problem of its own and holds up no other. Raises LedgerError, or StoreError when the root
    cannot be read.
    """
    store = StudyStore(config.store)
    ledger = open_ledger(config.ledger)
    try:
        if rebuild:
            with ledger.begin() as connection:
                restored = restore_index(connection, store)
            log.info("%d instances restored; the receiver takes their series up at its next start", restored)
        files = _Files(store.root)  # before the rows: what is placed later has its row already
        with ledger.read() as connection:
            rows = connection.execute(_ROWS).mappings().all()
            files.look_again(connection, rows)
            if verify:
                files.verify(rows, on_progress)
            return _account(connection, rows, files, config)
    finally:
        ledger.close()


_ROWS = select(
    instances.c.path,
    instances.c.study_instance_uid,
    instances.c.series_instance_uid,
    instances.c.size_bytes,
    instances.c.sha256,
    instances.c.received_at,
    instances.c.removed_at,
)


# --- files -----------------------------------------------------------------------------------------------------------


class _Files:
    """The instance files under a root, while others add and remove some."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.unreadable: dict[str, str] = {}
        """Why, by the path relative to the root of a folder or file."""
        self.sizes = dict(_instance_files(root, self._note_unreadable))
        self._removed: set[str] = set()
        self._changed: set[str] = set()

    def look_again(self, connection: Connection, rows: Sequence[RowMapping]) -> None:
        """Settle where files and rows, read one after the other, differ because of what happened in between."""
        differ = [row["path"] for row in rows if (row["path"] in self.sizes) == (row["removed_at"] is not None)]
        for path in differ:
            self.sizes.pop(path, None)
            if (size := _size(self._root / path, self._note_unreadable)) is not None:
                self.sizes[path] = size
        # a folder that is gone by now has been noted in the ledger, see receiver/retention.py
        being_removed = studies_being_removed(self._root)
        missing = [path for path in differ if path not in self.sizes]
        self._removed = {path for path in missing if path.partition("/")[0] in being_removed}
        for i in range(0, len(missing), ROWS_AT_ONCE):
            noted = select(instances.c.path).where(
                instances.c.path.in_(missing[i : i + ROWS_AT_ONCE]), instances.c.removed_at.is_not(None)
            )
            self._removed |= set(connection.execute(noted).scalars())

    def verify(self, rows: Sequence[RowMapping], on_progress: Progress | None) -> None:
        """Compare the bytes of every file with the SHA-256 that its row says."""
        there = [row for row in rows if row["path"] in self.sizes]
        for done, row in enumerate(there, start=1):
            try:
                same = file_sha256(self._root / row["path"]) == row["sha256"]
            except FileNotFoundError:  # removed just now; it is accounted for as it was when it was listed
                same = True
            except OSError as error:
                self._note_unreadable(self._root / row["path"], _cannot_read(self._root / row["path"], error))
                del self.sizes[row["path"]]
                same = True
            if not same:
                self._changed.add(row["path"])
            if on_progress is not None:
                on_progress(done, len(there))

    def is_removed(self, row: RowMapping) -> bool:
        """Whether retention has removed the file, or is about to."""
        path = row["path"]
        return path not in self.sizes and (row["removed_at"] is not None or path in self._removed)

    def is_fresh(self, path: str) -> bool:
        """Whether the file is so young that its row may follow."""
        try:
            return time.time() - (self._root / path).stat().st_mtime < GRACE_S
        except OSError:
            return True

    def problem(self, row: RowMapping) -> str | None:
        """What is wrong with the file of a row."""
        path, size = row["path"], self.sizes.get(row["path"])
        if size is None:
            if why := self._why_unreadable(path):
                return why
            return f"{path} is in the ledger and not on disk; restore it from a backup or send it again"
        if size != row["size_bytes"]:
            return f"{path} has {size} bytes and the ledger says {row['size_bytes']}; the file was changed"
        if path in self._changed:
            return f"{path} has other bytes than were received; restore it from a backup or send it again"
        if row["removed_at"] is not None:
            return f"{path} is on disk and the ledger says it was removed; run `herald reconcile --rebuild`"
        return None

    def _note_unreadable(self, place: Path, error: StoreError) -> None:
        if place == self._root:  # as a lost mount: nothing could be told of any file
            raise error
        relative = place.relative_to(self._root).as_posix()
        if self._why_unreadable(relative) is None:
            self.unreadable[relative] = str(error)

    def _why_unreadable(self, relative: str) -> str | None:
        """Why a file, or one of the folders that it lies in, cannot be read."""
        places = accumulate(relative.split("/"), "{}/{}".format)
        return next((self.unreadable[place] for place in places if place in self.unreadable), None)


def studies_being_removed(root: Path) -> set[str]:
    """Study Instance UIDs of the folders that retention has set aside and not yet removed."""
    return {path.name.removeprefix(REMOVING).partition("-")[0] for path in root.glob(REMOVING + "*")}


def _instance_files(root: Path, unreadable: Unreadable) -> Iterator[tuple[str, int]]:
    """Path relative to the root, and size, of every instance file; `unreadable` is told of what cannot be read.

    Only folders named by UIDs hold any: others are the disk's own, as `lost+found`, or set aside by retention.
    """
    for study in filter(is_uid, _names(root, unreadable)):
        for one in filter(is_uid, _names(root / study, unreadable)):
            for name in _names(root / study / one, unreadable):
                path = root / study / one / name
                if name.endswith(INSTANCE_SUFFIX) and (size := _size(path, unreadable)) is not None:
                    yield f"{study}/{one}/{name}", size


def _names(folder: Path, unreadable: Unreadable) -> list[str]:
    """What lies in a folder, in order; nothing where it was removed meanwhile, or is none."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        unreadable(folder, _cannot_read(folder, error))
        return []


def _size(path: Path, unreadable: Unreadable) -> int | None:
    """None where the file is gone, or cannot be asked."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        unreadable(path, _cannot_read(path, error))
        return None


def _cannot_read(path: Path, error: OSError) -> StoreError:
    return StoreError(f"cannot read {path}: {error.strerror}; check the disk and the rights on store.root")


# --- accounting ------------------------------------------------------------------------------------------------------


def _account(connection: Connection, rows: Sequence[RowMapping], files: _Files, config: Config) -> Reconciliation:
    revisions: dict[SeriesKey, list[RowMapping]] = defaultdict(list)
    for row in connection.execute(select(series).order_by(series.c.revision.desc())).mappings():
        revisions[row["study_instance_uid"], row["series_instance_uid"]].append(row)
    disposed = {
        (uid, revision): str(disposition)
        for uid, revision, disposition in connection.execute(
            select(results.c.series_instance_uid, results.c.revision, results.c.disposition)
        )
    }
    dispositions: dict[str, int] = defaultdict(int)
    waiting = removed = 0
    problems: dict[str, int] = defaultdict(int)
    for row in rows:
        if files.is_removed(row):
            removed += 1
            continue
        if row["removed_at"] is not None and files.is_fresh(row["path"]):
            waiting += 1  # it came again
            continue
        outcome = files.problem(row) or _whereabouts(row, revisions, disposed, config)
        if isinstance(outcome, _Disposed):
            dispositions[outcome.disposition] += 1
        elif isinstance(outcome, _Waiting):
            waiting += 1
        else:
            problems[outcome] += 1
    for path in sorted(files.sizes.keys() - {row["path"] for row in rows}):
        if files.is_fresh(path):
            waiting += 1
        else:
            problems[f"{path} is not in the ledger; run `herald reconcile --rebuild`"] += 1
    for why in files.unreadable.values():
        problems.setdefault(why, 0)
    rejected = select(func.count()).select_from(rejections)
    return Reconciliation(
        instances_on_disk=len(files.sizes),
        instances_in_ledger=len(rows),
        series_revisions=sum(len(of_series) for of_series in revisions.values()),
        dispositions=dict(sorted(dispositions.items())),
        waiting=waiting,
        removed=removed,
        rejected=int(connection.execute(rejected).scalar() or 0),
        unaccounted=sum(problems.values()),
        unreadable=len(files.unreadable),
        problems=tuple(text if count < 2 else f"{text} ({count} instances)" for text, count in problems.items()),
    )


@dataclass(frozen=True)
class _Disposed:
    disposition: str


@dataclass(frozen=True)
class _Waiting:
    pass


def _whereabouts(
    row: RowMapping,
    revisions: dict[SeriesKey, list[RowMapping]],
    disposed: dict[tuple[str, int], str],
    config: Config,
) -> _Disposed | _Waiting | str:
    """The newest revision that holds the instance, and what became of it."""
    holding = next(
        (
            revision
            for revision in revisions[row["study_instance_uid"], row["series_instance_uid"]]
            if revision["closed_at"] is None or revision["closed_at"] >= row["received_at"]
        ),
        None,
    )
    if holding is None:
        return (
            f"series {row['series_instance_uid']}: no revision holds {row['path']}; "
            "run `herald reconcile --rebuild` and start the receiver again"
        )
    name = f"series {holding['series_instance_uid']} revision {holding['revision']}"
    disposition = disposed.get((holding["series_instance_uid"], holding["revision"]))
    if disposition is not None:
        return _Disposed(disposition)
    if holding["closed_at"] is None:
        since, limit_s, advice = row["received_at"], config.receiver.quiet_s, "is still open; does the receiver run?"
    elif holding["published_at"] is None:
        since, limit_s = holding["closed_at"], config.bus.retry_for_s
        advice = "is closed and not published; do the receiver and the bus run?"
    else:
        since, limit_s = holding["published_at"], config.bus.retry_for_s
        advice = "was published and has no disposition; see `herald trace` and `herald dead-letters`"
    overdue = utc_now() - since > timedelta(seconds=limit_s + GRACE_S)
    return f"{name} {advice}" if overdue else _Waiting()


# --- restoring the index ---------------------------------------------------------------------------------------------


def restore_index(connection: Connection, store: StudyStore) -> int:
    """Make rows of files that have none, and open the next revision of every series that holds an image no revision
    covers; returns how many instances were restored. A file that is no DICOM is left alone, and so is a folder that
    cannot be read, each with a line in the log.
    """
    restored = 0
    batch: list[dict[str, Any]] = []
    for row in _missing_rows(connection, store):
        batch.append(row)
        if len(batch) == ROWS_AT_ONCE:
            restored += _restore_rows(connection, batch)
            batch = []
    restored += _restore_rows(connection, batch)
    for key in _uncovered(connection):
        _restore_series(connection, store, key)
    return restored


def _missing_rows(connection: Connection, store: StudyStore) -> Iterator[dict[str, Any]]:
    known = set(connection.execute(select(instances.c.path).where(instances.c.removed_at.is_(None))).scalars())
    for relative, _ in _instance_files(store.root, _pass_over):
        if relative in known:
            continue
        path = store.root / relative
        try:
            row = _instance_row(path, relative, read_header(path))
        except (DicomError, StoreError) as error:
            log.warning("%s; it stays out of the ledger", error)
            continue
        yield row


def _pass_over(_: Path, error: StoreError) -> None:
    log.error("%s; until then no image in it is restored to the ledger", error)


def _restore_rows(connection: Connection, rows: list[dict[str, Any]]) -> int:
    """Make the rows; one that a receiver at work has made meanwhile stays, one of a removed file is as new."""
    if not rows:
        return 0
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    statement = dialect.insert(instances)
    columns = {name: statement.excluded[name] for name in rows[0] if name != "path"}
    connection.execute(
        statement.on_conflict_do_update(
            index_elements=["path"], set_=columns, where=instances.c.removed_at.is_not(None)
        ),
        rows,
    )
    return len(rows)


def _instance_row(path: Path, relative: str, header: InstanceHeader) -> dict[str, Any]:
    try:
        sha256 = file_sha256(path)
        status = path.stat()
        meta = read_file_meta_info(path)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    study_instance_uid, series_instance_uid = path.parent.parent.name, path.parent.name
    return {
        "path": relative,
        "sop_instance_uid": header.sop_instance_uid,
        "series_instance_uid": series_instance_uid,
        "study_instance_uid": study_instance_uid,
        "sop_class_uid": header.sop_class_uid,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "sha256": sha256,
        "size_bytes": status.st_size,
        "conflict": path.name != header.sop_instance_uid + INSTANCE_SUFFIX,
        "copies": 1,
        "calling_ae_title": str(meta.get("SourceApplicationEntityTitle") or "")[:16],  # as the receiver writes it
        "calling_address": "",
        "received_at": datetime.fromtimestamp(status.st_mtime, UTC),
        "removed_at": None,
    }


def _uncovered(connection: Connection) -> list[SeriesKey]:
    """Series with an image that came after the last closed revision while none is open."""
    newest = (
        select(
            instances.c.study_instance_uid,
            instances.c.series_instance_uid,
            func.max(instances.c.received_at).label("newest_at"),
        )
        .where(instances.c.removed_at.is_(None))
        .group_by(instances.c.study_instance_uid, instances.c.series_instance_uid)
    )
    covered: dict[SeriesKey, datetime | None] = {}
    for row in connection.execute(select(series).order_by(series.c.revision)).mappings():
        key = row["study_instance_uid"], row["series_instance_uid"]
        before = covered.get(key, row["closed_at"])
        covered[key] = None if before is None or row["closed_at"] is None else max(before, row["closed_at"])
    found = []
    for study, uid, newest_at in connection.execute(newest):
        closed_at = covered.get((study, uid), datetime.min.replace(tzinfo=UTC))
        if closed_at is not None and closed_at < newest_at:
            found.append((study, uid))
    return found


def _restore_series(connection: Connection, store: StudyStore, key: SeriesKey) -> None:
    """Make the rows of revisions that have a result, and one that is open when images came after all of them."""
    study_instance_uid, series_instance_uid = key
    stored = and_(
        instances.c.study_instance_uid == study_instance_uid,
        instances.c.series_instance_uid == series_instance_uid,
        instances.c.removed_at.is_(None),
    )
    in_order: Select[Any] = (
        select(instances.c.path, instances.c.calling_ae_title)
        .where(stored)
        .order_by(instances.c.received_at, instances.c.path)
    )
    path, calling_ae_title = connection.execute(in_order.limit(1)).one()
    try:
        header = read_header(store.root / path)
    except (DicomError, StoreError) as error:
        log.warning("series %s cannot be restored: %s", series_instance_uid, error)
        return
    oldest_at, newest_at, count = connection.execute(
        select(
            func.min(instances.c.received_at),
            func.max(instances.c.received_at),
            func.count(instances.c.sop_instance_uid.distinct()),
        ).where(stored)
    ).one()
    common = {
        "study_instance_uid": study_instance_uid,
        "series_instance_uid": series_instance_uid,
        "accession_number": header.accession_number,
        "modality": header.modality,
        "scanner": header.station_name or calling_ae_title,
        "calling_ae_title": calling_ae_title,
        "instance_count": count,
        "first_image_at": oldest_at,
        "last_image_at": newest_at,
    }
    of_series = series.c.series_instance_uid == series_instance_uid
    revisions = set(connection.execute(select(series.c.revision).where(of_series)).scalars())
    triaged = connection.execute(
        select(results.c.revision, results.c.triaged_at)
        .where(results.c.series_instance_uid == series_instance_uid)
        .order_by(results.c.revision)
    ).all()
    covered = False
    for revision, triaged_at in triaged:
        if revision not in revisions:
            closed = {"closed_at": triaged_at, "published_at": triaged_at, "close_reason": REBUILT}
            connection.execute(insert(series).values(revision=revision, **common, **closed))
            revisions.add(revision)
            covered = covered or triaged_at >= newest_at
    if not covered:
        predicted = [int(p.stem) for p in store.prediction_path(*key, 0).parent.glob("*.npz") if p.stem.isdigit()]
        connection.execute(insert(series).values(revision=max([0, *revisions, *predicted]) + 1, **common))

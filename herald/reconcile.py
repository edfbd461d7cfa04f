"""Where is every instance? Files on disk against the ledger's instances, series revisions and dispositions.

The files are the truth: `restore_index` makes the ledger's rows of the receiver again from them.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select

from herald.config import Config
from herald.errors import DicomError, StoreError
from herald.events import utc_now
from herald.instance import InstanceHeader, read_header
from herald.ledger import instances, open_ledger, rejections, results, series
from herald.store import INSTANCE_SUFFIX, StudyStore

log = logging.getLogger(__name__)

REBUILT = "rebuilt"
GRACE_S = 60.0
"""How much longer than its own limits a step may take before an instance that waits for it is unaccounted."""

SeriesKey = tuple[str, str]


@dataclass(frozen=True)
class Reconciliation:
    """What was found: `dispositions` + `waiting` + `unaccounted` are all instances on disk or in the ledger."""

    instances_on_disk: int
    instances_in_ledger: int
    series_revisions: int
    dispositions: dict[str, int]
    """Instances by the disposition of their newest series revision."""
    waiting: int
    """Instances whose series is still on its way, within the time that this may take."""
    rejected: int
    """Instances that were refused with a failure status; their sender knows."""
    unaccounted: int
    problems: tuple[str, ...]
    """Why an instance is unaccounted, and what to do."""


def reconcile(config: Config, rebuild: bool = False) -> Reconciliation:
    """Account for every instance; `rebuild` first restores the ledger's rows from the files.

    Raises LedgerError or StoreError when either cannot be read.
    """
    store = StudyStore(config.store)
    ledger = open_ledger(config.ledger)
    try:
        if rebuild:
            with ledger.begin() as connection:
                restored = restore_index(connection, store)
            log.info("%d instances restored; the receiver takes their series up at its next start", restored)
        sizes = {path.relative_to(store.root).as_posix(): path.stat().st_size for path in store.all_instances()}
        with ledger.read() as connection:
            return _account(connection, sizes, config)
    finally:
        ledger.close()


# --- accounting ------------------------------------------------------------------------------------------------------


def _account(connection: Connection, sizes: dict[str, int], config: Config) -> Reconciliation:
    rows = connection.execute(select(instances)).mappings().all()
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
    waiting = unaccounted = 0
    problems: dict[str, int] = {}
    for row in rows:
        outcome = _file_problem(row, sizes) or _whereabouts(row, revisions, disposed, config)
        if isinstance(outcome, _Disposed):
            dispositions[outcome.disposition] += 1
        elif isinstance(outcome, _Waiting):
            waiting += 1
        else:
            unaccounted += 1
            problems[outcome] = problems.get(outcome, 0) + 1
    known = {row["path"] for row in rows}
    for path in sorted(sizes.keys() - known):
        unaccounted += 1
        problems[f"{path} is not in the ledger; run `herald reconcile --rebuild`"] = 1
    rejected = select(func.count()).select_from(rejections)
    return Reconciliation(
        instances_on_disk=len(sizes),
        instances_in_ledger=len(rows),
        series_revisions=sum(len(of_series) for of_series in revisions.values()),
        dispositions=dict(sorted(dispositions.items())),
        waiting=waiting,
        rejected=int(connection.execute(rejected).scalar() or 0),
        unaccounted=unaccounted,
        problems=tuple(text if count == 1 else f"{text} ({count} instances)" for text, count in problems.items()),
    )


@dataclass(frozen=True)
class _Disposed:
    disposition: str


@dataclass(frozen=True)
class _Waiting:
    pass


def _file_problem(row: RowMapping, sizes: dict[str, int]) -> str | None:
    size = sizes.get(row["path"])
    if size is None:
        return f"{row['path']} is in the ledger and not on disk; restore it from a backup or send it again"
    if size != row["size_bytes"]:
        return f"{row['path']} has {size} bytes and the ledger says {row['size_bytes']}; the file was changed"
    return None


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
    covers; returns how many instances were restored. A file that is no DICOM is left alone, with a line in the log.
    """
    restored = sum(1 for _ in _index_files(connection, store))
    for key, newest_at, path in _uncovered(connection):
        _restore_series(connection, store, key, newest_at, path)
    return restored


def _index_files(connection: Connection, store: StudyStore) -> Iterator[Path]:
    known = set(connection.execute(select(instances.c.path)).scalars())
    for path in store.all_instances():
        relative = path.relative_to(store.root).as_posix()
        if relative in known:
            continue
        try:
            header = read_header(path)
            row = _instance_row(path, relative, header)
        except (DicomError, StoreError) as error:
            log.warning("%s; it stays out of the ledger", error)
            continue
        connection.execute(insert(instances).values(row))
        yield path


def _instance_row(path: Path, relative: str, header: InstanceHeader) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        status = path.stat()
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
        "calling_ae_title": "",  # the file does not say who sent it
        "calling_address": "",
        "received_at": datetime.fromtimestamp(status.st_mtime, UTC),
    }


def _uncovered(connection: Connection) -> list[tuple[SeriesKey, datetime, str]]:
    """Series with an image that came after the last closed revision while none is open."""
    newest = select(
        instances.c.study_instance_uid,
        instances.c.series_instance_uid,
        func.max(instances.c.received_at).label("newest_at"),
        func.min(instances.c.path).label("path"),
    ).group_by(instances.c.study_instance_uid, instances.c.series_instance_uid)
    covered: dict[SeriesKey, datetime | None] = {}
    for row in connection.execute(select(series).order_by(series.c.revision)).mappings():
        key = row["study_instance_uid"], row["series_instance_uid"]
        before = covered.get(key, row["closed_at"])
        covered[key] = None if before is None or row["closed_at"] is None else max(before, row["closed_at"])
    found = []
    for study, uid, newest_at, path in connection.execute(newest):
        closed_at = covered.get((study, uid), datetime.min.replace(tzinfo=UTC))
        if closed_at is not None and closed_at < newest_at:
            found.append(((study, uid), newest_at, path))
    return found


def _restore_series(connection: Connection, store: StudyStore, key: SeriesKey, newest_at: datetime, path: str) -> None:
    """Make the rows of revisions that have a result, and one that is open when images came after all of them."""
    study_instance_uid, series_instance_uid = key
    try:
        header = read_header(store.root / path)
    except (DicomError, StoreError) as error:
        log.warning("series %s cannot be restored: %s", series_instance_uid, error)
        return
    oldest, count = connection.execute(
        select(func.min(instances.c.received_at), func.count(instances.c.sop_instance_uid.distinct())).where(
            instances.c.study_instance_uid == study_instance_uid, instances.c.series_instance_uid == series_instance_uid
        )
    ).one()
    common = {
        "study_instance_uid": study_instance_uid,
        "series_instance_uid": series_instance_uid,
        "accession_number": header.accession_number,
        "modality": header.modality,
        "scanner": header.station_name,
        "instance_count": count,
        "first_image_at": oldest,
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

"""What the receiver writes in the ledger: instances, rejections and series, in the order in which they happened.

Statements queue for one thread, which commits whatever waits as one transaction: concurrent associations share a
commit, and while the ledger is down the queue keeps order and nobody is blocked.
"""

import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, and_, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import InterfaceError, OperationalError, ProgrammingError

from herald.config import LedgerConfig
from herald.errors import LedgerError
from herald.events import SeriesReceived
from herald.instance import InstanceHeader
from herald.ledger import Ledger, instances, rejections, series
from herald.store import StoredInstance
from receiver.statuses import StoreStatus

log = logging.getLogger(__name__)

SeriesKey = tuple[str, str]
"""Study and Series Instance UID: two studies that share a Series Instance UID by mistake stay apart."""


@dataclass(frozen=True)
class Arrival:
    """One instance that is durable in the store, and who sent it."""

    header: InstanceHeader
    stored: StoredInstance
    path: str
    """Relative to the store's root."""
    calling_ae_title: str
    calling_address: str
    received_at: datetime

    @property
    def series_key(self) -> SeriesKey:
        """The series that it belongs to."""
        return self.header.study_instance_uid, self.header.series_instance_uid


@dataclass(frozen=True)
class Rejection:
    """One instance that was refused, and why."""

    occurred_at: datetime
    calling_ae_title: str
    calling_address: str
    sop_instance_uid: str
    status: StoreStatus
    error: str


@dataclass(frozen=True)
class Pause:
    """The longest pause that one sender showed in one series."""

    calling_ae_title: str
    key: SeriesKey
    largest_gap_s: float


# --- statements ------------------------------------------------------------------------------------------------------


def record_instances(connection: Connection, arrivals: Iterable[Arrival]) -> None:
    """One row per file, in one statement for all that are new; the same bytes again are counted in `copies`."""
    rows: dict[str, dict[str, Any]] = {}
    for arrival in arrivals:
        if arrival.stored.new:
            rows[arrival.path] = _instance_row(arrival)
            continue
        _upsert_instances(connection, rows)
        again = update(instances).where(instances.c.path == arrival.path).values(copies=instances.c.copies + 1)
        if not connection.execute(again).rowcount:
            rows[arrival.path] = _instance_row(arrival)
    _upsert_instances(connection, rows)


def _upsert_instances(connection: Connection, rows: dict[str, dict[str, Any]]) -> None:
    if rows:
        connection.execute(_instance_upsert(connection.dialect.name), list(rows.values()))
        rows.clear()


@cache
def _instance_upsert(dialect: str) -> Any:
    statement = _dialect_insert(dialect, instances)
    new = {column.name: statement.excluded[column.name] for column in instances.columns if column.name != "path"}
    return statement.on_conflict_do_update(index_elements=["path"], set_=new)


def _instance_row(arrival: Arrival) -> dict[str, Any]:
    header, stored = arrival.header, arrival.stored
    return {
        "path": arrival.path,
        "copies": 1,
        "sop_instance_uid": header.sop_instance_uid,
        "series_instance_uid": header.series_instance_uid,
        "study_instance_uid": header.study_instance_uid,
        "sop_class_uid": header.sop_class_uid,
        "transfer_syntax_uid": header.transfer_syntax_uid,
        "sha256": _digest(arrival),
        "size_bytes": stored.size_bytes,
        "conflict": stored.conflict,
        "calling_ae_title": arrival.calling_ae_title,
        "calling_address": arrival.calling_address,
        "received_at": arrival.received_at,
        "removed_at": None,
    }


def _digest(arrival: Arrival) -> str:
    """Of the file; empty when it is gone already, so that `herald reconcile` names it."""
    try:
        return arrival.stored.sha256
    except OSError as error:
        log.error("%s cannot be read: %s; was it removed by hand? Send it again", arrival.path, error.strerror)
        return ""


def record_rejection(connection: Connection, rejection: Rejection) -> None:
    """One row per refusal."""
    row = {
        "occurred_at": rejection.occurred_at,
        "calling_ae_title": rejection.calling_ae_title,
        "calling_address": rejection.calling_address,
        "sop_instance_uid": rejection.sop_instance_uid,
        "status": int(rejection.status),
        "error": rejection.error,
    }
    connection.execute(insert(rejections).values(row))


def open_series(
    connection: Connection, key: SeriesKey, header: InstanceHeader, calling_ae_title: str, at: datetime
) -> None:
    """Make the next revision of the series, unless one is open."""
    study_instance_uid, series_instance_uid = key
    if connection.execute(select(series.c.revision).where(_is_open(key))).first() is not None:
        return
    newest = select(func.max(series.c.revision)).where(series.c.series_instance_uid == series_instance_uid)
    row = {
        "series_instance_uid": series_instance_uid,
        "revision": (connection.execute(newest).scalar() or 0) + 1,
        "study_instance_uid": study_instance_uid,
        "accession_number": header.accession_number,
        "modality": header.modality,
        "scanner": header.station_name or calling_ae_title,
        "calling_ae_title": calling_ae_title,
        "first_image_at": at,
        "last_image_at": at,
    }
    connection.execute(insert(series).values(row))


def await_instances(connection: Connection, key: SeriesKey, sop_instance_uids: Sequence[str]) -> None:
    """Keep what is known to be missing of an open series; what has come by the next start is found in the store."""
    connection.execute(update(series).where(_is_open(key)).values(awaited=list(sop_instance_uids)))


def close_series(
    connection: Connection,
    key: SeriesKey,
    reason: str,
    at: datetime,
    settle_s: float | None = None,
    largest_gap_s: float | None = None,
    missing: Sequence[str] = (),
) -> SeriesReceived | None:
    """Close the open revision and say what is to be published; None when none is open."""
    row = connection.execute(select(series).where(_is_open(key))).mappings().first()
    if row is None:
        return None
    study_instance_uid, series_instance_uid = key
    content = select(
        func.count(instances.c.sop_instance_uid.distinct()).label("instance_count"),
        func.max(instances.c.received_at).label("last_image_at"),
    ).where(
        instances.c.study_instance_uid == study_instance_uid,
        instances.c.series_instance_uid == series_instance_uid,
        instances.c.removed_at.is_(None),
    )
    counted = connection.execute(content).mappings().one()
    closed: dict[str, Any] = {
        "instance_count": counted["instance_count"],
        "last_image_at": counted["last_image_at"] or row["last_image_at"],
        "closed_at": at,
        "close_reason": reason,
        "settle_s": settle_s,
        "largest_gap_s": largest_gap_s,
        "missing": list(missing),
    }
    connection.execute(update(series).where(_is_open(key)).values(closed))
    return _event({**row, **closed})


def mark_published(connection: Connection, event: SeriesReceived, at: datetime) -> None:
    """SeriesReceived of this revision is durable on the bus."""
    this = and_(series.c.series_instance_uid == event.series_instance_uid, series.c.revision == event.revision)
    connection.execute(update(series).where(this).values(published_at=at))


def unpublished(connection: Connection) -> list[SeriesReceived]:
    """What was closed and not yet published, oldest first."""
    waiting = and_(series.c.closed_at.is_not(None), series.c.published_at.is_(None))
    rows = connection.execute(select(series).where(waiting).order_by(series.c.closed_at)).mappings()
    return [_event(row) for row in rows]


def still_open(connection: Connection) -> list[SeriesKey]:
    """The series with an open revision."""
    rows = select(series.c.study_instance_uid, series.c.series_instance_uid).where(series.c.closed_at.is_(None))
    return [(study, uid) for study, uid in connection.execute(rows)]


def awaited(connection: Connection) -> dict[SeriesKey, list[str]]:
    """SOP Instance UIDs that were known to be missing of the series with an open revision."""
    rows = select(series.c.study_instance_uid, series.c.series_instance_uid, series.c.awaited)
    found = connection.execute(rows.where(series.c.closed_at.is_(None)))
    return {(study, uid): uids for study, uid, uids in found if uids}


def pauses_seen(connection: Connection, most: int) -> list[Pause]:
    """The longest pauses in the last revisions of every sender, `most` at most of each; oldest first."""
    newest_first = func.row_number().over(partition_by=series.c.calling_ae_title, order_by=series.c.closed_at.desc())
    known = (
        select(series, newest_first.label("age"))
        .where(series.c.closed_at.is_not(None), series.c.largest_gap_s.is_not(None), series.c.calling_ae_title != "")
        .subquery()
    )
    rows = connection.execute(select(known).where(known.c.age <= most).order_by(known.c.closed_at)).mappings()
    return [
        Pause(row["calling_ae_title"], (row["study_instance_uid"], row["series_instance_uid"]), row["largest_gap_s"])
        for row in rows
    ]


def _is_open(key: SeriesKey) -> Any:
    return and_(
        series.c.study_instance_uid == key[0], series.c.series_instance_uid == key[1], series.c.closed_at.is_(None)
    )


def _event(row: RowMapping | dict[str, Any]) -> SeriesReceived:
    return SeriesReceived(
        study_instance_uid=row["study_instance_uid"],
        series_instance_uid=row["series_instance_uid"],
        revision=row["revision"],
        occurred_at=row["closed_at"],
        accession_number=row["accession_number"],
        modality=row["modality"],
        scanner=row["scanner"],
        calling_ae_title=row["calling_ae_title"],
        instance_count=row["instance_count"],
        close_reason=row["close_reason"],
        first_image_at=row["first_image_at"],
        last_image_at=row["last_image_at"],
        missing=tuple(row["missing"] or ()),
    )


def _dialect_insert(dialect: str, table: Table) -> Any:
    """INSERT with ON CONFLICT, which SQLAlchemy spells per dialect."""
    return (postgresql if dialect == "postgresql" else sqlite).insert(table)


# --- the thread that writes ------------------------------------------------------------------------------------------

Statement = Callable[[Connection], Any]


_CURABLE = (OperationalError, InterfaceError, ProgrammingError)
"""The database is away, locked, full or not yet migrated; any other error is the statement's own."""


@dataclass(frozen=True)
class _Pending:
    statement: Statement
    done: "Future[Any]"


class Recorder:
    """Executes statements in order, each at least until it has succeeded or can never succeed.

    Arrivals are statements too; as nobody waits for one, they gather for a moment and share a transaction.
    """

    MOST_AT_ONCE = 256
    GATHER_S = 0.02
    RETRY_S = 1.0
    KEEP_CONNECTED_S = 2.0
    """How long the connection is kept when nothing comes: on SQLite, closing the last one costs a checkpoint."""

    def __init__(self, config: LedgerConfig) -> None:
        self.ledger = Ledger(config)
        self._connection: Connection | None = None
        self._pending: queue.SimpleQueue[_Pending | Arrival | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._behind = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        """Start writing; missing tables are created first."""
        self.submit(lambda connection: None)  # the tables are there before the first instance needs them
        self._thread.start()

    def submit(self, statement: Statement) -> "Future[Any]":
        """Queue a statement; its result is there when it is committed."""
        done: Future[Any] = Future()
        self._pending.put(_Pending(statement, done))
        return done

    def record(self, arrival: Arrival) -> None:
        """Queue the row of an instance."""
        self._pending.put(arrival)

    def stop(self, timeout_s: float) -> None:
        """Write what waits, for `timeout_s` at most; the next start makes up for the rest from the files."""
        self._pending.put(None)
        self._thread.join(timeout_s)
        self._stop.set()
        self._thread.join(self.RETRY_S)
        self.ledger.close()

    def _run(self) -> None:
        self._persist(self.ledger.create_tables)
        while not self._stop.is_set():
            batch, last = self._next()
            if batch:
                self._write(batch)
            if last:
                break
        self._disconnect()

    def _next(self) -> tuple[list[_Pending | Arrival], bool]:
        """What waits, once something does; arrivals are given a moment to gather. True when it is the last."""
        batch: list[_Pending | Arrival] = []
        while len(batch) < self.MOST_AT_ONCE:
            try:
                if batch:
                    item = self._pending.get_nowait()
                else:
                    item = self._pending.get(timeout=self.KEEP_CONNECTED_S if self._connection is not None else None)
                    if isinstance(item, Arrival):
                        self._stop.wait(self.GATHER_S)
            except queue.Empty:
                if batch:
                    break
                self._disconnect()
                continue
            if item is None:
                return batch, True
            batch.append(item)
        return batch, False

    def _write(self, batch: list[_Pending | Arrival]) -> None:
        """One transaction for all; if one of them is impossible, one transaction for each."""

        def together() -> list[Any]:
            try:
                if self._connection is None:
                    self._connection = self.ledger.connect()
                with self.ledger.begin(self._connection) as connection:
                    return _execute(connection, batch)
            except BaseException:
                self._disconnect()
                raise

        try:
            results = self._persist(together)
        except Exception as error:  # a statement that can never succeed must not hold up the others
            if len(batch) == 1:
                log.error("the ledger refuses a statement for good: %s; run `herald reconcile`", error)
                if isinstance(batch[0], _Pending):
                    batch[0].done.set_exception(error)
                return
            for pending in batch:
                self._write([pending])
            return
        for done, result in results or []:
            done.set_result(result)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _persist(self, write: Callable[[], Any]) -> Any:
        """Try until the ledger answers or the receiver stops; one line in the log per outage."""
        outage = False
        while not self._stop.is_set():
            try:
                result = write()
            except LedgerError as error:
                if not isinstance(error.__cause__, _CURABLE):
                    raise
                if not outage:
                    log.error("%s; instances are stored meanwhile and their rows follow", error)
                outage = self._behind = True
                self._stop.wait(self.RETRY_S)
            else:
                if self._behind:
                    log.info("the ledger answers again")
                self._behind = False
                return result
        return None


def _execute(connection: Connection, batch: list[_Pending | Arrival]) -> list[tuple["Future[Any]", Any]]:
    """In order; consecutive arrivals as one statement. Futures with their results, for after the commit."""
    results = []
    arrivals: list[Arrival] = []
    for item in batch:
        if isinstance(item, Arrival):
            arrivals.append(item)
            continue
        record_instances(connection, arrivals)
        arrivals = []
        results.append((item.done, item.statement(connection)))
    record_instances(connection, arrivals)
    return results

"""Retention: studies that are finished leave the store, oldest first, by age or when the disk is short.

A study is finished when every revision of its series is closed and published, the newest of each has a disposition
other than `failed`, and no page of it is to be sent or waits for an answer. Any other study stays, whatever the disk.

A removal is three steps, each of which can be repeated, so that it may end anywhere and be finished later:

1. rename `STUDY` to `.removing-STUDY-REASON-MICROSECONDS`, with the store's `placing` lock held and while nothing of
   the study is on its way: from here on an image of it that comes makes a new study folder;
2. say so in the ledger: `instances.removed_at`, and one row of `removals`;
3. remove the folder.
"""

import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, and_, case, func, insert, or_, select, update

from herald.config import StoreConfig
from herald.errors import HeraldError, LedgerError, StoreError
from herald.events import utc_now
from herald.ledger import instances, pages, removals, results, series
from herald.reconcile import REMOVING
from herald.store import INSTANCE_SUFFIX, StudyStore, sync_folder
from receiver.record import Recorder

log = logging.getLogger(__name__)

SWEEP_EVERY_S = 300.0
SWEEP_AT_MOST_EVERY_S = 1.0
"""However often it is woken: with a full disk every refused instance wakes it."""
LOOK_UP_EVERY_S = 0.2
"""How soon a sweep that waits for the ledger notices that it is to stop."""

Reason = Literal["age", "disk"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SET_ASIDE = re.compile(re.escape(REMOVING) + r"([0-9.]+)-(age|disk)-([0-9]+)")
_AWAITED = ("due", "sent")  # a page that is escalated has a successor, which is awaited in its place


@dataclass(frozen=True)
class FinishedStudy:
    """A study that may be removed, and since when: its last result, or the answer to its last page."""

    study_instance_uid: str
    finished_at: datetime


@dataclass(frozen=True)
class Removal:
    """One removal, as the name of its folder says it."""

    study_instance_uid: str
    reason: Reason
    at: datetime
    """Later than anything of the study that is removed was received, and earlier than what comes again."""

    @property
    def folder_name(self) -> str:
        """The name under the store's root while it lasts."""
        microseconds = (self.at - _EPOCH) // timedelta(microseconds=1)
        return f"{REMOVING}{self.study_instance_uid}-{self.reason}-{microseconds}"

    @classmethod
    def from_folder_name(cls, name: str) -> "Removal | None":
        """The inverse of `folder_name`; None for any other name."""
        found = _SET_ASIDE.fullmatch(name)
        if found is None:
            return None
        study, reason, microseconds = found.groups()
        return cls(study, "age" if reason == "age" else "disk", _EPOCH + timedelta(microseconds=int(microseconds)))


# --- ledger ----------------------------------------------------------------------------------------------------------


def finished_studies(connection: Connection, study_instance_uid: str | None = None) -> list[FinishedStudy]:
    """The studies that may be removed and have not been, oldest first; or the one that is named, if it may."""

    def named(column: Any) -> Any:
        return column == study_instance_uid if study_instance_uid else column.is_not(None)

    of_series = series.c.study_instance_uid
    closed = (
        select(of_series, func.max(series.c.closed_at).label("closed_at"))
        .where(named(of_series))
        .group_by(of_series)
        .having(and_(func.count() == func.count(series.c.closed_at), func.count() == func.count(series.c.published_at)))
        .subquery()
    )
    newest = (
        select(of_series, series.c.series_instance_uid, func.max(series.c.revision).label("revision"))
        .where(named(of_series))
        .group_by(of_series, series.c.series_instance_uid)
        .subquery()
    )
    this = and_(results.c.series_instance_uid == newest.c.series_instance_uid, results.c.revision == newest.c.revision)
    disposed = (
        select(
            newest.c.study_instance_uid,
            func.max(results.c.posted_at).label("posted_at"),
            func.count(case((results.c.disposition == "positive", 1))).label("positive"),
        )
        .select_from(newest.outerjoin(results, this))
        .group_by(newest.c.study_instance_uid)
        .having(func.count() == func.count(case((results.c.disposition != "failed", 1))))
        .subquery()
    )
    paged = (
        select(
            pages.c.study_instance_uid,
            func.max(pages.c.acknowledged_at).label("acknowledged_at"),
            func.count(case((pages.c.state.in_(_AWAITED), 1))).label("awaited"),
        )
        .where(named(pages.c.study_instance_uid))
        .group_by(pages.c.study_instance_uid)
        .subquery()
    )
    removed = (
        select(removals.c.study_instance_uid, func.max(removals.c.removed_at).label("removed_at"))
        .where(named(removals.c.study_instance_uid))
        .group_by(removals.c.study_instance_uid)
        .subquery()
    )

    def joins(other: Any) -> Any:
        return other.c.study_instance_uid == closed.c.study_instance_uid

    found = connection.execute(
        select(closed.c.study_instance_uid, disposed.c.posted_at, paged.c.acknowledged_at)
        .select_from(
            closed.join(disposed, joins(disposed)).outerjoin(paged, joins(paged)).outerjoin(removed, joins(removed))
        )
        .where(
            or_(paged.c.awaited.is_(None), paged.c.awaited == 0),
            or_(disposed.c.positive == 0, paged.c.awaited.is_not(None)),  # a positive one is yet to be paged
            or_(removed.c.removed_at.is_(None), removed.c.removed_at < closed.c.closed_at),
        )
    )
    studies = [
        FinishedStudy(study, max(posted_at, answered_at or posted_at)) for study, posted_at, answered_at in found
    ]
    return sorted(studies, key=lambda study: study.finished_at)


@dataclass(frozen=True)
class _Content:
    """What a removal would take: paths of the files, relative to the root, and the last moment in their history."""

    paths: frozenset[str]
    newest_at: datetime


def _removable(connection: Connection, study_instance_uid: str) -> _Content | None:
    """What a study that is still finished consists of; None when it is not, or when nothing is there to be removed."""
    if not finished_studies(connection, study_instance_uid):
        return None
    revisions = connection.execute(
        select(series.c.series_instance_uid, func.max(series.c.closed_at).label("closed_at"))
        .where(series.c.study_instance_uid == study_instance_uid)
        .group_by(series.c.series_instance_uid)
    )
    closed_at: dict[str, datetime] = {row.series_instance_uid: row.closed_at for row in revisions}
    kept = connection.execute(
        select(instances.c.path, instances.c.series_instance_uid, instances.c.received_at).where(
            instances.c.study_instance_uid == study_instance_uid, instances.c.removed_at.is_(None)
        )
    ).all()
    if not kept or any(uid not in closed_at or at > closed_at[uid] for _, uid, at in kept):
        return None  # an image that no revision holds yet, see `herald reconcile`
    return _Content(
        paths=frozenset(path for path, _, _ in kept),
        newest_at=max([*closed_at.values(), *(at for _, _, at in kept)]),
    )


def record_removal(connection: Connection, removal: Removal) -> tuple[int, int]:
    """Say in the ledger that the study was removed; repeating it changes nothing. Instances and bytes of the study."""
    this = and_(removals.c.study_instance_uid == removal.study_instance_uid, removals.c.removed_at == removal.at)
    noted = connection.execute(select(removals.c.instance_count, removals.c.size_bytes).where(this)).first()
    if noted is not None:
        return noted.instance_count, noted.size_bytes
    taken = and_(
        instances.c.study_instance_uid == removal.study_instance_uid,
        instances.c.removed_at.is_(None),
        instances.c.received_at <= removal.at,
    )
    found = connection.execute(select(func.count(), func.sum(instances.c.size_bytes)).where(taken)).one()
    count, size_bytes = int(found[0]), int(found[1] or 0)
    connection.execute(update(instances).where(taken).values(removed_at=removal.at))
    connection.execute(
        insert(removals).values(
            study_instance_uid=removal.study_instance_uid,
            removed_at=removal.at,
            reason=removal.reason,
            instance_count=count,
            size_bytes=size_bytes,
        )
    )
    return count, size_bytes


# --- the thread ------------------------------------------------------------------------------------------------------


class _Stopped(Exception):
    """Raised when retention is to stop while it waits for the ledger."""


class Retention:
    """Sweeps every few minutes and whenever it is woken, between `start` and `stop`.

    `holds` says whether a study has open series. Start it before the assembler: what a crash left half removed is
    then in the ledger before files are compared with rows.
    """

    def __init__(
        self, config: StoreConfig, store: StudyStore, recorder: Recorder, holds: Callable[[str], bool]
    ) -> None:
        self._keep = timedelta(days=config.keep_days) if config.keep_days > 0 else None
        self._watermark_bytes = int(config.remove_below_gb * 1e9)
        self._store = store
        self._recorder = recorder
        self._holds = holds
        self._short = False
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)

    def start(self) -> None:
        """Start the thread, whose first sweep finishes what a crash left."""
        for removal in self._left_over():
            self._submit_record(removal)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop after the present step; the next start finishes a removal that has begun."""
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def wake(self) -> None:
        """Sweep now: the disk is short."""
        self._woken.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()
            self.sweep(utc_now())
            if not self._stopping.wait(SWEEP_AT_MOST_EVERY_S):
                self._woken.wait(SWEEP_EVERY_S)

    def sweep(self, now: datetime) -> list[Removal]:
        """Remove what is due at `now`; returns what was removed. An error ends the sweep, with a line in the log."""
        removed: list[Removal] = []
        try:
            self._committed(self._recorder.submit(lambda connection: None))  # the tables are there, the ledger answers
            self.finish_removals()
            for removal in self._sweep(now):
                removed.append(removal)
        except _Stopped:
            pass
        except (HeraldError, OSError) as error:
            log.error("retention removes nothing until its next look: %s", error)
        return removed

    def _sweep(self, now: datetime) -> Iterator[Removal]:
        if self._keep is not None:
            for study in self._finished():
                if study.finished_at > now - self._keep:
                    break
                removed = self._remove(study, "age")
                if removed is not None:
                    yield removed[0]
        yield from self._make_room()

    def _make_room(self) -> Iterator[Removal]:
        """Remove the oldest until the watermark is reached, by the sizes of what went: some disks free it later."""
        short_of = self._watermark_bytes - self._store.free_bytes()
        if self._watermark_bytes == 0 or short_of <= 0:
            self._short = False
            return
        for study in self._finished():
            removed = self._remove(study, "disk")
            if removed is None:
                continue
            removal, size_bytes = removed
            yield removal
            short_of -= size_bytes
            if short_of <= 0 or self._store.free_bytes() >= self._watermark_bytes:
                self._short = False
                return
        if not self._short:
            self._short = True
            log.error(
                "%.1f GB free under %s, below store.remove_below_gb (%.1f), and every study that is left is "
                "unfinished; free disk space, and see `herald reconcile` for what they wait for",
                self._store.free_bytes() / 1e9,
                self._store.root,
                self._watermark_bytes / 1e9,
            )

    def _finished(self) -> list[FinishedStudy]:
        with self._recorder.ledger.read() as connection:
            return finished_studies(connection)

    # --- one removal -------------------------------------------------------------------------------------------------

    def _remove(self, study: FinishedStudy, reason: Reason) -> tuple[Removal, int] | None:
        """Remove one study unless something of it has come meanwhile; the removal and its size."""
        uid = study.study_instance_uid
        # through the queue, so that everything that was told to the ledger before is seen
        content = self._committed(self._recorder.submit(lambda connection: _removable(connection, uid)))
        if content is None:
            return None
        set_aside = self._set_aside(uid, reason, content)
        return None if set_aside is None else (set_aside[0], self._finish(*set_aside))

    def _set_aside(
        self, study_instance_uid: str, reason: Reason, content: _Content
    ) -> "tuple[Removal, Future[Any]] | None":
        """Step 1, with step 2 queued; None when the study is not as `content` says any more."""
        folder = self._store.root / study_instance_uid
        with self._store.placing:
            if self._store.in_flight(study_instance_uid) or self._holds(study_instance_uid):
                return None
            files = {path.relative_to(self._store.root).as_posix() for path in folder.glob("*/*" + INSTANCE_SUFFIX)}
            if not folder.is_dir() or not files <= content.paths:
                return None
            removal = Removal(study_instance_uid, reason, max(utc_now(), content.newest_at))
            folder.rename(self._store.root / removal.folder_name)
            sync_folder(self._store.root)
            return removal, self._submit_record(removal)  # before whatever comes of the study from now on

    def finish_removals(self) -> None:
        """Finish what was set aside and not removed, be it by another process that ended."""
        for removal in self._left_over():
            self._finish(removal, self._submit_record(removal))

    def _left_over(self) -> list[Removal]:
        found = (Removal.from_folder_name(path.name) for path in self._store.root.glob(REMOVING + "*"))
        return sorted((removal for removal in found if removal is not None), key=lambda removal: removal.at)

    def _finish(self, removal: Removal, recorded: "Future[Any]") -> int:
        """Step 3 once step 2 is committed; returns how many bytes the study had."""
        count, size_bytes = self._committed(recorded)
        folder = self._store.root / removal.folder_name
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise StoreError(f"cannot remove {folder}: {error.strerror}; check the rights on store.root") from error
        log.info(
            "removed study %s (%s): %d instances, %.1f MB",
            removal.study_instance_uid,
            removal.reason,
            count,
            size_bytes / 1e6,
        )
        return int(size_bytes)

    def _submit_record(self, removal: Removal) -> "Future[Any]":
        return self._recorder.submit(lambda connection: record_removal(connection, removal))

    def _committed(self, done: "Future[Any]") -> Any:
        """The result of a statement, however long the ledger is away; raises _Stopped when it is time to stop."""
        while not self._stopping.is_set():
            try:
                return done.result(LOOK_UP_EVERY_S)
            except FutureTimeoutError:
                continue
            except HeraldError:
                raise
            except Exception as error:
                raise LedgerError(f"the ledger refuses a statement of retention: {error}; report it") from error
        raise _Stopped

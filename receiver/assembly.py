"""When is a series complete? A pure state machine, told the time, and the thread that acts on it.

Reasons for closing:
- `released-and-even`: every association that sent it is gone, and its planes are an even, gap-free stack;
- `released-and-not-a-stack`: the same, and nothing in it is a plane of a stack (localizer, report, secondary capture,
  enhanced multi-frame), so that there is nothing to wait for;
- `announced-and-complete`: every association that sent it is gone, and everything is there that a procedure step
  (MPPS) or an availability notification said belongs to it;
- `quiet`: no new image for the quiet period, whatever else.

While something is known to be missing (announced, broken off or refused, and not there), or after its sender's
connection broke, nothing but quiet closes it, and the event says what is missing.
"""

import heapq
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection

from herald.config import ReceiverConfig
from herald.errors import DicomError, HeraldError, StoreError
from herald.events import SeriesReceived, utc_now
from herald.instance import InstanceHeader, Plane, read_header
from herald.reconcile import restore_index
from herald.store import INSTANCE_SUFFIX, StudyStore
from receiver.geometry import is_even
from receiver.record import (
    Arrival,
    Pause,
    Recorder,
    SeriesKey,
    await_instances,
    awaited,
    close_series,
    mark_published,
    open_series,
    pauses_seen,
    still_open,
    unpublished,
)
from receiver.settle import REMEMBERED_SERIES, Settling

log = logging.getLogger(__name__)

RELEASED_AND_EVEN: Final = "released-and-even"
RELEASED_AND_NOT_A_STACK: Final = "released-and-not-a-stack"
QUIET: Final = "quiet"
ANNOUNCED_AND_COMPLETE: Final = "announced-and-complete"

MOST_ANNOUNCED: Final = 200_000
"""SOP Instance UIDs known to be missing of series that are not open, some 30 MB; the oldest are forgotten."""


# --- state machine ---------------------------------------------------------------------------------------------------


@dataclass
class _Series:
    """One open series: what it holds, who sends it, and when it last changed (seconds of a monotonic clock)."""

    last_image: float
    last_change: float
    alarm: float = math.inf
    """The earliest moment at which it is going to be looked at."""
    planes: dict[str, Plane | None] = field(default_factory=dict)
    """By SOP Instance UID: the planes of a stack."""
    others: set[str] = field(default_factory=set)
    """SOP Instance UIDs of what is not part of a stack."""
    associations: set[int] = field(default_factory=set)
    senders: set[str] = field(default_factory=set)
    """Calling AE titles."""
    released_at: float | None = None
    """Since when nobody sends it any more."""
    pause_s: float = 0.0
    """Longest pause between its release and its next new image, of those that a rest can bridge."""
    announced: bool = False
    missing: set[str] = field(default_factory=set)
    """SOP Instance UIDs that are announced, broken off or refused, and not there."""
    more_missing: bool = False
    """Since the ledger was last told."""
    resumed: bool = False
    cut_off: bool = False
    """The process or a connection ended while it was sent, so that its sender, who was cut off, is waited for."""
    broken: bool = False
    """It was the one that was being sent when the connection broke."""
    released: str | None = None
    """Reason for which it may close once it is released; None until looked at."""
    looked_at: bool = False

    def add(self, header: InstanceHeader) -> None:
        if header.stacked:
            self.planes[header.sop_instance_uid] = header.plane
        else:
            self.others.add(header.sop_instance_uid)
        self.missing.discard(header.sop_instance_uid)
        self.looked_at = False

    def holds(self, sop_instance_uid: str) -> bool:
        return sop_instance_uid in self.planes or sop_instance_uid in self.others

    def announce(self, sop_instance_uids: Iterable[str]) -> None:
        self.announced = True
        self.miss(sop_instance_uids)

    def miss(self, sop_instance_uids: Iterable[str]) -> None:
        new = {uid for uid in sop_instance_uids if not self.holds(uid)} - self.missing
        self.missing |= new
        self.more_missing = self.more_missing or bool(new)

    def what_is_missing(self) -> tuple[str, ...]:
        """In words."""
        words = []
        if len(self.missing) == 1:
            words.append("1 instance was announced or sent and is not there")
        elif self.missing:
            words.append(f"{len(self.missing)} instances were announced or sent and are not there")
        if self.broken:
            words.append("the connection of its sender broke before a release")
        return tuple(words)

    def reason(self, fewest: int) -> str | None:
        if not self.looked_at:
            self.looked_at = True
            self.released = None
            if not self.planes:
                self.released = RELEASED_AND_NOT_A_STACK if self.others else None
            elif is_even(self.planes.values(), fewest):
                self.released = RELEASED_AND_EVEN
        return self.released


@dataclass(frozen=True, order=True)
class Closed:
    """One series that was due: since when, which, why, and what its senders' pauses were."""

    due_at: float
    key: SeriesKey
    reason: str
    settle_s: float
    """The rest that it was given."""
    largest_gap_s: float | None
    """The longest pause that it showed; None when it was not seen from its beginning."""
    missing: tuple[str, ...]
    """What is known to be missing, in words."""


class Assembly:
    """Which series are open, and when each is due to be closed; every method is told `now` in seconds.

    An image costs constant time. Each open series has an alarm, which may ring too early, and is then set again, but
    never too late: images, which only put things off, need not touch it, and geometry is judged when it rings.
    """

    def __init__(self, settling: Settling, quiet_s: float, min_even_slices: int) -> None:
        self._settling = settling
        self._quiet_s = quiet_s
        self._fewest = min_even_slices
        self._open: dict[SeriesKey, _Series] = {}
        self._sent_over: dict[int, dict[SeriesKey, None]] = {}  # by association, what was sent last at the end
        self._alarms: list[tuple[float, SeriesKey]] = []
        self._released_at: OrderedDict[SeriesKey, float] = OrderedDict()  # of series that were closed just now
        # by Series Instance UID, of what is not open: whether that was announced, and SOP Instance UIDs
        self._missing: OrderedDict[str, tuple[bool, set[str]]] = OrderedDict()
        self._missing_count = 0

    def __contains__(self, key: SeriesKey) -> bool:
        return key in self._open

    def __len__(self) -> int:
        return len(self._open)

    def holds(self, study_instance_uid: str) -> bool:
        """Whether a series of this study is open."""
        return any(study == study_instance_uid for study, _ in self._open)

    def image(
        self, key: SeriesKey, header: InstanceHeader, association: int, sender: str, now: float, new: bool = True
    ) -> bool:
        """Take in one image; returns whether it opened the series. Known bytes (`new` false) open nothing."""
        entry = self._open.get(key)
        opened = entry is None
        if entry is None:
            if not new:
                return False
            entry = self._opened(key, now)
            entry.released_at = self._released_at.pop(key, None)  # closed too early
        if new and entry.released_at is not None:
            pause_s = now - entry.released_at
            if entry.pause_s < pause_s <= self._settling.max_s:
                entry.pause_s = pause_s
                self._settling.note(sender, key, pause_s)
        if association not in entry.associations:  # its sender is back
            entry.cut_off = entry.broken = False
        entry.add(header)
        entry.associations.add(association)
        entry.senders.add(sender)
        entry.released_at = None
        entry.last_image = entry.last_change = now
        self._note_sent(association, key)
        return opened

    def not_stored(self, sop_instance_uid: str, key: SeriesKey | None, association: int) -> None:
        """An instance broke off or was refused; where nobody can tell its series, it is of the one sent last."""
        if key is not None:
            self._note_sent(association, key)
        elif (sent := self._sent_over.get(association)) is not None:
            key = next(reversed(sent))
        else:
            return
        entry = self._open.get(key)
        if entry is not None:
            entry.miss([sop_instance_uid])
        else:
            self._remember(key[1], [sop_instance_uid], announced=False)

    def resume(self, key: SeriesKey, now: float, missing: Iterable[str] = ()) -> None:
        """Open a series again that was open when the process ended, and give its sender time to come back."""
        if key not in self._open:
            entry = self._opened(key, now)
            entry.resumed = entry.cut_off = True
        self._open[key].miss(missing)

    def earlier(self, key: SeriesKey, headers: Iterable[InstanceHeader]) -> None:
        """Add what the store already held of an open series."""
        entry = self._open.get(key)
        if entry is None:
            return
        for header in headers:
            if not entry.holds(header.sop_instance_uid):
                entry.add(header)
        self._set_alarm(key, entry)

    def sop_instance_uids(self, key: SeriesKey) -> set[str]:
        """What is known of an open series."""
        entry = self._open.get(key)
        return entry.planes.keys() | entry.others if entry is not None else set()

    def more_missing(self, key: SeriesKey) -> list[str]:
        """What is known to be missing of an open series; nothing where no more is than when this was last asked."""
        entry = self._open[key]
        more, entry.more_missing = entry.more_missing, False
        return sorted(entry.missing) if more else []

    def announce(self, series_instance_uid: str, sop_instance_uids: Collection[str]) -> list[SeriesKey]:
        """Somebody who knows says what belongs to a series, which may be yet to come, open, or closed.

        What several announcements say adds up. One that comes after the series was closed changes nothing. Returns the
        open series that it is about.
        """
        if not sop_instance_uids:
            return []
        keys = [key for key in self._open if key[1] == series_instance_uid]
        for key in keys:
            self._open[key].announce(sop_instance_uids)
            self._set_alarm(key, self._open[key])
        if not keys:
            self._remember(series_instance_uid, sop_instance_uids, announced=True)
        return keys

    def association_ended(self, association: int, now: float, broken: bool = False) -> list[SeriesKey]:
        """An association was ended by its sender or has `broken`; returns the open series that it sent."""
        keys = []
        sent = self._sent_over.pop(association, {})
        for key in sent:
            entry = self._open.get(key)
            if entry is None or association not in entry.associations:
                continue
            keys.append(key)
            entry.associations.remove(association)
            if broken:
                entry.cut_off = True
                entry.broken = entry.broken or key == next(reversed(sent))
            entry.last_change = now
            if not entry.associations:
                entry.released_at = now
            self._set_alarm(key, entry)
        return keys

    def due(self, now: float) -> list[Closed]:
        """Close what is due, in the order of the deadlines."""
        found = []
        while self._alarms and self._alarms[0][0] <= now:
            at, key = heapq.heappop(self._alarms)
            entry = self._open.get(key)
            if entry is None or entry.alarm != at:  # closed meanwhile, or an earlier alarm took its place
                continue
            entry.alarm = math.inf
            deadline, reason = self._deadline_of(entry)
            if deadline <= now and reason is None:
                deadline, reason = self._judged(entry)
            if deadline <= now and reason is not None:
                found.append(self._closed(key, entry, deadline, reason))
            else:
                self._set_alarm(key, entry, deadline)
        self._forget_released(now)
        return sorted(found)

    def deadline(self) -> float | None:
        """When to look again, at the latest when the next series is due; None when none is open."""
        while self._alarms:
            at, key = self._alarms[0]
            entry = self._open.get(key)
            if entry is not None and entry.alarm == at:
                return at
            heapq.heappop(self._alarms)
        return None

    # --- deadlines ---------------------------------------------------------------------------------------------------

    def _deadline_of(self, entry: _Series) -> tuple[float, str | None]:
        """When a series is due or to be judged, and why; no reason yet where its geometry must be judged then."""
        quiet = entry.last_image + self._quiet_s, QUIET
        if entry.associations or entry.missing:
            return quiet
        if entry.announced:
            return entry.last_change, ANNOUNCED_AND_COMPLETE
        if entry.cut_off:
            return quiet
        rested = entry.last_change + self._rest_of(entry)
        return (rested, None) if rested < quiet[0] else quiet

    def _judged(self, entry: _Series) -> tuple[float, str]:
        reason = entry.reason(self._fewest)
        if reason is None:
            return entry.last_image + self._quiet_s, QUIET
        return entry.last_change + self._rest_of(entry), reason

    def _rest_of(self, entry: _Series) -> float:
        return self._settling.rest_s(entry.senders, entry.pause_s)

    def _set_alarm(self, key: SeriesKey, entry: _Series, at: float | None = None) -> None:
        """Ring no later than `at`, by default when the series is due or to be judged."""
        at = self._deadline_of(entry)[0] if at is None else at
        if at < entry.alarm:
            entry.alarm = at
            heapq.heappush(self._alarms, (at, key))

    # --- opening and closing -----------------------------------------------------------------------------------------

    def _opened(self, key: SeriesKey, now: float) -> _Series:
        entry = self._open[key] = _Series(last_image=now, last_change=now)
        announced, missing = self._missing.pop(key[1], (False, set()))
        self._missing_count -= len(missing)
        entry.announced = announced
        entry.miss(missing)
        self._set_alarm(key, entry, now + self._quiet_s)
        return entry

    def _closed(self, key: SeriesKey, entry: _Series, due_at: float, reason: str) -> Closed:
        settle_s = self._rest_of(entry)
        seen = not entry.resumed or entry.pause_s > 0
        if seen:
            for sender in entry.senders:
                self._settling.note(sender, key, 0.0)
        if entry.missing:  # what comes late may still complete it
            self._remember(key[1], entry.missing, entry.announced)
        if entry.released_at is not None:
            self._released_at[key] = entry.released_at
        del self._open[key]
        return Closed(due_at, key, reason, settle_s, entry.pause_s if seen else None, entry.what_is_missing())

    def _forget_released(self, now: float) -> None:
        """A pause longer than the longest rest teaches nothing."""
        while self._released_at and next(iter(self._released_at.values())) < now - self._settling.max_s:
            self._released_at.popitem(last=False)

    def _remember(self, series_instance_uid: str, sop_instance_uids: Iterable[str], announced: bool) -> None:
        before, missing = self._missing.pop(series_instance_uid, (False, set()))
        self._missing_count -= len(missing)
        missing.update(sop_instance_uids)
        self._missing[series_instance_uid] = before or announced, missing
        self._missing_count += len(missing)
        while self._missing_count > MOST_ANNOUNCED or len(self._missing) > MOST_ANNOUNCED // 50:
            _, (_, forgotten) = self._missing.popitem(last=False)
            self._missing_count -= len(forgotten)

    def _note_sent(self, association: int, key: SeriesKey) -> None:
        sent = self._sent_over.setdefault(association, {})
        sent.pop(key, None)
        sent[key] = None


# --- thread ----------------------------------------------------------------------------------------------------------


class SeriesAssembler:
    """Records arrivals, closes series when they are due, and publishes them; its methods never wait for a database.

    A bus or a ledger that is down is tried again until it answers.
    """

    RETRY_S = 1.0

    def __init__(
        self,
        config: ReceiverConfig,
        store: StudyStore,
        recorder: Recorder,
        publish: Callable[[SeriesReceived], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settling = Settling(config.settle_s, config.settle_min_s, config.settle_max_s)
        self._assembly = Assembly(self._settling, config.quiet_s, config.min_even_slices)
        self._store = store
        self._recorder = recorder
        self._publish = publish
        self._clock = clock
        self._changed = threading.Condition()
        self._unread: set[SeriesKey] = set()  # open series of which the store may hold more than we know
        self._to_publish: list[SeriesReceived] = []
        self._wakes_at: float | None = None
        self._stopping = False
        self._publish_at = 0.0  # not before this moment: the bus is down
        self._thread = threading.Thread(target=self._run, name="assembler", daemon=True)

    def start(self) -> "Future[Any]":
        """Start the thread, and resume from the ledger as soon as it answers; the future says when that is done."""
        self._thread.start()
        done = self._recorder.submit(self._left_over)
        done.add_done_callback(self._resume)
        return done

    def stop(self, timeout_s: float) -> None:
        """Stop; open series stay open for the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def arrived(self, arrival: Arrival, association: int) -> None:
        """Take in an instance that is durable in the store; its ledger row follows."""
        key = arrival.series_key
        with self._changed:
            opened = self._assembly.image(
                key,
                arrival.header,
                association,
                arrival.calling_ae_title,
                self._clock(),
                new=arrival.stored.new,
            )
            if opened:
                self._unread.add(key)
                self._changed.notify()

            # queued under the lock, so that the ledger sees openings and closings in their true order
            self._recorder.record(arrival)
            if opened:
                header, sender, at = arrival.header, arrival.calling_ae_title, arrival.received_at
                self._recorder.submit(lambda connection: open_series(connection, key, header, sender, at))

    def not_stored(self, sop_instance_uid: str, key: SeriesKey | None, association: int) -> None:
        """An instance broke off or was refused; its series where that is known."""
        with self._changed:
            self._assembly.not_stored(sop_instance_uid, key, association)

    def association_ended(self, association: int, broken: bool = False) -> None:
        """Nothing more comes over this association, which its sender has ended, or which has `broken`."""
        with self._changed:
            self._keep_missing(self._assembly.association_ended(association, self._clock(), broken))
            self._wake_if_earlier()

    def announce(self, series_instance_uid: str, sop_instance_uids: Collection[str]) -> None:
        """These instances belong to the series, says an MPPS or an availability notification; any time is right."""
        with self._changed:
            self._keep_missing(self._assembly.announce(series_instance_uid, sop_instance_uids))
            self._wake_if_earlier()

    def _keep_missing(self, keys: Iterable[SeriesKey]) -> None:
        """What is known to be missing outlives the process; what comes meanwhile the next one finds in the store."""
        for key in keys:
            if uids := self._assembly.more_missing(key):
                self._recorder.submit(_awaiting(key, uids))

    def holds(self, study_instance_uid: str) -> bool:
        """Whether a series of this study is open, so that more of it may come."""
        with self._changed:
            return self._assembly.holds(study_instance_uid)

    def _wake_if_earlier(self) -> None:
        deadline = self._assembly.deadline()
        if deadline is not None and (self._wakes_at is None or deadline < self._wakes_at):
            self._changed.notify()

    # --- at start ----------------------------------------------------------------------------------------------------

    def _left_over(self, connection: Connection) -> "_LeftOver":
        """What the last process left: files without a row, series that are open, series not yet published."""
        try:
            restore_index(connection, self._store)
        except (StoreError, OSError) as error:  # what the ledger has is taken up all the same
            log.error("files without a row are not restored: %s; run `herald reconcile --rebuild`", error)
        pauses = pauses_seen(connection, REMEMBERED_SERIES)
        return _LeftOver(still_open(connection), awaited(connection), unpublished(connection), pauses)

    def _resume(self, done: "Future[_LeftOver]") -> None:
        if done.exception():
            return
        keys, events = done.result().open, done.result().unpublished
        with self._changed:
            for pause in done.result().pauses:
                self._settling.note(pause.calling_ae_title, pause.key, pause.largest_gap_s)
            for key in keys:
                self._assembly.resume(key, self._clock(), done.result().awaited.get(key, ()))
            self._unread.update(keys)
            self._to_publish.extend(events)
            self._changed.notify()
        if keys or events:
            log.info("resumed %d open series and %d closed but not yet published", len(keys), len(events))

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                unread, self._unread = self._unread, set()
            for key in unread:
                self._read(key)
            self._send_out()
            with self._changed:
                if not self._unread:
                    self._close_due()
                    self._wait()

    def _close_due(self) -> None:
        for closed in self._assembly.due(self._clock()):
            self._close(closed, utc_now())

    def _close(self, closed: Closed, at: datetime) -> None:
        def statement(connection: Connection) -> SeriesReceived | None:
            return close_series(
                connection, closed.key, closed.reason, at, closed.settle_s, closed.largest_gap_s, closed.missing
            )

        self._recorder.submit(statement).add_done_callback(self._closed)

    def _closed(self, done: "Future[SeriesReceived | None]") -> None:
        event = None if done.exception() else done.result()
        if event is None:
            return
        log.info(
            "series %s revision %d closed: %d instances, %s%s",
            event.series_instance_uid,
            event.revision,
            event.instance_count,
            event.close_reason,
            "".join(f"; {what}" for what in event.missing),
        )
        with self._changed:
            self._to_publish.append(event)
            self._changed.notify()

    def _wait(self) -> None:
        if self._stopping:
            return
        deadlines = [self._assembly.deadline(), self._publish_at if self._to_publish else None]
        self._wakes_at = min((deadline for deadline in deadlines if deadline is not None), default=None)
        self._changed.wait(None if self._wakes_at is None else max(0.0, self._wakes_at - self._clock()))
        self._wakes_at = None

    def _read(self, key: SeriesKey) -> None:
        """Read the headers of what the store holds of this series from earlier."""
        try:
            paths = self._store.series_paths(*key)
            with self._changed:
                known = self._assembly.sop_instance_uids(key)
            missing = [path for path in paths if path.name.removesuffix(INSTANCE_SUFFIX) not in known]
            headers = [header for path in missing if (header := _header(path)) is not None]
        except (StoreError, OSError) as error:
            log.error("series %s: earlier images cannot be read (%s); it closes after the quiet period", key[1], error)
            return
        with self._changed:
            self._assembly.earlier(key, headers)

    def _send_out(self) -> None:
        """Publish what is closed, in order; what the bus does not take stays."""
        while True:
            with self._changed:
                if not self._to_publish or self._stopping or self._clock() < self._publish_at:
                    return
                event = self._to_publish[0]
            try:
                self._publish(event)
            except HeraldError as error:
                if not self._publish_at:
                    log.error("%s; closed series wait and reception goes on", error)
                self._publish_at = self._clock() + self.RETRY_S
                return
            if self._publish_at:
                log.info("the bus answers again")
            self._publish_at = 0.0
            self._recorder.submit(_marked(event, utc_now()))
            with self._changed:
                self._to_publish.pop(0)


@dataclass(frozen=True)
class _LeftOver:
    """What an earlier process left in the ledger."""

    open: list[SeriesKey]
    awaited: dict[SeriesKey, list[str]]
    unpublished: list[SeriesReceived]
    pauses: list[Pause]


def _awaiting(key: SeriesKey, sop_instance_uids: list[str]) -> Callable[[Connection], None]:
    return lambda connection: await_instances(connection, key, sop_instance_uids)


def _marked(event: SeriesReceived, at: datetime) -> Callable[[Connection], None]:
    return lambda connection: mark_published(connection, event, at)


def _header(path: Path) -> InstanceHeader | None:
    try:
        return read_header(path)
    except DicomError as error:
        log.warning("%s", error)
        return None

"""When is a series complete? A pure state machine, told the time, and the thread that acts on it.

Reasons for closing:
- `released-and-even`: every association that sent it is gone, and its planes are an even, gap-free stack;
- `released-and-not-a-stack`: the same, and nothing in it is a plane of a stack (localizer, report, secondary capture,
  enhanced multi-frame), so that there is nothing to wait for;
- `quiet`: no new image for the quiet period, whatever else.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection

from herald.config import ReceiverConfig
from herald.errors import DicomError, HeraldError, StoreError
from herald.events import SeriesReceived, utc_now
from herald.instance import InstanceHeader, Plane, read_header
from herald.reconcile import restore_index
from herald.store import INSTANCE_SUFFIX, StudyStore
from receiver.record import (
    Arrival,
    Recorder,
    SeriesKey,
    close_series,
    mark_published,
    open_series,
    record_instance,
    still_open,
    unpublished,
)

log = logging.getLogger(__name__)

RELEASED_AND_EVEN: Final = "released-and-even"
RELEASED_AND_NOT_A_STACK: Final = "released-and-not-a-stack"
QUIET: Final = "quiet"

SAME_ORIENTATION = 0.05
"""Largest difference of direction cosines within one stack."""
SAME_POSITION_MM = 0.01
EVEN_TOLERANCE = 0.1
"""Steps of one stack differ by less than this fraction; a missing slice makes a step twice as long."""
MOST_STACKS = 3
"""Head protocols change their spacing once or twice, as from 4 mm in the posterior fossa to 7 mm above."""
FEWEST_STEPS = 3
"""Fewest equal steps that make a stack of their own."""


# --- geometry --------------------------------------------------------------------------------------------------------


def is_even(planes: Collection[Plane | None], fewest: int) -> bool:
    """Whether the planes are one even, gap-free stack, or a few such stacks end to end; at least `fewest` positions.

    A plane without position, or positions that occur unequally often (a second pass that is half sent), are not even.
    """
    known = [plane for plane in planes if plane is not None]
    if len(known) < max(fewest, 2) or len(known) < len(planes):
        return False
    positions = _positions_mm(known)
    starts = np.flatnonzero(np.diff(positions, prepend=-np.inf) > SAME_POSITION_MM)
    times = np.diff(starts, append=len(positions))
    if len(starts) < max(fewest, 2) or bool((times != times[0]).any()):
        return False
    return _piecewise_constant([float(step) for step in np.diff(positions[starts])])


def _positions_mm(planes: list[Plane]) -> NDArray[np.float64]:
    """Ascending positions along the normal of those planes that share the usual orientation."""
    orientations = np.array([plane.orientation for plane in planes])
    usual = np.median(orientations, axis=0)
    same = np.abs(orientations - usual).max(axis=1) < SAME_ORIENTATION
    normal = np.cross(usual[:3], usual[3:])
    points = np.array([plane.position for plane in planes])[same]
    positions: NDArray[np.float64] = np.sort(points @ normal)
    return positions


def _piecewise_constant(steps: list[float]) -> bool:
    runs: list[list[float]] = []
    for step in steps:
        if runs and abs(step - runs[-1][0]) <= EVEN_TOLERANCE * runs[-1][0]:
            runs[-1].append(step)
        else:
            runs.append([step])
    if len(runs) == 1:
        return True
    for i, run in enumerate(runs):
        if len(run) >= FEWEST_STEPS:
            continue
        joint = len(run) == 1 and 0 < i < len(runs) - 1
        # where two stacks meet the step is anything up to the wider spacing; a longer one is a gap
        if not joint or run[0] > (1 + EVEN_TOLERANCE) * max(runs[i - 1][0], runs[i + 1][0]):
            return False
    return sum(len(run) >= FEWEST_STEPS for run in runs) <= MOST_STACKS


# --- state machine ---------------------------------------------------------------------------------------------------


@dataclass
class _Series:
    """One open series: what it holds, who sends it, and when it last changed (seconds of a monotonic clock)."""

    last_image: float
    last_change: float
    planes: dict[str, Plane | None] = field(default_factory=dict)
    """By SOP Instance UID: the planes of a stack."""
    others: set[str] = field(default_factory=set)
    """SOP Instance UIDs of what is not part of a stack."""
    associations: set[int] = field(default_factory=set)
    cut_off: bool = False
    """The process ended while it was sent, so that its sender, who was cut off, is waited for."""
    released: str | None = None
    """Reason for which it may close once it is released; None until looked at."""
    looked_at: bool = False

    def add(self, header: InstanceHeader) -> None:
        if header.stacked:
            self.planes[header.sop_instance_uid] = header.plane
        else:
            self.others.add(header.sop_instance_uid)
        self.looked_at = False

    def reason(self, fewest: int) -> str | None:
        if not self.looked_at:
            self.looked_at = True
            self.released = None
            if not self.planes:
                self.released = RELEASED_AND_NOT_A_STACK if self.others else None
            elif is_even(self.planes.values(), fewest):
                self.released = RELEASED_AND_EVEN
        return self.released


class Assembly:
    """Which series are open, and when each is due to be closed; every method is told `now` in seconds."""

    def __init__(self, settle_s: float, quiet_s: float, min_even_slices: int) -> None:
        self._settle_s = settle_s
        self._quiet_s = quiet_s
        self._fewest = min_even_slices
        self._open: dict[SeriesKey, _Series] = {}

    def __contains__(self, key: SeriesKey) -> bool:
        return key in self._open

    def __len__(self) -> int:
        return len(self._open)

    def image(self, key: SeriesKey, header: InstanceHeader, association: int, now: float, new: bool = True) -> bool:
        """Take in one image; returns whether it opened the series. Known bytes (`new` false) open nothing."""
        entry = self._open.get(key)
        opened = entry is None
        if entry is None:
            if not new:
                return False
            entry = self._open[key] = _Series(last_image=now, last_change=now)
        entry.add(header)
        entry.associations.add(association)
        entry.last_image = entry.last_change = now
        return opened

    def resume(self, key: SeriesKey, now: float) -> None:
        """Open a series again that was open when the process ended, and give its sender time to come back."""
        self._open.setdefault(key, _Series(last_image=now, last_change=now, cut_off=True))

    def earlier(self, key: SeriesKey, headers: Iterable[InstanceHeader]) -> None:
        """Add what the store already held of an open series."""
        entry = self._open.get(key)
        for header in headers if entry is not None else ():
            if entry is not None and header.sop_instance_uid not in entry.planes:
                entry.add(header)

    def sop_instance_uids(self, key: SeriesKey) -> set[str]:
        """What is known of an open series."""
        entry = self._open.get(key)
        return entry.planes.keys() | entry.others if entry is not None else set()

    def association_ended(self, association: int, now: float) -> None:
        """An association was released or aborted, or its connection is gone."""
        for entry in self._open.values():
            if association in entry.associations:
                entry.associations.remove(association)
                entry.cut_off = False
                entry.last_change = now

    def due(self, now: float) -> list[tuple[SeriesKey, str]]:
        """Close what is due: keys with the reason, in the order of their deadlines."""
        found = sorted(
            (deadline, key, reason) for key, (deadline, reason) in self._deadlines().items() if deadline <= now
        )
        for _, key, _ in found:
            del self._open[key]
        return [(key, reason) for _, key, reason in found]

    def deadline(self) -> float | None:
        """When the next series is due; None when none is open."""
        return min((deadline for deadline, _ in self._deadlines().values()), default=None)

    def _deadlines(self) -> dict[SeriesKey, tuple[float, str]]:
        return {key: self._deadline_of(entry) for key, entry in self._open.items()}

    def _deadline_of(self, entry: _Series) -> tuple[float, str]:
        quiet = entry.last_image + self._quiet_s, QUIET
        if entry.associations or entry.cut_off:
            return quiet
        reason = entry.reason(self._fewest)
        if reason is None:
            return quiet
        return min(quiet, (entry.last_change + self._settle_s, reason))


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
        self._assembly = Assembly(config.settle_s, config.quiet_s, config.min_even_slices)
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

    def arrived(self, arrival: Arrival, association: int) -> "Future[Any]":
        """Take in an instance that is durable in the store; the future is done when its ledger row is committed."""
        key = arrival.series_key
        with self._changed:
            opened = self._assembly.image(key, arrival.header, association, self._clock(), new=arrival.stored.new)
            if opened:
                self._unread.add(key)
                self._changed.notify()

            def statement(connection: Connection) -> None:
                record_instance(connection, arrival)
                if opened:
                    open_series(connection, key, arrival.header, arrival.calling_ae_title, arrival.received_at)

            # queued under the lock, so that the ledger sees openings and closings in their true order
            return self._recorder.submit(statement)

    def association_ended(self, association: int) -> None:
        """Nothing more comes over this association."""
        with self._changed:
            self._assembly.association_ended(association, self._clock())
            self._wake_if_earlier()

    def _wake_if_earlier(self) -> None:
        deadline = self._assembly.deadline()
        if deadline is not None and (self._wakes_at is None or deadline < self._wakes_at):
            self._changed.notify()

    # --- at start ----------------------------------------------------------------------------------------------------

    def _left_over(self, connection: Connection) -> tuple[list[SeriesKey], list[SeriesReceived]]:
        """What the last process left: files without a row, series that are open, series not yet published."""
        restore_index(connection, self._store)
        return still_open(connection), unpublished(connection)

    def _resume(self, done: "Future[tuple[list[SeriesKey], list[SeriesReceived]]]") -> None:
        if done.exception():
            return
        keys, events = done.result()
        with self._changed:
            for key in keys:
                self._assembly.resume(key, self._clock())
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
        for key, reason in self._assembly.due(self._clock()):
            self._close(key, reason)

    def _close(self, key: SeriesKey, reason: str) -> None:
        closed_at = utc_now()
        done = self._recorder.submit(lambda connection: close_series(connection, key, reason, closed_at))
        done.add_done_callback(self._closed)

    def _closed(self, done: "Future[SeriesReceived | None]") -> None:
        event = None if done.exception() else done.result()
        if event is None:
            return
        log.info(
            "series %s revision %d closed: %d instances, %s",
            event.series_instance_uid,
            event.revision,
            event.instance_count,
            event.close_reason,
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


def _marked(event: SeriesReceived, at: datetime) -> Callable[[Connection], None]:
    return lambda connection: mark_published(connection, event, at)


def _header(path: Path) -> InstanceHeader | None:
    try:
        return read_header(path)
    except DicomError as error:
        log.warning("%s", error)
        return None

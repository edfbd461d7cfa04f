"""How long each step took, and what reading positives first saves, by simulating the queue of unread studies.

The simulation takes the site's own arrivals, answers and times of answer; only how long a reading lasts is drawn.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from herald.validation.accuracy import study_cases
from herald.validation.row import ValidationRow

STEPS: tuple[tuple[str, str, str], ...] = (
    ("acquired to first image", "acquired_at", "first_image_at"),
    ("first to last image", "first_image_at", "last_image_at"),
    ("last image to complete", "last_image_at", "closed_at"),
    ("complete to taken up", "closed_at", "started_at"),
    ("taken up to classified", "started_at", "classified_at"),
    ("classified to detected", "classified_at", "detected_at"),
    ("taken up to result", "started_at", "triaged_at"),
    ("result to web page", "triaged_at", "posted_at"),
    ("result to page sent", "triaged_at", "paged_at"),
    ("page sent to acknowledged", "paged_at", "acknowledged_at"),
    ("result to first verdict", "triaged_at", "read_at"),
    ("last image to result", "last_image_at", "triaged_at"),
    ("last image to page sent", "last_image_at", "paged_at"),
    ("last image to first verdict", "last_image_at", "read_at"),
)

LATER = datetime.max.replace(tzinfo=UTC)

READ_MINUTES = 6.0
"""Mean time of a reading where the record cannot tell it and nobody says otherwise."""
LONGEST_READING_MINUTES = 60.0
"""A longer gap between two verdicts of a reader was no reading."""
LEAST_GAPS = 30
"""Gaps without which the record cannot tell how long a reading takes."""
ROUNDS = 10
RESAMPLES = 1000


@dataclass(frozen=True)
class Step:
    """Seconds between two times of the record; `negative` are those that end before they start, and are left out."""

    name: str
    n: int
    p50_s: float | None
    p90_s: float | None
    p95_s: float | None
    negative: int


def steps(rows: Sequence[ValidationRow]) -> list[Step]:
    """Percentiles of every step of the series that no later revision replaced; of paging, one for each study."""
    current = [row for row in rows if not row.superseded]
    first_positive: dict[str, ValidationRow] = {}  # the page is of the study, and its first positive made it
    for row in sorted(current, key=lambda row: row.triaged_at or LATER):
        if row.disposition == "positive":
            first_positive.setdefault(row.study_instance_uid, row)
    paged = list(first_positive.values())
    found = []
    for name, start, end in STEPS:
        lasted = np.array(
            [
                (getattr(row, end) - getattr(row, start)).total_seconds()
                for row in (paged if "paged_at" in (start, end) else current)
                if getattr(row, start) and getattr(row, end)
            ]
        )
        forward = lasted[lasted >= 0] if len(lasted) else lasted
        p50, p90, p95 = np.percentile(forward, [50, 90, 95]).tolist() if len(forward) else (None, None, None)
        found.append(Step(name, len(forward), p50, p90, p95, len(lasted) - len(forward)))
    return found


# --- queue -----------------------------------------------------------------------------------------------------------


def waits(
    arrives: NDArray[np.floating], known: NDArray[np.floating], lasts: NDArray[np.floating], readers: int
) -> NDArray[np.float64]:
    """How long each of N studies waits for one of `readers`, who never leave a reading for another.

    `arrives` (N,) rises. From `known` (N,) on, a study goes before all that are not; infinity is never, so that all
    infinite is first-come-first-served. `lasts` (N,) is how long the reading takes. All in the same unit.
    """
    n = len(arrives)
    come: list[float] = arrives.tolist()  # plain floats: indexing an array is what would take the time
    take: list[float] = lasts.tolist()
    since: list[float] = np.maximum(known, arrives).tolist()
    told = sorted((study for study in range(n) if since[study] < np.inf), key=lambda study: since[study])
    free = [come[0] if n else 0.0] * readers
    begun: list[float | None] = [None] * n
    urgent: list[int] = []  # of what is known to go first, by arrival
    usual = answered = 0  # all before `usual` have been begun
    now = 0.0
    for _ in range(n):
        now = max(now, heapq.heappop(free))  # a reader who idled takes what has come since, not before it came
        while begun[usual] is not None:
            usual += 1
        now = max(now, come[usual])  # the first of those that nobody has begun
        while answered < len(told) and since[told[answered]] <= now:
            heapq.heappush(urgent, told[answered])
            answered += 1
        while urgent and begun[urgent[0]] is not None:  # it was taken before its answer was known
            heapq.heappop(urgent)
        chosen = heapq.heappop(urgent) if urgent else usual
        begun[chosen] = now
        heapq.heappush(free, now + take[chosen])
    waited: NDArray[np.float64] = np.array(begun, dtype=float) - arrives
    return waited


@dataclass(frozen=True)
class Reading:
    """How studies are read in the simulation, and where that is from."""

    readers: int
    readers_from: str
    minutes: float
    minutes_from: str


@dataclass(frozen=True)
class Saving:
    """Mean minutes of waiting of some studies, first come first served and positives first, and what is saved."""

    name: str
    n: int
    minutes_first_come: float | None
    minutes_positives_first: float | None
    p90_first_come: float | None
    p90_positives_first: float | None
    saved: float | None
    saved_low: float | None
    saved_high: float | None


@dataclass(frozen=True)
class Queue:
    """What moving positives forward saves; `utilisation` is the share of time in which the readers read."""

    studies: int
    reading: Reading
    utilisation: float | None
    savings: list[Saving]
    warnings: tuple[str, ...]


def queue(
    rows: Sequence[ValidationRow], readers: int | None = None, read_minutes: float | None = None, seed: int = 0
) -> Queue:
    """Simulate the site's readers on its own arrivals, first come first served and positives first.

    A study arrives with its last image and is known to be positive from the time of its result. Lengths of readings
    are drawn from an exponential distribution, the same ones for both orders, in ROUNDS rounds; the interval is a
    bootstrap over days of arrival.
    """
    by_series = {(row.series_instance_uid, row.revision): row for row in rows}
    timed = []
    for case in study_cases(rows):
        row = by_series[case.series_instance_uid, case.revision]
        if row.last_image_at is not None:
            timed.append((row.last_image_at, row.triaged_at or row.last_image_at, case))
    timed.sort(key=lambda item: (item[0], item[2].study_instance_uid))
    reading = _reading(rows, readers, read_minutes)
    if not timed:
        return Queue(0, reading, None, [], ())
    first = timed[0][0]
    arrives = np.array([_minutes(first, at) for at, _, _ in timed])
    known = np.array([_minutes(first, told) if case.positive else np.inf for _, told, case in timed])
    before, after = _simulated(arrives, known, reading, seed)
    day = np.array([(at - first.replace(hour=0, minute=0, second=0, microsecond=0)).days for at, _, _ in timed])
    span = float(arrives[-1] - arrives[0])
    utilisation = len(timed) * reading.minutes / (span * reading.readers) if span else None
    groups = {
        "with haemorrhage by the reference standard": [case.truth is True for _, _, case in timed],
        "positive": [case.positive for _, _, case in timed],
        "with haemorrhage, missed": [case.truth is True and not case.positive for _, _, case in timed],
        "negative": [not case.positive for _, _, case in timed],
    }
    savings = [_saving(name, before, after, day, np.array(members), seed) for name, members in groups.items()]
    warnings = []
    if utilisation is not None and utilisation >= 1:
        warnings.append(
            f"{reading.readers} readers at {reading.minutes:.1f} min cannot keep up with these arrivals: waits grow "
            "all through the period and mean nothing. Give --readers or --read-minutes as they are."
        )
    return Queue(len(timed), reading, utilisation, savings, tuple(warnings))


def _simulated(
    arrives: NDArray[np.floating], known: NDArray[np.floating], reading: Reading, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean waits (N,) of the rounds in either order."""
    rng = np.random.default_rng(seed)
    before, after = np.zeros(len(arrives)), np.zeros(len(arrives))
    for _ in range(ROUNDS):
        lasts = rng.exponential(reading.minutes, len(arrives))
        before += waits(arrives, np.full(len(arrives), np.inf), lasts, reading.readers)
        after += waits(arrives, known, lasts, reading.readers)
    return before / ROUNDS, after / ROUNDS


def _saving(
    name: str,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    day: NDArray[np.integer],
    members: NDArray[np.bool_],
    seed: int,
) -> Saving:
    n = int(members.sum())
    if not n:
        return Saving(name, 0, None, None, None, None, None, None, None)
    days, of_day = np.unique(day, return_inverse=True)  # days on which nobody of the group came are drawn too
    saved = np.bincount(of_day[members], weights=(before - after)[members], minlength=len(days))
    count = np.bincount(of_day[members], minlength=len(days))
    drawn = np.random.default_rng(seed).integers(len(days), size=(RESAMPLES, len(days)))
    counts = count[drawn].sum(axis=1)
    means = saved[drawn].sum(axis=1)[counts > 0] / counts[counts > 0]
    low, high = np.percentile(means, [2.5, 97.5]) if len(days) > 1 else (None, None)
    return Saving(
        name,
        n,
        float(before[members].mean()),
        float(after[members].mean()),
        float(np.percentile(before[members], 90)),
        float(np.percentile(after[members], 90)),
        float((before - after)[members].mean()),
        None if low is None else float(low),
        None if high is None else float(high),
    )


def _reading(rows: Sequence[ValidationRow], readers: int | None, read_minutes: float | None) -> Reading:
    """As given, else as the record tells, else a guess that says so."""
    verdicts: dict[str, list[tuple[datetime, datetime]]] = {}  # by reader: when, and since when it could be read
    for row in rows:
        for reading in row.readings:
            if row.last_image_at is not None:
                verdicts.setdefault(reading.reader, []).append((reading.at, row.last_image_at))
    gaps = []
    for of_reader in verdicts.values():
        for (earlier, _), (later, available) in pairwise(sorted(of_reader)):
            gap = _minutes(earlier, later)
            if available <= earlier and 0 < gap <= LONGEST_READING_MINUTES:  # else the reader may have had nothing
                gaps.append(gap)
    hours: dict[datetime, set[str]] = {}
    for reader, of_reader in verdicts.items():
        for at, _ in of_reader:
            hours.setdefault(at.replace(minute=0, second=0, microsecond=0), set()).add(reader)
    count, count_from = 1, "assumed; give --readers"
    if readers is not None:
        count, count_from = readers, "given"
    elif hours:
        count = max(1, round(float(np.mean([len(names) for names in hours.values()]))))
        count_from = "mean of readers who gave verdicts in the same hour"
    minutes, minutes_from = READ_MINUTES, "assumed; give --read-minutes"
    if read_minutes is not None:
        minutes, minutes_from = read_minutes, "given"
    elif len(gaps) >= LEAST_GAPS:
        judged = {row.study_instance_uid for row in rows if row.analysed and row.readings}
        share = len(judged) / len({row.study_instance_uid for row in rows if row.analysed} or judged)
        minutes = float(np.mean(gaps)) * share
        minutes_from = (
            f"mean of {len(gaps)} gaps between two verdicts of a reader while the next study was waiting, times "
            f"{share:.2f}, the share of studies that have a verdict, as others are read in between"
        )
    return Reading(count, count_from, minutes, minutes_from)


def _minutes(start: datetime, end: datetime) -> float:
    return (end - start) / timedelta(minutes=1)

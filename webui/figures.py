"""What the ledger says of the last hours and days: how many series, what came of them, and where the time went."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

import msgspec
from sqlalchemy import Connection, Text, case, cast, func, select

from herald.events import Disposition
from herald.ledger import pages, results

DAY = timedelta(hours=24)
WEEK = timedelta(days=7)
HOURS = 24
MOST_MEASURED = 3000
"""So many of the newest series of a week are measured; more would change no percentile that anybody acts on."""
LOOKED_BACK = 20
"""Among so many of the newest results the model versions are looked for."""

DISPOSITIONS: tuple[Disposition, ...] = get_args(Disposition)


@dataclass(frozen=True)
class Hour:
    """Series that had their disposition within one hour (UTC) from `begin`."""

    begin: datetime
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Of every disposition."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Traffic:
    """Series revisions of the last 60 minutes, and of each hour of the clock, the oldest first, the last begun."""

    last_hour: int
    hours: tuple[Hour, ...]

    @property
    def busiest(self) -> Hour:
        """The hour with the most series."""
        return max(self.hours, key=lambda hour: hour.total)

    @property
    def counts(self) -> Counter[str]:
        """By disposition, of all these hours."""
        return sum((Counter(hour.counts) for hour in self.hours), Counter())


@dataclass(frozen=True)
class Spread:
    """Seconds of one step: median and 95th percentile of `count` series (nearest rank)."""

    count: int
    p50: float
    p95: float


@dataclass(frozen=True)
class Step:
    """One step on the way of a series; `begins_s` is where it begins if every step before takes its median."""

    label: str
    day: Spread | None
    week: Spread | None
    begins_s: float

    @property
    def shown(self) -> Spread | None:
        """Of the last day, or of the week where that had none."""
        return self.day or self.week


@dataclass(frozen=True)
class Waterfall:
    """The steps in their order; `capped` says that the week had more series than were measured."""

    steps: tuple[Step, ...]
    capped: bool

    @property
    def end_s(self) -> float:
        """Where the longest bar ends."""
        return max((step.begins_s + step.shown.p95 for step in self.steps if step.shown), default=0.0)


@dataclass(frozen=True)
class Models:
    """What the newest results were made with; `at` is when the newest of them was."""

    at: datetime
    versions: Mapping[str, str]
    software_version: str
    config_version: str


# --- how many --------------------------------------------------------------------------------------------------------


def traffic(connection: Connection, now: datetime) -> Traffic:
    """Count the results of 24 hours of the clock, by the database along its index of `triaged_at`."""
    this_hour = now.replace(minute=0, second=0, microsecond=0)
    begins = [this_hour - timedelta(hours=back) for back in reversed(range(HOURS))]
    hour = case(*((results.c.triaged_at < end, number) for number, end in enumerate(begins[1:])), else_=len(begins) - 1)
    in_last_hour = func.sum(case((results.c.triaged_at > now - timedelta(hours=1), 1), else_=0))
    statement = (
        select(hour.label("hour"), results.c.disposition, func.count(), in_last_hour)
        .where(results.c.triaged_at >= begins[0])
        .group_by("hour", results.c.disposition)
    )
    by_hour: list[dict[str, int]] = [{} for _ in begins]
    last_hour = 0
    for number, disposition, count, recent in connection.execute(statement):
        by_hour[number][disposition] = count
        last_hour += recent
    return Traffic(last_hour, tuple(Hour(begin, counts) for begin, counts in zip(begins, by_hour, strict=True)))


# --- how long --------------------------------------------------------------------------------------------------------


class _Times(msgspec.Struct):
    """The times in a SeriesTriaged; the rest of it is passed over, which is what makes thousands quick to read."""

    occurred_at: datetime
    last_image_at: datetime | None = None
    received_at: datetime | None = None
    started_at: datetime | None = None
    classified_at: datetime | None = None
    detected_at: datetime | None = None


_TIMES = msgspec.json.Decoder(_Times)

IN_A_ROW = (
    ("Last image to complete series", "received_at"),
    ("Waits for the router", "started_at"),
    ("Loaded and classified", "classified_at"),
    ("Searched for haemorrhage", "detected_at"),
    ("Decided", "occurred_at"),
)
WORKLIST = "Decided to worklist"
PAGED = "Decided to first page"


def waterfall(connection: Connection, now: datetime) -> Waterfall:
    """Median and 95th percentile of each step over a day and a week."""
    newest = (
        select(cast(results.c.event, Text), results.c.triaged_at, results.c.posted_at)
        .where(results.c.triaged_at > now - WEEK)
        .order_by(results.c.triaged_at.desc())
        .limit(MOST_MEASURED)
    )
    took: dict[str, tuple[list[float], list[float]]] = {
        label: ([], []) for label in (*(label for label, _ in IN_A_ROW), WORKLIST, PAGED)
    }

    def note(label: str, begin: datetime, end: datetime, at: datetime) -> None:
        seconds = max((end - begin).total_seconds(), 0.0)  # clocks of two hosts may differ
        took[label][1].append(seconds)
        if at > now - DAY:
            took[label][0].append(seconds)

    rows = connection.execute(newest).all()
    for body, triaged_at, posted_at in rows:
        times = _TIMES.decode(body)
        before = times.last_image_at
        for label, field in IN_A_ROW:
            at = getattr(times, field)
            if before is not None and at is not None:
                note(label, before, at, triaged_at)
            before = at or before
        note(WORKLIST, triaged_at, posted_at, triaged_at)
    first_pages = (
        select(pages.c.finding_at, pages.c.sent_at)
        .where(pages.c.due_at > now - WEEK, pages.c.step == 0, pages.c.sent_at.is_not(None))
        .order_by(pages.c.due_at.desc())
        .limit(MOST_MEASURED)
    )
    for finding_at, sent_at in connection.execute(first_pages):
        note(PAGED, finding_at, sent_at, finding_at)
    return Waterfall(tuple(_steps(took)), capped=len(rows) == MOST_MEASURED)


def _steps(took: Mapping[str, tuple[list[float], list[float]]]) -> Iterable[Step]:
    begins_s = 0.0
    for label, (day, week) in took.items():
        step = Step(label, spread(day), spread(week), begins_s)
        yield step
        if label not in (WORKLIST, PAGED) and step.shown is not None:  # these two begin together
            begins_s += step.shown.p50


def spread(seconds: list[float]) -> Spread | None:
    """Median and 95th percentile by nearest rank; None of nothing."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def ranked(share: float) -> float:
        return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]

    return Spread(len(ordered), ranked(0.5), ranked(0.95))


# --- with what -------------------------------------------------------------------------------------------------------


def models(connection: Connection) -> Models | None:
    """The model versions of the newest results that name them; None where none does."""
    newest = select(results.c.event, results.c.triaged_at).order_by(results.c.triaged_at.desc()).limit(LOOKED_BACK)
    rows = connection.execute(newest).all()
    versions: dict[str, str] = {}
    for event, _ in rows:
        for model, version in event.get("model_versions", {}).items():
            versions.setdefault(model, version)
    if not versions:
        return None
    event, at = next((event, at) for event, at in rows if event.get("model_versions"))
    return Models(at, versions, event.get("software_version", ""), event.get("config_version", ""))

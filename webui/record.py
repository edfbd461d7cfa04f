"""The web UI's statements on the ledger: `results`, `reviews` and `audit` are its own, the rest it only reads."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import ColumnElement, RowMapping, and_, exists, func, insert, or_, select, update

from herald.events import Action, SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import Ledger, audit, pages, results, reviews, series

PAGE_SIZE = 50
VERDICTS = ("agree", "disagree", "unsure")
ANALYSED = ("positive", "negative")

_newer = results.alias("newer")
_NEWEST = ~exists().where(
    _newer.c.series_instance_uid == results.c.series_instance_uid, _newer.c.revision > results.c.revision
)
_UNACKNOWLEDGED_POSITIVE = and_(results.c.disposition == "positive", results.c.acknowledged_at.is_(None))
_OF_RESULT = and_(
    reviews.c.series_instance_uid == results.c.series_instance_uid, reviews.c.revision == results.c.revision
)


@dataclass(frozen=True)
class Result:
    """One series revision as the notifier posted it, with who acknowledged it."""

    event: SeriesTriaged
    probability: float | None
    posted_at: datetime
    acknowledged_at: datetime | None
    acknowledged_by: str | None


@dataclass(frozen=True)
class Review:
    """One acknowledgement or verdict of one reader."""

    review_id: str
    action: Action
    finding_kind: str | None
    note: str | None
    reader: str
    prediction_shown: bool
    occurred_at: datetime


@dataclass(frozen=True)
class Acknowledgement:
    """Who acknowledged a result, and when; `first` is False where somebody else was faster than who asks."""

    reader: str
    at: datetime
    first: bool


@dataclass(frozen=True)
class WorklistRow:
    """One line of the worklist; `hidden` means that this reader must judge before the prediction is shown."""

    result: Result
    verdict: Review | None
    hidden: bool


@dataclass(frozen=True)
class WorklistQuery:
    """What the reader asked of the worklist; `blind_reader` sees a prediction only after a verdict of their own."""

    disposition: str = ""
    unreviewed: bool = False
    search: str = ""
    page: int = 1
    blind_reader: str = ""


@dataclass(frozen=True)
class Worklist:
    """One page of the worklist; `total` counts every row that matches, `unacknowledged` every such positive."""

    rows: tuple[WorklistRow, ...]
    total: int
    page: int
    page_count: int
    unacknowledged: int


@dataclass(frozen=True)
class InFlight:
    """A series that the receiver knows and that has no result yet."""

    series_instance_uid: str
    revision: int
    accession_number: str
    scanner: str
    instance_count: int
    last_image_at: datetime
    step: str


# --- results ---------------------------------------------------------------------------------------------------------


def upsert_result(ledger: Ledger, event: SeriesTriaged) -> bool:
    """Keep the result of a series revision; True when it is new. An acknowledgement already given stays."""
    body = json.loads(event.to_json())
    values = {
        "study_instance_uid": event.study_instance_uid,
        "accession_number": event.accession_number[:16],  # VR SH, PS3.5 6.2; a longer one stays whole in the event
        "scanner": event.scanner[:64],
        "disposition": event.disposition,
        "probability": study_probability(event),
        "uncertain": event.uncertain,
        "event": body,
        "triaged_at": event.occurred_at,
    }
    same = and_(results.c.series_instance_uid == event.series_instance_uid, results.c.revision == event.revision)
    with ledger.begin() as connection:
        # the update comes first: on SQLite it takes the write lock, so that two posts cannot both insert
        if connection.execute(update(results).where(same).values(values)).rowcount:
            return False
        connection.execute(
            insert(results).values(
                **values,
                series_instance_uid=event.series_instance_uid,
                revision=event.revision,
                posted_at=utc_now(),
            )
        )
        return True


def study_probability(event: SeriesTriaged) -> float | None:
    """Probability of any haemorrhage; None when detection did not run."""
    by_kind = {finding.kind: finding.probability for finding in event.findings}
    return by_kind.get("any", max(by_kind.values(), default=None))


def find_result(ledger: Ledger, series_instance_uid: str, revision: int) -> Result | None:
    """The result of one series revision, or None."""
    statement = select(results).where(
        results.c.series_instance_uid == series_instance_uid, results.c.revision == revision
    )
    with ledger.read() as connection:
        row = connection.execute(statement).mappings().first()
    return _result(row) if row else None


def newest_revision(ledger: Ledger, series_instance_uid: str) -> int | None:
    """The newest revision of a series that has a result, or None."""
    statement = select(func.max(results.c.revision)).where(results.c.series_instance_uid == series_instance_uid)
    with ledger.read() as connection:
        newest: int | None = connection.execute(statement).scalar()
    return newest


def find_analysed(ledger: Ledger, study_instance_uid: str) -> list[Result]:
    """The newest result of every series of a study that was searched for haemorrhage, positives first."""
    statement = (
        select(results)
        .where(
            results.c.study_instance_uid == study_instance_uid,
            results.c.disposition.in_(ANALYSED),
            _NEWEST,
        )
        .order_by(results.c.disposition.desc(), results.c.triaged_at)
    )
    with ledger.read() as connection:
        return [_result(row) for row in connection.execute(statement).mappings()]


def _result(row: RowMapping) -> Result:
    return Result(
        event=msgspec.convert(row["event"], SeriesTriaged),
        probability=row["probability"],
        posted_at=row["posted_at"],
        acknowledged_at=row["acknowledged_at"],
        acknowledged_by=row["acknowledged_by"],
    )


# --- worklist --------------------------------------------------------------------------------------------------------


def find_worklist(ledger: Ledger, query: WorklistQuery) -> Worklist:
    """The newest revision of every series that matches: positives not yet acknowledged first, then newest.

    For a blind reader the order is by time alone, since the order would tell the prediction.
    """
    matching = _matching(query)
    first = [] if query.blind_reader else [_UNACKNOWLEDGED_POSITIVE.desc()]
    order = [*first, results.c.triaged_at.desc(), results.c.series_instance_uid]
    with ledger.read() as connection:
        total = connection.execute(select(func.count()).select_from(results).where(*matching)).scalar_one()
        page_count = max(1, -(-total // PAGE_SIZE))
        page = min(max(query.page, 1), page_count)
        statement = select(results).where(*matching).order_by(*order).limit(PAGE_SIZE).offset((page - 1) * PAGE_SIZE)
        found = [_result(row) for row in connection.execute(statement).mappings()]
        unacknowledged = connection.execute(
            select(func.count()).select_from(results).where(_NEWEST, _UNACKNOWLEDGED_POSITIVE)
        ).scalar_one()
    given = _verdicts(ledger, [result.event.series_instance_uid for result in found])
    rows = []
    for result in found:
        verdicts = given.get((result.event.series_instance_uid, result.event.revision), [])
        own = any(review.reader == query.blind_reader for review in verdicts)
        hidden = bool(query.blind_reader) and result.event.disposition in ANALYSED and not own
        rows.append(WorklistRow(result, verdicts[-1] if verdicts else None, hidden))
    return Worklist(tuple(rows), total, page, page_count, unacknowledged)


def next_unread(ledger: Ledger, after: str, blind_reader: str) -> tuple[str, int] | None:
    """Series and revision that should be read next, other than series `after`; None when nothing is left."""
    query = WorklistQuery(disposition="analysed", unreviewed=True, blind_reader=blind_reader)
    first = [] if blind_reader else [_UNACKNOWLEDGED_POSITIVE.desc()]
    statement = (
        select(results.c.series_instance_uid, results.c.revision)
        .where(*_matching(query), results.c.series_instance_uid != after)
        .order_by(*first, results.c.triaged_at.desc(), results.c.series_instance_uid)
        .limit(1)
    )
    with ledger.read() as connection:
        row = connection.execute(statement).first()
    return (row[0], row[1]) if row else None


def _matching(query: WorklistQuery) -> list[ColumnElement[bool]]:
    matching: list[ColumnElement[bool]] = [_NEWEST]
    if query.disposition == "analysed":
        matching.append(results.c.disposition.in_(ANALYSED))
    elif query.disposition:
        matching.append(results.c.disposition == query.disposition)
    if query.unreviewed:
        read = exists().where(_OF_RESULT, reviews.c.action.in_(VERDICTS))
        if query.blind_reader:
            read = read.where(reviews.c.reader == query.blind_reader)
        matching.append(~read)
    if query.search:
        matching.append(
            or_(
                results.c.accession_number.icontains(query.search, autoescape=True),
                results.c.series_instance_uid.startswith(query.search, autoescape=True),
                results.c.study_instance_uid.startswith(query.search, autoescape=True),
            )
        )
    return matching


def find_in_flight(ledger: Ledger, limit: int = 20) -> tuple[list[InFlight], int]:
    """The latest series without a result, with the step each has reached, and how many there are."""
    done = exists().where(
        results.c.series_instance_uid == series.c.series_instance_uid, results.c.revision >= series.c.revision
    )
    statement = select(series).where(~done).order_by(series.c.last_image_at.desc()).limit(limit)
    with ledger.read() as connection:
        rows = connection.execute(statement).mappings().all()
        count = connection.execute(select(func.count()).select_from(series).where(~done)).scalar_one()
    return [
        InFlight(
            series_instance_uid=row["series_instance_uid"],
            revision=row["revision"],
            accession_number=row["accession_number"],
            scanner=row["scanner"],
            instance_count=row["instance_count"],
            last_image_at=row["last_image_at"],
            step=_step(row),
        )
        for row in rows
    ], count


def _step(row: RowMapping) -> str:
    if row["closed_at"] is None:
        return "receiving images"
    return "complete, waiting for the bus" if row["published_at"] is None else "in analysis"


# --- reviews ---------------------------------------------------------------------------------------------------------


def add_review(
    ledger: Ledger,
    event: SeriesTriaged,
    action: Action,
    reader: str,
    *,
    prediction_shown: bool,
    finding_kind: str | None = None,
    note: str | None = None,
) -> Acknowledgement:
    """Record an acknowledgement or verdict, and acknowledge the study's results that nobody has acknowledged yet.

    Of several readers at once one is first, and everybody is told the same one. Every review is kept, so that a reader
    who was second can still stop a page. A later revision of the same series stays unacknowledged: this reader has not
    seen it.
    """
    now = utc_now()
    own = and_(results.c.series_instance_uid == event.series_instance_uid, results.c.revision == event.revision)
    later = and_(results.c.series_instance_uid == event.series_instance_uid, results.c.revision > event.revision)
    with ledger.begin() as connection:
        # the insert comes first: on SQLite it takes the write lock, before anything has been read
        connection.execute(
            insert(reviews).values(
                review_id=str(uuid4()),
                study_instance_uid=event.study_instance_uid,
                series_instance_uid=event.series_instance_uid,
                revision=event.revision,
                action=action,
                finding_kind=finding_kind,
                note=note,
                reader=reader[:64],
                prediction_shown=prediction_shown,
                occurred_at=now,
            )
        )
        # the condition decides who is first: PostgreSQL asks it again after waiting for whoever was faster
        taken = connection.execute(
            update(results)
            .where(
                results.c.study_instance_uid == event.study_instance_uid, results.c.acknowledged_at.is_(None), ~later
            )
            .values(acknowledged_at=now, acknowledged_by=reader[:64])
            .returning(results.c.series_instance_uid, results.c.revision)
        ).all()
        held = connection.execute(select(results.c.acknowledged_by, results.c.acknowledged_at).where(own)).one()
    return Acknowledgement(
        held[0], held[1], (event.series_instance_uid, event.revision) in [tuple(row) for row in taken]
    )


def find_reviews(ledger: Ledger, series_instance_uid: str, revision: int) -> list[Review]:
    """The reviews of one series revision, oldest first."""
    statement = (
        select(reviews)
        .where(reviews.c.series_instance_uid == series_instance_uid, reviews.c.revision == revision)
        .order_by(reviews.c.occurred_at)
    )
    with ledger.read() as connection:
        return [_review(row) for row in connection.execute(statement).mappings()]


def pending_reviews(ledger: Ledger) -> list[SeriesReviewed]:
    """Reviews that are not on the bus yet, oldest first, as events."""
    statement = select(reviews).where(reviews.c.published_at.is_(None)).order_by(reviews.c.occurred_at)
    with ledger.read() as connection:
        return [
            SeriesReviewed(
                study_instance_uid=row["study_instance_uid"],
                series_instance_uid=row["series_instance_uid"],
                revision=row["revision"],
                occurred_at=row["occurred_at"],
                review_id=row["review_id"],
                action=row["action"],
                reader=row["reader"],
            )
            for row in connection.execute(statement).mappings()
        ]


def mark_published(ledger: Ledger, review_id: str) -> None:
    """Note that a review is on the bus."""
    with ledger.begin() as connection:
        connection.execute(update(reviews).where(reviews.c.review_id == review_id).values(published_at=utc_now()))


def _verdicts(ledger: Ledger, series_instance_uids: Sequence[str]) -> dict[tuple[str, int], list[Review]]:
    statement = (
        select(reviews)
        .where(reviews.c.series_instance_uid.in_(series_instance_uids), reviews.c.action.in_(VERDICTS))
        .order_by(reviews.c.occurred_at)
    )
    given: dict[tuple[str, int], list[Review]] = {}
    with ledger.read() as connection:
        for row in connection.execute(statement).mappings():
            given.setdefault((row["series_instance_uid"], row["revision"]), []).append(_review(row))
    return given


def _review(row: RowMapping) -> Review:
    return Review(
        review_id=row["review_id"],
        action=row["action"],
        finding_kind=row["finding_kind"],
        note=row["note"],
        reader=row["reader"],
        prediction_shown=row["prediction_shown"],
        occurred_at=row["occurred_at"],
    )


# --- pages, audit ----------------------------------------------------------------------------------------------------


def find_pages(ledger: Ledger, study_instance_uid: str) -> list[dict[str, Any]]:
    """The pages of a study in the order of the paging policy."""
    statement = select(pages).where(pages.c.study_instance_uid == study_instance_uid).order_by(pages.c.step)
    with ledger.read() as connection:
        return [dict(row) for row in connection.execute(statement).mappings()]


def add_audit(
    ledger: Ledger,
    user: str,
    address: str,
    action: str,
    study_instance_uid: str | None = None,
    series_instance_uid: str | None = None,
) -> None:
    """Note who did what from where."""
    with ledger.begin() as connection:
        connection.execute(
            insert(audit).values(
                occurred_at=utc_now(),
                user=user[:64],
                address=address[:64],
                action=action,
                study_instance_uid=study_instance_uid,
                series_instance_uid=series_instance_uid,
            )
        )


def count_audit(ledger: Ledger, action: str, within: timedelta, *, user: str | None = None, address: str | None) -> int:
    """How often `action` was noted lately for the user or from the address."""
    statement = (
        select(func.count())
        .select_from(audit)
        .where(audit.c.action == action, audit.c.occurred_at > utc_now() - within)
    )
    if user is not None:
        statement = statement.where(audit.c.user == user)
    if address is not None:
        statement = statement.where(audit.c.address == address)
    with ledger.read() as connection:
        return connection.execute(statement).scalar_one()

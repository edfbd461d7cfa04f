"""The web UI's statements on the ledger: `results`, `reviews` and `audit` are its own, the rest it only reads."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any, Literal
from uuid import uuid4

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    case,
    exists,
    false,
    func,
    insert,
    or_,
    select,
    update,
)

from herald.errors import HeraldError
from herald.events import Action, SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import Ledger, audit, pages, results, reviews, series
from herald.superseded import ANALYSED, NEWEST_ANALYSED, SUPERSEDED
from webui import words

PAGE_SIZE = 50
_COMPLETED_AT_ONCE = 500
VERDICTS = ("agree", "disagree", "unsure")

Blind = Literal["", "shadow", "chosen"]
OPEN: Blind = ""
SHADOW: Blind = "shadow"
CHOSEN: Blind = "chosen"

VIEW_SERIES = "view-series"
VIEW_PREDICTION = "view-prediction"
"""Audit action of the first time that a prediction is shown to a user."""

_LISTED = results.c.superseded.is_not(True)  # null is a row of an earlier version, until `complete_results`
_UNACKNOWLEDGED_POSITIVE = and_(results.c.disposition == "positive", results.c.acknowledged_at.is_(None))
_OF_RESULT = and_(
    reviews.c.series_instance_uid == results.c.series_instance_uid, reviews.c.revision == results.c.revision
)
_COUNTS = and_(reviews.c.action.in_(VERDICTS), reviews.c.undone_at.is_(None))


class ResultChanged(HeraldError):
    """Raised when a reader answers a result that is no longer the one stored; nothing is recorded."""


@dataclass(frozen=True)
class Result:
    """One series revision as the notifier posted it, who acknowledged it, and whether a later one is in its place."""

    event: SeriesTriaged
    probability: float | None
    posted_at: datetime
    acknowledged_at: datetime | None
    acknowledged_by: str | None
    superseded: bool


@dataclass(frozen=True)
class Review:
    """One acknowledgement or verdict of one reader; taken back, or of an earlier result, it counts no more."""

    review_id: str
    action: Action
    finding_kind: str | None
    note: str | None
    reader: str
    prediction_shown: bool
    occurred_at: datetime
    undone_at: datetime | None

    @property
    def counts(self) -> bool:
        """Whether it is a verdict that was not taken back."""
        return self.action in VERDICTS and self.undone_at is None


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
    leading_finding: str | None
    verdict: Review | None
    hidden: bool
    blind: Blind


@dataclass(frozen=True)
class WorklistQuery:
    """What the reader asked of the worklist; from `blind_reader` the predictions of blind series are hidden.

    `finding` is the leading one; `since` and `until` are days in UTC on which it was decided, both included.
    """

    disposition: str = ""
    finding: str = ""
    scanner: str = ""
    since: date | None = None
    until: date | None = None
    unreviewed: bool = False
    disagreement: bool = False
    search: str = ""
    page: int = 1
    blind_reader: str = ""


@dataclass(frozen=True)
class Worklist:
    """One page of the worklist; `total` counts every row that matches.

    `unacknowledged` counts all positives that wait for somebody, matching or not; `newest_positive_at` is when the last
    of them was posted.
    """

    rows: tuple[WorklistRow, ...]
    total: int
    page: int
    page_count: int
    unacknowledged: int
    newest_positive_at: datetime | None


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


def upsert_result(ledger: Ledger, event: SeriesTriaged, blind: Blind = OPEN) -> bool:
    """Keep the result of a series revision unless a later one is known; True when there was none.

    Where its disposition changes, it is another result: reviews of the one before count no more, and whether it is read
    blind is decided anew. Else what was given and decided stays.
    """
    now = utc_now()
    values = {
        "study_instance_uid": event.study_instance_uid,
        "accession_number": event.accession_number[:16],  # VR SH, PS3.5 6.2; a longer one stays whole in the event
        "scanner": event.scanner[:64],
        "disposition": event.disposition,
        "probability": study_probability(event),
        "uncertain": event.uncertain,
        "event": json.loads(event.to_json()),
        "triaged_at": event.occurred_at,
        "leading_finding": leading_finding(event),
        "disagreement": bool(event.disagreements),
    }
    of_series = results.c.series_instance_uid == event.series_instance_uid
    same = and_(of_series, results.c.revision == event.revision)
    no_later = results.c.triaged_at <= event.occurred_at  # an earlier message may be delivered once more
    if event.disposition == "positive":  # which no clock of another host may hide
        no_later = or_(no_later, results.c.disposition != "positive")
    replaceable = and_(same, no_later)
    with ledger.begin() as connection:
        if connection.dialect.name == "postgresql":  # else two revisions at once would not see one another
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(event.series_instance_uid))))
        # an update comes first: on SQLite it takes the write lock, so that two posts cannot both insert
        became = connection.execute(
            update(results)
            .where(replaceable, results.c.disposition != event.disposition)
            .values(acknowledged_at=None, acknowledged_by=None, posted_at=now, blind=blind)
        )
        if became.rowcount:
            connection.execute(
                update(reviews)
                .where(
                    reviews.c.series_instance_uid == event.series_instance_uid,
                    reviews.c.revision == event.revision,
                    reviews.c.undone_at.is_(None),
                )
                .values(undone_at=now)
            )
        known = bool(connection.scalar(select(exists().where(same))))
        if known:
            connection.execute(update(results).where(replaceable).values(values))
        else:
            connection.execute(
                insert(results).values(
                    **values,
                    series_instance_uid=event.series_instance_uid,
                    revision=event.revision,
                    posted_at=now,
                    blind=blind,
                )
            )
        connection.execute(update(results).where(of_series).values(superseded=SUPERSEDED))
    return not known


def complete_results(ledger: Ledger) -> int:
    """Fill in what an earlier version did not write of its results, and list what it hid; gives their number."""
    hidden = and_(results.c.superseded.is_(True), ~SUPERSEDED)
    missing = select(results.c.series_instance_uid, results.c.revision, results.c.event).where(
        or_(results.c.superseded.is_(None), results.c.disagreement.is_(None), hidden)
    )
    completed = 0
    while True:
        with ledger.begin() as connection:
            rows = connection.execute(missing.limit(_COMPLETED_AT_ONCE)).all()
            for uid, revision, body in rows:
                event = msgspec.convert(body, SeriesTriaged)
                connection.execute(
                    update(results)
                    .where(results.c.series_instance_uid == uid, results.c.revision == revision)
                    .values(
                        superseded=SUPERSEDED,
                        leading_finding=leading_finding(event),
                        disagreement=bool(event.disagreements),
                    )
                )
        completed += len(rows)
        if not rows:
            return completed


def leading_finding(event: SeriesTriaged) -> str | None:
    """The most probable kind of haemorrhage of a positive; None for every other disposition."""
    kinds = [finding for finding in event.findings if finding.kind != "any"] or list(event.findings)
    if event.disposition != "positive" or not kinds:
        return None
    return max(kinds, key=lambda finding: finding.probability).kind[:16]


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


def study_of(ledger: Ledger, series_instance_uid: str) -> str:
    """The StudyInstanceUID of a series that has a result, or nothing."""
    statement = select(results.c.study_instance_uid).where(results.c.series_instance_uid == series_instance_uid)
    with ledger.read() as connection:
        return connection.execute(statement.limit(1)).scalar() or ""


def newest_revision(ledger: Ledger, series_instance_uid: str) -> int | None:
    """The newest revision of a series that has a result, or None."""
    statement = select(func.max(results.c.revision)).where(results.c.series_instance_uid == series_instance_uid)
    with ledger.read() as connection:
        newest: int | None = connection.execute(statement).scalar()
    return newest


def find_analysed(ledger: Ledger, study_instance_uid: str) -> list[Result]:
    """Of every series of a study the newest revision that was searched for haemorrhage, positives first."""
    statement = (
        select(results)
        .where(results.c.study_instance_uid == study_instance_uid, NEWEST_ANALYSED)
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
        superseded=bool(row["superseded"]),
    )


# --- worklist --------------------------------------------------------------------------------------------------------


def find_worklist(ledger: Ledger, query: WorklistQuery) -> Worklist:
    """What is listed of every series and matches: positives nobody acknowledged, oldest first; then newest first.

    Listed is the newest revision, and an earlier one that still waits for a reader or a newer analysis, see
    `herald.superseded`. What is hidden from a blind reader is in the order of time alone, since any other would tell
    the prediction.
    """
    matching = _matching(query)
    urgent = _urgent(query.blind_reader)
    with ledger.read() as connection:
        total = connection.execute(select(func.count()).select_from(results).where(*matching)).scalar_one()
        page_count = max(1, -(-total // PAGE_SIZE))
        page = min(max(query.page, 1), page_count)
        # keys by the index first, then the rows of one page: sorting whole rows would read every event
        keys = select(results.c.series_instance_uid, results.c.revision).where(*matching).order_by(*_order(urgent))
        places = {
            (row[0], row[1]): place
            for place, row in enumerate(connection.execute(keys.limit(PAGE_SIZE).offset((page - 1) * PAGE_SIZE)))
        }
        found = _rows(connection, places, query.blind_reader)
        unacknowledged, newest_positive_at = connection.execute(
            select(func.count(), func.max(results.c.posted_at)).where(_LISTED, urgent)
        ).one()
    found.sort(key=lambda row: places[row["series_instance_uid"], row["revision"]])
    given = _verdicts(ledger, [row["series_instance_uid"] for row in found])
    rows = []
    for row in found:
        verdicts = given.get((row["series_instance_uid"], row["revision"]), [])
        rows.append(
            WorklistRow(
                result=_result(row),
                leading_finding=row["leading_finding"],
                verdict=verdicts[-1] if verdicts else None,
                hidden=bool(row["hidden"]),
                blind=row["blind"] or OPEN,
            )
        )
    return Worklist(tuple(rows), total, page, page_count, unacknowledged, newest_positive_at)


def _rows(connection: Connection, keys: Collection[tuple[str, int]], reader: str) -> list[RowMapping]:
    # by series alone: SQLite goes through the whole table for pairs of values
    of_series = results.c.series_instance_uid.in_([uid for uid, _ in keys])
    statement = select(results, hidden_from(reader).label("hidden")).where(of_series)
    rows = connection.execute(statement).mappings()
    return [row for row in rows if (row["series_instance_uid"], row["revision"]) in keys]


def next_unread(ledger: Ledger, after: tuple[str, int | None], blind_reader: str) -> tuple[str, int] | None:
    """Series and revision that should be read next, other than those of `after`; None when nothing is left."""
    query = WorklistQuery(disposition="analysed", unreviewed=True, blind_reader=blind_reader)
    there = and_(results.c.series_instance_uid == after[0], results.c.revision == after[1])
    statement = (
        select(results.c.series_instance_uid, results.c.revision)
        .where(*_matching(query), ~there)
        .order_by(*_order(_urgent(blind_reader)))
        .limit(1)
    )
    with ledger.read() as connection:
        row = connection.execute(statement).first()
    return (row[0], row[1]) if row else None


def find_scanners(ledger: Ledger) -> list[str]:
    """The names of the scanners that results came from."""
    statement = select(results.c.scanner).distinct().where(_LISTED, results.c.scanner != "")
    with ledger.read() as connection:
        return sorted(connection.execute(statement).scalars())


def worklist_version(ledger: Ledger) -> str:
    """A text that is another one whenever something has changed that a worklist shows."""
    of_results = (
        select(
            results.c.disposition,
            func.count(),
            func.count(results.c.acknowledged_at),
            func.max(results.c.triaged_at),
            func.max(results.c.posted_at),
            func.max(results.c.acknowledged_at),
            func.sum(results.c.probability),
        )
        .where(_LISTED)
        .group_by(results.c.disposition)
        .order_by(results.c.disposition)
    )
    of_reviews = select(
        func.count(), func.max(reviews.c.occurred_at), func.count(reviews.c.undone_at), func.max(reviews.c.undone_at)
    )
    in_flight = select(
        func.count(),
        func.sum(series.c.instance_count),
        func.count(series.c.closed_at),
        func.count(series.c.published_at),
        func.max(series.c.last_image_at),
    )
    with ledger.read() as connection:
        seen = [connection.execute(statement).all() for statement in (of_results, of_reviews, in_flight)]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def _urgent(reader: str) -> ColumnElement[bool]:
    """Whether a row waits at the top: a positive that nobody has acknowledged and that this reader may see."""
    return and_(_UNACKNOWLEDGED_POSITIVE, ~hidden_from(reader))


def _order(urgent: ColumnElement[bool]) -> list[ColumnElement[Any]]:
    """Who has waited longest comes first; the rest is newest first."""
    waiting_since = case((urgent, results.c.triaged_at))
    return [waiting_since.asc().nulls_last(), results.c.triaged_at.desc(), results.c.series_instance_uid]


def _matching(query: WorklistQuery) -> list[ColumnElement[bool]]:
    matching: list[ColumnElement[bool]] = [_LISTED]
    if query.disposition == "analysed":
        matching.append(results.c.disposition.in_(ANALYSED))
    elif query.disposition:
        matching.append(results.c.disposition == query.disposition)
    if query.finding:
        matching.append(results.c.leading_finding == query.finding)
    if query.finding or query.disposition in ANALYSED:
        matching.append(~hidden_from(query.blind_reader))  # else the filter would tell the prediction
    if query.scanner:
        matching.append(results.c.scanner == query.scanner)
    if query.since:
        matching.append(results.c.triaged_at >= datetime.combine(query.since, time.min, UTC))
    if query.until:
        matching.append(results.c.triaged_at <= datetime.combine(query.until, time.max, UTC))
    if query.disagreement:
        matching.append(results.c.disagreement.is_(True))
    if query.unreviewed:
        read = exists().where(_OF_RESULT, _COUNTS)
        if query.blind_reader:  # in shadow mode every reader reads for themselves
            read = read.where(or_(reviews.c.reader == query.blind_reader, results.c.blind.is_distinct_from(SHADOW)))
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
    statement = (
        select(series, func.count().over().label("total"))
        .where(~done)
        .order_by(series.c.last_image_at.desc())
        .limit(limit)
    )
    with ledger.read() as connection:
        rows = connection.execute(statement).mappings().all()
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
    ], rows[0]["total"] if rows else 0


def _step(row: RowMapping) -> str:
    if row["closed_at"] is None:
        return "receiving images"
    return "complete, waiting for the bus" if row["published_at"] is None else "in analysis"


# --- blind reading ---------------------------------------------------------------------------------------------------


def hidden_from(reader: str) -> ColumnElement[bool]:
    """Whether this reader must judge a row of `results` before its prediction is shown; no reader: never."""
    if not reader:
        return false()
    judged = exists().where(_OF_RESULT, _COUNTS, reviews.c.reader == reader)
    return and_(_unseen_by(reader), ~judged)


def _unseen_by(reader: str) -> ColumnElement[bool]:
    """Whether a row of `results` is read blind and its prediction has not been shown to this reader."""
    shown = exists().where(
        audit.c.series_instance_uid == results.c.series_instance_uid,
        audit.c.action == VIEW_PREDICTION,
        audit.c.user == reader[:64],
    )
    # in live mode a positive waits for nobody: until somebody has acknowledged it, it is shown to everybody
    live = and_(results.c.blind == CHOSEN, ~_UNACKNOWLEDGED_POSITIVE)
    return and_(or_(results.c.blind == SHADOW, live), results.c.disposition.in_(ANALYSED), ~shown)


def is_hidden(ledger: Ledger, event: SeriesTriaged, reader: str) -> bool:
    """Whether this reader must judge before the prediction is shown."""
    return _holds(ledger, event, hidden_from(reader))


def is_unseen(ledger: Ledger, event: SeriesTriaged, reader: str) -> bool:
    """Whether the series is read blind and this reader has not been shown its prediction, judged or not."""
    return _holds(ledger, event, _unseen_by(reader) if reader else false())


def _holds(ledger: Ledger, event: SeriesTriaged, condition: ColumnElement[bool]) -> bool:
    statement = select(results.c.revision).where(
        results.c.series_instance_uid == event.series_instance_uid, results.c.revision == event.revision, condition
    )
    with ledger.read() as connection:
        return connection.execute(statement).first() is not None


def note_shown(ledger: Ledger, user: str, address: str, events: Sequence[SeriesTriaged]) -> None:
    """Note in the audit that a user is shown the predictions of these series, unless that is noted already."""
    if not events:
        return
    noted = select(audit.c.series_instance_uid).where(
        audit.c.series_instance_uid.in_([event.series_instance_uid for event in events]),
        audit.c.action == VIEW_PREDICTION,
        audit.c.user == user[:64],
    )
    with ledger.read() as connection:
        known = set(connection.execute(noted).scalars())
    for event in events:
        if event.series_instance_uid not in known:
            add_audit(ledger, user, address, VIEW_PREDICTION, event.study_instance_uid, event.series_instance_uid)


def find_undecided(ledger: Ledger) -> list[SeriesTriaged]:
    """Results of which nobody has decided whether they are read blind: an earlier version posted them."""
    with ledger.read() as connection:
        found = connection.execute(select(results.c.event).where(results.c.blind.is_(None))).scalars()
        return [msgspec.convert(event, SeriesTriaged) for event in found]


def set_blind(ledger: Ledger, event: SeriesTriaged, blind: Blind) -> None:
    """Decide whether a result is read blind, unless that is decided."""
    same = and_(results.c.series_instance_uid == event.series_instance_uid, results.c.revision == event.revision)
    with ledger.begin() as connection:
        connection.execute(update(results).where(same, results.c.blind.is_(None)).values(blind=blind))


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
    seen it. When the reader first opened the series is taken from the audit. Raises ResultChanged where another result
    has come in the place of `event`.
    """
    now = utc_now()
    opened_at = select(func.min(audit.c.occurred_at)).where(
        audit.c.series_instance_uid == event.series_instance_uid,
        audit.c.action == VIEW_SERIES,
        audit.c.user == reader[:64],
    )
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
                opened_at=opened_at.scalar_subquery(),
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
        # what waited behind a newer revision for somebody waits no more
        connection.execute(
            update(results)
            .where(results.c.study_instance_uid == event.study_instance_uid, results.c.acknowledged_at == now)
            .values(superseded=SUPERSEDED)
        )
        columns = (results.c.acknowledged_by, results.c.acknowledged_at, results.c.posted_at, results.c.triaged_at)
        held = connection.execute(select(*columns).where(own).with_for_update()).one()  # no other comes until we commit
        if held.triaged_at != event.occurred_at:
            raise result_changed(held.posted_at, held.triaged_at)
    return Acknowledgement(
        held.acknowledged_by,
        held.acknowledged_at,
        (event.series_instance_uid, event.revision) in [tuple(row) for row in taken],
    )


def result_changed(posted_at: datetime, triaged_at: datetime) -> ResultChanged:
    """What to tell a reader to whom an earlier result was shown."""
    at = max(posted_at, triaged_at)  # the first moves with the disposition only, the second is of another host's clock
    return ResultChanged(
        f"This result changed at {words.clock(at)} after the page was loaded: look again. Nothing was recorded."
    )


def undo_verdict(ledger: Ledger, event: SeriesTriaged, reader: str) -> bool:
    """Take back whatever this reader said of a series revision; False when there was nothing.

    The rows stay and count no more. An acknowledgement stays one: paging has ended, and the bus has told of it.
    """
    statement = update(reviews).where(
        reviews.c.series_instance_uid == event.series_instance_uid,
        reviews.c.revision == event.revision,
        reviews.c.reader == reader[:64],
        _COUNTS,
    )
    with ledger.begin() as connection:
        return connection.execute(statement.values(undone_at=utc_now())).rowcount > 0


def find_reviews(ledger: Ledger, series_instance_uid: str, revision: int) -> list[Review]:
    """The reviews of one series revision, oldest first, with those that were taken back."""
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
        .where(reviews.c.series_instance_uid.in_(series_instance_uids), _COUNTS)
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
        undone_at=row["undone_at"],
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

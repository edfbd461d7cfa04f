"""Adjudication: studies about which readers or labels differ, and what somebody decided between them.

What Herald answered is not told here, so that the reference standard does not lean on what it is to judge. A reader
from whom a prediction is still hidden is not told what others said either. A decision is only added: the latest counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy import Connection, Integer, and_, case, cast, func, insert, or_, select, union_all

from herald.config import Config
from herald.events import utc_now
from herald.ledger import Ledger, adjudications, labels, results, reviews
from herald.signatures import FINDINGS
from herald.superseded import ANALYSED
from herald.validation.collect import collect
from herald.validation.row import ValidationRow
from webui import audit, blind, record
from webui.context import context
from webui.session import address, allow, user

blueprint = Blueprint("adjudication", __name__, url_prefix="/adjudication")

LONGEST_NOTE = 2000
MOST_SHOWN = 50
RECENT = 20
AT_ONCE = 100


@dataclass(frozen=True)
class Answer:
    """What one reader, source of labels, or report said of the head."""

    who: str
    how: str
    haemorrhage: bool | None
    finding_kind: str | None
    at: datetime | None


@dataclass(frozen=True)
class Case:
    """A study with what was said of it; `hidden` is a series that this reader has to judge first."""

    study_instance_uid: str
    accession_number: str
    scanner: str
    at: datetime | None
    series: tuple[tuple[str, int], ...]
    """UID and revision of each series that answers are about."""
    answers: tuple[Answer, ...]
    hidden: bool


@dataclass(frozen=True)
class Decision:
    """One adjudication of a study."""

    study_instance_uid: str
    haemorrhage: bool
    finding_kind: str | None
    note: str | None
    reader: str
    at: datetime


@blueprint.get("")
def index() -> ResponseReturnValue:
    """I see the studies that wait for a decision, oldest first, and the latest decisions."""
    parts = context()
    cases = find_queue(parts.ledger, parts.config, MOST_SHOWN + 1)
    return render_template(
        "adjudication/index.html",
        cases=cases[:MOST_SHOWN],
        more=len(cases) > MOST_SHOWN,
        decisions=find_decisions(parts.ledger, reader=blind.reader()),
        **_form(),
    )


@blueprint.get("/<study_instance_uid>")
def show(study_instance_uid: str) -> ResponseReturnValue:
    """I see what was said of one study, and decide, or decide again."""
    parts = context()
    case_ = find_case(parts.ledger, parts.config, study_instance_uid)
    if case_ is None:
        abort(404)
    audit.add_view(study_instance_uid, None, "view-adjudication")
    decisions = [] if case_.hidden else find_decisions(parts.ledger, study_instance_uid)
    return render_template("adjudication/show.html", case=case_, decisions=decisions, **_form())


@blueprint.post("/<study_instance_uid>")
@allow("reader", "admin")
def decide(study_instance_uid: str) -> ResponseReturnValue:
    """I decide whether the study shows haemorrhage."""
    parts = context()
    verdict, kind = request.form.get("verdict", ""), request.form.get("finding_kind", "") or None
    note = request.form.get("note", "").strip() or None
    if verdict not in ("haemorrhage", "no_haemorrhage") or len(note or "") > LONGEST_NOTE:
        abort(400)
    if kind is not None and kind not in FINDINGS:
        abort(400)
    haemorrhage = verdict == "haemorrhage"
    with parts.ledger.begin() as connection:
        known = connection.execute(
            select(results.c.series_instance_uid).where(results.c.study_instance_uid == study_instance_uid).limit(1)
        ).first()
        if known is None:
            abort(404)
        connection.execute(
            insert(adjudications).values(
                study_instance_uid=study_instance_uid,
                haemorrhage=haemorrhage,
                finding_kind=(kind or "any") if haemorrhage else None,
                note=note,
                reader=user().name[:64],
                occurred_at=utc_now(),
            )
        )
    record.add_audit(parts.ledger, user().name, address(), "adjudicate", study_instance_uid)
    flash(f"Decided: {'haemorrhage' if haemorrhage else 'no haemorrhage'}.")
    return redirect(url_for(".index"), 303)


def _form() -> dict[str, object]:
    return {"may_decide": user().role in ("reader", "admin"), "kinds": FINDINGS}


# --- the ledger ------------------------------------------------------------------------------------------------------


def find_queue(ledger: Ledger, config: Config, most: int) -> list[Case]:
    """The first studies whose answers differ and that nobody has decided, oldest first."""
    with ledger.read() as connection:
        return list(islice(_cases(connection, config, find_waiting(connection)), most))


def find_case(ledger: Ledger, config: Config, study_instance_uid: str) -> Case | None:
    """One study with what was said of it, whether it waits or not; None when it is not known."""
    with ledger.read() as connection:
        return next(_cases(connection, config, [study_instance_uid], every=True), None)


def find_decisions(ledger: Ledger, study_instance_uid: str = "", reader: str = "") -> list[Decision]:
    """The latest decisions, or those on a study, or of a reader; the newest first."""
    statement = select(adjudications).order_by(adjudications.c.adjudication_id.desc()).limit(RECENT)
    if reader:
        statement = statement.where(adjudications.c.reader == reader)
    if study_instance_uid:
        statement = statement.where(adjudications.c.study_instance_uid == study_instance_uid)
    with ledger.read() as connection:
        return [
            Decision(
                row["study_instance_uid"],
                row["haemorrhage"],
                row["finding_kind"],
                row["note"],
                row["reader"],
                row["occurred_at"],
            )
            for row in connection.execute(statement).mappings()
        ]


def find_waiting(connection: Connection) -> list[str]:
    """Studies with different answers and no decision, oldest first.

    Some wait for nothing, as where a reader only changed a verdict; `find_queue` leaves them out.
    """
    verdict = or_(
        and_(reviews.c.action == "agree", results.c.disposition == "positive"),
        and_(reviews.c.action == "disagree", results.c.disposition == "negative"),
    )
    of_result = and_(
        reviews.c.series_instance_uid == results.c.series_instance_uid, reviews.c.revision == results.c.revision
    )
    read = (
        select(results.c.study_instance_uid, results.c.triaged_at, case((verdict, 1), else_=0).label("says"))
        .join(reviews, of_result)
        .where(
            reviews.c.undone_at.is_(None),
            reviews.c.action.in_(("agree", "disagree")),
            results.c.disposition.in_(ANALYSED),
        )
    )
    labelled = (
        select(results.c.study_instance_uid, results.c.triaged_at, cast(labels.c.haemorrhage, Integer).label("says"))
        .join(labels, labels.c.accession_number == results.c.accession_number)
        .where(labels.c.superseded_at.is_(None), labels.c.accession_number != "")
    )
    said = union_all(read, labelled).subquery()
    statement = (
        select(said.c.study_instance_uid)
        .where(said.c.study_instance_uid.not_in(select(adjudications.c.study_instance_uid)))
        .group_by(said.c.study_instance_uid)
        .having(func.min(said.c.says) != func.max(said.c.says))
        .order_by(func.min(said.c.triaged_at), said.c.study_instance_uid)
    )
    return list(connection.execute(statement).scalars())


def _cases(connection: Connection, config: Config, studies: list[str], *, every: bool = False) -> Iterator[Case]:
    """The studies that wait for a decision, or every one of them, in their order."""
    rest = iter(studies)
    while some := list(islice(rest, AT_ONCE)):
        of_studies = select(results.c.series_instance_uid).where(results.c.study_instance_uid.in_(some))
        uids = connection.execute(of_studies).scalars().all()
        by_study: dict[str, list[ValidationRow]] = {uid: [] for uid in some}
        for row in collect(connection, config, utc_now(), uids):
            if row.disposition != "unfinished" and (every or (row.needs_adjudication and not row.superseded)):
                by_study[row.study_instance_uid].append(row)
        yield from (_case(rows) for rows in by_study.values() if rows)


def _case(rows: list[ValidationRow]) -> Case:
    first = rows[0]
    given = [Answer(label.source, label.kind, label.haemorrhage, None, None) for label in first.labels]
    given += [
        Answer(reading.reader, "verdict", reading.haemorrhage, reading.finding_kind, reading.at)
        for row in rows
        for reading in row.readings
    ]
    series = tuple((row.series_instance_uid, row.revision) for row in rows)
    hidden = user().role == "reader" and any(_is_hidden(*one) for one in series)
    times = [at for row in rows if (at := row.first_image_at or row.triaged_at)]
    return Case(
        first.study_instance_uid,
        first.accession_number,
        first.scanner,
        min(times, default=None),
        series,
        () if hidden else tuple(given),
        hidden,
    )


def _is_hidden(series_instance_uid: str, revision: int) -> bool:
    result = record.find_result(context().ledger, series_instance_uid, revision)
    return result is not None and blind.is_hidden(result.event)

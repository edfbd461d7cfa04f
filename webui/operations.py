"""What needs the operator: pages that reached nobody, alarms and routers; and the red banner on every page.

Everybody who is logged in sees these: whoever looks at a screen at 3 a.m. may be the one who calls the radiologist.
An administrator sees the condition of the node beside them, replays dead letters and reconciles. Addresses are masked.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from flask import Blueprint, abort, current_app, flash, make_response, redirect, render_template, request, url_for
from flask.blueprints import BlueprintSetupState
from flask.typing import ResponseReturnValue
from sqlalchemy import Connection, RowMapping, select

from herald.errors import BusError
from herald.events import utc_now
from herald.ledger import alarms, results, vitals
from herald.undelivered import Undelivered, holding, notifier_seen, undelivered
from webui import figures, record
from webui.condition import LATE, TOPICS, Condition, Letter
from webui.context import EXTENSION, Context, context
from webui.session import address, allow, user

blueprint = Blueprint("operations", __name__, url_prefix="/operations")

RECENT_ALARMS = 20
ALIVE = timedelta(seconds=60)
"""A router that wrote within so long is alive; it writes every 15 s."""

TITLES = {
    "silence": "No series is triaged",
    "models": "Triage stands still",
    "undelivered": "A page reached nobody",
    "heartbeat": "Daily message that paging works",
}

CONDITION = "herald-condition"

_ADDRESS = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)*")


@dataclass(frozen=True)
class Step:
    """One step of a study's paging as an operator may see it: addresses are masked."""

    number: int
    channel: str
    recipient: str
    state: str
    at: datetime
    attempts: int
    error: str


@dataclass(frozen=True)
class Study:
    """A study whose paging has failed; `known` says whether the web UI has its result, so that it can be opened."""

    undelivered: Undelivered
    accession_number: str
    scanner: str
    known: bool
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Group:
    """Studies whose paging has failed in the same way, with what to do."""

    headline: str
    advice: str
    studies: tuple[Study, ...]


@dataclass(frozen=True)
class Banner:
    """What is wrong now; `etag` is another whenever that is."""

    groups: tuple[Group, ...]
    alarms: tuple[RowMapping, ...]
    notifier_gone_since: datetime | None
    """When the last notifier was seen, if none is alive."""

    @property
    def etag(self) -> str:
        """Of what is wrong, not of how long it has been."""
        studies = [
            (group.headline, s.undelivered.study_instance_uid, s.known) for group in self.groups for s in group.studies
        ]
        told = [(alarm["alarm_id"], alarm["detail"]) for alarm in self.alarms]
        return hashlib.sha256(repr((studies, told, self.notifier_gone_since)).encode()).hexdigest()[:16]


@blueprint.get("")
def index() -> ResponseReturnValue:
    """I see what keeps pages from reaching anybody, and what the operators were told."""
    with context().ledger.read() as connection:
        studies = _studies(connection)
        held = [alarm["alarm_id"] for alarm in holding(connection)]
        statement = select(alarms).order_by(alarms.c.raised_at.desc())
        recent = connection.execute(statement.where(alarms.c.alarm_id.not_in(held)).limit(RECENT_ALARMS))
        return render_template(
            "operations/index.html",
            studies=studies,
            held=connection.execute(statement.where(alarms.c.alarm_id.in_(held))).mappings().all(),
            recent=recent.mappings().all(),
            routers=connection.execute(select(vitals).order_by(vitals.c.seen_at.desc())).mappings().all(),
            alive_since=utc_now() - ALIVE,
            headline=_headline,
            **_condition(),
        )


# --- for administrators ----------------------------------------------------------------------------------------------


@blueprint.record
def _prepare(state: BlueprintSetupState) -> None:
    parts: Context = state.app.extensions[EXTENSION]
    state.app.extensions[CONDITION] = Condition(parts.config, parts.ledger, parts.store)


def condition() -> Condition:
    """The condition of the node of the application that serves this request."""
    return cast(Condition, current_app.extensions[CONDITION])


def _condition() -> dict[str, Any]:
    """What the template of the condition needs; nothing is read for who may not see it."""
    if user().role != "admin":
        return {"parts": None, "masked": masked}
    return {
        "parts": condition().read(),
        "account": condition().account,
        "dispositions": figures.DISPOSITIONS,
        "late_since": utc_now() - LATE,
        "masked": masked,
    }


@blueprint.get("/condition")
@allow("admin")
def show_condition() -> ResponseReturnValue:
    """My open page asks for the condition of the node."""
    return render_template("operations/condition.html", **_condition())


@blueprint.get("/dead-letters/<topic>/<letter_id>")
@allow("admin")
def show_letter(topic: str, letter_id: str) -> ResponseReturnValue:
    """I read the whole error of an event that a service could not handle."""
    found = _find_letter(topic, letter_id)
    if found is None:
        abort(404)
    return render_template("operations/letter.html", found=found, masked=masked)


@blueprint.post("/dead-letters/<topic>/<letter_id>/replay")
@allow("admin")
def replay(topic: str, letter_id: str) -> ResponseReturnValue:
    """I have an event handed to its service again, now that the cause is mended."""
    try:
        found = _find_letter(topic, letter_id)
        if found is None:
            flash("This dead letter has been replayed already.")
        else:
            event = found.event
            study, series = (event.study_instance_uid, event.series_instance_uid) if event else (None, None)
            # written first, so that nothing is replayed unsaid
            record.add_audit(context().ledger, user().name, address(), "replay-dead-letter", study, series)
            condition().replay(found.letter)
            flash(f"Replayed: {found.letter.group} handles it again. If it fails again, it comes back here.")
    except BusError as error:
        flash(f"Not replayed: {error}.")
    return redirect(url_for(".index", _anchor="letters-title"), 303)


def _find_letter(topic: str, letter_id: str) -> Letter | None:
    if topic not in TOPICS:
        abort(404)
    return condition().find_letter(topic, letter_id)


@blueprint.post("/reconcile")
@allow("admin")
def reconcile() -> ResponseReturnValue:
    """I have every instance accounted for, in the background."""
    if condition().reconcile():
        record.add_audit(context().ledger, user().name, address(), "reconcile")
        flash("Reconciling; the result comes here.")
    else:
        flash("It is under way already.")
    return redirect(url_for(".index", _anchor="account-title"), 303)


@blueprint.errorhandler(BusError)
def bus_down(error: BusError) -> ResponseReturnValue:
    """I am told that the bus is down where I asked for what only it knows."""
    return render_template("error.html", code=503, title="The bus cannot be reached", advice=str(error)), 503


# --- the banner ------------------------------------------------------------------------------------------------------


@blueprint.get("/banner")
def banner() -> ResponseReturnValue:
    """My open page asks whether anything is wrong now."""
    found = find_banner()
    response = make_response(render_template("operations/banner.html", banner=found))
    response.headers["Cache-Control"] = "no-cache, private"
    response.set_etag(found.etag)
    return response.make_conditional(request)


@blueprint.app_context_processor
def _for_every_page() -> dict[str, Any]:
    return {"find_banner": find_banner, "alarm_titles": TITLES}


def find_banner() -> Banner:
    """Studies whose paging has failed, by how, the alarms that hold beside those about them, and a dead notifier."""
    with context().ledger.read() as connection:
        studies = _studies(connection)
        about = {study.undelivered.study_instance_uid for study in studies}
        held = [a for a in holding(connection) if not (a["kind"] == "undelivered" and a["about"] in about)]
        seen_at, alive = notifier_seen(connection, utc_now())
    by_headline: dict[tuple[str, str], list[Study]] = {}
    for study in studies:
        by_headline.setdefault(_headline(study.undelivered), []).append(study)
    groups = (Group(_counted(len(found), words[0]), words[1], tuple(found)) for words, found in by_headline.items())
    return Banner(tuple(groups), tuple(held), None if alive else seen_at)


def _headline(study: Undelivered) -> tuple[str, str]:
    """What went wrong in words, and what to do."""
    if study.overdue:
        return (
            "should have been paged by now",
            "The notifier may have stopped: call the radiologist now. Operator: run herald check.",
        )
    if study.reached:
        return "was paged, and nobody has answered", "Open and acknowledge, or call the radiologist now."
    return "could not be paged: nobody was reached", "Call the radiologist now, or open and acknowledge."


def _counted(count: int, what: str) -> str:
    return f"1 study {what}" if count == 1 else f"{count} studies {re.sub('^was ', 'were ', what)}"


def _studies(connection: Connection) -> list[Study]:
    found = undelivered(connection, context().config.notifier, utc_now())
    known = set(
        connection.scalars(
            select(results.c.series_instance_uid).where(
                results.c.series_instance_uid.in_([study.series_instance_uid for study in found])
            )
        )
    )
    return [_study(study, study.series_instance_uid in known) for study in found]


def _study(study: Undelivered, known: bool) -> Study:
    event = next((row["event"] for row in reversed(study.pages) if row["event"]), None) or {}
    return Study(
        undelivered=study,
        accession_number=event.get("accession_number") or "",
        scanner=event.get("scanner") or event.get("calling_ae_title") or "",
        known=known,
        steps=tuple(
            Step(
                number=row["step"] + 1,
                channel=row["channel"],
                recipient=masked(row["recipient"]),
                state="failed" if row["state"] == "exhausted" and not row["sent_at"] else row["state"],
                at=row["sent_at"] or row["due_at"],
                attempts=row["attempts"],
                error="" if row["sent_at"] else masked(row["error"] or ""),
            )
            for row in study.pages
        ),
    )


def masked(text: str) -> str:
    """The text with every e-mail address cut down to its first letter and its domain."""
    return _ADDRESS.sub(lambda found: f"{found[0][0]}…@{found[0].rpartition('@')[2]}", text)

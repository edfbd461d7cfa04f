"""What needs the operator: pages that reached nobody, alarms and routers; and the red banner on every page.

Everybody who is logged in sees them: whoever looks at a screen at 3 a.m. may be the one who calls the radiologist.
There is nothing to change here, and addresses are masked.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from flask import Blueprint, make_response, render_template, request
from flask.typing import ResponseReturnValue
from sqlalchemy import Connection, RowMapping, select

from herald.events import utc_now
from herald.ledger import alarms, results, vitals
from herald.undelivered import Undelivered, holding, undelivered
from webui.context import context

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

    @property
    def etag(self) -> str:
        """Of what is wrong, not of how long it has been."""
        studies = [
            (group.headline, s.undelivered.study_instance_uid, s.known) for group in self.groups for s in group.studies
        ]
        told = [(alarm["alarm_id"], alarm["detail"]) for alarm in self.alarms]
        return hashlib.sha256(repr((studies, told)).encode()).hexdigest()[:16]


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
            masked=masked,
        )


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
    """Studies whose paging has failed, by how, and the alarms that hold beside those about them."""
    with context().ledger.read() as connection:
        studies = _studies(connection)
        about = {study.undelivered.study_instance_uid for study in studies}
        held = [a for a in holding(connection) if not (a["kind"] == "undelivered" and a["about"] in about)]
    by_headline: dict[tuple[str, str], list[Study]] = {}
    for study in studies:
        by_headline.setdefault(_headline(study.undelivered), []).append(study)
    groups = (Group(_counted(len(found), words[0]), words[1], tuple(found)) for words, found in by_headline.items())
    return Banner(tuple(groups), tuple(held))


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

"""The worklist: every series with its disposition, and the series that are still on their way; filters; live."""

from collections.abc import Callable, Container
from datetime import date
from typing import Any, TypeVar

from flask import (
    Blueprint,
    Response,
    flash,
    make_response,
    redirect,
    render_template,
    request,
    stream_with_context,
    url_for,
)
from flask.typing import ResponseReturnValue

from herald.errors import LedgerError
from webui import blind, record, words
from webui.context import context
from webui.record import WorklistQuery
from webui.session import is_still_open, user

blueprint = Blueprint("worklist", __name__)

LONGEST_SEARCH = 64
LONGEST_SAID = 40
FILTERS = {
    "": "All",
    "positive": "Positive",
    "negative": "Negative",
    "not_eligible": "Not eligible",
    "failed": "Failed",
}
BLIND_FILTERS = {"": "All", "analysed": "Analysed", "not_eligible": "Not eligible", "failed": "Failed"}
FINDINGS = {kind: label for kind, label in words.FINDINGS.items() if kind != "any"}

Value = TypeVar("Value")


@blueprint.get("/")
def index() -> ResponseReturnValue:
    """I see every series, positives that nobody has acknowledged first."""
    return render_template("worklist/index.html", **_facts())


@blueprint.get("/worklist/rows")
def rows() -> ResponseReturnValue:
    """My open worklist asks whether anything has changed."""
    response = make_response(render_template("worklist/rows.html", **_facts()))
    response.headers["Cache-Control"] = "no-cache, private"
    response.add_etag()
    return response.make_conditional(request)


@blueprint.get("/worklist/events")
def events() -> ResponseReturnValue:
    """My open worklist is told to ask; 503 when too many are told already, and it asks by itself."""
    live = context().live
    stream = live.open(user().name)
    if stream is None:
        return Response("As many worklists as can be are live.", 503, {"Retry-After": "60"}, mimetype="text/plain")
    gone: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    messages = live.messages(stream, request.headers.get("Last-Event-ID", ""), _may_go_on, gone)
    response = Response(stream_with_context(messages), mimetype="text/event-stream")
    response.headers["X-Accel-Buffering"] = "no"  # nginx would gather the messages
    response.call_on_close(lambda: live.close(stream))
    return response


@blueprint.get("/next")
def next_unread() -> ResponseReturnValue:
    """I go on to the next series that has not been read."""
    after = request.args.get("after", ""), request.args.get("revision", type=int)
    found = record.next_unread(context().ledger, after, blind.reader())
    if found is None:
        flash("Nothing is left to read.")
        return redirect(url_for("worklist.index"))
    return redirect(url_for("series.show", series_instance_uid=found[0], revision=found[1]))


def _may_go_on() -> bool:
    try:
        return is_still_open()
    except LedgerError:
        return False  # who asks next is told in words that the ledger is down


def _facts() -> dict[str, object]:
    ledger = context().ledger
    reader = blind.reader()
    all_blind = context().shadow and bool(reader)
    filters, findings = (BLIND_FILTERS, {}) if all_blind else (FILTERS, FINDINGS)
    scanners = record.find_scanners(ledger)
    query, problems = _read_query(reader, filters, findings, scanners)
    in_flight, in_flight_count = record.find_in_flight(ledger)
    worklist = record.find_worklist(ledger, query)
    blind.note_shown(*(row.result.event for row in worklist.rows if row.blind and not row.hidden))
    return {
        "worklist": worklist,
        "query": query,
        "asked": _asked(query),
        "problems": problems,
        "filters": filters,
        "findings": findings,
        "scanners": scanners,
        "all_blind": all_blind,
        "in_flight": in_flight,
        "in_flight_count": in_flight_count,
    }


def _read_query(
    reader: str, dispositions: Container[str], findings: Container[str], scanners: Container[str]
) -> tuple[WorklistQuery, list[str]]:
    """What the address asks for, and in words what of it was left out."""
    problems: list[str] = []

    def read(name: str, what: str, understood: Callable[[str], Value], missing: Value) -> Value:
        value = request.args.get(name, "").strip()
        if not value:
            return missing
        try:
            return understood(value)
        except (ValueError, OverflowError) as error:
            said = "".join(letter if letter.isprintable() else "�" for letter in value[:LONGEST_SAID])
            problems.append(f"{what} “{said}” was left out: {error}.")
            return missing

    query = WorklistQuery(
        disposition=read("disposition", "Disposition", _one_of(dispositions), ""),
        finding=read("finding", "Finding", _one_of(findings), ""),
        scanner=read("scanner", "Scanner", _one_of(scanners), ""),
        since=read("from", "From", _day, None),
        until=read("to", "To", _day, None),
        unreviewed=read("unreviewed", "Not yet reviewed", _flag, False),
        disagreement=read("disagreement", "Header ≠ pixels", _flag, False),
        search=read("search", "Search", _text, ""),
        page=read("page", "Page", _number, 1),
        blind_reader=reader,
    )
    return query, problems


def _asked(query: WorklistQuery) -> dict[str, Any]:
    """The query as parameters of an address, without the page."""
    every = {
        "disposition": query.disposition,
        "finding": query.finding,
        "scanner": query.scanner,
        "from": query.since.isoformat() if query.since else "",
        "to": query.until.isoformat() if query.until else "",
        "unreviewed": "1" if query.unreviewed else "",
        "disagreement": "1" if query.disagreement else "",
        "search": query.search,
    }
    return {name: value for name, value in every.items() if value}


def _one_of(known: Container[str]) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in known:
            raise ValueError("it is not one of the choices")
        return value

    return read


def _day(value: str) -> date | None:
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise ValueError("a day is written as in 2026-01-31") from None


def _flag(value: str) -> bool:
    if value != "1":
        raise ValueError("it is 1 or nothing")
    return True


def _text(value: str) -> str:
    if not value.isprintable() or len(value) > LONGEST_SEARCH:
        raise ValueError(f"search for up to {LONGEST_SEARCH} printable characters")
    return value


def _number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("it is not a number") from None

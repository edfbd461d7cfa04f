"""The worklist: every series with its disposition, and the series that are still on their way."""

from flask import Blueprint, flash, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from webui import record
from webui.context import context
from webui.session import user

blueprint = Blueprint("worklist", __name__)

FILTERS = {
    "": "All",
    "positive": "Positive",
    "negative": "Negative",
    "not_eligible": "Not eligible",
    "failed": "Failed",
}
BLIND_FILTERS = {"": "All", "analysed": "Analysed", "not_eligible": "Not eligible", "failed": "Failed"}


def blind_reader() -> str:
    """The reader's name when they must judge before they see a prediction, else nothing."""
    return user().name if context().shadow and user().role == "reader" else ""


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


@blueprint.get("/next")
def next_unread() -> ResponseReturnValue:
    """I go on to the next series that has not been read."""
    found = record.next_unread(context().ledger, request.args.get("after", ""), blind_reader())
    if found is None:
        flash("Nothing is left to read.")
        return redirect(url_for("worklist.index"))
    return redirect(url_for("series.show", series_instance_uid=found[0], revision=found[1]))


def _facts() -> dict[str, object]:
    blind = blind_reader()
    filters = BLIND_FILTERS if blind else FILTERS
    disposition = request.args.get("disposition", "")
    query = record.WorklistQuery(
        disposition=disposition if disposition in filters else "",
        unreviewed=request.args.get("unreviewed") == "1",
        search=request.args.get("search", "").strip()[:64],
        page=request.args.get("page", 1, type=int),
        blind_reader=blind,
    )
    in_flight, in_flight_count = record.find_in_flight(context().ledger)
    return {
        "worklist": record.find_worklist(context().ledger, query),
        "query": query,
        "filters": filters,
        "in_flight": in_flight,
        "in_flight_count": in_flight_count,
    }

"""The validation report of a period, made in the background and kept until the record has grown."""

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from flask import Blueprint, Response, abort, current_app, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from herald.config import Config
from herald.errors import ConfigError, HeraldError
from herald.events import utc_now
from herald.ledger import Ledger
from herald.validation.period import Head, head, period
from webui import record, session
from webui.context import context

if TYPE_CHECKING:
    from herald.validation.report import Figures

# `herald.validation.report` is imported where it is used: it brings statsmodels and scikit-learn, seconds and a hundred
# megabytes that a web UI which nobody asks for a report does not need

log = logging.getLogger(__name__)

blueprint = Blueprint("validation", __name__, url_prefix="/validation")

EXTENSION = "herald.reports"
USUAL_DAYS = 30
KEPT = 4
"""Reports in memory; each is some hundred kilobytes of figures."""

Wanted = tuple[Head, date, date]


@dataclass
class Report:
    """One report: under way, made, or failed in words."""

    figures: "Figures | None" = None
    error: str = ""

    @property
    def under_way(self) -> bool:
        """Whether it is still being made."""
        return self.figures is None and not self.error


@dataclass
class Reports:
    """The last reports by period and by where the record stood; one is made at a time."""

    ledger: Ledger
    config: Config
    _kept: OrderedDict[Wanted, Report] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _one: threading.Lock = field(default_factory=threading.Lock)

    def find(self, first: date, last: date) -> Report:
        """The report of a period by the record as it stands, begun now if need be; raises LedgerError."""
        with self.ledger.read() as connection:
            wanted = (head(connection), first, last)
        with self._lock:
            known = self._kept.get(wanted)
            if known is not None:
                if known.error:  # it is told once; who looks again has it made again
                    del self._kept[wanted]
                return known
            found = self._kept[wanted] = Report()
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        threading.Thread(target=self._make, args=(found, first, last), name="validation-report", daemon=True).start()
        return found

    def _make(self, found: Report, first: date, last: date) -> None:
        from herald.validation.report import from_record

        try:
            with self._one, self.ledger.read() as connection:
                found.figures = from_record(connection, self.config, first, last)
        except Exception as error:  # told to who waits for it: nobody else would learn that the thread ended
            log.exception("the validation report of %s to %s failed", first, last)
            found.error = str(error) if isinstance(error, HeraldError) else f"{type(error).__name__}; see the log"


def _reports() -> Reports:
    made: Reports = current_app.extensions.setdefault(EXTENSION, Reports(context().ledger, context().config))
    return made


@blueprint.get("")
@session.allow("researcher", "admin")
def index() -> ResponseReturnValue:
    """I choose a period and read its validation report."""
    today = utc_now().date()
    first, last = request.args.get("from", ""), request.args.get("to", "")
    with context().ledger.read() as connection:
        entries = head(connection).entries
    shown = {
        "entries": entries,
        "first": first or (today - timedelta(days=USUAL_DAYS - 1)).isoformat(),
        "last": last or today.isoformat(),
    }
    if not first and not last:
        return render_template("validation/index.html", report=None, problem="", **shown)
    try:
        span = _span(first, last)
    except ConfigError as error:
        return render_template("validation/index.html", report=None, problem=str(error), **shown), 400
    _noted("view validation report")
    found = _reports().find(*span)
    return render_template(
        "validation/index.html",
        report=found,
        problem="",
        body=_body(found.figures) if found.figures is not None else "",
        **shown,
    )


@blueprint.get("/report.<any(html, json):kind>")
@session.allow("researcher", "admin")
def download(kind: str) -> ResponseReturnValue:
    """I take the report with me: one file that loads nothing, or its figures."""
    first, last = request.args.get("from", ""), request.args.get("to", "")
    from herald.validation.report import as_json, page

    try:
        span = _span(first, last)
    except ConfigError:
        abort(400)
    found = _reports().find(*span)
    if found.figures is None:
        return redirect(f"{url_for('validation.index')}?{urlencode({'from': first, 'to': last})}")
    _noted("download validation report")
    text, mimetype = page(found.figures), "text/html"
    if kind == "json":
        text, mimetype = as_json(found.figures), "application/json"
    name = f"herald-validation-{span[0]}-{span[1]}.{kind}"
    return Response(text, mimetype=mimetype, headers={"Content-Disposition": f'attachment; filename="{name}"'})


@blueprint.get("/report.css")
@session.public
def style() -> ResponseReturnValue:
    """My browser takes the report's style sheet, which is that of the file."""
    from herald.validation.report import STYLE

    return Response(STYLE.read_text(encoding="utf-8"), mimetype="text/css", headers={"Cache-Control": "max-age=3600"})


def _body(figures: "Figures") -> str:
    from herald.validation.report import body

    return body(figures)


def _span(first: str, last: str) -> tuple[date, date]:
    """The days of a period; raises ConfigError that says what is wrong with them."""
    try:
        span = date.fromisoformat(first), date.fromisoformat(last)
    except ValueError as error:
        raise ConfigError("Give both days of the period, as in 2026-03-01.") from error
    period(*span)
    return span


def _noted(action: str) -> None:
    record.add_audit(context().ledger, session.user().name, session.address(), action)

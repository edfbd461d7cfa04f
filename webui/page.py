"""The link of a pager page: the finding without images, and an acknowledgement without log-in."""

from typing import cast

from flask import Blueprint, abort, flash, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user  # type: ignore[import-untyped]

from herald.errors import LinkError
from herald.events import Action, SeriesTriaged
from herald.links import ReviewLink, follow_link
from webui import audit, blind, record, series, viewer, words
from webui.context import context
from webui.session import RETRY_AFTER, address, public, refused_too_often, user

blueprint = Blueprint("page", __name__, url_prefix="/page")

ANYBODY = "pager link"
"""Reader of an acknowledgement by whoever holds the link."""
LONGEST_NAME = 40
REFUSED = "link-refused"


@blueprint.get("/<token>")
@public
def show(token: str) -> ResponseReturnValue:
    """I open the link of my page and see what was found, and who acknowledged it."""
    parts = context()
    link = _follow(token)
    result = record.find_result(parts.ledger, link.series_instance_uid, link.revision)
    audit.add_view(link.study_instance_uid, link.series_instance_uid, "view-page", who=_who())
    if result is None:
        return render_template("page/waiting.html"), 404
    study = record.find_analysed(parts.ledger, link.study_instance_uid)
    if current_user.is_authenticated:  # whoever comes by the link knows the finding
        blind.note_shown(result.event)
    return render_template(
        "page/show.html",
        token=token,
        result=result,
        event=result.event,
        stack=viewer.find_stack(result.event)[0] if current_user.is_authenticated else None,
        may_review=_may_review(),
        asks_name=_who() == ANYBODY,
        longest_name=LONGEST_NAME,
        newest=record.newest_revision(parts.ledger, link.series_instance_uid),
        newer=next((r for r in study if _same_series(r, link) and r.event.revision > link.revision), None),
        others=[r for r in study if not _same_series(r, link)],
    )


@blueprint.post("/<token>")
@public
def acknowledge(token: str) -> ResponseReturnValue:
    """I say that I have seen the page, and logged in whether it is right; or I am told who was faster."""
    parts = context()
    link = _follow(token)
    result = record.find_result(parts.ledger, link.series_instance_uid, link.revision)
    if result is None:
        return render_template("page/waiting.html"), 404
    event, who = series.answered(result), _who()
    verdict = request.form.get("verdict", "")
    if verdict:  # here and not at the series: this address is its own proof against forged forms
        return _judge(event, verdict)
    given = record.add_review(parts.ledger, event, "acknowledge", who, prediction_shown=True)
    parts.publisher.wake()
    study = link.study_instance_uid
    record.add_audit(parts.ledger, who, address(), "acknowledge-page", study, link.series_instance_uid)
    if given.first:
        flash("Acknowledged. Nobody else will be paged for this study.")
    else:
        flash(f"{given.reader} was first, at {words.clock(given.at)}. That you have seen it is recorded too.")
    return redirect(url_for(".show", token=token), 303)


def _judge(event: SeriesTriaged, verdict: str) -> ResponseReturnValue:
    if not _may_review():
        abort(403)
    if verdict not in record.VERDICTS:
        abort(400)
    action = cast(Action, verdict)
    record.add_review(context().ledger, event, action, user().name, prediction_shown=True)
    context().publisher.wake()
    flash(f"Recorded: {words.ACTIONS[action]}.")
    here = url_for(
        "series.show",
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        describe=1 if series.is_bleed(action, event) else None,
    )
    return redirect(here, 303)


@blueprint.errorhandler(record.ResultChanged)
def changed(error: record.ResultChanged) -> ResponseReturnValue:
    """I am told that what I answered is not what Herald says now, and see what it says."""
    flash(str(error), "notice")
    return make_response(show(**(request.view_args or {})), 409)


@blueprint.errorhandler(LinkError)
def refused(error: LinkError) -> ResponseReturnValue:
    """I am told why my link does nothing, and what to do instead."""
    return render_template("page/refused.html", reason=str(error)), 403


def _follow(token: str) -> ReviewLink:
    parts = context()
    try:
        with parts.ledger.read() as connection:
            return follow_link(parts.config.webui, connection, token)
    except LinkError:
        # A link that holds is followed whatever others at its address tried: they may share a hospital's proxy, and
        # nobody guesses 64 bits.
        if refused_too_often(REFUSED):
            reason = "too many links that do not hold were opened from here; wait five minutes before you try others"
            abort(make_response(render_template("page/refused.html", reason=reason), 429, RETRY_AFTER))
        record.add_audit(parts.ledger, "", address(), REFUSED)
        raise


def _may_review() -> bool:
    return current_user.is_authenticated and user().role in ("reader", "admin")


def _same_series(result: record.Result, link: ReviewLink) -> bool:
    return result.event.series_instance_uid == link.series_instance_uid


def _who() -> str:
    """The reader who is logged in, else whoever holds the link, with the name that was given with it."""
    if current_user.is_authenticated and user().role != "researcher":
        return user().name
    given = "".join(c if c.isprintable() else " " for c in request.form.get("name", ""))
    name = " ".join(given.split())[:LONGEST_NAME]
    return f"{ANYBODY} ({name})" if name else ANYBODY

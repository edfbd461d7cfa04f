"""The link of a pager page: the finding without images, and an acknowledgement without log-in."""

from flask import Blueprint, flash, redirect, render_template, url_for
from flask.typing import ResponseReturnValue
from flask_login import current_user  # type: ignore[import-untyped]

from herald.links import ReviewLink, verify_link
from webui import record
from webui.context import context
from webui.session import address, public, user

blueprint = Blueprint("page", __name__, url_prefix="/page")

ANYBODY = "pager link"
"""Reader of an acknowledgement by whoever holds the link."""


@blueprint.get("/<token>")
@public
def show(token: str) -> ResponseReturnValue:
    """I open the link of my page and see what was found."""
    parts = context()
    link = verify_link(parts.config.webui, token)
    result = record.find_result(parts.ledger, link.series_instance_uid, link.revision)
    record.add_audit(parts.ledger, _who(), address(), "view-page", link.study_instance_uid, link.series_instance_uid)
    if result is None:
        return render_template("page/waiting.html"), 404
    return render_template(
        "page/show.html",
        token=token,
        result=result,
        event=result.event,
        newest=record.newest_revision(parts.ledger, link.series_instance_uid),
    )


@blueprint.post("/<token>")
@public
def acknowledge(token: str) -> ResponseReturnValue:
    """I say that I have seen the page, so that nobody else is paged."""
    parts = context()
    link: ReviewLink = verify_link(parts.config.webui, token)
    result = record.find_result(parts.ledger, link.series_instance_uid, link.revision)
    if result is None:
        return render_template("page/waiting.html"), 404
    record.add_review(parts.ledger, result.event, "acknowledge", _who(), prediction_shown=True)
    parts.publisher.wake()
    flash("Acknowledged. Nobody else will be paged for this study.")
    return redirect(url_for(".show", token=token), 303)


def _who() -> str:
    return user().name if current_user.is_authenticated and user().role != "researcher" else ANYBODY

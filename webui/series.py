"""The page of one series: its picture with the predicted mask, why Herald decided so, and the reader's review."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from flask import Blueprint, abort, flash, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from herald.events import Action, Finding, SeriesTriaged
from herald.signatures import FINDINGS, HEADS
from herald.superseded import ANALYSED
from herald.volume import WINDOWS
from webui import audit, blind, record, viewer, words
from webui.context import context
from webui.picture import Stack
from webui.record import Result, ResultChanged, Review
from webui.session import allow, user

blueprint = Blueprint("series", __name__, url_prefix="/series")

LONGEST_NOTE = 2000
KINDS = {"iph": "i", "ivh": "v", "sah": "s", "edh_sdh": "e", "any": "o"}
"""Kinds of haemorrhage that a reader can state, with the key of each."""
REVEALED = " The prediction is shown now."


@dataclass(frozen=True)
class HeadRow:
    """What the pixels say of one head of the protocol model, beside the header's claim."""

    head: str
    label: str | None
    probability: float | None
    claim: str | None
    disagrees: bool


@dataclass(frozen=True)
class FindingRow:
    """One kind of haemorrhage with the 1-based slice of our stack where it is hottest."""

    finding: Finding
    shown_slice: int | None


@dataclass(frozen=True)
class Said:
    """What one reader said, as another may read it; blind readers read their own words again."""

    review: Review
    text: str


@dataclass(frozen=True)
class Step:
    """One step of the timeline: seconds since the step before, and since the last image."""

    label: str
    at: datetime
    since_previous_s: float | None
    since_last_image_s: float | None


@blueprint.get("/<series_instance_uid>")
def newest(series_instance_uid: str) -> ResponseReturnValue:
    """I open a series and come to its newest revision."""
    revision = record.newest_revision(context().ledger, series_instance_uid)
    if revision is None:
        abort(404)
    return redirect(url_for(".show", series_instance_uid=series_instance_uid, revision=revision))


@blueprint.get("/<series_instance_uid>/<int:revision>")
def show(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I see what Herald found in a series, why, when, and what readers said."""
    parts = context()
    result = viewer.result_of(series_instance_uid, revision)
    event = result.event
    describes = "describe" in request.args
    # who still says what kind it is has not been shown the prediction
    hidden = blind.is_unseen(event) if describes else blind.is_hidden(event)
    audit.add_view(event.study_instance_uid, event.series_instance_uid, record.VIEW_SERIES)
    if not hidden:
        blind.note_shown(event)
    stack, no_picture = viewer.find_stack(event)
    given = [] if hidden else record.find_reviews(parts.ledger, series_instance_uid, revision)
    pages = [] if hidden else record.find_pages(parts.ledger, event.study_instance_uid)
    return render_template(
        "series/show.html",
        newest=record.newest_revision(parts.ledger, series_instance_uid),
        stack=stack,
        no_picture=no_picture,
        shown=viewer.shown_first(stack, hidden) if stack else None,
        window=viewer.window_of(stack),
        mask=request.args.get("mask") != "0" and not hidden and stack is not None and stack.mask is not None,
        windows=WINDOWS,
        findings=[] if hidden else _findings(event, stack),
        heads=_heads(event),
        timeline=_timeline(result, given, pages),
        pages=pages,
        **_read(result, hidden, describes),
    )


@blueprint.post("/<series_instance_uid>/<int:revision>/review")
@allow("reader", "admin")
def review(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I acknowledge, or say whether Herald was right, or before I see that, what there is."""
    parts = context()
    event = answered(viewer.result_of(series_instance_uid, revision))
    unseen = blind.is_unseen(event)
    verdict = request.form.get("verdict", "")
    action, (kind, note) = _action(verdict, event, unseen), _kind_and_note()
    if action is None:
        abort(400)
    asks_kind = kind is None and is_bleed(action, event)
    if verdict == "haemorrhage":
        kind = kind or "any"
    elif verdict == "no_haemorrhage":
        kind = None
    given = record.add_review(
        parts.ledger, event, action, user().name, prediction_shown=not unseen, finding_kind=kind, note=note
    )
    parts.publisher.wake()
    if action == "acknowledge":
        said = f"Recorded: {words.ACTIONS[action]}."
        if not given.first and given.reader != user().name:
            said += f" {given.reader} was first, at {words.clock(given.at)}."
        return _answer(event, said)
    said = "Your verdict is recorded." if unseen else f"Recorded: {words.ACTIONS[action]}."
    if unseen and not asks_kind:
        said += REVEALED
    return _answer(event, said, describes=asks_kind)


@blueprint.post("/<series_instance_uid>/<int:revision>/review/description")
@allow("reader", "admin")
def describe(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I add to my verdict what kind of bleed I saw, and a note; the verdict as it was stays in the record."""
    parts = context()
    event = answered(viewer.result_of(series_instance_uid, revision))
    kind, note = _kind_and_note()
    own = _own_verdict(record.find_reviews(parts.ledger, series_instance_uid, revision))
    if own is None:
        return _answer(event, "Nothing was added: you have given no verdict, or taken it back.")
    unseen = blind.is_unseen(event)
    described = (kind or own.finding_kind, note or own.note)
    if described != (own.finding_kind, own.note):
        record.add_review(
            parts.ledger,
            event,
            own.action,
            user().name,
            # a note alone does not make a blind verdict an informed one
            prediction_shown=own.prediction_shown if described[0] == own.finding_kind else not unseen,
            finding_kind=described[0],
            note=described[1],
        )
        parts.publisher.wake()
    said = f"Recorded: {_words(own.action, event, unseen)}"
    if described[0]:
        said += f", {words.FINDINGS[described[0]].lower()}"
    return _answer(event, f"{said}.{REVEALED if unseen else ''}")


@blueprint.post("/<series_instance_uid>/<int:revision>/review/undo")
@allow("reader", "admin")
def undo(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I take back my verdict."""
    event = answered(viewer.result_of(series_instance_uid, revision))
    if not record.undo_verdict(context().ledger, event, user().name):
        return _answer(event, "There is no verdict of yours to take back.")
    return _answer(
        event,
        "Your verdict is taken back: it counts no more, and stays in the record. "
        "The study stays acknowledged: paging that it ended does not begin again.",
    )


@blueprint.errorhandler(ResultChanged)
def changed(error: ResultChanged) -> ResponseReturnValue:
    """I am told that what I answered is not what Herald says now, and see what it says."""
    flash(str(error), "notice")
    if request.headers.get("X-Fragment") == "read":
        return "", 409  # all of the page has changed: the script loads it, and it says so
    return make_response(show(**(request.view_args or {})), 409)


def answered(result: Result) -> SeriesTriaged:
    """The result that a form answers; raises ResultChanged where its page showed another, or does not say which."""
    decided_at = request.form.get("decided_at")
    if not decided_at:
        raise ResultChanged("This page does not say which result it showed: look again. Nothing was recorded.")
    if decided_at != result.event.occurred_at.isoformat():
        raise record.result_changed(result.posted_at, result.event.occurred_at)
    return result.event


def _answer(event: SeriesTriaged, said: str, *, describes: bool = False) -> ResponseReturnValue:
    """What was done, in words: on the page again, or for a script on the part of it that has changed."""
    uid, revision = event.series_instance_uid, event.revision
    if request.headers.get("X-Fragment") == "read":
        result = viewer.result_of(uid, revision)
        # a part that is shown in place reveals nothing: only the page itself does, which notes it
        part = _read(result, blind.is_unseen(event), describes)
        # the rest of the page still shows the result that was answered
        return render_template("series/read.html", said=said, **{**part, "decided_at": event.occurred_at})
    flash(said)
    here = url_for(".show", series_instance_uid=uid, revision=revision, describe=1 if describes else None)
    return redirect(here, 303)


def _read(result: Result, hidden: bool, describes: bool) -> dict[str, Any]:
    """What the reading part of the page shows: what counts of every reader, and behind it what did."""
    event = result.event
    given = record.find_reviews(context().ledger, event.series_instance_uid, event.revision)
    visible = [review for review in given if not hidden or review.reader == user().name]
    valid = [review for review in visible if review.undone_at is None]
    standing = {review.reader: review for review in valid if review.action == "acknowledge"}
    standing |= {review.reader: review for review in visible if review.counts}
    own = _own_verdict(given)
    said = [Said(review, _words(review.action, event, hidden)) for review in visible]
    return {
        "result": result,
        "event": event,
        "here": {"series_instance_uid": event.series_instance_uid, "revision": event.revision},
        "decided_at": event.occurred_at,
        "blind": hidden,
        "may_review": user().role in ("reader", "admin"),
        "standing": [one for one in said if one.review in standing.values()],
        "earlier": [one for one in said if one.review not in standing.values()],
        "own": own,
        "describes": describes and own is not None,
        "kinds": KINDS,
    }


def _own_verdict(given: list[Review]) -> Review | None:
    """The verdict of who is logged in that counts: the last one that was not taken back."""
    return next((review for review in reversed(given) if review.counts and review.reader == user().name), None)


def _kind_and_note() -> tuple[str | None, str | None]:
    kind, note = request.form.get("finding_kind") or None, request.form.get("note", "").strip() or None
    if (kind is not None and kind not in FINDINGS) or len(note or "") > LONGEST_NOTE:
        abort(400)
    return kind, note


def _action(verdict: str, event: SeriesTriaged, unseen: bool) -> Action | None:
    """The action that a verdict means; a blind reader says what there is, and agrees or disagrees by that."""
    if verdict in ("haemorrhage", "no_haemorrhage") and event.disposition in ANALYSED:
        return "agree" if (verdict == "haemorrhage") == (event.disposition == "positive") else "disagree"
    if verdict in ("agree", "disagree") and unseen:
        return None
    return cast(Action, verdict) if verdict in words.ACTIONS else None


def is_bleed(action: Action, event: SeriesTriaged) -> bool:
    """Whether a verdict says that there is haemorrhage."""
    return (action, event.disposition) in (("agree", "positive"), ("disagree", "negative"))


def _words(action: Action, event: SeriesTriaged, hidden: bool) -> str:
    """A verdict in words that tell a blind reader nothing of the prediction."""
    if hidden and action in ("agree", "disagree"):
        return "haemorrhage" if is_bleed(action, event) else "no haemorrhage"
    return words.ACTIONS[action]


def _findings(event: SeriesTriaged, stack: Stack | None) -> list[FindingRow]:
    places = {uid: i + 1 for i, uid in enumerate(stack.sop_instance_uids)} if stack else {}
    return [FindingRow(finding, places.get(finding.sop_instance_uid)) for finding in event.findings]


def _heads(event: SeriesTriaged) -> list[HeadRow]:
    rows = []
    for head in HEADS:
        answer = (event.protocol or {}).get(head)
        rows.append(
            HeadRow(
                head=head,
                label=answer.label if answer else None,
                probability=answer.probability if answer else None,
                claim=event.header.get(head),
                disagrees=head in event.disagreements,
            )
        )
    return rows


def _timeline(result: Result, given: list[Review], pages: list[dict[str, object]]) -> list[Step]:
    event = result.event
    moments: list[tuple[str, datetime | None]] = [
        ("First image received", event.first_image_at),
        ("Last image received", event.last_image_at),
        (f"Series complete ({event.close_reason})" if event.close_reason else "Series complete", event.received_at),
        ("Taken up for analysis", event.started_at),
        ("Protocol recognised", event.classified_at),
        ("Searched for haemorrhage", event.detected_at),
        ("Decided", event.occurred_at),
        ("On the worklist", result.posted_at),
    ]
    for page in pages:
        sent = "recorded in shadow mode" if page["mode"] == "shadow" else "sent"
        moments.append((f"Page {cast(int, page['step']) + 1} {sent}", cast(datetime | None, page["sent_at"])))
    moments += [(f"{review.reader}: {words.ACTIONS[review.action]}", review.occurred_at) for review in given]
    undone = {(review.reader, review.undone_at) for review in given if review.undone_at is not None}
    ends = "review was of an earlier result"
    moments += [(f"{reader}: {ends if at == result.posted_at else 'verdict taken back'}", at) for reader, at in undone]
    steps: list[Step] = []
    for label, at in sorted(((label, at) for label, at in moments if at is not None), key=lambda moment: moment[1]):
        last = event.last_image_at
        steps.append(
            Step(
                label=label,
                at=at,
                since_previous_s=(at - steps[-1].at).total_seconds() if steps else None,
                since_last_image_s=(at - last).total_seconds() if last and at > last else None,
            )
        )
    return steps

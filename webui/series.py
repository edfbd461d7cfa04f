"""The page of one series: its picture with the predicted mask, why Herald decided so, and the reader's review."""

from dataclasses import dataclass
from datetime import datetime
from typing import cast

from flask import Blueprint, abort, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue

from herald.events import Action, Finding, SeriesTriaged
from herald.signatures import FINDINGS, HEADS
from herald.volume import WINDOWS
from webui import record, viewer, words
from webui.context import context
from webui.picture import Stack
from webui.record import Result, Review
from webui.session import address, allow, user

blueprint = Blueprint("series", __name__, url_prefix="/series")

LONGEST_NOTE = 2000


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
    given = record.find_reviews(parts.ledger, series_instance_uid, revision)
    blind = viewer.is_blind(event, given)
    record.add_audit(
        parts.ledger, user().name, address(), "view-series", event.study_instance_uid, event.series_instance_uid
    )
    stack, no_picture = viewer.find_stack(event)
    pages = [] if blind else record.find_pages(parts.ledger, event.study_instance_uid)
    return render_template(
        "series/show.html",
        result=result,
        event=event,
        blind=blind,
        may_review=user().role in ("reader", "admin"),
        newest=record.newest_revision(parts.ledger, series_instance_uid),
        stack=stack,
        no_picture=no_picture,
        shown=viewer.shown_first(stack, blind) if stack else None,
        window=viewer.window_of(stack),
        mask=request.args.get("mask") != "0" and not blind and stack is not None and stack.mask is not None,
        windows=WINDOWS,
        findings=[] if blind else _findings(event, stack),
        heads=_heads(event),
        timeline=_timeline(result, [] if blind else given, pages),
        pages=pages,
        reviews=[review for review in given if not blind or review.reader == user().name],
        kinds=FINDINGS,
    )


@blueprint.post("/<series_instance_uid>/<int:revision>/review")
@allow("reader", "admin")
def review(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I acknowledge, or say whether Herald was right and what I saw."""
    parts = context()
    event = viewer.result_of(series_instance_uid, revision).event
    blind = viewer.is_blind(event, record.find_reviews(parts.ledger, series_instance_uid, revision))
    kind = request.form.get("finding_kind", "") or None
    note = request.form.get("note", "").strip() or None
    verdict = request.form.get("verdict", "")
    action = _action(verdict, event, blind)
    if action is None or (kind is not None and kind not in FINDINGS) or len(note or "") > LONGEST_NOTE:
        abort(400)
    if verdict == "haemorrhage":
        kind = kind or "any"
    elif verdict == "no_haemorrhage":
        kind = None
    given = record.add_review(
        parts.ledger, event, action, user().name, prediction_shown=not blind, finding_kind=kind, note=note
    )
    parts.publisher.wake()
    said = (
        f"Recorded: {words.ACTIONS[action]}." if not blind or action == "acknowledge" else "Your verdict is recorded."
    )
    shown = " The prediction is shown now." if blind and action != "acknowledge" else ""
    if action == "acknowledge" and not given.first and given.reader != user().name:
        said += f" {given.reader} was first, at {words.clock(given.at)}."
    flash(said + shown)
    return redirect(url_for(".show", series_instance_uid=series_instance_uid, revision=revision), 303)


def _action(verdict: str, event: SeriesTriaged, blind: bool) -> Action | None:
    """The action that a verdict means; a blind reader says what there is, and agrees or disagrees by that."""
    if verdict in ("haemorrhage", "no_haemorrhage") and event.disposition in record.ANALYSED:
        return "agree" if (verdict == "haemorrhage") == (event.disposition == "positive") else "disagree"
    if verdict in ("agree", "disagree") and blind:
        return None
    return cast(Action, verdict) if verdict in words.ACTIONS else None


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

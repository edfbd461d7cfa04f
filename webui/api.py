"""What other programs call: the notifier posts results here, and a monitor asks for health."""

import hmac
from datetime import datetime

from flask import Blueprint, abort, jsonify, request
from flask.typing import ResponseReturnValue

from herald.config import required_secret
from herald.errors import EventDecodeError, HeraldError
from herald.events import SeriesTriaged, event_from_json
from webui import blind, record
from webui.context import context
from webui.session import address, public

blueprint = Blueprint("api", __name__)


@blueprint.put("/api/results/<series_instance_uid>/<int:revision>")
@public
def put_result(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """The notifier posts a result: 201 when it is new, 200 when it was known, 400 or 401 with the reason."""
    if not _authorized():
        return _error(401, "the bearer token is missing or wrong; notifier and web UI must share webui.token")
    try:
        event = event_from_json(request.get_data(cache=False))
    except EventDecodeError as error:
        return _error(400, str(error))
    if not isinstance(event, SeriesTriaged):
        return _error(400, f"expected a SeriesTriaged, got a {type(event).__name__}")
    if (event.series_instance_uid, event.revision) != (series_instance_uid, revision):
        return _error(
            400,
            f"the address says series {series_instance_uid} revision {revision}, "
            f"the event says {event.series_instance_uid} revision {event.revision}",
        )
    problem = _problem(event)
    if problem:
        return _error(400, problem)
    created = record.upsert_result(context().ledger, event, blind.drawn(context().config, event))
    return jsonify(series_instance_uid=series_instance_uid, revision=revision, created=created), 201 if created else 200


@blueprint.post("/api/acknowledgements/<series_instance_uid>/<int:revision>")
@public
def acknowledge(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """The notifier passes on that a page was answered: 200 with who was first, 404 while the result is not here."""
    if not _authorized():
        return _error(401, "the bearer token is missing or wrong; notifier and web UI must share webui.token")
    body = request.get_json(silent=True)
    reader = body.get("reader") if isinstance(body, dict) else None
    if not isinstance(reader, str) or not reader.strip():
        return _error(400, 'expected {"reader": "who answered"}')
    parts = context()
    result = record.find_result(parts.ledger, series_instance_uid, revision)
    if result is None:
        return _error(404, f"series {series_instance_uid} revision {revision} has no result here yet; try again later")
    given = record.add_review(parts.ledger, result.event, "acknowledge", reader, prediction_shown=True)
    parts.publisher.wake()
    study = result.event.study_instance_uid
    record.add_audit(parts.ledger, reader, address(), "acknowledge-reply", study, series_instance_uid)
    return jsonify(reader=given.reader, at=given.at.isoformat(), first=given.first)


@blueprint.get("/health")
@public
def health() -> ResponseReturnValue:
    """A monitor asks whether the web UI can work: 200, or 503 with what is wrong."""
    parts = context()
    problems = []
    for name, check in (("ledger", parts.ledger.check), ("store", parts.store.free_bytes)):
        try:
            check()
        except HeraldError as error:
            problems.append(f"{name}: {error}")
    return jsonify(status="failing" if problems else "ok", problems=problems), 503 if problems else 200


@blueprint.route("/api/", defaults={"path": ""})
@blueprint.route("/api/<path:path>")
@public
def nothing(path: str) -> ResponseReturnValue:
    """A program asks for something that is not there."""
    abort(404)


def _authorized() -> bool:
    expected = required_secret(context().config.webui.token, "webui.token")
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode(), expected.encode())


def _problem(event: SeriesTriaged) -> str | None:
    """What the ledger could not hold, or None."""
    for keyword in ("study_instance_uid", "series_instance_uid"):
        uid: str = getattr(event, keyword)
        if not 0 < len(uid) <= 64:
            return f"{keyword} must have 1 to 64 characters (PS3.5 9.1), it has {len(uid)}"
    for name, value in vars(event).items():
        if isinstance(value, datetime) and value.tzinfo is None:
            return f"{name} has no time zone; times must be aware, in UTC"
    return None


def _error(status: int, reason: str) -> ResponseReturnValue:
    return jsonify(error=reason), status

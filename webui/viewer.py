"""What the viewer of the series page shows and asks for: slices, the predicted mask, and who may see it yet."""

from flask import Blueprint, Response, abort, request
from flask.typing import ResponseReturnValue

from herald.errors import DicomError
from herald.events import SeriesTriaged
from herald.volume import WINDOWS
from webui import blind, record
from webui.context import context
from webui.picture import Stack, render
from webui.record import Result

blueprint = Blueprint("viewer", __name__, url_prefix="/series")

PICTURE_CACHE_S = 600


@blueprint.get("/<series_instance_uid>/<int:revision>/slice/<int:number>.png")
def picture(series_instance_uid: str, revision: int, number: int) -> ResponseReturnValue:
    """I look at one slice, counted from 1, at a window, with or without the mask."""
    window, mask = request.args.get("window", "brain"), request.args.get("mask") == "1"
    if window not in WINDOWS:
        abort(404)
    event = result_of(series_instance_uid, revision).event
    if mask and blind.is_hidden(event):
        abort(403)
    try:
        stack = context().pictures.stack(event)
    except DicomError:
        abort(404)
    if not 1 <= number <= stack.slice_count:
        abort(404)
    response = Response(render(stack, number - 1, window, mask=mask), mimetype="image/png")
    response.cache_control.private = True
    response.cache_control.max_age = PICTURE_CACHE_S
    return response


def result_of(series_instance_uid: str, revision: int) -> Result:
    """The result of a series revision; 404 when there is none."""
    result = record.find_result(context().ledger, series_instance_uid, revision)
    if result is None:
        abort(404)
    return result


def find_stack(event: SeriesTriaged) -> tuple[Stack | None, str]:
    """The pictures of a series, or None and why there are none."""
    try:
        return context().pictures.stack(event), ""
    except DicomError as error:
        return None, str(error)


def shown_first(stack: Stack, hidden: bool) -> int:
    """The 1-based slice to show first: the one asked for, else the hottest, for a blind reader the middle one."""
    asked = request.args.get("slice", 0, type=int)
    if 1 <= asked <= stack.slice_count:
        return asked
    return (stack.middle if hidden else stack.hottest) + 1


def window_of(stack: Stack | None) -> str:
    """The window to show first: the one asked for, else the one that shows most."""
    asked = request.args.get("window", "")
    return asked if asked in WINDOWS or stack is None else stack.window

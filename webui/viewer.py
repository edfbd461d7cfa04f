"""What the viewer of the series page shows and asks for: cuts, volumes, the predicted mask, and who may see it yet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, abort, jsonify, request
from flask.typing import ResponseReturnValue

from herald.errors import DicomError
from herald.events import SeriesTriaged
from herald.picture import MASK_OPACITY
from herald.volume import WINDOWS, Window
from webui import audit, blind, nifti, record
from webui.context import context
from webui.picture import Stack, cut_count, render
from webui.record import Result

blueprint = Blueprint("viewer", __name__, url_prefix="/series")

PICTURE_CACHE_S = 600
LOWEST_CENTER, HIGHEST_CENTER, WIDEST = -2000.0, 6000.0, 10000.0
VOLUME_VIEWER = Path(__file__).parent / "static" / "vendor" / "niivue.js"
"""Made by `make viewer`; without it the page shows pictures only."""

REVISION = "/<series_instance_uid>/<int:revision>"


# --- pictures --------------------------------------------------------------------------------------------------------


@blueprint.get(f"{REVISION}/slice/<int:number>.png", defaults={"plane": "slice"})
@blueprint.get(f"{REVISION}/<any(coronal, sagittal):plane>/<int:number>.png")
def picture(series_instance_uid: str, revision: int, plane: str, number: int) -> ResponseReturnValue:
    """I look at one cut, counted from 1, at a window, with or without the mask."""
    window, mask = _window_asked(), request.args.get("mask") == "1"
    opacity = request.args.get("opacity", MASK_OPACITY, type=float)
    if window is None or not 0 <= opacity <= 1:
        abort(404)
    event = result_of(series_instance_uid, revision).event
    if mask and blind.is_unseen(event):
        abort(403)
    pictures = context().pictures
    stack = _found(pictures.original if request.args.get("original") == "1" else pictures.stack, event)
    if not 1 <= number <= cut_count(stack, plane) or (plane != "slice" and not is_axial(stack)):
        abort(404)
    drawn = render(stack, number - 1, window, mask=mask, opacity=opacity, plane=plane)
    return _kept(Response(drawn, mimetype="image/png"))


def _window_asked() -> Window | None:
    """The window by its name, or by centre and width; None when it is none."""
    center, width = (request.args.get(name, type=float) for name in ("center", "width"))
    if center is None or width is None:
        return WINDOWS.get(request.args.get("window", "brain"))
    within = LOWEST_CENTER <= center <= HIGHEST_CENTER and 1 <= width <= WIDEST
    return Window(center, width) if within else None


# --- volumes ---------------------------------------------------------------------------------------------------------


@blueprint.get(f"{REVISION}/volume.nii.gz")
def volume(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """My viewer loads what the model saw, in Hounsfield units."""
    stack = _axial(context().pictures.stack, result_of(series_instance_uid, revision).event)
    return _volume(stack, stack.hounsfield)


@blueprint.get(f"{REVISION}/mask.nii.gz")
def mask(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """My viewer loads the predicted mask, probability of any haemorrhage x 255."""
    event = result_of(series_instance_uid, revision).event
    if blind.is_unseen(event):
        abort(403)
    stack = _axial(context().pictures.stack, event)
    if stack.mask is None:
        abort(404)
    return _volume(stack, stack.mask)


@blueprint.get(f"{REVISION}/original.nii.gz")
def original_volume(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """My viewer loads every slice as it was received, in Hounsfield units."""
    stack = _axial(context().pictures.original, result_of(series_instance_uid, revision).event)
    return _volume(stack, stack.hounsfield)


@blueprint.get(f"{REVISION}/original.json")
def original(series_instance_uid: str, revision: int) -> ResponseReturnValue:
    """I ask for the original images, and learn how many there are, or why there are none."""
    event = result_of(series_instance_uid, revision).event
    # the full matrix shows a face: that somebody asked for it is written down
    audit.add_view(event.study_instance_uid, event.series_instance_uid, "view-original")
    try:
        stack = context().pictures.original(event)
    except DicomError as error:
        return jsonify(error=str(error)), 404
    return _kept(jsonify(_geometry(stack)))


def _geometry(stack: Stack) -> dict[str, Any]:
    """Where the voxels of a stack lie, and what its slices are called."""
    return {
        "numbers": stack.numbers,
        "shape": stack.hounsfield.shape,
        "spacing": stack.spacing_mm,
        "origin": stack.origin_mm,
    }


def _volume(stack: Stack, voxels: Any) -> Response:
    pieces = nifti.pack(voxels, stack.spacing_mm, stack.origin_mm)
    return _kept(Response(pieces, mimetype=nifti.MIME_TYPE))


def _found(read: Callable[[SeriesTriaged], Stack], event: SeriesTriaged) -> Stack:
    try:
        return read(event)
    except DicomError:
        abort(404)


def _axial(read: Callable[[SeriesTriaged], Stack], event: SeriesTriaged) -> Stack:
    """A stack whose axes are known; 404 for others, of which there are only pictures."""
    stack = _found(read, event)
    if not is_axial(stack):
        abort(404)
    return stack


def _kept(response: Response) -> Response:
    """What changes only with the prediction; the browser may keep it, nobody between."""
    response.cache_control.private = True
    response.cache_control.max_age = PICTURE_CACHE_S
    return response


# --- the page --------------------------------------------------------------------------------------------------------


def is_axial(stack: Stack) -> bool:
    """Whether the axes of a stack are known: only then can it be cut in other planes."""
    return stack.orientation == "axial"


@blueprint.app_template_global()
def volume_viewer_built() -> bool:
    """Whether `make viewer` was run, or a package with the volume viewer installed."""
    return VOLUME_VIEWER.exists()


@blueprint.app_template_global()
def viewer_facts(stack: Stack, event: SeriesTriaged, hidden: bool, shown: int, window: str, mask: bool) -> str:
    """What the script of the viewer works with, as JSON; nothing of the prediction while it is hidden."""
    predicted = stack.mask is not None and not hidden
    probabilities = [] if hidden or stack.slice_probability is None else stack.slice_probability.tolist()
    return json.dumps(
        {
            **_geometry(stack),
            "probabilities": probabilities,
            "hottest": (stack.middle if hidden else stack.hottest) + 1,
            "focus": stack.focus if predicted else (0.5, 0.5),
            "slice": shown,
            "window": window,
            "windows": {name: (known.center, known.width) for name, known in WINDOWS.items()},
            "mask": mask and predicted,
            "hasMask": predicted,
            "opacity": MASK_OPACITY,
            "axial": is_axial(stack),
            "lettered": is_axial(stack) and not _side_is_unknown(event),
            "volume": is_axial(stack) and volume_viewer_built(),
        }
    )


def _side_is_unknown(event: SeriesTriaged) -> bool:
    """Without ImageOrientationPatient nobody knows the left of a picture from its right."""
    return any(note.startswith("ImageOrientationPatient is missing") for note in event.notes)


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

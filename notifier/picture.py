"""The picture in a page: the slice that is hottest, small enough for a phone, and without a word on it."""

import logging

import numpy as np
from PIL import Image

from herald.events import SeriesTriaged
from herald.picture import as_png, draw_slice
from herald.store import StudyStore
from herald.volume import BRAIN

log = logging.getLogger(__name__)

LARGEST_BYTES = 60_000
_SIDES = (512, 448, 384, 320, 256, 192)
"""Pixels of the longer side, the first that is small enough; 512 fill a phone of 360 points."""
_COLOURS = 64
"""Of the palette, chosen to cover all that occur: the outline keeps its colour, and grey its levels of 2 HU."""


def key_slice(store: StudyStore, event: SeriesTriaged) -> bytes | None:
    """PNG of the slice with the highest probability, the mask outlined, in the brain window; at most 60 kB.

    None where there is no prediction or it cannot be read, which is logged: no page waits for its picture.
    """
    try:
        prediction = store.read_prediction(event.study_instance_uid, event.series_instance_uid, event.revision)
        if prediction is None:
            log.warning("series %s revision %d has no prediction to show", event.series_instance_uid, event.revision)
            return None
        hottest = int(np.argmax(prediction.slice_probability[:, 0]))
        hounsfield, mask = prediction.hounsfield[hottest], prediction.mask[hottest, ..., 0]
        for side in _SIDES:
            drawn = draw_slice(hounsfield, BRAIN, mask, longer_side=side)
            picture = as_png(drawn.quantize(_COLOURS, Image.Quantize.MAXCOVERAGE))
            if len(picture) <= LARGEST_BYTES:
                return picture
    except Exception as error:  # a damaged file may hold arrays of any shape
        log.warning("series %s revision %d cannot be shown: %s", event.series_instance_uid, event.revision, error)
        return None
    log.warning("the key slice of series %s is larger than %d bytes", event.series_instance_uid, LARGEST_BYTES)
    return None

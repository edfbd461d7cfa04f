"""Which spots of the detector's mask are outlined as blood: those of which it is sure somewhere.

Two thresholds (hysteresis; Canny 1986, IEEE TPAMI 8:679-698): a bleed is outlined as far as it is likely, and a spot
that is likely but nowhere sure is left to the tint, which shows doubt.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

OUTLINED = 128
"""Mask value (probability x 255) from which a voxel is outlined, and counts as blood."""

SURE = 243
"""Mask value that a spot must reach somewhere: 95 %."""

TOUCHING = np.ones((3, 3, 3), np.bool_)  # by a face, an edge or a corner, in a slice and across slices


def outlined(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of `mask` (D, H, W, C), probability x 255, with spots that are nowhere SURE just below OUTLINED.

    A kind of which no spot is sure keeps them all: what a positive answer rests on must be seen.
    """
    out = mask.copy()
    for kind in np.moveaxis(out, -1, 0):
        for box in ndimage.find_objects((kind >= OUTLINED).view(np.uint8)):  # one around all of it, or none
            _cut_doubtful(kind[box])
    return out


def _cut_doubtful(kind: NDArray[np.uint8]) -> None:
    likely, sure = kind >= OUTLINED, kind >= SURE
    if sure.any():
        spots, count = ndimage.label(likely, TOUCHING)
        kept = np.zeros(count + 1, np.bool_)
        kept[spots[sure]] = True
        kind[likely & ~kept[spots]] = OUTLINED - 1

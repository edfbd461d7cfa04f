"""What of a head the haemorrhage model looks at: the cranial cavity, with cupping and noise made like the usual.

A scanner shows brain brighter the nearer it lies to the skull (cupping; Barrett and Keat 2004, RadioGraphics
24:1679-1691), by a few Hounsfield units or by twenty, depending on scanner, skull and correction. Thin blood on the
inner table differs from the brain beside it by as much. What a head has more or less of it than others is taken away.
Muscle and glands of face and neck are as bright as blood; what lies well below the skull is not looked at.
Both are for the model alone: readers see what was scanned.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.grain import without_excess_noise
from herald.volume import AIR_HOUNSFIELD, Hounsfield

Bool = NDArray[np.bool_]

BONE = 250.0  # Hounsfield units, above blood and most calcifications
TISSUE = (15, 75)  # brain and blood, without fluid and calcification
CORRECTED = (0, 120)  # what may hold brain or blood; all else stays as it is
ENCLOSED = 0.8  # of a cavity's outline that bone must border: face and neck have less
CAVITY = 1500 / 256**2  # of the square; smaller ones are sinuses, orbits and the canal

DEPTHS = (1, 6, 11, 17, 25, 37, 55, 90)  # edges of shells below the inner table, in pixels of a head of 384, 0.6 mm
USUAL = (14.0, 9.0, 8.0, 6.0, 4.0, 1.0, 0.0)
"""The `cupping` of CT-ICH's 41 heads, within one Hounsfield unit of the medians (tests/test_real_cranium.py)."""
TISSUE_PERCENTILE = 60.0  # grey rather than white matter, of which furrows and age take less
MOST = 10.0  # Hounsfield units, so that blood which fills a shell cannot be taken for cupping altogether
LEAST_VOXELS = 500  # in each shell, of every second row and column
LEAST_SLICES = 12  # from the first cavity up, some 6 cm of a head of 15 ...
LEAST_FOUND = 0.7  # ... with one in so many, before slices below are left out: not where bone is thin or open
MARGIN_SLICES = 3  # below the first cavity that are looked at all the same
COARSE = 2  # every such row and column is enough to find the skull


def detector_view(head: Hounsfield) -> Hounsfield:
    """The head (D, N, N) of `herald.volume.detection_input` as the model is shown it, in Hounsfield units; same shape.

    Noise beyond the usual is smoothed (`herald.grain`); else brain deep in the head stays as it is, and so does a
    head that shows too little of the cranial cavity. Slices below the skull become air, where the cavity is known well
    enough to say so.
    """
    depth = cavity_depth(head[:, ::COARSE, ::COARSE])
    fine = (depth * np.uint8(COARSE)).repeat(COARSE, axis=1).repeat(COARSE, axis=2)
    out = without_excess_noise(head, fine).copy()
    if (found := cupping(out[:, ::COARSE, ::COARSE], depth)) is not None:
        _lower(out, depth, np.clip(found - np.array(USUAL), -MOST, MOST))
    enclosed: Bool = np.any(depth > 0, axis=(1, 2))
    out[: _below_skull(enclosed)] = AIR_HOUNSFIELD
    return out


def cupping(head: Hounsfield, depth: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Hounsfield units by which tissue in each shell of DEPTHS is brighter than in the last; None where one is small.

    `head` (D, N, N) and its `cavity_depth`, at any N.
    """
    tissue = (depth > 0) & (head > TISSUE[0]) & (head < TISSUE[1])
    below, hounsfield = _in_384(depth)[tissue], head[tissue]
    shells = [hounsfield[(below >= low) & (below < high)] for low, high in pairwise(DEPTHS)]
    if min(len(shell) for shell in shells) < LEAST_VOXELS:
        return None
    level = np.array([np.percentile(shell, TISSUE_PERCENTILE) for shell in shells])
    return np.asarray(level - level[-1], np.float64)


def _lower(head: Hounsfield, depth: NDArray[np.uint8], excess: NDArray[np.float64]) -> None:
    """Take `excess` (shells,) from brain and blood of `head`, by their coarse `depth`, between middles of shells."""
    middles = [(low + high) / 2 for low, high in pairwise(DEPTHS)]
    rise = np.where(depth > 0, np.interp(_in_384(depth), middles, -excess), 0).astype(np.float32)
    for plane, added in zip(head, rise, strict=True):
        fine = ndimage.uniform_filter(added.repeat(COARSE, axis=0).repeat(COARSE, axis=1), COARSE)
        brain = (plane > CORRECTED[0]) & (plane < CORRECTED[1])
        plane[brain] = np.rint(plane[brain] + fine[brain])


def _in_384(depth: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Depths in pixels of a head of 384."""
    return depth.astype(np.float32) * np.float32(384 / depth.shape[1])


def _below_skull(enclosed: Bool) -> int:
    """How many of the lowest slices (D,) lie so far below the first cavity that they hold neither brain nor blood."""
    if not enclosed.any():
        return 0
    lowest = int(np.argmax(enclosed))
    found = enclosed[lowest:]
    sure = len(found) >= LEAST_SLICES and found.mean() >= LEAST_FOUND
    return max(0, lowest - MARGIN_SLICES) if sure else 0


def cavity_depth(head: Hounsfield) -> NDArray[np.uint8]:
    """Distance from the inner table in pixels within the cranial cavity of a head (D, N, N), 0 elsewhere: (D, N, N).

    It is found slice by slice; slices in which bone does not enclose one have none. The head fills the square.
    """
    side = int(head.shape[1])
    near, closed, thin = (round(pixels * side / 256) for pixels in (4, 3, 2))
    depth = np.zeros(head.shape, dtype=np.uint8)
    for plane, out in zip(head, depth, strict=True):
        bone: Bool = ndimage.binary_closing(np.pad(plane > BONE, near), iterations=closed)[near:-near, near:-near]
        soft = ndimage.binary_erosion((plane > -20) & (plane < 110) & ~bone, iterations=thin)
        parts, count = ndimage.label(soft)
        if not count:
            continue
        sizes = np.bincount(parts.ravel())[1:]
        ring = ndimage.binary_dilation(bone, iterations=near)
        for part in np.flatnonzero(sizes > CAVITY * side**2) + 1:
            inside = ndimage.binary_fill_holes(ndimage.binary_dilation(parts == part, iterations=thin)) & ~bone
            outline = inside & ~ndimage.binary_erosion(inside)
            if (outline & ring).sum() > ENCLOSED * outline.sum():
                out[inside] = np.minimum(ndimage.distance_transform_edt(inside), 255)[inside].astype(np.uint8)
    return depth

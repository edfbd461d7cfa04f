"""Noise of a scan, and taking what is beyond the usual away before the haemorrhage model looks.

A thinner slice, a lower dose or a sharper kernel leaves more noise in brain than the heads that the model learned from
have, and under it the model is less sure of blood. For the model alone: readers see what was scanned.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.volume import Hounsfield

MOST = 2.0
"""Hounsfield units of `noise` that are left; CT-ICH's heads have no more than 1.8 (tests/test_real_cranium.py)."""
BRAIN = (0, 75)  # Hounsfield units in which noise is measured
SMOOTHED = (-60, 120)  # with its noise brain, blood or fluid; bone, fat and air neither lend their grey nor change
DEEP = 22  # pixels of a head of 384 below the inner table, 14 mm
SAMPLED = 4  # every such slice is enough to know the noise
LEAST_VOXELS = 2000
WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0)  # of Gaussians, in pixels of a head of 384, 0.6 mm
STENCIL = np.array([[[0, 1, 0], [1, -4, 1], [0, 1, 0]]], np.float32)  # blind to what rises or falls evenly
WITHIN = 0.683  # of normally distributed values lie within one standard deviation


def noise(head: Hounsfield, depth: NDArray[np.uint8]) -> float | None:
    """Standard deviation in Hounsfield units between neighbouring pixels deep in the brain; None where little is seen.

    `head` (D, N, N) and its `herald.cranium.cavity_depth` (D, N, N). Noise of soft kernels, which neighbours share, is
    told as less than it is. By a Laplacian, after Immerkaer 1996 (Computer Vision and Image Understanding 64:300-302).
    """
    brain = (depth > DEEP * depth.shape[1] / 384) & (head > BRAIN[0]) & (head < BRAIN[1])
    inner = ndimage.binary_erosion(brain, np.ones((1, 3, 3), np.bool_))
    if inner.sum() < LEAST_VOXELS:
        return None
    differences = ndimage.convolve(head.astype(np.float32), STENCIL)[inner]
    return float(np.quantile(np.abs(differences), WITHIN) / np.sqrt((STENCIL**2).sum()))


def without_excess_noise(head: Hounsfield, depth: NDArray[np.uint8]) -> Hounsfield:
    """The head (D, N, N), smoothed in plane until its `noise` is no more than MOST; as it is where it is no more."""
    some, below = head[1::SAMPLED], depth[1::SAMPLED]
    found = noise(some, below)
    if found is None or found <= MOST:
        return head
    for width in WIDTHS:
        left = noise(_smoothed(some, width), below)
        if left is None or left <= MOST:
            break
    return _smoothed(head, width)


def _smoothed(head: Hounsfield, width: float) -> Hounsfield:
    """What lies in SMOOTHED becomes a mean over its neighbours that do too (normalised convolution)."""
    soft = (head > SMOOTHED[0]) & (head < SMOOTHED[1])
    across = (0.0, *[width * head.shape[1] / 384] * 2)
    grey = ndimage.gaussian_filter(np.where(soft, head, 0).astype(np.float32), across, truncate=3)
    share = ndimage.gaussian_filter(soft.astype(np.float32), across, truncate=3)
    out = head.copy()
    out[soft] = np.rint(grey[soft] / share[soft])
    return out

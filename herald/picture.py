"""One slice as PNG: a CT window in grey, and over it the predicted mask as a tint with an outline."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from herald.volume import Window

LONGER_SIDE = 512
"""Pixels of the longer side of a picture."""

MASK_COLOUR = (255, 64, 160)  # magenta: neither blood, bone nor brain is coloured in a CT window
MASK_OUTLINE = 0.5
MASK_FAINTEST = 0.2
MASK_OPACITY = 0.22


def draw_slice(
    hounsfield: NDArray[np.int16],
    window: Window,
    mask: NDArray[np.uint8] | None = None,
    *,
    aspect: float = 1.0,
    longer_side: int = LONGER_SIDE,
    opacity: float = MASK_OPACITY,
) -> Image.Image:
    """A picture of one slice, grey without a mask and in colours with one.

    `hounsfield` (H, W) int16; `mask` (H, W) uint8, probability x 255; `aspect` height of a pixel by its width;
    `opacity` of the tint where the probability is 1, its outline stays.
    """
    plane = hounsfield.astype(np.float32)
    size = _size(plane.shape[0], plane.shape[1], aspect, longer_side)
    grey = window.apply(np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)))
    if mask is None:
        return Image.fromarray(grey)
    small = Image.fromarray(mask.astype(np.float32) / 255)
    return Image.fromarray(_overlaid(grey, np.asarray(small.resize(size, Image.Resampling.BILINEAR)), opacity))


def as_png(picture: Image.Image) -> bytes:
    """The picture as PNG, packed quickly: nobody waits for the smallest file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _size(rows: int, columns: int, aspect: float, longer_side: int) -> tuple[int, int]:
    height, width = rows * aspect, float(columns)
    scale = longer_side / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _overlaid(grey: NDArray[np.uint8], probability: NDArray[np.float32], opacity: float) -> NDArray[np.uint8]:
    """A tint that grows with the probability, and an outline where it passes one half; (H, W, 3)."""
    inside = probability >= MASK_OUTLINE
    outline = ndimage.binary_dilation(inside, iterations=2) & ~inside
    alpha = np.where(probability >= MASK_FAINTEST, probability * opacity, 0.0)
    alpha = np.where(outline, 1.0, alpha)[..., None]
    colour = grey[..., None] * (1 - alpha) + np.array(MASK_COLOUR, dtype=np.float32) * alpha
    overlaid: NDArray[np.uint8] = np.rint(colour).astype(np.uint8)
    return overlaid

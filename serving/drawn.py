"""Bleeds and what is taken for them, drawn into real heads: kinds and sizes that few patients of a training set have.

Drawing follows the anatomy that a head shows by itself: the inner table (extra-axial blood lies on it), fluid (blood
fills sulci and ventricles), brain. The texture of what was there shines through, so that sharpness and noise of the
scan give nothing away. What is drawn is simulated, and only ever trained on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.cranium import CAVITY
from herald.signatures import DETECTION_IN_PLANE, FINDINGS

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]

BRIGHT = 110.0  # Hounsfield units, above blood
FLUID = 18.0  # below it, once smoothed: fluid rather than brain
PX = DETECTION_IN_PLANE / 256  # lengths below are those of a prepared head of 256 pixels, some 0.9 mm each
SLICE_PX = 5.5 * PX  # the distance of two slices, 5 mm
CAVITY_PX = CAVITY * DETECTION_IN_PLANE**2
UNEVEN_PX = 4.0 * PX  # radius above which a blob's outline shows bumps
LEAST_PX = 12 * PX**2  # of blood that make a slice positive: about 10 mm2

KINDS = ("iph", "tiny", "ivh", "sah", "sdh", "edh")
FINDING = {"iph": "iph", "tiny": "iph", "ivh": "ivh", "sah": "sah", "sdh": "edh_sdh", "edh": "edh_sdh"}


@dataclass(frozen=True, eq=False)
class Cavity:
    """`depth` (D, H, W) uint8 as `herald.cranium.cavity_depth` finds it in a prepared head."""

    depth: NDArray[np.uint8]

    def __getitem__(self, slices: NDArray[np.intp]) -> "Cavity":
        """The same of some slices."""
        return Cavity(self.depth[slices])


def draw_bleed(
    rng: np.random.Generator, volume: Float, inside: Cavity
) -> tuple[Float, NDArray[np.uint8], NDArray[np.uint8]] | None:
    """One bleed drawn into a crop (D, H, W) that has none.

    Returns the crop, its `positive` bits (D, H, W) and the bits of doubtful slices (D,); or None where the crop holds
    too little of the cranial cavity, or the bleed came out too small to be seen.
    """
    if (inside.depth > 0).sum() < CAVITY_PX:
        return None
    kind = str(rng.choice(KINDS))
    level = _LEVELS[kind](rng, volume, inside.depth)
    if level is None:
        return None
    weight = _soft(level < 1, rng) * _replaceable(volume, inside)
    if kind == "iph" and rng.random() < 0.7:  # oedema
        halo = _soft(level < rng.uniform(1.2, 1.9), rng) * (inside.depth > 0)
        volume = volume - halo * (1 - weight) * np.float32(rng.uniform(4, 12))
    low, high = (45, 70) if kind in ("sah", "ivh") else (52, 82)
    if kind == "sdh" and rng.random() < 0.25:
        low, high = 42, 54  # subacute
    return _blended(rng, volume, weight, float(rng.uniform(low, high)), FINDING[kind])


def move_bleed(
    rng: np.random.Generator,
    volume: Float,
    inside: Cavity,
    donor: Float,
    positive: NDArray[np.uint8],
    unknown: NDArray[np.uint8],
) -> tuple[Float, NDArray[np.uint8], NDArray[np.uint8]] | None:
    """The blood of another patient's crop `donor` with its bits, laid at the same place of this one.

    Shapes (D, H, W); what would lie outside the cranial cavity is left out. Returns as `draw_bleed`; a kind that is
    `unknown` of the blood stays doubtful in its slice.
    """
    blood = (positive & 1) > 0
    weight = _soft(blood, rng) * _replaceable(volume, inside)
    kept = weight > 0.5
    if kept.sum() < 0.6 * blood.sum() or not kept.any():
        return None
    out = volume * (1 - weight) + donor * weight
    bits = np.where(kept, np.where(blood, positive, 1), 0).astype(np.uint8)
    doubtful = np.bitwise_or.reduce(np.where(kept & blood, unknown, 0), axis=(1, 2))
    return out, bits, _doubtful(kept, np.bitwise_or.reduce(bits, axis=None)) | doubtful


def draw_calcification(rng: np.random.Generator, volume: Float, inside: Cavity) -> Float:
    """The crop (D, H, W) with some calcified spots of a millimetre to a centimetre, which are no blood."""
    places = np.argwhere(inside.depth > 3 * PX)
    if not len(places):
        return volume
    for _ in range(rng.integers(1, 5)):
        centre, radius_px = places[rng.integers(len(places))], PX * float(np.exp(rng.uniform(0.0, 1.6)))
        level = _ellipsoid(rng, volume.shape, centre, radius_px)
        weight = ndimage.gaussian_filter((level < 1).astype(np.float32), (0.3, 0.7 * PX, 0.7 * PX)) * (inside.depth > 0)
        volume = volume * (1 - weight) + weight * np.float32(rng.uniform(110, 400))
    return volume


def brighten_rim(rng: np.random.Generator, volume: Float, inside: Cavity) -> Float:
    """The crop (D, H, W) brighter under the skull on one side of the head, as beam hardening leaves it: no blood."""
    depth = inside.depth.astype(np.float32)
    y, x = np.mgrid[: volume.shape[1], : volume.shape[2]].astype(np.float32)
    towards = np.arctan2(y - y.mean(), x - x.mean()) - np.float32(rng.uniform(-np.pi, np.pi))
    side = np.clip(np.float32(rng.uniform(-0.5, 0.5)) + np.cos(towards), 0, 1)
    rise = np.float32(rng.uniform(4, 24)) * np.exp(-depth / np.float32(PX * rng.uniform(2, 12))) * side
    return np.asarray(np.where(depth > 0, volume + rise, volume), np.float32)


def widen_furrows(rng: np.random.Generator, volume: Float, inside: Cavity, kept: Bool) -> Float:
    """The crop (D, H, W) with wider furrows and fluid over the brain, as age leaves them; `kept` voxels stay.

    Gyri that reach the skull between dark furrows look bright beside them, and are no blood.
    """
    depth = inside.depth.astype(np.float32)
    reach = np.float32(PX * rng.uniform(5, 22)) * np.clip(1 + 0.4 * _noise(rng, volume.shape, 60.0 * PX), 0.2, 2)
    furrows = np.abs(_noise(rng, volume.shape, PX * float(rng.uniform(6, 12)))) < np.float32(rng.uniform(0.2, 0.7)) * (
        1 - depth / reach
    )
    over = depth < np.float32(PX * rng.uniform(0, 4)) * _noise(rng, volume.shape, 15.0 * PX)
    weight = _soft(furrows | over, rng) * _replaceable(volume, inside)
    weight = weight * (1 - ndimage.maximum_filter(kept.astype(np.float32), (1, *(2 * [2 * _steps(2) + 1]))))
    return volume * (1 - weight) + weight * (np.float32(rng.uniform(2, 12)) + _texture(volume, weight > 0))


def _texture(volume: Float, where: Bool) -> Float:
    """Noise of `volume` where it is to be replaced, without the edges of what is hidden then; 0 elsewhere."""
    share = ndimage.gaussian_filter(where.astype(np.float32), (0, 1.5 * PX, 1.5 * PX))
    smooth = ndimage.gaussian_filter(np.where(where, volume, 0), (0, 1.5 * PX, 1.5 * PX)) / np.maximum(share, 1e-3)
    return np.asarray(np.clip(np.where(where, volume - smooth, 0), -12, 12), np.float32)


def _blended(
    rng: np.random.Generator, volume: Float, weight: Float, hounsfield: float, finding: str
) -> tuple[Float, NDArray[np.uint8], NDArray[np.uint8]] | None:
    """`volume` with blood of the given Hounsfield units where `weight` is; noise and sharpness are those of before."""
    blood = weight > 0.5
    if blood.sum(axis=(1, 2)).max() < LEAST_PX:
        return None
    texture = _texture(volume, weight > 0)
    uneven = _noise(rng, volume.shape, 6.0 * PX) * np.float32(rng.uniform(0, 5))
    out = volume * (1 - weight) + weight * (np.float32(hounsfield) + texture + uneven)
    bit = 1 | 1 << FINDINGS.index(finding)
    return out, np.where(blood, bit, 0).astype(np.uint8), _doubtful(blood, bit)


def _replaceable(volume: Float, inside: Cavity) -> Bool:
    """What blood may take the place of: not bone, nor what bone shares a voxel with."""
    return (inside.depth > 0) & (volume < BRIGHT)


def _doubtful(blood: Bool, bits: int) -> NDArray[np.uint8]:
    """Bits of the slices that show so little of the blood that nobody could call them either way."""
    count = blood.sum(axis=(1, 2))
    return np.where((count > 0) & (count < LEAST_PX), bits, 0).astype(np.uint8)


def _steps(pixels: int) -> int:
    """So many pixels of a prepared head of 256 in whole pixels of ours."""
    return round(pixels * PX)


def _soft(blood: Bool, rng: np.random.Generator) -> Float:
    return ndimage.gaussian_filter(blood.astype(np.float32), (0.25, *(2 * [PX * rng.uniform(0.5, 1.2)])))


def _noise(rng: np.random.Generator, shape: tuple[int, ...], scale_px: float) -> Float:
    """Smooth noise of unit deviation, drawn coarsely and interpolated axis by axis, which zoom does far slower."""
    scales = (scale_px / SLICE_PX, scale_px, scale_px)
    coarse = [max(2, int(np.ceil(n / scale)) + 2) for n, scale in zip(shape, scales, strict=True)]
    planes, rows, columns = (_between(n, c) for n, c in zip(shape, coarse, strict=True))
    out = rows @ rng.standard_normal(coarse).astype(np.float32) @ columns.T
    out = np.tensordot(planes, out, axes=1)
    return np.asarray(out / max(float(out.std()), 1e-3), np.float32)


def _between(count: int, coarse: int) -> Float:
    """Weights (count, coarse) that interpolate linearly from `coarse` cells to `count` ones over the same length."""
    at = np.clip((np.arange(count) + 0.5) * coarse / count - 0.5, 0, coarse - 1)
    return np.asarray(np.maximum(1 - np.abs(at[:, None] - np.arange(coarse)), 0), np.float32)


def _ellipsoid(rng: np.random.Generator, shape: tuple[int, ...], centre: NDArray[np.intp], radius_px: float) -> Float:
    """Distance from `centre` in radii, of a turned and uneven ellipsoid."""
    angle, stretch = rng.uniform(0, np.pi), float(np.exp(rng.uniform(-0.35, 0.35)))
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    z, y, x = (z - centre[0]) * SLICE_PX, y - centre[1], x - centre[2]
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    up = max(radius_px * float(np.exp(rng.uniform(-0.3, 0.3))), 0.55 * SLICE_PX)  # a blob spans at least its slice
    level = np.sqrt((u / (radius_px * stretch)) ** 2 + (v * stretch / radius_px) ** 2 + (z / up) ** 2)
    if radius_px > UNEVEN_PX:
        level = level * (1 + 0.15 * _noise(rng, shape, radius_px))
    return np.asarray(level, dtype=np.float32)


def _iph(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    return _within(rng, volume, depth, PX * float(np.exp(rng.uniform(1.2, 3.0))), least_depth=8)


def _tiny(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    return _within(rng, volume, depth, PX * float(rng.uniform(2.0, 5.0)), least_depth=3)


def _within(
    rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8], radius_px: float, least_depth: int
) -> Float | None:
    places = np.argwhere(depth > least_depth * PX)
    if not len(places):
        return None
    return _ellipsoid(rng, volume.shape, places[rng.integers(len(places))], radius_px)


def _in_fluid(
    rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8], least: int, most: int, radius_px: float
) -> Float | None:
    """Where fluid between two depths is, around one of its places."""
    smooth = ndimage.gaussian_filter(volume, (0, 0.8 * PX, 0.8 * PX))
    fluid = (smooth < FLUID) & (smooth > -15) & (depth > least * PX) & (depth < most * PX)
    places = np.argwhere(fluid)
    if len(places) < 4 * LEAST_PX:
        return None
    level = _ellipsoid(rng, volume.shape, places[rng.integers(len(places))], radius_px)
    return np.where(fluid, level, np.float32(np.inf))


def _ivh(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    level = _in_fluid(rng, volume, depth, 28, 255, PX * float(rng.uniform(10, 50)))
    if level is not None and rng.random() < 0.6:  # blood sinks to the back, which is down for who lies
        rows = np.argwhere((level < 1).any(axis=(0, 2)))
        if len(rows):
            level[:, : int(rng.uniform(rows[0, 0], rows[-1, 0]))] = np.inf
    return level


def _sah(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    return _in_fluid(rng, volume, depth, 1, int(rng.integers(12, 40)), PX * float(rng.uniform(14, 60)))


def _sdh(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    return _on_table(rng, depth, PX * float(rng.uniform(2.5, 9)), PX * float(rng.uniform(35, 110)), power=4)


def _edh(rng: np.random.Generator, volume: Float, depth: NDArray[np.uint8]) -> Float | None:
    radius_px = PX * float(rng.uniform(12, 50))
    return _on_table(rng, depth, radius_px * float(rng.uniform(0.25, 0.6)), radius_px, power=2)


def _on_table(
    rng: np.random.Generator, depth: NDArray[np.uint8], thickness_px: float, radius_px: float, power: int
) -> Float | None:
    """On the inner table around one of its places, thinning out towards the rim."""
    places = np.argwhere((depth > 0) & (depth < 3 * PX))
    if not len(places):
        return None
    centre = places[rng.integers(len(places))]
    z, y, x = np.ogrid[: depth.shape[0], : depth.shape[1], : depth.shape[2]]
    away = np.sqrt(((z - centre[0]) * SLICE_PX) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) / radius_px
    thick = thickness_px * (1 - np.minimum(away, 1) ** power) * (1 + 0.15 * _noise(rng, depth.shape, 12.0 * PX))
    return np.where(depth > 0, depth / np.maximum(thick, 1e-3), np.inf).astype(np.float32)


_LEVELS = {"iph": _iph, "tiny": _tiny, "ivh": _ivh, "sah": _sah, "sdh": _sdh, "edh": _edh}

"""Simulated anatomy in Hounsfield units: heads on nilearn's MNI152 maps, bodies and test objects from solids.

All grids are (z, y, x) in DICOM patient axes: z towards the head, y towards the back, x towards the patient's left.
Millimetres of the head are those of MNI152 with x and y turned to DICOM's directions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template, load_mni152_wm_template
from numpy.typing import NDArray
from scipy import ndimage

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Point = tuple[float, float, float]

HEAD_ORIGIN = (-150.0, -114.0, -104.0)
HEAD_SHAPE = (255, 249, 209)  # 1 mm voxels
AIR = -1000.0


@dataclass(frozen=True, eq=False)
class Subject:
    """Something to scan: `hounsfield` int16 (z, y, x) and `truth` uint8 labels of findings on one grid in mm."""

    hounsfield: NDArray[np.int16]
    truth: NDArray[np.uint8] | None
    origin_mm: Point
    spacing_mm: float
    extent_mm: tuple[float, float]  # lowest and highest z worth scanning
    field_mm: float  # in-plane size of the object
    region: str
    contrast: str


@dataclass(frozen=True, eq=False)
class Atlas:
    """The maps that every simulated head is composed from, all of `HEAD_SHAPE`."""

    grey: Float
    white: Float
    depth: Float  # mm outside (+) or inside (-) the cranial cavity
    ventricle: Bool
    falx: Bool
    arteries: Float  # 0..1 filling
    veins: Float
    choroid: Float
    coarse: Float  # smooth noise of unit variance, for tissue texture
    fine: Float

    @property
    def csf(self) -> Float:
        """Fraction of cerebrospinal fluid inside the cranial cavity."""
        fraction: Float = np.clip(1 - self.grey - self.white, 0, 1)
        return fraction


def axes(
    origin: Point = HEAD_ORIGIN, shape: Sequence[int] = HEAD_SHAPE, spacing: float = 1.0
) -> tuple[Float, Float, Float]:
    """Coordinates (z, y, x) in mm, shaped to broadcast over the grid."""
    z, y, x = (
        np.float32(o) + np.arange(n, dtype=np.float32) * np.float32(spacing) for o, n in zip(origin, shape, strict=True)
    )
    return z[:, None, None], y[None, :, None], x[None, None, :]


@cache
def atlas() -> Atlas:
    """Build the maps once per process (about three seconds)."""
    grey, white, mask = (
        _to_head_grid(load(resolution=1).get_fdata(dtype=np.float32))
        for load in (load_mni152_gm_template, load_mni152_wm_template, load_mni152_brain_mask)
    )
    depth = _depth(mask > 0.5)
    z, y, x = axes()
    deep = (depth < -14) & (np.abs(x) < 42) & (y > -50) & (y < 75) & (z > -42) & (z < 38)
    ventricle = ndimage.binary_opening((1 - grey - white > 0.5) & deep & (mask > 0.5))
    arch = ((y - 5) / 55) ** 2 + ((z - 2) / 36) ** 2 > 1
    falx = (np.abs(x) < 1.2) & arch & (depth < 1) & (z > np.where(y > 30, -2, -10))
    coarse = smooth_noise(np.random.default_rng(1), HEAD_SHAPE, 6.0)
    fine = smooth_noise(np.random.default_rng(2), HEAD_SHAPE, 2.5)
    arteries, veins = _vessels(depth)
    choroid = np.zeros(HEAD_SHAPE, np.float32)
    for side in (-1, 1):
        choroid = np.maximum(choroid, tube([(14, 0, side * 18), (12, 22, side * 24), (0, 34, side * 28)], 2.4))
    return Atlas(grey, white, depth, ventricle, falx, arteries, veins, choroid, coarse, fine)


def _to_head_grid(ras: Float) -> Float:
    """MNI arrays are (x right, y anterior, z) from (-98, -134, -72); crop and pad them to the head grid."""
    zyx = ras[::-1, ::-1].transpose(2, 1, 0)  # now z from -72, y from -98, x from -98
    out = np.zeros(HEAD_SHAPE, np.float32)
    z0, y0, x0 = 78, 16, 6
    depth = min(zyx.shape[0], HEAD_SHAPE[0] - z0)
    out[z0 : z0 + depth, y0 : y0 + zyx.shape[1], x0 : x0 + zyx.shape[2]] = zyx[:depth]
    return out


def _depth(brain: Bool) -> Float:
    """Signed distance to the cranial cavity: the brain closed over its sulci and fissures, and 2 mm around it."""
    half = brain[::2, ::2, ::2]
    outside = ndimage.distance_transform_edt(~half, sampling=2.0)
    filled = ndimage.distance_transform_edt(outside < 16, sampling=2.0) > 13.5
    signed = np.where(
        filled,
        -ndimage.distance_transform_edt(filled, sampling=2.0),
        ndimage.distance_transform_edt(~filled, sampling=2.0),
    )
    smooth = ndimage.gaussian_filter(signed.astype(np.float32), 1.0)
    return grow(smooth, HEAD_SHAPE)


def grow(small: Float, shape: Sequence[int]) -> Float:
    """Interpolate a coarse array linearly to `shape`, axis by axis."""
    out = small
    for axis, n in enumerate(shape):
        at = np.linspace(0, out.shape[axis] - 1, n, dtype=np.float32)
        low = np.minimum(at.astype(int), out.shape[axis] - 2)
        weight = (at - low).reshape([-1 if a == axis else 1 for a in range(out.ndim)]).astype(np.float32)
        out = np.take(out, low, axis) * (1 - weight) + np.take(out, low + 1, axis) * weight
    return out.astype(np.float32, copy=False)


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], scale: float) -> Float:
    """Smooth random field of unit variance with features of about `scale` voxels."""
    coarse = rng.standard_normal([int(n / scale) + 3 for n in shape]).astype(np.float32)
    field = grow(ndimage.gaussian_filter(coarse, 0.6), shape)
    return field / np.float32(field[::4, ::4, ::4].std())


# --- vessels ---------------------------------------------------------------------------------------------------------


def tube(points: Sequence[Point], radius: float, out: Float | None = None) -> Float:
    """Fill a tube through `points` (z, y, x mm) into a map of filling fractions."""
    out = np.zeros(HEAD_SHAPE, np.float32) if out is None else out
    corners = np.asarray(points, dtype=np.float32)
    steps = np.maximum(np.linalg.norm(np.diff(corners, axis=0), axis=1) / 0.7, 1).astype(int)
    line = np.concatenate(
        [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(corners[:-1], corners[1:], steps, strict=True)]
    )
    if len(line) > 12:  # round the corners as vessels do
        line = ndimage.gaussian_filter1d(line, 4, axis=0, mode="nearest")
    reach = int(np.ceil(radius + 1))
    ball = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3, indexing="ij"), -1).reshape(-1, 3)
    centres = line - np.asarray(HEAD_ORIGIN, np.float32)
    voxels = np.rint(centres).astype(int)[:, None, :] + ball[None]
    filling = np.clip(radius + 0.5 - np.linalg.norm(voxels - centres[:, None, :], axis=-1), 0, 1).astype(np.float32)
    inside = ((voxels >= 0) & (voxels < HEAD_SHAPE)).all(-1) & (filling > 0)
    np.maximum.at(out, tuple(voxels[inside].T), filling[inside])
    return out


def _vessels(depth: Float) -> tuple[Float, Float]:
    """Filling of arteries and of veins with dural sinuses; courses after common atlases, (z, y, x) mm."""
    arteries, veins = np.zeros(HEAD_SHAPE, np.float32), np.zeros(HEAD_SHAPE, np.float32)
    for s in (-1, 1):
        for radius, course in (
            (2.6, [(-145, 30, 28), (-85, 22, 26), (-50, 8, 22), (-42, -2, 13), (-32, -8, 12), (-20, -4, 12)]),
            (1.6, [(-20, -4, 12), (-17, -6, 28), (-17, -2, 38), (-5, 5, 43), (6, 22, 46), (16, 42, 55)]),
            (1.3, [(-17, -2, 38), (-3, -12, 42), (12, -22, 48), (35, -5, 52)]),
            (1.3, [(-20, -4, 12), (-15, -18, 2), (-5, -36, 2), (15, -40, 2), (32, -20, 2), (38, 15, 2)]),
            (1.9, [(-145, 35, 22), (-85, 46, 18), (-64, 40, 8), (-52, 28, 0)]),
            (1.4, [(-18, 16, 0), (-16, 18, 10), (-8, 32, 24), (5, 65, 18), (5, 92, 10)]),
            (1.2, [(-60, 12, 76), (-20, 8, 80), (25, 5, 80), (50, -10, 68)]),
        ):
            tube([(z, y, s * x) for z, y, x in course], radius, arteries)
        for radius, course in (
            (
                3.8,
                [
                    (-8, 104, 0),
                    (-15, 98, 30),
                    (-20, 72, 54),
                    (-28, 48, 60),
                    (-55, 38, 48),
                    (-85, 26, 36),
                    (-145, 32, 34),
                ],
            ),
            (1.2, [(18, 0, 2), (12, 38, 1)]),
            (1.5, [(-22, -8, 8), (-28, -2, 14), (-34, 6, 18), (-30, 30, 45)]),
        ):
            tube([(z, y, s * x) for z, y, x in course], radius, veins)
    tube([(-52, 28, 0), (-30, 22, 0), (-18, 16, 0)], 1.9, arteries)
    tube([(12, 38, 0), (5, 65, 0), (-6, 98, 0)], 2.2, veins)
    rng = np.random.default_rng(3)
    tube(
        [_on_surface(depth, np.array([np.sin(t), -np.cos(t), 0.0]), -1.0) for t in np.linspace(0.25, 3.3, 24)],
        3.4,
        veins,
    )
    for _ in range(110):  # pial arteries and cortical veins: short smooth walks over the brain's surface
        direction = rng.standard_normal(3)
        direction[0] = abs(direction[0]) * 0.9 + 0.05
        drift = rng.standard_normal(3) * 0.09
        walk, below = [], rng.uniform(-7, -1.5)
        for _step in range(9):
            walk.append(_on_surface(depth, direction, below))
            drift += rng.standard_normal(3) * 0.05
            direction = direction / np.linalg.norm(direction) + drift
        tube(walk, rng.uniform(0.6, 1.1), veins if rng.random() < 0.5 else arteries)
    return arteries, veins


def _on_surface(depth: Float, direction: NDArray[np.float64], level: float) -> Point:
    """Where the ray from the middle of the brain along `direction` (z, y, x) reaches a depth of `level` mm."""
    centre = np.array([5.0, 18.0, 0.0])
    ray = centre + np.linspace(20, 110, 120)[:, None] * direction / np.linalg.norm(direction)
    index = np.clip(np.rint(ray - np.asarray(HEAD_ORIGIN)).astype(int), 0, np.asarray(HEAD_SHAPE) - 1)
    reached = int(np.argmax(depth[tuple(index.T)] > level))
    z, y, x = ray[reached]
    return float(z), float(y), float(x)


# --- heads -----------------------------------------------------------------------------------------------------------


def head(rng: np.random.Generator, contrast: str = "non_contrast") -> tuple[Float, Float]:
    """Compose one head: Hounsfield units and the fraction of fluid, both of `HEAD_SHAPE`.

    `contrast` is non_contrast, arterial, venous or delayed.
    """
    a = atlas()
    hounsfield = _face(rng, a)
    skull = _skull(rng, a, hounsfield)
    atrophy = rng.uniform(0.75, 1.9)
    csf = np.clip(a.csf * atrophy, 0, 1)
    csf *= csf * (3 - 2 * csf)  # the averaged maps blur the sulci: steepen them again
    brain_rest = 1 - csf
    share = a.white / np.maximum(a.grey + a.white, 1e-3)
    grey, white, fluid = rng.uniform(34, 41), rng.uniform(25, 31), rng.uniform(2, 12)
    inside = a.depth <= 0
    tissue = grey + (white - grey) * share + 1.2 * a.coarse + 0.8 * a.fine
    cupping = rng.uniform(0, 7) * np.exp(np.minimum(a.depth, 0) / 7)  # beam hardening under the skull
    brain = brain_rest * tissue + csf * fluid + cupping
    blood = rng.uniform(42, 62)
    brain = np.where(a.falx, np.maximum(brain, rng.uniform(42, 58)), brain)
    vessels = np.maximum(a.veins, 0.6 * a.arteries)
    brain += vessels * np.maximum(blood - brain, 0)
    if rng.random() < 0.6:  # calcified choroid plexus and pineal gland
        for centre in ((8.0, 24.0, 24.0), (8.0, 24.0, -24.0), (1.0, 26.0, 0.0)):
            if rng.random() < 0.7:
                ball = ellipsoid(centre + rng.normal(0, 2, 3), rng.uniform(1.2, 3.5, 3))
                brain[ball] = rng.uniform(80, 400)
    hounsfield = np.where(inside & ~skull, brain, hounsfield)
    if contrast != "non_contrast":
        hounsfield += _enhancement(rng, a, contrast, hounsfield)
    return hounsfield.astype(np.float32), np.where(inside, csf, 0).astype(np.float32)


def _enhancement(rng: np.random.Generator, a: Atlas, contrast: str, hounsfield: Float) -> Float:
    arterial, venous, tissue = {
        "arterial": (rng.uniform(180, 480), rng.uniform(20, 160), rng.uniform(1, 4)),
        "venous": (rng.uniform(90, 220), rng.uniform(130, 300), rng.uniform(3, 7)),
        "delayed": (rng.uniform(45, 110), rng.uniform(60, 130), rng.uniform(3, 8)),
    }[contrast]
    soft = (hounsfield > -20) & (hounsfield < 110)
    rise = np.where(soft & (a.depth > 0), tissue * 4, 0) + np.where(a.depth <= 0, tissue * (1 - a.csf), 0)
    rise = np.maximum(rise, a.arteries * arterial)
    rise = np.maximum(rise, a.veins * venous)
    rise = np.maximum(rise, a.choroid * (0.5 * venous) * (a.fine > -0.5))
    rise = np.maximum(rise, np.where(a.falx, 0.25 * venous, 0))
    result: Float = rise.astype(np.float32)
    return result


def ellipsoid(centre: NDArray[np.float64] | Point, radii: NDArray[np.float64] | Point) -> Bool:
    """Mask of an ellipsoid on the head grid, (z, y, x) mm."""
    (z, y, x), (cz, cy, cx), (rz, ry, rx) = axes(), centre, radii
    inside: Bool = ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return inside


def _skull(rng: np.random.Generator, a: Atlas, hounsfield: Float) -> Bool:
    """Draw the skull with its tables and diploe into `hounsfield`; return where bone or air reaches into the cavity."""
    z, y, x = axes()
    thickness = rng.uniform(4.0, 7.5) + rng.uniform(1, 4) * (y > 75) + 1.0 * a.coarse * (np.abs(a.depth - 4) < 6)
    thickness = np.where(z < -25, np.minimum(thickness, rng.uniform(3, 5)), thickness)
    table = rng.uniform(1.2, 1.9)
    shell = (a.depth > 0) & (a.depth < thickness)
    shell &= ~((np.abs(x) < 14) & (y > 28) & (y < 62) & (z < -66))  # foramen magnum
    diploe = shell & (a.depth > table) & (a.depth < thickness - table) & (z > -30)
    dense, loose = rng.uniform(1100, 1700), rng.uniform(350, 900)
    hounsfield[shell] = dense
    hounsfield[diploe] = (loose + 120 * a.fine)[diploe]
    near = (a.depth > -9) & (a.grey + a.white < 0.35)
    petrous = np.zeros(HEAD_SHAPE, bool)
    for side in (-1, 1):
        for t in np.linspace(0, 1, 6):
            centre = (-44 + 4 * t, 24 - 22 * t, side * (58 - 38 * t))
            petrous |= ellipsoid(centre, (9 - 3 * t, 10 - 4 * t, 9.0))
    petrous |= (np.abs(x) < 14) & (y > -14) & (y < 14) & (z < -36) & (z > -62) & (a.depth > -3)  # clivus and sella
    petrous &= near | (a.depth > 0)
    hounsfield[petrous] = (dense * 0.75 + 220 * a.fine)[petrous]
    cells = np.zeros(HEAD_SHAPE, bool)
    if rng.random() < 0.85:
        size = rng.uniform(9, 17)
        for side in (-1, 1):
            cells |= ellipsoid((-52, 32, side * 57.0), (size * 1.1, size, size * 0.8))
        cells &= (a.fine > rng.uniform(-0.4, 0.3)) & (a.depth > 1)
        hounsfield[cells] = rng.uniform(-900, -400)
    frontal = shell & (a.depth > 1) & (a.depth < thickness - 1) & (np.abs(x) < rng.uniform(5, 28)) & (y < -60)
    frontal &= (z > -15) & (z < rng.uniform(-5, 28)) & (np.abs(x) > 1)
    hounsfield[frontal] = AIR
    return petrous & (a.depth <= 0)


def _face(rng: np.random.Generator, a: Atlas) -> Float:
    """Scalp, face and neck, without skull and brain."""
    z, y, x = axes()
    scalp = rng.uniform(10, 17)
    knots = (-150, -110, -80, -50, -20, 10)
    width = np.interp(z, knots, np.array([60, 60, 64, 70, 74, 60]) * rng.uniform(0.92, 1.06))
    front = np.interp(z, knots, (-48, -84, -92, -94, -88, -60))
    back = np.interp(z, knots, np.array([66, 70, 82, 92, 92, 70]) * rng.uniform(0.95, 1.05))
    middle, half = (front + back) / 2, (back - front) / 2
    radius = np.sqrt((x / width) ** 2 + ((y - middle) / half) ** 2)
    below = np.where(z < 5, (1 - radius) * 62, -1).astype(np.float32)  # rough mm under the skin of face and neck
    under = np.maximum(below, scalp - a.depth)
    nose = (
        (np.abs(x) < 2 + (z + 60) * -0.0 + np.clip((-20 - z) * 0.35, 0, 13))
        & (y < -80)
        & (y > -112 + np.abs(z + 50) * 0.6)
    )
    under = np.maximum(under, np.where(nose & (z < -18) & (z > -62), 3.0, -1))
    for side in (-1, 1):
        ear = ellipsoid((-38, 22, side * (83.0 + rng.uniform(-2, 4))), (27, 14, 9))
        under = np.maximum(under, np.where(ear & (a.fine > -0.6), 2.0, -1))
    fat, muscle = rng.uniform(-110, -75), rng.uniform(45, 62)
    out = np.where(under > 0, fat + 12 * a.fine, AIR).astype(np.float32)
    temporal = (np.abs(x) > 50) & (z < 25) & (a.depth > 5) & (a.depth < scalp - 3)
    deep = (under > rng.uniform(5, 10)) & (z < -25)
    meat = (temporal | deep) & (a.coarse > rng.uniform(-1.3, -0.4))
    out[meat] = (muscle + 4 * a.fine)[meat]
    out[(under > 0) & (under < 2.2)] = rng.uniform(0, 45)
    wall = rng.uniform(350, 900)
    _airways(rng, a, out, wall)
    _orbits(rng, out, wall)
    _jaws_and_spine(rng, a, out)
    return out


def _airways(rng: np.random.Generator, a: Atlas, out: Float, wall: float) -> None:
    """Paranasal sinuses, nasal cavity and pharynx, some of the sinuses filled."""
    z, y, x = axes()
    solids = [ellipsoid((-46, -56, s * 27.0), rng.uniform(11, 19, 3)) for s in (-1, 1)]
    solids += [ellipsoid((-40, -20, s * 7.0), (9, 11, 7)) for s in (-1, 1)]
    for solid in solids:
        out[ndimage.binary_dilation(solid, iterations=2) & (out > -500)] = wall
        out[solid] = AIR if rng.random() < 0.85 else rng.uniform(15, 45)
        if rng.random() < 0.25:  # mucosa or fluid level
            out[solid & (y > rng.uniform(-60, -45))] = rng.uniform(10, 40)
    nasal = (np.abs(x) < 15) & (y > -84) & (y < -22) & (z > -62) & (z < -6)
    out[nasal] = np.where(a.fine > -0.1, AIR, 45)[nasal]
    walls = nasal & ((np.abs(x) < 1) | (np.abs(a.fine) < 0.16) | (np.abs(np.abs(x) - 15) < 1.5))
    out[walls] = wall * 0.7
    pharynx = ((x / 11) ** 2 + ((y + 4) / 7) ** 2 < 1) & (z < -55)
    out[pharynx] = AIR


def _orbits(rng: np.random.Generator, out: Float, wall: float) -> None:
    for s in (-1, 1):
        cone = ellipsoid((-30, -52, s * 30.0), (18, 29, 18))
        rim = ellipsoid((-30, -50, s * 30.0), (21, 31, 21)) & ~cone & (axes()[1] > -76)
        out[rim & (out > -300)] = wall
        out[cone] = -95
        globe = ellipsoid((-30, -70, s * 31.0), (12, 12, 12))
        out[ellipsoid((-30, -70, s * 31.0), (13, 13, 13))] = 45
        out[globe] = rng.uniform(4, 16)
        out[ellipsoid((-30, -79, s * 31.0), (4, 2, 4))] = rng.uniform(70, 120)
        for dz, dx in ((0, 0), (9, 0), (-9, 0), (0, 10), (0, -10)):  # optic nerve and muscles
            out[tube([(-30 + dz, -60, s * (30.0 + dx)), (-30, -26, s * 18.0)], 1.8) > 0.5] = 40


def _jaws_and_spine(rng: np.random.Generator, a: Atlas, out: Float) -> None:
    z, y, x = axes()
    bone = rng.uniform(700, 1300)
    arch = np.abs(np.sqrt((x / 1.0) ** 2 + ((y + 34) / 1.15) ** 2) - 43) < 5.5
    jaw = arch & (y < -18) & (z < -84) & (z > -118)
    ramus = (np.abs(np.abs(x) - 46) < 4) & (y > -28) & (y < 4) & (z > -118) & (z < -48)
    upper = (np.abs(np.sqrt(x**2 + ((y + 42) / 1.2) ** 2) - 30) < 6) & (y < -38) & (z > -76) & (z < -58)
    out[jaw | ramus] = bone
    out[upper] = bone * 0.6
    teeth = (np.abs(np.sqrt(x**2 + ((y + 42) / 1.2) ** 2) - 30) < 4.5) & (y < -40) & (z > -90) & (z < -72)
    teeth &= np.sin(np.arctan2(x, -(y + 42)) * 16) > -0.5
    out[teeth] = rng.uniform(1600, 2600)
    zygoma = (np.abs(np.abs(x) - 58) < 4) & (y > -62) & (y < 5) & (np.abs(z + 44) < 4.5)
    out[zygoma] = bone
    ring = np.sqrt((x / 1.25) ** 2 + (y - 46) ** 2)
    spine = (z < -80) & ((np.abs(ring - 14.5) < 3.5) | ((np.abs(x) < 11) & (y > 12) & (y < 32)))
    spine &= (np.sin((z + 80) / 2.7) > -0.75) & (a.depth > 0)
    out[spine] = bone * 0.8
    canal = (z < -66) & (ring < 11) & (a.depth > 0)
    out[canal] = 10
    out[canal & (ring < 6)] = 36

"""Simulated anatomy in Hounsfield units: heads on nilearn's MNI152 maps, bodies and test objects from solids.

All grids are (z, y, x) in DICOM patient axes: z towards the head, y towards the back, x towards the patient's left.
Millimetres of the head are those of MNI152 with x and y turned to DICOM's directions.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from nilearn.datasets import (  # type: ignore[import-untyped]
    load_mni152_brain_mask,
    load_mni152_gm_template,
    load_mni152_wm_template,
)
from numpy.typing import NDArray
from scipy import ndimage

Float = NDArray[np.float32]
Bool = NDArray[np.bool_]
Point = tuple[float, float, float]

HEAD_ORIGIN = (-150.0, -114.0, -104.0)
HEAD_SHAPE = (255, 249, 209)  # 1 mm voxels
AIR = -1000.0


@dataclass(frozen=True)
class Push:
    """A bleed that pushes the brain around `centre_mm` (z, y, x) towards x by `shift_mm`, less with distance."""

    centre_mm: Point
    shift_mm: float
    reach_mm: float


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
    mimics: tuple[str, ...] = ()  # what is in it beside bleeding
    bleeds: tuple[str, ...] = ()  # what was asked for
    pushes: tuple[Push, ...] = ()


@dataclass(frozen=True)
class Build:
    """How one head is built; the defaults are a middle-aged adult's. Lengths in mm."""

    age: str = "adult"  # infant, child, adult or old
    size: float = 1.0  # of the head, against an adult's
    bone: float = 1.0  # thickness of the skull against an adult's
    suture_mm: float = 0.0  # width of open sutures
    fontanelle_mm: float = 0.0  # radius of the anterior fontanelle
    atrophy_mm: float = 0.0  # by which the brain has drawn back from the inner table
    sulci: float = 1.0  # how much fluid there is in them
    ventricle_mm: float = 0.0  # by which the ventricles are widened
    asymmetry: float = 0.0  # of the ventricles: -1 all of it at the right, 1 at the left
    white_drop: float = 0.0  # HU by which white matter is darker, as before myelination


def draw_build(rng: np.random.Generator) -> Build:
    """Draw age and what goes with it; old heads as often as they are scanned."""
    age = str(rng.choice(["infant", "child", "adult", "old"], p=[0.08, 0.10, 0.42, 0.40]))
    asymmetry = float(np.clip(rng.normal(0, 0.35), -0.9, 0.9))
    if age == "infant":
        return Build(
            age,
            size=float(rng.uniform(0.66, 0.88)),
            bone=float(rng.uniform(0.3, 0.55)),
            suture_mm=float(rng.uniform(0.8, 2.5)),
            fontanelle_mm=float(rng.choice([0, rng.uniform(5, 14)])),
            atrophy_mm=float(rng.choice([0, rng.uniform(0, 3)])),
            sulci=float(rng.uniform(0.7, 1.4)),
            ventricle_mm=float(rng.uniform(0, 1.5)),
            asymmetry=asymmetry,
            white_drop=float(rng.uniform(2, 7)),
        )
    if age == "child":
        return Build(
            age,
            size=float(rng.uniform(0.85, 0.98)),
            bone=float(rng.uniform(0.5, 0.9)),
            suture_mm=float(rng.choice([0, 0.8])),
            sulci=float(rng.uniform(0.5, 1.0)),
            asymmetry=asymmetry,
            white_drop=float(rng.uniform(0, 2)),
        )
    much = 0.5 if age == "adult" else 1.0
    return Build(
        age,
        size=float(rng.uniform(0.94, 1.05)),
        bone=float(rng.uniform(0.85, 1.25)),
        atrophy_mm=much * float(rng.exponential(1.2)),
        sulci=1 + much * float(rng.uniform(0, 1.2)),
        ventricle_mm=much * float(rng.choice([rng.uniform(0, 5), rng.uniform(4, 9)], p=[0.88, 0.12])),
        asymmetry=asymmetry,
    )


@dataclass(frozen=True, eq=False)
class Atlas:
    """The maps that every simulated head is composed from, all of `HEAD_SHAPE`."""

    grey: Float
    white: Float
    whiteness: Float  # white / (white + grey)
    csf: Float  # fraction of cerebrospinal fluid inside the cranial cavity
    depth: Float  # mm outside (+) or inside (-) the cranial cavity
    outer: Float  # the same of its convex outline, which the outer table of the skull follows
    ventricle: Bool
    ventricle_mm: Float  # signed distance to the lateral ventricles, up to some centimetres
    falx: Bool
    tentorium: Bool
    arteries: Float  # 0..1 filling
    veins: Float
    choroid: Float
    coarse: Float  # smooth noise of unit variance, for tissue texture
    fine: Float
    petrous: Bool
    eye_muscles: Bool


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
    depth, outer = _depths(mask > 0.5)
    z, y, x = axes()
    csf = np.clip(1 - grey - white, 0, 1)
    deep = (depth < -14) & (np.abs(x) < 42) & (y > -50) & (y < 75) & (z > -42) & (z < 38)
    ventricle = ndimage.binary_opening((csf > 0.5) & deep & (mask > 0.5))
    arch = ((y - 5) / 55) ** 2 + ((z - 2) / 36) ** 2 > 1
    falx = (np.abs(x) < 0.6) & arch & (depth < 1) & (z > np.where(y > 30, -2, -10))
    arteries, veins = _vessels(depth)
    choroid, muscles = np.zeros(HEAD_SHAPE, np.float32), np.zeros(HEAD_SHAPE, np.float32)
    for side in (-1, 1):
        tube([(14, 0, side * 18), (12, 22, side * 24), (0, 34, side * 28)], 2.4, choroid)
        for dz, dx in ((0, 0), (9, 0), (-9, 0), (0, 10), (0, -10)):  # optic nerve and four muscles
            tube([(-30 + dz, -60, side * (30.0 + dx)), (-30, -26, side * 18.0)], 1.8, muscles)
    lateral = ventricle & (z > -12) & (np.abs(x) < 40) & (np.hypot(y - 26, z) > 12)
    lateral &= ~((np.abs(x) < 13) & (y > 30) & (z < 18))  # the cisterns above the cerebellum
    parts, _ = ndimage.label(lateral)
    lateral = np.isin(parts, 1 + np.argsort(np.bincount(parts.ravel())[1:])[-2:])
    return Atlas(
        grey=grey,
        white=white,
        whiteness=white / np.maximum(grey + white, np.float32(1e-3)),
        csf=csf,
        depth=depth,
        outer=outer,
        ventricle=ventricle,
        ventricle_mm=_around(lateral),
        falx=falx,
        tentorium=_tentorium(depth),
        arteries=arteries,
        veins=veins,
        choroid=choroid,
        coarse=smooth_noise(np.random.default_rng(1), HEAD_SHAPE, 6.0),
        fine=smooth_noise(np.random.default_rng(2), HEAD_SHAPE, 2.5),
        petrous=_petrous(depth, grey + white),
        eye_muscles=muscles > 0.5,
    )


def _to_head_grid(ras: Float) -> Float:
    """MNI arrays are (x right, y anterior, z) from (-98, -134, -72); crop and pad them to the head grid."""
    zyx = ras[::-1, ::-1].transpose(2, 1, 0)  # now z from -72, y from -98, x from -98
    out = np.zeros(HEAD_SHAPE, np.float32)
    z0, y0, x0 = 78, 16, 6
    depth = min(zyx.shape[0], HEAD_SHAPE[0] - z0)
    out[z0 : z0 + depth, y0 : y0 + zyx.shape[1], x0 : x0 + zyx.shape[2]] = zyx[:depth]
    return out


def _depths(brain: Bool) -> tuple[Float, Float]:
    """Signed distances to the cranial cavity and to its rounder outline, in mm.

    The cavity is the brain closed over its sulci, fissures and the suprasellar cistern, with 2.5 mm around it.
    """
    brain = brain.copy()
    box, cistern = ellipsoid((-22, -2, 0), (13, 15, 17))
    brain[box] |= cistern
    depth = _depth(brain, closing=14.0, margin=2.5, step=2)
    return depth, np.minimum(depth, _depth(brain, closing=34.0, margin=3.5, step=4))


def _depth(brain: Bool, closing: float, margin: float, step: int) -> Float:
    """Signed distance in mm to `brain` closed by a ball of radius `closing` and grown by `margin`, on a coarse grid."""
    room = int(np.ceil((closing + 2 * margin) / step)) + 1  # around the grid, for the closing to open into
    coarse = np.pad(brain[::step, ::step, ::step], room)

    def distance(mask: Bool) -> Float:
        return np.asarray(ndimage.distance_transform_edt(mask, sampling=float(step)), np.float32)

    filled = distance(distance(~coarse) < closing + margin) > closing
    signed = ndimage.gaussian_filter(np.where(filled, -distance(filled), distance(~filled)), 2.0 / step)
    return grow(signed[room:-room, room:-room, room:-room], HEAD_SHAPE)


def _around(mask: Bool) -> Float:
    """Signed distance in mm to `mask` in the middle of the grid; 99 elsewhere."""
    box = (slice(100, 215), slice(30, 215), slice(35, 175))
    out = np.full(HEAD_SHAPE, 99, np.float32)
    inside = mask[box]
    distance = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    out[box] = ndimage.gaussian_filter(distance.astype(np.float32), 1.0)
    return out


TENTORIUM_MM = np.array(  # height over (y 20, 30, 45, 60, 75, 90, 100) and |x| (0, 10, 20, 30, 40, 52, 64)
    [
        [8, -2, -18, -34, -40, -42, -42],
        [8, -2, -19, -29, -36, -38, -38],
        [4, -6, -16, -22, -29, -32, -32],
        [1, -7, -14, -19, -23, -25, -27],
        [-5, -12, -17, -19, -21, -23, -25],
        [-12, -17, -20, -20, -20, -21, -23],
        [-15, -18, -20, -20, -20, -20, -20],
    ],
    np.float32,
)


def _tentorium(depth: Float) -> Bool:
    """The tent between cerebrum and cerebellum, from its free edge to the transverse sinuses, about 2 mm thick."""
    _, y, x = axes()
    rows = np.interp(y.ravel(), (20, 30, 45, 60, 75, 90, 100), range(7))
    columns = np.interp(np.abs(x).ravel(), (0, 10, 20, 30, 40, 52, 64), range(7))
    height = ndimage.map_coordinates(TENTORIUM_MM, np.meshgrid(rows, columns, indexing="ij"), order=1)
    height = ndimage.gaussian_filter(height, 2.0)
    edge = 18 * np.sqrt(np.clip(1 - ((y[0] - 12) / 30) ** 2, 0, 1))  # of the incisura, beside the midbrain
    there = (np.abs(x[0]) >= edge) & (y[0] > 14) & (y[0] < 104)
    z = axes()[0]
    sheet: Bool = (np.abs(z - height) < 1.1) & there & (depth < 1)
    return sheet


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


def tube(points: Sequence[Point], radius: float, out: Float) -> None:
    """Fill a tube through `points` (z, y, x mm) into a map `out` of filling fractions."""
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
        [on_surface(depth, np.array([np.sin(t), -np.cos(t), 0.0]), -1.0) for t in np.linspace(0.25, 3.3, 24)],
        3.4,
        veins,
    )
    for _ in range(110):  # pial arteries and cortical veins: short smooth walks over the brain's surface
        direction = rng.standard_normal(3)
        direction[0] = abs(direction[0]) * 0.9 + 0.05
        drift = rng.standard_normal(3) * 0.09
        walk, below = [], rng.uniform(-7, -1.5)
        for _step in range(9):
            walk.append(on_surface(depth, direction, below))
            drift += rng.standard_normal(3) * 0.05
            direction = direction / np.linalg.norm(direction) + drift
        tube(walk, rng.uniform(0.6, 1.1), veins if rng.random() < 0.5 else arteries)
    return arteries, veins


def on_surface(depth: Float, direction: NDArray[np.float64], level: float) -> Point:
    """Where the ray from the middle of the brain along `direction` (z, y, x) reaches a depth of `level` mm."""
    centre = np.array([5.0, 18.0, 0.0])
    ray = centre + np.linspace(20, 110, 120)[:, None] * direction / np.linalg.norm(direction)
    index = np.clip(np.rint(ray - np.asarray(HEAD_ORIGIN)).astype(int), 0, np.asarray(HEAD_SHAPE) - 1)
    reached = int(np.argmax(depth[tuple(index.T)] > level))
    z, y, x = ray[reached]
    return float(z), float(y), float(x)


# --- heads -----------------------------------------------------------------------------------------------------------


def head(rng: np.random.Generator, contrast: str = "non_contrast", build: Build | None = None) -> tuple[Float, Float]:
    """Compose one head: Hounsfield units and the fraction of fluid, both of `HEAD_SHAPE`.

    `contrast` is non_contrast, arterial, venous or delayed; `build` is a middle-aged adult's by default.
    """
    a, build = atlas(), build or Build()
    coarse, fine = turned(rng, a.coarse), turned(rng, a.fine)
    hounsfield = _face(rng, a, coarse, fine)
    petrous = _skull(rng, a, hounsfield, coarse, fine, build)
    brain, csf = _brain(rng, a, coarse, fine, build)
    inside = a.depth <= 0
    inside[petrous] = False
    np.copyto(hounsfield, brain, where=inside)
    if contrast != "non_contrast":
        hounsfield += _enhancement(rng, a, contrast, hounsfield)
    csf[~inside] = 0
    return hounsfield, csf


def turned(rng: np.random.Generator, texture: Float) -> Float:
    """A texture shifted and mirrored at random: as good as a new one, and far cheaper."""
    flip = tuple(slice(None, None, int(step)) for step in rng.choice([-1, 1], 3))
    return np.roll(texture[flip], tuple(int(v) for v in rng.integers(0, 200, 3)), (0, 1, 2))


def _brain(rng: np.random.Generator, a: Atlas, coarse: Float, fine: Float, build: Build) -> tuple[Float, Float]:
    """Brain, fluid, falx and vessels without contrast; and the fraction of fluid."""
    csf = np.clip(a.csf * np.float32(rng.uniform(0.75, 1.9) * build.sulci), 0, 1)
    csf *= csf * (3 - 2 * csf)  # the averaged maps blur the sulci: steepen them again
    if build.ventricle_mm > 0:
        x = axes()[2]
        side = (1 + np.float32(build.asymmetry) * np.clip(x / 10, -1, 1)) * np.clip(np.abs(x) / 6, 0.15, 1)
        np.maximum(csf, np.clip(np.float32(build.ventricle_mm) * side + 0.5 - a.ventricle_mm, 0, 1), out=csf)
    rim = np.clip((a.depth + 4) / 3, 0, 1)  # of fluid under the inner table: young brains fill their skulls
    csf *= 1 - np.float32(rng.uniform(0, 0.5) + 0.4 * (build.age in ("infant", "child"))) * rim
    if build.atrophy_mm > 0:
        np.maximum(csf, np.clip(a.depth + np.float32(build.atrophy_mm + 0.5), 0, 1), out=csf)
    grey, white, fluid = (np.float32(rng.uniform(*span)) for span in ((34, 41), (25, 31), (2, 12)))
    white -= np.float32(build.white_drop)
    brain = grey + (white - grey) * a.whiteness + np.float32(1.2) * coarse + np.float32(0.8) * fine
    brain += csf * (fluid - brain)
    cupping = np.float32(rng.uniform(0, 7))  # beam hardening under the skull
    brain += cupping * np.exp(np.minimum(a.depth, 0) / np.float32(7))
    brain[a.falx] = np.maximum(brain[a.falx], rng.uniform(42, 58))
    vessels = np.maximum(a.veins, np.float32(0.6) * a.arteries)
    brain += vessels * np.maximum(np.float32(rng.uniform(42, 62)) - brain, 0)
    return brain, csf


def _enhancement(rng: np.random.Generator, a: Atlas, contrast: str, hounsfield: Float) -> Float:
    """What iodine adds, by phase: arteries, veins and sinuses, choroid plexus, dura, brain, muscle and mucosa."""
    arterial, venous, tissue = (
        np.float32(rng.uniform(*span))
        for span in {
            "arterial": ((180, 480), (20, 160), (1, 4)),
            "venous": ((90, 220), (130, 300), (3, 7)),
            "delayed": ((45, 110), (60, 130), (3, 8)),
        }[contrast]
    )
    if rng.random() < 0.15:  # diluted, a poor injection, or what an earlier examination left
        arterial, venous, tissue = (np.float32(rng.uniform(0.35, 0.8)) * v for v in (arterial, venous, tissue))
    rise = np.where(a.depth > 0, tissue * 4, tissue * (1 - a.csf)).astype(np.float32)
    _, y, x, rise_s, fine_s, depth_s = _slab(-110, -5, rise, a.fine, a.depth)
    lining = (np.abs(x) < 32) & (y < 0) & (depth_s > 2) & (fine_s > -0.5)  # mucosa of nose, sinuses and pharynx
    rise_s[lining] += np.float32(0.3) * venous
    soft = (hounsfield > -20) & (hounsfield < 110)
    rise[~soft] = 0
    np.maximum(rise, a.arteries * arterial, out=rise)
    np.maximum(rise, a.veins * venous, out=rise)
    tree = vessel_tree()
    if tree is not None and rng.random() < 0.5:  # the vessels of a real head too, thinner or thicker
        filled = tree.filled[:, :, ::-1] if rng.random() < 0.5 else tree.filled
        venosity = tree.venous[:, :, ::-1] if filled is not tree.filled else tree.venous
        thin = np.float32(rng.uniform(0.0, 0.6))
        real = np.clip((filled - thin) / (1 - thin), 0, 1) * (arterial + venosity * (venous - arterial))
        np.maximum(rise, real * soft, out=rise)
    np.maximum(rise, a.choroid * (0.5 * venous) * (a.fine > -0.5), out=rise)
    rise[a.falx] = np.maximum(rise[a.falx], 0.25 * venous)
    return rise


VESSELS = Path(os.environ.get("HERALD_DATA", "../shared/data")) / "volumes" / "vessels-avm.nii.gz"


@dataclass(frozen=True, eq=False)
class VesselTree:
    """The vessels of one real enhanced head on the head grid: filling 0..1, and how venous each place is, 0..1."""

    filled: Float
    venous: Float


@cache
def vessel_tree(path: Path = VESSELS) -> VesselTree | None:
    """Read the tree and fit it to the atlas by its outline, good to a centimetre; None where the data are absent."""
    if not path.is_file():
        return None
    from nibabel.nifti1 import Nifti1Image

    image = Nifti1Image.from_filename(path)
    zyx = np.asarray(image.dataobj, np.float32).transpose(2, 1, 0)[:, ::-1, ::-1]  # stored towards face and right
    dx, dy, dz = (float(v) for v in image.header.get_zooms())  # type: ignore[no-untyped-call]
    spacing = np.array([dz, dy, dx])
    scale, shift = np.array([1.0, 1.11, 1.04]), np.array([-59.0, -73.7, -106.0])  # mm here = scale * mm there + shift
    step = 1 / (scale * spacing)
    grid = ndimage.affine_transform(zyx, step, (np.asarray(HEAD_ORIGIN) - shift) * step, HEAD_SHAPE, order=1)
    a = atlas()
    filled = np.clip((grid - 110) / 200, 0, 1).astype(np.float32) * (a.depth < 1)
    veins, arteries = (ndimage.gaussian_filter(v[::2, ::2, ::2], 4) for v in (a.veins, a.arteries))
    return VesselTree(filled, grow(veins / (veins + arteries + np.float32(1e-6)), HEAD_SHAPE))


def plastic_skull(rng: np.random.Generator) -> Float:
    """A dry or cast skull with blocks inside and air for everything else, as used in quality assurance."""
    a = atlas()
    coarse, fine = turned(rng, a.coarse), turned(rng, a.fine)
    out = _face(rng, a, coarse, fine)
    _skull(rng, a, out, coarse, fine, Build())
    cast = rng.uniform(500, 1000)
    out[:] = np.where(out > 250, np.float32(cast), np.float32(AIR))
    out[:60] = AIR
    for _ in range(int(rng.integers(1, 6))):
        size = rng.uniform(5, 28, 3)
        paint(out, (rng.uniform(-20, 60), rng.uniform(-40, 70), rng.uniform(-45, 45)), size, rng.uniform(-100, 300))
    return out


Box = tuple[slice, slice, slice]


def ellipsoid(
    centre: Sequence[float] | NDArray[np.float64], radii: Sequence[float] | NDArray[np.float64]
) -> tuple[Box, Bool]:
    """An ellipsoid (z, y, x mm) on the head grid: the box around it and its mask within that box."""
    low = [
        int(np.clip(np.floor(c - r - o), 0, n))
        for c, r, o, n in zip(centre, radii, HEAD_ORIGIN, HEAD_SHAPE, strict=True)
    ]
    high = [
        int(np.clip(np.ceil(c + r - o) + 1, 0, n))
        for c, r, o, n in zip(centre, radii, HEAD_ORIGIN, HEAD_SHAPE, strict=True)
    ]
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    ramps = (
        ((np.arange(b.start, b.stop) + o - c) / r) ** 2
        for b, o, c, r in zip(box, HEAD_ORIGIN, centre, radii, strict=True)
    )
    z, y, x = np.ix_(*ramps)
    inside: Bool = z + y + x < 1
    return box, inside


def paint(
    out: Float,
    centre: Sequence[float] | NDArray[np.float64],
    radii: Sequence[float] | NDArray[np.float64],
    value: float,
    where: Bool | None = None,
) -> None:
    """Set an ellipsoid of `out` to `value`, within the mask `where` of the whole grid if given."""
    box, inside = ellipsoid(centre, radii)
    out[box][inside if where is None else inside & where[box]] = value


def _slab(low: float, high: float, *fields: Float) -> tuple[Float, ...]:
    """Coordinates z, y, x and `fields` between two heights in mm, as views."""
    z, y, x = axes()
    cut = slice(int(low - HEAD_ORIGIN[0]), int(high - HEAD_ORIGIN[0]))
    return (z[cut], y, x, *(field[cut] for field in fields))


def _skull(rng: np.random.Generator, a: Atlas, hounsfield: Float, coarse: Float, fine: Float, build: Build) -> Bool:
    """Draw the skull with its tables, diploe and cells into `hounsfield`; returns the bone reaching into the cavity."""
    z, y, x = axes()
    top = rng.uniform(4.0, 7.5) * build.bone
    base = min(top, rng.uniform(3, 5))
    outline = np.where(z < -25, base, top + rng.uniform(1, 4) * (y > 75)).astype(np.float32)
    table = rng.uniform(1.2, 1.9)
    shell = (a.depth > 0) & (a.outer < outline + np.float32(0.5) * coarse) & (a.depth < outline * 2.2)
    shell[:90] &= ~((np.abs(x) < 14) & (y > 28) & (y < 62) & (z[:90] < -66))  # foramen magnum
    diploe = shell & (a.depth > table) & (a.outer < outline - table) & (z > -30)
    dense, loose = rng.uniform(1100, 1700), rng.uniform(350, 900)
    hounsfield[shell] = dense
    hounsfield[diploe] = np.float32(loose) + 120 * fine[diploe]
    hounsfield[a.petrous] = np.float32(dense * 0.75) + 220 * fine[a.petrous]
    if build.suture_mm > 0:
        _open_sutures(rng, a, hounsfield, shell, coarse, build)
    if rng.random() < 0.85:
        size = rng.uniform(9, 17)
        for side in (-1, 1):
            box, inside = ellipsoid((-52, 32, side * 57.0), (size * 1.1, size, size * 0.8))
            cells = inside & (fine[box] > rng.uniform(-0.4, 0.3)) & (a.depth[box] > 1)
            hounsfield[box][cells] = rng.uniform(-900, -400)
    zs, ys, xs, depth_s, outer_s, hounsfield_s = _slab(-15, 28, a.depth, a.outer, hounsfield)
    frontal = (depth_s > 1) & (outer_s < base) & (np.abs(xs) < rng.uniform(5, 28)) & (np.abs(xs) > 1)
    frontal &= (ys < -60) & (zs < rng.uniform(-5, 28)) & (hounsfield_s > 300)
    hounsfield_s[frontal] = AIR  # frontal sinuses
    return a.petrous & (a.depth <= 0)


def _open_sutures(
    rng: np.random.Generator, a: Atlas, hounsfield: Float, shell: Bool, coarse: Float, build: Build
) -> None:
    """Cut the coronal, sagittal, lambdoid and metopic sutures and the anterior fontanelle into the skull."""
    z, y, x = axes()
    wavy = 1.5 * coarse
    bregma = np.float32(-14.0)
    half = np.float32(build.suture_mm / 2)
    sagittal = (np.abs(x + wavy) < half) & (z > 30)
    coronal = (np.abs(y - bregma - 0.35 * (z - 70) + wavy) < half) & (z > -5)
    lambdoid = (np.abs(y - 92 + 0.55 * np.abs(x) + 0.15 * (z - 30) + wavy) < half) & (z > -10) & (y > 40)
    soft = shell & (sagittal | coronal | lambdoid)
    if build.fontanelle_mm > 0:
        soft |= shell & (np.abs(x) + np.abs(y - bregma) < np.float32(build.fontanelle_mm * 1.4)) & (z > 40)
    hounsfield[soft] = rng.uniform(25, 60)


def _petrous(depth: Float, tissue: Float) -> Bool:
    """Pyramids of the temporal bones, clivus and sphenoid, where the maps show no brain."""
    z, y, x = axes()
    bone = np.zeros(HEAD_SHAPE, np.float32)
    for side in (-1, 1):
        for t in np.linspace(0, 1, 6):
            paint(bone, (-44 + 4 * t, 24 - 22 * t, side * (58 - 38 * t)), (9 - 3 * t, 10 - 4 * t, 9.0), 1)
    petrous = (bone > 0) & ((tissue < 0.35) & (depth > -9) | (depth > 0))
    clivus = (np.abs(x) < 12) & (np.abs(y - 8 + (z + 36) * 0.5) < 5) & (z < -34) & (z > -64)
    low = slice(0, int(-24 - HEAD_ORIGIN[0]))  # sphenoid: what is neither brain nor near it in front of the clivus
    sphenoid = (ndimage.gaussian_filter(tissue[low], 2.5) < 0.1) & (depth[low] <= 0) & (y < 4)
    sphenoid &= (np.abs(x) > 14) | (y < -14) | (z[low] < -32)  # the suprasellar cistern is free
    ridge = (ndimage.gaussian_filter(tissue[low], 1.8) < 0.2) & (depth[low] <= 0) & (z[low] < -31)
    sphenoid |= ridge & (np.abs(x) > 15 + 0.3 * np.abs(y - 10)) & (y > -4) & (y < 40)  # pyramids up to their ridge
    result: Bool = petrous | (clivus & (tissue < 0.35))
    result[low] |= sphenoid
    return result


def _face(rng: np.random.Generator, a: Atlas, coarse: Float, fine: Float) -> Float:
    """Scalp, face and neck, without skull and brain."""
    z, y, x = axes()
    scalp = rng.uniform(10, 17)
    under = scalp - a.outer  # mm under the skin
    low = slice(0, 155)  # z < 5
    knots = (-150, -110, -80, -50, -20, 10)
    width = np.interp(z[low], knots, np.array([60, 60, 64, 70, 74, 60]) * rng.uniform(0.92, 1.06)).astype(np.float32)
    front = np.interp(z[low], knots, (-48, -84, -92, -94, -88, -60)).astype(np.float32)
    back = np.interp(z[low], knots, np.array([66, 70, 82, 92, 92, 70]) * rng.uniform(0.95, 1.05)).astype(np.float32)
    middle, half = (front + back) / 2, (back - front) / 2
    radius = np.sqrt((x / width) ** 2 + ((y - middle) / half) ** 2)
    under[low] = np.maximum(under[low], (1 - radius) * 62)
    zs, ys, xs, under_s = _slab(-62, -18, under)
    nose = (np.abs(xs) < 2 + np.clip((-20 - zs) * 0.35, 0, 13)) & (ys < -80) & (ys > -112 + np.abs(zs + 50) * 0.6)
    under_s[nose] = np.maximum(under_s[nose], 3.0)
    for side in (-1, 1):
        box, ear = ellipsoid((-38, 22, side * (86.0 + rng.uniform(-2, 4))), (27, 14, 7))
        ear &= fine[box] > -0.6
        under[box][ear] = np.maximum(under[box][ear], 2.0)
    fat, muscle = rng.uniform(-110, -75), rng.uniform(45, 62)
    out = np.where(under > 0, np.float32(fat) + 12 * fine, np.float32(AIR))
    meat = (under[:180] > rng.uniform(5, 10)) & (z[:180] < -25)
    meat |= (np.abs(x) > 45) & (a.depth[:180] > 3) & (under[:180] > 4) & (y < 30)  # temporal muscles
    meat &= coarse[:180] > rng.uniform(-1.5, -0.6)
    out[:180][meat] = np.float32(muscle) + 4 * fine[:180][meat]
    out[(under > 0) & (under < 2.2)] = rng.uniform(0, 45)
    wall = rng.uniform(350, 900)
    _airways(rng, out, fine, wall)
    _orbits(rng, a, out, wall)
    _jaws_and_spine(rng, a, out)
    return out


def _airways(rng: np.random.Generator, out: Float, fine: Float, wall: float) -> None:
    """Paranasal sinuses, nasal cavity and pharynx, some of the sinuses filled."""
    sinuses = [((-46.0, -56.0, s * 27.0), rng.uniform(11, 19, 3)) for s in (-1, 1)]
    sinuses += [((-42.0, -20.0, s * 7.0), np.array([9.0, 11.0, 7.0])) for s in (-1, 1)]
    for centre, radii in sinuses:
        paint(out, centre, radii + 2, wall)
        paint(out, centre, radii, AIR if rng.random() < 0.85 else rng.uniform(15, 45))
        if rng.random() < 0.25:  # a fluid level
            paint(out, (centre[0], centre[1] + 0.5 * radii[1], centre[2]), radii * 0.8, rng.uniform(10, 40))
    z, y, x, out_s, fine_s = _slab(-62, -6, out, fine)
    nasal = (np.abs(x) < 15) & (y > -84) & (y < -22) & (z > -1e3)
    out_s[nasal] = np.where(fine_s > -0.1, AIR, 45)[nasal]
    bony = nasal & ((np.abs(x) < 1) | (np.abs(fine_s) < 0.16) | (np.abs(np.abs(x) - 15) < 1.5))
    out_s[bony] = wall * 0.7
    z, y, x, out_s = _slab(-150, -55, out)
    out_s[((x / 11) ** 2 + ((y + 4) / 7) ** 2 + 0 * z) < 1] = AIR  # pharynx


def _orbits(rng: np.random.Generator, a: Atlas, out: Float, wall: float) -> None:
    """Eyes with lenses, fat, muscles and optic nerves in bony cones."""
    bony = np.broadcast_to(axes()[1] > -76, HEAD_SHAPE)
    for s in (-1, 1):
        paint(out, (-30, -50, s * 30.0), (21, 31, 21), wall, bony)
        paint(out, (-30, -52, s * 30.0), (18, 29, 18), -95)
    out[a.eye_muscles] = 40
    for s in (-1, 1):
        paint(out, (-30, -70, s * 31.0), (13, 13, 13), 45)
        paint(out, (-30, -70, s * 31.0), (12, 12, 12), rng.uniform(4, 16))
        paint(out, (-30, -79, s * 31.0), (4, 2, 4), rng.uniform(70, 120))


def _jaws_and_spine(rng: np.random.Generator, a: Atlas, out: Float) -> None:
    z, y, x, out_s, depth = _slab(-150, -40, out, a.depth)
    bone = rng.uniform(700, 1300)
    lower = np.abs(np.hypot(x, (y + 34) / 1.15) - 43)
    upper = np.abs(np.hypot(x, (y + 42) / 1.2) - 30)
    jaw = (lower < 5.5) & (y < -18) & (z < -84) & (z > -118)
    jaw |= (np.abs(np.abs(x) - 46) < 4) & (y > -28) & (y < 4) & (z > -118) & (z < -48)
    jaw |= (np.abs(np.abs(x) - 58) < 4) & (y > -62) & (y < 5) & (np.abs(z + 44) < 4.5)  # zygoma
    out_s[jaw] = bone
    out_s[(upper < 6) & (y < -38) & (z > -76) & (z < -58)] = bone * 0.6
    gaps = np.sin(np.arctan2(x, -(y + 42)) * 16) > -0.5
    out_s[(upper < 4.5) & (y < -40) & gaps & (z > -90) & (z < -72)] = rng.uniform(1600, 2600)
    ring = np.hypot(x / 1.25, y - 46)
    spine = (z < -80) & ((np.abs(ring - 14.5) < 3.5) | ((np.abs(x) < 11) & (y > 12) & (y < 32)))
    spine &= (np.sin((z + 80) / 2.7) > -0.75) & (depth > 0)
    out_s[spine] = bone * 0.8
    canal = (z < -66) & (depth > 0)
    out_s[canal & (ring < 11)] = 10
    out_s[canal & (ring < 6)] = 36

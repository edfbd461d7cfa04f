"""What a CT scanner sees that is not a head: trunk, neck and shoulders, limbs, test objects; 2 mm voxels."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from serving.phantom.anatomy import AIR, Bool, Float, Subject, axes, smooth_noise

SPACING = 2.0
SHAPE = (160, 150, 230)
ORIGIN = (-160.0, -150.0, -230.0)


def body(rng: np.random.Generator, kind: str, contrast: str) -> Subject:
    """Compose one object of `kind`: trunk, neck, limb or test_object; `contrast` as for heads."""
    hounsfield, extent, field = _KINDS[kind](rng, 0.0 if contrast == "non_contrast" else float(rng.uniform(60, 250)))
    return Subject(
        hounsfield=np.rint(hounsfield).astype(np.int16),
        truth=None,
        origin_mm=ORIGIN,
        spacing_mm=SPACING,
        extent_mm=extent,
        field_mm=field,
        region="other",
        contrast="non_contrast" if contrast == "non_contrast" else "contrast",
    )


def _ellipse(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Bool:
    (z, y, x), (cz, cy, cx), (rz, ry, rx) = axes(ORIGIN, SHAPE, SPACING), centre, radii
    inside: Bool = ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    return inside


def _skin_and_meat(rng: np.random.Generator, under: Float, fat_mm: float) -> tuple[Float, Float]:
    """Air, skin, fat and muscle by depth `under` the skin in mm; also the noise used for texture."""
    texture = smooth_noise(rng, SHAPE, 5.0)
    out = np.where(under > 0, rng.uniform(-115, -90) + 8 * texture, AIR).astype(np.float32)
    meat = (under > fat_mm) & (texture > -1.4)
    out[meat] = (rng.uniform(45, 62) + 5 * texture)[meat]
    out[(under > 0) & (under < 3)] = 20
    return out, texture


def _trunk(rng: np.random.Generator, iodine: float) -> tuple[Float, tuple[float, float], float]:
    z, y, x = axes(ORIGIN, SHAPE, SPACING)
    width, thick = rng.uniform(145, 205), rng.uniform(90, 130)
    shift = rng.uniform(-110, 110)  # which part of the trunk lies in the grid: + is chest, - is pelvis
    level = z + shift
    radius = np.sqrt((x / width) ** 2 + (y / thick) ** 2)
    under = ((1 - radius) * thick + 0 * z).astype(np.float32)
    fat = rng.uniform(8, 35)
    out, texture = _skin_and_meat(rng, under, fat)
    wall = thick - fat - 14
    inner = ((1 - np.sqrt((x / (width - fat - 14)) ** 2 + (y / wall) ** 2)) * wall + 0 * z).astype(np.float32)
    abdomen = (inner > 0) & (level <= 20)
    out[abdomen] = (np.where(texture > 0.2, 40, -100) + 6 * texture)[abdomen]
    dome = 20 + 30 * np.exp(-(((np.abs(x) - 65) / 45) ** 2) - (y / 70) ** 2)
    lung = (inner > 0) & (level > dome) & (np.abs(x) > 16 + np.clip(25 - (y + 20) * 0.3, 0, 30))
    out[lung] = (-850 + 40 * texture)[lung]
    branches = lung & (np.abs(smooth_noise(rng, SHAPE, 4.0)) < 0.1) & (np.abs(x) < width * 0.6)
    out[branches] = 20 + 0.5 * iodine
    mediastinum = (inner > 0) & (level > 20) & ~lung
    out[mediastinum] = (rng.uniform(-60, 40) + 8 * texture)[mediastinum]
    out[_ellipse((60 - shift, -20, 25), (50, 42, 52))] = 42 + iodine
    out[_ellipse((150 - shift, -18, 0), (80, 9, 8))] = AIR  # trachea
    liver = _ellipse((0 - shift, -5, -62), (62, 66, 75)) & (inner > 0) & ~lung
    out[liver] = (58 + 0.35 * iodine + 4 * texture)[liver]
    out[_ellipse((-5 - shift, 28, 92), (38, 34, 25))] = 50 + 0.4 * iodine
    for s in (-1, 1):
        out[_ellipse((-55 - shift, 38, s * 55), (50, 26, 25))] = 32 + 0.8 * iodine
    gas = (inner > 4) & (level < -20) & (y < 0) & (smooth_noise(rng, SHAPE, 9.0) > 1.3)
    out[gas] = -900
    out[((x - 12) / 11) ** 2 + ((y - 42) / 11) ** 2 + 0 * z < 1] = 45 + iodine  # aorta
    ribs = (np.abs(inner) < 5) & (np.sin((level + 0.45 * y) / 3.6) > 0.35) & (level > -20) & (np.abs(x) > 12)
    out[ribs] = rng.uniform(350, 900)
    spine = ((x / 20) ** 2 + ((y - 64) / 18) ** 2 + 0 * z < 1) & (np.sin(level / 5.0) > -0.85)
    spine |= (np.abs(x) < 4) & (y > 84) & (y < thick - 8) & (np.sin(level / 5.0) > -0.2)
    spine |= (np.abs(y - 84) < 5) & (np.abs(x) < 32) & (np.sin(level / 5.0) > 0.3)
    out[spine] = (rng.uniform(180, 420) + 60 * texture)[spine]
    out[((x / 9) ** 2 + ((y - 86) / 8) ** 2 + 0 * z) < 1] = 30
    pelvis = (level < -70) & (np.abs(np.abs(x) - 85 - (level + 110) * 0.4 + y * 0.3) < 7) & (np.abs(y - 20) < 55)
    out[pelvis & (inner > -10)] = 600
    if rng.random() < 0.35:  # arms beside the body
        for s in (-1, 1):
            arm = np.sqrt((x - s * (width + 22)) ** 2 + (y - 15) ** 2 + 0 * z)
            out[arm < 34] = -80
            out[arm < 28] = 55
            out[(arm < 11) & (arm > 6)] = 1200
    return out, (-150.0, 150.0), 2 * width + 40


def _neck(rng: np.random.Generator, iodine: float) -> tuple[Float, tuple[float, float], float]:
    z, y, x = axes(ORIGIN, SHAPE, SPACING)
    slope = np.clip((20 - z) / 70, 0, 1)
    width = rng.uniform(58, 72) + slope * rng.uniform(110, 150)
    thick = rng.uniform(55, 68) + slope * rng.uniform(20, 45)
    under = ((1 - np.sqrt((x / width) ** 2 + (y / thick) ** 2)) * thick).astype(np.float32)
    out, texture = _skin_and_meat(rng, under, rng.uniform(4, 12))
    grid = under > -1e9
    out[grid & ((x / 15) ** 2 + ((y - 8) / 13) ** 2 < 1) & (np.sin(z / 3) > -0.8)] = rng.uniform(300, 600)
    ring = np.sqrt((x / 1.3) ** 2 + (y - 27) ** 2)
    out[grid & (ring > 9) & (ring < 14) & (np.sin(z / 3) > -0.2)] = 700
    out[grid & (ring < 8)] = 25
    out[grid & ((x / 9) ** 2 + ((y + 25) / 8) ** 2 < 1)] = AIR
    for s in (-1, 1):
        out[grid & (((x - s * 24) / 8) ** 2 + ((y + 28) / 11) ** 2 < 1) & (z < 0) & (z > -60)] = 95 + iodine
        for cy, cx, r in ((-12, 30, 4.0), (-8, 38, 6.0)):
            out[grid & ((x - s * cx) ** 2 + (y - cy) ** 2 < r**2)] = 45 + iodine
        out[_ellipse((-75, 5, s * 150), (26, 24, 24))] = (500 + 90 * texture)[_ellipse((-75, 5, s * 150), (26, 24, 24))]
        clavicle = (np.abs(z + 62 - 0.15 * np.abs(x)) < 6) & (np.abs(y + 30) < 7) & (np.abs(x) > 20) & (np.abs(x) < 130)
        out[clavicle] = 800
        lung = _ellipse((-150, 8, s * 75), (70, 60, 48))
        out[lung & (under > 12)] = -850
    out[(np.abs(out - 55) < 12) & (texture > 1.0) & (under > 8)] = -90
    return out, (-150.0, 90.0), 2 * float(np.median(width)) + 60


def _limb(rng: np.random.Generator, iodine: float) -> tuple[Float, tuple[float, float], float]:
    z, y, x = axes(ORIGIN, SHAPE, SPACING)
    radius, count = rng.uniform(32, 85), int(rng.integers(1, 3))
    out = np.full(SHAPE, AIR, np.float32)
    joint = rng.uniform(-100, 100)
    texture = smooth_noise(rng, SHAPE, 5.0)
    for k in range(count):
        cx = 0.0 if count == 1 else (k * 2 - 1) * (radius + rng.uniform(3, 25))
        r = np.sqrt((x - cx) ** 2 + y**2) + 3 * texture
        flare = 1 + 1.1 * np.exp(-(((z - joint) / 25) ** 2))
        out[r < radius + 0 * z] = -95
        meat = (r < radius - rng.uniform(4, 15)) & (texture > -1.2) & (z > -1e9)
        out[meat] = 55
        for bx in (0.0,) if rng.random() < 0.6 else (-radius * 0.3, radius * 0.3):
            bone = np.sqrt((x - cx - bx) ** 2 + (y - 5) ** 2) / (radius * 0.24 * flare)
            gap = np.abs(z - joint) < 3
            out[(bone < 1) & ~gap] = (250 + 60 * texture)[(bone < 1) & ~gap]
            out[(bone < 1) & (bone > 0.72) & ~gap] = 1300
        out[((x - cx - radius * 0.4) ** 2 + (y + radius * 0.3) ** 2 < 16) & (z > -1e9)] = 45 + iodine
    return out, (-150.0, 150.0), 2 * radius * count + 40


def _test_object(rng: np.random.Generator, iodine: float) -> tuple[Float, tuple[float, float], float]:
    z, y, x = axes(ORIGIN, SHAPE, SPACING)
    radius = rng.uniform(70, 160)
    r = np.sqrt(x**2 + y**2) + 0 * z
    out = np.where(r < radius, rng.uniform(-10, 130), AIR).astype(np.float32)
    out[(r < radius) & (r > radius - rng.uniform(2, 8))] = rng.uniform(60, 250)
    for _ in range(int(rng.integers(0, 14))):
        angle, away, size = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0, 0.75), rng.uniform(3, 16)
        insert = np.hypot(x - away * np.cos(angle), y - away * np.sin(angle)) + 0 * z < size
        out[insert & (np.abs(z - rng.uniform(-80, 80)) < rng.uniform(20, 120))] = rng.choice(
            [-1000, -100, 10, 120, 340, 990]
        )
    return out, (-120.0, 120.0), 2 * radius + 40


_KINDS: dict[str, Callable[[np.random.Generator, float], tuple[NDArray[np.float32], tuple[float, float], float]]] = {
    "trunk": _trunk,
    "neck": _neck,
    "limb": _limb,
    "test_object": _test_object,
}

"""What is bright, dark or odd in a head that does not bleed: drawn by `draw_mimics`, painted by `paint_mimics`.

A detector that has never seen them pages for each. Attenuations and sites after common neuroradiology teaching; how
often each is drawn is the share of adults, or more where an everyday thing must be learned from few heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from serving.phantom.anatomy import (
    AIR,
    HEAD_ORIGIN,
    HEAD_SHAPE,
    Atlas,
    Box,
    Build,
    Float,
    atlas,
    axes,
    on_surface,
)

Centre = Sequence[float] | NDArray[np.float64] | float

METAL = 30_000.0
"""Beyond what a scanner stores, so that its streaks are those of metal."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """A head being painted: Hounsfield units in place, and what is needed to find the way in it."""

    rng: np.random.Generator
    hounsfield: Float
    atlas: Atlas
    build: Build

    def blob(self, centre: Centre, radii: Centre, roughness: float = 0.2, edge_mm: float = 1.5) -> tuple[Box, Float]:
        """A rough ellipsoid (z, y, x mm): the box around it and how much of each voxel there it fills."""
        centre, radii = np.asarray(centre, np.float64), np.broadcast_to(np.asarray(radii, np.float64), 3)
        reach = radii * (1 + 2 * roughness) + edge_mm
        low = np.clip(np.floor(centre - reach - HEAD_ORIGIN), 0, HEAD_SHAPE).astype(int)
        high = np.clip(np.ceil(centre + reach - HEAD_ORIGIN) + 1, 0, HEAD_SHAPE).astype(int)
        box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
        spans = zip(box, HEAD_ORIGIN, centre, radii, strict=True)
        z, y, x = np.ix_(*((np.arange(b.start, b.stop) + o - c) / r for b, o, c, r in spans))
        shift = self.rng.integers(0, 9, 3)  # so that no two blobs have the same outline
        texture = np.roll(self.atlas.coarse[box], shift, (0, 1, 2)) + 0.5 * self.atlas.fine[box]
        level = np.sqrt(z**2 + y**2 + x**2) * (1 + roughness * texture)
        filled = np.clip((1 - level) * (float(radii.min()) / edge_mm) + 0.5, 0, 1)
        return box, filled.astype(np.float32)

    def blend(self, box: Box, filled: Float, value: float | Float) -> None:
        """Move `box` towards `value` by the filled fractions."""
        here = self.hounsfield[box]
        here += filled * (value - here)

    def speck(self, centre: Centre, radii: Centre, value: float, roughness: float = 0.3) -> None:
        """A small dense blob; where it is half filled it is half as bright, as in thick slices."""
        box, filled = self.blob(centre, radii, roughness, edge_mm=0.8)
        here = self.hounsfield[box]
        np.maximum(here, here + filled * (value - here), out=here)

    def jitter(self, centre: Centre, spread_mm: float) -> NDArray[np.float64]:
        """A point near `centre`."""
        return np.asarray(centre, np.float64) + self.rng.normal(0, spread_mm, 3)

    def cortex(self, below_mm: float) -> NDArray[np.float64]:
        """A random point of the cerebral hemispheres, so deep under the inner table."""
        direction = self.rng.standard_normal(3)
        direction[0] = abs(direction[0])
        return np.array(on_surface(self.atlas.depth, direction, -below_mm))


# --- calcification ---------------------------------------------------------------------------------------------------


def _choroid(c: Canvas) -> None:
    """Glomus of the choroid plexus in the atria, often on both sides: clumps of specks."""
    sides = (-1, 1) if c.rng.random() < 0.8 else (int(c.rng.choice([-1, 1])),)
    size, value = c.rng.uniform(1.2, 4.0), c.rng.uniform(80, 400)
    for side in sides:
        for _ in range(int(c.rng.integers(1, 5))):
            centre = c.jitter((6.0, 40.0, side * (23.0 + c.build.ventricle_mm * 0.5)), 2.5)
            c.speck(centre, size * c.rng.uniform(0.5, 1.1, 3), value * c.rng.uniform(0.6, 1.2))
    if c.rng.random() < 0.15:  # also in the foramina of Monro and the fourth ventricle
        c.speck(c.jitter((12.0, -2.0, 5.0), 1.5), c.rng.uniform(1, 2, 3), value)


def _pineal(c: Canvas) -> None:
    centre, value = c.jitter((1.0, 27.0, 0.0), 0.8), c.rng.uniform(100, 300)
    for _ in range(int(c.rng.integers(1, 4))):
        c.speck(c.jitter(centre, 1.0), c.rng.uniform(1.0, 3.2, 3), value)
    if c.rng.random() < 0.4:  # the habenula in front of it
        c.speck(c.jitter((3.0, 21.0, 0.0), 0.6), c.rng.uniform(0.8, 1.6, 3), value)


def _falx_calcification(c: Canvas) -> None:
    for _ in range(int(c.rng.integers(1, 5))):
        angle = c.rng.uniform(0.1, 0.95) * np.pi
        centre = (5 + 62 * np.sin(angle), 5 - 66 * np.cos(angle), 0.0)
        c.speck(c.jitter(centre, 2.0) * (1, 1, 0.15), c.rng.uniform((2, 2, 0.8), (9, 9, 2.2)), c.rng.uniform(120, 900))


def _ganglia(c: Canvas) -> None:
    """Globus pallidus, sometimes dentate nucleus too: symmetric and faint."""
    value, size = c.rng.uniform(60, 120), c.rng.uniform(0.6, 1.2)
    for side in (-1, 1):
        box, filled = c.blob(c.jitter((-1.0, 3.0, side * 19.0), 0.8), np.array((4.5, 7.5, 3.5)) * size, 0.25, 2.5)
        c.blend(box, filled * np.clip(0.7 + 0.2 * c.atlas.fine[box], 0.2, 1), value * c.rng.uniform(0.85, 1.1))
        if value > 95:
            c.speck(c.jitter((-34.0, 58.0, side * 15.0), 1.0), (3.0 * size, 5.0 * size, 2.0), value)


def _vessel_calcification(c: Canvas) -> None:
    """Carotid siphons and vertebral arteries of the old."""
    for side in (-1, 1):
        for course in ((-30.0, -6.0, 11.0), (-27.0, -10.0, 11.0), (-24.0, -4.0, 11.0), (-62.0, 40.0, 8.0)):
            if c.rng.random() < 0.6:
                centre = c.jitter((course[0], course[1], side * course[2]), 1.2)
                c.speck(centre, c.rng.uniform(0.8, 2.2, 3), c.rng.uniform(150, 700))


def _granuloma(c: Canvas) -> None:
    for _ in range(int(c.rng.choice([1, 1, 1, 2, 4]))):
        c.speck(c.cortex(c.rng.uniform(4, 30)), c.rng.uniform(1.0, 3.0), c.rng.uniform(80, 400))


# --- dense dura and vessels ------------------------------------------------------------------------------------------


def _dense_dura(c: Canvas) -> None:
    """Falx and tentorium thicker and denser than usual; the tentorium's free edge ends bright beside the brainstem."""
    value = c.rng.uniform(45, 65)
    thick_falx = ndimage.binary_dilation(c.atlas.falx, np.ones((1, 1, 3), bool))
    for sheet in (c.atlas.tentorium, thick_falx):
        raised = c.hounsfield[sheet]
        c.hounsfield[sheet] = np.maximum(raised, raised + c.rng.uniform(0.2, 1.0) * (value - raised))


def _dense_vessels(c: Canvas) -> None:
    """Dural sinuses, cortical veins and basal arteries as in haemoconcentration, and in children."""
    value = np.float32(c.rng.uniform(52, 72))
    for vessels in (c.atlas.veins, c.atlas.arteries):
        at = np.nonzero(vessels)
        here = c.hounsfield[at]
        c.hounsfield[at] = np.where(here < 150, here + vessels[at] * np.maximum(value - here, 0), here)


# --- bone ------------------------------------------------------------------------------------------------------------


def _sella(c: Canvas) -> None:
    """Dorsum sellae with posterior clinoids, and the anterior ones: bone amid the basal cisterns."""
    value, height = c.rng.uniform(200, 1000), c.rng.uniform(-29, -22)
    y = c.rng.uniform(2, 6)
    box, filled = c.blob(
        ((height - 38) / 2, y, 0.0), ((height + 38) / 2, c.rng.uniform(1.0, 2.0), c.rng.uniform(5, 9)), 0.1, 1.0
    )
    c.blend(box, filled, value)
    for side in (-1, 1):
        c.speck(c.jitter((height, y, side * 7.0), 0.7), (2.2, 1.8, 2.0), value)
        c.speck(c.jitter((height - 1, y - 16, side * 12.0), 1.0), (2.2, 4.5, 2.0), value)
        if c.rng.random() < 0.1:  # petroclinoid ligament
            c.speck(c.jitter((height - 3, y + 7, side * 11.0), 1.0), (0.8, 7.0, 1.0), 0.4 * value)


def _rough_table(c: Canvas) -> None:
    """The inner table is no smooth shell: ridges of the skull base, and hyperostosis at the forehead of some."""
    a = c.atlas
    z, y, _ = axes()
    base = np.clip((-4 - z) / 12, 0, 1) * c.rng.uniform(0.8, 2.6)
    if c.rng.random() < 0.25:  # hyperostosis frontalis interna
        base = base + np.clip((-30 - y) / 20, 0, 1) * np.clip((z + 5) / 10, 0, 1) * c.rng.uniform(1.0, 4.0)
    near = np.flatnonzero(((a.depth > -6) & (a.depth <= 0)).ravel())
    height = np.broadcast_to(base + c.rng.uniform(0.2, 0.7), HEAD_SHAPE).ravel()[near]
    texture = (near + int(c.rng.integers(a.coarse.size))) % a.coarse.size  # shifted: as good as a new one
    bumps = height * np.maximum(a.coarse.ravel()[texture] + 0.6 * a.fine.ravel()[texture], -0.5)
    bone = near[a.depth.ravel()[near] > -bumps]
    c.hounsfield.reshape(-1)[bone] = np.maximum(c.hounsfield.reshape(-1)[bone], c.rng.uniform(500, 1100))


# --- lesions that do not bleed ---------------------------------------------------------------------------------------


def _infarct(c: Canvas) -> None:
    """Old infarcts: a dark area of cortex and what lies beneath, or lacunes in the basal ganglia."""
    inside = c.atlas.depth < -0.5
    if c.rng.random() < 0.6:
        centre = c.cortex(c.rng.uniform(5, 18))
        box, filled = c.blob(centre, c.rng.uniform(8, 28, 3), 0.3, c.rng.uniform(2, 6))
        c.blend(box, filled * inside[box] * np.float32(c.rng.uniform(0.5, 1)), c.rng.uniform(8, 20))
    for _ in range(int(c.rng.choice([0, 1, 2, 4]))):
        side = c.rng.choice([-1, 1])
        box, filled = c.blob(c.jitter((6.0, 4.0, side * 20.0), 6.0), c.rng.uniform(1.5, 5.0, 3), 0.3, 1.5)
        c.blend(box, filled, c.rng.uniform(6, 18))


def _mass(c: Canvas) -> None:
    """A tumour: a little denser than brain, within oedema, some with a dark middle or calcified."""
    centre = c.cortex(c.rng.uniform(8, 32))
    radii = c.rng.uniform(4, 17) * c.rng.uniform(0.8, 1.25, 3)
    inside = c.atlas.depth < -1
    box, filled = c.blob(centre, radii + c.rng.uniform(4, 18), 0.35, 5.0)
    here = c.hounsfield[box]
    here -= filled * inside[box] * (0.35 + c.atlas.whiteness[box]) * np.float32(c.rng.uniform(5, 12))
    box, filled = c.blob(centre, radii, 0.2, 2.5)
    c.blend(box, filled * inside[box], np.float32(c.rng.uniform(30, 45)) + 2 * c.atlas.fine[box])
    if radii.min() > 8 and c.rng.random() < 0.4:
        box, filled = c.blob(centre, radii * 0.6, 0.25, 2.0)
        c.blend(box, filled, c.rng.uniform(10, 25))
    if c.rng.random() < 0.2:
        c.speck(c.jitter(centre, 2.0), c.rng.uniform(1.0, 3.0, 3), c.rng.uniform(90, 300))


def _metal(c: Canvas) -> None:
    """An aneurysm's clip or coil, or a shunt's end; the scanner makes its streaks."""
    site = [(-18.0, -6.0, 10.0), (-16.0, -4.0, 30.0), (-14.0, -12.0, 1.0), (-14.0, 16.0, 0.0), (14.0, 8.0, 12.0)]
    centre = c.jitter(np.array(site[c.rng.integers(len(site))]) * (1, 1, c.rng.choice([-1, 1])), 2.0)
    radii = c.rng.uniform(1.8, 4.5, 3)
    box, filled = c.blob(centre, radii, 0.2, 0.8)
    c.blend(box, filled, METAL)


def _operated(c: Canvas) -> None:
    """After a craniotomy: the gap around a flap or a burr hole, fluid beneath, swollen scalp, and early on some air."""
    a, rng = c.atlas, c.rng
    direction = rng.standard_normal(3)
    direction = np.array([abs(direction[0]) * 0.8 + 0.1, direction[1] * 0.8 - 0.2, direction[2]])
    direction /= np.linalg.norm(direction)
    centre = np.array(on_surface(a.depth, direction, 2.0))
    flap = rng.uniform(18, 38) if rng.random() < 0.7 else rng.uniform(5, 8)
    box, _ = c.blob(centre, flap + 6, 0.0)
    z, y, x = (axis[b] for axis, b in zip((v.ravel() for v in axes()), box, strict=True))
    away = np.sqrt(
        (z[:, None, None] - centre[0]) ** 2 + (y[None, :, None] - centre[1]) ** 2 + (x[None, None, :] - centre[2]) ** 2
    )
    here, depth = c.hounsfield[box], a.depth[box]
    bone = (depth > 0) & (here > 200)
    gap = np.abs(away - flap) < rng.uniform(1.0, 2.2) if flap > 10 else away < flap
    here[bone & gap] = rng.uniform(5, 45)
    here[(depth > 0) & (away < flap + 5) & (here < 0) & (here > -200)] += rng.uniform(40, 110)  # swollen scalp
    box, filled = c.blob(np.array(on_surface(a.depth, direction, -rng.uniform(4, 16))), rng.uniform(6, 18, 3), 0.3, 2.5)
    c.blend(box, filled * (a.depth[box] < -0.5), rng.uniform(4, 15))
    for _ in range(int(rng.choice([0, 2, 5]))):
        box, filled = c.blob(c.jitter(on_surface(a.depth, direction, -3.0), 5.0), rng.uniform(1.5, 4.5, 3), 0.2, 0.8)
        c.blend(box, filled * (a.depth[box] < 1), AIR)


def _white_matter(c: Canvas) -> None:
    """Dark white matter around the ventricles (leukoaraiosis)."""
    a, drop, reach = c.atlas, np.float32(c.rng.uniform(3, 9)), np.float32(c.rng.uniform(4, 12))
    near = np.nonzero(a.ventricle_mm < 30)
    c.hounsfield[near] -= drop * np.exp(-np.maximum(a.ventricle_mm[near], 0) / reach) * a.whiteness[near]


Painter = Callable[[Canvas], None]

MIMICS: Mapping[str, tuple[Painter, Mapping[str, float]]] = {
    "white_matter": (_white_matter, {"adult": 0.1, "old": 0.7}),
    "infarct": (_infarct, {"infant": 0.02, "child": 0.02, "adult": 0.12, "old": 0.35}),
    "mass": (_mass, {"child": 0.06, "adult": 0.07, "old": 0.07}),
    "choroid": (_choroid, {"infant": 0.02, "child": 0.25, "adult": 0.75, "old": 0.9}),
    "pineal": (_pineal, {"child": 0.15, "adult": 0.7, "old": 0.8}),
    "falx_calcification": (_falx_calcification, {"adult": 0.15, "old": 0.3}),
    "ganglia_calcification": (_ganglia, {"adult": 0.1, "old": 0.2}),
    "vessel_calcification": (_vessel_calcification, {"adult": 0.15, "old": 0.7}),
    "granuloma": (_granuloma, {"child": 0.03, "adult": 0.08, "old": 0.08}),
    "dense_dura": (_dense_dura, {"infant": 0.8, "child": 0.6, "adult": 0.5, "old": 0.5}),
    "dense_vessels": (_dense_vessels, {"infant": 0.6, "child": 0.4, "adult": 0.25, "old": 0.2}),
    "sella": (_sella, {"infant": 0.2, "child": 0.7, "adult": 0.85, "old": 0.85}),
    "rough_table": (_rough_table, {"infant": 0.3, "child": 0.8, "adult": 0.85, "old": 0.9}),
    "metal": (_metal, {"adult": 0.04, "old": 0.05}),
    "operated": (_operated, {"child": 0.03, "adult": 0.06, "old": 0.05}),
}
"""How each is painted and how often, by age group; in the order of painting: what is bone comes after what is soft."""


def draw_mimics(rng: np.random.Generator, age: str = "adult") -> tuple[str, ...]:
    """Names of MIMICS that one head of an age group (infant, child, adult, old) shows; half of all heads few."""
    often = 1.0 if rng.random() < 0.7 else 0.25
    return tuple(name for name, (_, shares) in MIMICS.items() if rng.random() < often * shares.get(age, 0.0))


def paint_mimics(rng: np.random.Generator, hounsfield: Float, build: Build, names: Sequence[str]) -> None:
    """Paint `names` into the composed head `hounsfield` (HEAD_SHAPE) in place; raises ValueError for an unknown one."""
    unknown = set(names) - set(MIMICS)
    if unknown:
        raise ValueError(f"unknown mimics {sorted(unknown)}; known are {', '.join(MIMICS)}")
    canvas = Canvas(rng, hounsfield, atlas(), build)
    for name, (painter, _) in MIMICS.items():
        if name in names:
            painter(canvas)

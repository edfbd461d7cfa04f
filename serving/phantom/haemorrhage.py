"""Simulated bleeding with voxel truth, painted into a composed head.

Attenuation by age (acute 55 to 80 HU, subacute that of brain, chronic 20 to 32) and the forms of the kinds after common
neuroradiology teaching.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.signatures import FINDINGS
from serving.phantom.anatomy import HEAD_ORIGIN, HEAD_SHAPE, Bool, Box, Build, Float, Push, atlas

KINDS = ("iph", "contusion", "ivh", "sah", "sdh", "edh")
"""What can be asked for; `iph` and `contusion` share one channel of the truth, and so do `sdh` and `edh`."""

LABELS: Mapping[str, int] = {name: FINDINGS.index(name) for name in ("iph", "ivh", "sah")} | {
    "contusion": FINDINGS.index("iph"),
    "sdh": FINDINGS.index("edh_sdh"),
    "edh": FINDINGS.index("edh_sdh"),
}
SHIFTS = ("iph", "sdh", "edh")  # what pushes the midline aside
THINNEST_MM = {"sdh": 3.0, "edh": 5.0}
"""Mean thickness below which a bleed on the skull spreads less instead: a thinner one is lost in the blur of bone."""
SKULL_RADIUS_MM = 68.0

Index = NDArray[np.intp]  # into the flattened grid


def bleed(
    rng: np.random.Generator, hounsfield: Float, fluid: Float, kinds: Mapping[str, float], build: Build | None = None
) -> tuple[NDArray[np.uint8], tuple[Push, ...]]:
    """Paint bleeds of the given kinds and target volumes (ml) into `hounsfield` in place.

    Returns labels, 0 = none and else the channel of herald.signatures.FINDINGS, and how the bleeds push the brain
    aside. `fluid` is the fraction of cerebrospinal fluid, `build` that of the head.
    """
    truth = np.zeros(HEAD_SHAPE, np.uint8)
    pushes: list[Push] = []
    for kind, volume_ml in kinds.items():
        place = _Place(rng, hounsfield, fluid, build or Build())
        region = _SHAPES[kind](place, volume_ml)
        if region.size == 0:
            continue
        box, mask = _boxed(region, room=4)
        if kind == "sah":
            blood = _diluted(rng, hounsfield[box], fluid[box])
            mask &= blood > 42
            hounsfield[box][mask] = np.maximum(blood, hounsfield[box])[mask]
        else:
            blood = _density(rng, kind, box, volume_ml)
            here = hounsfield[box]
            bone = here >= 150
            mask &= ~bone
            filled = (mask | bone & ndimage.binary_dilation(mask, iterations=2)).astype(np.float32)  # up to the bone
            blend = np.where(bone, 0, ndimage.gaussian_filter(filled, rng.uniform(0.5, 1.0)))
            blend *= ndimage.binary_dilation(mask, iterations=2)
            here += blend * (blood - here)
        truth[box][mask] = LABELS[kind]
        if kind in SHIFTS and volume_ml > 12:
            pushes += _push(rng, region, volume_ml)
    return truth, tuple(pushes)


# --- how dense blood is ----------------------------------------------------------------------------------------------


def _density(rng: np.random.Generator, kind: str, box: Box, volume_ml: float) -> Float:
    """Hounsfield units of blood in `box`: clotted, settled to a level, swirling, or old."""
    fine, coarse = _texture(rng, atlas().fine, box), _texture(rng, atlas().coarse, box)
    acute = np.float32(rng.uniform(45, 56) if rng.random() < 0.08 else rng.uniform(55, 80))  # anaemia: less dense
    blood = acute + np.float32(rng.uniform(1, 5)) * fine
    if kind == "contusion":  # mottled
        return np.asarray(blood - 2 + np.float32(rng.uniform(3, 8)) * fine, np.float32)
    kind_of_age = rng.random()
    if kind == "sdh" and kind_of_age < 0.1:  # chronic
        blood = np.float32(rng.uniform(20, 32)) + 2 * fine
    elif kind == "sdh" and kind_of_age < 0.18:  # subacute
        blood = np.float32(rng.uniform(34, 50)) + 3 * fine
    elif (kind == "sdh" and kind_of_age < 0.4) or (kind == "iph" and volume_ml > 5 and kind_of_age < 0.12):
        blood = _settled(rng, box, blood, coarse)  # mixed age, or blood that does not clot
    elif kind in ("edh", "iph") and volume_ml > 5 and kind_of_age < 0.35:  # swirl: still bleeding
        blood = blood - np.float32(rng.uniform(10, 22)) * np.clip(coarse - 0.3, 0, 1)
    elif kind == "ivh" and kind_of_age < 0.4:
        blood = _settled(rng, box, blood, coarse, upper=(30, 45))
    return np.asarray(blood, np.float32)


def _settled(
    rng: np.random.Generator, box: Box, blood: Float, coarse: Float, upper: tuple[float, float] = (20, 38)
) -> Float:
    """Cells sink to the back of a head that lies, serum stays in front."""
    y = np.arange(box[1].start, box[1].stop, dtype=np.float32)[None, :, None] - box[1].start
    level = (box[1].stop - box[1].start) * rng.uniform(0.3, 0.7)
    sunk = np.clip((y - level + rng.uniform(0, 1.5) * coarse) / rng.uniform(1, 6) + 0.5, 0, 1)
    serum = np.float32(rng.uniform(*upper))
    return np.asarray(serum + sunk * (blood - serum), np.float32)


def _diluted(rng: np.random.Generator, hounsfield: Float, fluid: Float) -> Float:
    """Blood in the fluid of cisterns and sulci, which also holds brain in every voxel."""
    density = np.float32(rng.uniform(50, 78))
    return fluid * density + (1 - fluid) * hounsfield + 2 * rng.standard_normal(fluid.shape, np.float32)


def _texture(rng: np.random.Generator, field: Float, box: Box) -> Float:
    """A part of a texture as large as `box`, from anywhere."""
    start = [int(rng.integers(n - (b.stop - b.start) + 1)) for b, n in zip(box, HEAD_SHAPE, strict=True)]
    return field[tuple(slice(s, s + b.stop - b.start) for s, b in zip(start, box, strict=True))]


def _push(rng: np.random.Generator, region: Index, volume_ml: float) -> list[Push]:
    """A space-occupying bleed of one side pushes the midline at its height to the other."""
    z, y, x = (float(v.mean()) for v in _millimetres(region[::7]))
    if abs(x) < 12:
        return []
    shift = -np.sign(x) * min(volume_ml / 60 * rng.uniform(2, 12), 14)
    return [Push((z, y, 0.0), float(shift), float(rng.uniform(26, 34)))]


# --- where it lies ---------------------------------------------------------------------------------------------------


def _boxed(region: Index, room: int) -> tuple[Box, Bool]:
    """The box around a region with some room, and its mask there."""
    at = np.unravel_index(region, HEAD_SHAPE)
    low = [max(int(a.min()) - room, 0) for a in at]
    high = [min(int(a.max()) + room + 1, n) for a, n in zip(at, HEAD_SHAPE, strict=True)]
    mask = np.zeros([h - b for b, h in zip(low, high, strict=True)], bool)
    mask[tuple(a - b for a, b in zip(at, low, strict=True))] = True
    return (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])), mask


def _millimetres(region: Index) -> tuple[Float, Float, Float]:
    """Coordinates z, y, x of voxels."""
    z, y, x = (
        a.astype(np.float32) + np.float32(o)
        for a, o in zip(np.unravel_index(region, HEAD_SHAPE), HEAD_ORIGIN, strict=True)
    )
    return z, y, x


@dataclass(frozen=True, eq=False)
class _Place:
    """A head to find room for a bleed in."""

    rng: np.random.Generator
    hounsfield: Float
    fluid: Float
    build: Build

    def voxels(self, allowed: Bool) -> tuple[Index, Float, Float, Float]:
        """Indices and coordinates of the allowed voxels."""
        found = np.flatnonzero(allowed)
        return (found, *_millimetres(found))

    def near(self, centre: NDArray[np.float64], reach_mm: float) -> tuple[Box, Index, Float, Float, Float]:
        """The box around a point, and indices and coordinates of all in it."""
        low = [
            int(np.clip(c - reach_mm - o, 0, n - 2)) for c, o, n in zip(centre, HEAD_ORIGIN, HEAD_SHAPE, strict=True)
        ]
        high = [
            int(np.clip(c + reach_mm - o, b + 1, n))
            for c, o, n, b in zip(centre, HEAD_ORIGIN, HEAD_SHAPE, low, strict=True)
        ]
        box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
        grid = np.ravel_multi_index(np.ix_(*(range(b.start, b.stop) for b in box)), HEAD_SHAPE)
        return (box, grid, *_millimetres(grid))

    def rough(self, region: Index, amount: float, field: Float | None = None) -> Float:
        """A factor around one that varies smoothly from voxel to voxel."""
        field = atlas().coarse if field is None else field
        shift = int(self.rng.integers(field.size))
        factor: Float = 1 + np.float32(amount) * field.ravel()[(region + shift) % field.size]
        return factor

    def side(self) -> int:
        """Left or right."""
        return int(self.rng.choice([-1, 1]))


def _grown(region: Index, level: Float, volume_ml: float) -> Index:
    """The voxels of lowest `level` that make up `volume_ml` (1 mm voxels)."""
    wanted = min(int(volume_ml * 1000), region.size)
    return region[np.argpartition(level, wanted - 1)[:wanted]] if wanted else region[:0]


def _away(z: Float, y: Float, x: Float, centre: NDArray[np.float64], radii: NDArray[np.float64]) -> Float:
    squared = ((z - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((x - centre[2]) / radii[2]) ** 2
    return np.asarray(np.sqrt(squared), np.float32)


def _iph(p: _Place, volume_ml: float) -> Index:
    """Intraparenchymal: an irregular lump, most often in the basal ganglia and thalamus, with oedema."""
    a, side = atlas(), p.side()
    site = p.rng.choice(["ganglia", "thalamus", "lobar", "cerebellum", "pons"], p=[0.36, 0.16, 0.33, 0.1, 0.05])
    if site == "lobar":
        inside, *_ = p.voxels((a.depth[::3] < -7) & (a.depth[::3] > -30) & (p.fluid[::3] < 0.2))
        at = np.array(np.unravel_index(p.rng.choice(inside), a.depth[::3].shape), float) * (3, 1, 1)
        centre = np.maximum(at + np.asarray(HEAD_ORIGIN), (-20, -999, -999))
    else:
        centre = np.array(
            {
                "ganglia": (4.0, -2.0, side * 27.0),
                "thalamus": (8.0, 18.0, side * 13.0),
                "cerebellum": (-36.0, 66.0, side * 24.0),
                "pons": (-34.0, 28.0, 0.0),
            }[str(site)]
        ) + p.rng.normal(0, 2.5, 3)
    reach = (volume_ml * 1000 / 4.19) ** (1 / 3)
    box, grid, z, y, x = p.near(centre, 2.6 * reach + 12)
    level = _away(z, y, x, centre, p.rng.uniform(0.7, 1.5, 3)) * p.rough(grid, p.rng.uniform(0.05, 0.22))
    free = (a.depth[box] < -1.5) & (p.fluid[box] < 0.7)
    region = _grown(grid[free], level[free], volume_ml)
    mask = np.zeros(grid.shape, bool)
    mask.ravel()[np.searchsorted(grid.ravel(), region)] = True
    if volume_ml > 2:
        mask = ndimage.binary_opening(mask)
    edge = float(level[mask].max()) if mask.any() else 0.0
    width = p.rng.uniform(1, 8) * min(1, 0.4 + volume_ml / 15)
    drop = p.rng.uniform(4, 12) * np.clip((edge + width - level) / 2, 0, 1)  # oedema around it
    oedema = (level < edge + width) & (a.depth[box] < -1.5) & (p.fluid[box] < 0.4) & ~mask
    p.hounsfield[box][oedema] -= (drop * (0.5 + 0.7 * a.whiteness[box]))[oedema].astype(np.float32)
    return grid[mask]


def _contusion(p: _Place, volume_ml: float) -> Index:
    """Contusions: patches in the cortex of the frontal base and the temporal poles, or opposite a blow."""
    a, side = atlas(), p.side()
    sites = [(-8, -48, 15), (0, -52, 22), (-26, -22, 42), (-22, -8, 50), (20, -50, 25), (-10, 60, 45)]
    picked = p.rng.choice(len(sites), int(p.rng.integers(1, 4)), replace=False)
    centres = [
        np.array(sites[i]) * (1, 1, side if p.rng.random() < 0.8 else -side) + p.rng.normal(0, 5, 3) for i in picked
    ]
    cortex = (a.depth < -0.8) & (a.depth > -16) & (p.fluid < 0.6)
    region, z, y, x = p.voxels(cortex)
    level = np.full(region.shape, np.inf, np.float32)
    for centre in centres:
        np.minimum(level, _away(z, y, x, centre, p.rng.uniform(0.6, 1.5, 3)), out=level)
    level *= p.rough(region, 0.3) * p.rough(region, 0.35, a.fine)
    chosen = _grown(region, level, volume_ml)
    around = region[level < np.partition(level, chosen.size - 1)[chosen.size - 1] * 1.25 + 2]
    p.hounsfield.reshape(-1)[np.setdiff1d(around, chosen, True)] -= np.float32(p.rng.uniform(4, 10))
    return chosen


def _ivh(p: _Place, volume_ml: float) -> Index:
    """Intraventricular: fills the lateral ventricles from their lowest (posterior) part, or as a cast of one side."""
    a = atlas()
    region, z, y, x = p.voxels((a.ventricle_mm < p.build.ventricle_mm + 1.5) & (p.fluid > 0.5))
    if p.rng.random() < 0.6:
        level = -y + 3 * p.rough(region, 1.0)
    else:
        level = np.abs(x - p.rng.uniform(-20, 20)) + 0.4 * np.abs(y - p.rng.uniform(0, 30)) + 0.3 * np.abs(z - 5)
    return _grown(region, level, volume_ml)


def _sah(p: _Place, volume_ml: float) -> Index:
    """Subarachnoid: the fluid of basal cisterns, Sylvian or interhemispheric fissures, or sulci of a convexity."""
    a, side, rng = atlas(), p.side(), p.rng
    places = {
        "cisterns": ((-24.0, 0.0, 0.0), (1.0, 1.6, 1.8)),
        "perimesencephalic": ((-18.0, 22.0, 0.0), (1.0, 1.0, 1.2)),
        "sylvian": ((-8.0, -8.0, side * 42.0), (1.2, 1.6, 1.0)),
        "interhemispheric": ((10.0, -45.0, 0.0), (1.8, 1.5, 0.4)),
        "convexity": ((float(rng.uniform(20, 60)), float(rng.uniform(-50, 60)), side * 45.0), (1.0, 1.3, 0.9)),
    }
    site = str(rng.choice(list(places), p=[0.35, 0.1, 0.2, 0.1, 0.25]))
    region, z, y, x = p.voxels((a.depth < 0.5) & (a.depth > -45) & (p.fluid > 0.3) & ~a.ventricle)
    centre, radii = (np.asarray(v) for v in places[site])
    across = np.abs(x) if site == "sylvian" and rng.random() < 0.3 else x * side  # both sides
    level = _away(z, y, across, centre * (1, 1, side), radii)
    return _grown(region, level * p.rough(region, 0.2), volume_ml)


def _sdh(p: _Place, volume_ml: float) -> Index:
    """Subdural: a crescent along the skull, on one side or both, or a layer on falx or tentorium."""
    a, side = atlas(), p.side()
    site = str(p.rng.choice(["convexity", "both", "falx", "tentorium"], p=[0.66, 0.1, 0.13, 0.11]))
    if site in ("falx", "tentorium"):
        region, layer = _beside(a.falx, 2, side) if site == "falx" else _beside(a.tentorium, 0, 1)
        z, y, x = _millimetres(region)
        keep = (x * side > -1) & (a.depth.ravel()[region] < 0) & (p.hounsfield.ravel()[region] < 150)
        middle = p.rng.uniform(-40, 60) if site == "falx" else p.rng.uniform(35, 90)
        level = (layer + 0.06 * np.abs(y - middle) + 0.03 * np.abs(z - 40) * (site == "falx"))[keep]
        return _grown(region[keep], level * p.rough(region[keep], 0.15), min(volume_ml, 15))
    sides = (-1, 1) if site == "both" else (side,)
    each = volume_ml / len(sides)
    return np.concatenate(
        [_on_skull(p, each, s, _spread(each, p.rng.uniform(45, 75), THINNEST_MM["sdh"]), sharp=False) for s in sides]
    )


def _beside(sheet: Bool, axis: int, direction: int, layers: int = 8) -> tuple[Index, Float]:
    """Voxels on one side of a thin sheet, and how many millimetres from it."""
    flat = np.flatnonzero(sheet)
    stride = direction * int(np.prod(HEAD_SHAPE[axis + 1 :]))
    stacked = (flat[None] + stride * np.arange(1, layers + 1)[:, None]).ravel()
    region, first = np.unique(stacked, return_index=True)
    return region, (first // flat.size + 1).astype(np.float32)


def _edh(p: _Place, volume_ml: float) -> Index:
    """Epidural: a lens under the skull."""
    return _on_skull(p, volume_ml, p.side(), _spread(volume_ml, p.rng.uniform(20, 32), THINNEST_MM["edh"]), sharp=True)


def _spread(volume_ml: float, widest_deg: float, thinnest_mm: float) -> float:
    """Degrees around its middle over which so much blood is at least `thinnest_mm` thick on average."""
    radius_mm = np.sqrt(volume_ml * 1000 / (np.pi * thinnest_mm))
    return float(min(widest_deg, np.degrees(radius_mm / SKULL_RADIUS_MM)))


def _on_skull(p: _Place, volume_ml: float, side: int, spread_deg: float, sharp: bool) -> Index:
    """What lies under the skull within some degrees of a direction: thin at its rim, or a lens with `sharp` corners."""
    depth = atlas().depth
    angle, height = p.rng.uniform(0.15, 0.85) * np.pi, p.rng.uniform(-0.15, 0.75)
    direction = np.array([height, -np.cos(angle), side * np.sin(angle)])
    direction /= np.linalg.norm(direction)
    region, z, y, x = p.voxels((depth < 0.3) & (depth > -30) & (p.hounsfield < 150))
    dz, dy = z - 5, y - 18
    cosine = (dz * direction[0] + dy * direction[1] + x * direction[2]) / np.sqrt(dz**2 + dy**2 + x**2 + 1)
    away = np.arccos(np.clip(cosine, -1, 1)) / np.radians(spread_deg)
    profile = 1 - away**2
    if not sharp:
        profile = np.sqrt(np.maximum(profile, 0))
    keep = (profile > 0.05) & (x * side > -1) & (z > -48)
    region, profile = region[keep], profile[keep]
    level = -depth.ravel()[region] / profile * p.rough(region, 0.08)
    return _grown(region, np.asarray(level, np.float32), volume_ml)


_SHAPES: Mapping[str, Callable[[_Place, float], Index]] = {
    "iph": _iph,
    "contusion": _contusion,
    "ivh": _ivh,
    "sah": _sah,
    "sdh": _sdh,
    "edh": _edh,
}

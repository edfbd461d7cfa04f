"""Simulated acute bleeding with voxel truth, painted into a composed head.

Attenuation of acute blood 55-80 HU and the forms of the five kinds after common neuroradiology teaching.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.signatures import FINDINGS
from serving.phantom.anatomy import HEAD_ORIGIN, HEAD_SHAPE, Bool, Float, atlas, axes, turned

KINDS = ("iph", "ivh", "sah", "sdh", "edh")
"""What can be asked for; `sdh` and `edh` share one channel of the truth."""

LABELS: Mapping[str, int] = {name: FINDINGS.index(name) for name in ("iph", "ivh", "sah")} | {
    "sdh": FINDINGS.index("edh_sdh"),
    "edh": FINDINGS.index("edh_sdh"),
}


def bleed(rng: np.random.Generator, hounsfield: Float, fluid: Float, kinds: Mapping[str, float]) -> NDArray[np.uint8]:
    """Paint bleeds of the given kinds and target volumes (ml) into `hounsfield` in place; returns labels, 0 = none.

    A label is the channel of herald.signatures.FINDINGS. `fluid` is the fraction of cerebrospinal fluid.
    """
    a = atlas()
    truth = np.zeros(HEAD_SHAPE, np.uint8)
    for kind, volume_ml in kinds.items():
        density = rng.uniform(55, 80)
        region, rim = {"iph": _iph, "ivh": _ivh, "sah": _sah, "sdh": _extra_axial, "edh": _extra_axial}[kind](
            rng, fluid, volume_ml, kind
        )
        texture = turned(rng, a.fine)
        if rim is not None:  # perifocal oedema
            hounsfield[rim & ~region] -= rng.uniform(4, 12)
        if kind == "sah":
            painted = fluid * density + (1 - fluid) * hounsfield + 2 * texture
            truth[region & (painted > 42)] = LABELS[kind]
            hounsfield[region] = np.maximum(painted, hounsfield)[region]
        else:
            clot = density + rng.uniform(1, 5) * texture
            soft = ndimage.gaussian_filter(region.astype(np.float32), 0.8)
            box = region & (hounsfield < 150)
            blend = np.where(hounsfield < 150, soft, 0)
            hounsfield += blend * (clot - hounsfield)
            truth[box] = LABELS[kind]
    return truth


def _grown_to(level: Float, allowed: Bool, volume_ml: float) -> Bool:
    """The voxels of lowest `level` within `allowed` that make up `volume_ml` (1 mm voxels)."""
    values = level[allowed]
    wanted = min(int(volume_ml * 1000), values.size)
    if wanted < 1:
        return np.zeros_like(allowed)
    threshold = np.partition(values, wanted - 1)[wanted - 1]
    region: Bool = allowed & (level <= threshold)
    return region


def _iph(rng: np.random.Generator, fluid: Float, volume_ml: float, kind: str) -> tuple[Bool, Bool | None]:
    """Intraparenchymal: an irregular lump, most often in the basal ganglia and thalamus, with oedema."""
    a = atlas()
    side = rng.choice([-1, 1])
    site = rng.choice(["ganglia", "thalamus", "lobar", "cerebellum", "pons"], p=[0.36, 0.16, 0.33, 0.1, 0.05])
    if site == "lobar":
        inside = np.flatnonzero((a.depth < -9) & (a.depth > -30) & (fluid < 0.2) & (axes()[0] > -20))
        index = np.array(np.unravel_index(rng.choice(inside), HEAD_SHAPE), dtype=float)
        centre = index + np.asarray(HEAD_ORIGIN)
    else:
        centre = np.array(
            {
                "ganglia": (4.0, -2.0, side * 27.0),
                "thalamus": (8.0, 18.0, side * 13.0),
                "cerebellum": (-36.0, 66.0, side * 24.0),
                "pons": (-34.0, 28.0, 0.0),
            }[site]
        ) + rng.normal(0, 2.5, 3)
    radii = rng.uniform(0.7, 1.5, 3)
    reach = (volume_ml * 1000 / 4.19) ** (1 / 3)
    level = _distance(centre, radii) * (1 + rng.uniform(0.05, 0.22) * turned(rng, atlas().coarse))
    near = _distance(centre, radii) < 3.0 * reach + 4
    region = _grown_to(level, near & (a.depth < -1.5) & (fluid < 0.7), volume_ml)
    region = ndimage.binary_opening(region) if volume_ml > 2 else region
    edge = float(level[region].max()) if region.any() else 0.0
    rim = (level < edge + rng.uniform(1, 8)) & (a.depth < -2) & (fluid < 0.3)
    return region, rim


def _distance(centre: NDArray[np.float64], radii: NDArray[np.float64]) -> Float:
    z, y, x = axes()
    squared = ((z - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((x - centre[2]) / radii[2]) ** 2
    distance: Float = np.sqrt(squared).astype(np.float32)
    return distance


def _ivh(rng: np.random.Generator, fluid: Float, volume_ml: float, kind: str) -> tuple[Bool, Bool | None]:
    """Intraventricular: fills the ventricles from their lowest (posterior) part, or as a cast of one side."""
    ventricle = ndimage.binary_dilation(atlas().ventricle) & (fluid > 0.35)
    z, y, x = axes()
    if rng.random() < 0.6:
        level = -y + 0 * x + 0 * z + 3 * turned(rng, atlas().coarse)
    else:
        level = np.abs(x - rng.uniform(-20, 20)) + 0.4 * np.abs(y - rng.uniform(0, 30)) + 0.3 * np.abs(z - 5)
    return _grown_to(level.astype(np.float32), ventricle, volume_ml), None


def _sah(rng: np.random.Generator, fluid: Float, volume_ml: float, kind: str) -> tuple[Bool, Bool | None]:
    """Subarachnoid: the fluid of basal cisterns, of a Sylvian fissure or of sulci over one convexity."""
    a = atlas()
    side = rng.choice([-1, 1])
    centre, radii = {
        "cisterns": ((-24.0, 0.0, 0.0), (1.0, 1.6, 1.8)),
        "sylvian": ((-8.0, -8.0, side * 42.0), (1.2, 1.6, 1.0)),
        "convexity": ((float(rng.uniform(20, 60)), float(rng.uniform(-50, 60)), side * 45.0), (1.0, 1.3, 0.9)),
    }[str(rng.choice(["cisterns", "sylvian", "convexity"], p=[0.45, 0.25, 0.3]))]
    space = (a.depth < 0.5) & (a.depth > -45) & (fluid > 0.3) & ~a.ventricle
    level = _distance(np.array(centre), np.array(radii)) * (1 + 0.2 * turned(rng, atlas().coarse))
    return _grown_to(level, space, volume_ml), None


def _extra_axial(rng: np.random.Generator, fluid: Float, volume_ml: float, kind: str) -> tuple[Bool, Bool | None]:
    """Epidural (a lens under the skull) and subdural (a crescent along it, or a layer on the falx)."""
    a = atlas()
    z, y, x = axes()
    side = rng.choice([-1, 1])
    if kind == "sdh" and rng.random() < 0.15:
        along = np.abs(x - side * 1.0) + 0.06 * np.abs(y - rng.uniform(-40, 60)) + 0.03 * np.abs(z - 40)
        layer = (
            (x * side >= -0.5) & (np.abs(x) < 8) & (z > 5) & (a.depth < 0) & (((y - 5) / 58) ** 2 + (z / 40) ** 2 > 1)
        )
        return _grown_to(along.astype(np.float32), layer, min(volume_ml, 15)), None
    angle, height = rng.uniform(0.15, 0.85) * np.pi, rng.uniform(-0.15, 0.75)
    direction = np.array([height, -np.cos(angle), side * np.sin(angle)])
    direction /= np.linalg.norm(direction)
    dz, dy, dx = z - 5, y - 18, x
    cosine = (dz * direction[0] + dy * direction[1] + dx * direction[2]) / np.sqrt(dz**2 + dy**2 + dx**2 + 1)
    spread = np.radians(rng.uniform(45, 75) if kind == "sdh" else rng.uniform(18, 32))
    away = np.arccos(np.clip(cosine, -1, 1)) / spread
    profile = np.sqrt(np.clip(1 - away**2, 0, 1)) if kind == "sdh" else np.clip(1 - away**2, 0, 1)
    level = np.where(profile > 0.05, -a.depth / np.maximum(profile, 0.05), 1e6) * (
        1 + 0.08 * turned(rng, atlas().coarse)
    )
    allowed = (a.depth < 0.3) & (a.depth > -30) & (away < 1) & (x * side > -1) & (z > -48)
    return _grown_to(level.astype(np.float32), allowed, volume_ml), None

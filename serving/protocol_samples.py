"""What the protocol model learns from: clean series drawn once, and samples drawn from them for every step.

Simulated series, and real heads that are turned, cropped, sharpened to bone kernels and given contrast medium. A sample
follows from the number of its step and the seed alone. The real DICOM series are for evaluation only.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.heads import TRIAGE_HEADS, Heads
from herald.signatures import PROTOCOL_IN_PLANE, PROTOCOL_SLICES
from herald.volume import AIR_HOUNSFIELD, Hounsfield
from serving import readers
from serving.phantom import CONTRAST_PHASES, OTHER_REGIONS, acquire, draw_acquisition, draw_findings, make_subject
from serving.phantom.anatomy import HEAD_ORIGIN, HEAD_SHAPE, Float, Subject, atlas
from serving.phantom.scanner import Acquisition, develop
from serving.progress import progress
from serving.public_sets import read_cranium

SEED = 2026
BATCH = 6  # small, for many steps in little time; large enough for batch normalisation over eight slices
HEAD_SUBJECTS, SERIES_PER_HEAD = 240, 6  # composing a head costs two seconds, scanning it a tenth
SKULL_SUBJECTS, SERIES_PER_SKULL = 4, 8  # plastic skulls, which quality assurance sends
OTHER_SUBJECTS, SERIES_PER_OTHER = 120, 6
PLANELESS = ("limb", "test_object")  # look much alike in every plane, so that their orientation is undefined
CRANIUM_VARIANTS, SERIES_PER_CRANIUM = 4, 12  # one real thin-slice head, so many warps of it
SERIES_PER_PATIENT = {"ct-ich": 8, "phe-sich": 2}  # PHE-SICH has lost what lies outside the brain window: fewer
WORKERS = 2  # cores
SHARES = {"head": 0.39, "other": 0.17, "skull": 0.06, "cranium": 0.09, "ct-ich": 0.21, "phe-sich": 0.08}
AVERAGED = 0.85  # of the samples as from a matrix of 512, by far the commonest; the others as from a smaller one
TRAINED_ON = {"ct-ich": (1, 2), "phe-sich": (0,)}  # patients by rank modulo 3; the others are held out


@dataclass(frozen=True, eq=False)
class Sample:
    """Eight slices before kernel and noise, (8, 256, 256), with what is known of them; None is not known."""

    image: NDArray[np.int16]
    contrast: str | None
    orientation: str
    region: str
    pixel_mm: float
    thickness_mm: float
    real: bool = False
    planeless: bool = False

    def labels(self, kernel: str) -> dict[str, str | None]:
        """The label of each head."""
        contrast = self.contrast if self.region == "head" else None  # of no interest in a body
        orientation = None if self.planeless else self.orientation
        return {"contrast": contrast, "orientation": orientation, "kernel": kernel, "region": self.region}

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """The slices with a kernel and noise of their own, and the label of each head, None where undefined."""
        kernel = "bone" if rng.random() < 0.42 else "soft"
        return finish(self, kernel, rng), self.labels(kernel)


# --- clean series, drawn once ----------------------------------------------------------------------------------------


def prepare(cache: Path, data: Path) -> dict[str, list[Sample]]:
    """Clean training series by kind; drawn on the first call (some ten minutes), then read from `cache`."""
    plan: dict[str, tuple[int, Callable[[int], list[Sample]]]] = {
        "head": (HEAD_SUBJECTS, lambda i: _simulated_series("head", i, SERIES_PER_HEAD, _draw_head)),
        "other": (OTHER_SUBJECTS, lambda i: _simulated_series("other", i, SERIES_PER_OTHER, _draw_other)),
        "skull": (SKULL_SUBJECTS, lambda i: _simulated_series("skull", i, SERIES_PER_SKULL, _draw_skull)),
    }
    if (data / "volumes" / "cranium.nii.gz").exists():
        draw = partial(_draw_cranium, data / "volumes" / "cranium.nii.gz")
        plan["cranium"] = (CRANIUM_VARIANTS, lambda i: _simulated_series("cranium", i, SERIES_PER_CRANIUM, draw))
    for source, series in SERIES_PER_PATIENT.items():
        if names := patients_of(data, source, held_out=False):
            plan[source] = (len(names), partial(_real_series, data, source, names, series))
    cache.mkdir(parents=True, exist_ok=True)
    return {kind: _pool(cache, kind, count, draw) for kind, (count, draw) in plan.items()}


_draw: Callable[[int], list[Sample]]  # of the pool being made; workers are forked, so that they inherit it


def _pool(cache: Path, kind: str, count: int, draw: Callable[[int], list[Sample]]) -> list[Sample]:
    index, pixels = cache / f"{kind}.json", cache / f"{kind}.npy"
    if not index.exists():
        global _draw
        _draw = draw
        atlas()  # built before the fork, shared after it
        samples = []
        with progress() as bar, get_context("fork").Pool(WORKERS) as workers:
            for some in bar.track(workers.imap(_run_draw, range(count)), total=count, description=f"drawing {kind}"):
                samples += some
        np.save(pixels, np.stack([sample.image for sample in samples]))
        facts = [{k: v for k, v in vars(sample).items() if k != "image"} for sample in samples]
        index.write_text(json.dumps(facts), encoding="utf-8")
    stored = np.load(pixels, mmap_mode="r")
    return [Sample(image, **fact) for image, fact in zip(stored, json.loads(index.read_text()), strict=True)]


def _run_draw(i: int) -> list[Sample]:
    return _draw(i)


def _simulated_series(
    kind: str, i: int, series: int, draw: Callable[[np.random.Generator, int], Subject]
) -> list[Sample]:
    """Some series of the i-th subject of a kind."""
    rng = np.random.default_rng((SEED, list(SHARES).index(kind), i))
    subject = replace(draw(rng, i), truth=None)
    planeless = kind == "other" and _other_region(i) in PLANELESS
    return [replace(_clean(rng, subject, kind), planeless=planeless) for _ in range(series)]


def _real_series(data: Path, source: str, names: Sequence[str], series: int, i: int) -> list[Sample]:
    """Some series drawn from the i-th patient of a real set."""
    rng = np.random.default_rng((SEED, list(SHARES).index(source), i))
    patient = read_patient(data, source, names[i])
    return [draw_real(patient, rng) for _ in range(series)]


def _draw_skull(rng: np.random.Generator, i: int) -> Subject:
    return make_subject(rng, region="skull")


def _draw_head(rng: np.random.Generator, i: int) -> Subject:
    if i % 2:
        return make_subject(rng, contrast=str(rng.choice(CONTRAST_PHASES, p=[0.45, 0.25, 0.3])))
    return make_subject(rng, findings=draw_findings(rng) if i % 4 else None)


def _draw_other(rng: np.random.Generator, i: int) -> Subject:
    return make_subject(rng, region=_other_region(i), contrast=str(rng.choice(["non_contrast", "venous"])))


def _other_region(i: int) -> str:
    """What the i-th subject that is no head is: trunks as often as everything else together."""
    return "trunk" if i % 2 else OTHER_REGIONS[1:][i // 2 % (len(OTHER_REGIONS) - 1)]


def _draw_cranium(path: Path, rng: np.random.Generator, i: int) -> Subject:
    cranium = cranium_subject(path)
    if i % 2 == 0:
        return cranium
    hounsfield = cranium.hounsfield.astype(np.float32)
    hounsfield += iodine(rng, hounsfield, atlas().arteries, atlas().veins, atlas().depth < 0)
    return replace(cranium, hounsfield=np.clip(hounsfield, -1024, 3071).astype(np.int16), contrast="contrast")


def _clean(rng: np.random.Generator, subject: Subject, kind: str) -> Sample:
    """Scan without kernel and noise, which every later use draws anew."""
    orientation = str(rng.choice(["axial", "coronal", "sagittal"], p=[0.4, 0.3, 0.3]))
    drawn = draw_acquisition(rng, subject, orientation=orientation, slices=PROTOCOL_SLICES, matrix=PROTOCOL_IN_PLANE)
    drawn = replace(drawn, warp_mm=drawn.warp_mm + (2 if subject.region == "head" else 4), circle=False)
    image = acquire(subject, drawn, rng, noisy=False).volume.hounsfield
    return Sample(
        image=image,
        contrast=subject.contrast if kind != "skull" else None,
        orientation=orientation,
        region=subject.region,
        pixel_mm=drawn.field_mm / PROTOCOL_IN_PLANE,
        thickness_mm=drawn.thickness_mm,
    )


# --- real heads ------------------------------------------------------------------------------------------------------


def cranium_subject(path: Path) -> Subject:
    """The thin-slice head on the head grid of the atlas, roughly aligned to it."""
    volume = read_cranium(path)
    zyx, dz, (dy, dx) = volume.hounsfield, volume.slice_spacing_mm, volume.pixel_spacing_mm
    fit = fit_to_atlas(zyx, dz)
    scale = np.array([1 / dz, 1 / dy, 1 / dx])
    middle = np.array([(fit.top - 86.0 / dz), (fit.front + 99.0 / dy), (fit.left + fit.right) / 2])  # where mm are 0
    matrix = np.diag(scale)
    offset = middle + np.asarray(HEAD_ORIGIN) * scale
    grid = ndimage.affine_transform(zyx, matrix, offset, HEAD_SHAPE, order=1, cval=AIR_HOUNSFIELD)
    low = max(HEAD_ORIGIN[0], -middle[0] * dz)
    return Subject(grid, None, HEAD_ORIGIN, 1.0, (float(low) + 4, 86.0), 225.0, "head", "non_contrast")


@dataclass(frozen=True)
class Fit:
    """Where the skull lies in a stack, in voxels: vertex slice, front and back rows, left and right columns."""

    top: float
    front: float
    back: float
    left: float
    right: float


def fit_to_atlas(stack: NDArray[np.int16], spacing_mm: float) -> Fit:
    """Bounding box of the skull over the upper head, good to about a centimetre: enough to place vessels."""
    bone = ndimage.binary_opening(stack[:, ::3, ::3] > 250, structure=np.ones((1, 2, 2), bool))
    filled = bone.sum(axis=(1, 2))
    top = int(np.flatnonzero(filled > 0.15 * filled.max())[-1])
    upper = bone[max(0, top - int(75 / spacing_mm)) : max(1, top - int(20 / spacing_mm))]
    rows, columns = np.flatnonzero(upper.any((0, 2))) * 3.0, np.flatnonzero(upper.any((0, 1))) * 3.0
    ends = [float(np.percentile(v, q)) for v in (rows, columns) for q in (2, 98)]
    return Fit(float(top), *ends)


def iodine(
    rng: np.random.Generator, hounsfield: Float, arteries: Float, veins: Float, brain: NDArray[np.bool_]
) -> Float:
    """What contrast medium adds to a real head, from filling fractions of the atlas' vessels on the same grid."""
    phase = str(rng.choice(CONTRAST_PHASES, p=[0.45, 0.25, 0.3]))
    arterial, venous, tissue = (
        rng.uniform(*span)
        for span in {
            "arterial": ((150, 450), (10, 150), (1, 4)),
            "venous": ((80, 200), (110, 260), (3, 7)),
            "delayed": ((45, 110), (60, 130), (3, 8)),
        }[phase]
    )
    soft = (hounsfield > -40) & (hounsfield < 120)
    rise = np.where(brain, tissue, 3 * tissue).astype(np.float32)
    np.maximum(rise, arteries * np.float32(arterial), out=rise)
    np.maximum(rise, veins * np.float32(venous), out=rise)
    result: Float = np.where(soft, rise, 0)
    return result


@dataclass(frozen=True, eq=False)
class Patient:
    """A real stack of axial slices of a head without contrast: (D, H, W) and its fit to the atlas."""

    name: str
    stack: Hounsfield
    spacing_mm: float
    pixel_mm: float
    child: bool | None = None

    @cached_property
    def fit(self) -> Fit:
        """Where the skull lies."""
        return fit_to_atlas(self.stack, self.spacing_mm)


def patients_of(data: Path, source: str, held_out: bool) -> list[str]:
    """Names of the training patients of a real set, or of those kept from training; none where the set is absent."""
    folder, patients, _ = readers.SETS[source]
    if not (data / folder).exists():
        return []
    return [name for i, name in enumerate(patients(data / folder)) if (i % 3 not in TRAINED_ON[source]) == held_out]


def read_patient(data: Path, source: str, name: str) -> Patient:
    """One patient of a real set."""
    folder, _, read = readers.SETS[source]
    labelled = read(data / folder, name)
    volume = labelled.volume
    return Patient(name, volume.hounsfield, volume.slice_spacing_mm, volume.pixel_spacing_mm[0], labelled.child)


def draw_real(patient: Patient, rng: np.random.Generator) -> Sample:
    """Eight slices of a real head in one of three planes: turned, cropped and moved, half of them with contrast."""
    depth = len(patient.stack)
    orientation = str(rng.choice(["axial", "coronal", "sagittal"], p=[0.84, 0.08, 0.08]))
    fit = patient.fit
    field = max(fit.back - fit.front, fit.right - fit.left) * rng.uniform(1.12, 1.6)
    ramp = ((np.arange(PROTOCOL_IN_PLANE, dtype=np.float32) + 0.5) / PROTOCOL_IN_PLANE - 0.5) * np.float32(field)
    down, right = np.meshgrid(ramp, ramp, indexing="ij")
    angle = np.radians(np.clip(rng.normal(0, 9), -28, 28))
    down, right = (
        (np.cos(angle) * down + np.sin(angle) * right).astype(np.float32),
        (np.cos(angle) * right - np.sin(angle) * down).astype(np.float32),
    )
    if rng.random() < 0.5:
        right = -right
    middle = np.array([(fit.front + fit.back) / 2, (fit.left + fit.right) / 2]) + rng.normal(0, 0.03 * field, 2)
    per_slice = patient.spacing_mm / patient.pixel_mm  # in-plane pixels that one slice spans
    index = np.empty((3, PROTOCOL_SLICES, PROTOCOL_IN_PLANE, PROTOCOL_IN_PLANE), np.float32)
    if orientation == "axial":
        low = 0.0 if rng.random() < 0.5 else rng.uniform(0, 0.25)
        high = 1.0 if rng.random() < 0.6 else rng.uniform(0.75, 1)
        chunks = int(rng.integers(1, 5))
        picks = np.linspace(low * (depth - 1), high * (depth - 1), PROTOCOL_SLICES * chunks)
        index[0] = picks[rng.integers(chunks) :: chunks].round()[:, None, None]
        index[1], index[2] = middle[0] + down, middle[1] + right
    else:
        across = np.linspace(-0.42, 0.42, PROTOCOL_SLICES) * rng.uniform(0.6, 1)
        height = fit.top - 75 / patient.spacing_mm + down / np.float32(per_slice) * -1
        index[0] = height
        span, fixed, free = (fit.back - fit.front, 1, 2) if orientation == "coronal" else (fit.right - fit.left, 2, 1)
        centre = {1: middle[0], 2: middle[1]}
        index[fixed] = (centre[fixed] + across * span)[:, None, None]
        index[free] = centre[free] + right
    image = _lookup(patient.stack, index, AIR_HOUNSFIELD)
    contrast = "non_contrast"
    if rng.random() < 0.42:
        contrast = "contrast"
        image += _painted(patient, image, index, rng)
    return Sample(
        image=np.rint(image).astype(np.int16),
        contrast=contrast,
        orientation=orientation,
        region="head",
        pixel_mm=float(field * patient.pixel_mm / PROTOCOL_IN_PLANE),
        thickness_mm=patient.spacing_mm,
        real=True,
    )


def _lookup(grid: NDArray[np.int16 | np.float32], index: Float, outside: float) -> Float:
    out = np.empty(index.shape[1:], np.float32)
    for i in range(len(out)):
        ndimage.map_coordinates(grid, index[:, i], out[i], order=1, mode="constant", cval=outside, prefilter=False)
    return out


def _painted(patient: Patient, image: Float, index: Float, rng: np.random.Generator) -> Float:
    """Contrast for the sampled planes: the atlas' vessels where the patient's skull says they should be."""
    fit = patient.fit
    jitter = rng.normal(0, 4, 3).astype(np.float32)
    at = np.empty_like(index)
    at[0] = 86 - (fit.top - index[0]) * patient.spacing_mm
    at[1] = (index[1] - fit.front) / (fit.back - fit.front) * 194 - 82
    at[2] = (index[2] - fit.left) / (fit.right - fit.left) * 156 - 78
    for axis in range(3):
        at[axis] += jitter[axis] - np.float32(HEAD_ORIGIN[axis])
    arteries, veins = _lookup(atlas().arteries, at, 0), _lookup(atlas().veins, at, 0)
    return iodine(rng, image, arteries, veins, _lookup(atlas().depth, at, 50) < 0)


# --- from clean slices to training samples ---------------------------------------------------------------------------


def finish(sample: Sample, kernel: str, rng: np.random.Generator) -> NDArray[np.int16]:
    """Apply a kernel, its noise, and what scanners, archives and exports do to Hounsfield units."""
    image = sample.image.astype(np.float32)
    thickness = max(sample.thickness_mm, 0.75)
    already = 0.6 if sample.real else 1.0  # real slices bring noise of their own
    soft = kernel == "soft"
    low_dose = rng.random() < 0.15
    level = rng.uniform(1.2, 8 if low_dose else 5) * already if soft else rng.uniform(9, 65)
    image = develop(
        image,
        Acquisition(
            orientation=sample.orientation,
            kernel=kernel,
            matrix=PROTOCOL_IN_PLANE,
            field_mm=sample.pixel_mm * PROTOCOL_IN_PLANE,
            thickness_mm=thickness,
            noise=float(level * (5 / thickness) ** rng.uniform(0.25, 0.5)),
            blur_mm=float(rng.uniform(0, 0.8)) if soft else 0.0,
            sharpen=0.0 if soft else float(rng.uniform(0.2, 2.0)),
            streaks=float(rng.uniform(0, 8)),
            averaged=bool(rng.random() < AVERAGED),
        ),
        rng,
    )
    if soft and rng.random() < 0.25:  # mild edge enhancement of ordinary head kernels
        image += rng.uniform(0.1, 0.4) * (image - ndimage.uniform_filter(image, (0, 3, 3)))
    inside = image > -500
    image[inside] = image[inside] * rng.uniform(0.97, 1.03) + rng.normal(0, 2.5)
    if rng.random() < 0.25:  # outside the reconstruction circle
        ramp = np.linspace(-1, 1, PROTOCOL_IN_PLANE, dtype=np.float32)
        image[:, ramp[:, None] ** 2 + ramp[None, :] ** 2 > 1] = AIR_HOUNSFIELD
    if rng.random() < 0.12:  # 8-bit exports and clipped archives
        image = np.clip(image, *((-20, 100), (-1000, 1000), (0, 3071), (-200, 2000), (-20, 100))[rng.integers(5)])
        if rng.random() < 0.5:
            image[image <= -19] = AIR_HOUNSFIELD
    image = np.clip(np.rint(image), AIR_HOUNSFIELD, rng.choice([3071, 3071, 8000]))
    if rng.random() < 0.5:
        image = image[:, :, ::-1]
    if sample.orientation != "axial" and rng.random() < 0.5:  # reformats come in either order
        image = image[::-1]
    return np.ascontiguousarray(image).astype(np.int16)


Batch = tuple[NDArray[np.int16], dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]


class Drawable(Protocol):
    """A series from which training samples are drawn: a `Sample` or a `SiteSeries`."""

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """Eight slices, (8, 256, 256), and the labels that are known, by head."""


class Source:
    """All training series by kind; `batch(i)` draws the batch of step i from the seed and i alone."""

    def __init__(
        self,
        pools: Mapping[str, Sequence[Drawable]],
        heads: Heads = TRIAGE_HEADS,
        shares: Mapping[str, float] = SHARES,
        seed: int = SEED,
        batch: int = BATCH,
    ) -> None:
        """`shares` says how often each kind is drawn from; kinds without series are left out."""
        self.pools, self.heads, self.seed, self.size = pools, heads, seed, batch
        self.kinds = [kind for kind in shares if pools.get(kind)]
        of_kinds = np.array([shares[kind] for kind in self.kinds])
        self.shares = of_kinds / of_kinds.sum()

    def sample(self, rng: np.random.Generator) -> tuple[NDArray[np.int16], Mapping[str, str | None]]:
        """One training sample: eight slices and the label of each head, None where undefined."""
        pool = self.pools[str(rng.choice(self.kinds, p=self.shares))]
        return pool[int(rng.integers(len(pool)))].draw(rng)

    def batch(self, step: int) -> Batch:
        """Volumes (B, 8, 256, 256), one-hot labels and weights by head; weight 0 where a label is undefined."""
        drawn = [self.sample(np.random.default_rng((self.seed, 99, step, k))) for k in range(self.size)]
        targets = {name: np.zeros((self.size, len(head.classes)), np.float32) for name, head in self.heads.items()}
        weights = {name: np.zeros(self.size, np.float32) for name in self.heads}
        for row, (_, known) in enumerate(drawn):
            for name, head in self.heads.items():
                if (label := known.get(name)) in head.classes:
                    targets[name][row, head.classes.index(label)] = 1
                    weights[name][row] = 1
        return np.stack([volume for volume, _ in drawn]), targets, weights

"""What the haemorrhage model learns from: prepared patients, and crops drawn from them, changed at random.

The data are prepared once through `herald.volume.detection_input` and `herald.cranium`, exactly as the node does. Every
batch follows from the seed and its number alone, so that a run that was cut short goes on as if it had not been.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import keras  # type: ignore[import-untyped]
import numpy as np
from keras import ops
from numpy.typing import NDArray
from PIL import Image

from herald.cranium import cavity_depth, detector_view
from herald.errors import ConfigError
from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from herald.volume import Placement, detection_input, slabs
from serving.drawn import PX, Cavity, brighten_rim, draw_bleed, draw_calcification, move_bleed, widen_furrows
from serving.phantom import draw_findings, simulate
from serving.progress import progress
from serving.public_sets import PUBLIC_SETS
from serving.readers import SETS, UNKNOWN, LabelledVolume, anywhere

FOLDS = 5
CROPS = 8  # crops of a step, of as many patients or places: neighbouring slices teach little that is new
OUTPUT_SLICES = 2  # slices of a crop that are learned from; the four around them are context
PRETRAINING = {"phe-sich": 0.7, "simulated": 0.3}  # shares of crops; no patient of the set that tells how good it is
SHARES = {"ct-ich": 0.75, "phe-sich": 0.13, "simulated": 0.12}  # most from the set that holds both classes
POSITIVE_SHARE = 0.55  # of crops that are drawn around a positive slice; the kinds of bleed in equal parts
DRAWN_SHARE = 0.15  # of the other crops that get a bleed, drawn or moved there from another patient
MOVED_SHARE = 0.3  # of those, moved
CALCIFIED_SHARE = 0.08  # of all crops
KEPT_IN_MEMORY = 300  # patients of some 10 MB
RIM_SHARE = 0.25  # of all crops, made brighter under the skull: what `detector_view` leaves is uneven
AGED_SHARE = 0.4  # of all crops, given the wide furrows of old age: most patients of CT-ICH are young
SIMULATED_SEED = 20
WORTH_PROCESSES = 8  # patients to prepare: a process takes some seconds to import Keras
SIMULATED = 48  # heads to learn from, half of them bleeding; one takes some five seconds to prepare
BONE_HOUNSFIELD = 150
LEAST_SEEN_MM2 = 20.0  # of a simulated bleed in a slice: of less nobody could say whether it is there
HELD_OUT_SIMULATED, HELD_OUT_FROM = 40, 1000  # other ones, to measure on
CROSS_VALIDATED = "ct-ich"  # the real set with and without bleeding: every figure on it is out of fold
SAME_PATIENTS = {"ct-ich-nifti": "ct-ich", "bhsd": "rsna-2019"}
ALL_SETS = {**SETS, **PUBLIC_SETS}
KNOWN = ("source", "patient", "slice_truth", "study_truth", "child")

# Augmentation. One crop is changed as a whole; every set alike, so that the look of a set does not give its label away.
ROTATION_DEG, SCALE, SHIFT_PX = 45.0, 0.10, 10.0 * PX  # children and the unconscious lie as they lie
HOUNSFIELD_SHIFT, HOUNSFIELD_SCALE = 5.0, 0.06
NOISE_HOUNSFIELD, BLUR_SHARE = 6.0, 0.3
SATURATED_SHARE = 0.2  # of crops whose values beyond a brain window are lost, as they are in PHE-SICH
JPEG_SHARE = 0.5  # of crops of the sets that are not JPEG already, as CT-ICH is


@dataclass(frozen=True, eq=False)
class Pixels:
    """One patient as the model sees it; bit c of `positive` and `unknown` is finding c.

    `volume` (D, N, N) int16, `positive` and `unknown` (D, N, N) uint8, `depth` (D, N, N) uint8 as
    `herald.cranium.cavity_depth` finds it.
    """

    volume: NDArray[np.int16]
    positive: NDArray[np.uint8]
    unknown: NDArray[np.uint8]
    depth: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What is known of one patient, `slice_truth` (D, C) and `study_truth` (C,), and pixels, read when asked for."""

    source: str
    patient: str
    slice_truth: NDArray[np.uint8]
    study_truth: NDArray[np.uint8]
    child: bool
    read: Callable[[], Pixels]

    @property
    def pixels(self) -> Pixels:
        """Read now, or lately."""
        return self.read()


def prepare(labelled: LabelledVolume) -> Prepared:
    """Average thin slices, cut volume and truth to the square around the head, show it as the node does."""
    thick = slabs(labelled.volume)
    volume, placement = detection_input(thick.volume)
    truth, slice_truth = labelled.truth, labelled.slice_truth
    if len(thick.members) < len(truth):
        slice_truth = np.stack([anywhere(slice_truth[list(m)]) for m in thick.members])
        truth = np.stack([anywhere(truth[list(m)]) for m in thick.members])
    truth = _nearest(truth, placement)
    pixels = Pixels(
        volume=detector_view(volume),
        positive=np.packbits(truth == 1, axis=-1, bitorder="little")[..., 0],
        unknown=np.packbits(truth == UNKNOWN, axis=-1, bitorder="little")[..., 0],
        depth=cavity_depth(volume),
    )
    study_truth = anywhere(labelled.slice_truth) if labelled.study_truth is None else labelled.study_truth
    return Prepared(labelled.source, labelled.patient, slice_truth, study_truth, bool(labelled.child), lambda: pixels)


def _nearest(truth: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
    """`truth` (D, H, W, C) sampled where `detection_input` samples Hounsfield units; 0 outside."""
    step = (np.arange(DETECTION_IN_PLANE) + 0.5) * placement.side / DETECTION_IN_PLANE - 0.5
    rows, columns = np.rint(placement.top + step).astype(int), np.rint(placement.left + step).astype(int)
    inside = np.ix_((rows >= 0) & (rows < truth.shape[1]), (columns >= 0) & (columns < truth.shape[2]))
    out = np.zeros((len(truth), DETECTION_IN_PLANE, DETECTION_IN_PLANE, truth.shape[3]), dtype=np.uint8)
    rows, columns = np.clip(rows, 0, truth.shape[1] - 1), np.clip(columns, 0, truth.shape[2] - 1)
    for plane, source in zip(out, truth, strict=True):
        plane[inside] = source[rows[:, None], columns[None, :]][inside]
    return out


def simulated_patient(seed: int) -> LabelledVolume:
    """A simulated head in slices of about 5 mm; every second seed bleeds."""
    rng = np.random.default_rng((SIMULATED_SEED, seed))
    findings = draw_findings(rng) if seed % 2 else {}
    series = simulate(50_000 + seed, findings=findings, matrix=384, thickness_mm=5.0, spacing_mm=5.0,
                      slices=int(rng.integers(26, 33)))  # fmt: skip
    truth = series.truth.astype(np.uint8)
    truth[series.volume.hounsfield > BONE_HOUNSFIELD] = 0  # blood beside bone, lost in its blur
    area_mm2 = truth.sum(axis=(1, 2)) * np.prod(series.volume.pixel_spacing_mm)
    slice_truth = np.where(area_mm2 >= LEAST_SEEN_MM2, 1, np.where(area_mm2 > 0, UNKNOWN, 0)).astype(np.uint8)
    return LabelledVolume("simulated", f"{seed:04d}", series.volume, truth, slice_truth)


def read_labelled(data: Path, source: str, patient: str) -> LabelledVolume | None:
    """A patient of a set or a simulated one; None where the set is not in `data`."""
    if source == "simulated":
        return simulated_patient(int(patient))
    folder, _, read = ALL_SETS[source]
    return read(data / folder, patient) if (data / folder).exists() else None


def load_patients(data: Path, work: Path, source: str) -> list[Prepared]:
    """All patients of one set, or all simulated heads, prepared now or read from the cache in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    if source == "simulated":
        seeds = [*range(SIMULATED), *range(HELD_OUT_FROM, HELD_OUT_FROM + HELD_OUT_SIMULATED)]
        readers = {f"{i:04d}": partial(simulated_patient, i) for i in seeds}
    else:
        folder, names, read = ALL_SETS[source]
        readers = {name: partial(read, data / folder, name) for name in names(data / folder)}
    paths = {name: work / f"{source}_{name}.npz" for name in readers}
    missing = {path: readers[name] for name, path in paths.items() if not path.exists()}
    if missing:
        with progress() as bar, _workers(len(missing)) as pool:
            task = bar.add_task(f"preparing {source}", total=len(missing))
            for _ in pool.map(_prepare_to, missing.values(), missing):
                bar.advance(task)
    return [_stored(path) for path in paths.values()]


def _workers(patients: int) -> Executor:
    """Processes, one for each processor, where there are enough patients to be worth their start."""
    processors = len(os.sched_getaffinity(0))
    if processors == 1 or patients < WORTH_PROCESSES:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(processors, get_context("forkserver"))


def _prepare_to(read: Callable[[], LabelledVolume], path: Path) -> None:
    """Prepare one patient and keep it under `path`, whole or not at all."""
    ready = prepare(read())
    partly = path.with_suffix(f".{os.getpid()}.partly.npz")  # two runs may prepare at once
    np.savez(partly, **{name: getattr(ready, name) for name in KNOWN}, **vars(ready.pixels))
    partly.rename(path)


def _stored(path: Path) -> Prepared:
    """A patient of the cache: RSNA 2019 as a whole would fill 200 GB of memory with pixels."""
    with np.load(path) as file:
        return Prepared(
            str(file["source"]),
            str(file["patient"]),
            file["slice_truth"],
            file["study_truth"],
            bool(file["child"]),
            partial(_pixels, path),
        )


@lru_cache(KEPT_IN_MEMORY)
def _pixels(path: Path) -> Pixels:
    with np.load(path) as file:
        return Pixels(file["volume"], file["positive"], file["unknown"], file["depth"])


def bleeds(patient: Prepared) -> bool:
    """Whether it is known to, be it not where."""
    return bool(patient.study_truth[0] == 1)


def identity(patient: Prepared) -> tuple[str, str]:
    """Who it is: two sets that show the same patients name them alike."""
    return SAME_PATIENTS.get(patient.source, patient.source), patient.patient


def fold_of(patients: Sequence[Prepared], folds: int = FOLDS) -> dict[tuple[str, str], int]:
    """Which of `folds` holds whom, by `identity`: dealt out in turn, set by set, positives and negatives apart."""
    dealt: dict[tuple[str, str], int] = {}
    whether: dict[tuple[str, str], bool] = {}
    for p in patients:
        whether[identity(p)] = whether.get(identity(p), False) or bleeds(p)
    for family in dict.fromkeys(name for name, _ in whether):
        for positive in (True, False):
            group = [who for who, bleeding in whether.items() if who[0] == family and bleeding == positive]
            dealt.update({who: i % folds for i, who in enumerate(group)})
    return dealt


def split(patients: Sequence[Prepared], fold: int | None, folds: int = FOLDS) -> tuple[list[Prepared], list[Prepared]]:
    """Who is learned from, and who is kept aside and measured, in one of `folds`; None keeps nobody of CT-ICH aside.

    CT-ICH is cross-validated. Of every other set the pretraining has seen all but those of fold 0 of FOLDS, and
    of simulated heads those below HELD_OUT_FROM: the rest is kept aside always, and measured by the model of fold 0.
    """
    dealt, always = fold_of(patients, folds), fold_of(patients)
    learned, aside = [], []
    for p in patients:
        if identity(p)[0] == CROSS_VALIDATED:
            (aside if dealt[identity(p)] == fold else learned).append(p)
        elif always[identity(p)] if p.source != "simulated" else int(p.patient) < HELD_OUT_FROM:
            learned.append(p)
        elif not fold:
            aside.append(p)
    return learned, aside


Crop = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]


class Sampler:
    """Draws crops (volume with context, positive, unknown, slice_truth) with classes, sets and kinds in balance."""

    def __init__(self, patients: Sequence[Prepared], seed: int, shares: Mapping[str, float] = SHARES) -> None:
        self.seed = seed
        self.patients = {source: [p for p in patients if p.source == source] for source in shares}
        self.sources = [source for source in shares if self.patients[source]]
        if not self.sources:
            raise ConfigError(f"nobody to learn from in {', '.join(shares)}; name sets of which there are patients")
        of_sources = np.array([shares[source] for source in self.sources])
        self.shares = of_sources / of_sources.sum()
        self.donors = [p for p in patients if (p.slice_truth[:, 0] == 1).any() and p.source != "simulated"]

    def crop(self, rng: np.random.Generator) -> Crop:
        """One crop of OUTPUT_SLICES slices and the two on either side; edges of the scan are repeated."""
        patients = self.patients[str(rng.choice(self.sources, p=self.shares))]
        kinds = [c for c in range(len(FINDINGS)) if any((p.slice_truth[:, c] == 1).any() for p in patients)]
        if kinds and rng.random() < POSITIVE_SHARE:
            kind = int(rng.choice(kinds[1:] or kinds))
            bleeding = [p for p in patients if (p.slice_truth[:, kind] == 1).any()]
            patient = bleeding[rng.integers(len(bleeding))]
            drawn, middle = False, int(rng.choice(np.flatnonzero(patient.slice_truth[:, kind] == 1)))
        else:
            clean = [p for p in patients if not p.slice_truth[:, 0].any()]
            patient = (clean or patients)[rng.integers(len(clean or patients))]
            quiet = np.flatnonzero(patient.slice_truth[:, 0] == 0)
            drawn, middle = bool(clean) and rng.random() < DRAWN_SHARE, int(rng.choice(quiet if len(quiet) else [0]))
        around = _around(patient, middle - int(rng.integers(OUTPUT_SLICES)))
        pixels, truth = patient.pixels, patient.slice_truth[around]
        volume, positive = pixels.volume[around].astype(np.float32), pixels.positive[around]
        unknown, inside = pixels.unknown[around], Cavity(pixels.depth[around])
        if rng.random() < CALCIFIED_SHARE and not positive.any():  # nor does it cover blood
            volume = draw_calcification(rng, volume, inside)
        if drawn and (bleed := self._bleed(rng, volume, inside, middle / len(patient.slice_truth))) is not None:
            volume, positive, doubtful = bleed
            truth, unknown = truth_of(positive, doubtful)
        if rng.random() < AGED_SHARE:
            volume = widen_furrows(rng, volume, inside, (positive | unknown) > 0)
        if rng.random() < RIM_SHARE:
            volume = brighten_rim(rng, volume, inside)
        if patient.source != "ct-ich" and rng.random() < JPEG_SHARE:
            volume = _as_jpeg(volume, int(rng.integers(70, 96)))
        return volume, positive[2:-2], unknown[2:-2], truth[2:-2]

    def _bleed(
        self, rng: np.random.Generator, volume: NDArray[np.float32], inside: Cavity, height: float
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8]] | None:
        """Blood drawn into a crop around `height` (0 to 1 of the scan), or moved there from another patient."""
        if not self.donors or rng.random() >= MOVED_SHARE:
            return draw_bleed(rng, volume, inside)
        donor = self.donors[rng.integers(len(self.donors))]
        around = _around(donor, round(height * len(donor.slice_truth)) - int(rng.integers(OUTPUT_SLICES)))
        pixels = donor.pixels
        blood = pixels.volume[around].astype(np.float32)
        return move_bleed(rng, volume, inside, blood, pixels.positive[around], pixels.unknown[around])

    def batch(self, index: int) -> tuple[NDArray[np.generic], ...]:
        """The crops of one step, stacked; the same for the same seed and index."""
        rng = np.random.default_rng((self.seed, index))
        return tuple(np.stack(part) for part in zip(*(self.crop(rng) for _ in range(CROPS)), strict=True))

    def batches(self, first: int, end: int) -> Iterator[tuple[NDArray[np.generic], ...]]:
        """The batches of steps `first` to `end` - 1, each drawn while the one before is learned from."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.batch, first)
            for index in range(first, end):
                current, following = following.result(), pool.submit(self.batch, index + 1)
                yield current


def _around(patient: Prepared, start: int) -> NDArray[np.intp]:
    """Indices of the slices of a crop that is learned from `start` on, with its context."""
    return np.clip(np.arange(start - 2, start + OUTPUT_SLICES + 2), 0, len(patient.slice_truth) - 1)


def truth_of(positive: NDArray[np.uint8], doubtful: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Slice truth (D, C) and `unknown` bits (D, H, W) of a drawn bleed: doubtful slices count neither way."""
    bits = 1 << np.arange(len(FINDINGS))
    truth = ((np.bitwise_or.reduce(positive, axis=(1, 2))[:, None] & bits) > 0).astype(np.uint8)
    truth[(doubtful[:, None] & bits) > 0] = UNKNOWN
    return truth, np.broadcast_to(doubtful[:, None, None], positive.shape)


def _as_jpeg(hounsfield: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """Give the brain window of each slice the look of JPEG."""
    low, width = -20.0, 120.0
    out = hounsfield.copy()
    for plane in out:
        grey = np.clip((plane - low) * (255 / width), 0, 255).astype(np.uint8)
        file = BytesIO()
        Image.fromarray(grey).save(file, "JPEG", quality=quality)
        within = (grey > 0) & (grey < 255)
        plane[within] = np.asarray(Image.open(file), dtype=np.float32)[within] * (width / 255) + low
    return out


Tensor = keras.KerasTensor


def augment(
    volume: Tensor, positive: Tensor, unknown: Tensor, random: keras.random.SeedGenerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Change crops (B, D, H, W) in geometry, scale of grey and sharpness; masks follow the geometry."""
    batch = ops.shape(volume)[0]
    each = (batch, 1, 1, 1)

    def uniform(low: float, high: float, shape: tuple[int, ...]) -> Tensor:
        return keras.random.uniform(shape, low, high, seed=random)

    angle = (
        np.deg2rad(ROTATION_DEG) * uniform(-1, 1, (batch,)) ** 3
    )  # two in three within 13 degrees: most lie straight
    scale, shift = uniform(1 - SCALE, 1 + SCALE, (batch, 2)), uniform(-SHIFT_PX, SHIFT_PX, (batch, 2))
    flip = ops.where(uniform(0, 1, (batch,)) < 0.5, -1.0, 1.0)
    centre = (DETECTION_IN_PLANE - 1) / 2
    a, b = ops.cos(angle) * scale[:, 0] * flip, -ops.sin(angle) * scale[:, 1]
    c, d = ops.sin(angle) * scale[:, 0] * flip, ops.cos(angle) * scale[:, 1]
    x0 = centre + shift[:, 0] - a * centre - b * centre
    y0 = centre + shift[:, 1] - c * centre - d * centre
    nothing = ops.zeros_like(a)
    transforms = ops.stack([a, b, x0, c, d, y0, nothing, nothing], axis=-1)  # (B, 8), output to input

    def moved(x: Tensor, interpolation: str, fill: float) -> Tensor:
        depth = x.shape[1]
        images = ops.reshape(ops.cast(x, "float32"), (-1, DETECTION_IN_PLANE, DETECTION_IN_PLANE, 1))
        images = ops.image.affine_transform(
            images, ops.repeat(transforms, depth, axis=0), interpolation, "constant", fill, "channels_last"
        )
        return ops.reshape(images, (-1, depth, DETECTION_IN_PLANE, DETECTION_IN_PLANE))

    volume = moved(volume, "bilinear", -1024.0)
    positive = ops.cast(moved(positive, "nearest", 0.0), "int32")
    unknown = ops.cast(moved(unknown, "nearest", 0.0), "int32")

    low, high = uniform(-30, -10, each), uniform(90, 110, each)
    saturated = ops.where(volume > high, 700.0, volume)
    saturated = ops.where(volume < low, ops.where(volume < -300, -1024.0, -100.0), saturated)
    volume = ops.where(uniform(0, 1, each) < SATURATED_SHARE, saturated, volume)
    volume = volume * uniform(1 - HOUNSFIELD_SCALE, 1 + HOUNSFIELD_SCALE, each)
    volume = volume + uniform(-HOUNSFIELD_SHIFT, HOUNSFIELD_SHIFT, each)
    images = ops.reshape(volume, (-1, DETECTION_IN_PLANE, DETECTION_IN_PLANE, 1))
    blurred = ops.reshape(ops.average_pool(images, 3, 1, "same", "channels_last"), ops.shape(volume))
    volume = ops.where(uniform(0, 1, each) < BLUR_SHARE, (volume + blurred) / 2, volume)
    noise = keras.random.normal(ops.shape(volume), seed=random)
    return volume + noise * uniform(0, NOISE_HOUNSFIELD, each) * uniform(0, 1, each), positive, unknown

"""Train, evaluate and calibrate the haemorrhage model: `python -m serving.train hemorrhage`.

    --fold K      train without the patients of fold K and score them     (weights and scores in .work)
    --all         train on every patient                                  (serving/weights/hemorrhage.weights.h5)
    --score K     score the patients of fold K with weights that are there   (default: the shipped ones)
    --evaluate    pool the scores of the folds, calibrate, measure        (serving/weights/hemorrhage.json)
                  and report them with pictures, never to be committed    (--report, .work/hemorrhage/report.html)

The data are prepared once through `herald.volume.detection_input`, which is exactly what the node sends. Every run
repeats from its seed, as far as the threads of the CPU allow.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # type: ignore[import-untyped]
import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.special import expit

from herald.errors import ConfigError
from herald.signatures import CONTEXT_SLICES, FINDINGS, IN_PLANE
from herald.volume import Placement, detection_input
from serving.evaluation import auc, bootstrap_interval, dice, operating_point, platt, wilson
from serving.evaluation_report import Case, picture, report, worst_cases, write_report
from serving.hemorrhage import WEIGHTS, build
from serving.phantom import draw_findings, simulate
from serving.readers import SETS, UNKNOWN, LabelledVolume

CALIBRATION = WEIGHTS.with_name("hemorrhage.json")

SEED = 20
FOLDS = 3  # each leaves 27 or 28 of the 41 CT-ICH patients to learn from; more folds cost more time than they tell
STEPS = 160  # about five minutes on two idle cores of a server's CPU
CROPS = 3  # crops of a step: few, so that steps are many
OUTPUT_SLICES = 8  # slices of a crop that are learned from; the four around them are context
LEARNING_RATE = 2e-3  # the highest at which batches this small stay stable
WARM_UP = 25  # steps; normalisation must see some batches first
WEIGHT_DECAY = 1e-4
FINE_TUNING_RATE = 5e-4  # when a run starts from trained weights
SAVE_EVERY = 20  # steps, so that a run that is cut short leaves something
SHARES = {"ct-ich": 0.6, "phe-sich": 0.22, "simulated": 0.18}  # of crops: most from the set that holds both classes
POSITIVE_SHARE = 0.6  # of crops that are drawn around a positive slice; the kinds of bleed in equal parts
SIMULATED = 16  # heads, half of them bleeding
VOXEL_POSITIVE_WEIGHT = 3.0  # blood is 1 voxel in 500
FINDING_WEIGHTS = (1.0, 0.4, 0.3, 0.4, 0.5)  # `any` decides whether somebody is paged
DICE_WEIGHT, VOXEL_WEIGHT, SLICE_WEIGHT, POOLED_WEIGHT = 0.5, 4.0, 0.5, 0.7
TARGET_SENSITIVITY = 0.95  # of studies, out of fold: missing a bleed is worse than an extra look ...
LEAST_SPECIFICITY = 0.9  # ... but a reader who is paged for every fifth healthy patient stops looking
SMOOTHING = (0.25, 0.5, 0.25)  # over neighbouring slices, since blood rarely fills just one

# Augmentation. One crop is changed as a whole; every set alike, so that the look of a set does not give its label away.
ROTATION_DEG, SCALE, SHIFT_PX, PERSPECTIVE = 25.0, 0.12, 10.0, 2e-4
HOUNSFIELD_SHIFT, HOUNSFIELD_SCALE = 4.0, 0.06
NOISE_HOUNSFIELD, BLUR_SHARE = 6.0, 0.3
SATURATED_SHARE = 0.6  # of crops whose values beyond a brain window are lost, as they are in PHE-SICH
JPEG_SHARE = 0.5  # of crops of the sets that are not JPEG already, as CT-ICH is


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Prepared:
    """One patient as the model sees it; bit c of `positive` and `unknown` is finding c.

    `volume` (D, 256, 256) int16, `positive` and `unknown` (D, 256, 256) uint8, `slice_truth` (D, C) uint8.
    """

    source: str
    patient: str
    volume: NDArray[np.int16]
    positive: NDArray[np.uint8]
    unknown: NDArray[np.uint8]
    slice_truth: NDArray[np.uint8]
    child: bool


def prepare(labelled: LabelledVolume) -> Prepared:
    """Cut volume and truth to the square around the head."""
    volume, placement = detection_input(labelled.volume)
    truth = _nearest(labelled.truth, placement)
    return Prepared(
        source=labelled.source,
        patient=labelled.patient,
        volume=volume,
        positive=np.packbits(truth == 1, axis=-1, bitorder="little")[..., 0],
        unknown=np.packbits(truth == UNKNOWN, axis=-1, bitorder="little")[..., 0],
        slice_truth=labelled.slice_truth,
        child=bool(labelled.child),
    )


def _nearest(truth: NDArray[np.uint8], placement: Placement) -> NDArray[np.uint8]:
    """`truth` (D, H, W, C) sampled where `detection_input` samples Hounsfield units; 0 outside."""
    step = (np.arange(IN_PLANE) + 0.5) * placement.side / IN_PLANE - 0.5
    rows, columns = np.rint(placement.top + step).astype(int), np.rint(placement.left + step).astype(int)
    inside = np.ix_((rows >= 0) & (rows < truth.shape[1]), (columns >= 0) & (columns < truth.shape[2]))
    out = np.zeros((len(truth), IN_PLANE, IN_PLANE, truth.shape[3]), dtype=np.uint8)
    rows, columns = np.clip(rows, 0, truth.shape[1] - 1), np.clip(columns, 0, truth.shape[2] - 1)
    for plane, source in zip(out, truth, strict=True):
        plane[inside] = source[rows[:, None], columns[None, :]][inside]
    return out


def simulated_patient(seed: int) -> LabelledVolume:
    """A simulated head in slices of about 5 mm; every second seed bleeds."""
    rng = np.random.default_rng((SEED, seed))
    findings = draw_findings(rng) if seed % 2 else {}
    series = simulate(50_000 + seed, findings=findings, matrix=384, thickness_mm=5.0, spacing_mm=5.0,
                      slices=int(rng.integers(26, 33)))  # fmt: skip
    truth = series.truth.astype(np.uint8)
    slice_truth = (truth.sum(axis=(1, 2)) > 8).astype(np.uint8)
    return LabelledVolume("simulated", f"{seed:04d}", series.volume, truth, slice_truth)


def load_patients(data: Path, work: Path, source: str) -> list[Prepared]:
    """All patients of one set, prepared now or read from the cache in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    if source == "simulated":
        readers = {f"{i:04d}": partial(simulated_patient, i) for i in range(SIMULATED)}
    else:
        folder, names, read = SETS[source]
        readers = {name: partial(read, data / folder, name) for name in names(data / folder)}
    missing = {name: read for name, read in readers.items() if not (work / f"{source}_{name}.npz").exists()}
    if missing:
        with progress() as bar:
            for name, read in bar.track(missing.items(), description=f"preparing {source}"):
                partly = work / f"{source}_{name}.partly.npz"
                np.savez(partly, **vars(prepare(read())))
                partly.rename(work / f"{source}_{name}.npz")
    loaded = []
    for name in readers:
        with np.load(work / f"{source}_{name}.npz") as file:
            fields = {name: file[name] for name in file.files}
        fields.update(source=source, patient=str(fields["patient"]), child=bool(fields["child"]))
        loaded.append(Prepared(**fields))
    return loaded


def fold_of(patients: Sequence[Prepared]) -> dict[tuple[str, str], int]:
    """Which fold holds which patient: dealt out in turn, positives and negatives apart."""
    folds: dict[tuple[str, str], int] = {}
    for positive in (True, False):
        group = [p for p in patients if bool((p.slice_truth[:, 0] == 1).any()) == positive]
        folds.update({(p.source, p.patient): i % FOLDS for i, p in enumerate(group)})
    return folds


Crop = tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]


class Sampler:
    """Draws crops (volume with context, positive, unknown, slice_truth) with classes, sets and kinds in balance."""

    def __init__(self, patients: Sequence[Prepared], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.patients = {source: [p for p in patients if p.source == source] for source in SHARES}
        self.sources = [source for source in SHARES if self.patients[source]]
        shares = np.array([SHARES[source] for source in self.sources])
        self.shares = shares / shares.sum()

    def crop(self) -> Crop:
        """One crop of OUTPUT_SLICES slices and the two on either side; edges of the scan are repeated."""
        rng = self.rng
        patients = self.patients[str(rng.choice(self.sources, p=self.shares))]
        middle = None
        if rng.random() < POSITIVE_SHARE:
            kinds = [c for c in range(1, len(FINDINGS)) if any((p.slice_truth[:, c] == 1).any() for p in patients)]
            kind = int(rng.choice(kinds))
            bleeding = [p for p in patients if (p.slice_truth[:, kind] == 1).any()]
            patient = bleeding[rng.integers(len(bleeding))]
            middle = int(rng.choice(np.flatnonzero(patient.slice_truth[:, kind] == 1)))
        else:
            clean = [p for p in patients if not (p.slice_truth[:, 0] != 0).any()] or patients
            patient = clean[rng.integers(len(clean))]
            quiet = np.flatnonzero(patient.slice_truth[:, 0] == 0)
            middle = int(rng.choice(quiet))
        start = middle - int(rng.integers(OUTPUT_SLICES))
        last = len(patient.volume) - 1
        around = np.clip(np.arange(start - 2, start + OUTPUT_SLICES + 2), 0, last)
        inner = around[2:-2]
        volume = patient.volume[around].astype(np.float32)
        if patient.source != "ct-ich" and rng.random() < JPEG_SHARE:
            volume = _as_jpeg(volume, int(rng.integers(70, 96)))
        return volume, patient.positive[inner], patient.unknown[inner], patient.slice_truth[inner]

    def batch(self) -> tuple[NDArray[np.generic], ...]:
        """CROPS crops, stacked."""
        return tuple(np.stack(part) for part in zip(*(self.crop() for _ in range(CROPS)), strict=True))

    def batches(self, count: int) -> Iterator[tuple[NDArray[np.generic], ...]]:
        """`count` batches, each drawn while the one before is learned from."""
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self.batch)
            for _ in range(count):
                current, following = following.result(), pool.submit(self.batch)
                yield current


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


def augment(
    volume: tf.Tensor, positive: tf.Tensor, unknown: tf.Tensor, seed: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Change crops (B, D, H, W) in geometry, scale of grey and sharpness; masks follow the geometry."""
    batch = tf.shape(volume)[0]

    def uniform(index: int, low: float, high: float, shape: tuple[tf.Tensor | int, ...]) -> tf.Tensor:
        return tf.random.stateless_uniform(shape, seed + tf.constant([0, index]), low, high)

    angle = uniform(0, -np.deg2rad(ROTATION_DEG), np.deg2rad(ROTATION_DEG), (batch,))
    scale = uniform(1, 1 - SCALE, 1 + SCALE, (batch, 2))
    shift = uniform(2, -SHIFT_PX, SHIFT_PX, (batch, 2))
    bend = uniform(3, -PERSPECTIVE, PERSPECTIVE, (batch, 2))
    flip = tf.where(uniform(4, 0, 1, (batch,)) < 0.5, -1.0, 1.0)
    centre = (IN_PLANE - 1) / 2
    a, b = tf.cos(angle) * scale[:, 0] * flip, -tf.sin(angle) * scale[:, 1]
    c, d = tf.sin(angle) * scale[:, 0] * flip, tf.cos(angle) * scale[:, 1]
    x0 = centre + shift[:, 0] - a * centre - b * centre
    y0 = centre + shift[:, 1] - c * centre - d * centre
    transforms = tf.stack([a, b, x0, c, d, y0, bend[:, 0], bend[:, 1]], axis=-1)  # (B, 8), output to input

    def moved(x: tf.Tensor, interpolation: str, fill: float) -> tf.Tensor:
        depth = tf.shape(x)[1]
        images = tf.reshape(tf.cast(x, tf.float32), (-1, IN_PLANE, IN_PLANE, 1))
        images = tf.raw_ops.ImageProjectiveTransformV3(
            images=images,
            transforms=tf.repeat(transforms, depth, axis=0),
            output_shape=(IN_PLANE, IN_PLANE),
            interpolation=interpolation,
            fill_mode="CONSTANT",
            fill_value=fill,
        )
        return tf.reshape(images, (batch, depth, IN_PLANE, IN_PLANE))

    volume = moved(volume, "BILINEAR", -1024.0)
    positive = tf.cast(moved(positive, "NEAREST", 0.0), tf.int32)
    unknown = tf.cast(moved(unknown, "NEAREST", 0.0), tf.int32)

    each = (batch, 1, 1, 1)
    low, high = uniform(5, -30, -10, each), uniform(6, 90, 110, each)
    saturated = tf.where(volume > high, 700.0, volume)
    saturated = tf.where(volume < low, tf.where(volume < -300, -1024.0, -100.0), saturated)
    volume = tf.where(uniform(7, 0, 1, each) < SATURATED_SHARE, saturated, volume)
    volume = volume * uniform(8, 1 - HOUNSFIELD_SCALE, 1 + HOUNSFIELD_SCALE, each)
    volume += uniform(9, -HOUNSFIELD_SHIFT, HOUNSFIELD_SHIFT, each)
    images = tf.reshape(volume, (-1, IN_PLANE, IN_PLANE, 1))
    blurred = tf.reshape(tf.nn.avg_pool2d(images, 3, 1, "SAME"), tf.shape(volume))
    volume = tf.where(uniform(10, 0, 1, each) < BLUR_SHARE, (volume + blurred) / 2, volume)
    noise = tf.random.stateless_normal(tf.shape(volume), seed + tf.constant([0, 11]))
    return volume + noise * uniform(12, 0, NOISE_HOUNSFIELD, each) * uniform(13, 0, 1, each), positive, unknown


# --- learning --------------------------------------------------------------------------------------------------------


def loss(outputs: dict[str, tf.Tensor], positive: tf.Tensor, unknown: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
    """Dice and cross-entropy of voxels, cross-entropy of slices by both routes; what is UNKNOWN counts nothing."""
    weights = tf.constant(FINDING_WEIGHTS)
    bits = tf.constant([1 << c for c in range(len(FINDINGS))])
    depth, rows, columns = outputs["mask"].shape[1:-1]
    coarse = tf.nn.avg_pool2d(tf.reshape(outputs["mask"], (-1, rows, columns, len(FINDINGS))), 2, 2, "VALID")
    mask = tf.reshape(coarse, (-1, depth, rows // 2, columns // 2, len(FINDINGS)))  # a quarter of the work
    positive, unknown = positive[:, :, ::2, ::2], unknown[:, :, ::2, ::2]
    voxel = tf.cast(tf.bitwise.bitwise_and(positive[..., None], bits) > 0, tf.float32)  # (B, D, H / 2, W / 2, C)
    known = tf.cast(tf.bitwise.bitwise_and(unknown[..., None], bits) == 0, tf.float32)
    entropy = tf.nn.weighted_cross_entropy_with_logits(voxel, mask, VOXEL_POSITIVE_WEIGHT) * known
    voxel_loss = tf.reduce_mean(entropy, axis=(0, 1, 2, 3))  # (C,)
    probability = tf.sigmoid(mask) * known
    voxel *= known
    overlap = tf.reduce_sum(probability * voxel, axis=(0, 1, 2, 3))
    size = tf.reduce_sum(probability, axis=(0, 1, 2, 3)) + tf.reduce_sum(voxel, axis=(0, 1, 2, 3))
    present = tf.cast(tf.reduce_sum(voxel, axis=(0, 1, 2, 3)) > 0, tf.float32)
    dice = (1 - (2 * overlap + 50) / (size + 50)) * present
    slice_known = tf.cast(truth != UNKNOWN, tf.float32)
    slice_target = tf.cast(truth == 1, tf.float32)
    total = DICE_WEIGHT * dice + VOXEL_WEIGHT * voxel_loss
    for output, weight in (("slice", SLICE_WEIGHT), ("pooled", POOLED_WEIGHT)):
        entropy = tf.nn.sigmoid_cross_entropy_with_logits(slice_target, outputs[output]) * slice_known
        total += weight * tf.reduce_sum(entropy, axis=(0, 1)) / tf.maximum(tf.reduce_sum(slice_known, axis=(0, 1)), 1)
    return tf.reduce_sum(total * weights)


def train(
    patients: Sequence[Prepared],
    weights: Path,
    steps: int,
    seed: int,
    label: str,
    start: Path | None = None,
    rate: float | None = None,
) -> None:
    """Train from scratch, or from the weights `start`, and write `weights`."""
    keras.utils.set_random_seed(seed)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")  # halves the step where the CPU has AMX or AVX512-BF16
    model = build(slices=OUTPUT_SLICES + CONTEXT_SLICES - 1)
    keras.mixed_precision.set_global_policy("float32")
    if start is not None:
        model.load_weights(start)
    rate = rate or (LEARNING_RATE if start is None else FINE_TUNING_RATE)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 20, max(steps - WARM_UP, 1), alpha=0.02, warmup_target=rate, warmup_steps=WARM_UP
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY, clipnorm=2.0)
    optimizer.build(model.trainable_variables)

    @tf.function  # type: ignore[untyped-decorator]
    def step(
        volume: tf.Tensor, positive: tf.Tensor, unknown: tf.Tensor, truth: tf.Tensor, index: tf.Tensor
    ) -> tf.Tensor:
        volume, positive, unknown = augment(volume, positive, unknown, tf.stack([seed, index * 100]))
        with tf.GradientTape() as tape:
            value = loss(model(volume, training=True), positive, unknown, truth)
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        return value

    smooth = None
    weights.parent.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        task = bar.add_task(label, total=steps)
        for i, batch in enumerate(Sampler(patients, seed).batches(steps)):
            value = float(step(*(tf.constant(part) for part in batch), tf.constant(i)))
            smooth = value if smooth is None else 0.97 * smooth + 0.03 * value
            bar.update(task, advance=1, description=f"{label} loss {smooth:.3f}")
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == steps:
                model.save_weights(weights)
                bar.console.print(f"{label}: step {i + 1} of {steps}, loss {smooth:.3f}")


def progress() -> Progress:
    """A progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


# --- scores ----------------------------------------------------------------------------------------------------------


def raw_scores(model: keras.Model, volume: NDArray[np.int16]) -> dict[str, NDArray[np.float32]]:
    """Logits of a whole study (D, 256, 256): `slice` and `pooled` (D, C), `mask` (D, 256, 256, C)."""
    padded = np.pad(volume, ((2, 2), (0, 0), (0, 0)), mode="edge")[None].astype(np.float32)
    return {name: np.asarray(value)[0] for name, value in model(padded, training=False).items()}


def score(weights: Path, patients: Sequence[Prepared], out: Path, label: str) -> None:
    """Score `patients` with `weights`; one npz per patient in `out`, with Dice of `any` where a mask is known."""
    model = build()
    model.load_weights(weights)
    out.mkdir(parents=True, exist_ok=True)
    with progress() as bar:
        for p in bar.track(patients, description=label):
            raw = raw_scores(model, p.volume)
            predicted, truth = raw["mask"][..., 0] > 0, (p.positive & 1) > 0
            known = (p.unknown & 1) == 0
            np.savez(
                out / f"{p.source}_{p.patient}.npz",
                slice=raw["slice"],
                pooled=raw["pooled"],
                slice_truth=p.slice_truth,
                child=p.child,
                dice=dice(predicted & known, truth & known),
                outlined=truth.any(axis=(1, 2)),
                found=np.packbits(predicted, axis=-1),
            )


def slice_logits(slice_head: NDArray[np.float32], pooled: NDArray[np.float32]) -> NDArray[np.float64]:
    """The uncalibrated logit of each slice: the mean of both routes, smoothed over neighbouring slices, (D, C)."""
    mean = (slice_head.astype(np.float64) + pooled) / 2
    padded = np.pad(mean, ((1, 1), (0, 0)), mode="edge")
    return SMOOTHING[0] * padded[:-2] + SMOOTHING[1] * padded[1:-1] + SMOOTHING[2] * padded[2:]


def scored(folder: Path) -> list[dict[str, object]]:
    """What `score` wrote for each study of the folds in `folder`, with its `logits` (D, C)."""
    studies = []
    for path in sorted(folder.glob("fold*/*.npz")):
        with np.load(path) as file:
            fields = {name: file[name] for name in file.files}
        fields["source"], _, fields["patient"] = path.stem.rpartition("_")
        fields["logits"] = slice_logits(fields["slice"], fields["pooled"])
        studies.append(fields)
    return studies


def evaluate(folder: Path) -> dict[str, object]:
    """Calibration and metrics from the scores of folds in `folder`; raises ConfigError where there are none."""
    studies = scored(folder)
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("fold*/run.json"))]
    mixed = [s for s in studies if s["source"] == "ct-ich"]
    if not mixed:
        raise ConfigError(f"no scores in {folder}; run --fold 0, --fold 1 and --fold 2 first")

    thresholds, scales = [], []
    for c in range(len(FINDINGS)):
        study_score = np.array([s["logits"][:, c].max() for s in mixed])
        study_truth = np.array([(s["slice_truth"][:, c] == 1).any() for s in mixed])
        slices = np.concatenate([s["logits"][:, c] for s in mixed])
        truth = np.concatenate([s["slice_truth"][:, c] == 1 for s in mixed])
        thresholds.append(operating_point(study_score, study_truth, TARGET_SENSITIVITY, LEAST_SPECIFICITY))
        scales.append(float(np.clip(platt(slices, truth)[0], 0.5, 2.0)) if truth.any() else 1.0)
    metrics: dict[str, object] = {}
    for name, group in (
        ("ct-ich", mixed),
        ("ct-ich adults", [s for s in mixed if not s["child"]]),
        ("ct-ich children", [s for s in mixed if s["child"]]),
        ("phe-sich", [s for s in studies if s["source"] == "phe-sich"]),
        ("simulated", [s for s in studies if s["source"] == "simulated"]),
    ):
        if group:
            metrics[name] = _metrics(group, thresholds)
    return {
        "findings": list(FINDINGS),
        "scale": scales,
        "threshold": thresholds,
        "smoothing": list(SMOOTHING),
        "obtained": f"patients kept aside from training, {len(runs)} of {FOLDS} folds",
        "runs": runs,
        "metrics": metrics,
    }


def _metrics(studies: Sequence[dict[str, NDArray[np.generic]]], thresholds: Sequence[float]) -> dict[str, object]:
    out: dict[str, object] = {"patients": len(studies)}
    for c, finding in enumerate(FINDINGS):
        score_ = np.array([s["logits"][:, c].max() for s in studies])
        truth = np.array([(s["slice_truth"][:, c] == 1).any() for s in studies])
        if not truth.any():
            continue
        found = score_ >= thresholds[c]
        row: dict[str, object] = {
            "positive": int(truth.sum()),
            "sensitivity": wilson(int((found & truth).sum()), int(truth.sum())),
        }
        if not truth.all():
            row["specificity"] = wilson(int((~found & ~truth).sum()), int((~truth).sum()))
            row["patient_auc"] = [auc(score_, truth), *bootstrap_interval(score_, truth)]
        known = [s["slice_truth"][:, c] != UNKNOWN for s in studies]
        slices = np.concatenate([s["logits"][k, c] for s, k in zip(studies, known, strict=True)])
        slice_truth = np.concatenate([s["slice_truth"][k, c] == 1 for s, k in zip(studies, known, strict=True)])
        owner = np.concatenate([np.full(k.sum(), i) for i, k in enumerate(known)])
        if slice_truth.any() and not slice_truth.all():
            row["slice_auc"] = [auc(slices, slice_truth), *bootstrap_interval(slices, slice_truth, owner)]
            row["slices"] = len(slices)
        out[finding] = row
    overlaps = np.concatenate([s["dice"][s["outlined"].astype(bool)] for s in studies])
    if len(overlaps):
        out["dice_of_outlined_slices"] = float(overlaps.mean())
    return out


TASKS = ("any bleeding", *(finding.upper().replace("_", "/") for finding in FINDINGS[1:]))


def cases(folder: Path, calibration: dict[str, object], data: Path) -> list[Case]:
    """Every study and every slice whose truth is known as a case; volumes and the worst ones' pictures from `data`."""
    scale, threshold = np.array(calibration["scale"]), np.array(calibration["threshold"])
    studies = {(s["source"], s["patient"]): s for s in scored(folder)}
    out: list[Case] = []
    with progress() as bar:
        for (source, patient), s in bar.track(studies.items(), description="reading truth"):
            labelled = read_labelled(data, source, patient)
            out += _cases_of(s, expit(scale * (s["logits"] - threshold)), labelled)
        pictured: dict[int, Case] = {}
        for source in {case.source for case in out}:
            worst = worst_cases(case for case in out if case.source == source)
            for case in bar.track(worst, description=f"drawing the worst of {source}"):
                labelled = read_labelled(data, source, case.patient)
                if labelled is not None:
                    pictured[id(case)] = _pictured(case, studies[source, case.patient], prepare(labelled))
    return [pictured.get(id(case), case) for case in out]


def read_labelled(data: Path, source: str, patient: str) -> LabelledVolume | None:
    """A patient of a set or a simulated one; None where the set is not in `data`."""
    if source == "simulated":
        return simulated_patient(int(patient))
    folder, _, read = SETS[source]
    return read(data / folder, patient) if (data / folder).exists() else None


def _cases_of(
    study: dict[str, object], probability: NDArray[np.floating], labelled: LabelledVolume | None
) -> list[Case]:
    present = study["slice_truth"] == 1
    child = bool(study["child"]) if study["source"] == "ct-ich" else None  # the other sets do not say
    volume_ml, spacing = [None] * len(FINDINGS), None
    if labelled is not None:
        child = labelled.child
        spacing = labelled.volume.slice_spacing_mm
        voxel_ml = labelled.volume.slice_extents_mm * np.prod(labelled.volume.pixel_spacing_mm) / 1000
        millilitres = voxel_ml @ (labelled.truth == 1).sum(axis=(1, 2))
        unsure = (labelled.truth == UNKNOWN).any(axis=(0, 1, 2))
        volume_ml = [None if blurred else float(ml) for ml, blurred in zip(millilitres, unsure, strict=True)]
    known = {
        "source": study["source"],
        "patient": study["patient"],
        "simulated": study["source"] == "simulated",
        "child": child,
        "thickness_mm": spacing,
    }
    out = []
    for c, task in enumerate(TASKS):
        bleeds = bool(present[:, c].any())
        out.append(
            Case(
                task=task,
                truth="bleeding" if bleeds else "none",
                probability=_two_classes(probability[:, c].max()),
                kinds=tuple(TASKS[k] for k in range(1, len(TASKS)) if present[:, k].any()) if not c else (),
                volume_ml=volume_ml[c] if bleeds else None,
                **known,
            )
        )
        for i in np.flatnonzero(study["slice_truth"][:, c] != UNKNOWN):
            out.append(
                Case(
                    task=f"{task}, by slice",
                    truth="bleeding" if present[i, c] else "none",
                    probability=_two_classes(probability[i, c]),
                    unit="slice",
                    name=str(i + 1),
                    dice=float(study["dice"][i]) if not c and study["outlined"][i] else None,
                    **known,
                )
            )
    return out


def _two_classes(positive: float) -> dict[str, float]:
    return {"none": 1 - float(positive), "bleeding": float(positive)}


def _pictured(case: Case, study: dict[str, object], patient: Prepared) -> Case:
    """With the slice that holds most of the blood, or else the one that the model likes least."""
    finding = TASKS.index(case.task)
    truth = (patient.positive >> finding) & 1 > 0
    i = int(np.argmax(truth.sum(axis=(1, 2)) if truth.any() else study["logits"][:, finding]))
    outlines, shows = [(truth[i], (70, 170, 255))], f"slice {i + 1}{'; blue: truth' if truth[i].any() else ''}"
    if "found" in study:
        outlines.append((np.unpackbits(study["found"][i], axis=-1) > 0, (255, 64, 160)))
        shows += "; pink: model"
    return replace(case, picture=picture(patient.volume[i], outlines), picture_shows=shows)


# --- command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score, evaluate as asked."""
    parser = argparse.ArgumentParser(prog="python -m serving.train hemorrhage", description=__doc__.split("\n")[0])
    parser.add_argument("--fold", type=int, choices=range(FOLDS), help="train without this fold, then score it")
    parser.add_argument(
        "--score", type=int, choices=range(FOLDS), help="only score this fold, with the weights there are"
    )
    parser.add_argument("--all", action="store_true", help="train on every patient and write the shipped weights")
    parser.add_argument("--evaluate", action="store_true", help="pool the folds' scores, calibrate, measure")
    parser.add_argument("--prepare", action="store_true", help="only prepare the data")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path(".work/hemorrhage"), help="cache and scores")
    parser.add_argument("--weights", type=Path, help="where to write the weights instead")
    parser.add_argument("--report", type=Path, help="page of --evaluate (default: report.html in the folder of --work)")
    parser.add_argument("--start", type=Path, help="weights to start from, instead of from scratch")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, help="highest learning rate, instead of the usual one")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    if not (args.all or args.evaluate or args.prepare) and args.fold is None and args.score is None:
        parser.error("say what to do: --fold K, --score K, --all, --evaluate or --prepare")
    if args.prepare or args.all or args.fold is not None:
        patients = [p for source in SHARES for p in load_patients(args.data, args.work / "data", source)]
    if args.fold is not None:
        folds = fold_of(patients)
        kept = [p for p in patients if folds[p.source, p.patient] != args.fold or p.source == "simulated"]
        aside = [p for p in patients if folds[p.source, p.patient] == args.fold and p.source != "simulated"]
        weights = args.weights or args.work / f"fold{args.fold}.weights.h5"
        scores = args.work / "scores" / f"fold{args.fold}"
        train(kept, weights, args.steps, args.seed + args.fold, f"fold {args.fold}", args.start, args.rate)
        score(weights, aside, scores, f"scoring fold {args.fold}")
        run = {"fold": args.fold, "steps": args.steps, "seed": args.seed + args.fold, "trained_on": len(kept)}
        (scores / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    elif args.score is not None:
        real = [p for source in SETS for p in load_patients(args.data, args.work / "data", source)]
        folds = fold_of(real)
        aside = [p for p in real if folds[p.source, p.patient] == args.score]
        weights = args.weights or WEIGHTS
        scores = args.work / "scores" / f"fold{args.score}"
        score(weights, aside, scores, f"scoring fold {args.score}")
        run = {"fold": args.score, "weights": weights.name}
        (scores / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    if args.all:
        train(patients, args.weights or WEIGHTS, args.steps, args.seed, "all patients", args.start, args.rate)
    if args.evaluate:
        result = evaluate(args.work / "scores")
        CALIBRATION.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        Console(stderr=True).print_json(json.dumps(result))
        page = args.report or args.work / "report.html"
        about = {
            "Obtained": result["obtained"],
            "Truth": "CT-ICH: experts' outlines, no pixel size given, so that ml are rough; PHE-SICH: experts' boxes",
            "Operating point": "chosen on CT-ICH as a whole, so that its sensitivity and specificity are optimistic",
        }
        write_report(page, *report(cases(args.work / "scores", result, args.data), "Haemorrhage: evaluation", about))
        Console(stderr=True).print(f"figures by type and volume, with pictures: {page}")

"""Score patients that were kept aside, calibrate on them and measure: what `--evaluate` of the training does."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import keras  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from herald.discrimination import auc
from herald.errors import ConfigError
from herald.outline import OUTLINED, outlined
from herald.signatures import FINDINGS
from serving.crops import ALL_SETS, CROSS_VALIDATED, Prepared, prepare, read_labelled
from serving.evaluation import auc_interval, dice, operating_point, platt, wilson
from serving.evaluation_report import Case, picture, worst_cases
from serving.hemorrhage import build
from serving.progress import progress
from serving.readers import UNKNOWN, LabelledVolume

TARGET_SENSITIVITY = 0.95  # of studies, out of fold: missing a bleed is worse than an extra look ...
LEAST_SPECIFICITY = 0.9  # ... but a reader who is paged for every fifth healthy patient stops looking
POOLED_SHARE = 0.75  # of the pooled voxel logits in a slice's logit; the slice head is the weaker of the two
SMOOTHING = (0.25, 0.5, 0.25)  # over neighbouring slices, since blood rarely fills just one
SHIPPED = "shipped"
"""Folder of what the shipped weights say of the studies that nobody learned from."""
RANGES = "ranges.json"
"""Beside the scores, the ranges of activations with which the weights were rounded to eight bits for them."""
RANGED = 24
"""Studies that were learned from, of every set, whose activations give the ranges."""
MASK_OFFSETS = (-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0)
"""Of voxel logits, one of which fits the outlines best."""


def raw_scores(model: keras.Model, volume: NDArray[np.int16]) -> dict[str, NDArray[np.float32]]:
    """Logits of a whole study (D, N, N): `slice` and `pooled` (D, C), `mask` (D, N, N, C)."""
    padded = np.pad(volume, ((2, 2), (0, 0), (0, 0)), mode="edge")[None].astype(np.float32)
    return {name: np.asarray(value)[0] for name, value in model(padded, training=False).items()}


def as_served(
    model: keras.Model, learned: Sequence[Prepared]
) -> tuple[Callable[[NDArray[np.int16]], dict[str, NDArray[np.float32]]], dict[str, float]]:
    """`raw_scores` of `model` in eight bits, as it is exported, and the ranges of its activations in `learned`."""
    import tensorflow as tf  # type: ignore[import-untyped]  # which training itself does without on other backends

    from serving.whole_volume import EightBits, forward, observed_ranges, padded

    chosen = dict.fromkeys(np.linspace(0, len(learned) - 1, RANGED).round().astype(int).tolist())
    ranges = observed_ranges(model, (learned[i].pixels.volume for i in chosen))
    run = tf.function(forward(model, EightBits(ranges)), autograph=False, reduce_retracing=True)

    def raw_scores_served(volume: NDArray[np.int16]) -> dict[str, NDArray[np.float32]]:
        raw = run(padded(tf.constant(volume, tf.float32)))
        raw["mask"] = tf.nn.depth_to_space(raw["mask"], 2)
        return {name: value.numpy() for name, value in raw.items()}

    return raw_scores_served, ranges


def score(weights: Path, patients: Sequence[Prepared], out: Path, label: str, learned: Sequence[Prepared]) -> None:
    """Score `patients` with `weights`, which `learned` from others, in eight bits, as they would be served.

    One npz per patient in `out`, with Dice of `any` where a mask is known, and RANGES.
    """
    model = build()
    model.load_weights(weights)
    raw_scores_served, ranges = as_served(model, learned)
    out.mkdir(parents=True, exist_ok=True)
    (out / RANGES).write_text(json.dumps(ranges, indent=2) + "\n", encoding="utf-8")
    for former in out.glob("*.npz"):  # of other weights, or of who was kept aside then
        former.unlink()
    with progress() as bar:
        for p in bar.track(patients, description=label):
            pixels = p.pixels
            raw = raw_scores_served(pixels.volume)
            voxel, truth = raw["mask"][..., 0], (pixels.positive & 1) > 0
            known = (pixels.unknown & 1) == 0
            found = np.stack([_outlined(voxel - offset) for offset in MASK_OFFSETS])
            np.savez(
                out / f"{p.source}_{p.patient}.npz",
                slice=raw["slice"],
                pooled=raw["pooled"],
                slice_truth=p.slice_truth,
                study_truth=p.study_truth,
                child=p.child,
                dice=np.stack([dice(blood & known, truth & known) for blood in found]),
                outlined=truth.any(axis=(1, 2)),
                found=np.packbits(found, axis=-1),
            )


def _outlined(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """What the node outlines of the voxel logits (D, N, N) of one kind, as they are served."""
    mask = np.rint(expit(logits) * 255).astype(np.uint8)
    return outlined(mask[..., None])[..., 0] >= OUTLINED


def slice_logits(slice_head: NDArray[np.float32], pooled: NDArray[np.float32]) -> NDArray[np.float64]:
    """The uncalibrated logit of each slice: the mean of both routes, smoothed over neighbouring slices, (D, C)."""
    mean = (1 - POOLED_SHARE) * slice_head.astype(np.float64) + POOLED_SHARE * pooled
    padded = np.pad(mean, ((1, 1), (0, 0)), mode="edge")
    return SMOOTHING[0] * padded[:-2] + SMOOTHING[1] * padded[1:-1] + SMOOTHING[2] * padded[2:]


def study_logit(model: keras.Model, volume: NDArray[np.int16]) -> float:
    """The uncalibrated logit of a study (D, N, N) for any bleeding: that of its most positive slice."""
    raw = raw_scores(model, volume)
    return float(slice_logits(raw["slice"], raw["pooled"])[:, 0].max())


def scored(folder: Path) -> tuple[dict[tuple[str, str], dict[str, object]], NDArray[np.float64]]:
    """What `score` wrote in `folder` by source and patient, with its `logits` (D, C), and the `shift` (C,) of scales.

    Thresholds come from the folds, whose models saw fewer patients. The shift is by how much the shipped weights'
    logits of a study lie above theirs, as the median of studies that both scored; 0 where there are none. What the
    shipped weights scored stands as they did, on the scale of the folds.
    """
    folds, shipped = _read(folder, "fold*"), _read(folder, SHIPPED)
    above = [s["logits"].max(axis=0) - folds[who]["logits"].max(axis=0) for who, s in shipped.items() if who in folds]
    shift = np.median(above, axis=0) if above else np.zeros(len(FINDINGS))
    for study in shipped.values():
        study["logits"] = study["logits"] - shift
    return folds | shipped, shift


def served(
    logits: NDArray[np.float64], scale: NDArray[np.float64], threshold: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Logits (D, C) as they are served: calibrated, 0 at the operating point, and no kind likelier than `any`."""
    calibrated = scale * (logits - threshold)
    return np.minimum(calibrated, calibrated[:, :1])


def _read(folder: Path, which: str) -> dict[tuple[str, str], dict[str, object]]:
    studies = {}
    for path in sorted(folder.glob(f"{which}/*.npz")):
        with np.load(path) as file:
            fields = {name: file[name] for name in file.files}
        fields["source"], _, fields["patient"] = path.stem.rpartition("_")
        fields["fold"] = path.parent.name
        fields["logits"] = slice_logits(fields["slice"], fields["pooled"])
        if (who := (fields["source"], fields["patient"])) in studies:
            raise ConfigError(f"{' '.join(who)} was scored by {studies[who]['fold']} and {fields['fold']}; remove one")
        studies[who] = fields
    return studies


def evaluate(folder: Path) -> dict[str, object]:
    """Calibration and metrics from the scores of folds in `folder`.

    Raises ConfigError where there are none, or where some patients may have been scored by a model that saw them.
    """
    found, shift = scored(folder)
    studies = list(found.values())
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("fold*/run.json"))]
    if len(dealt := {run["folds"] for run in runs}) > 1:
        raise ConfigError(f"{folder} has scores of {' and of '.join(map(str, sorted(dealt)))} folds; remove the others")
    mixed = [s for s in studies if s["source"] == CROSS_VALIDATED]
    if not mixed:
        raise ConfigError(f"no scores of {CROSS_VALIDATED} in {folder}; run --fold 0, --fold 1 and --fold 2 first")

    thresholds, scales = [], []
    for c in range(len(FINDINGS)):
        study_score = np.array([s["logits"][:, c].max() for s in mixed])
        study_truth = np.array([s["study_truth"][c] == 1 for s in mixed])
        slices = np.concatenate([s["logits"][:, c] for s in mixed])
        truth = np.concatenate([s["slice_truth"][:, c] == 1 for s in mixed])
        thresholds.append(operating_point(study_score, study_truth, TARGET_SENSITIVITY, LEAST_SPECIFICITY))
        scales.append(float(np.clip(platt(slices, truth)[0], 0.5, 2.0)) if truth.any() else 1.0)
    offset = int(np.argmax(_outlined_dice(mixed).mean(axis=1)))
    for s in studies:
        s["served"] = served(s["logits"], np.array(scales), np.array(thresholds))
    metrics: dict[str, object] = {}
    folds = sorted({s["fold"] for s in mixed})
    groups = {
        CROSS_VALIDATED: mixed,
        f"{CROSS_VALIDATED} adults": [s for s in mixed if not s["child"]],
        f"{CROSS_VALIDATED} children": [s for s in mixed if s["child"]],
        **{f"{CROSS_VALIDATED} {fold}": [s for s in mixed if s["fold"] == fold] for fold in folds},
        **{source: [s for s in studies if s["source"] == source] for source in (*ALL_SETS, "simulated")},
    }
    for name, group in groups.items():
        if group:
            metrics[name] = _metrics(group, offset)
    rounded = folder / SHIPPED / RANGES
    return {
        "findings": list(FINDINGS),
        **({"ranges": json.loads(rounded.read_text(encoding="utf-8"))} if rounded.exists() else {}),
        "scale": scales,
        "threshold": (np.array(thresholds) + shift).tolist(),
        "threshold_of_folds": thresholds,
        "pooled_share": [POOLED_SHARE],
        "smoothing": list(SMOOTHING),
        "mask_offset": [MASK_OFFSETS[offset]],
        "target_sensitivity": TARGET_SENSITIVITY,
        "obtained": f"patients kept aside from training, {len(runs)} of {runs[0]['folds']} folds",
        "runs": runs,
        "metrics": metrics,
    }


def _metrics(studies: Sequence[dict[str, NDArray[np.generic]]], offset: int) -> dict[str, object]:
    out: dict[str, object] = {"patients": len(studies)}
    for c, finding in enumerate(FINDINGS):
        said = [s for s in studies if s["study_truth"][c] != UNKNOWN]
        score_ = np.array([s["served"][:, c].max() for s in said])
        truth = np.array([s["study_truth"][c] == 1 for s in said])
        if not truth.any():
            continue
        found = score_ >= 0
        row: dict[str, object] = {
            "positive": int(truth.sum()),
            "sensitivity": wilson(int((found & truth).sum()), int(truth.sum())),
        }
        if not truth.all():
            row["specificity"] = wilson(int((~found & ~truth).sum()), int((~truth).sum()))
            row["patient_auc"] = [auc(score_, truth), *auc_interval(score_, truth, np.arange(len(truth)))[:2]]
        known = [s["slice_truth"][:, c] != UNKNOWN for s in studies]
        slices = np.concatenate([s["served"][k, c] for s, k in zip(studies, known, strict=True)])
        slice_truth = np.concatenate([s["slice_truth"][k, c] == 1 for s, k in zip(studies, known, strict=True)])
        owner = np.concatenate([np.full(k.sum(), i) for i, k in enumerate(known)])
        if slice_truth.any() and not slice_truth.all():
            row["slice_auc"] = [auc(slices, slice_truth), *auc_interval(slices, slice_truth, owner)[:2]]
            row["slices"] = len(slices)
        out[finding] = row
    overlaps = _outlined_dice(studies)[offset]
    if len(overlaps):
        out["dice_of_outlined_slices"] = float(overlaps.mean())
    return out


def _outlined_dice(studies: Sequence[dict[str, NDArray[np.generic]]]) -> NDArray[np.float64]:
    """Dice of the outlined slices of all studies at each of MASK_OFFSETS: (offsets, N)."""
    return np.concatenate([s["dice"][:, s["outlined"].astype(bool)] for s in studies], axis=1)


TASKS = ("any bleeding", *(finding.upper().replace("_", "/") for finding in FINDINGS[1:]))


def cases(folder: Path, calibration: dict[str, object], data: Path) -> list[Case]:
    """Every study and every slice whose truth is known as a case; volumes and the worst ones' pictures from `data`."""
    scale, threshold = np.array(calibration["scale"]), np.array(calibration["threshold_of_folds"])
    offset = MASK_OFFSETS.index(calibration["mask_offset"][0])
    studies, _ = scored(folder)
    out: list[Case] = []
    with progress() as bar:
        for (source, patient), s in bar.track(studies.items(), description="reading truth"):
            labelled = read_labelled(data, source, patient)
            out += _cases_of(s, expit(served(s["logits"], scale, threshold)), labelled, offset)
        pictured: dict[int, Case] = {}
        for source in {case.source for case in out}:
            worst = worst_cases(case for case in out if case.source == source)
            for case in bar.track(worst, description=f"drawing the worst of {source}"):
                labelled = read_labelled(data, source, case.patient)
                if labelled is not None:
                    pictured[id(case)] = _pictured(case, studies[source, case.patient], prepare(labelled), offset)
    return [pictured.get(id(case), case) for case in out]


def _cases_of(
    study: dict[str, object], probability: NDArray[np.floating], labelled: LabelledVolume | None, offset: int
) -> list[Case]:
    present, of_study = study["slice_truth"] == 1, study["study_truth"]
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
        if of_study[c] != UNKNOWN:
            bleeds = bool(of_study[c] == 1)
            out.append(
                Case(
                    task=task,
                    truth="bleeding" if bleeds else "none",
                    probability=_two_classes(probability[:, c].max()),
                    kinds=tuple(TASKS[k] for k in range(1, len(TASKS)) if of_study[k] == 1) if not c else (),
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
                    dice=float(study["dice"][offset, i]) if not c and study["outlined"][i] else None,
                    **known,
                )
            )
    return out


def _two_classes(positive: float) -> dict[str, float]:
    return {"none": 1 - float(positive), "bleeding": float(positive)}


def _pictured(case: Case, study: dict[str, object], patient: Prepared, offset: int) -> Case:
    """With the slice that holds most of the blood, or else the one that the model likes least."""
    finding = TASKS.index(case.task)
    pixels = patient.pixels
    truth = (pixels.positive >> finding) & 1 > 0
    i = int(np.argmax(truth.sum(axis=(1, 2)) if truth.any() else study["logits"][:, finding]))
    outlines, shows = [(truth[i], (70, 170, 255))], f"slice {i + 1}{'; blue: truth' if truth[i].any() else ''}"
    if "found" in study:
        outlines.append((np.unpackbits(study["found"][offset, i], axis=-1) > 0, (255, 64, 160)))
        shows += "; pink: model"
    return replace(case, picture=picture(pixels.volume[i], outlines), picture_shows=shows)

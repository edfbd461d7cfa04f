"""How much gives away which set a slice comes from, and whether the detector makes use of it.

A set whose every patient bleeds teaches a shortcut: whoever knows the set knows the answer. Figures of slices without
blood show it, 0.5 being the best there is: how well a classifier tells the sets apart, cross-validated by patient, by
what the detector and simple statistics see of prepared slices, and of such as training changes them; and how well the
detector's own score for bleeding tells them apart.
"""

from collections.abc import Sequence

import keras  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from herald.discrimination import auc
from serving.crops import Prepared, augment
from serving.evaluation import bootstrap_interval
from serving.score_hemorrhage import slice_logits

FOLDS = 5
BINS = np.arange(-120, 141, 10)  # Hounsfield units: what windows cut off shows here
SLICES = 6  # of each patient, evenly spread
CONTEXT = 2


def clean_slices(patient: Prepared) -> NDArray[np.intp]:
    """Up to SLICES slices without blood that have neighbours on either side, evenly spread."""
    quiet = np.flatnonzero(patient.slice_truth[:, 0] == 0)
    quiet = quiet[(quiet >= CONTEXT) & (quiet < len(patient.slice_truth) - CONTEXT)]
    return quiet[np.linspace(0, len(quiet) - 1, min(SLICES, len(quiet))).round().astype(int)]


def windows(patient: Prepared, seed: int | None) -> NDArray[np.float32]:
    """Five slices around each of `clean_slices`: (slices, 5, N, N); changed as in training where a seed is given."""
    around = clean_slices(patient)[:, None] + np.arange(-CONTEXT, CONTEXT + 1)
    volume = patient.pixels.volume[around].astype(np.float32)
    if seed is not None and len(volume):
        nothing = np.zeros((len(volume), 1, *volume.shape[2:]), dtype=np.uint8)
        crops = map(keras.ops.convert_to_tensor, (volume, nothing, nothing))
        volume = np.asarray(augment(*crops, keras.random.SeedGenerator(seed))[0])
    return volume


def statistics(volume: NDArray[np.float32]) -> NDArray[np.float64]:
    """Histogram and sharpness of the middle slice of each window (N, 5, H, W): (N, F)."""
    return np.array([_statistics(plane) for plane in volume[:, CONTEXT]])


def _statistics(plane: NDArray[np.float32]) -> list[float]:
    shares, _ = np.histogram(np.clip(plane, BINS[0], BINS[-1]), BINS, density=True)
    tissue = (plane > 0) & (plane < 80)
    sharpness = []
    for axis in (0, 1):
        for order in (1, 2):  # neighbours and next neighbours: noise, its correlation, and what JPEG does to both
            inside = tissue & np.roll(tissue, order, axis=axis)
            differences = np.abs(plane - np.roll(plane, order, axis=axis))[inside]
            sharpness.append(float(np.log1p(differences.mean())) if len(differences) else 0.0)
    return [*shares.tolist(), *sharpness]


def told_apart(features: NDArray[np.floating], truth: NDArray[np.bool_], owner: NDArray[np.intp]) -> list[float]:
    """AUC with 95 % interval at which a linear classifier tells `truth` (N,) from `features` (N, F).

    Cross-validated in such a way that no patient (`owner` (N,)) is in both parts; the interval draws whole patients.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000, class_weight="balanced"))
    scores = cross_val_predict(
        classifier, features, truth, groups=owner, cv=GroupKFold(FOLDS), method="decision_function"
    )
    return [auc(scores, truth), *bootstrap_interval(scores, truth, owner)]


def compare(
    model: keras.Model, patients: Sequence[Prepared], first: str, second: str, seed: int = 0
) -> dict[str, object]:
    """Both figures for two sets: `sets_told_apart` before and after augmentation, and `score_told_apart`.

    `model` is that of `serving.hemorrhage.build`; what it scores should have been kept aside from its training.
    """
    patients = [p for p in patients if p.source in (first, second) and len(clean_slices(p))]
    owner = np.concatenate([np.full(len(clean_slices(p)), i) for i, p in enumerate(patients)])
    truth = np.concatenate([np.full(len(clean_slices(p)), p.source == second) for p in patients])
    trunk = keras.Model(model.input, [model.get_layer("slice_summary").output, *model.output.values()])
    result: dict[str, object] = {"sets": [first, second], "patients": len(patients), "slices": len(owner)}
    for name, changed in (("prepared", None), ("augmented", seed)):
        features, scores = [], []
        for i, p in enumerate(patients):
            volume = windows(p, None if changed is None else changed + i)
            summary, *outputs = trunk(volume, training=False)
            raw = {key: np.asarray(value)[:, 0] for key, value in zip(model.output, outputs, strict=True)}
            features.append(np.hstack([np.asarray(summary), statistics(volume)]))
            scores.append(slice_logits(raw["slice"], raw["pooled"])[:, 0])
        result[f"sets_told_apart_{name}"] = told_apart(np.concatenate(features), truth, owner)
        if changed is None:
            score = np.concatenate(scores)
            result["score_told_apart"] = [auc(score, truth), *bootstrap_interval(score, truth, owner)]
    return result

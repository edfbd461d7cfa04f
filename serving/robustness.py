"""Whether the detector's answers hold when the same heads are scanned otherwise: `--changed` of its training.

Every patient that a fold keeps aside is changed as another scanner, dose or position would change the scan, seen as the
node sees a series, and scored by the weights of that fold. It is no substitute for scans of other scanners.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from herald.cranium import detector_view
from herald.discrimination import auc
from herald.volume import AIR_HOUNSFIELD, Hounsfield, Volume, detection_input, slabs
from serving.crops import ALL_SETS, Prepared, split
from serving.evaluation import auc_interval, wilson
from serving.hemorrhage import load
from serving.progress import progress
from serving.score_hemorrhage import study_logit

Float = NDArray[np.float32]

SEED = 7
BODY = -500.0  # Hounsfield units; air stays air
GRAIN = 0.7  # pixels by which noise is correlated, as in soft kernels
BRAIN, DENSEST = 35.0, 200.0  # Hounsfield units around which, and up to which, grey is stretched


def brighter(by: float) -> Callable[[Float], Float]:
    """The body by so many Hounsfield units."""
    return lambda scan: np.where(scan > BODY, scan + np.float32(by), scan)


def noisier(by: float) -> Callable[[Float], Float]:
    """Noise of such a standard deviation in Hounsfield units on top of what is there."""

    def change(scan: Float) -> Float:
        grain = np.random.default_rng(SEED).normal(size=scan.shape).astype(np.float32)
        grain = ndimage.gaussian_filter(grain, (0, GRAIN, GRAIN))
        return scan + grain * np.float32(by / grain.std())

    return change


def stretched(by: float) -> Callable[[Float], Float]:
    """Grey by such a factor around that of brain, as by another tube voltage."""
    return lambda scan: np.where((scan > BODY) & (scan < DENSEST), BRAIN + (scan - BRAIN) * np.float32(by), scan)


def _softer(scan: Float) -> Float:
    return ndimage.gaussian_filter(scan, (0, 1, 1))


def _turned(scan: Float) -> Float:
    return ndimage.rotate(scan, 15, (1, 2), reshape=False, order=1, cval=float(AIR_HOUNSFIELD))


CHANGES: Mapping[str, Callable[[Float], Float]] = {
    "as it is": lambda scan: scan,
    "4 HU brighter": brighter(4),
    "4 HU darker": brighter(-4),
    "4 HU of noise more": noisier(4),
    "8 HU of noise more": noisier(8),
    "softer kernel": _softer,
    "sharper kernel": lambda scan: scan + np.float32(0.7) * (scan - _softer(scan)),
    "15 % more contrast": stretched(1.15),
    "15 % less contrast": stretched(0.85),
    "turned by 15 degrees": _turned,
    "mirrored": lambda scan: scan[:, :, ::-1],
    "mean of two slices each": lambda scan: (scan + np.concatenate([scan[1:], scan[-1:]])) / 2,
}


@dataclass(frozen=True)
class Study:
    """What one study is, and its score by change of CHANGES."""

    bleeds: bool
    scores: Mapping[str, float]


def changed(volume: Volume, score: Callable[[Hounsfield], float]) -> dict[str, float]:
    """The score of what the node shows of `volume`, after each of CHANGES."""
    scan = volume.hounsfield.astype(np.float32)
    found = {}
    for name, change in CHANGES.items():
        hounsfield = np.rint(np.clip(change(scan), AIR_HOUNSFIELD, 3071)).astype(np.int16)
        head, _ = detection_input(slabs(replace(volume, hounsfield=hounsfield)).volume)
        found[name] = score(detector_view(head))
    return found


def score_changed(weights: Sequence[Path], patients: Sequence[Prepared], data: Path) -> list[Study]:
    """Each of `patients`, read anew from `data` and changed, by the `weights` of the fold that keeps it aside."""
    studies = []
    with progress() as bar:
        task = bar.add_task("scanning otherwise", total=len(patients))
        for fold, path in enumerate(weights):
            score = partial(study_logit, load(path))
            for patient in split(patients, fold, len(weights))[1]:
                folder, _, read = ALL_SETS[patient.source]
                scores = changed(read(data / folder, patient.patient).volume, score)
                studies.append(Study(bool(patient.study_truth[0] == 1), scores))
                bar.advance(task)
    return studies


class Answers(TypedDict):
    """What became of the answers after one change: shares and AUC with their intervals, and how scores moved."""

    patient_auc: list[float]
    sensitivity: list[float]
    specificity: list[float]
    shift: dict[str, float]
    spread: dict[str, float]


def answers(studies: Sequence[Study], threshold: float) -> dict[str, Answers]:
    """By change: AUC over `studies`, sensitivity and specificity at `threshold`, each with a 95 % interval.

    `shift` is by how much the scores of bleeding and of other studies rise in the mean, and `spread` the standard
    deviation of that rise. There must be studies of both.
    """
    truth = np.array([study.bleeds for study in studies])
    before = np.array([study.scores["as it is"] for study in studies])
    result: dict[str, Answers] = {}
    for name in CHANGES:
        scores = np.array([study.scores[name] for study in studies])
        rise, positive = scores - before, scores >= threshold
        result[name] = {
            "patient_auc": [auc(scores, truth), *auc_interval(scores, truth, np.arange(len(truth)))[:2]],
            "sensitivity": wilson(int(positive[truth].sum()), int(truth.sum())),
            "specificity": wilson(int((~positive[~truth]).sum()), int((~truth).sum())),
            "shift": {"bleeding": float(rise[truth].mean()), "other": float(rise[~truth].mean())},
            "spread": {"bleeding": float(rise[truth].std()), "other": float(rise[~truth].std())},
        }
    return result

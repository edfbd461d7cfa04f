"""Temperature scaling of softmax heads (Guo et al. 2017), fitted on series that training never saw."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from herald.heads import Aggregation, aggregate
from serving.evaluation import expected_calibration_error

LOWEST, HIGHEST = 0.25, 8.0
FOLDS = 5
LEAST = 20
"""Series below which nothing is fitted."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What one head said of one series: softmaxes (N, C) of its chunks, the true class, and the group it counts in."""

    softmax: NDArray[np.float32]
    truth: int
    group: str


@dataclass(frozen=True)
class Measured:
    """Log loss and expected calibration error, each group of series counting the same, over `series` of them."""

    log_loss: float
    calibration_error: float
    series: int


def tempered(softmax: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Softmaxes (..., C) whose logits are divided by `temperature`, as the exported model computes them."""
    logits = np.log(np.maximum(softmax, 1e-30)) / temperature
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True), np.float32)


def fit_temperature(cases: Sequence[Scored], how: Aggregation) -> float:
    """The temperature of least log loss of the aggregated answers, each group counting the same.

    Targets are smoothed by one imagined series of each class, after Platt 1999: a head that is always right would else
    be made infinitely sure of itself.
    """
    weights = _weights(cases)
    classes = cases[0].softmax.shape[-1]
    targets = np.full((len(cases), classes), 1 / (len(cases) + classes))
    targets[np.arange(len(cases)), [case.truth for case in cases]] = (len(cases) + 1) / (len(cases) + classes)

    def loss(log_temperature: float) -> float:
        answers = _answers(cases, float(np.exp(log_temperature)), how)
        return float(-(weights * (targets * np.log(answers)).sum(axis=1)).sum())

    found = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded")
    return round(float(np.exp(found.x)), 4)


def measure(cases: Sequence[Scored], temperatures: Sequence[float], how: Aggregation) -> Measured:
    """How well probabilities fit the truth, each case at its own temperature."""
    answers = np.concatenate([_answers([c], t, how) for c, t in zip(cases, temperatures, strict=True)])
    weights = _weights(cases)
    truth = np.array([case.truth for case in cases])
    right = answers[np.arange(len(cases)), truth]
    groups = np.array([case.group for case in cases])
    errors = [
        expected_calibration_error(
            answers[groups == g].max(axis=1), answers[groups == g].argmax(axis=1) == truth[groups == g]
        )
        for g in sorted(set(groups.tolist()))
    ]
    return Measured(float(-(weights * np.log(right)).sum()), float(np.mean(errors)), len(cases))


def out_of_fold(cases: Sequence[Scored], how: Aggregation) -> list[float]:
    """For each case, the temperature fitted on the four fifths of the cases that it is not among."""
    folds = np.arange(len(cases)) % FOLDS
    fitted = [
        fit_temperature([c for c, f in zip(cases, folds, strict=True) if f != fold], how) for fold in range(FOLDS)
    ]
    return [fitted[fold] for fold in folds.tolist()]


def _answers(cases: Sequence[Scored], temperature: float, how: Aggregation) -> NDArray[np.float64]:
    """Aggregated softmaxes (N, C), kept from 0."""
    one = np.stack([aggregate(tempered(case.softmax, temperature), how) for case in cases])
    return np.clip(one.astype(np.float64), 1e-12, 1.0)


def _weights(cases: Sequence[Scored]) -> NDArray[np.float64]:
    """Of each case, so that groups weigh the same and all sum to 1."""
    groups = [case.group for case in cases]
    counts = {group: groups.count(group) for group in groups}
    return np.array([1 / (counts[group] * len(counts)) for group in groups])

"""Figures of diagnostic accuracy with their intervals."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

Scores = NDArray[np.floating]
Truth = NDArray[np.bool_]


def auc(scores: Scores, truth: Truth) -> float:
    """Area under the ROC curve of `scores` (N,) for `truth` (N,); ties count half. NaN where one class is missing."""
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = stats.rankdata(scores)
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def wilson(successes: int, n: int, level: float = 0.95) -> list[float]:
    """Share, lower and upper end of Wilson's interval."""
    if not n:
        return [float("nan")] * 3
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return [successes / n, float(interval.low), float(interval.high)]


def bootstrap_interval(
    scores: Scores,
    truth: Truth,
    owner: NDArray[np.integer] | None = None,
    metric: Callable[[Scores, Truth], float] = auc,
    rounds: int = 1000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap of `metric`; `owner` (N,) draws whole patients, since slices of one are not independent."""
    rng = np.random.default_rng(0)
    owner = np.arange(len(scores)) if owner is None else owner
    members = [np.flatnonzero(owner == o) for o in np.unique(owner)]
    values = []
    for _ in range(rounds):
        picked = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        value = metric(scores[picked], truth[picked])
        if not np.isnan(value):
            values.append(value)
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def sensitivity_threshold(scores: Scores, truth: Truth, sensitivity: float) -> float:
    """The highest threshold whose `scores >= threshold` reaches `sensitivity`, put halfway to the next lower score."""
    positives = np.sort(scores[truth])[::-1]
    needed = int(np.ceil(sensitivity * len(positives) - 1e-9))
    edge = float(positives[needed - 1])
    below = scores[scores < edge]
    return (edge + float(below.max())) / 2 if len(below) else edge - 1e-3


def operating_point(scores: Scores, truth: Truth, sensitivity: float, specificity: float) -> float:
    """The threshold that reaches `sensitivity`, or the lowest that keeps `specificity` where both cannot be had.

    The latter lies halfway to the next score above, so that it does not hang on a single study.
    """
    negatives = np.sort(scores[~truth])
    allowed = int(np.floor((1 - specificity) * len(negatives) + 1e-9))  # false positives
    edge = -np.inf
    if len(negatives):
        highest = float(negatives[-allowed - 1])
        above = scores[scores > highest]
        edge = (highest + float(above.min())) / 2 if len(above) else highest + 1e-3
    return max(sensitivity_threshold(scores, truth, sensitivity), edge) if truth.any() else float(negatives[-1]) + 1e-3


def platt(scores: Scores, truth: Truth) -> tuple[float, float]:
    """Scale and bias of the logistic regression of `truth` on `scores`, barely regularised."""
    sign = np.where(truth, 1.0, -1.0)

    def cost(parameters: NDArray[np.floating]) -> float:
        scale, bias = parameters
        return float(np.logaddexp(0, -sign * (scale * scores + bias)).mean() + 1e-4 * scale**2)

    scale, bias = optimize.minimize(cost, np.array([1.0, 0.0]), method="BFGS").x
    return float(scale), float(bias)

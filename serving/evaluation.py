"""Figures of diagnostic accuracy with their intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from herald.discrimination import Scores, Truth, auc, delong_interval, newcombe_auc_interval, z_of

FEW = 3
"""Patients of a class below which neither DeLong's variance nor the bootstrap tells anything."""


def wilson(successes: float, n: float, level: float = 0.95) -> list[float]:
    """Share, lower and upper end of Wilson's interval (Wilson 1927); `n` may be an effective number. NaN without n."""
    if not n:
        return [float("nan")] * 3
    share, z2 = successes / n, z_of(level) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = float(np.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))) / (1 + z2 / n)
    return [share, max(0.0, middle - half) if share else 0.0, min(1.0, middle + half) if share < 1 else 1.0]


def clustered_share(hits: Truth, owner: NDArray[np.integer], level: float = 0.95) -> list[float]:
    """Share of `hits` (N,) and Wilson's interval for the effective number of cases when `owner` (N,) has several.

    The variance between patients gives the effective number (Korn and Graubard 1998), never fewer than there are
    patients nor more than there are cases. Where all hits agree it is the number of patients.
    """
    n = len(hits)
    if not n:
        return [float("nan")] * 3
    _, patient = np.unique(owner, return_inverse=True)
    members = np.bincount(patient)
    patients, share = len(members), float(hits.mean())
    if patients == n:
        return wilson(int(hits.sum()), n, level)
    effective = float(patients)
    if 0 < share < 1 and patients > 1:
        excess = np.bincount(patient, weights=hits) - share * members
        variance = float((excess**2).sum()) * patients / (patients - 1) / n**2
        effective = float(np.clip(share * (1 - share) / variance, patients, n)) if variance else float(n)
    return wilson(share * effective, effective, level)


def predictive_values(
    sensitivity: Sequence[float], specificity: Sequence[float], prevalence: float
) -> tuple[list[float], list[float]]:
    """PPV and NPV at `prevalence` by Bayes, each value, low, high; arguments are value, low, high too.

    The intervals are those of the likelihood ratios (MOVER-R, Donner and Zou 2012). NaN where a ratio is 0 / 0.
    """
    odds = prevalence / (1 - prevalence)
    missed = [1 - sensitivity[0], 1 - sensitivity[2], 1 - sensitivity[1]]
    alarmed = [1 - specificity[0], 1 - specificity[2], 1 - specificity[1]]
    ppv = [_share_of_odds(odds * ratio) for ratio in _ratio(sensitivity, alarmed)]
    npv = [1 - _share_of_odds(odds * ratio) for ratio in _ratio(missed, specificity)]
    return ppv, [npv[0], npv[2], npv[1]]


def _share_of_odds(odds: float) -> float:
    return 1.0 if np.isinf(odds) else float(odds / (1 + odds))


def _ratio(top: Sequence[float], bottom: Sequence[float]) -> list[float]:
    """Ratio of two independent shares, its lower and upper end; written so that shares of 0 need no correction."""
    (a, a_low, a_high), (b, b_low, b_high) = top, bottom
    if np.isnan([*top, *bottom]).any() or a == b == 0:
        return [float("nan")] * 3
    product = a * b
    below = product + np.sqrt(max(0.0, product**2 - a_low * b_high * (2 * a - a_low) * (2 * b - b_high)))
    above = product + np.sqrt(max(0.0, product**2 - a_high * b_low * (2 * a - a_high) * (2 * b - b_low)))
    low = a_low * (2 * a - a_low) / below if a > 0 else 0.0
    high = above / (b_low * (2 * b - b_low)) if b > 0 else float("inf")
    return [a / b if b else float("inf"), float(low), float(high)]


@dataclass(frozen=True)
class Bin:
    """The cases whose probability lies in one tenth or so: their indices, mean probability and share of positives."""

    members: NDArray[np.intp]
    said: float
    seen: float


def calibration_curve(probability: Scores, truth: Truth, bins: int = 10) -> list[Bin]:
    """The occupied ones of `bins` equally wide bins of `probability` (N,), lowest first."""
    place = np.minimum((np.asarray(probability) * bins).astype(int), bins - 1)
    groups = [np.flatnonzero(place == i) for i in range(bins)]
    return [Bin(g, float(probability[g].mean()), float(truth[g].mean())) for g in groups if len(g)]


def expected_calibration_error(probability: Scores, truth: Truth, bins: int = 10) -> float:
    """Mean distance between what is said and what is seen, over the cases of the bins; biased upwards in few cases."""
    if not len(truth):
        return float("nan")
    curve = calibration_curve(probability, truth, bins)
    return float(sum(len(b.members) * abs(b.said - b.seen) for b in curve) / len(truth))


def dice(predicted: Truth, truth: Truth) -> NDArray[np.float64]:
    """Dice of each plane of two masks (..., H, W); NaN where both are empty."""
    size = predicted.sum(axis=(-2, -1)) + truth.sum(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        overlap: NDArray[np.float64] = 2 * (predicted & truth).sum(axis=(-2, -1)) / np.where(size, size, np.nan)
    return overlap


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


def auc_interval(scores: Scores, truth: Truth, owner: NDArray[np.integer]) -> tuple[float, float, str]:
    """Lower and upper end of the 95 % interval of the AUC of `scores` (N,), and the method it is from.

    DeLong's; whole patients are drawn where `owner` (N,) has several scores of one. Where a class has fewer than FEW
    patients, or all are told apart, neither says anything, and the numbers alone do (Newcombe 2006).
    """
    positive, negative = len(np.unique(owner[truth])), len(np.unique(owner[~truth]))
    low = high = float("nan")
    if min(positive, negative) >= FEW:
        if len(np.unique(owner)) < len(owner):
            method, (low, high) = "bootstrap over patients", bootstrap_interval(scores, truth, owner)
        else:
            method, (low, high) = "DeLong", delong_interval(scores, truth)
    if not low < high:
        method, (low, high) = "Newcombe", newcombe_auc_interval(auc(scores, truth), positive, negative)
    return low, high, method


def sensitivity_threshold(scores: Scores, truth: Truth, sensitivity: float) -> float:
    """The highest threshold whose `scores >= threshold` reaches `sensitivity`, put halfway to the next lower score."""
    positives = np.sort(scores[truth])[::-1]
    needed = int(np.ceil(sensitivity * len(positives) - 1e-9))
    edge = float(positives[needed - 1])
    below = scores[scores < edge]
    return (edge + float(below.max())) / 2 if len(below) else edge - 1e-3


def operating_point(scores: Scores, truth: Truth, sensitivity: float, specificity: float) -> float:
    """The threshold that reaches `sensitivity`, or finds the most that `specificity` allows where both cannot be had.

    Of thresholds that find as many it is the one that spares most of the others, as `sensitivity_threshold` puts it.
    """
    negatives = np.sort(scores[~truth])
    allowed = int(np.floor((1 - specificity) * len(negatives) + 1e-9))  # false positives
    spared = float(negatives[-allowed - 1]) if allowed < len(negatives) else -np.inf
    findable = int((scores[truth] > spared).sum())
    if not findable:
        return float(scores.max()) + 1e-3
    return sensitivity_threshold(scores, truth, min(sensitivity, findable / int(truth.sum())))


def platt(scores: Scores, truth: Truth) -> tuple[float, float]:
    """Scale and bias of the logistic regression of `truth` on `scores`, barely regularised."""
    sign = np.where(truth, 1.0, -1.0)

    def cost(parameters: NDArray[np.floating]) -> float:
        scale, bias = parameters
        return float(np.logaddexp(0, -sign * (scale * scores + bias)).mean() + 1e-4 * scale**2)

    scale, bias = optimize.minimize(cost, np.array([1.0, 0.0]), method="BFGS").x
    return float(scale), float(bias)

"""How well scores tell two classes apart: the area under the ROC curve (AUC) with its intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

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


def z_of(level: float) -> float:
    """How many standard errors a two-sided interval of `level` reaches."""
    return float(stats.norm.ppf((1 + level) / 2))


def delong_variance(scores: Sequence[Scores], truth: Truth) -> NDArray[np.float64]:
    """Covariance (K, K) of the AUCs of K scores of the same N cases (DeLong et al. 1988), by ranks (Sun and Xu 2014).

    NaN where a class has fewer than two cases.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives < 2 or negatives < 2:
        return np.full((len(scores), len(scores)), np.nan)
    of_positives, of_negatives = [], []  # share of the other class that each case lies on the right side of
    for values in scores:
        ranks = stats.rankdata(values)
        of_positives.append((ranks[truth] - stats.rankdata(values[truth])) / negatives)
        of_negatives.append(1 - (ranks[~truth] - stats.rankdata(values[~truth])) / positives)
    covariance: NDArray[np.float64] = np.atleast_2d(np.cov(of_positives)) / positives
    return covariance + np.atleast_2d(np.cov(of_negatives)) / negatives


def delong_interval(scores: Scores, truth: Truth, level: float = 0.95) -> tuple[float, float]:
    """DeLong's interval of the AUC, made on the logit scale so that it stays within 0 and 1 and holds near 1.

    NaN where there is no variance to go by: classes told apart perfectly, or fewer than two cases of one.
    """
    area, variance = auc(scores, truth), float(delong_variance([scores], truth)[0, 0])
    if not variance > 0:
        return float("nan"), float("nan")
    middle, half = np.log(area / (1 - area)), z_of(level) * np.sqrt(variance) / (area * (1 - area))
    return float(1 / (1 + np.exp(half - middle))), float(1 / (1 + np.exp(-half - middle)))


@dataclass(frozen=True)
class Difference:
    """One AUC less another of the same cases, its interval, and the two-sided p of there being none."""

    value: float
    low: float
    high: float
    p: float


def delong_difference(first: Scores, second: Scores, truth: Truth, level: float = 0.95) -> Difference:
    """AUC of `first` less that of `second`, both scores of the same cases (DeLong et al. 1988); NaN as for one AUC."""
    value = auc(first, truth) - auc(second, truth)
    contrast = np.array([1.0, -1.0])
    variance = float(contrast @ delong_variance([first, second], truth) @ contrast)
    if np.isnan(variance) or (variance <= 1e-15 and abs(value) > 1e-12):
        return Difference(value, float("nan"), float("nan"), float("nan"))
    error = float(np.sqrt(max(variance, 0.0)))
    half = z_of(level) * error
    p = float(2 * stats.norm.sf(abs(value) / error)) if error > 1e-8 else 1.0
    return Difference(value, max(-1.0, value - half), min(1.0, value + half), p)


def newcombe_auc_interval(area: float, positives: int, negatives: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of an AUC from the numbers of cases alone (Newcombe 2006, method 5): holds where `area` is 0 or 1."""
    if not positives or not negatives or np.isnan(area):
        return float("nan"), float("nan")
    z2, n = z_of(level) ** 2, (positives + negatives) / 2

    def excess(true: float) -> float:
        spread = true * (1 - true) * (1 + (n - 1) * ((1 - true) / (2 - true) + true / (1 + true)))
        return (area - true) ** 2 - z2 * spread / (positives * negatives)

    low = optimize.brentq(excess, 0.0, min(area, 1 - 1e-9)) if area > 0 else 0.0  # `area` 1 is a root by itself
    high = optimize.brentq(excess, max(area, 1e-9), 1.0) if area < 1 else 1.0
    return float(low), float(high)

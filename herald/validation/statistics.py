"""Figures of the validation report with their intervals; scipy, scikit-learn and statsmodels do what they can do."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import brier_score_loss, roc_curve  # type: ignore[import-untyped]
from statsmodels.genmod.families import Binomial  # type: ignore[import-untyped]
from statsmodels.genmod.generalized_linear_model import GLM  # type: ignore[import-untyped]
from statsmodels.stats.proportion import proportion_confint  # type: ignore[import-untyped]

from herald import discrimination
from herald.discrimination import Scores, Truth, delong_interval, newcombe_auc_interval

LEVEL = 0.95
Z = float(stats.norm.ppf((1 + LEVEL) / 2))
SIGMAS = 3.0
"""Width of the control limits (Shewhart 1931)."""
LEAST_OF_WEEK = 5
"""A week with fewer cases is drawn and not judged: no share of so few can be told from chance."""
BINS = 10


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval and what it is of; None is what cannot be estimated."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    hits: int | None = None


def not_estimable(n: int = 0) -> Estimate:
    """A figure that the data cannot give."""
    return Estimate(None, None, None, n)


def share(hits: int, n: int) -> Estimate:
    """`hits` of `n` with Wilson's interval (Wilson 1927); not estimable without cases."""
    if not n:
        return not_estimable()
    low, high = proportion_confint(hits, n, 1 - LEVEL, method="wilson")
    return Estimate(hits / n, max(0.0, float(low)), min(1.0, float(high)), n, hits)


# --- discrimination --------------------------------------------------------------------------------------------------


def auc(scores: Scores, truth: Truth) -> Estimate:
    """Area under the ROC curve with DeLong's interval, or Newcombe's where the classes are told apart perfectly.

    Not estimable where a class is missing.
    """
    n, positives = len(truth), int(truth.sum())
    if not 0 < positives < n:
        return not_estimable(n)
    area, (low, high) = discrimination.auc(scores, truth), delong_interval(scores, truth, LEVEL)
    if np.isnan(low):
        low, high = newcombe_auc_interval(area, positives, n - positives, LEVEL)
    return Estimate(area, low, high, n)


def roc_points(scores: Scores, truth: Truth) -> list[tuple[float, float]]:
    """Corners of the ROC curve as (1 - specificity, sensitivity); empty where a class is missing."""
    if not 0 < truth.sum() < len(truth):
        return []
    false_positive, true_positive, _ = roc_curve(truth, scores)
    return [(float(x), float(y)) for x, y in zip(false_positive, true_positive, strict=True)]


@dataclass(frozen=True)
class Corrected:
    """Sensitivity and specificity as they would be had everybody a reference standard."""

    sensitivity: Estimate
    specificity: Estimate


def begg_greenes(tp: int, fp: int, fn: int, tn: int, positives: int, negatives: int) -> Corrected:
    """Sensitivity and specificity corrected for who was verified (Begg and Greenes 1983, intervals as Zhou 1993).

    `positives` and `negatives` are all with that test result, verified or not. It holds only where, given the test
    result, it is chance who has a reference standard.
    """
    verified_positives, verified_negatives = tp + fp, fn + tn
    n = positives + negatives
    if not verified_positives or not verified_negatives:
        return Corrected(not_estimable(n), not_estimable(n))
    return Corrected(
        _by_odds(positives, tp, verified_positives, negatives, fn, verified_negatives),
        _by_odds(negatives, tn, verified_negatives, positives, fp, verified_positives),
    )


def _by_odds(right: int, hits: int, of: int, wrong: int, misses: int, misses_of: int) -> Estimate:
    """The share a / (a + b) of a = right * hits / of and b = wrong * misses / misses_of, by the delta method."""
    a, b, n = right * hits / of, wrong * misses / misses_of, right + wrong
    if a + b == 0:
        return not_estimable(n)
    if a == 0 or b == 0:
        return Estimate(a / (a + b), None, None, n)
    variance = 1 / right + 1 / wrong + (1 / hits - 1 / of) + (1 / misses - 1 / misses_of)
    middle, half = np.log(a / b), Z * np.sqrt(variance)
    return Estimate(a / (a + b), _expit(middle - half), _expit(middle + half), n)


def _expit(x: float) -> float:
    return float(1 / (1 + np.exp(-x)))


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReliabilityBin:
    """The cases of one tenth of the probability: what was said of them on average, and what was seen."""

    said: float
    seen: Estimate


@dataclass(frozen=True)
class Calibration:
    """How well probabilities hold; a perfect model has slope 1 and intercept 0 (Cox 1958)."""

    brier: float | None
    brier_of_prevalence: float | None
    """Of who always says the share of positives; a model that is worse than this knows nothing."""
    slope: Estimate
    intercept: Estimate
    bins: list[ReliabilityBin]


def calibration(probability: Scores, truth: Truth) -> Calibration:
    """Brier score, slope and intercept of `truth` (N,) on the logit of `probability` (N,), reliability by tenths."""
    n = len(truth)
    if not n:
        return Calibration(None, None, not_estimable(), not_estimable(), [])
    clipped = np.clip(probability, 1e-6, 1 - 1e-6)
    logit = np.log(clipped / (1 - clipped))
    ones = np.ones_like(logit)
    place = np.minimum((probability * BINS).astype(int), BINS - 1)
    members = [place == i for i in range(BINS)]
    prevalence = float(truth.mean())
    return Calibration(
        brier=float(brier_score_loss(truth, probability, labels=[False, True])),
        brier_of_prevalence=prevalence * (1 - prevalence),
        slope=_coefficient(truth, np.column_stack([ones, logit]), None),
        intercept=_coefficient(truth, ones[:, None], logit),  # calibration in the large: the slope is held at 1
        bins=[
            ReliabilityBin(float(probability[m].mean()), share(int(truth[m].sum()), int(m.sum())))
            for m in members
            if m.any()
        ],
    )


def _coefficient(truth: Truth, design: Scores, offset: Scores | None) -> Estimate:
    """The last coefficient of a logistic regression; not estimable where classes are told apart perfectly."""
    n = len(truth)
    if not 1 < truth.sum() < n - 1 or np.linalg.matrix_rank(design) < design.shape[1]:
        return not_estimable(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # statsmodels warns of perfect separation and of no convergence
        try:
            fitted = GLM(truth.astype(float), design, family=Binomial(), offset=offset).fit()
        except (Warning, np.linalg.LinAlgError, ValueError):
            return not_estimable(n)
    low, high = fitted.conf_int(1 - LEVEL)[-1]
    return Estimate(float(fitted.params[-1]), float(low), float(high), n)


# --- process control -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlPoint:
    """One week of a p-chart; `verdict` is "above", "below", "within" or "too few"."""

    share: Estimate
    low: float | None
    high: float | None
    verdict: str


def p_chart(counts: Sequence[tuple[int, int]]) -> tuple[float | None, list[ControlPoint]]:
    """Overall share of (hits, n) and, for each, whether it lies within 3 sigma of it (NIST handbook 6.3.3.2).

    sigma is sqrt(p (1 - p) / n) by the overall share p and the n of the week.
    """
    total = sum(n for _, n in counts)
    if not total:
        return None, [ControlPoint(not_estimable(), None, None, "too few") for _ in counts]
    overall = sum(hits for hits, _ in counts) / total
    points = []
    for hits, n in counts:
        found = share(hits, n)
        if not n or found.value is None:
            points.append(ControlPoint(found, None, None, "too few"))
            continue
        half = SIGMAS * float(np.sqrt(overall * (1 - overall) / n))
        low, high = max(0.0, overall - half), min(1.0, overall + half)
        verdict = "above" if found.value > high else "below" if found.value < low else "within"
        points.append(ControlPoint(found, low, high, verdict if n >= LEAST_OF_WEEK else "too few"))
    return overall, points

"""The report's figures against worked examples from the literature and against queueing theory."""

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from herald.discrimination import delong_variance
from herald.validation.drift import chi_square, ks, psi
from herald.validation.statistics import auc, begg_greenes, calibration, p_chart, roc_points, share
from herald.validation.turnaround import waits


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_s_interval_is_that_of_the_examples_of_newcombe_1998(hits, n, low, high):
    found = share(hits, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert (found.value, found.hits, found.n) == (hits / n, hits, n)


def test_a_share_of_nothing_is_not_estimable():
    found = share(0, 0)
    assert (found.value, found.low, found.high, found.n) == (None, None, None, 0)


# Hanley and McNeil 1982, table I: 109 readings of CT rated 1 (surely normal) to 5
NORMAL, ABNORMAL = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)


def hanley_mcneil():
    scores = np.concatenate([np.repeat(np.arange(1.0, 6.0), NORMAL), np.repeat(np.arange(1.0, 6.0), ABNORMAL)])
    return scores, np.repeat([False, True], [sum(NORMAL), sum(ABNORMAL)])


def test_delong_gives_the_published_auc_and_error_of_the_ratings_of_hanley_and_mcneil():
    scores, truth = hanley_mcneil()
    found = auc(scores, truth)
    error = np.sqrt(delong_variance([scores], truth)[0, 0])
    assert found.value == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    plain = found.value + np.array([-1, 1]) * 1.959964 * error
    assert plain == pytest.approx([0.83295, 0.95339], abs=5e-6)
    assert found.low < plain[0]  # on the logit scale: shifted away from 1
    assert found.high < plain[1]


def test_an_auc_of_1_has_an_interval_from_its_numbers_and_one_without_a_class_no_value():
    scores = np.arange(10.0)
    perfect = auc(scores, scores >= 5)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.5 < perfect.low < 0.95  # five against five
    assert auc(scores, scores >= 0).value is None
    assert roc_points(scores, scores >= 0) == []


def test_the_roc_curve_goes_from_corner_to_corner_and_has_the_area_of_the_auc():
    scores, truth = hanley_mcneil()
    points = np.array(roc_points(scores, truth))
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    assert np.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(auc(scores, truth).value)


def test_partial_verification_is_corrected_as_in_the_liver_scans_of_begg_and_greenes_1983():
    # Drum and Christacopoulos 1972: 650 scans, 429 abnormal; 231 + 32 and 27 + 54 were verified
    found = begg_greenes(tp=231, fp=32, fn=27, tn=54, positives=429, negatives=221)
    assert found.sensitivity.value == pytest.approx(0.836, abs=1e-3)
    assert found.specificity.value == pytest.approx(0.738, abs=1e-3)
    assert share(231, 258).value == pytest.approx(0.895, abs=1e-3)  # as counted
    assert found.sensitivity.low < 0.836 < found.sensitivity.high


def test_the_interval_of_the_corrected_sensitivity_covers_the_truth():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        sick = rng.random(1500) < 0.2
        positive = rng.random(1500) < np.where(sick, 0.85, 0.1)
        verified = rng.random(1500) < np.where(positive, 0.9, 0.3)
        cells = ((positive, sick), (positive, ~sick), (~positive, sick), (~positive, ~sick))
        tp, fp, fn, tn = (int((verified & answer & truth).sum()) for answer, truth in cells)
        found = begg_greenes(tp, fp, fn, tn, int(positive.sum()), int((~positive).sum())).sensitivity
        covered += found.low <= 0.85 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_where_all_are_verified_the_correction_changes_nothing():
    found = begg_greenes(tp=40, fp=10, fn=5, tn=100, positives=50, negatives=105)
    assert found.sensitivity.value == pytest.approx(40 / 45)
    assert found.specificity.value == pytest.approx(100 / 110)


def test_the_p_chart_is_that_of_the_wafers_of_the_nist_handbook():
    # NIST/SEMATECH e-Handbook, 6.3.3.2: 30 wafers of 50 chips
    defective = [
        12,
        15,
        8,
        10,
        4,
        7,
        16,
        9,
        14,
        10,
        5,
        6,
        17,
        12,
        22,
        8,
        10,
        5,
        13,
        11,
        20,
        18,
        24,
        15,
        9,
        12,
        7,
        13,
        9,
        6,
    ]
    overall, points = p_chart([(hits, 50) for hits in defective])
    assert overall == pytest.approx(0.2313, abs=5e-5)
    assert (points[0].low, points[0].high) == pytest.approx((0.0524, 0.4102), abs=1e-4)
    assert [i + 1 for i, point in enumerate(points) if point.verdict == "above"] == [15, 23]
    assert "below" not in {point.verdict for point in points}


def test_a_week_of_few_is_not_judged_and_one_of_none_has_no_limits():
    overall, points = p_chart([(400, 500), (0, 4), (0, 0), (3, 10)])
    assert overall == pytest.approx(403 / 514)
    assert [point.verdict for point in points] == ["within", "too few", "too few", "below"]
    assert points[2].low is None
    assert p_chart([(0, 0)])[0] is None


def test_slope_and_intercept_of_calibration_are_those_of_two_groups_by_hand():
    probability = np.repeat([0.2, 0.8], 100)
    truth = np.concatenate([np.arange(100) < 30, np.arange(100) < 60])
    found = calibration(probability, truth)
    # through both groups: logit 0.3 and 0.6 over logit 0.2 and 0.8
    slope = (np.log(0.6 / 0.4) - np.log(0.3 / 0.7)) / (2 * np.log(4))
    assert found.slope.value == pytest.approx(slope, abs=1e-6)
    assert found.brier == pytest.approx((30 * 0.64 + 70 * 0.04 + 60 * 0.04 + 40 * 0.64) / 200)
    assert found.brier_of_prevalence == pytest.approx(0.45 * 0.55)
    assert [(b.said, b.seen.value) for b in found.bins] == [(pytest.approx(0.2), 0.3), (pytest.approx(0.8), 0.6)]
    # the intercept solves sum(expit(logit p + a)) = number of positives
    assert np.sum(
        1 / (1 + np.exp(-(np.log(probability / (1 - probability)) + found.intercept.value)))
    ) == pytest.approx(90)


def test_calibration_of_classes_told_apart_perfectly_has_no_slope():
    probability = np.array([0.1] * 20 + [0.9] * 20)
    found = calibration(probability, probability > 0.5)
    assert found.slope.value is None
    assert found.brier == pytest.approx(0.01)


def test_chi_square_is_that_of_agresti_s_table_of_gender_and_party():
    # Agresti 2007, table 2.5: X2 = 30.1 with 2 degrees of freedom
    women, men = (
        Counter(democrat=762, independent=327, republican=468),
        Counter(democrat=484, independent=239, republican=477),
    )
    assert chi_square(women, men) == pytest.approx(stats.chi2.sf(30.07, 2), rel=5e-3)


def test_rare_categories_are_taken_together_and_a_single_one_is_not_tested():
    before, after = Counter(a=50, b=50, c=1, d=1), Counter(a=30, b=70, e=2)
    together = stats.chi2_contingency([[50, 50, 2], [30, 70, 2]], correction=False).pvalue
    assert chi_square(before, after) == pytest.approx(float(together))
    assert chi_square(Counter(a=50), Counter(a=60)) is None


def test_ks_distance_is_the_largest_distance_of_the_cumulative_shares():
    distance, _ = ks(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6]))
    assert distance == 0.5
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=200), rng.normal(0.5, 1, size=150)
    # Smirnov's limiting distribution: 2 sum (-1)^(k-1) exp(-2 k^2 n D^2) holds closely for these sizes
    distance, p = ks(a, b)
    n = 200 * 150 / 350
    assert p == pytest.approx(stats.kstwobign.sf(np.sqrt(n) * distance), rel=0.2)


def test_psi_is_the_sum_over_shares_and_is_finite_for_a_new_category():
    same = Counter(a=500, b=500)
    assert psi(same, same) == 0
    moved = psi(Counter(a=5000, b=5000), Counter(a=8000, b=2000))
    assert moved == pytest.approx(0.3 * np.log(0.8 / 0.5) - 0.3 * np.log(0.2 / 0.5), rel=1e-2)
    assert np.isfinite(psi(Counter(a=100), Counter(b=100)))


# --- queue -----------------------------------------------------------------------------------------------------------


def poisson_queue(rate: float, urgent_share: float, n: int = 150_000):
    """Arrivals of a Poisson process, which of them are urgent from then on, and exponential readings of mean 1."""
    rng = np.random.default_rng(12)
    arrives = np.cumsum(rng.exponential(1 / rate, n))
    urgent = rng.random(n) < urgent_share
    return arrives, urgent, rng.exponential(1.0, n)


def test_waits_are_those_of_cobham_s_priority_queue():
    rate, urgent_share = 0.7, 0.2
    arrives, urgent, lasts = poisson_queue(rate, urgent_share)
    residual = rate  # lambda E[S^2] / 2 with E[S^2] = 2 (Cobham 1954)
    in_order = waits(arrives, np.full(len(arrives), np.inf), lasts, 1)
    assert in_order.mean() == pytest.approx(residual / (1 - rate), rel=0.05)  # Pollaczek and Khinchine
    first = waits(arrives, np.where(urgent, arrives, np.inf), lasts, 1)
    of_urgent = 1 - rate * urgent_share
    assert first[urgent].mean() == pytest.approx(residual / of_urgent, rel=0.05)
    assert first[~urgent].mean() == pytest.approx(residual / (of_urgent * (1 - rate)), rel=0.05)


def test_two_readers_wait_as_erlang_says():
    arrives, _, lasts = poisson_queue(1.4, 0.0)
    found = waits(arrives, np.full(len(arrives), np.inf), lasts, 2)
    load, busy = 1.4, 0.7
    waiting = load**2 / 2 / (1 - busy)
    erlang_c = waiting / (1 + load + waiting)
    assert found.mean() == pytest.approx(erlang_c / (2 - load), rel=0.05)
    assert (found > 0).mean() == pytest.approx(erlang_c, rel=0.03)


def test_a_positive_goes_first_only_from_the_time_its_answer_is_known():
    arrives = np.array([0.0, 1.0, 2.0, 3.0])
    lasts = np.full(4, 10.0)
    never = np.full(4, np.inf)
    assert waits(arrives, never, lasts, 1).tolist() == [0, 9, 18, 27]
    at_once = np.array([np.inf, np.inf, np.inf, 3.0])
    assert waits(arrives, at_once, lasts, 1).tolist() == [0, 19, 28, 7]
    late = np.array([np.inf, np.inf, np.inf, 15.0])  # after the second was begun
    assert waits(arrives, late, lasts, 1).tolist() == [0, 9, 28, 17]
    assert waits(arrives, never, lasts, 2).tolist() == [0, 0, 8, 8]
    assert waits(np.array([0.0, 100.0]), never[:2], lasts[:2], 1).tolist() == [0, 0]
    assert waits(never[:0], never[:0], never[:0], 1).tolist() == []

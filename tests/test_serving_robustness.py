"""Heads that are scanned otherwise, and what is told of the answers to them."""

import numpy as np
import pytest
from real_data import DATA, needs_real_data
from test_herald_cranium import head

from herald.volume import Volume
from serving.crops import Prepared
from serving.hemorrhage import WEIGHTS
from serving.robustness import CHANGES, Study, answers, changed, score_changed

RNG = np.random.default_rng(3)
SCAN = np.where(RNG.random((4, 40, 40)) < 0.2, -1000, RNG.normal(35, 5, (4, 40, 40))).astype(np.float32)
BODY = SCAN > -500


def of(name: str) -> np.ndarray:
    before = SCAN.copy()
    after = CHANGES[name](SCAN)
    np.testing.assert_array_equal(SCAN, before)
    assert after.shape == SCAN.shape
    return after


@pytest.mark.parametrize(("name", "by"), [("4 HU brighter", 4), ("4 HU darker", -4)])
def test_the_body_becomes_brighter_and_air_stays_air(name: str, by: float) -> None:
    np.testing.assert_allclose(of(name)[BODY], SCAN[BODY] + by, atol=1e-4)
    np.testing.assert_array_equal(of(name)[~BODY], SCAN[~BODY])


@pytest.mark.parametrize(("name", "by"), [("4 HU of noise more", 4), ("8 HU of noise more", 8)])
def test_noise_has_the_strength_that_its_name_says_and_is_the_same_each_time(name: str, by: float) -> None:
    added = of(name) - SCAN
    assert added.std() == pytest.approx(by, rel=0.01)
    np.testing.assert_array_equal(of(name), of(name))


@pytest.mark.parametrize(("name", "factor"), [("15 % more contrast", 1.15), ("15 % less contrast", 0.85)])
def test_grey_is_stretched_around_brain(name: str, factor: float) -> None:
    np.testing.assert_allclose(of(name)[BODY] - 35, (SCAN[BODY] - 35) * factor, rtol=1e-4, atol=1e-3)


def test_a_softer_kernel_takes_from_the_noise_and_a_sharper_one_adds_to_it() -> None:
    flat = RNG.normal(35, 5, (2, 60, 60)).astype(np.float32)
    assert CHANGES["softer kernel"](flat).std() < 3 < 6 < CHANGES["sharper kernel"](flat).std()


def test_a_head_that_is_mirrored_twice_is_as_it_was_and_one_that_is_turned_is_not() -> None:
    np.testing.assert_array_equal(CHANGES["mirrored"](of("mirrored")), SCAN)
    assert np.abs(of("turned by 15 degrees") - SCAN).mean() > 10


def test_thicker_slices_are_the_mean_of_two() -> None:
    np.testing.assert_allclose(of("mean of two slices each")[1], (SCAN[1] + SCAN[2]) / 2, rtol=1e-5)


def test_a_scan_is_shown_to_the_detector_as_the_node_shows_it_after_each_change() -> None:
    scan = Volume(head(slices=6), np.arange(6) * 5.0, (0.5, 0.5))
    shown = []

    def score(seen: np.ndarray) -> float:
        shown.append(seen)
        return float(seen[:, seen.shape[1] // 2, seen.shape[2] // 2].mean())

    scores = changed(scan, score)
    assert list(scores) == list(CHANGES)
    assert {(seen.shape, seen.dtype.name) for seen in shown} == {((6, 384, 384), "int16")}
    assert scores["4 HU brighter"] - scores["as it is"] == pytest.approx(4, abs=0.6)
    assert scores["mirrored"] == pytest.approx(scores["as it is"], abs=3)


@needs_real_data
def test_a_large_bleed_of_a_real_head_kept_aside_is_seen_however_it_is_scanned() -> None:
    def never() -> None:
        raise AssertionError("the scan is read anew")

    bleeding = Prepared("ct-ich", "087", np.ones((1, 5), np.uint8), np.ones(5, np.uint8), True, never)
    weights = WEIGHTS.parent / "of_6_folds" / "384" / "fold1.weights.h5"
    (study,) = score_changed([weights], [bleeding], DATA)
    assert study.bleeds
    assert list(study.scores) == list(CHANGES)
    assert min(study.scores.values()) > 5
    assert len(set(study.scores.values())) == len(CHANGES)


def test_answers_are_told_by_change_with_how_far_they_moved() -> None:
    steady = dict.fromkeys(CHANGES, 0.0)
    studies = [
        Study(True, {**steady, "as it is": 2.0, "8 HU of noise more": 0.0}),
        Study(True, {**steady, "as it is": 3.0, "8 HU of noise more": 3.0}),
        Study(False, {**steady, "as it is": -1.0, "8 HU of noise more": 1.0}),
        Study(False, {**steady, "as it is": -2.0, "8 HU of noise more": -2.0}),
    ]
    told = answers(studies, threshold=0.5)
    assert told["as it is"]["patient_auc"][0] == told["as it is"]["sensitivity"][0] == 1.0
    noisy = told["8 HU of noise more"]
    assert noisy["patient_auc"][0] == 0.75
    assert (noisy["sensitivity"][0], noisy["specificity"][0]) == (0.5, 0.5)
    assert noisy["shift"] == {"bleeding": -1.0, "other": 1.0}
    assert noisy["spread"] == {"bleeding": 1.0, "other": 1.0}

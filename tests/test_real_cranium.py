"""What the detector is shown of every real bleeding and healthy head of CT-ICH."""

import numpy as np
import pytest
from real_data import DATA, needs_real_data

from herald.cranium import USUAL, cavity_depth, cupping, detector_view
from herald.grain import MOST, noise
from herald.volume import AIR_HOUNSFIELD, detection_input, slabs
from serving.readers import SETS

FOLDER, PATIENTS, READ = SETS["ct-ich"]
pytestmark = [needs_real_data, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def heads() -> list[tuple[np.ndarray, np.ndarray]]:
    """Each head as it is cut out, and which of its slices bleed."""
    labelled = [READ(DATA / FOLDER, name) for name in PATIENTS(DATA / FOLDER)]
    return [(detection_input(slabs(one.volume).volume)[0], one.slice_truth[:, 0] == 1) for one in labelled]


def test_the_usual_cupping_is_the_median_of_these_heads(heads: list) -> None:
    found = [cupping(head, cavity_depth(head)) for head, _ in heads]
    medians = np.median([one for one in found if one is not None], axis=0)
    assert medians == pytest.approx(np.array(USUAL), abs=1.0)


def test_no_slice_that_bleeds_is_taken_for_neck_and_many_of_the_others_are(heads: list) -> None:
    left_out = [(detector_view(head) == AIR_HOUNSFIELD).all(axis=(1, 2)) for head, _ in heads]
    assert not any((out & bleeds).any() for out, (_, bleeds) in zip(left_out, heads, strict=True))
    assert sum(out.any() for out in left_out) > len(heads) / 2


def test_no_head_of_these_is_noisier_than_what_is_left_to_every_head(heads: list) -> None:
    found = [noise(head, cavity_depth(head)) for head, _ in heads]
    assert 1.5 < max(one for one in found if one is not None) < MOST


def test_with_noise_added_the_detector_is_shown_no_more_of_it_than_these_heads_have(heads: list) -> None:
    head, _ = heads[1]
    depth = cavity_depth(head)
    noisy = (head + np.random.default_rng(0).normal(0, 8, head.shape)).astype(np.int16)
    assert (noise(noisy, depth) or 0) > 3 * MOST
    assert (noise(detector_view(noisy), depth) or 9) == pytest.approx(MOST, abs=0.5)

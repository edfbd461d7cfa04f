"""Noise beyond the usual is taken from brain before the detector looks, and blood, bone and air stay as they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_herald_cranium import DEEP, INNER, RADIUS, X, Y, head

from herald.cranium import cavity_depth
from herald.grain import LEAST_VOXELS, MOST, noise, without_excess_noise

BLOOD = (np.abs(X - 40) < 12) & (np.abs(Y) < 12)
THIN = (RADIUS > INNER - 4) & (RADIUS < INNER) & (X > 0) & (np.abs(Y) < 40)


@pytest.mark.parametrize("deviation", [1.5, 4.0, 9.0])
def test_the_noise_of_a_head_is_measured_whatever_else_it_holds(deviation: float) -> None:
    volume = head(noise=deviation)
    volume[:, BLOOD] += 30
    assert noise(volume, cavity_depth(volume)) == pytest.approx(deviation, rel=0.15)


@given(st.floats(2.5, 12.0))
@settings(max_examples=8, deadline=None)
def test_however_noisy_no_more_than_the_usual_is_left_and_blood_stands_out_as_before(deviation: float) -> None:
    volume = head(noise=deviation)
    depth = cavity_depth(volume)
    volume[:, BLOOD | THIN] += 30
    after = without_excess_noise(volume, depth)
    assert (noise(after, depth) or 9) <= MOST + 0.25
    assert after[:, BLOOD].mean() == pytest.approx(volume[:, BLOOD].mean(), abs=3)
    assert after[:, THIN].mean() - DEEP > 0.6 * (volume[:, THIN].mean() - DEEP)


def test_bone_and_air_stay_as_they_are_and_lend_brain_nothing_of_their_grey() -> None:
    volume = head(noise=6.0)
    after = without_excess_noise(volume, cavity_depth(volume))
    elsewhere = (volume >= 120) | (volume <= -60)
    assert (after[elsewhere] == volume[elsewhere]).all()
    beside_bone = (RADIUS > INNER - 3) & (RADIUS < INNER)
    assert after[:, beside_bone].mean() == pytest.approx(volume[:, beside_bone].mean(), abs=1.0)


def test_a_head_with_no_more_noise_than_usual_is_shown_as_it_is() -> None:
    volume = head(noise=1.7)
    assert without_excess_noise(volume, cavity_depth(volume)) is volume


def test_where_hardly_any_brain_is_seen_nothing_is_measured_and_nothing_changed() -> None:
    volume = head(noise=9.0)
    depth = np.zeros(volume.shape, np.uint8)
    depth.reshape(-1)[: LEAST_VOXELS // 2] = 99
    assert noise(volume, depth) is None
    assert without_excess_noise(volume, depth) is volume

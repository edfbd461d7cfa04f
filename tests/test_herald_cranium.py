"""Cupping is made alike, what lies below the skull is left out, and all else, blood above all, is left as it is."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herald.cranium import DEPTHS, LEAST_SLICES, MARGIN_SLICES, MOST, USUAL, cavity_depth, detector_view
from herald.signatures import DETECTION_IN_PLANE
from herald.volume import AIR_HOUNSFIELD

SIDE = DETECTION_IN_PLANE
DEEP = 33
Y, X = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
RADIUS = np.hypot(X, Y) / SIDE * 256
INNER = 92  # of the inner table, in pixels of a head of 256
LEFT = (RADIUS > INNER - 6) & (X > 0) & (np.abs(Y) < SIDE / 8) & (RADIUS < INNER)


def head(cupping: float = 1.0, slices: int = 5, noise: float = 1.5) -> np.ndarray:
    """A round skull with brain so many times as bright towards it as usual, (D, N, N)."""
    middles = [(low + high) / 2 for low, high in pairwise(DEPTHS)]
    below = (INNER - RADIUS) * 384 / 256
    plane = np.full(RADIUS.shape, -1000.0)
    plane[RADIUS < 108] = 30  # scalp
    plane[RADIUS < 100] = 900
    brain = RADIUS < INNER
    plane[brain] = DEEP + cupping * np.interp(below[brain], middles, USUAL)
    volume = np.repeat(plane[None], slices, axis=0)
    return np.rint(volume + np.random.default_rng(0).normal(0, noise, volume.shape)).astype(np.int16)


def under_the_skull(volume: np.ndarray) -> float:
    return float(volume[:, (RADIUS > INNER - 8) & (RADIUS < INNER - 3)].mean())


def test_a_head_with_the_usual_cupping_stays_as_it_is() -> None:
    volume = head()
    assert np.abs(detector_view(volume).astype(int) - volume).max() <= 1


@given(st.floats(0.4, 1.6))
@settings(max_examples=10, deadline=None)
def test_heads_with_more_or_less_cupping_become_alike(cupping: float) -> None:
    assert under_the_skull(detector_view(head(cupping))) == pytest.approx(under_the_skull(head()), abs=1.0)


def test_deep_brain_bone_scalp_and_air_stay_as_they_are() -> None:
    volume = head(cupping=2.0)
    elsewhere = (RADIUS < 40) | (RADIUS > INNER + 1)
    assert (detector_view(volume)[:, elsewhere] == volume[:, elsewhere]).all()


def test_thin_blood_on_the_inner_table_stands_out_as_much_as_before() -> None:
    before = head(cupping=1.8)
    before[:, LEFT] += 20
    right = LEFT[:, ::-1]
    after = detector_view(before)
    assert under_the_skull(after) < under_the_skull(before) - 3
    contrast = after[:, LEFT].mean() - after[:, right].mean()
    assert contrast == pytest.approx(before[:, LEFT].mean() - before[:, right].mean(), abs=1.0)


def test_blood_all_around_the_brain_is_not_taken_for_cupping_altogether() -> None:
    volume = head()
    around = (RADIUS > INNER - 12) & (RADIUS < INNER)
    volume[:, around] = 68
    assert detector_view(volume)[:, around].mean() >= 68 - MOST - 0.5


@pytest.mark.parametrize("what", ["no skull", "air", "an open skull", "one slice of the vertex"])
def test_without_enough_of_a_cavity_nothing_is_changed(what: str) -> None:
    volume = head(cupping=2.0)
    if what == "no skull":
        volume[volume > 200] = 30
    elif what == "air":
        volume[:] = -1000
    elif what == "an open skull":
        lower = volume[:, SIDE // 2 :]
        lower[lower > 400] = 30
    else:
        volume = volume[:1]
        volume[:, RADIUS < 60] = 900
    before = volume.copy()
    assert (detector_view(volume) == before).all()
    assert (volume == before).all()


def test_what_it_is_given_stays_untouched() -> None:
    volume = head(cupping=2.0)
    before = volume.copy()
    assert (detector_view(volume) != before).any()
    assert (volume == before).all()


def test_the_cavity_is_what_bone_encloses_and_its_depth_grows_from_the_inner_table() -> None:
    depth, middle, px = cavity_depth(head()), SIDE // 2, SIDE / 256
    assert depth[2, middle, middle] > 80 * px
    assert 0 < depth[2, middle, middle - round(90 * px)] < 5 * px
    assert not depth[2, middle, middle - round(104 * px)], "scalp"
    assert not depth[2, 5, 5], "air"


def test_the_cavity_of_every_second_row_and_column_is_the_same_one() -> None:
    fine, coarse = cavity_depth(head()), cavity_depth(head()[:, ::2, ::2])
    assert np.abs(fine[:, ::2, ::2] / 2 - coarse).max() <= 1.5


def test_a_head_whose_bone_does_not_close_has_no_cavity() -> None:
    volume = head(slices=1)
    lower = volume[:, SIDE // 2 :]
    lower[lower > 400] = 30
    assert not cavity_depth(volume).any()


def with_neck(slices_of_neck: int, slices_of_head: int) -> np.ndarray:
    neck = np.full((slices_of_neck, SIDE, SIDE), -1000, np.int16)
    neck[:, RADIUS < 60] = 60  # muscle
    neck[:, RADIUS < 12] = 900
    return np.concatenate([neck, head(slices=slices_of_head)])


def test_muscle_well_below_the_skull_is_not_looked_at_and_the_slices_next_to_it_are() -> None:
    seen = detector_view(with_neck(8, 20))
    assert (seen[: 8 - MARGIN_SLICES] == AIR_HOUNSFIELD).all()
    assert (seen[8 - MARGIN_SLICES : 8, RADIUS < 50] > -1000).all()


@pytest.mark.parametrize("why", ["few slices of a head", "bone too thin to be found in most slices", "no bone at all"])
def test_where_the_skull_is_not_sure_every_slice_is_looked_at(why: str) -> None:
    volume = with_neck(8, LEAST_SLICES - 1 if why == "few slices of a head" else 20)
    if why != "few slices of a head":
        thin = volume[8 + 1 :: 2] if "most" in why else volume
        thin[thin > 200] = 200
    assert (detector_view(volume) > AIR_HOUNSFIELD).all()

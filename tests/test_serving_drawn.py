"""Bleeds drawn into heads: on the anatomy, with truth that fits, and nothing where there is no room."""

import numpy as np
import pytest

from herald.cranium import cavity_depth
from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from serving.crops import truth_of
from serving.drawn import (
    FINDING,
    KINDS,
    LEAST_PX,
    PX,
    Cavity,
    brighten_rim,
    draw_bleed,
    draw_calcification,
    move_bleed,
    widen_furrows,
)
from serving.readers import UNKNOWN


def head(slices: int = 12, noise: float = 3.0) -> np.ndarray:
    """A round skull with brain, a fluid-filled middle and a dark furrow near the bone; air outside."""
    y, x = np.mgrid[:DETECTION_IN_PLANE, :DETECTION_IN_PLANE] - (DETECTION_IN_PLANE - 1) / 2
    radius = np.hypot(x, y) / PX
    plane = np.full(radius.shape, -1000.0)
    plane[radius < 108] = 30  # scalp
    plane[radius < 100] = 900
    plane[radius < 92] = 33
    plane[(radius < 86) & (radius > 82)] = 6
    plane[radius < 25] = 5
    volume = np.repeat(plane[None], slices, axis=0)
    return (volume + np.random.default_rng(0).normal(0, noise, volume.shape)).astype(np.int16)


def px(low: float, high: float) -> slice:
    """From `low` to `high` in a head of 256 pixels."""
    return slice(round(low * PX), round(high * PX))


BLOOD = (slice(4, 7), px(100, 120), px(60, 80))
IN_BLOOD = (5, round(110 * PX), round(70 * PX))


@pytest.fixture(scope="module")
def scan() -> tuple[np.ndarray, Cavity]:
    volume = head()
    return volume.astype(np.float32), Cavity(cavity_depth(volume))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_brighter_than_what_it_covers_and_lies_within_the_cavity(
    kind: str, scan: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, inside = scan
    monkeypatch.setattr("serving.drawn.KINDS", (kind,))
    drawn = [draw_bleed(np.random.default_rng(seed), volume, inside) for seed in range(12)]
    drawn = [bleed for bleed in drawn if bleed is not None]
    assert len(drawn) > 6
    for out, positive, doubtful in drawn:
        blood = positive > 0
        assert not blood[inside.depth == 0].any()
        assert (positive[blood] == 1 | 1 << FINDINGS.index(FINDING[kind])).all()
        assert (out - volume)[blood].mean() > 3
        np.testing.assert_array_equal(out[inside.depth == 0], volume[inside.depth == 0])
        count = blood.sum(axis=(1, 2))
        np.testing.assert_array_equal(doubtful > 0, (count > 0) & (count < LEAST_PX))


def test_blood_outside_the_brain_lies_on_the_inner_table_and_blood_in_furrows_where_fluid_was(
    scan: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, inside = scan
    for kind in ("edh", "sdh", "sah", "ivh"):
        monkeypatch.setattr("serving.drawn.KINDS", (kind,))
        bleed = next(b for seed in range(20) if (b := draw_bleed(np.random.default_rng(seed), volume, inside)))
        blood = bleed[1] > 0
        if kind in ("edh", "sdh"):
            assert (inside.depth[blood] < 4 * PX).any()
        else:
            assert np.median(volume[blood]) < 18


def test_a_crop_without_a_cavity_gets_no_bleed(scan: tuple) -> None:
    volume, inside = scan
    nothing = Cavity(np.zeros_like(inside.depth))
    assert draw_bleed(np.random.default_rng(1), volume, nothing) is None
    np.testing.assert_array_equal(draw_calcification(np.random.default_rng(1), volume, nothing), volume)


def test_calcifications_are_brighter_than_blood_and_small(scan: tuple) -> None:
    volume, inside = scan
    out = draw_calcification(np.random.default_rng(2), volume, inside)
    bright = (out > 100) & (inside.depth > 0) & (volume < 100)
    assert 0 < bright.sum() < 2000 * PX**2


def test_blood_moved_from_another_head_keeps_its_kind_and_stays_inside(scan: tuple) -> None:
    volume, inside = scan
    donor, positive = volume.copy(), np.zeros(volume.shape, dtype=np.uint8)
    donor[BLOOD], positive[BLOOD] = 70, 0b10001
    unknown = np.zeros_like(positive)
    out, bits, doubtful = move_bleed(np.random.default_rng(3), volume, inside, donor, positive, unknown)
    assert out[IN_BLOOD] == pytest.approx(70, abs=2)
    assert bits[IN_BLOOD] == 0b10001
    assert not doubtful[5]
    outside = np.zeros_like(positive)
    outside[5, px(2, 20), px(2, 20)] = 1
    assert move_bleed(np.random.default_rng(3), volume, inside, donor, outside, unknown) is None


def test_blood_moved_from_a_slice_with_two_kinds_is_not_taught_to_be_of_neither(scan: tuple) -> None:
    volume, inside = scan
    donor, positive, unknown = volume.copy(), np.zeros(volume.shape, np.uint8), np.zeros(volume.shape, np.uint8)
    donor[BLOOD], positive[BLOOD] = 70, 1
    unknown[5, *BLOOD[1:]] = 0b10010
    _, bits, doubtful = move_bleed(np.random.default_rng(3), volume, inside, donor, positive, unknown)
    truth, of_voxels = truth_of(bits, doubtful)
    assert truth[5].tolist() == [1, UNKNOWN, 0, 0, UNKNOWN]
    assert of_voxels[IN_BLOOD] == 0b10010


def test_a_rim_is_brightest_at_the_bone_on_one_side_and_leaves_the_middle_and_what_is_outside(scan: tuple) -> None:
    volume, inside = scan
    for seed in range(12):
        rise = brighten_rim(np.random.default_rng(seed), volume, inside) - volume
        assert not rise[inside.depth == 0].any()
        at_bone, deep = rise[(inside.depth > 0) & (inside.depth < 3 * PX)], rise[inside.depth > 60 * PX]
        assert 1 < at_bone.max() <= 24
        assert at_bone.min() < 0.8 * at_bone.max()
        assert np.abs(deep).max() < 0.3


def test_age_widens_furrows_near_the_skull_and_leaves_bone_depth_and_blood_alone(scan: tuple) -> None:
    volume, inside = scan
    blood = np.zeros(volume.shape, bool)
    blood[:, px(100, 110), px(40, 50)] = True
    for seed in range(8):
        aged = widen_furrows(np.random.default_rng(seed), volume, inside, blood)
        changed = np.abs(aged - volume) > 8
        assert not changed[inside.depth == 0].any()
        assert not changed[blood].any()
        assert not changed[inside.depth > 60 * PX].any()
        assert not changed[volume >= 250].any()
        near = (inside.depth > 0) & (inside.depth < 6 * PX) & (volume > 20) & (volume < 46)
        assert 0.02 < changed[near].mean() < 0.9, "some gyri reach the skull, some furrows are wide"
        assert np.median(aged[changed & near]) < 20  # fluid, not blood

"""Whether two sets can be told apart, measured where the answer is known."""

import keras
import numpy as np
import pytest

from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from serving.crops import Pixels, Prepared
from serving.hemorrhage import Sizes, build
from serving.set_identity import clean_slices, compare, statistics, told_apart

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL = Sizes(widths=(3, 4, 6, 6, 8), blocks=(0, 1, 0, 0, 1))


def patient(source: str, number: int, noise: float) -> Prepared:
    rng = np.random.default_rng(number)
    volume = rng.normal(35, noise, (12, DETECTION_IN_PLANE, DETECTION_IN_PLANE)).astype(np.int16)
    nothing = np.zeros(volume.shape, dtype=np.uint8)
    truth = np.zeros((12, len(FINDINGS)), dtype=np.uint8)
    truth[5, 0] = 1
    pixels = Pixels(volume, nothing, nothing, nothing)
    return Prepared(source, f"{number:03d}", truth, truth.max(axis=0), False, lambda: pixels)


def test_sets_that_look_different_are_told_apart(monkeypatch):
    monkeypatch.setattr("serving.set_identity.SLICES", 2)
    keras.utils.set_random_seed(1)
    model = build(SMALL)
    different = [patient("a", i, 3) for i in range(5)] + [patient("b", i + 9, 12) for i in range(5)]
    found = compare(model, different, "a", "b")
    assert found["sets_told_apart_prepared"][0] > 0.95
    assert found["patients"] == 10


def test_chance_is_one_half_when_a_patient_is_never_in_both_parts():
    rng = np.random.default_rng(2)
    owner = np.repeat(np.arange(40), 5)
    own = rng.normal(size=(40, 3))[owner]  # would give each patient away to whoever has seen it
    area, low, high = told_apart(own, owner % 2 == 0, owner)
    assert low < 0.5 < high
    assert 0.2 < area < 0.8


def test_only_slices_without_blood_and_with_neighbours_are_looked_at():
    p = patient("a", 1, 3)
    assert 5 not in clean_slices(p)
    assert clean_slices(p).min() >= 2
    assert clean_slices(p).max() <= 9


def test_blur_shows_in_the_statistics():
    rng = np.random.default_rng(3)
    sharp = rng.normal(35, 8, (1, 5, 64, 64)).astype(np.float32)
    blurred = (sharp + np.roll(sharp, 1, axis=-1)) / 2
    assert statistics(blurred)[0, -2:].sum() < statistics(sharp)[0, -2:].sum()

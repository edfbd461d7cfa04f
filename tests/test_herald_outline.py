"""Which spots are outlined as blood."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from herald.outline import OUTLINED, SURE, outlined

masks = arrays(np.uint8, (3, 6, 6, 2), elements=st.sampled_from([0, OUTLINED - 1, OUTLINED, SURE - 1, SURE, 255]))


def test_a_spot_is_outlined_to_its_likely_rim_when_it_is_sure_somewhere_and_not_at_all_otherwise() -> None:
    mask = np.zeros((4, 20, 20, 1), np.uint8)
    mask[1, 2:8, 2:8] = 150
    mask[2, 8:10, 8:10] = SURE  # touches it by a corner, in the next slice
    mask[1, 14:18, 14:18] = SURE - 1
    before = mask.copy()
    seen = outlined(mask)[..., 0] >= OUTLINED
    assert seen[1, 2:8, 2:8].all()
    assert seen[2, 8:10, 8:10].all()
    assert seen.sum() == 36 + 4
    np.testing.assert_array_equal(mask, before)


def test_a_spot_that_is_left_out_is_still_tinted() -> None:
    mask = np.zeros((2, 20, 20, 1), np.uint8)
    mask[0, 2:4, 2:4], mask[1, 10:12, 10:12] = SURE, 200
    assert set(np.unique(outlined(mask)[1])) == {0, OUTLINED - 1}


def test_a_kind_that_is_sure_nowhere_keeps_its_spots_whatever_others_have() -> None:
    mask = np.zeros((2, 20, 20, 2), np.uint8)
    mask[0, 2:4, 2:4, 0], mask[1, 10:12, 10:12, :] = SURE, 200
    seen = outlined(mask) >= OUTLINED
    assert not seen[1, ..., 0].any()
    assert seen[1, 10:12, 10:12, 1].all()


@given(masks)
def test_what_is_sure_or_unlikely_stays_as_it_is_and_nothing_rises(mask: np.ndarray) -> None:
    out = outlined(mask)
    stays = (mask < OUTLINED) | (mask >= SURE)
    np.testing.assert_array_equal(out[stays], mask[stays])
    assert (out <= mask).all()
    np.testing.assert_array_equal(outlined(out), out)

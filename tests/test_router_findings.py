"""From the model's answer to millilitres and original slices."""

import numpy as np
import pytest

from herald.signatures import FINDINGS
from herald.volume import Placement, Volume, slabs
from router.findings import findings


def thin(count: int, spacing_mm: float) -> Volume:
    return Volume(
        np.zeros((count, 512, 512), np.int16),
        np.arange(count) * spacing_mm,
        (0.5, 0.5),
        sop_instance_uids=tuple(f"1.2.{i}" for i in range(count)),
    )


@pytest.mark.parametrize("finer", [1, 2])
def test_volume_is_counted_in_millilitres_of_the_original_geometry(finer: int) -> None:
    thick = slabs(thin(10, 5.0))
    mask = np.zeros((10, 256, 256, len(FINDINGS)), np.uint8)
    mask[4:6, 100:120, 100:120, 0] = 200
    mask = mask.repeat(finer, axis=1).repeat(finer, axis=2)
    found = findings(
        thick, Placement(0, 0, 512, (512, 512)), mask, np.zeros((10, 5), np.float32), np.zeros(5, np.float32)
    )
    assert found[0].volume_ml == pytest.approx(2 * 20 * 20 * 1.0 * 1.0 * 5 / 1000)
    assert found[1].volume_ml == 0


def test_the_hottest_slab_is_named_by_an_original_slice() -> None:
    volume = thin(50, 1.0)
    thick = slabs(volume)
    by_slice = np.zeros((10, len(FINDINGS)), np.float32)
    by_slice[7, 1] = 0.9
    mask = np.zeros((10, 256, 256, len(FINDINGS)), np.uint8)
    found = findings(thick, Placement(0, 0, 512, (512, 512)), mask, by_slice, np.zeros(5, np.float32))
    assert found[1].kind == "iph"
    assert 36 <= found[1].slice <= 40
    assert found[1].sop_instance_uid == volume.sop_instance_uids[found[1].slice - 1]


def test_every_kind_is_reported_whatever_its_probability() -> None:
    thick = slabs(thin(8, 5.0))
    mask = np.zeros((8, 256, 256, len(FINDINGS)), np.uint8)
    found = findings(
        thick, Placement(0, 0, 512, (512, 512)), mask, np.zeros((8, 5), np.float32), np.zeros(5, np.float32)
    )
    assert tuple(finding.kind for finding in found) == FINDINGS

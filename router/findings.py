"""From the haemorrhage model's answer to findings in millilitres and original slices, and the prediction to keep."""

import numpy as np
from numpy.typing import NDArray

from herald.events import Finding
from herald.outline import OUTLINED
from herald.signatures import FINDINGS
from herald.store import Prediction
from herald.volume import Hounsfield, Placement, Slabs


def findings(
    slabs: Slabs,
    placement: Placement,
    mask: NDArray[np.uint8],
    slice_probability: NDArray[np.float32],
    probability: NDArray[np.float32],
) -> tuple[Finding, ...]:
    """One finding for each kind in `herald.signatures.FINDINGS`, whatever its probability.

    `mask` (D, N, N, C), `slice_probability` (D, C), `probability` (C,) over the slabs; N rows and columns were seen.
    """
    row_mm, column_mm = (spacing * placement.side / mask.shape[1] for spacing in slabs.volume.pixel_spacing_mm)
    voxel_ml = row_mm * column_mm * slabs.volume.slice_extents_mm / 1000  # (D,)
    voxels = (mask >= OUTLINED).sum(axis=(1, 2))  # (D, C)
    volume_ml = voxel_ml @ voxels  # (C,)
    found = []
    for channel, kind in enumerate(FINDINGS):
        hottest = int(np.argmax(slice_probability[:, channel]))
        members = slabs.members[hottest]
        original = members[len(members) // 2]
        found.append(
            Finding(
                kind=kind,
                probability=round(float(probability[channel]), 4),
                volume_ml=round(float(volume_ml[channel]), 2),
                slice=original + 1,
                sop_instance_uid=slabs.source.sop_instance_uids[original],
            )
        )
    return tuple(found)


def prediction(
    slabs: Slabs,
    seen: Hounsfield,
    placement: Placement,
    mask: NDArray[np.uint8],
    slice_probability: NDArray[np.float32],
    probability: NDArray[np.float32],
) -> Prediction:
    """What the model saw and said, for the reader's page."""
    return Prediction(
        hounsfield=seen,
        mask=mask,
        slice_probability=slice_probability,
        probability=probability,
        placement=np.array([placement.top, placement.left, placement.side, *placement.matrix]),
        first_source=np.array([members[0] for members in slabs.members]),
        last_source=np.array([members[-1] for members in slabs.members]),
        sop_instance_uids=np.array(slabs.volume.sop_instance_uids),
        pixel_spacing_mm=np.array(slabs.volume.pixel_spacing_mm),
    )

"""Voxels as NIfTI-1 for the volume viewer: geometry and values, nothing that says whose they are."""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

MIME_TYPE = "application/gzip"

Triple = tuple[float, float, float]

_HEADER = struct.Struct("<i36x8h14x2h2x8f3f3xB128x2h18f16x4s")  # nifti1.h; what is skipped stays zero
_EXTENSION = bytes(4)  # none
_TYPES = {np.dtype(np.int16): 4, np.dtype(np.uint8): 2}
_MILLIMETRES = 2
_ALIGNED = 2  # directions are the patient's, the origin is ours
_GZIP = 31
_FASTEST = 1


def pack(voxels: NDArray[np.int16] | NDArray[np.uint8], spacing_mm: Triple, origin_mm: Triple) -> Iterator[bytes]:
    """A .nii.gz in pieces, slice by slice, so that a long series needs no second copy in memory.

    `voxels` (D, H, W) from inferior to superior, anterior to posterior, the patient's right to left; `spacing_mm` and
    `origin_mm`, the middle of the first voxel, are along column, row and slice, as DICOM counts: to the left,
    posterior, superior.
    """
    packer = zlib.compressobj(_FASTEST, wbits=_GZIP)
    yield packer.compress(_header(voxels, spacing_mm, origin_mm) + _EXTENSION)
    for plane in np.ascontiguousarray(voxels):
        yield packer.compress(plane)
    yield packer.flush()


def _header(voxels: NDArray[np.int16] | NDArray[np.uint8], spacing_mm: Triple, origin_mm: Triple) -> bytes:
    depth, rows, columns = voxels.shape
    (dx, dy, dz), (x, y, z) = spacing_mm, origin_mm
    return _HEADER.pack(
        _HEADER.size,
        *(3, columns, rows, depth, 1, 1, 1, 1),  # our last axis is NIfTI's first
        _TYPES[voxels.dtype],
        8 * voxels.itemsize,
        *(1.0, dx, dy, dz, 0.0, 0.0, 0.0, 0.0),
        *(float(_HEADER.size + len(_EXTENSION)), 1.0, 0.0),  # where voxels begin, slope and intercept
        _MILLIMETRES,
        *(_ALIGNED, _ALIGNED),
        *(0.0, 0.0, 1.0, -x, -y, z),  # NIfTI counts to the right and anterior: half a turn about the long axis
        *(-dx, 0.0, 0.0, -x),
        *(0.0, -dy, 0.0, -y),
        *(0.0, 0.0, dz, z),
        b"n+1",
    )

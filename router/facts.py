"""Technical facts of a series for the validation record: what the scanner did, and how its pixels measure."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

import numpy as np
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import DT

from herald.volume import Volume

TISSUE = (0, 80)
"""Hounsfield units of brain, blood and fluid; bone, fat and air lie outside."""
MIDDLE_SLICES = 5
LONGEST_TEXT = 64


class Facts(TypedDict):
    """Fields of `SeriesTriaged` that this module fills in."""

    acquired_at: datetime | None
    convolution_kernel: str
    slice_thickness_mm: float | None
    pixel_spacing_mm: float | None
    tissue_hounsfield: float | None
    noise_hounsfield: float | None


def series_facts(datasets: Sequence[Dataset], volume: Volume | None = None) -> Facts:
    """The facts of a series; None or empty for what its headers do not say or what cannot be measured.

    Noise is the median difference of neighbours in a row, scaled to a standard deviation (median absolute deviation
    times 1.4826, over the root of two for a difference of two pixels).
    """
    tissue, noise = (None, None) if volume is None else _measured(volume)
    return Facts(
        acquired_at=min((at for ds in datasets if (at := _acquired_at(ds))), default=None),
        convolution_kernel=_text(datasets[0], "ConvolutionKernel") if datasets else "",
        slice_thickness_mm=_number(datasets[0], "SliceThickness") if datasets else None,
        pixel_spacing_mm=round(volume.pixel_spacing_mm[0], 4) if volume else None,
        tissue_hounsfield=tissue,
        noise_hounsfield=noise,
    )


def _acquired_at(ds: Dataset) -> datetime | None:
    """AcquisitionDateTime, else AcquisitionDate and AcquisitionTime; without an offset it is this host's local time."""
    written = str(ds.get("AcquisitionDateTime") or "")
    if not written:
        date, time = str(ds.get("AcquisitionDate") or ""), str(ds.get("AcquisitionTime") or "")
        written = date + time if date and time else ""
    if len(written) < 12:
        return None
    offset = str(ds.get("TimezoneOffsetFromUTC") or "")  # (0008,0201)
    try:
        at = DT(written if any(sign in written for sign in "+-") else written + offset)
        return datetime.fromisoformat(at.isoformat()).astimezone()
    except (ValueError, OverflowError, OSError):
        return None


def _value(ds: Dataset, keyword: str) -> Any:
    value = ds.get(keyword)
    return value[0] if isinstance(value, MultiValue) and value else value


def _text(ds: Dataset, keyword: str) -> str:
    return str(_value(ds, keyword) or "").strip()[:LONGEST_TEXT]


def _number(ds: Dataset, keyword: str) -> float | None:
    try:
        number = float(_value(ds, keyword))
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _measured(volume: Volume) -> tuple[float | None, float | None]:
    """Median and noise of the soft tissue of the middle slices."""
    first = max(0, (volume.slice_count - MIDDLE_SLICES) // 2)
    middle = volume.hounsfield[first : first + MIDDLE_SLICES].astype(np.float32)
    inside = (middle > TISSUE[0]) & (middle < TISSUE[1])
    both = inside[..., 1:] & inside[..., :-1]
    if not both.any():
        return None, None
    difference = np.abs(np.diff(middle, axis=-1)[both])
    noise = 1.4826 * float(np.median(difference)) / np.sqrt(2)
    return round(float(np.median(middle[inside])), 2), round(float(noise), 3)

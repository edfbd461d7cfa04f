"""Pictures of a series: a stack of slices from the prediction or from the files, and one slice as PNG."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from herald.errors import DicomError
from herald.events import SeriesTriaged
from herald.picture import as_png, draw_slice
from herald.store import Prediction, StudyStore
from herald.volume import WINDOWS, read_datasets, volume_from_datasets

MIDDLE_SLICES = 9
"""Slices shown of a series that was not analysed: enough to see what it is, and quick to read."""

FEWEST_GREY = 0.05
"""Share of pixels within a window below which a picture says nothing."""

_KEPT_STACKS = 6  # of 32 slices: 16 MB each


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices that can be shown, inferior to superior.

    `hounsfield` (D, H, W) int16; `mask` (D, H, W) uint8, probability of any haemorrhage x 255, and `slice_probability`
    (D,) float32, both None without a prediction; `numbers` (D,) say in words which original slices each one shows;
    `sop_instance_uids` (D,); `aspect` height of a pixel by its width; `explanation` why there is not more to see.
    """

    hounsfield: NDArray[np.int16]
    mask: NDArray[np.uint8] | None
    slice_probability: NDArray[np.float32] | None
    numbers: tuple[str, ...]
    sop_instance_uids: tuple[str, ...]
    aspect: float = 1.0
    explanation: str = ""

    @property
    def slice_count(self) -> int:
        """Number of slices."""
        return int(self.hounsfield.shape[0])

    @property
    def middle(self) -> int:
        """0-based middle slice."""
        return self.slice_count // 2

    @property
    def hottest(self) -> int:
        """0-based slice with the highest probability of any haemorrhage; the middle one without a prediction."""
        return self.middle if self.slice_probability is None else int(np.argmax(self.slice_probability))

    @property
    def window(self) -> str:
        """The window to open with: brain, unless it would show hardly any grey, as of a localizer or a bone kernel."""
        grey = WINDOWS["brain"].apply(self.hounsfield[self.middle])
        enough = self.mask is not None or np.mean((grey > 0) & (grey < 255)) > FEWEST_GREY
        return "brain" if enough else "bone"


class Pictures:
    """Stacks of the series looked at last, kept in memory; safe to use from several threads."""

    def __init__(self, store: StudyStore) -> None:
        self._store = store
        self._stacks: OrderedDict[tuple[str, int, int], Stack] = OrderedDict()
        self._lock = threading.Lock()

    def stack(self, event: SeriesTriaged) -> Stack:
        """The slices of a series revision; raises StoreError, or DicomError when nothing can be shown of it."""
        study, series, revision = event.study_instance_uid, event.series_instance_uid, event.revision
        path = self._store.prediction_path(study, series, revision)
        written = path.stat().st_mtime_ns if path.exists() else 0
        key = (series, revision, written)
        with self._lock:
            if key in self._stacks:
                self._stacks.move_to_end(key)
                return self._stacks[key]
        prediction = self._store.read_prediction(study, series, revision)
        if prediction is not None:
            stack = _stack_of_prediction(prediction)
        else:
            stack = _stack_of_files(self._store.series_paths(study, series))
        with self._lock:
            self._stacks[key] = stack
            while len(self._stacks) > _KEPT_STACKS:
                self._stacks.popitem(last=False)
        return stack


def _stack_of_prediction(prediction: Prediction) -> Stack:
    return Stack(
        hounsfield=prediction.hounsfield,
        mask=np.ascontiguousarray(prediction.mask[..., 0]),
        slice_probability=prediction.slice_probability[:, 0],
        numbers=tuple(
            _span(int(first) + 1, int(last) + 1)
            for first, last in zip(prediction.first_source, prediction.last_source, strict=True)
        ),
        sop_instance_uids=tuple(str(uid) for uid in prediction.sop_instance_uids),
    )


def _stack_of_files(paths: list[Path]) -> Stack:
    """The middle slices of a series, by InstanceNumber."""
    if not paths:
        raise DicomError("the store holds no file of this series; its images were removed or never arrived")
    numbered = sorted((_instance_number(path), path.name, path) for path in paths)
    start = max(0, (len(numbered) - MIDDLE_SLICES) // 2)
    volume = volume_from_datasets(read_datasets(path for _, _, path in numbered[start : start + MIDDLE_SLICES]))
    shown = slice(None)
    if volume.slice_count > MIDDLE_SLICES:  # one enhanced multi-frame instance
        first = (volume.slice_count - MIDDLE_SLICES) // 2
        shown = slice(first, first + MIDDLE_SLICES)
    hounsfield = volume.hounsfield[shown]
    return Stack(
        hounsfield=hounsfield,
        mask=None,
        slice_probability=None,
        numbers=tuple(str(number) for number in volume.instance_numbers[shown]),
        sop_instance_uids=volume.sop_instance_uids[shown],
        aspect=volume.pixel_spacing_mm[0] / volume.pixel_spacing_mm[1],
        explanation=f"Not analysed for haemorrhage: {len(hounsfield)} middle slices as they were received, no mask.",
    )


def _instance_number(path: Path) -> int:
    try:
        return int(dcmread(path, stop_before_pixels=True, specific_tags=["InstanceNumber"]).get("InstanceNumber") or 0)
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError):
        return 0  # reading the slice itself says what is wrong with it


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def render(stack: Stack, index: int, window: str, *, mask: bool) -> bytes:
    """PNG of slice `index` (0-based) at a window of `herald.volume.WINDOWS`, the predicted mask over it."""
    shown = stack.mask[index] if mask and stack.mask is not None else None
    return as_png(draw_slice(stack.hounsfield[index], WINDOWS[window], shown, aspect=stack.aspect))

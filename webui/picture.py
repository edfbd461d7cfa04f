"""Pictures of a series: a stack of slices from the prediction or from the files, and one cut through it as PNG."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.errors import InvalidDicomError

from herald.errors import DicomError, VolumeError
from herald.events import SeriesTriaged
from herald.picture import MASK_OPACITY, as_png, draw_slice
from herald.store import INSTANCE_SUFFIX, Prediction, StudyStore
from herald.volume import WINDOWS, Volume, Window, read_datasets, volume_from_datasets
from webui.nifti import Triple

MIDDLE_SLICES = 9
"""Slices shown of a series that was not analysed: enough to see what it is, and quick to read."""

FEWEST_GREY = 0.05
"""Share of pixels within a window below which a picture says nothing."""

PLANES = ("slice", "coronal", "sagittal")

USUAL_SPACING_MM = 5.0
"""Between slices whose files are gone: what thin ones are averaged to, and what thick ones mostly have."""

_KEPT_STACKS = 6  # of 32 slices: 16 MB each
_KEPT_ORIGINALS = 2  # of 32 slices: 17 MB each, of 500: 262 MB

Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Stack:
    """Slices that can be shown, inferior to superior.

    `hounsfield` (D, H, W) int16; `mask` uint8, probability of any haemorrhage x 255, and `slice_probability`, both None
    without a prediction, by the model's slices; `numbers` (D,) say in words which original slices each one shows;
    `sop_instance_uids` (D,); `aspect` height of a pixel by its width; `explanation` why there is not more to see.
    `spacing_mm` and `origin_mm` along column, row and slice, origin in the middle of the original matrix and at its
    lowest slice. `in_mask` are three index arrays into the mask for each slice, row and column, -1 outside; None where
    the mask has the same voxels.
    """

    hounsfield: NDArray[np.int16]
    mask: NDArray[np.uint8] | None
    slice_probability: NDArray[np.float32] | None
    numbers: tuple[str, ...]
    sop_instance_uids: tuple[str, ...]
    aspect: float = 1.0
    explanation: str = ""
    orientation: str = "axial"
    spacing_mm: Triple = (1.0, 1.0, 1.0)
    origin_mm: Triple = (0.0, 0.0, 0.0)
    in_mask: tuple[Index, Index, Index] | None = None

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
    def focus(self) -> tuple[float, float]:
        """Where the mask is hottest in the hottest slice: shares of width and height; the middle without a mask."""
        if self.mask is None or not self.mask[self.hottest].any():
            return 0.5, 0.5
        row, column = np.unravel_index(int(np.argmax(self.mask[self.hottest])), self.mask.shape[1:])
        return (float(column) + 0.5) / self.mask.shape[2], (float(row) + 0.5) / self.mask.shape[1]

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
        self._stacks = _Newest(_KEPT_STACKS)
        self._originals = _Newest(_KEPT_ORIGINALS)

    def stack(self, event: SeriesTriaged) -> Stack:
        """The slices of a series revision; raises StoreError, or DicomError when nothing can be shown of it."""
        study, series, revision = event.study_instance_uid, event.series_instance_uid, event.revision
        path = self._store.prediction_path(study, series, revision)
        written = path.stat().st_mtime_ns if path.exists() else 0
        return self._stacks.get((series, revision, written), lambda: self._read_stack(event))

    def original(self, event: SeriesTriaged) -> Stack:
        """Every slice as it was received, with the mask over it; raises StoreError, or DicomError saying why not."""
        paths = self._store.series_paths(event.study_instance_uid, event.series_instance_uid)
        key = (event.series_instance_uid, event.revision, len(paths))
        return self._originals.get(key, lambda: self._read_original(event, paths))

    def _read_stack(self, event: SeriesTriaged) -> Stack:
        prediction = self._store.read_prediction(event.study_instance_uid, event.series_instance_uid, event.revision)
        if prediction is None:
            return _stack_of_files(self._store.series_paths(event.study_instance_uid, event.series_instance_uid))
        folder = self._store.series_folder(event.study_instance_uid, event.series_instance_uid)
        return _stack_of_prediction(prediction, _spacing_between(folder, prediction))

    def _read_original(self, event: SeriesTriaged, paths: list[Path]) -> Stack:
        if not paths:
            raise DicomError("the store holds no file of this series; its images were removed or never arrived")
        volume = volume_from_datasets(read_datasets(paths))
        prediction = self._store.read_prediction(event.study_instance_uid, event.series_instance_uid, event.revision)
        stack = _stack_of_volume(volume, slice(None))
        return replace(stack, explanation="") if prediction is None else _with_mask(stack, prediction)


class _Newest:
    """Stacks by key; the ones that were not asked for longest go first."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: OrderedDict[Hashable, Stack] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, read: Callable[[], Stack]) -> Stack:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        stack = read()  # outside the lock: one slow disk must not hold up every reader
        with self._lock:
            self._kept[key] = stack
            while len(self._kept) > self._count:
                self._kept.popitem(last=False)
        return stack


# --- from the prediction ---------------------------------------------------------------------------------------------


def _stack_of_prediction(prediction: Prediction, between_mm: float | None) -> Stack:
    """What the model saw, placed in the original matrix; `between_mm` neighbouring slices, None if not known."""
    top, left, side, rows, columns = (int(number) for number in prediction.placement)
    row_mm, column_mm = (float(mm) for mm in prediction.pixel_spacing_mm)
    scale = side / prediction.mask.shape[1]
    per_slice, lowest = _slab_line(prediction)
    between = between_mm or USUAL_SPACING_MM
    return Stack(
        hounsfield=prediction.hounsfield,
        mask=np.ascontiguousarray(prediction.mask[..., 0]),
        slice_probability=prediction.slice_probability[:, 0],
        numbers=tuple(
            _span(int(first) + 1, int(last) + 1)
            for first, last in zip(prediction.first_source, prediction.last_source, strict=True)
        ),
        sop_instance_uids=tuple(str(uid) for uid in prediction.sop_instance_uids),
        aspect=row_mm / column_mm,
        spacing_mm=(scale * column_mm, scale * row_mm, between),
        origin_mm=(
            (left + scale / 2 - columns / 2) * column_mm,
            (top + scale / 2 - rows / 2) * row_mm,
            lowest * between / per_slice,
        ),
    )


def _slab_line(prediction: Prediction) -> tuple[float, float]:
    """Original slices from one model slice to the next, and where the first one lies among them."""
    middles = (prediction.first_source + prediction.last_source) / 2
    if len(middles) < 2:
        return 1.0, float(middles[0])
    slope, start = np.polyfit(np.arange(len(middles)), middles, 1)
    return float(slope), float(start)


def _spacing_between(folder: Path, prediction: Prediction) -> float | None:
    """Mean distance of neighbouring model slices in mm, by the files of the first and the last one."""
    ends = [_header(folder / f"{prediction.sop_instance_uids[i]}{INSTANCE_SUFFIX}") for i in (0, -1)]
    try:
        first, last = (np.array(end.ImagePositionPatient, dtype=float) for end in ends)
        cosines = np.array(ends[0].ImageOrientationPatient, dtype=float)
        away = abs(float(np.dot(last - first, np.cross(cosines[:3], cosines[3:]))))
    except (AttributeError, TypeError, ValueError):  # an enhanced instance has them by frame; some have none
        return None
    count = len(prediction.sop_instance_uids)
    return away / (count - 1) if count > 1 and away > 0 else None


def _header(path: Path) -> Dataset:
    tags = ["InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient"]
    try:
        return dcmread(path, stop_before_pixels=True, specific_tags=tags)
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError):
        return Dataset()  # reading the slice itself says what is wrong with it


# --- from the files --------------------------------------------------------------------------------------------------


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
    return _stack_of_volume(volume, shown)


def _instance_number(path: Path) -> int:
    try:
        return int(_header(path).get("InstanceNumber") or 0)
    except (ValueError, TypeError):
        return 0


def _stack_of_volume(volume: Volume, shown: slice) -> Stack:
    hounsfield = volume.hounsfield[shown]
    row_mm, column_mm = volume.pixel_spacing_mm
    _, rows, columns = hounsfield.shape
    return Stack(
        hounsfield=hounsfield,
        mask=None,
        slice_probability=None,
        numbers=tuple(str(number) for number in volume.instance_numbers[shown]),
        sop_instance_uids=volume.sop_instance_uids[shown],
        aspect=row_mm / column_mm,
        explanation=f"Not analysed for haemorrhage: {len(hounsfield)} middle slices as they were received, no mask.",
        orientation=volume.orientation,
        spacing_mm=(column_mm, row_mm, volume.slice_spacing_mm or USUAL_SPACING_MM),
        origin_mm=((0.5 - columns / 2) * column_mm, (0.5 - rows / 2) * row_mm, 0.0),
    )


def _with_mask(stack: Stack, prediction: Prediction) -> Stack:
    """The original slices with the prediction that was made from them."""
    slabs = np.repeat(np.arange(len(prediction.first_source)), prediction.last_source - prediction.first_source + 1)
    middles = (prediction.first_source + prediction.last_source + 1) // 2
    uids = np.array(stack.sop_instance_uids)
    if len(slabs) != len(uids) or (uids[middles] != prediction.sop_instance_uids).any():
        raise VolumeError(
            f"the series has {len(uids)} slices now, {len(slabs)} were analysed as this revision; open its newest one"
        )
    top, left, side, rows, columns = (int(number) for number in prediction.placement)
    seen = prediction.mask.shape[1]
    return replace(
        stack,
        mask=np.ascontiguousarray(prediction.mask[..., 0]),
        slice_probability=prediction.slice_probability[slabs, 0],
        numbers=tuple(str(number) for number in range(1, len(slabs) + 1)),
        explanation="",
        in_mask=(slabs, _in_square(rows, top, side, seen), _in_square(columns, left, side, seen)),
    )


def _in_square(count: int, start: int, side: int, seen: int) -> Index:
    """The model's row, of `seen`, of each original row, or column; -1 outside of what the model saw."""
    index = np.floor((np.arange(count) + 0.5 - start) * seen / side).astype(np.int64)
    index[(index < 0) | (index >= seen)] = -1
    return index


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


# --- to the screen ---------------------------------------------------------------------------------------------------


def cut_count(stack: Stack, plane: str) -> int:
    """How many cuts there are in a plane of PLANES."""
    return int(stack.hounsfield.shape[PLANES.index(plane)])


def render(
    stack: Stack, index: int, window: str | Window, *, mask: bool, opacity: float = MASK_OPACITY, plane: str = "slice"
) -> bytes:
    """PNG of cut `index` (0-based) in a plane at a window, the predicted mask over it.

    Seen as radiologists do: axial from below and coronal from the front, the patient's right on the left of the
    picture; sagittal with the nose on the left.
    """
    across, down, up = stack.spacing_mm
    cut: tuple[slice | int, ...]
    if plane == "slice":
        cut, aspect = (index,), stack.aspect
    elif plane == "coronal":
        cut, aspect = (slice(None, None, -1), index), up / across
    else:
        cut, aspect = (slice(None, None, -1), slice(None), index), up / down
    shown = _mask_of(stack, cut) if mask else None
    wanted = WINDOWS[window] if isinstance(window, str) else window
    return as_png(draw_slice(stack.hounsfield[cut], wanted, shown, aspect=aspect, opacity=opacity))


def _mask_of(stack: Stack, cut: tuple[slice | int, ...]) -> NDArray[np.uint8] | None:
    if stack.mask is None or stack.in_mask is None:
        return None if stack.mask is None else stack.mask[cut]
    chosen = [
        np.atleast_1d(index[part]) for index, part in zip(stack.in_mask, (*cut, *[slice(None)] * 3), strict=False)
    ]
    slabs, rows, columns = np.ix_(*chosen)
    inside = (slabs >= 0) & (rows >= 0) & (columns >= 0)
    mask: NDArray[np.uint8] = np.where(inside, stack.mask[slabs, rows, columns], 0).astype(np.uint8)
    dropped = tuple(axis for axis, part in enumerate(cut) if isinstance(part, int))
    return mask.squeeze(dropped)

"""From the instances of one series to a volume in Hounsfield units, and from a volume to what the models see.

Axes: an axial volume is laid out (slice, row, column) with slices from inferior to superior, rows from anterior to
posterior and columns from the patient's right to left, whatever the order in which a scanner stored them.
Geometry follows DICOM PS3.3 C.7.6.2 (Image Plane) and C.8.2.1 (CT Image).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.multival import MultiValue
from scipy import ndimage

from herald.errors import NotDicomError, PixelDataError, VolumeError
from herald.instance import MOST_SCOUTS
from herald.signatures import DETECTION_IN_PLANE, PROTOCOL_IN_PLANE, PROTOCOL_SLICES

AIR_HOUNSFIELD = -1024

Hounsfield = NDArray[np.int16]


@dataclass(frozen=True)
class Window:
    """A display window in Hounsfield units: `center` and `width` as radiologists name them."""

    center: float
    width: float

    def apply(self, hounsfield: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Map Hounsfield units linearly to grey levels 0..255, clipped (PS3.3 C.11.2.1.3.2)."""
        low = self.center - self.width / 2
        grey = (hounsfield.astype(np.float32) - low) * (255.0 / self.width)
        grey_8bit: NDArray[np.uint8] = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
        return grey_8bit


BRAIN = Window(center=40, width=80)
SUBDURAL = Window(center=75, width=200)
STROKE = Window(center=40, width=40)
BONE = Window(center=600, width=2800)
WINDOWS = {"brain": BRAIN, "subdural": SUBDURAL, "stroke": STROKE, "bone": BONE}


@dataclass(frozen=True, eq=False)
class Volume:
    """One series as Hounsfield units with its geometry and without identity.

    `hounsfield` (D, H, W) int16; `positions_mm` (D,) along the slice normal, ascending; `pixel_spacing_mm` (row,
    column); `orientation` axial, coronal, sagittal or oblique; `gantry_tilt_deg` 0 when upright; `sop_instance_uids`
    and `instance_numbers` (D,) name the original of each slice; `notes` say in words what was unusual; `unreadable`
    says of each image that is missing here why its pixels could not be read; `left_out` how many slices did not fit the
    others, where these are more than scouts.
    """

    hounsfield: Hounsfield
    positions_mm: NDArray[np.float64]
    pixel_spacing_mm: tuple[float, float]
    orientation: str = "axial"
    gantry_tilt_deg: float = 0.0
    sop_instance_uids: tuple[str, ...] = ()
    instance_numbers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def slice_count(self) -> int:
        """Number of slices."""
        return int(self.hounsfield.shape[0])

    @property
    def slice_spacing_mm(self) -> float:
        """Median distance between neighbouring slices, perpendicular to them; 0 for a single slice."""
        return float(np.median(np.diff(self.positions_mm))) if self.slice_count > 1 else 0.0

    @property
    def slice_extents_mm(self) -> NDArray[np.float64]:
        """How much of the body each slice stands for: (D,) mm, half the way to either neighbour.

        Capped at 1.5 times the median spacing, so that a gap in the scan does not inflate a bleed's volume.
        """
        if self.slice_count < 2:
            return np.ones(self.slice_count)
        gaps = np.diff(self.positions_mm)
        extents = np.concatenate([gaps[:1], (gaps[:-1] + gaps[1:]) / 2, gaps[-1:]])
        capped: NDArray[np.float64] = np.minimum(extents, 1.5 * np.median(gaps))
        return capped


# --- from DICOM ------------------------------------------------------------------------------------------------------


def read_datasets(paths: Iterable[Path]) -> list[Dataset]:
    """Read Part 10 files; raises NotDicomError naming the first file that is none."""
    datasets: list[Dataset] = []
    for path in paths:
        try:
            datasets.append(dcmread(path))
        except (InvalidDicomError, OSError, EOFError, ValueError, KeyError) as error:
            raise NotDicomError(f"{path.name} cannot be read as DICOM ({error}); send the series again") from error
    return datasets


@dataclass(frozen=True)
class _Slice:
    """One image plane before it is put in its place."""

    hounsfield: Hounsfield
    sop_instance_uid: str
    instance_number: int
    position: NDArray[np.float64] | None  # (3,) mm, patient coordinates
    orientation: NDArray[np.float64] | None  # (6,) row and column direction cosines
    spacing: tuple[float, float] | None
    tilt_deg: float


def volume_from_datasets(datasets: Sequence[Dataset]) -> Volume:
    """Put the instances of one CT series together.

    Handles gantry tilt, reversed and duplicate positions, gaps, missing ImagePositionPatient and enhanced multi-frame
    CT, and says so in `notes`. Slices of another orientation or matrix are left out, and `left_out` tells when they are
    more than scouts. Images whose pixels cannot be read are left out and listed in `unreadable`; raises PixelDataError
    when there is no other, VolumeError when there is nothing to stack.
    """
    slices: list[_Slice] = []
    unreadable: list[PixelDataError] = []
    for ds in datasets:
        try:
            slices += _planes(ds)
        except PixelDataError as error:
            unreadable.append(error)
    if not slices and unreadable:
        raise unreadable[0]
    if not slices:
        raise VolumeError("the series has no image; nothing can be analysed")
    notes: list[str] = []
    count = len(slices)
    slices = _same_matrix(slices, notes)
    slices, cosines = _same_orientation(slices, notes)
    left_out = _left_out(count - len(slices), count)
    normal = np.cross(cosines[:3], cosines[3:])
    orientation = _plane_name(normal)
    positions = _positions(slices, normal, notes)

    order = np.argsort(positions, kind="stable")
    slices = [slices[i] for i in order]
    positions = positions[order]
    keep = _without_duplicates(slices, positions, notes)
    slices = [slices[i] for i in keep]
    positions = positions[keep]
    _note_gaps(positions, notes)

    hounsfield = np.stack([s.hounsfield for s in slices])
    uids = [s.sop_instance_uid for s in slices]
    numbers = [s.instance_number for s in slices]
    if orientation == "axial":
        if normal[2] < 0:  # slices ascend along the normal, so turn them to ascend towards the head
            hounsfield, positions = hounsfield[::-1], -positions[::-1]
            uids.reverse()
            numbers.reverse()
        if cosines[0] < 0:
            hounsfield = hounsfield[:, :, ::-1]
        if cosines[4] < 0:
            hounsfield = hounsfield[:, ::-1]

    spacing = next((s.spacing for s in slices if s.spacing), None)
    if spacing is None:
        spacing = (0.5, 0.5)
        notes.append("PixelSpacing is missing; 0.5 mm assumed, so volumes in ml are estimates")
    tilt = _tilt(slices, normal)
    if abs(tilt) >= 0.5:
        notes.append(f"gantry tilt {tilt:+.1f} degrees")
    return Volume(
        hounsfield=np.ascontiguousarray(hounsfield),
        positions_mm=positions,
        pixel_spacing_mm=spacing,
        orientation=orientation,
        gantry_tilt_deg=tilt,
        sop_instance_uids=tuple(uids),
        instance_numbers=tuple(numbers),
        notes=tuple(notes),
        unreadable=tuple(str(error) for error in unreadable),
        left_out=left_out,
    )


def _planes(ds: Dataset) -> list[_Slice]:
    """The image planes of one instance: one, or as many as an enhanced multi-frame instance has frames."""
    uid = str(ds.get("SOPInstanceUID", ""))
    if "PixelData" not in ds:
        raise PixelDataError(f"instance {uid} has no PixelData; send the image itself")
    try:
        pixels = ds.pixel_array
    except Exception as error:  # decoders raise many kinds: each means the same here, and the text is kept
        raise PixelDataError(f"pixels of instance {uid} cannot be decoded: {error}") from error
    if int(ds.get("SamplesPerPixel", 1)) != 1:
        raise PixelDataError(f"instance {uid} is a colour image, not CT")
    number = int(ds.get("InstanceNumber") or 0)
    shared, frames = ds.get("SharedFunctionalGroupsSequence"), ds.get("PerFrameFunctionalGroupsSequence")
    if pixels.ndim == 2:
        if not shared and not frames:
            return [_plane(ds, ds, pixels, uid, number)]
        pixels, first = pixels[np.newaxis], number  # one frame has functional groups too (PS3.3 C.7.6.16)
    else:
        first = 1
    groups_of_all = (shared or [Dataset()])[0]
    frames = frames or [Dataset()] * len(pixels)
    return [
        _plane(ds, _frame_attributes(ds, groups_of_all, frame), pixels[i], uid, first + i)
        for i, frame in enumerate(frames[: len(pixels)])
    ]


def _frame_attributes(ds: Dataset, shared: Dataset, frame: Dataset) -> Dataset:
    """Flatten the functional groups that place and scale one frame (PS3.3 C.7.6.16) into one data set."""
    flat = Dataset()
    for group in (shared, frame):
        for macro in (
            "PlanePositionSequence",
            "PlaneOrientationSequence",
            "PixelMeasuresSequence",
            "PixelValueTransformationSequence",
            "CTAcquisitionDetailsSequence",
        ):
            for item in group.get(macro) or []:
                flat.update(item)
    if "RescaleSlope" not in flat and "RescaleSlope" in ds:
        flat.RescaleSlope, flat.RescaleIntercept = ds.RescaleSlope, ds.RescaleIntercept
    return flat


def _plane(ds: Dataset, attributes: Dataset, pixels: NDArray[np.generic], uid: str, number: int) -> _Slice:
    slope = float(attributes.get("RescaleSlope") or 1)
    intercept = float(attributes.get("RescaleIntercept") or 0)
    values = pixels.astype(np.float32) * slope + intercept
    padding = ds.get("PixelPaddingValue")
    if isinstance(padding, int):
        values[pixels == padding] = AIR_HOUNSFIELD
    return _Slice(
        hounsfield=np.clip(np.rint(values), AIR_HOUNSFIELD, 32767).astype(np.int16),
        sop_instance_uid=uid,
        instance_number=number,
        position=_vector(attributes.get("ImagePositionPatient"), 3),
        orientation=_vector(attributes.get("ImageOrientationPatient"), 6),
        spacing=_spacing(attributes.get("PixelSpacing")),
        tilt_deg=float(attributes.get("GantryDetectorTilt") or ds.get("GantryDetectorTilt") or 0),
    )


def _vector(value: object, length: int) -> NDArray[np.float64] | None:
    if not isinstance(value, MultiValue) or len(value) != length:
        return None
    vector = np.array([float(v) for v in value])
    return vector if bool(np.isfinite(vector).all()) else None


def _spacing(value: object) -> tuple[float, float] | None:
    vector = _vector(value, 2)
    return (float(vector[0]), float(vector[1])) if vector is not None and bool((vector > 0).all()) else None


def _same_matrix(slices: list[_Slice], notes: list[str]) -> list[_Slice]:
    shapes = [s.hounsfield.shape for s in slices]
    usual = max(set(shapes), key=shapes.count)
    kept = [s for s in slices if s.hounsfield.shape == usual]
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} images of another matrix than {usual[0]}x{usual[1]} left out")
    return kept


def _left_out(odd: int, count: int) -> str:
    """What is told of odd slices that are more than scouts: a tilt that changes leaves out a part of the head."""
    if odd <= MOST_SCOUTS:
        return ""
    return f"{odd} of {count} slices left out, of another orientation or matrix than the others"


def _same_orientation(slices: list[_Slice], notes: list[str]) -> tuple[list[_Slice], NDArray[np.float64]]:
    """The slices of the usual orientation and its cosines: some scanners store scouts within the axial series."""
    known = [tuple(s.orientation.round(2)) for s in slices if s.orientation is not None]
    if not known:
        notes.append("ImageOrientationPatient is missing; taken as axial")
        return slices, np.array([1.0, 0, 0, 0, 1.0, 0])
    usual = max(set(known), key=known.count)
    cosines = next(
        s.orientation for s in slices if s.orientation is not None and tuple(s.orientation.round(2)) == usual
    )
    kept = [s for s in slices if s.orientation is None or bool(np.allclose(s.orientation, cosines, atol=0.05))]
    if len(kept) < len(slices):
        notes.append(f"{len(slices) - len(kept)} images of another orientation left out")
    return kept, cosines


def _plane_name(normal: NDArray[np.float64]) -> str:
    axis = int(np.argmax(np.abs(normal)))
    if abs(normal[axis]) < 0.8:  # gantry tilt reaches 30 degrees: cos 30 = 0.87
        return "oblique"
    return ("sagittal", "coronal", "axial")[axis]


def _positions(slices: list[_Slice], normal: NDArray[np.float64], notes: list[str]) -> NDArray[np.float64]:
    points = [s.position for s in slices]
    if all(p is not None for p in points):
        return np.array([float(np.dot(p, normal)) for p in points if p is not None])
    missing = sum(p is None for p in points)
    notes.append(f"ImagePositionPatient is missing in {missing} images; slices ordered by InstanceNumber")
    numbers = np.array([s.instance_number for s in slices], dtype=np.float64)
    known = [(n, float(np.dot(p, normal))) for n, p in zip(numbers, points, strict=True) if p is not None]
    slope = 5.0 if len(known) < 2 or known[0][0] == known[-1][0] else _slope(known)
    return numbers * slope


def _slope(known: list[tuple[float, float]]) -> float:
    number, position = np.array(known).T
    slope = float(np.polyfit(number, position, 1)[0])
    return slope if abs(slope) > 0.05 else 5.0


def _without_duplicates(slices: list[_Slice], positions: NDArray[np.float64], notes: list[str]) -> list[int]:
    keep = [0]
    for i in range(1, len(slices)):
        if positions[i] - positions[keep[-1]] > 0.01:
            keep.append(i)
    if len(keep) < len(slices):
        notes.append(f"{len(slices) - len(keep)} images at a position that another image has; the first is used")
    return keep


def _note_gaps(positions: NDArray[np.float64], notes: list[str]) -> None:
    steps = np.diff(positions)
    if len(steps) < 2:
        return
    usual = float(np.median(steps))
    uneven = [i for i, step in enumerate(steps) if step > 1.5 * usual]
    if uneven:
        notes.append(f"uneven spacing: {usual:.1f} mm usual, up to {steps.max():.1f} mm after slice {uneven[0] + 1}")


def _tilt(slices: list[_Slice], normal: NDArray[np.float64]) -> float:
    """Angle of the slices against the patient's axis: from geometry, else as GantryDetectorTilt claims."""
    if abs(normal[2]) > 0.8 and abs(normal[1]) > 1e-3:
        return (
            float(np.degrees(np.arctan2(normal[1], normal[2])))
            if normal[2] > 0
            else float(np.degrees(np.arctan2(-normal[1], -normal[2])))
        )
    points = [s.position for s in slices if s.position is not None]
    if len(points) > 1:
        for first, second in pairwise(points):
            step = second - first
            if abs(step[2]) > 0.1 and abs(step[1]) > 1e-3:  # sheared stack: upright normal, shifting origin
                return float(np.degrees(np.arctan2(step[1], step[2])))
    return slices[0].tilt_deg


# --- to the models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slabs:
    """A volume averaged to thicker slices; `members[i]` are the slices of `source` that slab i averages."""

    volume: Volume
    source: Volume
    members: tuple[tuple[int, ...], ...]


def slabs(volume: Volume, thickness_mm: float = 5.0) -> Slabs:
    """Average thin slices to slabs of about `thickness_mm`; a series that is already that thick stays as it is."""
    if volume.slice_count < 2 or volume.slice_spacing_mm > thickness_mm / 2:
        return Slabs(volume, volume, tuple((i,) for i in range(volume.slice_count)))
    bins = np.floor((volume.positions_mm - volume.positions_mm[0]) / thickness_mm + 1e-6).astype(int)
    members = tuple(tuple(int(i) for i in np.flatnonzero(bins == b)) for b in np.unique(bins))
    thick = np.stack([np.rint(volume.hounsfield[m[0] : m[-1] + 1].mean(axis=0)).astype(np.int16) for m in members])
    middles = [m[len(m) // 2] for m in members]
    return Slabs(
        volume=replace(
            volume,
            hounsfield=thick,
            positions_mm=np.array([float(volume.positions_mm[list(m)].mean()) for m in members]),
            sop_instance_uids=tuple(volume.sop_instance_uids[i] for i in middles) if volume.sop_instance_uids else (),
            instance_numbers=tuple(volume.instance_numbers[i] for i in middles) if volume.instance_numbers else (),
            notes=(*volume.notes, f"{volume.slice_count} slices averaged to {len(members)} of {thickness_mm:g} mm"),
        ),
        source=volume,
        members=members,
    )


def protocol_batch(volume: Volume, chunks: int = 4) -> NDArray[np.int16]:
    """Up to `chunks` interleaved sets of eight evenly spread slices: (B, 8, 256, 256) int16.

    The whole field of view is kept, since it tells a head from a body. Of a matrix of 512 each pixel is the mean of
    four: what is faint, as dilute contrast medium under the noise of a bone kernel, shows better than in one of them,
    and as much of the noise is left as tells a bone kernel from a soft one.
    """
    count = volume.slice_count
    chunks = max(1, min(chunks, count // PROTOCOL_SLICES))
    picks = np.linspace(0, count - 1, chunks * PROTOCOL_SLICES).round().astype(int)
    plane = _shrunk(_squared(volume.hounsfield[picks]))
    return np.ascontiguousarray(np.stack([plane[c::chunks] for c in range(chunks)]))


def _squared(hounsfield: Hounsfield) -> Hounsfield:
    """Pad the shorter in-plane side with air, evenly."""
    _, rows, columns = hounsfield.shape
    side = max(rows, columns)
    top, left = (side - rows) // 2, (side - columns) // 2
    pad = ((0, 0), (top, side - rows - top), (left, side - columns - left))
    return hounsfield if rows == columns else np.pad(hounsfield, pad, constant_values=AIR_HOUNSFIELD)


def _shrunk(hounsfield: Hounsfield) -> Hounsfield:
    """Square planes at PROTOCOL_IN_PLANE: means of as many pixels everywhere, so that the noise is alike everywhere."""
    side = hounsfield.shape[1]
    scale = side / PROTOCOL_IN_PLANE
    block = max(1, int(scale))
    first = ((np.arange(PROTOCOL_IN_PLANE) + 0.5) * scale - (block - 1) / 2).astype(int)
    rows = np.zeros((len(hounsfield), PROTOCOL_IN_PLANE, side), np.int32)
    total = np.zeros((len(hounsfield), PROTOCOL_IN_PLANE, PROTOCOL_IN_PLANE), np.int32)
    for i in range(block):
        rows += hounsfield[:, first + i]
    for i in range(block):
        total += rows.take(first + i, axis=2)
    mean: Hounsfield = np.rint(total / np.float32(block**2)).astype(np.int16)
    return mean


@dataclass(frozen=True)
class Placement:
    """Where the square that the haemorrhage model sees lies in the original matrix, in pixels (may reach outside)."""

    top: int
    left: int
    side: int
    matrix: tuple[int, int]


def detection_input(volume: Volume) -> tuple[Hounsfield, Placement]:
    """Cut out a square around the head, at one size: (D, N, N) int16 for N of DETECTION_IN_PLANE.

    Cutting by the head rather than by millimetres makes the input independent of the field of view and of whether
    PixelSpacing is known; `Placement` leads back. The haemorrhage model sees `herald.cranium.detector_view` of it.
    """
    placement = head_square(volume.hounsfield)
    side = placement.side
    scale = side / DETECTION_IN_PLANE
    rows = placement.top + (np.arange(DETECTION_IN_PLANE) + 0.5) * scale - 0.5
    columns = placement.left + (np.arange(DETECTION_IN_PLANE) + 0.5) * scale - 0.5
    out = np.empty((volume.slice_count, DETECTION_IN_PLANE, DETECTION_IN_PLANE), dtype=np.int16)
    grid = np.meshgrid(rows, columns, indexing="ij")
    for i, plane in enumerate(volume.hounsfield):
        smooth = ndimage.uniform_filter(plane.astype(np.float32), size=max(1, round(scale)))
        sampled = ndimage.map_coordinates(smooth, grid, order=1, mode="constant", cval=AIR_HOUNSFIELD)
        out[i] = np.rint(sampled).astype(np.int16)
    return out, placement


def head_square(hounsfield: Hounsfield, margin: float = 0.06) -> Placement:
    """The square around the head: per-slice extents of the largest body, thin head holders opened away.

    The 80th percentile over slices bounds it, so that shoulders in a few low slices do not shrink the head.
    """
    matrix = (int(hounsfield.shape[1]), int(hounsfield.shape[2]))
    step = max(1, round(min(matrix) / 128))
    body = ndimage.binary_opening(hounsfield[:, ::step, ::step] > -300, structure=np.ones((1, 5, 5), dtype=bool))
    boxes = []
    for plane in body:
        labels, count = ndimage.label(plane)
        if not count:
            continue
        largest = int(np.argmax(np.bincount(labels.ravel())[1:])) + 1
        row, column = ndimage.find_objects(labels)[largest - 1]
        boxes.append((row.start, row.stop, column.start, column.stop))
    if not boxes:
        side = max(matrix)
        return Placement((matrix[0] - side) // 2, (matrix[1] - side) // 2, side, matrix)
    r0, r1, c0, c1 = (np.array(boxes) * step).T
    extents = np.maximum(r1 - r0, c1 - c0)
    large = extents >= 0.5 * extents.max()
    side = round(float(np.percentile(extents[large], 80)) * (1 + 2 * margin))
    top = round(float(np.median((r0 + r1)[large])) / 2 - side / 2)
    left = round(float(np.median((c0 + c1)[large])) / 2 - side / 2)
    return Placement(top, left, max(side, 16), matrix)

"""A simulated CT scanner: planes through a subject, partial volume, kernel, noise, streaks and the head holder."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from serving.phantom.anatomy import Float, Subject

AIR_STORED = -1024  # what scanners write outside the reconstruction circle


@dataclass(frozen=True)
class Acquisition:
    """How one series is scanned and reconstructed. Angles in degrees, lengths in mm, noise in HU."""

    orientation: str = "axial"
    kernel: str = "soft"
    thickness_mm: float = 5.0
    spacing_mm: float = 5.0
    slices: int = 30
    matrix: int = 512
    field_mm: float = 230.0
    centre_mm: tuple[float, float, float] = (10.0, 10.0, 0.0)  # (z, y, x) of the stack's middle
    tilt_deg: float = 0.0
    pose_deg: tuple[float, float, float] = (0.0, 0.0, 0.0)  # pitch, roll, yaw of the subject
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    warp_mm: float = 3.0
    noise: float = 4.0
    blur_mm: float = 0.5
    sharpen: float = 0.0
    streaks: float = 4.0
    holder: str = "curved"  # curved, table or none
    circle: bool = False


def plane_axes(acquisition: Acquisition) -> NDArray[np.float64]:
    """Directions of slice normal, rows and columns: (3, 3), each (z, y, x) in patient axes."""
    tilt = np.radians(acquisition.tilt_deg)
    return np.array(
        {
            "axial": [[np.cos(tilt), np.sin(tilt), 0], [-np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]],
            "coronal": [[0, 1, 0], [-1, 0, 0], [0, 0, 1]],
            "sagittal": [[0, 0, 1], [-1, 0, 0], [0, 1, 0]],
        }[acquisition.orientation],
        dtype=np.float64,
    )


def scan(
    subject: Subject, acquisition: Acquisition, rng: np.random.Generator, noisy: bool = True
) -> tuple[Float, NDArray[np.uint8] | None]:
    """Scan `subject`: Hounsfield units (D, M, M) float32 and truth labels (D, M, M), or None for no bleed.

    With `noisy` false the kernel, the noise and the streaks are left out, for training that adds its own each time.
    """
    parts = 1 if acquisition.thickness_mm < 2.5 else 2 if acquisition.thickness_mm < 6 else 3
    offsets = (np.arange(parts) - (parts - 1) / 2) * acquisition.thickness_mm / parts
    place = _placement(subject, acquisition, rng)
    total = np.zeros((acquisition.slices, acquisition.matrix, acquisition.matrix), np.float32)
    for offset in offsets:
        total += _sample(subject.hounsfield, place, acquisition, subject, float(offset), order=1, outside=-1000.0)
    image = total / np.float32(parts)
    truth = None
    if subject.truth is not None:
        truth = _sample(subject.truth, place, acquisition, subject, 0.0, order=0, outside=0.0).astype(np.uint8)
    if subject.region == "head" or acquisition.holder == "table":
        _add_holder(image, acquisition)
    if noisy:
        image = develop(image, acquisition, rng)
    if acquisition.circle:
        ramp = (np.arange(acquisition.matrix, dtype=np.float32) + 0.5) / acquisition.matrix * 2 - 1
        image[:, ramp[:, None] ** 2 + ramp[None, :] ** 2 > 1] = AIR_STORED
    return np.maximum(image, AIR_STORED), truth


@dataclass(frozen=True, eq=False)
class _Placement:
    """Affine from scanner mm to subject mm and the waves of a smooth deformation."""

    rotation: NDArray[np.float64]
    waves: NDArray[np.float64]  # (n, 3) wave vectors per mm
    phases: NDArray[np.float64]
    amplitudes: NDArray[np.float64]  # (n, 3) mm


def _placement(subject: Subject, acquisition: Acquisition, rng: np.random.Generator) -> _Placement:
    pitch, roll, yaw = np.radians(acquisition.pose_deg)
    about_x = np.array([[np.cos(pitch), np.sin(pitch), 0], [-np.sin(pitch), np.cos(pitch), 0], [0, 0, 1]])
    about_y = np.array([[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[1, 0, 0], [0, np.cos(yaw), np.sin(yaw)], [0, -np.sin(yaw), np.cos(yaw)]])
    rotation = np.diag(1 / np.asarray(acquisition.scale)) @ about_x @ about_y @ about_z
    count = 5
    waves = rng.standard_normal((count, 3)) * 2 * np.pi / 160
    return _Placement(
        rotation,
        waves,
        rng.uniform(0, 2 * np.pi, count),
        rng.standard_normal((count, 3)) * acquisition.warp_mm / count**0.5,
    )


def _sample(
    grid: NDArray[np.int16 | np.uint8],
    place: _Placement,
    acquisition: Acquisition,
    subject: Subject,
    offset: float,
    order: Literal[0, 1],
    outside: float,
) -> Float:
    """Sample `grid` at the planes; coordinates are exact on a coarse mesh and linear between, which is fast."""
    matrix, mesh = acquisition.matrix, 33
    normal, down, right = plane_axes(acquisition)
    edge = np.linspace(-0.5, 0.5, mesh) * acquisition.field_mm
    pixel = ((np.arange(matrix) + 0.5) / matrix - 0.5) * acquisition.field_mm
    at = (pixel - edge[0]) / (edge[1] - edge[0])
    low = np.minimum(at.astype(int), mesh - 2)
    weights = np.zeros((matrix, mesh), np.float32)
    weights[np.arange(matrix), low] = 1 - (at - low)
    weights[np.arange(matrix), low + 1] = at - low
    out = np.empty((acquisition.slices, matrix, matrix), np.float32)
    pivot = np.array([5.0, 15.0, 0.0]) if subject.region == "head" else np.zeros(3)
    for i in range(acquisition.slices):
        along = (i - (acquisition.slices - 1) / 2) * acquisition.spacing_mm + offset
        point = (
            np.asarray(acquisition.centre_mm)
            + along * normal
            + edge[:, None, None] * down
            + edge[None, :, None] * right
        )
        point = (point - pivot) @ place.rotation.T + pivot
        point = point + np.sin(point @ place.waves.T + place.phases) @ place.amplitudes
        index = (point - np.asarray(subject.origin_mm)) / subject.spacing_mm
        fine = np.stack([weights @ index[..., k].astype(np.float32) @ weights.T for k in range(3)])
        ndimage.map_coordinates(grid, fine, out[i], order=order, mode="constant", cval=outside, prefilter=False)
    return out


def _add_holder(image: Float, acquisition: Acquisition) -> None:
    """Draw the head holder or the table top, which stays with the scanner while the head turns."""
    if acquisition.holder == "none":
        return
    normal, down, right = plane_axes(acquisition)
    pixel = (((np.arange(acquisition.matrix) + 0.5) / acquisition.matrix - 0.5) * acquisition.field_mm).astype(
        np.float32
    )
    along = (np.arange(acquisition.slices) - (acquisition.slices - 1) / 2) * acquisition.spacing_mm

    def coordinate(axis: int) -> Float:
        value = (
            acquisition.centre_mm[axis]
            + along[:, None, None] * normal[axis]
            + pixel[None, :, None] * down[axis]
            + pixel[None, None, :] * right[axis]
        )
        return np.asarray(value, np.float32)

    y, x = coordinate(1), coordinate(2)
    if acquisition.holder == "curved":
        radius = np.sqrt((x / 108) ** 2 + (np.maximum(y - 5, 0) / 118) ** 2)
        shell = (np.abs(radius - 1) < 0.014) & (y > -25)
        hounsfield = 180.0
    else:
        bend = y - 118 + (x / 55) ** 2 * 3
        shell = (np.abs(bend) < 1.6) & (np.abs(x) < 230)
        hounsfield = -100.0
    free = shell & (image < -700)
    image[free] = hounsfield


# --- kernel, noise and streaks ---------------------------------------------------------------------------------------


@cache
def noise_field(kernel: str, variant: int, size: int) -> Float:
    """A periodic field of unit variance with the noise power spectrum of a kernel, repeated to (2 size, 2 size).

    Filtered back projection gives a ramp times the square of the kernel's MTF (Riederer 1978); frequencies in
    cycles per pixel of a 512 matrix.
    """
    rng = np.random.default_rng((variant, size, kernel == "bone"))
    cut, power = (rng.uniform(0.13, 0.27), 2) if kernel == "soft" else (rng.uniform(0.3, 0.48), 4)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    frequency = np.hypot(fy, fx)
    shape = np.sqrt(frequency + 0.01) * np.exp(-((frequency / cut) ** power))
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * shape
    field = np.fft.irfft2(spectrum, s=(size, size))
    return np.tile((field / field.std()).astype(np.float32), (2, 2))


def noise(kernel: str, shape: tuple[int, int, int], rng: np.random.Generator, along_rows: float = 0.0) -> Float:
    """Noise of unit variance, (D, M, M): shifted and turned copies of a field made at twice M and decimated if M = 256.

    `along_rows` smooths down the rows, as in reformats whose rows run along the slices' thickness.
    """
    depth, matrix, _ = shape
    step = 2 if matrix <= 256 else 1
    size = 1024 if matrix * step > 512 else 512
    variant = int(rng.integers(10))
    out = np.empty(shape, np.float32)
    for i in range(depth):
        field = noise_field(kernel, variant, size)
        dy, dx = rng.integers(0, size, 2)
        patch = field[dy : dy + matrix * step : step, dx : dx + matrix * step : step]
        if along_rows > 0:
            patch = ndimage.gaussian_filter1d(patch, along_rows, axis=0)
            patch = patch / patch.std()
        out[i] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return out


def develop(image: Float, acquisition: Acquisition, rng: np.random.Generator) -> Float:
    """Apply kernel, noise and streaks to a clean image (D, M, M)."""
    pixel_mm = acquisition.field_mm / acquisition.matrix
    sigma = acquisition.blur_mm / pixel_mm
    if acquisition.sharpen > 0:
        halo = ndimage.gaussian_filter(image, (0, 0.9 / pixel_mm, 0.9 / pixel_mm))
        image = image + acquisition.sharpen * (image - halo)
    elif sigma > 0.2:
        image = ndimage.gaussian_filter(image, (0, sigma, sigma))
    grain_size = acquisition.noise * _attenuation(image)
    rows = 0.0 if acquisition.orientation == "axial" else acquisition.thickness_mm / pixel_mm * rng.uniform(0.1, 0.5)
    grain = noise(acquisition.kernel, (image.shape[0], acquisition.matrix, acquisition.matrix), rng, rows)
    image = image + grain_size * grain
    if acquisition.streaks > 0 and acquisition.orientation == "axial":
        image += acquisition.streaks * _streaks(image, rng)
    return image


def _attenuation(image: Float) -> Float:
    """How noisy each pixel is, about 0.25 in free air to 1.1 amid the head: noise grows with what the beam crosses."""
    step = 8
    solid = ndimage.gaussian_filter((image[:, ::step, ::step] > -400).astype(np.float32), (0, 5, 5))
    blocks = np.repeat(np.repeat(0.25 + 0.85 * solid, step, axis=1), step, axis=2)
    size: Float = blocks[:, : image.shape[1], : image.shape[2]]
    return size


def _streaks(image: Float, rng: np.random.Generator) -> Float:
    """Horizontal dark and bright bands where a row meets much bone on both sides, as between the petrous bones."""
    bone = (image > 500).mean(axis=2)
    row = ndimage.gaussian_filter1d(rng.standard_normal(bone.shape), 2.0, axis=1) * 2
    across = np.exp(-(np.linspace(-1, 1, image.shape[2]) ** 2) / 0.18)
    strength = np.clip((bone - 0.12) * 8, 0, 1.5) * (row - 0.4)
    bands: Float = (strength[:, :, None] * across).astype(np.float32)
    return bands

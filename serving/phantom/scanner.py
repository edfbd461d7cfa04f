"""A simulated CT scanner: planes through a subject, partial volume, kernel, noise, beam hardening, motion, holder."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

from serving.phantom.anatomy import Float, Subject

AIR_STORED = -1024  # what scanners write outside the reconstruction circle
BRIGHTEST = 3071  # of twelve bits; metal is brighter


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
    streaks: float = 4.0  # beam hardening and starved rays, about the HU that the petrous bones cost the pons
    motion_mm: float = 0.0  # by which the head moves in the midst of some slices
    holder: str = "curved"  # curved, table or none
    circle: bool = False
    averaged: bool = False  # a matrix of 256 whose pixels are each the mean of four of 512: less noise


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
    return np.clip(image, AIR_STORED, BRIGHTEST), truth


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
        for push in subject.pushes:
            away = ((point - np.asarray(push.centre_mm)) ** 2).sum(-1) / (2 * push.reach_mm**2)
            point[..., 2] -= push.shift_mm * np.exp(-away)
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


def noise(
    kernel: str,
    shape: tuple[int, int, int],
    rng: np.random.Generator,
    along_rows: float = 0.0,
    averaged: bool = False,
) -> Float:
    """Noise of unit variance, (D, M, M): shifted and turned copies of a field made at twice M and decimated if M = 256.

    With `averaged` it is not decimated: each pixel is the mean of four, which hold the unit variance. `along_rows`
    smooths down the rows, as in reformats whose rows run along the slices' thickness.
    """
    depth, matrix, _ = shape
    step = 2 if matrix <= 256 else 1
    size = 1024 if matrix * step > 512 else 512
    kept = 1 if averaged else step
    variant = int(rng.integers(10))
    out = np.empty(shape, np.float32)
    for i in range(depth):
        field = noise_field(kernel, variant, size)
        dy, dx = rng.integers(0, size, 2)
        patch = field[dy : dy + matrix * step : kept, dx : dx + matrix * step : kept]
        if along_rows > 0:
            patch = ndimage.gaussian_filter1d(patch, along_rows * step / kept, axis=0)
            patch = patch / patch.std()
        if averaged:
            patch = patch.reshape(matrix, step, matrix, step).mean((1, 3))
        out[i] = patch[:, ::-1] if rng.random() < 0.5 else patch
    return out


def develop(image: Float, acquisition: Acquisition, rng: np.random.Generator) -> Float:
    """Apply motion, kernel, noise and streaks to a clean image (D, M, M)."""
    pixel_mm = acquisition.field_mm / acquisition.matrix
    streaks = None
    if acquisition.orientation == "axial" and (acquisition.streaks > 0 or acquisition.motion_mm > 0):
        streaks = _Sinogram.of(image, pixel_mm)
        if acquisition.motion_mm > 0:
            image = _moved(image, streaks, acquisition.motion_mm / pixel_mm, rng)
    sigma = acquisition.blur_mm / pixel_mm
    if sigma > 0.2:
        image = ndimage.gaussian_filter(image, (0, sigma, sigma))
    if acquisition.sharpen > 0:
        halo = ndimage.gaussian_filter(image, (0, 0.9 / pixel_mm, 0.9 / pixel_mm))
        image = image + acquisition.sharpen * (image - halo)
    grain_size = acquisition.noise * _attenuation(image)
    rows = 0.0 if acquisition.orientation == "axial" else acquisition.thickness_mm / pixel_mm * rng.uniform(0.1, 0.5)
    grain = noise(
        acquisition.kernel, (image.shape[0], acquisition.matrix, acquisition.matrix), rng, rows, acquisition.averaged
    )
    grain *= grain_size
    image = image + grain
    if streaks is not None:
        if acquisition.streaks > 0:
            streaks.harden(acquisition.streaks / 4, rng)
        image += streaks.error(image.shape)
    return image


def _attenuation(image: Float) -> Float:
    """How noisy each pixel is, about 0.25 in free air to 1.1 amid the head: noise grows with what the beam crosses."""
    step = 8
    solid = ndimage.gaussian_filter((image[:, ::step, ::step] > -400).astype(np.float32), (0, 5, 5))
    blocks = np.repeat(np.repeat(0.25 + 0.85 * solid, step, axis=1), step, axis=2)
    size: Float = blocks[:, : image.shape[1], : image.shape[2]]
    return size


ANGLES = 90
WATER_PER_CM = 0.2  # linear attenuation at 70 keV


@cache
def _projector(size: int) -> sparse.csr_array:
    """Parallel projections of (size, size) pixels at ANGLES angles, size bins each: (ANGLES * size, size * size)."""
    at = np.arange(size) - (size - 1) / 2
    y, x = (v.ravel() for v in np.meshgrid(at, at, indexing="ij"))
    rows, columns, weights = [], [], []
    for k, angle in enumerate(np.arange(ANGLES) * np.pi / ANGLES):
        bins = x * np.cos(angle) + y * np.sin(angle) + (size - 1) / 2
        low = np.floor(bins).astype(int)
        for bin_, weight in ((low, 1 - (bins - low)), (low + 1, bins - low)):
            inside = (bin_ >= 0) & (bin_ < size)
            rows.append(k * size + bin_[inside])
            columns.append(np.flatnonzero(inside))
            weights.append(weight[inside])
    matrix = sparse.csr_array(
        (np.concatenate(weights).astype(np.float32), (np.concatenate(rows), np.concatenate(columns))),
        shape=(ANGLES * size, size * size),
    )
    return matrix


@dataclass(frozen=True, eq=False)
class _Sinogram:
    """What goes wrong in the projections of an image, on a coarse grid, and what it does to the reconstruction.

    After Brooks and Di Chiro 1976: a polychromatic beam measures too little behind bone, by about the square of its
    path there; and where little of the beam is left, its noise makes streaks (Hsieh 1998).
    """

    size: int
    step: int  # pixels of the image that a pixel here spans
    hounsfield: float  # of one unit of attenuation per pixel here
    tissue: Float  # (size * size, D) attenuation per pixel
    bone: Float  # the same of bone beyond water
    wrong: Float  # (ANGLES * size, D) error of the projections

    @staticmethod
    def of(image: Float, pixel_mm: float) -> "_Sinogram":
        """Of an image (D, M, M) in Hounsfield units."""
        step = max(1, round(image.shape[1] / 110))
        size = image.shape[1] // step
        mean, bone = (
            np.asarray(x[:, : size * step, : size * step].reshape(-1, size, step, size, step).mean((2, 4)), np.float32)
            .reshape(len(image), -1)
            .T
            for x in (image, np.maximum(image - 150, 0))
        )
        hounsfield = 1000 / (WATER_PER_CM * pixel_mm * step / 10)
        return _Sinogram(
            size,
            step,
            hounsfield,
            np.asarray((np.maximum(mean, -1000) + 1000) / hounsfield, np.float32),
            np.asarray(bone / hounsfield, np.float32),
            np.zeros((ANGLES * size, len(image)), np.float32),
        )

    def harden(self, strength: float, rng: np.random.Generator) -> None:
        """Add beam hardening by bone and the noise of starved rays."""
        project = _projector(self.size)
        bone, path = project @ self.bone, project @ self.tissue
        np.subtract(self.wrong, np.float32(0.012 * strength) * bone * (bone + np.float32(0.15) * path), out=self.wrong)
        starved = np.expm1(np.clip((path - 5.0) / 2, 0, 2.5))
        self.wrong[:] += np.float32(0.012 * strength**0.5) * starved * rng.standard_normal(path.shape, np.float32)

    def move(self, first: int, moved: Float, share: float) -> None:
        """Let slices from `first` on be `moved` (size, size, n) for the last `share` of the angles.

        The image already holds the mean of before and after; this adds what is not just that.
        """
        some = slice(first, first + moved.shape[2])
        change = _projector(self.size) @ (moved.reshape(-1, moved.shape[2]) - self.tissue[:, some])
        angle = np.repeat(np.arange(ANGLES) / ANGLES, self.size)
        late = 1 / (1 + np.exp((1 - share - angle) * 12))  # no head jumps
        self.wrong[:, some] += (0.4 * (late - late.mean())).astype(np.float32)[:, None] * change

    def error(self, shape: tuple[int, ...]) -> Float:
        """The error in Hounsfield units by filtered back projection, `shape` (D, M, M); its median in brain is none."""
        depth, matrix, _ = shape
        ramp = np.abs(np.fft.rfftfreq(2 * self.size))[:, None]
        spectrum = np.fft.rfft(self.wrong.reshape(ANGLES, self.size, depth), 2 * self.size, axis=1) * ramp
        filtered = np.fft.irfft(spectrum, axis=1)[:, : self.size].astype(np.float32).reshape(-1, depth)
        coarse: Float = (_projector(self.size).T @ filtered) * np.float32(self.hounsfield * np.pi / ANGLES)
        soft = np.abs(self.tissue * self.hounsfield - 1030) < 40
        if soft.any():
            coarse -= np.float32(np.median(coarse[soft]))
        coarse[self.tissue * self.hounsfield < 500] *= 0.5  # air is often cut off at -1024
        at = np.clip((np.arange(matrix) + 0.5) / self.step - 0.5, 0, self.size - 1)
        low = np.minimum(at.astype(int), self.size - 2)
        weights = np.zeros((matrix, self.size), np.float32)
        weights[np.arange(matrix), low] = 1 - (at - low)
        weights[np.arange(matrix), low + 1] = at - low
        planes = coarse.T.reshape(depth, self.size, self.size)
        return np.asarray(weights @ planes @ weights.T, np.float32)


def _moved(image: Float, sinogram: _Sinogram, reach_px: float, rng: np.random.Generator) -> Float:
    """Let the head move in the midst of a few slices: doubled contours here, streaks by the sinogram."""
    count = min(int(rng.integers(2, 8)), len(image))
    first = int(rng.integers(len(image) - count + 1))
    share = float(rng.uniform(0.2, 0.5))
    angle = rng.uniform(0, 2 * np.pi)
    shift = reach_px * np.array([np.sin(angle), np.cos(angle)])
    some = image[first : first + count]
    moved = ndimage.shift(some, (0, *shift), order=1, cval=float(AIR_STORED))
    coarse = sinogram.tissue[:, first : first + count].reshape(sinogram.size, sinogram.size, count)
    sinogram.move(first, ndimage.shift(coarse, (*(shift / sinogram.step), 0), order=1), share)
    out = image.copy()
    out[first : first + count] = (1 - np.float32(share)) * some + np.float32(share) * moved
    return out

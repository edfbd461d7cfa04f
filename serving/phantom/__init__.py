"""Simulated CT with voxel truth: `simulate` one series, `write_phantoms` folders of DICOM, `write_demo_study`.

>>> series = simulate(seed=7, findings={"iph": 30.0}, slices=30)   # doctest: +SKIP
>>> series.volume.hounsfield.shape, series.truth[..., 0].any(), series.labels["contrast"]   # doctest: +SKIP
((30, 512, 512), True, 'non_contrast')
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from herald.signatures import FINDINGS
from herald.volume import Volume
from serving.dicom_writer import Origin, seeded_uid, write_dicom_series
from serving.phantom.anatomy import HEAD_ORIGIN, Build, Float, Subject, draw_build, head, plastic_skull
from serving.phantom.bodies import body
from serving.phantom.haemorrhage import KINDS, bleed
from serving.phantom.mimics import draw_mimics, paint_mimics
from serving.phantom.scanner import Acquisition, plane_axes, scan

OTHER_REGIONS = ("trunk", "neck", "limb", "test_object")


@dataclass(frozen=True, eq=False)
class SimulatedSeries:
    """One simulated series: `volume`, voxel `truth` bool (D, H, W, len(FINDINGS)), and labels by protocol head."""

    volume: Volume
    truth: NDArray[np.bool_]
    labels: Mapping[str, str]
    acquisition: Acquisition
    image_positions_mm: NDArray[np.float64]  # (D, 3) patient x, y, z of the first pixel
    image_orientation: tuple[float, ...]  # six direction cosines
    mimics: tuple[str, ...] = ()  # what is in the subject beside bleeding
    bleeds: tuple[str, ...] = ()  # the kinds of serving.phantom.haemorrhage.KINDS that were painted

    @property
    def volumes_ml(self) -> dict[str, float]:
        """True volume of each finding in millilitres."""
        row, column = self.volume.pixel_spacing_mm
        per_slice = self.truth.sum(axis=(1, 2)) * (row * column / 1000)  # (D, C)
        return dict(
            zip(FINDINGS, (per_slice * self.volume.slice_extents_mm[:, None]).sum(axis=0).tolist(), strict=True)
        )


def simulate(
    seed: int,
    *,
    region: str = "head",
    contrast: str = "non_contrast",
    orientation: str = "axial",
    kernel: str = "soft",
    findings: Mapping[str, float] | None = None,
    build: Build | None = None,
    mimics: Sequence[str] | None = None,
    slices: int | None = None,
    matrix: int = 512,
    **acquisition: object,
) -> SimulatedSeries:
    """Simulate one series, the same for the same arguments; what is not asked for is drawn at random from `seed`.

    `region` head, skull (of plastic) or one of OTHER_REGIONS; `contrast` non_contrast, arterial, venous or delayed;
    `findings` maps kinds of bleed (`haemorrhage.KINDS`) to target volumes in ml, none by default; `mimics` names
    what else is in the head (`serving.phantom.mimics.MIMICS`); further keywords are fields of `Acquisition`. Raises
    ValueError for an unknown kind of bleed or mimic.
    """
    for_subject, rng = np.random.default_rng(seed).spawn(2)  # so that another subject is scanned alike
    subject = make_subject(for_subject, region=region, contrast=contrast, findings=findings, build=build, mimics=mimics)
    thickness = acquisition.get("thickness_mm")
    chosen = draw_acquisition(
        rng,
        subject,
        orientation=orientation,
        kernel=kernel,
        slices=slices,
        matrix=matrix,
        thickness_mm=float(thickness) if isinstance(thickness, int | float) else None,
    )
    return acquire(subject, replace(chosen, **acquisition), rng)  # type: ignore[arg-type]


def make_subject(
    rng: np.random.Generator,
    *,
    region: str = "head",
    contrast: str = "non_contrast",
    findings: Mapping[str, float] | None = None,
    build: Build | None = None,
    mimics: Sequence[str] | None = None,
) -> Subject:
    """Compose something to scan; about a second. Several series may be acquired of one subject."""
    if region in OTHER_REGIONS:
        return body(rng, region, contrast)
    if region == "skull":
        return _head_subject(plastic_skull(rng), None, "non_contrast", Build(), ())
    unknown = set(findings or {}) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kinds of bleed {sorted(unknown)}; known are {', '.join(KINDS)}")
    for_variety = rng.spawn(1)[0]  # so that the rest is drawn alike with and without
    build = draw_build(for_variety) if build is None else build
    mimics = draw_mimics(for_variety, build.age) if mimics is None else tuple(mimics)
    hounsfield, fluid = head(rng, contrast, build)
    paint_mimics(for_variety, hounsfield, build, mimics)
    grown = {kind: volume_ml / build.size**3 for kind, volume_ml in (findings or {}).items()}
    truth, pushes = bleed(rng, hounsfield, fluid, grown, build) if grown else (None, ())
    subject = _head_subject(hounsfield, truth, contrast, build, mimics)
    return replace(subject, bleeds=tuple(grown), pushes=pushes)


def _head_subject(
    hounsfield: Float, truth: NDArray[np.uint8] | None, contrast: str, build: Build, mimics: Sequence[str]
) -> Subject:
    z, y, x = (v * build.size for v in HEAD_ORIGIN)
    return Subject(
        hounsfield=np.clip(np.rint(hounsfield), -1024, 32_000).astype(np.int16),
        truth=truth,
        origin_mm=(z, y, x),
        spacing_mm=build.size,
        extent_mm=(-78.0 * build.size, 92.0 * build.size),
        field_mm=215.0 * build.size,
        region="head",
        contrast="non_contrast" if contrast == "non_contrast" else "contrast",
        mimics=(*mimics, *(() if build.age == "adult" else (build.age,))),
    )


def draw_acquisition(
    rng: np.random.Generator,
    subject: Subject,
    *,
    orientation: str = "axial",
    kernel: str = "soft",
    slices: int | None = None,
    matrix: int = 512,
    thickness_mm: float | None = None,
) -> Acquisition:
    """Draw how a subject is scanned: coverage, thickness, field of view, pose, noise, as clinical protocols vary."""
    is_head = subject.region == "head"
    low, high = subject.extent_mm
    if is_head:
        low += float(rng.choice([0, rng.uniform(-60, 0), rng.uniform(0, 30)], p=[0.5, 0.3, 0.2]))
        high += float(rng.choice([4, rng.uniform(-45, 0)], p=[0.75, 0.25]))
    else:
        middle = rng.uniform(low + 40, high - 40)
        half = rng.uniform(20, 100)
        low, high = max(low, middle - half), min(high, middle + half)
    thin = rng.random() < (0.6 if kernel == "bone" else 0.3)
    thickness = float(rng.choice([0.75, 1.0, 1.25, 2.0]) if thin else rng.choice([2.5, 3.0, 4.0, 5.0, 5.0, 6.0, 7.5]))
    thickness = thickness_mm or thickness
    reach = {"axial": high - low, "coronal": rng.uniform(120, 190), "sagittal": rng.uniform(90, 150)}[orientation]
    spacing = reach / slices if slices else thickness
    count = slices or max(8, round(reach / thickness))
    field = subject.field_mm * rng.uniform(0.98, 1.35) if is_head else subject.field_mm * rng.uniform(0.7, 1.3)
    if is_head and orientation != "axial":
        field *= 1.08
    z, y = ((low + high) / 2, 12.0) if is_head else ((low + high) / 2, 0.0)
    angle = rng.normal(0, 1, 3) * ((9, 4, 7) if is_head else (3, 2, 3))
    if is_head and rng.random() < 0.2:  # a head that could not be laid straight
        angle += rng.choice([-1, 1], 3) * rng.uniform((0, 4, 8), (14, 15, 25))
    soft_noise = np.exp(rng.normal(np.log(3.2), 0.28)) * (5 / max(thickness, 0.75)) ** 0.45  # as measured in real heads
    sharp_noise = rng.uniform(14, 45) * (5 / max(thickness, 0.75)) ** 0.45
    off_centre = rng.normal(0, rng.choice([5, 15], p=[0.8, 0.2]) if is_head else 5, 2)
    tilt = float(rng.uniform(-24, 24)) if is_head and orientation == "axial" and rng.random() < 0.4 else 0.0
    return Acquisition(
        orientation=orientation,
        kernel=kernel,
        thickness_mm=thickness,
        spacing_mm=float(spacing),
        slices=int(count),
        matrix=matrix,
        field_mm=float(field),
        centre_mm=(float(z + rng.normal(0, 3)), float(y + off_centre[0]), float(off_centre[1])),
        tilt_deg=tilt,
        pose_deg=(float(angle[0] + 0.8 * tilt), float(angle[1]), float(angle[2])),
        scale=tuple(float(v) for v in rng.uniform(0.9, 1.08, 3)),  # type: ignore[arg-type]
        warp_mm=float(rng.uniform(1, 4)),
        noise=float(soft_noise if kernel == "soft" else sharp_noise),
        blur_mm=float(rng.uniform(0.35, 0.8)) if kernel == "soft" else 0.0,
        sharpen=float(rng.uniform(0.5, 2.2) if kernel == "bone" else max(rng.uniform(-0.6, 0.4), 0)),
        streaks=float(rng.uniform(0, 8)),
        motion_mm=float(rng.uniform(0.5, 4)) if is_head and rng.random() < 0.08 else 0.0,
        holder=str(rng.choice(["curved", "none"], p=[0.7, 0.3])) if is_head else str(rng.choice(["table", "none"])),
        circle=bool(rng.random() < 0.3),
    )


def acquire(
    subject: Subject, acquisition: Acquisition, rng: np.random.Generator, noisy: bool = True
) -> SimulatedSeries:
    """Scan `subject` once."""
    image, classes = scan(subject, acquisition, rng, noisy)
    truth = np.zeros((*image.shape, len(FINDINGS)), bool)
    if classes is not None:
        for channel in range(1, len(FINDINGS)):
            truth[..., channel] = classes == channel
        truth[..., 0] = classes > 0
    pixel = acquisition.field_mm / acquisition.matrix
    normal, down, right = plane_axes(acquisition)
    along = (np.arange(acquisition.slices) - (acquisition.slices - 1) / 2) * acquisition.spacing_mm
    corner = (0.5 - acquisition.matrix / 2) * pixel
    corners = np.asarray(acquisition.centre_mm) + along[:, None] * normal + corner * (down + right)
    volume = Volume(
        hounsfield=np.rint(image).astype(np.int16),
        positions_mm=np.asarray(along + np.dot(acquisition.centre_mm, normal), dtype=np.float64),
        pixel_spacing_mm=(pixel, pixel),
        orientation=acquisition.orientation,
        gantry_tilt_deg=acquisition.tilt_deg,
    )
    return SimulatedSeries(
        volume=volume,
        truth=truth,
        labels={
            "contrast": subject.contrast,
            "orientation": acquisition.orientation,
            "kernel": acquisition.kernel,
            "region": subject.region,
        },
        acquisition=acquisition,
        image_positions_mm=corners[:, ::-1].copy(),
        image_orientation=(*right[::-1].tolist(), *down[::-1].tolist()),
        mimics=subject.mimics,
        bleeds=subject.bleeds,
    )


# --- to DICOM --------------------------------------------------------------------------------------------------------

CONTRAST_PHASES = ("arterial", "venous", "delayed")


def draw_series(seed: int, slices: int | None = None, matrix: int = 512) -> SimulatedSeries:
    """One series of the mixture that a scanner of heads sends: half eligible heads, of which half bleed."""
    rng = np.random.default_rng((seed, 11))
    region, contrast, orientation, kernel = "head", "non_contrast", "axial", "soft"
    findings: dict[str, float] = {}
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            findings = draw_findings(rng)
    else:
        odd = rng.choice(["contrast", "orientation", "kernel", "region"])
        contrast = str(rng.choice(CONTRAST_PHASES)) if odd == "contrast" else contrast
        orientation = str(rng.choice(["coronal", "sagittal"])) if odd == "orientation" else orientation
        kernel = "bone" if odd == "kernel" else kernel
        region = str(rng.choice(OTHER_REGIONS)) if odd == "region" else region
    return simulate(
        seed,
        region=region,
        contrast=contrast,
        orientation=orientation,
        kernel=kernel,
        findings=findings,
        slices=slices,
        matrix=matrix,
    )


def draw_findings(rng: np.random.Generator) -> dict[str, float]:
    """One to three kinds of bleed with volumes from 0.4 to 60 ml, small ones as likely as large ones."""
    count = int(rng.choice([1, 2, 3], p=[0.62, 0.28, 0.1]))
    kinds = rng.choice(KINDS, size=count, replace=False, p=[0.26, 0.12, 0.12, 0.2, 0.17, 0.13])
    limit = {"iph": 60, "contusion": 20, "ivh": 25, "sah": 25, "sdh": 60, "edh": 60}
    return {str(kind): float(np.exp(rng.uniform(np.log(0.4), np.log(limit[str(kind)])))) for kind in kinds}


def write_series(series: SimulatedSeries, folder: Path, origin: Origin) -> dict[str, object]:
    """Write one simulated series as DICOM with headers that tell the truth; returns what truth.json says of it."""
    labels = series.labels
    origin = replace(
        origin,
        body_part_examined="HEAD" if labels["region"] == "head" else "CHEST",
        convolution_kernel="HERALD-SOFT" if labels["kernel"] == "soft" else "HERALD-BONE",
        contrast_bolus_agent="SIMULATED IODINE" if labels["contrast"] == "contrast" else "",
        series_description=f"SIMULATED {labels['region']} {labels['orientation']} {labels['kernel']}".upper(),
        slice_thickness_mm=series.acquisition.thickness_mm,
    )
    write_dicom_series(
        series.volume,
        folder,
        origin,
        image_positions_mm=series.image_positions_mm,
        image_orientation=series.image_orientation,
    )
    findings = {
        name: {"volume_ml": round(volume, 2), "slices": (np.flatnonzero(series.truth[..., c].any((1, 2))) + 1).tolist()}
        for c, (name, volume) in enumerate(series.volumes_ml.items())
        if volume > 0
    }
    return {
        "folder": folder.name,
        "study_instance_uid": seeded_uid(origin.study),
        "series_instance_uid": seeded_uid(origin.study, origin.series),
        "accession_number": origin.accession_number,
        "labels": dict(labels),
        "bleeds": list(series.bleeds),
        "findings": findings,
        "mimics": list(series.mimics),
        "acquisition": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(series.acquisition).items()},
    }


def write_phantoms(
    out: Path, n: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> list[dict[str, object]]:
    """Write `n` simulated series, a folder of DICOM each, and truth.json into `out`; returns truth.json's content."""
    truth = []
    for i in range(n):
        origin = Origin(study=f"phantom-{seed}-{i}", series="1", accession_number=f"SIM{seed % 1000:03d}{i:05d}")
        truth.append(write_series(draw_series(seed * 100_003 + i), out / f"{i:04d}", origin))
        if progress:
            progress(i + 1, n)
    _write_truth(out, truth)
    return truth


def write_demo_study(out: Path, seed: int = 7) -> list[dict[str, object]]:
    """Write the demo's two studies into `out`: one with a bleed of 30 ml, by default in the thalamus, and without."""
    truth = []
    for i, (name, findings) in enumerate((("bleed", {"iph": 30.0}), ("no-bleed", {}))):
        series = simulate(
            206 + seed + i,  # of the default seed the bleed is bright and lies deep, as a demo's should
            findings=findings,
            build=Build(),
            mimics=(),
            slices=30,
            thickness_mm=5.0,
            spacing_mm=5.0,
            centre_mm=(8.0, 12.0, 0.0),
            field_mm=235.0,
            pose_deg=(3.0, 1.0, 4.0),
            scale=(1.0, 1.0, 1.0),
            tilt_deg=0.0,
            noise=3.5,
            sharpen=0.0,
            motion_mm=0.0,
            holder="curved",
        )
        origin = Origin(study=f"demo-{seed}-{name}", series="1", accession_number=f"DEMO{seed:04d}{i + 1}")
        truth.append(write_series(series, out / name, origin))
    _write_truth(out, truth)
    return truth


def _write_truth(out: Path, truth: list[dict[str, object]]) -> None:
    (out / "truth.json").write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")

"""The real, publicly released CT data that the models are trained on, read as the same `Volume` that DICOM gives.

Both sets keep the layout of `herald.volume`: slices from inferior to superior, rows from anterior to posterior. Neither
says which side is the patient's left; training flips sides at random. `SETS` names where each lies below the data
folder. `named_patients` and `write_patient` turn patients into DICOM series, to test a whole node with real bleeds.
CT-ICH: Hssayeni et al. 2020, PhysioNet, CC BY 4.0. PHE-SICH-CT-IDS: Ma et al. 2023, CC BY 4.0.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from herald.errors import ConfigError
from herald.signatures import FINDINGS
from herald.volume import AIR_HOUNSFIELD, Hounsfield, Volume, Window
from serving.dicom_writer import Origin, write_dicom_series

UNKNOWN = 255
"""Value of `truth` where nobody can say."""

BONE_HOUNSFIELD = 700
"""Stands for bone where only a brain window is known."""

CT_ICH_BRAIN = Window(center=40, width=120)
CT_ICH_BONE = Window(center=700, width=3200)
CT_ICH_SPACING_MM = 0.36
"""The set gives no PixelSpacing: adults' heads of about 190 mm span about 530 of 650 pixels."""
CT_ICH_KINDS = {"iph": ("intraparenchymal",), "ivh": ("intraventricular",), "sah": ("subarachnoid",),
                "edh_sdh": ("epidural", "subdural")}  # fmt: skip

PHE_WIDTH = 120
"""Every picture holds 121 grey levels: a window 120 HU wide in steps of one."""
PHE_BRAIN_HOUNSFIELD = 32
"""Mode of supratentorial brain, grey and white matter together; each patient's window is shifted to it."""
PHE_FAT_HOUNSFIELD = -100
PHE_SPACING_MM = 0.45
PHE_NEAR = 3
"""A slice without a box so near a boxed one may still hold blood."""


@dataclass(frozen=True, eq=False)
class LabelledVolume:
    """One patient: `volume`, and what experts say about it.

    `truth` (D, H, W, C) uint8 holds 0, 1 or UNKNOWN for each voxel and finding, `slice_truth` (D, C) the same for each
    slice. `child` is None where the set does not say. `study_truth` (C,) is given where more is known of the whole
    scan than of its slices, as that it bleeds somewhere; None where the slices tell all.
    """

    source: str
    patient: str
    volume: Volume
    truth: NDArray[np.uint8]
    slice_truth: NDArray[np.uint8]
    child: bool | None = None
    study_truth: NDArray[np.uint8] | None = None


def anywhere(truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Truth of several slices (N, ...) as one: 1 outweighs UNKNOWN, and that 0."""
    return np.where((truth == 1).any(axis=0), 1, truth.max(axis=0)).astype(np.uint8)


def voxel_truth(mask: NDArray[np.bool_], slice_truth: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Truth (D, H, W, C) of voxels from one mask (D, H, W) of all blood and the kinds (D, C) of each slice.

    Which voxel is which kind is UNKNOWN where a slice has, or may have, several; so is everything where a slice that
    bleeds, or may, has no mask.
    """
    truth = np.zeros((*mask.shape, len(FINDINGS)), dtype=np.uint8)
    for i in np.flatnonzero(mask.any(axis=(1, 2))).tolist():
        kinds = 1 + np.flatnonzero(slice_truth[i, 1:])
        sure = len(kinds) == 1 and slice_truth[i, kinds[0]] == 1
        truth[i][mask[i][:, :, None] & np.isin(np.arange(len(FINDINGS)), kinds)] = 1 if sure else UNKNOWN
    truth[..., 0] = mask
    for i in np.flatnonzero(slice_truth[:, 0].astype(bool) & ~mask.any(axis=(1, 2))).tolist():
        truth[i][..., np.flatnonzero(slice_truth[i])] = UNKNOWN
    return truth


def ct_ich_patients(folder: Path) -> list[str]:
    """Patients of CT-ICH v1 in `folder`, sorted; raises ConfigError where labels.csv is missing."""
    return sorted(_rows(folder))


def read_ct_ich(folder: Path, patient: str) -> LabelledVolume:
    """Fuse brain and bone window of each 5 mm slice to Hounsfield units.

    The brain window gives them where it is not saturated, the bone window elsewhere. Experts outlined the blood of each
    positive slice in one mask; where a slice has two kinds, which voxel is which is UNKNOWN.
    """
    rows = sorted(_patient(folder, patient), key=lambda row: int(row["slice"]))  # 1 is the lowest slice
    planes, masks = [], []
    for row in rows:
        base = folder / "Patients_CT" / patient
        brain = _grey(base / "brain" / f"{row['slice']}.jpg")
        bone = base / "bone" / f"{row['slice']}.jpg"
        planes.append(fuse(brain, _grey(bone)) if bone.exists() else _brain_only(brain))
        outline = base / "brain" / f"{row['slice']}_HGE_Seg.jpg"
        masks.append(_grey(outline) > 127 if outline.exists() else np.zeros(brain.shape, dtype=bool))
    hounsfield, mask = np.stack(planes), np.stack(masks)
    slice_truth = np.zeros((len(rows), len(FINDINGS)), dtype=np.uint8)
    for i, row in enumerate(rows):
        for kind, columns in CT_ICH_KINDS.items():
            slice_truth[i, FINDINGS.index(kind)] = any(int(row[column]) for column in columns)
        slice_truth[i, 0] = slice_truth[i, 1:].any() or mask[i].any()
    volume = Volume(
        hounsfield=hounsfield,
        positions_mm=np.arange(len(rows), dtype=np.float64) * 5.0,
        pixel_spacing_mm=(CT_ICH_SPACING_MM, CT_ICH_SPACING_MM),
    )
    truth = voxel_truth(mask, slice_truth)
    return LabelledVolume("ct-ich", patient, volume, truth, slice_truth, child=rows[0]["child"] == "1")


def fuse(brain: NDArray[np.uint8], bone: NDArray[np.uint8]) -> Hounsfield:
    """Hounsfield units from one slice in both windows of CT-ICH, (H, W) grey levels each."""
    fine = brain * (CT_ICH_BRAIN.width / 255) + CT_ICH_BRAIN.center - CT_ICH_BRAIN.width / 2
    coarse = bone * (CT_ICH_BONE.width / 255) + CT_ICH_BONE.center - CT_ICH_BONE.width / 2
    low, high = 3, 252  # JPEG leaves saturated pixels a few levels off the end
    hounsfield = np.where(brain >= high, np.maximum(coarse, fine), fine)
    hounsfield = np.where(brain <= low, np.minimum(coarse, fine), hounsfield)
    hounsfield[bone == 0] = AIR_HOUNSFIELD
    return _as_int16(hounsfield)


def _brain_only(brain: NDArray[np.uint8]) -> Hounsfield:
    """As `fuse`, for the few slices without a bone window: what saturates the brain window is bone or air."""
    hounsfield = brain * (CT_ICH_BRAIN.width / 255) + CT_ICH_BRAIN.center - CT_ICH_BRAIN.width / 2
    hounsfield[brain <= 3] = AIR_HOUNSFIELD
    hounsfield[brain >= 252] = BONE_HOUNSFIELD
    return _as_int16(hounsfield)


def phe_sich_patients(folder: Path) -> list[str]:
    """Patients of PHE-SICH-CT-IDS in `folder`, sorted; raises ConfigError where labels.csv is missing."""
    return sorted(_rows(folder))


def read_phe_sich(folder: Path, patient: str) -> LabelledVolume:
    """Whole scan of a spontaneous basal-ganglia haemorrhage, turned upright, calibrated to Hounsfield units.

    Only the brain window is known: what saturates it is taken for bone or air, and a rim of air by tissue for fat. The
    clot masks were made by a threshold inside experts' boxes: good to learn from, not to measure by. Slices without a
    box near a boxed one, and intraventricular blood beside the clot, are UNKNOWN.
    """
    rows = sorted(_patient(folder, patient), key=lambda row: int(row["slice"]))  # 0 is the lowest slice
    names = [f"{patient}_{int(row['slice']):02d}.png" for row in rows]
    grey = np.stack([_upright(_grey(folder / "img" / name)) for name in names])
    mask = np.zeros(grey.shape, dtype=bool)
    for i, name in enumerate(names):
        if (folder / "pseudo_haem" / name).exists():
            mask[i] = _upright(_grey(folder / "pseudo_haem" / name)) > 127
    boxed = np.array([row["box"] == "1" for row in rows])
    doubtful = ndimage.binary_dilation(boxed, iterations=PHE_NEAR) & ~boxed

    any_, iph, ivh = FINDINGS.index("any"), FINDINGS.index("iph"), FINDINGS.index("ivh")
    slice_truth = np.zeros((len(rows), len(FINDINGS)), dtype=np.uint8)
    slice_truth[boxed, any_] = slice_truth[boxed, iph] = 1
    slice_truth[boxed, ivh] = UNKNOWN
    slice_truth[np.ix_(doubtful, [any_, iph, ivh])] = UNKNOWN
    truth = np.zeros((*grey.shape, len(FINDINGS)), dtype=np.uint8)
    truth[..., any_] = truth[..., iph] = mask
    truth[boxed | doubtful, ..., ivh] = UNKNOWN
    outlined = mask.any(axis=(1, 2))
    for finding in (any_, iph):
        truth[(boxed | doubtful) & ~outlined, ..., finding] = UNKNOWN
    volume = Volume(
        hounsfield=_calibrated(grey),
        positions_mm=np.arange(len(rows), dtype=np.float64) * (5.0 if len(rows) < 45 else 2.5),
        pixel_spacing_mm=(PHE_SPACING_MM, PHE_SPACING_MM),
    )
    return LabelledVolume("phe-sich", patient, volume, truth, slice_truth)


def _calibrated(grey: NDArray[np.uint8]) -> Hounsfield:
    """Shift the window of known width until brain, away from bone and at the height of the ventricles, is as it is."""
    bone = grey == 255
    counts = np.zeros(256)
    for i in range(len(grey) // 3, len(grey) * 5 // 6):
        inside = ndimage.binary_erosion(ndimage.binary_fill_holes(bone[i]), iterations=3)
        inside &= ~ndimage.binary_dilation(bone[i], iterations=6)
        smooth = ndimage.uniform_filter(grey[i].astype(np.float32), 5)
        counts += np.bincount(smooth[inside].astype(int), minlength=256)
    mode = 30 + int(np.argmax(ndimage.gaussian_filter1d(counts[30:200], 3)))  # neither CSF nor calcification
    hounsfield = (grey - float(mode)) * (PHE_WIDTH / 255) + PHE_BRAIN_HOUNSFIELD
    hounsfield[bone] = BONE_HOUNSFIELD
    disk = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 6)
    for plane, levels in zip(hounsfield, grey, strict=True):
        tissue = levels > 0
        plane[~tissue] = AIR_HOUNSFIELD
        plane[ndimage.binary_closing(tissue, structure=disk) & ~tissue] = PHE_FAT_HOUNSFIELD
    return _as_int16(hounsfield)


SETS = {
    "ct-ich": ("ct-ich-v1", ct_ich_patients, read_ct_ich),
    "phe-sich": ("phe-sich", phe_sich_patients, read_phe_sich),
}
"""Folder below the data folder, how to list patients, how to read one; by the name of the set."""


def read_patients(data: Path, source: str) -> Iterator[LabelledVolume]:
    """Every patient of one set below the data folder, in order."""
    folder, patients, read = SETS[source]
    for patient in patients(data / folder):
        yield read(data / folder, patient)


@dataclass(frozen=True)
class NamedPatient:
    """A patient of one of SETS, which lies in `folder`."""

    source: str
    folder: Path
    patient: str


def named_patients(what: str, data: Path) -> list[NamedPatient]:
    """The patients that `what` names: SET:PATIENT or SET:all below `data`, or a folder in the layout of a set.

    A set goes by its name or its folder's. None where `what` is neither; raises ConfigError where the set or the
    patient is missing.
    """
    set_name, colon, patient = what.partition(":")
    for source, (folder, patients, _) in SETS.items():
        if colon and set_name in (source, folder):
            names = patients(data / folder)
            if patient not in (*names, "all"):
                raise ConfigError(f"{set_name} has no patient {patient!r}; it has {', '.join(names[:5])}, … or all")
            return [NamedPatient(source, data / folder, name) for name in names if patient in (name, "all")]
        path = Path(what)
        if (path / "labels.csv").is_file() and (path / _PICTURES[source]).is_dir():
            return [NamedPatient(source, path, name) for name in patients(path)]
    return []


_PICTURES = {"ct-ich": "Patients_CT", "phe-sich": "img"}
"""A folder that only this set has beside labels.csv."""


def write_patient(named: NamedPatient, out: Path) -> list[Path]:
    """Write a real patient as a DICOM series of CT images into `out`, by our own writer; returns the paths.

    Headers tell what the set tells and invent no more than positions; the same patient has the same UIDs each time.
    Which side is the patient's left is not known.
    """
    volume = SETS[named.source][2](named.folder, named.patient).volume
    name = f"{named.source}-{named.patient}".upper()
    origin = Origin(
        study=f"{named.source}/{named.patient}",
        series="1",
        patient_name=name.replace("-", "^", 1),
        patient_id=name,
        accession_number=name[-16:],
        study_description=f"PUBLIC SET {named.source}".upper(),
        series_description="HEAD",
        convolution_kernel="UNKNOWN",
        slice_thickness_mm=volume.slice_spacing_mm,
        manufacturer_model_name="Converted pictures",
        derived=True,
    )
    return write_dicom_series(volume, out, origin)


def _as_int16(hounsfield: NDArray[np.floating]) -> Hounsfield:
    rounded: Hounsfield = np.rint(hounsfield).astype(np.int16)
    return rounded


def _rows(folder: Path) -> dict[str, list[dict[str, str]]]:
    labels = folder / "labels.csv"
    if not labels.is_file():
        raise ConfigError(f"{labels.name} is not in {folder}; point --data at the folder that holds the data sets")
    rows = defaultdict(list)
    with labels.open(newline="") as file:
        for row in csv.DictReader(file):
            rows[row["patient"]].append(row)
    return rows


def _patient(folder: Path, patient: str) -> list[dict[str, str]]:
    rows = _rows(folder)
    if patient not in rows:
        raise ConfigError(f"{folder.name} has no patient {patient}; it has {', '.join(sorted(rows)[:5])}, …")
    return rows[patient]


def _grey(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


def _upright(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The face looks to the left in PHE-SICH: a quarter turn clockwise brings it to the top."""
    return np.rot90(plane, k=-1)

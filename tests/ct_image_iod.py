"""What a CT Image Storage series must hold (PS3.3 A.3 and C.8.2), checked by pydicom as dciodvfy would."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import config, dcmread
from pydicom.dataset import FileDataset
from pydicom.uid import UID, CTImageStorage

TYPE_1 = [
    *("ImageType", "SOPClassUID", "SOPInstanceUID", "Modality", "StudyInstanceUID", "SeriesInstanceUID"),
    *("FrameOfReferenceUID", "PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient", "SamplesPerPixel"),
    *("PhotometricInterpretation", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelData", "RescaleIntercept", "RescaleSlope", "RescaleType"),
]
TYPE_2 = [
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("ReferringPhysicianName", "AccessionNumber", "SeriesNumber", "PatientPosition", "PositionReferenceIndicator"),
    *("Manufacturer", "AcquisitionNumber", "InstanceNumber", "SliceThickness", "KVP"),
]
SAME = [
    *("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows", "Columns", "PixelSpacing"),
    "ImageOrientationPatient",
]


def faults(paths: Sequence[Path]) -> list[str]:
    """What is wrong with one series, in words; none when all is well."""
    reading = config.settings.reading_validation_mode
    config.settings.reading_validation_mode = config.RAISE
    try:
        instances = [dcmread(path) for path in paths]
        found = [f"{path.name}: {fault}" for path, ds in zip(paths, instances, strict=True) for fault in _instance(ds)]
    finally:
        config.settings.reading_validation_mode = reading
    return found or _series(instances)


def _instance(ds: FileDataset) -> list[str]:
    found = [f"{keyword} is missing or empty" for keyword in TYPE_1 if keyword not in ds or ds[keyword].is_empty]
    found += [f"{keyword} is missing" for keyword in TYPE_2 if keyword not in ds]
    found += [f"{element.tag} is private" for element in ds.iterall() if element.tag.is_private]
    for element in ds.iterall():  # reads every value in its VR, which raises where it does not fit
        if element.VR == "UI" and not UID(str(element.value)).is_valid:
            found.append(f"{element.keyword} is no UID")
    if found:
        return found
    if ds.SOPClassUID != CTImageStorage or ds.Modality != "CT":
        found.append("is no CT image")
    meta = ds.file_meta
    if (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) != (ds.SOPClassUID, ds.SOPInstanceUID):
        found.append("File Meta names another instance")
    if ds.ImageType[0] not in ("ORIGINAL", "DERIVED") or ds.ImageType[2] not in ("AXIAL", "LOCALIZER"):
        found.append(f"ImageType {ds.ImageType}")
    if (ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated) != (1, "MONOCHROME2", 16):
        found.append("pixels are not those of a CT image")
    if not 12 <= ds.BitsStored <= 16 or ds.HighBit != ds.BitsStored - 1:
        found.append("BitsStored and HighBit do not fit")
    if len(ds.PixelData) != ds.Rows * ds.Columns * 2:
        found.append("PixelData has another length than Rows and Columns give")
    row, column = np.split(np.asarray(ds.ImageOrientationPatient, float), 2)
    if not np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-4):
        found.append("ImageOrientationPatient is not orthonormal")
    return found


def _series(instances: Sequence[FileDataset]) -> list[str]:
    first = instances[0]
    found = [f"{keyword} differs" for keyword in SAME if any(ds[keyword] != first[keyword] for ds in instances)]
    if len({ds.SOPInstanceUID for ds in instances}) < len(instances):
        found.append("SOPInstanceUID comes twice")
    if sorted(int(ds.InstanceNumber) for ds in instances) != list(range(1, len(instances) + 1)):
        found.append("InstanceNumber does not count from 1")
    row, column = np.split(np.asarray(first.ImageOrientationPatient, float), 2)
    corners = np.asarray([ds.ImagePositionPatient for ds in instances], float)
    steps = np.diff(corners @ np.cross(row, column))
    if len(steps) and (np.abs(steps).min() < 0.01 or not np.allclose(steps, steps[0], atol=0.01)):
        found.append("slices are not evenly spaced along their normal")
    return found

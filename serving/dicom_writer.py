"""Volumes to CT Image Storage instances, with invented identity and UIDs that depend on a seed only (PS3.3 A.3)."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from herald.volume import Volume

IMPLEMENTATION_CLASS_UID = UID("2.25.213174651437263526137012943867163829123")
RESCALE_INTERCEPT = -1024


@dataclass(frozen=True)
class Origin:
    """What the headers of a series claim: names follow the DICOM keywords; `study` and `series` seed the UIDs."""

    study: str
    series: str
    patient_name: str = "HERALD^SIMULATED"
    patient_id: str = "HERALD-SIMULATED"
    accession_number: str = "HERALD0000"
    study_description: str = "SIMULATED CT HEAD"
    series_description: str = "HEAD 5MM"
    series_number: int = 2
    body_part_examined: str = "HEAD"
    convolution_kernel: str = "HERALD-SOFT"
    contrast_bolus_agent: str = ""
    slice_thickness_mm: float = 5.0
    manufacturer_model_name: str = "Simulated CT"
    derived: bool = False  # pixels that came from other images
    study_date: str = "20260101"
    study_time: str = "120000"


def seeded_uid(*parts: object) -> UID:
    """A UID that depends on `parts` only, under the UUID root 2.25 (PS3.5 B.2)."""
    return UID(f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, parts))).int}")


def write_dicom_series(
    volume: Volume,
    folder: Path,
    origin: Origin,
    *,
    image_positions_mm: NDArray[np.float64] | None = None,
    image_orientation: Sequence[float] | None = None,
) -> list[Path]:
    """Write `volume` as one Part 10 file a slice (explicit VR little endian) into `folder`; returns the paths in order.

    Positions (D, 3) and the six direction cosines in patient mm default to an upright stack at the volume's positions.
    The same arguments write the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    depth, rows, columns = volume.hounsfield.shape
    if image_orientation is None:
        image_orientation = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    if image_positions_mm is None:
        left, top = -columns / 2 * volume.pixel_spacing_mm[1], -rows / 2 * volume.pixel_spacing_mm[0]
        image_positions_mm = np.array([[left, top, z] for z in volume.positions_mm])
    paths = []
    for i in range(depth):
        path = folder / f"{i + 1:04d}.dcm"
        ds = _instance(volume, origin, i, image_positions_mm[i], image_orientation)
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _instance(
    volume: Volume, origin: Origin, i: int, position: NDArray[np.float64], orientation: Sequence[float]
) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = seeded_uid(origin.study, origin.series, i)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_CLASS_UID
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    ds.SpecificCharacterSet = "ISO_IR 100"
    ds.ImageType = ["DERIVED" if origin.derived or volume.orientation != "axial" else "ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = origin.study_date
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = origin.study_time
    ds.AccessionNumber = origin.accession_number
    ds.Modality = "CT"
    ds.Manufacturer, ds.ManufacturerModelName = "Herald", origin.manufacturer_model_name
    ds.InstitutionName = ds.ReferringPhysicianName = ""
    ds.StudyDescription, ds.SeriesDescription = origin.study_description, origin.series_description
    ds.PatientName, ds.PatientID = origin.patient_name, origin.patient_id
    ds.PatientBirthDate = ds.PatientSex = ""
    ds.BodyPartExamined = origin.body_part_examined
    if origin.contrast_bolus_agent:
        ds.ContrastBolusAgent = origin.contrast_bolus_agent
    ds.SliceThickness = f"{origin.slice_thickness_mm:g}"
    ds.KVP = "120"
    ds.ProtocolName = origin.study_description
    ds.GantryDetectorTilt = f"{volume.gantry_tilt_deg:.4g}"
    ds.ConvolutionKernel = origin.convolution_kernel
    ds.PatientPosition = "HFS"
    ds.StudyInstanceUID = seeded_uid(origin.study)
    ds.SeriesInstanceUID = seeded_uid(origin.study, origin.series)
    ds.StudyID = "1"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = origin.series_number, 1, i + 1
    ds.ImagePositionPatient = [f"{v:.6f}" for v in position]
    ds.ImageOrientationPatient = [f"{v:.6f}" for v in orientation]
    ds.FrameOfReferenceUID = seeded_uid(origin.study, "frame")
    ds.PositionReferenceIndicator = ""
    ds.SliceLocation = f"{volume.positions_mm[i]:.3f}"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    _, ds.Rows, ds.Columns = volume.hounsfield.shape
    ds.PixelSpacing = [f"{v:.6f}" for v in volume.pixel_spacing_mm]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.WindowCenter, ds.WindowWidth = "40", "80"
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = str(RESCALE_INTERCEPT), "1", "HU"
    stored = volume.hounsfield[i].astype(np.int32) - RESCALE_INTERCEPT
    ds.PixelData = np.clip(stored, -32768, 32767).astype("<i2").tobytes()
    ds["PixelData"].VR = "OW"
    return ds

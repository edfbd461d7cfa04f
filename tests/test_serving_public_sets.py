"""Each public set in its own layout, made small in a temporary folder and read back."""

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.config import disable_value_validation

from herald.errors import ConfigError
from herald.signatures import FINDINGS
from herald.volume import Volume, read_datasets, volume_from_datasets
from serving.dicom_writer import Origin, write_dicom_series
from serving.public_sets import (
    PUBLIC_SETS,
    RSNA_INDEX,
    RSNA_SUBTYPES,
    bhsd_cases,
    cq500_cases,
    ct_ich_nifti_patients,
    instance_cases,
    read_bhsd,
    read_cq500,
    read_ct_ich_nifti,
    read_instance,
    read_public_set,
    read_rsna,
    read_site,
    rsna_series,
    site_series,
)
from serving.readers import UNKNOWN, LabelledVolume

ANY, IPH, IVH, SAH, EDH_SDH = (FINDINGS.index(f) for f in ("any", "iph", "ivh", "sah", "edh_sdh"))


def head(depth: int = 5, spacing_mm: float = 5.0, first_mm: float = -20.0) -> Volume:
    """A head that differs along every axis: its slices, its front and its left are brighter; 12 rows, 10 columns."""
    hounsfield = np.full((depth, 12, 10), -1000, dtype=np.int16)
    hounsfield[:, 2:10, 2:8] = 30
    hounsfield[:, 2, 2:8] = 300  # the face
    hounsfield[:, 2:10, 7] = 150  # the patient's left
    hounsfield[:, 2:10, 2:8] += np.arange(depth, dtype=np.int16)[:, None, None]
    return Volume(hounsfield, first_mm + np.arange(depth) * spacing_mm, (0.5, 0.4))


def nifti(values: NDArray[np.generic], volume: Volume, path: Path, axes: str = "LPS", affine: bool = True) -> None:
    """Write (D, H, W) on the grid of `volume` with the stored axes growing towards `axes` (x, y, z in that order)."""
    stored = values.transpose(2, 1, 0)  # grows to the left, to the back and up, as DICOM does
    step = np.diag([-volume.pixel_spacing_mm[1], -volume.pixel_spacing_mm[0], volume.slice_spacing_mm, 1])
    _, rows, columns = volume.hounsfield.shape
    step[:3, 3] = [
        columns / 2 * volume.pixel_spacing_mm[1],
        rows / 2 * volume.pixel_spacing_mm[0],
        volume.positions_mm[0],
    ]
    image = nibabel.Nifti1Image(stored, step)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(axes)
    )
    image = image.as_reoriented(turn)
    if not affine:
        image = nibabel.Nifti1Image(np.asarray(image.dataobj), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def write_table(path: Path, columns: list[str], rows: list[list[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def same_volume(one: Volume, other: Volume) -> bool:
    return (
        np.array_equal(one.hounsfield, other.hounsfield)
        and np.allclose(one.positions_mm, other.positions_mm, atol=1e-4)
        and np.allclose(one.pixel_spacing_mm, other.pixel_spacing_mm)
        and one.orientation == other.orientation
        and one.gantry_tilt_deg == pytest.approx(other.gantry_tilt_deg, abs=0.01)
    )


def well_formed(labelled: LabelledVolume) -> bool:
    shape = labelled.volume.hounsfield.shape
    return (
        labelled.volume.hounsfield.dtype == np.int16
        and labelled.truth.shape == (*shape, len(FINDINGS))
        and labelled.truth.dtype == labelled.slice_truth.dtype == np.uint8
        and labelled.slice_truth.shape == (shape[0], len(FINDINGS))
        and set(np.unique(labelled.truth).tolist()) <= {0, 1, UNKNOWN}
        and not (labelled.truth[labelled.slice_truth[:, ANY] == 0] != 0).any()
    )


# --- RSNA 2019 -------------------------------------------------------------------------------------------------------


def rsna_image(folder: Path, name: str, series: str, patient: str, path: Path) -> Path:
    """One slice under the names of the set, which are UIDs as well."""
    out = folder / "stage_2_train" / f"{name}.dcm"
    out.parent.mkdir(parents=True, exist_ok=True)
    with disable_value_validation():
        ds = dcmread(path)
        ds.SOPInstanceUID, ds.SeriesInstanceUID, ds.PatientID = name, series, patient
        ds.save_as(out)
    return out


@pytest.fixture
def rsna(tmp_path: Path) -> Path:
    """Two series of one patient and one of another, files in no order; slice 2 of the first has epidural blood."""
    folder = tmp_path / "rsna-2019"
    rows: list[list[object]] = []
    serial = 0
    for series, patient, depth in (("ID_s1", "ID_p1", 4), ("ID_s2", "ID_p1", 2), ("ID_s3", "ID_p2", 2)):
        paths = write_dicom_series(head(depth), tmp_path / series, Origin("study", series))
        for i, path in reversed(list(enumerate(paths))):
            name = f"ID_{(serial := serial + 7) % 31:09x}"
            rsna_image(folder, name, series, patient, path)
            positive = {"any", "epidural"} if (series, i) == ("ID_s1", 2) else set()
            rows += [[f"{name}_{subtype}", int(subtype in positive)] for subtype in RSNA_SUBTYPES]
    write_table(folder / "stage_2_train.csv", ["ID", "Label"], [*rows, *rows[:6]])  # the set repeats some rows
    return folder


def test_rsna_slices_are_put_together_by_series_and_carry_their_label(rsna: Path):
    assert rsna_series(rsna) == ["ID_s1", "ID_s2", "ID_s3"]
    labelled = read_rsna(rsna, "ID_s1")
    assert well_formed(labelled)
    assert same_volume(labelled.volume, head(4))
    assert labelled.patient == read_rsna(rsna, "ID_s2").patient == "ID_p1"
    assert labelled.slice_truth.tolist() == [[0] * 5, [0] * 5, [1, 0, 0, 0, 1], [0] * 5]
    assert labelled.study_truth is None


def test_which_voxel_bleeds_is_unknown_in_a_positive_rsna_slice_only(rsna: Path):
    truth = read_rsna(rsna, "ID_s1").truth
    assert (truth[2, ..., [ANY, EDH_SDH]] == UNKNOWN).all()
    assert not truth[2, ..., [IPH, IVH, SAH]].any()
    assert not truth[[0, 1, 3]].any()


def test_an_rsna_slice_without_a_row_is_unknown(rsna: Path):
    table = rsna / "stage_2_train.csv"
    name = "ID_" + dcmread(next((rsna / "stage_2_train").glob("*.dcm"))).filename[-13:-4]
    kept = [line for line in table.read_text().splitlines() if not line.startswith(name)]
    table.write_text("\n".join(kept) + "\n")
    slice_truth = np.concatenate([read_rsna(rsna, series).slice_truth for series in rsna_series(rsna)])
    assert (slice_truth == UNKNOWN).all(axis=1).sum() == 1


def test_the_rsna_index_is_kept_and_made_anew_when_the_set_or_the_index_has_changed(rsna: Path):
    rsna_series(rsna)
    index = rsna / RSNA_INDEX
    kept = index.stat().st_mtime_ns
    rsna_series(rsna)
    assert index.stat().st_mtime_ns == kept
    for path in (rsna / "stage_2_train").glob("*.dcm"):
        with disable_value_validation():
            if str(dcmread(path).SeriesInstanceUID) == "ID_s3":
                path.unlink()
    assert rsna_series(rsna) == ["ID_s1", "ID_s2"]
    index.write_bytes(b"SQLite format 3\0 cut short")
    assert rsna_series(rsna) == ["ID_s1", "ID_s2"]


def test_rsna_values_that_wrapped_round_at_twelve_bits_are_mended(rsna: Path):
    for path in (rsna / "stage_2_train").glob("*.dcm"):
        with disable_value_validation():
            ds = dcmread(path)
            pixels = ds.pixel_array.astype(np.int32) + int(ds.RescaleIntercept)
            ds.PixelData = (pixels % 4096).astype("<u2").tobytes()
            ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.RescaleIntercept = 12, 11, 0, 0
            ds.save_as(path)
    assert same_volume(read_rsna(rsna, "ID_s1").volume, head(4))


def test_an_rsna_slice_with_damaged_pixels_is_left_out_with_its_label(rsna: Path):
    for path in (rsna / "stage_2_train").glob("*.dcm"):
        with disable_value_validation():
            ds = dcmread(path)
            if ds.SeriesInstanceUID == "ID_s1" and ds.InstanceNumber == 1:
                ds.PixelData = ds.PixelData[:100]
                ds.save_as(path)
    labelled = read_rsna(rsna, "ID_s1")
    assert labelled.slice_truth[:, ANY].tolist() == [0, 1, 0]
    assert len(labelled.volume.unreadable) == 1


def test_a_damaged_rsna_file_row_or_folder_is_named(rsna: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"stage_2_train is missing; unpack"):
        rsna_series(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no series ID_none"):
        read_rsna(rsna, "ID_none")
    table = rsna / "stage_2_train.csv"
    good = table.read_text()
    table.write_text(good + "ID_00000000a_any,2\n")
    with pytest.raises(ConfigError, match=r"stage_2_train\.csv, line \d+: Label is '2', not 0 or 1"):
        rsna_series(rsna)
    table.write_text(good + "ID_00000000a_glioma,1\n")
    with pytest.raises(ConfigError, match=r"'ID_00000000a_glioma' does not end in one of any, epidural"):
        rsna_series(rsna)
    table.write_text(good)
    broken = rsna / "stage_2_train" / "ID_broken.dcm"
    broken.write_bytes(b"not DICOM")
    with pytest.raises(ConfigError, match=r"ID_broken\.dcm cannot be read as DICOM .* take it away"):
        rsna_series(rsna)
    broken.unlink()
    table.unlink()
    with pytest.raises(ConfigError, match=r"stage_2_train\.csv is missing"):
        rsna_series(rsna)


def test_an_rsna_folder_that_cannot_take_the_index_is_named(rsna: Path):
    (rsna / f"{RSNA_INDEX}.partly").mkdir()  # even root cannot write a file there
    with pytest.raises(ConfigError, match=r"herald-index\.sqlite cannot be written .* link its files"):
        rsna_series(rsna)


# --- CQ500 -----------------------------------------------------------------------------------------------------------

CQ500_KINDS = ("ICH", "IPH", "IVH", "SDH", "EDH", "SAH")


def reads(number: int, *seen: set[str]) -> list[object]:
    """One row of reads.csv: what each of three readers saw."""
    return [f"CQ500-CT-{number}", "B1", *[int(kind in reader) for reader in seen for kind in CQ500_KINDS]]


def cq500_series(folder: Path, case: int, name: str, volume: Volume, thickness_mm: float = 5.0) -> Path:
    out = folder / f"CQ500CT{case} CQ500CT{case}" / "Unknown Study" / name
    origin = Origin(f"cq500-{case}", name, slice_thickness_mm=thickness_mm)
    write_dicom_series(volume, out, origin)
    return out


@pytest.fixture
def cq500(tmp_path: Path) -> Path:
    folder = tmp_path / "cq500"
    cq500_series(folder, 10, "CT POST CONTRAST", head(9))
    cq500_series(folder, 10, "CT Plain", head(10))
    cq500_series(folder, 10, "CT PRE CONTRAST THIN", head(20, 1.0), 1.0)
    cq500_series(folder, 10, "CT BONE", head(11))
    cq500_series(folder, 10, "CT SCOUT", head(2))
    cq500_series(folder / "qct02", 2, "CT PRE CONTRAST BONE", head(9))
    cq500_series(folder / "qct02", 2, "CT PRE CONTRAST THIN", head(24, 0.625), 0.625)
    cq500_series(folder, 3, "CT 4cc sec 150cc D3D on", head(9))
    columns = ["name", "Category", *[f"{reader}:{kind}" for reader in ("R1", "R2", "R3") for kind in CQ500_KINDS]]
    rows = [
        reads(10, {"ICH", "IPH", "SAH"}, {"ICH", "IPH", "SDH"}, {"ICH", "EDH"}),
        reads(2, set(), {"ICH", "IVH"}, set()),
        reads(3, set(), set(), set()),
        reads(400, set(), set(), set()),
    ]
    write_table(folder / "reads.csv", columns, rows)
    return folder


def test_cq500_lists_cases_that_have_a_plain_series_and_reads(cq500: Path):
    assert cq500_cases(cq500) == ["CQ500CT2", "CQ500CT10"]


def test_two_of_three_readers_make_the_truth_of_a_cq500_study(cq500: Path):
    labelled = read_cq500(cq500, "CQ500CT10")
    assert well_formed(labelled)
    assert labelled.study_truth is not None
    assert labelled.study_truth.tolist() == [1, 1, 0, 0, 1]  # SDH and EDH, one reader each, are one finding
    assert (labelled.slice_truth == np.where(labelled.study_truth, UNKNOWN, 0)).all()
    assert (labelled.truth == np.where(labelled.study_truth, UNKNOWN, 0)).all()


def test_a_negative_cq500_study_is_negative_in_every_slice_and_voxel(cq500: Path):
    labelled = read_cq500(cq500, "CQ500CT2")
    assert labelled.study_truth is not None
    assert not labelled.study_truth.any()
    assert not labelled.slice_truth.any()
    assert not labelled.truth.any()


def test_of_the_series_of_a_cq500_case_the_plain_soft_one_nearest_to_5_mm_is_read(cq500: Path):
    assert same_volume(read_cq500(cq500, "CQ500CT10").volume, head(10))
    assert same_volume(read_cq500(cq500, "CQ500CT2").volume, head(24, 0.625))  # soft and thin before bone and thick


def test_a_cq500_case_or_file_that_is_missing_or_damaged_is_named(cq500: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"reads\.csv is missing"):
        cq500_cases(tmp_path)
    with pytest.raises(ConfigError, match="no case CQ500CT400 on disk"):
        read_cq500(cq500, "CQ500CT400")
    case = cq500 / "CQ500CT10 CQ500CT10" / "Unknown Study"
    (case / "CT Plain" / "0003.dcm").write_bytes(b"\0" * 200)
    with pytest.raises(ConfigError, match=r"CT Plain/0003\.dcm cannot be read as DICOM"):
        read_cq500(cq500, "CQ500CT10")
    for path in (cq500 / "qct02").rglob("*.dcm"):
        path.unlink()
    with pytest.raises(ConfigError, match="CQ500CT2 has no axial series of at least 8 images"):
        read_cq500(cq500, "CQ500CT2")
    table = cq500 / "reads.csv"
    table.write_text(table.read_text().replace("R3:EDH", "R3:XXX"))
    with pytest.raises(ConfigError, match=r"reads\.csv has no column R3:EDH"):
        cq500_cases(cq500)
    table.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(ConfigError, match=r"reads\.csv is not a CSV file"):
        cq500_cases(cq500)


def test_a_vote_that_is_neither_0_nor_1_is_named(cq500: Path):
    table = cq500 / "reads.csv"
    table.write_text(table.read_text().replace("CQ500-CT-10,B1,1", "CQ500-CT-10,B1,"))
    with pytest.raises(ConfigError, match=r"reads\.csv, line 2: R1:ICH is '', not 0 or 1"):
        read_cq500(cq500, "CQ500CT10")


# --- NIfTI -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["LPS", "RAS", "LAS", "RPI", "SAL"])
def test_a_nifti_volume_is_what_the_node_makes_of_the_same_series_in_dicom(tmp_path: Path, axes: str):
    volume = head()
    paths = write_dicom_series(volume, tmp_path / "dicom", Origin("study", "series"))
    nifti(volume.hounsfield, volume, tmp_path / "train_2" / "data" / "001.nii.gz", axes)
    nifti(np.zeros(volume.hounsfield.shape, np.uint8), volume, tmp_path / "train_2" / "label" / "001.nii.gz", axes)
    read = read_instance(tmp_path, "001").volume
    assert same_volume(read, volume_from_datasets(read_datasets(paths)))
    assert same_volume(read, volume)


@pytest.mark.parametrize("sheared", [False, True])
def test_gantry_tilt_and_distances_in_nifti_are_those_of_dicom(tmp_path: Path, sheared: bool):
    """A tilted stack, and one whose slices stay upright while their origin moves."""
    volume, angle = head(), np.radians(18.0)
    columns = np.array([0.0, np.cos(angle), -np.sin(angle)]) if not sheared else np.array([0.0, 1.0, 0.0])
    step = np.array([0.0, 5 * np.sin(angle), 5 * np.cos(angle)])
    positions = np.array([-2.0, -3.0, -20.0]) + np.arange(5)[:, None] * step
    paths = write_dicom_series(
        volume,
        tmp_path / "dicom",
        Origin("study", "series"),
        image_positions_mm=positions,
        image_orientation=(1.0, 0.0, 0.0, *columns),
    )
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0.4, 0, 0], columns * 0.5, step]).T
    affine[:3, 3] = positions[0]
    affine[:2] *= -1  # DICOM's patient axes grow to the left and to the back, NIfTI's to the right and to the front
    for folder, values in (("data", volume.hounsfield), ("label", np.zeros(volume.hounsfield.shape, np.uint8))):
        (tmp_path / "train_2" / folder).mkdir(parents=True)
        image = nibabel.Nifti1Image(values.transpose(2, 1, 0), affine)
        nibabel.save(image, tmp_path / "train_2" / folder / "001.nii.gz")
    read = read_instance(tmp_path, "001").volume
    expected = volume_from_datasets(read_datasets(paths))
    assert abs(expected.gantry_tilt_deg) == pytest.approx(18, abs=0.1)
    assert same_volume(read, expected)
    assert read.notes == expected.notes


@pytest.fixture
def bhsd(tmp_path: Path) -> Path:
    """Case 1 has every kind in its own slice, case 2 none; the second lies in the folders of another release."""
    folder = tmp_path / "bhsd"
    volume = head(6)
    labels = np.zeros(volume.hounsfield.shape, dtype=np.float32)
    for label in range(1, 6):
        labels[label, 3, 2 + label] = label
    root = folder / "label_192"
    nifti(volume.hounsfield.astype(np.float64), volume, root / "images" / "ID_0a_ID_1b.nii.gz", "LAS")
    nifti(labels, volume, root / "ground truths" / "ID_0a_ID_1b.nii.gz", "LAS")
    nifti(volume.hounsfield, volume, root / "imagesTr" / "ID_0a_ID_2c.nii.gz")
    nifti(np.zeros(volume.hounsfield.shape, np.uint8), volume, root / "labelsTr" / "ID_0a_ID_2c.nii.gz")
    return folder


def test_bhsd_labels_are_the_kinds_of_haemorrhage_where_they_are(bhsd: Path):
    assert bhsd_cases(bhsd) == ["ID_0a_ID_1b", "ID_0a_ID_2c"]
    labelled = read_bhsd(bhsd, "ID_0a_ID_1b")
    assert well_formed(labelled)
    assert same_volume(labelled.volume, head(6))
    for label, finding in ((1, EDH_SDH), (2, IPH), (3, IVH), (4, SAH), (5, EDH_SDH)):
        assert np.argwhere(labelled.truth[label, ..., finding]).tolist() == [[3, 2 + label]]
        assert np.flatnonzero(labelled.slice_truth[label]).tolist() == [ANY, finding]
    assert labelled.truth.sum() == 10
    assert not labelled.slice_truth[0].any()


def test_scans_of_one_bhsd_patient_are_told_to_be_his(bhsd: Path):
    one, other = read_bhsd(bhsd, "ID_0a_ID_1b"), read_bhsd(bhsd, "ID_0a_ID_2c")
    assert one.patient == other.patient == "ID_0a"
    assert not other.slice_truth.any()


def test_a_mask_that_lies_otherwise_than_its_volume_tells_of_the_study_only(bhsd: Path):
    path = bhsd / "label_192" / "ground truths" / "ID_0a_ID_1b.nii.gz"
    image = nibabel.load(path)
    values, affine = np.asarray(image.dataobj), image.affine @ np.diag([1, -1, 1, 1])
    values[values == 4] = 0
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    labelled = read_bhsd(bhsd, "ID_0a_ID_1b")
    assert labelled.study_truth is not None
    assert labelled.study_truth.tolist() == [1, 1, 1, 0, 1]
    assert (labelled.slice_truth == np.where(labelled.study_truth, UNKNOWN, 0)).all()
    assert (labelled.truth == np.where(labelled.study_truth, UNKNOWN, 0)).all()


def test_what_is_missing_or_damaged_in_bhsd_is_named(bhsd: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unpack label_192\.zip"):
        bhsd_cases(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no case ID_9_ID_9; it has ID_0a_ID_1b"):
        read_bhsd(bhsd, "ID_9_ID_9")
    root = bhsd / "label_192"
    mask, image = root / "ground truths" / "ID_0a_ID_1b.nii.gz", root / "images" / "ID_0a_ID_1b.nii.gz"
    nifti(np.full(head(6).hounsfield.shape, 6, np.uint8), head(6), mask)
    with pytest.raises(ConfigError, match=r"ID_1b\.nii\.gz holds other values than 0 and 1, 2, 3, 4, 5"):
        read_bhsd(bhsd, "ID_0a_ID_1b")
    nifti(np.zeros(head(4).hounsfield.shape, np.uint8), head(4), mask)
    with pytest.raises(ConfigError, match=r"has the shape \(10, 12, 4\), its volume \(10, 12, 6\)"):
        read_bhsd(bhsd, "ID_0a_ID_1b")
    mask.unlink()
    with pytest.raises(ConfigError, match=r"ID_1b\.nii\.gz is missing, the mask of"):
        read_bhsd(bhsd, "ID_0a_ID_1b")
    nifti(np.zeros(head(6).hounsfield.shape, np.uint8), head(6), mask)
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"ID_1b\.nii\.gz cannot be read as NIfTI"):
        read_bhsd(bhsd, "ID_0a_ID_1b")
    image.write_bytes(b"not NIfTI at all")
    with pytest.raises(ConfigError, match=r"ID_1b\.nii\.gz cannot be read as NIfTI"):
        read_bhsd(bhsd, "ID_0a_ID_1b")
    nifti(np.zeros((6, 12, 10, 3), np.int16)[..., 0] + np.int16(120), head(6), image)
    with pytest.raises(ConfigError, match="not in Hounsfield units"):
        read_bhsd(bhsd, "ID_0a_ID_1b")


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    folder = tmp_path / "instance-2022"
    volume = head()
    mask = np.zeros(volume.hounsfield.shape, dtype=np.int32)
    mask[3, 4:6, 5] = 1
    nifti(volume.hounsfield, volume, folder / "train_2" / "data" / "001.nii.gz", "RAS")
    nifti(mask, volume, folder / "train_2" / "label" / "001.nii.gz", "RAS")
    return folder


def test_instance_tells_where_blood_is_but_not_of_which_kind(instance: Path):
    assert instance_cases(instance) == ["001"]
    labelled = read_instance(instance, "001")
    assert well_formed(labelled)
    assert labelled.slice_truth[:, ANY].tolist() == [0, 0, 0, 1, 0]
    assert (labelled.slice_truth[3, 1:] == UNKNOWN).all()
    blood = labelled.truth[..., ANY] == 1
    assert np.argwhere(blood).tolist() == [[3, 4, 5], [3, 5, 5]]
    assert (labelled.truth[blood][:, 1:] == UNKNOWN).all()
    assert not labelled.truth[~blood].any()


def test_a_missing_or_strange_part_of_instance_is_named(instance: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="train_2 is missing"):
        instance_cases(tmp_path)
    label = instance / "train_2" / "label" / "001.nii.gz"
    nifti(np.full(head().hounsfield.shape, 0.5, np.float32), head(), label)
    with pytest.raises(ConfigError, match=r"001\.nii\.gz holds other values than 0 and 1"):
        read_instance(instance, "001")
    (instance / "train_2" / "data" / "001.nii.gz").unlink()
    with pytest.raises(ConfigError, match=r"holds no \.nii\.gz file; unpack train_2\.zip"):
        instance_cases(instance)


# --- CT-ICH 1.3.1 ----------------------------------------------------------------------------------------------------

CT_ICH_COLUMNS = ["PatientNumber", "SliceNumber", "Intraventricular", "Intraparenchymal", "Subarachnoid", "Epidural",
                  "Subdural", "No_Hemorrhage", "Fracture_Yes_No"]  # fmt: skip


def ct_ich(folder: Path, axes: str) -> Path:
    """Patient 49: epidural blood in plane 2, two kinds in plane 3, none in 1 and 4, plane 5 is not in the table."""
    volume = head()
    mask = np.zeros(volume.hounsfield.shape, dtype=np.uint8)
    mask[1, 3, 3] = mask[2, 4, 4] = 255
    if axes.endswith("I"):  # the file counts from the top
        mask = mask[::-1]
    nifti(volume.hounsfield, volume, folder / "ct_scans" / "049.nii", axes)
    nifti(mask, volume, folder / "masks" / "049.nii", axes, affine=False)
    rows: list[list[object]] = [
        [49, 1, 0, 0, 0, 0, 0, 1, 0],
        [49, 2, 0, 0, 0, 1, 0, 0, 1],
        [49, 3, 1, 0, 0, 0, 1, 0, 0],
        [49, 4, 0, 0, 0, 0, 0, 1, 0],
        [50, 5, 1, 1, 1, 1, 1, 0, 0],
    ]
    write_table(folder / "hemorrhage_diagnosis_raw_ct.csv", CT_ICH_COLUMNS, rows)
    (folder / "Patient_demographics.csv").write_text('Patient Number,"Age\n(years)",Gender\n,,\n49,17,Male\n')
    return folder


@pytest.mark.parametrize("axes", ["LPS", "RAI"])
def test_ct_ich_slices_are_the_planes_of_the_file_whichever_way_it_counts(tmp_path: Path, axes: str):
    folder = ct_ich(tmp_path, axes)
    assert ct_ich_nifti_patients(folder) == ["049"]
    labelled = read_ct_ich_nifti(folder, "049")
    assert same_volume(labelled.volume, head())
    assert well_formed(labelled)
    assert labelled.child
    order = slice(None) if axes == "LPS" else slice(None, None, -1)
    truth, slice_truth = labelled.truth[order], labelled.slice_truth[order]
    assert slice_truth.tolist() == [[0] * 5, [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [0] * 5, [UNKNOWN] * 5]
    assert np.argwhere(truth[..., ANY] == 1).tolist() == [[1, 3, 3], [2, 4, 4]]
    assert truth[1, 3, 3].tolist() == [1, 0, 0, 0, 1]
    assert truth[2, 4, 4].tolist() == [1, 0, UNKNOWN, 0, UNKNOWN]
    assert (truth[4] == UNKNOWN).all()
    assert not truth[0].any()
    assert not truth[3].any()


def test_an_outlined_ct_ich_plane_bleeds_even_if_its_row_says_no(tmp_path: Path):
    folder = ct_ich(tmp_path, "LPS")
    table = folder / "hemorrhage_diagnosis_raw_ct.csv"
    table.write_text(table.read_text().replace("49,2,0,0,0,1,0", "49,2,0,0,0,0,0"))
    labelled = read_ct_ich_nifti(folder, "049")
    assert labelled.slice_truth[1].tolist() == [1] + [UNKNOWN] * 4
    assert labelled.truth[1, 3, 3].tolist() == [1] + [UNKNOWN] * 4


def test_what_is_missing_or_damaged_in_ct_ich_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"ct_scans holds no \.nii file; download CT-ICH 1\.3\.1"):
        ct_ich_nifti_patients(tmp_path)
    folder = ct_ich(tmp_path, "LPS")
    (folder / "Patient_demographics.csv").unlink()
    assert read_ct_ich_nifti(folder, "049").child is None
    table = folder / "hemorrhage_diagnosis_raw_ct.csv"
    with table.open("a") as file:
        file.write("49,6,0,0,0,0,0,1,0\n")
    with pytest.raises(ConfigError, match=r"line 7: SliceNumber '6' is none of the 5 planes of 049\.nii"):
        read_ct_ich_nifti(folder, "049")
    table.write_text(table.read_text().replace("49,6,0,0,0,0,0,1,0", "49,5"))
    with pytest.raises(ConfigError, match="line 7: not as many cells as columns"):
        read_ct_ich_nifti(folder, "049")
    table.unlink()
    with pytest.raises(ConfigError, match=r"hemorrhage_diagnosis_raw_ct\.csv is missing"):
        read_ct_ich_nifti(folder, "049")


# --- a site's own series ---------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    for name in ("a/1", "a/2", "b"):
        write_dicom_series(head(), folder / name, Origin("study", name, patient_id="SECRET-7" if name < "b" else "X"))
    (folder / "a" / "1" / ".DS_Store").write_bytes(b"not DICOM")
    columns = ["path", "label", "iph", "sah", "child"]
    write_table(folder / "series.csv", columns, [["a/1", 1, 1, "", 1], ["a/2", 0, "", "", ""], ["b", 1, 0, "", ""]])
    return folder


def test_a_site_lists_its_series_and_says_what_each_study_shows(site: Path):
    assert site_series(site) == ["a-1", "a-2", "b"]
    bleeding = read_site(site, "a-1")
    assert well_formed(bleeding)
    assert same_volume(bleeding.volume, head())
    assert bleeding.study_truth is not None
    assert bleeding.study_truth.tolist() == [1, 1, UNKNOWN, UNKNOWN, UNKNOWN]
    assert (bleeding.slice_truth == UNKNOWN).all()
    assert bleeding.child
    negative = read_site(site, "a-2")
    assert not negative.truth.any()
    assert not negative.slice_truth.any()
    assert negative.child is None
    other = read_site(site, "b")
    assert not other.truth[..., IPH].any()
    assert (other.truth[..., ANY] == UNKNOWN).all()


def test_series_of_one_patient_of_a_site_are_told_to_be_his_without_his_id(site: Path):
    one, other, third = (read_site(site, name).patient for name in ("a-1", "a-2", "b"))
    assert one == other != third
    assert "SECRET" not in one


def test_a_mistake_in_a_site_list_is_named_with_its_line(site: Path):
    table = site / "series.csv"

    def listed(*rows: list[object], columns: tuple[str, ...] = ("path", "label", "iph")) -> None:
        write_table(table, list(columns), list(rows))

    listed(["a/1", 0, 1])
    with pytest.raises(ConfigError, match=r"line 2: label is 0, yet a kind of haemorrhage is 1"):
        read_site(site, "a-1")
    listed(["a/1", "yes", ""])
    with pytest.raises(ConfigError, match=r"line 2: label is 'yes', not 0 or 1"):
        read_site(site, "a-1")
    listed(["a", 1, ""], ["gone", 1, ""], ["a", 1, ""])
    with pytest.raises(ConfigError, match=r"line 4: a is listed before"):
        site_series(site)
    listed(["a", 1, ""], ["gone", 1, ""])
    with pytest.raises(ConfigError, match=r"a holds 2 DICOM series; name a folder that holds one"):
        read_site(site, "a")
    with pytest.raises(ConfigError, match=r"line 3: .*gone is not a folder"):
        read_site(site, "gone")
    with pytest.raises(ConfigError, match=r"no series x; it has a, gone"):
        read_site(site, "x")
    listed()
    with pytest.raises(ConfigError, match="lists no series"):
        site_series(site)
    listed(["a"], columns=("path",))
    with pytest.raises(ConfigError, match="has no column label"):
        site_series(site)
    table.unlink()
    with pytest.raises(ConfigError, match=r"series\.csv is missing"):
        site_series(site)


def test_a_file_of_a_site_that_is_no_dicom_is_named(site: Path):
    (site / "b" / "report.pdf").write_bytes(b"%PDF-1.7")
    with pytest.raises(ConfigError, match=r"report\.pdf cannot be read as DICOM"):
        read_site(site, "b")


def test_a_series_without_one_good_image_is_named(site: Path):
    for path in (site / "b").glob("*.dcm"):
        ds = dcmread(path)
        ds.PixelData = ds.PixelData[:10]
        ds.save_as(path)
    with pytest.raises(ConfigError, match=r"/b: no image can be decoded .* take them away"):
        read_site(site, "b")


# --- all sets --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rsna", "cq500", "bhsd", "instance", "site")
def test_every_public_set_reads_by_its_name_one_volume_at_a_time(tmp_path: Path):
    ct_ich(tmp_path / "ct-ich-nifti", "LPS")
    for source, count in zip(PUBLIC_SETS, (3, 2, 2, 1, 1, 3), strict=True):
        volumes = read_public_set(tmp_path, source)
        assert iter(volumes) is volumes
        read = list(volumes)
        assert [labelled.source for labelled in read] == [source] * count
        assert all(well_formed(labelled) for labelled in read)


def test_labels_of_a_whole_study_take_no_memory_for_voxels(site: Path):
    truth = read_site(site, "a-2").truth
    assert truth.strides[1:3] == (0, 0)

from pathlib import Path

import numpy as np
import pytest
from ct_image_iod import faults
from PIL import Image
from pydicom import dcmread
from real_data import DATA, needs_real_data

from herald.errors import ConfigError
from herald.signatures import FINDINGS
from herald.volume import read_datasets, volume_from_datasets
from serving.readers import (
    PHE_BRAIN_HOUNSFIELD,
    UNKNOWN,
    NamedPatient,
    ct_ich_patients,
    fuse,
    named_patients,
    phe_sich_patients,
    read_ct_ich,
    read_phe_sich,
    write_patient,
)


def test_the_brain_window_is_used_where_it_is_not_saturated_and_the_bone_window_elsewhere():
    brain = np.array([[0, 0, 128, 255, 255]], dtype=np.uint8)
    bone = np.array([[0, 60, 75, 82, 200]], dtype=np.uint8)  # air, fat, brain, calcification, bone
    assert fuse(brain, bone).tolist() == [[-1024, -147, 40, 129, 1610]]


def test_fused_units_never_contradict_the_saturated_brain_window():
    brain = np.array([[0, 255]], dtype=np.uint8)
    bone = np.array([[79, 72]], dtype=np.uint8)  # JPEG noise: 91 HU and 4 HU
    air_side, bone_side = fuse(brain, bone)[0]
    assert air_side <= -20
    assert bone_side >= 100


@needs_real_data
def test_ct_ich_gives_the_brain_the_units_of_the_same_slices_in_dicom():
    for name in ("049_21", "066_19", "080_19"):
        patient, number = name.split("_")
        native = dcmread(DATA / "ct-ich" / "images" / f"{name}.dcm", force=True).pixel_array
        fused = read_ct_ich(DATA / "ct-ich-v1", patient).volume.hounsfield[int(number) - 1]
        medians = [float(np.median(x[(x > 10) & (x < 60)])) for x in (native, fused)]
        assert medians[0] == pytest.approx(medians[1], abs=1.5)


@needs_real_data
def test_ct_ich_masks_lie_in_positive_slices_and_carry_their_kind():
    labelled = read_ct_ich(DATA / "ct-ich-v1", "066")
    any_, edh_sdh = FINDINGS.index("any"), FINDINGS.index("edh_sdh")
    positive = labelled.slice_truth[:, any_] == 1
    assert positive.sum() == 12
    outlined = labelled.truth[..., any_].any(axis=(1, 2))
    assert not (outlined & ~positive).any()
    assert np.array_equal(labelled.truth[..., edh_sdh], labelled.truth[..., any_])
    assert not labelled.truth[..., FINDINGS.index("iph")].any()
    assert labelled.child


@needs_real_data
def test_which_of_two_kinds_a_voxel_is_stays_unknown():
    labelled = read_ct_ich(DATA / "ct-ich-v1", "076")
    both = (labelled.slice_truth[:, 1:] == 1).sum(axis=1) > 1
    truth = labelled.truth[both]
    blood = truth[..., 0] == 1
    assert blood.any()
    assert set(np.unique(truth[blood][:, FINDINGS.index("sah")])) == {UNKNOWN}
    assert set(np.unique(truth[~blood][:, 1:])) == {0}


@needs_real_data
def test_ct_ich_slices_ascend_from_the_skull_base_to_the_vertex_with_the_face_on_top():
    hounsfield = read_ct_ich(DATA / "ct-ich-v1", "054").volume.hounsfield
    soft = (hounsfield > -300).sum(axis=(1, 2))
    assert soft[-1] < soft[len(soft) // 2]
    low = hounsfield[len(hounsfield) // 6]
    behind_tissue = np.maximum.accumulate(low > 0, axis=0)
    before_tissue = np.maximum.accumulate(low[::-1] > 0, axis=0)[::-1]
    air_inside = (low < -300) & behind_tissue & before_tissue
    rows = np.flatnonzero(air_inside.any(axis=1))
    body = np.flatnonzero((low > 0).any(axis=1))
    centre_of_air = np.average(np.arange(len(low)), weights=air_inside.sum(axis=1))
    assert rows.size
    assert centre_of_air < (body[0] + body[-1]) / 2  # sinuses and mouth are in front


@pytest.fixture
def phe_sich(tmp_path: Path) -> Path:
    """Twelve slices of a bright ring, grey brain and a clot, boxed in slices 5 and 6; 6 has no clot mask."""
    for folder in ("img", "pseudo_haem"):
        (tmp_path / folder).mkdir()
    rows, columns = np.mgrid[:512, :512]
    radius = np.hypot(rows - 256, columns - 256)
    lines = ["patient,slice,src,phe_mask_px,box,pseudo_haem_px"]
    for i in range(12):
        plane = np.where(radius < 180, 100, 0) + np.where((radius >= 180) & (radius < 200), 255, 0)
        clot = np.hypot(rows - 256, columns - 140) < 20  # towards the face, which looks to the left
        if i in (5, 6):
            plane[clot] = 170
        Image.fromarray(plane.astype(np.uint8)).save(tmp_path / "img" / f"0001_{i:02d}.png")
        if i == 5:
            Image.fromarray((clot * 255).astype(np.uint8)).save(tmp_path / "pseudo_haem" / f"0001_{i:02d}.png")
        lines.append(f"0001,{i},png,0,{int(i in (5, 6))},0")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_phe_sich_is_turned_upright_and_calibrated_on_brain(phe_sich: Path):
    labelled = read_phe_sich(phe_sich, "0001")
    clot = labelled.truth[5, ..., FINDINGS.index("iph")] == 1
    assert np.argwhere(clot).mean(axis=0) == pytest.approx([140, 255.5], abs=1)
    assert np.median(labelled.volume.hounsfield[8, 200:300, 200:300]) == pytest.approx(PHE_BRAIN_HOUNSFIELD, abs=1)
    assert labelled.volume.hounsfield[5][clot].mean() == pytest.approx(PHE_BRAIN_HOUNSFIELD + 70 * 120 / 255, abs=1)


def test_a_slice_without_a_box_near_a_boxed_one_is_unknown_not_negative(phe_sich: Path):
    slice_truth = read_phe_sich(phe_sich, "0001").slice_truth
    assert slice_truth[:, FINDINGS.index("any")].tolist() == [0, 0] + [UNKNOWN] * 3 + [1, 1] + [UNKNOWN] * 3 + [0, 0]
    assert slice_truth[5, FINDINGS.index("ivh")] == UNKNOWN


def test_a_boxed_slice_without_a_clot_mask_teaches_no_voxel(phe_sich: Path):
    truth = read_phe_sich(phe_sich, "0001").truth
    assert (truth[6, ..., FINDINGS.index("any")] == UNKNOWN).all()
    assert (truth[0] == 0).all()


@needs_real_data
def test_both_sets_list_their_patients():
    assert len(ct_ich_patients(DATA / "ct-ich-v1")) == 41
    assert len(phe_sich_patients(DATA / "phe-sich")) == 60


def test_a_missing_set_or_patient_is_named(tmp_path: Path, phe_sich: Path):
    with pytest.raises(ConfigError, match=r"labels\.csv is not in"):
        ct_ich_patients(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no patient 9999; it has 0001"):
        read_phe_sich(phe_sich, "9999")


def test_patients_are_named_by_set_and_number_by_all_and_by_a_folder_in_the_set_s_layout(phe_sich: Path):
    phe_sich.rename(phe_sich.parent / "phe-sich")
    data, folder = phe_sich.parent, phe_sich.parent / "phe-sich"
    only = [NamedPatient("phe-sich", folder, "0001")]
    assert named_patients("phe-sich:0001", data) == only
    assert named_patients("phe-sich:all", data) == only
    assert named_patients(str(folder), data / "elsewhere") == only
    assert named_patients(str(folder / "img"), data) == []
    assert named_patients("C:/scans", data) == []
    with pytest.raises(ConfigError, match="phe-sich has no patient '0002'; it has 0001"):
        named_patients("phe-sich:0002", data)


def test_a_patient_written_as_dicom_is_a_valid_series_with_the_same_hounsfield_units(phe_sich: Path, tmp_path: Path):
    paths = write_patient(NamedPatient("phe-sich", phe_sich, "0001"), tmp_path / "out")
    assert faults(paths) == []
    volume = volume_from_datasets(read_datasets(paths))
    expected = read_phe_sich(phe_sich, "0001").volume
    assert np.array_equal(volume.hounsfield, expected.hounsfield)
    assert volume.slice_spacing_mm == expected.slice_spacing_mm
    assert dcmread(paths[0]).ImageType[0] == "DERIVED"

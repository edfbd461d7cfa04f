"""The simulation: truth that fits its pixels, labels that fit its headers, and the same from the same seed."""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from ct_image_iod import faults
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from real_data import needs_real_data
from scipy import ndimage

from herald.signatures import FINDINGS, HEADS
from herald.volume import Volume, read_datasets, volume_from_datasets
from serving import phantom
from serving.dicom_writer import Origin, write_dicom_series
from serving.phantom import (
    OTHER_REGIONS,
    SimulatedSeries,
    acquire,
    draw_acquisition,
    draw_findings,
    make_subject,
    simulate,
    write_demo_study,
    write_phantoms,
    write_series,
)
from serving.phantom.anatomy import (
    HEAD_ORIGIN,
    HEAD_SHAPE,
    Build,
    Subject,
    atlas,
    draw_build,
    head,
    vessel_tree,
)
from serving.phantom.haemorrhage import KINDS, LABELS, bleed
from serving.phantom.mimics import MIMICS, draw_mimics, paint_mimics
from serving.phantom.scanner import noise


@pytest.fixture(scope="module")
def plain() -> Subject:
    return make_subject(np.random.default_rng(4), build=Build(), mimics=())


@pytest.fixture(scope="module")
def bleeding() -> SimulatedSeries:
    return simulate(3, findings={"iph": 25.0, "sdh": 20.0}, slices=24, matrix=128, noise=2.0, tilt_deg=0.0)


def test_the_same_seed_gives_the_same_series_and_another_seed_another() -> None:
    first, again, other = (simulate(seed, region="limb", slices=8, matrix=64) for seed in (5, 5, 6))
    assert np.array_equal(first.volume.hounsfield, again.volume.hounsfield)
    assert not np.array_equal(first.volume.hounsfield, other.volume.hounsfield)


def test_truth_marks_blood_that_is_brighter_than_brain(bleeding: SimulatedSeries) -> None:
    inside = bleeding.volume.hounsfield[bleeding.truth[..., FINDINGS.index("iph")]]
    assert 50 < np.median(inside) < 85
    assert np.array_equal(bleeding.truth[..., 0], bleeding.truth[..., 1:].any(-1))
    assert not bleeding.truth[..., FINDINGS.index("ivh")].any()


def test_a_bleed_has_about_the_volume_asked_for(bleeding: SimulatedSeries) -> None:
    # the head is scaled by up to 10 percent a side, so its volumes by up to about 30 percent
    assert bleeding.volumes_ml["iph"] == pytest.approx(25, rel=0.4)
    assert bleeding.volumes_ml["edh_sdh"] == pytest.approx(20, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bleed_fills_its_own_channel_with_about_its_volume(kind: str) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        hounsfield, fluid = composed()
        labels, _ = bleed(rng, hounsfield, fluid, {kind: 8.0})
        assert set(np.unique(labels)) == {0, LABELS[kind]}
        assert 4000 < (labels > 0).sum() < 9000


def test_tiny_bleeds_are_drawn_and_painted() -> None:
    volumes = [v for seed in range(300) for v in draw_findings(np.random.default_rng(seed)).values()]
    assert np.mean(np.asarray(volumes) < 1) > 0.1
    assert np.mean((np.asarray(volumes) >= 1) & (np.asarray(volumes) < 5)) > 0.2
    for kind in KINDS:
        labels, _ = bleed(np.random.default_rng(2), *composed(), {kind: 0.6})
        assert 150 < (labels > 0).sum() < 700


def test_subdural_blood_may_be_fresh_or_old_and_settle() -> None:
    medians = []
    for seed in range(48):
        hounsfield, fluid = composed()
        labels, _ = bleed(np.random.default_rng(seed), hounsfield, fluid, {"sdh": 30.0})
        medians.append(float(np.median(hounsfield[labels > 0])))
    assert min(medians) < 45
    assert np.median(medians) > 52


def test_a_large_bleed_of_one_side_shifts_the_midline_away_from_it(plain: Subject) -> None:
    hounsfield, fluid = composed()
    labels, pushes = bleed(np.random.default_rng(5), hounsfield, fluid, {"edh": 50.0})
    _, _, x = np.nonzero(labels)
    (push,) = pushes
    assert push.shift_mm * (x.mean() + HEAD_ORIGIN[2]) < 0
    flat = {"tilt_deg": 0.0, "pose_deg": (0.0, 0.0, 0.0), "holder": "none"}
    drawn = draw_acquisition(np.random.default_rng(1), plain, slices=30, matrix=128)
    drawn = replace(drawn, spacing_mm=5.0, **flat)  # type: ignore[arg-type]
    still, shifted = (
        acquire(replace(plain, pushes=p), drawn, np.random.default_rng(3), noisy=False).volume.hounsfield.astype(float)
        for p in ((), (replace(push, shift_mm=8.0),))
    )
    assert np.abs(shifted - still)[(still > 0) & (still < 80)].mean() > 0.5


def composed() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A fresh copy of one head, Hounsfield units and fraction of fluid."""
    hounsfield, fluid = _composed()
    return hounsfield.copy(), fluid


@cache
def _composed() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return head(np.random.default_rng(4), build=Build(sulci=1.5))


def painted(head: Subject, mimic: str, seed: int) -> NDArray[np.float32]:
    hounsfield = head.hounsfield.astype(np.float32)
    paint_mimics(np.random.default_rng(seed), hounsfield, Build(), (mimic,))
    return hounsfield


@pytest.mark.parametrize("mimic", MIMICS)
def test_every_mimic_changes_its_part_of_the_head(plain: Subject, mimic: str) -> None:
    changed = np.abs(painted(plain, mimic, 8) - plain.hounsfield) > 2
    assert 8 < changed.sum() < 500_000


def test_mimics_are_named_and_are_no_blood() -> None:
    series = simulate(5, mimics=list(MIMICS), build=Build(), slices=8, matrix=64)
    assert not series.truth.any()
    assert series.mimics == tuple(MIMICS)


def test_choroid_plexus_is_calcified_in_the_atria_of_the_ventricles(plain: Subject) -> None:
    sides = np.zeros(2)
    for seed in range(4):
        dense = (painted(plain, "choroid", seed) > 70) & (plain.hounsfield < 60)
        z, y, x = (np.argwhere(dense) + np.asarray(HEAD_ORIGIN)).T
        glomus = (np.abs(z - 6) < 16) & (np.abs(y - 40) < 16)
        assert glomus.mean() > 0.7
        sides += [(x[glomus] < -12).any(), (x[glomus] > 12).any()]
    assert (sides >= 2).all()


def test_mimics_and_build_follow_age_and_seed() -> None:
    assert draw_mimics(np.random.default_rng(1), "old") == draw_mimics(np.random.default_rng(1), "old")
    drawn = [draw_mimics(np.random.default_rng(seed), age) for age in ("infant", "old") for seed in range(200)]
    infants, old = drawn[:200], drawn[200:]
    share = {name: (np.mean([name in d for d in infants]), np.mean([name in d for d in old])) for name in MIMICS}
    assert share["choroid"][0] < 0.1 < 0.5 < share["choroid"][1]
    assert share["dense_dura"][0] > share["dense_dura"][1]
    builds = [draw_build(np.random.default_rng(seed)) for seed in range(200)]
    assert max(b.size for b in builds if b.age == "infant") < min(b.size for b in builds if b.age == "old")


def test_an_infant_has_a_small_head_with_a_thin_open_skull() -> None:
    adult = make_subject(np.random.default_rng(2), build=Build(), mimics=())
    infant = make_subject(
        np.random.default_rng(2), build=Build("infant", 0.7, 0.4, suture_mm=2.0, fontanelle_mm=10.0), mimics=()
    )
    z = int(60 - HEAD_ORIGIN[0])
    assert (infant.hounsfield[z] > 300).sum() < 0.7 * (adult.hounsfield[z] > 300).sum()
    assert infant.extent_mm[1] < adult.extent_mm[1]
    at_bregma = np.s_[z:, 95:105, 100:108]  # x from -4, y from -19
    assert (infant.hounsfield[at_bregma] > 300).mean() < 0.5 * (adult.hounsfield[at_bregma] > 300).mean()


def test_unknown_mimics_are_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="hat"):
        simulate(1, mimics=["hat"])


def test_an_unknown_kind_of_bleed_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match="bruise"):
        simulate(1, findings={"bruise": 1.0})


def test_a_bone_kernel_is_noisier_at_high_frequency_than_a_soft_one(plain: Subject) -> None:
    roughness = {}
    for kernel in HEADS["kernel"]:
        drawn = draw_acquisition(np.random.default_rng(1), plain, kernel=kernel, slices=8, matrix=256)
        image = acquire(plain, drawn, np.random.default_rng(2)).volume.hounsfield[4].astype(float)
        brain = (image > -60) & (image < 160)
        roughness[kernel] = float(np.median(np.abs(np.diff(image, axis=1))[brain[:, 1:] & brain[:, :-1]]))
    assert roughness["bone"] > 2 * roughness["soft"]


@pytest.mark.parametrize("kernel", HEADS["kernel"])
@pytest.mark.parametrize("along_rows", [0.0, 1.5])
def test_averaged_noise_of_256_is_what_averaging_leaves_of_that_of_512(kernel: str, along_rows: float) -> None:
    large = noise(kernel, (4, 512, 512), np.random.default_rng(5), 2 * along_rows)
    small = noise(kernel, (4, 256, 256), np.random.default_rng(5), along_rows, averaged=True)
    np.testing.assert_allclose(small, large.reshape(4, 256, 2, 256, 2).mean((2, 4)), atol=1e-5)


def developed(head: Subject, **change: object) -> NDArray[np.float32]:
    drawn = draw_acquisition(np.random.default_rng(1), head, slices=12, matrix=128, thickness_mm=5.0)
    flat = {"tilt_deg": 0.0, "pose_deg": (0.0, 0.0, 0.0), "noise": 0.0, "streaks": 0.0, "motion_mm": 0.0}
    chosen = replace(drawn, centre_mm=(-10.0, 12.0, 0.0), spacing_mm=6.0, **(flat | change))  # type: ignore[arg-type]
    return acquire(head, chosen, np.random.default_rng(3)).volume.hounsfield.astype(np.float32)


def test_beam_hardening_bands_brain_between_the_petrous_bones_more_than_below_the_vertex(plain: Subject) -> None:
    clean, hard = developed(plain), developed(plain, streaks=6.0)
    brain = (clean > 10) & (clean < 60)
    wrong = np.array([np.std((hard - clean)[i][brain[i]]) for i in range(12)])
    assert wrong[1:4].max() > 3
    assert wrong[1:4].max() > 2 * wrong[9]


def test_metal_makes_streaks(plain: Subject) -> None:
    with_metal = replace(plain, hounsfield=painted(plain, "metal", 1).astype(np.int16))
    change = np.abs(developed(with_metal, streaks=4.0) - developed(plain, streaks=4.0))
    assert (change > 8).mean() > 2 * (np.abs(developed(with_metal) - developed(plain)) > 8).mean()


def test_motion_spoils_some_slices_and_leaves_others(plain: Subject) -> None:
    still, moved = developed(plain), developed(plain, motion_mm=3.0)
    changed = np.abs(moved - still).max(axis=(1, 2)) > 20
    assert 2 <= changed.sum() < 12


def test_contrast_fills_arteries_and_is_labelled(plain: Subject) -> None:
    enhanced = make_subject(np.random.default_rng(4), contrast="arterial")
    assert (plain.contrast, enhanced.contrast) == ("non_contrast", "contrast")
    arteries = (atlas().arteries > 0.9) & (atlas().depth < -3)
    assert np.median(plain.hounsfield[arteries]) < 70
    assert np.median(enhanced.hounsfield[arteries]) > 150


@needs_real_data
def test_the_vessels_of_a_real_head_lie_in_the_cranial_cavity_of_the_atlas() -> None:
    tree = vessel_tree()
    assert tree is not None
    large = ndimage.binary_opening(tree.filled > 0.8)
    z, y, x = np.argwhere(large).T + np.asarray(HEAD_ORIGIN)[:, None]
    assert (z.max(), y.max(), x.max(), x.min()) == pytest.approx((82, 104, 68, -68), abs=9)
    sagittal_sinus = (atlas().veins > 0.9) & (np.abs(np.arange(HEAD_SHAPE[2]) + HEAD_ORIGIN[2]) < 6)
    near = ndimage.binary_dilation(large, iterations=6)
    assert near[sagittal_sinus].mean() > 0.5


def test_no_vessel_tree_is_needed(tmp_path: Path) -> None:
    assert vessel_tree(tmp_path / "absent.nii.gz") is None


def test_the_same_seed_scans_alike_with_and_without_a_bleed(bleeding: SimulatedSeries) -> None:
    without = simulate(3, slices=24, matrix=128, noise=2.0, tilt_deg=0.0)
    assert without.acquisition == bleeding.acquisition


@pytest.mark.parametrize("region", OTHER_REGIONS)
def test_what_is_not_a_head_is_labelled_other_and_has_no_truth(region: str) -> None:
    series = simulate(2, region=region, slices=8, matrix=64)
    assert series.labels["region"] == "other"
    assert not series.truth.any()
    assert (series.volume.hounsfield > -300).mean() > 0.03


@pytest.mark.parametrize(
    ("orientation", "tilt"), [("axial", 0.0), ("axial", 20.0), ("coronal", 0.0), ("sagittal", 0.0)]
)
def test_written_series_come_back_as_the_same_volume(
    plain: Subject, tmp_path: Path, orientation: str, tilt: float
) -> None:
    rng = np.random.default_rng(4)
    drawn = draw_acquisition(rng, plain, orientation=orientation, slices=8, matrix=64)
    series = acquire(plain, replace(drawn, tilt_deg=tilt), rng)
    write_dicom_series(
        series.volume,
        tmp_path,
        Origin(study="s", series="1"),
        image_positions_mm=series.image_positions_mm,
        image_orientation=series.image_orientation,
    )
    back = volume_from_datasets(read_datasets(sorted(tmp_path.glob("*.dcm"))))
    assert back.orientation == orientation
    assert back.gantry_tilt_deg == pytest.approx(tilt, abs=0.01)
    assert back.slice_spacing_mm == pytest.approx(series.volume.slice_spacing_mm, abs=0.01)
    same = np.array_equal(back.hounsfield, series.volume.hounsfield)
    assert same or np.array_equal(back.hounsfield[::-1], series.volume.hounsfield)  # sagittal normals point either way


def test_any_volume_becomes_valid_ct_instances_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    hounsfield = np.arange(3 * 16 * 16, dtype=np.int16).reshape(3, 16, 16) - 1024
    volume = Volume(hounsfield, np.array([0.0, 5.0, 10.0]), (0.5, 0.5))
    first = write_dicom_series(volume, tmp_path / "a", Origin(study="x", series="1"))
    second = write_dicom_series(volume, tmp_path / "b", Origin(study="x", series="1"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    ds = dcmread(first[0])
    assert (ds.SOPClassUID, ds.file_meta.TransferSyntaxUID) == (CTImageStorage, ExplicitVRLittleEndian)
    assert ds.PatientName == "HERALD^SIMULATED"
    assert np.array_equal(volume_from_datasets(read_datasets(first)).hounsfield, hounsfield)


def test_write_phantoms_writes_a_folder_and_a_truth_for_each_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phantom, "draw_series", partial(phantom.draw_series, slices=8, matrix=64))
    seen: list[tuple[int, int]] = []
    truth = write_phantoms(tmp_path, 2, seed=1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert json.loads((tmp_path / "truth.json").read_text()) == truth
    for entry in truth:
        ds = dcmread(sorted((tmp_path / str(entry["folder"])).glob("*.dcm"))[0])
        assert ds.SeriesInstanceUID == entry["series_instance_uid"]
        labels = entry["labels"]
        assert isinstance(labels, dict)
        assert ("ContrastBolusAgent" in ds) == (labels["contrast"] == "contrast")
        assert set(labels) == set(HEADS)
        acquisition, bleeds, mimics = entry["acquisition"], entry["bleeds"], entry["mimics"]
        assert isinstance(acquisition, dict)
        assert isinstance(mimics, list)
        assert (acquisition["slices"], acquisition["matrix"]) == (8, 64)
        assert bool(bleeds) >= bool(entry["findings"])
        assert set(mimics) <= {*MIMICS, "infant", "child", "old"}


@pytest.mark.parametrize("orientation", ["axial", "coronal", "sagittal"])
def test_written_series_are_valid_ct_images(plain: Subject, tmp_path: Path, orientation: str) -> None:
    rng = np.random.default_rng(4)
    series = acquire(plain, draw_acquisition(rng, plain, orientation=orientation, slices=8, matrix=64), rng)
    write_series(series, tmp_path, Origin(study="s", series="1"))
    assert faults(sorted(tmp_path.glob("*.dcm"))) == []


@pytest.mark.parametrize(
    ("keyword", "value", "fault"),
    [
        ("KVP", None, "KVP is missing"),
        ("RescaleSlope", "", "RescaleSlope is missing or empty"),
        ("ImagePositionPatient", [0, 0, 400], "slices are not evenly spaced along their normal"),
        ("ImageOrientationPatient", [1, 0, 0, 1, 1, 0], "ImageOrientationPatient is not orthonormal"),
        ("Rows", 15, "PixelData has another length than Rows and Columns give"),
        ("FrameOfReferenceUID", "1.2.3", "FrameOfReferenceUID differs"),
    ],
)
def test_the_check_of_ct_images_finds_what_is_wrong(tmp_path: Path, keyword: str, value: object, fault: str) -> None:
    volume = Volume(np.zeros((3, 16, 16), np.int16), np.array([0.0, 5.0, 10.0]), (0.5, 0.5))
    paths = write_dicom_series(volume, tmp_path, Origin(study="x", series="1"))
    assert faults(paths) == []
    ds = dcmread(paths[1])
    if value is None:
        delattr(ds, keyword)
    else:
        setattr(ds, keyword, value)
    ds.save_as(paths[1])
    (found,) = faults(paths)
    assert found.endswith(fault)


def test_the_demo_has_one_study_with_a_large_bleed_and_one_without(tmp_path: Path) -> None:
    bleed, no_bleed = write_demo_study(tmp_path)
    assert bleed["study_instance_uid"] != no_bleed["study_instance_uid"]
    findings = bleed["findings"]
    assert isinstance(findings, dict)
    assert 20 < findings["iph"]["volume_ml"] < 40
    assert no_bleed["findings"] == {}
    ds = dcmread(sorted((tmp_path / "bleed").glob("*.dcm"))[0])
    assert (ds.Rows, ds.Columns, ds.SliceThickness) == (512, 512, 5)

"""From DICOM instances to a volume: order, orientation, tilt, gaps, duplicates, missing attributes, slabs, inputs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian
from real_data import DATA, needs_real_data

from herald.errors import NotDicomError, PixelDataError, VolumeError
from herald.volume import (
    BRAIN,
    Placement,
    Volume,
    Window,
    detection_input,
    head_square,
    protocol_batch,
    read_datasets,
    slabs,
    volume_from_datasets,
)
from serving.dicom_writer import Origin, write_dicom_series

SIDE = 64


def real(folder: str) -> list[Path]:
    return sorted(p for p in (DATA / folder).iterdir() if p.is_file())


def numbered(count: int, spacing_mm: float = 5.0) -> Volume:
    """A volume whose slice i is 10 i Hounsfield units, with a bright corner at the anterior right."""
    hounsfield = np.repeat(np.arange(count, dtype=np.int16)[:, None, None] * 10, SIDE, axis=1).repeat(SIDE, axis=2)
    hounsfield[:, 0, 0] = 1000
    return Volume(hounsfield, np.arange(count) * spacing_mm, (0.5, 0.5))


@pytest.fixture
def instances(tmp_path: Path) -> Callable[[int], list[Dataset]]:
    def make(count: int) -> list[Dataset]:
        paths = write_dicom_series(numbered(count), tmp_path / "series", Origin(study="s", series="t"))
        return [dcmread(path) for path in paths]

    return make


def enhanced_frame(number: int) -> Dataset:
    """An Enhanced CT instance with one frame of 40 HU at 5 mm times its number (PS3.3 A.38)."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = EnhancedCTImageStorage, f"1.2.3.{number}"
    ds.InstanceNumber, ds.NumberOfFrames = number, 1
    ds.Rows = ds.Columns = SIDE
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    ds.PixelData = np.full((SIDE, SIDE), 1064, "<u2").tobytes()
    shared, frame = Dataset(), Dataset()
    shared.PixelValueTransformationSequence = [item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")]
    shared.PlaneOrientationSequence = [item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]
    shared.PixelMeasuresSequence = [item(PixelSpacing=[0.4, 0.4])]
    frame.PlanePositionSequence = [item(ImagePositionPatient=[0, 0, 5.0 * number])]
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], [frame]
    return ds


def item(**elements: object) -> Dataset:
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def levels(volume: Volume) -> list[int]:
    return [int(plane[5, 5]) for plane in volume.hounsfield]


def test_slices_come_out_from_inferior_to_superior_in_whatever_order_they_came(instances) -> None:
    datasets = instances(10)
    order = np.random.default_rng(0).permutation(10)
    volume = volume_from_datasets([datasets[i] for i in order])
    assert levels(volume) == [10 * i for i in range(10)]
    assert volume.orientation == "axial"
    assert volume.slice_spacing_mm == 5.0


def test_an_image_stored_upside_down_is_turned_to_anterior_first_and_right_first(instances) -> None:
    datasets = instances(8)
    for ds in datasets:
        ds.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        ds.PixelData = ds.pixel_array[::-1, ::-1].tobytes()
    volume = volume_from_datasets(datasets)
    assert (volume.hounsfield[:, 0, 0] == 1000).all()


def test_slices_with_a_normal_towards_the_feet_are_turned_over(instances) -> None:
    datasets = instances(8)
    for ds in datasets:
        ds.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]
        ds.PixelData = ds.pixel_array[:, ::-1].tobytes()
    volume = volume_from_datasets(datasets)
    assert levels(volume) == [10 * i for i in range(8)]
    assert (np.diff(volume.positions_mm) > 0).all()
    assert (volume.hounsfield[:, 0, 0] == 1000).all()


def test_two_images_at_one_position_count_once_and_are_noted(instances) -> None:
    datasets = instances(8)
    volume = volume_from_datasets([*datasets, datasets[3]])
    assert volume.slice_count == 8
    assert any("position that another image has" in note for note in volume.notes)


def test_a_gap_is_noted_and_does_not_inflate_what_a_slice_stands_for(instances) -> None:
    datasets = instances(12)
    volume = volume_from_datasets(datasets[:4] + datasets[7:])
    assert any("uneven spacing" in note for note in volume.notes)
    assert volume.slice_extents_mm.max() <= 7.5


def test_without_positions_the_instance_number_orders_the_slices(instances) -> None:
    datasets = instances(9)
    for ds in datasets:
        del ds.ImagePositionPatient
    volume = volume_from_datasets(datasets[::-1])
    assert levels(volume) == [10 * i for i in range(9)]
    assert any("ImagePositionPatient is missing" in note for note in volume.notes)


def test_a_scout_within_the_series_is_left_out(instances) -> None:
    datasets = instances(9)
    datasets[0].ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    volume = volume_from_datasets(datasets)
    assert volume.slice_count == 8
    assert any("another orientation" in note for note in volume.notes)


def test_more_slices_of_another_orientation_or_matrix_than_scouts_are_told_as_left_out(instances) -> None:
    datasets = instances(20)
    assert volume_from_datasets(datasets).left_out == ""
    for ds in datasets[:2]:
        ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
    assert volume_from_datasets(datasets).left_out == "", "a frontal and a lateral scout"
    for ds in datasets[2:5]:
        ds.Rows, ds.PixelData = SIDE // 2, ds.PixelData[: len(ds.PixelData) // 2]
    volume = volume_from_datasets(datasets)
    assert volume.slice_count == 15
    assert "5 of 20 slices left out" in volume.left_out


def test_an_enhanced_instance_of_one_frame_is_scaled_and_placed_by_its_functional_groups() -> None:
    volume = volume_from_datasets([enhanced_frame(number) for number in (3, 1, 2)])
    assert levels(volume) == [40, 40, 40]
    assert volume.positions_mm.tolist() == [5.0, 10.0, 15.0]
    assert volume.pixel_spacing_mm == (0.4, 0.4)
    assert volume.instance_numbers == (1, 2, 3)
    assert volume.notes == ()


def test_an_image_without_pixels_is_left_out_and_named(instances) -> None:
    datasets = instances(9)
    del datasets[4].PixelData
    volume = volume_from_datasets(datasets)
    assert volume.slice_count == 8
    assert len(volume.unreadable) == 1
    assert datasets[4].SOPInstanceUID in volume.unreadable[0]


def test_a_series_without_any_pixels_says_so(instances) -> None:
    datasets = instances(8)
    for ds in datasets:
        del ds.PixelData
    with pytest.raises(PixelDataError, match="no PixelData"):
        volume_from_datasets(datasets)


def test_truncated_pixels_are_an_error_that_names_the_instance(instances) -> None:
    datasets = instances(8)[:1]
    datasets[0].PixelData = datasets[0].PixelData[:100]
    with pytest.raises(PixelDataError, match="cannot be decoded"):
        volume_from_datasets(datasets)


def test_nothing_makes_no_volume() -> None:
    with pytest.raises(VolumeError):
        volume_from_datasets([])


def test_a_file_that_is_not_dicom_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(NotDicomError, match=r"notes\.txt"):
        read_datasets([path])


@needs_real_data
def test_the_real_head_has_its_tilt_and_its_two_spacings_noted() -> None:
    volume = volume_from_datasets(read_datasets(real("ge-head")))
    assert volume.slice_count == 28
    assert volume.gantry_tilt_deg == pytest.approx(18.5, abs=0.2)
    assert any("uneven spacing: 4.0 mm usual, up to 7.0 mm" in note for note in volume.notes)


@needs_real_data
def test_a_real_localizer_lies_in_another_plane() -> None:
    assert volume_from_datasets(read_datasets(real("philips-phantom/localizer"))).orientation != "axial"


def test_thin_slices_become_slabs_that_map_back_to_the_originals() -> None:
    thin = numbered(50, spacing_mm=1.0)
    thick = slabs(thin, 5.0)
    assert thick.volume.slice_count == 10
    assert [i for members in thick.members for i in members] == list(range(50))
    assert levels(thick.volume)[0] == 20


def test_thick_slices_stay_as_they_are() -> None:
    volume = numbered(10, spacing_mm=4.0)
    assert slabs(volume, 5.0).volume is volume


@given(count=st.integers(1, 90), spacing=st.floats(0.3, 8.0))
def test_slabs_keep_every_slice_once_and_positions_ascending(count: int, spacing: float) -> None:
    thick = slabs(numbered(count, spacing), 5.0)
    assert [i for members in thick.members for i in members] == list(range(count))
    assert (np.diff(thick.volume.positions_mm) > 0).all()


@given(count=st.integers(1, 70), rows=st.integers(20, 90), columns=st.integers(20, 90))
def test_the_protocol_model_always_gets_eight_slices_of_256(count: int, rows: int, columns: int) -> None:
    volume = Volume(np.zeros((count, rows, columns), np.int16), np.arange(count) * 1.0, (0.5, 0.5))
    batch = protocol_batch(volume)
    assert batch.shape[1:] == (8, 256, 256)
    assert 1 <= len(batch) <= 4
    assert batch.dtype == np.int16


@given(side=st.integers(1, 1300))
@settings(deadline=None)  # the largest planes take a while
def test_what_the_protocol_model_sees_lies_where_it_was_whatever_the_matrix(side: int) -> None:
    across = np.broadcast_to(np.arange(side, dtype=np.int16), (8, side, side))
    seen = protocol_batch(Volume(across, np.arange(8) * 5.0, (0.5, 0.5)))[0, 0, 0]
    assert np.abs(seen - ((np.arange(256) + 0.5) * side / 256 - 0.5)).max() <= 1


def test_the_protocol_model_sees_the_mean_of_four_pixels_of_512_with_half_their_noise() -> None:
    noisy = np.random.default_rng(0).normal(40, 20, (8, 512, 512)).astype(np.int16)
    seen = protocol_batch(Volume(noisy, np.arange(8) * 5.0, (0.5, 0.5)))[0]
    assert np.abs(seen - noisy.reshape(8, 256, 2, 256, 2).mean((2, 4))).max() <= 0.5
    assert seen.std() == pytest.approx(10, rel=0.02)


def test_the_square_around_the_head_follows_the_head_and_not_the_field_of_view() -> None:
    row, column = np.mgrid[:200, :200]
    head = np.where((row - 80) ** 2 / 60**2 + (column - 120) ** 2 / 45**2 < 1, 40, -1000).astype(np.int16)
    square = head_square(np.stack([head] * 5))
    assert square.top + square.side / 2 == pytest.approx(80, abs=4)
    assert square.left + square.side / 2 == pytest.approx(120, abs=4)
    assert square.side == pytest.approx(120 * 1.12, rel=0.06)


def test_what_the_model_sees_lies_by_its_placement_where_it_was_in_the_original_matrix() -> None:
    row, column = np.mgrid[:300, :300]
    head = np.where((row - 150) ** 2 / 110**2 + (column - 140) ** 2 / 90**2 < 1, 30, -1000)
    bleed = (row - 170) ** 2 + (column - 120) ** 2 < 20**2
    volume = Volume(np.stack([np.where(bleed, 70, head).astype(np.int16)] * 3), np.arange(3) * 5.0, (0.5, 0.5))
    seen, placement = detection_input(volume)
    scale = placement.side / seen.shape[1]
    rows, columns = (seen[1] > 50).nonzero()
    assert placement.top + (rows.mean() + 0.5) * scale - 0.5 == pytest.approx(170, abs=0.3)
    assert placement.left + (columns.mean() + 0.5) * scale - 0.5 == pytest.approx(120, abs=0.3)
    assert len(rows) * scale**2 == pytest.approx(bleed.sum(), rel=0.05)


def test_air_only_still_gives_a_square() -> None:
    assert head_square(np.full((3, 64, 64), -1000, np.int16)) == Placement(0, 0, 64, (64, 64))


@given(st.floats(-500, 500), st.floats(1, 4000))
def test_a_window_is_black_below_white_above_and_never_falls(center: float, width: float) -> None:
    ramp = np.arange(-1024, 3071, 7, dtype=np.int16)
    grey = Window(center, width).apply(ramp)
    assert (np.diff(grey.astype(int)) >= 0).all()
    assert (grey[ramp < center - width / 2] == 0).all()
    assert (grey[ramp > center + width / 2] == 255).all()


def test_the_brain_window_shows_zero_to_eighty() -> None:
    assert BRAIN.apply(np.array([-5, 0, 40, 80, 90])).tolist() == [0, 0, 128, 255, 255]

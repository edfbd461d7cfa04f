"""From a complete series to its disposition: what is missing, left out or too much is never taken for a whole head."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage
from receiver_fakes import ct_series
from router_fakes import FixedModels, received
from test_herald_cranium import head

from herald.config import RouterConfig, StoreConfig
from herald.cranium import detector_view
from herald.errors import StoreError
from herald.events import SeriesTriaged
from herald.outline import OUTLINED
from herald.store import StudyStore
from herald.volume import Volume, read_datasets
from router.inference import HemorrhagePrediction
from router.triage import triage_series
from serving.dicom_writer import Origin, write_dicom_series

TILTED = [1.0, 0.0, 0.0, 0.0, float(np.cos(np.radians(15))), float(np.sin(np.radians(15)))]


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore(StoreConfig(root=tmp_path / "store", min_free_gb=0.0))


def stored(store: StudyStore, images: Sequence[Dataset]) -> list[Path]:
    paths = []
    for image in images:
        encoded = BytesIO()
        image.save_as(encoded, enforce_file_format=True)
        uids = str(image.StudyInstanceUID), str(image.SeriesInstanceUID), str(image.SOPInstanceUID)
        paths.append(store.write_instance(*uids, [encoded.getvalue()]).path)
    return paths


def triaged(
    store: StudyStore, images: Sequence[Dataset], count: int | None = None, models: Any = None
) -> SeriesTriaged:
    """The disposition of the images' series, of which the receiver counted `count` instances."""
    event = received(
        study_instance_uid=str(images[0].StudyInstanceUID),
        series_instance_uid=str(images[0].SeriesInstanceUID),
        instance_count=len(images) if count is None else count,
    )
    return triage_series(event, store, models or FixedModels(bleeds=False), RouterConfig())


def test_a_whole_head_without_a_bleed_is_negative_and_certain(store: StudyStore) -> None:
    images = ct_series(10)
    stored(store, images)
    event = triaged(store, images)
    assert (event.disposition, event.uncertain, event.reasons) == ("negative", False, ())


@pytest.mark.parametrize("there", [0, 9])
def test_fewer_instances_in_the_store_than_were_received_are_retried_and_never_a_disposition(
    store: StudyStore, there: int
) -> None:
    images = ct_series(10)
    stored(store, images[:there])
    with pytest.raises(StoreError, match=f"{there} of 10 instances .* store.root") as raised:
        triaged(store, images)
    assert raised.value.retriable
    assert str(images[0].SeriesInstanceUID) in str(raised.value)


def test_another_file_of_the_same_instance_stands_for_no_missing_one(store: StudyStore) -> None:
    images = ct_series(10)
    gone = stored(store, images)[9]
    images[0].PixelData = bytes(128)
    stored(store, images[:1])
    assert triaged(store, images).disposition == "negative", "11 files of 10 instances"
    gone.unlink()
    with pytest.raises(StoreError, match="9 of 10 instances"):
        triaged(store, images)


def test_images_that_came_after_the_series_was_closed_make_it_no_less_whole(store: StudyStore) -> None:
    images = ct_series(10)
    stored(store, images)
    assert triaged(store, images, count=9).disposition == "negative"


def test_a_tilt_that_changes_within_the_series_makes_it_incomplete_and_uncertain(store: StudyStore) -> None:
    images = ct_series(32)
    for image in images[:14]:
        image.ImageOrientationPatient = TILTED
    stored(store, images)
    event = triaged(store, images)
    assert (event.disposition, event.uncertain, event.slice_count) == ("negative", True, 18)
    assert event.reasons == ("incomplete: 14 of 32 slices left out, of another orientation or matrix than the others",)


def test_two_scouts_within_the_series_make_it_no_less_certain(store: StudyStore) -> None:
    images = ct_series(12)
    for image in images[:2]:
        image.ImageOrientationPatient = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]
    stored(store, images)
    event = triaged(store, images)
    assert (event.uncertain, event.reasons, event.slice_count) == (False, (), 10)


def test_a_series_of_more_images_than_any_head_is_not_eligible_and_nothing_of_it_is_read(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.triage.read_datasets", lambda _: pytest.fail("it is read"))
    images = ct_series(1)
    stored(store, images)
    event = triaged(store, images, count=6000)
    assert event.disposition == "not_eligible"
    assert event.reasons == ("too many images: 6000, a head scan has at most 2000 (router.most_images)",)


@pytest.mark.parametrize("frames", [[6000], [1500, 1500]])
def test_the_frames_of_enhanced_images_count_against_the_most_images_before_any_pixel_is_decoded(
    store: StudyStore, monkeypatch: pytest.MonkeyPatch, frames: list[int]
) -> None:
    monkeypatch.setattr("router.triage.volume_from_datasets", lambda _: pytest.fail("its pixels are decoded"))
    images = ct_series(len(frames))
    for image, count in zip(images, frames, strict=True):
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
        image.NumberOfFrames = count
    stored(store, images)
    event = triaged(store, images)
    assert event.disposition == "not_eligible"
    assert event.reasons == (f"too many images: {sum(frames)}, a head scan has at most 2000 (router.most_images)",)


def test_the_model_sees_a_head_with_usual_cupping_and_the_reader_the_one_that_was_scanned(
    store: StudyStore, tmp_path: Path
) -> None:
    class Watching(FixedModels):
        def detect_hemorrhage(self, volume: Any) -> Any:
            shown.append(volume)
            return super().detect_hemorrhage(volume)

    shown: list[Any] = []
    scanned = Volume(head(cupping=2.0, slices=12), np.arange(12) * 5.0, (0.5, 0.5))
    origin = Origin(study="cupping", series="1", slice_thickness_mm=5.0, derived=True)
    write_dicom_series(scanned, tmp_path / "series", origin)
    images = read_datasets((tmp_path / "series").glob("*.dcm"))
    stored(store, images)
    event = triaged(store, images, models=Watching(bleeds=True))
    kept = store.read_prediction(event.study_instance_uid, event.series_instance_uid, event.revision)
    usual = detector_view(kept.hounsfield)
    assert (kept.hounsfield != usual).any()
    assert (shown[0] == usual).all()


def test_a_doubtful_spot_beside_a_sure_one_is_neither_counted_nor_outlined_on_the_page(store: StudyStore) -> None:
    class Doubtful(FixedModels):
        def detect_hemorrhage(self, volume: Any) -> HemorrhagePrediction:
            detected = super().detect_hemorrhage(volume)
            detected.mask[0, 10:20, 10:20, 0] = 200
            return detected

    images = ct_series(10, PixelSpacing=[25.0, 25.0])  # 200 mm across
    stored(store, images)
    sure, doubtful = (triaged(store, images, models=kind(bleeds=True)) for kind in (FixedModels, Doubtful))
    assert doubtful.findings[0].volume_ml == sure.findings[0].volume_ml > 0
    kept = store.read_prediction(doubtful.study_instance_uid, doubtful.series_instance_uid, doubtful.revision)
    assert not (kept.mask[0] >= OUTLINED).any()
    assert (kept.mask[5] >= OUTLINED).any()

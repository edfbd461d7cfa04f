import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webui_site import HOTTEST, prediction, triaged

from herald.config import StoreConfig
from herald.events import SeriesTriaged
from herald.picture import MASK_COLOUR, draw_slice
from herald.store import StudyStore
from herald.volume import BRAIN
from notifier.picture import LARGEST_BYTES, key_slice


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    return StudyStore(StoreConfig(root=tmp_path / "store", min_free_gb=0))


def kept(store: StudyStore, event: SeriesTriaged) -> Path:
    """The event's prediction in the store."""
    return store.write_prediction(event.study_instance_uid, event.series_instance_uid, event.revision, prediction())


def pixels(picture: bytes | None) -> "np.ndarray[tuple[int, ...], np.dtype[np.int16]]":
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(np.int16)


def test_the_picture_is_the_hottest_slice_in_the_brain_window(store: StudyStore) -> None:
    event = triaged(1)
    kept(store, event)
    shown = pixels(key_slice(store, event))
    side = shown.shape[0]

    def difference(index: int) -> float:
        plane, mask = prediction().hounsfield[index], prediction().mask[index, ..., 0]
        drawn = np.asarray(draw_slice(plane, BRAIN, mask, longer_side=side)).astype(np.int16)
        return float(np.abs(shown - drawn).mean())

    assert difference(HOTTEST) < 5  # grey levels; what the palette costs
    assert all(difference(HOTTEST + step) > 2 * difference(HOTTEST) for step in (-2, 2))


def test_the_bleed_is_outlined_where_the_mask_is(store: StudyStore) -> None:
    event = triaged(1)
    kept(store, event)
    shown = pixels(key_slice(store, event))
    rows, columns = np.nonzero(np.abs(shown - np.array(MASK_COLOUR)).max(axis=-1) < 16)
    assert len(rows) > 100
    scale = 256 / shown.shape[0]
    mask_rows, mask_columns = np.nonzero(prediction().mask[HOTTEST, ..., 0] >= 128)
    assert abs(rows.mean() * scale - mask_rows.mean()) < 2
    assert abs(columns.mean() * scale - mask_columns.mean()) < 2


def test_the_picture_is_small_enough_for_a_phone_and_has_no_metadata(store: StudyStore) -> None:
    event = triaged(1)
    kept(store, event)
    picture = key_slice(store, event)
    assert picture is not None
    assert len(picture) <= LARGEST_BYTES
    opened = Image.open(io.BytesIO(picture))
    opened.load()
    assert opened.format == "PNG"
    assert min(opened.size) >= 256
    assert opened.info == {}


def test_noise_that_cannot_be_packed_makes_a_smaller_picture_and_no_larger_file(store: StudyStore) -> None:
    event, random = triaged(1), np.random.default_rng(1)
    noise = random.integers(0, 80, prediction().hounsfield.shape).astype(np.int16)
    wild = {
        **vars(prediction()),
        "hounsfield": noise,
        "mask": random.integers(0, 255, prediction().mask.shape, np.uint8),
    }
    store.write_prediction(event.study_instance_uid, event.series_instance_uid, 1, type(prediction())(**wild))
    picture = key_slice(store, event)
    assert picture is None or len(picture) <= LARGEST_BYTES


def test_without_a_prediction_there_is_no_picture_and_a_line_in_the_log(
    store: StudyStore, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "notifier.picture"):
        assert key_slice(store, triaged(1)) is None
    assert "has no prediction to show" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "flat", "of another shape", "UID"])
def test_a_prediction_that_cannot_be_read_costs_the_picture_and_not_the_page(
    store: StudyStore, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    event = triaged(1)
    path = kept(store, event)
    arrays = dict(np.load(path))
    match damage:
        case "cut":
            path.write_bytes(path.read_bytes()[:5000])
        case "rubbish":
            path.write_bytes(b"rubbish")
        case "empty":
            np.savez(path, **{**arrays, "slice_probability": np.zeros((0, 5), np.float32)})
        case "flat":
            np.savez(path, **{**arrays, "mask": np.zeros(12, np.uint8)})
        case "of another shape":
            np.savez(path, **{**arrays, "hounsfield": np.zeros((3, 256, 256), np.int16)})
        case "UID":
            event = triaged(1, study_instance_uid="../..")
    with caplog.at_level(logging.WARNING, "notifier.picture"):
        assert key_slice(store, event) is None
    assert "cannot be shown" in caplog.text

"""The study store: durable, exact, and deaf to paths that would leave it."""

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herald.config import StoreConfig
from herald.errors import DicomError, StoreError, StoreFullError
from herald.store import Prediction, StudyStore

UIDS = ("1.2", "1.2.3", "1.2.3.4")


def store_under(folder: Path, min_free_gb: float = 0.0) -> StudyStore:
    return StudyStore(StoreConfig(root=folder / "store", min_free_gb=min_free_gb))


def test_an_instance_is_its_parts_in_order_under_study_and_series(tmp_path: Path) -> None:
    store = store_under(tmp_path)
    stored = store.write_instance(*UIDS, [b"head", memoryview(b"body")])
    assert stored.path == store.root / "1.2" / "1.2.3" / "1.2.3.4.dcm"
    assert stored.path.read_bytes() == b"headbody"
    assert (stored.sha256, stored.size_bytes) == (hashlib.sha256(b"headbody").hexdigest(), 8)
    assert stored.new
    assert list(store.all_instances()) == store.series_paths("1.2", "1.2.3") == [stored.path]


def test_file_and_every_new_folder_are_synced_before_the_write_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = store_under(tmp_path), []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    store.write_instance(*UIDS, [b"x"])
    root = str(store.root)
    assert synced[0].endswith(".partial"), "the file, before its name"
    assert synced[1:3] == [root, f"{root}/1.2"], "parents of the new folders"
    assert synced[3:] == [f"{root}/1.2/1.2.3"], "its name"


def test_the_same_bytes_change_nothing_and_other_bytes_are_kept_beside(tmp_path: Path) -> None:
    store = store_under(tmp_path)
    first = store.write_instance(*UIDS, [b"one"])
    again = store.write_instance(*UIDS, [b"one"])
    other = store.write_instance(*UIDS, [b"two"])
    other_again = store.write_instance(*UIDS, [b"two"])
    assert (again.path, again.new, again.conflict) == (first.path, False, False)
    assert (other.new, other.conflict, other_again.new, other_again.conflict) == (True, True, False, True)
    assert other.path != first.path
    assert first.path.read_bytes() == b"one"
    assert other.path.read_bytes() == b"two"


@pytest.mark.parametrize("uid", ["", "..", "../../etc", "1.2/3", "a.b", "1" * 65, "1.2\n", ".1"])
def test_what_is_no_uid_never_becomes_a_path(tmp_path: Path, uid: str) -> None:
    store = store_under(tmp_path)
    for uids in ((uid, "1.2", "1.3"), ("1.1", uid, "1.3"), ("1.1", "1.2", uid)):
        with pytest.raises(DicomError, match="is not a UID"):
            store.write_instance(*uids, [b"x"])
    assert [path for path in store.root.rglob("*") if path.is_file()] == []
    assert [path.name for path in store.root.iterdir()] == ["incoming"]


@settings(max_examples=50)
@given(parts=st.lists(st.binary(max_size=2000), max_size=5))
def test_any_bytes_come_back(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    store = store_under(tmp_path_factory.mktemp("any"))
    assert store.write_instance(*UIDS, parts).path.read_bytes() == b"".join(parts)


def test_a_write_that_fails_leaves_neither_name_nor_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_under(tmp_path)

    def full(descriptor: int) -> None:
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.write_instance(*UIDS, [b"x"])
    assert list(store.all_instances()) == []
    assert list(store.leftovers()) == []


def test_below_the_watermark_there_is_no_space(tmp_path: Path) -> None:
    store_under(tmp_path).require_space()
    with pytest.raises(StoreFullError, match=r"lower store\.min_free_gb"):
        store_under(tmp_path, min_free_gb=1e9).require_space()


def test_a_store_that_cannot_be_made_says_which(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file is in the way")
    with pytest.raises(StoreError, match=r"check store\.root"):
        store_under(tmp_path)


def test_a_prediction_comes_back_as_it_was_and_is_none_before(tmp_path: Path) -> None:
    store = store_under(tmp_path)
    assert store.read_prediction("1.2", "1.2.3", 1) is None
    prediction = Prediction(
        hounsfield=np.arange(8, dtype=np.int16).reshape(2, 2, 2),
        mask=np.ones((2, 2, 2, 4), np.uint8),
        slice_probability=np.full((2, 4), 0.5, np.float32),
        probability=np.full(4, 0.25, np.float32),
        placement=np.arange(5),
        first_source=np.array([0, 1]),
        last_source=np.array([0, 2]),
        sop_instance_uids=np.array(["1.1", "1.2"]),
        pixel_spacing_mm=np.array([0.4, 0.4]),
    )
    store.write_prediction("1.2", "1.2.3", 1, prediction)
    read = store.read_prediction("1.2", "1.2.3", 1)
    assert read is not None
    for name in vars(prediction):
        np.testing.assert_array_equal(getattr(read, name), getattr(prediction, name))
    assert list(store.all_instances()) == [], "a prediction is no instance"


def test_a_damaged_prediction_is_an_error_and_not_none(tmp_path: Path) -> None:
    store = store_under(tmp_path)
    path = store.prediction_path("1.2", "1.2.3", 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PK damaged")
    with pytest.raises(StoreError, match="cannot read the prediction"):
        store.read_prediction("1.2", "1.2.3", 1)

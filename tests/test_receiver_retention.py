"""Finished studies leave the store, oldest first; unfinished ones never; and a crash loses nothing."""

import logging
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from datetime import datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from pydicom.dataset import Dataset
from receiver_fakes import ListBus, config_under, ct_series, receiving, send_all
from sqlalchemy import insert, select, update

import herald.check
from herald.config import Config, LedgerConfig
from herald.errors import StoreFullError
from herald.events import Disposition, SeriesReceived, utc_now
from herald.instance import header_from_dataset
from herald.ledger import instances, pages, removals, results, series
from herald.reconcile import REMOVING, reconcile, restore_index
from herald.store import Prediction, StudyStore
from receiver.record import Arrival, Recorder, close_series, mark_published, open_series, record_instances
from receiver.retention import Removal, Retention, finished_studies

NOW = utc_now()
GIGABYTE = 1_000_000_000


def days_ago(days: float) -> datetime:
    return NOW - timedelta(days=days)


class FakeDisk(StudyStore):
    """A store on a disk of which the test says how much is free before anything is removed."""

    free_gb = 100.0

    def free_bytes(self) -> int:
        return int(self.free_gb * GIGABYTE)


class Node:
    """A store and a ledger of the receiver, filled by hand, and its retention."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.store = FakeDisk(config.store)
        self.recorder = Recorder(config.ledger)
        self.recorder.start()
        self.held: set[str] = set()
        self.retention = self.new_retention()

    def new_retention(self, recorder: Recorder | None = None) -> Retention:
        return Retention(self.config.store, self.store, recorder or self.recorder, self.held.__contains__)

    def do(self, statement: Any) -> Any:
        return self.recorder.submit(lambda connection: connection.execute(statement)).result(10.0)

    def receive(self, images: list[Dataset], at: datetime) -> SeriesReceived:
        """Store, record, close and publish one series revision as the receiver does."""
        for image in images:
            self.place(image, at)
        key = str(images[0].StudyInstanceUID), str(images[0].SeriesInstanceUID)
        event: SeriesReceived = self.recorder.submit(lambda c: close_series(c, key, "quiet", at)).result(10.0)
        self.recorder.submit(lambda c: mark_published(c, event, at)).result(10.0)
        return event

    def place(self, image: Dataset, at: datetime, inside: Any = None) -> None:
        encoded = BytesIO()
        image.save_as(encoded, enforce_file_format=True)
        incoming = self.store.receive()
        incoming.write(encoded.getvalue())
        key = str(image.StudyInstanceUID), str(image.SeriesInstanceUID)
        with self.store.place(incoming, *key, str(image.SOPInstanceUID)) as stored:
            if inside is not None:
                inside()
            data_set = BytesIO()
            image.save_as(data_set, implicit_vr=False, little_endian=True)
            header = header_from_dataset(BytesIO(data_set.getvalue()), image.file_meta.TransferSyntaxUID)
            path = stored.path.relative_to(self.store.root).as_posix()
            arrival = Arrival(header, stored, path, "CT1", "10.0.0.1", at)

            def both(connection: Any) -> None:
                record_instances(connection, [arrival])
                if stored.new:
                    open_series(connection, key, header, "CT1", at)

            done = self.recorder.submit(both)
        done.result(10.0)

    def triage(self, event: SeriesReceived, at: datetime, disposition: Disposition = "negative") -> None:
        row = {
            "series_instance_uid": event.series_instance_uid,
            "revision": event.revision,
            "study_instance_uid": event.study_instance_uid,
            "disposition": disposition,
            "event": {},
            "triaged_at": at,
            "posted_at": at,
        }
        self.do(insert(results).values(row))

    def page(self, event: SeriesReceived, state: str, at: datetime, step: int = 0) -> None:
        answered = {"acknowledged_at": at} if state == "acknowledged" else {}
        row = {
            "page_id": str(uuid4()),
            "study_instance_uid": event.study_instance_uid,
            "series_instance_uid": event.series_instance_uid,
            "revision": event.revision,
            "step": step,
            "state": state,
            "mode": "live",
            "channel": "smtp",
            "recipient": "oncall@hospital.example",
            "subject": "s",
            "body": "b",
            "finding_at": at,
            "due_at": at,
            **answered,
        }
        self.do(insert(pages).values(row))

    def finished(self, at: datetime, count: int = 2) -> str:
        """A study that was finished then; its UID."""
        event = self.receive(ct_series(count), at)
        self.triage(event, at)
        return event.study_instance_uid

    def rows(self, table: Any) -> list[dict[str, Any]]:
        with self.recorder.ledger.read() as connection:
            return [dict(row) for row in connection.execute(select(table)).mappings()]

    def removed(self) -> list[tuple[str, str, int]]:
        return [(row["study_instance_uid"], row["reason"], row["instance_count"]) for row in self.rows(removals)]

    def folders(self) -> set[str]:
        """Studies in the store, and what is being removed."""
        return {path.name for path in self.store.root.iterdir() if path.name != "incoming"}

    def end(self) -> None:
        self.retention.stop(10.0)
        self.recorder.stop(10.0)


@pytest.fixture
def config(tmp_path: Path, ledger_url: str) -> Config:
    base = config_under(tmp_path)
    store = replace(base.store, keep_days=7.0, remove_below_gb=0.0)
    return replace(base, store=store, ledger=LedgerConfig(url=ledger_url))


@pytest.fixture
def node(config: Config) -> Iterator[Node]:
    node = Node(config)
    yield node
    node.end()


def with_watermark(node: Node, below_gb: float) -> None:
    node.config = replace(node.config, store=replace(node.config.store, keep_days=0.0, remove_below_gb=below_gb))
    node.retention = node.new_retention()


# --- what goes and what stays ---


def test_studies_that_finished_longer_ago_than_keep_days_go_oldest_first_and_the_ledger_says_so(node: Node) -> None:
    newer, oldest, old = node.finished(days_ago(6.9)), node.finished(days_ago(30), 3), node.finished(days_ago(7.1))
    prediction = node.store.root / oldest / "predictions_of_series"
    prediction.mkdir()
    (prediction / "1.npz").write_bytes(b"what the model saw")
    gone = node.retention.sweep(NOW)
    assert [(removal.study_instance_uid, removal.reason) for removal in gone] == [(oldest, "age"), (old, "age")]
    assert node.folders() == {newer}
    assert node.removed() == [(oldest, "age", 3), (old, "age", 2)]
    (first, _) = node.rows(removals)
    of_oldest = [row for row in node.rows(instances) if row["study_instance_uid"] == oldest]
    assert {row["removed_at"] for row in of_oldest} == {first["removed_at"]}
    assert first["size_bytes"] == sum(row["size_bytes"] for row in of_oldest)
    assert {row["removed_at"] for row in node.rows(instances) if row["study_instance_uid"] == newer} == {None}
    assert node.retention.sweep(NOW) == []


def test_predictions_go_with_the_images(node: Node) -> None:
    event = node.receive(ct_series(2), days_ago(9))
    node.triage(event, days_ago(9))
    depth = 2
    prediction = Prediction(
        hounsfield=np.zeros((depth, 256, 256), np.int16),
        mask=np.zeros((depth, 256, 256, 1), np.uint8),
        slice_probability=np.zeros((depth, 1), np.float32),
        probability=np.zeros(1, np.float32),
        placement=np.zeros(5, np.int64),
        first_source=np.arange(depth),
        last_source=np.arange(depth),
        sop_instance_uids=np.array(["1.1", "1.2"]),
        pixel_spacing_mm=np.ones(2),
    )
    path = node.store.write_prediction(event.study_instance_uid, event.series_instance_uid, 1, prediction)
    node.retention.sweep(NOW)
    assert not path.exists()
    assert node.store.read_prediction(event.study_instance_uid, event.series_instance_uid, 1) is None
    assert node.folders() == set()


def test_without_keep_days_and_with_disk_enough_everything_stays(node: Node) -> None:
    study = node.finished(days_ago(4000))
    with_watermark(node, below_gb=5.0)
    assert node.retention.sweep(NOW) == []
    assert node.folders() == {study}


@pytest.mark.parametrize(
    "unfinished", ["open", "unpublished", "untriaged", "failed", "page due", "page sent", "not paged", "held", "late"]
)
def test_an_unfinished_study_stays_whatever_its_age_and_the_disk(
    node: Node, unfinished: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = days_ago(100)
    event = node.receive(ct_series(3), old)
    if unfinished != "untriaged":
        positive = unfinished in ("page due", "page sent", "not paged")
        node.triage(event, old, "failed" if unfinished == "failed" else "positive" if positive else "negative")
    match unfinished:
        case "open":
            node.do(update(series).values(closed_at=None, published_at=None))
        case "unpublished":
            node.do(update(series).values(published_at=None))
        case "page due":
            node.page(event, "escalated", old)
            node.page(event, "due", old, step=1)
        case "page sent":
            node.page(event, "sent", old)
        case "held":
            node.held.add(event.study_instance_uid)
        case "late":
            node.do(update(instances).values(received_at=old + timedelta(seconds=1)))
    node.config = replace(node.config, store=replace(node.config.store, remove_below_gb=5.0))
    node.retention = node.new_retention()
    node.store.free_gb = 0.1
    for _ in range(3):
        assert node.retention.sweep(NOW) == []
    assert node.folders() == {event.study_instance_uid}
    assert node.removed() == []
    (line,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "0.1 GB free" in line.getMessage()
    assert "every study that is left is unfinished; free disk space" in line.getMessage()


def test_an_answered_page_and_one_that_nobody_will_answer_let_their_study_go(node: Node) -> None:
    for state in ("acknowledged", "exhausted", "withdrawn"):
        event = node.receive(ct_series(2), days_ago(20))
        node.triage(event, days_ago(20), "positive")
        node.page(event, "escalated", days_ago(20))
        node.page(event, state, days_ago(19), step=1)
    assert len(node.retention.sweep(NOW)) == 3


def test_keep_days_count_from_the_answer_to_the_page(node: Node) -> None:
    event = node.receive(ct_series(2), days_ago(20))
    node.triage(event, days_ago(20), "positive")
    node.page(event, "acknowledged", days_ago(6))
    assert node.retention.sweep(NOW) == []
    assert len(node.retention.sweep(NOW + timedelta(days=1.5))) == 1


def test_only_the_newest_revision_needs_a_result_and_every_series_of_the_study_does(node: Node) -> None:
    first, second = ct_series(4), ct_series(2)
    for image in second:
        image.StudyInstanceUID = first[0].StudyInstanceUID
    node.receive(first[:3], days_ago(30))  # closed too early, its result never came
    late = node.receive(first[3:], days_ago(29))
    assert late.revision == 2
    node.triage(late, days_ago(29))
    other = node.receive(second, days_ago(28))
    assert node.retention.sweep(NOW) == []
    node.triage(other, days_ago(28), "not_eligible")
    assert len(node.retention.sweep(NOW)) == 1
    assert node.removed() == [(late.study_instance_uid, "age", 6)]


# --- the watermark ---


def test_below_the_watermark_the_oldest_go_until_enough_is_freed_and_no_more(node: Node) -> None:
    studies = [node.finished(days_ago(days), count) for days, count in ((3, 2), (9, 2), (6, 2), (1, 2))]
    size = sum(row["size_bytes"] for row in node.rows(instances) if row["study_instance_uid"] == studies[1])
    with_watermark(node, below_gb=50.0)
    node.store.free_gb = 50.0 - 1.5 * size / GIGABYTE  # the fake disk shows no gain, as one that frees later
    gone = node.retention.sweep(NOW)
    assert [(r.study_instance_uid, r.reason) for r in gone] == [(studies[1], "disk"), (studies[2], "disk")]
    assert node.folders() == {studies[0], studies[3]}
    node.store.free_gb = 50.0
    assert node.retention.sweep(NOW) == []


def test_a_short_disk_is_said_once_until_it_has_recovered(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    with_watermark(node, below_gb=5.0)

    def said() -> int:
        return sum("below store.remove_below_gb" in record.getMessage() for record in caplog.records)

    for free_gb, lines in ((1.0, 1), (1.0, 1), (9.0, 1), (1.0, 2)):
        node.store.free_gb = free_gb
        node.retention.sweep(NOW)
        assert said() == lines


def test_the_thread_sweeps_at_once_when_it_is_woken(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.retention.SWEEP_AT_MOST_EVERY_S", 0.01)
    with_watermark(node, below_gb=5.0)
    study = node.finished(days_ago(1))
    gone = threading.Event()
    remove = shutil.rmtree

    def removing(path: Path) -> None:
        remove(path)
        gone.set()

    monkeypatch.setattr("receiver.retention.shutil.rmtree", removing)
    node.retention.start()
    node.store.free_gb = 1.0
    node.retention.wake()
    assert gone.wait(10.0)
    assert study not in node.folders()


def test_a_store_that_cannot_be_changed_is_said_and_nothing_is_noted(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    study = node.finished(days_ago(30))

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    assert node.retention.sweep(NOW) == []
    assert "Permission denied" in caplog.text
    assert (node.folders(), node.removed()) == ({study}, [])


def test_herald_check_says_how_the_disk_stands_to_both_watermarks(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk(free_gb: float, **settings: float) -> str:
        monkeypatch.setattr(StudyStore, "free_bytes", lambda _: int(free_gb * GIGABYTE))
        store = replace(node.config.store, **{"min_free_gb": 2.0, "remove_below_gb": 5.0, **settings})  # type: ignore[arg-type]
        return herald.check._disk(replace(node.config, store=store))

    assert "9.0 GB free" in disk(9.0)
    assert "retention removes studies below 5, the receiver refuses images below 2" in disk(9.0)
    assert "retention is off" in disk(3.0, remove_below_gb=0.0)
    with pytest.raises(StoreFullError, match=r"below store\.remove_below_gb; retention cannot free any: no study"):
        disk(4.0)
    with pytest.raises(StoreFullError, match="`out of resources`; retention is off: free some"):
        disk(1.0, remove_below_gb=0.0)
    node.finished(days_ago(1))
    node.receive(ct_series(2), days_ago(1))
    assert "below store.remove_below_gb; retention may remove 1 finished studies" in disk(4.0)
    with pytest.raises(StoreFullError, match=r"below store\.min_free_gb.*may remove 1 finished"):
        disk(1.0)


# --- reception at the same time ---


def test_an_image_that_is_being_placed_keeps_its_study(node: Node) -> None:
    images = ct_series(4)
    node.triage(node.receive(images[:3], days_ago(30)), days_ago(30))
    during: list[list[Removal]] = []
    node.place(images[3], days_ago(0), inside=lambda: during.append(node.retention.sweep(NOW)))
    assert during == [[]]
    assert node.retention.sweep(NOW) == [], "it is open again"
    assert len(list(node.store.root.glob("*/*/*.dcm"))) == 4


def test_an_image_that_came_after_the_ledger_was_asked_keeps_its_study(node: Node) -> None:
    images = ct_series(4)
    study = str(images[0].StudyInstanceUID)
    node.triage(node.receive(images[:3], days_ago(30)), days_ago(30))

    def holds(uid: str) -> bool:  # asked under the lock, after the ledger
        assert uid == study
        node.place(images[3], days_ago(0))
        return False

    retention = Retention(node.config.store, node.store, node.recorder, holds)
    assert retention.sweep(NOW) == []
    assert node.folders() == {study}


def test_images_that_arrive_while_their_study_is_removed_make_a_new_one(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ct_series(3)
    study = str(images[0].StudyInstanceUID)
    node.triage(node.receive(images, days_ago(30)), days_ago(30))
    remove = shutil.rmtree

    def arrive_first(path: Path) -> None:
        monkeypatch.setattr("receiver.retention.shutil.rmtree", remove)
        node.place(images[0], utc_now())
        remove(path)

    monkeypatch.setattr("receiver.retention.shutil.rmtree", arrive_first)
    assert len(node.retention.sweep(NOW)) == 1
    assert node.folders() == {study}
    state = {row["sop_instance_uid"]: row["removed_at"] is None for row in node.rows(instances)}
    assert state == {str(image.SOPInstanceUID): image is images[0] for image in images}
    revisions = sorted((row["revision"], row["closed_at"] is None) for row in node.rows(series))
    assert revisions == [(1, False), (2, True)]
    assert node.retention.sweep(NOW) == []


def test_a_removed_study_that_is_sent_again_is_received_published_and_removed_again(config: Config) -> None:
    config = replace(config, store=replace(config.store, keep_days=1e-9))
    images = ct_series(8)
    bus = ListBus()
    for revision in (1, 2):
        with receiving(config, bus) as receiver:
            assert send_all(receiver.port, images) == [0] * 8
            event = bus.wait_for(revision)[-1]
            assert (event.revision, event.instance_count) == (revision, 8)
            retention = Retention(config.store, receiver.store, receiver.recorder, receiver.assembler.holds)
            assert retention.sweep(utc_now()) == []
        node = Node(config)
        node.triage(event, utc_now())
        assert len(node.retention.sweep(utc_now() + timedelta(seconds=1))) == 1
        assert [row["instance_count"] for row in node.rows(removals)] == [8] * revision
        node.end()
        found = reconcile(config)
        assert (found.removed, found.instances_on_disk, found.unaccounted) == (8, 0, 0)


# --- crashes ---


class DyingRecorder(Recorder):
    """Loses every statement after the first few, as a process that is killed does."""

    def __init__(self, config: LedgerConfig, lives_for: int) -> None:
        super().__init__(config)
        self._lives_for = lives_for
        self.dead = threading.Event()

    def submit(self, statement: Any) -> "Future[Any]":
        self._lives_for -= 1
        if self._lives_for < 0:
            self.dead.set()
            return Future()
        return super().submit(statement)


def accounted(node: Node) -> tuple[int, int]:
    found = reconcile(node.config)
    return found.removed, found.unaccounted


def test_a_crash_before_the_ledger_knows_is_finished_at_the_next_start(node: Node) -> None:
    study, other = node.finished(days_ago(30), 3), node.finished(days_ago(1))
    dying = DyingRecorder(node.config.ledger, lives_for=3)  # tables, ledger there, study finished
    dying.start()
    retention = node.new_retention(dying)
    retention.start()
    assert dying.dead.wait(10.0)
    retention.stop(10.0)
    dying.stop(10.0)
    assert {name.removeprefix(REMOVING).partition("-")[0] for name in node.folders()} == {study, other}
    assert node.removed() == []
    assert accounted(node) == (3, 0), "files that are set aside are as good as removed"
    restored = node.recorder.submit(lambda connection: restore_index(connection, node.store)).result(10.0)
    assert restored == 0, "files that are set aside are not in the store"
    again = node.new_retention()
    again.finish_removals()
    again.finish_removals()
    assert node.folders() == {other}
    assert node.removed() == [(study, "age", 3)]
    assert accounted(node) == (3, 0)


@pytest.mark.parametrize("half", [False, True])
def test_a_crash_before_all_files_are_gone_is_finished_at_the_next_start(
    node: Node, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    study = node.finished(days_ago(30), 3)

    def die(path: Path) -> None:
        if half:
            next(path.glob("*/*.dcm")).unlink()
        raise OSError(5, "the process is killed here")

    with monkeypatch.context() as patch:
        patch.setattr("receiver.retention.shutil.rmtree", die)
        assert node.retention.sweep(NOW) == []
    assert node.removed() == [(study, "age", 3)]
    assert accounted(node) == (3, 0)
    gone = threading.Event()
    remove = shutil.rmtree

    def removing(path: Path) -> None:
        remove(path)
        gone.set()

    monkeypatch.setattr("receiver.retention.shutil.rmtree", removing)
    again = node.new_retention()
    again.start()
    assert gone.wait(10.0)
    again.stop(10.0)
    assert node.folders() == set()
    assert node.removed() == [(study, "age", 3)], "one removal, however often it is finished"


def test_images_that_came_again_before_a_crash_are_new_after_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    images = ct_series(3)
    node.triage(node.receive(images, days_ago(30)), days_ago(30))
    dying = DyingRecorder(node.config.ledger, lives_for=3)
    dying.start()
    retention = node.new_retention(dying)
    retention.start()
    assert dying.dead.wait(10.0)
    encoded = BytesIO()
    images[0].save_as(encoded, enforce_file_format=True)
    node.store.write_instance(  # its row is lost with the process
        str(images[0].StudyInstanceUID),
        str(images[0].SeriesInstanceUID),
        str(images[0].SOPInstanceUID),
        [encoded.getvalue()],
    )
    retention.stop(10.0)
    dying.stop(10.0)

    # the order of a start: retention first, then the assembler compares files with rows
    again = node.new_retention()
    again.start()
    assert node.recorder.submit(lambda connection: restore_index(connection, node.store)).result(10.0) == 1
    again.stop(10.0)
    node.new_retention().finish_removals()
    assert node.folders() == {str(images[0].StudyInstanceUID)}
    state = {row["sop_instance_uid"]: row["removed_at"] is None for row in node.rows(instances)}
    assert state == {str(image.SOPInstanceUID): image is images[0] for image in images}
    assert sorted((row["revision"], row["closed_at"] is None) for row in node.rows(series)) == [(1, False), (2, True)]
    found = reconcile(node.config)
    assert (found.removed, found.waiting, found.unaccounted) == (2, 1, 0)


def test_the_name_of_the_folder_says_the_whole_removal() -> None:
    removal = Removal("1.2.840." + "9" * 56, "disk", NOW)
    assert removal.folder_name.startswith(f"{REMOVING}1.2.840.")
    assert len(removal.folder_name) < 255
    assert Removal.from_folder_name(removal.folder_name) == removal
    assert Removal.from_folder_name(".removing-1.2.3") is None
    assert Removal.from_folder_name("1.2.3") is None


def test_finished_studies_are_told_for_one_study_as_for_all(node: Node) -> None:
    one, other = node.finished(days_ago(3)), node.finished(days_ago(5))
    with node.recorder.ledger.read() as connection:
        assert [study.study_instance_uid for study in finished_studies(connection)] == [other, one]
        assert [study.finished_at for study in finished_studies(connection, one)] == [days_ago(3)]
        assert finished_studies(connection, "1.2.3") == []

"""The storage SCP, met by real senders on loopback."""

import hashlib
import logging
import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from pynetdicom import evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.sop_class import ModalityPerformedProcedureStep, StorageCommitmentPushModel
from real_data import DATA, needs_real_data
from receiver_fakes import ListBus, Receiver, association, config_under, ct_series, ct_slice, receiving, send_all
from receiver_faults import ReceiverProcess, data_set_bytes, dcmtk, encoded
from sqlalchemy import func, select
from test_receiver_announcement import change, create, performed, step
from test_receiver_commitment import Reports, ask, request_for

from herald.bus import open_bus
from herald.config import StoreConfig
from herald.events import SeriesReceived
from herald.instance import read_header
from herald.ledger import instances, rejections, series
from herald.reconcile import reconcile
from herald.send import send
from receiver.scp import TRANSFER_SYNTAXES
from receiver.service import remove_leftovers
from receiver.statuses import StoreStatus


def rows_of(receiver: Receiver, table: Any) -> list[Any]:
    """The rows, once everything that was submitted so far is committed."""
    receiver.recorder.submit(lambda connection: None).result(10.0)
    with receiver.recorder.ledger.read() as connection:
        return list(connection.execute(select(table)).mappings())


def store_raw(assoc: Any, data: bytes, sop_class: str, sop_instance: str) -> int:
    """C-STORE with a command and a data set that need not agree; the status."""
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID = UID(sop_class), UID(sop_instance)
    request.DataSet = BytesIO(data)
    assoc._reactor_checkpoint.clear()
    while not assoc._is_paused:
        time.sleep(0.001)
    assoc.dimse.send_msg(request, assoc.accepted_contexts[0].context_id)
    _, response = assoc.dimse.get_msg(block=True)
    assoc._reactor_checkpoint.set()
    return int(response.Status)


# --- what is stored ---


def test_an_image_is_on_disk_when_success_is_answered_and_its_row_follows(tmp_path: Path) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port) as assoc:
        assert assoc.send_c_store(image).Status == StoreStatus.SUCCESS
        path = receiver.store.root / "1.2.3" / "1.2.3.4" / f"{image.SOPInstanceUID}.dcm"
        assert dcmread(path) == image
        (row,) = rows_of(receiver, instances)
        assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert row["path"] == f"1.2.3/1.2.3.4/{image.SOPInstanceUID}.dcm"
        assert (row["copies"], row["conflict"], row["calling_ae_title"]) == (1, False, "CT1")
        assert row["calling_address"] == "127.0.0.1"
        (open_row,) = rows_of(receiver, series)
        assert open_row["closed_at"] is None, "the series is in the ledger from its first image on"
        assert not any("Never" in str(v) or "SECRET" in str(v) for v in {**row, **open_row}.values())


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEG2000Lossless,
        HTJ2KLossless,
    ],
    ids=lambda syntax: UID(syntax).name,
)
def test_bytes_are_written_as_they_were_received(tmp_path: Path, syntax: UID) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    image.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        image.PixelData = encapsulate([b"\xff\xd8 a code stream that nobody decodes \xff\xd9"])
        image["PixelData"].VR = "OB"
    original = tmp_path / "original.dcm"
    image.save_as(original, enforce_file_format=True)
    with receiving(config_under(tmp_path)) as receiver:
        report = send([original], f"HERALD@127.0.0.1:{receiver.port}")
        assert report.failed == ()
        (path,) = receiver.store.all_instances()
        assert data_set_bytes(path) == data_set_bytes(original)
        assert read_header(path) == read_header(original)


def test_every_accepted_compressed_syntax_has_a_decoder() -> None:
    for syntax in map(UID, TRANSFER_SYNTAXES):
        assert syntax.is_transfer_syntax
        if syntax.is_encapsulated:
            assert get_decoder(syntax).is_available, syntax.name


def test_the_same_bytes_again_are_one_instance_counted_twice(tmp_path: Path) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    with receiving(config_under(tmp_path)) as receiver:
        assert send_all(receiver.port, [image, image]) == [0, 0]
        (row,) = rows_of(receiver, instances)
        assert (row["copies"], row["conflict"]) == (2, False)


def test_other_bytes_under_the_same_uid_are_kept_beside_the_first_and_flagged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    other = ct_slice("1.2.3", "1.2.3.4", 0.0, SOPInstanceUID=image.SOPInstanceUID, PixelData=bytes(128))
    with receiving(config_under(tmp_path)) as receiver:
        assert send_all(receiver.port, [image, other]) == [0, 0]
        assert sorted(row["conflict"] for row in rows_of(receiver, instances)) == [False, True]
        assert len(list(receiver.store.all_instances())) == 2
    assert "with other bytes" in caplog.text


def test_interleaved_series_over_two_associations_stay_apart(tmp_path: Path) -> None:
    study = generate_uid()
    left, right = ct_series(10, study=study), ct_series(10, spacing=3.0, study=study)
    with receiving(config_under(tmp_path)) as receiver:
        with association(receiver.port, calling="CT1") as one, association(receiver.port, calling="CT2") as two:
            for i in range(10):  # both associations send both series
                first, second = (one, two) if i % 2 else (two, one)
                assert first.send_c_store(left[i]).Status == 0
                assert second.send_c_store(right[i]).Status == 0
        events = receiver.bus.wait_for(2)
    assert {event.series_instance_uid for event in events} == {left[0].SeriesInstanceUID, right[0].SeriesInstanceUID}
    assert [(event.revision, event.instance_count) for event in events] == [(1, 10)] * 2


def test_a_series_closes_when_its_association_is_aborted_after_the_last_image(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        with association(receiver.port) as assoc:
            for image in ct_series(8):
                assert assoc.send_c_store(image).Status == 0
            assoc.abort()
        (event,) = receiver.bus.wait_for(1)
    assert (event.close_reason, event.instance_count) == ("released-and-even", 8)


def test_one_association_per_image_makes_one_series(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path, settle_s=2.0)) as receiver:
        for image in ct_series(12):
            assert send_all(receiver.port, [image]) == [0]
        (event,) = receiver.bus.wait_for(1, timeout_s=20.0)
    assert (event.revision, event.close_reason, event.instance_count) == (1, "released-and-even", 12)


def test_two_studies_that_share_a_series_uid_stay_apart(tmp_path: Path) -> None:
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    mine, theirs = (ct_slice(study, "1.2.9", 0.0, ImageType=scout) for study in ("1.2.3", "1.2.4"))
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, [mine, theirs])
        events = receiver.bus.wait_for(2)
    assert {(event.study_instance_uid, event.instance_count) for event in events} == {("1.2.3", 1), ("1.2.4", 1)}
    assert {event.revision for event in events} == {1, 2}


# --- what is refused ---


@pytest.mark.parametrize(
    ("missing", "status"),
    [
        ("StudyInstanceUID", StoreStatus.NO_STUDY_INSTANCE_UID),
        ("SeriesInstanceUID", StoreStatus.NO_SERIES_INSTANCE_UID),
        ("SOPInstanceUID", StoreStatus.NO_SOP_INSTANCE_UID),
    ],
)
def test_a_missing_uid_has_its_own_status_and_the_association_lives_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, missing: str, status: StoreStatus
) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    uid = str(image.SOPInstanceUID)
    delattr(image, missing)
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port) as assoc:
        assert store_raw(assoc, encoded(image), CTImageStorage, uid) == status
        assert assoc.send_c_store(ct_slice("1.2.3", "1.2.3.4", 5.0)).Status == 0
        (row,) = rows_of(receiver, rejections)
        assert (row["status"], row["sop_instance_uid"], row["calling_ae_title"]) == (status, uid, "CT1")
        assert missing in row["error"]
    assert f"refused instance {uid} of CT1 (127.0.0.1)" in caplog.text
    assert "Never" not in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    "data",
    [b"this is no data set, however one looks at it", b"\x08\x00\x16\x00UI\xff\xff1.2", bytes(5000)],
    ids=["text", "truncated", "zeros"],
)
def test_bytes_that_are_no_data_set_are_refused_and_nothing_is_stored(tmp_path: Path, data: bytes) -> None:
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port) as assoc:
        answered = store_raw(assoc, data, CTImageStorage, "1.2.3.4.5")
        assert answered in (StoreStatus.NO_SOP_INSTANCE_UID, StoreStatus.CANNOT_DECODE)
        assert assoc.send_c_store(ct_slice("1.2.3", "1.2.3.4", 5.0)).Status == 0
        assert len(list(receiver.store.all_instances())) == 1


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "SOPClassUID"])
def test_a_data_set_that_contradicts_its_command_does_not_match(tmp_path: Path, keyword: str) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    command = {"SOPInstanceUID": str(image.SOPInstanceUID), "SOPClassUID": CTImageStorage}
    setattr(image, keyword, "1.2.840.10008.5.1.4.1.1.4" if keyword == "SOPClassUID" else "1.2.3.4.5.6")
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port) as assoc:
        status = store_raw(assoc, encoded(image), command["SOPClassUID"], command["SOPInstanceUID"])
        assert status == StoreStatus.DATA_SET_DOES_NOT_MATCH_SOP_CLASS
        assert list(receiver.store.all_instances()) == []


def test_a_uid_that_would_leave_the_store_is_refused(tmp_path: Path) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    uid = str(image.SOPInstanceUID)
    data = encoded(image).replace(b"UI\x06\x001.2.3\0", b"UI\x06\x00../../")
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port) as assoc:
        assert store_raw(assoc, data, CTImageStorage, uid) == StoreStatus.INVALID_UID
        assert list(tmp_path.rglob("*.dcm")) == []


def test_a_full_disk_is_out_of_resources_before_anything_is_written(tmp_path: Path) -> None:
    config = config_under(tmp_path)
    full = replace(config, store=StoreConfig(root=config.store.root, min_free_gb=1e9))
    with receiving(full) as receiver, association(receiver.port) as assoc:
        response = assoc.send_c_store(ct_slice("1.2.3", "1.2.3.4", 0.0))
        assert response.Status == StoreStatus.OUT_OF_RESOURCES
        assert "free" in response.ErrorComment
        assert [path.name for path in receiver.store.root.rglob("*")] == ["incoming"]
        assert [row["status"] for row in rows_of(receiver, rejections)] == [StoreStatus.OUT_OF_RESOURCES]


def test_a_full_disk_wakes_whoever_can_free_it(tmp_path: Path) -> None:
    config, woken = config_under(tmp_path), threading.Event()
    full = replace(config, store=StoreConfig(root=config.store.root, min_free_gb=1e9))
    receiver = Receiver(full, ListBus())
    receiver.server.short_of_space = woken.set
    receiver.start()
    try:
        assert send_all(receiver.port, [ct_slice("1.2.3", "1.2.3.4", 0.0)]) == [StoreStatus.OUT_OF_RESOURCES]
        assert woken.wait(5.0)
    finally:
        receiver.stop()


def test_a_sender_that_is_not_allowed_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_under(tmp_path, allowed_senders=("CT1",), require_called_ae_title=True)
    with receiving(config) as receiver:
        with association(receiver.port, calling="STRANGER") as assoc:
            assert not assoc.is_established  # pynetdicom takes a swift rejection for an abort
        with association(receiver.port, calling="CT1") as assoc:
            assert assoc.is_established
    assert "refused the association of STRANGER (127.0.0.1) calling HERALD: it is not in" in caplog.text


def test_more_associations_than_allowed_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        receiving(config_under(tmp_path, max_associations=1)) as receiver,
        association(receiver.port) as first,
        association(receiver.port) as second,
    ):
        assert first.is_established
        assert not second.is_established
    assert "receiver.max_associations are open" in caplog.text


def test_a_sop_class_or_syntax_that_is_not_accepted_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mpeg = "1.2.840.10008.1.2.4.102"
    proposed = [(CTImageStorage, ExplicitVRLittleEndian), ("1.2.840.10008.5.1.4.1.1.77.1.4.1", mpeg)]
    with receiving(config_under(tmp_path)) as receiver, association(receiver.port, proposed) as assoc:
        assert len(assoc.accepted_contexts) == 1
    assert "CT1 (127.0.0.1) proposed what is not accepted here" in caplog.text


def test_c_echo_is_answered(tmp_path: Path) -> None:
    with (
        receiving(config_under(tmp_path)) as receiver,
        association(receiver.port, [("1.2.840.10008.1.1", ImplicitVRLittleEndian)]) as assoc,
    ):
        assert assoc.send_c_echo().Status == 0


# --- a ledger that is down, a process that is killed ---


def test_a_ledger_that_is_down_delays_the_rows_and_not_the_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = config_under(tmp_path / "later")
    store = StoreConfig(root=tmp_path / "store", min_free_gb=0.0)
    receiver = Receiver(replace(config, store=store), ListBus())
    receiver.recorder.RETRY_S = 0.05  # type: ignore[misc]
    receiver.recorder.start()
    resumed = receiver.assembler.start()
    receiver.server.start()
    try:
        started = time.monotonic()
        assert send_all(receiver.port, ct_series(8)) == [0] * 8
        assert time.monotonic() - started < 6.0, (
            "eight instances do not each wait for a ledger that is known to be down"
        )
        (tmp_path / "later").mkdir()  # the ledger's folder appears: the cause is gone
        resumed.result(10.0)
        (event,) = receiver.bus.wait_for(1)
        assert event.instance_count == 8
        assert len(rows_of(receiver, instances)) == 8
        assert {row["calling_ae_title"] for row in rows_of(receiver, instances)} == {"CT1"}
    finally:
        receiver.stop()
    assert caplog.text.count("instances are stored meanwhile and their rows follow") == 1
    assert "the ledger answers again" in caplog.text


def test_unfinished_files_are_removed_at_the_start(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, [ct_slice("1.2.3", "1.2.3.4", 0.0)])
        unfinished = receiver.store.root / "1.2.3" / "1.2.3.4" / "tmpabc.partial"
        unfinished.write_bytes(b"half")
        remove_leftovers(receiver.store)
        assert not unfinished.exists()
        assert len(list(receiver.store.all_instances())) == 1


def test_what_was_acknowledged_survives_kill_9_in_mid_send_and_the_series_is_finished_later(tmp_path: Path) -> None:
    images = ct_series(60)
    receiver = ReceiverProcess(tmp_path)
    receiver.start()
    acknowledged: list[str] = []
    enough = threading.Event()

    def push() -> None:
        with association(receiver.port) as assoc:
            for image in images:
                if not assoc.is_established:
                    return
                if getattr(assoc.send_c_store(image), "Status", None) == 0:
                    acknowledged.append(str(image.SOPInstanceUID))
                if len(acknowledged) == 15:
                    enough.set()

    sender = threading.Thread(target=push)
    sender.start()
    assert enough.wait(30.0)
    receiver.end(signal.SIGKILL)
    sender.join(30.0)
    assert 15 <= len(acknowledged) < 60

    folder = tmp_path / "store" / images[0].StudyInstanceUID / images[0].SeriesInstanceUID
    for image in images:
        if image.SOPInstanceUID in acknowledged:
            assert dcmread(folder / f"{image.SOPInstanceUID}.dcm") == image

    receiver.start()
    assert send_all(receiver.port, images) == [0] * 60
    bus = open_bus(receiver.config.bus)
    delivery = bus.fetch("router", ("series",), timeout_s=20.0)
    assert delivery is not None
    event = delivery.event
    bus.close()
    assert isinstance(event, SeriesReceived)
    assert (event.revision, event.instance_count, event.close_reason) == (1, 60, "released-and-even")
    assert receiver.end(signal.SIGTERM) == 0, receiver.log
    found = reconcile(receiver.config)
    assert (found.instances_on_disk, found.unaccounted, found.problems) == (60, 0, ())
    assert list((tmp_path / "store").rglob("*.partial")) == []
    assert "Never" not in receiver.log
    assert "Traceback" not in receiver.log


def test_a_clean_stop_finishes_what_is_being_stored_and_leaves_open_series_to_the_next_start(tmp_path: Path) -> None:
    config = config_under(tmp_path, settle_s=60.0)
    with receiving(config) as receiver:
        send_all(receiver.port, ct_series(3))
    with receiver.recorder.ledger.read() as connection:
        assert connection.execute(select(func.count()).select_from(instances)).scalar() == 3
        assert connection.execute(select(series.c.closed_at)).scalars().all() == [None]


# --- real senders and real series ---


def test_dcmtk_storescu_sends_a_series(tmp_path: Path) -> None:
    storescu = dcmtk("storescu")
    files = []
    for i, image in enumerate(ct_series(12)):
        files.append(tmp_path / f"{i}.dcm")
        image.save_as(files[-1], enforce_file_format=True)
    with receiving(config_under(tmp_path)) as receiver:
        done = subprocess.run(
            [storescu, "-aet", "DCMTK", "-aec", "HERALD", "127.0.0.1", str(receiver.port), *map(str, files)],
            env={**os.environ, "TCP_NODELAY": "1"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (event,) = receiver.bus.wait_for(1)
        assert (event.instance_count, event.close_reason, event.calling_ae_title) == (12, "released-and-even", "DCMTK")


@needs_real_data
def test_the_tilted_head_with_mixed_gaps_closes_about_a_second_after_its_release(tmp_path: Path) -> None:
    files = sorted((DATA / "ge-head").glob("*.dcm"))
    with receiving(config_under(tmp_path, settle_s=0.7)) as receiver:
        assert send(files, f"HERALD@127.0.0.1:{receiver.port}").failed == ()
        (event,) = receiver.bus.wait_for(1)
        assert (event.close_reason, event.instance_count) == ("released-and-even", 28)
        assert (event.occurred_at - event.last_image_at).total_seconds() < 2.0
        for path in files:
            stored = receiver.store.series_folder(event.study_instance_uid, event.series_instance_uid)
            uid = read_header(path).sop_instance_uid
            assert data_set_bytes(stored / f"{uid}.dcm") == data_set_bytes(path)


@needs_real_data
def test_a_whole_study_gives_one_event_per_series(tmp_path: Path) -> None:
    files = sorted(path for path in (DATA / "philips-phantom").rglob("*") if path.is_file())
    with receiving(config_under(tmp_path, settle_s=0.3)) as receiver:
        report = send(files, f"HERALD@127.0.0.1:{receiver.port}")
        events = receiver.bus.wait_for(4)
    assert report.failed == ()
    assert sorted((event.instance_count, event.close_reason) for event in events) == [
        (1, "released-and-not-a-stack"),
        (2, "released-and-not-a-stack"),
        (28, "released-and-even"),
        (60, "released-and-even"),
    ]


# --- the other services of the same server ---


def test_a_sender_stores_asks_for_commitment_and_is_told_all_is_safe_over_one_association(tmp_path: Path) -> None:
    images = ct_series(3)
    reports = Reports()
    contexts = [(CTImageStorage, ExplicitVRLittleEndian), (StorageCommitmentPushModel, ImplicitVRLittleEndian)]
    with (
        receiving(config_under(tmp_path)) as receiver,
        association(receiver.port, contexts, evt_handlers=[(evt.EVT_N_EVENT_REPORT, reports)]) as assoc,
    ):
        assert [assoc.send_c_store(image).Status for image in images] == [0, 0, 0]
        assert ask(assoc, request_for(*((CTImageStorage, image.SOPInstanceUID) for image in images))) == 0
        event_type, _, committed, failed = reports.next()
    assert (event_type, failed) == (1, {})
    assert {uid for _, uid in committed} == {image.SOPInstanceUID for image in images}


def test_a_completed_procedure_step_closes_a_series_that_is_no_even_stack(tmp_path: Path) -> None:
    images = ct_series(3)  # too few to be taken for complete
    uid = images[0].SeriesInstanceUID
    step_syntax = [(ModalityPerformedProcedureStep, ImplicitVRLittleEndian)]
    with receiving(config_under(tmp_path, quiet_s=60.0)) as receiver:
        assert send_all(receiver.port, images) == [0, 0, 0]
        with association(receiver.port, step_syntax) as assoc:
            assert create(assoc, step(), "1.2.3.99") == 0
            series_list = [performed(uid, [image.SOPInstanceUID for image in images])]
            assert change(assoc, step("COMPLETED", PerformedSeriesSequence=series_list), "1.2.3.99").Status == 0
        (event,) = receiver.bus.wait_for(1)
    assert (event.close_reason, event.instance_count) == ("announced-and-complete", 3)

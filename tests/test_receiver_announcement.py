"""MPPS and Instance Availability Notification by real senders: what is announced, and what is answered."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, generate_uid
from pynetdicom import evt
from pynetdicom.dimse_primitives import N_CREATE
from pynetdicom.sop_class import InstanceAvailabilityNotification, ModalityPerformedProcedureStep
from receiver_fakes import association
from receiver_services import serving

from receiver.announcement import ABSTRACT_SYNTAXES, Announcements


class Heard:
    """What was announced, in order."""

    def __init__(self) -> None:
        self.series: list[tuple[str, set[str]]] = []

    def __call__(self, series_instance_uid: str, sop_instance_uids: Collection[str]) -> None:
        self.series.append((series_instance_uid, set(sop_instance_uids)))


@contextmanager
def modality(announcements: Announcements) -> Iterator[Any]:
    """An association of a scanner with a receiver that serves these announcements."""
    handlers = (evt.EVT_N_CREATE, announcements.created), (evt.EVT_N_SET, announcements.changed)
    with (
        serving(ABSTRACT_SYNTAXES, *handlers) as port,
        association(port, [(uid, ImplicitVRLittleEndian) for uid in ABSTRACT_SYNTAXES]) as assoc,
    ):
        assert assoc.is_established
        yield assoc


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def scanner(heard: Heard) -> Iterator[Any]:
    with modality(Announcements(heard)) as assoc:
        yield assoc


def step(status: str | None = "IN PROGRESS", **values: Any) -> Dataset:
    """Attributes of a procedure step, with the names that modalities send along."""
    ds = Dataset()
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Never^Logged", "SECRET-ID", "19500101"
    ds.PerformedProcedureStepID, ds.Modality = "PPS1", "CT"
    if status is not None:
        ds.PerformedProcedureStepStatus = status
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def performed(series: str | None, images: Collection[str] = (), others: Collection[str] = ()) -> Dataset:
    """One item of PerformedSeriesSequence."""
    item = Dataset()
    item.OperatorsName = "Never^Logged"
    if series is not None:
        item.SeriesInstanceUID = series
    item.ReferencedImageSequence = [_reference(uid) for uid in images]
    item.ReferencedNonImageCompositeSOPInstanceSequence = [_reference(uid) for uid in others]
    return item


def available(series: str, uids: dict[str, str | None]) -> Dataset:
    """One item of ReferencedSeriesSequence: SOP Instance UIDs with their availability."""
    item = Dataset()
    item.SeriesInstanceUID = series
    item.ReferencedSOPSequence = []
    for uid, availability in uids.items():
        reference = _reference(uid)
        if availability is not None:
            reference.InstanceAvailability = availability
        reference.RetrieveAETitle = "ARCHIVE"
        item.ReferencedSOPSequence.append(reference)
    return item


def notification(*series: Dataset, **values: Any) -> Dataset:
    ds = Dataset()
    ds.StudyInstanceUID = "1.2.3"
    ds.ReferencedPerformedProcedureStepSequence = []
    ds.ReferencedSeriesSequence = list(series)
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def _reference(uid: str) -> Dataset:
    ds = Dataset()
    ds.ReferencedSOPClassUID = CTImageStorage
    ds.ReferencedSOPInstanceUID = uid
    return ds


def create(assoc: Any, ds: Dataset | None, uid: str | None, sop_class: str = ModalityPerformedProcedureStep) -> int:
    status, _ = assoc.send_n_create(ds, sop_class, uid)
    return int(status.Status)


def change(assoc: Any, ds: Dataset, uid: str) -> Dataset:
    status: Dataset = assoc.send_n_set(ds, ModalityPerformedProcedureStep, uid)[0]
    return status


# --- MPPS ------------------------------------------------------------------------------------------------------------


def test_a_completed_step_announces_every_series_with_its_instances(scanner: Any, heard: Heard) -> None:
    uid = generate_uid()
    assert create(scanner, step(PerformedSeriesSequence=[]), uid) == 0x0000
    assert heard.series == []
    done = step("COMPLETED")
    done.PerformedSeriesSequence = [
        performed("1.1", ["1.1.1", "1.1.2"], ["1.1.9"]),
        performed("1.2", ["1.2.1"]),
        performed("1.1", ["1.1.3"]),
        performed("1.3"),
    ]
    assert change(scanner, done, uid).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1", "1.1.2", "1.1.3", "1.1.9"}), ("1.2", {"1.2.1"})]


def test_a_list_that_came_while_in_progress_counts_when_the_step_completes_without_one(
    scanner: Any, heard: Heard
) -> None:
    uid = generate_uid()
    assert create(scanner, step(), uid) == 0x0000
    first = step("IN PROGRESS", PerformedSeriesSequence=[performed("1.1", ["1.1.1"])])
    second = step(None, PerformedSeriesSequence=[performed("1.1", ["1.1.1", "1.1.2"])])
    assert change(scanner, first, uid).Status == 0x0000
    assert change(scanner, second, uid).Status == 0x0000
    assert heard.series == []
    assert change(scanner, step("COMPLETED"), uid).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1", "1.1.2"})]


def test_a_discontinued_step_announces_nothing(scanner: Any, heard: Heard) -> None:
    uid = generate_uid()
    assert create(scanner, step(), uid) == 0x0000
    stopped = step("DISCONTINUED", PerformedSeriesSequence=[performed("1.1", ["1.1.1"])])
    assert change(scanner, stopped, uid).Status == 0x0000
    assert heard.series == []


@pytest.mark.parametrize("final", ["COMPLETED", "DISCONTINUED"])
def test_a_final_step_may_no_longer_be_updated(scanner: Any, heard: Heard, final: str) -> None:
    uid = generate_uid()
    listed = [performed("1.1", ["1.1.1"])]
    assert create(scanner, step(PerformedSeriesSequence=listed), uid) == 0x0000
    assert change(scanner, step(final), uid).Status == 0x0000
    announced = list(heard.series)
    refused = change(scanner, step("COMPLETED", PerformedSeriesSequence=listed), uid)
    assert (refused.Status, refused.ErrorID) == (0x0110, 0xA710)  # PS3.4 table F.7.2-2
    assert refused.ErrorComment == "Performed Procedure Step Object may no longer be updated"
    assert heard.series == announced


def test_a_step_is_created_once(scanner: Any) -> None:
    uid = generate_uid()
    assert create(scanner, step(), uid) == 0x0000
    assert create(scanner, step(), uid) == 0x0111


def test_a_step_without_a_uid_gets_one(scanner: Any, heard: Heard) -> None:
    request = N_CREATE()
    request.MessageID = 1
    request.AffectedSOPClassUID = ModalityPerformedProcedureStep
    request.AttributeList = BytesIO(b"\x40\x00\x52\x02\x0c\x00\x00\x00IN PROGRESS ")
    scanner._reactor_checkpoint.clear()
    while not scanner._is_paused:
        pass
    scanner.dimse.send_msg(request, 1)
    _, response = scanner.dimse.get_msg(block=True)
    scanner._reactor_checkpoint.set()
    assert response.Status == 0x0000
    done = step("COMPLETED", PerformedSeriesSequence=[performed("1.1", ["1.1.1"])])
    assert change(scanner, done, str(response.AffectedSOPInstanceUID)).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1"})]


@pytest.mark.parametrize(
    ("ds", "status"),
    [
        pytest.param(step(None), 0x0120, id="no status"),
        pytest.param(None, 0x0120, id="no attributes"),
        pytest.param(step(""), 0x0121, id="empty status"),
        pytest.param(step("COMPLETED"), 0x0106, id="completed from the start"),
        pytest.param(step("FINE"), 0x0106, id="no such status"),
        pytest.param(step(PerformedSeriesSequence=[performed(None, ["1.2"])]), 0x0120, id="no series UID"),
    ],
)
def test_a_step_that_lacks_something_is_not_created(scanner: Any, ds: Dataset | None, status: int) -> None:
    uid = generate_uid()
    assert create(scanner, ds, uid) == status
    assert create(scanner, step(), uid) == 0x0000


@pytest.mark.parametrize(
    ("ds", "status"),
    [
        pytest.param(step("COMPLETED"), 0x0120, id="completed without a list"),
        pytest.param(step("COMPLETED", PerformedSeriesSequence=[]), 0x0121, id="completed with an empty list"),
        pytest.param(step("OVER", PerformedSeriesSequence=[performed("1.1", ["1.2"])]), 0x0106, id="no such status"),
        pytest.param(step("COMPLETED", PerformedSeriesSequence=[performed("", ["1.2"])]), 0x0121, id="empty series"),
        pytest.param(step("COMPLETED", PerformedSeriesSequence=[performed("1.1", [""])]), 0x0121, id="empty image"),
    ],
)
def test_a_change_that_lacks_something_changes_nothing(scanner: Any, heard: Heard, ds: Dataset, status: int) -> None:
    uid = generate_uid()
    assert create(scanner, step(), uid) == 0x0000
    assert change(scanner, ds, uid).Status == status
    assert heard.series == []
    right = step("COMPLETED", PerformedSeriesSequence=[performed("1.1", ["1.1.1"])])
    assert change(scanner, right, uid).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1"})]


def test_a_completed_step_that_a_restart_forgot_is_used_and_answered_with_success_once(
    scanner: Any, heard: Heard
) -> None:
    uid = generate_uid()
    done = step("COMPLETED", PerformedSeriesSequence=[performed("1.1", ["1.1.1"])])
    assert change(scanner, done, uid).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1"})]
    assert change(scanner, done, uid).Status == 0x0110


@pytest.mark.parametrize("ds", [step(None), step("DISCONTINUED"), step("COMPLETED")])
def test_any_other_change_of_an_unknown_step_is_refused(scanner: Any, heard: Heard, ds: Dataset) -> None:
    assert change(scanner, ds, generate_uid()).Status == 0x0112
    assert heard.series == []


def test_memory_is_bounded_and_the_oldest_step_is_forgotten_first(heard: Heard) -> None:
    announcements = Announcements(heard)
    announcements.MOST_KEPT = 10  # type: ignore[misc]
    old, new = generate_uid(), generate_uid()
    listed = [performed("1.1", ["1.1.1", "1.1.2", "1.1.3"])]
    with modality(announcements) as assoc:
        for uid in (old, *(generate_uid() for _ in range(20)), new):
            assert create(assoc, step(PerformedSeriesSequence=listed), uid) == 0x0000
        assert len(announcements._known) == 2
        assert change(assoc, step("COMPLETED"), old).Status == 0x0112
        assert change(assoc, step("COMPLETED"), new).Status == 0x0000
    assert heard.series == [("1.1", {"1.1.1", "1.1.2", "1.1.3"})]


# --- instance availability -------------------------------------------------------------------------------------------


def test_a_notification_announces_what_is_available(scanner: Any, heard: Heard) -> None:
    ds = notification(
        available("1.1", {"1.1.1": "ONLINE", "1.1.2": "NEARLINE", "1.1.3": "UNAVAILABLE", "1.1.4": None}),
        available("1.2", {"1.2.1": "ONLINE"}),
        available("1.3", {"1.3.1": "UNAVAILABLE"}),
    )
    assert create(scanner, ds, generate_uid(), InstanceAvailabilityNotification) == 0x0000
    assert heard.series == [("1.1", {"1.1.1", "1.1.2", "1.1.4"}), ("1.2", {"1.2.1"})]


def test_a_notification_that_comes_twice_is_announced_once(scanner: Any, heard: Heard) -> None:
    uid = generate_uid()
    ds = notification(available("1.1", {"1.1.1": "ONLINE"}))
    assert create(scanner, ds, uid, InstanceAvailabilityNotification) == 0x0000
    assert create(scanner, ds, uid, InstanceAvailabilityNotification) == 0x0111
    assert change(scanner, step("COMPLETED"), uid).Status == 0x0119
    assert heard.series == [("1.1", {"1.1.1"})]


@pytest.mark.parametrize(
    ("ds", "status"),
    [
        pytest.param(None, 0x0120, id="no attributes"),
        pytest.param(notification(StudyInstanceUID=None), 0x0120, id="no study"),
        pytest.param(notification(ReferencedSeriesSequence=None), 0x0120, id="no series sequence"),
        pytest.param(notification(), 0x0121, id="no series"),
        pytest.param(notification(available("1.1", {})), 0x0121, id="no instances"),
        pytest.param(notification(available("", {"1.2": None})), 0x0121, id="empty series UID"),
        pytest.param(notification(available("1.1", {"1.2": None, "": None})), 0x0121, id="empty instance UID"),
    ],
)
def test_a_notification_that_lacks_something_is_refused(
    scanner: Any, heard: Heard, ds: Dataset | None, status: int
) -> None:
    assert create(scanner, ds, generate_uid(), InstanceAvailabilityNotification) == status
    assert heard.series == []


# --- both ------------------------------------------------------------------------------------------------------------


def test_an_announcement_that_nobody_can_use_is_no_fault_of_the_sender(caplog: pytest.LogCaptureFixture) -> None:
    def fail(series_instance_uid: str, sop_instance_uids: Collection[str]) -> None:
        raise RuntimeError("the assembler is gone")

    with modality(Announcements(fail)) as assoc, caplog.at_level(logging.ERROR):
        ds = notification(available("1.1", {"1.1.1": "ONLINE"}))
        assert create(assoc, ds, generate_uid(), InstanceAvailabilityNotification) == 0x0000
    assert "the announcement of series 1.1 is lost" in caplog.text


def test_no_identity_is_kept_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    announcements = Announcements(Heard())
    uid = generate_uid()
    with caplog.at_level(logging.DEBUG, logger="receiver"), modality(announcements) as assoc:
        create(assoc, step(PerformedSeriesSequence=[performed("1.1", ["1.1.1"])]), uid)
        create(assoc, step(), uid)
        change(assoc, step("OVER"), uid)
        change(assoc, step("COMPLETED"), generate_uid())
        assert [record for record in caplog.records if record.name.startswith("receiver")]
        kept = repr(announcements._known)
    for text in (caplog.text, kept):
        assert "Never" not in text
        assert "SECRET" not in text
        assert "1950" not in text

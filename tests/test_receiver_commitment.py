"""Storage commitment by real senders: what is answered, over which association, and what survives."""

import logging
import queue
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import free_port_pair
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import N_ACTION
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance
from receiver_fakes import association, config_under, ct_slice
from receiver_services import VERIFICATION, serving
from sqlalchemy import insert, select, update

from herald.config import Config, LedgerConfig
from herald.errors import ConfigError
from herald.events import utc_now
from herald.instance import read_header
from herald.ledger import commitments, instances
from herald.store import StudyStore
from receiver.commitment import ABSTRACT_SYNTAXES, CommitmentService
from receiver.record import Arrival, Recorder

NO_SUCH_INSTANCE, CLASS_CONFLICT, PROCESSING_FAILURE = 0x0112, 0x0119, 0x0110


class Prompt(CommitmentService):
    """Retries within a test's patience."""

    RETRY_FIRST_S = 0.05
    RETRY_LONGEST_S = 0.2
    ANSWERED_S = 0.05
    CONNECT_S = 2.0


class Node:
    """Store, ledger and commitment service of one receiver process."""

    def __init__(self, config: Config, kind: type[CommitmentService] = Prompt) -> None:
        self.store = StudyStore(config.store)
        self.recorder = Recorder(config.ledger)
        self.service = kind(config.receiver, self.store, self.recorder)
        self.recorder.start()

    def stop(self) -> None:
        self.service.stop(10.0)
        self.recorder.stop(10.0)

    def keep(self, ds: Dataset) -> Path:
        """Store an instance as the receiver does; does not wait for its row."""
        encoded = _part10(ds)
        stored = self.store.write_instance(ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID, [encoded])
        path = str(stored.path.relative_to(self.store.root))
        arrival = Arrival(read_header(stored.path), stored, path, "CT1", "127.0.0.1", utc_now())
        self.recorder.record(arrival)
        return stored.path

    def rows(self) -> list[Any]:
        self.recorder.submit(lambda connection: None).result(10.0)
        with self.recorder.ledger.read() as connection:
            return list(connection.execute(select(commitments).order_by(commitments.c.commitment_id)))

    @contextmanager
    def listening(self) -> Iterator[int]:
        with serving(ABSTRACT_SYNTAXES, (evt.EVT_N_ACTION, self.service.requested)) as port:
            yield port


@contextmanager
def node(config: Config, kind: type[CommitmentService] = Prompt) -> Iterator[Node]:
    running = Node(config, kind)
    running.service.start()
    try:
        yield running
    finally:
        running.stop()


class Reports:
    """Takes reports as the SCU does, over any association; `status` is what it answers."""

    def __init__(self) -> None:
        self.came: queue.Queue[tuple[int, Dataset]] = queue.Queue()
        self.statuses: queue.Queue[int] = queue.Queue()
        self.roles: list[tuple[bool, bool]] = []

    def __call__(self, event: evt.Event) -> tuple[int, None]:
        context = next(c for c in event.assoc.accepted_contexts if c.abstract_syntax == StorageCommitmentPushModel)
        self.roles.append((context.as_scu, context.as_scp))
        self.came.put((event.event_type, event.event_information))
        return self.statuses.get() if not self.statuses.empty() else 0x0000, None

    def next(self) -> tuple[int, str, set[tuple[str, str]], dict[tuple[str, str], int]]:
        """Event type, transaction, committed references, and failed ones with their reason."""
        event_type, ds = self.came.get(timeout=20.0)
        committed = [(r.ReferencedSOPClassUID, r.ReferencedSOPInstanceUID) for r in ds.get("ReferencedSOPSequence", ())]
        failed = {
            (r.ReferencedSOPClassUID, r.ReferencedSOPInstanceUID): r.FailureReason
            for r in ds.get("FailedSOPSequence", ())
        }
        assert len(committed) == len(set(committed))
        return event_type, ds.TransactionUID, set(committed), failed


@contextmanager
def sender(port: int, reports: Reports | Callable[..., Any], calling: str = "CT1") -> Iterator[Any]:
    contexts = [(StorageCommitmentPushModel, ImplicitVRLittleEndian), (VERIFICATION, ImplicitVRLittleEndian)]
    handlers = [(evt.EVT_N_EVENT_REPORT, reports)]
    with association(port, contexts, evt_handlers=handlers, calling=calling) as assoc:
        assert assoc.is_established
        yield assoc


@contextmanager
def peer(reports: Reports, port: int = 0) -> Iterator[int]:
    """A sender that takes reports over an association of their own; its port."""
    ae = AE(ae_title="CT1")
    ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
    handlers: list[Any] = [(evt.EVT_N_EVENT_REPORT, reports)]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
    try:
        yield server.server_address[1]
    finally:
        ae.shutdown()


def request_for(*references: tuple[str, str], transaction: str | None = None) -> Dataset:
    ds = Dataset()
    ds.TransactionUID = transaction or generate_uid()
    ds.ReferencedSOPSequence = [reference(*each) for each in references]
    return ds


def reference(sop_class: str | None, uid: str | None) -> Dataset:
    item = Dataset()
    if sop_class is not None:
        item.ReferencedSOPClassUID = sop_class
    if uid is not None:
        item.ReferencedSOPInstanceUID = uid
    return item


def ask(assoc: Any, ds: Dataset | None, action: int = 1, instance: str = StorageCommitmentPushModelInstance) -> int:
    status, _ = assoc.send_n_action(ds, action, StorageCommitmentPushModel, instance)
    return int(status.Status)


def ct(**values: Any) -> Dataset:
    return ct_slice(generate_uid(), generate_uid(), 0.0, **values)


def eventually(holds: Callable[[], bool], timeout_s: float = 15.0) -> None:
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def _part10(ds: Dataset) -> bytes:
    file = BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def named(config: Config, port: int) -> Config:
    return replace(config, receiver=replace(config.receiver, commitment_peers=(f"CT1@127.0.0.1:{port}",)))


# --- what is committed -----------------------------------------------------------------------------------------------


def test_everything_that_is_stored_is_committed_over_the_association_of_the_request(
    tmp_path: Path, ledger_url: str
) -> None:
    reports = Reports()
    config = replace(config_under(tmp_path), ledger=LedgerConfig(url=ledger_url))
    with node(config) as running, running.listening() as port, sender(port, reports) as assoc:
        images = [ct() for _ in range(3)]
        for ds in images:
            running.keep(ds)  # the rows are still on their way when the request comes
        asked = request_for(*((ds.SOPClassUID, ds.SOPInstanceUID) for ds in images))
        assert ask(assoc, asked) == 0x0000
        event_type, transaction, committed, failed = reports.next()
        assert assoc.send_c_echo().Status == 0x0000
        (row,) = running.rows()
    assert (event_type, transaction, failed) == (1, asked.TransactionUID, {})
    assert committed == {(ds.SOPClassUID, ds.SOPInstanceUID) for ds in images}
    assert row.reported_at is not None
    assert (row.attempts, row.failures, row.error) == (1, [], None)
    assert (row.calling_ae_title, row.calling_address) == ("CT1", "127.0.0.1")


def test_what_is_not_intact_on_disk_and_in_the_ledger_fails_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reports = Reports()
    good, altered, cut, gone, retired, other_class = (ct() for _ in range(6))
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        paths = [running.keep(ds) for ds in (good, other_class, retired, altered, cut, gone)]
        running.rows()  # what is damaged is damaged after its row was made
        content = bytearray(paths[3].read_bytes())
        content[-1] ^= 1
        paths[3].write_bytes(content)
        paths[4].write_bytes(paths[4].read_bytes()[:-1])
        paths[5].unlink()
        removal = update(instances).where(instances.c.sop_instance_uid == retired.SOPInstanceUID)
        running.recorder.submit(lambda connection: connection.execute(removal.values(removed_at=utc_now())))
        never = generate_uid()
        expected = {
            (CTImageStorage, altered.SOPInstanceUID): PROCESSING_FAILURE,
            (CTImageStorage, cut.SOPInstanceUID): PROCESSING_FAILURE,
            (CTImageStorage, gone.SOPInstanceUID): NO_SUCH_INSTANCE,
            (CTImageStorage, retired.SOPInstanceUID): NO_SUCH_INSTANCE,
            (CTImageStorage, never): NO_SUCH_INSTANCE,
            (MRImageStorage, other_class.SOPInstanceUID): CLASS_CONFLICT,
        }
        with caplog.at_level(logging.ERROR):
            assert ask(assoc, request_for((CTImageStorage, good.SOPInstanceUID), *expected)) == 0x0000
            event_type, _, committed, failed = reports.next()
        (row,) = running.rows()
    assert event_type == 2
    assert committed == {(CTImageStorage, good.SOPInstanceUID)}
    assert failed == expected
    assert {(c, u): r for c, u, r in row.failures} == expected
    for damaged in (altered, cut, gone):
        assert any(damaged.SOPInstanceUID in record.getMessage() for record in caplog.records)


def test_a_uid_that_came_with_two_contents_is_committed_only_while_both_are_intact(tmp_path: Path) -> None:
    reports = Reports()
    first = ct()
    second = ct_slice(first.StudyInstanceUID, first.SeriesInstanceUID, 5.0, SOPInstanceUID=first.SOPInstanceUID)
    asked = (CTImageStorage, first.SOPInstanceUID)
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        running.keep(first)
        path = running.keep(second)
        assert ask(assoc, request_for(asked)) == 0x0000
        assert reports.next()[2] == {asked}
        path.write_bytes(b"\0" * path.stat().st_size)
        assert ask(assoc, request_for(asked)) == 0x0000
        assert reports.next()[3] == {asked: PROCESSING_FAILURE}


def test_thousands_of_references_get_one_report(tmp_path: Path) -> None:
    reports = Reports()
    kept = ct()
    unknown = [(str(CTImageStorage), generate_uid()) for _ in range(4999)]
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        running.keep(kept)
        asked = request_for((CTImageStorage, kept.SOPInstanceUID), *unknown, unknown[0])
        assert ask(assoc, asked) == 0x0000
        event_type, _, committed, failed = reports.next()
    assert event_type == 2
    assert committed == {(CTImageStorage, kept.SOPInstanceUID)}
    assert failed == dict.fromkeys(unknown, NO_SUCH_INSTANCE)


def test_a_transaction_that_is_asked_for_again_is_answered_again(tmp_path: Path) -> None:
    reports = Reports()
    late = ct()
    asked = request_for((CTImageStorage, late.SOPInstanceUID))
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        assert ask(assoc, asked) == 0x0000
        assert reports.next()[:2] == (2, asked.TransactionUID)
        running.keep(late)
        assert ask(assoc, asked) == 0x0000
        assert reports.next()[:2] == (1, asked.TransactionUID)
        eventually(lambda: [row.reported_at is not None for row in running.rows()] == [True, True])


# --- requests that are refused ---------------------------------------------------------------------------------------


def _changed(**values: Any) -> Dataset:
    ds = request_for((CTImageStorage, "1.2.3"))
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


@pytest.mark.parametrize(
    ("ds", "action", "instance", "status"),
    [
        pytest.param(_changed(), 2, None, 0x0123, id="no such action"),
        pytest.param(_changed(), 1, "1.2.3.4", 0x0112, id="not the well-known instance"),
        pytest.param(None, 1, None, 0x0120, id="no action information"),
        pytest.param(_changed(TransactionUID=None), 1, None, 0x0120, id="no transaction UID"),
        pytest.param(_changed(TransactionUID=""), 1, None, 0x0121, id="empty transaction UID"),
        pytest.param(_changed(TransactionUID=["1.2", "1.3"]), 1, None, 0x0115, id="two transaction UIDs"),
        pytest.param(_changed(ReferencedSOPSequence=None), 1, None, 0x0120, id="no references"),
        pytest.param(_changed(ReferencedSOPSequence=[]), 1, None, 0x0121, id="no reference"),
        pytest.param(_changed(ReferencedSOPSequence=[reference("1.2", None)]), 1, None, 0x0120, id="no instance"),
        pytest.param(_changed(ReferencedSOPSequence=[reference(None, "1.2")]), 1, None, 0x0120, id="no class"),
        pytest.param(_changed(ReferencedSOPSequence=[reference("1.2", "")]), 1, None, 0x0121, id="empty instance"),
    ],
)
def test_a_request_that_lacks_something_is_refused_and_the_association_lives_on(
    tmp_path: Path, ds: Dataset | None, action: int, instance: str | None, status: int
) -> None:
    reports = Reports()
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        assert ask(assoc, ds, action, instance or StorageCommitmentPushModelInstance) == status
        assert running.rows() == []
        assert ask(assoc, _changed()) == 0x0000
        assert reports.next()[3] == {(CTImageStorage, "1.2.3"): NO_SUCH_INSTANCE}
        eventually(lambda: [row.reported_at is not None for row in running.rows()] == [True])


@pytest.mark.filterwarnings("ignore:Invalid value for VR UI")
@pytest.mark.parametrize(
    ("information", "status"),
    [
        pytest.param(b"\x08\x00\x95\x11\x04\x00\x00\x00abc ", 0x0115, id="letters for a UID"),
        pytest.param(
            b"\x08\x00\x95\x11\x04\x00\x00\x001.2\0\x08\x00\x99\x11\x0c\x00\x00\x00no sequence!",
            0x0120,
            id="a sequence of letters",
        ),
        pytest.param(b"\x08\x00\x95\x11\xff\x00\x00\x001.2", 0x0120, id="cut off"),
    ],
)
def test_garbage_is_refused_and_the_association_lives_on(tmp_path: Path, information: bytes, status: int) -> None:
    reports = Reports()
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        request = N_ACTION()
        request.MessageID = 7
        request.RequestedSOPClassUID = StorageCommitmentPushModel
        request.RequestedSOPInstanceUID = StorageCommitmentPushModelInstance
        request.ActionTypeID = 1
        request.ActionInformation = BytesIO(information)
        assoc._reactor_checkpoint.clear()
        eventually(lambda: assoc._is_paused)
        assoc.dimse.send_msg(request, 1)
        _, response = assoc.dimse.get_msg(block=True)
        assoc._reactor_checkpoint.set()
        assert response.Status == status
        assert running.rows() == []
        assert ask(assoc, _changed()) == 0x0000
        reports.next()


def test_while_the_ledger_does_not_answer_the_sender_is_told_to_ask_again_and_nothing_is_reported_later(
    tmp_path: Path,
) -> None:
    class Impatient(Prompt):
        LEDGER_WAIT_S = 0.3

    reports = Reports()
    with (
        node(config_under(tmp_path), Impatient) as running,
        running.listening() as port,
        sender(port, reports) as assoc,
    ):
        running.rows()
        lock = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
        lock.execute("begin immediate")
        asked = request_for((CTImageStorage, "1.2.3"))
        assert ask(assoc, asked) == 0x0213
        lock.execute("rollback")
        lock.close()
        assert running.rows() == []
        assert ask(assoc, asked) == 0x0000
        assert reports.next()[1] == asked.TransactionUID


# --- over the association of the request -----------------------------------------------------------------------------


def test_a_sender_that_releases_at_once_is_let_go_and_the_log_says_what_to_configure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Slow(Prompt):
        """Decides only when the sender has asked for its release."""

        def _failure_reason(self, *arguments: Any) -> int | None:
            released.wait(10.0)
            return super()._failure_reason(*arguments)

    released = threading.Event()
    reports = Reports()
    asked = request_for(*((CTImageStorage, generate_uid()) for _ in range(10)))
    with node(config_under(tmp_path), Slow) as running, running.listening() as port:
        with caplog.at_level(logging.WARNING), sender(port, reports) as assoc:
            assert ask(assoc, asked) == 0x0000
            assoc.bind(evt.EVT_PDU_SENT, lambda event: released.set())  # the next PDU is the release
            started = time.monotonic()
            assoc.release()
            assert assoc.is_released
            assert time.monotonic() - started < 5.0
        eventually(lambda: running.rows()[0].error is not None)
        (row,) = running.rows()
    assert row.reported_at is None
    assert "ended its association" in row.error
    assert reports.came.empty()
    assert [r.getMessage() for r in caplog.records if "CT1@HOST:PORT to receiver.commitment_peers" in r.getMessage()]


def test_a_sender_that_asks_for_more_before_it_answers_the_report_gets_both(tmp_path: Path) -> None:
    busy = threading.Event()
    reports = Reports()

    def after_the_echo(event: evt.Event) -> tuple[int, None]:
        assert busy.wait(10.0)
        return reports(event)

    first, second = (request_for((CTImageStorage, generate_uid())) for _ in range(2))
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, after_the_echo) as assoc:
        assert ask(assoc, first) == 0x0000
        assert assoc.send_c_echo().Status == 0x0000
        assert ask(assoc, second) == 0x0000
        busy.set()
        assert [reports.next()[1], reports.next()[1]] == [first.TransactionUID, second.TransactionUID]
        eventually(lambda: all(row.reported_at for row in running.rows()))


def test_a_sender_that_refuses_the_report_leaves_a_row_with_the_reason(tmp_path: Path) -> None:
    reports = Reports()
    reports.statuses.put(0x0110)
    with node(config_under(tmp_path)) as running, running.listening() as port, sender(port, reports) as assoc:
        assert ask(assoc, request_for((CTImageStorage, generate_uid()))) == 0x0000
        reports.next()
        assert assoc.send_c_echo().Status == 0x0000
        (row,) = running.rows()
    assert row.reported_at is None
    assert "refuses the report with 0x0110" in row.error


def test_a_sender_that_vanishes_leaves_a_row_with_the_reason(tmp_path: Path) -> None:
    reports = Reports()

    def vanish(event: evt.Event) -> tuple[int, None]:
        event.assoc.abort()
        return 0x0000, None

    with node(config_under(tmp_path)) as running, running.listening() as port:
        with sender(port, vanish) as assoc:
            assert ask(assoc, request_for((CTImageStorage, generate_uid()))) == 0x0000
            eventually(lambda: running.rows()[0].error is not None)
        (row,) = running.rows()
        assert row.reported_at is None
        with sender(port, reports) as assoc:
            assert ask(assoc, request_for((CTImageStorage, generate_uid()))) == 0x0000
            reports.next()


# --- over an association of our own ----------------------------------------------------------------------------------


def test_a_peer_gets_its_report_over_an_association_in_which_we_are_the_provider(
    tmp_path: Path, ledger_url: str
) -> None:
    reports, here = Reports(), Reports()
    kept = ct()
    config = replace(config_under(tmp_path), ledger=LedgerConfig(url=ledger_url))
    with peer(reports) as peer_port, node(named(config, peer_port)) as running, running.listening() as port:
        running.keep(kept)
        asked = request_for((CTImageStorage, kept.SOPInstanceUID))
        with sender(port, here) as assoc:
            assert ask(assoc, asked) == 0x0000
        assert reports.next() == (1, asked.TransactionUID, {(CTImageStorage, kept.SOPInstanceUID)}, {})
        eventually(lambda: running.rows()[0].reported_at is not None)
    assert reports.roles == [(True, False)]  # the peer is the SCU of the association that we opened
    assert here.came.empty()


def test_a_peer_that_is_down_at_first_gets_its_report_when_it_is_up(tmp_path: Path) -> None:
    reports = Reports()
    peer_port = free_port_pair()
    with node(named(config_under(tmp_path), peer_port)) as running, running.listening() as port:
        asked = request_for((CTImageStorage, generate_uid()))
        with sender(port, Reports()) as assoc:
            assert ask(assoc, asked) == 0x0000
        eventually(lambda: running.rows()[0].attempts >= 2)
        assert "cannot be reached" in running.rows()[0].error
        with peer(reports, peer_port):
            assert reports.next()[1] == asked.TransactionUID
            eventually(lambda: running.rows()[0].reported_at is not None)
        assert running.rows()[0].error is None
    assert reports.came.empty()


def test_a_new_process_takes_up_what_the_last_one_could_not_report(tmp_path: Path) -> None:
    reports = Reports()
    peer_port = free_port_pair()
    config = named(config_under(tmp_path), peer_port)
    kept = [ct() for _ in range(3)]
    asked = [request_for((CTImageStorage, ds.SOPInstanceUID)) for ds in kept]
    first = Node(config)  # its reporting thread never runs, as in a process that is killed at once
    try:
        with first.listening() as port, sender(port, Reports()) as assoc:
            for ds, request in zip(kept, asked, strict=True):
                first.keep(ds)
                assert ask(assoc, request) == 0x0000
    finally:
        first.stop()
    with peer(reports, peer_port), node(config) as second:
        assert [reports.next()[:2] for _ in asked] == [(1, request.TransactionUID) for request in asked]
        eventually(lambda: all(row.reported_at for row in second.rows()))
    with peer(reports, peer_port), node(config) as third:
        third.rows()
    assert reports.came.empty()


def test_a_sender_that_is_made_a_peer_later_gets_the_reports_that_it_missed(tmp_path: Path) -> None:
    reports = Reports()
    config = config_under(tmp_path)
    asked = request_for((CTImageStorage, generate_uid()))
    refusing = Reports()
    refusing.statuses.put(0x0110)
    with node(config) as running, running.listening() as port, sender(port, refusing) as assoc:
        assert ask(assoc, asked) == 0x0000
        refusing.next()
    with peer(reports) as peer_port, node(named(config, peer_port)) as running:
        assert reports.next()[1] == asked.TransactionUID
        eventually(lambda: running.rows()[0].reported_at is not None)


def test_a_peer_that_refuses_a_report_is_asked_again(tmp_path: Path) -> None:
    reports = Reports()
    reports.statuses.put(0x0110)
    asked = request_for((CTImageStorage, generate_uid()))
    with peer(reports) as peer_port, node(named(config_under(tmp_path), peer_port)) as running:
        with running.listening() as port, sender(port, Reports()) as assoc:
            assert ask(assoc, asked) == 0x0000
        assert reports.next()[1] == reports.next()[1] == asked.TransactionUID
        eventually(lambda: running.rows()[0].reported_at is not None)
        assert running.rows()[0].attempts == 2


def test_an_instance_that_is_gone_by_the_time_of_the_report_is_not_committed(tmp_path: Path) -> None:
    reports = Reports()
    peer_port = free_port_pair()
    kept = ct()
    asked = (CTImageStorage, kept.SOPInstanceUID)
    config = named(config_under(tmp_path), peer_port)
    with node(config) as running, running.listening() as port:
        path = running.keep(kept)
        with sender(port, Reports()) as assoc:
            assert ask(assoc, request_for(asked)) == 0x0000
        eventually(lambda: running.rows()[0].attempts >= 1)
        assert running.rows()[0].failures == []
    path.unlink()
    with peer(reports, peer_port), node(config):
        event_type, _, committed, failed = reports.next()
    assert (event_type, committed, failed) == (2, set(), {asked: NO_SUCH_INSTANCE})


def test_asking_again_while_the_peer_is_down_makes_one_report(tmp_path: Path) -> None:
    reports = Reports()
    peer_port = free_port_pair()
    late = ct()
    asked = request_for((CTImageStorage, late.SOPInstanceUID))
    with node(named(config_under(tmp_path), peer_port)) as running, running.listening() as port:
        with sender(port, Reports()) as assoc:
            assert ask(assoc, asked) == 0x0000
            eventually(lambda: running.rows()[0].attempts >= 1)
            running.keep(late)
            assert ask(assoc, asked) == 0x0000
        with peer(reports, peer_port):
            assert reports.next()[1] == asked.TransactionUID
            eventually(lambda: running.rows()[0].reported_at is not None)
        assert len(running.rows()) == 1
    assert reports.came.empty()


def test_after_a_day_a_report_is_given_up_with_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reports = Reports()
    transaction = generate_uid()
    old = insert(commitments).values(
        transaction_uid=transaction,
        calling_ae_title="CT1",
        calling_address="127.0.0.1",
        requested_at=utc_now() - timedelta(hours=25),
        references=[[CTImageStorage, "1.2.3"]],
        attempts=100,
        error="it refuses our association",
    )
    with peer(reports) as peer_port:
        config = named(config_under(tmp_path), peer_port)
        for lines in (1, 0):
            caplog.clear()
            running = Node(config)
            if lines:
                running.recorder.submit(lambda connection: connection.execute(old)).result(10.0)
            with caplog.at_level(logging.ERROR):
                running.service.start()
                eventually(lambda: running.rows()[0].error.startswith("given up"))  # noqa: B023
                running.stop()
            assert len([r for r in caplog.records if transaction in r.getMessage()]) == lines
    assert reports.came.empty()


def test_a_peer_that_is_not_a_dicom_node_holds_up_no_other(tmp_path: Path) -> None:
    reports = Reports()
    asked = request_for((CTImageStorage, generate_uid()))
    with socket.create_server(("127.0.0.1", 0)) as mute, peer(reports) as peer_port:
        config = config_under(tmp_path)
        entries = (f"MUTE@127.0.0.1:{mute.getsockname()[1]}", f"CT1@127.0.0.1:{peer_port}")

        def hang_up() -> None:
            while True:
                try:
                    mute.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        config = replace(config, receiver=replace(config.receiver, commitment_peers=entries))
        with node(config) as running, running.listening() as port:
            with sender(port, Reports(), calling="MUTE") as assoc:
                assert ask(assoc, request_for((CTImageStorage, generate_uid()))) == 0x0000
            eventually(lambda: running.rows()[0].attempts >= 1)
            assert "aborts our association" in running.rows()[0].error
            with sender(port, Reports()) as assoc:
                assert ask(assoc, asked) == 0x0000
            assert reports.next()[1] == asked.TransactionUID
            assert running.rows()[0].reported_at is None
        mute.shutdown(socket.SHUT_RDWR)


def test_a_peer_that_does_not_let_us_be_the_provider_is_named_with_the_reason(tmp_path: Path) -> None:
    ae = AE(ae_title="CT1")
    ae.supported_contexts = [build_context(VERIFICATION)]
    server = ae.start_server(("127.0.0.1", 0), block=False)
    try:
        config = named(config_under(tmp_path), server.server_address[1])
        with node(config) as running, running.listening() as port:
            with sender(port, Reports()) as assoc:
                assert ask(assoc, request_for((CTImageStorage, generate_uid()))) == 0x0000
            eventually(lambda: running.rows()[0].attempts >= 1)
            assert "does not take storage commitment reports" in running.rows()[0].error
    finally:
        ae.shutdown()


@pytest.mark.parametrize(
    "entry",
    [
        "CT1",
        "CT1@host",
        "CT1@host:",
        "@host:104",
        "CT1@:104",
        "CT1@host:0",
        "CT1@host:70000",
        "CT1@host:dicom",
        "A-TITLE-OF-17-CHARS@host:104",
        "CT\\1@host:104",
        " @host:104",
        "CT1@::1:104",
    ],
)
def test_an_entry_that_is_no_peer_is_named_with_the_form(tmp_path: Path, entry: str) -> None:
    config = config_under(tmp_path, commitment_peers=("CT2@10.0.0.5:104", entry))
    with pytest.raises(ConfigError, match=r"receiver\.commitment_peers.*AE_TITLE@HOST:PORT") as error:
        CommitmentService(config.receiver, StudyStore(config.store), Recorder(config.ledger))
    assert repr(entry) in str(error.value)


def test_a_sender_has_one_peer_entry(tmp_path: Path) -> None:
    config = config_under(tmp_path, commitment_peers=("CT1@10.0.0.5:104", "CT1@[::1]:11113"))
    with pytest.raises(ConfigError, match="second entry of CT1"):
        CommitmentService(config.receiver, StudyStore(config.store), Recorder(config.ledger))

"""Storage commitment (PS3.4 annex J): the sender's licence to delete, answered from the ledger and the disk.

A request becomes a row before it is answered. An instance is committed when its row is there and its file, read again,
has the row's SHA-256. The report goes over an association of our own to senders in `receiver.commitment_peers`, retried
for a day and across restarts; to any other sender it goes over the association of its request, or not at all.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from io import BytesIO
from typing import Any, Final, cast

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import build_context, build_role, evt
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import N_EVENT_REPORT
from pynetdicom.dsutils import encode
from pynetdicom.pdu_primitives import A_ABORT, A_P_ABORT, A_RELEASE
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
)
from pynetdicom.status import STATUS_FAILURE, code_to_category
from sqlalchemy import Connection, Row, Select, delete, insert, null, or_, select, update

from herald.calling import CallingEntity, reached
from herald.config import ReceiverConfig
from herald.errors import ConfigError, HeraldError
from herald.events import utc_now
from herald.ledger import commitments, instances
from herald.store import StudyStore, file_sha256
from receiver.normalized import (
    NormalizedStatus,
    Refused,
    answer,
    decoded,
    required_sequence,
    required_uid,
)
from receiver.record import Recorder
from receiver.upper_layer import ReceivingAssociation

log = logging.getLogger(__name__)

ABSTRACT_SYNTAXES: Final[tuple[str, ...]] = (str(StorageCommitmentPushModel),)
"""The SOP classes that `CommitmentService` serves."""

_PUSH_MODEL = UID(StorageCommitmentPushModel)
_WELL_KNOWN_INSTANCE = UID(StorageCommitmentPushModelInstance)
_REQUEST_COMMITMENT = 1  # Action Type ID (PS3.4 table J.3-1)
_ALL_COMMITTED, _SOME_FAILED = 1, 2  # Event Type IDs (PS3.4 table J.3-2)
_GIVEN_UP = "given up"  # how the error of a row starts that is not tried again
_UIDS_PER_QUERY = 500
_REPORTS_PER_ASSOCIATION = 20

Reference = tuple[str, str]
"""SOP class and SOP Instance UID."""
Failure = tuple[str, str, int]
"""SOP class, SOP Instance UID and Failure Reason (PS3.3 C.14.1.1)."""


@dataclass(frozen=True)
class _Peer:
    ae_title: str
    host: str
    port: int


@dataclass(frozen=True)
class _Request:
    transaction_uid: str
    calling_ae_title: str
    calling_address: str
    requested_at: datetime
    references: list[Reference]


@dataclass(frozen=True)
class _Report:
    """What a sender is told of one request."""

    commitment_id: int
    transaction_uid: str
    committed: list[Reference]
    failures: list[Failure]

    @property
    def event_type(self) -> int:
        return _SOME_FAILED if self.failures else _ALL_COMMITTED

    def dataset(self) -> Dataset:
        """The Event Information (PS3.4 table J.3-2); without Retrieve AE Title, for nothing is retrieved from here."""
        ds = Dataset()
        ds.TransactionUID = self.transaction_uid
        if self.committed:
            ds.ReferencedSOPSequence = [_reference(*reference) for reference in self.committed]
        if self.failures:
            ds.FailedSOPSequence = [_reference(*failure) for failure in self.failures]
        return ds


class CommitmentService:
    """Takes commitment requests, and reports to the senders that `receiver.commitment_peers` names.

    Raises ConfigError when an entry of `receiver.commitment_peers` is not `AE_TITLE@HOST:PORT`.
    """

    LEDGER_WAIT_S = 5.0
    """Longest wait for a request's row; the sender is then asked to come again."""
    REPLY_S = 30.0
    """Longest wait for a peer's answer."""
    CONNECT_S = 5.0
    """Longest wait for a peer to take a connection."""
    ANSWERED_S = 0.5
    """By then a sender has the answer to its request, and the report may follow."""
    RETRY_FIRST_S = 2.0
    """Pause after the first failed report; it doubles each time."""
    RETRY_LONGEST_S = 900.0
    POLL_S = 0.5
    """How often a wait for the ledger looks whether the service is to stop."""
    GIVE_UP_AFTER = timedelta(days=1)

    def __init__(self, config: ReceiverConfig, store: StudyStore, recorder: Recorder) -> None:
        self._config = config
        self._store = store
        self._recorder = recorder
        self._peers = _peers(config.commitment_peers)
        self._changed = threading.Condition()
        self._next_attempt: dict[int, float] = {}  # by commitment_id, of a monotonic clock
        self._woken = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="commitment", daemon=True)

    def start(self) -> None:
        """Start reporting to the peers, beginning with what earlier processes left."""
        if self._peers:
            self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop after the report that is going out; the others wait in the ledger for the next start."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    # --- N-ACTION ----------------------------------------------------------------------------------------------------

    def requested(self, event: evt.Event) -> tuple[int | Dataset, Dataset | None]:
        """Handler of evt.EVT_N_ACTION; the report follows the response."""
        return answer(event, self._take_up)

    def _take_up(self, event: evt.Event) -> None:
        request = decoded(lambda: _read_request(event))
        given_up = threading.Event()

        def statement(connection: Connection) -> int | None:
            if given_up.is_set():
                return None
            commitment_id, new = _record_request(connection, request)
            if given_up.is_set() and new:  # while a lock was waited for
                connection.execute(delete(commitments).where(commitments.c.commitment_id == commitment_id))
            return commitment_id

        done = self._recorder.submit(statement)
        try:
            commitment_id: int = done.result(self.LEDGER_WAIT_S)
        except TimeoutError as error:
            given_up.set()  # the sender is told to ask again, so this request must not be reported later
            raise Refused(NormalizedStatus.RESOURCE_LIMITATION, "the ledger does not answer; ask again") from error
        except Exception as error:  # whatever the database has against this one statement
            log.exception("the ledger refuses the request of %s for commitment", request.calling_ae_title)
            raise Refused(NormalizedStatus.PROCESSING_FAILURE, "the ledger refuses the request") from error
        if request.calling_ae_title in self._peers:
            with self._changed:
                self._next_attempt.pop(commitment_id, None)
                self._woken = True
                self._changed.notify()
        else:
            association = cast(ReceivingAssociation, event.assoc)
            association.afterwards(lambda: self._report_over(association, commitment_id))

    # --- report over the association of the request ------------------------------------------------------------------

    def _report_over(self, association: ReceivingAssociation, commitment_id: int) -> None:
        """Report in the association's own thread; raises what its transport raises when the connection breaks."""
        error: str | None = "the connection broke"
        try:
            report = self._report(commitment_id, wanted=lambda: _goes_on(association))
            if report is None:
                error = "it ended its association before the report"
            else:
                error = self._send_over(association, report)
        except HeraldError as refusal:  # of the ledger
            error = str(refusal)
        finally:
            self._recorder.submit(lambda connection: _record_attempt(connection, commitment_id, error))
            if error is not None:
                log.warning(
                    "commitment %d was not reported to %s: %s; if it takes reports over another association, "
                    "add %s@HOST:PORT to receiver.commitment_peers",
                    commitment_id,
                    association.who,
                    error,
                    association.calling_ae_title,
                )

    def _send_over(self, association: ReceivingAssociation, report: _Report) -> str | None:
        """N-EVENT-REPORT over an association that goes on receiving; why it failed, or None.

        pynetdicom's own `send_n_event_report` takes whatever comes next for the answer, and does not see a release.
        """
        context = next((c for c in association.accepted_contexts if c.abstract_syntax == _PUSH_MODEL), None)
        if context is None or context.context_id is None:
            return "it asked in the presentation context of another SOP class"
        syntax = context.transfer_syntax[0]
        encoded = encode(report.dataset(), syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
        message = N_EVENT_REPORT()
        message.MessageID = report.commitment_id % 65535 + 1
        message.AffectedSOPClassUID = _PUSH_MODEL
        message.AffectedSOPInstanceUID = _WELL_KNOWN_INSTANCE
        message.EventTypeID = report.event_type
        message.EventInformation = BytesIO(encoded or b"")
        association.dimse.send_msg(message, context.context_id)
        while True:  # a sender that keeps silent ends it by receiver.network_timeout_s
            context_id, came = association.dimse.get_msg()
            if isinstance(came, N_EVENT_REPORT) and came.MessageIDBeingRespondedTo == message.MessageID:
                return _refusal(came.Status)
            if came is not None and context_id is not None:
                association._serve_request(came, context_id)
            elif _is_ending(association) or not association.receive():
                return "it ended its association without an answer to the report"

    # --- report over an association of our own -----------------------------------------------------------------------

    def _run(self) -> None:
        self._committed(self._recorder.submit(lambda connection: None))  # from then on the tables are there
        outage = False
        while True:
            try:
                wait_s = self._report_to_peers()
                outage = False
            except Exception as error:  # the thread must outlive whatever the ledger or a peer does
                wait_s = self.RETRY_FIRST_S
                if not isinstance(error, HeraldError):
                    log.exception("an error that nobody foresaw; please report it")
                elif not outage:
                    log.error("commitments wait: %s", error)
                outage = True
            with self._changed:
                if not self._woken and not self._stopping:
                    self._changed.wait(wait_s)
                if self._stopping:
                    return
                self._woken = False

    def _report_to_peers(self) -> float:
        """Report what is due; seconds until the next is."""
        due: dict[str, list[Row[Any]]] = {}
        next_s = self.RETRY_LONGEST_S
        waiting = self._waiting()
        with self._changed:
            ids = {row.commitment_id for row in waiting}
            self._next_attempt = {key: at for key, at in self._next_attempt.items() if key in ids}
            attempts = dict(self._next_attempt)
        for row in waiting:
            age_s = (utc_now() - row.requested_at).total_seconds()
            if age_s > self.GIVE_UP_AFTER.total_seconds():
                self._give_up(row)
                continue
            left_s = attempts.get(row.commitment_id, 0.0) - time.monotonic()
            if 0 <= age_s < self.ANSWERED_S:
                left_s = max(left_s, self.ANSWERED_S - age_s)
            if left_s <= 0:
                due.setdefault(row.calling_ae_title, []).append(row)
            else:
                next_s = min(next_s, left_s)
        for ae_title, rows in due.items():
            self._report_to(self._peers[ae_title], rows[:_REPORTS_PER_ASSOCIATION])
        return 0.0 if due else next_s

    def _waiting(self) -> list[Row[Any]]:
        c = commitments.c
        rows = (
            select(c.commitment_id, c.calling_ae_title, c.transaction_uid, c.requested_at, c.attempts, c.error)
            .where(c.reported_at.is_(None), c.calling_ae_title.in_(self._peers))
            .where(or_(c.error.is_(None), c.error.not_like(_GIVEN_UP + "%")))
            .order_by(c.commitment_id)
        )
        with self._recorder.ledger.read() as connection:
            return list(connection.execute(rows))

    def _report_to(self, peer: _Peer, rows: list[Row[Any]]) -> None:
        # decided first: a peer need not wait while files are read
        reports = [(row, self._report(row.commitment_id, lambda: not self._stopping)) for row in rows]
        if self._stopping:
            return
        with self._association(peer) as (assoc, unreachable):
            for row, report in reports:
                if self._stopping or report is None:
                    return
                error = self._send(assoc, report) if unreachable is None else unreachable
                self._settle(peer, row, report, error)
                if unreachable is None and not assoc.is_established:
                    return  # the others are still due, and go over the next association

    @contextmanager
    def _association(self, peer: _Peer) -> Iterator[tuple[Any, str | None]]:
        """An association in which we are SCP (PS3.4 J.3.3), and why there is none."""
        ae = CallingEntity(ae_title=self._config.ae_title)
        ae.connection_timeout = self.CONNECT_S
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = self.REPLY_S
        try:
            assoc = ae.associate(
                peer.host,
                peer.port,
                contexts=[build_context(_PUSH_MODEL)],
                ae_title=peer.ae_title,
                ext_neg=[build_role(_PUSH_MODEL, scp_role=True)],
            )
        except (OSError, ValueError, RuntimeError) as error:  # as for a name that is not resolved
            yield None, f"{peer.host}:{peer.port} cannot be reached ({error})"
            return
        try:
            yield assoc, None if assoc.is_established else _why_not(assoc, peer)
        finally:
            if assoc.is_established:
                assoc.release()

    def _send(self, assoc: Association, report: _Report) -> str | None:
        try:
            status, _ = assoc.send_n_event_report(
                report.dataset(),
                report.event_type,
                _PUSH_MODEL,
                _WELL_KNOWN_INSTANCE,
                msg_id=report.commitment_id % 65535 + 1,
            )
        except (ValueError, RuntimeError) as error:
            return f"the report cannot be sent ({error})"
        return _refusal(status.get("Status"))

    def _settle(self, peer: _Peer, row: Row[Any], report: _Report, error: str | None) -> None:
        done = self._recorder.submit(lambda connection: _record_attempt(connection, row.commitment_id, error))
        if error is None:
            log.info(
                "reported to %s that %d instances are committed and %d are not, transaction %s",
                peer.ae_title,
                len(report.committed),
                len(report.failures),
                report.transaction_uid,
            )
        else:
            pause_s = min(self.RETRY_LONGEST_S, self.RETRY_FIRST_S * 2.0 ** min(row.attempts, 30))
            with self._changed:
                self._next_attempt[row.commitment_id] = time.monotonic() + pause_s
            if row.error != error:  # one line per kind of trouble
                log.warning(
                    "commitment %d is not yet reported to %s: %s; tried again for %s",
                    row.commitment_id,
                    peer.ae_title,
                    error,
                    self.GIVE_UP_AFTER,
                )
        self._committed(done)  # until the ledger knows, the row would be taken for one that waits

    def _committed(self, done: "Future[Any]") -> None:
        """Wait until a statement is committed or refused, or the service stops."""
        while not self._stopping:
            try:
                done.exception(self.POLL_S)
                return
            except TimeoutError:
                continue

    def _give_up(self, row: Row[Any]) -> None:
        error = f"{_GIVEN_UP} after {self.GIVE_UP_AFTER}: {row.error or 'the receiver did not run'}"
        log.error(
            "commitment %d (transaction %s) was never reported to %s: %s; the sender must ask again",
            row.commitment_id,
            row.transaction_uid,
            row.calling_ae_title,
            error,
        )
        done = self._recorder.submit(
            lambda connection: connection.execute(
                update(commitments).where(commitments.c.commitment_id == row.commitment_id).values(error=error)
            )
        )
        with self._changed:
            self._next_attempt[row.commitment_id] = time.monotonic() + self.RETRY_LONGEST_S
        self._committed(done)

    # --- what is committed -------------------------------------------------------------------------------------------

    def _report(self, commitment_id: int, wanted: Callable[[], bool]) -> _Report | None:
        """Decide what is committed, once; None as soon as it is not wanted any more. Raises LedgerError."""
        row_of_it = select(commitments).where(commitments.c.commitment_id == commitment_id)
        with self._recorder.ledger.read() as connection:
            row = connection.execute(row_of_it).one()
        references: list[Reference] = [(sop_class, uid) for sop_class, uid in row.references]
        earlier: list[Failure] = [(sop_class, uid, reason) for sop_class, uid, reason in row.failures or ()]
        failures = self._failures(references, row.failures is not None, earlier, wanted)
        if failures is None:
            return None
        if failures != earlier or row.failures is None:
            self._recorder.submit(
                lambda connection: connection.execute(
                    update(commitments).where(commitments.c.commitment_id == commitment_id).values(failures=failures)
                )
            )
        failed = {(sop_class, uid) for sop_class, uid, _ in failures}
        committed = [reference for reference in references if reference not in failed]
        return _Report(commitment_id, row.transaction_uid, committed, failures)

    def _failures(
        self, references: list[Reference], hashed: bool, earlier: list[Failure], wanted: Callable[[], bool]
    ) -> list[Failure] | None:
        """What cannot be committed; of what was `hashed` before, it is seen that it is still there."""
        failures = {(sop_class, uid): reason for sop_class, uid, reason in earlier}
        for start in range(0, len(references), _UIDS_PER_QUERY):
            chunk = references[start : start + _UIDS_PER_QUERY]
            stored = self._stored({uid for _, uid in chunk})
            for sop_class, uid in chunk:
                if not wanted():
                    return None
                if (sop_class, uid) in failures:
                    continue
                reason = self._failure_reason(sop_class, stored.get(uid, []), hashed)
                if reason is not None:
                    failures[sop_class, uid] = reason
        return [(*reference, failures[reference]) for reference in references if reference in failures]

    def _stored(self, sop_instance_uids: set[str]) -> dict[str, list[Row[Any]]]:
        c = instances.c
        rows: Select[Any] = select(c.sop_instance_uid, c.sop_class_uid, c.path, c.sha256, c.size_bytes).where(
            c.sop_instance_uid.in_(sorted(sop_instance_uids)), c.removed_at.is_(None)
        )
        found: dict[str, list[Row[Any]]] = {}
        with self._recorder.ledger.read() as connection:
            for row in connection.execute(rows):
                found.setdefault(row.sop_instance_uid, []).append(row)
        return found

    def _failure_reason(self, sop_class: str, rows: list[Row[Any]], hashed: bool) -> int | None:
        """Failure Reason (PS3.3 C.14.1.1). Where one UID came with several contents, every one must be intact."""
        if not rows:
            return int(NormalizedStatus.NO_SUCH_SOP_INSTANCE)
        same = [row for row in rows if row.sop_class_uid == sop_class]
        if not same:
            return int(NormalizedStatus.CLASS_INSTANCE_CONFLICT)
        return next((reason for row in same if (reason := self._damage(row, hashed)) is not None), None)

    def _damage(self, row: Row[Any], hashed: bool) -> int | None:
        path = self._store.root / row.path
        try:
            if path.stat().st_size == row.size_bytes and (hashed or file_sha256(path) == row.sha256):
                return None
        except FileNotFoundError:
            log.error("instance %s is in the ledger, but its file is not in the store; run `herald reconcile`", row[0])
            return int(NormalizedStatus.NO_SUCH_SOP_INSTANCE)
        except OSError as error:
            log.error("instance %s cannot be read: %s; check the disk of store.root", row[0], error.strerror)
            return int(NormalizedStatus.PROCESSING_FAILURE)
        log.error("the file of instance %s is not what was received; check the disk of store.root", row[0])
        return int(NormalizedStatus.PROCESSING_FAILURE)


# --- ledger rows -----------------------------------------------------------------------------------------------------


def _record_request(connection: Connection, request: _Request) -> tuple[int, bool]:
    """Key of its row, and whether that is new: a sender that asks again before the report gets one report for both."""
    c = commitments.c
    waiting = select(c.commitment_id, c.references).where(
        c.transaction_uid == request.transaction_uid,
        c.calling_ae_title == request.calling_ae_title,
        c.reported_at.is_(None),
    )
    references = [list(reference) for reference in request.references]
    for row in connection.execute(waiting).all():
        if row.references == references:
            again = {
                "calling_address": request.calling_address,
                "requested_at": request.requested_at,
                "failures": null(),  # decided anew: what was missing may have come
                "attempts": 0,
                "error": None,
            }
            connection.execute(update(commitments).where(c.commitment_id == row.commitment_id).values(again))
            return int(row.commitment_id), False
    new = insert(commitments).values(
        transaction_uid=request.transaction_uid,
        calling_ae_title=request.calling_ae_title,
        calling_address=request.calling_address,
        requested_at=request.requested_at,
        references=references,
        attempts=0,
    )
    key = connection.execute(new).inserted_primary_key
    assert key is not None
    return int(key[0]), True


def _record_attempt(connection: Connection, commitment_id: int, error: str | None) -> None:
    values: dict[str, Any] = {"attempts": commitments.c.attempts + 1, "error": error}
    if error is None:
        values["reported_at"] = utc_now()
    connection.execute(update(commitments).where(commitments.c.commitment_id == commitment_id).values(values))


def _why_not(assoc: Association, peer: _Peer) -> str:
    if assoc.is_rejected:
        answered = assoc.acceptor.primitive
        return f"it refuses our association: {answered.reason_str if answered is not None else 'no reason given'}"
    if assoc.rejected_contexts:
        return "it does not take storage commitment reports from us as SCP"
    return f"{peer.host}:{peer.port} {'aborts our association' if reached(assoc) else 'cannot be reached'}"


# --- DICOM -----------------------------------------------------------------------------------------------------------


def _read_request(event: evt.Event) -> _Request:
    """Check an N-ACTION (PS3.4 J.3.2); raises Refused."""
    invalid = NormalizedStatus.INVALID_ARGUMENT_VALUE
    request: Any = event.request
    association = cast(ReceivingAssociation, event.assoc)
    if request.RequestedSOPClassUID != _PUSH_MODEL:
        raise Refused(NormalizedStatus.NO_SUCH_SOP_CLASS, "only the Storage Commitment Push Model has actions here")
    if request.RequestedSOPInstanceUID != _WELL_KNOWN_INSTANCE:
        raise Refused(NormalizedStatus.NO_SUCH_SOP_INSTANCE, "not the well-known SOP instance of the push model")
    if request.ActionTypeID != _REQUEST_COMMITMENT:
        raise Refused(NormalizedStatus.NO_SUCH_ACTION, "the only action is 1, request storage commitment")
    information = event.action_information
    transaction_uid = required_uid(information, "TransactionUID", invalid)
    references = [
        (
            required_uid(item, "ReferencedSOPClassUID", invalid),
            required_uid(item, "ReferencedSOPInstanceUID", invalid),
        )
        for item in required_sequence(information, "ReferencedSOPSequence", invalid)
    ]
    return _Request(
        transaction_uid=transaction_uid,
        calling_ae_title=association.calling_ae_title,
        calling_address=association.calling_address,
        requested_at=utc_now(),
        references=list(dict.fromkeys(references)),
    )


def _reference(sop_class_uid: str, sop_instance_uid: str, failure_reason: int | None = None) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = sop_class_uid
    item.ReferencedSOPInstanceUID = sop_instance_uid
    if failure_reason is not None:
        item.FailureReason = failure_reason
    return item


def _refusal(status: int | None) -> str | None:
    """Why a status of N-EVENT-REPORT is a refusal; None when it is none."""
    if status is None:
        return "it does not answer the report"
    if code_to_category(status) == STATUS_FAILURE:
        return f"it refuses the report with 0x{status:04X}"
    return None


def _is_ending(association: ReceivingAssociation) -> bool:
    """Whether the peer has asked for the release, aborted or gone; the request stays for its loop to answer."""
    return not association.is_established or isinstance(
        association.dul.peek_next_pdu(), A_RELEASE | A_ABORT | A_P_ABORT
    )


def _goes_on(association: ReceivingAssociation) -> bool:
    """Whether the sender is still there; what it has sent meanwhile is taken in, so that no release is kept waiting."""
    connection = association.dul.socket
    if connection is not None and connection.ready and not association.receive():
        return False
    return not _is_ending(association)


def _peers(entries: tuple[str, ...]) -> dict[str, _Peer]:
    """The peers by AE title; raises ConfigError that names the entry."""
    peers: dict[str, _Peer] = {}
    for entry in entries:
        matched = _PEER.fullmatch(entry.strip())
        if matched is None or not 0 < int(matched["port"]) < 65536:
            raise ConfigError(
                f"receiver.commitment_peers: {entry!r} is not of the form AE_TITLE@HOST:PORT, as in CT1@10.0.0.5:104 "
                "(an AE title has at most 16 characters, an IPv6 address stands in brackets)"
            )
        peer = _Peer(matched["title"], matched["host"].strip("[]"), int(matched["port"]))
        if peer.ae_title in peers:
            raise ConfigError(f"receiver.commitment_peers: {entry!r} is the second entry of {peer.ae_title}; keep one")
        peers[peer.ae_title] = peer
    return peers


_PEER = re.compile(
    r"(?P<title>(?! )[ -?A-\[\]-~]{1,16}(?<! ))@(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:@\[\]]+):(?P<port>[0-9]{1,5})"
)

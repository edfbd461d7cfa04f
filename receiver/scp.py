"""The storage SCP: what a sender meets (PS3.4 annex B), on pynetdicom.

Success means that the file and its folder are fsynced. Bytes are written as they came: nothing is decoded but the few
header elements that say where an instance belongs.
"""

import contextlib
import logging
import ssl
import struct
import threading
from collections.abc import Callable
from typing import Any, cast

from pydicom.uid import UID
from pynetdicom import (
    AE,
    PYNETDICOM_IMPLEMENTATION_UID,
    PYNETDICOM_IMPLEMENTATION_VERSION,
    AllStoragePresentationContexts,
    _config,
    evt,
)

from herald.config import ReceiverConfig
from herald.errors import ConfigError, DicomError, NotDicomError, StoreError, StoreFullError
from herald.events import utc_now
from herald.instance import Head, InstanceHeader, fragments_end, read_head
from herald.metrics import RECEIVER_INSTANCES, RECEIVER_STORED_BYTES
from herald.store import IncomingInstance, StudyStore
from receiver import announcement, commitment
from receiver.access import AllowedSenders, tls_context
from receiver.announcement import Announcements
from receiver.assembly import SeriesAssembler
from receiver.command import StoreRequest
from receiver.commitment import CommitmentService
from receiver.record import Arrival, Recorder, Rejection, record_rejection
from receiver.statuses import StoreStatus
from receiver.upper_layer import ReceivingAssociation, ReceivingServer, printable

log = logging.getLogger(__name__)

TRANSFER_SYNTAXES = [
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.1.99",  # Deflated Explicit VR Little Endian
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.5",  # RLE Lossless
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless SV1
    "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS Near Lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.201",  # HTJ2K Lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K Lossless RPCL
    "1.2.840.10008.1.2.4.203",  # HTJ2K
]
"""What the node can decode; others are refused when the association is negotiated."""

VERIFICATION = "1.2.840.10008.1.1"
"""SOP class of C-ECHO (PS3.4 annex A)."""

HEAD_BYTES = 1 << 16
"""So much of a data set is kept in memory for its header; a longer header is read from the file."""

_SILENCED = ("pynetdicom.utils", "pynetdicom.dimse", "pynetdicom.fsm", "pynetdicom.pdu_primitives")
"""Loggers of tracebacks for what a peer sent wrongly; such errors reach us, and are one line in our log."""

POLL_S = 0.1
"""How often the listening thread looks whether it is to stop."""

MOST_PIECES = 256
"""Fragments that are written at once; below the system's IOV_MAX."""

_PREAMBLE = b"\0" * 128 + b"DICM"  # PS3.10 7.1

_ANSWERED = {status: RECEIVER_INSTANCES.labels(status.name.lower()) for status in StoreStatus}


class _Refused(Exception):
    """An instance is not stored: status and reason, with what to do."""

    def __init__(self, status: StoreStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class StorageServer:
    """Accepts associations between `start` and `stop`; raises ConfigError when a port cannot be opened."""

    def __init__(
        self,
        config: ReceiverConfig,
        store: StudyStore,
        recorder: Recorder,
        assembler: SeriesAssembler,
        short_of_space: Callable[[], None] = lambda: None,
    ) -> None:
        self.store = store
        self.assembler = assembler
        self.short_of_space = short_of_space
        self._config = config
        self._recorder = recorder
        self._allowed = AllowedSenders(config.allowed_senders)
        self._idle = threading.Condition()
        self._in_flight = 0
        self._stopping = False
        self._commitments = CommitmentService(config, store, recorder)
        self._announcements = Announcements(assembler.announce)
        self._ae = _application_entity(config)
        self._servers: list[ReceivingServer] = []

    @property
    def port(self) -> int:
        """The port that is listened on; the one that was found where the configuration says 0."""
        return int(self._servers[0].server_address[1])

    def start(self) -> None:
        """Listen; returns at once."""
        self._commitments.start()
        _config.LOG_HANDLER_LEVEL = "none"  # pynetdicom would format every message for its log
        for name in _SILENCED:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._listen("receiver.port", self._config.port, None)
        if self._config.tls_port:
            self._listen("receiver.tls_port", self._config.tls_port, tls_context(self._config))

    def _listen(self, setting: str, port: int, context: ssl.SSLContext | None) -> None:
        handlers: list[tuple[evt.EventType, Callable[..., Any]]] = [
            (evt.EVT_ACCEPTED, self._accepted),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_N_ACTION, self._commitments.requested),
            (evt.EVT_N_CREATE, self._announcements.created),
            (evt.EVT_N_SET, self._announcements.changed),
        ]
        address = self._config.host, port
        try:
            server = ReceivingServer(self._ae, address, self, self._ae.supported_contexts, handlers, context)
        except OSError as error:
            raise ConfigError(
                f"{setting} {port} on {self._config.host} cannot be opened: {error.strerror}; "
                "is another receiver running?"
            ) from error
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(POLL_S,), name=setting, daemon=True).start()
        secured = " with TLS" if context is not None else ""
        log.info("%s listens on %s:%d%s", self._config.ae_title, self._config.host, server.server_address[1], secured)

    def stop(self, timeout_s: float) -> None:
        """Finish the instances that are being stored, refuse further ones, then abort what is still connected."""
        with self._idle:
            self._stopping = True
            self._idle.wait_for(lambda: self._in_flight == 0, timeout_s)
        for server in self._servers:
            server.stop(timeout_s)
        self._commitments.stop(timeout_s)

    # --- associations ------------------------------------------------------------------------------------------------

    def refusal(self, association: ReceivingAssociation) -> str | None:
        """Why this sender may not connect; None lets it in."""
        if self._allowed(association.calling_ae_title, association.calling_address):
            return None
        return "it is not in receiver.allowed_senders"

    def ended(self, association: ReceivingAssociation) -> None:
        """Nothing more comes over this association."""
        self.assembler.association_ended(id(association), broken=not association.ended_by_sender)

    def _accepted(self, event: evt.Event) -> None:
        refused = sorted({str(context.abstract_syntax) for context in event.assoc.rejected_contexts})
        if refused:
            names = ", ".join(UID(uid).name for uid in refused[:8])
            log.warning(
                "%s proposed what is not accepted here (SOP class or transfer syntax): %s%s",
                cast(ReceivingAssociation, event.assoc).who,
                names,
                " ..." if len(refused) > 8 else "",
            )

    def _rejected(self, event: evt.Event) -> None:
        """Log a refused association with who and why (PS3.8 9.3.4)."""
        association = cast(ReceivingAssociation, event.assoc)
        answer = association.acceptor.primitive
        if answer is not None:
            reason = _REFUSALS.get((answer.result_source, answer.diagnostic), answer.reason_str)
            log.warning(
                "refused the association of %s calling %s: %s", association.who, association.called_ae_title, reason
            )

    # --- C-STORE -----------------------------------------------------------------------------------------------------

    def begin(self, association: ReceivingAssociation, request: StoreRequest, transfer_syntax: str) -> "Reception":
        """A C-STORE begins."""
        with self._idle:
            self._in_flight += 1
            stopping = self._stopping
        return Reception(self, association, request, transfer_syntax, stopping)

    def finished(self) -> None:
        """A C-STORE has been answered or given up."""
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def reject(self, rejection: Rejection) -> None:
        """Put a refusal on record; reception does not wait for the ledger."""
        self._recorder.submit(lambda connection: record_rejection(connection, rejection))


class Reception:
    """One C-STORE in progress: the data set goes to disk as it comes, and is judged once it is whole.

    Whatever happens here the sender gets a status and its association lives on.
    """

    def __init__(
        self,
        server: StorageServer,
        association: ReceivingAssociation,
        request: StoreRequest,
        transfer_syntax: str,
        stopping: bool,
    ) -> None:
        self._server = server
        self._association = association
        self._request = request
        self._transfer_syntax = transfer_syntax
        self._incoming: IncomingInstance | None = None
        self._head = bytearray()
        self._pieces: list[memoryview] = []
        self._read: Head | None = None
        self._meta_bytes = 0
        self._refused: _Refused | None = None
        try:
            if stopping:
                raise _Refused(StoreStatus.OUT_OF_RESOURCES, "the receiver is stopping; send the instance again")
            if not request.has_data_set:
                raise _Refused(StoreStatus.CANNOT_DECODE, "the command came without a data set; send it again")
            server.store.require_space()
            meta = _PREAMBLE + file_meta(request, transfer_syntax, association.calling_ae_title)
            self._meta_bytes = len(meta)
            self._incoming = server.store.receive()
            self._pieces.append(memoryview(meta))
        except (StoreError, OSError) as error:
            if isinstance(error, StoreFullError):
                server.short_of_space()
            self._refused = _out_of_resources(error)
        except _Refused as refusal:
            self._refused = refusal

    def write(self, fragment: memoryview) -> None:
        """Take a fragment; of an instance that is refused already, only the head is kept, which says what it is."""
        if len(self._head) < HEAD_BYTES:
            self._head += fragment[: HEAD_BYTES - len(self._head)]
        if self._refused is not None or self._incoming is None:
            return
        self._pieces.append(fragment)
        if len(self._pieces) >= MOST_PIECES:
            self.let_go()

    def let_go(self) -> None:
        """Write out the fragments so far."""
        pieces, self._pieces = self._pieces, []
        if self._incoming is None or self._refused is not None or not pieces:
            return
        try:
            self._incoming.write(*pieces)
        except OSError as error:
            self._refused = _out_of_resources(error)

    def finish(self) -> tuple[int, str]:
        """Make the instance durable and tell the ledger and the assembler; status and error comment."""
        try:
            try:
                self.let_go()
                if self._refused is not None:
                    raise self._refused
                self._take_in()
                _ANSWERED[StoreStatus.SUCCESS].inc()
                return StoreStatus.SUCCESS, ""
            except _Refused as refusal:
                return self._refuse(refusal.status, str(refusal))
            except Exception as error:  # see the class
                log.exception("an error that nobody foresaw; please report it")
                return self._refuse(StoreStatus.UNEXPECTED_ERROR, f"{type(error).__name__}: {error}")
        finally:
            self._close()

    def abandon(self) -> None:
        """The association ended within the data set: its sender knows that nothing was stored."""
        uid = printable(self._request.sop_instance_uid)
        log.warning("%s left within instance %s; nothing of it is kept", self._association.who, uid)
        self._miss(whole=False)
        self._close()

    def _close(self) -> None:
        if self._incoming is not None:
            self._incoming.discard()
            self._incoming = None
        self._server.finished()

    def _take_in(self) -> None:
        assert self._incoming is not None
        self._incoming.start_writing()  # the disk works while the header is read
        header = self._identified()
        uids = header.study_instance_uid, header.series_instance_uid, header.sop_instance_uid
        association = self._association
        try:
            with self._server.store.place(self._incoming, *uids) as stored:
                if stored.conflict and stored.new:
                    log.warning(
                        "instance %s came again with other bytes from %s; both are kept", uids[2], association.who
                    )
                arrival = Arrival(
                    header=header,
                    stored=stored,
                    path=f"{uids[0]}/{uids[1]}/{stored.path.name}",
                    calling_ae_title=association.calling_ae_title,
                    calling_address=association.calling_address,
                    received_at=utc_now(),
                )
                self._server.assembler.arrived(arrival, id(association))
            RECEIVER_STORED_BYTES.inc(stored.size_bytes)
        except StoreError as error:
            raise _out_of_resources(error) from error
        except DicomError as error:
            raise _Refused(StoreStatus.INVALID_UID, str(error)) from error

    def _identified(self) -> InstanceHeader:
        """The header, once it is sure that the data set is what the command says."""
        request = self._request
        try:
            header = self._read_header()
        except NotDicomError as error:
            raise _Refused(StoreStatus.CANNOT_DECODE, str(error)) from error
        except OSError as error:
            raise _out_of_resources(error) from error
        for status, keyword, uid in (
            (StoreStatus.NO_SOP_INSTANCE_UID, "SOPInstanceUID", header.sop_instance_uid),
            (StoreStatus.NO_STUDY_INSTANCE_UID, "StudyInstanceUID", header.study_instance_uid),
            (StoreStatus.NO_SERIES_INSTANCE_UID, "SeriesInstanceUID", header.series_instance_uid),
        ):
            if not uid:
                raise _Refused(status, f"the data set has no {keyword}; the sender must give one")
        for keyword, uid, command in (
            ("SOPClassUID", header.sop_class_uid, request.sop_class_uid),
            ("SOPInstanceUID", header.sop_instance_uid, request.sop_instance_uid),
        ):
            if uid != command:
                raise _Refused(
                    StoreStatus.DATA_SET_DOES_NOT_MATCH_SOP_CLASS,
                    f"{keyword} is {uid!r} in the data set and {command!r} in the command; correct the sender",
                )
        return header

    def _read_header(self) -> InstanceHeader:
        """From memory where it fits, else from the file; raises NotDicomError, also when the data set is cut off."""
        assert self._incoming is not None
        size = self._incoming.size_bytes - self._meta_bytes
        if self._read is None:
            self._read_head()
        head = self._read
        if head is None or not (head.whole or size <= len(self._head)):
            with self._incoming.open() as file:
                file.seek(self._meta_bytes)
                head = read_head(file, self._transfer_syntax)
        end = head.end
        if head.fragments is not None:
            with self._incoming.open() as file:
                end = fragments_end(file, self._meta_bytes + head.fragments) - self._meta_bytes
        if end is not None and end > size:
            raise NotDicomError(f"the data set is cut off, {end - size} bytes or more are missing; send it again")
        return head.header

    def _read_head(self) -> None:
        with contextlib.suppress(NotDicomError):  # a header that is longer than what is kept, if it is one at all
            self._read = read_head(bytes(self._head), self._transfer_syntax)

    def _miss(self, whole: bool) -> None:
        """Tell the assembler of an instance that is not stored, and of which series, if what there is of it says so."""
        if self._read is None:
            self._read_head()
        key = None
        if self._read is not None and (whole or self._read.whole):  # else a UID may be cut off
            header = self._read.header
            if header.study_instance_uid and header.series_instance_uid:
                key = header.study_instance_uid, header.series_instance_uid
        self._server.assembler.not_stored(self._request.sop_instance_uid, key, id(self._association))

    def _refuse(self, status: StoreStatus, reason: str) -> tuple[int, str]:
        """Log and record a refusal; returns status and ErrorComment (PS3.7 C)."""
        _ANSWERED[status].inc()
        uid, association = printable(self._request.sop_instance_uid), self._association
        log.error("refused instance %s of %s with %s: %s", uid, association.who, status.words, reason)
        self._miss(whole=True)
        self._server.reject(
            Rejection(
                occurred_at=utc_now(),
                calling_ae_title=association.calling_ae_title,
                calling_address=association.calling_address,
                sop_instance_uid=uid,
                status=status,
                error=printable(reason, 2000),
            )
        )
        return status, printable(reason, 64).encode("ascii", "replace").decode().replace("\\", "/")


def _out_of_resources(error: StoreError | OSError) -> _Refused:
    reason = str(error) if isinstance(error, StoreError) else f"the store cannot be written: {error.strerror}"
    return _Refused(StoreStatus.OUT_OF_RESOURCES, reason)


def file_meta(request: StoreRequest, transfer_syntax: str, calling_ae_title: str) -> bytes:
    """The File Meta Information of an instance that is stored as it came (PS3.10 7.1), with who sent it."""
    elements = b"".join(
        (
            b"\x02\x00\x01\x00OB\x00\x00\x02\x00\x00\x00\x00\x01",  # FileMetaInformationVersion
            _meta_element(0x0002, "UI", request.sop_class_uid),
            _meta_element(0x0003, "UI", request.sop_instance_uid),
            _meta_element(0x0010, "UI", transfer_syntax),
            _meta_element(0x0012, "UI", PYNETDICOM_IMPLEMENTATION_UID),
            _meta_element(0x0013, "SH", PYNETDICOM_IMPLEMENTATION_VERSION),
            _meta_element(0x0016, "AE", calling_ae_title),  # SourceApplicationEntityTitle
        )
    )
    return b"\x02\x00\x00\x00UL\x04\x00" + len(elements).to_bytes(4, "little") + elements


def _meta_element(element: int, vr: str, text: str) -> bytes:
    value = text.encode("ascii", "replace")
    value += (b"\0" if vr == "UI" else b" ") * (len(value) % 2)
    return struct.pack("<HH2sH", 0x0002, element, vr.encode(), len(value)) + value


_REFUSALS: dict[tuple[int | None, int | None], str] = {
    (1, 7): "it calls another AE title than receiver.ae_title",
    (3, 2): "receiver.max_associations are open",
}
"""By result source and diagnostic of A-ASSOCIATE-RJ (PS3.8 table 9-21)."""


def _application_entity(config: ReceiverConfig) -> AE:
    ae = AE(ae_title=config.ae_title)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(str(context.abstract_syntax), TRANSFER_SYNTAXES)
    for abstract_syntax in (VERIFICATION, *commitment.ABSTRACT_SYNTAXES, *announcement.ABSTRACT_SYNTAXES):
        ae.add_supported_context(abstract_syntax)
    ae.maximum_pdu_size = config.max_pdu_bytes
    ae.maximum_associations = config.max_associations
    ae.require_called_aet = config.require_called_ae_title
    ae.network_timeout = ae.dimse_timeout = config.network_timeout_s
    return ae

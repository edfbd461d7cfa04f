"""The storage SCP: what a sender meets (PS3.4 annex B), on pynetdicom.

Success means that the file and its folder are fsynced. Bytes are written as they came: nothing is decoded but the few
header elements that say where an instance belongs.
"""

import logging
import socket
import threading
from typing import Any, cast

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode_file_meta

from herald.config import ReceiverConfig
from herald.errors import ConfigError, DicomError, NotDicomError, StoreError
from herald.events import utc_now
from herald.instance import InstanceHeader, header_from_dataset
from herald.store import StudyStore
from receiver.assembly import SeriesAssembler
from receiver.record import Arrival, Recorder, Rejection, record_rejection
from receiver.statuses import StoreStatus

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

LEDGER_WAIT_S = 1.0
"""Longest wait for an instance's ledger row; its file is the truth and the row follows."""

_PREAMBLE = b"\0" * 128 + b"DICM"  # PS3.10 7.1


class _Refused(Exception):
    """An instance is not stored: status and reason, with what to do."""

    def __init__(self, status: StoreStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class StorageServer:
    """Accepts associations between `start` and `stop`; raises ConfigError when the port cannot be opened."""

    def __init__(
        self, config: ReceiverConfig, store: StudyStore, recorder: Recorder, assembler: SeriesAssembler
    ) -> None:
        self._config = config
        self._store = store
        self._recorder = recorder
        self._assembler = assembler
        self._live: set[int] = set()  # ids of the associations whose connection is open
        self._idle = threading.Condition()
        self._in_flight = 0
        self._stopping = False
        self._ae = _application_entity(config)
        self._server: Any = None

    @property
    def port(self) -> int:
        """The port that is listened on; the one that was found where the configuration says 0."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Listen; returns at once."""
        _config.LOG_HANDLER_LEVEL = "none"  # pynetdicom would format every message for its log
        try:
            self._server = self._ae.start_server(
                (self._config.host, self._config.port),
                block=False,
                evt_handlers=[
                    (evt.EVT_CONN_OPEN, self._connected),
                    (evt.EVT_ACCEPTED, self._accepted),
                    (evt.EVT_REJECTED, self._rejected),
                    (evt.EVT_C_STORE, self._store_instance),
                    (evt.EVT_RELEASED, self._ended),
                    (evt.EVT_ABORTED, self._ended),
                    (evt.EVT_CONN_CLOSE, self._ended),
                ],
            )
        except OSError as error:
            raise ConfigError(
                f"receiver.port {self._config.port} on {self._config.host} cannot be opened: {error.strerror}; "
                "is another receiver running?"
            ) from error
        log.info("%s listens on %s:%d", self._config.ae_title, self._config.host, self.port)

    def stop(self, timeout_s: float) -> None:
        """Finish the instances that are being stored, refuse further ones, then abort what is still connected."""
        with self._idle:
            self._stopping = True
            self._idle.wait_for(lambda: self._in_flight == 0, timeout_s)
        self._ae.shutdown()

    # --- associations ------------------------------------------------------------------------------------------------

    def _connected(self, event: evt.Event) -> None:
        self._live.add(id(event.assoc))
        connection = event.assoc.dul.socket
        if connection is not None and connection.socket is not None:
            # small responses must not wait for the sender's delayed acknowledgement
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _accepted(self, event: evt.Event) -> None:
        refused = sorted({str(context.abstract_syntax) for context in event.assoc.rejected_contexts})
        if refused:
            names = ", ".join(UID(uid).name for uid in refused[:8])
            log.warning(
                "%s proposed what is not accepted here (SOP class or transfer syntax): %s%s",
                _who(event),
                names,
                " ..." if len(refused) > 8 else "",
            )

    def _rejected(self, event: evt.Event) -> None:
        """Log a refused association with who and why (PS3.8 9.3.4)."""
        asked, answer = event.assoc.requestor.primitive, event.assoc.acceptor.primitive
        if asked is None or answer is None:
            return
        reason = _REFUSALS.get((answer.result_source, answer.diagnostic), answer.reason_str)
        called = _printable(asked.called_ae_title, 16)
        log.warning("refused the association of %s calling %s: %s", _who(event), called, reason)

    def _ended(self, event: evt.Event) -> None:
        association = id(event.assoc)
        if association in self._live:
            self._live.discard(association)
            self._assembler.association_ended(association)

    # --- C-STORE -----------------------------------------------------------------------------------------------------

    def _store_instance(self, event: evt.Event) -> int | Dataset:
        with self._idle:
            self._in_flight += 1
        try:
            if self._stopping:
                raise _Refused(StoreStatus.OUT_OF_RESOURCES, "the receiver is stopping; send the instance again")
            self._take_in(event)
            return StoreStatus.SUCCESS
        except _Refused as refusal:
            return self._refuse(event, refusal.status, str(refusal))
        except Exception as error:  # whatever happens here, the sender gets a status and the association lives on
            log.exception("an error that nobody foresaw; please report it")
            return self._refuse(event, StoreStatus.UNEXPECTED_ERROR, f"{type(error).__name__}: {error}")
        finally:
            with self._idle:
                self._in_flight -= 1
                self._idle.notify_all()

    def _take_in(self, event: evt.Event) -> None:
        """Store one instance durably and tell the ledger and the assembler; raises _Refused."""
        header = self._identified(event)
        data_set = _request(event).DataSet
        try:
            self._store.require_space()
            stored = self._store.write_instance(
                header.study_instance_uid,
                header.series_instance_uid,
                header.sop_instance_uid,
                [_PREAMBLE + encode_file_meta(event.file_meta), data_set.getbuffer() if data_set else b""],
            )
        except StoreError as error:
            raise _Refused(StoreStatus.OUT_OF_RESOURCES, str(error)) from error
        except DicomError as error:
            raise _Refused(StoreStatus.INVALID_UID, str(error)) from error
        if stored.conflict and stored.new:
            log.warning(
                "instance %s came again with other bytes from %s; both are kept", header.sop_instance_uid, _who(event)
            )
        association = id(event.assoc)
        arrival = Arrival(
            header=header,
            stored=stored,
            path=stored.path.relative_to(self._store.root).as_posix(),
            calling_ae_title=_calling_ae_title(event),
            calling_address=_calling_address(event),
            received_at=utc_now(),
        )
        done = self._assembler.arrived(arrival, association)
        if association not in self._live:  # its connection broke meanwhile: nobody would say so again
            self._assembler.association_ended(association)
        self._recorder.wait(done, LEDGER_WAIT_S)

    def _identified(self, event: evt.Event) -> InstanceHeader:
        """The header, once it is sure that the data set is what the command says."""
        request = _request(event)
        if request.DataSet is None:
            raise _Refused(StoreStatus.CANNOT_DECODE, "the command came without a data set; send the instance again")
        try:
            request.DataSet.seek(0)
            header = header_from_dataset(request.DataSet, event.context.transfer_syntax)
        except NotDicomError as error:
            raise _Refused(StoreStatus.CANNOT_DECODE, str(error)) from error
        for status, keyword, uid in (
            (StoreStatus.NO_SOP_INSTANCE_UID, "SOPInstanceUID", header.sop_instance_uid),
            (StoreStatus.NO_STUDY_INSTANCE_UID, "StudyInstanceUID", header.study_instance_uid),
            (StoreStatus.NO_SERIES_INSTANCE_UID, "SeriesInstanceUID", header.series_instance_uid),
        ):
            if not uid:
                raise _Refused(status, f"the data set has no {keyword}; the sender must give one")
        for keyword, uid, command in (
            ("SOPClassUID", header.sop_class_uid, request.AffectedSOPClassUID),
            ("SOPInstanceUID", header.sop_instance_uid, request.AffectedSOPInstanceUID),
        ):
            if uid != command:
                raise _Refused(
                    StoreStatus.DATA_SET_DOES_NOT_MATCH_SOP_CLASS,
                    f"{keyword} is {uid!r} in the data set and {str(command)!r} in the command; correct the sender",
                )
        return header

    def _refuse(self, event: evt.Event, status: StoreStatus, reason: str) -> Dataset:
        """Log and record a refusal; returns the response with its ErrorComment (PS3.7 C)."""
        uid = _printable(_request(event).AffectedSOPInstanceUID)
        log.error("refused instance %s of %s with %s: %s", uid, _who(event), status.words, reason)
        rejection = Rejection(
            occurred_at=utc_now(),
            calling_ae_title=_calling_ae_title(event),
            calling_address=_calling_address(event),
            sop_instance_uid=uid,
            status=status,
            error=_printable(reason, 2000),
        )
        done = self._recorder.submit(lambda connection: record_rejection(connection, rejection))
        self._recorder.wait(done, LEDGER_WAIT_S)
        response = Dataset()
        response.Status = int(status)
        response.ErrorComment = _printable(reason, 64).encode("ascii", "replace").decode().replace("\\", "/")
        return response


_REFUSALS: dict[tuple[int | None, int | None], str] = {
    (1, 3): "its AE title is not in receiver.allowed_senders",
    (1, 7): "it calls another AE title than receiver.ae_title",
    (3, 2): "receiver.max_associations are open",
}
"""By result source and diagnostic of A-ASSOCIATE-RJ (PS3.8 table 9-21)."""


def _application_entity(config: ReceiverConfig) -> AE:
    ae = AE(ae_title=config.ae_title)
    for context in AllStoragePresentationContexts:
        ae.add_supported_context(str(context.abstract_syntax), TRANSFER_SYNTAXES)
    ae.add_supported_context(VERIFICATION)
    ae.maximum_pdu_size = config.max_pdu_bytes
    ae.maximum_associations = config.max_associations
    ae.require_calling_aet = list(config.allowed_senders)
    ae.require_called_aet = config.require_called_ae_title
    ae.network_timeout = ae.dimse_timeout = config.network_timeout_s
    return ae


def _request(event: evt.Event) -> C_STORE:
    return cast(C_STORE, event.request)


def _calling_ae_title(event: evt.Event) -> str:
    return _printable(event.assoc.requestor.ae_title, 16).strip()


def _calling_address(event: evt.Event) -> str:
    return _printable(event.assoc.requestor.address, 64)


def _who(event: evt.Event) -> str:
    return f"{_calling_ae_title(event)} ({_calling_address(event)})"


def _printable(text: object, longest: int = 64) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(text or ""))[:longest]

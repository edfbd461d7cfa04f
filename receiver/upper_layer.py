"""The upper layer of an association that receives (PS3.8), in one thread that blocks on its socket.

pynetdicom runs two threads per association that poll, and reads 4 KB at a time; `benchmarks/receive.py` measures what
comes of doing otherwise. Here the association's own thread reads PDUs, steps pynetdicom's state machine for
all but C-STORE, and streams C-STORE data sets fragment by fragment to whoever takes them, so that memory does not grow
with an instance. Negotiation, release, abort and every other DIMSE service are pynetdicom's own code.
"""

import contextlib
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from socketserver import BaseServer
from typing import Any, Protocol, cast

from pynetdicom import evt
from pynetdicom.ae import ApplicationEntity
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_primitives import C_ECHO, N_ACTION, N_CREATE, N_SET
from pynetdicom.dul import DULServiceProvider
from pynetdicom.fsm import InvalidEventError
from pynetdicom.pdu_primitives import A_ASSOCIATE, P_DATA
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import ServiceClass, VerificationServiceClass
from pynetdicom.service_class_n import (
    InstanceAvailabilityNotificationServiceClass,
    ProcedureStepServiceClass,
    StorageCommitmentServiceClass,
)
from pynetdicom.sop_class import uid_to_service_class
from pynetdicom.transport import AddressInformation, AssociationServer, AssociationSocket

from receiver.command import C_STORE_RQ, StoreRequest, command_elements, command_field, store_request, store_response

log = logging.getLogger(__name__)

# PDU types (PS3.8 9.3)
_P_DATA_TF, _ABORT = 0x04, 0x07
_PDU_TYPES = range(0x01, 0x08)
_PDU_HEADER = struct.Struct(">BxL")  # type, length
_PDV_HEADER = struct.Struct(">LBB")  # length of what follows, presentation context id, message control header (annex E)
_COMMAND, _LAST = 1, 2  # bits of the message control header

_DATA_TRANSFER = "Sta6"
_CLOSED = "Sta1"

_OPERATIONS: dict[type[ServiceClass], tuple[type, ...]] = {
    VerificationServiceClass: (C_ECHO,),
    StorageCommitmentServiceClass: (N_ACTION,),
    ProcedureStepServiceClass: (N_CREATE, N_SET),
    InstanceAvailabilityNotificationServiceClass: (N_CREATE,),
}
"""What is served beside C-STORE."""

MOST_COMMAND_BYTES = 1 << 16
MOST_SERVICE_BYTES = 1 << 24
"""Largest data set of a service other than C-STORE; it is kept in memory."""
MOST_CONTROL_BYTES = 1 << 20
"""Largest PDU that is not P-DATA: an A-ASSOCIATE-RQ with every presentation context there is needs a tenth of it."""
LINGER_S = 5.0
"""How long the sender may take to close its connection after a release or an abort."""
_BUFFER_BYTES = 1 << 20  # an image of usual size fits, so that it is written at once
_LEAST_ROOM = 1 << 16  # less than this is not read into


class ProtocolError(Exception):
    """The peer violates the upper layer protocol; its association is aborted."""


class Stalled(Exception):
    """The peer is silent, or too slow, for longer than it may be."""


class Incoming(Protocol):
    """One C-STORE in progress."""

    def write(self, fragment: memoryview) -> None:
        """Take a fragment of the data set; its memory stays as it is until `let_go` or `finish`."""

    def let_go(self) -> None:
        """Be done with the memory of the fragments so far."""

    def finish(self) -> tuple[int, str]:
        """The data set is complete: status and error comment of the response."""

    def abandon(self) -> None:
        """The association ended within the data set."""


class Service(Protocol):
    """Who receives: told of every association and of every C-STORE."""

    def refusal(self, association: "ReceivingAssociation") -> str | None:
        """Why this requestor must not connect; None lets it in."""

    def begin(self, association: "ReceivingAssociation", request: StoreRequest, transfer_syntax: str) -> Incoming:
        """A C-STORE begins."""

    def ended(self, association: "ReceivingAssociation") -> None:
        """Nothing more comes over this association; told once for each that was connected."""


# --- reading ---------------------------------------------------------------------------------------------------------


class PduReader:
    """Bytes of a connection through one buffer; raises EOFError at its end and Stalled when it is silent for too long.

    `receive` fills a memoryview and returns the number of bytes, 0 at the end, or raises TimeoutError. `reuse` is
    called before memory that `some` has lent is written to again.
    """

    def __init__(
        self, receive: Callable[[memoryview], int], timeout_s: float, reuse: Callable[[], None] = lambda: None
    ) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._reuse = reuse
        self._deadline: float | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._lent = False

    def begin(self) -> None:
        """A PDU is waited for: silence alone counts."""
        self._deadline = None

    def within(self) -> None:
        """A PDU has begun: from now on it has `timeout_s` to be whole, however busily it trickles in."""
        self._deadline = time.monotonic() + self._timeout_s

    def take(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        if count > _LEAST_ROOM:
            return self._take_long(count)
        while self._end - self._start < count:
            self._fill()
        self._start += count
        return bytes(self._buffer[self._start - count : self._start])

    def some(self, most: int) -> memoryview:
        """From 1 to `most` bytes, whatever is there, lent until `give_back` or until `reuse` is called."""
        if self._start == self._end:
            self._fill()
        count = min(most, self._end - self._start)
        self._start += count
        self._lent = True
        return self._buffer[self._start - count : self._start]

    def give_back(self) -> None:
        """Nobody needs any more what `some` has lent."""
        self._lent = False

    def close(self) -> None:
        """Let go of the buffer: an association, which refers to itself, waits for the garbage collector."""
        self._buffer = memoryview(b"")

    def _take_long(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            parts += self.some(count - len(parts))
        self._lent = False
        return bytes(parts)

    def _fill(self) -> None:
        if self._start == self._end and not self._lent:
            self._start = self._end = 0
        if len(self._buffer) - self._end < _LEAST_ROOM:
            if self._lent:
                self._reuse()
                self._lent = False
            rest = bytes(self._buffer[self._start : self._end])
            self._buffer[: len(rest)] = rest
            self._start, self._end = 0, len(rest)
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Stalled(f"one PDU took longer than {self._timeout_s:g} s")
        try:
            count = self._receive(self._buffer[self._end :])
        except TimeoutError:
            within = "nothing came" if self._deadline is None else "nothing more came within a PDU"
            raise Stalled(f"{within} for {self._timeout_s:g} s") from None
        if count == 0:
            raise EOFError
        self._end += count


# --- pynetdicom's providers, stepped instead of polling --------------------------------------------------------------


class _Stepped(DULServiceProvider):
    """pynetdicom's upper layer without its thread: what is sent goes out before `send_pdu` returns."""

    def __init__(self, assoc: "ReceivingAssociation") -> None:
        super().__init__(assoc)
        self._stepping = threading.RLock()

    def send_pdu(self, primitive: Any) -> None:
        super().send_pdu(primitive)
        self.step()

    def receive_pdu(self, wait: bool = False, timeout: float | None = None) -> Any:
        while wait and self.to_user_queue.empty() and cast(ReceivingAssociation, self.assoc).receive():
            pass
        return super().receive_pdu(wait=False)

    def step(self) -> None:
        """Let the state machine act on every event and on every primitive to be sent."""
        with self._stepping:
            while not self.event_queue.empty() or self._process_recv_primitive():
                self.state_machine.do_action(self.event_queue.get(block=False))

    def received(self, pdu: bytes) -> None:
        """Let the state machine act on a PDU; raises ProtocolError when it cannot be decoded."""
        try:
            decoded, event = self._decode_pdu(bytearray(pdu))
        except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors
            raise ProtocolError(
                f"a PDU of type {pdu[0]} cannot be decoded ({type(error).__name__}: {error})"
            ) from error
        self._recv_pdu.put(decoded)
        self.event_queue.put(event)
        try:
            self.step()
        except (ValueError, TypeError) as error:  # what was decoded has a value that it must not have
            raise ProtocolError(f"a PDU of type {pdu[0]} is invalid ({error})") from error

    @property
    def state(self) -> str:
        return self.state_machine.current_state


class _ReadingDimse(DIMSEServiceProvider):
    """pynetdicom's DIMSE provider, which reads the socket itself when somebody waits for a message."""

    def get_msg(self, block: bool = False) -> Any:
        while block and self.msg_queue.empty() and cast(ReceivingAssociation, self.assoc).receive():
            pass
        return (None, None) if self.msg_queue.empty() else self.msg_queue.get(block=False)


# --- the association -------------------------------------------------------------------------------------------------


class ReceivingAssociation(Association):
    """An acceptor whose thread does everything: negotiate, receive, answer, release."""

    def __init__(self, server: "ReceivingServer", connection: socket.socket, address: AddressInformation) -> None:
        super().__init__(server.ae, "acceptor")
        self._server = server
        self._service = server.service
        self._connection = connection
        self.dul: _Stepped = _Stepped(self)
        self.dimse = _ReadingDimse(self)
        self.name = f"AcceptorThread@{address.address}:{address.port}"  # by this pynetdicom finds a server's own
        acceptor = self.acceptor
        acceptor.maximum_length = server.ae.maximum_pdu_size
        acceptor.ae_title = server.ae_title
        acceptor.address_info = AddressInformation.from_tuple(cast("tuple[str, int]", server.server_address))
        acceptor.implementation_class_uid = server.ae.implementation_class_uid
        acceptor.implementation_version_name = server.ae.implementation_version_name
        acceptor.supported_contexts = server.contexts
        self.requestor.address_info = address
        self.calling_address = printable(address.address, 64)
        for event, handlers in server.handlers:
            self.bind(event, handlers)
        self._longest = server.ae.maximum_pdu_size
        self._timeout_s = float(server.ae.network_timeout or 60.0)
        self._reader = PduReader(self._receive_into, self._timeout_s, self._let_go)
        self._command = bytearray()
        self._request: StoreRequest | None = None
        self._incoming: Incoming | None = None
        self._context_id = 0
        self._service_bytes = 0
        self._after: list[Callable[[], None]] = []
        self._told_end = False

    # --- who ---

    calling_ae_title = ""
    """What the requestor calls itself; empty until it has."""

    ended_by_sender = False
    """It was released or aborted by the requestor, rather than that the connection broke."""

    @property
    def called_ae_title(self) -> str:
        """Whom the requestor called."""
        request = self.requestor.primitive
        return printable(request.called_ae_title if request is not None else "", 16).strip()

    @property
    def who(self) -> str:
        """The requestor, for a log line."""
        return f"{self.calling_ae_title or 'an unknown sender'} ({self.calling_address})"

    # --- the thread ---

    def run_reactor(self) -> None:
        """Serve the connection until it ends."""
        try:
            self._prepare()
            if self._negotiate():
                self._serve()
            self._linger()
        except Stalled as reason:
            log.warning("%s: %s; the association is aborted, what was stored stays", self.who, reason)
            self._abort_pdu()
        except ProtocolError as violation:
            log.warning("%s violates the protocol: %s; the association is aborted", self.who, violation)
            self._abort_pdu()
        except (EOFError, OSError) as error:
            if self.is_established or str(error):
                log.warning("the connection of %s broke%s", self.who, f": {error}" if str(error) else "")
        except Exception:
            log.exception("the association of %s ends because of an error that nobody foresaw", self.who)
            self._abort_pdu()
        finally:
            try:
                self._end()
            except Exception:  # whatever it was, the connection and its place must not be lost
                log.exception("the association of %s ends with an error that nobody foresaw", self.who)
            with contextlib.suppress(OSError):
                self._connection.close()
            self._reader.close()
            cast(ReceivingServer, self._server).forget(self)

    def _prepare(self) -> None:
        connection = self._connection
        connection.settimeout(self._timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a response must not wait for more to send
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        context = cast(ReceivingServer, self._server).ssl_context
        if context is not None:
            self._connection = context.wrap_socket(connection, server_side=True)
        else:  # let the kernel keep the time: Python would poll before every call
            connection.settimeout(None)
            limit = struct.pack("@ll", int(self._timeout_s), int(self._timeout_s % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                connection.setsockopt(socket.SOL_SOCKET, option, limit)
        self.set_socket(AssociationSocket(self, client_socket=self._connection))

    def _negotiate(self) -> bool:
        request = self.dul.receive_pdu(wait=True)
        if not isinstance(request, A_ASSOCIATE):
            return False
        if request.maximum_length_received is None:
            request.maximum_length_received = 0  # it must be there (PS3.8 D.1); without it there is no limit
        elif 0 < request.maximum_length_received <= _PDV_HEADER.size:
            raise ProtocolError(f"it takes PDUs of {request.maximum_length_received} bytes, which hold nothing")
        self.requestor.primitive = request
        self.requestor.ae_title = request.calling_ae_title
        self.calling_ae_title = printable(request.calling_ae_title, 16).strip()
        reason = self._service.refusal(self)
        if reason is not None:
            log.warning("refused the association of %s calling %s: %s", self.who, self.called_ae_title, reason)
            # permanent, by the service user, calling AE title not recognised (PS3.8 table 9-21)
            self.acse.send_reject(0x01, 0x01, 0x03)
            self.is_rejected = True
            return False
        self.acse.negotiate_association()
        return bool(self.is_established)

    def _serve(self) -> None:
        while self.is_established and self.receive():
            self._serve_messages()
            if self.acse.is_release_requested():
                self.ended_by_sender = True
                self._end()  # before the answer: the series may settle from now on
                self.acse.send_release(is_response=True)
                self.is_released, self.is_established = True, False
            elif self.acse.is_aborted():
                self.is_aborted, self.is_established = True, False
                log.warning("%s aborted its association", self.who)

    def _serve_messages(self) -> None:
        """Serve what pynetdicom has put together; one PDU may have brought several messages."""
        while self.is_established:
            context_id, message = self.dimse.get_msg()
            if message is None or context_id is None:
                return
            if message.is_valid_request:
                self._require_served(message, context_id)
            self._serve_request(message, context_id)
            while self._after:
                self._after.pop(0)()

    def _require_served(self, message: Any, context_id: int) -> None:
        """Pynetdicom goes by the message's SOP class, and fails within when that is not what was negotiated."""
        abstract_syntax = self._accepted_cx[context_id].abstract_syntax
        sop_class = getattr(message, "AffectedSOPClassUID", None) or getattr(message, "RequestedSOPClassUID", None)
        operations = _OPERATIONS.get(uid_to_service_class(str(abstract_syntax)), ())
        if sop_class != abstract_syntax or not isinstance(message, operations):
            raise ProtocolError(
                f"{type(message).__name__.replace('_', '-')} of SOP class {printable(sop_class)} "
                f"came in a presentation context of {abstract_syntax}"
            )

    def afterwards(self, action: Callable[[], None]) -> None:
        """From within a handler: do this once the response has gone out, in this thread."""
        self._after.append(action)

    def _linger(self) -> None:
        """Let the peer close first, so that it reads our last PDU (PS3.8 9.2, Sta13)."""
        self._connection.settimeout(LINGER_S)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        until = time.monotonic() + LINGER_S
        with contextlib.suppress(OSError):
            while self._connection.recv(4096) and time.monotonic() < until:
                pass

    def _end(self) -> None:
        """Give up an unfinished instance and tell the service, once."""
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            incoming.abandon()
        if not self._told_end:
            self._told_end = True
            self._service.ended(self)

    def _abort_blocking(self, block: bool = True) -> None:
        """End the association from any thread; pynetdicom calls it by the name of `abort`."""
        self.is_aborted, self.is_established = True, False
        self._abort_pdu()
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    _abort_nonblocking = _abort_blocking

    def kill(self) -> None:
        """Pynetdicom's way to end the threads; ours ends by itself."""
        self.is_established = False

    def _abort_pdu(self) -> None:
        """Send A-ABORT past the state machine: by the provider, reason not specified (PS3.8 9.3.8)."""
        with contextlib.suppress(OSError):
            self._connection.settimeout(LINGER_S)
            self._connection.sendall(bytes([_ABORT, 0, 0, 0, 0, 4, 0, 0, 2, 0]))

    # --- PDUs ---

    def _receive_into(self, view: memoryview) -> int:
        try:
            return self._connection.recv_into(view)
        except BlockingIOError as error:  # how SO_RCVTIMEO says that the time is up
            raise TimeoutError from error

    def _let_go(self) -> None:
        if self._incoming is not None:
            self._incoming.let_go()

    def receive(self) -> bool:
        """Take in one PDU; false when the state machine has closed the association."""
        self._reader.begin()
        first = self._reader.take(_PDU_HEADER.size)
        self._reader.within()
        kind, length = _PDU_HEADER.unpack(first)
        if kind not in _PDU_TYPES:
            raise ProtocolError(f"PDU type 0x{kind:02X} is unknown")
        if kind == _P_DATA_TF and self.dul.state == _DATA_TRANSFER:
            if self._longest and length > self._longest:
                raise ProtocolError(f"a PDU of {length} bytes came where receiver.max_pdu_bytes is {self._longest}")
            self._data_transfer(length)
            return True
        if length > MOST_CONTROL_BYTES:
            raise ProtocolError(f"a PDU of type {kind} claims {length} bytes")
        self.ended_by_sender = kind == _ABORT
        try:
            self.dul.received(first + self._reader.take(length))
        except InvalidEventError as error:
            raise ProtocolError(f"a PDU of type {kind} came in state {self.dul.state}") from error
        return bool(self.dul.state != _CLOSED)

    def _data_transfer(self, left: int) -> None:
        """Take in the presentation data values of one P-DATA-TF PDU (PS3.8 9.3.5, annex D.2)."""
        while left:
            if left < _PDV_HEADER.size:
                raise ProtocolError("a presentation data value is cut off")
            item_length, context_id, control = _PDV_HEADER.unpack(self._reader.take(_PDV_HEADER.size))
            left -= item_length + 4
            if item_length < 2 or left < 0:
                raise ProtocolError(f"a presentation data value claims {item_length} bytes")
            if control & _COMMAND:
                self._command_fragment(context_id, bool(control & _LAST), item_length - 2)
            else:
                self._data_fragment(context_id, bool(control & _LAST), item_length - 2)

    def _command_fragment(self, context_id: int, last: bool, size: int) -> None:
        if self._incoming is not None or self._service_bytes:
            raise ProtocolError("a command came within a data set")
        if len(self._command) + size > MOST_COMMAND_BYTES:
            raise ProtocolError("a command set is unreasonably long")
        self._command += self._reader.take(size)
        if not last:
            return
        encoded, self._command = bytes(self._command), bytearray()
        self._context_id = context_id
        context = self._accepted_cx.get(context_id)
        if context is None:
            raise ProtocolError(f"a message came in presentation context {context_id}, which was not accepted")
        try:
            elements = command_elements(encoded)
            if command_field(elements) != C_STORE_RQ:
                self._to_pynetdicom(_COMMAND | _LAST, encoded)
                return
            request = store_request(elements, context_id)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        self._request = request
        self._incoming = self._service.begin(self, request, str(context.transfer_syntax[0]))
        if not request.has_data_set:
            self._answer()

    def _data_fragment(self, context_id: int, last: bool, size: int) -> None:
        if context_id != self._context_id:
            raise ProtocolError(f"a data set came in presentation context {context_id}, its command in another")
        if self._incoming is None:
            if self.dimse.message is None:
                raise ProtocolError("a data set came without a command")
            self._service_bytes += size
            if self._service_bytes > MOST_SERVICE_BYTES:
                raise ProtocolError("the data set of a service other than C-STORE is unreasonably long")
            self._to_pynetdicom(_LAST if last else 0, self._reader.take(size))
            if last:
                self._service_bytes = 0
            return
        while size:
            fragment = self._reader.some(size)
            size -= len(fragment)
            self._incoming.write(fragment)
        if last:
            self._answer()

    def _to_pynetdicom(self, control: int, fragment: bytes) -> None:
        data = P_DATA()
        value: Any = [self._context_id, bytes([control]) + fragment]  # a list, whatever its type hint says
        data.presentation_data_value_list = [value]
        try:
            self.dimse.receive_primitive(data)
        except Exception as error:  # see _Stepped.received
            raise ProtocolError(f"a message cannot be decoded ({type(error).__name__}: {error})") from error
        if not self.dul.event_queue.empty():  # pynetdicom's way to say that a message is invalid
            raise ProtocolError("a message lacks what its service demands")

    def _answer(self) -> None:
        incoming, request = self._incoming, self._request
        if incoming is None or request is None:
            return
        status, error_comment = incoming.finish()
        self._incoming = None
        self._reader.give_back()
        response = store_response(request, status, error_comment)
        value = _PDV_HEADER.pack(len(response) + 2, request.context_id, _COMMAND | _LAST) + response
        self._connection.sendall(_PDU_HEADER.pack(_P_DATA_TF, len(value)) + value)


# --- the server ------------------------------------------------------------------------------------------------------


class ReceivingServer(AssociationServer):
    """Listens on one port; every connection gets a thread, whose TLS handshake holds up nobody else."""

    MOST_UNNEGOTIATED = 32
    """Connections beyond the allowed associations, which get a proper refusal; any more are closed at once."""

    request_queue_size = 128

    def __init__(
        self,
        ae: ApplicationEntity,
        address: tuple[str, int],
        service: Service,
        contexts: list[PresentationContext],
        handlers: list[tuple[evt.EventType, Callable[..., Any]]],
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self.service = service
        self.handlers = handlers
        self._associations: set[ReceivingAssociation] = set()
        self._counting = threading.Lock()
        super().__init__(ae, address, ae.ae_title, contexts, ssl_context)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; TLS follows in the association's thread."""
        return cast(socket.socket, self.socket).accept()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start an association, or close the connection when there are too many."""
        address = AddressInformation.from_tuple(client_address)
        with self._counting:
            most = self.ae.maximum_associations + self.MOST_UNNEGOTIATED
            too_many = len(self._associations) >= most
            if not too_many:
                association = ReceivingAssociation(self, request, address)
                self._associations.add(association)
        if too_many:
            log.warning("closed the connection of %s at once: %d are open already", address.address, most)
            self.shutdown_request(request)
            return
        association.start()

    def forget(self, association: ReceivingAssociation) -> None:
        """An association has ended."""
        with self._counting:
            self._associations.discard(association)

    def service_actions(self) -> None:
        """Nothing: pynetdicom collects garbage here, which would halt every association."""

    def stop(self, timeout_s: float) -> None:
        """Stop listening, then abort what is still connected and wait for its thread."""
        BaseServer.shutdown(self)
        self.server_close()
        with self._counting:
            associations = list(self._associations)
        for association in associations:
            association.abort()
        deadline = time.monotonic() + timeout_s
        for association in associations:
            association.join(max(0.0, deadline - time.monotonic()))


def printable(text: object, longest: int = 64) -> str:
    """Text of a peer, fit for a log line."""
    line = str(text or "")[:longest]
    return line if line.isprintable() else "".join(c if c.isprintable() else "?" for c in line)

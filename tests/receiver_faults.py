"""A receiver in a process of its own, senders that keep every byte in their hands, and the account afterwards."""

import hashlib
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.dsutils import encode
from pynetdicom.pdu import A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification
from pynetdicom.presentation import build_context
from receiver_fakes import config_under
from sqlalchemy import select

from herald.events import SeriesReceived, event_from_json
from herald.instance import read_header
from herald.ledger import instances, open_ledger
from herald.reconcile import reconcile

LONG = os.environ.get("HERALD_FAULTS") == "long"
"""`make faults`: counts that take minutes."""

VERIFICATION = "1.2.840.10008.1.1"
IMPLICIT = "1.2.840.10008.1.2"
CONTEXTS: tuple[tuple[str, str], ...] = ((CTImageStorage, ExplicitVRLittleEndian), (VERIFICATION, IMPLICIT))
"""What a RawSender proposes unless told; presentation contexts 1, 3, ..."""

ASSOCIATE_RQ, ASSOCIATE_AC, P_DATA_TF, RELEASE_RQ, RELEASE_RP, ABORT = 0x01, 0x02, 0x04, 0x05, 0x06, 0x07
COMMAND, LAST = 1, 2
RELEASE = struct.pack(">BxLL", RELEASE_RQ, 4, 0)
ABORTED = struct.pack(">BxLL", ABORT, 4, 0)
_ECHO_RQ, _STORE_RQ, _NO_DATA_SET = 0x0030, 0x0001, 0x0101


def times(short: int, long: int) -> int:
    """How often: in `make test`, and in `make faults`."""
    return long if LONG else short


# --- a process -------------------------------------------------------------------------------------------------------


class ReceiverProcess:
    """`herald run receiver` as a process of its own; `settings` are environment variables without HERALD_."""

    def __init__(self, folder: Path, prefix: Sequence[str] = (), **settings: str) -> None:
        self.config = config_under(folder)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        waits = {"RECEIVER__QUIET_S": "2", "RECEIVER__SETTLE_S": "0.2"}
        place = {"NODE__DATA_DIR": str(folder), "RECEIVER__HOST": "127.0.0.1", "RECEIVER__PORT": str(self.port)}
        own = {"STORE__MIN_FREE_GB": "0", **place, **waits, **settings}
        own = {f"HERALD_{name}": value for name, value in own.items()}
        self._environment = {**os.environ, "PYTHONFAULTHANDLER": "1", **own}
        self._environment.pop("HERALD_SUPERVISED", None)
        self._prefix = list(prefix)
        self._output = folder / "receiver.txt"

    def start(self) -> None:
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "herald", "run", "receiver"],
                env=self._environment,
                stdout=output,
                stderr=output,
                cwd=Path(__file__).parents[1],
            )
        self.within(30.0, self._listens, "it listens")

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.log
        with socket.socket() as probe:
            probe.settimeout(1.0)
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        try:
            return self.process.wait(20.0)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # faulthandler tells what every thread was at
            self.process.wait(20.0)
            raise AssertionError(f"signal {number} does not end it:\n{self.log}") from None

    @property
    def log(self) -> str:
        return self._output.read_text()

    @property
    def store(self) -> Path:
        return self.config.store.root

    def within(self, seconds: float, condition: Callable[[], bool], what: str) -> None:
        """Wait for what the process is going to do; there is nothing but its effects to await."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.log}"
            time.sleep(0.02)

    # --- what it holds ---

    @property
    def resident_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    @property
    def descriptors(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())

    @property
    def threads(self) -> int:
        return int(psutil.Process(self.process.pid).num_threads())

    def at_rest(self) -> tuple[int, int]:
        """Threads and descriptors once nothing changes any more for a quarter of a second."""
        seen: list[tuple[int, int]] = []

        def unchanged() -> bool:
            seen.append((self.threads, self.descriptors))
            return len(seen) > 12 and len(set(seen[-12:])) == 1

        self.within(20.0, unchanged, "rest")
        return seen[-1]

    def wait_idle(self, threads: int, descriptors: int, seconds: float = 15.0) -> None:
        """Threads and descriptors come back to what they were; the ledger's may be open or closed just now."""
        self.within(seconds, lambda: self.threads <= threads, f"{threads} threads again")
        self.within(seconds, lambda: self.descriptors <= descriptors, f"{descriptors} descriptors again")

    # --- what became of what was sent ---

    def published(self) -> list[SeriesReceived]:
        """Every message of the topic `series` on the SQLite bus, in order."""
        with closing(sqlite3.connect(self.folder / "bus.sqlite")) as bus:
            rows = bus.execute("SELECT body FROM messages WHERE topic = 'series' ORDER BY seq").fetchall()
        events = [event_from_json(body) for (body,) in rows]
        return [event for event in events if isinstance(event, SeriesReceived)]

    def wait_published(self, series_instance_uid: str, count: int, seconds: float = 30.0) -> None:
        """The newest revision of the series is on the bus with so many instances."""

        def there() -> bool:
            try:
                events = [event for event in self.published() if event.series_instance_uid == series_instance_uid]
            except sqlite3.OperationalError:  # not yet made
                return False
            return bool(events) and events[-1].instance_count == count

        self.within(seconds, there, f"SeriesReceived with {count} instances")

    def end_accounted(self, acknowledged: "Acknowledged", conflicts: int = 0) -> None:
        """Stop it, and account for every instance that got 0x0000."""
        assert self.end(15) == 0, self.log
        assert_durable(self.store, acknowledged)
        assert_accounted(self, acknowledged, conflicts)
        assert_log_is_clean(self.log)


Acknowledged = dict[str, str]
"""SHA-256 of the data set as it was sent, by the SOP Instance UID of what got 0x0000."""


def sha256(data_set: bytes) -> str:
    return hashlib.sha256(data_set).hexdigest()


def data_set_bytes(path: Path) -> bytes:
    """What follows the File Meta of a Part 10 file."""
    raw = path.read_bytes()
    return raw[132 + 12 + int.from_bytes(raw[140:144], "little") :]


def assert_durable(store: Path, acknowledged: Acknowledged) -> None:
    """Every instance that got 0x0000 is on disk as it was sent, whole and readable."""
    there = {path.stem: path for path in store.glob("*/*/*.dcm")}
    assert acknowledged.keys() <= there.keys()
    wrong = [uid for uid, digest in acknowledged.items() if sha256(data_set_bytes(there[uid])) != digest]
    assert wrong == []
    assert all(read_header(there[uid]).sop_instance_uid == uid for uid in acknowledged)


def assert_accounted(receiver: ReceiverProcess, acknowledged: Acknowledged, conflicts: int = 0) -> None:
    """Files and rows agree one to one, nothing is there twice, nothing is half there, every revision went out once."""
    found = reconcile(receiver.config, verify=True)
    assert (found.unaccounted, found.problems) == (0, ())
    assert found.instances_on_disk == found.instances_in_ledger
    ledger = open_ledger(receiver.config.ledger)
    try:
        with ledger.read() as connection:
            rows = connection.execute(select(instances.c.sop_instance_uid, instances.c.conflict)).all()
    finally:
        ledger.close()
    assert sum(conflict for _, conflict in rows) == conflicts
    assert acknowledged.keys() <= {uid for uid, _ in rows}
    assert max(Counter(uid for uid, conflict in rows if not conflict).values(), default=1) == 1
    assert list(receiver.store.rglob("*.partial")) == []
    if (receiver.folder / "bus.sqlite").exists():
        revisions = Counter((event.series_instance_uid, event.revision) for event in receiver.published())
        assert max(revisions.values(), default=1) == 1, "a revision was published twice"


def assert_log_is_clean(log: str) -> None:
    """Nothing that nobody foresaw, and nobody's name."""
    for forbidden in ("Traceback", "nobody foresaw", "Never^Logged", "SECRET-ID"):
        assert forbidden not in log, log


# --- dcmtk -----------------------------------------------------------------------------------------------------------


def dcmtk(program: str) -> str:
    # not in a virtual environment, where pynetdicom has programs of the same names
    folders = [folder for folder in os.get_exec_path() if not Path(folder, "activate").exists()]
    path = shutil.which(program, path=os.pathsep.join(folders))
    if path is None:
        message = f"dcmtk's {program} is missing; `make tools` installs it"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return path


def dcmtk_sender(program: str, port: int, files: Sequence[Path], output: Path) -> "subprocess.Popen[bytes]":
    """storescu or dcmsend at work, its log in `output`."""
    command = [dcmtk(program), "-v", "-aet", "DCMTK", "-aec", "HERALD", "127.0.0.1", str(port), *map(str, files)]
    with output.open("wb") as log:
        return subprocess.Popen(command, env={**os.environ, "TCP_NODELAY": "1"}, stdout=subprocess.DEVNULL, stderr=log)


def acknowledged_by_dcmtk(output: Path, files: Sequence[Path]) -> list[Path]:
    """The files whose C-STORE got 0x0000: one request after the other, in the order given."""
    answers = re.findall(r"Received (?:C-STORE|Store) Response \((\w+)\)", output.read_text(errors="replace"))
    return [file for file, answer in zip(files, answers, strict=False) if answer == "Success"]


# --- bytes of the upper layer ----------------------------------------------------------------------------------------


def associate_rq(contexts: Iterable[tuple[str, str]] = CONTEXTS, calling: str = "RAW", longest: int = 16384) -> bytes:
    """An A-ASSOCIATE-RQ PDU."""
    request = A_ASSOCIATE()
    request.application_context_name = UID("1.2.840.10008.3.1.1.1")
    request.calling_ae_title, request.called_ae_title = calling, "HERALD"
    proposed = [build_context(abstract, transfer) for abstract, transfer in contexts]
    for i, context in enumerate(proposed):
        context.context_id = 2 * i + 1
    request.presentation_context_definition_list = proposed
    length, implementation = MaximumLengthNotification(), ImplementationClassUIDNotification()
    length.maximum_length_received = longest
    implementation.implementation_class_uid = UID("1.2.3.4")
    request.user_information = [length, implementation]
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return pdu.encode()


def pdv(context_id: int, control: int, fragment: bytes) -> bytes:
    """A presentation data value (PS3.8 9.3.5.1)."""
    return struct.pack(">LBB", len(fragment) + 2, context_id, control) + fragment


def p_data(*values: bytes) -> bytes:
    """A P-DATA-TF PDU."""
    body = b"".join(values)
    return struct.pack(">BxL", P_DATA_TF, len(body)) + body


def command_set(elements: dict[int, bytes]) -> bytes:
    """A command set with its group length (PS3.7 6.3.1)."""
    body = b"".join(struct.pack("<HHL", 0, element, len(value)) + value for element, value in elements.items())
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def _us(number: int) -> bytes:
    return struct.pack("<H", number)


def _ui(uid: str) -> bytes:
    return uid.encode() + b"\0" * (len(uid) % 2)


def store_command(sop_class: str, sop_instance: str, message_id: int = 1, has_data_set: bool = True) -> bytes:
    """A C-STORE-RQ."""
    return command_set(
        {
            0x0002: _ui(sop_class),
            0x0100: _us(_STORE_RQ),
            0x0110: _us(message_id),
            0x0700: _us(0),
            0x0800: _us(0 if has_data_set else _NO_DATA_SET),
            0x1000: _ui(sop_instance),
        }
    )


def echo_command(message_id: int = 1) -> bytes:
    """A C-ECHO-RQ."""
    return command_set(
        {0x0002: _ui(VERIFICATION), 0x0100: _us(_ECHO_RQ), 0x0110: _us(message_id), 0x0800: _us(_NO_DATA_SET)}
    )


def encoded(ds: Dataset) -> bytes:
    """The data set in its transfer syntax, as it is sent."""
    syntax = UID(ds.file_meta.TransferSyntaxUID)
    data_set = encode(ds, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated)
    assert data_set is not None
    return data_set


def store_pdus(image: Dataset, context_id: int = 1, message_id: int = 1, fragment: int = 16378) -> list[bytes]:
    """The PDUs of one C-STORE: its command, and its data set in fragments."""
    data_set = encoded(image)
    pieces = [data_set[start : start + fragment] for start in range(0, len(data_set), fragment)] or [b""]
    command = store_command(str(image.SOPClassUID), str(image.SOPInstanceUID), message_id)
    return [
        p_data(pdv(context_id, COMMAND | LAST, command)),
        *(p_data(pdv(context_id, 0, piece)) for piece in pieces[:-1]),
        p_data(pdv(context_id, LAST, pieces[-1])),
    ]


class RawSender:
    """A sender of which a test has every byte in its hands; closed without a release unless told."""

    def __init__(self, port: int, contexts: Iterable[tuple[str, str]] = CONTEXTS, timeout_s: float = 20.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._contexts = list(contexts)

    def __enter__(self) -> "RawSender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.socket.close()

    def send(self, *pdus: bytes) -> None:
        self.socket.sendall(b"".join(pdus))

    def associate(self) -> None:
        self.send(associate_rq(self._contexts))
        kind, _ = self.read_pdu()
        assert kind == ASSOCIATE_AC

    def read_pdu(self) -> tuple[int, bytes]:
        """Type and body; raises EOFError when the peer has closed."""
        kind, length = struct.unpack(">BxL", self._exactly(6))
        return int(kind), self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        parts = b""
        while len(parts) < count:
            part = self.socket.recv(count - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts

    def response(self) -> tuple[int, int]:
        """Message ID being responded to, and status, of the next response."""
        kind, body = self.read_pdu()
        assert kind == P_DATA_TF, f"a PDU of type {kind} came instead of a response"
        return response_in(body)

    def store(self, image: Dataset, message_id: int = 1, context_id: int = 1) -> int:
        """C-STORE; the status."""
        self.send(*store_pdus(image, context_id, message_id))
        answered, status = self.response()
        assert answered == message_id
        return status

    def echo(self, context_id: int = 3) -> int:
        """C-ECHO; the status."""
        self.send(p_data(pdv(context_id, COMMAND | LAST, echo_command())))
        return self.response()[1]

    def release(self) -> None:
        self.send(RELEASE)
        kind, _ = self.read_pdu()
        assert kind == RELEASE_RP

    def wait_closed(self) -> list[int]:
        """The types of the PDUs that still come until the receiver closes the connection."""
        kinds = []
        try:
            while True:
                kinds.append(self.read_pdu()[0])
        except (EOFError, ConnectionError):
            return kinds


def response_in(body: bytes) -> tuple[int, int]:
    """Message ID being responded to, and status, in the body of a P-DATA-TF PDU."""
    command = body[6:]
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(command):
        _, element, length = struct.unpack_from("<HHL", command, offset)
        elements[element] = command[offset + 8 : offset + 8 + length]
        offset += 8 + length
    return int.from_bytes(elements[0x0120], "little"), int.from_bytes(elements[0x0900], "little")


def echoes(port: int) -> bool:
    """Whether a receiver answers a C-ECHO over a new association."""
    with RawSender(port) as sender:
        sender.associate()
        answered = sender.echo() == 0
        sender.release()
    return answered


def send_over(port: int, images: Iterable[Dataset]) -> Acknowledged:
    """One association, one image after the other; what got 0x0000."""
    acknowledged = {}
    with RawSender(port) as sender:
        sender.associate()
        for i, image in enumerate(images):
            if sender.store(image, i % 65535 + 1) == 0:
                acknowledged[str(image.SOPInstanceUID)] = sha256(encoded(image))
        sender.release()
    return acknowledged


def at_once(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Do all at the same time, each in a thread; what they return, or the first error."""
    results: list[Any] = [None] * len(actions)
    errors: list[BaseException] = []
    gate = threading.Barrier(len(actions))

    def run(i: int) -> None:
        try:
            gate.wait(30.0)
            results[i] = actions[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120.0)
    if errors:
        raise errors[0]
    return results

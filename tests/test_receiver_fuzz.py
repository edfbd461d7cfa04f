"""The receiver fed with what nobody should send: it never crashes, never hangs, and never says 0x0000 wrongly.

`make test` takes the same sample every time; `make faults` thousands of new cases.
"""

import logging
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)
from pynetdicom.dimse_messages import C_STORE_RSP
from pynetdicom.dsutils import decode
from receiver_fakes import Receiver, config_under, ct_slice, receiving
from receiver_faults import (
    ABORTED,
    COMMAND,
    CONTEXTS,
    LAST,
    P_DATA_TF,
    RELEASE,
    RawSender,
    associate_rq,
    data_set_bytes,
    echo_command,
    echoes,
    encoded,
    p_data,
    pdv,
    store_command,
    store_pdus,
    times,
)

import receiver.upper_layer
from herald.errors import NotDicomError
from herald.instance import Head, header_from_dataset, read_head
from receiver.command import command_elements, command_field, store_request, store_response
from receiver.scp import TRANSFER_SYNTAXES, file_meta
from receiver.upper_layer import PduReader, Stalled

pytestmark = [
    pytest.mark.timeout(3600),
    # pydicom warns of much that it reads; as errors, unlike at work, the warnings would end the reading
    pytest.mark.filterwarnings("ignore"),
]

SILENCE_S = 0.5
"""`receiver.network_timeout_s` here."""


def cases(short: int, long: int) -> settings:
    """How many; in `make test` always the same ones."""
    return settings(
        max_examples=times(short, long),
        derandomize=times(1, 0) == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


# --- mutations -------------------------------------------------------------------------------------------------------

_at = st.integers(0, 1 << 20)
_interesting = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff", b"\x7f\xff\xff\xff", b"\xfe\xff\x00\xe0", b"SQ"]),
)
MUTATION = st.one_of(
    st.tuples(st.just("overwrite"), _at, _interesting),
    st.tuples(st.just("insert"), _at, st.one_of(_interesting, st.binary(max_size=64))),
    st.tuples(st.just("remove"), _at, st.integers(1, 64)),
    st.tuples(st.just("cut"), _at, st.none()),
    st.tuples(st.just("repeat"), _at, st.integers(1, 200)),
)
MUTATIONS = st.lists(MUTATION, min_size=1, max_size=4)


def mutated(data: bytes, mutations: list[tuple[str, int, Any]]) -> bytes:
    for kind, at, what in mutations:
        i = at % (len(data) + 1)
        if kind == "overwrite":
            data = data[:i] + what + data[i + len(what) :]
        elif kind == "insert":
            data = data[:i] + what + data[i:]
        elif kind == "remove":
            data = data[:i] + data[i + what :]
        elif kind == "cut":
            data = data[:i]
        else:
            data = data[:i] + data[i : i + what] + data[i:]
    return data


# --- whole associations ----------------------------------------------------------------------------------------------


class Unforeseen(logging.Handler):
    """Collects what is logged with a traceback, by the receiver or by pynetdicom."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[str] = []
        self._formatter = logging.Formatter()

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or "nobody foresaw" in record.getMessage():
            self.records.append(self._formatter.format(record))


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Receiver, Unforeseen]]:
    unforeseen = Unforeseen()
    died: list[str] = []
    linger_s, receiver.upper_layer.LINGER_S = receiver.upper_layer.LINGER_S, 0.2
    hook, threading.excepthook = threading.excepthook, lambda args: died.append(repr(args))
    loggers = [logging.getLogger(), logging.getLogger("pynetdicom")]
    for logger in loggers:
        logger.addHandler(unforeseen)
    config = config_under(tmp_path_factory.mktemp("fuzz"), network_timeout_s=SILENCE_S, quiet_s=2.0)
    try:
        with receiving(config) as running:
            assert echoes(running.port)
            wait_threads(running, threading.active_count())
            threads, descriptors = threading.active_count(), psutil.Process().num_fds()
            yield running, unforeseen
            wait_threads(running, threads)
            assert psutil.Process().num_fds() <= descriptors + 6, "descriptors leak"
            assert list(running.store.root.rglob("*.partial")) == []
        assert died == []
        assert running.server._in_flight == 0
    finally:
        receiver.upper_layer.LINGER_S = linger_s
        threading.excepthook = hook
        for logger in loggers:
            logger.removeHandler(unforeseen)


def wait_threads(running: Receiver, most: int) -> None:
    deadline = time.monotonic() + 10.0
    while threading.active_count() > most or running.server._servers[0]._associations:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def valid_pdus() -> list[bytes]:
    """A whole association: two instances, the first in three fragments, a C-ECHO, several PDVs in one PDU."""
    first, second = (ct_slice("1.2.3", "1.2.3.4", z, SOPInstanceUID=f"1.2.3.4.{z:.0f}") for z in (0.0, 5.0))
    for image in (first, second):
        image.StudyInstanceUID = "1.2.3"
    data_set = encoded(second)
    command = store_command(CTImageStorage, str(second.SOPInstanceUID), 3)
    return [
        associate_rq(),
        *store_pdus(first, message_id=1, fragment=len(encoded(first)) // 3 + 1),
        p_data(pdv(3, COMMAND | LAST, echo_command(2))),
        p_data(
            pdv(1, COMMAND, command[:30]),
            pdv(1, COMMAND | LAST, command[30:]),
            pdv(1, 0, data_set[:77]),
            pdv(1, LAST, data_set[77:]),
        ),
        RELEASE,
    ]


VALID = valid_pdus()


def messages_in(stream: bytes) -> dict[str, list[bytes]]:
    """What a stream sends, read independently of the receiver: data sets by SOP Instance UID of their C-STORE-RQ."""
    sent: dict[str, list[bytes]] = defaultdict(list)
    command, data_set, uid = b"", b"", None
    offset = 0
    while offset + 6 <= len(stream):
        kind, length = struct.unpack_from(">BxL", stream, offset)
        body = stream[offset + 6 : offset + 6 + length]
        offset += 6 + length
        if kind != P_DATA_TF:
            continue
        at = 0
        while at + 6 <= len(body):
            size, _, control = struct.unpack_from(">LBB", body, at)
            fragment = body[at + 6 : at + 4 + size]
            at += 4 + max(size, 2)
            if control & COMMAND:
                command += fragment
                if control & LAST:
                    elements, command, data_set = _elements(command), b"", b""
                    uid = elements.get(0x1000, b"").strip(b"\0 ").decode("ascii", "replace")
            else:
                data_set += fragment
                if control & LAST and uid is not None:
                    sent[uid].append(data_set)
                    data_set = b""
    return sent


def _elements(command: bytes) -> dict[int, bytes]:
    elements = {}
    at = 0
    while at + 8 <= len(command):
        _, element, length = struct.unpack_from("<HHL", command, at)
        elements[element] = command[at + 8 : at + 8 + length]
        at += 8 + length
    return elements


def exchange(port: int, stream: bytes, chunk: int, silent: bool) -> list[bytes]:
    """Send, and read to the end; the command sets that came back. Raises TimeoutError when the end does not come."""
    answers = b""
    with RawSender(port, timeout_s=15.0) as sender:

        def write() -> None:
            try:
                for i in range(0, len(stream), chunk):
                    sender.socket.sendall(stream[i : i + chunk])
                if not silent:
                    sender.socket.shutdown(socket.SHUT_WR)
            except OSError:  # aborted meanwhile
                pass

        writer = threading.Thread(target=write)
        writer.start()
        try:
            while part := sender.socket.recv(65536):
                answers += part
        except ConnectionError:
            pass
        writer.join()
    commands = []
    offset = 0
    while offset + 6 <= len(answers):
        kind, length = struct.unpack_from(">BxL", answers, offset)
        if kind == P_DATA_TF:
            commands.append(answers[offset + 12 : offset + 6 + length])
        offset += 6 + length
    return commands


def check_exchange(fuzzed: tuple[Receiver, Unforeseen], stream: bytes, chunk: int, silent: bool) -> None:
    running, unforeseen = fuzzed
    sent = messages_in(stream)
    for command in exchange(running.port, stream, chunk, silent):
        elements = _elements(command)
        if elements.get(0x0100) != b"\x01\x80":  # C-STORE-RSP
            continue
        status = int.from_bytes(elements[0x0900], "little")
        event(f"C-STORE answered {status:04X}")
        if status == 0:
            uid = elements[0x1000].strip(b"\0 ").decode("ascii", "replace")
            stored = {data_set_bytes(path) for path in running.store.root.glob(f"*/*/{uid}*.dcm")}
            assert stored & set(sent[uid]), f"0x0000 for {uid}, which is not on disk as it was sent"
    assert echoes(running.port)
    found, unforeseen.records = unforeseen.records, []
    assert found == []


def test_the_streams_that_are_mutated_are_valid(fuzzed: tuple[Receiver, Unforeseen]) -> None:
    answers = exchange(fuzzed[0].port, b"".join(VALID), 1 << 16, silent=False)
    assert [_elements(command)[0x0900] for command in answers] == [b"\0\0"] * 3
    assert sorted(messages_in(b"".join(VALID))) == ["1.2.3.4.0", "1.2.3.4.5"]


@cases(150, 6000)
@given(mutations=MUTATIONS, chunk=st.sampled_from([1, 7, 1000, 1 << 16]), silent=st.integers(0, 19))
def test_a_stream_of_changed_bytes_does_no_harm(
    fuzzed: tuple[Receiver, Unforeseen], mutations: list[tuple[str, int, Any]], chunk: int, silent: int
) -> None:
    check_exchange(fuzzed, mutated(b"".join(VALID), mutations), chunk, silent == 19)


@cases(100, 3000)
@given(
    order=st.lists(st.integers(0, len(VALID)), max_size=12),
    lengths=st.lists(st.tuples(_at, st.integers(0, 1 << 32 - 1)), max_size=2),
    accepted=st.booleans(),
)
def test_pdus_out_of_order_and_of_wrong_lengths_do_no_harm(
    fuzzed: tuple[Receiver, Unforeseen], order: list[int], lengths: list[tuple[int, int]], accepted: bool
) -> None:
    pdus = [(*VALID, ABORTED)[i] for i in order]
    if accepted:
        pdus.insert(0, VALID[0])
    for at, length in lengths:
        if pdus:
            pdu = pdus[at % len(pdus)]
            pdus[at % len(pdus)] = pdu[:2] + struct.pack(">L", length) + pdu[6:]
    check_exchange(fuzzed, b"".join(pdus), 1 << 16, False)


@cases(100, 3000)
@given(
    body=st.binary(max_size=400),
    kind=st.integers(0, 9),
    after=st.integers(0, 4),
    length=st.none() | st.integers(0, 900),
)
def test_arbitrary_pdus_do_no_harm(
    fuzzed: tuple[Receiver, Unforeseen], body: bytes, kind: int, after: int, length: int | None
) -> None:
    pdu = struct.pack(">BxL", kind, len(body) if length is None else length) + body
    check_exchange(fuzzed, b"".join(VALID[:after]) + pdu, 1 << 16, False)


@cases(150, 4000)
@given(
    elements=st.dictionaries(
        st.sampled_from(
            [0x0000, 0x0002, 0x0003, 0x0100, 0x0110, 0x0120, 0x0700, 0x0800, 0x0900, 0x1000, 0x1001, 0x1008]
        ),
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [
                    struct.pack("<H", n)
                    for n in (0x0001, 0x0020, 0x0021, 0x0030, 0x0FFF, 0x8001, 0x0100, 0x0130, 0x0101, 0)
                ]
            ),
            st.sampled_from(
                [CTImageStorage.encode() + b"\0", b"1.2.840.10008.1.1\0", b"1.2.3.4.0\0", b"1.2.840.10008.1.20.1"]
            ),
        ),
    ),
    command=st.sampled_from(
        [0x0001, 0x0010, 0x0020, 0x0021, 0x0030, 0x0FFF, 0x0100, 0x0110, 0x0120, 0x0130, 0x0140, 0x0150, 0x8001, 0x8030]
    ),
    context_id=st.sampled_from([1, 3, 5, 7, 9]),
    data_set=st.none() | st.binary(max_size=300),
)
def test_arbitrary_commands_do_no_harm(
    fuzzed: tuple[Receiver, Unforeseen],
    elements: dict[int, bytes],
    command: int,
    context_id: int,
    data_set: bytes | None,
) -> None:
    whole = {
        0x0002: CTImageStorage.encode() + b"\0",
        0x0100: struct.pack("<H", command),
        0x0110: struct.pack("<H", 7),
        0x0800: struct.pack("<H", 0x0101 if data_set is None else 0),
        0x1000: b"1.2.3.4.0\0",
        **elements,
    }
    encoded_command = b"".join(struct.pack("<HHL", 0, e, len(v)) + v for e, v in sorted(whole.items()))
    contexts = [
        *CONTEXTS,
        ("1.2.840.10008.1.20.1", ImplicitVRLittleEndian),  # Storage Commitment Push Model
        ("1.2.840.10008.3.1.2.3.3", ImplicitVRLittleEndian),  # Modality Performed Procedure Step
    ]
    stream = associate_rq(contexts) + p_data(pdv(context_id, COMMAND | LAST, encoded_command))
    if data_set is not None:
        stream += p_data(pdv(context_id, LAST, data_set))
    check_exchange(fuzzed, stream + RELEASE, 1 << 16, False)


@cases(100, 4000)
@given(
    mutations=MUTATIONS, syntax=st.sampled_from(["explicit", "implicit", "big", "deflated"]), cut=st.integers(1, 400)
)
def test_changed_data_sets_are_stored_as_they_came_or_refused(
    fuzzed: tuple[Receiver, Unforeseen], mutations: list[tuple[str, int, Any]], syntax: str, cut: int
) -> None:
    transfer_syntax, data_set = ENCODED[syntax]
    data = mutated(data_set, mutations)
    stream = associate_rq([(CTImageStorage, transfer_syntax)]) + p_data(
        pdv(1, COMMAND | LAST, store_command(CTImageStorage, "1.2.3.4.77", 9)),
        pdv(1, 0, data[:cut]),
        pdv(1, LAST, data[cut:]),
    )
    check_exchange(fuzzed, stream + RELEASE, 1 << 16, False)


# --- reading PDUs ----------------------------------------------------------------------------------------------------


@cases(200, 5000)
@given(
    data=st.binary(max_size=3000),
    receives=st.lists(st.integers(1, 1000), min_size=1),
    takes=st.lists(st.tuples(st.booleans(), st.integers(0, 900)), max_size=30),
    buffer=st.sampled_from([128, 512, 1 << 18]),
)
def test_bytes_come_out_of_the_reader_in_order_and_stay_while_they_are_lent(
    data: bytes, receives: list[int], takes: list[tuple[bool, int]], buffer: int
) -> None:
    lent: list[tuple[memoryview, bytes]] = []

    def reuse() -> None:
        assert all(view == copy for view, copy in lent)
        lent.clear()

    source, sizes = BytesIO(data), iter(receives * 3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receiver.upper_layer, "_BUFFER_BYTES", buffer)
        patch.setattr(receiver.upper_layer, "_LEAST_ROOM", 64)
        reader = PduReader(lambda view: source.readinto(view[: next(sizes)]), 10.0, reuse)
        out = b""
        try:
            for whole, count in takes:
                if whole:
                    taken = reader.take(count)
                    assert len(taken) == count
                else:
                    view = reader.some(count + 1)
                    taken = bytes(view)
                    lent.append((view, taken))
                    assert 1 <= len(taken) <= count + 1
                out += taken
                assert data.startswith(out)
        except EOFError:
            assert source.tell() == len(data)
            assert len(data) - len(out) < max(count + 1 for _, count in takes)
        reuse()


def test_a_trickle_within_a_pdu_is_a_stall() -> None:
    def slowly(view: memoryview) -> int:
        time.sleep(0.01)
        return 1

    reader = PduReader(slowly, 0.05)
    reader.take(3)
    reader.within()
    with pytest.raises(Stalled, match="one PDU took longer"):
        reader.take(1000)


# --- headers ---------------------------------------------------------------------------------------------------------


def encoded_in(syntax: UID, **values: Any) -> bytes:
    image = ct_slice("1.2.3", "1.2.3.4", 5.0, SOPInstanceUID="1.2.3.4.77", **values)
    item = ct_slice("1.2.3", "1.2.3.4", 6.0, PixelData=None)
    del item.file_meta
    image.ReferencedStudySequence = [item, item]
    image.file_meta.TransferSyntaxUID = syntax
    if syntax.is_encapsulated:
        image.PixelData = encapsulate([b"\xff\xd8 a code stream that nobody decodes \xff\xd9"])
        image["PixelData"].VR = "OB"
    return encoded(image)


ENCODED: dict[str, tuple[str, bytes]] = {
    name: (syntax, encoded_in(syntax))
    for name, syntax in {
        "explicit": ExplicitVRLittleEndian,
        "implicit": ImplicitVRLittleEndian,
        "big": ExplicitVRBigEndian,
        "deflated": DeflatedExplicitVRLittleEndian,
        "encapsulated": JPEG2000Lossless,
    }.items()
}


def head_or_none(data: bytes | BytesIO, syntax: str) -> Head | None:
    started = time.monotonic()
    try:
        head = read_head(data, syntax)
    except NotDicomError:
        return None
    finally:
        assert time.monotonic() - started < 5.0
    header = head.header
    for text, longest in (
        (header.sop_class_uid, 64),
        (header.sop_instance_uid, 65),
        (header.study_instance_uid, 65),
        (header.series_instance_uid, 65),
        (header.accession_number, 16),
        (header.modality, 16),
        (header.station_name, 64),
    ):
        assert len(text) <= longest
        assert text.isprintable() or not any(ord(c) < 32 or ord(c) == 127 for c in text)
        text.encode()
    return head


@pytest.mark.parametrize("name", ENCODED)
def test_what_is_mutated_can_be_read(name: str) -> None:
    syntax, data = ENCODED[name]
    header = header_from_dataset(BytesIO(data), syntax)
    assert (header.sop_instance_uid, header.station_name) == ("1.2.3.4.77", "CT-EAST")
    assert header.plane is not None


@cases(500, 20000)
@given(name=st.sampled_from(sorted(ENCODED)), mutations=MUTATIONS, prefix=_at)
def test_a_changed_header_is_read_or_refused_and_its_start_says_no_other_than_all_of_it(
    name: str, mutations: list[tuple[str, int, Any]], prefix: int
) -> None:
    syntax, data = ENCODED[name]
    data = mutated(data, mutations)
    whole, by_pydicom = head_or_none(data, syntax), head_or_none(BytesIO(data), syntax)
    if whole is not None and by_pydicom is not None:
        assert whole.header == by_pydicom.header
    start = head_or_none(data[: max(16, prefix % (len(data) + 1))], syntax)  # what is kept is not that short
    if start is not None and start.whole:
        assert whole is not None
        assert start.header == whole.header
        assert start.end == whole.end


@cases(300, 10000)
@given(syntax=st.sampled_from(TRANSFER_SYNTAXES), data=st.binary(max_size=2000))
def test_arbitrary_bytes_are_a_header_or_refused(syntax: str, data: bytes) -> None:
    head_or_none(data, syntax)


def test_a_deep_nest_of_sequences_is_refused_in_no_time() -> None:
    nest = b"\x08\x00\x06\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000
    assert head_or_none(nest, ExplicitVRLittleEndian) is None


def test_a_small_deflated_data_set_that_inflates_to_a_large_one_is_not_inflated() -> None:
    import zlib

    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(1 << 20)) for _ in range(64)) + deflater.flush()
    started = time.monotonic()
    head_or_none(bomb, DeflatedExplicitVRLittleEndian)
    assert time.monotonic() - started < 2.0


# --- command sets and File Meta --------------------------------------------------------------------------------------


@cases(500, 10000)
@given(mutations=MUTATIONS)
def test_a_changed_command_is_read_or_refused(mutations: list[tuple[str, int, Any]]) -> None:
    encoded_command = mutated(store_command(CTImageStorage, "1.2.3.4.5"), mutations)
    try:
        elements = command_elements(encoded_command)
        assert 0 <= command_field(elements) <= 0xFFFF
        request = store_request(elements, 1)
    except ValueError:
        return
    answered = command_elements(store_response(request, 0xC000, "a reason"))[0x1000].rstrip(b"\0").decode()
    assert answered == request.sop_instance_uid.replace("\ufffd", "?")
    assert len(file_meta(request, ExplicitVRLittleEndian, "CT1")) % 2 == 0


_uids = st.from_regex(r"[0-9][0-9.]{0,63}", fullmatch=True)


@cases(100, 3000)
@given(
    sop_class=_uids,
    sop_instance=_uids,
    message_id=st.integers(0, 65535),
    status=st.integers(0, 65535),
    comment=st.text(max_size=64),
)
def test_pynetdicom_reads_our_response(
    sop_class: str, sop_instance: str, message_id: int, status: int, comment: str
) -> None:
    request = store_request(command_elements(store_command(sop_class, sop_instance, message_id)), 1)
    answer = store_response(request, status, comment.encode("ascii", "replace").decode())
    message = C_STORE_RSP()
    message.encoded_command_set = BytesIO(answer)
    message.command_set = decode(BytesIO(answer), True, True)
    message.data_set = BytesIO()
    primitive: Any = message.message_to_primitive()
    assert primitive.MessageIDBeingRespondedTo == message_id
    assert (str(primitive.AffectedSOPInstanceUID), primitive.Status) == (sop_instance, status)


@cases(200, 5000)
@given(
    sop_class=_uids,
    sop_instance=_uids,
    syntax=st.sampled_from(TRANSFER_SYNTAXES),
    calling=st.from_regex(r"[ -\[\]-~]{0,16}", fullmatch=True),
)
def test_file_meta_comes_back_through_pydicom(sop_class: str, sop_instance: str, syntax: str, calling: str) -> None:
    request = store_request(command_elements(store_command(sop_class, sop_instance)), 1)
    encoded_meta = file_meta(request, syntax, calling)
    meta = dcmread(BytesIO(bytes(128) + b"DICM" + encoded_meta)).file_meta
    assert (meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID) == (sop_class, sop_instance)
    assert meta.TransferSyntaxUID == syntax
    assert str(meta.get("SourceApplicationEntityTitle") or "") == calling.strip()
    assert meta.FileMetaInformationGroupLength == len(encoded_meta) - 12

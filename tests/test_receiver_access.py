"""Who may connect and how: senders by AE title and network, TLS, limits, and what a misbehaving peer meets."""

import logging
import os
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from receiver_fakes import Receiver, association, config_under, ct_series, ct_slice, receiving, send_all
from test_receiver_scp import dcmtk

from herald.config import ReceiverConfig
from herald.errors import ConfigError
from receiver.access import AllowedSenders, tls_context
from receiver.command import StoreRequest, command_elements, store_request
from receiver.upper_layer import PduReader, Stalled

CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


# --- senders ---


@pytest.mark.parametrize(
    ("entry", "ae_title", "address", "allowed"),
    [
        ("CT1", "CT1", "10.9.9.9", True),
        ("CT1", "CT2", "10.9.9.9", False),
        ("CT1@10.0.0.0/24", "CT1", "10.0.0.7", True),
        ("CT1@10.0.0.0/24", "CT1", "10.0.1.7", False),
        ("CT1@10.0.0.0/24", "CT2", "10.0.0.7", False),
        ("CT1@10.0.0.5/24", "CT1", "10.0.0.7", True),  # host bits are forgiven
        ("*@10.0.0.5", "ANY", "10.0.0.5", True),
        ("*@10.0.0.5", "ANY", "::ffff:10.0.0.5", True),  # IPv4 as a listener on :: sees it
        ("*@10.0.0.5", "ANY", "10.0.0.6", False),
        ("*@fe80::/10", "ANY", "fe80::1", True),
        ("*@fe80::/10", "ANY", "no address", False),
        ("*", "ANY", "10.0.0.6", True),
    ],
)
def test_a_sender_is_allowed_by_title_and_network(entry: str, ae_title: str, address: str, allowed: bool) -> None:
    assert AllowedSenders(["OTHER@192.0.2.1", entry])(ae_title, address) is allowed


def test_an_empty_list_allows_all() -> None:
    assert AllowedSenders([])("ANY", "10.0.0.1")


@pytest.mark.parametrize("entry", ["", "@10.0.0.0/8", "CT1@ten", "CT1@10.0.0.0/99", "A" * 17, "A\\B"])
def test_an_entry_that_is_no_sender_is_named_with_the_form_that_is_wanted(entry: str) -> None:
    with pytest.raises(ConfigError, match=r"receiver\.allowed_senders: .* write CT1, CT1@10\.0\.0\.0/24"):
        AllowedSenders([entry])


def test_a_title_from_a_wrong_address_is_refused_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        receiving(config_under(tmp_path, allowed_senders=("CT1@192.0.2.0/24",))) as receiver,
        association(receiver.port) as assoc,
    ):
        assert not assoc.is_established
    assert "refused the association of CT1 (127.0.0.1) calling HERALD: it is not in receiver.allowed_senders" in (
        caplog.text
    )


def test_whoever_calls_another_title_is_refused_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    echoscu = dcmtk("echoscu")
    with receiving(config_under(tmp_path, require_called_ae_title=True)) as receiver:
        for called, status in (("WRONG", 1), ("HERALD", 0)):
            done = subprocess.run([echoscu, "-aec", called, "127.0.0.1", str(receiver.port)], check=False, timeout=30)
            assert done.returncode == status
    assert "calling WRONG: it calls another AE title than receiver.ae_title" in caplog.text


# --- TLS ---


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a certificate of the receiver and one of a sender, as PEM files."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    # ruff: noqa: SIM905 - command lines read better as such
    openssl(*"req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=authority -days 2".split())
    for name in ("receiver", "sender"):
        openssl(*f"req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}".split())
        openssl(*f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2".split())
    return folder


@contextmanager
def receiving_tls(folder: Path, certificates: Path, **settings: object) -> Iterator[tuple[Receiver, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = config_under(
        folder,
        tls_port=port,
        tls_certificate=str(certificates / "receiver.pem"),
        tls_key=str(certificates / "receiver.key"),
        **settings,
    )
    with receiving(config) as receiver:
        yield receiver, port


def storescu_tls(port: int, certificates: Path, files: list[Path], as_sender: bool) -> int:
    identity = ["+tls", str(certificates / "sender.key"), str(certificates / "sender.pem")] if as_sender else ["+tla"]
    done = subprocess.run(
        [dcmtk("storescu"), *identity, "+cf", str(certificates / "ca.pem"), "127.0.0.1", str(port), *map(str, files)],
        env={**os.environ, "TCP_NODELAY": "1"},
        check=False,
        capture_output=True,
        timeout=60,
    )
    return done.returncode


def part10_files(folder: Path, count: int) -> list[Path]:
    files = []
    for i, image in enumerate(ct_series(count)):
        files.append(folder / f"{i}.dcm")
        image.save_as(files[-1], enforce_file_format=True)
    return files


def test_dcmtk_sends_a_series_over_tls_while_the_plain_port_stays_open(tmp_path: Path, certificates: Path) -> None:
    with receiving_tls(tmp_path, certificates) as (receiver, port):
        assert storescu_tls(port, certificates, part10_files(tmp_path, 12), as_sender=False) == 0
        (event,) = receiver.bus.wait_for(1)
        assert (event.instance_count, event.close_reason) == (12, "released-and-even")
        assert send_all(receiver.port, ct_series(2)) == [0, 0]


def test_a_sender_without_a_certificate_of_the_authority_is_kept_out(
    tmp_path: Path, certificates: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = part10_files(tmp_path, 8)
    with receiving_tls(tmp_path, certificates, tls_client_ca=str(certificates / "ca.pem")) as (receiver, port):
        assert storescu_tls(port, certificates, files, as_sender=False) != 0
        assert list(receiver.store.all_instances()) == []
        assert storescu_tls(port, certificates, files, as_sender=True) == 0
        assert len(list(receiver.store.all_instances())) == 8
    assert "the connection of an unknown sender (127.0.0.1) broke" in caplog.text


def test_a_handshake_that_stalls_holds_up_nobody_else(tmp_path: Path, certificates: Path) -> None:
    with (
        receiving_tls(tmp_path, certificates) as (_, port),
        socket.create_connection(("127.0.0.1", port)),
    ):
        assert storescu_tls(port, certificates, part10_files(tmp_path, 1), as_sender=False) == 0


def test_an_old_tls_version_is_not_spoken(tmp_path: Path, certificates: Path) -> None:
    context = tls_context(
        ReceiverConfig(
            tls_certificate=str(certificates / "receiver.pem"), tls_key=str(certificates / "receiver.key"), tls_port=1
        )
    )
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"receiver\.tls_certificate and receiver\.tls_key are needed"),
        ({"tls_certificate": "none.pem", "tls_key": "none.key"}, r"none\.pem .* cannot be used"),
        ({"tls_certificate": "receiver.pem", "tls_key": "sender.key"}, "belong together"),
        ({"tls_certificate": "receiver.pem", "tls_key": "receiver.key", "tls_client_ca": "no.pem"}, r"tls_client_ca"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_named(certificates: Path, settings: dict[str, str], message: str) -> None:
    files = {key: str(certificates / value) for key, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        tls_context(ReceiverConfig(tls_port=2762, **files))  # type: ignore[arg-type]


# --- limits ---


def associate(port: int) -> socket.socket:
    """A raw connection on which an association for CT in Explicit VR is established, context 1."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BxH", kind, len(content)) + content

    context = item(0x20, b"\x01\0\0\0" + item(0x30, CT.encode()) + item(0x40, EXPLICIT.encode()))
    user = item(0x50, item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3"))
    body = struct.pack(">HH", 1, 0) + b"HERALD".ljust(16) + b"RAW".ljust(16) + bytes(32)
    body += item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    connection.sendall(struct.pack(">BxL", 1, len(body)) + body)
    answer = connection.recv(4096)
    assert answer[0] == 2, answer
    return connection


def until_closed(connection: socket.socket) -> bytes:
    """What still comes before the peer closes."""
    received = b""
    while part := connection.recv(4096):
        received += part
    return received


A_ABORT = b"\x07\0\0\0\0\4"


def test_a_pdu_longer_than_agreed_aborts_its_association(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        receiving(config_under(tmp_path, max_pdu_bytes=16384)) as receiver,
        associate(receiver.port) as connection,
    ):
        connection.sendall(struct.pack(">BxL", 4, 16385) + bytes(100))
        assert until_closed(connection).startswith(A_ABORT)
    assert "a PDU of 16385 bytes came where receiver.max_pdu_bytes is 16384" in caplog.text
    assert "RAW (127.0.0.1) violates the protocol" in caplog.text


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "PDU type 0x47 is unknown"),
        (struct.pack(">BxL", 1, 1 << 30), "claims 1073741824 bytes"),
        (struct.pack(">BxLLBB", 4, 6, 2, 9, 3), "context 9, which was not accepted"),
        (struct.pack(">BxLLBB", 4, 6, 2, 1, 2), "a data set came in presentation context 1"),
        (struct.pack(">BxLLBB", 4, 6, 99, 1, 3), "claims 99 bytes"),
        (struct.pack(">BxLL", 4, 4, 0), "cut off"),
        (struct.pack(">BxLLBB", 4, 6, 2, 1, 3), "element (0000,0100) must be one unsigned short"),
    ],
)
def test_what_violates_the_protocol_is_aborted_with_the_reason_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        with associate(receiver.port) as connection:
            connection.sendall(sent)
            assert until_closed(connection).startswith(A_ABORT)
        assert send_all(receiver.port, [ct_slice("1.2.3", "1.2.3.4", 0.0)]) == [0]
    assert reason in caplog.text
    assert "nobody foresaw" not in caplog.text


@pytest.mark.parametrize(
    ("sent", "reason"),
    [(b"", "nothing came for 0.5 s"), (struct.pack(">BxL", 4, 1000) + b"\0\0", "nothing more came within a PDU")],
)
def test_a_silent_peer_is_aborted_and_its_thread_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, sent: bytes, reason: str
) -> None:
    with (
        receiving(config_under(tmp_path, network_timeout_s=0.5)) as receiver,
        associate(receiver.port) as connection,
    ):
        connection.sendall(sent)
        assert until_closed(connection).startswith(A_ABORT)
    assert f"RAW (127.0.0.1): {reason}" in caplog.text


def test_a_pdu_that_trickles_in_has_no_more_time_than_one_that_stalls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        receiving(config_under(tmp_path, network_timeout_s=0.5)) as receiver,
        associate(receiver.port) as connection,
    ):
        connection.sendall(struct.pack(">BxLLBB", 4, 1000, 996, 1, 3))
        started = time.monotonic()
        with suppress(ConnectionError):  # the peer closes on us
            while time.monotonic() - started < 10.0:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 5.0
    assert "one PDU took longer than 0.5 s" in caplog.text


def test_connections_far_beyond_the_limit_are_closed_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with receiving(config_under(tmp_path, max_associations=2)) as receiver:
        silent = [socket.create_connection(("127.0.0.1", receiver.port), timeout=10) for _ in range(2 + 32)]
        with socket.create_connection(("127.0.0.1", receiver.port), timeout=10) as one_more:
            assert one_more.recv(1) == b""
        for connection in silent:
            connection.close()
    assert "closed the connection of 127.0.0.1 at once: 34 are open already" in caplog.text


# --- the hot path against pynetdicom ---

uids = st.from_regex(r"(0|[1-9][0-9]{0,9})(\.(0|[1-9][0-9]{0,9})){1,4}", fullmatch=True)


@given(sop_class=uids, sop_instance=uids, message_id=st.integers(0, 65535))
def test_a_request_reads_as_pynetdicom_writes_it(sop_class: str, sop_instance: str, message_id: int) -> None:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = message_id, 0
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = sop_class, sop_instance  # type: ignore[assignment]
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    encoded = b"".join(pdv[1][1:] for pdata in message.encode_msg(1, 0) for pdv in pdata.presentation_data_value_list)
    request = store_request(command_elements(encoded), 1)
    assert request == StoreRequest(1, message_id, sop_class, sop_instance, has_data_set=False)


@given(encoded=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_command_or_a_value_error(encoded: bytes) -> None:
    with suppress(ValueError):
        store_request(command_elements(encoded), 1)


def test_a_reader_says_how_long_it_waited() -> None:
    def silent(view: memoryview) -> int:
        raise TimeoutError

    with pytest.raises(Stalled, match="nothing came for 3 s"):
        PduReader(silent, 3.0).take(1)

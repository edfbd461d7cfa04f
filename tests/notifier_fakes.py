"""What the notifier's tests share: an event, a configuration, and real SMTP, HTTP and MLLP servers on loopback."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from hl7apy.core import Message as Hl7Message  # type: ignore[import-untyped]
from hl7apy.mllp import AbstractHandler, MLLPServer  # type: ignore[import-untyped]
from hl7apy.parser import parse_message  # type: ignore[import-untyped]

from herald.config import Config, NotifierConfig, WebuiConfig
from herald.events import Finding, Label, SeriesTriaged

NOON = datetime(2026, 3, 29, 12, 0, tzinfo=UTC)

FINDINGS = (
    Finding("any", 0.971, 12.34, 14, "1.2.3.4.14"),
    Finding("iph", 0.953, 11.8, 14, "1.2.3.4.14"),
    Finding("sah", 0.61, 0.5, 9, "1.2.3.4.9"),
    Finding("ivh", 0.12, 0.0, 3, "1.2.3.4.3"),
)


def triaged(
    disposition: str = "positive", study: str = "1.2.3", series: str = "1.2.3.4", revision: int = 1, **changes: Any
) -> SeriesTriaged:
    event = SeriesTriaged(
        study_instance_uid=study,
        series_instance_uid=series,
        revision=revision,
        occurred_at=NOON,
        disposition=disposition,  # type: ignore[arg-type]
        protocol={"contrast": Label("non_contrast", 0.99), "kernel": Label("soft", 0.97)},
        findings=FINDINGS if disposition == "positive" else (),
        accession_number="ACC20260329",
        scanner="CT-EAST",
        calling_ae_title="EAST1",
        slice_count=32,
        last_image_at=datetime(2026, 3, 29, 1, 15, 30, tzinfo=UTC),
    )
    return replace(event, **changes)


def configured(**notifier: Any) -> Config:
    return Config(
        notifier=NotifierConfig(**notifier),
        webui=WebuiConfig(token="token-for-tests", secret_key="key-for-tests", public_url="https://herald.example"),
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Mailbox:
    """An aiosmtpd handler: keeps accepted e-mails; `answers` replaces the reply at a stage (MAIL, RCPT, DATA, QUIT)."""

    def __init__(self) -> None:
        self.emails: list[EmailMessage] = []
        self.encrypted: list[bool] = []
        self.answers: dict[str, str] = {}
        self.arrived = threading.Event()

    async def handle_MAIL(self, _server: Any, _session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802
        if "MAIL" in self.answers:
            return self.answers["MAIL"]
        envelope.mail_from = address
        return "250 OK"

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, options: Any) -> str:  # noqa: N802
        if "RCPT" in self.answers:
            return self.answers["RCPT"]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        if "DATA" in self.answers:
            return self.answers["DATA"]
        self.emails.append(BytesParser(policy=default).parsebytes(envelope.content))  # type: ignore[arg-type]
        self.encrypted.append(session.ssl is not None)
        self.arrived.set()
        return "250 accepted"

    async def handle_QUIT(self, _server: Any, _session: Any, _envelope: Any) -> str:  # noqa: N802
        return self.answers.get("QUIT", "221 Bye")


@contextmanager
def smtp_server(mailbox: Mailbox, port: int, **options: Any) -> Iterator[None]:
    controller = Controller(mailbox, hostname="127.0.0.1", port=port, **options)
    controller.start()
    try:
        yield
    finally:
        controller.stop()


class HttpServer:
    """A real HTTP server that keeps what it was sent and answers `status`."""

    def __init__(self, port: int = 0) -> None:
        self.status = 204
        self.arrived = threading.Event()
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.command, self.path, dict(self.headers), body))
                self.send_response(outer.status)
                if outer.status == 302:
                    self.send_header("Location", "/login")
                self.send_header("Content-Length", "0")
                self.end_headers()
                outer.arrived.set()

            do_PUT = do_POST = do_GET = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class MllpListener:
    """A real MLLP listener that keeps the results it was sent, as ER7, and answers `code`, or `answer` where set."""

    def __init__(self) -> None:
        self.code = "AA"
        self.about: str | None = None
        self.answer: str | None = None
        self.messages: list[str] = []
        outer = self

        class Handler(AbstractHandler):  # type: ignore[misc]
            def reply(self) -> str:
                outer.messages.append(self.incoming_message)
                return outer.answer if outer.answer is not None else outer.acknowledgement(self.incoming_message)

        self._server = MLLPServer("127.0.0.1", 0, {"ORU^R01^ORU_R01": (Handler,)})
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def acknowledgement(self, message: str) -> str:
        """ACK^R01 with an ERR segment unless it accepts."""
        ack = Hl7Message("ACK", version="2.5")
        ack.msh.msh_9, ack.msh.msh_10, ack.msh.msh_11 = "ACK^R01^ACK", "1", "P"
        ack.msa.msa_1 = self.code
        ack.msa.msa_2 = self.about or parse_message(message).msh.msh_10.to_er7()
        if self.code not in ("AA", "CA"):
            ack.err.err_3, ack.err.err_4, ack.err.err_8 = "204", "E", "no such order"
        framed: str = ack.to_mllp()
        return framed

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

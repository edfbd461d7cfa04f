"""An SMTP server that keeps what it accepts in memory, so that a demonstration's page crosses a real SMTP session."""

import threading
from dataclasses import dataclass
from email import message_from_bytes
from email.policy import default

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


@dataclass(frozen=True)
class AcceptedMail:
    """One accepted message."""

    to: str
    subject: str
    body: str


class SmtpSink:
    """Accepts every message on loopback; `messages` is what came so far."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = port
        self._messages: list[AcceptedMail] = []
        self._arrived = threading.Condition()
        self._controller = Controller(self, hostname=host, port=port, ready_timeout=10)

    def start(self) -> "SmtpSink":
        """Listen."""
        self._controller.start()
        return self

    @property
    def messages(self) -> list[AcceptedMail]:
        """Accepted so far."""
        with self._arrived:
            return list(self._messages)

    def wait_for(self, count: int, timeout_s: float) -> bool:
        """Wait until `count` messages have come; False when they did not in time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: len(self._messages) >= count, timeout_s)

    def stop(self) -> None:
        """Stop listening."""
        self._controller.stop()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's
        """Keep one message; aiosmtpd calls this at the end of DATA."""
        content = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        message = message_from_bytes(content, policy=default)
        body = message.get_body(("plain",))
        text = body.get_content() if body is not None else ""
        with self._arrived:
            self._messages.append(AcceptedMail(", ".join(envelope.rcpt_tos), str(message["Subject"]), text.strip()))
            self._arrived.notify_all()
        return "250 Message accepted"

"""Results to a RIS: an ORU^R01 of HL7 v2.5 over MLLP, preliminary, filed by its accession number."""

import math
import socket
import time
from datetime import UTC, datetime
from urllib.parse import urlsplit

from hl7apy.core import Group  # type: ignore[import-untyped]
from hl7apy.core import Message as Hl7Message
from hl7apy.parser import parse_message  # type: ignore[import-untyped]

from herald.config import NotifierConfig
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import Finding, SeriesTriaged, utc_now
from notifier.channels import Message
from notifier.message import WORDS

TIMEOUT_S = 10.0
"""To connect, and for the whole answer."""
LONGEST_ANSWER = 1 << 16
START, END = b"\x0b", b"\x1c\r"  # MLLP release 1
CODING = "99HERALD"  # a local coding system (HL7 table 0396)
SERVICE = f"HERALDICH^Intracranial haemorrhage triage (AI)^{CODING}"
NOBODY = "^^^^^^U"  # name type code U: unspecified (HL7 table 0200)

_ESCAPED = {"\\": "\\E\\", "|": "\\F\\", "^": "\\S\\", "&": "\\T\\", "~": "\\R\\"}


class Hl7Channel:
    """One listener, HOST:PORT, each message on a connection of its own."""

    def __init__(self, to: str, config: NotifierConfig) -> None:
        try:
            parts = urlsplit(f"//{to}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or not port or parts.netloc != to or "@" in to:
            raise ConfigError(f"notifier.steps.to {to!r} is not an HL7 listener; use HOST:PORT, as in ris.example:2575")
        self.recipient = to
        self._address = (host, port)
        self._receiver = config.hl7_receiver

    def send(self, message: Message) -> None:
        """Return when the listener has answered AA or CA.

        Raises ChannelRefused for AE, AR, CE and CR with the listener's words, and for a result without an accession
        number, by which alone it can be filed; ChannelUnavailable where there is no answer or not one to this message.
        """
        if message.event is not None and not message.event.accession_number.strip():
            raise ChannelRefused(
                f"{self.recipient} was not asked: the series has no accession number, without which a RIS cannot file "
                "a result; check AccessionNumber in what the scanner sends"
            )
        sent = result_message(message, self._receiver)
        try:
            answer = self._exchange(START + sent.to_er7().encode() + b"\r" + END)
        except OSError as error:
            raise ChannelUnavailable(
                f"the HL7 listener {self.recipient} gave no answer: {error or type(error).__name__}; "
                "check notifier.steps.to and that the listener runs"
            ) from error
        self._judge(answer, control_id(message))

    def _exchange(self, framed: bytes) -> bytes:
        """The bytes between start and end of the answer; raises OSError."""
        ends_at = time.monotonic() + TIMEOUT_S
        with socket.create_connection(self._address, TIMEOUT_S) as connection:
            connection.sendall(framed)
            answer = b""
            while END not in answer and len(answer) < LONGEST_ANSWER:
                connection.settimeout(max(ends_at - time.monotonic(), 0.001))
                part = connection.recv(4096)
                if not part:
                    raise ConnectionError("the connection was closed before the end of an answer")
                answer += part
        return answer.partition(START)[2].partition(END)[0]

    def _judge(self, answer: bytes, sent_id: str) -> None:
        try:
            parsed = parse_message(answer.decode("utf-8", "replace").strip(), find_groups=False)
            code, about = parsed.msa.msa_1.to_er7(), parsed.msa.msa_2.to_er7()
            words = " ".join(segment.to_er7() for name in ("msa", "err") for segment in getattr(parsed, name))
        except Exception as error:  # hl7apy raises what it comes upon in a damaged message
            raise ChannelUnavailable(
                f"the HL7 listener {self.recipient} answered what is no HL7 acknowledgement: {type(error).__name__}; "
                "check that notifier.steps.to is the port for results"
            ) from error
        if about != sent_id or code not in ("AA", "CA", "AE", "AR", "CE", "CR"):
            raise ChannelUnavailable(
                f"the HL7 listener {self.recipient} answered {code or 'nothing'} to message {about or 'none'} instead "
                f"of {sent_id}; check the listener's log"
            )
        if code not in ("AA", "CA"):
            raise ChannelRefused(
                f"the HL7 listener {self.recipient} answered {code}: {words[:300]}; check the interface's log and "
                "notifier.hl7_receiver"
            )


def control_id(message: Message) -> str:
    """MSH-10 from the page's id, so that a message sent again is the same message (at most 20 characters)."""
    return message.page_id.replace("-", "")[:20]


def result_message(message: Message, receiver: str) -> Hl7Message:
    """The message: without identity in PID, the accession number in OBR-2 and OBR-3, an OBX for each number and line.

    A message without an event, as for a test, is for training (MSH-11) and has no order.
    """
    event = message.event
    hl7 = Hl7Message("ORU_R01", version="2.5")
    msh = hl7.msh
    msh.msh_3, msh.msh_5 = "HERALD", _escape(receiver)
    msh.msh_7, msh.msh_9, msh.msh_10 = _time(utc_now()), "ORU^R01^ORU_R01", control_id(message)
    msh.msh_11, msh.msh_12, msh.msh_18 = ("P" if event else "T"), "2.5", "UNICODE UTF-8"
    result = hl7.add_group("ORU_R01_PATIENT_RESULT")
    patient = result.add_group("ORU_R01_PATIENT").pid
    patient.pid_1, patient.pid_3, patient.pid_5 = "1", '""', NOBODY
    order = result.add_group("ORU_R01_ORDER_OBSERVATION")
    order.obr.obr_1, order.obr.obr_4 = "1", SERVICE
    order.obr.obr_25 = "P"  # preliminary: a radiologist has not read it
    if event is not None:
        order.obr.obr_2 = order.obr.obr_3 = _escape(event.accession_number.strip())
        order.obr.obr_22 = _time(event.occurred_at)
        order.obr.obr_24 = "CT"
        if event.last_image_at is not None:
            order.obr.obr_7 = _time(event.last_image_at)
        _add_findings(order, event)
    for line in message.body.splitlines():
        if line.strip():
            _observe(order, "TX", f"TEXT^Text^{CODING}", _escape(line))
    return hl7


def _add_findings(order: Group, event: SeriesTriaged) -> None:
    """Probability, volume and key slice of each; the sub-id (OBX-4) keeps those of one finding together."""
    for number, finding in enumerate(event.findings, 1):
        flag = "A" if finding.kind == "any" and event.disposition == "positive" else ""
        name = _escape(WORDS.get(finding.kind, finding.kind))
        code = _escape(finding.kind.upper())
        for suffix, label, unit, value, abnormal in _numbers(finding, flag):
            identifier = f"{code}_{suffix}^{name}, {label}^{CODING}"
            _observe(order, "NM", identifier, value, sub_id=str(number), unit=unit, flag=abnormal)


def _numbers(finding: Finding, flag: str) -> list[tuple[str, str, str, str, str]]:
    numbers = [("PROBABILITY", "probability", "", f"{finding.probability:.4f}", flag)]
    if math.isfinite(finding.volume_ml):
        numbers.append(("VOLUME", "volume", "mL^millilitre^UCUM", f"{finding.volume_ml:.2f}", ""))
    return [*numbers, ("SLICE", "key slice", "", str(finding.slice), "")]


def _observe(
    order: Group, kind: str, identifier: str, value: str, *, sub_id: str = "", unit: str = "", flag: str = ""
) -> None:
    obx = order.add_group("ORU_R01_OBSERVATION").obx
    obx.obx_1 = str(len(order.oru_r01_observation))
    obx.obx_2, obx.obx_3, obx.obx_5 = kind, identifier, value
    for field, content in (("obx_4", sub_id), ("obx_6", unit), ("obx_8", flag)):
        if content:
            setattr(obx, field, content)
    obx.obx_11 = "P"


def _escape(text: str) -> str:
    """HL7 v2.5 2.7: delimiters escaped, control characters left out."""
    return "".join(_ESCAPED.get(c, c) for c in text if c.isprintable())


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y%m%d%H%M%S}+0000"

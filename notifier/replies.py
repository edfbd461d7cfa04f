"""Answers to a page by e-mail: an SMTP server that passes them to the web UI as acknowledgements.

The hospital's mail system routes `notifier.reply_address` here. What counts is the signed token of the page, which is
in the address that the page was sent from for replies, and in its text; In-Reply-To proves nothing. The words of an
answer are not read: any answer of a person means that the page was seen, also one that says "not me". What a machine
sends on its own (RFC 3834: absence notes, bounces, receipts) acknowledges nothing.

250 means that the acknowledgement is in the ledger. While that cannot be said the answer is 451, and the sender's mail
system tries again; 550 comes back to the sender with what to do instead.
"""

import asyncio
import logging
import re
import threading
from collections.abc import Iterator
from email import message_from_bytes
from email.errors import MessageError
from email.message import EmailMessage
from email.policy import default
from email.utils import parseaddr
from urllib.parse import urlsplit

import requests
from aiosmtpd.smtp import SMTP, Envelope, Session

from herald.config import Config, required_secret
from herald.errors import ChannelUnavailable, ConfigError, LedgerError, LinkError
from herald.ledger import Ledger
from herald.links import TOKEN_LENGTH, ReviewLink, follow_link, reply_token

log = logging.getLogger(__name__)

LARGEST_MESSAGE_BYTES = 10 << 20
"""An answer quotes the page, its picture and the logo of a signature."""
IDLE_S = 60.0
TIMEOUT_S = (3.0, 10.0)
"""To connect to the web UI, and to wait for its answer."""
MOST_TOKENS = 8
"""References that are tried in one message; more are no answer to a page."""

_TOKEN = re.compile(rf"(?<![A-Za-z0-9])[A-Za-z2-7]{{{TOKEN_LENGTH}}}(?![A-Za-z0-9])")


def serve_replies(config: Config, stop: threading.Event) -> None:
    """Take answers to pages until `stop` is set.

    Raises ConfigError when `notifier.reply_address` is no address, the port cannot be listened on, or a secret is
    missing.
    """
    replies = Replies(config)
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # aiosmtpd's own, which would write down tokens
    try:
        asyncio.run(_serve(config, replies, stop))
    finally:
        replies.close()


async def _serve(config: Config, replies: "Replies", stop: threading.Event) -> None:
    host, port = config.notifier.reply_host, config.notifier.reply_port

    def session() -> SMTP:
        return _Smtp(
            replies,
            data_size_limit=LARGEST_MESSAGE_BYTES,
            enable_SMTPUTF8=True,
            hostname=replies.domain,
            ident="Herald",
            timeout=IDLE_S,
        )

    try:
        server = await asyncio.get_running_loop().create_server(session, host, port)
    except OSError as error:
        raise ConfigError(
            f"replies by e-mail cannot be taken on {host}:{port}: {error.strerror}; "
            "change notifier.reply_host or notifier.reply_port, or stop what listens there"
        ) from error
    log.info("replies to %s are taken on %s:%d", replies.address, host, port)
    async with server:
        await asyncio.to_thread(stop.wait)


class _Smtp(SMTP):
    """Takes lines longer than RFC 5321 4.5.3.1.6 asks for: some mail systems pass on what a browser wrote."""

    line_length_limit = 1 << 20


class Replies:
    """The handler that aiosmtpd calls; each of its answers is one line of SMTP."""

    def __init__(self, config: Config) -> None:
        """Connects to nothing; raises ConfigError when a setting or secret is missing."""
        self.address = config.notifier.reply_address
        local, _, self.domain = self.address.rpartition("@")
        if parseaddr(self.address)[1] != self.address or not (local and self.domain):
            raise ConfigError(f"notifier.reply_address {self.address!r} is not one address; use NAME@DOMAIN")
        self._subaddress = re.compile(rf"{re.escape(local)}\+.*@{re.escape(self.domain)}", re.IGNORECASE)
        required_secret(config.webui.secret_key, "webui.secret_key")
        self._token = required_secret(config.webui.token, "webui.token")
        self._config = config
        self._webui = config.notifier.webui_url.rstrip("/")
        self._ledger = Ledger(config.ledger)

    def close(self) -> None:
        """Let go of the ledger."""
        self._ledger.close()

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Take mail for the reply address, with or without a token, and for nobody else."""
        if address.lower() != self.address.lower() and not self._subaddress.fullmatch(address):
            return f"550 5.1.1 There is no such mailbox: only {self.address} is answered here"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        """Acknowledge the page that is answered, and say what became of it."""
        return await asyncio.to_thread(self._answer, envelope)

    async def handle_exception(self, error: Exception) -> str:
        """An error that nobody foresaw: the sender's mail system tries again."""
        log.error("a reply could not be handled", exc_info=error)
        return "451 4.3.0 Nothing was acknowledged: an error within Herald, see the log of the notifier"

    def _answer(self, envelope: Envelope) -> str:
        content = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        message = message_from_bytes(content, policy=default)
        sign = automatic(envelope.mail_from or "", message)
        if sign:
            log.warning("an automatic e-mail to %s acknowledges nothing (%s)", self.address, sign)
            return f"550 5.7.1 Nothing was acknowledged: only a person can, and this e-mail is automatic ({sign})"
        try:
            link = self._link(envelope, message)
        except LinkError as error:
            log.warning("an e-mail to %s acknowledges nothing: %s", self.address, error)
            return f"550 5.7.1 Nothing was acknowledged: {error}"
        except LedgerError as error:
            log.error("a reply waits for the ledger: %s", error)
            return "451 4.3.0 Nothing was acknowledged yet: the ledger cannot be reached"
        reader = f"e-mail reply ({_masked(message, envelope)})"
        try:
            self._acknowledge(link, reader)
        except ChannelUnavailable as error:
            log.error("a reply waits for the web UI: %s", error)
            return "451 4.4.1 Nothing was acknowledged yet: the web UI does not take it"
        log.info("study %s was acknowledged by %s", link.study_instance_uid, reader)
        return "250 2.0.0 Acknowledged"

    def _link(self, envelope: Envelope, message: EmailMessage) -> ReviewLink:
        """What the first good token of the message stands for; raises LinkError with the reason of the last bad one."""
        tokens = [token for to in envelope.rcpt_tos if (token := reply_token(self.address, to))]
        tokens += [token for text in _texts(message) for token in _TOKEN.findall(text)]
        refused = LinkError(
            "it names no page: answer the page itself and leave its text below your answer, or open its link"
        )
        with self._ledger.read() as connection:
            for token in list(dict.fromkeys(token.lower() for token in tokens))[:MOST_TOKENS]:
                try:
                    return follow_link(self._config.webui, connection, token)
                except LinkError as error:
                    refused = error
        raise refused

    def _acknowledge(self, link: ReviewLink, reader: str) -> None:
        """Return when the web UI has recorded it; raises ChannelUnavailable."""
        url = f"{self._webui}/api/acknowledgements/{link.series_instance_uid}/{link.revision}"
        try:
            response = requests.post(
                url,
                json={"reader": reader},
                auth=self._authorize,
                timeout=TIMEOUT_S,
                # an internal address: a proxy for the internet must not come between
                proxies={"no_proxy": urlsplit(self._webui).hostname or ""},
                allow_redirects=False,
            )
        except (requests.RequestException, ValueError) as error:
            raise ChannelUnavailable(
                f"the web UI {self._webui} cannot be reached: {error}; check notifier.webui_url and that it runs"
            ) from error
        if response.status_code != 200:
            raise ChannelUnavailable(
                f"{url} answered {response.status_code} {response.reason}: {response.text[:200].strip()}"
            )

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As `auth`, not as a plain header, which a .netrc entry would replace."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def automatic(mail_from: str, message: EmailMessage) -> str:
    """The sign that a machine wrote the message on its own (RFC 3834), or nothing."""
    if not mail_from.strip("<> "):
        return "empty MAIL FROM"
    if mail_from.partition("@")[0].lower() in ("mailer-daemon", "postmaster"):
        return "from a mail system"
    said = _header(message, "Auto-Submitted")
    if said and said.partition(";")[0].strip().lower() != "no":
        return f"Auto-Submitted: {said[:40]}"
    # what responders older than RFC 3834 write
    said = _header(message, "Precedence").lower()
    if said in ("bulk", "junk", "auto_reply"):
        return f"Precedence: {said}"
    for name in ("X-Autoreply", "X-Autorespond", "X-Auto-Reply"):
        if _header(message, name):
            return name
    # delivery and disposition notifications (RFC 6522)
    return "multipart/report" if message.get_content_type() == "multipart/report" else ""


def _header(message: EmailMessage, name: str) -> str:
    """A header as one printable ASCII line; one that cannot be parsed counts as there."""
    try:
        value = str(message.get(name, ""))
    except (MessageError, ValueError, IndexError, AttributeError):  # the parser's, for headers beyond its grammar
        return "unreadable"
    return _ascii(value)


def _texts(message: EmailMessage) -> Iterator[str]:
    """Subject and text parts; what cannot be decoded is passed over."""
    yield _header(message, "Subject")
    for part in message.walk():
        if part.get_content_maintype() == "text" and not part.is_attachment():
            content = part.get_payload(decode=True)
            yield content.decode("ascii", "replace") if isinstance(content, bytes) else ""


def _masked(message: EmailMessage, envelope: Envelope) -> str:
    """The sender's address, enough for colleagues to know who it was: k...@hospital.example."""
    address = parseaddr(_header(message, "From"))[1] or _ascii(envelope.mail_from or "")
    local, _, domain = address.rpartition("@")
    return f"{local[:1]}...@{domain}" if local else "unknown sender"


def _ascii(text: str) -> str:
    return "".join(c if c.isascii() and c.isprintable() else " " for c in text).strip()

"""Pages by e-mail: text, and the same as HTML with the key slice in it."""

import contextlib
import smtplib
import ssl
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import format_datetime, getaddresses, parseaddr
from html import escape

from herald.config import NotifierConfig
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import utc_now
from herald.links import TOKEN_LENGTH, reply_address
from notifier.channels import Message
from notifier.message import LINK_INTRODUCTION

LONGEST_LOCAL_PART = 64 - 1 - TOKEN_LENGTH
"""Octets of notifier.reply_address before the @ that leave room for a token (RFC 5321 4.5.3.1.1)."""


class SmtpChannel:
    """One e-mail address, reached over the SMTP server of `[notifier]`."""

    def __init__(self, to: str, config: NotifierConfig) -> None:
        self.recipient = _address(to, "notifier.steps.to")
        self._sender = _address(config.sender, "notifier.sender")
        self._domain = parseaddr(self._sender)[1].rpartition("@")[2] or "localhost"
        self._server = f"SMTP server {config.smtp_host}:{config.smtp_port}"
        self._config = config
        if config.smtp_tls and config.smtp_starttls:
            raise ConfigError(
                "notifier.smtp_tls and notifier.smtp_starttls exclude each other: the first encrypts from the first "
                "byte (usually port 465), the second after a greeting (usually port 587); set one of them to false"
            )
        if config.reply_address and len(_reply_local_part(config.reply_address).encode()) > LONGEST_LOCAL_PART:
            raise ConfigError(
                f"notifier.reply_address {config.reply_address!r} leaves no room for a token: use an address with at "
                f"most {LONGEST_LOCAL_PART} characters before the @"
            )

    def send(self, message: Message) -> None:
        """Return when the server has accepted the e-mail (250 after DATA).

        Raises ChannelUnavailable on connection problems and 4xx replies, ChannelRefused on 5xx replies, a
        certificate that does not verify and a server without the STARTTLS or AUTH that was asked for.
        """
        try:
            email = self.compose(message)
            smtp = self._connect()
            try:
                self._transmit(smtp, email)
                with contextlib.suppress(smtplib.SMTPException, OSError):
                    smtp.quit()  # the e-mail is accepted already: a failure from here on must not send it again
            finally:
                smtp.close()
        except smtplib.SMTPRecipientsRefused as error:
            code, reply = next(iter(error.recipients.values()))
            raise self._replied(code, reply, "notifier.steps.to") from error
        except smtplib.SMTPAuthenticationError as error:
            hint = "notifier.smtp_user and notifier.smtp_password"
            raise self._replied(error.smtp_code, error.smtp_error, hint) from error
        except smtplib.SMTPResponseException as error:
            hint = "notifier.sender and the server's log"
            raise self._replied(error.smtp_code, error.smtp_error, hint) from error
        except smtplib.SMTPNotSupportedError as error:
            raise ChannelRefused(
                f"{self._server}: {error}; check notifier.smtp_starttls, notifier.smtp_user and the port"
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise ChannelRefused(
                f"{self._server} has a certificate that does not verify: {error.verify_message}; "
                "use the name in the certificate as notifier.smtp_host, and name its authority with SSL_CERT_FILE"
            ) from error
        except (smtplib.SMTPException, OSError) as error:
            raise ChannelUnavailable(
                f"{self._server} cannot be reached: {error or type(error).__name__}; "
                "check notifier.smtp_host, notifier.smtp_port, notifier.smtp_tls and that the server runs"
            ) from error

    def compose(self, message: Message) -> EmailMessage:
        """Text, its alternative in HTML, and the key slice within that where there is one."""
        email = self.headers(message)
        email["Subject"] = message.subject
        email.set_content(message.body)
        picture = message.picture() if self._config.picture else None
        content_id = f"slice.{message.page_id[:8]}@{self._domain}"
        email.add_alternative(_html(message, content_id if picture else ""), subtype="html")
        if picture:
            alternative = email.get_payload()[1]  # type: ignore[index]
            alternative.add_related(  # type: ignore[union-attr]
                picture, "image", "png", cid=f"<{content_id}>", disposition="inline", filename="key-slice.png"
            )
        return email

    def headers(self, message: Message) -> EmailMessage:
        """An e-mail to the recipient without subject and content; a reply to it finds the page."""
        email = EmailMessage()
        email["From"] = self._sender
        email["To"] = self.recipient
        email["Date"] = format_datetime(utc_now())
        email["Message-ID"] = f"<{message.page_id}@{self._domain}>"
        email["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation replies
        email["Importance"] = "high"
        if self._config.reply_address and message.link:
            email["Reply-To"] = reply_address(self._config.reply_address, message.link.rpartition("/")[2])
        return email

    def _connect(self) -> smtplib.SMTP:
        config = self._config
        host, port, timeout_s = config.smtp_host, config.smtp_port, config.smtp_timeout_s
        # EHLO with the sender's domain: smtplib's own choice may wait for a slow reverse DNS look-up
        if config.smtp_tls:
            context = ssl.create_default_context()
            return smtplib.SMTP_SSL(host, port, local_hostname=self._domain, timeout=timeout_s, context=context)
        return smtplib.SMTP(host, port, local_hostname=self._domain, timeout=timeout_s)

    def _transmit(self, smtp: smtplib.SMTP, email: EmailMessage) -> None:
        config = self._config
        if config.smtp_starttls:
            smtp.starttls(context=ssl.create_default_context())
        if config.smtp_user:
            smtp.login(config.smtp_user, config.smtp_password)
        smtp.send_message(email)

    def _replied(self, code: int, reply: bytes | str, hint: str) -> ChannelRefused | ChannelUnavailable:
        words = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else reply
        said = f"{self._server} answered {code} {words}"
        if 500 <= code < 600:
            return ChannelRefused(f"{said}; check {hint}")
        return ChannelUnavailable(f"{said}; it will be tried again")


def _address(text: str, setting: str) -> str:
    """One e-mail address, or ConfigError."""
    try:
        addresses = getaddresses([text])
        EmailMessage()["To"] = text
    except (MessageError, ValueError) as error:
        raise ConfigError(f"{setting} {text!r} is not an e-mail address: {error}") from error
    if len(addresses) != 1 or not addresses[0][1]:
        raise ConfigError(f"{setting} {text!r} is not one e-mail address; use NAME@DOMAIN, one step per recipient")
    return text


def _reply_local_part(address: str) -> str:
    """What stands before the @ of a plain address, or ConfigError."""
    local, _, domain = address.rpartition("@")
    if not local or not domain or parseaddr(_address(address, "notifier.reply_address"))[1] != address:
        raise ConfigError(f"notifier.reply_address {address!r} is not a plain address; use NAME@DOMAIN")
    return local


def _html(message: Message, content_id: str) -> str:
    """The text, a link as large as a thumb and the picture in one column that follows the width of the screen."""
    text = message.body.partition(LINK_INTRODUCTION)[0] if message.link else message.body
    button = (
        f'<p><a href="{escape(message.link)}" style="display:block;padding:14px;background:#0b5394;color:#ffffff;'
        'text-align:center;font-weight:bold;text-decoration:none;border-radius:6px">Review and acknowledge</a></p>\n'
    )
    picture = (
        f'<p><img src="cid:{escape(content_id)}" alt="Key slice, suspected bleed outlined" '
        'style="width:100%;max-width:512px;height:auto"></p>\n'
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"></head>\n'
        '<body style="margin:12px;max-width:512px;font:16px/1.4 sans-serif">\n'
        f'<p style="font-size:20px;font-weight:bold;margin:0">{escape(message.subject)}</p>\n'
        f'<p style="white-space:pre-line;overflow-wrap:anywhere">{escape(text.strip())}</p>\n'
        f"{button if message.link else ''}{picture if content_id else ''}</body></html>\n"
    )

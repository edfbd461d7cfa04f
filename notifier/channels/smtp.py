"""Pages by e-mail, to a mailbox or an e-mail-to-pager gateway."""

import contextlib
import smtplib
import ssl
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import format_datetime, getaddresses, parseaddr

from herald.config import NotifierConfig
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from herald.events import utc_now
from notifier.channels import Message


class SmtpChannel:
    """One e-mail address, reached over the SMTP server of `[notifier]`."""

    def __init__(self, to: str, config: NotifierConfig) -> None:
        self.recipient = _address(to, "notifier.steps.to")
        self._sender = _address(config.sender, "notifier.sender")
        self._domain = parseaddr(self._sender)[1].rpartition("@")[2] or "localhost"
        self._server = f"SMTP server {config.smtp_host}:{config.smtp_port}"
        self._config = config

    def send(self, message: Message) -> None:
        """Return when the server has accepted the e-mail (250 after DATA).

        Raises ChannelUnavailable on connection problems and 4xx replies, ChannelRefused on 5xx replies, a
        certificate that does not verify and a server without the STARTTLS or AUTH that was asked for.
        """
        try:
            # EHLO with the sender's domain: smtplib's own choice may wait for a slow reverse DNS look-up
            smtp = smtplib.SMTP(
                self._config.smtp_host,
                self._config.smtp_port,
                local_hostname=self._domain,
                timeout=self._config.smtp_timeout_s,
            )
            try:
                self._transmit(smtp, self._email(message))
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
                "check notifier.smtp_host, notifier.smtp_port and that the server runs"
            ) from error

    def _email(self, message: Message) -> EmailMessage:
        email = EmailMessage()
        email["From"] = self._sender
        email["To"] = self.recipient
        email["Subject"] = message.subject
        email["Date"] = format_datetime(utc_now())
        email["Message-ID"] = f"<{message.page_id}@{self._domain}>"
        email["Auto-Submitted"] = "auto-generated"  # RFC 3834: no vacation replies
        email["Importance"] = "high"
        email.set_content(message.body)
        return email

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

"""Pages over every service that Apprise knows: SMS, push, chat."""

import logging
import re
import threading

import apprise

from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError
from notifier.channels import Message

_STATUS = re.compile(r"\berror=(\d{3})\b")
"""How Apprise's services say which HTTP status they were answered."""


class AppriseChannel:
    """One Apprise URL; what Apprise prints about a failure is kept as the reason."""

    def __init__(self, url: str) -> None:
        service = apprise.Apprise.instantiate(url)
        if service is None:
            scheme = url.partition("://")[0][:16]
            raise ConfigError(
                f"notifier.steps.to ({scheme}://…) is not a URL that Apprise knows; "
                "see https://github.com/caronc/apprise for the form of each service"
            )
        self._service = service
        self.recipient = service.url(privacy=True)  # type: ignore[no-untyped-call]

    def send(self, message: Message) -> None:
        """Return when the service has accepted the message.

        Raises ChannelRefused where the service is known to have answered 4xx, as for a wrong key, save 408 and 429;
        ChannelUnavailable else, since Apprise does not tell a broken line from a refusal for every service.
        """
        title, body = message.subject, message.body
        if message.short and len(title) + len(body) + 2 > self._service.body_maxlen:  # an SMS
            title, body = "", message.short
        reasons = _Reasons()
        reasons.logger.addHandler(reasons)
        try:
            sent = self._service.notify(title=title, body=body, notify_type=apprise.NotifyType.FAILURE)
        finally:
            reasons.logger.removeHandler(reasons)
        if sent:
            return
        reason = " ".join(reasons.said)
        said = f"{self.recipient} did not take the page: {reason or 'Apprise gave no reason'}"
        statuses = [int(status) for status in _STATUS.findall(reason)]
        if statuses and all(400 <= status < 500 and status not in (408, 429) for status in statuses):
            raise ChannelRefused(f"{said}; check the keys and the address in notifier.steps.to")
        raise ChannelUnavailable(f"{said}; check notifier.steps.to and that the service can be reached from here")


class _Reasons(logging.Handler):
    """What Apprise warns of in this thread; pages are sent in several at once, and its own capture mixes them."""

    logger = logging.getLogger("apprise")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning of the thread that made this handler."""
        if record.thread == self._thread:
            self.said += record.getMessage().split()

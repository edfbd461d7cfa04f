"""Pages over every service that Apprise knows: SMS, push, chat, webhooks."""

import apprise

from herald.errors import ChannelUnavailable, ConfigError
from notifier.channels import Message


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
        """Return when the service has accepted the message; raises ChannelUnavailable with Apprise's reason."""
        with apprise.LogCapture(level=apprise.logging.WARNING) as captured:  # type: ignore[no-untyped-call]
            sent = self._service.notify(
                title=message.subject, body=message.body, notify_type=apprise.NotifyType.FAILURE
            )
            reason = " ".join(captured.getvalue().split()) if not sent else ""
        if not sent:
            raise ChannelUnavailable(
                f"{self.recipient} did not take the page: {reason or 'Apprise gave no reason'}; "
                "check notifier.steps.to and that the service can be reached from here"
            )

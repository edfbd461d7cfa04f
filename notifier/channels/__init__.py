"""Channels: one short file each; a channel sends or says why not, and keeps no state of its own."""

from dataclasses import dataclass
from typing import Protocol

from herald.config import NotifierConfig, PagingStep


@dataclass(frozen=True)
class Message:
    """What a channel sends; `page_id` is the same whenever the same page is sent again."""

    page_id: str
    subject: str
    body: str


class Channel(Protocol):
    """A way to reach one recipient."""

    recipient: str
    """Who is reached, fit for logs and the ledger: secrets are masked."""

    def send(self, message: Message) -> None:
        """Return when the message is accepted; raises ChannelUnavailable or ChannelRefused."""


def open_channel(step: PagingStep, config: NotifierConfig) -> Channel:
    """The channel of a step of the policy, without touching the network; raises ConfigError for a bad address."""
    if step.channel == "smtp":
        from notifier.channels.smtp import SmtpChannel

        return SmtpChannel(step.to, config)
    from notifier.channels.apprise import AppriseChannel

    return AppriseChannel(step.to)

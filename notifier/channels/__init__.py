"""Channels: one short file each; a channel sends or says why not, and keeps no state of its own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from herald.config import NotifierConfig, PagingStep
from herald.events import SeriesTriaged


def no_picture() -> bytes | None:
    """What a message without a picture has."""
    return None


@dataclass(frozen=True)
class Message:
    """What a channel sends; `page_id` is the same whenever the same page is sent again.

    `short` has at most 160 characters; `link` is the signed link of the page, `event` what is paged (None for a message
    to operators), `picture` makes the key slice as PNG, or None where there is none.
    """

    page_id: str
    subject: str
    body: str
    short: str = ""
    link: str = ""
    event: SeriesTriaged | None = None
    picture: Callable[[], bytes | None] = no_picture


class Channel(Protocol):
    """A way to reach one recipient."""

    recipient: str
    """Who is reached, fit for logs and the ledger: secrets are masked."""

    def send(self, message: Message) -> None:
        """Return when the message is accepted; raises ChannelUnavailable or ChannelRefused."""


def open_channel(step: PagingStep, config: NotifierConfig) -> Channel:
    """The channel of a step of the policy, without touching the network; raises ConfigError for a bad address."""
    # each is imported when it is used: Apprise and hl7apy take long to import
    match step.channel:
        case "smtp":
            from notifier.channels.smtp import SmtpChannel

            return SmtpChannel(step.to, config)
        case "pager":
            from notifier.channels.pager import PagerChannel

            return PagerChannel(step.to, config)
        case "webhook":
            from notifier.channels.webhook import WebhookChannel

            return WebhookChannel(step.to, config)
        case "hl7":
            from notifier.channels.hl7 import Hl7Channel

            return Hl7Channel(step.to, config)
        case "apprise":
            from notifier.channels.apprise import AppriseChannel

            return AppriseChannel(step.to)

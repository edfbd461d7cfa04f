"""What the views of one application work with."""

from dataclasses import dataclass
from typing import cast

from flask import current_app

from herald.config import Config
from herald.ledger import Ledger
from herald.store import StudyStore
from webui.live import Live
from webui.picture import Pictures
from webui.publisher import ReviewPublisher

EXTENSION = "herald"


@dataclass(frozen=True)
class Context:
    """The parts that `create_app` was given, and what it made of them."""

    config: Config
    ledger: Ledger
    store: StudyStore
    pictures: Pictures
    publisher: ReviewPublisher
    live: Live

    @property
    def shadow(self) -> bool:
        """Whether the node records and pages nobody."""
        return self.config.notifier.mode == "shadow"


def context() -> Context:
    """The context of the application that serves this request."""
    return cast(Context, current_app.extensions[EXTENSION])

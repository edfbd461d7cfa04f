"""Posting of every result to the web UI, apart from paging: neither waits for the other."""

import time

from herald.errors import ChannelRefused, ChannelUnavailable, NotificationError
from herald.events import SeriesTriaged, utc_now
from herald.ledger import Ledger
from notifier import record
from notifier.channels.webui import WebuiChannel
from notifier.record import Outcome


class Posting:
    """Handler of results for the web UI; each change of outcome is a row in `deliveries`."""

    def __init__(self, ledger: Ledger, webui: WebuiChannel) -> None:
        self._ledger = ledger
        self._webui = webui

    def on_triaged(self, event: SeriesTriaged) -> None:
        """Post the result; raises ChannelUnavailable (the bus tries again) or ChannelRefused (a dead letter)."""
        started = time.perf_counter()
        try:
            self._webui.put(event)
        except ChannelUnavailable as error:
            self._note(event, "unavailable", started, error)
            raise
        except ChannelRefused as error:
            self._note(event, "refused", started, error)
            raise
        self._note(event, "sent", started, None)

    def _note(self, event: SeriesTriaged, outcome: Outcome, started: float, error: NotificationError | None) -> None:
        with self._ledger.begin() as connection:
            record.note_delivery(
                connection,
                at=utc_now(),
                series_instance_uid=event.series_instance_uid,
                revision=event.revision,
                page=None,
                channel="webui",
                recipient=self._webui.recipient[:256],
                outcome=outcome,
                error=None if error is None else str(error),
                duration_s=time.perf_counter() - started,
            )

"""Reviews go to the bus from one thread: a reader never waits for the bus, and no review is lost while it is down."""

import logging
import threading

from herald.bus import Bus
from herald.errors import BusError, LedgerError
from herald.ledger import Ledger
from webui import record

log = logging.getLogger(__name__)

RETRY_S = 2.0
LOOK_S = 0.5  # how soon a stop is noticed


class ReviewPublisher:
    """Publishes reviews that are not on the bus yet: at the start, after each review, and again while it fails."""

    def __init__(self, ledger: Ledger, bus: Bus) -> None:
        self._ledger, self._bus = ledger, bus
        self._wake = threading.Event()

    def wake(self) -> None:
        """There is a new review."""
        self._wake.set()

    def publish_pending(self) -> int:
        """Publish every pending review and note it; gives their number, raises BusError or LedgerError."""
        pending = record.pending_reviews(self._ledger)
        for event in pending:
            self._bus.publish(event)
            record.mark_published(self._ledger, event.review_id)
        return len(pending)

    def run(self, stop: threading.Event) -> None:
        """Publish until `stop` is set; one line in the log per outage."""
        outage = False
        self._wake.set()  # reviews may be left over from before the start
        while not stop.is_set():
            if not self._wake.wait(LOOK_S):
                continue
            self._wake.clear()
            try:
                self.publish_pending()
                if outage:
                    log.info("reviews reach the bus again")
                outage = False
            except (BusError, LedgerError) as error:
                if not outage:
                    log.error("reviews wait in the ledger until they can be published: %s", error)
                outage = True
                self._wake.set()
                stop.wait(RETRY_S)

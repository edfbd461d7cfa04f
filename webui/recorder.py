"""The validation record is written from one thread: what has changed since the last look, and now and then everything.

Nothing else of the web UI waits for it. It may be killed at any moment: the record stays whole, and the next start
catches up with what was missed.
"""

import logging
import threading
import time
from collections.abc import Collection
from datetime import datetime, timedelta
from itertools import islice

from herald.config import Config
from herald.errors import LedgerError
from herald.events import utc_now
from herald.ledger import Ledger
from herald.validation.chain import append
from herald.validation.collect import changed, collect

log = logging.getLogger(__name__)

LOOK_S = 5.0
FULL_S = 3600.0
RETRY_S = 5.0
OVERLAP = timedelta(minutes=1)
"""So much later than its time a row of the ledger may become visible: transactions take time, and clocks differ."""
AT_ONCE = 200


class ValidationRecorder:
    """Keeps the validation record up with the other tables."""

    def __init__(self, ledger: Ledger, config: Config) -> None:
        self._ledger, self._config = ledger, config
        self._before: set[str] = set()

    def catch_up(self, stop: threading.Event) -> int:
        """Record every series revision that is not recorded as it is now; gives the number of entries written."""
        return self._record(None, stop)

    def look(self, since: datetime, stop: threading.Event) -> int:
        """Record what has changed since a time, and once more what had at the look before.

        A page that is closed leaves no time behind; while it was open, each look found it.
        """
        with self._ledger.read() as connection:
            found = changed(connection, self._config, since, utc_now())
        written = self._record(found | self._before, stop) if found or self._before else 0
        self._before = found
        return written

    def _record(self, series_instance_uids: Collection[str] | None, stop: threading.Event) -> int:
        written, now = 0, utc_now()
        with self._ledger.read() as connection:
            rows = collect(connection, self._config, now, series_instance_uids)
            while not stop.is_set():
                started = time.monotonic()
                some = list(islice(rows, AT_ONCE))
                if not some:
                    break
                written += append(self._ledger, some, now)
                stop.wait(time.monotonic() - started)  # readers need this process too
        return written

    def run(self, stop: threading.Event) -> None:
        """Look every few seconds until `stop` is set; one line in the log per outage of the ledger."""
        since: datetime | None = None
        full_at, outage = 0.0, False
        while not stop.is_set():
            started = utc_now()
            try:
                if since is None or time.monotonic() >= full_at:
                    self.catch_up(stop)
                    full_at = time.monotonic() + FULL_S
                else:
                    self.look(since, stop)
                since = started - OVERLAP
                if outage:
                    log.info("the validation record is written again")
                outage = False
            except LedgerError as error:
                if not outage:
                    log.error("the validation record waits for the ledger, and will catch up: %s", error)
                outage = True
                stop.wait(RETRY_S)
                continue
            except Exception:  # a record that stands still unnoticed would be worse than a thread that goes on
                log.exception("the validation record could not be written; it is tried again")
                stop.wait(RETRY_S)
                continue
            stop.wait(LOOK_S)

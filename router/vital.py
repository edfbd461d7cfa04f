"""The router's sign of life: every 15 s it asks the model server and writes its row of the ledger's `vitals`.

The notifier tells the operators when such signs stop coming. Triage knows nothing of this thread: a ledger that is
away, or slow, costs signs of life and nothing else.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from herald.config import Config
from herald.errors import LedgerError, ServingError
from herald.events import utc_now
from herald.ledger import Ledger, vitals
from herald.vital import SignOfLife
from router.inference import InferenceClient

log = logging.getLogger(__name__)

BEAT_S = 15.0
DEADLINE_S = 5.0
"""Longest wait for the model server's word on one model: a server that hangs must not make the router look dead."""
STOP_S = 2.0
"""How long a stop waits for a beat under way; the ledger may be why it takes long."""


class Vital:
    """One router's row of `vitals`."""

    def __init__(self, ledger: Ledger, client: InferenceClient, now: Callable[[], datetime] = utc_now) -> None:
        self._sign = SignOfLife(ledger, vitals)
        self._client = client
        self._now = now
        self._started_at = now()

    def beat(self) -> None:
        """Ask the model server and write down what came of it; raises LedgerError."""
        written: dict[str, Any] = {"started_at": self._started_at, "error": None}
        try:
            self._client.ask()
            written["models_answered_at"] = self._now()
        except ServingError as error:
            written["error"] = str(error)
        self._sign.write(self._now(), **written)

    def run(self, stop: threading.Event) -> None:
        """Beat until `stop` is set, whatever happens; one line in the log per outage of the ledger."""
        outage = False
        while not stop.is_set():
            try:
                self.beat()
                if outage:
                    log.info("the ledger takes the router's signs of life again")
                outage = False
            except LedgerError as error:
                if not outage:
                    log.warning("the router goes on without signs of life: %s", error)
                outage = True
            except Exception:  # or the operators would be told that the router is dead
                log.exception("a sign of life broke; please report it")
            stop.wait(BEAT_S)


@contextmanager
def signs_of_life(config: Config) -> Iterator[None]:
    """Beat in a thread of its own for the block; raises ConfigError when `ledger.url` cannot be used."""
    ledger = Ledger(config.ledger)
    client = InferenceClient(config.router.serving_address, DEADLINE_S)
    stop = threading.Event()
    thread = threading.Thread(target=Vital(ledger, client).run, args=(stop,), name="vital", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(STOP_S)
        client.close()
        ledger.close()

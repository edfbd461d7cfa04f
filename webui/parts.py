"""Parts of a page that may be slow or away: each is read in a thread of its own, and no page waits long for any."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from herald.errors import HeraldError
from herald.events import utc_now

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """What was read, and when; `problem` says why there is nothing newer, or nothing at all."""

    value: Any = None
    at: datetime | None = None
    problem: str = ""


class Parts:
    """Parts by name. A part that is read already is not read a second time beside it: who asks waits for the same."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, Future[Part]] = {}
        self._last: dict[str, Part] = {}

    def read(self, sources: Mapping[str, Callable[[], Any]], within_s: float) -> dict[str, Part]:
        """Every part after at most `within_s`: one that is late is as it was read last, and says so."""
        with self._lock:
            futures = {name: self._running.get(name) or self._start(name, read) for name, read in sources.items()}
        wait(futures.values(), within_s)
        return {name: future.result() if future.done() else self._late(name) for name, future in futures.items()}

    def _start(self, name: str, read: Callable[[], Any]) -> "Future[Part]":
        future: Future[Part] = Future()
        self._running[name] = future
        # not a pool: its threads would hold up the end of the process while a broker does not answer
        threading.Thread(target=self._run, args=(name, read, future), name=f"part-{name}", daemon=True).start()
        return future

    def _run(self, name: str, read: Callable[[], Any], future: "Future[Part]") -> None:
        try:
            part = Part(read(), utc_now())
        except HeraldError as error:
            part = Part(None, utc_now(), str(error))
        except Exception:
            log.exception("%s cannot be shown; please report it", name)
            part = Part(None, utc_now(), "Something went wrong on our side; the error is in the log of the web UI.")
        with self._lock:
            if not part.problem:
                self._last[name] = part
            del self._running[name]
        future.set_result(part)

    def _late(self, name: str) -> Part:
        last = self._last.get(name, Part())
        return Part(last.value, last.at, "It takes long to answer; look again in some seconds.")

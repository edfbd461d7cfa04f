"""Server-sent events that tell an open worklist to look again: one thread watches the ledger for all of them."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flask import Flask
from flask_login.signals import user_logged_out  # type: ignore[import-untyped]

from herald.errors import LedgerError

log = logging.getLogger(__name__)

MOST_STREAMS = 32
"""Each takes a thread of the server while it is open; who comes later polls."""
LOOK_S = 0.5
MOST_LOOKING = 0.2
"""Share of the time that may go into looking; a ledger that answers slowly is asked less often."""
NOTICE_S = 1.0
"""How soon a browser that went away is noticed."""
KEEP_ALIVE_S = 15.0
LASTS_S = 300.0
"""After this a stream ends, and the browser opens another: nothing that was forgotten stays for ever."""
RECONNECT_MS = 2000


@dataclass(eq=False)
class Stream:
    """One open worklist of a user."""

    user: str
    closed: bool = False


class Live:
    """Tells streams when `look` gives another text; looks only while any is open, and holds nothing of the ledger."""

    def __init__(self, look: Callable[[], str]) -> None:
        self._look = look
        self._streams: set[Stream] = set()
        self._changed = threading.Condition()  # of everything below
        self._version = ""
        self._watching = False
        self._stopped = False

    def init_app(self, app: Flask) -> None:
        """End the streams of whoever logs out of this application."""
        user_logged_out.connect(self._logged_out, app)

    @property
    def open_streams(self) -> int:
        """How many there are now."""
        with self._changed:
            return len(self._streams)

    def open(self, user: str) -> Stream | None:
        """A stream, to be closed by who opened it; None when there are as many as there may be, or after `stop`."""
        with self._changed:
            if self._stopped or len(self._streams) >= MOST_STREAMS:
                return None
            stream = Stream(user)
            self._streams.add(stream)
            if not self._watching:
                self._watching = True
                threading.Thread(target=self._watch, name="worklist", daemon=True).start()
            return stream

    def close(self, stream: Stream) -> None:
        """Give its place to somebody else."""
        with self._changed:
            self._streams.discard(stream)
            self._changed.notify_all()

    def close_all_of(self, user: str) -> None:
        """A user has logged out: their streams end; a session of theirs that goes on opens another."""
        with self._changed:
            for stream in self._streams:
                stream.closed = stream.closed or stream.user == user
            self._changed.notify_all()

    def stop(self) -> None:
        """End every stream and the thread, for good."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def messages(
        self, stream: Stream, seen: str, may_go_on: Callable[[], bool], is_gone: Callable[[], bool]
    ) -> Iterator[str]:
        """What the browser is sent: a message for every version other than the one `seen`, else comments.

        `may_go_on` is asked before each, `is_gone` every second.
        """
        started = said = time.monotonic()
        yield f"retry: {RECONNECT_MS}\n\n"
        while (now := time.monotonic()) < started + LASTS_S and not is_gone():
            version = self._next(stream, seen)
            if version is None:
                return
            if version == seen and now < said + KEEP_ALIVE_S:
                continue
            if not may_go_on():
                return
            said = now
            yield ": still here\n\n" if version == seen else f"id: {version}\ndata: changed\n\n"
            seen = version

    def _next(self, stream: Stream, seen: str) -> str | None:
        """The version as soon as it is another, or after a second; None when the stream has ended."""

        def ended() -> bool:
            return stream.closed or self._stopped

        with self._changed:
            self._changed.wait_for(lambda: ended() or self._version not in ("", seen), timeout=NOTICE_S)
            return None if ended() else self._version or seen

    def _watch(self) -> None:
        outage = False
        while True:
            started = time.monotonic()
            try:
                version = self._look()
                outage = False
            except LedgerError as error:
                version = ""
                if not outage:
                    log.error("open worklists are not told of changes: %s", error)
                outage = True
            pause = max(LOOK_S, (time.monotonic() - started) / MOST_LOOKING)
            with self._changed:
                if version and version != self._version:
                    self._version = version
                    self._changed.notify_all()
                self._changed.wait_for(self._is_idle, timeout=pause)
                if self._is_idle():
                    self._watching = False
                    return

    def _logged_out(self, _app: Flask, user: object) -> None:
        name = getattr(user, "name", None)  # of somebody whose session had ended there is none
        if name:
            self.close_all_of(name)

    def _is_idle(self) -> bool:
        return self._stopped or not self._streams

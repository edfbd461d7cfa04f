"""The web UI as a service: waitress in front, the review publisher beside it, one stop for both."""

import logging
import threading
import time
from typing import Any

import waitress  # type: ignore[import-untyped]
from waitress import wasyncore
from waitress.channel import HTTPChannel  # type: ignore[import-untyped]

from herald.bus import open_bus
from herald.config import Config
from herald.errors import ConfigError, LedgerError
from herald.ledger import Ledger
from herald.store import StudyStore
from webui import blind, record
from webui.app import create_app
from webui.context import EXTENSION, Context
from webui.live import MOST_STREAMS
from webui.measured import measure
from webui.recorder import ValidationRecorder

log = logging.getLogger(__name__)

THREADS = MOST_STREAMS + 16
"""An open worklist takes one for as long as it is open."""
CONNECTIONS = 500
"""A browser keeps up to six."""
LOOK_S = 0.2
"""How soon a stop is noticed."""
DRAIN_S = 5.0
"""How long requests under way may take after a stop."""


def serve(config: Config, stop: threading.Event) -> None:
    """Serve until `stop` is set, then finish the requests under way; raises ConfigError when it cannot listen."""
    ledger, store, bus = Ledger(config.ledger), StudyStore(config.store), open_bus(config.bus)
    app = create_app(config, ledger, store, bus)
    measure(app)
    parts: Context = app.extensions[EXTENSION]
    sockets: dict[int, Any] = {}
    try:
        server = waitress.create_server(
            app,
            map=sockets,
            host=config.webui.host,
            port=config.webui.port,
            threads=THREADS,
            connection_limit=CONNECTIONS,
            channel_request_lookahead=1,  # so that waitress sees when the reader of a stream goes away
            ident=None,
            clear_untrusted_proxy_headers=not config.webui.trusted_proxies,  # else webui.proxy judges them
        )
    except OSError as error:
        wasyncore.close_all(sockets, ignore_all=True)
        bus.close()
        ledger.close()
        raise ConfigError(
            f"the web UI cannot listen on {config.webui.host}:{config.webui.port}: {error.strerror}; "
            "change webui.host or webui.port, or stop what listens there"
        ) from error
    background = threading.Thread(target=_background, args=(ledger, parts, stop), name="reviews")
    background.start()
    log.info("web UI on http://%s:%d", config.webui.host, config.webui.port)
    try:
        while not stop.is_set():
            wasyncore.loop(timeout=LOOK_S, use_poll=True, map=sockets, count=1)
    finally:
        stop.set()
        parts.live.stop()
        _drain(sockets)
        server.task_dispatcher.shutdown(cancel_pending=True, timeout=DRAIN_S)
        wasyncore.close_all(sockets, ignore_all=True)
        background.join()
        bus.close()
        ledger.close()


def _background(ledger: Ledger, parts: Context, stop: threading.Event) -> None:
    """Create missing tables as soon as the ledger can be reached, then record for validation, and publish reviews."""
    outage = False
    while not stop.is_set():
        try:
            ledger.create_tables()
            blind.draw_missing(parts.config, ledger)  # which decides what may be listed
            record.complete_results(ledger)
            break
        except LedgerError as error:
            if not outage:
                log.error("the web UI waits for the ledger: %s", error)
            outage = True
            stop.wait(1.0)
    recorder = ValidationRecorder(ledger, parts.config)
    recording = threading.Thread(target=recorder.run, args=(stop,), name="validation record")
    recording.start()
    parts.publisher.run(stop)
    recording.join()


def _drain(sockets: dict[int, Any]) -> None:
    """Accept nothing new, and let answers under way reach their readers."""
    for listener in [s for s in sockets.values() if getattr(s, "accepting", False)]:
        listener.accepting = False
        listener.socket.close()
        listener.del_channel(sockets)
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline and any(
        isinstance(s, HTTPChannel) and (s.requests or s.total_outbufs_len) for s in sockets.values()
    ):
        wasyncore.loop(timeout=LOOK_S, use_poll=True, map=sockets, count=1)

"""The node: every service as a supervised process of one command.

Each service module offers `serve(config, stop)`. A child stops when its standard input closes, so no child outlives a
supervisor that was killed.
"""

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from herald.config import Config
from herald.errors import ConfigError, HeraldError
from herald.logs import configure_logging
from herald.metrics import serve_metrics

log = logging.getLogger(__name__)

SERVICES: Mapping[str, str] = {
    "serving": "serving.service",
    "webui": "webui.service",
    "notifier": "notifier.service",
    "router": "router.service",
    "receiver": "receiver.service",
}
"""Name -> module; in the order of start, so that whoever is spoken to is there first."""

SUPERVISED = "HERALD_SUPERVISED"
RESTART_FIRST_S = 0.5
RESTART_LONGEST_S = 30.0
STEADY_S = 60.0
"""A service that ran so long starts again at once."""

EXIT_CONFIG = 78
"""sysexits EX_CONFIG: starting again would not help."""


def stop_at_signals(stop: threading.Event) -> None:
    """Let SIGTERM and SIGINT set `stop`; for the main thread.

    By a thread that reads what Python writes when a signal comes. Python calls a handler only between two steps of the
    main thread: a signal that comes just before that begins to wait would be seen when the next one comes.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def wait() -> None:
        while reader.recv(1):
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.detach())
    threading.Thread(target=wait, name="signals", daemon=True).start()


def run_service(name: str, config: Config) -> int:
    """Run one service in this process until a signal, or until the supervisor goes; returns the exit status."""
    configure_logging(name, config.node.log_level)
    stop = threading.Event()
    stop_at_signals(stop)
    if os.environ.get(SUPERVISED):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the supervisor decides
        threading.Thread(target=_stop_at_end_of_input, args=(stop,), name="supervisor-watch", daemon=True).start()
    try:
        with serve_metrics(name, config.metrics):
            importlib.import_module(SERVICES[name]).serve(config, stop)
    except ConfigError as error:
        log.error("%s", error)
        return EXIT_CONFIG
    except HeraldError as error:
        log.error("%s: %s", type(error).__name__, error)
        return 1
    except Exception:
        log.exception("%s ends because of an error that nobody foresaw; please report it", name)
        return 1
    return 0


def _stop_at_end_of_input(stop: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    stop.set()


@dataclass
class _Child:
    name: str
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    start_at: float = 0.0
    pause_s: float = RESTART_FIRST_S


@dataclass
class Supervisor:
    """Starts the services, starts again what dies (with growing pauses), and stops them all."""

    config: Config
    names: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    def __post_init__(self) -> None:
        """Check the names before anything starts."""
        for name in self.names:
            if name not in SERVICES:
                raise ConfigError(f"unknown service {name}; known are {', '.join(SERVICES)}")
        self._children = [_Child(name) for name in SERVICES if name in self.names]

    def run(self, stop: threading.Event) -> None:
        """Supervise until `stop` is set; then stop every service within `node.stop_timeout_s`.

        Raises ConfigError, and stops everything, when a service cannot start with this configuration: half a node
        would take in series and never page.
        """
        try:
            while not stop.is_set():
                for child in self._children:
                    self._tend(child)
                stop.wait(0.2)
        finally:
            self._stop_all()

    def _tend(self, child: _Child) -> None:
        now = time.monotonic()
        if child.process is not None:
            status = child.process.poll()
            if status is None:
                return
            child.process = None
            if status == EXIT_CONFIG:
                raise ConfigError(f"{child.name} cannot start with this configuration; its log above says what to mend")
            if now - child.started > STEADY_S:
                child.pause_s = RESTART_FIRST_S
            log.error("%s ended with status %d; starting it again in %.1f s", child.name, status, child.pause_s)
            child.start_at = now + child.pause_s
            child.pause_s = min(2 * child.pause_s, RESTART_LONGEST_S)
        if now >= child.start_at:
            child.process = subprocess.Popen(
                [sys.executable, "-m", "herald", "run", child.name],
                stdin=subprocess.PIPE,
                stdout=sys.stderr,
                env={**self.environment, SUPERVISED: "1"},
            )
            child.started = now

    def _stop_all(self) -> None:
        deadline = time.monotonic() + self.config.node.stop_timeout_s
        running = [child for child in self._children if child.process is not None]
        for child in reversed(running):  # who takes work in stops first
            if child.process is not None and child.process.stdin is not None:
                child.process.stdin.close()
        for child in running:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                log.error("%s did not stop in time; killing it, nothing acknowledged is lost", child.name)
                child.process.kill()
                child.process.wait()

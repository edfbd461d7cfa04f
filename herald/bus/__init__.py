"""The bus: at least once, ordered per study, with retries and dead letters, on SQLite or Kafka.

`publish` returns when the event is durable. `handle` fetches, calls, and acknowledges after the effect. An error
that is `retriable` backs off and is tried again for `retry_for_s`; then, or on any other error, the delivery goes to
the dead letters with its traceback.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from herald.config import BusConfig
from herald.errors import BusError, ConfigError, HeraldError
from herald.events import Event

log = logging.getLogger(__name__)

RETRY_LONGEST_S = 30.0

Handler = Callable[[Event], None]


@dataclass(frozen=True)
class Delivery:
    """One event in the hands of one consumer group; `token` is the implementation's own."""

    event: Event
    topic: str
    group: str
    attempt: int
    token: object


@dataclass(frozen=True)
class DeadLetter:
    """An event that a group could not handle, kept with the reason until it is replayed."""

    letter_id: str
    topic: str
    group: str
    message: bytes
    error: str
    traceback: str
    died_at: datetime


class Bus(Protocol):
    """What every implementation offers; one instance per process and thread of consumption."""

    def publish(self, event: Event) -> None:
        """Make the event durable; raises BusError when that cannot be said."""

    def fetch(self, group: str, topics: tuple[str, ...], timeout_s: float) -> Delivery | None:
        """The next delivery for the group, or None after `timeout_s` without one.

        Ordered per study: while one event of a study is out, no later one of that study is handed to the group.
        A message that is not an event goes to the dead letters by itself.
        """

    def ack(self, delivery: Delivery) -> None:
        """The effect is done: never deliver this again to the group."""

    def keep_alive(self, delivery: Delivery) -> None:
        """The handler still works on it: do not hand it to another consumer."""

    def dead_letter(self, delivery: Delivery, error: str, trace: str) -> None:
        """Put the delivery aside with its error, and acknowledge it."""

    def dead_letters(self, topic: str) -> list[DeadLetter]:
        """What was put aside, oldest first."""

    def replay(self, letter: DeadLetter) -> None:
        """Publish a dead letter again to the group that could not handle it, and remove it from the dead letters."""

    def backlog(self, group: str, topic: str) -> int:
        """How many events wait for the group."""

    def check(self) -> None:
        """Raise BusError when the bus cannot be reached."""

    def close(self) -> None:
        """Let go of every resource; deliveries that are out come back to others."""


def open_bus(config: BusConfig) -> Bus:
    """The bus that `bus.url` names: sqlite:///FILE or kafka://HOST:PORT."""
    scheme, separator, rest = config.url.partition("://")
    if not separator:
        raise ConfigError(f"bus.url {config.url!r} is no URL; use sqlite:///FILE or kafka://HOST:PORT")
    if scheme == "sqlite":
        from herald.bus.sqlite import SqliteBus

        return SqliteBus(rest.removeprefix("/"))
    if scheme == "kafka":
        from herald.bus.kafka import KafkaBus

        return KafkaBus(rest)
    raise ConfigError(f"bus.url has the unknown scheme {scheme!r}; use sqlite:///FILE or kafka://HOST:PORT")


def handle(
    bus: Bus,
    group: str,
    handlers: Mapping[type[Event], Handler],
    stop: threading.Event,
    config: BusConfig,
    on_dead: Callable[[Event, BaseException], None] | None = None,
) -> None:
    """Serve `handlers` until `stop` is set; a delivery under way is finished first.

    `on_dead` is called before an event is put aside, so that a service can still say what became of it. An
    unreachable bus is waited for, with one line in the log per outage.
    """
    topics = tuple(event_type.topic for event_type in handlers)
    outage = False
    while not stop.is_set():
        try:
            delivery = bus.fetch(group, topics, timeout_s=0.5)
            if delivery is not None:
                _deliver(bus, delivery, handlers[type(delivery.event)], stop, config, on_dead)
            if outage:
                log.info("the bus answers again; %s goes on", group)
            outage = False
        except BusError as error:
            if not outage:
                log.error("%s waits for the bus: %s", group, error)
            outage = True
            stop.wait(1.0)


def _deliver(
    bus: Bus,
    delivery: Delivery,
    handler: Handler,
    stop: threading.Event,
    config: BusConfig,
    on_dead: Callable[[Event, BaseException], None] | None,
) -> None:
    event = delivery.event
    deadline = time.monotonic() + config.retry_for_s
    pause_s = config.retry_first_s
    while True:
        try:
            with _kept_alive(bus, delivery):
                handler(event)
            bus.ack(delivery)
            return
        except Exception as error:
            name = f"{type(event).__name__} of series {event.series_instance_uid} revision {event.revision}"
            retriable = isinstance(error, HeraldError) and error.retriable
            if retriable and time.monotonic() + pause_s < deadline:
                log.warning("%s: %s: %s; trying again in %.1f s", name, type(error).__name__, error, pause_s)
                if stop.wait(pause_s):
                    return  # not acknowledged: it comes back when the service does
                bus.keep_alive(delivery)
                pause_s = min(2 * pause_s, RETRY_LONGEST_S)
                continue
            log.error("%s goes to the dead letters: %s: %s", name, type(error).__name__, error)
            if on_dead is not None:
                on_dead(event, error)
            bus.dead_letter(delivery, f"{type(error).__name__}: {error}", traceback.format_exc())
            return


class _kept_alive:  # noqa: N801 - reads as a phrase in the with statement
    """Renews the claim on a delivery from a second thread while its handler works."""

    EVERY_S = 5.0

    def __init__(self, bus: Bus, delivery: Delivery) -> None:
        self._bus, self._delivery = bus, delivery
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="keep-alive", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _renew(self) -> None:
        while not self._done.wait(self.EVERY_S):
            try:
                self._bus.keep_alive(self._delivery)
            except BusError as error:
                log.warning("the claim on a delivery could not be renewed: %s", error)

"""The bus: at least once, ordered per study, with retries and dead letters, on SQLite or Kafka.

`publish` returns when the event is durable. `handle` fetches, calls, and acknowledges after the effect. An error
that is `retriable` backs off and is tried again for `retry_for_s`; then, or on any other error, the delivery goes to
the dead letters with its traceback. So does one that was begun `most_attempts` times and whose process ended each time
before it was done. A cause that is published again is delivered again with the same `event_id`, so consumers upsert on
it. The very same event, as a publisher repeats it that died before it could note that it had published, is delivered
once on SQLite; Kafka knows no ids of ours, delivers it again, and the upsert makes it one.
"""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from herald.config import BusConfig
from herald.errors import BusError, ConfigError, EventDecodeError, HeraldError, NeverFinished
from herald.events import Event, event_from_json

log = logging.getLogger(__name__)

RETRY_LONGEST_S = 30.0

GROUPS = (("router", "series"), ("notifier", "results"), ("notifier", "reviews"), ("notifier-webui", "results"))
"""Who consumes what: group and topic."""

Handler = Callable[[Event], None]


@dataclass(frozen=True)
class Delivery:
    """One event in the hands of one consumer group; `token` is the implementation's own."""

    event: Event
    topic: str
    group: str
    attempt: int
    """1, and one more for each consumer that began it and ended or fell silent before it finished or gave it back.

    On Kafka the first of those may be missing, see `herald.bus.kafka`.
    """
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


@dataclass(frozen=True)
class Queue:
    """What a consumer group has not acknowledged of a topic; `oldest_at` is None where nothing waits."""

    group: str
    topic: str
    waiting: int
    oldest_at: datetime | None
    """When the oldest of them was published."""


class Bus(Protocol):
    """What every implementation offers.

    One instance may be published to from several threads, and consumed from by one. Opening never fails: an
    unreachable bus raises BusError at each use until it is back, without a new instance.
    """

    def publish(self, event: Event) -> None:
        """Make the event durable; raises BusError when that cannot be said."""

    def fetch(self, group: str, topics: tuple[str, ...], timeout_s: float) -> Delivery | None:
        """The next delivery for the group, or None after `timeout_s` without one.

        Ordered per study: while one event of a study is out, no later one of that study is handed to the group.
        A message that is not an event goes to the dead letters by itself. A counted attempt is durable on return.
        """

    def ack(self, delivery: Delivery) -> None:
        """The effect is done: never deliver this again to the group."""

    def keep_alive(self, delivery: Delivery) -> None:
        """The handler still works on it: do not hand it to another consumer."""

    def release(self, delivery: Delivery) -> None:
        """Give the delivery back undone, to whoever comes first; the attempt does not count."""

    def forgive(self, delivery: Delivery) -> None:
        """The handler still works on it and may be killed, but not because of it: the attempt does not count."""

    def dead_letter(self, delivery: Delivery, error: str, trace: str) -> None:
        """Put the delivery aside with its error, and acknowledge it."""

    def dead_letters(self, topic: str) -> list[DeadLetter]:
        """What was put aside, oldest first."""

    def replay(self, letter: DeadLetter) -> None:
        """Publish a dead letter again to the group that could not handle it, and remove it from the dead letters."""

    def backlog(self, group: str, topic: str) -> int:
        """How many events the group has not acknowledged."""

    def queues(self, of: Iterable[tuple[str, str]]) -> list[Queue]:
        """What waits for each of these groups on its topic, and since when."""

    def check(self) -> None:
        """Raise BusError when the bus cannot be reached."""

    def close(self) -> None:
        """Let go of every resource; deliveries that are out come back to others."""


def open_bus(config: BusConfig) -> Bus:
    """The bus that `bus.url` names: sqlite:///FILE or kafka://HOST:PORT[,HOST:PORT][/PREFIX]."""
    scheme, separator, rest = config.url.partition("://")
    if not separator:
        raise ConfigError(f"bus.url {config.url!r} is no URL; use sqlite:///FILE or kafka://HOST:PORT")
    if scheme == "sqlite":
        from herald.bus.sqlite import SqliteBus

        return SqliteBus(rest.removeprefix("/"))
    if scheme == "kafka":
        from herald.bus.kafka import KafkaBus

        servers, _, prefix = rest.partition("/")
        return KafkaBus(servers, prefix)
    raise ConfigError(f"bus.url has the unknown scheme {scheme!r}; use sqlite:///FILE or kafka://HOST:PORT")


def decode(topic: str, message: bytes) -> Event:
    """The event in a message of `topic`; raises EventDecodeError when it is none or belongs elsewhere."""
    event = event_from_json(message)
    if event.topic != topic:
        raise EventDecodeError(f"{type(event).__name__} belongs on topic {event.topic}, it was found on {topic}")
    return event


def handle(
    bus: Bus,
    group: str,
    handlers: Mapping[type[Event], Handler],
    stop: threading.Event,
    config: BusConfig,
    on_dead: Callable[[Event, BaseException], None] | None = None,
) -> None:
    """Serve `handlers` until `stop` is set; a handler at work is finished first, a pause before a retry is not.

    `on_dead` is called before an event is put aside, so that a service can still say what became of it; until it
    succeeds, the event is not put aside. An unreachable bus is waited for, with one line in the log per outage.
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


class _Stopped(Exception):
    """Raised when the service is to stop while a delivery waits for its next attempt."""


def _deliver(
    bus: Bus,
    delivery: Delivery,
    handler: Handler,
    stop: threading.Event,
    config: BusConfig,
    on_dead: Callable[[Event, BaseException], None] | None,
) -> None:
    event = delivery.event
    name = f"{type(event).__name__} of series {event.series_instance_uid} revision {event.revision}"
    try:
        with _kept_alive(bus, delivery, stop):
            given_up = delivery.attempt > config.most_attempts
            error = _never_finished(delivery) if given_up else _failure(event, name, handler, stop, config)
            if error is None:
                bus.ack(delivery)
                return
            reason = f"{type(error).__name__}: {error}"
            log.error("%s goes to the dead letters: %s", name, reason)
            if on_dead is not None:
                _tell(event, name, error, on_dead, stop, config)
            bus.dead_letter(delivery, reason, "".join(traceback.format_exception(error)))
    except (_Stopped, BusError, KeyboardInterrupt) as error:  # whatever else comes here ends the process, and counts
        with contextlib.suppress(BusError):  # an unreachable bus hands it out again by itself
            bus.release(delivery)
        if not isinstance(error, _Stopped):
            raise


def _never_finished(delivery: Delivery) -> NeverFinished:
    return NeverFinished(
        f"{delivery.group} began this {delivery.attempt - 1} times, and each time its process ended before it was done:"
        " killed, out of memory, or a crash in a library; the logs of the service and of the kernel say which. Mend the"
        " cause, then `herald dead-letters --replay`"
    )


def _failure(
    event: Event, name: str, handler: Handler, stop: threading.Event, config: BusConfig
) -> BaseException | None:
    """Call the handler, again while trying again may help: None, or the error that it failed with for good."""
    deadline = time.monotonic() + config.retry_for_s
    pauses = _pauses(config)
    while True:
        pause_s = next(pauses)
        try:
            handler(event)
            return None
        except Exception as error:
            retriable = isinstance(error, HeraldError) and error.retriable
            if not retriable or time.monotonic() + pause_s >= deadline:
                return error
            log.warning("%s: %s: %s; trying again in %.1f s", name, type(error).__name__, error, pause_s)
        if stop.wait(pause_s):
            raise _Stopped


def _tell(
    event: Event,
    name: str,
    error: BaseException,
    on_dead: Callable[[Event, BaseException], None],
    stop: threading.Event,
    config: BusConfig,
) -> None:
    """Call `on_dead` until it succeeds: an event that is put aside unsaid would have vanished."""
    for pause_s in _pauses(config):
        try:
            on_dead(event, error)
            return
        except Exception as failure:
            log.error(
                "what became of %s cannot be said: %s: %s; trying again in %.1f s",
                name,
                type(failure).__name__,
                failure,
                pause_s,
            )
        if stop.wait(pause_s):
            raise _Stopped


def _pauses(config: BusConfig) -> Iterator[float]:
    pause_s = config.retry_first_s
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, RETRY_LONGEST_S)


class _kept_alive:  # noqa: N801 - reads as a phrase in the with statement
    """Renews the claim on a delivery from a second thread while its handler works."""

    EVERY_S = 5.0

    def __init__(self, bus: Bus, delivery: Delivery, stop: threading.Event) -> None:
        self._bus, self._delivery, self._stop = bus, delivery, stop
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
                if self._stop.is_set():  # a supervisor kills whoever takes too long, whatever the event
                    self._bus.forgive(self._delivery)
            except BusError as error:
                log.warning("the claim on a delivery could not be renewed: %s", error)

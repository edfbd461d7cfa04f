"""The bus keeps its promises on SQLite and on a real Kafka broker alike: one suite, run on both."""

import dataclasses
import gc
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import conftest
import pytest

import herald.bus
import herald.bus.kafka
import herald.bus.sqlite
from herald.bus import Bus, DeadLetter, Delivery, Handler, Queue, handle, open_bus
from herald.bus.kafka import KafkaBus
from herald.config import BusConfig
from herald.errors import BusError, ConfigError, LedgerError, VolumeError
from herald.events import Event, SeriesReceived, SeriesReviewed, SeriesTriaged, event_from_json

WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)
SOON_S = 30.0
"""Far more than anything here takes on a busy machine; a test that waits so long fails."""
FAST = BusConfig(retry_for_s=60.0, retry_first_s=0.01)


def received(study: str = "1.2", number: int = 1) -> SeriesReceived:
    return SeriesReceived(
        study_instance_uid=study,
        series_instance_uid=f"{study}.{number}",
        revision=1,
        occurred_at=WHEN,
        accession_number="A1",
        modality="CT",
        scanner="CT1",
        calling_ae_title="CT1",
        instance_count=30,
        close_reason="quiet",
        first_image_at=WHEN,
        last_image_at=WHEN,
    )


def triaged(study: str = "1.2") -> SeriesTriaged:
    return SeriesTriaged(
        study_instance_uid=study, series_instance_uid=f"{study}.1", revision=1, occurred_at=WHEN, disposition="negative"
    )


def numbers(events: list[Event]) -> list[str]:
    return [event.series_instance_uid for event in events]


@pytest.fixture
def another_bus(bus_url: str) -> Iterator[Callable[[], Bus]]:
    """Opens one more consumer or producer on the same bus."""
    opened: list[Bus] = []

    def open_another() -> Bus:
        opened.append(open_bus(BusConfig(url=bus_url)))
        return opened[-1]

    yield open_another
    for bus in opened:
        bus.close()


@pytest.fixture
def bus(another_bus: Callable[[], Bus]) -> Bus:
    return another_bus()


def take(bus: Bus, group: str = "router", topics: tuple[str, ...] = ("series",)) -> Delivery:
    delivery = bus.fetch(group, topics, timeout_s=SOON_S)
    assert delivery is not None
    return delivery


def nothing(bus: Bus, group: str = "router", topics: tuple[str, ...] = ("series",)) -> bool:
    return bus.fetch(group, topics, timeout_s=1.0) is None


class Record:
    """Events as a handler saw them, to be awaited."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, count: int) -> list[Event]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, timeout=2 * SOON_S)
            return list(self.events)


@contextmanager
def serving(
    bus: Bus,
    handlers: Mapping[type[Event], Handler],
    config: BusConfig = FAST,
    on_dead: Callable[[Event, BaseException], None] | None = None,
    group: str = "router",
) -> Iterator[threading.Event]:
    """`handle` in a thread for the block; what it raises is raised here."""
    stop = threading.Event()
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            handle(bus, group, handlers, stop, config, on_dead)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(SOON_S)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Delivery


def test_an_event_arrives_as_it_was_published_and_once_acknowledged_never_again(bus: Bus) -> None:
    bus.publish(received())
    delivery = take(bus)
    assert (delivery.event, delivery.topic, delivery.group, delivery.attempt) == (received(), "series", "router", 1)
    bus.ack(delivery)
    assert nothing(bus)
    assert bus.backlog("router", "series") == 0


def test_the_bus_says_that_it_is_well(bus: Bus) -> None:
    bus.check()


def test_nothing_arrives_before_something_is_published(bus: Bus) -> None:
    assert nothing(bus)
    assert bus.backlog("router", "series") == 0


def test_a_consumer_that_waits_is_woken_by_a_publication(bus: Bus, another_bus: Callable[[], Bus]) -> None:
    nothing(bus)  # a member of the group by now
    publisher = another_bus()
    publisher.check()
    timer = threading.Timer(0.2, publisher.publish, [received()])
    timer.start()
    started = time.monotonic()
    take(bus)
    assert time.monotonic() - started < 5.0
    timer.join()


def test_every_group_receives_everything_from_the_beginning_even_one_that_comes_late(bus: Bus) -> None:
    for number in (1, 2):
        bus.publish(received(number=number))
    for group in ("router", "auditor"):
        assert bus.backlog(group, "series") == 2
        for number in (1, 2):
            delivery = take(bus, group)
            assert delivery.event == received(number=number)
            bus.ack(delivery)
        assert nothing(bus, group)


def test_a_queue_says_how_much_waits_for_a_group_and_since_when(bus: Bus) -> None:
    queue = ("router", "series")
    bus.publish(received("1.9"))
    bus.ack(take(bus))  # a new broker takes a while until it can say where a group stands
    assert bus.queues([queue]) == [Queue("router", "series", 0, None)]
    before = datetime.now(UTC) - timedelta(milliseconds=1)  # Kafka keeps whole milliseconds
    for number in range(3):
        bus.publish(received(f"1.{number}"))
        time.sleep(0.01)  # so that their times differ
    between = datetime.now(UTC)
    bus.publish(received("1.3"))
    (waits, other) = bus.queues([queue, ("notifier", "results")])
    assert (waits.waiting, other) == (4, Queue("notifier", "results", 0, None))
    assert waits.oldest_at is not None
    assert before <= waits.oldest_at < between
    for _ in range(3):
        bus.ack(take(bus))
    (waits,) = bus.queues([queue])
    assert waits.waiting == 1
    assert waits.oldest_at is not None
    bus.ack(take(bus))
    assert bus.queues([queue]) == [Queue("router", "series", 0, None)]
    (never_read,) = bus.queues([("auditor", "series")])
    assert (never_read.waiting, never_read.oldest_at is not None) == (5, True)


def test_a_group_receives_only_the_topics_that_it_asks_for(bus: Bus) -> None:
    bus.publish(received())
    bus.publish(triaged())
    delivery = take(bus, "notifier", ("results", "reviews"))
    assert delivery.event == triaged()
    bus.ack(delivery)
    assert nothing(bus, "notifier", ("results", "reviews"))


def test_a_cause_published_again_is_delivered_again_with_the_same_id(bus: Bus) -> None:
    later = dataclasses.replace(received(), close_reason="released-and-even")
    bus.publish(received())
    bus.publish(later)
    first = take(bus)
    bus.ack(first)
    second = take(bus)
    assert (first.event, second.event) == (received(), later)
    assert second.event.event_id == first.event.event_id


def test_the_very_same_event_published_again_after_a_crash_is_one_for_its_consumers(
    bus_url: str, another_bus: Callable[[], Bus]
) -> None:
    crashed = another_bus()
    crashed.publish(received())
    crashed.close()  # before it could note that it had published
    bus = another_bus()
    bus.publish(event_from_json(received().to_json()))
    bus.publish(received(number=2))
    first = take(bus)
    bus.ack(first)
    second = take(bus)
    if not bus_url.startswith("sqlite"):  # Kafka appends, and the id lets consumers upsert
        assert second.event.event_id == first.event.event_id
        bus.ack(second)
        second = take(bus)
    assert (first.event, second.event) == (received(), received(number=2))
    bus.ack(second)
    bus.publish(received())
    assert nothing(bus) == bus_url.startswith("sqlite"), "also when it was acknowledged long ago"


def test_a_sqlite_file_of_before_with_an_event_twice_still_opens(sqlite_file: Path) -> None:
    def bus() -> Bus:
        return open_bus(BusConfig(url=f"sqlite:///{sqlite_file}"))

    first = bus()
    first.publish(received())
    first.close()
    db = sqlite3.connect(sqlite_file)
    db.execute("DROP INDEX messages_by_event")
    columns = "event_id, topic, study, body, only_group, published_at"
    db.execute(f"INSERT INTO messages ({columns}) SELECT {columns} FROM messages")
    db.commit()
    db.close()
    opened = bus()
    assert opened.backlog("router", "series") == 2
    opened.publish(received())
    assert opened.backlog("router", "series") == 2
    opened.close()


def test_several_threads_publish_through_one_bus(bus: Bus) -> None:
    def publish(study: str) -> None:
        for number in range(10):
            bus.publish(received(study, number))

    threads = [threading.Thread(target=publish, args=[f"1.{index}"]) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = Record()
    with serving(bus, {SeriesReceived: record}):
        events = record.wait(60)
    assert sorted(numbers(events)) == sorted(f"1.{index}.{number}" for index in range(6) for number in range(10))


def test_a_released_delivery_comes_again_before_later_ones_of_its_study(bus: Bus) -> None:
    for number in (1, 2):
        bus.publish(received(number=number))
    for _ in range(3):
        bus.release(take(bus))
    again = take(bus)
    assert (again.event, again.attempt) == (received(number=1), 1), "what is given back in order does not count"
    bus.ack(again)
    assert take(bus).event == received(number=2)


def test_while_an_event_of_a_study_is_out_no_later_one_is_handed_to_the_group(bus: Bus) -> None:
    for number in (1, 2):
        bus.publish(received(number=number))
    out = take(bus)
    assert nothing(bus)
    bus.ack(out)
    assert take(bus).event == received(number=2)


def test_events_fetched_ahead_are_still_delivered_after_a_long_job(bus: Bus) -> None:
    for number in range(5):
        bus.publish(received(number=number))
    for number in range(5):
        delivery = take(bus)
        assert delivery.event == received(number=number)
        bus.keep_alive(delivery)
        bus.keep_alive(delivery)
        bus.ack(delivery)


def test_a_delivery_comes_back_when_its_consumer_closes(bus: Bus, another_bus: Callable[[], Bus]) -> None:
    bus.publish(received())
    first = another_bus()
    take(first)
    first.close()
    assert take(bus).event == received()


def test_consumers_of_a_group_share_the_work_and_keep_the_order_of_each_study(another_bus: Callable[[], Bus]) -> None:
    publisher, record = another_bus(), Record()
    at_work: set[str] = set()
    overlaps: list[str] = []
    guard = threading.Lock()
    handled_by: dict[str, int] = {"first": 0, "second": 0}

    def handler(name: str) -> Handler:
        def work(event: Event) -> None:
            study = event.study_instance_uid
            with guard:
                overlaps.extend({study} & at_work)
                at_work.add(study)
                handled_by[name] += 1
            time.sleep(0.002)
            with guard:
                at_work.remove(study)
            record(event)

        return work

    studies = [f"1.{index}" for index in range(12)]
    published: dict[str, list[str]] = {study: [] for study in studies}
    with (
        serving(another_bus(), {SeriesReceived: handler("first")}),
        serving(another_bus(), {SeriesReceived: handler("second")}),
    ):
        for round_number in range(20):  # until the second has joined the first
            for number in range(3 * round_number, 3 * round_number + 3):
                for study in studies:
                    publisher.publish(received(study, number))
                    published[study].append(f"{study}.{number}")
            record.wait(sum(map(len, published.values())))
            if all(handled_by.values()):
                break
    assert all(handled_by.values())
    assert not overlaps
    for study in studies:
        assert numbers([event for event in record.events if event.study_instance_uid == study]) == published[study]


def test_a_consumer_that_joins_while_an_event_is_out_loses_nothing(bus: Bus, another_bus: Callable[[], Bus]) -> None:
    studies = [f"1.{index}" for index in range(12)]
    for study in studies:
        bus.publish(received(study))
    out = take(bus)
    record = Record()

    def second_works() -> bool:
        bus.keep_alive(out)
        return bool(record.events)

    second = another_bus()
    with serving(second, {SeriesReceived: record}):
        eventually(second_works)
        bus.ack(out)
        bus.close()
        eventually(lambda: second.backlog("router", "series") == 0)
    handled = {event.study_instance_uid for event in record.events} | {out.event.study_instance_uid}
    assert handled == set(studies)


def test_a_closed_bus_refuses(bus: Bus) -> None:
    bus.publish(received())
    delivery = take(bus)
    bus.close()
    with pytest.raises(BusError, match="closed"):
        bus.publish(received())
    with pytest.raises(BusError, match="closed"):
        bus.fetch(delivery.group, ("series",), timeout_s=0.1)


# Dead letters


def test_a_dead_letter_keeps_the_message_and_the_reason(bus: Bus) -> None:
    bus.publish(received(number=1))
    bus.publish(received(number=2))
    before = datetime.now(UTC)
    bus.dead_letter(take(bus), "VolumeError: two slices", "Traceback: é" + 200_000 * "x" + "the end")
    (letter,) = bus.dead_letters("series")
    assert (letter.topic, letter.group, letter.error) == ("series", "router", "VolumeError: two slices")
    assert letter.traceback.endswith("the end")
    assert event_from_json(letter.message) == received(number=1)
    assert before <= letter.died_at <= datetime.now(UTC)
    assert bus.dead_letters("results") == []
    assert take(bus).event == received(number=2)


def test_dead_letters_are_listed_oldest_first(bus: Bus) -> None:
    for number in range(4):
        bus.publish(received(number=number))
        bus.dead_letter(take(bus), f"error {number}", "")
    assert [letter.error for letter in bus.dead_letters("series")] == [f"error {number}" for number in range(4)]


def test_a_replay_reaches_the_group_that_failed_and_no_other(bus: Bus) -> None:
    bus.publish(received())
    bus.ack(take(bus, "auditor"))
    bus.dead_letter(take(bus), "LedgerError: gone", "")
    (letter,) = bus.dead_letters("series")
    bus.replay(letter)
    assert bus.dead_letters("series") == []
    assert nothing(bus, "auditor")
    again = take(bus)
    assert again.event == received()
    bus.ack(again)
    assert nothing(bus)
    assert (bus.backlog("router", "series"), bus.backlog("auditor", "series")) == (0, 0)


def test_a_letter_is_replayed_once_however_often_it_is_asked_for(bus: Bus) -> None:
    bus.publish(received())
    bus.dead_letter(take(bus), "LedgerError: gone", "")
    (letter,) = bus.dead_letters("series")
    bus.replay(letter)
    bus.replay(letter)
    bus.ack(take(bus))
    assert nothing(bus)


def test_a_replayed_event_that_fails_again_is_a_new_dead_letter(bus: Bus) -> None:
    bus.publish(received())
    bus.dead_letter(take(bus), "first", "")
    (first,) = bus.dead_letters("series")
    bus.replay(first)
    bus.dead_letter(take(bus), "second", "")
    (second,) = bus.dead_letters("series")
    assert (second.error, second.group) == ("second", "router")
    assert second.letter_id != first.letter_id


class Garbled(SeriesReceived):
    """Publishes what is no event of its topic."""

    body = b""

    def to_json(self) -> bytes:
        return self.body


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not one of our events"),
        (b"\x00\xff", "not one of our events"),
        (b'{"type": "SeriesLost", "schema": 1}', "unknown event type 'SeriesLost'"),
        (triaged().to_json(), "SeriesTriaged belongs on topic results, it was found on series"),
    ],
    ids=["empty", "binary", "unknown", "elsewhere"],
)
def test_a_message_that_is_no_event_goes_to_the_dead_letters_and_holds_up_nothing(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, body: bytes, reason: str
) -> None:
    monkeypatch.setattr(Garbled, "body", body)
    bus.publish(Garbled(**{field.name: getattr(received(), field.name) for field in dataclasses.fields(received())}))
    bus.publish(received(number=2))
    assert take(bus).event == received(number=2)
    (letter,) = bus.dead_letters("series")
    assert letter.message == body
    assert letter.error.startswith("EventDecodeError: ")
    assert reason in letter.error


# handle


def test_handle_acknowledges_after_the_effect(bus: Bus) -> None:
    backlogs: list[int] = []

    def work(event: Event) -> None:
        backlogs.append(bus.backlog("router", "series"))

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}):
        eventually(lambda: bus.backlog("router", "series") == 0)
    assert backlogs == [1]


def test_handle_calls_the_handler_of_each_type(bus: Bus) -> None:
    results, reviews = Record(), Record()
    review = SeriesReviewed(
        study_instance_uid="1.2",
        series_instance_uid="1.2.1",
        revision=1,
        occurred_at=WHEN,
        review_id="r",
        action="agree",
        reader="reader",
    )
    bus.publish(triaged())
    bus.publish(review)
    with serving(bus, {SeriesTriaged: results, SeriesReviewed: reviews}, group="notifier"):
        assert results.wait(1) == [triaged()]
        assert reviews.wait(1) == [review]


def test_an_error_that_may_pass_is_retried_until_it_has_passed(bus: Bus) -> None:
    record = Record()

    def work(event: Event) -> None:
        record(event)
        if len(record.events) < 4:
            raise LedgerError("the database restarts")

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}, dataclasses.replace(FAST, most_attempts=1)):  # these are retries
        record.wait(4)
        eventually(lambda: bus.backlog("router", "series") == 0)
    assert bus.dead_letters("series") == []


def test_an_error_that_does_not_pass_becomes_a_dead_letter_after_the_time_for_retries(bus: Bus) -> None:
    attempts, told = Record(), Record()

    def work(event: Event) -> None:
        attempts(event)
        raise LedgerError("the database is gone")

    def on_dead(event: Event, error: BaseException) -> None:
        assert isinstance(error, LedgerError)
        assert bus.dead_letters("series") == []
        told(event)

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}, BusConfig(retry_for_s=0.5, retry_first_s=0.1), on_dead):
        eventually(lambda: bus.dead_letters("series") != [])
    (letter,) = bus.dead_letters("series")
    assert letter.error == "LedgerError: the database is gone"
    assert told.events == [received()]
    assert 2 <= len(attempts.events) <= 3  # at 0, 0.1 and 0.3 s; the next would come after 0.5 s
    assert nothing(bus)


@pytest.mark.parametrize("error", [VolumeError("two slices"), ZeroDivisionError("a bug")], ids=["ours", "a bug"])
def test_an_error_that_no_retry_cures_becomes_a_dead_letter_at_once(bus: Bus, error: Exception) -> None:
    attempts, told = Record(), Record()

    def work(event: Event) -> None:
        attempts(event)
        if len(attempts.events) == 1:
            raise error

    bus.publish(received(number=1))
    bus.publish(received(number=2))
    with serving(bus, {SeriesReceived: work}, on_dead=lambda event, _: told(event)):
        assert attempts.wait(2) == [received(number=1), received(number=2)]
    (letter,) = bus.dead_letters("series")
    assert letter.error == f"{type(error).__name__}: {error}"
    assert "in work" in letter.traceback
    assert told.events == [received(number=1)]


def test_an_event_is_not_put_aside_before_its_end_could_be_told(bus: Bus) -> None:
    attempts, told = Record(), Record()
    reachable = threading.Event()

    def work(event: Event) -> None:
        attempts(event)
        raise VolumeError("two slices")

    def on_dead(event: Event, error: BaseException) -> None:
        told(event)
        if not reachable.is_set():
            raise BusError("the broker is down")

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}, on_dead=on_dead):
        told.wait(3)
        assert bus.dead_letters("series") == []
        assert bus.backlog("router", "series") == 1
        reachable.set()
        eventually(lambda: bus.dead_letters("series") != [])
    assert len(attempts.events) == 1


def test_an_event_whose_end_could_not_be_told_comes_back_after_a_stop(bus: Bus) -> None:
    told = Record()

    def work(event: Event) -> None:
        raise VolumeError("two slices")

    def on_dead(event: Event, error: BaseException) -> None:
        told(event)
        raise BusError("the broker is down")

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}, on_dead=on_dead):
        told.wait(1)
    assert bus.dead_letters("series") == []
    assert take(bus).event == received()


def test_a_stop_during_a_pause_before_a_retry_leaves_the_event_to_the_next_start(bus: Bus) -> None:
    attempts = Record()

    def work(event: Event) -> None:
        attempts(event)
        raise LedgerError("the database restarts")

    bus.publish(received())
    started = time.monotonic()
    with serving(bus, {SeriesReceived: work}, BusConfig(retry_for_s=600.0, retry_first_s=60.0)):
        attempts.wait(1)
    assert time.monotonic() - started < SOON_S
    assert bus.dead_letters("series") == []
    assert take(bus).event == received()


def test_however_often_a_service_is_stopped_in_order_its_event_is_not_given_up(
    another_bus: Callable[[], Bus],
) -> None:
    attempts = Record()

    def work(event: Event) -> None:
        attempts(event)
        raise LedgerError("the database restarts")

    another_bus().publish(received())
    for stops in range(3):
        bus = another_bus()
        with serving(bus, {SeriesReceived: work}, BusConfig(retry_first_s=60.0, most_attempts=1)):
            attempts.wait(stops + 1)
        bus.close()
    bus = another_bus()
    assert take(bus).attempt == 1
    assert bus.dead_letters("series") == []


def test_a_handler_that_exits_its_process_has_begun_and_not_finished(bus: Bus, another_bus: Callable[[], Bus]) -> None:
    attempts, exits = Record(), another_bus()

    def work(event: Event) -> None:
        attempts(event)
        raise SystemExit(1)

    bus.publish(received())
    with pytest.raises(SystemExit), serving(exits, {SeriesReceived: work}):
        attempts.wait(1)
    exits.close()
    assert take(bus).attempt == 2


def test_a_stop_lets_the_handler_at_work_finish(bus: Bus) -> None:
    begun, finished = threading.Event(), threading.Event()

    def work(event: Event) -> None:
        begun.set()
        time.sleep(0.3)
        finished.set()

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}):
        assert begun.wait(SOON_S)
    assert finished.is_set()
    assert nothing(bus)


class Failing:
    """A bus of which some verbs cannot reach anything while `down` is set."""

    def __init__(self, bus: Bus, *verbs: str) -> None:
        self._bus, self._verbs = bus, verbs
        self.down = threading.Event()
        self.refused = Record()

    def __getattr__(self, verb: str) -> Any:
        if self.down.is_set() and verb in self._verbs:
            self.refused(received())
            raise BusError(f"no {verb} while the bus is down")
        return getattr(self._bus, verb)


def test_an_outage_of_the_bus_is_waited_for_and_logged_once(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "herald.bus")
    failing, record = Failing(bus, "fetch"), Record()
    failing.down.set()
    bus.publish(received())
    with serving(failing, {SeriesReceived: record}):
        failing.refused.wait(2)
        failing.down.clear()
        record.wait(1)
    lines = [entry.message for entry in caplog.records if entry.name == "herald.bus"]
    assert lines == [
        "router waits for the bus: no fetch while the bus is down",
        "the bus answers again; router goes on",
    ]


@pytest.mark.parametrize("verb", ["ack", "dead_letter"])
def test_an_outage_after_the_handler_delivers_the_event_again(bus: Bus, verb: str) -> None:
    failing, record = Failing(bus, verb), Record()
    failing.down.set()

    def work(event: Event) -> None:
        record(event)
        if verb == "dead_letter":
            raise VolumeError("two slices")

    bus.publish(received())
    with serving(failing, {SeriesReceived: work}):
        failing.refused.wait(1)
        failing.down.clear()
        record.wait(2)
        eventually(lambda: bus.backlog("router", "series") == 0)
    assert len(bus.dead_letters("series")) == (verb == "dead_letter")


def test_a_long_job_keeps_its_event(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(herald.bus.sqlite, "LEASE_S", 1.5)
    monkeypatch.setitem(herald.bus.kafka.GROUP, "max_poll_interval_ms", 1_500)
    monkeypatch.setattr(herald.bus._kept_alive, "EVERY_S", 0.3)
    record = Record()

    def work(event: Event) -> None:
        time.sleep(4.0)
        record(event)

    bus.publish(received())
    with serving(bus, {SeriesReceived: work}):
        record.wait(1)
        eventually(lambda: bus.backlog("router", "series") == 0)
        assert nothing(bus, "auditor", ("results",))
    assert len(record.events) == 1


CONSUMER = """
import os, signal, sys, threading
import herald.bus
from herald.bus import handle, open_bus
from herald.config import BusConfig
from herald.events import SeriesReceived
from herald.node import stop_at_signals

def hang(event):
    print(event.series_instance_uid, flush=True)
    threading.Event().wait()

def die_of_the_first(event):
    if event.series_instance_uid == "1.2.1":
        os.kill(os.getpid(), signal.SIGKILL)
    print("handled", event.series_instance_uid, flush=True)

def on_dead(event, error):
    print("gave up", event.series_instance_uid, type(error).__name__, flush=True)

def forgive(delivery):
    forgive_delivery(delivery)
    print("forgiven", flush=True)

herald.bus._kept_alive.EVERY_S = 0.2
stop = threading.Event()
stop_at_signals(stop)
config = BusConfig(url=sys.argv[1], most_attempts=2)
bus = open_bus(config)
forgive_delivery, bus.forgive = bus.forgive, forgive
handle(bus, "router", {SeriesReceived: globals()[sys.argv[2]]}, stop, config, on_dead)
"""


@contextmanager
def consumer_process(bus_url: str, handler: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A process of the group `router`, and what reads its next line; it is killed at the end of the block."""
    command = [sys.executable, "-c", CONSUMER, bus_url, handler]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        output = process.stdout
        assert output is not None
        try:
            yield process, lambda: output.readline().strip()
        finally:
            process.kill()


def test_the_event_of_a_killed_process_comes_back_soon(bus: Bus, bus_url: str) -> None:
    for number in (1, 2):
        bus.publish(received(number=number))
    with consumer_process(bus_url, "hang") as (_, line):
        assert line() == "1.2.1"
        assert bus_url.startswith("kafka") or nothing(bus)
    killed = time.monotonic()
    for number, attempt in ((1, 2), (2, 1)):
        delivery = take(bus)
        assert (delivery.event, delivery.attempt) == (received(number=number), attempt)
        bus.ack(delivery)
    assert time.monotonic() - killed < (2.0 if bus_url.startswith("sqlite") else 20.0)


def test_an_event_that_ends_its_process_each_time_is_given_up_and_holds_up_nothing(bus: Bus, bus_url: str) -> None:
    for number in (1, 2):
        bus.publish(received(number=number))
    for _ in range(2):
        with consumer_process(bus_url, "die_of_the_first") as (process, line):
            assert line() == "", "it died before it could say anything"
            assert process.wait(SOON_S) == -signal.SIGKILL
        assert bus.dead_letters("series") == []
    with consumer_process(bus_url, "die_of_the_first") as (_, line):
        assert [line(), line()] == ["gave up 1.2.1 NeverFinished", "handled 1.2.2"]
        eventually(lambda: bus.backlog("router", "series") == 0)
    (letter,) = bus.dead_letters("series")
    assert letter.error.startswith("NeverFinished: router began this 2 times")
    assert letter.error.endswith("Mend the cause, then `herald dead-letters --replay`")
    bus.replay(letter)
    replayed = take(bus)
    assert (replayed.event, replayed.attempt) == (received(number=1), 1)


def test_a_process_that_is_killed_because_it_stops_too_slowly_has_not_begun(bus: Bus, bus_url: str) -> None:
    bus.publish(received())
    with consumer_process(bus_url, "hang") as (process, line):
        assert line() == "1.2.1"
        process.terminate()
        assert line() == "forgiven"
    assert take(bus).attempt == 1


# Only SQLite


@pytest.fixture
def sqlite_file(tmp_path: Path) -> Path:
    return tmp_path / "bus.sqlite"


@pytest.fixture
def sqlite_bus(sqlite_file: Path) -> Iterator[Bus]:
    bus = open_bus(BusConfig(url=f"sqlite:///{sqlite_file}"))
    yield bus
    bus.close()


def test_sqlite_gives_the_event_of_a_silent_consumer_to_another_when_its_lease_ends(
    sqlite_bus: Bus, sqlite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herald.bus.sqlite, "LEASE_S", 1.0)
    other = open_bus(BusConfig(url=f"sqlite:///{sqlite_file}"))
    sqlite_bus.publish(received())
    silent = take(sqlite_bus)
    assert other.fetch("router", ("series",), timeout_s=0.3) is None
    again = take(other)
    assert again.attempt == 2
    sqlite_bus.keep_alive(silent)  # too late: it is no longer its own
    sqlite_bus.ack(silent)
    other.ack(again)
    assert nothing(other)
    other.close()


def test_sqlite_does_not_count_what_a_living_consumer_could_neither_finish_nor_give_back(
    sqlite_bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herald.bus.sqlite, "LEASE_S", 0.2)
    sqlite_bus.publish(received())
    assert [take(sqlite_bus).attempt for _ in range(3)] == [1, 1, 1]


def test_sqlite_names_a_missing_folder_and_goes_on_when_it_is_there(tmp_path: Path) -> None:
    bus = open_bus(BusConfig(url=f"sqlite:///{tmp_path / 'missing' / 'bus.sqlite'}"))
    with pytest.raises(BusError, match=r"missing/bus\.sqlite cannot be used: unable to open.*create its folder"):
        bus.publish(received())
    (tmp_path / "missing").mkdir()
    bus.publish(received())
    assert take(bus).event == received()
    bus.close()


def test_sqlite_names_a_file_that_is_no_database(sqlite_bus: Bus, sqlite_file: Path) -> None:
    sqlite_file.write_text("somebody's notes, long enough to be read as a header\n" * 100)
    with pytest.raises(BusError, match="not a database; it is another file"):
        sqlite_bus.check()
    assert sqlite_file.read_text().startswith("somebody's notes")


def test_sqlite_says_that_the_disk_is_full_and_loses_nothing(
    sqlite_bus: Bus, sqlite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sqlite_bus.publish(received(number=1))
    sqlite_bus.close()
    connect = sqlite3.connect

    def connect_to_full_disk(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **options)
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    bus = open_bus(BusConfig(url=f"sqlite:///{sqlite_file}"))
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", connect_to_full_disk)
        published = 1

        def fill() -> None:
            nonlocal published
            while published < 1000:
                bus.publish(received(number=published + 1))
                published += 1

        with pytest.raises(BusError, match="disk is full; free disk space"):
            fill()
    record = Record()
    with serving(bus, {SeriesReceived: record}):
        events = record.wait(published)
    assert numbers(events) == [f"1.2.{number}" for number in range(1, published + 1)]
    bus.close()


def test_sqlite_names_a_lock_that_another_process_holds(
    sqlite_bus: Bus, sqlite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herald.bus.sqlite, "BUSY_S", 0.1)
    sqlite_bus.check()
    holder = sqlite3.connect(sqlite_file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(BusError, match="locked"):
        sqlite_bus.publish(received())
    holder.execute("ROLLBACK")
    holder.close()
    sqlite_bus.publish(received())
    assert take(sqlite_bus).event == received()


def test_sqlite_leaves_the_file_of_a_newer_herald_alone(sqlite_bus: Bus, sqlite_file: Path) -> None:
    newer = sqlite3.connect(sqlite_file)
    newer.execute("PRAGMA user_version = 99")
    newer.close()
    with pytest.raises(BusError, match="written by a newer Herald"):
        sqlite_bus.check()


def test_sqlite_files_can_be_created_by_several_services_at_once(sqlite_file: Path) -> None:
    barrier = threading.Barrier(8)
    failures: list[BaseException] = []

    def first_use(index: int) -> None:
        bus = open_bus(BusConfig(url=f"sqlite:///{sqlite_file}"))
        barrier.wait(SOON_S)
        try:
            bus.publish(received(f"1.{index}"))
        except BaseException as error:
            failures.append(error)
        bus.close()

    threads = [threading.Thread(target=first_use, args=[index]) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    reader = sqlite3.connect(sqlite_file)
    assert reader.execute("SELECT count(*) FROM messages").fetchone() == (8,)
    reader.close()


def test_sqlite_forgets_old_events_that_every_group_has_acknowledged(
    sqlite_bus: Bus, sqlite_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(herald.bus.sqlite, "KEEP_ACKNOWLEDGED_S", -1.0)
    monkeypatch.setattr(herald.bus.sqlite, "PRUNE_EVERY_S", 0.0)
    reader = sqlite3.connect(sqlite_file)
    for number in (1, 2):
        sqlite_bus.publish(received(number=number))
    out = take(sqlite_bus, "auditor")
    for _ in range(2):
        sqlite_bus.ack(take(sqlite_bus))
    assert reader.execute("SELECT count(*) FROM messages").fetchone() == (2,)  # the auditor still needs both
    sqlite_bus.ack(out)
    assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)
    sqlite_bus.ack(take(sqlite_bus, "auditor"))
    assert reader.execute("SELECT count(*) FROM messages").fetchone() == (0,)
    assert reader.execute("SELECT count(*) FROM deliveries").fetchone() == (0,)
    sqlite_bus.publish(received(number=3))
    assert take(sqlite_bus).event == received(number=3)
    reader.close()


# Only Kafka


@pytest.fixture
def no_threads_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A long outage must not use up the process; refused sockets kafka-python leaves to the garbage collector."""
    before = set(threading.enumerate())
    yield
    eventually(lambda: set(threading.enumerate()) <= before)
    caplog.get_records("call").clear()  # the errors in there hold on to sockets
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.usefixtures("no_threads_left_behind")
def test_kafka_names_the_address_of_a_broker_that_is_down_and_goes_on_when_it_is_up(tmp_path: Path) -> None:
    """A broker is killed in mid-traffic: what was acknowledged is there, and the same bus objects go on."""
    with conftest.running_kafka(tmp_path / "kafka") as broker:
        config = BusConfig(url=f"kafka://{broker.servers}", retry_first_s=0.1)
        consumer, publisher = open_bus(config), open_bus(config)
        record = Record()
        with serving(consumer, {SeriesReceived: record}, config):
            for number in range(20):
                publisher.publish(received(number=number))
            record.wait(10)
            broker.kill()
            for use in (publisher.check, lambda: publisher.publish(received(number=99))):
                with pytest.raises(BusError, match=rf"Kafka at {broker.servers} does not serve.*bus\.url"):
                    use()
            broker.start()
            publisher.publish(received(number=20))
            eventually(lambda: consumer.backlog("router", "series") == 0)
            record.wait(21)
        handled = {event.series_instance_uid for event in record.events}
        assert {f"1.2.{number}" for number in range(21)} <= handled
        publisher.close()
        consumer.close()


def test_kafka_that_was_never_there_is_named_at_the_first_use() -> None:
    bus = open_bus(BusConfig(url=f"kafka://127.0.0.1:{conftest.free_port_pair()}"))
    letter = DeadLetter("0-0", "series", "router", b"", "", "", WHEN)
    for use in (
        bus.check,
        lambda: bus.publish(received()),
        lambda: bus.fetch("router", ("series",), 0.1),
        lambda: bus.dead_letters("series"),
        lambda: bus.backlog("router", "series"),
        lambda: bus.replay(letter),
    ):
        with pytest.raises(BusError, match=r"does not serve: .*refused; start the broker"):
            use()
    bus.close()


def moved_to(joining: Bus, holder: Bus, held: Delivery, count: int) -> list[Delivery]:
    """The first `count` deliveries to a bus that joins the group while `holder` works on what it holds."""
    moved: list[Delivery] = []

    def has_its_share() -> bool:
        holder.keep_alive(held)
        delivery = joining.fetch("router", ("series",), timeout_s=0.2)
        moved.extend([delivery] if delivery is not None else [])
        return len(moved) == count

    eventually(has_its_share)
    return moved


def test_kafka_counts_for_the_group_and_only_what_a_consumer_that_has_left_it_had_begun(
    kafka_servers: str, tmp_path: Path
) -> None:
    config = BusConfig(url=f"kafka://{kafka_servers}/{tmp_path.name}.")
    first, second = open_bus(config), open_bus(config)
    for index in range(40):
        first.publish(received(f"1.{index}"))
    out = [take(first) for _ in range(herald.bus.kafka.PARTITIONS)]  # one of each
    assert {delivery.attempt for delivery in out} == {1}
    moved = moved_to(second, first, out[0], herald.bus.kafka.PARTITIONS // 2)
    assert {delivery.attempt for delivery in moved} == {1}, "the first lives: its partitions moved, and it did not die"
    first.close()  # without giving back what it has begun, as when its process ends
    inherited = [take(second) for _ in range(herald.bus.kafka.PARTITIONS // 2)]
    assert {delivery.attempt for delivery in inherited} == {2}
    second.close()


def test_kafka_counts_what_another_began_and_left_of_a_partition_that_has_been_here_before(
    kafka_servers: str, tmp_path: Path
) -> None:
    config = BusConfig(url=f"kafka://{kafka_servers}/{tmp_path.name}.")
    first, second = open_bus(config), open_bus(config)
    for index in range(60):
        first.publish(received(f"1.{index}"))
    for delivery in [take(first) for _ in range(herald.bus.kafka.PARTITIONS)]:
        first.ack(delivery)
    out = take(first)
    (left,) = moved_to(second, first, out, 1)
    second.close()  # without giving back what it has begun
    first.ack(out)
    while (delivery := take(first)).event != left.event:
        first.ack(delivery)
    assert delivery.attempt == 2
    first.close()


@pytest.mark.parametrize("url", ["kafka://broker", "kafka://", "kafka://a:1,b", "bus.sqlite", "amqp://a:1"])
def test_a_url_that_names_no_bus_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"bus\.url"):
        open_bus(BusConfig(url=url))


def test_a_consumer_that_never_gets_a_partition_joins_its_group_anew(
    kafka_servers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("herald.bus.kafka.PATIENCE_S", 0.5)
    bus = open_bus(BusConfig(url=f"kafka://{kafka_servers}/{tmp_path.name}."))
    try:
        assert isinstance(bus, KafkaBus)
        assert bus.fetch("router", ("series",), timeout_s=0.1) is None
        stuck = bus._consumers["router"]
        monkeypatch.setattr(stuck._client, "assignment", set)  # as in a rebalance that does not end
        monkeypatch.setattr(stuck._client, "poll", lambda **_: time.sleep(0.05) or {})
        bus.publish(received("1.2.3"))
        delivery = bus.fetch("router", ("series",), timeout_s=30.0)
        assert delivery is not None
        bus.ack(delivery)
    finally:
        bus.close()
    assert "joining the group anew" in caplog.text

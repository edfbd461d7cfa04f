"""The bus on Apache Kafka: one topic per kind of event, keyed by study, acknowledged by committing the offset.

The producer is idempotent and waits for all replicas. A consumer commits by hand, after the effect, one event at a
time; and before the first of a partition, where it stands, with a note of how often it was begun and by whom. Dead
letters lie in `<topic>.dead-letter` with their reason in the headers; a replay leaves a mark there.
"""

import logging
import math
import secrets
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kafka import (  # type: ignore[import-untyped]
    ConsumerRebalanceListener,
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetSpec,
    TopicPartition,
)
from kafka.errors import (  # type: ignore[import-untyped]
    CommitFailedError,
    IllegalGenerationError,
    KafkaError,
    RebalanceInProgressError,
    TopicAlreadyExistsError,
    UnknownMemberIdError,
)
from kafka.net.compat import KafkaNetClient  # type: ignore[import-untyped]
from kafka.structs import OffsetAndMetadata  # type: ignore[import-untyped]

from herald.bus import DeadLetter, Delivery, Queue, decode
from herald.errors import BusError, ConfigError, EventDecodeError
from herald.events import EVENT_TYPES, Event, utc_now

log = logging.getLogger(__name__)
# kafka-python reports each failed connection several times; Herald says it once per outage.
logging.getLogger("kafka").setLevel(logging.CRITICAL)

PARTITIONS = 8
"""Most consumers of one group that can share a topic; changing it later would break the order per study."""
KEEP_EVENTS_DAYS = 30
DEAD_LETTER = ".dead-letter"
ANSWER_S = 6.0
"""Longest wait for an answer of the broker."""
PROBE_EVERY_S = 5.0
"""How often an idle consumer asks whether the broker is still there: polling does not tell."""
KEEP_ALIVE_POLL_MS = 50
HELD_BACK_S = 0.02
"""Pause before a partition of which an event is out is asked again."""
CLOSE_S = 3.0
LONGEST_TRACE = 100_000

CLIENT = {
    "bootstrap_timeout_ms": 5_000,
    "request_timeout_ms": int(1000 * ANSWER_S),
    "reconnect_backoff_max_ms": 1_000,
}
CONSUMER = {
    **CLIENT,
    "enable_auto_commit": False,
    "auto_offset_reset": "earliest",
    "isolation_level": "read_committed",
    "allow_auto_create_topics": False,
}
PRODUCER = {
    **CLIENT,
    "acks": "all",
    "enable_idempotence": True,
    "max_block_ms": 5_000,
    "delivery_timeout_ms": int(1500 * ANSWER_S),
    "allow_auto_create_topics": False,
}
GROUP = {
    "session_timeout_ms": 10_000,  # a killed consumer's events come back after this
    "heartbeat_interval_ms": 2_000,
    "max_poll_interval_ms": 60_000,  # keep_alive polls every few seconds
}

# The group went on without this consumer: the event is delivered again, to it or to another.
LOST = (CommitFailedError, IllegalGenerationError, RebalanceInProgressError, UnknownMemberIdError)

PATIENCE_S = 15.0
"""A consumer without a partition for so long joins its group anew; each time it is given twice as long."""
LONGEST_PATIENCE_S = 300.0

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True)
class _Record:
    """A message and its place; the token of a delivery."""

    partition: TopicPartition
    offset: int
    key: bytes
    value: bytes
    only_group: str | None


class KafkaBus:
    """The bus on the cluster at `servers`, HOST:PORT[,HOST:PORT]; `prefix` keeps two nodes on one cluster apart."""

    def __init__(self, servers: str, prefix: str = "") -> None:
        self._servers = [_address(server) for server in servers.split(",")]
        self._where = servers
        self._prefix = prefix
        self._name = f"herald-{secrets.token_hex(8)}"
        self._producing = threading.Lock()
        self._producer: Any = None
        self._consuming = threading.RLock()
        self._consumers: dict[str, _Consumer] = {}
        self._patience_s: dict[str, float] = defaultdict(lambda: PATIENCE_S)
        self._topics_exist = False
        self._closed = False

    def publish(self, event: Event) -> None:
        """Append the event; every in-sync replica has it on return."""
        self._send(event.topic, event.study_instance_uid.encode(), event.to_json(), [])

    def fetch(self, group: str, topics: tuple[str, ...], timeout_s: float) -> Delivery | None:
        """The next delivery for the group, or None after `timeout_s` without one."""
        deadline = time.monotonic() + timeout_s
        with self._consuming, self._answers(lambda: self._forget(group)):
            consumer = self._consumer(group, topics)
            while True:
                record = consumer.poll(max(0.0, deadline - time.monotonic()))
                if record is not None:
                    delivery = self._delivery(consumer, record, group)
                    if delivery is not None:
                        return delivery
                elif consumer.idle_s() > self._patience_s[group]:
                    # kafka-python 3.0.12 can wait for ever for the end of a rebalance
                    log.warning("%s has been without a partition for long; joining the group anew", group)
                    self._patience_s[group] = min(2 * self._patience_s[group], LONGEST_PATIENCE_S)
                    self._forget(group)
                    consumer = self._consumer(group, topics)
                elif time.monotonic() >= deadline:
                    if time.monotonic() - consumer.heard_at > PROBE_EVERY_S:
                        self._probe()
                        consumer.heard_at = time.monotonic()
                    return None

    def ack(self, delivery: Delivery) -> None:
        """Commit the offset behind the event."""
        with self._consuming, self._answers(lambda: None):
            if delivery.group in self._consumers:
                self._consumers[delivery.group].commit(_record(delivery))

    def keep_alive(self, delivery: Delivery) -> None:
        """Poll without taking anything, so that the group does not take this consumer for dead."""
        with self._consuming, self._answers(lambda: None):
            if delivery.group in self._consumers:
                self._consumers[delivery.group].keep_alive()

    def release(self, delivery: Delivery) -> None:
        """Give the delivery back undone: this consumer, or the partition's next owner, gets it again."""
        with self._consuming, self._answers(lambda: None):
            if delivery.group in self._consumers:
                consumer, record = self._consumers[delivery.group], _record(delivery)
                try:
                    with suppress(*LOST):
                        consumer.note(record, delivery.attempt - 1, "")
                finally:
                    consumer.rewind(record)

    def forgive(self, delivery: Delivery) -> None:
        """Do not count this attempt."""
        with self._consuming, self._answers(lambda: None), suppress(*LOST):
            if delivery.group in self._consumers:
                self._consumers[delivery.group].note(_record(delivery), delivery.attempt - 1, self._name)

    def dead_letter(self, delivery: Delivery, error: str, trace: str) -> None:
        """Put the delivery aside with its error, and acknowledge it."""
        self._bury(delivery.topic, delivery.group, _record(delivery), error, trace)
        self.ack(delivery)

    def dead_letters(self, topic: str) -> list[DeadLetter]:
        """What was put aside, oldest first."""
        letters: dict[str, DeadLetter] = {}
        for record in self._read_all(topic + DEAD_LETTER):
            headers = {name: value.decode(errors="replace") for name, value in record.headers}
            if "replayed" in headers:
                letters.pop(headers["replayed"], None)
            elif {"topic", "group", "error", "traceback", "died_at"} <= headers.keys():
                letter_id = f"{record.partition}-{record.offset}"
                letters[letter_id] = DeadLetter(
                    letter_id,
                    headers["topic"],
                    headers["group"],
                    record.value or b"",
                    headers["error"],
                    headers["traceback"],
                    datetime.fromisoformat(headers["died_at"]),
                )
        return list(letters.values())

    def replay(self, letter: DeadLetter) -> None:
        """Publish a dead letter again to the group that could not handle it; a letter already replayed is left."""
        if letter.letter_id not in {waiting.letter_id for waiting in self.dead_letters(letter.topic)}:
            return
        self._send(letter.topic, _study(letter), letter.message, [("only-group", letter.group.encode())])
        self._send(letter.topic + DEAD_LETTER, b"", b"", [("replayed", letter.letter_id.encode())])

    def backlog(self, group: str, topic: str) -> int:
        """How many events the group has not acknowledged; a replay to another group counts until it is passed over."""
        with self._admin() as admin:
            return sum(end - begin for begin, end in self._open_ranges(admin, group, topic).values())

    def queues(self, of: Iterable[tuple[str, str]]) -> list[Queue]:
        """What waits for each of these groups on its topic, and since when; replays as in `backlog`."""
        self._create_topics()
        with self._admin() as admin:
            ranges = {(group, topic): self._open_ranges(admin, group, topic) for group, topic in of}
        found = []
        for (group, topic), of_queue in ranges.items():
            begins = {partition: begin for partition, (begin, end) in of_queue.items() if begin < end}
            waiting = sum(end - begin for begin, end in of_queue.values())
            found.append(Queue(group, topic, waiting, self._oldest_at(begins) if begins else None))
        return found

    def _open_ranges(self, admin: Any, group: str, topic: str) -> dict[TopicPartition, tuple[int, int]]:
        """By partition, the first offset that the group has not acknowledged, and the end."""
        (description,) = admin.describe_topics([self._prefix + topic])
        partitions = [TopicPartition(self._prefix + topic, p["partition_index"]) for p in description["partitions"]]
        committed = admin.list_group_offsets({self._prefix + group: partitions})[self._prefix + group]
        first = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.EARLIEST))
        end = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
        return {p: (max(first[p].offset, committed[p].offset), end[p].offset) for p in partitions}

    def _oldest_at(self, begins: Mapping[TopicPartition, int]) -> datetime:
        """When the oldest of the records at these places was published."""
        published_ms: dict[TopicPartition, int] = {}
        with self._reading() as consumer:
            consumer.assign(list(begins))
            for partition, begin in begins.items():
                consumer.seek(partition, begin)
            deadline = time.monotonic() + ANSWER_S
            while len(published_ms) < len(begins):
                for partition, records in consumer.poll(timeout_ms=200).items():
                    published_ms.setdefault(partition, records[0].timestamp)
                if time.monotonic() > deadline:
                    raise BusError(f"the broker at {self._where} did not hand out what waits; try again")
        return datetime.fromtimestamp(min(published_ms.values()) / 1000, UTC)

    def check(self) -> None:
        """Raise BusError when no broker answers."""
        with self._admin() as admin:
            admin.list_topics()

    def close(self) -> None:
        """Leave the groups, so that deliveries that are out come back to others at once."""
        self._closed = True
        with self._consuming:
            for group in list(self._consumers):
                self._forget(group)
        with self._producing:
            self._forget_producer()

    def _consumer(self, group: str, topics: tuple[str, ...]) -> "_Consumer":
        if self._closed:
            raise BusError(f"the bus at {self._where} has been closed in this process")
        if group not in self._consumers:
            self._create_topics()
            client = _open(
                KafkaConsumer,
                bootstrap_servers=self._servers,
                group_id=self._prefix + group,
                client_id=self._name,
                metrics_enabled=False,
                **CONSUMER,
                **GROUP,
            )
            self._consumers[group] = _Consumer(client)
        self._consumers[group].subscribe([self._prefix + topic for topic in topics])
        return self._consumers[group]

    def _delivery(self, consumer: "_Consumer", record: _Record, group: str) -> Delivery | None:
        """The record as a delivery; None when it is not for this group, or no event and put aside for that."""
        if record.only_group is not None and record.only_group != group:
            consumer.commit(record)
            return None
        topic = record.partition.topic.removeprefix(self._prefix)
        try:
            event = decode(topic, record.value)
        except EventDecodeError as error:
            try:
                self._bury(topic, group, record, f"{type(error).__name__}: {error}", "")
            except BusError:
                consumer.rewind(record)
                raise
            consumer.commit(record)
            return None
        try:
            attempt = self._begin(consumer, record, group)
        except LOST:
            consumer.rewind(record)
            return None
        except (KafkaError, BusError):
            consumer.rewind(record)
            raise
        return Delivery(event, topic, group, attempt, record)

    def _begin(self, consumer: "_Consumer", record: _Record, group: str) -> int:
        """Note that the record is begun; its attempt. One by a consumer that still lives did not end its process."""
        begun, by = consumer.noted(record)
        attempt = max(begun, 1) if by and (by == self._name or self._lives(by, group)) else begun + 1
        consumer.note(record, attempt, self._name)
        return attempt

    def _lives(self, name: str, group: str) -> bool:
        """Whether the consumer is a member of the group: then its partition has only moved."""
        with self._admin() as admin:
            members = admin.describe_groups([self._prefix + group])[self._prefix + group]["members"]
        return name in {member["client_id"] for member in members}

    def _bury(self, topic: str, group: str, record: _Record, error: str, trace: str) -> None:
        headers = {
            "topic": topic,
            "group": group,
            "error": error,
            "traceback": trace[-LONGEST_TRACE:],  # its end says what went wrong
            "died_at": utc_now().isoformat(),
        }
        encoded = [(name, text.encode(errors="replace")) for name, text in headers.items()]
        self._send(topic + DEAD_LETTER, record.key, record.value, encoded)

    def _send(self, topic: str, key: bytes, value: bytes, headers: Headers) -> None:
        with self._answers(self._forget_producer):
            with self._producing:
                if self._closed:
                    raise BusError(f"the bus at {self._where} has been closed in this process")
                if self._producer is None:
                    self._create_topics()
                    self._producer = _open(KafkaProducer, bootstrap_servers=self._servers, **PRODUCER)
                producer = self._producer
            sent = producer.send(self._prefix + topic, key=key, value=value, headers=headers)
            sent.get(timeout=2 * ANSWER_S)

    def _read_all(self, topic: str) -> Iterator[Any]:
        """Every record that lies in the topic now."""
        self._create_topics()
        with self._reading() as consumer:
            name = self._prefix + topic
            partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name)]
            consumer.assign(partitions)
            consumer.seek_to_beginning()
            end = consumer.end_offsets(partitions)
            silent_since = time.monotonic()
            while any(consumer.position(p, timeout_ms=1000 * ANSWER_S) < end[p] for p in partitions):
                for records in consumer.poll(timeout_ms=200).values():
                    silent_since = time.monotonic()
                    yield from records
                if time.monotonic() - silent_since > ANSWER_S:
                    raise BusError(f"the broker at {self._where} stopped answering while {name} was read; try again")

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """A consumer of no group, for the block."""
        with self._answers(lambda: None):
            consumer = _open(KafkaConsumer, bootstrap_servers=self._servers, metrics_enabled=False, **CONSUMER)
            try:
                yield consumer
            finally:
                consumer.close(autocommit=False, timeout_ms=1000 * CLOSE_S)

    def _create_topics(self) -> None:
        if self._topics_exist:
            return
        wanted: dict[str, dict[str, Any]] = {}
        for event_type in EVENT_TYPES.values():
            name = self._prefix + event_type.topic
            keep_ms = KEEP_EVENTS_DAYS * 24 * 3600 * 1000
            wanted[name] = {"num_partitions": PARTITIONS, "configs": {"retention.ms": str(keep_ms)}}
            wanted[name + DEAD_LETTER] = {"num_partitions": 1, "configs": {"retention.ms": "-1"}}
        with self._admin() as admin:
            missing = wanted.keys() - set(admin.list_topics())
            if missing:
                with suppress(TopicAlreadyExistsError):  # another service was faster
                    admin.create_topics({name: wanted[name] for name in missing})
                admin.wait_for_topics(missing)
        self._topics_exist = True

    @contextmanager
    def _admin(self) -> Iterator[Any]:
        with self._answers(lambda: None):
            self._probe()
            with _open(KafkaAdminClient, bootstrap_servers=self._servers, **CLIENT) as admin:
                yield admin

    def _probe(self) -> None:
        """Raise BusError at once when no server accepts a connection."""
        reason: OSError | None = None
        for server in self._servers:
            host, _, port = server.rpartition(":")
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=CLOSE_S).close()
                return
            except OSError as error:
                reason = error
        raise self._unreachable(reason)

    @contextmanager
    def _answers(self, forget: Callable[[], None]) -> Iterator[None]:
        try:
            yield
        except KafkaError as error:
            forget()
            self._topics_exist = False  # a broker may come back empty
            raise self._unreachable(error) from error

    def _unreachable(self, reason: BaseException | None) -> BusError:
        return BusError(
            f"Kafka at {self._where} does not serve: {reason}; start the broker (`make kafka` runs one on this host)"
            " or correct bus.url"
        )

    def _forget(self, group: str) -> None:
        consumer = self._consumers.pop(group, None)
        if consumer is not None:
            consumer.close()

    def _forget_producer(self) -> None:
        """After an error the next send makes a new producer: the old one's sequence may have a hole."""
        producer, self._producer = self._producer, None
        if producer is not None:
            with suppress(KafkaError):
                producer.close(timeout=0)


class _Consumer(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types, and asks for its class
    """A group's membership: what is out, and where to go on.

    Attempts are noted of the first record after an assignment only: where one consumer dies, another begins.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._out: set[TopicPartition] = set()
        self._followed: set[TopicPartition] = set()  # held since a commit of ours: nobody else began what comes next
        self.heard_at = self._assigned_at = time.monotonic()

    def idle_s(self) -> float:
        """How long it has held no partition: for ever where a group has more members than there are partitions."""
        if self._client.assignment():
            self._assigned_at = time.monotonic()
        return time.monotonic() - self._assigned_at

    def subscribe(self, topics: list[str]) -> None:
        if self._client.subscription() != set(topics):
            self._client.subscribe(topics, listener=self)

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """Others may have had them."""
        self._followed.difference_update(assigned)

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Nothing to do before they come back."""

    def poll(self, timeout_s: float) -> _Record | None:
        """The next record of a partition of which none is out: committing a later one would lose the first."""
        for partition, (record,) in self._client.poll(timeout_ms=int(1000 * timeout_s), max_records=1).items():
            self.heard_at = time.monotonic()
            if partition in self._out:
                self._client.seek(partition, record.offset)
                time.sleep(HELD_BACK_S)
                continue
            self._out.add(partition)
            only_group = dict(record.headers).get("only-group")
            return _Record(
                partition,
                record.offset,
                record.key or b"",
                record.value or b"",
                only_group.decode() if only_group is not None else None,
            )
        return None

    def noted(self, record: _Record) -> tuple[int, str]:
        """How often the record has been begun in the group, and by whom last."""
        if record.partition in self._followed:
            return 0, ""
        here = self._client.committed(record.partition, metadata=True, timeout_ms=1000 * ANSWER_S)
        if here is None or here.offset != record.offset:
            return 0, ""
        begun, _, by = here.metadata.partition(" ")
        return int(begun) if begun.isdecimal() else 0, by

    def note(self, record: _Record, begun: int, by: str) -> None:
        """Write so, unless nothing is noted of such a record; the group still stands before it."""
        if record.partition not in self._followed:
            self._commit(record.partition, record.offset, f"{begun} {by}")

    def commit(self, record: _Record) -> None:
        """Commit behind the record, and go on there."""
        self._out.discard(record.partition)
        place, behind = record.partition, record.offset + 1
        try:
            self._commit(place, behind, "")
        except LOST:
            log.warning("%s went to another consumer while an event of it was handled; it may be handled twice", place)
        except KafkaError:
            self.rewind(record)
            self.heard_at = -math.inf
            raise
        else:
            self._followed.add(place)
            if self._client.position(place, timeout_ms=1000 * ANSWER_S) != behind:
                self._client.seek(place, behind)

    def keep_alive(self) -> None:
        # Not by pausing: kafka-python 3.0.12 can forget what it had fetched of a partition that was paused and resumed.
        for partition, (record,) in self._client.poll(timeout_ms=KEEP_ALIVE_POLL_MS, max_records=1).items():
            self._client.seek(partition, record.offset)

    def rewind(self, record: _Record) -> None:
        """Go back, so that the record is taken again."""
        self._out.discard(record.partition)
        self._followed.discard(record.partition)
        if record.partition in self._client.assignment():
            self._client.seek(record.partition, record.offset)

    def _commit(self, partition: TopicPartition, offset: int, metadata: str) -> None:
        if partition not in self._client.assignment():
            raise CommitFailedError
        self._client.commit({partition: OffsetAndMetadata(offset, metadata, -1)}, timeout_ms=1000 * ANSWER_S)
        self.heard_at = time.monotonic()

    def close(self) -> None:
        with suppress(KafkaError):
            self._client.close(autocommit=False, timeout_ms=1000 * CLOSE_S)


def _record(delivery: Delivery) -> _Record:
    assert isinstance(delivery.token, _Record)
    return delivery.token


def _open(kind: Any, **settings: Any) -> Any:
    """A client of kafka-python; one that cannot bootstrap would leave its thread and its sockets behind."""
    opened: list[Any] = []

    def connections(**configs: Any) -> Any:
        opened.append(KafkaNetClient(**configs))
        return opened[-1]

    try:
        return kind(kafka_client=connections, **settings)
    except BaseException:
        for client in opened:
            client.close()
        raise


def _address(server: str) -> str:
    host, _, port = server.strip().rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"bus.url names the Kafka server {server!r}; use kafka://HOST:PORT[,HOST:PORT]")
    return f"{host}:{port}"


def _study(letter: DeadLetter) -> bytes:
    try:
        return decode(letter.topic, letter.message).study_instance_uid.encode()
    except EventDecodeError:
        return b""

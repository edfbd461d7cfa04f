"""The bus in one SQLite file, for the processes of one host: WAL, and every commit synced to the disk.

A message is appended once. Each group keeps `done_through`, below which it has acknowledged everything, and one row
per delivery above it. A delivery is leased: a consumer that goes silent loses it when the lease ends, one whose
process died loses it at once, because the kernel drops the lock by which it is known to live.

The same event, byte for byte, is kept once: who died between publishing and noting so may publish it again. Another
event of the same cause is another message: what failed and was replayed has a second result with the same id.
"""

import fcntl
import os
import secrets
import sqlite3
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from herald.bus import DeadLetter, Delivery, Queue, decode
from herald.errors import BusError, EventDecodeError
from herald.events import Event, utc_now
from herald.wal import use_wal

LEASE_S = 30.0
POLL_S = 0.004
"""How often a waiting consumer asks whether the file has changed: half of it is added to each latency."""
LOOK_AGAIN_S = 0.5
"""How often it looks for leases that ended, which change nothing in the file."""
BUSY_S = 10.0
KEEP_ACKNOWLEDGED_S = 7 * 24 * 3600.0
PRUNE_EVERY_S = 3600.0
SCHEMA_VERSION = 1

SCHEMA = """
CREATE TABLE IF NOT EXISTS messages (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of delivery
    event_id TEXT,                          -- of the event; null on a replay
    topic TEXT NOT NULL,
    study TEXT NOT NULL,                    -- StudyInstanceUID: deliveries of one study do not overtake each other
    body BLOB NOT NULL,
    only_group TEXT,                        -- set on a replay: the other groups have handled it
    published_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS messages_of_topic ON messages (topic, seq);
CREATE INDEX IF NOT EXISTS messages_by_event ON messages (event_id) WHERE only_group IS NULL;
CREATE TABLE IF NOT EXISTS progress (
    group_name TEXT NOT NULL,
    topic TEXT NOT NULL,
    done_through INTEGER NOT NULL,
    PRIMARY KEY (group_name, topic)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS deliveries (
    group_name TEXT NOT NULL,
    topic TEXT NOT NULL,
    seq INTEGER NOT NULL,
    study TEXT NOT NULL,
    owner INTEGER NOT NULL,
    lease_until REAL NOT NULL,
    attempt INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (group_name, topic, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dead_letters (
    letter_id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    group_name TEXT NOT NULL,
    study TEXT NOT NULL,
    body BLOB NOT NULL,
    error TEXT NOT NULL,
    traceback TEXT NOT NULL,
    died_at TEXT NOT NULL
);
"""

# The first open message of a topic whose study nobody in the group is working on, and its attempt. What this very
# consumer has begun, and could then neither finish nor give back, did not end its process: that does not count.
NEXT = """
SELECT m.seq, m.topic, m.study, m.body, coalesce(d.attempt - (d.owner = :owner), 0) + 1
FROM messages m LEFT JOIN deliveries d ON d.group_name = :group AND d.topic = m.topic AND d.seq = m.seq
WHERE m.topic = :topic AND m.seq > :done AND coalesce(m.only_group, :group) = :group
  AND (d.seq IS NULL OR (NOT d.acknowledged AND d.lease_until <= :now))
  AND NOT EXISTS (SELECT 1 FROM deliveries o WHERE o.group_name = :group AND o.study = m.study
                  AND NOT o.acknowledged AND o.lease_until > :now)
ORDER BY m.seq LIMIT 1
"""

# Messages of a topic that the group has not acknowledged.
OPEN = """
FROM messages m LEFT JOIN deliveries d ON d.group_name = :group AND d.topic = m.topic AND d.seq = m.seq
WHERE m.topic = :topic AND m.seq > :done AND coalesce(m.only_group, :group) = :group
  AND NOT coalesce(d.acknowledged, 0)
"""

HINTS = {
    "unable to open": "create its folder, or correct bus.url",
    "not a database": "it is another file: move it away, or correct bus.url",
    "malformed": "it is damaged: stop the node, keep a copy, and let `sqlite3 FILE .recover` save what it holds",
    "is full": "free disk space",
    "locked": f"another process has held it for {BUSY_S:.0f} s: look for a stuck one",
    "readonly": "give the node's user write permission to the file and its folder",
    "disk I/O": "look at the disk's health and at free space",
}

Row = tuple[int, str, str, bytes, int]


class SqliteBus:
    """The bus in the file `path`, whose folder must exist."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._presence: _Presence | None = None
        self._own_commits = 0
        self._next_prune = 0.0
        self._closed = False

    def publish(self, event: Event) -> None:
        """Append the event unless the very same is there already; it is on the disk on return."""
        event_id, body = str(event.event_id), event.to_json()
        with self._transaction() as db:  # of which there is one at a time, whatever the process
            same = "SELECT 1 FROM messages WHERE event_id = ? AND only_group IS NULL AND body = ?"
            if db.execute(same, (event_id, body)).fetchone() is None:
                _append(db, event_id, event.topic, event.study_instance_uid, body, None)

    def fetch(self, group: str, topics: tuple[str, ...], timeout_s: float) -> Delivery | None:
        """The next delivery for the group, or None after `timeout_s` without one."""
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self._version()
            delivery = self._claim(group, topics)
            if delivery is not None:
                return delivery
            look_again = min(deadline, time.monotonic() + LOOK_AGAIN_S)
            while time.monotonic() < look_again and self._version() == seen:
                time.sleep(POLL_S)
            if time.monotonic() >= deadline:
                return None

    def ack(self, delivery: Delivery) -> None:
        """Never deliver this again to the group."""
        with self._transaction() as db:
            _acknowledge(db, delivery.group, delivery.topic, _seq(delivery))
            if time.monotonic() >= self._next_prune:
                self._next_prune = time.monotonic() + PRUNE_EVERY_S
                _prune(db)

    def keep_alive(self, delivery: Delivery) -> None:
        """Renew the lease."""
        self._change(delivery, "lease_until = ?", time.time() + LEASE_S)

    def release(self, delivery: Delivery) -> None:
        """Give the delivery back undone; nobody has it then."""
        self._change(delivery, "lease_until = 0, owner = 0, attempt = ?", delivery.attempt - 1)

    def forgive(self, delivery: Delivery) -> None:
        """Do not count this attempt."""
        self._change(delivery, "attempt = ?", delivery.attempt - 1)

    def dead_letter(self, delivery: Delivery, error: str, trace: str) -> None:
        """Put the delivery aside with its error, and acknowledge it."""
        with self._transaction() as db:
            _bury(db, delivery.group, delivery.topic, _seq(delivery), error, trace)

    def dead_letters(self, topic: str) -> list[DeadLetter]:
        """What was put aside, oldest first."""
        with self._connected() as db:
            rows = db.execute(
                "SELECT letter_id, topic, group_name, body, error, traceback, died_at FROM dead_letters"
                " WHERE topic = ? ORDER BY letter_id",
                (topic,),
            ).fetchall()
        return [
            DeadLetter(str(letter_id), topic, group, body, error, trace, datetime.fromisoformat(died_at))
            for letter_id, topic, group, body, error, trace, died_at in rows
        ]

    def replay(self, letter: DeadLetter) -> None:
        """Publish a dead letter again to the group that could not handle it; a letter already replayed is left."""
        with self._transaction() as db:
            row = db.execute(
                "DELETE FROM dead_letters WHERE letter_id = ? RETURNING study", (int(letter.letter_id),)
            ).fetchone()
            if row is not None:
                _append(db, None, letter.topic, row[0], letter.message, letter.group)

    def backlog(self, group: str, topic: str) -> int:
        """How many events the group has not acknowledged."""
        with self._connected() as db:
            at = {"group": group, "topic": topic, "done": _done_through(db, group, topic)}
            return int(db.execute("SELECT count(*) " + OPEN, at).fetchone()[0])

    def queues(self, of: Iterable[tuple[str, str]]) -> list[Queue]:
        """What waits for each of these groups on its topic, and since when."""
        found = []
        with self._connected() as db:
            for group, topic in of:
                at = {"group": group, "topic": topic, "done": _done_through(db, group, topic)}
                waiting, oldest = db.execute("SELECT count(*), min(m.published_at) " + OPEN, at).fetchone()
                oldest_at = None if oldest is None else datetime.fromtimestamp(oldest, UTC)
                found.append(Queue(group, topic, waiting, oldest_at))
        return found

    def check(self) -> None:
        """Raise BusError when the file cannot be written."""
        with self._transaction():
            pass

    def close(self) -> None:
        """Let go of the file; deliveries that are out come back to others at once."""
        with self._lock:
            self._closed = True
            presence, self._presence = self._presence, None
            if presence is not None:
                presence.close()
            self._disconnect()

    def _change(self, delivery: Delivery, assignment: str, value: float) -> None:
        """Change the row of a delivery that is still this consumer's."""
        with self._transaction() as db:
            db.execute(
                f"UPDATE deliveries SET {assignment} WHERE group_name = ? AND topic = ? AND seq = ? AND owner = ?",
                (value, delivery.group, delivery.topic, _seq(delivery), self._own_presence().owner),
            )

    def _claim(self, group: str, topics: tuple[str, ...]) -> Delivery | None:
        with self._connected() as db:
            owner = self._own_presence().owner
            self._end_leases_of_the_dead(db, group)
            if _next(db, group, topics, owner) is None:  # most looks find nothing, and need no lock for it
                return None
        with self._transaction() as db:
            for topic in topics:  # a group is known, and nothing is pruned before it, from its first delivery
                db.execute("INSERT OR IGNORE INTO progress VALUES (?, ?, 0)", (group, topic))
            while (row := _next(db, group, topics, owner)) is not None:
                seq, topic, study, body, attempt = row
                db.execute(
                    "INSERT OR REPLACE INTO deliveries VALUES (?, ?, ?, ?, ?, ?, ?, 0)",
                    (group, topic, seq, study, owner, time.time() + LEASE_S, attempt),
                )
                try:
                    return Delivery(decode(topic, body), topic, group, attempt, seq)
                except EventDecodeError as error:
                    _bury(db, group, topic, seq, f"{type(error).__name__}: {error}", "")
        return None

    def _end_leases_of_the_dead(self, db: sqlite3.Connection, group: str) -> None:
        presence = self._own_presence()
        owners = db.execute(
            "SELECT DISTINCT owner FROM deliveries WHERE group_name = ? AND NOT acknowledged AND lease_until > ?",
            (group, time.time()),
        ).fetchall()
        for (owner,) in owners:
            if owner != presence.owner and not presence.lives(owner):
                db.execute("UPDATE deliveries SET lease_until = 0 WHERE owner = ? AND NOT acknowledged", (owner,))

    def _own_presence(self) -> "_Presence":
        if self._presence is None:
            self._presence = _Presence(self._path.with_name(self._path.name + "-consumers"))
        return self._presence

    def _version(self) -> tuple[int, int]:
        """Changes with every commit to the file."""
        with self._connected() as db:
            return db.execute("PRAGMA data_version").fetchone()[0], self._own_commits

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
                self._own_commits += 1
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time; after an error the next use opens the file anew."""
        with self._lock:
            try:
                yield self._connect()
            except (sqlite3.Error, OSError) as error:
                self._disconnect()
                hint = next((hint for text, hint in HINTS.items() if text in str(error)), "see the message")
                raise BusError(f"the bus {self._path} cannot be used: {error}; {hint}") from error

    def _connect(self) -> sqlite3.Connection:
        if self._closed:
            raise BusError(f"the bus {self._path} has been closed in this process")
        if self._connection is None:
            db = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
            try:
                use_wal(db, BUSY_S)
                db.execute("PRAGMA synchronous = FULL")
                db.execute("BEGIN IMMEDIATE")
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version > SCHEMA_VERSION:
                    raise BusError(f"the bus {self._path} was written by a newer Herald; use that version")
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("COMMIT")
            except BaseException:
                db.close()
                raise
            self._connection = db
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Presence:
    """Says that a consumer lives: a lock on the byte `owner` of a file, which the kernel drops with the process.

    Open-file-description locks (Linux) belong to this object and not to the process, so two consumers of one process
    see each other's, and no process id can be mistaken for another's. Elsewhere everybody counts as alive.
    """

    def __init__(self, path: Path) -> None:
        self.owner = secrets.randbits(62)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        self._lock("F_OFD_SETLK", self.owner)

    def lives(self, owner: int) -> bool:
        """Whether the consumer's process still runs and has not closed its bus."""
        held = self._lock("F_OFD_GETLK", owner)
        return held is None or held != fcntl.F_UNLCK

    def close(self) -> None:
        """Give up the lock, and with it every lease."""
        os.close(self._file)

    def _lock(self, command: str, owner: int) -> int | None:
        number = getattr(fcntl, command, None)
        if number is None:
            return None
        layout = "hhqqi4x"  # struct flock: type, whence, start, length, pid
        answer = fcntl.fcntl(self._file, number, struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, owner, 1, 0))
        return int(struct.unpack(layout, answer)[0])


def _seq(delivery: Delivery) -> int:
    assert isinstance(delivery.token, int)
    return delivery.token


def _append(
    db: sqlite3.Connection, event_id: str | None, topic: str, study: str, body: bytes, only_group: str | None
) -> None:
    db.execute(
        "INSERT INTO messages (event_id, topic, study, body, only_group, published_at) VALUES (?, ?, ?, ?, ?, ?)",
        (event_id, topic, study, body, only_group, time.time()),
    )


def _done_through(db: sqlite3.Connection, group: str, topic: str) -> int:
    row = db.execute("SELECT done_through FROM progress WHERE group_name = ? AND topic = ?", (group, topic)).fetchone()
    return 0 if row is None else int(row[0])


def _next(db: sqlite3.Connection, group: str, topics: tuple[str, ...], owner: int) -> Row | None:
    found: list[Row] = []
    at = {"group": group, "owner": owner, "now": time.time()}
    for topic in topics:
        found += db.execute(NEXT, {**at, "topic": topic, "done": _done_through(db, group, topic)}).fetchall()
    return min(found, default=None)


def _acknowledge(db: sqlite3.Connection, group: str, topic: str, seq: int) -> None:
    """Mark the delivery, and move `done_through` up to the first message that is still open."""
    here = (group, topic)
    db.execute("UPDATE deliveries SET acknowledged = 1 WHERE group_name = ? AND topic = ? AND seq = ?", (*here, seq))
    done = _done_through(db, group, topic)
    at = {"group": group, "topic": topic, "done": done}
    (first_open,) = db.execute("SELECT min(m.seq) " + OPEN, at).fetchone()
    if first_open is not None:
        done = first_open - 1
    else:
        (newest,) = db.execute("SELECT max(seq) FROM messages WHERE topic = ?", (topic,)).fetchone()
        done = max(done, newest or 0)
    db.execute("UPDATE progress SET done_through = ? WHERE group_name = ? AND topic = ?", (done, *here))
    db.execute("DELETE FROM deliveries WHERE group_name = ? AND topic = ? AND acknowledged AND seq <= ?", (*here, done))


def _bury(db: sqlite3.Connection, group: str, topic: str, seq: int, error: str, trace: str) -> None:
    db.execute(
        "INSERT INTO dead_letters (topic, group_name, study, body, error, traceback, died_at)"
        " SELECT topic, ?, study, body, ?, ?, ? FROM messages WHERE seq = ?",
        (group, error, trace, utc_now().isoformat(), seq),
    )
    _acknowledge(db, group, topic, seq)


def _prune(db: sqlite3.Connection) -> None:
    """Delete old messages that every known group has acknowledged."""
    db.execute(
        "DELETE FROM messages WHERE published_at < ?"
        " AND seq <= (SELECT min(done_through) FROM progress WHERE progress.topic = messages.topic)",
        (time.time() - KEEP_ACKNOWLEDGED_S,),
    )

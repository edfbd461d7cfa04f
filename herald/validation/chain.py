"""The validation record: numbered entries that are only ever added, each bound to the one before by its SHA-256.

An entry holds what was known of one series revision when it was written; a later entry of the same revision replaces
it, and both stay. Who changes, removes or moves an entry breaks the chain there. Who cuts off its end, or writes all of
it anew, does not: against that an investigator writes down the number and hash of the last entry, by which `verify` can
look for that very entry later (Haber and Stornetta, How to time-stamp a digital document, 1991).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, func, insert, select, text

from herald.ledger import Ledger, validation
from herald.validation.row import ValidationRow

START = "0" * 64
"""What the first entry has for the hash of the one before."""

AT_ONCE = 500
_LOCK = 0x4865726D
"""Of the transaction that appends on PostgreSQL; any number that nobody else locks in this database."""

_decoder = msgspec.json.Decoder(ValidationRow)
_encoder = msgspec.json.Encoder(order="sorted")


@dataclass(frozen=True)
class Fault:
    """The first entry at which the record does not hold, and why."""

    entry: int
    why: str


@dataclass(frozen=True)
class Verification:
    """How many entries hold from the first on, and the hash of the last of these; `fault` is None when all do."""

    entries: int
    head_sha256: str
    fault: Fault | None = None


def encode(row: ValidationRow) -> str:
    """Canonical JSON: keys sorted, no blanks, times in UTC."""
    return _encoder.encode(row).decode()


def decode(row: str) -> ValidationRow:
    """The row that `encode` was given; what an older or newer version wrote has defaults for what it lacks."""
    return _decoder.decode(row)


def digest(entry: int, written_at: datetime, row: str, previous_sha256: str) -> str:
    """SHA-256 of an entry, in hex."""
    return hashlib.sha256(f"{entry}\n{written_at.isoformat()}\n{row}\n{previous_sha256}".encode()).hexdigest()


def append(ledger: Ledger, rows: Iterable[ValidationRow], now: datetime) -> int:
    """Write an entry for every row that differs from the last entry of its series revision; gives their number.

    Each 500 rows are one transaction, so that whoever is killed leaves a whole record. The mode of a row without a page
    stays what it was when it was first written: the node may have gone live since. Raises LedgerError.
    """
    written, rest, now = 0, iter(rows), now.astimezone(UTC)
    while some := list(islice(rest, AT_ONCE)):
        with ledger.read() as connection:
            if not _news(connection, some):  # as nearly always, and then nobody is kept from writing
                continue
        with ledger.begin() as connection:
            _lock(connection)
            news = _news(connection, some)
            _write(connection, news, now)
            written += len(news)
    return written


def _lock(connection: Connection) -> None:
    """Keep other writers out before the head of the chain is read, so that it cannot fork."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _LOCK})
    else:
        connection.exec_driver_sql("begin immediate")


def _write(connection: Connection, rows: list[ValidationRow], now: datetime) -> None:
    head = connection.execute(
        select(validation.c.entry, validation.c.sha256).order_by(validation.c.entry.desc()).limit(1)
    ).first()
    entry, previous = (head[0], head[1]) if head else (0, START)
    values = []
    for row in rows:
        entry, body = entry + 1, encode(row)
        values.append(
            {
                "entry": entry,
                "series_instance_uid": row.series_instance_uid,
                "revision": row.revision,
                "written_at": now,
                "row": body,
                "previous_sha256": previous,
                "sha256": (previous := digest(entry, now, body, previous)),
            }
        )
    if values:
        connection.execute(insert(validation), values)


def _news(connection: Connection, rows: list[ValidationRow]) -> list[ValidationRow]:
    """The rows that say something new, each as it is to be written."""
    uids = {row.series_instance_uid for row in rows}
    last = {_key(row): row for row in _newest(connection, validation.c.series_instance_uid.in_(uids))}
    news: dict[tuple[str, int], ValidationRow] = {}
    for row in rows:
        before = last.get(_key(row))
        if before is not None and not row.page_state and before.mode:
            row = replace(row, mode=before.mode)
        if before is None or decode(encode(row)) != before:
            news[_key(row)] = row
    return list(news.values())


def _key(row: ValidationRow) -> tuple[str, int]:
    return row.series_instance_uid, row.revision


def _newest(connection: Connection, *where: Any) -> Iterator[ValidationRow]:
    """The last entry of each series revision."""
    last = select(func.max(validation.c.entry)).where(*where)
    last = last.group_by(validation.c.series_instance_uid, validation.c.revision)
    for row in connection.execute(select(validation.c.row).where(validation.c.entry.in_(last))).scalars():
        yield decode(row)


def latest(connection: Connection, start: datetime | None = None, end: datetime | None = None) -> list[ValidationRow]:
    """The newest row of each series revision whose first image, else whose decision, was at `start` or later, before
    `end`; in the order of these times. Raises what the connection raises.
    """
    found = []
    for row in _newest(connection):
        at = row.first_image_at or row.triaged_at
        if at is None or (start is not None and at < start) or (end is not None and at >= end):
            continue
        found.append((at, *_key(row), row))
    return [row for *_, row in sorted(found, key=lambda one: one[:3])]


def verify(ledger: Ledger, head_sha256: str = "", entries: int | None = None) -> Verification:
    """Walk the record from its first entry, and look for an entry that was written down: its hash, and its number.

    Stops at the first fault. A missing end shows only by an entry that was written down. Raises LedgerError.
    """
    holds, previous, seen = 0, START, False
    wanted = head_sha256.strip().lower()
    with ledger.read() as connection:
        for row in _walk(connection):
            why = _why_wrong(row, holds + 1, previous)
            if not why and wanted and row["entry"] == entries and row["sha256"] != wanted:
                why = f"it has the hash {row['sha256']}, not the one that was written down: the record was made anew"
            if why:
                return Verification(holds, previous, Fault(holds + 1, why))
            holds, previous = row["entry"], row["sha256"]
            seen = seen or previous == wanted
    if entries is not None and entries > holds:
        why = f"it was written down, but the record ends with entry {holds}: its end was cut off"
        return Verification(holds, previous, Fault(holds + 1, why))
    if wanted and not seen:
        why = f"no entry has the hash {wanted} that was written down: the record was made anew, or its end was cut off"
        return Verification(holds, previous, Fault(holds + 1, why))
    return Verification(holds, previous)


def _walk(connection: Connection) -> Iterator[Any]:
    """Every entry in order, some at a time, so that a record of years needs no memory."""
    statement: Select[Any] = select(validation).order_by(validation.c.entry).limit(AT_ONCE)
    after: int | None = None
    while (
        some := connection.execute(statement if after is None else statement.where(validation.c.entry > after))
        .mappings()
        .all()
    ):
        yield from some
        after = some[-1]["entry"]


def _why_wrong(row: Any, expected: int, previous: str) -> str:
    """What is wrong with the entry that should be number `expected`, in words; empty when it holds."""
    if row["entry"] != expected:
        if row["entry"] < expected:
            return f"entry {row['entry']} stands where none can be: entries are numbered from 1"
        return f"it is missing, entry {row['entry']} comes next: entries were removed"
    linked = row["previous_sha256"] == previous
    whole = row["sha256"] == digest(row["entry"], row["written_at"], row["row"], row["previous_sha256"])
    if not whole and not linked:
        return "neither its content nor the entry before fits its hashes: entries were removed or put in another order"
    if not whole:
        return "its content does not fit its hash: it was changed after it was written"
    if not linked:
        return "it does not follow from the entry before: that one was changed or replaced, and its hash made anew"
    try:
        named = _key(decode(row["row"]))
    except msgspec.MsgspecError as error:
        return f"its row is none of the validation record: {error}"
    if named != (row["series_instance_uid"], row["revision"]):
        return "its columns name another series revision than its row: they were changed after it was written"
    return ""

"""Which days a report is of, and where the record stood when it was made."""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta

from sqlalchemy import Connection, select

from herald.errors import ConfigError
from herald.ledger import validation
from herald.validation.chain import START


@dataclass(frozen=True)
class Head:
    """Number and hash of the last entry of the record from which a report was made."""

    entries: int
    sha256: str


def head(connection: Connection) -> Head:
    """Where the record stands; the entries before are as `chain.verify` finds them."""
    columns = (validation.c.entry, validation.c.sha256)
    last = connection.execute(select(*columns).order_by(validation.c.entry.desc()).limit(1)).first()
    return Head(last[0], last[1]) if last else Head(0, START)


def period(first: date, last: date) -> tuple[datetime, datetime]:
    """From the start of the first day to the end of the last, in UTC; raises ConfigError where there is no such day."""
    if last < first:
        raise ConfigError(f"the period ends before it starts: from {first} to {last}, which is its last day")
    start = datetime.combine(first, time(), UTC)
    try:
        return start, datetime.combine(last, time(), UTC) + timedelta(days=1)
    except OverflowError as error:
        raise ConfigError(f"the period ends later than dates can tell: {last}; give an earlier last day") from error

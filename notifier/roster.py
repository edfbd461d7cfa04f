"""Who is on call: a roster file, iCalendar or CSV, looked into anew whenever somebody is to be paged.

iCalendar: a shift's SUMMARY is the role; its address is the first ATTENDEE who has not declined, else the first line of
LOCATION, else that of DESCRIPTION. Recurring shifts, their exceptions, all-day shifts and time zones are understood; a
cancelled shift is none. CSV: the columns role, from, until and to, times in ISO 8601. Times without a zone are of
`notifier.time_zone`. Where shifts of a role overlap, the one that began last is on call: a swap overrides the rota.
"""

import csv
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from pathlib import Path
from typing import Any

import icalendar
import recurring_ical_events  # type: ignore[import-untyped]

from herald.errors import ChannelRefused, ConfigError

log = logging.getLogger(__name__)

COLUMNS = ("role", "from", "until", "to")
MARGIN = timedelta(days=1)
"""Shifts are looked for this far around a moment, further than any two zones are apart, and kept for so long."""


@dataclass(frozen=True)
class Shift:
    """Who is on call for a role from a moment until another (UTC); `role` is in lower case."""

    role: str
    begins: datetime
    ends: datetime
    to: str


Shifts = Callable[[datetime, datetime], Iterable[Shift]]
"""Every shift that overlaps a span, and perhaps others."""


class Roster:
    """The roster file at `path`; it is read again when it has changed, and the last good reading is kept."""

    def __init__(self, path: str, zone: tzinfo | None) -> None:
        """`zone` is that of times without one, None is the host's. Raises ConfigError when the file cannot be read."""
        self._path = Path(path)
        self._zone = zone
        self._lock = threading.Lock()
        self._seen = self._version()
        self._shifts = read_roster(self._path, zone)
        self._near: tuple[datetime, list[Shift]] | None = None  # shifts around a moment: expanding a calendar is slow

    def on_call(self, role: str, at: datetime) -> str:
        """The address of who is on call for a role; raises ChannelRefused when nobody is."""
        with self._lock:
            self._refresh()
            if self._near is None or abs(at - self._near[0]) > MARGIN:
                self._near = at, list(self._shifts(at - 2 * MARGIN, at + 2 * MARGIN))
            near = self._near[1]
        name = _role(role)
        now = [shift for shift in near if shift.role == name and shift.begins <= at < shift.ends]
        if not now:
            local = at.astimezone(self._zone)
            raise ChannelRefused(
                f"nobody is on call for {role} at {local:%a %Y-%m-%d %H:%M %Z} in {self._path.name}; add a shift"
            )
        return min(reversed(now), key=lambda shift: (-shift.begins.timestamp(), shift.ends)).to

    def _refresh(self) -> None:
        """Read the file again when its time or size is another; one that cannot be read is told once, and left."""
        seen = self._version()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._shifts = read_roster(self._path, self._zone)
        except ConfigError as error:
            log.error("%s; until then the roster is used as it was", error)
            return
        self._near = None
        log.info("the roster %s is read anew", self._path.name)

    def _version(self) -> tuple[int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size


def read_roster(path: Path, zone: tzinfo | None) -> Shifts:
    """The shifts in a file; raises ConfigError that names the file, the place and what to do."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".ics":
            return _read_calendar(content, zone)
        if path.suffix.lower() == ".csv":
            shifts = list(_read_table(content.decode("utf-8-sig").splitlines(), zone))
            return lambda begins, ends: shifts
    except OSError as error:
        raise ConfigError(f"notifier.roster {path} cannot be read: {error.strerror}; correct its name") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, csv.Error) as error:
        # what a calendar's parser raises depends on where the file is damaged
        raise ConfigError(f"notifier.roster {path} is damaged: {error}; correct it or export it again") from error
    raise ConfigError(f"notifier.roster {path} is neither .ics nor .csv; use one of them")


def _role(text: str) -> str:
    return text.strip().casefold()


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_table(lines: list[str], zone: tzinfo | None) -> Iterator[Shift]:
    rows = csv.DictReader(lines, skipinitialspace=True)
    if missing := [column for column in COLUMNS if column not in (rows.fieldnames or ())]:
        raise ValueError(f"its first line lacks {', '.join(missing)}; it must name {','.join(COLUMNS)}")
    for row in rows:
        where = f"line {rows.line_num}"
        if any(not (row[column] or "").strip() for column in COLUMNS):
            raise ValueError(f"{where} has an empty column")
        try:
            begins, ends = (_utc(datetime.fromisoformat(row[c].strip()), zone) for c in ("from", "until"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}; write times as 2026-11-22T18:00") from error
        if not begins < ends:
            raise ValueError(f"{where} ends before it begins")
        yield Shift(_role(row["role"]), begins, ends, row["to"].strip())


# --- iCalendar -------------------------------------------------------------------------------------------------------


def _read_calendar(content: bytes, zone: tzinfo | None) -> Shifts:
    calendar = icalendar.Calendar.from_ical(content)
    for event in calendar.walk("VEVENT"):
        summary = str(event.get("SUMMARY", "")).strip()
        if not summary:
            raise ValueError(f"the shift {event.get('UID', 'without UID')} has no SUMMARY, which must be its role")
        if not _address(event):
            raise ValueError(f"the shift {summary} has no address: give it an ATTENDEE, or a LOCATION or DESCRIPTION")
        if event.errors:
            raise ValueError(f"the shift {summary}: {event.errors[0]}")
    query = recurring_ical_events.of(calendar, skip_bad_series=False)

    def shifts(begins: datetime, ends: datetime) -> Iterator[Shift]:
        for event in query.between(begins, ends):
            if str(event.get("STATUS", "")).upper() != "CANCELLED":
                yield Shift(
                    _role(str(event["SUMMARY"])), _utc(event.start, zone), _utc(event.end, zone), _address(event)
                )

    now = datetime.now(UTC)
    list(shifts(now, now + MARGIN))  # a rule that cannot be followed is to be found now, and not in the night
    return shifts


def _address(event: Any) -> str:
    attendees = event.get("ATTENDEE", [])
    for attendee in attendees if isinstance(attendees, list) else [attendees]:
        if str(attendee.params.get("PARTSTAT", "")).upper() != "DECLINED":
            text = str(attendee).strip()
            return text[7:] if text[:7].lower() == "mailto:" else text
    for name in ("LOCATION", "DESCRIPTION"):
        if lines := str(event.get(name, "")).strip().splitlines():
            return lines[0].strip()
    return ""


def _utc(moment: date, zone: tzinfo | None) -> datetime:
    """A moment of the file in UTC: a day begins at midnight, and a time without a zone is of `zone`."""
    if not isinstance(moment, datetime):
        moment = datetime.combine(moment, time())
    if moment.tzinfo is None and zone is not None:
        moment = moment.replace(tzinfo=zone)
    return moment.astimezone(UTC)

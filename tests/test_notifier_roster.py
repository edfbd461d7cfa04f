import logging
import os
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herald.errors import ChannelRefused, ConfigError
from notifier.roster import Roster

BERLIN = ZoneInfo("Europe/Berlin")

RosterOf = Callable[[str], Roster]


def calendar(*events: str) -> str:
    body = "".join(f"BEGIN:VEVENT\nUID:{i}\n{event}\nEND:VEVENT\n" for i, event in enumerate(events))
    return f"BEGIN:VCALENDAR\nVERSION:2.0\nPRODID:-//test//roster\n{body}END:VCALENDAR\n".replace("\n", "\r\n")


def local(text: str, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).astimezone(UTC)


@pytest.fixture
def ics(tmp_path: Path) -> RosterOf:
    def written(content: str) -> Roster:
        path = tmp_path / "rota.ics"
        path.write_text(content, newline="")
        return Roster(str(path), BERLIN)

    return written


@pytest.fixture
def table(tmp_path: Path) -> RosterOf:
    def written(content: str) -> Roster:
        path = tmp_path / "rota.csv"
        path.write_text(content)
        return Roster(str(path), BERLIN)

    return written


def nobody(roster: Roster, role: str, at: datetime) -> bool:
    try:
        roster.on_call(role, at)
    except ChannelRefused:
        return True
    return False


# --- iCalendar -------------------------------------------------------------------------------------------------------

NIGHTS = """SUMMARY:Neurosurgery
DTSTART;TZID=Europe/Berlin:20260323T200000
DTEND;TZID=Europe/Berlin:20260324T080000
RRULE:FREQ=DAILY
ATTENDEE:mailto:nights@hospital.example"""


def test_a_recurring_night_shift_begins_and_ends_by_the_clock_on_the_wall(ics: RosterOf) -> None:
    roster = ics(calendar(NIGHTS))
    assert nobody(roster, "neurosurgery", local("2026-11-22T19:59"))
    assert roster.on_call("neurosurgery", local("2026-11-22T20:00")) == "nights@hospital.example"
    assert roster.on_call("neurosurgery", local("2026-11-23T07:59")) == "nights@hospital.example"
    assert nobody(roster, "neurosurgery", local("2026-11-23T08:00"))


@pytest.mark.parametrize("night", ["2026-03-28", "2026-10-24"])
def test_a_night_in_which_the_clock_changes_still_ends_at_eight(ics: RosterOf, night: str) -> None:
    roster = ics(calendar(NIGHTS))
    begins = local(f"{night}T20:00")
    ends = local(f"{date.fromisoformat(night) + timedelta(days=1)}T08:00")
    assert (ends - begins) in (timedelta(hours=11), timedelta(hours=13))
    moment = begins
    while moment < ends:
        assert roster.on_call("Neurosurgery", moment) == "nights@hospital.example"
        moment += timedelta(minutes=30)
    assert nobody(roster, "neurosurgery", ends)
    assert nobody(roster, "neurosurgery", begins - timedelta(minutes=1))


def test_both_hours_that_the_autumn_night_repeats_have_their_own_shift(ics: RosterOf) -> None:
    roster = ics(
        calendar(
            "SUMMARY:ct\nDTSTART:20261025T000000Z\nDTEND:20261025T010000Z\nLOCATION:first@hospital.example",
            "SUMMARY:ct\nDTSTART:20261025T010000Z\nDTEND:20261025T020000Z\nLOCATION:second@hospital.example",
        )
    )
    assert roster.on_call("ct", local("2026-10-25T02:30", fold=0)) == "first@hospital.example"
    assert roster.on_call("ct", local("2026-10-25T02:30", fold=1)) == "second@hospital.example"


def test_times_without_a_zone_are_of_the_zone_of_the_roster(ics: RosterOf) -> None:
    roster = ics(calendar("SUMMARY:ct\nDTSTART:20260701T080000\nDTEND:20260701T160000\nLOCATION:day@hospital.example"))
    assert roster.on_call("ct", datetime(2026, 7, 1, 6, 0, tzinfo=UTC)) == "day@hospital.example"
    assert nobody(roster, "ct", datetime(2026, 7, 1, 14, 0, tzinfo=UTC))


def test_an_all_day_shift_lasts_from_midnight_to_midnight(ics: RosterOf) -> None:
    roster = ics(
        calendar(
            "SUMMARY:ct\nDTSTART;VALUE=DATE:20260328\nDTEND;VALUE=DATE:20260330\nLOCATION:weekend@hospital.example"
        )
    )
    assert nobody(roster, "ct", local("2026-03-27T23:59"))
    assert roster.on_call("ct", local("2026-03-28T00:00")) == "weekend@hospital.example"
    assert roster.on_call("ct", local("2026-03-29T23:59")) == "weekend@hospital.example"
    assert nobody(roster, "ct", local("2026-03-30T00:00"))


def test_a_moved_a_left_out_and_a_cancelled_shift_follow_the_calendar(ics: RosterOf) -> None:
    weekly = """SUMMARY:ct
DTSTART;TZID=Europe/Berlin:20261102T080000
DTEND;TZID=Europe/Berlin:20261102T160000
RRULE:FREQ=WEEKLY
EXDATE;TZID=Europe/Berlin:20261109T080000
LOCATION:mondays@hospital.example"""
    moved = """SUMMARY:ct
RECURRENCE-ID;TZID=Europe/Berlin:20261116T080000
DTSTART;TZID=Europe/Berlin:20261117T080000
DTEND;TZID=Europe/Berlin:20261117T160000
LOCATION:stand-in@hospital.example"""
    cancelled = """SUMMARY:ct
DTSTART;TZID=Europe/Berlin:20261118T080000
DTEND;TZID=Europe/Berlin:20261118T160000
STATUS:CANCELLED
LOCATION:cancelled@hospital.example"""
    content = calendar(weekly, moved, cancelled).replace("UID:1", "UID:0")
    roster = ics(content)
    assert roster.on_call("ct", local("2026-11-02T12:00")) == "mondays@hospital.example"
    assert nobody(roster, "ct", local("2026-11-09T12:00"))
    assert nobody(roster, "ct", local("2026-11-16T12:00"))
    assert roster.on_call("ct", local("2026-11-17T12:00")) == "stand-in@hospital.example"
    assert nobody(roster, "ct", local("2026-11-18T12:00"))


def test_a_swap_overrides_the_rota_while_it_lasts(ics: RosterOf) -> None:
    swap = """SUMMARY:neurosurgery
DTSTART;TZID=Europe/Berlin:20261122T220000
DTEND;TZID=Europe/Berlin:20261123T020000
LOCATION:swap@hospital.example"""
    roster = ics(calendar(swap, NIGHTS))
    assert roster.on_call("neurosurgery", local("2026-11-22T21:59")) == "nights@hospital.example"
    assert roster.on_call("neurosurgery", local("2026-11-22T22:00")) == "swap@hospital.example"
    assert roster.on_call("neurosurgery", local("2026-11-23T02:00")) == "nights@hospital.example"


@pytest.mark.parametrize(
    ("lines", "address"),
    [
        ("ATTENDEE;CN=A:MAILTO:a@x.example\nLOCATION:b@x.example", "a@x.example"),
        ("ATTENDEE;PARTSTAT=DECLINED:mailto:a@x.example\nATTENDEE:mailto:b@x.example", "b@x.example"),
        ("ATTENDEE;PARTSTAT=DECLINED:mailto:a@x.example\nLOCATION:c@x.example", "c@x.example"),
        ("LOCATION:c@x.example\nDESCRIPTION:d@x.example", "c@x.example"),
        ("DESCRIPTION:d@x.example\\nsecond line", "d@x.example"),
    ],
)
def test_the_address_is_the_attendee_who_comes_then_the_location_then_the_description(
    ics: RosterOf, lines: str, address: str
) -> None:
    roster = ics(calendar(f"SUMMARY:ct\nDTSTART:20261122T000000Z\nDTEND:20261123T000000Z\n{lines}"))
    assert roster.on_call("ct", datetime(2026, 11, 22, 12, tzinfo=UTC)) == address


# --- CSV -------------------------------------------------------------------------------------------------------------


def test_a_table_has_local_times_and_times_with_an_offset(table: RosterOf) -> None:
    roster = table(
        "role,from,until,to\n"
        "CT, 2026-03-28T20:00, 2026-03-29T08:00, night@hospital.example\n"
        "ct,2026-03-29T08:00+02:00,2026-03-29T20:00+02:00,day@hospital.example\n"
    )
    assert roster.on_call("ct", datetime(2026, 3, 29, 5, 59, tzinfo=UTC)) == "night@hospital.example"
    assert roster.on_call("ct", datetime(2026, 3, 29, 6, 0, tzinfo=UTC)) == "day@hospital.example"


def test_nobody_on_call_says_for_which_role_when_and_where_to_add_one(table: RosterOf) -> None:
    roster = table("role,from,until,to\nct,2026-03-28T20:00,2026-03-29T08:00,night@hospital.example\n")
    with pytest.raises(ChannelRefused, match=r"nobody is on call for mri at Sun 2026-03-29 03:30 CEST in rota\.csv"):
        roster.on_call("mri", datetime(2026, 3, 29, 1, 30, tzinfo=UTC))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rota.csv", "role,from,to\n", "lacks until"),
        ("rota.csv", "role,from,until,to\nct,now,2026-01-01,a@b.example\n", "line 2"),
        ("rota.csv", "role,from,until,to\nct,2026-01-02,2026-01-01,a@b.example\n", "line 2 ends before it begins"),
        ("rota.csv", "role,from,until,to\nct,2026-01-01,2026-01-02\n", "line 2 has an empty column"),
        ("rota.ics", "no calendar", "damaged"),
        ("rota.ics", calendar("SUMMARY:ct\nDTSTART:20261122T000000Z"), "ct has no address"),
        ("rota.ics", calendar("DTSTART:20261122T000000Z\nLOCATION:a@b.example"), "no SUMMARY"),
        ("rota.ics", calendar("SUMMARY:ct\nDTSTART:2026\nLOCATION:a@b.example"), "damaged"),
        ("rota.xlsx", "", r"neither \.ics nor \.csv"),
    ],
)
def test_a_roster_that_cannot_be_used_at_the_start_names_the_place(
    tmp_path: Path, name: str, content: str, says: str
) -> None:
    path = tmp_path / name
    path.write_text(content, newline="")
    with pytest.raises(ConfigError, match=says) as raised:
        Roster(str(path), BERLIN)
    assert name in str(raised.value)


def test_a_roster_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.ics cannot be read: No such file"):
        Roster(str(tmp_path / "missing.ics"), BERLIN)


# --- changes ---------------------------------------------------------------------------------------------------------

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)


def row(to: str) -> str:
    return f"role,from,until,to\nct,2026-11-22T00:00Z,2026-11-23T00:00Z,{to}@hospital.example\n"


def test_a_changed_roster_is_used_at_the_next_page(table: RosterOf) -> None:
    roster = table(row("first"))
    assert roster.on_call("ct", AT) == "first@hospital.example"
    assert table(row("other")).on_call("ct", AT) == roster.on_call("ct", AT) == "other@hospital.example"


def test_a_roster_changed_within_its_own_time_stamp_is_seen_by_its_size(table: RosterOf, tmp_path: Path) -> None:
    roster = table(row("first"))
    before = (tmp_path / "rota.csv").stat()
    (tmp_path / "rota.csv").write_text(row("somebody-else"))
    os.utime(tmp_path / "rota.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert roster.on_call("ct", AT) == "somebody-else@hospital.example"


@pytest.mark.parametrize("damage", ["role;from\n", None])
def test_a_damaged_new_version_keeps_the_last_good_one_and_is_told_once(
    table: RosterOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str | None
) -> None:
    roster = table(row("first"))
    path = tmp_path / "rota.csv"
    path.unlink() if damage is None else path.write_text(damage)
    assert [roster.on_call("ct", AT) for _ in range(3)] == ["first@hospital.example"] * 3
    (line,) = (r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)
    assert "until then the roster is used as it was" in line
    path.write_text(row("mended"))
    assert roster.on_call("ct", AT) == "mended@hospital.example"


# --- any roster ------------------------------------------------------------------------------------------------------

SPRING = datetime(2026, 3, 27, tzinfo=UTC)
hours = st.integers(0, 120)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shifts=st.lists(st.tuples(st.sampled_from("ab"), hours, st.integers(1, 60)), max_size=8, unique_by=lambda s: s[:2]),
    asked=st.lists(st.tuples(st.sampled_from("ab"), hours), min_size=1, max_size=6),
    calendars=st.booleans(),
)
def test_whoever_began_last_is_on_call_as_in_a_search_through_every_shift(
    tmp_path: Path, shifts: list[tuple[str, int, int]], asked: list[tuple[str, int]], calendars: bool
) -> None:
    """Across the night of 2026-03-29, with shifts in local time that begin and end at any hour that there is."""
    spans = [
        (role, SPRING + timedelta(hours=begin), SPRING + timedelta(hours=begin + length), f"{i}@x.example")
        for i, (role, begin, length) in enumerate(shifts)
    ]
    if calendars:
        text = calendar(
            *(
                f"SUMMARY:{role}\nDTSTART;TZID=Europe/Berlin:{b.astimezone(BERLIN):%Y%m%dT%H%M%S}\n"
                f"DTEND;TZID=Europe/Berlin:{e.astimezone(BERLIN):%Y%m%dT%H%M%S}\nLOCATION:{to}"
                for role, b, e, to in spans
            )
        )
    else:
        rows = [
            f"{role},{b.astimezone(BERLIN):%Y-%m-%dT%H:%M},{e.astimezone(BERLIN):%Y-%m-%dT%H:%M},{to}\n"
            for role, b, e, to in spans
        ]
        text = "role,from,until,to\n" + "".join(rows)
    path = tmp_path / ("any.ics" if calendars else "any.csv")
    path.write_text(text, newline="")
    roster = Roster(str(path), BERLIN)
    for role, hour in asked:
        at = SPRING + timedelta(hours=hour, minutes=30)
        expected = ""
        latest = datetime.min.replace(tzinfo=UTC)
        for of, begins, ends, to in spans:
            if of == role and begins <= at < ends and begins > latest:
                latest, expected = begins, to
        if expected:
            assert roster.on_call(role, at) == expected
        else:
            assert nobody(roster, role, at)


def test_the_zone_of_the_host_is_used_where_none_is_set(tmp_path: Path) -> None:
    path = tmp_path / "host.csv"
    path.write_text("role,from,until,to\nct,2026-07-01T08:00,2026-07-01T16:00,day@hospital.example\n")
    begins = datetime.combine(date(2026, 7, 1), time(8)).astimezone()
    roster = Roster(str(path), None)
    assert roster.on_call("ct", begins) == "day@hospital.example"
    assert nobody(roster, "ct", begins - timedelta(minutes=1))

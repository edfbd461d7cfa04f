from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from notifier_fakes import NOON, configured, triaged

from herald.config import Config, PagingPolicy, PagingSite, PagingStep
from herald.errors import ConfigError
from herald.events import Finding
from herald.sites import mode_of, site_of
from notifier import policy

BERLIN = ZoneInfo("Europe/Berlin")
STEPS = (PagingStep(to="default@hospital.example"),)
OTHERS = (PagingStep(to="other@hospital.example"),)
NORTH = PagingSite(name="north", calling_ae_titles=("NORTH1", "NORTH2"), mode="live")
EAST = PagingSite(name="east", scanners=("CT-EAST",))


def node(*policies: PagingPolicy, **notifier: Any) -> Config:
    settings_ = {"mode": "live", "steps": STEPS, "sites": (NORTH, EAST), "time_zone": "Europe/Berlin", **notifier}
    return configured(policies=policies, **settings_)


def named(name: str = "p", **conditions: Any) -> PagingPolicy:
    return PagingPolicy(name=name, steps=OTHERS, **conditions)


def chosen(config: Config, at: datetime = NOON, **changes: Any) -> str:
    return policy.choose(triaged(**changes), config, at).name


def local(text: str, fold: int = 0) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=fold).astimezone(UTC)


# --- what fits -------------------------------------------------------------------------------------------------------


def test_without_a_policy_that_fits_the_steps_of_the_notifier_are_taken() -> None:
    config = node(named(findings=("edh_sdh",)))
    assert policy.choose(triaged(), config, NOON) == PagingPolicy(name="", steps=STEPS)


def test_the_first_policy_that_fits_is_taken() -> None:
    assert chosen(node(named("first", sites=("north",)), named("second"), named("third"))) == "second"


@pytest.mark.parametrize(
    ("changes", "site", "mode"),
    [
        ({"calling_ae_title": "NORTH2", "scanner": "CT9"}, "north", "live"),
        ({"calling_ae_title": " NORTH1 "}, "north", "live"),
        ({"calling_ae_title": "ELSEWHERE", "scanner": "CT-EAST"}, "east", "shadow"),
        ({"calling_ae_title": "ELSEWHERE", "scanner": "CT9"}, "", "shadow"),
        ({"calling_ae_title": "", "scanner": ""}, "", "shadow"),
    ],
)
def test_a_site_is_known_by_calling_ae_title_or_scanner_and_has_its_own_mode(
    changes: dict[str, str], site: str, mode: str
) -> None:
    config = node(named(sites=("east",)), mode="shadow")
    event = triaged(**changes)
    assert (site_of(event, config), mode_of(site, config)) == (site, mode)
    assert (policy.choose(event, config, NOON).name == "p") is (site == "east")


def test_the_mode_of_a_site_that_is_gone_is_that_of_the_node() -> None:
    assert mode_of("north", node(mode="shadow", sites=())) == "shadow"


@pytest.mark.parametrize(
    ("findings", "leading"),
    [
        ((("any", 0.9), ("iph", 0.7), ("sah", 0.8)), "sah"),
        ((("any", 0.9), ("iph", 0.49)), "any"),
        ((("any", 0.9), ("iph", 0.5)), "iph"),
        ((), "any"),
    ],
)
def test_the_leading_finding_is_the_likeliest_kind_at_or_above_the_operating_point(
    findings: tuple[tuple[str, float], ...], leading: str
) -> None:
    event = triaged(findings=tuple(Finding(kind, p, 1.0, 1, "1.2") for kind, p in findings))
    for kind in ("any", "iph", "sah"):
        assert (policy.choose(event, node(named(findings=(kind,))), NOON).name == "p") is (kind == leading)


@pytest.mark.parametrize(("low", "high", "fits"), [(0.971, 1.01, True), (0.972, 1.01, False), (0.5, 0.971, False)])
def test_the_probability_of_any_haemorrhage_is_from_the_lower_and_below_the_upper_bound(
    low: float, high: float, fits: bool
) -> None:
    assert (chosen(node(named(probability_from=low, probability_below=high))) == "p") is fits


# --- hours -----------------------------------------------------------------------------------------------------------

WEEKEND_NIGHTS = named(days=("fri", "sat"), from_time="18:00", until_time="07:00")


@pytest.mark.parametrize(
    ("at", "fits"),
    [
        ("2026-11-20T17:59", False),  # a Friday
        ("2026-11-20T18:00", True),
        ("2026-11-21T06:59", True),
        ("2026-11-21T07:00", False),
        ("2026-11-21T18:00", True),
        ("2026-11-22T06:59", True),
        ("2026-11-22T07:00", False),
        ("2026-11-22T18:00", False),  # Sunday evening begins nothing
        ("2026-11-20T06:00", False),  # nor does Friday morning end a Thursday night
    ],
)
def test_hours_past_midnight_belong_to_the_day_on_which_they_begin(at: str, fits: bool) -> None:
    assert (chosen(node(WEEKEND_NIGHTS), local(at)) == "p") is fits


@pytest.mark.parametrize(
    ("at", "fits"),
    [
        (local("2026-03-29T01:59"), False),
        (local("2026-03-29T03:00"), True),  # a minute later: two o'clock is skipped
        (local("2026-10-25T02:30", fold=0), True),
        (local("2026-10-25T02:30", fold=1), True),
        (local("2026-10-25T02:30", fold=1) + timedelta(minutes=90), False),
    ],
)
def test_hours_go_by_the_clock_on_the_wall_when_it_changes(at: datetime, fits: bool) -> None:
    assert (chosen(node(named(from_time="02:30", until_time="04:00")), at) == "p") is fits


def test_the_same_moment_is_another_hour_in_another_zone() -> None:
    hours = named(from_time="18:00", until_time="19:00")
    at = datetime(2026, 7, 1, 16, 30, tzinfo=UTC)
    assert chosen(node(hours), at) == "p"
    assert chosen(node(hours, time_zone="America/New_York"), at) == ""


def test_equal_times_are_a_whole_day_and_the_night() -> None:
    config = node(named(days=("fri",), from_time="08:00", until_time="08:00"))
    assert chosen(config, local("2026-11-20T08:00")) == "p"
    assert chosen(config, local("2026-11-21T07:59")) == "p"
    assert chosen(config, local("2026-11-21T08:00")) == ""
    assert chosen(config, local("2026-11-20T07:59")) == ""


times = st.integers(0, 1439)


@settings(deadline=None)
@given(
    begins=times,
    ends=times,
    days=st.sets(st.sampled_from(policy.DAYS)),
    minute=st.integers(0, 400 * 24 * 60),
)
def test_hours_hold_as_a_walk_back_to_their_beginning_finds(
    begins: int, ends: int, days: set[str], minute: int
) -> None:
    """Going back on the wall clock, minute by minute, the beginning comes before the end, on one of the days."""
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minute)
    wall = at.astimezone(BERLIN).replace(tzinfo=None)
    expected = False
    length = (ends - begins) % 1440 or 1440
    back = wall - timedelta(minutes=(wall.hour * 60 + wall.minute - begins) % 1440)  # when the hours last began
    if wall - back < timedelta(minutes=length):
        expected = not days or policy.DAYS[back.weekday()] in days
    hours = named(
        days=tuple(days),
        from_time=f"{begins // 60:02d}:{begins % 60:02d}",
        until_time=f"{ends // 60:02d}:{ends % 60:02d}",
    )
    assert (chosen(node(hours), at) == "p") is expected


def test_every_condition_says_in_words_whether_it_is_met() -> None:
    config = node(
        named(sites=("north",), findings=("iph", "sah"), probability_from=0.99, days=("mon",), from_time="08:00")
    )
    told = policy.conditions(config.notifier.policies[0], triaged(), config, local("2026-11-22T12:00"))
    assert [(condition.met, condition.words) for condition in told] == [
        (False, "site east is not north"),
        (True, "leading finding iph is one of iph, sah"),
        (False, "probability 0.97 is not 0.99 to below 1.01"),
        (False, "sun 12:00 CET is not within mon 08:00 to 24:00"),
    ]
    assert list(policy.conditions(named(), triaged(), config, NOON)) == []


# --- a configuration that is wrong -----------------------------------------------------------------------------------


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as raised:
        policy.validate(config)
    return str(raised.value)


@pytest.mark.parametrize(
    ("conditions", "says"),
    [
        ({"sites": ("south",)}, "notifier.policies p: sites names south, which is not known; known are north, east"),
        ({"findings": ("edh",)}, "notifier.policies p: findings names edh, which is not known; known are any, iph"),
        ({"days": ("friday",)}, "notifier.policies p: days names friday, which is not known; known are mon, tue"),
        ({"from_time": "7:00"}, "notifier.policies p: from_time '7:00' is no time of day; write it as 07:30"),
        ({"from_time": "24:00"}, "from_time '24:00' is no time of day"),
        ({"until_time": "25:00"}, "until_time '25:00' is no time of day"),
        ({"probability_from": 0.9, "probability_below": 0.9}, "no probability is from 0.9 and below 0.9"),
        ({"steps": ()}, "notifier.policies p pages nobody"),
        ({"name": ""}, "notifier.policies: '' is no name"),
        ({"name": "x" * 65}, "is no name; use 1 to 64 characters"),
    ],
)
def test_a_policy_that_is_wrong_is_named_with_what_is_wrong(conditions: dict[str, Any], says: str) -> None:
    assert says in refused(node(replace(named(), **conditions)))


@pytest.mark.parametrize(
    ("notifier", "says"),
    [
        ({"time_zone": "Europe/Berlim"}, "notifier.time_zone 'Europe/Berlim' is not known"),
        ({"time_zone": "/etc/passwd"}, "notifier.time_zone"),
        ({"sites": (NORTH, NORTH)}, "notifier.sites has two of the name north"),
        ({"sites": (NORTH, replace(NORTH, name="n2"))}, "calling_ae_titles has NORTH1 in north and in n2"),
        ({"senders": 0}, "notifier.senders is 0"),
        ({"steps": (PagingStep(to="on-call:ct"),)}, "notifier.steps pages on-call:ct, but there is no roster"),
        ({"operators": (PagingStep(to="on-call:it"),)}, "notifier.operators pages on-call:it, but there is no roster"),
        ({"roster": "r.csv", "steps": (PagingStep(to="on-call:"),)}, "without a role"),
    ],
)
def test_a_notifier_that_is_wrong_is_told_what_is_wrong(notifier: dict[str, Any], says: str) -> None:
    assert says in refused(node(**notifier))


def test_two_policies_of_one_name_are_refused() -> None:
    assert "notifier.policies has two of the name p" in refused(node(named(), named(sites=("north",))))


@pytest.mark.parametrize(
    ("notifier", "setting"),
    [
        ({"mode": "live"}, "notifier.mode"),
        ({"mode": "shadow"}, "notifier.sites north: mode"),
        ({"mode": "shadow", "policies": (named(sites=("north",), days=("mon",)),)}, "notifier.sites north: mode"),
        ({"mode": "shadow", "policies": (named(sites=("east",)),)}, "notifier.sites north: mode"),
    ],
)
def test_whoever_is_live_must_have_somebody_to_page_at_any_hour(notifier: dict[str, Any], setting: str) -> None:
    config = configured(**{"steps": (), "sites": (NORTH, EAST), **notifier})
    message = refused(config)
    assert message.startswith(f"{setting} is live")
    assert "[[notifier.steps]]" in message


@pytest.mark.parametrize(
    "notifier",
    [
        {"mode": "shadow", "sites": ()},
        {"mode": "shadow", "policies": (named(sites=("north",)),)},
        {"mode": "live", "policies": (named(days=("mon",)), named("all"))},
        {"mode": "live", "steps": STEPS},
    ],
)
def test_a_sound_configuration_is_taken(notifier: dict[str, Any]) -> None:
    policy.validate(configured(**{"steps": (), "sites": (NORTH, EAST), **notifier}))

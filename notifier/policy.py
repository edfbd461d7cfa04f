"""Who is paged and when: pure functions of a result or a page, the configuration and the time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from herald.config import Config, PagingPolicy, PagingStep
from herald.errors import ConfigError
from herald.events import SeriesTriaged
from herald.signatures import FINDINGS
from herald.sites import mode_of, site_of
from notifier.record import Page, Review

ON_CALL = "on-call:"
"""Start of a step's `to` that names a role of the roster instead of an address."""
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
LONGEST_NAME = 64

RETRY_FIRST_S = 2.0
RETRY_LONGEST_S = 30.0
CLOCK_SLACK = timedelta(seconds=60)
"""How far a clock is set back, or two hosts' differ, before the times in the ledger are no longer believed."""

_TIME = re.compile(r"([01]\d|2[0-3]):([0-5]\d)|24:00")
_MINUTES_A_DAY = 24 * 60


# --- which policy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One condition of a policy: whether a result meets it, and why, in words."""

    met: bool
    words: str


def choose(event: SeriesTriaged, config: Config, at: datetime) -> PagingPolicy:
    """The first policy whose conditions are all met, else `notifier.steps` under the name ""."""
    for policy in config.notifier.policies:
        if all(condition.met for condition in conditions(policy, event, config, at)):
            return policy
    return PagingPolicy(name="", steps=config.notifier.steps)


def conditions(policy: PagingPolicy, event: SeriesTriaged, config: Config, at: datetime) -> Iterator[Condition]:
    """What the policy asks of a result that is paged at `at`; nothing for a policy that fits always."""
    if policy.sites:
        site = site_of(event, config)
        yield _one_of(f"site {site}" if site else "no site", site in policy.sites, policy.sites)
    if policy.findings:
        kind = leading_kind(event, config)
        yield _one_of(f"leading finding {kind}", kind in policy.findings, policy.findings)
    everywhere = PagingPolicy(name="", steps=())
    if (policy.probability_from, policy.probability_below) != (
        everywhere.probability_from,
        everywhere.probability_below,
    ):
        probability = overall_probability(event, config)
        within = policy.probability_from <= probability < policy.probability_below
        span = f"{policy.probability_from:g} to below {policy.probability_below:g}"
        yield Condition(within, f"probability {probability:.2f} is {_not(within)}{span}")
    if policy.days or (policy.from_time, policy.until_time) != (everywhere.from_time, everywhere.until_time):
        local = at.astimezone(zone_of(config))
        within = _within_hours(policy, local)
        days = f"{', '.join(policy.days)} " if policy.days else ""
        hours = f"{days}{policy.from_time} to {policy.until_time}"
        yield Condition(within, f"{DAYS[local.weekday()]} {local:%H:%M %Z} is {_not(within)}within {hours}")


def _one_of(what: str, met: bool, allowed: tuple[str, ...]) -> Condition:
    return Condition(met, f"{what} is {_not(met)}{'one of ' if len(allowed) > 1 else ''}{', '.join(allowed)}")


def _not(met: bool) -> str:
    return "" if met else "not "


def _within_hours(policy: PagingPolicy, local: datetime) -> bool:
    """Whether a local time lies in the policy's hours; hours that pass midnight belong to the day they begin on.

    By the clock on the wall, so that the hour that daylight saving repeats belongs twice, and the one it skips never.
    """
    begins, ends = _minutes(policy.from_time), _minutes(policy.until_time)
    now = local.hour * 60 + local.minute
    days = policy.days or DAYS
    today = DAYS[local.weekday()] in days
    if begins < ends:
        return today and begins <= now < ends
    yesterday = DAYS[local.weekday() - 1] in days
    return (today and now >= begins) or (yesterday and now < ends)


def _minutes(time: str) -> int:
    hours, _, minutes = time.partition(":")
    return int(hours) * 60 + int(minutes)


def leading_kind(event: SeriesTriaged, config: Config) -> str:
    """The likeliest kind of bleed at or above the operating point, `any` when no kind reaches it."""
    kinds = [f for f in event.findings if f.kind != "any" and f.probability >= config.router.operating_point]
    return max(kinds, key=lambda finding: finding.probability).kind if kinds else "any"


def overall_probability(event: SeriesTriaged, config: Config) -> float:
    """Probability of any haemorrhage; that of the likeliest kind, or the operating point, where it is not told."""
    by_kind = {finding.kind: finding.probability for finding in event.findings}
    return by_kind.get("any", max(by_kind.values(), default=config.router.operating_point))


def any_live(config: Config) -> bool:
    """Whether a page of any scanner would be sent."""
    return "live" in {mode_of(site, config) for site in ("", *(s.name for s in config.notifier.sites))}


def zone_of(config: Config) -> ZoneInfo | None:
    """The zone of local times; None, as `astimezone` takes it, is the host's."""
    return ZoneInfo(config.notifier.time_zone) if config.notifier.time_zone else None


# --- is the configuration sound --------------------------------------------------------------------------------------


def validate(config: Config) -> None:
    """Raise ConfigError that names the first thing wrong with sites, policies, roles or the time zone."""
    notifier = config.notifier
    try:
        zone_of(config)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ConfigError(
            f"notifier.time_zone {notifier.time_zone!r} is not known; use an IANA name such as Europe/Berlin, or leave "
            "it empty for this host's zone"
        ) from error
    if notifier.senders < 1:
        raise ConfigError(f"notifier.senders is {notifier.senders}, so that nothing could be sent; use at least 1")
    _validate_names("sites", [site.name for site in notifier.sites])
    _validate_names("policies", [policy.name for policy in notifier.policies])
    for key in ("calling_ae_titles", "scanners"):
        seen: dict[str, str] = {}
        for site in notifier.sites:
            for device in getattr(site, key):
                if seen.setdefault(device, site.name) != site.name:
                    raise ConfigError(
                        f"notifier.sites: {key} has {device} in {seen[device]} and in {site.name}; name it in one"
                    )
    for policy in notifier.policies:
        _validate_policy(policy, config)
    for where, steps in all_steps(config).items():
        for step in steps:
            if step.to.startswith(ON_CALL) and not notifier.roster:
                raise ConfigError(
                    f"{where} pages {step.to}, but there is no roster; set notifier.roster to an .ics or .csv file"
                )
            if step.to == ON_CALL:
                raise ConfigError(f"{where} pages {step.to!r} without a role; write {ON_CALL}ROLE")
    _validate_live(config)


def all_steps(config: Config) -> dict[str, tuple[PagingStep, ...]]:
    """Every step in the configuration by where it stands."""
    by_policy = {f"notifier.policies {policy.name}": policy.steps for policy in config.notifier.policies}
    return {"notifier.steps": config.notifier.steps, **by_policy, "notifier.operators": config.notifier.operators}


def roles(config: Config) -> list[str]:
    """Roles that a step names, each once."""
    to = [step.to for steps in all_steps(config).values() for step in steps]
    return list(dict.fromkeys(t.removeprefix(ON_CALL) for t in to if t.startswith(ON_CALL)))


def _validate_names(table: str, names: list[str]) -> None:
    for name in names:
        if not name or len(name) > LONGEST_NAME:
            raise ConfigError(f"notifier.{table}: {name!r} is no name; use 1 to {LONGEST_NAME} characters")
        if names.count(name) > 1:
            raise ConfigError(f"notifier.{table} has two of the name {name}; rename one")


def _validate_policy(policy: PagingPolicy, config: Config) -> None:
    where = f"notifier.policies {policy.name}"
    for key, known in (("sites", [s.name for s in config.notifier.sites]), ("findings", FINDINGS), ("days", DAYS)):
        for name in getattr(policy, key):
            if name not in known:
                raise ConfigError(
                    f"{where}: {key} names {name}, which is not known; known are {', '.join(known) or 'none'}"
                )
    for key in ("from_time", "until_time"):
        time = getattr(policy, key)
        if not _TIME.fullmatch(time) or (key, time) == ("from_time", "24:00"):
            raise ConfigError(f"{where}: {key} {time!r} is no time of day; write it as 07:30")
    if not policy.probability_from < policy.probability_below:
        raise ConfigError(
            f"{where}: no probability is from {policy.probability_from:g} and below {policy.probability_below:g}; "
            "exchange or widen them"
        )
    if not policy.steps:
        raise ConfigError(f'{where} pages nobody; add steps = [{{ to = "radiologist@hospital.example" }}]')


def _validate_live(config: Config) -> None:
    """Whoever is live needs somebody to page whatever the finding and the hour."""
    if config.notifier.steps:
        return
    for site in ("", *(site.name for site in config.notifier.sites)):
        if mode_of(site, config) == "live" and not any(_fits_always(p, site) for p in config.notifier.policies):
            setting = "notifier.mode" if mode_of("", config) == "live" else f"notifier.sites {site}: mode"
            raise ConfigError(
                f"{setting} is live, but nobody is to be paged when no policy fits: add to herald.toml\n"
                '[[notifier.steps]]\nto = "radiologist@hospital.example"\n'
                f'or set {setting} = "shadow"'
            )


def _fits_always(policy: PagingPolicy, site: str) -> bool:
    anything = PagingPolicy(name=policy.name, steps=policy.steps, sites=policy.sites)
    return policy == anything and (not policy.sites or site in policy.sites)


# --- when a page does what -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """What an open page needs next, and from when."""

    kind: Literal["send", "escalate", "exhaust", "tell"]
    at: datetime


def steps_of(page: Page, config: Config) -> tuple[PagingStep, ...]:
    """The steps of the policy that the page was made by; `notifier.steps` when that has gone from the configuration."""
    by_name = {policy.name: policy.steps for policy in config.notifier.policies}
    return by_name.get(page.policy or "", config.notifier.steps)


def step_of(page: Page, config: Config) -> PagingStep | None:
    """The page's step; None when it has gone from the configuration."""
    steps = steps_of(page, config)
    return steps[page.step] if page.step < len(steps) else None


def next_move(page: Page, config: Config, now: datetime) -> Move | None:
    """The next move of a page; None when its state is final.

    due: send at `due_at`, then at each `next_attempt_at`. sent: escalate when the next step's `after_minutes` since
    the finding are over; on the last step, exhaust `exhausted_after_minutes` after it was sent. exhausted: tell the
    operators at `next_attempt_at`, which is empty once they have been told.
    """
    if page.state == "due":
        if page.next_attempt_at is not None:
            return Move("send", _believed(page.next_attempt_at, timedelta(seconds=2 * RETRY_LONGEST_S), now))
        step = step_of(page, config)
        waiting = step.after_minutes if step else 0.0
        return Move("send", _believed(page.due_at, timedelta(minutes=waiting), now))
    if page.state == "sent":
        if (following := following_step(page, config)) is not None:
            wait = timedelta(minutes=steps_of(page, config)[following].after_minutes)
            return Move("escalate", _believed(page.finding_at + wait, wait, now))
        wait = timedelta(minutes=config.notifier.exhausted_after_minutes)
        return Move("exhaust", _believed((page.sent_at or page.due_at) + wait, wait, now))
    if page.state == "exhausted" and page.next_attempt_at is not None:
        return Move("tell", _believed(page.next_attempt_at, timedelta(seconds=2 * RETRY_LONGEST_S), now))
    return None


def following_step(page: Page, config: Config) -> int | None:
    """The step after the page's, None after the last."""
    return page.step + 1 if page.step + 1 < len(steps_of(page, config)) else None


def _believed(at: datetime, longest: timedelta, now: datetime) -> datetime:
    """A time further ahead than was ever scheduled means that the clock was set back: then act now, not hours late."""
    return now if at > now + longest + CLOCK_SLACK else at


def retry_pause_s(attempt: int) -> float:
    """Pause after the first, second, ... attempt, before jitter."""
    return min(RETRY_FIRST_S * 2.0 ** min(attempt - 1, 16), RETRY_LONGEST_S)


def attempts_allowed(retry_for_s: float) -> int:
    """How many attempts fit into the time that a channel is retried; counted, so that no clock can shorten it."""
    attempts, spent_s = 1, 0.0
    while spent_s < retry_for_s:
        spent_s += retry_pause_s(attempts)
        attempts += 1
    return attempts


def answers(review: Review, page: Page) -> bool:
    """Whether a reader has seen what the page is about.

    A review of the page's series does, unless it is of an earlier revision or was given before the finding, when the
    revision had failed; a review of another series of the study does only once the page was made: agreeing beforehand
    that another series is clear must not stop the page.
    """
    if review.series_instance_uid == page.series_instance_uid:
        return review.revision >= page.revision and review.occurred_at >= page.finding_at - CLOCK_SLACK
    return review.occurred_at >= (page.made_at or page.finding_at)


def newer(series_instance_uid: str, revision: int, page: Page) -> bool:
    """Whether a result came after the one that the page was made for."""
    return series_instance_uid != page.series_instance_uid or revision > page.revision


def untold(page: Page, live: bool) -> bool:
    """Whether a page ended without reaching anybody, so that a newer finding may use it again."""
    if page.mode == "shadow" and live:
        return True
    return page.sent_at is None and page.state in ("withdrawn", "failed", "exhausted")

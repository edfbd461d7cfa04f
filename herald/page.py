"""`herald page`: who is or would be paged about a study, when and why; and a test page through every channel."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, or_, select

from herald.config import Config, PagingPolicy, PagingStep
from herald.errors import ChannelRefused, ConfigError, NotificationError
from herald.events import Finding, SeriesTriaged, utc_now
from herald.ledger import open_ledger, pages, results, series
from herald.sites import Mode, mode_of, site_of
from notifier import policy, record
from notifier.channels import Message
from notifier.paging import Reach, nobody_on_call
from notifier.record import Page
from notifier.service import open_channels, open_roster

DEFAULT = "notifier.steps"
"""What the steps are called that hold where no policy fits."""

OnCall = Callable[[str, datetime], str]


# --- who is or would be paged ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExplainedStep:
    """One step: what became of its page, or what would; `at` is when it was sent, or when it is due."""

    step: int
    """1-based."""
    at: datetime
    channel: str
    recipient: str
    state: str
    """As in the ledger; `planned`, or `not needed`, where there is no page."""
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Who was and will be paged about a study, or would be if it were positive, and why."""

    study_instance_uid: str
    verdict: str
    """What is known of the study, in words."""
    positive: bool
    """False: everything else is what a positive result would do now."""
    site: str
    mode: Mode
    finding: str
    policy: str
    """Name of the policy whose steps are taken, or notifier.steps."""
    policies: tuple[str, ...]
    """Each policy up to the one that is taken: whether it fits, and why."""
    steps: tuple[ExplainedStep, ...]
    afterwards: str
    """What happens when nobody answers the last page."""


def explain(config: Config, what: str, now: datetime | None = None) -> list[Explanation]:
    """For each study that a StudyInstanceUID or accession number names; empty when nothing is known of it.

    Raises ConfigError for policies or a roster that are not sound, LedgerError when the ledger cannot be read.
    """
    reach, on_call = _addresses(config)
    now = now or utc_now()
    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            return [_explained(connection, uid, config, reach, on_call, now) for uid in _studies(connection, what)]
    finally:
        ledger.close()


def _addresses(config: Config) -> tuple[Reach, OnCall]:
    roster = open_roster(config)
    return open_channels(config), roster.on_call if roster else nobody_on_call


def _studies(connection: Connection, what: str) -> list[str]:
    found: dict[str, None] = {}
    for table in (series, results, pages):
        named = [c for c in table.c if c.name in ("study_instance_uid", "accession_number")]
        query = select(table.c.study_instance_uid).where(or_(*(column == what for column in named))).distinct()
        found |= dict.fromkeys(connection.scalars(query))
    return list(found)


def _explained(
    connection: Connection, study: str, config: Config, reach: Reach, on_call: OnCall, now: datetime
) -> Explanation:
    known = record.pages_of_study(connection, study)
    event, verdict = _event(connection, study, known, config)
    positive = event.disposition == "positive"
    judged = event if positive else _as_positive(event, config)
    chosen = policy.choose(judged, config, known[0].finding_at if known else now)
    told = list(_policies(judged, config, chosen, known[0].finding_at if known else now))
    site = site_of(judged, config)
    if known:
        site, taken = known[0].site or "", known[0].policy or DEFAULT
        if taken != (chosen.name or DEFAULT):
            told.append(f"{taken}: was taken when the page was made; the configuration has changed since")
    page = known[-1] if known else _first_page(judged, chosen, site, config, now)
    steps = policy.steps_of(page, config)
    return Explanation(
        study_instance_uid=study,
        verdict=verdict,
        positive=positive,
        site=site,
        mode=known[0].mode if known else mode_of(site, config),
        finding=f"{policy.leading_kind(judged, config)}, probability {policy.overall_probability(judged, config):.2f}",
        policy=page.policy or DEFAULT,
        policies=tuple(told),
        steps=(
            *(_made(page) for page in known),
            *_planned(page, steps[page.step + 1 if known else 0 :], reach, on_call, now, made=bool(known)),
        ),
        afterwards=_afterwards(page, config),
    )


def _event(connection: Connection, study: str, known: list[Page], config: Config) -> tuple[SeriesTriaged, str]:
    """What is paged, or the latest that is known of the study, and that in words."""
    statement = select(results).where(results.c.study_instance_uid == study).order_by(results.c.triaged_at)
    latest = {
        row["series_instance_uid"]: msgspec.convert(row["event"], SeriesTriaged)
        for row in connection.execute(statement).mappings()
    }
    if known and (paged := known[0].triaged) is not None:
        return paged, f"positive: series {paged.series_instance_uid} revision {paged.revision} is paged"
    if positives := [event for event in latest.values() if event.disposition == "positive"]:
        return positives[0], "positive, and not paged yet: see `herald check` whether the notifier runs"
    if latest:
        event = list(latest.values())[-1]
        reasons = f" ({'; '.join(event.reasons)})" if event.reasons else ""
        counts = ", ".join(dict.fromkeys(event.disposition.replace("_", " ") for event in latest.values()))
        return event, f"{counts}{reasons}: nobody is paged"
    row = (
        connection.execute(
            select(series).where(series.c.study_instance_uid == study).order_by(series.c.last_image_at.desc()).limit(1)
        )
        .mappings()
        .one_or_none()
    )
    facts: dict[str, Any] = {} if row is None else {name: row[name] for name in ("scanner", "calling_ae_title")}
    known_as = known[0] if known else None
    event = SeriesTriaged(
        study_instance_uid=study,
        series_instance_uid=known_as.series_instance_uid if known_as else str(row and row["series_instance_uid"]),
        revision=known_as.revision if known_as else 1,
        disposition="positive" if known_as else "failed",
        **facts,
    )
    return event, "positive" if known_as else "no result yet: nobody is paged"


def _as_positive(event: SeriesTriaged, config: Config) -> SeriesTriaged:
    """The least positive result that the series could have had."""
    least = Finding("any", config.router.operating_point, 0.0, 0, "")
    return replace(event, disposition="positive", findings=(least,))


def _policies(event: SeriesTriaged, config: Config, chosen: PagingPolicy, at: datetime) -> Iterator[str]:
    for candidate in config.notifier.policies:
        told = list(policy.conditions(candidate, event, config, at))
        if unmet := [condition.words for condition in told if not condition.met]:
            yield f"{candidate.name}: does not fit, {'; '.join(unmet)}"
        else:
            yield f"{candidate.name}: fits, {'; '.join(c.words for c in told) or 'as it always does'}"
            return
    yield f"{DEFAULT}: no policy fits" if config.notifier.policies else f"{DEFAULT}: there are no policies"


def _first_page(event: SeriesTriaged, chosen: PagingPolicy, site: str, config: Config, now: datetime) -> Page:
    """The page that would be made now, for its policy, site and times."""
    return Page(
        page_id="",
        study_instance_uid=event.study_instance_uid,
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        step=0,
        state="due",
        mode=mode_of(site, config),
        channel="",
        recipient="",
        subject="",
        body="",
        finding_at=now,
        due_at=now,
        policy=chosen.name,
        site=site,
    )


def _made(page: Page) -> ExplainedStep:
    tried = f"{page.attempts} attempt{'' if page.attempts == 1 else 's'}"
    reasons = {
        "due": f"{tried} so far: {page.error}" if page.error else f"waits; {tried} so far",
        "sent": f"taken after {tried}; waits for an answer",
        "acknowledged": f"acknowledged by {page.acknowledged_by} at {page.acknowledged_at:%Y-%m-%d %H:%M:%S} UTC"
        if page.acknowledged_at
        else f"acknowledged by {page.acknowledged_by}",
    }
    reason = reasons.get(page.state, page.error or "")
    if page.mode == "shadow":
        reason = f"shadow mode, recorded and not sent; {reason}"
    at = page.sent_at or page.next_attempt_at or page.due_at
    return ExplainedStep(page.step + 1, at, page.channel, page.recipient, page.state, reason)


def _planned(
    page: Page, steps: Sequence[PagingStep], reach: Reach, on_call: OnCall, now: datetime, *, made: bool
) -> Iterator[ExplainedStep]:
    """Steps that have no page yet."""
    for number, step in enumerate(steps, start=page.step + 2 if made else 1):
        at = page.finding_at + timedelta(minutes=step.after_minutes)
        if made and page.state not in ("due", "sent"):
            yield ExplainedStep(number, at, step.channel, _recipient(step, reach), "not needed", f"it is {page.state}")
            continue
        after = f"{step.after_minutes:g} min after the finding" if step.after_minutes else "at once"
        reason = after if number == 1 else f"{after}, while nobody has acknowledged, or when step {number - 1} fails"
        recipient = _recipient(step, reach)
        if step.to.startswith(policy.ON_CALL):
            try:
                to = on_call(step.to.removeprefix(policy.ON_CALL), max(at, now))
                recipient = _recipient(PagingStep(to=to, channel=step.channel), reach)
                reason = f"{step.to}; {reason}"
            except (ChannelRefused, ConfigError) as error:
                reason = f"{error}; the next step is used at once"
        if page.mode == "shadow":
            reason = f"shadow mode, would be recorded and not sent; {reason}"
        yield ExplainedStep(number, at, step.channel, recipient, "planned", reason)


def _recipient(step: PagingStep, reach: Reach) -> str:
    """As logs may show it: secrets are masked."""
    if step.to.startswith(policy.ON_CALL):
        return step.to
    return reach(PagingStep(to=step.to, channel=step.channel)).recipient


def _afterwards(page: Page, config: Config) -> str:
    if page.mode == "shadow":
        return "shadow mode: the operators are not told"
    operators = len(config.notifier.operators)
    whom = (
        f"{operators} operator{'' if operators == 1 else 's'} told" if operators else "an alarm is shown (no operators)"
    )
    return f"{config.notifier.exhausted_after_minutes:g} min after the last page without an answer: {whom}"


# --- a test page through every channel -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One recipient on one channel, and the tables of the configuration whose steps reach it."""

    step: PagingStep
    of: tuple[str, ...]


@dataclass(frozen=True)
class TestOutcome:
    """What came of a test page."""

    __test__ = False  # a name that pytest would collect

    channel: str
    recipient: str
    of: tuple[str, ...]
    ok: bool
    error: str
    duration_ms: float


def targets(config: Config, policy_name: str | None = None, even_in_shadow: bool = False) -> list[Target]:
    """Each distinct recipient of every policy and of the operators, or of one policy only.

    Without `even_in_shadow` recipients of whom only shadow mode speaks are left out, and a node that is all in shadow
    mode raises ConfigError; so does a policy that is not there, and a node that pages nobody.
    """
    policy.validate(config)
    tables = policy.all_steps(config)
    if policy_name is not None:
        wanted = policy_name if policy_name == DEFAULT else f"notifier.policies {policy_name}"
        if wanted not in tables:
            names = ", ".join([DEFAULT, *(p.name for p in config.notifier.policies)])
            raise ConfigError(f"there is no policy {policy_name}; known are {names}")
        tables = {wanted: tables[wanted]}
    if not any(tables.values()):
        raise ConfigError("nobody is to be paged: add [[notifier.steps]] to herald.toml")
    if not even_in_shadow:
        tables = {where: steps for where, steps in tables.items() if _is_live(where, config)}
        if not any(tables.values()):
            raise ConfigError(
                "in shadow mode nothing is sent, so nothing was; to send test pages all the same, add --even-in-shadow"
            )
    found: dict[tuple[str, str], list[str]] = {}
    for where, steps in tables.items():
        for step in steps:
            of = found.setdefault((step.channel, step.to), [])
            of += [where] if where not in of else []
    return [
        Target(PagingStep(to=to, channel=channel), tuple(of))  # type: ignore[arg-type]
        for (channel, to), of in found.items()
    ]


def _is_live(where: str, config: Config) -> bool:
    """Whether steps of this table may ever be sent."""
    sites = {f"notifier.policies {p.name}": p.sites for p in config.notifier.policies}.get(where, ())
    if not sites:
        return policy.any_live(config)
    return any(mode_of(site, config) == "live" for site in sites)


def send_tests(config: Config, chosen: Sequence[Target]) -> list[TestOutcome]:
    """Send a page that says it is a test to each target, side by side; roles are those on call now."""
    reach, on_call = _addresses(config)
    sent_at = utc_now()
    with ThreadPoolExecutor(config.notifier.senders) as threads:
        return list(threads.map(lambda target: _send_test(target, config, reach, on_call, sent_at), chosen))


def recipients(config: Config, chosen: Sequence[Target]) -> list[str]:
    """Whom each target reaches, as logs may show it: a role is not looked up."""
    reach = open_channels(config)
    return [f"{target.step.channel} to {_recipient(target.step, reach)}" for target in chosen]


def _send_test(target: Target, config: Config, reach: Reach, on_call: OnCall, at: datetime) -> TestOutcome:
    step, recipient, error = target.step, "", ""
    started = time.perf_counter()
    try:
        recipient = _recipient(step, reach)
        if step.to.startswith(policy.ON_CALL):
            to = on_call(step.to.removeprefix(policy.ON_CALL), at)
            step = PagingStep(to=to, channel=step.channel)
            recipient = f"{_recipient(step, reach)} ({recipient})"
        reach(step).send(_test_message(target, config, at))
    except (NotificationError, ConfigError) as failure:
        error = str(failure)
    except Exception as failure:  # one broken channel must not hide what came of the others
        error = f"the channel broke: {type(failure).__name__}: {failure}"
    duration_ms = (time.perf_counter() - started) * 1e3
    return TestOutcome(step.channel, recipient, target.of, not error, error, round(duration_ms, 1))


def _test_message(target: Target, config: Config, at: datetime) -> Message:
    subject = "TEST of Herald's paging: no patient, nothing to do"
    body = (
        "This is a TEST page. It is about no patient, and nothing has to be done.\n\n"
        f"Somebody tried at {at:%Y-%m-%d %H:%M:%S} UTC whether Herald reaches you by {target.step.channel}.\n"
        f"You are paged by: {', '.join(target.of)}\n"
    )
    return Message(
        str(uuid4()), subject, body, short=f"TEST of Herald: no patient, nothing to do. {at:%d %b %H:%M} UTC"
    )

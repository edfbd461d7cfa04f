import base64
import logging
import shutil
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from notifier_fakes import NOON, configured, triaged
from sqlalchemy import Connection, insert, select, update

from herald.config import ChannelName, Config, LedgerConfig, PagingPolicy, PagingSite, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError, LedgerError
from herald.events import Action, Finding, SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import Ledger, deliveries, pages, reviews
from notifier import policy, record
from notifier.channels import Channel, Message
from notifier.message import page_text
from notifier.paging import Paging
from notifier.record import Mode, Page
from notifier.service import Senders, open_channels

STEPS = (
    PagingStep(to="first@hospital.example"),
    PagingStep(to="second@hospital.example", after_minutes=10),
    PagingStep(to="third@hospital.example", after_minutes=20),
)
ANSWERED: tuple[Action, ...] = ("acknowledge", "agree", "disagree", "unsure")


class Killed(BaseException):
    """The process is gone at this very point."""


class FakeChannel:
    """Accepts, or does what `behaviour` says; keeps every attempt and every accepted message."""

    def __init__(self, recipient: str) -> None:
        self.recipient = recipient
        self.behaviour: str = "accept"
        self.attempts: list[Message] = []
        self.accepted: list[Message] = []
        self.during: Callable[[], None] = lambda: None

    def send(self, message: Message) -> None:
        self.attempts.append(message)
        self.during()
        if self.behaviour == "unavailable":
            raise ChannelUnavailable("server 10.0.0.1:25 cannot be reached")
        if self.behaviour == "refuse":
            raise ChannelRefused("server 10.0.0.1:25 answered 550 no")
        if self.behaviour == "break":
            raise KeyError("a bug in a channel")
        if self.behaviour == "die before":
            raise Killed
        self.accepted.append(message)
        if self.behaviour == "die after":
            raise Killed


class FaultyLedger(Ledger):
    """A ledger whose next transactions fail as `faults` say, in order; `ok` lets one pass."""

    faults: list[str]

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        fault = self.faults.pop(0) if self.faults else "ok"
        if fault == "refuse":
            raise LedgerError("the ledger refuses")
        if fault == "die before":
            raise Killed
        with super().begin() as connection:
            yield connection
        if fault == "refuse after":
            raise LedgerError("the connection was lost while it committed")
        if fault == "die after":
            raise Killed


def faulty_ledger(folder: Path) -> FaultyLedger:
    ledger = FaultyLedger(LedgerConfig(f"sqlite:///{folder / 'ledger.sqlite'}"))
    ledger.faults = []
    ledger.create_tables()
    return ledger


class Night:
    """A notifier's paging with a clock in the test's hand, that can die and start again on the same ledger.

    Senders work at once; while they are `busy`, their work waits in `queue` until the test has it done.
    """

    def __init__(self, ledger: FaultyLedger, **notifier: Any) -> None:
        self.ledger = ledger
        self.config: Config = configured(**{"mode": "live", "steps": STEPS, "retry_for_s": 20.0, **notifier})
        every = [step.to for steps in policy.all_steps(self.config).values() for step in steps]
        self.channels = [FakeChannel(to) for to in dict.fromkeys(every)]
        self.on_duty: dict[str, str] = {}
        self.undelivered: list[tuple[str, str]] = []
        self.while_told: Callable[[], None] = lambda: None
        self.busy = False
        self.now = NOON
        self.start()

    def start(self, **notifier: Any) -> None:
        self.config = replace(self.config, notifier=replace(self.config.notifier, **notifier))
        self.queue: list[Callable[[], None]] = []
        self.paging = Paging(
            self.ledger,
            self.config,
            self.reach,
            on_call=self.on_call,
            submit=self.submit,
            on_undelivered=self.tell,
            picture=lambda event: f"picture of {event.series_instance_uid}".encode(),
            now=lambda: self.now,
            jitter=lambda low, high: 1.0,
        )

    def reach(self, step: PagingStep) -> Channel:
        if step.to == "no address":
            raise ConfigError("notifier.steps.to 'no address' is not an e-mail address")
        return self.channel(step.to)

    def channel(self, to: str) -> FakeChannel:
        return next(channel for channel in self.channels if channel.recipient == to)

    def on_call(self, role: str, at: datetime) -> str:
        assert at == self.now
        if role not in self.on_duty:
            raise ChannelRefused(f"nobody is on call for {role}")
        return self.on_duty[role]

    def submit(self, channel: str, work: Callable[[], None]) -> None:
        if self.busy:
            self.queue.append(work)
        else:
            work()

    def tell(self, page: Page, reason: str) -> None:
        self.while_told()
        self.undelivered.append((page.study_instance_uid, reason))

    def after(self, **duration: float) -> datetime | None:
        self.now += timedelta(**duration)
        return self.paging.tick()

    def triage(self, disposition: str = "positive", **changes: Any) -> SeriesTriaged:
        event = triaged(disposition, occurred_at=self.now, **changes)
        self.paging.on_triaged(event)
        return event

    def review(self, action: Action = "acknowledge", *, series: str = "1.2.3.4", revision: int = 1) -> None:
        self.paging.on_reviewed(self.reviewed(action, series=series, revision=revision))

    def reviewed(self, action: Action = "acknowledge", *, series: str = "1.2.3.4", revision: int = 1) -> SeriesReviewed:
        return SeriesReviewed(
            study_instance_uid="1.2.3",
            series_instance_uid=series,
            revision=revision,
            occurred_at=self.now,
            review_id=str(uuid4()),
            action=action,
            reader="dr-night",
        )

    def pages(self, study: str = "1.2.3") -> list[Page]:
        with self.ledger.read() as connection:
            return record.pages_of_study(connection, study)

    def states(self) -> list[str]:
        return [page.state for page in self.pages()]

    def sent(self) -> list[int]:
        return [len(channel.accepted) for channel in self.channels]

    def outcomes(self) -> list[str]:
        with self.ledger.read() as connection:
            return list(connection.scalars(select(deliveries.c.outcome).order_by(deliveries.c.delivery_id)))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[FaultyLedger]:
    ledger = faulty_ledger(tmp_path)
    yield ledger
    ledger.close()


@pytest.fixture
def night(ledger: FaultyLedger) -> Night:
    return Night(ledger)


# --- one page --------------------------------------------------------------------------------------------------------


def test_a_positive_result_pages_the_first_step_at_once(night: Night) -> None:
    night.triage()
    (message,) = night.channels[0].accepted
    assert message.subject == page_text(triaged(), night.config).subject
    (page,) = night.pages()
    assert (page.state, page.mode, page.channel, page.recipient) == ("sent", "live", "smtp", "first@hospital.example")
    assert (page.sent_at, page.attempts, page.error) == (NOON, 1, None)
    assert message.page_id == page.page_id == record.page_id("1.2.3", 0)
    assert night.outcomes() == ["sent"]


@pytest.mark.parametrize("disposition", ["negative", "not_eligible", "failed"])
def test_any_other_result_pages_nobody(night: Night, disposition: str) -> None:
    night.triage(disposition)
    assert (night.sent(), night.pages()) == ([0, 0, 0], [])


def test_a_redelivered_result_pages_once(night: Night) -> None:
    event = night.triage()
    night.paging.on_triaged(event)
    night.start()
    night.paging.on_triaged(event)
    assert night.sent() == [1, 0, 0]
    assert night.outcomes() == ["sent"]


def test_a_later_series_or_revision_of_a_paged_study_is_noted_and_pages_nobody(night: Night) -> None:
    night.triage()
    night.triage(revision=2)
    again = night.triage(series="1.2.3.5")
    night.paging.on_triaged(again)
    assert night.sent() == [1, 0, 0]
    assert night.outcomes() == ["sent", "covered", "covered"]


def test_two_studies_are_two_pages(night: Night) -> None:
    night.triage()
    night.triage(study="1.2.9", series="1.2.9.1")
    assert night.sent() == [2, 0, 0]


def test_a_first_step_with_a_delay_waits_for_it(ledger: FaultyLedger) -> None:
    night = Night(ledger, steps=(replace(STEPS[0], after_minutes=3),))
    night.triage()
    assert night.after(minutes=2) == NOON + timedelta(minutes=3)
    assert night.sent() == [0]
    night.after(minutes=1)
    assert night.sent() == [1]


# --- channels that fail ----------------------------------------------------------------------------------------------


def test_an_unavailable_channel_is_retried_until_it_is_back_and_the_outage_is_one_row(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    assert night.after(seconds=1.9) == NOON + timedelta(seconds=2)
    assert len(night.channels[0].attempts) == 1
    night.after(seconds=0.1)
    (page,) = night.pages()
    assert (page.state, page.attempts, page.error) == ("due", 2, "server 10.0.0.1:25 cannot be reached")
    night.channels[0].behaviour = "accept"
    night.after(seconds=4)
    assert night.sent() == [1, 0, 0]
    assert night.outcomes() == ["unavailable", "sent"]


def test_a_channel_that_stays_unavailable_fails_and_the_next_step_is_used_at_once(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    for _ in range(20):
        night.after(seconds=2)
    assert night.states() == ["failed", "sent"]
    assert len(night.channels[0].attempts) == policy.attempts_allowed(20.0)
    assert night.pages()[1].sent_at <= NOON + timedelta(seconds=31)  # type: ignore[operator]


def test_a_channel_that_refuses_is_not_asked_again_and_the_next_step_is_used_in_the_same_breath(night: Night) -> None:
    night.channels[0].behaviour = "refuse"
    night.triage()
    assert night.states() == ["failed", "sent"]
    assert night.sent() == [0, 1, 0]
    assert night.outcomes() == ["refused", "sent"]


def test_a_channel_with_a_bug_is_passed_over_like_one_that_is_down(night: Night) -> None:
    night.channels[0].behaviour = "break"
    night.triage()
    for _ in range(20):
        night.after(seconds=2)
    assert night.states() == ["failed", "sent"]
    assert "KeyError" in str(night.pages()[0].error)


def test_when_every_channel_refuses_the_operator_is_told_what_to_do(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    assert night.states() == ["failed", "failed", "exhausted"]
    (line,) = (r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)
    assert "550 no" in line
    assert "call the radiologist" in line


def test_a_study_whose_page_reached_nobody_is_paged_for_its_next_positive_series(night: Night) -> None:
    for channel in night.channels:
        channel.behaviour = "refuse"
    event = night.triage()
    night.paging.on_triaged(event)
    assert len(night.channels[0].attempts) == 1
    night.channels[0].behaviour = "accept"
    night.triage(series="1.2.3.5")
    assert night.states() == ["sent"]
    assert night.sent() == [1, 0, 0]


# --- escalation ------------------------------------------------------------------------------------------------------


def test_an_unanswered_page_escalates_step_by_step_and_is_exhausted_after_the_last(
    night: Night, caplog: pytest.LogCaptureFixture
) -> None:
    night.triage()
    assert night.after(minutes=9.9) == NOON + timedelta(minutes=10)
    assert night.sent() == [1, 0, 0]
    night.after(minutes=0.1)
    assert (night.states(), night.sent()) == (["escalated", "sent"], [1, 1, 0])
    assert night.after(minutes=10) == NOON + timedelta(minutes=35)
    assert (night.states(), night.sent()) == (["escalated", "escalated", "sent"], [1, 1, 1])
    assert night.after(minutes=15) is None
    assert night.states() == ["escalated", "escalated", "exhausted"]
    assert "nobody has acknowledged in time" in caplog.text
    assert any(r.levelno == logging.ERROR for r in caplog.records)


@pytest.mark.parametrize("action", ANSWERED)
def test_any_verdict_stops_the_escalation_and_is_recorded(night: Night, action: Action) -> None:
    night.triage()
    night.now += timedelta(minutes=5)
    night.review(action)
    (page,) = night.pages()
    assert (page.state, page.acknowledged_by, page.acknowledged_at) == ("acknowledged", "dr-night", night.now)
    assert night.after(hours=2) is None
    assert night.sent() == [1, 0, 0]


def test_a_review_after_exhaustion_still_acknowledges(ledger: FaultyLedger) -> None:
    night = Night(ledger, steps=STEPS[:1])
    night.triage()
    night.after(minutes=20)
    assert night.states() == ["exhausted"]
    night.review()
    assert night.states() == ["acknowledged"]


def test_the_first_reader_stays_the_one_who_acknowledged(night: Night) -> None:
    night.triage()
    night.review()
    night.paging.on_reviewed(replace(night.reviewed(), reader="dr-late"))
    assert night.pages()[0].acknowledged_by == "dr-night"


def write_review(night: Night, event: SeriesReviewed) -> None:
    """As the web UI does, before its event reaches the notifier."""
    with night.ledger.begin() as connection:
        connection.execute(
            insert(reviews).values(
                review_id=event.review_id,
                study_instance_uid=event.study_instance_uid,
                series_instance_uid=event.series_instance_uid,
                revision=event.revision,
                action=event.action,
                reader=event.reader,
                prediction_shown=True,
                occurred_at=event.occurred_at,
            )
        )


def test_a_review_in_the_ledger_stops_a_page_whose_result_is_handled_later(night: Night) -> None:
    event = triaged(occurred_at=NOON)
    write_review(night, night.reviewed())
    night.paging.on_triaged(event)
    assert (night.states(), night.sent()) == (["acknowledged"], [0, 0, 0])


def test_a_review_in_the_ledger_stops_the_escalation_before_its_event_arrives(night: Night) -> None:
    night.triage()
    night.now += timedelta(minutes=9)
    write_review(night, night.reviewed())
    night.after(minutes=5)
    assert (night.states(), night.sent()) == (["acknowledged"], [1, 0, 0])


def test_agreeing_beforehand_that_another_series_is_clear_does_not_stop_the_page(night: Night) -> None:
    clear = night.reviewed("agree", series="1.2.3.5")
    write_review(night, clear)
    night.now += timedelta(minutes=1)
    night.triage()
    night.paging.on_reviewed(clear)
    assert (night.states(), night.sent()) == (["sent"], [1, 0, 0])


def test_a_review_of_an_earlier_revision_does_not_stop_the_page_of_the_next(night: Night) -> None:
    early = night.reviewed("agree")
    write_review(night, early)
    night.now += timedelta(minutes=1)
    night.triage(revision=2)
    night.paging.on_reviewed(early)
    assert (night.states(), night.sent()) == (["sent"], [1, 0, 0])


def test_a_review_of_an_earlier_revision_after_the_finding_does_not_stop_the_page_of_the_next(night: Night) -> None:
    night.triage(revision=2)
    night.now += timedelta(minutes=1)
    late = night.reviewed("agree", revision=1)
    write_review(night, late)
    night.paging.on_reviewed(late)
    night.after(minutes=9)
    assert (night.states(), night.sent()) == (["escalated", "sent"], [1, 1, 0])


def test_a_review_of_another_series_before_the_notifier_knew_of_the_finding_does_not_stop_the_page(
    night: Night,
) -> None:
    event = triaged(occurred_at=NOON)
    night.now += timedelta(minutes=5)
    clear = night.reviewed("agree", series="1.2.3.5")
    write_review(night, clear)
    night.now += timedelta(minutes=15)
    night.paging.on_triaged(event)
    night.paging.on_reviewed(clear)
    assert (night.states(), night.sent(), night.pages()[0].made_at) == (["sent"], [1, 0, 0], night.now)
    night.after(minutes=10)
    assert {page.made_at for page in night.pages()} == {NOON + timedelta(minutes=20)}  # the next step's is no later
    night.review("agree", series="1.2.3.5")
    assert night.states()[-1] == "acknowledged"


def test_a_row_of_an_earlier_version_is_answered_by_another_series_from_the_finding_on(night: Night) -> None:
    night.triage()
    with night.ledger.begin() as connection:
        connection.execute(update(pages).values(made_at=None))
    night.review(series="1.2.3.5")
    assert night.states() == ["acknowledged"]


def test_an_acknowledged_failure_does_not_stop_the_page_when_its_replay_is_positive(night: Night) -> None:
    night.triage("failed")
    night.now += timedelta(minutes=2)
    early = night.reviewed()
    write_review(night, early)
    night.now += timedelta(minutes=5)
    night.triage()
    night.paging.on_reviewed(early)
    assert (night.states(), night.sent()) == (["sent"], [1, 0, 0])


def test_a_reader_whose_host_is_a_little_behind_still_stops_the_page(night: Night) -> None:
    event = night.reviewed()
    night.now += policy.CLOCK_SLACK
    night.triage()
    night.paging.on_reviewed(event)
    assert night.states() == ["acknowledged"]


def test_a_review_while_the_page_is_being_sent_is_not_overwritten(night: Night) -> None:
    night.channels[0].during = night.review
    night.triage()
    (page,) = night.pages()
    assert (page.state, page.sent_at) == ("acknowledged", NOON)


def test_a_review_while_a_channel_is_failing_keeps_the_next_step_from_being_paged(night: Night) -> None:
    night.channels[0].during = night.review
    night.channels[0].behaviour = "refuse"
    night.triage()
    assert (night.states(), night.sent()) == (["acknowledged"], [0, 0, 0])


# --- revisions -------------------------------------------------------------------------------------------------------


def test_a_negative_later_revision_withdraws_a_page_that_is_not_sent_yet(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    night.triage("negative", revision=2)
    assert night.states() == ["withdrawn"]
    night.channels[0].behaviour = "accept"
    assert night.after(hours=1) is None
    assert night.sent() == [0, 0, 0]
    night.triage(revision=3)
    assert night.sent() == [1, 0, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"disposition": "negative", "revision": 1},
        {"disposition": "negative", "series": "1.2.3.5", "revision": 2},
        {"disposition": "failed", "revision": 2},
        {"disposition": "not_eligible", "revision": 2},
    ],
)
def test_no_other_result_withdraws_a_page(night: Night, changes: dict[str, Any]) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    night.triage(**changes)
    assert night.states() == ["due"]


def test_a_page_that_stands_for_another_positive_series_too_is_not_withdrawn(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    night.triage(series="1.2.3.5")
    night.triage("negative", revision=2)
    assert night.states() == ["due"]


def test_a_later_step_is_not_withdrawn_once_an_earlier_one_was_sent(night: Night) -> None:
    night.triage()
    night.channels[1].behaviour = "unavailable"
    night.after(minutes=10)
    night.triage("negative", revision=2)
    night.triage(series="1.2.3.5")
    assert night.states() == ["escalated", "due"]
    night.channels[1].behaviour = "accept"
    night.after(seconds=2)
    assert night.sent() == [1, 1, 0]


def test_a_page_that_was_sent_stays_and_still_escalates_after_a_negative_revision(night: Night) -> None:
    night.triage()
    night.triage("negative", revision=2)
    night.after(minutes=10)
    assert night.sent() == [1, 1, 0]


# --- policies, sites, rosters -----------------------------------------------------------------------------------------

NORTH = PagingSite(name="north", calling_ae_titles=("NORTH1",))
NIGHT_STEPS = (PagingStep(to="night@hospital.example"), PagingStep(to="chief@hospital.example", after_minutes=10))
NIGHTS = PagingPolicy(name="nights", sites=("north",), from_time="18:00", until_time="07:00", steps=NIGHT_STEPS)
LATE = NOON + timedelta(hours=18, minutes=55)  # five to seven, UTC


@pytest.fixture
def north(ledger: FaultyLedger) -> Night:
    night = Night(ledger, sites=(NORTH,), policies=(NIGHTS,), time_zone="UTC")
    night.now = LATE
    return night


def test_a_page_keeps_policy_site_mode_and_event_and_escalates_by_its_policy_after_its_hours(north: Night) -> None:
    event = north.triage(calling_ae_title="NORTH1")
    north.after(minutes=10)
    first, second = north.pages()
    assert {(page.policy, page.site, page.mode) for page in (first, second)} == {("nights", "north", "live")}
    assert first.triaged == second.triaged == event
    assert [page.recipient for page in (first, second)] == ["night@hospital.example", "chief@hospital.example"]
    assert len(north.channel("chief@hospital.example").accepted) == 1
    north.triage(study="1.2.9", series="1.2.9.1", calling_ae_title="NORTH1")
    assert [(page.policy, page.recipient) for page in north.pages("1.2.9")] == [("", "first@hospital.example")]


def test_a_page_of_a_policy_that_has_gone_goes_on_by_the_steps_of_the_notifier(north: Night) -> None:
    north.triage(calling_ae_title="NORTH1")
    north.start(policies=())
    north.after(minutes=10)
    assert [page.recipient for page in north.pages()] == ["night@hospital.example", "second@hospital.example"]
    assert len(north.channel("second@hospital.example").accepted) == 1


def test_a_row_of_an_earlier_version_without_policy_site_and_event_is_sent_and_escalated(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    with night.ledger.begin() as connection:
        connection.execute(update(pages).values(policy=None, site=None, event=None))
    night.channels[0].behaviour = "accept"
    night.after(seconds=2)
    night.after(minutes=10)
    assert (night.states(), night.sent()) == (["escalated", "sent"], [1, 1, 0])
    (message,) = night.channels[0].accepted
    assert (message.event, message.link) == (None, "")
    assert 0 < len(message.short) <= 160


def test_a_message_has_all_that_a_channel_may_need_and_draws_the_picture_only_when_asked(night: Night) -> None:
    event = night.triage()
    (message,) = night.channels[0].accepted
    assert message.event == event
    assert 0 < len(message.short) <= 160
    assert message.link.startswith("https://herald.example/page/")
    assert message.link in message.body
    assert message.picture() == b"picture of 1.2.3.4"


ON_CALL = (PagingStep(to="on-call:neurosurgery"), PagingStep(to="second@hospital.example", after_minutes=10))


@pytest.fixture
def rota(ledger: FaultyLedger) -> Night:
    night = Night(ledger, steps=ON_CALL, roster="rota.ics")
    night.channels += [FakeChannel("early@hospital.example"), FakeChannel("late@hospital.example")]
    return night


def test_a_role_is_looked_up_when_it_is_paged_and_again_at_every_retry(rota: Night) -> None:
    rota.on_duty["neurosurgery"] = "early@hospital.example"
    rota.channel("early@hospital.example").behaviour = "unavailable"
    rota.triage()
    assert rota.pages()[0].recipient == "early@hospital.example"
    rota.on_duty["neurosurgery"] = "late@hospital.example"
    rota.after(seconds=2)
    assert rota.pages()[0].recipient == "late@hospital.example"
    assert len(rota.channel("late@hospital.example").accepted) == 1
    assert rota.outcomes() == ["unavailable", "sent"]


def test_a_page_that_waits_for_its_time_names_the_role_that_will_be_looked_up(ledger: FaultyLedger) -> None:
    night = Night(ledger, steps=(replace(ON_CALL[0], after_minutes=5),), roster="rota.ics")
    night.triage()
    assert night.pages()[0].recipient == "on-call:neurosurgery"


def test_with_nobody_on_call_the_next_step_is_used_in_the_same_breath(rota: Night) -> None:
    rota.triage()
    assert rota.states() == ["failed", "sent"]
    assert rota.pages()[0].error == "nobody is on call for neurosurgery"
    assert len(rota.channel("second@hospital.example").accepted) == 1


def test_an_address_of_the_roster_that_is_none_is_passed_over_with_the_reason(rota: Night) -> None:
    rota.on_duty["neurosurgery"] = "no address"
    rota.triage()
    assert rota.states() == ["failed", "sent"]
    assert "'no address' is not an e-mail address" in str(rota.pages()[0].error)


def test_shadow_mode_finds_out_who_was_on_call_and_that_nobody_was(ledger: FaultyLedger) -> None:
    night = Night(ledger, steps=ON_CALL, roster="rota.ics", mode="shadow")
    night.channels += [FakeChannel("early@hospital.example")]
    night.on_duty["neurosurgery"] = "early@hospital.example"
    night.triage()
    assert (night.states(), night.pages()[0].recipient) == (["sent"], "early@hospital.example")
    night.on_duty.clear()
    night.triage(study="1.2.9", series="1.2.9.1")
    assert [page.state for page in night.pages("1.2.9")] == ["failed", "sent"]
    assert sum(night.sent()) == 0


# --- the operators ---------------------------------------------------------------------------------------------------


def test_the_operators_are_told_once_of_a_study_that_reached_nobody_and_why(night: Night) -> None:
    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    night.after()
    night.after(hours=1)
    assert night.undelivered == [("1.2.3", "server 10.0.0.1:25 answered 550 no")]


def test_the_operators_are_told_when_nobody_has_acknowledged_the_last_page(night: Night) -> None:
    night.triage()
    for _ in range(40):
        night.after(minutes=1)
    assert night.undelivered == [("1.2.3", "nobody has acknowledged in time")]


def test_an_answer_that_comes_before_the_operators_were_told_spares_them(night: Night) -> None:
    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    night.review()
    night.after()
    assert (night.undelivered, night.states()[-1]) == ([], "acknowledged")


def test_operators_who_could_not_be_told_are_told_again(night: Night, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise KeyError("a bug in the alarm")

    night.while_told = broken
    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    assert night.after() == NOON + timedelta(seconds=30)
    assert "could not be told" in caplog.text
    night.while_told = lambda: None
    night.after(seconds=29)
    assert night.undelivered == []
    night.after(seconds=1)
    assert len(night.undelivered) == 1


def test_a_crash_while_the_operators_are_told_has_them_told_again(night: Night) -> None:
    def killed() -> None:
        raise Killed

    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    night.while_told = killed
    with pytest.raises(Killed):
        night.after()
    night.while_told = lambda: None
    night.start()
    night.after()
    assert len(night.undelivered) == 1


def test_paging_may_be_used_while_the_operators_are_told_because_no_lock_is_held(night: Night) -> None:
    for channel in night.channels:
        channel.behaviour = "refuse"
    night.triage()
    night.while_told = night.review
    night.after()
    assert night.states()[-1] == "acknowledged"


def test_nobody_is_told_of_what_shadow_mode_would_have_exhausted(ledger: FaultyLedger) -> None:
    night = Night(ledger, mode="shadow")
    night.triage()
    for _ in range(60):
        night.after(minutes=1)
    assert (night.states()[-1], night.undelivered) == ("exhausted", [])


# --- senders ---------------------------------------------------------------------------------------------------------


def test_a_page_that_waits_for_a_sender_is_handed_over_once_and_not_sent_once_answered(night: Night) -> None:
    night.busy = True
    event = night.triage()
    night.paging.on_triaged(event)
    assert night.after(minutes=1) is None  # nothing is due that no sender has in hand
    (work,) = night.queue
    assert night.pages()[0].attempts == 0
    night.review()
    work()
    assert (night.sent(), night.states()) == ([0, 0, 0], ["acknowledged"])


def test_a_page_that_waits_for_a_sender_may_still_be_withdrawn(night: Night) -> None:
    night.busy = True
    night.triage()
    night.triage("negative", revision=2)
    night.queue.pop()()
    assert (night.sent(), night.states()) == ([0, 0, 0], ["withdrawn"])


def test_a_bug_that_a_sender_meets_ends_the_clock(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug while recording")

    monkeypatch.setattr(record, "note_delivery", broken)
    night.triage()
    with pytest.raises(RuntimeError, match="a bug while recording"):
        night.paging.run(threading.Event())


class Hanging(FakeChannel):
    """Hangs until it is let go."""

    def __init__(self, recipient: str) -> None:
        super().__init__(recipient)
        self.entered, self.released = threading.Semaphore(0), threading.Event()
        self.done = threading.Event()

    def send(self, message: Message) -> None:
        self.entered.release()
        assert self.released.wait(20)
        super().send(message)
        self.done.set()


@contextmanager
def sending(ledger: Ledger, config: Config, *channels: FakeChannel) -> Iterator[Paging]:
    """Paging with real senders and a clock that runs."""
    by_address = {channel.recipient: channel for channel in channels}
    senders, stop = Senders(config.notifier.senders), threading.Event()
    paging = Paging(ledger, config, lambda step: by_address[step.to], submit=senders.submit)
    clock = threading.Thread(target=paging.run, args=(stop,))
    clock.start()
    try:
        yield paging
    finally:
        stop.set()
        paging.wake()
        for channel in channels:
            if isinstance(channel, Hanging):
                channel.released.set()
        clock.join(20)
        senders.close()
    assert not clock.is_alive()


ELSEWHERE = PagingPolicy(name="elsewhere", findings=("sah",), steps=(PagingStep(to="other@hospital.example"),))
SAH = (Finding("any", 0.9, 1.0, 3, "1.2"), Finding("sah", 0.9, 1.0, 3, "1.2"))


def test_a_channel_that_hangs_holds_up_no_other_page(ledger: FaultyLedger) -> None:
    hanging, other = Hanging("first@hospital.example"), FakeChannel("other@hospital.example")
    arrived = threading.Event()
    other.during = arrived.set
    config = configured(mode="live", steps=STEPS[:1], policies=(ELSEWHERE,), senders=2)
    with sending(ledger, config, hanging, other) as paging:
        paging.on_triaged(triaged())
        assert hanging.entered.acquire(timeout=10)
        paging.on_triaged(triaged(study="1.2.9", series="1.2.9.1", findings=SAH))
        assert arrived.wait(10)
    assert (len(hanging.accepted), len(other.accepted)) == (1, 1)


def test_when_every_sender_of_a_channel_hangs_another_channel_still_sends(ledger: FaultyLedger) -> None:
    hanging, other = Hanging("first@hospital.example"), FakeChannel("other@hospital.example")
    arrived = threading.Event()
    other.during = arrived.set
    pager = replace(ELSEWHERE, steps=(PagingStep(to="other@hospital.example", channel="pager"),))
    config = configured(mode="live", steps=STEPS[:1], policies=(pager,), senders=2)
    with sending(ledger, config, hanging, other) as paging:
        for study in range(4):
            paging.on_triaged(triaged(study=f"1.2.{study}", series=f"1.2.{study}.1"))
        assert hanging.entered.acquire(timeout=10)
        assert hanging.entered.acquire(timeout=10)
        paging.on_triaged(triaged(study="1.2.9", series="1.2.9.1", findings=SAH))
        assert arrived.wait(10)


def test_the_clock_sends_what_comes_due_while_a_channel_hangs(ledger: FaultyLedger) -> None:
    hanging, other = Hanging("first@hospital.example"), FakeChannel("other@hospital.example")
    arrived = threading.Event()
    other.during = arrived.set
    steps = (replace(STEPS[0], to="other@hospital.example", after_minutes=0.001),)
    delayed = replace(ELSEWHERE, steps=steps)
    config = configured(mode="live", steps=STEPS[:1], policies=(delayed,), senders=2)
    with sending(ledger, config, hanging, other) as paging:
        paging.on_triaged(triaged())
        assert hanging.entered.acquire(timeout=10)
        paging.on_triaged(triaged(study="1.2.9", series="1.2.9.1", findings=SAH, occurred_at=utc_now()))
        assert arrived.wait(10)


def test_stopping_sends_a_page_under_way_to_its_end_and_leaves_those_that_wait(ledger: FaultyLedger) -> None:
    hanging = Hanging("first@hospital.example")
    senders = Senders(1)
    config = configured(mode="live", steps=STEPS[:1])
    paging = Paging(ledger, config, lambda step: hanging, submit=senders.submit)
    paging.on_triaged(triaged())
    paging.on_triaged(triaged(study="1.2.9", series="1.2.9.1"))
    assert hanging.entered.acquire(timeout=10)
    closing = threading.Thread(target=senders.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    hanging.released.set()
    closing.join(10)
    assert not closing.is_alive()
    with ledger.read() as connection:
        states = {study: record.pages_of_study(connection, study)[0].state for study in ("1.2.3", "1.2.9")}
    assert states == {"1.2.3": "sent", "1.2.9": "due"}
    again = FakeChannel("first@hospital.example")
    Paging(ledger, config, lambda step: again).tick()
    assert [message.page_id for message in again.accepted] == [record.page_id("1.2.9", 0)]


def test_a_channel_is_opened_once_for_each_recipient(monkeypatch: pytest.MonkeyPatch, ledger: FaultyLedger) -> None:
    opened: list[str] = []

    def opening(step: PagingStep, config: Any) -> FakeChannel:
        opened.append(step.to)
        return FakeChannel(step.to)

    monkeypatch.setattr("notifier.service.open_channel", opening)
    twice = (STEPS[0], replace(STEPS[0], after_minutes=5), STEPS[1])
    config = configured(mode="live", steps=twice)
    paging = Paging(ledger, config, open_channels(config))
    for study in range(3):
        paging.on_triaged(triaged(study=f"1.2.{study}", series=f"1.2.{study}.1"))
    assert opened == ["first@hospital.example", "second@hospital.example"]


# --- modes -----------------------------------------------------------------------------------------------------------


def test_shadow_mode_records_what_would_have_been_sent_and_sends_nothing(ledger: FaultyLedger) -> None:
    night = Night(ledger, mode="shadow")
    night.triage()
    for _ in range(60):
        night.after(minutes=1)
    assert (night.states(), night.sent()) == (["escalated", "escalated", "exhausted"], [0, 0, 0])
    assert {page.mode for page in night.pages()} == {"shadow"}
    assert night.outcomes() == ["shadow", "shadow", "shadow"]


class TrapServer:
    """Accepts TCP connections, counts them, and hangs up."""

    def __init__(self) -> None:
        self.connections = 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.accept)
        self.thread.start()

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(10)


@pytest.fixture
def trap() -> Iterator[TrapServer]:
    trap = TrapServer()
    yield trap
    trap.close()


ADDRESSES: dict[ChannelName, str] = {
    "smtp": "first@hospital.example",
    "pager": "4711@pager.example",
    "webhook": "http://127.0.0.1:{port}/page",
    "hl7": "127.0.0.1:{port}",
    "apprise": "json://127.0.0.1:{port}/",
}


@pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")  # Apprise's
@pytest.mark.parametrize("channel", get_args(ChannelName))
@pytest.mark.parametrize("mode", ["shadow", "live"])
def test_a_real_channel_of_any_kind_connects_to_nobody_in_shadow_mode_and_does_in_live(
    ledger: FaultyLedger, trap: TrapServer, channel: ChannelName, mode: Mode
) -> None:
    """The live half shows that the trap is one."""
    step = PagingStep(to=ADDRESSES[channel].format(port=trap.port), channel=channel)
    config = configured(
        mode="live",  # of the node: the site's own mode is what counts
        steps=(step, replace(step, after_minutes=5)),
        sites=(PagingSite(name="east", scanners=("CT-EAST",), mode=mode),),
        smtp_host="127.0.0.1",
        smtp_port=trap.port,
        smtp_timeout_s=2.0,
        webhook_secret="whsec_" + base64.b64encode(bytes(24)).decode(),
        retry_for_s=0.0,
    )
    clock = NOON
    paging = Paging(ledger, config, open_channels(config), now=lambda: clock)
    paging.on_triaged(triaged())
    for _ in range(4):
        clock += timedelta(minutes=6)
        paging.tick()
    assert bool(trap.connections) is (mode == "live")
    with ledger.read() as connection:
        found = record.pages_of_study(connection, "1.2.3")
    assert {page.mode for page in found} == {mode}
    assert [page.state for page in found] == (
        ["escalated", "exhausted"] if mode == "shadow" else ["failed", "exhausted"]
    )


def test_a_live_site_of_a_shadow_node_is_paged_and_the_others_are_not(ledger: FaultyLedger) -> None:
    night = Night(ledger, mode="shadow", sites=(replace(NORTH, mode="live"),))
    night.triage(calling_ae_title="NORTH1")
    night.triage(study="1.2.9", series="1.2.9.1", calling_ae_title="SOUTH1")
    assert night.sent() == [1, 0, 0]
    assert [(page.mode, page.site) for study in ("1.2.3", "1.2.9") for page in night.pages(study)] == [
        ("live", "north"),
        ("shadow", ""),
    ]


def test_shadow_mode_without_a_policy_still_shows_that_somebody_would_have_been_paged(ledger: FaultyLedger) -> None:
    night = Night(ledger, mode="shadow", steps=())
    night.triage()
    night.after(minutes=1)
    (page,) = night.pages()
    assert (page.channel, page.state, page.mode) == ("none", "sent", "shadow")
    assert "Intraparenchymal" in page.body
    assert night.outcomes() == ["shadow"]


def test_a_page_made_in_shadow_mode_is_never_sent_by_a_live_node(ledger: FaultyLedger) -> None:
    night = Night(ledger, mode="shadow")
    event = night.triage()
    night.start(mode="live")
    night.paging.on_triaged(event)
    night.after(minutes=30)
    assert night.sent() == [0, 0, 0]
    night.triage(series="1.2.3.5")
    assert night.sent() == [1, 0, 0]


def test_a_page_made_live_is_not_sent_by_a_node_switched_to_shadow(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    night.channels[0].behaviour = "accept"
    night.start(mode="shadow")
    night.after(minutes=1)
    assert night.sent() == [0, 0, 0]
    assert night.pages()[0].mode == "shadow"


def test_live_mode_without_a_policy_does_not_start_and_says_how_to_write_one() -> None:
    with pytest.raises(ConfigError, match=r"\[\[notifier\.steps\]\]"):
        open_channels(configured(mode="live"))
    open_channels(configured(mode="shadow"))


# --- crashes and clocks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["die before", "die after"])
def test_a_crash_while_sending_leads_to_another_attempt_with_the_same_page_id(night: Night, moment: str) -> None:
    night.channels[0].behaviour = moment
    with pytest.raises(Killed):
        night.triage()
    assert night.pages()[0].attempts == 1  # marked before it was made
    night.channels[0].behaviour = "accept"
    night.start()
    night.after(seconds=3)
    assert night.states() == ["sent"]
    assert len({message.page_id for message in night.channels[0].attempts}) == 1


def test_a_page_sent_while_the_ledger_goes_away_is_not_sent_again_when_it_is_back(night: Night) -> None:
    night.ledger.faults = ["ok", "ok", "refuse", "refuse"]
    night.triage()
    with pytest.raises(LedgerError):
        night.after(minutes=1)
    night.after(minutes=1)
    assert (night.sent(), night.states()) == ([1, 0, 0], ["sent"])


def test_a_result_redelivered_before_its_page_could_be_recorded_does_not_page_again(night: Night) -> None:
    night.ledger.faults = ["ok", "ok", "refuse"]
    event = triaged(occurred_at=NOON)
    night.paging.on_triaged(event)
    night.now += timedelta(minutes=1)
    night.paging.on_triaged(event)
    assert night.sent() == [1, 0, 0]
    night.after(minutes=1)
    assert night.states() == ["sent"]


def test_a_clock_set_back_by_hours_delays_neither_a_retry_nor_an_escalation(night: Night) -> None:
    night.channels[0].behaviour = "unavailable"
    night.triage()
    night.channels[0].behaviour = "accept"
    night.after(hours=-6)
    assert night.sent() == [1, 0, 0]
    night.after(hours=-6)
    assert night.sent()[1] == 1


@pytest.mark.parametrize("ahead_s", [30, 3600])
def test_a_result_from_a_host_whose_clock_is_ahead_is_paged_at_once(night: Night, ahead_s: int) -> None:
    night.paging.on_triaged(triaged(occurred_at=NOON + timedelta(seconds=ahead_s)))
    assert night.sent() == [1, 0, 0]


def test_a_step_that_was_taken_out_of_the_policy_is_passed_over(night: Night) -> None:
    night.channels[1].behaviour = "unavailable"
    night.triage()
    night.after(minutes=10)
    night.channels = night.channels[:1]
    night.start(steps=STEPS[:1])
    night.after(minutes=1)
    assert night.states() == ["escalated", "exhausted"]
    assert "no step 2 any more" in str(night.pages()[1].error)


@settings(deadline=None)
@given(retry_for_s=st.floats(0, 86400))
def test_the_attempts_of_a_channel_take_as_long_as_it_is_to_be_retried(retry_for_s: float) -> None:
    attempts = policy.attempts_allowed(retry_for_s)
    spent_s = sum(policy.retry_pause_s(attempt) for attempt in range(1, attempts))
    assert retry_for_s <= spent_s < retry_for_s + policy.RETRY_LONGEST_S or attempts == 1


def test_the_clock_thread_retries_without_being_polled_and_is_woken_by_new_pages(ledger: FaultyLedger) -> None:
    channel = FakeChannel("first@hospital.example")
    tried, accepted = threading.Semaphore(0), threading.Event()

    def during() -> None:
        if len(channel.attempts) >= 3:
            channel.behaviour = "accept"
            accepted.set()
        tried.release()

    channel.behaviour, channel.during = "unavailable", during
    config = configured(mode="live", steps=STEPS[:1])
    paging = Paging(ledger, config, lambda step: channel, jitter=lambda low, high: 0.005)
    stop = threading.Event()
    clock = threading.Thread(target=paging.run, args=(stop,))
    clock.start()
    try:
        paging.on_triaged(triaged())
        assert accepted.wait(10)
    finally:
        stop.set()
        paging.wake()
        clock.join(10)
    assert not clock.is_alive()
    assert len(channel.accepted) == 1


# --- anything, in any order ------------------------------------------------------------------------------------------

SITES = {"1.2.3": "NORTH1", "1.2.7": "SOUTH1", "1.2.9": "ELSEWHERE"}
"""Studies, and who sent them: a site with policies of its own, one in shadow mode, and none."""

STUDIES = tuple(SITES)
STEP_OF = {record.page_id(study, step): (study, step) for study in STUDIES for step in range(len(STEPS))}
SOUTH = PagingSite(name="south", calling_ae_titles=("SOUTH1",), mode="shadow")
DAYS = replace(
    NIGHTS,
    name="days",
    from_time="07:00",
    until_time="18:00",
    steps=(PagingStep(to="on-call:neurosurgery"), PagingStep(to="chief@hospital.example", after_minutes=10)),
)
DUTY = ("early@hospital.example", "late@hospital.example")
RECIPIENTS = {
    "1.2.3": {"night@hospital.example", "chief@hospital.example", *DUTY, *(step.to for step in STEPS)},
    "1.2.7": set[str](),
    "1.2.9": {step.to for step in STEPS},
}
"""Who may ever be told of a study, also when its policy has gone."""

ADDRESSES_OF_ALL = tuple(sorted(set().union(*RECIPIENTS.values())))


class PagingUnderFire(RuleBasedStateMachine):
    """Redelivery, crashes anywhere, ledger outages, clock jumps, early reviews, busy senders, swaps, new policies."""

    def __init__(self) -> None:
        super().__init__()
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.night = Night(
            faulty_ledger(self.folder),
            sites=(NORTH, SOUTH),
            policies=(NIGHTS, DAYS),
            time_zone="UTC",
            roster="rota.ics",
        )
        self.night.channels = [FakeChannel(to) for to in ADDRESSES_OF_ALL]
        self.allowed: Counter[tuple[str, int]] = Counter()
        self.handled: list[SeriesTriaged] = []
        self.unacknowledged: list[SeriesTriaged | SeriesReviewed] = []
        self.excused: set[str] = set()  # studies that a review or a negative revision may have stopped
        self.answered: dict[str, Counter[tuple[str, int]]] = {}

    def survive(self, action: Callable[[], object]) -> bool:
        """Whether the action came to its end; a process that dies is started again."""
        try:
            action()
        except LedgerError:
            return False
        except Killed:
            self.dies()
            return False
        return True

    def deliver(self, event: SeriesTriaged | SeriesReviewed) -> None:
        handler: Any = (
            self.night.paging.on_triaged if isinstance(event, SeriesTriaged) else self.night.paging.on_reviewed
        )
        if not self.survive(lambda: handler(event)):
            self.unacknowledged.append(event)

    def accepted(self) -> Counter[tuple[str, int]]:
        return Counter(STEP_OF[m.page_id] for channel in self.night.channels for m in channel.accepted)

    @rule(
        study=st.sampled_from(STUDIES), series=st.sampled_from("12"), revision=st.integers(1, 2), positive=st.booleans()
    )
    def triage(self, study: str, series: str, revision: int, positive: bool) -> None:
        event = triaged(
            "positive" if positive else "negative",
            study=study,
            series=f"{study}.{series}",
            revision=revision,
            occurred_at=self.night.now,
            calling_ae_title=SITES[study],
        )
        if not positive:
            self.excused.add(study)
        self.handled.append(event)
        self.deliver(event)

    @rule(which=st.integers(0, 1000))
    def redeliver(self, which: int) -> None:
        if self.handled:
            self.deliver(self.handled[which % len(self.handled)])

    @rule(study=st.sampled_from(STUDIES), series=st.sampled_from("12"), early=st.booleans())
    def review(self, study: str, series: str, early: bool) -> None:
        event = replace(self.night.reviewed(series=f"{study}.{series}", revision=2), study_instance_uid=study)
        self.excused.add(study)
        self.night.ledger.faults.clear()
        write_review(self.night, event)
        if early:
            return
        self.deliver(event)
        states = {page.state for page in self.night.pages(study)}
        if "acknowledged" in states and not states & {"due", "sent", "exhausted"}:
            self.answered.setdefault(study, self.accepted())

    @rule(seconds=st.sampled_from([0.0, 1.0, 5.0, 40.0, 601.0, 1300.0]))
    def time_passes(self, seconds: float) -> None:
        self.survive(lambda: self.night.after(seconds=seconds))

    @rule(hours=st.sampled_from([-9, -1, 1, 9]))
    def clock_jumps(self, hours: int) -> None:
        self.survive(lambda: self.night.after(hours=hours))

    @rule(
        to=st.sampled_from(ADDRESSES_OF_ALL),
        behaviour=st.sampled_from(["accept", "accept", "unavailable", "refuse", "break", "die before", "die after"]),
    )
    def channel_changes(self, to: str, behaviour: str) -> None:
        self.night.channel(to).behaviour = behaviour

    @rule(to=st.sampled_from(ADDRESSES_OF_ALL), slow=st.booleans(), which=st.integers(0, 1000))
    def other_threads_work_while_a_channel_takes_its_time(self, to: str, slow: bool, which: int) -> None:
        def meanwhile() -> None:
            self.night.channel(to).during = lambda: None  # once, or channels that wait for each other never end
            if self.night.queue:
                self.night.queue.pop(which % len(self.night.queue))()
            with suppress(LedgerError):
                self.night.paging.tick()

        self.night.channel(to).during = meanwhile if slow else lambda: None

    @rule(busy=st.booleans())
    def senders_are_busy(self, busy: bool) -> None:
        self.night.busy = busy

    @rule(which=st.integers(0, 1000))
    def a_sender_takes_up_a_page(self, which: int) -> None:
        if self.night.queue:
            self.survive(self.night.queue.pop(which % len(self.night.queue)))

    @rule(on_duty=st.sampled_from([*DUTY, "no address", None]))
    def the_rota_changes(self, on_duty: str | None) -> None:
        self.night.on_duty = {"neurosurgery": on_duty} if on_duty else {}

    @rule(fault=st.sampled_from([None, None, Killed, LedgerError, KeyError]))
    def the_alarm_changes(self, fault: type[BaseException] | None) -> None:
        def fail() -> None:
            if fault is not None:
                raise fault("the alarm")

        self.night.while_told = fail

    @rule(there=st.booleans())
    def it_is_started_with_or_without_policies(self, there: bool) -> None:
        self.dies()
        self.night.start(policies=(NIGHTS, DAYS) if there else ())

    @rule(
        later=st.integers(0, 4),
        fault=st.sampled_from(["refuse", "refuse after", "die before", "die after"]),
        times=st.integers(1, 2),
    )
    def ledger_fails(self, later: int, fault: str, times: int) -> None:
        self.night.ledger.faults = ["ok"] * later + [fault] * times

    @rule()
    def dies(self) -> None:
        """What was accepted and could not be marked before this death may be sent once more, and nothing else."""
        accepted = self.accepted()
        for study in STUDIES:
            for page in self.night.pages(study):
                if page.sent_at is None and accepted[study, page.step]:
                    self.allowed[study, page.step] = accepted[study, page.step] + 1
        self.night.start()

    @invariant()
    def nobody_is_paged_twice_for_a_study_and_step_unless_the_process_died_in_between(self) -> None:
        assert all(count <= max(1, self.allowed[key]) for key, count in self.accepted().items())

    @invariant()
    def what_the_ledger_calls_sent_was_accepted(self) -> None:
        accepted = self.accepted()
        for study in STUDIES:
            for page in self.night.pages(study):
                assert page.sent_at is None or page.mode == "shadow" or accepted[study, page.step]

    @invariant()
    def nobody_is_told_of_a_study_who_is_in_no_policy_of_its_site(self) -> None:
        for channel in self.night.channels:
            for message in channel.attempts:
                assert channel.recipient in RECIPIENTS[STEP_OF[message.page_id][0]]

    @invariant()
    def the_operators_are_told_of_no_study_that_was_not_live(self) -> None:
        assert {study for study, _ in self.night.undelivered} <= {"1.2.3", "1.2.9"}

    @invariant()
    def nothing_is_sent_for_a_study_after_it_was_answered(self) -> None:
        for study, then in self.answered.items():
            now = self.accepted()
            assert {k: v for k, v in now.items() if k[0] == study} == {k: v for k, v in then.items() if k[0] == study}

    def teardown(self) -> None:
        try:
            self.night.ledger.faults.clear()
            self.night.busy, self.night.while_told = False, lambda: None
            for channel in self.night.channels:
                channel.behaviour, channel.during = "accept", lambda: None
            while self.night.queue:
                self.night.queue.pop()()
            for event in tuple(self.unacknowledged):
                self.deliver(event)
            for _ in range(100):
                soonest = self.night.after(seconds=30)
                if soonest is None:
                    break
                self.night.now = max(self.night.now, soonest)
            told = {study for study, _ in self.night.undelivered}
            for study in STUDIES:
                found = self.night.pages(study)
                assert not {page.state for page in found} & {"due", "sent"}
                exhausted = [page for page in found if page.state == "exhausted"]
                assert all(page.next_attempt_at is None for page in exhausted)
                assert not exhausted or study == "1.2.7" or study in told
            attempted = {STEP_OF[m.page_id][0] for channel in self.night.channels for m in channel.attempts}
            positive = {event.study_instance_uid for event in self.handled if event.disposition == "positive"}
            assert positive - self.excused - {"1.2.7"} <= attempted
            assert all(self.night.pages(study) for study in positive & {"1.2.7"})
        finally:
            self.night.ledger.close()
            shutil.rmtree(self.folder)


TestPagingUnderFire = PagingUnderFire.TestCase
TestPagingUnderFire.settings = settings(
    max_examples=20, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPagingUnderFire.pytestmark = [pytest.mark.timeout(600)]  # a busy machine takes its time over so many ledgers


def test_an_attempt_is_recorded_once_though_clock_and_handler_see_it_at_the_same_time(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock: list[threading.Thread] = []
    recorded = []
    note_delivery = record.note_delivery

    def while_the_clock_ticks(*arguments: Any, **facts: Any) -> None:
        if not clock:
            clock.append(threading.Thread(target=night.paging.tick))
            clock[0].start()
            clock[0].join(0.3)  # long enough to be caught between the two
        recorded.append(facts["outcome"])
        note_delivery(*arguments, **facts)

    monkeypatch.setattr(record, "note_delivery", while_the_clock_ticks)
    night.paging.on_triaged(triaged())
    clock[0].join()
    assert recorded == ["sent"]

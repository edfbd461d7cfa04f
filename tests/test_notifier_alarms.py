"""Alarms to the operators: one per outage, none lost in a crash, none in shadow mode, and a word when it is over."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from notifier_fakes import Mailbox, configured, free_port, smtp_server
from sqlalchemy import RowMapping, select, text

from herald.config import Config, LedgerConfig, PagingSite, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, LedgerError
from herald.ledger import Ledger, alarms, open_ledger
from notifier.alarms import REMINDER, SHORT_LENGTH, Alarms
from notifier.channels import Message, open_channel
from notifier.policy import attempts_allowed

START = datetime(2026, 3, 28, 22, 0, tzinfo=UTC)
OPERATORS = (PagingStep(to="it@hospital.example"), PagingStep(to="chief@hospital.example", after_minutes=30.0))


class Operators:
    """Channels by address that keep what they take; `faults` are raised instead, `during` happens while one sends."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Message]] = []
        self.faults: dict[str, Exception] = {}
        self.during: Callable[[], None] = lambda: None

    def __call__(self, step: PagingStep) -> Any:
        operators = self

        class Channel:
            recipient = step.to

            def send(self, message: Message) -> None:
                operators.during()
                if step.to in operators.faults:
                    raise operators.faults[step.to]
                operators.taken.append((step.to, message))

        return Channel()

    @property
    def subjects(self) -> list[tuple[str, str]]:
        return sorted((to.partition("@")[0], message.subject) for to, message in self.taken)


class Desk:
    """Alarms of one ledger with a clock that is set by hand."""

    def __init__(self, ledger: Ledger, config: Config) -> None:
        self.ledger, self.config, self.operators, self.time = ledger, config, Operators(), START
        self.alarms = self.restarted()

    def restarted(self) -> Alarms:
        """What a new process has; the old one is forgotten, as after a crash."""
        self.alarms = Alarms(self.ledger, self.config, self.operators, now=lambda: self.time, jitter=lambda *_: 1.0)
        return self.alarms

    def pass_time(self, **span: float) -> None:
        self.time += timedelta(**span)

    def run_for(self, **span: float) -> None:
        """Tick whenever something is due, until the span is over."""
        until = self.time + timedelta(**span)
        while (soonest := self.alarms.tick()) is not None and soonest <= until:
            self.time = max(soonest, self.time)
        self.time = until

    def rows(self) -> list[RowMapping]:
        with self.ledger.read() as connection:
            return list(connection.execute(select(alarms).order_by(alarms.c.raised_at)).mappings())

    @property
    def row(self) -> RowMapping:
        (row,) = self.rows()
        return row


def settings(ledger_url: str, **notifier: Any) -> Config:
    base = configured(**({"mode": "live", "operators": OPERATORS} | notifier))
    return replace(base, ledger=LedgerConfig(url=ledger_url))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    config = settings(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    ledger = open_ledger(config.ledger)
    yield Desk(ledger, config)
    ledger.close()


def desk_of(desk: Desk, **notifier: Any) -> Desk:
    """The same ledger with other settings, as after a restart."""
    other = Desk(desk.ledger, settings(desk.config.ledger.url, **notifier))
    other.time = desk.time
    return other


def test_every_operator_is_told_at_once_whatever_their_step_says_of_minutes(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router has been alive")
    desk.alarms.tick()
    assert desk.operators.subjects == [
        ("chief", "Herald ALARM: triage stands still"),
        ("it", "Herald ALARM: triage stands still"),
    ]
    (_, message), _ = desk.operators.taken
    assert "no router has been alive" in message.body
    assert "Since 2026-03-28 22:00 UTC." in message.body
    assert message.link == "https://herald.example/operations"
    assert message.link in message.body
    assert desk.row["sent_at"] == START


def test_an_alarm_that_holds_is_one_row_and_one_message_however_often_it_is_raised(desk: Desk) -> None:
    for _ in range(5):
        desk.alarms.raise_alarm("models", "", "no router has been alive")
        desk.run_for(minutes=5)
    assert len(desk.rows()) == 1
    assert len(desk.operators.taken) == len(OPERATORS)


def test_alarms_of_another_kind_or_about_another_study_are_their_own(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router")
    desk.alarms.raise_alarm("silence", "", "no series")
    desk.alarms.raise_alarm("undelivered", "1.2.3", "nobody answered")
    desk.alarms.raise_alarm("undelivered", "1.2.4", "nobody answered")
    desk.alarms.tick()
    assert len(desk.operators.taken) == 4 * len(OPERATORS)
    assert desk.alarms.holding() == {
        ("models", ""),
        ("silence", ""),
        ("undelivered", "1.2.3"),
        ("undelivered", "1.2.4"),
    }


def test_an_alarm_that_goes_on_is_repeated_once_an_hour_with_what_is_known_then(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "the model server is away")
    desk.run_for(minutes=30)
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.run_for(minutes=29)
    assert len(desk.operators.taken) == 2
    desk.run_for(hours=2)
    mine = [message for to, message in desk.operators.taken if to.startswith("it")]
    assert [message.subject for message in mine] == [
        "Herald ALARM: triage stands still",
        "Herald ALARM: triage stands still, since 1 h",
        "Herald ALARM: triage stands still, since 2 h",
    ]
    assert "no router is alive" in mine[1].body
    assert len({message.page_id for message in mine}) == 3


def test_whoever_was_told_is_told_when_it_is_over_and_hears_no_more(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive. Start it now.")
    desk.run_for(minutes=20)
    desk.operators.taken.clear()
    desk.alarms.clear("models")
    desk.run_for(hours=5)
    assert desk.operators.subjects == [
        ("chief", "Herald: over: triage stands still"),
        ("it", "Herald: over: triage stands still"),
    ]
    body = desk.operators.taken[0][1].body
    assert "From 2026-03-28 22:00 UTC to 2026-03-28 22:20 UTC." in body
    assert "It was: no router is alive.\n" in body
    assert "Start it now" not in body
    assert (desk.row["cleared_at"], desk.row["next_attempt_at"]) == (START + timedelta(minutes=20), None)


def test_the_next_outage_is_an_alarm_of_its_own(desk: Desk) -> None:
    for _ in range(2):
        desk.alarms.raise_alarm("models", "", "no router is alive")
        desk.run_for(minutes=1)
        desk.alarms.clear("models")
        desk.run_for(minutes=1)
    assert len(desk.rows()) == 2
    assert len({message.page_id for _, message in desk.operators.taken}) == 4


def test_what_is_over_before_anybody_was_told_is_not_told(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.alarms.clear("models")
    desk.run_for(hours=2)
    assert desk.operators.taken == []
    assert desk.row["cleared_at"] == START


def test_clearing_what_does_not_hold_does_nothing(desk: Desk) -> None:
    desk.alarms.clear("silence")
    assert desk.rows() == []


def test_an_operator_who_cannot_be_reached_is_tried_again_and_nobody_else_is_told_twice(desk: Desk) -> None:
    desk.operators.faults["it@hospital.example"] = ChannelUnavailable("the gateway is away")
    desk.alarms.raise_alarm("silence", "", "no series")
    desk.run_for(seconds=20)
    assert [to for to, _ in desk.operators.taken] == ["chief@hospital.example"]
    assert desk.row["error"] == "it@hospital.example: the gateway is away"
    assert desk.row["attempts"] > 1
    desk.operators.faults.clear()
    desk.run_for(minutes=5)
    assert [to for to, _ in desk.operators.taken] == ["chief@hospital.example", "it@hospital.example"]
    assert len({message.page_id for _, message in desk.operators.taken}) == 1
    assert desk.row["error"] is None


def test_pauses_between_attempts_grow_and_end_and_the_next_hour_tries_anew(desk: Desk) -> None:
    times: list[datetime] = []
    desk.operators.faults = {step.to: ChannelUnavailable("away") for step in OPERATORS}
    desk.operators.during = lambda: times.append(desk.time)
    desk.alarms.raise_alarm("silence", "", "no series")
    desk.run_for(minutes=59)
    moments = sorted(set(times))
    pauses = [(b - a).total_seconds() for a, b in pairwise(moments)]
    assert pauses[:4] == [2.0, 4.0, 8.0, 16.0]
    assert max(pauses) == 30.0
    assert len(moments) == attempts_allowed(desk.config.notifier.retry_for_s)
    assert desk.row["sent_at"] is None
    assert "away" in desk.row["error"]
    desk.operators.faults.clear()
    desk.run_for(minutes=2)
    assert len(desk.operators.taken) == 2
    assert desk.row["sent_at"] == START + REMINDER


def test_who_refuses_is_not_tried_again_before_the_next_hour(desk: Desk) -> None:
    desk.operators.faults["it@hospital.example"] = ChannelRefused("no such mailbox")
    desk.alarms.raise_alarm("silence", "", "no series")
    desk.run_for(minutes=59)
    assert desk.row["attempts"] == 0  # of the next hour's
    assert desk.row["error"] == "it@hospital.example: no such mailbox"
    desk.operators.faults.clear()
    desk.run_for(minutes=2)
    assert [to for to, _ in desk.operators.taken].count("it@hospital.example") == 1


def test_a_channel_that_breaks_does_not_keep_the_others_from_being_told(desk: Desk) -> None:
    desk.operators.faults["it@hospital.example"] = RuntimeError("a bug")
    desk.alarms.raise_alarm("silence", "", "no series")
    desk.alarms.tick()
    assert [to for to, _ in desk.operators.taken] == ["chief@hospital.example"]
    assert desk.row["error"] == "it@hospital.example: the channel broke: RuntimeError: a bug"


def test_a_crash_between_raising_and_sending_leads_to_a_message(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.restarted().tick()
    assert len(desk.operators.taken) == 2


def test_a_crash_while_sending_costs_a_second_message_of_the_same_id_and_no_alarm(desk: Desk) -> None:
    class Crash(BaseException):
        pass

    def crash() -> None:
        raise Crash

    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.operators.during = crash
    with pytest.raises(Crash):
        desk.alarms.tick()
    desk.operators.during = lambda: None
    desk.restarted()
    desk.run_for(minutes=1)
    assert len(desk.operators.taken) == 2
    first = desk.operators.taken[0][1].page_id
    desk.restarted()
    with desk.ledger.begin() as connection:  # the crash came after sending and before it was noted
        connection.execute(alarms.update().values(sent_at=None, next_attempt_at=desk.time))
    desk.alarms.tick()
    assert {message.page_id for _, message in desk.operators.taken} == {first}


def test_an_alarm_that_clears_while_it_is_being_sent_is_told_to_be_over(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.operators.during = lambda: desk.alarms.clear("models")
    desk.alarms.tick()
    desk.operators.during = lambda: None
    desk.run_for(hours=2)
    assert [subject for who, subject in desk.operators.subjects if who == "it"] == [
        "Herald ALARM: triage stands still",
        "Herald: over: triage stands still",
    ]
    assert desk.row["next_attempt_at"] is None


def test_a_ledger_that_fails_while_sending_tells_nobody_twice(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive")

    def refuse(*_: object) -> None:
        raise LedgerError("the ledger is away")

    with monkeypatch.context() as patch:
        patch.setattr(desk.alarms, "_note", refuse)
        with pytest.raises(LedgerError):
            desk.alarms.tick()
    desk.run_for(minutes=1)
    assert len(desk.operators.taken) == 2
    assert desk.row["sent_at"] is not None


def test_in_shadow_mode_everything_is_recorded_and_nobody_is_told(desk: Desk) -> None:
    shadow = desk_of(desk, mode="shadow")
    shadow.alarms.raise_alarm("models", "", "no router is alive")
    shadow.alarms.heartbeat("2026-03-28", lambda _: "well")
    shadow.run_for(hours=3)
    shadow.alarms.clear("models")
    shadow.alarms.tell("ledger", "the ledger is away")
    shadow.run_for(hours=3)
    assert shadow.operators.taken == []
    assert [row["mode"] for row in shadow.rows()] == ["shadow", "shadow"]
    assert [row["next_attempt_at"] for row in shadow.rows()] == [None, None]


def test_an_alarm_that_holds_since_shadow_mode_is_told_once_the_node_is_live(desk: Desk) -> None:
    desk_of(desk, mode="shadow").alarms.raise_alarm("models", "", "no router is alive")
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.alarms.tick()
    assert len(desk.operators.taken) == 2
    assert desk.row["mode"] == "live"


def test_an_alarm_from_live_mode_is_not_sent_when_the_node_has_gone_to_shadow(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "no router is alive")
    shadow = desk_of(desk, mode="shadow")
    shadow.run_for(hours=3)
    shadow.alarms.clear("models")
    shadow.run_for(hours=3)
    assert shadow.operators.taken == []


def test_one_live_site_is_reason_enough_to_tell_the_operators(desk: Desk) -> None:
    sites = (PagingSite("north", calling_ae_titles=("CT1",), mode="live"),)
    live = desk_of(desk, mode="shadow", sites=sites)
    live.alarms.raise_alarm("undelivered", "1.2.3", "nobody has answered")
    live.alarms.tick()
    assert len(live.operators.taken) == 2


def test_without_operators_an_alarm_is_recorded_with_what_to_do(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    alone = desk_of(desk, operators=())
    assert "[[notifier.operators]]" in caplog.text
    alone.alarms.raise_alarm("models", "", "no router is alive")
    alone.run_for(hours=2)
    assert "[[notifier.operators]]" in alone.row["error"]
    assert alone.row["next_attempt_at"] is None


def test_a_heartbeat_is_sent_once_a_day_and_never_holds(desk: Desk) -> None:
    for _ in range(3):
        desk.alarms.heartbeat("2026-03-28", lambda _: "41 series")
        desk.restarted()
        desk.run_for(minutes=90)
    assert desk.operators.subjects == [("chief", "Herald: paging works"), ("it", "Herald: paging works")]
    assert desk.alarms.holding() == set()
    assert desk.row["sent_at"] is not None
    desk.alarms.heartbeat("2026-03-29", lambda _: "12 series")
    desk.alarms.tick()
    assert len(desk.operators.taken) == 4


def test_a_role_is_looked_up_whenever_somebody_is_told(desk: Desk) -> None:
    asked: list[tuple[str, datetime]] = []

    def on_call(role: str, at: datetime) -> str:
        asked.append((role, at))
        return f"{role}-{len(asked)}@hospital.example"

    config = settings(desk.config.ledger.url, operators=(PagingStep(to="on-call:it"),))
    alarms_ = Alarms(desk.ledger, config, desk.operators, on_call=on_call, now=lambda: desk.time)
    alarms_.raise_alarm("models", "", "no router is alive")
    alarms_.tick()
    desk.pass_time(hours=1)
    alarms_.tick()
    assert asked == [("it", START), ("it", START + REMINDER)]
    assert [to for to, _ in desk.operators.taken] == ["it-1@hospital.example", "it-2@hospital.example"]


def test_a_role_that_nobody_holds_is_noted_with_the_role(desk: Desk) -> None:
    config = settings(desk.config.ledger.url, operators=(PagingStep(to="on-call:it"), OPERATORS[1]))
    Alarms(desk.ledger, config, desk.operators, now=lambda: desk.time).raise_alarm("models", "", "no router is alive")
    alarms_ = Alarms(desk.ledger, config, desk.operators, now=lambda: desk.time)
    alarms_.tick()
    assert [to for to, _ in desk.operators.taken] == ["chief@hospital.example"]
    assert desk.row["error"].startswith("on-call:it: nobody is on call for it")


def test_a_clock_set_back_delays_no_alarm(desk: Desk) -> None:
    desk.operators.faults = {step.to: ChannelUnavailable("away") for step in OPERATORS}
    desk.alarms.raise_alarm("models", "", "no router is alive")
    desk.alarms.tick()
    desk.operators.faults.clear()
    desk.pass_time(days=-1)
    desk.alarms.tick()
    assert len(desk.operators.taken) == 2


def test_a_short_text_has_at_most_160_characters_and_begins_with_what_is_wrong(desk: Desk) -> None:
    desk.alarms.raise_alarm("models", "", "the model server has not answered " * 20)
    desk.alarms.tick()
    short = desk.operators.taken[0][1].short
    assert len(short) == SHORT_LENGTH
    assert short.startswith("Herald ALARM: triage stands still. the model server")
    assert short.endswith("…")


def test_what_cannot_be_recorded_is_told_all_the_same(desk: Desk) -> None:
    with desk.ledger.begin() as connection:
        connection.execute(text("drop table alarms"))
    desk.alarms.tell("ledger", "the database does not answer")
    assert desk.operators.subjects == [
        ("chief", "Herald ALARM: the ledger is away, nothing is paged"),
        ("it", "Herald ALARM: the ledger is away, nothing is paged"),
    ]


def test_the_thread_sends_when_an_alarm_is_raised_and_ends_when_it_is_to_stop(tmp_path: Path) -> None:
    mailbox, port = Mailbox(), free_port()
    config = settings(
        f"sqlite:///{tmp_path / 'ledger.sqlite'}",
        operators=OPERATORS[:1],
        smtp_port=port,
        sender="herald@hospital.example",
    )
    ledger = open_ledger(config.ledger)
    raised = Alarms(ledger, config, lambda step: open_channel(step, config.notifier))
    stop = threading.Event()
    thread = threading.Thread(target=raised.run, args=(stop,))
    with smtp_server(mailbox, port):
        thread.start()
        raised.raise_alarm("models", "", "no router is alive")
        assert mailbox.arrived.wait(20)
        stop.set()
        thread.join(20)
    assert not thread.is_alive()
    (email,) = mailbox.emails
    assert email["Subject"] == "Herald ALARM: triage stands still"
    assert email["To"] == "it@hospital.example"
    ledger.close()


KILLED = """
import os, signal, sys
from herald.config import Config, LedgerConfig, NotifierConfig, PagingStep
from herald.ledger import open_ledger
from notifier.alarms import Alarms
from notifier.channels import open_channel

config = Config(
    ledger=LedgerConfig(url=sys.argv[1]),
    notifier=NotifierConfig(mode="live", operators=(PagingStep(to="it@hospital.example"),)),
)
Alarms(open_ledger(config.ledger), config, lambda step: open_channel(step, config.notifier)).raise_alarm(
    "models", "", "no router is alive"
)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_after_raising_leaves_an_alarm_that_the_next_one_sends(desk: Desk) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, desk.config.ledger.url], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    desk.time = datetime.now(UTC)
    desk.alarms.tick()
    assert len(desk.operators.taken) == 2


@pytest.mark.parametrize("kind", ["silence", "models", "undelivered"])
def test_alarms_work_on_every_database(ledger_url: str, kind: Any) -> None:
    config = settings(ledger_url)
    ledger = open_ledger(config.ledger)
    try:
        desk = Desk(ledger, config)
        desk.alarms.raise_alarm(kind, "1.2.3", "something is wrong")
        desk.run_for(hours=1, minutes=1)
        desk.alarms.clear(kind, "1.2.3")
        desk.run_for(hours=2)
        assert len(desk.operators.taken) == 6
    finally:
        ledger.close()

"""The dead-man's watch: silence, dead routers and model servers, pages that came to nothing, the heartbeat."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from notifier_fakes import configured, triaged
from sqlalchemy import RowMapping, delete, insert, select, text, update

from herald.config import Config, LedgerConfig, PagingStep
from herald.errors import ConfigError
from herald.ledger import Ledger, alarms, open_ledger, pages, results, reviews, vitals, watches
from notifier.alarms import Alarms
from notifier.channels import Message
from notifier.watch import Watch

START = datetime(2026, 3, 27, 20, 0, tzinfo=UTC)
BEAT_S = 30.0
OPERATOR = PagingStep(to="it@hospital.example")


class Inbox:
    """The one operator's channel."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def __call__(self, step: PagingStep) -> Any:
        inbox = self

        class Channel:
            recipient = step.to

            def send(self, message: Message) -> None:
                inbox.messages.append(message)

        return Channel()

    @property
    def subjects(self) -> list[str]:
        return [message.subject for message in self.messages]


class Node:
    """A notifier's watch over a ledger, with routers that beat and clocks that are set by hand."""

    def __init__(self, ledger: Ledger, config: Config) -> None:
        self.ledger, self.config, self.inbox = ledger, config, Inbox()
        self.time, self.seconds = START, 1000.0
        self.routers: dict[str, str | None] = {"ct1:7": None}
        """Router -> why its model server does not answer."""
        self.restart()

    def restart(self, **notifier: Any) -> None:
        """A new process, perhaps with other settings."""
        self.config = replace(self.config, notifier=replace(self.config.notifier, **notifier))
        self.seconds = 5.0  # a monotonic clock means nothing across processes
        self.alarms = Alarms(self.ledger, self.config, self.inbox, now=lambda: self.time, jitter=lambda *_: 1.0)
        self.watch = Watch(self.ledger, self.config, self.alarms, now=lambda: self.time, monotonic=lambda: self.seconds)

    def run_for(self, *, look: bool = True, beat: bool = True, step_s: float = 0.0, **span: float) -> None:
        """Let time pass in steps, of a router's beat where routers are watched, with a look after each."""
        beats = beat and self.config.notifier.models_silent_minutes > 0
        step_s = step_s or (BEAT_S if beats else 60.0)
        until = self.time + timedelta(**span)
        while self.time < until:
            self.time += timedelta(seconds=step_s)
            self.seconds += step_s
            if beats:
                self.beat()
            if look:
                self.look()

    def look(self) -> None:
        self.watch.look()
        self.alarms.tick()

    def beat(self) -> None:
        with self.ledger.begin() as connection:
            for name, error in self.routers.items():
                row: dict[str, Any] = {"seen_at": self.time, "error": error}
                if error is None:
                    row["models_answered_at"] = self.time
                if not connection.execute(update(vitals).where(vitals.c.router == name).values(row)).rowcount:
                    connection.execute(insert(vitals).values(router=name, started_at=self.time, **row))

    def rows(self, kind: str) -> list[RowMapping]:
        with self.ledger.read() as connection:
            statement = select(alarms).where(alarms.c.kind == kind).order_by(alarms.c.raised_at)
            return list(connection.execute(statement).mappings())

    def holding(self) -> set[str]:
        with self.ledger.read() as connection:
            return set(connection.scalars(select(alarms.c.kind).where(alarms.c.cleared_at.is_(None))))

    def add_result(self, disposition: str = "negative", at: datetime | None = None) -> None:
        with self.ledger.begin() as connection:
            connection.execute(
                insert(results).values(
                    series_instance_uid=str(uuid4()),
                    revision=1,
                    study_instance_uid="1.2.3",
                    disposition=disposition,
                    event={},
                    triaged_at=at or self.time,
                    posted_at=self.time,
                )
            )

    def add_page(self, study: str = "1.2.3", step: int = 0, state: str = "exhausted", **changes: Any) -> None:
        row = {
            "page_id": str(uuid4()),
            "study_instance_uid": study,
            "series_instance_uid": f"{study}.4",
            "revision": 1,
            "step": step,
            "state": state,
            "mode": "live",
            "channel": "smtp",
            "recipient": "oncall@hospital.example",
            "subject": "",
            "body": "",
            "finding_at": self.time,
            "due_at": self.time,
            "sent_at": self.time,
            "event": {"scanner": "CT-EAST", "accession_number": "ACC20260329"},
        }
        with self.ledger.begin() as connection:
            connection.execute(insert(pages).values(**{**row, **changes}))

    def review(self, study: str = "1.2.3") -> None:
        with self.ledger.begin() as connection:
            connection.execute(
                insert(reviews).values(
                    review_id=str(uuid4()),
                    study_instance_uid=study,
                    series_instance_uid=f"{study}.4",
                    revision=1,
                    action="acknowledge",
                    reader="rita",
                    prediction_shown=True,
                    occurred_at=self.time,
                )
            )


def node_of(folder: Path, **notifier: Any) -> Node:
    base = configured(**({"mode": "live", "operators": (OPERATOR,), "models_silent_minutes": 0.0} | notifier))
    config = replace(base, ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"))
    return Node(open_ledger(config.ledger), config)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Node]:
    """A node whose operators are told after ten minutes without a series."""
    node = node_of(tmp_path, silence_minutes=10.0)
    yield node
    node.ledger.close()


@pytest.fixture
def modelled(tmp_path: Path) -> Iterator[Node]:
    """A node whose operators are told after five minutes without router or model server."""
    node = node_of(tmp_path, models_silent_minutes=5.0)
    yield node
    node.ledger.close()


@pytest.fixture
def beating(tmp_path: Path) -> Iterator[Node]:
    """A node in Berlin with a heartbeat at half past two, which daylight saving skips once a year and repeats once."""
    node = node_of(tmp_path, heartbeat_at="02:30", time_zone="Europe/Berlin")
    yield node
    node.ledger.close()


# --- silence ---------------------------------------------------------------------------------------------------------


def test_no_series_for_the_allowed_time_raises_one_alarm_that_says_since_when(silent: Node) -> None:
    silent.run_for(minutes=10)
    assert silent.holding() == set()
    silent.run_for(minutes=4)
    assert silent.holding() == {"silence"}
    assert silent.inbox.subjects == ["Herald ALARM: no series is triaged"]
    assert "no series has been triaged since 2026-03-27 20:00 UTC; 10 min are allowed" in silent.inbox.messages[0].body


def test_a_result_that_the_notifier_sees_counts_when_the_web_ui_is_down(silent: Node) -> None:
    silent.run_for(minutes=8)
    silent.watch.seen(triaged("negative"))
    silent.run_for(minutes=9)
    assert silent.holding() == set()
    silent.run_for(minutes=2)
    assert silent.holding() == {"silence"}
    assert "since 2026-03-27 20:08 UTC" in silent.inbox.messages[0].body


def test_a_result_in_the_ledger_counts_when_the_notifier_is_not_told(silent: Node) -> None:
    silent.run_for(minutes=8)
    silent.add_result()
    silent.run_for(minutes=9)
    assert silent.holding() == set()


def test_results_that_failed_are_no_sign_of_triage(silent: Node) -> None:
    for _ in range(6):
        silent.run_for(minutes=2)
        silent.watch.seen(triaged("failed"))
        silent.add_result("failed")
    assert silent.holding() == {"silence"}


@pytest.mark.parametrize("sign", ["seen", "ledger"])
def test_the_next_series_ends_the_alarm(silent: Node, sign: str) -> None:
    silent.run_for(minutes=11)
    if sign == "seen":
        silent.watch.seen(triaged("not_eligible"))
    else:
        silent.add_result()
    silent.look()
    assert silent.holding() == set()
    assert silent.inbox.subjects[-1] == "Herald: over: no series is triaged"


def test_a_restart_neither_ends_an_alarm_without_evidence_nor_repeats_it(silent: Node) -> None:
    silent.run_for(minutes=11)
    silent.restart()
    silent.run_for(minutes=5)
    assert silent.holding() == {"silence"}
    assert len(silent.inbox.messages) == 1


def test_silence_is_measured_from_the_notifier_s_start_when_the_last_result_is_older(silent: Node) -> None:
    silent.add_result(at=START - timedelta(days=3))
    silent.restart()
    silent.run_for(minutes=9)
    assert silent.holding() == set()
    silent.run_for(minutes=2)
    assert silent.holding() == {"silence"}


def test_a_clock_that_is_set_makes_no_silence_and_hides_none(silent: Node) -> None:
    silent.run_for(minutes=5)
    silent.time += timedelta(hours=5)
    silent.look()
    assert silent.holding() == set()
    silent.time -= timedelta(hours=9)
    silent.run_for(minutes=6)
    assert silent.holding() == {"silence"}


def test_an_alarm_that_is_switched_off_does_not_hold_for_ever(silent: Node) -> None:
    silent.run_for(minutes=11)
    silent.restart(silence_minutes=0.0)
    silent.look()
    assert silent.holding() == set()


def test_silence_off_never_alarms(tmp_path: Path) -> None:
    node = node_of(tmp_path)
    node.run_for(minutes=5)
    node.watch._blind_until = replace(node.watch._blind_until, at_s=-1e9)  # as if a month had passed
    node.look()
    assert node.holding() == set()
    node.ledger.close()


# --- routers and the model server ------------------------------------------------------------------------------------


def test_a_node_that_works_raises_nothing(modelled: Node) -> None:
    modelled.run_for(minutes=20)
    assert modelled.holding() == set()
    assert modelled.inbox.messages == []


def test_no_router_for_the_allowed_time_raises_an_alarm_and_the_next_sign_of_life_ends_it(modelled: Node) -> None:
    modelled.run_for(minutes=10)
    modelled.routers.clear()
    modelled.run_for(minutes=5)
    assert modelled.holding() == set()
    modelled.run_for(minutes=1)
    assert modelled.inbox.subjects == ["Herald ALARM: triage stands still"]
    assert "no router has been alive since 2026-03-27 20:10 UTC" in modelled.inbox.messages[0].body
    assert "herald run router" in modelled.inbox.messages[0].body
    modelled.routers["ct1:8"] = None
    modelled.run_for(seconds=30)
    assert modelled.holding() == set()
    assert modelled.inbox.subjects[-1] == "Herald: over: triage stands still"


def test_a_router_that_never_came_is_an_alarm_too(modelled: Node) -> None:
    modelled.routers.clear()
    modelled.run_for(minutes=6)
    assert modelled.holding() == {"models"}


def test_a_model_server_that_does_not_answer_raises_an_alarm_with_its_reason(modelled: Node) -> None:
    modelled.run_for(minutes=10)
    modelled.routers["ct1:7"] = "model server 127.0.0.1:8500 did not answer"
    modelled.run_for(minutes=5)
    assert modelled.holding() == set()
    modelled.run_for(minutes=1)
    body = modelled.inbox.messages[0].body
    assert "the model server has not answered router ct1:7 since 2026-03-27 20:10 UTC" in body
    assert "model server 127.0.0.1:8500 did not answer" in body
    modelled.routers["ct1:7"] = None
    modelled.run_for(seconds=30)
    assert modelled.holding() == set()


def test_one_router_that_is_answered_does_not_hide_another_that_is_not(modelled: Node) -> None:
    modelled.routers["ct2:9"] = None
    modelled.run_for(minutes=2)
    modelled.routers["ct2:9"] = "connection refused"
    modelled.run_for(minutes=6)
    assert modelled.holding() == {"models"}
    assert "ct2:9" in modelled.inbox.messages[0].body


def test_a_router_that_went_while_another_lives_is_no_alarm(modelled: Node) -> None:
    modelled.routers["ct2:9"] = None
    modelled.run_for(minutes=2)
    del modelled.routers["ct2:9"]
    modelled.run_for(minutes=30)
    assert modelled.holding() == set()


def test_a_router_that_starts_again_and_again_does_not_hide_a_dead_model_server(modelled: Node) -> None:
    modelled.run_for(minutes=2)
    for life in range(8):
        modelled.routers = {f"ct1:{100 + life}": "connection refused"}
        modelled.run_for(minutes=1)
    assert modelled.holding() == {"models"}


def test_rows_of_routers_long_gone_say_nothing(modelled: Node) -> None:
    with modelled.ledger.begin() as connection:
        old = START - timedelta(hours=20)
        connection.execute(insert(vitals).values(router="old:1", started_at=old, seen_at=old, error="refused"))
    modelled.restart()
    modelled.run_for(minutes=20)
    assert modelled.holding() == set()


def test_a_router_whose_clock_is_wrong_is_alive_all_the_same(modelled: Node) -> None:
    wrong = timedelta(hours=-7)
    modelled.routers.clear()
    for _ in range(15):
        modelled.run_for(seconds=BEAT_S, look=False)
        with modelled.ledger.begin() as connection:
            connection.execute(delete(vitals).where(vitals.c.router == "ct3:1"))
            row = {"seen_at": modelled.time + wrong, "models_answered_at": modelled.time + wrong}
            connection.execute(insert(vitals).values(router="ct3:1", started_at=START + wrong, **row))
        modelled.look()
    assert modelled.holding() == set()


def test_a_ledger_that_is_back_after_an_outage_is_no_dead_router(modelled: Node) -> None:
    modelled.run_for(minutes=2)
    broken(modelled)
    modelled.run_for(beat=False, minutes=4)
    mended(modelled)
    modelled.look()
    modelled.run_for(minutes=10)
    assert modelled.holding() == set()


def test_a_ledger_that_stays_away_is_told_without_it_and_hourly(
    modelled: Node, caplog: pytest.LogCaptureFixture
) -> None:
    modelled.run_for(minutes=2)
    broken(modelled)
    modelled.run_for(beat=False, minutes=6)
    assert modelled.inbox.subjects == ["Herald ALARM: the ledger is away, nothing is paged"]
    assert "since 2026-03-27 20:02 UTC" in modelled.inbox.messages[0].body
    modelled.run_for(beat=False, step_s=600.0, minutes=70)
    assert len(modelled.inbox.messages) == 2
    assert len([r for r in caplog.records if "waits for the ledger" in r.message]) == 1
    mended(modelled)
    modelled.run_for(minutes=1)
    assert modelled.holding() == set()


def broken(node: Node) -> None:
    """The ledger refuses every look."""
    with node.ledger.begin() as connection:
        connection.execute(text("alter table vitals rename to elsewhere"))


def mended(node: Node) -> None:
    with node.ledger.begin() as connection:
        connection.execute(text("alter table elsewhere rename to vitals"))


# --- its own sign of life --------------------------------------------------------------------------------------------


def signs(node: Node) -> list[datetime]:
    with node.ledger.read() as connection:
        return list(connection.scalars(select(watches.c.seen_at).order_by(watches.c.seen_at)))


def test_a_notifier_gives_a_sign_of_life_every_quarter_of_a_minute(modelled: Node) -> None:
    seen = set()
    for _ in range(12):
        modelled.run_for(step_s=5.0, seconds=5)
        seen.update(signs(modelled))
    assert sorted(seen) == [START + timedelta(seconds=s) for s in (5, 20, 35, 50)]
    assert len(signs(modelled)) == 1


def test_a_notifier_that_cannot_read_the_ledger_gives_no_sign_of_life(modelled: Node) -> None:
    modelled.run_for(minutes=1)
    before = signs(modelled)
    broken(modelled)
    modelled.run_for(beat=False, minutes=3)
    assert signs(modelled) == before
    mended(modelled)
    modelled.run_for(minutes=1)
    assert signs(modelled) > before


def test_notifiers_of_the_day_before_yesterday_are_forgotten_and_one_that_has_just_died_is_not(modelled: Node) -> None:
    dead = START - timedelta(minutes=1)
    with modelled.ledger.begin() as connection:
        for name, seen_at in (("ct1:3", START - timedelta(days=2)), ("ct1:5", dead)):
            connection.execute(insert(watches).values(notifier=name, seen_at=seen_at))
    modelled.look()
    assert signs(modelled) == [dead, START]


# --- pages that came to nothing --------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = node_of(tmp_path, steps=(PagingStep(to="a@b.example"), PagingStep(to="c@d.example", after_minutes=5.0)))
    yield node
    node.ledger.close()


def test_a_page_that_nobody_answered_is_an_alarm_of_its_study_until_somebody_does(node: Node) -> None:
    node.add_page(state="escalated")
    node.add_page(step=1)
    node.add_page("1.2.5", state="acknowledged")
    node.look()
    assert [(row["about"], row["mode"]) for row in node.rows("undelivered")] == [("1.2.3", "live")]
    (message,) = node.inbox.messages
    assert message.subject == "Herald ALARM: a page reached nobody"
    assert "nobody has answered the page of a suspected haemorrhage found at 2026-03-27 20:00 UTC" in message.body
    assert "scanner CT-EAST, accession ...0329" in message.body
    assert "1.2.3" not in message.body
    assert "ACC20260329" not in message.body
    node.review()
    node.look()
    assert node.holding() == set()
    assert node.inbox.subjects[-1] == "Herald: over: a page reached nobody"


def test_a_page_that_could_not_be_sent_is_told_with_its_reason(node: Node) -> None:
    node.add_page(state="failed", sent_at=None, error="SMTP server answered 550")
    node.add_page(step=1, sent_at=None, error="the gateway cannot be reached")
    node.look()
    assert "no page could be sent of" in node.inbox.messages[0].body
    assert "Last error: the gateway cannot be reached" in node.inbox.messages[0].body


@pytest.mark.parametrize("state", ["due", "sent", "acknowledged", "withdrawn"])
def test_a_page_that_is_under_way_or_settled_is_no_alarm(node: Node, state: str) -> None:
    node.add_page(state="failed", sent_at=None)
    node.add_page(step=1, state=state)
    node.look()
    assert node.rows("undelivered") == []


def test_pages_of_shadow_mode_were_to_reach_nobody(node: Node) -> None:
    node.add_page(mode="shadow")
    node.look()
    assert node.holding() == set()


def test_a_page_that_waits_too_long_is_an_alarm_once_the_notifier_had_time_to_send_it(node: Node) -> None:
    node.add_page(state="due", sent_at=None, due_at=START - timedelta(hours=1))
    node.run_for(minutes=2)
    assert node.holding() == set()
    node.run_for(minutes=1)
    assert node.holding() == {"undelivered"}
    assert "the notifier is late with the page" in node.inbox.messages[0].body


def test_an_escalation_that_does_not_come_is_an_alarm(node: Node) -> None:
    node.add_page(state="sent")
    node.run_for(minutes=6)
    assert node.holding() == set()
    node.run_for(minutes=2)
    assert node.holding() == {"undelivered"}


def test_an_alarm_about_a_study_without_pages_waits_for_whoever_raised_it(node: Node) -> None:
    node.alarms.raise_alarm("undelivered", "1.2.99", "a dead letter")
    node.look()
    assert node.holding() == {"undelivered"}


# --- heartbeat -------------------------------------------------------------------------------------------------------


def local(node: Node) -> list[str]:
    zone = ZoneInfo("Europe/Berlin")
    return [f"{row['raised_at'].astimezone(zone):%Y-%m-%d %H:%M %Z}" for row in node.rows("heartbeat")]


def test_a_heartbeat_comes_once_a_day_though_daylight_saving_skips_its_hour(beating: Node) -> None:
    beating.run_for(step_s=1800.0, hours=60)
    # the first is late, because the notifier came late that day
    assert local(beating) == [
        "2026-03-27 21:30 CET",
        "2026-03-28 02:30 CET",
        "2026-03-29 03:30 CEST",
        "2026-03-30 02:30 CEST",
    ]
    assert beating.inbox.subjects == ["Herald: paging works"] * 4
    assert beating.holding() == set()


def test_a_heartbeat_comes_once_a_day_though_daylight_saving_repeats_its_hour(beating: Node) -> None:
    beating.time = datetime(2026, 10, 23, 23, 30, tzinfo=UTC)
    beating.restart()
    beating.run_for(step_s=1800.0, hours=52)
    assert local(beating) == ["2026-10-24 02:30 CEST", "2026-10-25 02:30 CEST", "2026-10-26 02:30 CET"]


def test_restarts_at_any_hour_make_no_second_heartbeat(beating: Node) -> None:
    for _ in range(12):
        beating.run_for(step_s=1800.0, hours=4)
        beating.restart()
        beating.look()
    assert [row["about"] for row in beating.rows("heartbeat")] == ["2026-03-27", "2026-03-28", "2026-03-29"]
    assert len(beating.inbox.messages) == 3


def test_a_heartbeat_tells_how_many_series_were_triaged_in_a_day(beating: Node) -> None:
    for disposition in ("negative", "negative", "positive", "not_eligible"):
        beating.add_result(disposition)
    beating.add_result("negative", at=START - timedelta(hours=25))
    beating.run_for(seconds=BEAT_S)
    assert (
        "Series triaged in the last 24 h: 4 (2 negative, 1 not eligible, 1 positive)." in beating.inbox.messages[0].body
    )


def test_a_heartbeat_of_this_host_s_zone_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        node = node_of(tmp_path, heartbeat_at="08:00")
        node.run_for(step_s=1800.0, hours=4)
        moments = [row["raised_at"] for row in node.rows("heartbeat")]
        assert moments == [datetime(2026, 3, 27, 23, 0, tzinfo=UTC)]
        node.ledger.close()
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text_of", ["8", "25:00", "08:00:00", "noon", "08:00+02:00"])
def test_a_heartbeat_at_no_time_of_day_is_a_configuration_error_that_names_it(tmp_path: Path, text_of: str) -> None:
    with pytest.raises(ConfigError, match=r"notifier\.heartbeat_at .* write it as 08:00"):
        node_of(tmp_path, heartbeat_at=text_of)


# --- every database --------------------------------------------------------------------------------------------------


def test_the_watch_works_on_every_database(ledger_url: str) -> None:
    settings = configured(
        mode="live",
        operators=(OPERATOR,),
        silence_minutes=4.0,
        models_silent_minutes=2.0,
        heartbeat_at="00:00",
        time_zone="UTC",
    )
    config = replace(settings, ledger=LedgerConfig(url=ledger_url))
    node = Node(open_ledger(config.ledger), config)
    try:
        node.add_page()
        node.add_page("1.2.5")
        node.review("1.2.5")
        node.run_for(minutes=1)
        assert node.holding() == {"undelivered"}
        node.routers["ct1:7"] = "connection refused"
        node.run_for(minutes=4)
        assert node.holding() == {"undelivered", "models", "silence"}
        node.routers["ct1:7"] = None
        node.add_result()
        node.review()
        node.run_for(minutes=1)
        assert node.holding() == set()
        assert len(node.inbox.messages) == 7
    finally:
        node.ledger.close()


# --- the thread ------------------------------------------------------------------------------------------------------


def test_the_thread_looks_when_it_is_woken_and_ends_when_it_is_to_stop(node: Node) -> None:
    looked, stop = threading.Event(), threading.Event()
    watch = Watch(node.ledger, node.config, node.alarms)
    watch.look = looked.set  # type: ignore[method-assign]
    thread = threading.Thread(target=watch.run, args=(stop,))
    thread.start()
    assert looked.wait(20)
    looked.clear()
    watch.wake()
    assert looked.wait(4)  # and not after the usual five seconds
    stop.set()
    thread.join(20)
    assert not thread.is_alive()

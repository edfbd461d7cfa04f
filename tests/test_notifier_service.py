import asyncio
import smtplib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from notifier_fakes import HttpServer, Mailbox, configured, free_port, smtp_server, triaged
from sqlalchemy import select

from herald.bus import open_bus
from herald.config import BusConfig, Config, LedgerConfig, PagingPolicy, PagingSite, PagingStep, StoreConfig
from herald.errors import ConfigError
from herald.events import Event, SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import alarms, deliveries, open_ledger, pages, watches
from notifier.paging import Paging
from notifier.service import PAGING_GROUP, POSTING_GROUP, serve

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    base = configured(
        mode="live",
        steps=(PagingStep(to="first@hospital.example"),),
        smtp_port=free_port(),
        webui_url=f"http://127.0.0.1:{free_port()}",
    )
    return replace(
        base,
        bus=BusConfig(url=f"sqlite:///{tmp_path / 'bus.sqlite'}", retry_first_s=0.05),
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'ledger.sqlite'}"),
        store=StoreConfig(root=tmp_path / "store"),
    )


@contextmanager
def serving(config: Config) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not thread.is_alive()


def publish(config: Config, event: Event) -> None:
    bus = open_bus(config.bus)
    bus.publish(event)
    bus.close()


def rows(config: Config, statement: Any) -> list[Any]:
    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            return list(connection.execute(statement))
    finally:
        ledger.close()


def eventually(holds: Callable[[], bool], within_s: float = 60.0) -> None:
    """Another process writes the ledger, and nothing tells this one: look until it holds."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.02)


def state(config: Config) -> str | None:
    found = rows(config, select(pages.c.state))
    return found[0].state if found else None


def test_a_page_goes_out_while_the_web_ui_is_down_and_the_result_is_posted_when_it_is_back(config: Config) -> None:
    mailbox = Mailbox()
    event = triaged(occurred_at=utc_now())
    with smtp_server(mailbox, config.notifier.smtp_port), serving(config):
        publish(config, event)
        assert mailbox.arrived.wait(60)
        webui_outcomes = select(deliveries.c.outcome).where(deliveries.c.channel == "webui")
        eventually(lambda: [row.outcome for row in rows(config, webui_outcomes)] == ["unavailable"])
        webui = HttpServer(int(config.notifier.webui_url.rpartition(":")[2]))
        try:
            assert webui.arrived.wait(60)
        finally:
            webui.close()
        eventually(lambda: [row.outcome for row in rows(config, webui_outcomes)] == ["unavailable", "sent"])
        eventually(lambda: state(config) == "sent")
        review = SeriesReviewed(
            study_instance_uid=event.study_instance_uid,
            series_instance_uid=event.series_instance_uid,
            revision=1,
            review_id="r1",
            action="agree",
            reader="dr-night",
        )
        publish(config, review)
        eventually(lambda: state(config) == "acknowledged")
    assert len(mailbox.emails) == 1
    bus = open_bus(config.bus)
    assert bus.backlog(PAGING_GROUP, "results") == bus.backlog(POSTING_GROUP, "results") == 0
    bus.close()


class StuckMailbox(Mailbox):
    """Takes the message and never says whether it was accepted, the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        if not self.reached.is_set():
            self.reached.set()
            await asyncio.sleep(60)
        return await super().handle_DATA(server, session, envelope)


PROCESS = """
import sys, threading
from pathlib import Path
from herald.config import load_config
from notifier.service import serve
serve(load_config(Path(sys.argv[1]), {}), threading.Event())
"""


@contextmanager
def process(toml: Path) -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", PROCESS, str(toml)], cwd=ROOT)
    try:
        yield started
    finally:
        started.kill()
        started.wait(10)


def test_a_notifier_killed_while_it_sends_sends_the_page_when_it_is_started_again(
    config: Config, tmp_path: Path
) -> None:
    toml = tmp_path / "herald.toml"
    toml.write_text(
        f"""
[node]
data_dir = "{tmp_path}"
[notifier]
mode = "live"
smtp_port = {config.notifier.smtp_port}
webui_url = "{config.notifier.webui_url}"
[[notifier.steps]]
to = "first@hospital.example"
[webui]
token = "token-for-tests"
secret_key = "key-for-tests"
"""
    )
    publish(config, triaged(occurred_at=utc_now()))
    mailbox = StuckMailbox()
    with smtp_server(mailbox, config.notifier.smtp_port):
        with process(toml) as first:
            assert mailbox.reached.wait(60)
            first.kill()
            assert first.wait(10) == -9
        assert (state(config), mailbox.emails) == ("due", [])
        with process(toml):
            assert mailbox.arrived.wait(60)
            eventually(lambda: state(config) == "sent")
    assert len(mailbox.emails) == 1
    (page,) = rows(config, select(pages))
    assert page.attempts == 2
    assert mailbox.emails[0]["Message-ID"] == f"<{page.page_id}@localhost>"


def test_a_running_notifier_gives_a_sign_of_life(config: Config) -> None:
    begun = utc_now()
    with serving(config):
        eventually(lambda: any(row.seen_at >= begun for row in rows(config, select(watches))))


def test_a_page_goes_to_who_is_on_call_and_an_answer_by_e_mail_comes_in_beside_it(
    config: Config, tmp_path: Path
) -> None:
    roster = tmp_path / "rota.csv"
    roster.write_text("role,from,until,to\nct,2000-01-01T00:00,2100-01-01T00:00,night@hospital.example\n")
    nights = PagingPolicy(name="all", sites=("east",), steps=(PagingStep(to="on-call:ct"),))
    config = replace(
        config,
        notifier=replace(
            config.notifier,
            mode="shadow",
            steps=(),
            policies=(nights,),
            sites=(PagingSite(name="east", scanners=("CT-EAST",), mode="live"),),
            roster=str(roster),
            reply_address="herald@hospital.example",
            reply_port=free_port(),
        ),
    )
    mailbox = Mailbox()
    with smtp_server(mailbox, config.notifier.smtp_port), serving(config):
        publish(config, triaged(occurred_at=utc_now()))
        assert mailbox.arrived.wait(60)
        eventually(lambda: _greets(config.notifier.reply_port))
        eventually(lambda: state(config) == "sent")
    (page,) = rows(config, select(pages))
    assert (page.policy, page.site, page.mode, page.recipient) == ("all", "east", "live", "night@hospital.example")
    assert mailbox.emails[0]["To"] == "night@hospital.example"
    assert str(mailbox.emails[0]["Reply-To"]).startswith("herald+")


def _greets(port: int) -> bool:
    try:
        with smtplib.SMTP("127.0.0.1", port, timeout=5):
            return True
    except OSError:
        return False


def test_a_page_that_reaches_nobody_has_the_operators_told(config: Config) -> None:
    mailbox = Mailbox()
    operator = PagingStep(to="it@hospital.example", channel="smtp")
    unreachable = PagingStep(to=f"127.0.0.1:{free_port()}", channel="hl7")
    config = replace(
        config, notifier=replace(config.notifier, steps=(unreachable,), operators=(operator,), retry_for_s=0.0)
    )
    with smtp_server(mailbox, config.notifier.smtp_port), serving(config):
        publish(config, triaged(occurred_at=utc_now()))
        assert mailbox.arrived.wait(60)
    assert mailbox.emails[0]["To"] == "it@hospital.example"
    assert state(config) == "exhausted"


def test_a_roster_or_policy_that_is_wrong_keeps_the_notifier_from_starting(config: Config, tmp_path: Path) -> None:
    for wrong, says in (
        ({"roster": str(tmp_path / "none.ics")}, "none.ics"),
        ({"policies": (PagingPolicy(name="p", steps=(), days=("someday",)),)}, "someday"),
        ({"operators": (PagingStep(to="a@b.example, c@d.example"),)}, "a@b.example, c@d.example"),
    ):
        with pytest.raises(ConfigError, match=says):
            serve(replace(config, notifier=replace(config.notifier, **wrong)), threading.Event())


def test_without_secrets_the_notifier_does_not_start(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"webui\.secret_key"):
        serve(replace(config, webui=replace(config.webui, secret_key="")), threading.Event())
    with pytest.raises(ConfigError, match=r"webui\.token"):
        serve(replace(config, webui=replace(config.webui, token="")), threading.Event())


def test_a_thread_that_dies_ends_the_notifier_with_its_error(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: object) -> None:
        raise RuntimeError("a bug in the paging clock")

    monkeypatch.setattr("notifier.paging.Paging.tick", broken)
    stop = threading.Event()
    with pytest.raises(RuntimeError, match="a bug in the paging clock"):
        serve(config, stop)
    assert stop.is_set()


def test_a_positive_result_that_cannot_be_paged_at_all_is_an_alarm(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(paging: Paging, event: SeriesTriaged) -> None:
        raise ValueError("a bug that names ANNA^SECRET")

    monkeypatch.setattr(Paging, "on_triaged", broken)
    config = replace(config, notifier=replace(config.notifier, operators=(PagingStep(to="it@hospital.example"),)))
    mailbox = Mailbox()
    event = triaged(occurred_at=utc_now())
    with smtp_server(mailbox, config.notifier.smtp_port), serving(config):
        publish(config, event)
        assert mailbox.arrived.wait(60)
    (email,) = mailbox.emails
    text = email.get_body(("plain",)).get_content()  # type: ignore[union-attr]
    assert f"study {event.study_instance_uid} is POSITIVE" in " ".join(text.split())
    assert "ANNA" not in text
    (alarm,) = rows(config, select(alarms))
    assert (alarm.kind, alarm.about, alarm.cleared_at) == ("undelivered", event.study_instance_uid, None)

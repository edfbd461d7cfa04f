"""The red banner and the operations page: what failed, for whoever looks at a screen; what runs, for administrators."""

import json
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import router_fakes
from served_models import eventually
from sqlalchemy import event, insert, select, update
from webui_browser import CONTRAST, DESKTOP, PHONE, UNNAMED, fits, log_in, open_page
from webui_site import ROOT, Site, open_site, served, triaged

from herald.bus import handle, open_bus
from herald.config import BusConfig, LedgerConfig, NotifierConfig, PagingStep, StoreConfig
from herald.errors import LedgerError, VolumeError
from herald.events import Event, SeriesReceived, utc_now
from herald.ledger import Ledger, alarms, audit, open_ledger, pages, results, vitals, watches
from webui import condition, figures
from webui.operations import CONDITION, masked
from webui.parts import Parts


def add_page(site: Site, number: int, state: str = "exhausted", step: int = 0, **changes: Any) -> None:
    """A page for the study of `site.add(number)`, twenty minutes old."""
    then = utc_now() - timedelta(minutes=20)
    study = f"1.2.826.0.1.3680043.8.498.{number}"
    row = {
        "page_id": str(uuid4()),
        "study_instance_uid": study,
        "series_instance_uid": f"{study}.1",
        "revision": 1,
        "step": step,
        "state": state,
        "mode": "live",
        "channel": "smtp",
        "recipient": "oncall.radiology@hospital.example",
        "subject": "",
        "body": "",
        "finding_at": then,
        "due_at": then,
        "sent_at": then,
        "attempts": 1,
        "event": {"scanner": "CT-EMERGENCY", "accession_number": f"ACC{number:05d}"},
    }
    with site.ledger.begin() as connection:
        connection.execute(insert(pages).values(**{**row, **changes}))


def add_alarm(
    site: Site, kind: str = "models", about: str = "", cleared_at: datetime | None = None, **more: Any
) -> None:
    with site.ledger.begin() as connection:
        connection.execute(
            insert(alarms).values(
                **{
                    "alarm_id": str(uuid4()),
                    "kind": kind,
                    "about": about,
                    "detail": "no router has been alive since 2026-03-27 03:12 UTC: start it with `herald run router`.",
                    "mode": "live",
                    "raised_at": utc_now() - timedelta(minutes=9),
                    "cleared_at": cleared_at,
                }
                | more
            )
        )


def banner_of(html: str) -> str:
    """The words of the banner, empty where there is none."""
    found = re.search(r'<section class="alarm".*?</section>', html, re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", found[0]).split()) if found else ""


def test_a_study_whose_page_nobody_answered_is_on_every_page_with_a_link_and_what_to_do(site: Site) -> None:
    event = site.add(1)
    add_page(site, 1)
    client = site.client("rita")
    for address in ("/", f"/series/{event.series_instance_uid}/1", "/operations", "/operations/banner"):
        html = client.get(address).text
        assert "1 study was paged, and nobody has answered: ACC00001 CT-EMERGENCY, 20 min ago" in banner_of(html)
        assert "Open and acknowledge, or call the radiologist now." in banner_of(html)
        assert f'href="/series/{event.series_instance_uid}"' in html


def test_several_studies_are_counted_and_the_latest_are_named(site: Site) -> None:
    for number in range(1, 8):
        site.add(number)
        add_page(site, number, finding_at=utc_now() - timedelta(minutes=20 + number))
    told = banner_of(site.client("rita").get("/").text)
    assert told.startswith("7 studies were paged, and nobody has answered: ACC00001")
    assert "ACC00005" in told
    assert "ACC00006" not in told
    assert "and 2 more" in told


def test_what_could_not_be_sent_and_what_is_late_are_told_apart(site: Site) -> None:
    add_page(site, 1, sent_at=None)
    add_page(site, 2, state="due", sent_at=None)
    told = banner_of(site.client("rita").get("/").text)
    assert "1 study could not be paged: nobody was reached: ACC00001" in told
    assert "1 study should have been paged by now: ACC00002" in told
    assert "The notifier may have stopped" in told


@pytest.mark.parametrize("way", ["acknowledge", "agree", "link"])
def test_acknowledging_a_study_takes_it_off_the_banner_at_once(site: Site, way: str) -> None:
    event = site.add(1)
    add_page(site, 1)
    add_alarm(site, "undelivered", event.study_instance_uid)
    client = site.client("rita")
    assert "ACC00001" in banner_of(client.get("/").text)
    if way == "link":
        site.client().post(site.link(event), data=site.shown(event))
    else:
        client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": way, **site.shown(event)})
    assert banner_of(client.get("/").text) == ""
    assert "Every page has been answered, or is under way." in client.get("/operations").text


def test_a_later_revision_that_is_paged_in_vain_is_not_answered_by_a_look_at_the_earlier_one(site: Site) -> None:
    event = site.add(1)
    client = site.client("rita")
    client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "agree", **site.shown(event)})
    add_page(site, 1, revision=2, finding_at=utc_now() + timedelta(seconds=1))
    assert "ACC00001" in banner_of(client.get("/").text)


def test_a_look_at_an_earlier_revision_after_the_finding_answers_no_page_of_the_later(site: Site) -> None:
    event = site.add(1)
    add_page(site, 1, revision=2)
    client = site.client("rita")
    client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "agree", **site.shown(event)})
    assert "ACC00001" in banner_of(client.get("/").text)


def test_a_look_at_a_failure_answers_no_page_of_the_finding_that_its_replay_made(site: Site) -> None:
    event = site.add(1, "failed")
    client = site.client("rita")
    client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "acknowledge", **site.shown(event)})
    add_page(site, 1, finding_at=utc_now())
    assert "ACC00001" in banner_of(client.get("/").text)


@pytest.mark.parametrize(("made_later", "answered"), [(None, True), (-1, True), (1, False)])
def test_another_series_answers_only_once_the_page_was_made(site: Site, made_later: int | None, answered: bool) -> None:
    other = site.add(1, series_instance_uid=f"{ROOT}.1.2")
    made_at = None if made_later is None else utc_now() + timedelta(minutes=made_later)
    add_page(site, 1, made_at=made_at)
    client = site.client("rita")
    client.post(f"/series/{other.series_instance_uid}/1/review", data={"verdict": "agree", **site.shown(other)})
    assert (banner_of(client.get("/").text) == "") is answered


@pytest.mark.parametrize("state", ["due", "sent", "acknowledged", "withdrawn"])
def test_paging_under_way_or_settled_is_no_reason_for_a_banner(site: Site, state: str) -> None:
    now = utc_now()
    add_page(site, 1, state="failed", sent_at=None, finding_at=now, due_at=now)
    add_page(site, 1, state=state, step=1, finding_at=now, due_at=now, sent_at=now)
    assert banner_of(site.client("rita").get("/").text) == ""


def test_pages_of_shadow_mode_are_no_reason_for_a_banner(site: Site) -> None:
    add_page(site, 1, mode="shadow")
    assert banner_of(site.client("rita").get("/").text) == ""


def test_an_alarm_that_holds_is_on_every_page_until_it_is_over(site: Site) -> None:
    add_alarm(site)
    client = site.client("remi")
    assert "Triage stands still: no router has been alive since" in banner_of(client.get("/").text)
    with site.ledger.begin() as connection:
        connection.execute(update(alarms).values(cleared_at=utc_now()))
    assert banner_of(client.get("/").text) == ""


@pytest.mark.parametrize(("minutes_ago", "told"), [(1, False), (5, True)])
def test_a_notifier_that_is_alive_no_more_is_on_every_page(site: Site, minutes_ago: int, told: bool) -> None:
    client = site.client("remi")
    (before,) = re.findall(r'data-etag="(\w+)"', client.get("/").text)
    with site.ledger.begin() as connection:
        seen_at = utc_now() - timedelta(minutes=minutes_ago)
        connection.execute(insert(watches).values(notifier="ct1:7", seen_at=seen_at))
    for address in ("/", "/operations"):
        words = banner_of(client.get(address).text)
        assert ("Paging has stopped: the notifier was last alive 5 min ago. Nobody is paged" in words) is told
    changed = client.get("/operations/banner", headers={"If-None-Match": f'"{before}"'})
    assert changed.status_code == (200 if told else 304)


def test_a_study_and_its_own_alarm_are_told_once(site: Site) -> None:
    event = site.add(1)
    add_page(site, 1)
    add_alarm(site, "undelivered", event.study_instance_uid)
    add_alarm(site, "undelivered", "1.2.3.4")  # a result that became a dead letter has no pages
    told = banner_of(site.client("rita").get("/").text)
    assert told.count("A page reached nobody") == 1


def test_nobody_who_is_not_logged_in_sees_the_banner(site: Site) -> None:
    event = site.add(1)
    add_page(site, 1)
    for address in ("/login", site.link(event)):
        html = site.client().get(address).text
        assert banner_of(html) == ""
        assert "banner.js" not in html


def test_an_open_page_is_told_only_what_has_changed(site: Site) -> None:
    client = site.client("rita")
    page = client.get("/").text
    (etag,) = re.findall(r'data-etag="(\w+)"', page)
    assert client.get("/operations/banner", headers={"If-None-Match": f'"{etag}"'}).status_code == 304
    add_page(site, 1)
    changed = client.get("/operations/banner", headers={"If-None-Match": f'"{etag}"'})
    assert changed.status_code == 200
    assert "ACC00001" in banner_of(changed.text)


def test_the_operations_page_names_every_step_that_was_tried_without_anybody_s_address(site: Site) -> None:
    site.add(1)
    refusal = (
        "SMTP server 127.0.0.1:25 answered 550 <oncall.radiology@hospital.example> unknown; check notifier.steps.to"
    )
    add_page(site, 1, state="failed", sent_at=None, error=refusal, attempts=4)
    add_page(
        site, 1, step=1, channel="pager", recipient="5551234@pager.example", error="nobody has acknowledged in time"
    )
    html = site.client("ada").get("/operations").text
    words = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "Step 1 to o…@hospital.example by smtp: could not be sent, 4 attempts" in words
    assert "550 &lt;o…@hospital.example&gt; unknown" in words
    assert "Step 2 to 5…@pager.example by pager: nobody acknowledged" in words
    assert "oncall.radiology" not in html
    assert "5551234" not in html


def test_the_operations_page_shows_alarms_that_hold_apart_from_those_that_are_over(site: Site) -> None:
    add_alarm(site, error="it@hospital.example: the gateway is away")
    add_alarm(site, "silence", cleared_at=utc_now(), sent_at=utc_now())
    add_alarm(site, "heartbeat", "2026-03-27", cleared_at=utc_now(), sent_at=utc_now(), detail="41 series")
    html = site.client("ada").get("/operations").text
    held, _, recent = html.partition("Recent messages to the operators")
    assert "Alarms that hold <span" in held
    assert "nobody was reached" in held
    assert "i…@hospital.example: the gateway is away" in held
    assert "it@hospital.example" not in html
    assert "No series is triaged" in recent
    assert "No series is triaged" not in held
    assert "41 series" in recent


def test_the_operations_page_shows_which_routers_are_alive(site: Site) -> None:
    now = utc_now()
    with site.ledger.begin() as connection:
        for name, seen_at, error in (
            ("ct1:7", now, None),
            ("ct2:9", now, "model server 127.0.0.1:8500 did not answer"),
            ("old:1", now - timedelta(hours=3), None),
        ):
            connection.execute(
                insert(vitals).values(
                    router=name, started_at=now, seen_at=seen_at, models_answered_at=None, error=error
                )
            )
    words = " ".join(re.sub(r"<[^>]+>", " ", site.client("ada").get("/operations").text).split())
    assert re.search(r"ct1:7 alive", words)
    assert re.search(r"ct2:9 waits for the model server", words)
    assert re.search(r"old:1 gone", words)


def test_an_escalation_that_the_notifier_missed_counts_by_the_policy_of_its_page(tmp_path: Path) -> None:
    with open_site(tmp_path) as site:
        steps = (PagingStep(to="a@b.example"), PagingStep(to="c@d.example", after_minutes=60.0))
        patient = replace(site.config, notifier=NotifierConfig(mode="live", steps=steps))
        add_page(site, 1, state="sent")  # twenty minutes ago
        assert "should have been paged by now" in banner_of(site.client("rita").get("/").text)
        parts = site.app.extensions["herald"]
        site.app.extensions["herald"] = replace(parts, config=patient)
        assert banner_of(site.client("rita").get("/").text) == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oncall@hospital.example", "o…@hospital.example"),
        ("550 <dr.who+night@a-b.example>: no", "550 <d…@a-b.example>: no"),
        ("ris.hospital.example:2575", "ris.hospital.example:2575"),
        ("json://host/…/", "json://host/…/"),
        ("", ""),
    ],
)
def test_addresses_of_people_are_masked_and_machines_are_not(text: str, expected: str) -> None:
    assert masked(text) == expected


# --- the condition of the node, for administrators -------------------------------------------------------------------


def words_of(html: str) -> str:
    """What is read on a page, without its markup."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def received(number: int = 1) -> SeriesReceived:
    return router_fakes.received(
        study_instance_uid=f"{ROOT}.{number}",
        series_instance_uid=f"{ROOT}.{number}.1",
        accession_number=f"ACC{number:05d}",
        scanner="CT-EMERGENCY",
        instance_count=24,
    )


def with_config(site: Site, **tables: Any) -> None:
    """Have the condition read with other settings."""
    config = replace(site.config, **tables)
    site.app.extensions[CONDITION] = condition.Condition(config, site.ledger, site.store)


@contextmanager
def router(config: BusConfig, triage: Callable[[Event], None]) -> Iterator[None]:
    """A consumer like the router's for the block."""
    stop = threading.Event()
    with closing(open_bus(config)) as bus:
        thread = threading.Thread(target=handle, args=(bus, "router", {SeriesReceived: triage}, stop, config))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


def unreadable(event: Event) -> None:
    raise VolumeError("the slices have no positions; write to it@hospital.example")


def bury(config: BusConfig, *numbers: int) -> None:
    """Dead letters about these studies."""
    with closing(open_bus(config)) as bus, router(config, unreadable):
        for number in numbers:
            bus.publish(received(number))
        eventually(lambda: len(bus.dead_letters("series")) == len(numbers))


PARTS = ("Dead letters", "Queues", "Series of the last 24 hours", "Where the time goes", "Disk of the store", "Models")


def test_an_administrator_sees_the_condition_of_the_node_and_others_do_not(site: Site) -> None:
    page = site.client("ada").get("/operations").text
    assert [part for part in PARTS if part not in page] == []
    assert "cannot be read" not in page
    for name in ("rita", "remi"):
        page = site.client(name).get("/operations").text
        assert [part for part in PARTS if part in page] == []
        assert "Alarms that hold" in page


def test_a_dead_letter_is_replayed_and_handled_once_however_often_it_is_clicked(tmp_path: Path, bus_url: str) -> None:
    config = BusConfig(url=bus_url, retry_for_s=0.0)
    with open_site(tmp_path) as site:
        with_config(site, bus=config)
        bury(config, 1)
        client = site.client("ada")

        def shown() -> str:
            return client.get("/operations/condition").text

        eventually(lambda: "ACC00001" in shown())  # Kafka may take longer than the page waits
        assert "VolumeError: the slices have no positions" in shown()
        (action,) = re.findall(r'action="(/operations/dead-letters/[^"]+)"', shown())
        handled: list[Event] = []
        with router(config, handled.append):
            answer = client.post(action, follow_redirects=True)
            assert "Replayed: router handles it again" in answer.text
            again = client.post(action, follow_redirects=True)
            assert "has been replayed already" in again.text
            eventually(lambda: len(handled) == 1)
        assert handled[0].series_instance_uid == f"{ROOT}.1.1"
        with closing(open_bus(config)) as bus:
            assert bus.dead_letters("series") == []
            assert bus.backlog("router", "series") == 0
        with site.ledger.read() as connection:
            rows = connection.execute(select(audit).where(audit.c.action == "replay-dead-letter")).mappings().all()
        assert [(row["user"], row["series_instance_uid"]) for row in rows] == [("ada", f"{ROOT}.1.1")]


def test_the_error_of_a_dead_letter_is_told_in_full_without_anybody_s_address(site: Site) -> None:
    bury(replace(site.config.bus, retry_for_s=0.0), 1)
    client = site.client("ada")
    page = client.get("/operations").text
    (address,) = re.findall(r'href="(/operations/dead-letters/[^"]+)"', page)
    letter = client.get(address).text
    assert "Traceback (most recent call last)" in letter
    assert "in unreadable" in letter
    assert "ACC00001" in letter
    assert "i…@hospital.example" in letter
    assert "it@hospital.example" not in page + letter
    assert client.get("/operations/dead-letters/series/999").status_code == 404
    assert client.get("/operations/dead-letters/nothing/1").status_code == 404


def test_a_message_that_is_no_event_can_be_seen_and_put_back(site: Site) -> None:
    with closing(open_bus(site.config.bus)) as bus:
        bus.publish(received(1))
        with closing(sqlite3.connect(site.config.bus.url.removeprefix("sqlite:///"))) as file:
            file.execute("update messages set body = 'no event'")
            file.commit()
        assert bus.fetch("router", ("series",), 0.1) is None
    client = site.client("ada")
    page = client.get("/operations").text
    assert "no event of ours" in page
    (action,) = re.findall(r'action="(/operations/dead-letters/[^"]+)"', page)
    assert "Replayed" in client.post(action, follow_redirects=True).text


@pytest.mark.parametrize("address", ["/operations/dead-letters/series/1/replay", "/operations/reconcile"])
def test_what_changes_something_needs_the_token_of_its_form(tmp_path: Path, address: str) -> None:
    with open_site(tmp_path) as site:
        bury(replace(site.config.bus, retry_for_s=0.0), 1)
        client = site.client("ada")
        site.app.config["WTF_CSRF_ENABLED"] = True
        assert client.post(address).status_code == 400
        with closing(open_bus(site.config.bus)) as bus:
            assert len(bus.dead_letters("series")) == 1
        assert "Not asked since the web UI was started" in client.get("/operations").text


def test_a_queue_says_since_when_its_oldest_event_waits_and_who_may_have_stopped(site: Site) -> None:
    with closing(open_bus(site.config.bus)) as bus:
        bus.publish(received(1))
        bus.publish(received(2))
    client = site.client("ada")
    assert re.search(r"router series 2 \d+ s notifier", words_of(client.get("/operations").text))
    with closing(sqlite3.connect(site.config.bus.url.removeprefix("sqlite:///"))) as file:
        file.execute("update messages set published_at = published_at - 600 where seq = 1")
        file.commit()
    words = words_of(client.get("/operations").text)
    assert "router series 2 10 min – is the router running?" in words
    assert "notifier results 0 nothing waits" in words


def test_with_the_bus_down_the_page_comes_and_says_so_in_the_places_of_the_bus(site: Site, tmp_path: Path) -> None:
    site.add(1)
    with_config(site, bus=BusConfig(url=f"sqlite:///{tmp_path / 'gone' / 'bus.sqlite'}"))
    client = site.client("ada")
    answer = client.get("/operations")
    words = words_of(answer.text)
    assert answer.status_code == 200
    assert "The dead letters cannot be read." in words
    assert "The queues cannot be read." in words
    assert "create its folder, or correct bus.url" in words
    assert words.count("cannot be read") == 2
    assert "1 in the last 60 minutes" in words
    answer = client.get("/operations/dead-letters/series/1")
    assert (answer.status_code, "The bus cannot be reached" in answer.text) == (503, True)
    answer = client.post("/operations/dead-letters/series/1/replay", follow_redirects=True)
    assert "Not replayed: the bus" in answer.text
    with site.ledger.read() as connection:
        assert connection.execute(select(audit).where(audit.c.action == "replay-dead-letter")).all() == []


def test_a_part_that_breaks_is_said_in_its_place_without_its_traceback(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    def away(*_: object) -> None:
        raise LedgerError("the ledger refuses: too many clients")

    monkeypatch.setattr(figures, "waterfall", broken)
    monkeypatch.setattr(figures, "traffic", away)
    answer = site.client("ada").get("/operations")
    assert answer.status_code == 200
    assert "The times cannot be read. Something went wrong on our side" in words_of(answer.text)
    assert "The series cannot be read. the ledger refuses: too many clients" in words_of(answer.text)
    assert "a bug" not in answer.text


def test_a_part_that_is_late_shows_what_was_read_last_and_is_not_read_twice_at_a_time() -> None:
    parts, go_on, asked = Parts(), threading.Event(), []

    def read() -> int:
        asked.append(1)
        assert go_on.wait(30)
        return len(asked)

    first = parts.read({"slow": read, "quick": lambda: 7}, 0.05)
    assert (first["quick"].value, first["slow"].value) == (7, None)
    assert "takes long" in first["slow"].problem
    assert parts.read({"slow": read}, 0.05)["slow"].value is None
    go_on.set()
    assert parts.read({"slow": read}, 30)["slow"].value == 1
    go_on.clear()
    late = parts.read({"slow": read}, 0.05)["slow"]
    assert (late.value, "takes long" in late.problem) == (1, True)
    assert late.at is not None
    go_on.set()
    assert parts.read({"slow": read}, 30)["slow"].problem == ""


def add_results(ledger: Ledger, *events: Any) -> None:
    with ledger.begin() as connection:
        for number, one in enumerate(events):
            connection.execute(
                insert(results).values(
                    series_instance_uid=f"{ROOT}.{number}.9",
                    revision=1,
                    study_instance_uid=one.study_instance_uid,
                    disposition=one.disposition,
                    event=json.loads(one.to_json()),
                    triaged_at=one.occurred_at,
                    posted_at=one.occurred_at + timedelta(seconds=0.5),
                )
            )


@pytest.fixture
def ledger(ledger_url: str) -> Iterator[Ledger]:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    yield ledger
    ledger.close()


def test_series_are_counted_by_the_hour_of_their_disposition(ledger: Ledger) -> None:
    now = utc_now().replace(minute=30, second=0, microsecond=0)
    ages = {"positive": [5, 95], "negative": [10, 20, 31, 90], "failed": [23 * 60, 24 * 60]}
    add_results(
        ledger,
        *(
            triaged(1, disposition, occurred_at=now - timedelta(minutes=minutes))
            for disposition, of_disposition in ages.items()
            for minutes in of_disposition
        ),
    )
    with ledger.read() as connection:
        found = figures.traffic(connection, now)
        waterfall = figures.waterfall(connection, now)
        made_with = figures.models(connection)
    assert found.last_hour == 4
    this_hour, before, earlier = found.hours[-1], found.hours[-2], found.hours[-3]
    assert this_hour.begin == now.replace(minute=0)
    assert this_hour.counts == {"positive": 1, "negative": 2}
    assert before.counts == {"negative": 2}
    assert earlier.counts == {"positive": 1}
    assert found.hours[0].counts == {"failed": 1}
    assert found.counts == {"positive": 2, "negative": 4, "failed": 1}
    assert len(found.hours) == 24
    assert [step.week.count for step in waterfall.steps[:5] if step.week] == [8, 8, 8, 6, 8]
    assert made_with is not None
    assert made_with.versions == {"protocol": "1", "hemorrhage": "1"}


def test_the_waterfall_has_median_and_95th_percentile_of_each_step(site: Site) -> None:
    now = utc_now()

    def one(seconds: float, at: datetime) -> Any:
        last = at - timedelta(seconds=seconds + 10)
        return triaged(
            1,
            "negative",
            last_image_at=last,
            received_at=last + timedelta(seconds=seconds),
            started_at=last + timedelta(seconds=seconds + 1),
            classified_at=last + timedelta(seconds=seconds + 3),
            detected_at=last + timedelta(seconds=seconds + 9),
            occurred_at=at,
        )

    today = [one(seconds, now - timedelta(hours=1)) for seconds in range(1, 21)]
    earlier = [one(100, now - timedelta(days=3)) for _ in range(20)]
    failed = triaged(1, "failed", classified_at=None, detected_at=None, occurred_at=now - timedelta(hours=2))
    add_results(site.ledger, *today, *earlier, replace(failed, last_image_at=None, received_at=None, started_at=None))
    add_page(site, 1, finding_at=now - timedelta(hours=1), due_at=now, sent_at=now - timedelta(minutes=59))
    with site.ledger.read() as connection:
        found = figures.waterfall(connection, now)
    steps = {step.label: step for step in found.steps}
    complete = steps["Last image to complete series"]
    assert complete.day == figures.Spread(20, 10.0, 19.0)
    assert complete.week == figures.Spread(40, 20.0, 100.0)
    assert [step.day.p50 for step in found.steps if step.day] == [10.0, 1.0, 2.0, 6.0, 1.0, 0.5, 60.0]
    assert [step.begins_s for step in found.steps] == [0.0, 10.0, 11.0, 13.0, 19.0, 20.0, 20.0]
    assert found.end_s == 80.0
    assert not found.capped


def test_the_waterfall_of_a_week_without_series_is_said_in_words(site: Site) -> None:
    assert "No series has been triaged in the last seven days." in site.client("ada").get("/operations").text
    assert figures.spread([]) is None


def test_model_versions_are_those_of_the_newest_results(site: Site) -> None:
    now = utc_now()
    add_results(
        site.ledger,
        triaged(1, occurred_at=now - timedelta(hours=2), model_versions={"protocol": "1", "hemorrhage": "2"}),
        triaged(1, "not_eligible", occurred_at=now - timedelta(hours=1), model_versions={"protocol": "3"}),
        triaged(1, "failed", occurred_at=now, model_versions={}),
    )
    words = words_of(site.client("ada").get("/operations").text)
    assert "protocol version 3" in words
    assert "hemorrhage version 2" in words


def test_the_figures_read_along_indexes_and_never_through_every_result(site: Site) -> None:
    asked: list[tuple[str, Any]] = []
    event.listen(site.ledger.engine, "before_cursor_execute", lambda *said: asked.append((said[2], said[3])))
    with site.ledger.read() as connection:
        figures.traffic(connection, utc_now())
        figures.waterfall(connection, utc_now())
        figures.models(connection)
        statements = list(asked)
        assert len(statements) == 4
        for statement, values in statements:
            plan = connection.exec_driver_sql(f"explain query plan {statement}", values).all()
            assert not any(step[-1] in ("SCAN results", "SCAN pages") for step in plan), plan


@pytest.mark.parametrize(
    ("store", "says"),
    [
        ({"min_free_gb": 0.0, "remove_below_gb": 0.0}, "Images are refused below 0.0 GB."),
        ({"min_free_gb": 0.0, "remove_below_gb": 1e9}, "the oldest finished studies are removed"),
        ({"min_free_gb": 1e9, "remove_below_gb": 0.0}, "images are refused until there is space"),
    ],
)
def test_the_disk_is_shown_with_its_watermarks(site: Site, store: Mapping[str, float], says: str) -> None:
    with_config(site, store=StoreConfig(root=site.config.store.root, **store))
    assert says in words_of(site.client("ada").get("/operations").text)


def test_reconciling_runs_in_the_background_and_its_result_comes_onto_the_page(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), condition.reconcile

    def held_up(config: Any) -> Any:
        assert go_on.wait(30)
        return real(config)

    monkeypatch.setattr(condition, "reconcile", held_up)
    client = site.client("ada")
    assert "Reconciling; the result comes here." in client.post("/operations/reconcile", follow_redirects=True).text
    assert "It is under way already." in client.post("/operations/reconcile", follow_redirects=True).text
    go_on.set()
    eventually(lambda: "0 unaccounted of 0 instances" in words_of(client.get("/operations/condition").text))
    with site.ledger.read() as connection:
        assert len(connection.execute(select(audit).where(audit.c.action == "reconcile")).all()) == 1


def test_reconciling_that_fails_says_why_and_can_be_tried_again(site: Site, tmp_path: Path) -> None:
    with_config(site, ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'gone' / 'ledger.sqlite'}"))
    client = site.client("ada")
    client.post("/operations/reconcile")
    eventually(lambda: "Reconciling failed" in client.get("/operations/condition").text)
    words = words_of(client.get("/operations").text)
    assert "the ledger sqlite:///" in words
    assert "Reconcile now" in words


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as site, served(site) as up:
        yield up


def trouble(site: Site) -> None:
    for number in (1, 2, 3):
        site.add(number)
    add_page(site, 1, state="escalated", error="nobody has acknowledged in time")
    add_page(
        site, 1, step=1, recipient="5551234@pager.example", channel="pager", error="nobody has acknowledged in time"
    )
    refusal = "SMTP server smtp.hospital.example:25 cannot be reached: timed out; check notifier.smtp_host"
    add_page(site, 2, sent_at=None, attempts=14, error=refusal)
    add_page(site, 4, state="due", sent_at=None)
    add_alarm(site, sent_at=utc_now())
    add_alarm(site, "silence", cleared_at=utc_now(), sent_at=utc_now())
    with site.ledger.begin() as connection:
        connection.execute(
            insert(vitals).values(
                router="herald-1:4711", started_at=utc_now(), seen_at=utc_now() - timedelta(minutes=9)
            )
        )


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_banner_and_the_operations_page_can_be_read_and_used(
    chromium: Any,
    running: Site,
    viewport: Any,
    pictures: Path,
) -> None:
    trouble(running)
    page = open_page(chromium, running, viewport, "/operations")
    log_in(page)
    page.wait_for_url("**/operations")
    name = "phone" if viewport is PHONE else "desktop"
    for path in ("/operations", "/"):
        page.goto(path)
        assert page.evaluate(CONTRAST) == [], path
        assert page.evaluate(UNNAMED) == [], path
        assert fits(page), path
        page.screenshot(path=pictures / f"{name}-{'operations' if path != '/' else 'banner'}.png", full_page=True)
    page.locator("#banner a", has_text="ACC00001").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/series/*.1.1/1")
    assert page.complaints == []


def test_the_banner_comes_and_goes_on_a_page_that_is_left_open(chromium: Any, running: Site) -> None:
    event = running.add(1)
    page = chromium.new_context(viewport=DESKTOP, base_url=running.config.webui.public_url).new_page()
    page.clock.install()
    page.goto("/")
    log_in(page)
    page.get_by_role("link", name="ACC00001").wait_for()
    add_page(running, 1)
    with page.expect_response("**/operations/banner"):
        page.clock.fast_forward(11_000)
    page.get_by_text("1 study was paged, and nobody has answered").wait_for()
    other = running.app.test_client()
    other.post("/login", data={"name": "ada", "password": "a password for tests"})
    other.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "acknowledge", **running.shown(event)})
    with page.expect_response("**/operations/banner"):
        page.clock.fast_forward(11_000)
    page.locator("section.alarm").wait_for(state="detached")


def busy(site: Site) -> None:
    """A day of series, a queue that stands still, and dead letters."""
    now = utc_now()
    dispositions = ("negative", "not_eligible", "negative", "positive", "not_eligible", "negative", "failed")
    made = []
    for number in range(240):
        at = now - timedelta(minutes=6 * number + (number * number) % 37)
        took = 2 + number % 5 + (30 if number % 25 == 0 else 0)
        last = at - timedelta(seconds=took)
        disposition = dispositions[(number * 5 + number // 9) % len(dispositions)]
        made.append(
            triaged(
                number,
                disposition,
                last_image_at=last,
                received_at=last + timedelta(seconds=0.4),
                started_at=last + timedelta(seconds=0.5),
                classified_at=last + timedelta(seconds=1.2),
                detected_at=at - timedelta(seconds=0.1) if disposition in ("positive", "negative") else None,
                occurred_at=at,
                config_version="0f3a9c2b71de",
            )
        )
    add_results(site.ledger, *made)
    bury(replace(site.config.bus, retry_for_s=0.0), 1, 2)
    with closing(open_bus(site.config.bus)) as bus:
        for number in (7, 8, 9):
            bus.publish(received(number))
    with closing(sqlite3.connect(site.config.bus.url.removeprefix("sqlite:///"))) as file:
        file.execute("update messages set published_at = published_at - 900 where seq > 2")
        file.commit()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_an_administrator_reads_the_condition_replays_and_reconciles_in_a_browser(
    chromium: Any,
    running: Site,
    viewport: Any,
    pictures: Path,
) -> None:
    busy(running)
    page = open_page(chromium, running, viewport, "/operations")
    log_in(page, "ada")
    page.wait_for_url("**/operations")
    name = "phone" if viewport is PHONE else "desktop"
    page.get_by_role("button", name="Reconcile now").click()
    page.get_by_text("Reconciling; the result comes here.").wait_for()
    eventually(lambda: page.reload() and page.get_by_text("unaccounted").count())
    page.screenshot(path=pictures / f"{name}-condition.png", full_page=True)
    assert page.evaluate(CONTRAST) == []
    assert page.evaluate(UNNAMED) == []
    assert fits(page)
    page.get_by_role("link", name=re.compile("the error of ACC00002")).click()
    page.get_by_text("Traceback (most recent call last)").wait_for()
    page.screenshot(path=pictures / f"{name}-letter.png", full_page=True)
    assert page.evaluate(CONTRAST) == []
    assert fits(page)
    page.get_by_role("button", name="Replay").click()
    page.get_by_text("Replayed: router handles it again.").wait_for()
    assert page.get_by_role("button", name="Replay ACC00001").count() == 1
    assert page.get_by_role("button", name="Replay ACC00002").count() == 0
    assert page.complaints == []


def test_the_condition_on_an_open_page_keeps_itself_up_to_date(chromium: Any, running: Site) -> None:
    page = chromium.new_context(viewport=DESKTOP, base_url=running.config.webui.public_url).new_page()
    page.clock.install()
    page.goto("/operations")
    log_in(page, "ada")
    page.get_by_text("0 in the last 60 minutes").wait_for()
    add_results(running.ledger, triaged(1, occurred_at=utc_now()))
    with page.expect_response("**/operations/condition"):
        page.clock.fast_forward(16_000)
    page.get_by_text("1 in the last 60 minutes").wait_for()

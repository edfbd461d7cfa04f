"""The red banner and the operations page: what failed, for whoever looks at a screen."""

import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import insert, update
from test_webui_browser import CONTRAST, DESKTOP, PHONE, UNNAMED, fits, log_in, open_page, pictures, served  # noqa: F401 - a fixture
from webui_site import Site, open_site

from herald.config import NotifierConfig, PagingStep
from herald.events import utc_now
from herald.ledger import alarms, pages, vitals
from webui.operations import masked


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as site:
        yield site


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
        site.client().post(site.link(event))
    else:
        client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": way})
    assert banner_of(client.get("/").text) == ""
    assert "Every page has been answered, or is under way." in client.get("/operations").text


def test_a_later_revision_that_is_paged_in_vain_is_not_answered_by_a_look_at_the_earlier_one(site: Site) -> None:
    event = site.add(1)
    client = site.client("rita")
    client.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "agree"})
    add_page(site, 1, revision=2, finding_at=utc_now() + timedelta(seconds=1))
    assert "ACC00001" in banner_of(client.get("/").text)


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
    pictures: Path,  # noqa: F811
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
    other.post(f"/series/{event.series_instance_uid}/1/review", data={"verdict": "acknowledge"})
    with page.expect_response("**/operations/banner"):
        page.clock.fast_forward(11_000)
    page.locator("section.alarm").wait_for(state="detached")

"""The validation page: who may see the report of a period, and how it comes about."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from report_rows import analysed, excluded
from sqlalchemy import select
from webui_browser import CONTRAST, DESKTOP, PHONE, UNNAMED, fits, log_in, open_page
from webui_site import Site, open_site, served

from herald.errors import LedgerError
from herald.ledger import audit
from herald.validation import report
from herald.validation.chain import append
from webui import validation

MARCH = "from=2026-03-01&to=2026-03-31"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as site:
        fill(site)
        yield site


def fill(site: Site) -> None:
    rows = [analysed(n, positive=n % 3 == 0, truth=n % 6 == 0, day=n % 28) for n in range(60)]
    append(site.ledger, [*rows, excluded(60)], datetime(2026, 4, 1, tzinfo=UTC))


def wait_for_report() -> None:
    for thread in threading.enumerate():
        if thread.name == "validation-report":
            thread.join(120)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Reports are written only while this is set, however fast the machine."""
    may_write, from_record = threading.Event(), report.from_record
    monkeypatch.setattr(report, "from_record", lambda *args: may_write.wait(60) and from_record(*args))
    return may_write


def actions(site: Site) -> list[tuple[str, str]]:
    with site.ledger.read() as connection:
        rows = connection.execute(select(audit.c.user, audit.c.action).order_by(audit.c.audit_id))
        return [(user, action) for user, action in rows if action != "log-in"]


def test_a_report_is_made_in_the_background_shown_kept_and_noted(
    site: Site, writer: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    from_record = report.from_record
    monkeypatch.setattr(report, "from_record", lambda *args: made.append(args[2:]) or from_record(*args))
    client = site.client("remi")
    first = client.get(f"/validation?{MARCH}").text
    assert "The report is being made" in first
    assert 'http-equiv="refresh"' in first
    writer.set()
    wait_for_report()
    shown = client.get(f"/validation?{MARCH}").text
    assert "61 series revisions received" in shown
    assert 'http-equiv="refresh"' not in shown
    assert client.get(f"/validation/report.html?{MARCH}").text.startswith("<!doctype html>")
    figures = json.loads(client.get(f"/validation/report.json?{MARCH}").text)
    assert figures["flow"]["received"] == 61
    assert len(made) == 1  # all of these are one report
    assert actions(site) == [("remi", "view validation report")] * 2 + [("remi", "download validation report")] * 2


def test_a_record_that_has_grown_makes_a_new_report(site: Site, writer: threading.Event) -> None:
    client = site.client("ada")
    client.get(f"/validation?{MARCH}")
    writer.set()
    wait_for_report()
    writer.clear()
    append(site.ledger, [excluded(61)], datetime(2026, 4, 2, tzinfo=UTC))
    assert "The report is being made" in client.get(f"/validation?{MARCH}").text
    writer.set()
    wait_for_report()
    assert "62 series revisions received" in client.get(f"/validation?{MARCH}").text


def test_without_a_period_the_page_says_what_the_record_has_and_makes_nothing(site: Site) -> None:
    shown = site.client("remi").get("/validation").text
    assert "The record has 61 entries." in shown
    assert actions(site) == []


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("from=2026-03-31&to=2026-03-01", "the period ends before it starts"),
        ("from=yesterday&to=2026-03-01", "Give both days of the period"),
        ("from=2026-03-01", "Give both days of the period"),
        ("from=9999-12-01&to=9999-12-31", "the period ends later than dates can tell"),
    ],
)
def test_a_period_that_is_none_is_refused_in_words(site: Site, query: str, said: str) -> None:
    answer = site.client("remi").get(f"/validation?{query}")
    assert answer.status_code == 400
    assert said in answer.text
    assert site.client("remi").get(f"/validation/report.json?{query}").status_code == 400


def test_a_report_that_failed_says_so_and_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from herald.validation import report

    def fail(*_: object) -> None:
        raise LedgerError("the ledger was away for this test")

    client = site.client("remi")
    with monkeypatch.context() as broken:
        broken.setattr(report, "from_record", fail)
        found = validation.Reports(site.ledger, site.config)
        site.app.extensions[validation.EXTENSION] = found
        client.get(f"/validation?{MARCH}")
        wait_for_report()
    assert [kept.error for kept in found._kept.values()] == ["the ledger was away for this test"]
    told = client.get(f"/validation?{MARCH}").text
    assert "The report could not be made: the ledger was away for this test" in told
    client.get(f"/validation?{MARCH}")
    wait_for_report()
    assert "61 series revisions received" in client.get(f"/validation?{MARCH}").text


def test_only_researchers_and_admins_have_the_link(site: Site) -> None:
    for name, has in (("rita", False), ("remi", True), ("ada", True)):
        assert ('href="/validation"' in site.client(name).get("/").text) is has


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_has_contrast_names_and_fits_and_the_browser_does_not_complain(
    chromium,
    site: Site,
    viewport,
    pictures: Path,
) -> None:
    with served(site) as running:
        page = open_page(chromium, running, viewport, f"/validation?{MARCH}")
        log_in(page, "remi")
        page.get_by_text("61 series revisions received").wait_for(timeout=120_000)
        page.screenshot(path=pictures / f"validation-{viewport['width']}.png", full_page=True)
        assert page.evaluate(CONTRAST) == []
        assert page.evaluate(UNNAMED) == []
        assert fits(page)
        assert page.complaints == []

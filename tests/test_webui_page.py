import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import requests
from notifier_fakes import Mailbox, free_port, smtp_server
from sqlalchemy import func, select
from webui_site import add_page, open_site, running, served, triaged

from herald import links
from herald.bus import open_bus
from herald.config import LedgerConfig, PagingStep
from herald.events import utc_now
from herald.ledger import audit, open_ledger, pages, results, reviews
from notifier.paging import Paging
from notifier.service import serve as notify
from webui import record, words

OTHER_PAGE = "0a1b2c3d-4e5f-5071-8293-a4b5c6d7e8f9"


def test_the_link_of_a_page_shows_the_finding_without_images_and_without_log_in(site):
    event = site.add(1)
    page = site.client().get(site.link(event)).text
    for text in ("Positive", "93 %", "Intraparenchymal", "CT-EMERGENCY", "…0001", "Open images (log in)"):
        assert text in page
    assert "ACC00001" not in page
    assert "slice/" not in page


def test_whoever_holds_the_link_acknowledges_and_the_study_is_acknowledged(site):
    event = site.add(1)
    answer = site.client().post(site.link(event), data=site.shown(event), follow_redirects=True)
    assert "Nobody else will be paged" in answer.text
    assert "Acknowledged by pager link" in answer.text
    with site.ledger.read() as connection:
        (row,) = connection.execute(select(reviews)).mappings().all()
        assert connection.execute(select(results.c.acknowledged_by)).scalar_one() == "pager link"
    assert (row["action"], row["reader"]) == ("acknowledge", "pager link")


def test_a_reader_who_is_logged_in_acknowledges_under_their_name(site):
    event = site.add(1)
    site.client("rita").post(site.link(event), data=site.shown(event))
    with site.ledger.read() as connection:
        assert connection.execute(select(reviews.c.reader)).scalar_one() == "rita"


def test_opening_a_link_does_not_acknowledge_but_is_audited(site):
    event = site.add(1)
    site.client().get(site.link(event))
    with site.ledger.read() as connection:
        assert connection.execute(select(reviews)).all() == []
        rows = connection.execute(select(audit.c.user, audit.c.action, audit.c.study_instance_uid)).all()
    assert [tuple(row) for row in rows] == [("pager link", "view-page", event.study_instance_uid)]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_forged_damaged_or_expired_link_is_refused_in_words(site, method, monkeypatch):
    event = site.add(1)
    good = site.link(event)
    another = replace(site.config.webui, secret_key="another key")
    forged = "/page/" + links.page_token(another, add_page(site.ledger, event, page_id=OTHER_PAGE))
    assert site.client().get(good).status_code == 200
    for bad in (forged, good[:-2], "/page/x"):
        answer = site.client().open(bad, method=method)
        assert answer.status_code == 403
        assert "was not signed by this node" in answer.text
    later = links.utc_now() + links.timedelta(hours=73)
    monkeypatch.setattr(links, "utc_now", lambda: later)
    answer = site.client().open(good, method=method)
    assert answer.status_code == 403
    assert "has expired" in answer.text
    with site.ledger.read() as connection:
        assert connection.execute(select(reviews)).all() == []


def test_a_link_that_comes_before_its_result_asks_to_reload(site):
    answer = site.client().get(site.link(triaged(7)))
    assert answer.status_code == 404
    assert "has not reached the web page" in answer.text


def test_a_link_to_an_older_revision_says_so(site):
    event = site.add(1)
    site.add(1, "negative", revision=2)
    assert "a newer revision supersedes" in site.client().get(site.link(event)).text


def test_a_link_to_a_finding_before_a_revision_that_failed_says_that_the_finding_stands(site):
    event = site.add(1)
    site.add(1, "failed", revision=2)
    page = site.client().get(site.link(event)).text
    assert "revision 2 was not analysed: this finding stands" in page
    assert "supersedes" not in page


# --- the link of a page in the ledger, and two readers at once -------------------------------------------------------


def test_the_short_link_of_a_page_in_the_ledger_acknowledges_too(site):
    event = site.add(1)
    path = site.link(event)
    assert len(path) < 40
    assert "93 %" in site.client().get(path).text
    assert "Nobody else will be paged" in site.client().post(path, data=site.shown(event), follow_redirects=True).text
    assert readers(site) == ["pager link"]


def test_who_acknowledges_without_log_in_may_say_who_it_is(site):
    event = site.add(1)
    page = site.client().get(site.link(event)).text
    assert 'autocomplete="name"' in page
    site.client().post(site.link(event), data={"name": " Kim\r\nReader" + 60 * "x", **site.shown(event)})
    assert readers(site) == ["pager link (Kim Reader" + 30 * "x" + ")"]
    assert "Kim Reader" in site.client().get(site.link(event)).text
    assert 'autocomplete="name"' not in site.client("rita").get(site.link(site.add(2))).text


def test_who_is_second_is_told_who_was_first_and_when_and_is_recorded(site):
    event = site.add(1)
    first, second = site.client(), site.client()
    assert "Acknowledge</button>" in second.get(site.link(event)).text
    first.post(site.link(event), data={"name": "Anna", **site.shown(event)})
    at = acknowledged(site, event)[1]
    told = second.post(site.link(event), data={"name": "Ben", **site.shown(event)}, follow_redirects=True).text
    assert f"pager link (Anna) was first, at {words.clock(at)}" in told
    assert re.search(rf"Acknowledged by pager link \(Anna\), \d+ s ago \({words.clock(at)}\)\.", marks(told))
    assert acknowledged(site, event) == ("pager link (Anna)", at)
    assert readers(site) == ["pager link (Anna)", "pager link (Ben)"]


def test_who_is_second_on_the_series_page_is_told_who_was_first(site):
    event = site.add(1)
    site.client().post(site.link(event), data={"name": "Anna", **site.shown(event)})
    review = f"/series/{event.series_instance_uid}/1/review"
    told = (
        site.client("rita")
        .post(review, data={"verdict": "acknowledge", **site.shown(event)}, follow_redirects=True)
        .text
    )
    assert "pager link (Anna) was first, at " in told


def test_of_many_readers_at_once_exactly_one_is_first_and_all_are_told_the_same(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    try:
        events = [triaged(1), replace(triaged(1), series_instance_uid=f"{triaged(1).series_instance_uid}.2")]
        for event in events:
            record.upsert_result(ledger, event)
        gate = threading.Barrier(8)

        def acknowledge(number: int) -> record.Acknowledgement:
            gate.wait(30)
            # half of them come by the other series of the study
            return record.add_review(
                ledger, events[number % 2], "acknowledge", f"reader {number}", prediction_shown=True
            )

        with ThreadPoolExecutor(8) as threads:
            told = list(threads.map(acknowledge, range(8)))
        (winner,) = [i for i, given in enumerate(told) if given.first]
        assert {(given.reader, given.at) for given in told} == {(f"reader {winner}", told[winner].at)}
        with ledger.read() as connection:
            assert connection.execute(select(func.count()).select_from(reviews)).scalar_one() == 8
            held = connection.execute(select(results.c.acknowledged_by).distinct()).scalars().all()
            assert held == [f"reader {winner}"]
    finally:
        ledger.close()


def test_of_two_phones_at_once_one_is_told_that_it_was_first(tmp_path):
    with open_site(tmp_path) as unserved, served(unserved) as site:
        url = site.config.webui.public_url
        for number in range(1, 6):
            event = site.add(number)
            path, shown = site.link(event), site.shown(event)
            gate = threading.Barrier(2)

            def tap(name: str, path: str = path, shown: dict[str, str] = shown, gate: threading.Barrier = gate) -> str:
                with requests.Session() as phone:
                    phone.get(url + path, timeout=30)
                    gate.wait(30)
                    return phone.post(url + path, data={"name": name, **shown}, timeout=30).text

            with ThreadPoolExecutor(2) as threads:
                told = dict(zip(("Anna", "Ben"), threads.map(tap, ("Anna", "Ben")), strict=True))
            (first,) = [name for name, text in told.items() if "Nobody else will be paged" in text]
            (second,) = set(told) - {first}
            assert f"pager link ({first}) was first, at " in told[second]


def test_a_phone_that_refuses_cookies_can_acknowledge(tmp_path):
    with open_site(tmp_path, csrf=True) as site:
        event = site.add(1)
        phone = site.app.test_client(use_cookies=False)
        assert phone.get(site.link(event)).status_code == 200
        answer = phone.post(site.link(event), data=site.shown(event))
        assert answer.status_code == 303
        assert "Acknowledged by pager link" in phone.get(answer.location).text


def test_the_page_says_what_else_there_is_in_the_study(site):
    event = site.add(1)
    other = replace(triaged(1, "negative"), series_instance_uid=f"{event.series_instance_uid}.2")
    assert site.put(other).status_code == 201
    assert site.put(replace(triaged(1), revision=2)).status_code == 201
    page = marks(site.client().get(site.link(event)).text)
    assert "Another series of this study is negative (2 %)." in page
    assert "a newer revision supersedes what this page was about, and it is positive (93 %)." in page
    newer = marks(site.client().get(site.link(replace(event, revision=2))).text)
    assert "supersedes" not in newer


def test_acknowledging_an_older_revision_leaves_the_newer_one_on_the_worklist(site):
    event = site.add(1)
    assert site.put(replace(triaged(1), revision=2)).status_code == 201
    site.client().post(site.link(event), data=site.shown(event))
    assert acknowledged(site, event)[0] == "pager link"
    assert acknowledged(site, replace(event, revision=2)) == (None, None)


def test_a_short_accession_number_is_not_shown_whole(site):
    event = site.add(1, accession_number="A1234")
    page = site.client().get(site.link(event)).text
    assert "…34" in page
    assert "…1234" not in page


def test_a_refused_link_says_that_nothing_was_acknowledged_and_what_to_do(site):
    page = marks(site.client().post(site.link(site.add(1))[:-2]).text)
    assert "Nothing was acknowledged with it. While nobody acknowledges, the next in line is paged." in page
    assert "Log in and open the worklist" in page


# --- the way of an acknowledgement to the page -----------------------------------------------------------------------


def test_a_tap_on_the_link_ends_the_paging_of_the_study_at_once(tmp_path, monkeypatch):
    """The real web UI, SQLite bus and notifier: nothing but the event of the review wakes the notifier."""
    mailbox, smtp_port = Mailbox(), free_port()
    handled = threading.Event()
    on_reviewed = Paging.on_reviewed

    def watched(paging, event):
        on_reviewed(paging, event)
        handled.set()

    monkeypatch.setattr(Paging, "on_reviewed", watched)
    with open_site(tmp_path) as unserved, served(unserved) as site:
        steps = (PagingStep(to="first@hospital.example"), PagingStep(to="second@hospital.example", after_minutes=60))
        site.config = replace(
            site.config,
            notifier=replace(
                site.config.notifier, webui_url=site.config.webui.public_url, smtp_port=smtp_port, steps=steps
            ),
        )
        event = site.add(1, occurred_at=utc_now())
        with smtp_server(mailbox, smtp_port), running(notify, site.config):
            bus = open_bus(site.config.bus)
            bus.publish(event)
            bus.close()
            assert mailbox.arrived.wait(60)
            (address,) = re.findall(r"https?://\S+/page/\S+", mailbox.emails[0].get_body(("plain",)).get_content())
            with requests.Session() as phone:
                phone.get(address, timeout=30)
                started = time.perf_counter()
                shown = site.shown(event)
                assert "Nobody else will be paged" in phone.post(address, data=shown, timeout=30).text
                assert handled.wait(60)
            took_s = time.perf_counter() - started
            (state, by, at) = page_of(site, event)
            assert (state, by) == ("acknowledged", "pager link")
            assert at == acknowledged(site, event)[1]
            print(f"{took_s:.3f} s from the tap until the page was acknowledged")  # `pytest -s` shows it
    assert len(mailbox.emails) == 1


# --- what these tests share ------------------------------------------------------------------------------------------


def marks(page: str) -> str:
    """The text of a page, without its tags."""
    return " ".join(re.sub(r"<[^>]+>", "", page).split())


def readers(site) -> list[str]:
    with site.ledger.read() as connection:
        return list(connection.execute(select(reviews.c.reader).order_by(reviews.c.occurred_at)).scalars())


def acknowledged(site, event) -> tuple:
    statement = select(results.c.acknowledged_by, results.c.acknowledged_at).where(
        results.c.series_instance_uid == event.series_instance_uid, results.c.revision == event.revision
    )
    with site.ledger.read() as connection:
        return tuple(connection.execute(statement).one())


def page_of(site, event) -> tuple:
    statement = select(pages.c.state, pages.c.acknowledged_by, pages.c.acknowledged_at).where(
        pages.c.study_instance_uid == event.study_instance_uid
    )
    with site.ledger.read() as connection:
        return tuple(connection.execute(statement).one())

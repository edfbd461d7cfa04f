from dataclasses import replace

import pytest
from sqlalchemy import select
from webui_site import open_site, triaged

from herald import links
from herald.ledger import audit, results, reviews


@pytest.fixture
def site(tmp_path):
    with open_site(tmp_path) as site:
        yield site


def link(site, event, config=None) -> str:
    url = links.sign_link(
        config or site.config.webui, event.study_instance_uid, event.series_instance_uid, event.revision
    )
    return "/page/" + url.rpartition("/page/")[2]


def test_the_link_of_a_page_shows_the_finding_without_images_and_without_log_in(site):
    event = site.add(1)
    page = site.client().get(link(site, event)).text
    for text in ("Positive", "93 %", "Intraparenchymal", "CT-EMERGENCY", "…0001", "Open images (log in)"):
        assert text in page
    assert "ACC00001" not in page
    assert "slice/" not in page


def test_whoever_holds_the_link_acknowledges_and_the_study_is_acknowledged(site):
    event = site.add(1)
    answer = site.client().post(link(site, event), follow_redirects=True)
    assert "Nobody else will be paged" in answer.text
    assert "Acknowledged by pager link" in answer.text
    with site.ledger.read() as connection:
        (row,) = connection.execute(select(reviews)).mappings().all()
        assert connection.execute(select(results.c.acknowledged_by)).scalar_one() == "pager link"
    assert (row["action"], row["reader"]) == ("acknowledge", "pager link")


def test_a_reader_who_is_logged_in_acknowledges_under_their_name(site):
    event = site.add(1)
    site.client("rita").post(link(site, event))
    with site.ledger.read() as connection:
        assert connection.execute(select(reviews.c.reader)).scalar_one() == "rita"


def test_opening_a_link_does_not_acknowledge_but_is_audited(site):
    event = site.add(1)
    site.client().get(link(site, event))
    with site.ledger.read() as connection:
        assert connection.execute(select(reviews)).all() == []
        rows = connection.execute(select(audit.c.user, audit.c.action, audit.c.study_instance_uid)).all()
    assert [tuple(row) for row in rows] == [("pager link", "view-page", event.study_instance_uid)]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_forged_damaged_or_expired_link_is_refused_in_words(site, method, monkeypatch):
    event = site.add(1)
    good = link(site, event)
    forged = link(site, event, replace(site.config.webui, secret_key="another key"))
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
    answer = site.client().get(link(site, triaged(7)))
    assert answer.status_code == 404
    assert "has not reached the web page" in answer.text


def test_a_link_to_an_older_revision_says_so(site):
    event = site.add(1)
    site.add(1, "negative", revision=2)
    assert "a newer revision supersedes" in site.client().get(link(site, event)).text

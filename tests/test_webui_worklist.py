from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import insert
from webui_site import open_site, triaged

from herald.events import utc_now
from herald.ledger import results, series
from webui import record
from webui.record import WorklistQuery


@pytest.fixture
def site(tmp_path):
    with open_site(tmp_path) as site:
        yield site


@pytest.fixture
def shadow(tmp_path):
    with open_site(tmp_path, mode="shadow") as site:
        yield site


def accessions(site, **query) -> list[str]:
    rows = record.find_worklist(site.ledger, WorklistQuery(**query)).rows
    return [row.result.event.accession_number for row in rows]


def review(site, event, verdict: str, who: str = "rita"):
    return site.client(who).post(
        f"/series/{event.series_instance_uid}/{event.revision}/review", data={"verdict": verdict}
    )


def test_positives_that_nobody_acknowledged_come_first_then_the_newest(site):
    for number, disposition in ((1, "negative"), (2, "failed"), (3, "positive"), (4, "not_eligible"), (5, "positive")):
        site.put(triaged(number, disposition))
    assert accessions(site) == ["ACC00003", "ACC00005", "ACC00001", "ACC00002", "ACC00004"]
    review(site, triaged(3), "acknowledge")
    assert accessions(site) == ["ACC00005", "ACC00001", "ACC00002", "ACC00003", "ACC00004"]


def test_only_the_newest_revision_is_listed(site):
    site.put(replace(triaged(1), revision=2, disposition="negative"))
    site.put(triaged(1))  # posted late
    rows = record.find_worklist(site.ledger, WorklistQuery()).rows
    assert [(row.result.event.revision, row.result.event.disposition) for row in rows] == [(2, "negative")]


def test_filters_and_search_select_rows(site):
    for number, disposition in ((1, "negative"), (2, "positive"), (3, "failed")):
        site.put(triaged(number, disposition))
    review(site, triaged(1, "negative"), "agree")
    review(site, triaged(2), "acknowledge")
    assert accessions(site, disposition="failed") == ["ACC00003"]
    assert accessions(site, unreviewed=True) == ["ACC00002", "ACC00003"]  # to acknowledge is not to read
    assert accessions(site, search="acc00002") == ["ACC00002"]
    assert accessions(site, search=triaged(3).series_instance_uid) == ["ACC00003"]
    assert accessions(site, search=triaged(3).study_instance_uid) == ["ACC00003"]
    assert accessions(site, search="%") == []
    page = site.client("rita").get("/?search=ACC00002").text
    assert "ACC00002" in page
    assert "ACC00001" not in page


def test_ten_thousand_series_are_paged_by_the_server(site):
    template = triaged(1, "negative")
    body = record.json.loads(template.to_json())
    now = utc_now()
    with site.ledger.begin() as connection:
        connection.execute(
            insert(results),
            [
                {
                    "series_instance_uid": f"1.2.{i}",
                    "revision": 1,
                    "study_instance_uid": f"1.2.{i}",
                    "accession_number": f"A{i}",
                    "disposition": "negative",
                    "event": {**body, "series_instance_uid": f"1.2.{i}"},
                    "triaged_at": now - timedelta(seconds=i),
                    "posted_at": now,
                }
                for i in range(10_000)
            ],
        )
    client = site.client("rita")
    first = client.get("/").text
    assert "10000 series, page 1 of 200" in first
    assert first.count("data-series=") == record.PAGE_SIZE
    assert "page 200 of 200" in client.get("/worklist/rows?page=200").text


@pytest.mark.parametrize("page", ["0", "-1", "99", "x"])
def test_a_page_that_is_not_there_is_the_nearest_one(site, page):
    site.put(triaged(1))
    assert "ACC00001" in site.client("rita").get(f"/?page={page}").text


def test_rows_say_marks_reasons_and_review_state_in_words(site):
    site.put(triaged(1, uncertain=True))
    site.put(triaged(2, "not_eligible"))
    review(site, triaged(1), "disagree")
    page = site.client("ada").get("/").text
    for text in ("93 %", "uncertain", "header ≠ pixels", "the kernel is bone, not soft tissue", "disagreed", "by rita"):
        assert text in page


def test_what_a_sender_wrote_is_escaped(site):
    site.put(triaged(1, accession_number="<b>A</b>", scanner='"><script>x</script>'))
    page = site.client("rita").get("/").text
    assert "<b>A</b>" not in page
    assert "<script>x" not in page


def test_unchanged_rows_are_not_sent_again(site, monkeypatch):
    site.put(triaged(1))
    now = utc_now()
    monkeypatch.setattr("webui.words.utc_now", lambda: now)
    client = site.client("rita")
    first = client.get("/worklist/rows")
    again = client.get("/worklist/rows", headers={"If-None-Match": first.headers["ETag"]})
    assert (first.status_code, again.status_code, again.data) == (200, 304, b"")
    site.put(triaged(2))
    assert client.get("/worklist/rows", headers={"If-None-Match": first.headers["ETag"]}).status_code == 200


def add_series(site, number: int, revision: int = 1, **changes) -> None:
    now = utc_now()
    values = {
        "series_instance_uid": triaged(number).series_instance_uid,
        "revision": revision,
        "study_instance_uid": triaged(number).study_instance_uid,
        "accession_number": f"ACC{number:05d}",
        "instance_count": 7,
        "first_image_at": now,
        "last_image_at": now - timedelta(minutes=3, seconds=number),
        "closed_at": now,
        "published_at": now,
    }
    with site.ledger.begin() as connection:
        connection.execute(series.insert().values(**{**values, **changes}))


def test_series_without_a_result_are_shown_with_their_step_and_age(site):
    add_series(site, 1, closed_at=None, published_at=None)
    add_series(site, 2, published_at=None)
    add_series(site, 3)
    add_series(site, 4)
    site.put(triaged(4))
    add_series(site, 4, revision=2)
    items, count = record.find_in_flight(site.ledger)
    assert count == 4
    assert [(item.accession_number, item.revision, item.step) for item in items] == [
        ("ACC00001", 1, "receiving images"),
        ("ACC00002", 1, "complete, waiting for the bus"),
        ("ACC00003", 1, "in analysis"),
        ("ACC00004", 2, "in analysis"),
    ]
    page = site.client("rita").get("/").text
    assert "receiving images" in page
    assert "3 min" in page


def test_next_goes_through_unread_analysed_series_and_then_says_so(site):
    site.put(triaged(1, "not_eligible"))
    site.put(triaged(2, "negative"))
    site.put(triaged(3, "positive"))
    client = site.client("rita")
    assert triaged(3).series_instance_uid in client.get("/next").location
    assert triaged(2).series_instance_uid in client.get(f"/next?after={triaged(3).series_instance_uid}").location
    review(site, triaged(3), "agree")
    review(site, triaged(2, "negative"), "agree")
    assert "Nothing is left to read." in client.get("/next", follow_redirects=True).text


def test_in_shadow_mode_neither_words_nor_order_tell_a_reader_the_prediction(shadow):
    shadow.put(triaged(1, "negative"))
    shadow.put(triaged(2, "positive"))
    shadow.put(triaged(3, "failed"))
    page = shadow.client("rita").get("/").text
    assert page.index("ACC00001") < page.index("ACC00002") < page.index("ACC00003")
    assert page.count("to be read") == 2
    for telling in ("Positive", "Negative", "93 %", "2 %", "urgent", 'value="positive"'):
        assert telling not in page
    assert "Failed" in page
    both = shadow.client("rita").get("/?disposition=positive").text
    assert "ACC00001" in both  # a filter would tell it, too
    assert 'data-unacknowledged="0"' in page


def test_in_shadow_mode_a_reader_sees_what_they_judged_and_others_see_all(shadow):
    event = shadow.add(2, "positive")
    shadow.put(triaged(1, "negative"))
    review(shadow, event, "haemorrhage")
    page = shadow.client("rita").get("/").text
    assert page.count("to be read") == 1
    assert "93 %" in page
    for who in ("remi", "ada"):
        assert "to be read" not in shadow.client(who).get("/").text


def test_in_shadow_mode_each_reader_has_their_own_unread_list(shadow):
    from webui.users import add_user

    add_user(shadow.ledger, "rosa", "a password for tests", "reader")
    event = shadow.add(1)
    review(shadow, event, "haemorrhage")
    assert shadow.client("rita").get("/next").location == "/"
    assert event.series_instance_uid in shadow.client("rosa").get("/next").location
    assert "to be read" in shadow.client("rosa").get("/").text
    assert "agreed" not in shadow.client("rosa").get("/").text

import html
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.parse import quote_from_bytes, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update
from webui_site import open_site, triaged

from herald.config import LedgerConfig
from herald.events import Finding, utc_now
from herald.ledger import open_ledger, results, series
from webui import record
from webui.record import WorklistQuery


def accessions(site, **query) -> list[str]:
    rows = record.find_worklist(site.ledger, WorklistQuery(**query)).rows
    return [row.result.event.accession_number for row in rows]


def review(site, event, verdict: str, who: str = "rita"):
    return site.client(who).post(
        f"/series/{event.series_instance_uid}/{event.revision}/review", data={"verdict": verdict, **site.shown(event)}
    )


def test_positives_that_nobody_acknowledged_come_first_with_the_longest_wait_on_top_then_the_newest(site):
    for number, disposition in ((1, "negative"), (2, "failed"), (3, "positive"), (4, "not_eligible"), (5, "positive")):
        site.put(triaged(number, disposition))
    assert accessions(site) == ["ACC00005", "ACC00003", "ACC00001", "ACC00002", "ACC00004"]  # 5 is the oldest
    review(site, triaged(5), "acknowledge")
    assert accessions(site) == ["ACC00003", "ACC00001", "ACC00002", "ACC00004", "ACC00005"]


def test_an_order_over_pages_shows_every_series_once(site, monkeypatch):
    monkeypatch.setattr(record, "PAGE_SIZE", 3)
    for number in range(1, 9):
        site.put(triaged(number, "positive" if number % 2 else "negative"))
    assert [accessions(site, page=page) for page in (1, 2, 3)] == [
        ["ACC00007", "ACC00005", "ACC00003"],
        ["ACC00001", "ACC00002", "ACC00004"],
        ["ACC00006", "ACC00008"],
    ]


def columns(ledger) -> list[tuple[bool | None, str | None, bool | None]]:
    """superseded, leading_finding and disagreement, by series and revision."""
    of = (results.c.superseded, results.c.leading_finding, results.c.disagreement)
    statement = select(*of).order_by(results.c.series_instance_uid, results.c.revision)
    with ledger.read() as connection:
        return [tuple(row) for row in connection.execute(statement)]


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_only_the_newest_revision_is_listed_in_whatever_order_they_are_posted(site, order):
    for revision in order:
        site.put(triaged(1, ("positive", "not_eligible", "negative")[revision - 1], revision=revision))
    assert listed_revisions(site) == [(3, "negative")]
    assert columns(site.ledger) == [(True, "iph", True), (True, None, False), (False, None, True)]


def listed_revisions(site) -> list[tuple[int, str]]:
    rows = record.find_worklist(site.ledger, WorklistQuery()).rows
    return [(row.result.event.revision, row.result.event.disposition) for row in rows]


@pytest.mark.parametrize("newer", ["failed", "not_eligible"])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_positive_that_nobody_acknowledged_stays_until_a_newer_revision_is_analysed_or_somebody_does(
    site, newer, order
):
    for revision in order:
        site.put(triaged(1, "positive" if revision == 1 else newer, revision=revision))
    assert record.find_worklist(site.ledger, WorklistQuery()).unacknowledged == 1
    assert listed_revisions(site) == [(1, "positive"), (2, newer)]
    assert f"{triaged(1).series_instance_uid}/1" in site.client("rita").get("/next").location
    review(site, triaged(1), "acknowledge")
    assert listed_revisions(site) == [(2, newer)]


@pytest.mark.parametrize("analysed", ["positive", "negative"])
def test_a_positive_that_waits_behind_a_failure_gives_way_to_a_newer_analysis(site, analysed):
    for revision, disposition in ((1, "positive"), (2, "failed"), (3, analysed)):
        site.put(triaged(1, disposition, revision=revision))
    assert listed_revisions(site) == [(3, analysed)]


@pytest.mark.parametrize("disposition", ["positive", "negative"])
def test_in_shadow_mode_an_older_revision_that_is_listed_tells_nothing(shadow, disposition):
    shadow.put(triaged(1, disposition))
    shadow.put(triaged(1, "failed", revision=2))
    assert sorted(listed_revisions(shadow)) == [(1, disposition), (2, "failed")]


def test_a_positive_that_an_earlier_version_hid_behind_a_failure_is_listed_again(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    for revision, disposition in ((1, "positive"), (2, "failed")):
        record.upsert_result(ledger, triaged(1, disposition, revision=revision))
    with ledger.begin() as connection:
        connection.execute(update(results).where(results.c.revision == 1).values(superseded=True))
    assert record.complete_results(ledger) == 1
    assert [superseded for superseded, _, _ in columns(ledger)] == [False, False]
    ledger.close()


# --- the same revision once more -------------------------------------------------------------------------------------


def test_a_positive_in_the_place_of_a_failure_that_was_read_is_urgent_and_unread(site):
    client = site.client("rita")
    site.put(triaged(1, "failed"))
    for verdict in ("acknowledge", "agree"):
        review(site, triaged(1), verdict)
    (before,) = record.find_worklist(site.ledger, WorklistQuery()).rows
    assert site.put(triaged(1)).status_code == 200
    worklist = record.find_worklist(site.ledger, WorklistQuery(unreviewed=True))
    (row,) = worklist.rows
    assert (worklist.unacknowledged, row.verdict, row.result.acknowledged_by) == (1, None, None)
    assert worklist.newest_positive_at == row.result.posted_at > before.result.posted_at
    page = client.get(f"/series/{triaged(1).series_instance_uid}/1").text
    assert page.count("of an earlier result") >= 2
    assert "taken back" not in page
    assert 'value="acknowledge"' in page


def test_whether_a_result_is_read_blind_is_decided_anew_when_its_disposition_changes(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    for event, blind, kept in (
        (triaged(1, "failed"), record.OPEN, record.OPEN),
        (triaged(1), record.SHADOW, record.SHADOW),
        (triaged(1), record.OPEN, record.SHADOW),
    ):
        record.upsert_result(ledger, event, blind)
        with ledger.read() as connection:
            assert connection.execute(select(results.c.blind)).scalar_one() == kept
    ledger.close()


def test_a_positive_takes_the_place_of_a_failure_though_another_host_s_clock_was_ahead(site):
    positive = triaged(1)
    site.put(replace(triaged(1, "failed"), occurred_at=positive.occurred_at + timedelta(minutes=5)))
    site.put(positive)
    assert record.find_worklist(site.ledger, WorklistQuery()).unacknowledged == 1


def test_an_earlier_result_that_is_delivered_once_more_changes_nothing(site):
    failed, positive = triaged(1, "failed"), triaged(1)
    for event in (failed, positive):
        site.put(event)
    review(site, positive, "agree")
    with site.ledger.read() as connection:
        before = connection.execute(select(results)).all()
    assert site.put(failed).status_code == 200
    with site.ledger.read() as connection:
        assert connection.execute(select(results)).all() == before
    (row,) = record.find_worklist(site.ledger, WorklistQuery()).rows
    assert row.verdict.action == "agree"


def test_results_of_an_earlier_version_are_listed_and_then_completed(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    for revision in (1, 2):
        record.upsert_result(ledger, triaged(1, revision=revision))
    record.upsert_result(ledger, triaged(2))
    with ledger.begin() as connection:
        connection.execute(update(results).values(superseded=None, leading_finding=None, disagreement=None))
    assert record.find_worklist(ledger, WorklistQuery()).total == 3
    assert record.complete_results(ledger) == 3
    assert record.complete_results(ledger) == 0
    assert columns(ledger) == [(True, "iph", True), (False, "iph", True), (False, "iph", True)]
    found = record.find_worklist(ledger, WorklistQuery(finding="iph", disagreement=True))
    assert [(row.result.event.series_instance_uid, row.result.event.revision) for row in found.rows] == [
        (triaged(2).series_instance_uid, 1),
        (triaged(1).series_instance_uid, 2),
    ]
    ledger.close()


@pytest.mark.parametrize(
    ("probabilities", "leading"),
    [({"any": 0.99, "sah": 0.4, "ivh": 0.6}, "ivh"), ({"any": 0.9}, "any"), ({}, None)],
)
def test_the_leading_finding_is_the_most_probable_kind_of_a_positive(probabilities, leading):
    findings = tuple(Finding(kind, chance, 1.0, 1, "1.2") for kind, chance in probabilities.items())
    assert record.leading_finding(triaged(1, findings=findings)) == leading
    assert record.leading_finding(triaged(1, "negative", findings=findings)) is None


def test_filters_and_search_select_rows(site):
    for number, disposition in ((1, "negative"), (2, "positive"), (3, "failed")):
        site.put(triaged(number, disposition))
    review(site, triaged(1, "negative"), "agree")
    review(site, triaged(2), "acknowledge")
    assert accessions(site, disposition="failed") == ["ACC00003"]
    assert accessions(site, unreviewed=True) == ["ACC00002", "ACC00003"]  # to acknowledge is not to read
    assert accessions(site, search=triaged(3).series_instance_uid) == ["ACC00003"]


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MIDNIGHT = datetime(2026, 3, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Five series: bleeds of two kinds, two scanners, two days."""
    with open_site(tmp_path_factory.mktemp("many")) as site:
        site.put(triaged(1, "positive", scanner="CT 1", occurred_at=NOON))
        subarachnoid = tuple(
            replace(finding, probability=0.91) if finding.kind == "sah" else finding for finding in triaged(2).findings
        )
        site.put(triaged(2, "positive", scanner="CT 2", findings=subarachnoid, occurred_at=MIDNIGHT))
        site.put(triaged(3, "negative", scanner="CT 2", occurred_at=MIDNIGHT - timedelta(microseconds=1)))
        site.put(triaged(4, "not_eligible", scanner="CT <2>", occurred_at=NOON))
        site.put(triaged(5, "negative", scanner="CT 1", disagreements=(), occurred_at=NOON))
        review(site, triaged(3, "negative"), "agree")
        yield site


@pytest.fixture(scope="module")
def rita(many):
    return many.client("rita")


def rows_url(page: str) -> str:
    """Where the page will ask for its rows."""
    return html.unescape(re.findall(r'id="rows" data-url="([^"]+)"', page)[0])


def listed(page: str) -> set[int]:
    return {int(number) for number in re.findall(r">ACC0*(\d+)</a>", page)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {1, 2, 3, 4, 5}),
        ({"disposition": "negative"}, {3, 5}),
        ({"finding": "iph"}, {1}),
        ({"finding": "sah"}, {2}),
        ({"finding": "ivh"}, set()),
        ({"scanner": "CT 2"}, {2, 3}),
        ({"scanner": "CT <2>"}, {4}),
        ({"from": "2026-03-02"}, {2}),
        ({"to": "2026-03-01"}, {1, 3, 4, 5}),
        ({"from": "2026-03-01", "to": "2026-03-01"}, {1, 3, 4, 5}),
        ({"from": "2026-03-03", "to": "2026-03-01"}, set()),
        ({"unreviewed": "1"}, {1, 2, 4, 5}),
        ({"disagreement": "1"}, {1, 2, 3}),
        ({"search": "acc00002"}, {2}),
        ({"search": triaged(3).study_instance_uid}, {3}),
        ({"search": "%"}, set()),
        ({"disposition": "negative", "scanner": "CT 1", "unreviewed": "1", "to": "9999-12-31"}, {5}),
        ({"finding": "", "from": "", "scanner": "", "page": ""}, {1, 2, 3, 4, 5}),
    ],
)
def test_an_address_selects_rows_and_the_form_shows_what_it_asks(rita, asked, expected):
    page = rita.get("/", query_string=asked).text
    assert listed(page) == expected
    assert "left out" not in page
    assert listed(rita.get(rows_url(page)).text) == expected
    for name, value in asked.items():
        if name in ("unreviewed", "disagreement"):
            assert re.search(f'name="{name}" value="1" checked', page)
        elif value:
            chosen = re.escape(html.escape(value))
            assert re.search(f'value="{chosen}" selected|name="{name}"[^>]* value="{chosen}"', page)
    assert ('<details class="more" open' in page) == any(
        asked.get(name) for name in ("finding", "scanner", "from", "to", "disagreement")
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"disposition": "nonsense"}, "Disposition “nonsense” was left out: it is not one of the choices."),
        ({"finding": "any"}, "Finding “any” was left out: it is not one of the choices."),
        ({"scanner": "<b>"}, "Scanner “<b>” was left out: it is not one of the choices."),
        ({"from": "yesterday"}, "From “yesterday” was left out: a day is written as in 2026-01-31."),
        ({"to": "2026-02-30"}, "To “2026-02-30” was left out: a day is written as in 2026-01-31."),
        ({"to": "10000-01-01"}, "To “10000-01-01” was left out"),
        ({"unreviewed": "yes"}, "Not yet reviewed “yes” was left out: it is 1 or nothing."),
        ({"search": "a\x00b"}, "Search “a�b” was left out"),
        ({"search": "x" * 65}, f"Search “{'x' * 40}” was left out"),
        ({"page": "two"}, "Page “two” was left out: it is not a number."),
    ],
)
def test_what_cannot_be_understood_is_left_out_and_said(rita, asked, said):
    page = rita.get("/", query_string=asked).text
    assert said in html.unescape(page)
    assert listed(page) == {1, 2, 3, 4, 5}
    assert next(iter(asked)) not in rows_url(page)


names = st.sampled_from(
    ["disposition", "finding", "scanner", "from", "to", "unreviewed", "disagreement", "search", "page"]
)
values = st.one_of(
    st.text(max_size=80), st.integers().map(str), st.dates().map(str), st.sampled_from(["1", "positive"])
)


@given(
    asked=st.lists(st.tuples(st.one_of(names, st.text(max_size=12)), values), max_size=6), raw=st.binary(max_size=40)
)
@settings(max_examples=40, deadline=None)
def test_no_address_whatsoever_is_an_error(rita, asked, raw):
    for query in (urlencode(asked, errors="replace"), quote_from_bytes(raw, safe="&=%+")):
        for path in ("/", "/worklist/rows"):
            assert rita.get(f"{path}?{query}").status_code == 200


def test_paging_keeps_the_filters(rita, monkeypatch):
    monkeypatch.setattr(record, "PAGE_SIZE", 1)
    seen = set()
    page = rita.get("/?scanner=CT+2&to=2026-03-02&nonsense=1").text
    seen |= listed(page)
    (following,) = re.findall(r'rel="next" href="([^"]+)"', page)
    assert "nonsense" not in following
    page = rita.get(html.unescape(following)).text
    seen |= listed(page)
    assert seen == {2, 3}
    assert "page 2 of 2" in page
    assert 'rel="next" href' not in page
    assert "page=2" in rows_url(page)


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
    assert (
        triaged(2).series_instance_uid
        in client.get(f"/next?after={triaged(3).series_instance_uid}&revision=1").location
    )
    review(site, triaged(3), "agree")
    review(site, triaged(2, "negative"), "agree")
    assert "Nothing is left to read." in client.get("/next", follow_redirects=True).text


@pytest.mark.parametrize(
    ("of_revisions", "at", "then"), [(("positive", "failed"), 2, 1), (("negative", "positive"), 1, 2)]
)
def test_next_passes_over_the_result_that_one_comes_from_and_over_no_other_revision_of_its_series(
    site, of_revisions, at, then
):
    for revision, disposition in enumerate(of_revisions, start=1):
        site.add(1, disposition, revision=revision)
    client, series = site.client("rita"), f"/series/{triaged(1).series_instance_uid}"
    (following,) = re.findall(r'id="next" [^>]*href="([^"]+)"', client.get(f"{series}/{at}").text)
    assert client.get(html.unescape(following)).location == f"{series}/{then}"
    (following,) = re.findall(r'id="next" [^>]*href="([^"]+)"', client.get(f"{series}/{then}").text)
    assert client.get(html.unescape(following)).location == "/"


def test_in_shadow_mode_neither_words_nor_order_tell_a_reader_the_prediction(shadow):
    shadow.put(triaged(1, "negative"))
    shadow.put(triaged(2, "positive"))
    shadow.put(triaged(3, "failed"))
    page = shadow.client("rita").get("/").text
    assert page.index("ACC00001") < page.index("ACC00002") < page.index("ACC00003")
    assert page.count("to be read") == 2
    for telling in ("Positive", "Negative", "93 %", "2 %", "urgent", 'value="positive"', "Leading finding", "Sound"):
        assert telling not in page
    assert "Failed" in page
    for filter_ in ("disposition=positive", "finding=iph"):
        both = shadow.client("rita").get(f"/?{filter_}").text
        assert {"ACC00001", "ACC00002"} <= set(re.findall(r"ACC\d+", both))  # a filter would tell it, too
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

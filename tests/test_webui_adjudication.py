"""The adjudication queue: which studies wait, who may decide, what a decision changes, and who is told what."""

import re
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert, select, text
from validation_ledger import NOON, Month, study_of
from webui_site import Site, open_site

from herald.events import SeriesTriaged, utc_now
from herald.ledger import adjudications, audit, labels
from herald.validation.collect import collect
from webui import adjudication, record


def label(site: Site, event: SeriesTriaged, haemorrhage: bool, source: str, kind: str = "label") -> None:
    with site.ledger.begin() as connection:
        given = {"accession_number": event.accession_number, "haemorrhage": haemorrhage, "source": source}
        connection.execute(insert(labels).values(**given, kind=kind, imported_at=utc_now()))


def read(site: Site, event: SeriesTriaged, action: str, reader: str, kind: str | None = None) -> None:
    record.add_review(site.ledger, event, action, reader, prediction_shown=True, finding_kind=kind)  # type: ignore[arg-type]


def address(event: SeriesTriaged) -> str:
    return f"/adjudication/{event.study_instance_uid}"


def waiting(page: str) -> list[str]:
    """Accession numbers on the queue, in their order."""
    return re.findall(r'<h3 id="case-\d+"><a href="[^"]+">([^<]+)</a>', page)


def said(page: str) -> list[tuple[str, str]]:
    rows = re.findall(r'<th scope="row">([^<]+)</th><td><(?:strong|span)[^>]*>([^<]+)<', page)
    return [(who, what) for who, what in rows]


def test_studies_whose_answers_differ_wait_oldest_first_with_who_said_what(site: Site) -> None:
    old = utc_now() - timedelta(hours=3)
    first = site.add(1)
    second = site.add(2, "negative", occurred_at=old, first_image_at=old)
    agreed = site.add(3)
    site.add(4)
    read(site, first, "agree", "rita", "sah")
    label(site, first, False, "ris", "report")
    read(site, second, "agree", "rita")
    read(site, second, "disagree", "omar")
    read(site, second, "unsure", "zoe")
    read(site, agreed, "agree", "rita")
    label(site, agreed, True, "ris")
    page = site.client("ada").get("/adjudication").text
    assert waiting(page) == [second.accession_number, first.accession_number]
    assert said(page) == [
        ("rita", "no haemorrhage"),
        ("omar", "haemorrhage"),
        ("zoe", "unsure"),
        ("ris", "no haemorrhage"),
        ("rita", "haemorrhage"),
    ]
    assert "(subarachnoid)" in page
    assert "report, by rule" in page
    assert f"/series/{first.series_instance_uid}/1" in page


def test_an_answer_that_was_changed_or_taken_back_does_not_wait(site: Site) -> None:
    changed, undone = site.add(1), site.add(2)
    read(site, changed, "agree", "rita")
    read(site, changed, "disagree", "rita")
    read(site, undone, "agree", "rita")
    read(site, undone, "disagree", "omar")
    assert waiting(site.client("ada").get("/adjudication").text) == [undone.accession_number]
    with site.ledger.begin() as connection:
        connection.execute(text("update reviews set undone_at = occurred_at where reader = 'omar'"))
    assert waiting(site.client("ada").get("/adjudication").text) == []


def test_a_decision_ends_the_wait_is_added_and_audited_and_the_latest_counts(site: Site) -> None:
    event = site.add(1)
    read(site, event, "agree", "rita")
    label(site, event, False, "ris")
    client = site.client("ada")
    data = {"verdict": "haemorrhage", "finding_kind": "sah", "note": "thin, in the sulci"}
    answer = client.post(address(event), data=data, follow_redirects=True)
    assert "Decided: haemorrhage." in answer.text
    assert waiting(answer.text) == []
    assert client.post(address(event), data={"verdict": "no_haemorrhage"}).status_code == 303
    with site.ledger.read() as connection:
        columns = (adjudications.c.haemorrhage, adjudications.c.finding_kind, adjudications.c.note)
        kept = connection.execute(select(*columns).order_by(adjudications.c.adjudication_id)).all()
        actions = connection.execute(select(audit.c.action, audit.c.user, audit.c.study_instance_uid)).all()
        (row,) = collect(connection, site.config, utc_now())
    assert [tuple(one) for one in kept] == [(True, "sah", "thin, in the sulci"), (False, None, None)]
    assert [tuple(one) for one in actions].count(("adjudicate", "ada", event.study_instance_uid)) == 2
    assert row.adjudicated is False
    assert row.reference is False
    page = client.get(address(event)).text
    assert page.index("no haemorrhage</strong> by ada") < page.index("<q>thin, in the sulci</q>")


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"verdict": "agree"},
        {"verdict": "haemorrhage", "finding_kind": "stroke"},
        {"verdict": "haemorrhage", "note": "x" * 2001},
    ],
)
def test_a_decision_that_says_nothing_clear_is_refused(site: Site, data: dict[str, str]) -> None:
    event = site.add(1)
    assert site.client("rita").post(address(event), data=data).status_code == 400
    with site.ledger.read() as connection:
        assert connection.execute(select(adjudications)).all() == []


def test_a_study_that_is_not_known_can_neither_be_seen_nor_decided(site: Site) -> None:
    client = site.client("ada")
    assert client.get("/adjudication/1.2.3").status_code == 404
    assert client.post("/adjudication/1.2.3", data={"verdict": "haemorrhage"}).status_code == 404


def test_a_researcher_sees_the_queue_and_decides_nothing(site: Site) -> None:
    event = site.add(1)
    read(site, event, "agree", "rita")
    label(site, event, False, "ris")
    client = site.client("remi")
    page = client.get("/adjudication").text
    assert waiting(page) == [event.accession_number]
    assert '<form class="decide"' not in page
    assert client.post(address(event), data={"verdict": "haemorrhage"}).status_code == 403


def test_a_form_without_its_token_decides_nothing(site: Site) -> None:
    event = site.add(1)
    client = site.client("rita")
    site.app.config["WTF_CSRF_ENABLED"] = True
    assert client.post(address(event), data={"verdict": "haemorrhage"}).status_code == 400


def test_herald_s_own_answer_is_not_told(site: Site) -> None:
    event = site.add(1)
    read(site, event, "agree", "omar")
    label(site, event, False, "ris")
    for page in (site.client("ada").get("/adjudication").text, site.client("ada").get(address(event)).text):
        content = page[page.index("<main") :]
        assert "ositive" not in content.replace("answers", "")
        assert "%" not in content


def test_who_has_to_judge_first_is_not_told_what_others_said(tmp_path: Path) -> None:
    with open_site(tmp_path, mode="shadow") as site:
        event = site.add(1)
        read(site, event, "agree", "omar")
        label(site, event, False, "ris")
        reader = site.client("rita")
        for where in ("/adjudication", address(event)):
            page = reader.get(where).text
            assert "once you have read the series yourself" in page
            assert said(page) == []
            assert '<form class="decide"' not in page
        assert said(site.client("remi").get(address(event)).text)
        read(site, event, "disagree", "rita")
        assert ("rita", "no haemorrhage") in said(reader.get(address(event)).text)
        site.client("ada").post(address(event), data={"verdict": "haemorrhage"})
        assert "by ada" not in reader.get("/adjudication").text


def test_the_queue_of_ten_thousand_series_is_quick(site: Site) -> None:
    event = site.add(1)
    events = [
        replace(
            event,
            study_instance_uid=f"1.2.{number}",
            series_instance_uid=f"1.2.{number}.1",
            accession_number=f"B{number}",
        )
        for number in range(10_000)
    ]
    with site.ledger.begin() as connection:
        Month(site.ledger).post(connection, *events)
        connection.execute(
            insert(labels),
            [
                {
                    "accession_number": f"B{number}",
                    "haemorrhage": number % 100 > 0,
                    "source": source,
                    "imported_at": utc_now(),
                }
                for number in range(10_000)
                for source in (("ris", "follow-up") if number % 100 else ("ris",))
            ],
        )
    read(site, events[0], "agree", "omar")
    client = site.client("ada")
    started = time.process_time()
    assert waiting(client.get("/adjudication").text) == ["B0"]
    assert time.process_time() - started < 3


def test_the_studies_that_may_wait_are_found_in_either_database(ledger_url: str) -> None:
    with Month.opened(ledger_url) as month:
        for number in range(1, 5):
            month.triage(number, "negative" if number == 3 else "positive")
        month.review(1, "agree", "rita", NOON)
        month.label("ACC00001", False, "ris")
        month.review(2, "agree", "rita", NOON)
        month.label("ACC00002", True, "ris")
        month.review(3, "agree", "rita", NOON)
        month.review(3, "disagree", "omar", NOON)
        month.review(4, "agree", "rita", NOON)
        month.review(4, "disagree", "omar", NOON)
        month.adjudicate(4, True)
        with month.ledger.read() as connection:
            assert adjudication.find_waiting(connection) == [study_of(1), study_of(3)]

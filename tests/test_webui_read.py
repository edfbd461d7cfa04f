"""The read of a series: a verdict with kind and note, taking it back, and reading before the prediction is shown."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update
from webui_site import ROOT, Site, open_site, triaged

from herald.config import LedgerConfig, NotifierConfig, PagingSite
from herald.events import SeriesTriaged, utc_now
from herald.ledger import audit, open_ledger, results, reviews
from webui import blind, record, words

TELLING = ("Positive", "Negative", "93 %", "agreed", "disagreed", "mask=1", "Herald was")


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[Site]:
    """Live, and every series is read blind."""
    with open_site(tmp_path, blind_fraction=1.0) as site:
        yield site


def add(site: Site, number: int, disposition: str = "positive") -> SeriesTriaged:
    """A result without pictures, which take longer."""
    event = triaged(number, disposition)
    assert site.put(event).status_code == 201
    return event


def address(event: SeriesTriaged) -> str:
    return f"/series/{event.series_instance_uid}/{event.revision}"


def kept(site: Site) -> list[Any]:
    with site.ledger.read() as connection:
        return list(connection.execute(select(reviews).order_by(reviews.c.occurred_at)).mappings())


def shown_to(site: Site, name: str) -> list[str]:
    """Series of which the audit says that this user saw the prediction."""
    statement = select(audit.c.series_instance_uid).where(audit.c.action == "view-prediction", audit.c.user == name)
    with site.ledger.read() as connection:
        return list(connection.execute(statement).scalars())


def shown(event: SeriesTriaged) -> dict[str, str]:
    """What a form of a page carries on which this result is shown."""
    return {"decided_at": event.occurred_at.isoformat()}


def judge(client: Any, event: SeriesTriaged, verdict: str, **form: str) -> Any:
    return client.post(f"{address(event)}/review", data={"verdict": verdict, **shown(event), **form})


def describe(client: Any, event: SeriesTriaged, **form: str) -> Any:
    return client.post(f"{address(event)}/review/description", data={**shown(event), **form}, follow_redirects=True)


def undo(client: Any, event: SeriesTriaged) -> Any:
    return client.post(f"{address(event)}/review/undo", data=shown(event), follow_redirects=True)


# --- verdict, kind, note ---------------------------------------------------------------------------------------------


def test_kind_and_note_come_after_the_verdict_and_overwrite_nothing(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    asked = judge(client, event, "agree")
    assert asked.location == f"{address(event)}?describe=1"
    assert "Which kind of haemorrhage?" in client.get(asked.location).text
    assert "Recorded: agreed, subarachnoid." in describe(client, event, finding_kind="sah", note=" left ").text
    first, second = kept(site)
    assert (first["action"], first["finding_kind"], first["note"]) == ("agree", None, None)
    assert (second["action"], second["finding_kind"], second["note"]) == ("agree", "sah", "left")
    assert first["undone_at"] is second["undone_at"] is None
    site.publisher.publish_pending()
    assert [getattr(said, "action", None) for said in site.bus.published] == ["agree", "agree"]
    page = client.get(address(event)).text
    assert "agreed: subarachnoid" in page
    assert "Earlier (1)" in page


def test_a_note_that_is_added_later_keeps_the_kind(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree", finding_kind="iph")
    describe(client, event, note="thalamus")
    assert (kept(site)[-1]["finding_kind"], kept(site)[-1]["note"]) == ("iph", "thalamus")


@pytest.mark.parametrize("form", [{}, {"finding_kind": "iph"}, {"finding_kind": "", "note": "  "}])
def test_a_description_that_changes_nothing_leaves_no_second_row(site: Site, form: dict[str, str]) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree", finding_kind="iph")
    describe(client, event, **form)
    assert len(kept(site)) == 1


def test_without_a_verdict_there_is_nothing_to_describe(site: Site) -> None:
    event = add(site, 1)
    judge(site.client("ada"), event, "agree", finding_kind="iph")
    assert "Nothing was added" in describe(site.client("rita"), event, finding_kind="sah").text
    assert len(kept(site)) == 1


@pytest.mark.parametrize(
    ("disposition", "verdict", "asks"),
    [
        ("positive", "agree", True),
        ("positive", "disagree", False),
        ("negative", "agree", False),
        ("negative", "disagree", True),
        ("positive", "unsure", False),
        ("not_eligible", "disagree", False),
    ],
)
def test_the_kind_is_asked_only_of_who_says_that_there_is_haemorrhage(
    site: Site, disposition: str, verdict: str, asks: bool
) -> None:
    event = add(site, 1, disposition)
    assert judge(site.client("rita"), event, verdict).location.endswith("?describe=1") is asks


@pytest.mark.parametrize("form", [{"finding_kind": "tumour"}, {"note": "x" * 2001}])
def test_a_description_that_makes_no_sense_is_refused(site: Site, form: dict[str, str]) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree", finding_kind="iph")
    assert describe(client, event, **form).status_code == 400
    assert len(kept(site)) == 1


def test_a_verdict_tells_when_its_reader_first_opened_the_series(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    site.client("ada").get(address(event))
    client.get(address(event))
    client.get(address(event))
    judge(client, event, "agree")
    with site.ledger.read() as connection:
        views = select(audit.c.occurred_at).where(audit.c.action == "view-series", audit.c.user == "rita")
        first, _ = connection.execute(views.order_by(audit.c.occurred_at)).scalars().all()
    (row,) = kept(site)
    assert row["opened_at"] == first
    assert row["opened_at"] < row["occurred_at"]


# --- undo ------------------------------------------------------------------------------------------------------------


def test_a_verdict_taken_back_stays_in_the_record_and_counts_no_more(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree")
    describe(client, event, finding_kind="sah")
    told = undo(client, event).text
    assert "counts no more, and stays in the record" in told
    assert "taken back" in told
    rows = kept(site)
    assert [row["action"] for row in rows] == ["agree", "agree"]
    assert all(row["undone_at"] for row in rows)
    (line,) = record.find_worklist(site.ledger, record.WorklistQuery(unreviewed=True)).rows
    assert line.verdict is None
    assert client.get("/next").location == address(event)
    judge(client, event, "disagree")
    (line,) = record.find_worklist(site.ledger, record.WorklistQuery()).rows
    assert line.verdict is not None
    assert line.verdict.action == "disagree"


def test_taking_a_verdict_back_ends_no_acknowledgement_and_keeps_what_the_bus_was_told(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree")
    assert "stays acknowledged" in undo(client, event).text
    with site.ledger.read() as connection:
        assert connection.execute(select(results.c.acknowledged_by)).scalar_one() == "rita"
    site.publisher.publish_pending()  # the bus was down until now: paging must still end
    assert len(site.bus.published) == 1


def test_nobody_takes_back_what_another_said(site: Site) -> None:
    event = add(site, 1)
    judge(site.client("ada"), event, "agree")
    assert "no verdict of yours" in undo(site.client("rita"), event).text
    assert kept(site)[0]["undone_at"] is None


def test_an_acknowledgement_is_not_taken_back(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "acknowledge")
    judge(client, event, "agree")
    undo(client, event)
    assert [bool(row["undone_at"]) for row in kept(site)] == [False, True]


def test_the_timeline_tells_of_a_verdict_and_of_its_end(site: Site) -> None:
    event, client = add(site, 1), site.client("rita")
    judge(client, event, "agree")
    undo(client, event)
    page = client.get(address(event)).text
    assert page.index("rita: agreed") < page.index("rita: verdict taken back")


# --- a result that has changed since the page was loaded --------------------------------------------------------------


def acknowledged(site: Site) -> list[str | None]:
    with site.ledger.read() as connection:
        return list(connection.execute(select(results.c.acknowledged_by)).scalars())


@pytest.mark.parametrize("before", ["failed", "negative", "positive"])
@pytest.mark.parametrize("verdict", ["acknowledge", "agree", "disagree", "unsure"])
def test_a_button_of_a_page_that_shows_an_earlier_result_records_nothing_and_shows_the_one_that_came(
    site: Site, before: str, verdict: str
) -> None:
    seen, client = add(site, 1, before), site.client("rita")
    now = replace(triaged(1), occurred_at=utc_now())
    assert site.put(now).status_code == 200
    answer = judge(client, seen, verdict)
    assert answer.status_code == 409
    assert f"This result changed at {changed_at(site)} after the page was loaded: look again." in answer.text
    assert "93 %" in answer.text
    assert (kept(site), acknowledged(site)) == ([], [None])
    assert f'name="decided_at" value="{now.occurred_at.isoformat()}"' in answer.text  # what is shown can be answered
    assert judge(client, now, verdict).status_code == 303
    assert ([row["action"] for row in kept(site)], acknowledged(site)) == ([verdict], ["rita"])


def changed_at(site: Site) -> str:
    with site.ledger.read() as connection:
        return words.clock(max(connection.execute(select(results.c.posted_at, results.c.triaged_at)).one()))


def test_kind_note_and_undo_of_an_earlier_result_change_nothing(site: Site) -> None:
    seen, client = add(site, 1), site.client("rita")
    judge(client, seen, "agree")
    site.put(replace(seen, occurred_at=utc_now()))  # a positive as before: what was said of it stands
    for answer in (describe(client, seen, finding_kind="sah"), undo(client, seen)):
        assert answer.status_code == 409
        assert "This result changed at" in answer.text
    (row,) = kept(site)
    assert (row["finding_kind"], row["undone_at"]) == (None, None)


def test_the_same_result_delivered_once_more_is_no_other_result(site: Site) -> None:
    event = add(site, 1)
    site.put(event)
    assert judge(site.client("rita"), event, "acknowledge").status_code == 303


@pytest.mark.parametrize("field", [{}, {"decided_at": ""}])
@pytest.mark.parametrize("way", ["review", "review/description", "review/undo", "link"])
def test_a_form_that_does_not_say_which_result_it_showed_is_refused(
    site: Site, way: str, field: dict[str, str]
) -> None:
    event, client = add(site, 1), site.client("rita")
    where = site.link(event) if way == "link" else f"{address(event)}/{way}"
    answer = client.post(where, data={"verdict": "acknowledge" * (way == "review"), **field})
    assert answer.status_code == 409
    assert "does not say which result it showed: look again. Nothing was recorded." in answer.text
    assert (kept(site), acknowledged(site)) == ([], [None])


def test_a_script_is_told_of_the_conflict_and_the_page_that_it_loads_says_so_once(site: Site) -> None:
    seen, client = add(site, 1, "failed"), site.client("rita")
    site.put(triaged(1))
    form = {"verdict": "acknowledge", **shown(seen)}
    assert client.post(f"{address(seen)}/review", data=form, headers={"X-Fragment": "read"}).status_code == 409
    assert "This result changed at" in client.get(address(seen)).text
    assert "This result changed at" not in client.get(address(seen)).text


def test_the_part_that_a_script_puts_in_place_still_answers_the_result_that_the_page_shows(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, client = add(site, 1), site.client("rita")
    add_review = record.add_review

    def and_then_it_changes(*args: Any, **kwargs: Any) -> Any:
        given = add_review(*args, **kwargs)
        site.put(replace(seen, occurred_at=utc_now()))
        return given

    monkeypatch.setattr(record, "add_review", and_then_it_changes)
    form = {"verdict": "acknowledge", **shown(seen)}
    part = client.post(f"{address(seen)}/review", data=form, headers={"X-Fragment": "read"})
    assert f'name="decided_at" value="{shown(seen)["decided_at"]}"' in part.text


def test_a_blind_reader_is_told_of_the_change_and_not_of_the_prediction(shadow: Site) -> None:
    seen, client = add(shadow, 1, "negative"), shadow.client("rita")
    shadow.put(triaged(1))
    answer = judge(client, seen, "no_haemorrhage")
    assert answer.status_code == 409
    assert "This result changed at" in answer.text
    assert not [word for word in TELLING if word in answer.text]
    assert (kept(shadow), shown_to(shadow, "rita")) == ([], [])


def test_a_result_that_changes_while_the_answer_is_recorded_takes_the_answer_back(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    seen = triaged(1, "failed")
    for event in (seen, triaged(1)):
        record.upsert_result(ledger, event)
    with pytest.raises(record.ResultChanged, match="look again"):
        record.add_review(ledger, seen, "acknowledge", "rita", prediction_shown=True)
    with ledger.read() as connection:
        assert connection.execute(select(reviews)).all() == []
        assert connection.execute(select(results.c.acknowledged_at)).scalar_one() is None
    ledger.close()


@pytest.mark.parametrize("verdict", ["", "agree"])
def test_the_link_of_a_page_acknowledges_and_judges_no_result_that_came_after_it_was_opened(
    site: Site, verdict: str
) -> None:
    seen = add(site, 1, "failed")
    site.put(triaged(1))
    client = site.client("rita" if verdict else None)
    answer = client.post(site.link(seen), data={"verdict": verdict, **shown(seen)})
    assert answer.status_code == 409
    assert "This result changed at" in answer.text
    assert "93 %" in answer.text
    assert (kept(site), acknowledged(site)) == ([], [None])
    (again,) = {*re.findall(r'name="decided_at" value="([^"]+)"', answer.text)}
    assert client.post(site.link(seen), data={"verdict": verdict, "decided_at": again}).status_code == 303
    assert acknowledged(site) == ["rita" if verdict else "pager link"]


# --- who was shown what, and when ------------------------------------------------------------------------------------


def test_the_first_time_that_a_prediction_is_shown_is_audited_once_for_each_reader(site: Site) -> None:
    event = add(site, 1)
    for name in ("rita", "rita", "remi"):
        site.client(name).get(address(event))
    assert shown_to(site, "rita") == shown_to(site, "remi") == [event.series_instance_uid]
    site.client("rita").get(address(add(site, 2, "not_eligible")))  # there is no prediction
    assert shown_to(site, "rita") == [event.series_instance_uid]


def test_a_blind_verdict_comes_before_the_first_view_of_the_prediction_in_the_ledger(shadow: Site) -> None:
    event, client = add(shadow, 1), shadow.client("rita")
    client.get("/")
    client.get(address(event))
    assert shown_to(shadow, "rita") == []
    judge(client, event, "haemorrhage")
    describe(client, event, finding_kind="iph")  # leads on to the page, which shows the prediction
    judge(client, event, "disagree")
    first, second, third = kept(shadow)
    assert [row["prediction_shown"] for row in (first, second, third)] == [False, False, True]
    assert (first["finding_kind"], second["finding_kind"]) == ("any", "iph")
    with shadow.ledger.read() as connection:
        (seen_at,) = connection.execute(
            select(audit.c.occurred_at).where(audit.c.action == "view-prediction")
        ).scalars()
    assert first["opened_at"] < first["occurred_at"] < second["occurred_at"] < seen_at < third["occurred_at"]


@pytest.mark.parametrize(("form", "informed"), [({"note": "thalamus"}, False), ({"finding_kind": "iph"}, True)])
def test_what_is_added_to_a_blind_verdict_after_the_prediction_was_shown_says_so_of_a_kind_and_not_of_a_note(
    shadow: Site, form: dict[str, str], informed: bool
) -> None:
    event, client = add(shadow, 1), shadow.client("rita")
    judge(client, event, "haemorrhage")
    client.get(address(event))
    describe(client, event, **form)
    assert [row["prediction_shown"] for row in kept(shadow)] == [False, informed]


def test_a_blind_reader_who_is_asked_for_the_kind_is_still_shown_nothing(shadow: Site) -> None:
    event, client = shadow.add(1), shadow.client("rita")
    page = client.get(judge(client, event, "haemorrhage").location).text
    assert "Which kind of haemorrhage?" in page
    assert not [word for word in TELLING if word in page]
    mask = f"{address(event)}/slice/8.png?mask=1"
    assert client.get(mask).status_code == 403  # only the page shows the prediction, since it notes that
    assert "93 %" in client.get(address(event)).text
    assert client.get(mask).status_code == 200


@pytest.mark.parametrize("disposition", ["positive", "negative"])
@pytest.mark.parametrize("verdict", ["haemorrhage", "no_haemorrhage", "unsure"])
def test_the_part_of_the_page_that_a_script_puts_in_place_tells_a_blind_reader_nothing(
    shadow: Site, disposition: str, verdict: str
) -> None:
    event, client = add(shadow, 1, disposition), shadow.client("rita")
    form = {"verdict": verdict, **shown(event)}
    part = client.post(f"{address(event)}/review", data=form, headers={"X-Fragment": "read"})
    assert part.status_code == 200
    assert "<html" not in part.text
    assert not [word for word in TELLING if word in part.text]
    assert shown_to(shadow, "rita") == []


def test_who_takes_a_blind_verdict_back_before_the_prediction_was_shown_is_blind_again(shadow: Site) -> None:
    event, client = add(shadow, 1), shadow.client("rita")
    judge(client, event, "haemorrhage")
    client.post(f"{address(event)}/review/undo", data=shown(event))
    assert "93 %" not in client.get(address(event)).text
    judge(client, event, "no_haemorrhage")
    assert [row["prediction_shown"] for row in kept(shadow)] == [False, False]


def test_who_takes_a_blind_verdict_back_after_the_prediction_was_shown_is_blind_no_more(shadow: Site) -> None:
    event, client = add(shadow, 1), shadow.client("rita")
    judge(client, event, "haemorrhage")
    client.get(address(event))
    assert "93 %" in undo(client, event).text
    judge(client, event, "disagree")
    assert [row["prediction_shown"] for row in kept(shadow)] == [False, True]


def test_a_prediction_seen_on_the_worklist_or_by_the_link_of_a_page_is_audited_too(drawn: Site) -> None:
    event = add(drawn, 1)
    drawn.client("rita").get("/")
    drawn.client("ada").get(drawn.link(event))
    assert shown_to(drawn, "rita") == shown_to(drawn, "ada") == [event.series_instance_uid]


# --- which series are read blind -------------------------------------------------------------------------------------


def test_the_fraction_of_series_is_drawn_by_a_secret_and_alike_for_every_revision(site: Site) -> None:
    config = replace(site.config, webui=replace(site.config.webui, blind_fraction=0.3))
    another = replace(config, webui=replace(config.webui, secret_key="another"))
    events = [replace(triaged(1), series_instance_uid=f"{ROOT}.{n}") for n in range(2000)]
    taken = [blind.drawn(config, event) == record.CHOSEN for event in events]
    assert 0.26 < sum(taken) / len(taken) < 0.34  # 4 standard deviations
    assert [blind.drawn(config, replace(event, revision=2)) == record.CHOSEN for event in events] == taken
    otherwise = [blind.drawn(another, event) == record.CHOSEN for event in events]
    both = sum(a and b for a, b in zip(taken, otherwise, strict=True))
    assert 0.06 < both / len(events) < 0.12  # independent: 0.09
    wider = replace(config, webui=replace(config.webui, blind_fraction=0.5))
    assert all(blind.drawn(wider, event) for event, was in zip(events, taken, strict=True) if was)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_no_series_or_every_analysed_one_is_read_blind(site: Site, fraction: float) -> None:
    config = replace(site.config, webui=replace(site.config.webui, blind_fraction=fraction))
    expected = record.CHOSEN if fraction else record.OPEN
    assert {blind.drawn(config, triaged(n, d)) for n, d in ((1, "positive"), (2, "negative"))} == {expected}
    assert {blind.drawn(config, triaged(n, d)) for n, d in ((1, "failed"), (2, "not_eligible"))} == {record.OPEN}


def test_what_was_drawn_is_kept_when_the_fraction_changes(drawn: Site) -> None:
    event = add(drawn, 1, "negative")
    config = replace(drawn.config, webui=replace(drawn.config.webui, blind_fraction=0.0))
    assert blind.draw_missing(config, drawn.ledger) == 0
    assert "2 %" not in drawn.client("rita").get(address(event)).text


def test_results_of_an_earlier_version_are_drawn_when_the_service_starts(shadow: Site) -> None:
    event = add(shadow, 1)
    with shadow.ledger.begin() as connection:
        connection.execute(update(results).values(blind=None))
    assert blind.draw_missing(shadow.config, shadow.ledger) == 1
    assert "93 %" not in shadow.client("rita").get(address(event)).text


def test_in_live_mode_a_positive_is_shown_to_everybody_until_somebody_has_acknowledged_it(drawn: Site) -> None:
    negative, positive = add(drawn, 1, "negative"), add(drawn, 2)
    rita = drawn.client("rita")
    page = rita.get("/").text
    assert page.index("ACC00002") < page.index("ACC00001")
    assert "93 %" in page
    assert "to be read" in page
    assert "93 %" in rita.get(address(positive)).text
    assert "Herald shows its own answer after your verdict" in rita.get(address(negative)).text


def test_in_live_mode_an_acknowledged_positive_is_hidden_from_who_has_not_seen_it(drawn: Site) -> None:
    event = add(drawn, 1)
    drawn.client().post(drawn.link(event), data=shown(event))
    assert "93 %" not in drawn.client("rita").get("/").text
    assert "93 %" not in drawn.client("rita").get(address(event)).text
    assert judge(drawn.client("rita"), event, "agree").status_code == 400
    judge(drawn.client("rita"), event, "haemorrhage")
    assert [(row["action"], row["prediction_shown"]) for row in kept(drawn)] == [
        ("acknowledge", True),
        ("agree", False),
    ]


def test_in_live_mode_an_acknowledged_positive_stays_open_to_who_has_seen_it(drawn: Site) -> None:
    event = add(drawn, 1)
    rita = drawn.client("rita")
    rita.get("/")
    drawn.client().post(drawn.link(event), data=shown(event))
    assert "93 %" in rita.get(address(event)).text


@pytest.mark.parametrize("disposition", ["positive", "negative"])
def test_no_filter_tells_what_is_hidden(drawn: Site, disposition: str) -> None:
    negative, positive = add(drawn, 1, "negative"), add(drawn, 2)
    drawn.client().post(drawn.link(positive), data=shown(positive))
    listed = drawn.client("rita").get(f"/?disposition={disposition}").text
    assert positive.accession_number not in listed
    assert negative.accession_number not in listed


def test_a_hidden_series_that_somebody_acknowledged_looks_like_one_that_nobody_did(drawn: Site) -> None:
    event, rita = add(drawn, 1, "negative"), drawn.client("rita")
    before = rita.get(address(event)).text
    judge(drawn.client("ada"), event, "agree")
    after = rita.get(address(event)).text
    assert "Acknowledge" not in before
    assert "ada" not in after.replace("data-", "")


@pytest.mark.parametrize(("node", "own", "hidden"), [("live", "shadow", True), ("shadow", "live", False)])
def test_the_mode_of_the_site_of_the_scanner_decides(tmp_path: Path, node: str, own: str, hidden: bool) -> None:
    with open_site(tmp_path, mode=node) as site:
        of_site = PagingSite(name="east", mode=own, scanners=("CT-EMERGENCY",))  # type: ignore[arg-type]
        notifier: NotifierConfig = replace(site.config.notifier, sites=(of_site,))
        event = triaged(1)
        drawn = blind.drawn(replace(site.config, notifier=notifier), event)
        record.upsert_result(site.ledger, event, drawn)
        assert ("93 %" not in site.client("rita").get(address(event)).text) is hidden


# --- the page of a pager link ----------------------------------------------------------------------------------------


def test_who_is_logged_in_sees_the_key_picture_on_the_page_and_judges_there(site: Site) -> None:
    event, client = site.add(1), site.client("rita")
    page = client.get(site.link(event)).text
    assert "/slice/8.png?window=brain&amp;mask=1" in page
    answer = client.post(site.link(event), data={"verdict": "agree", **shown(event)})
    assert answer.location == f"{address(event)}?describe=1"
    (row,) = kept(site)
    assert (row["action"], row["reader"], row["prediction_shown"]) == ("agree", "rita", True)


@pytest.mark.parametrize("who", [None, "remi"])
def test_a_link_alone_judges_nothing(site: Site, who: str | None) -> None:
    event, client = add(site, 1), site.client(who)
    assert "Disagree" not in client.get(site.link(event)).text
    assert client.post(site.link(event), data={"verdict": "agree", **shown(event)}).status_code == 403
    assert kept(site) == []


def test_a_verdict_on_the_page_that_makes_no_sense_is_refused(site: Site) -> None:
    event = add(site, 1)
    assert site.client("rita").post(site.link(event), data={"verdict": "maybe", **shown(event)}).status_code == 400
    assert kept(site) == []

import json
import shutil
from dataclasses import replace

import pytest
from router_fakes import received
from sqlalchemy import func, select, text
from webui_site import Site, triaged

from herald.ledger import results


def rows(site: Site) -> list:
    with site.ledger.read() as connection:
        return list(connection.execute(select(results)).mappings())


def test_a_new_result_is_kept_with_its_probability_of_any_haemorrhage(site):
    answer = site.put(triaged(1))
    assert (answer.status_code, answer.json["created"]) == (201, True)
    (row,) = rows(site)
    assert (row["disposition"], row["probability"], row["accession_number"]) == ("positive", 0.93, "ACC00001")


def test_the_same_result_again_is_no_second_row_and_keeps_the_acknowledgement(site):
    event = triaged(1)
    site.put(event)
    site.client("rita").post(
        f"/series/{event.series_instance_uid}/1/review", data={"verdict": "acknowledge", **site.shown(event)}
    )
    before = rows(site)
    assert site.put(event).status_code == 200
    assert rows(site) == before
    assert before[0]["acknowledged_by"] == "rita"


def test_a_corrected_result_of_the_same_revision_replaces_the_first(site):
    site.put(triaged(1))
    site.put(triaged(1, "negative"))
    assert [row["disposition"] for row in rows(site)] == ["negative"]


def test_a_result_without_detection_has_no_probability(site):
    site.put(triaged(1, "not_eligible"))
    assert rows(site)[0]["probability"] is None


@pytest.mark.parametrize("header", [{}, {"Authorization": "Bearer forged"}, {"Authorization": "Basic token for tests"}])
def test_a_missing_or_forged_token_is_refused_and_nothing_is_kept(site, header):
    event = triaged(1)
    address = f"/api/results/{event.series_instance_uid}/1"
    answer = site.app.test_client().put(address, data=event.to_json(), headers=header)
    assert answer.status_code == 401
    assert "webui.token" in answer.json["error"]
    assert rows(site) == []


def put_raw(site: Site, event, body: bytes):
    return site.app.test_client().put(
        f"/api/results/{event.series_instance_uid}/{event.revision}",
        data=body,
        headers={"Authorization": "Bearer token for tests"},
    )


def changed(event, **fields) -> bytes:
    return json.dumps({**json.loads(event.to_json()), **fields}).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not one of our events"),
        (b"[]", "expected a JSON object"),
        (changed(triaged(1), disposition="maybe"), "disposition"),
        (changed(triaged(1), revision=2), "the event says"),
        (changed(triaged(1), study_instance_uid="1" * 65), "study_instance_uid must have 1 to 64"),
        (changed(triaged(1), last_image_at="2026-01-01T00:00:00"), "last_image_at has no time zone"),
        (changed(triaged(1), schema=99), "schema version 99"),
    ],
)
def test_a_body_that_is_no_such_result_is_refused_with_the_reason(site, body, reason):
    answer = put_raw(site, triaged(1), body)
    assert answer.status_code == 400
    assert reason in answer.json["error"]
    assert rows(site) == []


def test_another_kind_of_event_is_refused_by_its_name(site):
    event = triaged(1)
    other = received(study_instance_uid=event.study_instance_uid, series_instance_uid=event.series_instance_uid)
    answer = put_raw(site, event, other.to_json())
    assert answer.status_code == 400
    assert "got a SeriesReceived" in answer.json["error"]


def test_a_ledger_that_is_down_makes_the_notifier_try_again(site):
    with site.ledger.begin() as connection:
        connection.execute(text("drop table results"))
    answer = site.put(triaged(1))
    assert answer.status_code == 503
    assert "ledger" in answer.json["error"]
    assert answer.headers["Retry-After"]


def test_health_is_ok_and_says_what_fails_when_it_does(site, tmp_path):
    client = site.app.test_client()
    assert (client.get("/health").status_code, client.get("/health").json["status"]) == (200, "ok")
    shutil.rmtree(tmp_path / "store")
    answer = client.get("/health")
    assert answer.status_code == 503
    assert "store" in answer.json["problems"][0]


def test_an_unknown_address_of_the_api_answers_in_json(site):
    answer = site.app.test_client().get("/api/nothing")
    assert (answer.status_code, answer.mimetype) == (404, "application/json")


def test_a_body_beyond_the_limit_is_refused(site):
    answer = put_raw(site, triaged(1), b" " * (1 << 21))
    assert answer.status_code == 413


def test_results_of_two_revisions_are_two_rows(site):
    site.put(triaged(1))
    assert site.put(replace(triaged(1), revision=2)).status_code == 201
    with site.ledger.read() as connection:
        assert connection.execute(select(func.count()).select_from(results)).scalar() == 2

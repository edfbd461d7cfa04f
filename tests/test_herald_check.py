"""What `herald check` says of the served models, of the notifier, of pages that reached nobody and of alarms."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from served_models import build, eventually
from sqlalchemy import insert, update

import herald.check
from herald.check import Outcome, check, describe_model
from herald.config import Config, ServingConfig, load_config
from herald.events import utc_now
from herald.ledger import Ledger, alarms, open_ledger, pages, reviews, watches
from serving.server import ModelServer

HEMORRHAGE: Mapping[str, Any] = {
    "model": "hemorrhage",
    "calibration": {"scale": [1.0], "threshold": [0.2], "smoothing": [0.25, 0.5, 0.25]},
    "obtained": "patients kept aside from training, 5 of 5 folds",
    "target_sensitivity": 0.95,
    "measured": {"ct-ich": {"patients": 41}, "ct-ich adults": {"patients": 30}, "phe-sich": {"patients": 60}},
}
PROTOCOL: Mapping[str, Any] = {
    "model": "protocol",
    "heads": {"contrast": {"classes": ["non_contrast", "contrast"]}, "region": {"classes": ["head", "other"]}},
    "calibration": {"temperature": {}, "obtained": "not fitted"},
}


def node(data_dir: Path, serving_address: str) -> Config:
    environment = {"HERALD_NODE__DATA_DIR": str(data_dir), "HERALD_ROUTER__SERVING_ADDRESS": serving_address}
    return load_config(environment=environment)


def test_the_operating_point_of_the_detector_is_told_with_its_target_and_what_it_was_calibrated_on() -> None:
    assert describe_model(HEMORRHAGE, 0.5) == (
        "operating point 0.50 chosen for sensitivity 0.95; calibrated on patients kept aside from training, 5 of 5"
        " folds (41 of ct-ich, 60 of phe-sich)"
    )


def test_an_operating_point_that_a_site_has_moved_is_told_beside_the_calibrated_one() -> None:
    assert "operating point 0.60 (router.operating_point; the model is calibrated for 0.50)" in describe_model(
        HEMORRHAGE, 0.6
    )


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ({}, "says nothing of its calibration; export it again"),
        ({"model": "hemorrhage"}, "operating point 0.50; not calibrated"),
        ({"model": "hemorrhage", "calibration": None}, "operating point 0.50; not calibrated"),
        (
            {"calibration": {"scale": [1], "threshold": [0]}},
            "operating point 0.50; calibrated on data that the model does not name",
        ),
        (PROTOCOL, "tells contrast, region; not calibrated"),
        (
            {**PROTOCOL, "calibration": {"temperature": {"contrast": 1.3}, "obtained": "54 series"}},
            "tells contrast, region; temperatures contrast 1.30, others 1, on 54 series",
        ),
        (
            {
                **PROTOCOL,
                "calibration": {
                    "temperature": {"region": 1.5},
                    "obtained": "54 series",
                    "measured": {
                        "contrast": {
                            "kept": False,
                            "before": {"calibration_error": 0.04},
                            "after": {"calibration_error": 0.05},
                        },
                        "region": {
                            "kept": True,
                            "before": {"calibration_error": 0.02},
                            "after": {"calibration_error": 0.01},
                        },
                    },
                },
            },
            "tells contrast, region; temperatures region 1.50, others 1, calibration error contrast 0.040, region 0.010"
            ", on 54 series",
        ),
        (
            {
                **PROTOCOL,
                "calibration": {
                    "temperature": {},
                    "obtained": "54 series",
                    "measured": {"region": {"kept": False, "before": {"calibration_error": 0.02}}},
                },
            },
            "tells contrast, region; temperatures 1, as no other is better, calibration error region 0.020"
            ", on 54 series",
        ),
    ],
    ids=str,
)
def test_what_a_card_does_not_say_is_not_made_up(card: Mapping[str, Any], told: str) -> None:
    assert describe_model(card, 0.5) == told


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.getbasetemp())


def test_models_that_carry_no_card_are_told_to_be_exported_again(models: Path, tmp_path: Path) -> None:
    server = ModelServer(ServingConfig(port=0, models=models / "contract", poll_s=0.05))
    server.start()
    try:
        eventually(lambda: not server.repository.missing())
        config = node(tmp_path, f"127.0.0.1:{server.port}")
        (answered,) = [outcome for outcome in check(config, quick=True) if outcome.what == "models"]
    finally:
        server.stop()
    assert answered.ok, answered.detail
    assert "protocol 1: says nothing of its calibration; export it again" in answered.detail
    assert "hemorrhage 1: says nothing of its calibration; export it again" in answered.detail


def test_a_model_server_that_is_down_is_told(tmp_path: Path) -> None:
    config = node(tmp_path, "127.0.0.1:1")
    (answered,) = [outcome for outcome in check(config, quick=True) if outcome.what == "models"]
    assert not answered.ok
    assert "herald run serving" in answered.detail


# --- notifier, pages and alarms --------------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """The ledger of a node that is asked for pages and alarms only."""
    config = node(tmp_path, "127.0.0.1:1")
    monkeypatch.setattr(herald.check, "TIMEOUT_S", 0.1)
    ledger = open_ledger(config.ledger)
    yield ledger
    ledger.close()


def said(tmp_path: Path, what: str) -> Outcome:
    (outcome,) = [outcome for outcome in check(node(tmp_path, "127.0.0.1:1")) if outcome.what == what]
    return outcome


def add_page(ledger: Ledger, study: str = "1.2.3", hours_ago: float = 1.0, **changes: Any) -> None:
    then = utc_now() - timedelta(hours=hours_ago)
    row = {
        "page_id": study,
        "study_instance_uid": study,
        "series_instance_uid": f"{study}.4",
        "revision": 1,
        "step": 0,
        "state": "exhausted",
        "mode": "live",
        "channel": "smtp",
        "recipient": "oncall@hospital.example",
        "subject": "",
        "body": "",
        "finding_at": then,
        "due_at": then,
        "sent_at": then,
    }
    with ledger.begin() as connection:
        connection.execute(insert(pages).values(**{**row, **changes}))


def test_a_node_whose_pages_are_answered_is_well(live: Ledger, tmp_path: Path) -> None:
    add_page(live, state="acknowledged")
    add_page(live, "1.2.4", mode="shadow")
    assert said(tmp_path, "pages").ok
    assert said(tmp_path, "alarms") == Outcome("alarms", True, "none holds")


def test_a_page_that_nobody_answered_is_a_fault_that_names_the_study_until_it_is_reviewed(
    live: Ledger, tmp_path: Path
) -> None:
    add_page(live)
    add_page(live, "1.2.4", sent_at=None)
    fault = said(tmp_path, "pages")
    assert not fault.ok
    assert "2 studies:" in fault.detail
    assert "1.2.3 (paged, nobody has answered)" in fault.detail
    assert "1.2.4 (could not be paged)" in fault.detail
    assert "call the radiologist" in fault.detail
    assert "http://127.0.0.1:8080/operations" in fault.detail
    for study in ("1.2.3", "1.2.4"):
        with live.begin() as connection:
            connection.execute(
                insert(reviews).values(
                    review_id=study,
                    study_instance_uid=study,
                    series_instance_uid=f"{study}.4",
                    revision=1,
                    action="agree",
                    reader="rita",
                    prediction_shown=True,
                    occurred_at=utc_now(),
                )
            )
    assert said(tmp_path, "pages").ok


def test_a_page_that_nobody_answered_days_ago_is_left_to_the_operations_page(live: Ledger, tmp_path: Path) -> None:
    add_page(live, hours_ago=25)
    assert said(tmp_path, "pages").ok


@pytest.mark.parametrize(("minutes_ago", "ok"), [(1, True), (3, False)])
def test_a_page_that_is_late_by_minutes_is_a_fault_of_the_notifier(
    live: Ledger, tmp_path: Path, minutes_ago: float, ok: bool
) -> None:
    add_page(live, hours_ago=minutes_ago / 60, state="due", sent_at=None)
    late = said(tmp_path, "pages")
    assert late.ok is ok
    if not ok:
        assert "1 study: 1.2.3 (late, found 3 min ago)" in late.detail
        assert "herald run notifier" in late.detail


def test_an_alarm_is_a_fault_while_it_holds(live: Ledger, tmp_path: Path) -> None:
    with live.begin() as connection:
        connection.execute(
            insert(alarms).values(
                alarm_id="1",
                kind="models",
                about="",
                detail="no router has been alive since 03:12.",
                mode="live",
                raised_at=datetime(2026, 3, 27, 3, 17, tzinfo=UTC),
            )
        )
    fault = said(tmp_path, "alarms")
    assert not fault.ok
    assert fault.detail.startswith("models since 2026-03-27 03:17 UTC: no router has been alive since 03:12.")
    assert "No operator was reached." in fault.detail
    with live.begin() as connection:
        connection.execute(update(alarms).values(cleared_at=utc_now()))
    assert said(tmp_path, "alarms").ok


def test_a_notifier_that_has_never_been_alive_or_is_so_no_more_is_a_fault(live: Ledger, tmp_path: Path) -> None:
    assert said(tmp_path, "notifier") == Outcome(
        "notifier", False, "none has ever been alive; start it with `herald run notifier`"
    )
    with live.begin() as connection:
        connection.execute(insert(watches).values(notifier="ct1:7", seen_at=utc_now() - timedelta(minutes=3)))
    gone = said(tmp_path, "notifier")
    assert not gone.ok
    assert "nobody is paged: start it with `herald run notifier`" in gone.detail
    with live.begin() as connection:
        connection.execute(insert(watches).values(notifier="ct1:9", seen_at=utc_now() - timedelta(minutes=1)))
    alive = said(tmp_path, "notifier")
    assert alive.ok
    assert alive.detail.startswith("last seen ")

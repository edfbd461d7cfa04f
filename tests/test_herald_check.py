"""What `herald check` says of the served models: versions, heads, operating point, calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from served_models import build, eventually

from herald.check import check, describe_model
from herald.config import Config, ServingConfig, load_config
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

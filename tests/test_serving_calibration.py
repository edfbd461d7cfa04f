"""Temperature scaling: what is fitted, what it mends, and what it must not do."""

import os
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from herald.volume import Volume
from serving import protocol, score_protocol
from serving.calibration import Scored, fit_temperature, measure, out_of_fold, tempered


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (raised / raised.sum(axis=-1, keepdims=True)).astype(np.float32)


def cases(temperature: float, count: int = 600, group: str = "a", seed: int = 0) -> list[Scored]:
    """Series whose true class is drawn from the model's softmax as it would be at `temperature`."""
    rng = np.random.default_rng(seed)
    found = []
    for logits in rng.normal(0, 3, (count, 3)):
        share = np.exp(logits / temperature)
        found.append(Scored(softmax(logits)[None], int(rng.choice(3, p=share / share.sum())), group))
    return found


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_at_which_the_truth_was_drawn_is_found(temperature: float) -> None:
    assert fit_temperature(cases(temperature), "mean") == pytest.approx(temperature, rel=0.15)


def test_a_model_that_is_too_sure_gets_a_lower_log_loss_and_calibration_error_out_of_fold() -> None:
    drawn = cases(3.0)
    before = measure(drawn, [1.0] * len(drawn), "mean")
    after = measure(drawn, out_of_fold(drawn, "mean"), "mean")
    assert after.log_loss < 0.8 * before.log_loss
    assert after.calibration_error < 0.4 * before.calibration_error
    assert before.series == after.series == 600


def test_a_head_that_is_always_right_is_not_made_infinitely_sure() -> None:
    right = [Scored(np.array([[0.9, 0.1]], np.float32), 0, "a") for _ in range(20)]
    fitted = fit_temperature(right, "mean")
    assert tempered(right[0].softmax, fitted)[0, 0] == pytest.approx(21 / 22, abs=0.01)


def test_a_small_set_weighs_as_much_as_a_large_one() -> None:
    large, small = cases(1.0, 900, "a"), cases(4.0, 90, "b", seed=1)
    pooled = [Scored(case.softmax, case.truth, "a") for case in (*large, *small)]
    assert fit_temperature([*large, *small], "mean") > 1.3 * fit_temperature(pooled, "mean")


def test_chunks_are_tempered_before_they_are_made_one_as_the_node_does() -> None:
    softmaxes = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    case = Scored(softmaxes, 0, "a")
    warm = softmaxes**0.5 / (softmaxes**0.5).sum(axis=1, keepdims=True)
    assert measure([case], [2.0], "mean").log_loss == pytest.approx(-np.log(warm[:, 0].mean()), abs=1e-5)
    assert tempered(softmaxes, 1.0) == pytest.approx(softmaxes, abs=1e-6)


def test_temperatures_are_stored_beside_the_weights_and_heads_of_one_class_keep_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "own.weights.h5"
    protocol.write_description(weights, protocol.describe(weights))
    volume = Volume(np.zeros((8, 16, 16), np.int16), np.arange(8) * 5.0, (1.0, 1.0))
    truths = ["contrast" if i % 3 else "non_contrast" for i in range(30)]
    asked = []

    def sets(data: Path, names: tuple[str, ...], aside_only: bool) -> list[object]:
        asked.append((names, aside_only))
        labels = [{"contrast": truth, "region": "head", "kernel": "soft"} for truth in truths]
        return [("set, held out", str(i), volume, of_one, None, None) for i, of_one in enumerate(labels)]

    monkeypatch.setattr(score_protocol, "evaluation_sets", sets)
    sure = {name: np.array([[0.01, 0.99]], np.float32) for name in ("contrast", "region", "kernel", "orientation")}
    told = StringIO()
    score_protocol.calibrate(lambda batch: sure, weights, tmp_path, (), 0, Console(file=told, width=200))
    assert asked == [(("ct-ich", "phe-sich"), True)]
    found = protocol.describe(weights).calibration
    assert list(found.temperature) == ["contrast"]
    assert tempered(sure["contrast"], found.temperature["contrast"])[0, 1] == pytest.approx(21 / 32, abs=0.01)
    assert found.obtained == "30 set series kept from training"
    assert found.measured["contrast"]["after"]["log_loss"] < 0.5 * found.measured["contrast"]["before"]["log_loss"]
    assert found.measured["contrast"]["kept"]
    assert "kernel" in told.getvalue()
    assert "of one class" in told.getvalue()


def test_a_temperature_that_is_not_better_on_other_series_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "own.weights.h5"
    monkeypatch.setattr(score_protocol, "evaluation_sets", lambda *_, **__: (
        ("set, held out", str(i), Volume(np.zeros((8, 16, 16), np.int16), np.arange(8) * 5.0, (1.0, 1.0)),
         {"region": ("head", "other")[i % 2]}, None, None) for i in range(20)
    ))  # fmt: skip
    right = iter([np.array([[0.999, 0.001], [0.001, 0.999]][i % 2 : i % 2 + 1], np.float32) for i in range(20)])
    told = StringIO()
    score_protocol.calibrate(
        lambda batch: dict.fromkeys(("contrast", "orientation", "kernel", "region"), next(right)),
        weights, tmp_path, (), 0, Console(file=told, width=200),
    )  # fmt: skip
    found = protocol.describe(weights).calibration
    assert found.temperature == {}
    assert found.measured["region"]["fitted"] > 1.5
    assert not found.measured["region"]["kept"]
    assert "would not be better" in told.getvalue()

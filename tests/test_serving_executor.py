"""Which precision a model is run in."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from herald.tensors import Array
from serving import executor as executors
from serving.executor import ExecutionError, ExecutorOptions, load_executor, rounded_if_it_pays

INPUTS = {"volume": np.zeros((1, 2, 2), dtype=np.int16)}
NOTHING = np.zeros(0, dtype=np.float32)


class Watch:
    """The module `time` to the executors, whose clock only moves while one runs."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch) -> Watch:
    clock = Watch()
    monkeypatch.setattr(executors, "time", clock)
    return clock


class Runner:
    """An executor whose runs take the given seconds, one after another."""

    def __init__(self, name: str, watch: Watch, *seconds: float):
        self.name = name
        self.precision = name.split()[-1]
        self._watch, self._seconds = watch, list(seconds)

    def run(self, signature_name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if not self._seconds:
            raise ExecutionError(3, "no")
        self._watch.now += self._seconds.pop(0)
        return {"sum": NOTHING}


@pytest.mark.parametrize(
    ("rounded", "exact", "kept"),
    [
        ((1.3, 1.2), (1.0, 0.9), "f32"),  # an Intel Xeon without AMX
        ((0.5, 0.6), (0.8, 0.7), "bf16"),
        ((0.9, 0.9), (1.0, 1.0), "f32"),  # quicker by a hair: the exact one
        ((0.5, 9.0), (1.0, 0.8), "bf16"),  # something else took the cores during one run
    ],
)
def test_bf16_is_kept_only_where_it_is_clearly_quicker(rounded, exact, kept, caplog, watch):
    caplog.set_level("INFO")
    bf16, f32 = Runner("openvino bf16", watch, *rounded), Runner("openvino f32", watch, *exact)
    assert rounded_if_it_pays(bf16, f32, INPUTS).name == f"openvino {kept}"
    assert f"took openvino bf16 {min(rounded) * 1e3:.0f} ms and openvino f32 {min(exact) * 1e3:.0f} ms" in caplog.text
    assert f"kept openvino {kept}" in caplog.text


def test_a_model_that_cannot_be_tried_is_run_exactly(watch):
    bf16, f32 = Runner("openvino bf16", watch), Runner("openvino f32", watch, 1.0, 1.0)
    assert rounded_if_it_pays(bf16, f32, INPUTS) is f32


@pytest.mark.parametrize(
    ("asked", "seconds_of_bf16", "kept"), [("auto", 2.0, "f32"), ("auto", 0.5, "bf16"), ("bf16", 2.0, "bf16")]
)
def test_auto_tries_both_precisions_where_openvino_would_round_and_a_precision_asked_for_is_kept(
    monkeypatch, watch, asked, seconds_of_bf16, kept
):
    loaded = []

    def load(folder, signatures, options):  # as OpenVINO does on a CPU that computes in bf16
        precision = "f32" if options.precision == "f32" else "bf16"
        loaded.append(options.precision)
        return Runner(f"openvino {precision}", watch, *[seconds_of_bf16 if precision == "bf16" else 1.0] * 9)

    monkeypatch.setattr(executors, "OpenVinoExecutor", load)
    monkeypatch.setattr(executors, "blank_inputs", lambda signature: INPUTS)
    signatures = {executors.SIGNATURE_NAME: object()}
    executor = load_executor(Path("sum/1"), signatures, ExecutorOptions(precision=asked))
    assert executor.name == f"openvino {kept}"
    assert loaded == (["auto", "f32"] if asked == "auto" else ["bf16"])

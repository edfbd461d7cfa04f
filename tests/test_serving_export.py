import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import openvino
import pytest
import tensorflow as tf

from herald.errors import ConfigError, SignatureMismatch
from herald.signatures import DETECTION_IN_PLANE, FINDINGS, HEMORRHAGE, PROTOCOL
from serving import export as exporting
from serving.crops import Pixels, Prepared
from serving.export import export, hemorrhage_function, main, protocol_function, read_calibration, write_saved_model
from serving.hemorrhage import Sizes, build
from serving.score_hemorrhage import as_served, raw_scores, served, slice_logits
from serving.whole_volume import EightBits, observed_ranges

SMALL = Sizes(widths=(3, 4, 6, 6, 8), blocks=(0, 1, 0, 0, 1))
CALIBRATION = {
    "scale": [1.0, 0.8, 0.7, 0.9, 1.2],
    "threshold": [0.1, -0.2, 0.3, 0.0, -0.1],
    "smoothing": [0.25, 0.5, 0.25],
    "mask_offset": [0.7],
    "pooled_share": [0.75],
}

# keras 3.15 turns variables to arrays in a way that NumPy 2 is to drop
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def small() -> keras.Model:
    keras.utils.set_random_seed(5)
    return build(SMALL)


@pytest.fixture(scope="module")
def saved(small: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "hemorrhage" / "1"
    folder.parent.mkdir()
    write_saved_model(hemorrhage_function(small, CALIBRATION), HEMORRHAGE, folder)
    return folder


@pytest.fixture(scope="module")
def rounded(small: keras.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `saved`, in eight bits."""
    folder = tmp_path_factory.mktemp("rounded") / "hemorrhage" / "1"
    folder.parent.mkdir()
    write_saved_model(hemorrhage_function(small, CALIBRATION, observed_ranges(small, [head(3)])), HEMORRHAGE, folder)
    return folder


Answer = Callable[[np.ndarray], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def by_tensorflow(saved: Path) -> Answer:
    return answer_by_tensorflow(saved)


def answer_by_tensorflow(folder: Path) -> Answer:
    loaded = tf.saved_model.load(str(folder))
    return lambda volume: {
        name: value.numpy() for name, value in loaded.signatures["serving_default"](volume=tf.constant(volume)).items()
    }


@pytest.fixture(scope="module")
def by_openvino(saved: Path) -> Answer:
    return answer_by_openvino(compiled_by_openvino(saved))


def compiled_by_openvino(folder: Path) -> openvino.CompiledModel:
    return openvino.compile_model(openvino.convert_model(str(folder)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def answer_by_openvino(compiled: openvino.CompiledModel) -> Answer:
    def run(volume: np.ndarray) -> dict[str, np.ndarray]:
        result = compiled({"volume": volume})
        return {port.get_any_name(): result[port] for port in compiled.outputs}

    return run


def head(slices: int) -> np.ndarray:
    shape = (slices, DETECTION_IN_PLANE, DETECTION_IN_PLANE)
    return np.random.default_rng(slices).normal(40, 40, shape).astype(np.int16)


@pytest.mark.parametrize("slices", [3, 1, 60, 2, 30])
def test_tensorflow_and_openvino_give_the_same_for_any_number_of_slices(by_tensorflow, by_openvino, slices):
    volume = head(slices)
    one, other = by_tensorflow(volume), by_openvino(volume)
    assert set(one) == set(HEMORRHAGE.outputs)
    assert one["mask"].shape == (slices, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS))
    assert one["mask"].dtype == np.uint8
    assert one["slice_probability"].shape == (slices, len(FINDINGS))
    for name in ("slice_probability", "probability"):
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)
    assert np.abs(one["mask"].astype(int) - other["mask"].astype(int)).max() <= 1


def test_openvino_computes_in_integers_what_is_rounded_to_eight_bits_and_answers_as_tensorflow_does(rounded):
    compiled = compiled_by_openvino(rounded)
    kinds = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    convolutions = [k["runtimePrecision"].astype(str) for k in kinds if k["layerType"].astype(str) == "Convolution"]
    assert convolutions.count("f32") == 1  # the windows, before anything is rounded
    assert {"u8", "i8"} >= set(convolutions) - {"f32"} != set()
    one, other = answer_by_tensorflow(rounded)(head(6)), answer_by_openvino(compiled)(head(6))
    for name in ("slice_probability", "probability"):
        np.testing.assert_allclose(one[name], other[name], atol=0.01)  # a step of rounding is decided either way
    assert np.abs(one["mask"].astype(int) - other["mask"].astype(int)).mean() < 1


OLDER = """
import sys
import numpy as np, openvino
compiled = openvino.compile_model(openvino.Core().read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
print(float(compiled(np.ones((1, 8, 8, 16), np.float32))[0][0, 4, 4, 0]))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_products_of_eight_bits_are_not_cut_off_on_a_cpu_without_vnni(tmp_path, instructions):
    rounding = EightBits({"here": 1.0})
    kernel = np.ones((3, 3, 16, 16), np.float32)

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 16), tf.float32, name="x")], autograph=False)
    def highest(x):  # as high as activations and kernel can be
        return {"y": rounding.convolve(rounding.activation(tf.nn.relu(x), "here"), kernel)}

    module = tf.Module()
    module.highest = highest
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=highest)
    done = subprocess.run(
        [sys.executable, "-c", OLDER, str(tmp_path / "1")],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": instructions},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) == pytest.approx(144, abs=0.1)


def test_what_is_measured_is_rounded_as_what_is_served(small, rounded):
    volume = head(3)
    pixels = Pixels(volume, *[np.zeros(volume.shape, np.uint8)] * 3)
    flags = np.zeros((3, 5), np.uint8)
    run, _ = as_served(small, [Prepared("ct-ich", "049", flags, flags[0], False, lambda: pixels)])
    raw = run(volume)
    assert raw["mask"].shape == (*volume.shape, len(FINDINGS))
    logits = served(
        slice_logits(raw["slice"], raw["pooled"]), *(np.array(CALIBRATION[k]) for k in ("scale", "threshold"))
    )
    said = answer_by_tensorflow(rounded)(volume)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), said["slice_probability"], atol=1e-5)


def test_the_outermost_slices_are_repeated_to_lend_context(small, by_tensorflow):
    volume = head(4)
    padded = np.pad(volume, ((2, 2), (0, 0), (0, 0)), mode="edge")[None].astype(np.float32)
    raw = np.asarray(small(padded, training=False)["mask"])[0]
    mask = 1 / (1 + np.exp(CALIBRATION["mask_offset"][0] - raw))
    np.testing.assert_allclose(by_tensorflow(volume)["mask"], mask * 255, atol=0.51)


def test_calibration_puts_the_operating_point_at_one_half(small, by_tensorflow):
    volume = head(4)
    raw = raw_scores(small, volume)  # what is measured is what is served
    logits = slice_logits(raw["slice"], raw["pooled"])
    wanted = 1 / (1 + np.exp(-served(logits, np.array(CALIBRATION["scale"]), np.array(CALIBRATION["threshold"]))))
    out = by_tensorflow(volume)
    np.testing.assert_allclose(out["slice_probability"], wanted, atol=1e-4)
    np.testing.assert_allclose(out["probability"], wanted.max(axis=0), atol=1e-4)


def test_no_kind_of_bleed_is_likelier_than_any(by_tensorflow):
    for seed in range(3):
        probability = by_tensorflow(head(5 + seed))["probability"]
        assert probability[0] >= probability[1:].max()


def test_a_model_that_breaks_the_contract_is_refused_with_every_difference(tmp_path):
    def wrong(volume: tf.Tensor) -> dict[str, tf.Tensor]:
        batch = tf.shape(volume)[0]
        return {"contrast": tf.zeros((batch, 2)), "region": tf.zeros((batch, 2), tf.float64)}

    with pytest.raises(SignatureMismatch, match=r"(?s)kernel is missing.*orientation is missing.*region is .*float64"):
        write_saved_model(wrong, PROTOCOL, tmp_path / "1")


def test_the_protocol_model_keeps_its_signature(tmp_path):
    from serving import protocol

    write_saved_model(protocol_function(protocol.build()), PROTOCOL, tmp_path / "1")
    loaded = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    out = loaded(volume=tf.zeros((2, 8, 256, 256), tf.int16))
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "contrast": (2, 2), "orientation": (2, 3), "kernel": (2, 2), "region": (2, 2)
    }  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, small: keras.Model, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources of a haemorrhage model that is quick to export."""
    weights, calibration = tmp_path / "hemorrhage.weights.h5", tmp_path / "hemorrhage.json"
    small.save_weights(weights)
    calibration.write_text(json.dumps({"findings": list(FINDINGS), **CALIBRATION}))
    monkeypatch.setitem(exporting.CODE, "hemorrhage", [])
    monkeypatch.setitem(exporting.WEIGHTS, "hemorrhage", weights)
    monkeypatch.setattr(exporting.hemorrhage, "load", lambda weights: small)
    return tmp_path


def test_what_is_exported_already_is_left_alone_and_a_change_gets_the_next_number(project, capsys):
    models = project / "models"
    folder, written = export("hemorrhage", models)
    assert (folder, written) == (models / "hemorrhage" / "1", True)
    assert export("hemorrhage", models) == (folder, False)
    assert main(["--out", str(models), "--only", "hemorrhage"]) == 0
    assert "unchanged" in capsys.readouterr().out

    calibration = {"findings": list(FINDINGS), **CALIBRATION, "threshold": [1.0] * 5}
    (project / "hemorrhage.json").write_text(json.dumps(calibration))
    folder, written = export("hemorrhage", models)
    assert (folder.name, written) == ("2", True)
    assert sorted(p.name for p in (models / "hemorrhage").iterdir()) == ["1", "2"]
    card = json.loads((folder / "assets.extra" / "model.json").read_text())
    assert card["version"] == 2
    assert card["calibration"]["threshold"] == [1.0] * 5
    assert card["measured"] == {}
    assert card["weights_sha256"] == hashlib.sha256((project / "hemorrhage.weights.h5").read_bytes()).hexdigest()


def test_a_model_of_a_former_contract_is_exported_again(project, monkeypatch):
    models, contract = project / "models", project / "signatures.py"
    assert export("hemorrhage", models)[0].name == "1"
    contract.write_text(exporting.CONTRACT.read_text() + "DETECTION_IN_PLANE = 64\n")
    monkeypatch.setattr(exporting, "CONTRACT", contract)
    assert export("hemorrhage", models) == (models / "hemorrhage" / "2", True)


def test_the_card_is_an_output_of_the_model_and_leaves_the_bulk_of_the_calibration_out(project):
    told = {"sensitivity": [0.95, 0.9, 1.0], "patient_auc": [0.9, 0.8, 1.0]}
    calibration = {"findings": list(FINDINGS), **CALIBRATION, "obtained": "5 of 5 folds", "target_sensitivity": 0.95,
                   "runs": [{"fold": 0}], "ranges": observed_ranges(build(SMALL), [head(1)]),
                   "metrics": {"ct-ich": {"patients": 41, "any": told}, "odd": 3}}  # fmt: skip
    (project / "hemorrhage.json").write_text(json.dumps(calibration))
    folder, _ = export("hemorrhage", project / "models")
    card = json.loads((folder / "assets.extra" / "model.json").read_text())
    assert card["measured"] == {"ct-ich": {"patients": 41, "sensitivity": [0.95, 0.9, 1.0]}}
    assert card["target_sensitivity"] == 0.95
    assert not {"runs", "metrics", "ranges"} & card.keys()
    compiled = openvino.compile_model(openvino.Core().read_model(str(folder)), "CPU")
    outputs = compiled({"volume": head(1)})
    assert json.loads(bytes(outputs[compiled.output("card")])) == card


def test_weights_of_ones_own_are_exported_for_the_model_they_are_named_with(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--weights", "own.weights.h5"])
    assert "name it with --only" in capsys.readouterr().err
    assert main(["--out", str(tmp_path), "--only", "protocol", "--weights", str(tmp_path / "own.weights.h5")]) == 1
    assert "own.weights.h5 is missing" in capsys.readouterr().err


def test_a_failed_export_leaves_the_former_version_and_no_litter(project, monkeypatch):
    folder, _ = export("hemorrhage", project / "models")
    monkeypatch.setattr(exporting, "write_saved_model", lambda *_: (_ for _ in ()).throw(SignatureMismatch("broken")))
    with pytest.raises(SignatureMismatch, match="broken"):
        export("hemorrhage", project / "models", version=1, force=True)
    assert [p.name for p in folder.parent.iterdir()] == ["1"]
    assert (folder / "saved_model.pb").is_file()


def test_missing_weights_are_named_on_stderr(project, capsys):
    (project / "hemorrhage.weights.h5").unlink()
    assert main(["--out", str(project / "models"), "--only", "hemorrhage"]) == 1
    assert "hemorrhage.weights.h5 is missing; train the model first" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", '{"scale": [1], "threshold": "x", "smoothing": []}'])
def test_a_calibration_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "hemorrhage.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"hemorrhage\.json cannot be read"):
        read_calibration(path)

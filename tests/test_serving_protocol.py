"""The protocol model: its signature, its shape, its training samples, and what it decides on real CT."""

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
from numpy.typing import NDArray
from real_data import DATA, needs_real_data

from herald.errors import ConfigError, SignatureMismatch
from herald.heads import Head
from herald.signatures import HEADS, PROTOCOL
from herald.volume import protocol_batch, read_datasets, volume_from_datasets
from serving import protocol
from serving.phantom import simulate
from serving.protocol_samples import BATCH, Sample, Source, finish, fit_to_atlas
from serving.score_protocol import DICOM_SERIES
from serving.train import main as train_main


@pytest.fixture(scope="module")
def trained() -> "keras.Model":
    return protocol.load()


def decide(model: "keras.Model", batch: NDArray[np.int16]) -> dict[str, tuple[str, float]]:
    softmaxes = {head: np.asarray(p).mean(axis=0) for head, p in model.predict_on_batch(batch).items()}
    return {head: (HEADS[head][int(p.argmax())], float(p.max())) for head, p in softmaxes.items()}


def test_the_model_has_the_signature_that_the_router_expects() -> None:
    model = protocol.build()
    spec = PROTOCOL.inputs["volume"]
    assert (model.input.name, model.input.dtype, model.input.shape) == ("volume", spec.dtype, spec.shape)
    assert {head: out.shape for head, out in model.output.items()} == {
        head: spec.shape for head, spec in PROTOCOL.outputs.items()
    }


def test_there_are_six_residual_blocks_of_two_1x3x3_convolutions_and_z_is_valid() -> None:
    model = protocol.build()
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv3D)]
    assert [layer.kernel_size for layer in convolutions].count((1, 3, 3)) == 12
    assert [layer.kernel_size for layer in convolutions].count((2, 3, 3)) == 6
    assert model.get_layer("stage6_relu2").output.shape == (None, 2, 4, 4, 96)


def test_windows_clip_to_one_at_their_ends() -> None:
    hounsfield = np.array([-3000, -40, 40, 120, 3000], np.int16).reshape(5, 1)
    assert np.asarray(protocol.Windows(((40.0, 160.0),))(hounsfield)).ravel().tolist() == [-1, -1, 0, 1, 1]


def test_missing_weights_are_an_error_that_says_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(SignatureMismatch, match=r"python -m serving\.train protocol"):
        protocol.load(tmp_path / "none.weights.h5")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", r"cannot be read \(KeyError\('heads'\)\)"),
        ('{"heads": {"a": {"classes": ["x", "y"]}}, "sizes": {"layers": 3}}', "cannot be read .*`layers`"),
        (
            '{"heads": {"a": {"classes": ["x", "y"]}}, "calibration": {"temperature": {"b": 1}}}',
            "not of its heads",
        ),
        ('{"heads": {"a": {"classes": ["x", "y"]}}, "calibration": {"temperature": {"a": 0}}}', "not above 0"),
    ],
)
def test_a_description_that_does_not_fit_its_weights_is_named(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "own.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"own\.json.*{reason}"):
        protocol.describe(tmp_path / "own.weights.h5")


def test_weights_without_a_description_have_the_default_heads_and_are_not_calibrated(tmp_path: Path) -> None:
    described = protocol.describe(tmp_path / "own.weights.h5")
    assert {name: head.classes for name, head in described.heads.items()} == dict(HEADS)
    assert described.calibration.temperature == {}
    assert described.calibration.obtained == "not fitted"


def test_a_description_is_read_as_it_was_written(tmp_path: Path) -> None:
    heads = {"phase": Head(("early", "late"), 2.0, "texture", "max"), "side": Head(("l", "r"), given={"phase": "late"})}
    written = protocol.Description(heads, protocol.ProtocolSizes(channels=(2, 3)), protocol.Calibration({"phase": 1.5}))
    protocol.write_description(tmp_path / "own.weights.h5", written)
    assert protocol.describe(tmp_path / "own.weights.h5") == written


def test_softmaxes_sum_to_one_whatever_the_input(trained: "keras.Model") -> None:
    extremes = np.stack([np.full((8, 256, 256), value, np.int16) for value in (-32768, -1024, 0, 32767)])
    for softmax in trained.predict_on_batch(extremes).values():
        assert np.asarray(softmax).sum(axis=1) == pytest.approx(1.0, abs=1e-4)


@needs_real_data
@pytest.mark.parametrize(("name", "labels"), DICOM_SERIES.items())
def test_real_series_that_training_never_saw_are_recognised(
    trained: "keras.Model", name: str, labels: Mapping[str, str]
) -> None:
    files = sorted((DATA / name).glob("*.dcm"))
    decided = decide(trained, protocol_batch(volume_from_datasets(read_datasets(files))))
    assert {head: decided[head][0] for head in labels} == dict(labels)


@pytest.mark.parametrize(
    "asked",
    [
        {"findings": {"iph": 50.0}},
        {"kernel": "bone"},
        {"orientation": "coronal"},
        {"orientation": "sagittal"},
        {"region": "trunk"},
    ],
    ids=str,
)
def test_simulated_series_are_told_apart(trained: "keras.Model", asked: dict[str, object]) -> None:
    series = simulate(77, slices=16, matrix=512, **asked)  # type: ignore[arg-type]
    decided = decide(trained, protocol_batch(series.volume))
    known = dict(series.labels) if series.labels["region"] == "head" else {"region": "other"}
    assert {head: decided[head][0] for head in known} == known


def test_contrast_is_recognised_in_most_enhanced_heads(trained: "keras.Model") -> None:
    # of seeds 77 to 84 one arterial head, with faint vessels, is missed: the first of these four
    heads = [simulate(seed, contrast="arterial", slices=16, matrix=512).volume for seed in range(77, 81)]
    decided = [decide(trained, protocol_batch(volume))["contrast"][0] for volume in heads]
    assert decided.count("contrast") >= 3


def test_batches_depend_on_the_step_alone_and_undefined_labels_weigh_nothing() -> None:
    image = np.full((8, 256, 256), 40, np.int16)
    head = Sample(image, "contrast", "axial", "head", 0.9, 5.0)
    trunk = Sample(image, "contrast", "axial", "other", 1.5, 5.0)
    source = Source({"head": [head], "other": [trunk]})
    volumes, targets, weights = source.batch(3)
    again = source.batch(3)[0]
    assert np.array_equal(volumes, again)
    assert not np.array_equal(volumes, source.batch(4)[0])
    assert volumes.shape == (BATCH, 8, 256, 256)
    is_head = targets["region"][:, HEADS["region"].index("head")] == 1
    assert np.array_equal(weights["contrast"] == 1, is_head)
    assert (weights["kernel"] == 1).all()


def test_a_bone_kernel_makes_a_rougher_sample_of_the_same_slices() -> None:
    sample = Sample(np.full((8, 256, 256), 40, np.int16), "non_contrast", "axial", "head", 0.9, 3.0)
    soft, bone = (
        np.median(
            [np.diff(finish(sample, kernel, np.random.default_rng(s))[4, 100:150, 100:150]).std() for s in range(9)]
        )
        for kernel in ("soft", "bone")
    )
    assert bone > 2 * soft


def test_the_skull_is_found_in_a_stack() -> None:
    stack = np.full((30, 200, 200), -1000, np.int16)
    stack[:25, 30:171, 50:151] = 1000
    fit = fit_to_atlas(stack, 5.0)
    assert fit.top == 24
    assert (fit.front, fit.back, fit.left, fit.right) == pytest.approx((30, 170, 50, 150), abs=6)


def test_training_names_the_models_when_asked_for_another(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["stroke"]) == 2
    assert "protocol|hemorrhage" in capsys.readouterr().err

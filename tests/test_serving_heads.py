"""Heads as data: a TOML and a CSV of labels in, a served model that tells its own classes out; no code changes."""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path

import keras
import msgspec
import numpy as np
import pytest
from rich.console import Console
from served_models import eventually

from herald.check import check
from herald.config import ServingConfig, load_config
from herald.errors import ConfigError, SignatureMismatch
from herald.heads import Head, Heads, aggregate, answers, parse_heads, read_heads
from herald.signatures import FINDINGS, HEADS, HEMORRHAGE
from herald.volume import Volume, protocol_batch
from router.inference import InferenceClient
from serving import protocol
from serving.dicom_writer import Origin, write_dicom_series
from serving.export import export, write_saved_model
from serving.protocol_samples import Sample, Source
from serving.server import ModelServer
from serving.site_series import held_out, prepare_site, read_labels
from serving.train import main as train_main
from serving.train_protocol import Plan, train

# keras 3.15 turns variables to arrays in a way that NumPy 2 is to drop
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TOMLS = sorted((Path(protocol.__file__).parent / "heads").glob("*.toml"))
TINY = (2, 3)
PATIENTS = 6


def volume(seed: int, depth: int = 17) -> Volume:
    rng = np.random.default_rng(seed)
    hounsfield = np.full((depth, 64, 64), -1000, np.int16)
    hounsfield[:, 8:56, 12:52] = rng.normal(40 + 10 * seed, 5 + 4 * seed, (depth, 48, 40)).astype(np.int16)
    return Volume(hounsfield, np.arange(depth) * 5.0, (3.5, 3.5))


def table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def site(folder: Path, heads: Heads) -> Path:
    """DICOM series of six patients and a CSV that labels each for every head, one cell left empty."""
    rows = []
    for i in range(PATIENTS):
        write_dicom_series(volume(i), folder / f"s{i}", Origin(f"study{i}", "series", patient_id=f"P{i}"))
        row = {"path": f"s{i}", "note": "of no interest"}
        for name, head in heads.items():
            asked = all(row[other] == answer for other, answer in head.given.items())
            row[name] = head.classes[i % len(head.classes)] if asked else ""
        rows.append(row)
    rows[1][next(iter(heads))] = ""
    return table(folder / "labels.csv", rows)


@contextmanager
def serving(models: Path) -> Iterator[InferenceClient]:
    server = ModelServer(ServingConfig(port=0, models=models, poll_s=0.05, precision="f32", threads=1))
    server.start()
    try:
        wanted = {folder.name for folder in models.iterdir()}
        eventually(lambda: not wanted & set(server.repository.missing()))
        with InferenceClient(f"127.0.0.1:{server.port}", deadline_s=60) as client:
            yield client
    finally:
        server.stop()


def test_three_sets_of_heads_are_shipped_and_the_default_is_what_triage_needs() -> None:
    assert [path.stem for path in TOMLS] == ["body_parts", "contrast_phases", "default"]
    default = read_heads(protocol.DEFAULT_HEADS)
    assert {name: head.classes for name, head in default.items()} == dict(HEADS)
    assert protocol.describe().heads == default
    assert {head.aggregation for head in default.values()} == {"mean"}
    assert [name for name, head in default.items() if head.reads == "texture"] == ["kernel"]
    assert len(read_heads(TOMLS[0])["body_part"].classes) == 16


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_heads_of_a_toml_train_export_serve_and_answer_over_grpc(path: Path, tmp_path: Path) -> None:
    heads = read_heads(path)
    weights = tmp_path / "own.weights.h5"
    command = ["protocol", "--heads", str(path), "--labels", str(site(tmp_path, heads)), "--steps", "3", "--channels"]
    command += [*map(str, TINY), "--weights", str(weights), "--cache", str(tmp_path / "cache")]
    assert train_main([*command, "--report", str(tmp_path / "report.html")]) == 0
    assert protocol.describe(weights).heads == heads
    assert (tmp_path / "report.html").stat().st_size > 1000

    folder, _ = export("protocol", tmp_path / "models", weights=weights)
    card = json.loads((folder / "assets.extra" / "model.json").read_text())
    assert parse_heads(card["heads"], "card") == heads
    batch = protocol_batch(volume(3, depth=40))
    expected = answers({k: np.asarray(v) for k, v in protocol.load(weights).predict_on_batch(batch).items()}, heads)
    with serving(tmp_path / "models") as client:
        answered = client.classify_protocol(batch)
    assert answered.version == "1"
    assert {name: list(classes) for name, classes in answered.heads.items()} == {
        name: list(heads[name].classes) for name in expected
    }
    for name, probabilities in expected.items():
        assert answered.heads[name] == pytest.approx(probabilities, abs=1e-3)


def test_a_served_model_without_the_heads_of_triage_answers_and_the_check_says_what_is_missing(tmp_path: Path) -> None:
    weights = tmp_path / "own.weights.h5"
    heads = {"region": Head(("chest", "abdomen")), "orientation": Head(HEADS["orientation"])}
    keras.utils.set_random_seed(1)
    sizes = protocol.ProtocolSizes(channels=TINY)
    protocol.build(heads, sizes).save_weights(weights)
    protocol.write_description(weights, protocol.Description(heads, sizes))
    export("protocol", tmp_path / "models", weights=weights)
    with serving(tmp_path / "models") as client:
        assert set(client.classify_protocol(np.zeros((1, 8, 256, 256), np.int16)).heads) == set(heads)
        with pytest.raises(SignatureMismatch) as raised:
            client.check()
    told = str(raised.value)
    assert "model protocol version 1" in told
    assert "no head contrast" in told
    assert "no head kernel" in told
    assert "no class head in its head region" in told
    assert "no head orientation" not in told


def test_temperature_and_aggregation_travel_with_the_model_to_the_router(tmp_path: Path) -> None:
    weights = tmp_path / "own.weights.h5"
    heads = {**read_heads(protocol.DEFAULT_HEADS), "contrast": Head(HEADS["contrast"], aggregation="max")}
    keras.utils.set_random_seed(1)
    sizes = protocol.ProtocolSizes(channels=TINY)
    model = protocol.build(heads, sizes)
    model.save_weights(weights)
    calibration = protocol.Calibration({"contrast": 0.5, "region": 2.0}, "30 series")
    protocol.write_description(weights, protocol.Description(heads, sizes, calibration))
    export("protocol", tmp_path / "models", weights=weights)
    batch = np.concatenate([protocol_batch(volume(seed, depth=16)) for seed in range(3)])
    raw = {name: np.asarray(scores, np.float64) for name, scores in model.predict_on_batch(batch).items()}
    with serving(tmp_path / "models") as client:
        answered = client.classify_protocol(batch)
    sharpened = raw["contrast"] ** 2 / (raw["contrast"] ** 2).sum(axis=1, keepdims=True)
    highest = sharpened.max(axis=0)
    assert list(answered.heads["contrast"].values()) == pytest.approx(highest / highest.sum(), abs=1e-3)
    softened = raw["region"] ** 0.5 / (raw["region"] ** 0.5).sum(axis=1, keepdims=True)
    assert list(answered.heads["region"].values()) == pytest.approx(softened.mean(axis=0), abs=1e-3)
    assert list(answered.heads["kernel"].values()) == pytest.approx(raw["kernel"].mean(axis=0), abs=1e-3)


def test_herald_check_learns_heads_and_calibration_of_both_models_from_the_server_itself(tmp_path: Path) -> None:
    import tensorflow as tf

    weights = tmp_path / "own.weights.h5"
    heads, sizes = read_heads(protocol.DEFAULT_HEADS), protocol.ProtocolSizes(channels=TINY)
    protocol.build(heads, sizes).save_weights(weights)
    calibration = protocol.Calibration({"contrast": 0.5}, "30 series")
    protocol.write_description(weights, protocol.Description(heads, sizes, calibration))
    export("protocol", tmp_path / "models", weights=weights)

    def detect(volume: "tf.Tensor") -> dict[str, "tf.Tensor"]:
        mean = tf.reduce_mean(tf.cast(volume, tf.float32), axis=(1, 2))[:, None] * tf.zeros((1, len(FINDINGS)))
        mask = tf.cast(mean[:, None, None] + tf.zeros((1, *HEMORRHAGE.outputs["mask"].shape[1:])), tf.uint8)
        return {"mask": mask, "slice_probability": mean, "probability": tf.reduce_max(mean, axis=0)}

    (tmp_path / "models" / "hemorrhage").mkdir()
    card = {"calibration": {"scale": [], "threshold": []}, "obtained": "5 of 5 folds", "target_sensitivity": 0.95}
    write_saved_model(detect, HEMORRHAGE, tmp_path / "models" / "hemorrhage" / "7", json.dumps(card).encode())
    with serving(tmp_path / "models") as client:
        environment = {"HERALD_NODE__DATA_DIR": str(tmp_path), "HERALD_ROUTER__SERVING_ADDRESS": client.address}
        config = load_config(environment=environment)
        outcomes = {outcome.what: outcome for outcome in check(config, quick=True)}
    assert outcomes["models"].ok, outcomes["models"].detail
    told = "protocol 1: tells contrast, orientation, kernel, region; temperatures contrast 0.50, others 1, on 30 series"
    assert told in outcomes["models"].detail
    told = "hemorrhage 7: operating point 0.50 chosen for sensitivity 0.95; calibrated on 5 of 5 folds"
    assert told in outcomes["models"].detail


# --- aggregation -----------------------------------------------------------------------------------------------------

SCORES = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]], np.float32)


@pytest.mark.parametrize(
    ("how", "first"),
    [("mean", 0.625), ("median", 0.75), ("max", 0.5), ("middle", 0.75)],
)
def test_scores_of_several_chunks_become_one(how: str, first: float) -> None:
    one = aggregate(SCORES, how)  # type: ignore[arg-type]
    assert one.tolist() == pytest.approx([first, 1 - first], abs=1e-6)


@pytest.mark.parametrize("how", ["mean", "median", "max", "middle"])
def test_the_score_of_a_single_chunk_stays_as_it_is_however_it_is_aggregated(how: str) -> None:
    assert aggregate(SCORES[:1], how).tolist() == pytest.approx([0.9, 0.1])  # type: ignore[arg-type]


def test_the_second_step_is_left_out_where_the_first_says_something_else() -> None:
    heads = read_heads(TOMLS[1])
    second = np.array([[0.4, 0.6]], np.float32)
    early = answers({"phase": np.array([[0.8, 0.1, 0.1]], np.float32), "arterial": second}, heads)
    late = answers({"phase": np.array([[0.1, 0.8, 0.1]], np.float32), "arterial": second}, heads)
    assert early["arterial"] == pytest.approx({"early": 0.4, "late": 0.6})
    assert list(late) == ["phase"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "has no head"),
        ({"Phase": {"classes": ["a", "b"]}}, "'Phase' cannot be a head"),
        ({"card": {"classes": ["a", "b"]}}, "'card' cannot be a head"),
        ({"phase": {"classes": ["a"]}}, "not at least two"),
        ({"phase": {"classes": ["a", "a"]}}, "not at least two"),
        ({"phase": {"classes": ["a", "b"], "weight": 2}}, "head phase: .*`weight`"),
        ({"phase": {"classes": ["a", "b"], "aggregation": "sum"}}, "head phase: .*'sum'"),
        ({"phase": {"classes": ["a", "b"], "loss_weight": 0}}, "loss_weight must be above 0"),
        ({"phase": {"classes": ["a", "b"], "given": {"other": "x"}}}, "given names other = 'x'"),
        ({"phase": 3}, "head phase: Expected `object`"),
    ],
    ids=str,
)
def test_a_mistake_in_the_heads_is_named_with_its_head(content: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_heads(content, "own.toml")


# --- a site's labels -------------------------------------------------------------------------------------------------


def test_an_empty_cell_counts_nothing_and_patients_stay_on_one_side(tmp_path: Path) -> None:
    heads = read_heads(TOMLS[0])
    rows = read_labels(site(tmp_path, heads), heads)
    series = prepare_site(rows, tmp_path / "cache")
    source = Source({"site": [series[1]]}, heads, {"site": 1.0}, batch=2)
    volumes, targets, weights = source.batch(0)
    assert volumes.shape == (2, 8, 256, 256)
    assert weights["body_part"].tolist() == [0, 0]
    assert weights["orientation"].tolist() == [1, 1]
    assert targets["orientation"].argmax(axis=1).tolist() == [1, 1]
    assert not np.array_equal(volumes[0], volumes[1])
    assert np.array_equal(volumes, source.batch(0)[0])
    assert not np.array_equal(volumes, Source({"site": [series[1]]}, heads, {"site": 1.0}, 7, 2).batch(0)[0])

    same = [replace(one, patient="c0ffee") for one in series]
    assert held_out(same) == ([], same)
    many = [replace(series[0], patient=f"{i:012x}") for i in (*range(10, 30), 12)]
    trained, aside = held_out(many)
    assert [one.patient[-2:] for one in aside] == ["0a", "0f", "14", "19"]
    assert not {one.patient for one in trained} & {one.patient for one in aside}
    fewer = held_out(many[:10])[1]  # more patients later bring nobody who was kept aside into training
    assert {one.patient for one in fewer} < {one.patient for one in aside}
    assert not any("P" in one.patient for one in series)


def test_series_are_decoded_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = read_heads(TOMLS[0])
    rows = read_labels(site(tmp_path, heads), heads)
    first = prepare_site(rows, tmp_path / "cache")
    monkeypatch.setattr("serving.site_series.site_volume", lambda *_: pytest.fail("decoded again"))
    assert prepare_site(rows, tmp_path / "cache") == first
    monkeypatch.undo()
    (tmp_path / "s0" / "0001.dcm").unlink()
    again = prepare_site(rows, tmp_path / "cache")
    assert again[0].pixels != first[0].pixels
    assert again[1:] == first[1:]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"path": "s0", "phase": "venous"}, "line 2: phase is 'venous', none of arterial, portal_venous, delayed"),
        (
            {"path": "s0", "phase": "delayed", "arterial": "early"},
            "line 2: arterial is 'early' where phase is 'delayed'",
        ),
        ({"path": "s0", "region": "head"}, "column for none of the heads phase, arterial"),
        ({"path": "s0", "phase": ""}, "labels no series"),
        ({"phase": "delayed"}, "no column path"),
    ],
    ids=str,
)
def test_a_mistake_in_the_labels_is_named_with_its_line(tmp_path: Path, row: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_labels(table(tmp_path / "labels.csv", [row]), read_heads(TOMLS[1]))


def test_heads_that_no_series_tells_are_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["protocol", "--heads", str(TOMLS[0]), "--weights", str(tmp_path / "own.weights.h5")]
    assert train_main([*command, "--cache", str(tmp_path)]) == 1
    assert "no series tells body_part; add a column of that name" in capsys.readouterr().err


# --- fine-tuning and resuming ----------------------------------------------------------------------------------------


def test_fine_tuning_keeps_the_trunk_and_the_heads_whose_classes_are_the_same(tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    heads = read_heads(protocol.DEFAULT_HEADS)
    start, sizes = tmp_path / "start.weights.h5", protocol.ProtocolSizes(channels=TINY)
    trained = protocol.build(heads, sizes)
    trained.save_weights(start)
    protocol.write_description(start, protocol.Description(heads, sizes))

    wanted = {**heads, "region": Head(("head", "neck", "other")), "side": Head(("left", "right"))}
    model, kept = protocol.fine_tunable(start, wanted)
    assert kept == ["contrast", "orientation", "kernel"]
    before, after = ({layer.name: layer.get_weights() for layer in m.layers if layer.weights} for m in (trained, model))
    assert set(before) - {"region_head"} == set(after) - {"region_head", "side_head"}
    for name in before.keys() - {"region_head"}:
        assert all(np.array_equal(a, b) for a, b in zip(before[name], after[name], strict=True)), name
    assert after["region_head"][0].shape[-1] == 3

    told = StringIO()
    plan = Plan(heads=wanted, cycles=((1, 1e-3),), start=str(start))
    source = Source(SOURCE.pools, wanted, batch=2)
    train(source, tmp_path / "own.weights.h5", plan, console=Console(file=told, width=500))
    assert "trunk, contrast, orientation, kernel; begun anew: region, side" in told.getvalue()
    assert protocol.describe(tmp_path / "own.weights.h5").heads == wanted


SOURCE = Source(
    {"head": [Sample(np.full((8, 256, 256), 40, np.int16), "contrast", "axial", "head", 0.9, 5.0)]}, batch=2
)
PLAN = Plan(heads=read_heads(protocol.DEFAULT_HEADS), channels=TINY, cycles=((4, 1e-3), (3, 1e-3)), seed=5)


def test_of_the_weights_before_fine_tuning_a_share_can_be_kept(tmp_path: Path) -> None:
    start = tmp_path / "start.weights.h5"
    train(SOURCE, start, PLAN)
    written = {}
    for keep in (0.0, 0.5):
        plan = msgspec.structs.replace(PLAN, channels=(), cycles=((2, 1e-2),), start=str(start), keep=keep)
        train(SOURCE, tmp_path / f"{keep}.weights.h5", plan)
        written[keep] = protocol.load(tmp_path / f"{keep}.weights.h5").get_weights()
    before = protocol.load(start).get_weights()
    moved = False
    for was, now, half in zip(before, written[0.0], written[0.5], strict=True):
        moved |= not np.allclose(was, now)
        np.testing.assert_allclose(half, (was + now) / 2, rtol=1e-4, atol=1e-5)
    assert moved

    other = msgspec.structs.replace(plan, heads={**PLAN.heads, "side": Head(("left", "right"))})
    with pytest.raises(ConfigError, match="no side of which to keep a share; leave --keep out"):
        train(SOURCE, tmp_path / "other.weights.h5", other)


@pytest.mark.parametrize("wrong", [["--keep", "0.5"], ["--start", "some.weights.h5", "--keep", "1"]], ids=" ".join)
def test_a_share_to_keep_of_nothing_or_of_all_is_refused(capsys: pytest.CaptureFixture[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        train_main(["protocol", *wrong])
    assert "--keep is at least 0 and below 1" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from test_serving_heads import PLAN, SOURCE, train
whole = SOURCE.batch
def batch(step):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(step)
SOURCE.batch = batch
train(SOURCE, Path(sys.argv[3]) / "own.weights.h5", PLAN, save_every=2)
"""


def _trained(folder: Path, plan: Plan = PLAN) -> list[np.ndarray]:
    train(SOURCE, folder / "own.weights.h5", plan, save_every=2)
    return list(protocol.load(folder / "own.weights.h5").get_weights())


@pytest.mark.timeout(400)  # TensorFlow starts twice
def test_a_run_that_was_killed_and_taken_up_again_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here.parent), str(here), str(tmp_path)]
    died = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    with np.load(tmp_path / "own.state.npz") as saved:
        assert saved["done"] == 4
    assert not (tmp_path / "own.weights.h5").exists()

    with pytest.raises(ConfigError, match=r"a run with another seed; .*remove the file"):
        _trained(tmp_path, plan=Plan(PLAN.heads, PLAN.channels, PLAN.cycles, seed=6))
    resumed = _trained(tmp_path)
    assert not (tmp_path / "own.state.npz").exists()
    whole = _trained(tmp_path / "whole")
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole, strict=True))

import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from herald.discrimination import auc
from herald.errors import ConfigError, SignatureMismatch
from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from herald.volume import Volume
from serving import hemorrhage
from serving.crops import (
    ALL_SETS,
    FOLDS,
    HELD_OUT_FROM,
    OUTPUT_SLICES,
    WORTH_PROCESSES,
    Pixels,
    Prepared,
    Sampler,
    augment,
    bleeds,
    fold_of,
    identity,
    load_patients,
    prepare,
    simulated_patient,
    split,
    truth_of,
)
from serving.evaluation import bootstrap_interval, operating_point, platt, sensitivity_threshold, wilson
from serving.hemorrhage import WEIGHTS, Sizes, build
from serving.readers import UNKNOWN, LabelledVolume, anywhere
from serving.score_hemorrhage import MASK_OFFSETS, evaluate, score, served
from serving.train_hemorrhage import loss, main, train
from serving.unfinished import UnfinishedRun
from serving.whole_volume import INPUT, STEPS, TOP, EightBits, forward, observed_ranges

# keras 3.15 turns variables to arrays in a way that NumPy 2 is to drop
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

SMALL = Sizes(widths=(3, 4, 6, 6, 8), blocks=(0, 1, 0, 0, 1))


@pytest.fixture(scope="module")
def small() -> keras.Model:
    """A small detector whose normalisation has statistics of its own."""
    keras.utils.set_random_seed(3)
    model = build(SMALL)
    rng = np.random.default_rng(3)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            size = layer.gamma.shape
            layer.set_weights([rng.uniform(0.5, 1.5, size), *rng.normal(0, 0.2, (2, *size)), rng.uniform(0.5, 2, size)])
    return model


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(40, 30, (1, 10, DETECTION_IN_PLANE, DETECTION_IN_PLANE)).astype(np.float32)


def run(model: keras.Model, volume: np.ndarray) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in model(volume, training=False).items()}


def test_one_pass_over_a_volume_gives_per_slice_exactly_what_a_window_of_five_slices_gives(small, volume):
    whole = run(small, volume)
    assert whole["mask"].shape == (1, 6, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS))
    for i in range(6):
        window = run(small, volume[:, i : i + 5])
        for name in ("mask", "slice", "pooled"):
            np.testing.assert_allclose(window[name][:, 0], whole[name][:, i], rtol=1e-4, atol=1e-4)
    assert np.ptp(whole["slice"], axis=1).min() > 1e-3  # or the comparison above would say nothing


def test_what_is_served_for_a_whole_volume_is_what_was_trained(small, volume):
    trained = run(small, volume)
    served = {name: np.asarray(value) for name, value in forward(small)(tf.constant(volume[0])).items()}
    served["mask"] = np.asarray(tf.nn.depth_to_space(served["mask"], 2))
    for name, value in served.items():
        np.testing.assert_allclose(value, trained[name][0], rtol=1e-4, atol=1e-4)
        assert np.ptp(value) > 1e-2


def test_eight_bits_stay_close_to_what_was_trained(small, volume):
    ranges = observed_ranges(small, [volume[0].astype(np.int16)])
    assert ranges[INPUT] == TOP
    assert {"down1", "down1_block0", "up1", "up1_refine"} <= ranges.keys()
    exact, rounded = (forward(small, rounding)(tf.constant(volume[0])) for rounding in (None, EightBits(ranges)))
    for name in ("mask", "slice", "pooled"):
        off = np.abs(np.subtract(rounded[name], exact[name]))
        assert 0 < off.max() < 0.05 * np.ptp(exact[name])


def test_an_activation_beyond_its_range_is_cut_off_and_a_kernel_keeps_its_extremes():
    rounding = EightBits({"down1": 10.2})
    np.testing.assert_allclose(rounding.activation(tf.constant([0.0, 0.05, 5.0, 99.0]), "down1"), [0, 0.04, 5, 10.2],
                               atol=1e-5)  # fmt: skip
    kernel = np.array([[-2.0, 0.1], [0.5, -0.01], [2.0, 0.0]], np.float32).reshape(1, 3, 1, 2)
    kept = np.asarray(rounding.kernel(kernel))
    np.testing.assert_allclose(kept, kernel, atol=2.0 / STEPS / 2 + 1e-6)
    steps = kept / np.abs(kernel).max(axis=(0, 1, 2)) * STEPS
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert 255 * 2 * np.abs(steps).max() < 2**15  # two products in sixteen bits
    np.testing.assert_allclose(kept[0, [0, 2, 2], 0, [0, 0, 1]], [-2, 2, 0], atol=1e-6)  # a grid with 0 in its middle


def test_ranges_of_another_model_are_refused_by_name(small, volume):
    ranges = observed_ranges(small, [volume[0].astype(np.int16)])
    del ranges["up2_refine"]
    with pytest.raises(ConfigError, match=r"up2_refine has none; write them: .*--score-shipped --evaluate"):
        forward(small, EightBits(ranges))(tf.constant(volume[0]))


@pytest.mark.parametrize("output", ["mask", "slice"])
def test_a_slice_depends_on_two_neighbours_on_either_side_and_on_no_more(small, volume, output):
    before = run(small, volume)[output]
    for changed in range(10):
        other = volume.copy()
        other[:, changed] = other[:, changed, ::-1] + 15
        after = run(small, other)[output]
        differs = [not np.allclose(before[:, i], after[:, i], atol=1e-6) for i in range(6)]
        assert differs == [abs(i + 2 - changed) <= 2 for i in range(6)]


def test_a_full_model_has_between_one_and_two_million_parameters_and_named_layers():
    model = build()
    assert 1.0e6 < model.count_params() < 2.0e6
    assert {"down1_conv", "down4_block1_conv", "up3_transpose", "up3_project", "mask_transpose"} <= {
        layer.name for layer in model.layers
    }


def test_values_beyond_every_window_change_nothing(small, volume):
    saturated = np.where(volume > 60, 1000, volume)
    extreme = np.where(volume > 60, 3000, volume)
    np.testing.assert_array_equal(run(small, saturated)["slice"], run(small, extreme)["slice"])


def test_normalisation_learns_as_that_of_keras_does():
    x = np.random.default_rng(5).normal(3, 2, (2, 4, 16, 16, 6)).astype(np.float32)
    ours, theirs = hemorrhage.BatchNormalization(momentum=0.9), keras.layers.BatchNormalization(momentum=0.9)
    outputs, gradients = [], []
    for layer in (ours, theirs):
        layer.build(x.shape)
        layer.gamma.assign(np.linspace(0.5, 1.5, 6))
        with tf.GradientTape() as tape:
            y = layer(tf.constant(x), training=True)
            value = tf.reduce_sum(y**3)
        outputs.append(y.numpy())
        gradients.append([g.numpy() for g in tape.gradient(value, layer.trainable_variables)])
    np.testing.assert_allclose(*outputs, atol=1e-4)
    for one, two in zip(*gradients, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=0.1)
    np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, rtol=1e-4)
    np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=2e-3)  # one divides by n - 1


def test_missing_weights_say_how_to_train_them(tmp_path):
    with pytest.raises(SignatureMismatch, match=r"python -m serving.train hemorrhage --all"):
        hemorrhage.load(tmp_path / "none.weights.h5")


# --- learning --------------------------------------------------------------------------------------------------------


def patient(name: str, kind: int | None, source: str = "ct-ich", slices: int = 12) -> Prepared:
    """A bright square in slices 4 to 7 of a grey head; kind None bleeds nowhere."""
    rng = np.random.default_rng(sum(map(ord, name)))
    volume = rng.normal(30, 3, (slices, DETECTION_IN_PLANE, DETECTION_IN_PLANE)).astype(np.int16)
    positive = np.zeros(volume.shape, dtype=np.uint8)
    slice_truth = np.zeros((slices, len(FINDINGS)), dtype=np.uint8)
    if kind is not None:
        volume[4:8, 100:140, 100:140] += 40
        positive[4:8, 100:140, 100:140] = 1 | (1 << kind)
        slice_truth[4:8, [0, kind]] = 1
    depth = np.zeros_like(positive)
    depth[:, 60:200, 60:200] = 20
    pixels = Pixels(volume, positive, np.zeros_like(positive), depth)
    return Prepared(source, name, slice_truth, anywhere(slice_truth), False, lambda: pixels)


def test_crops_come_from_every_kind_and_from_patients_without_blood():
    sampler = Sampler([patient("a", 1), patient("b", 3), patient("c", None)], seed=1)
    rng = np.random.default_rng(1)
    crops = [sampler.crop(rng) for _ in range(60)]
    seen = {tuple(np.flatnonzero((truth == 1).any(axis=0))) for *_, truth in crops}
    assert seen >= {(), (0, 1), (0, 3)}
    volume, positive, unknown, truth = crops[0]
    assert volume.shape == (OUTPUT_SLICES + 4, DETECTION_IN_PLANE, DETECTION_IN_PLANE)
    assert positive.shape == unknown.shape == (OUTPUT_SLICES, DETECTION_IN_PLANE, DETECTION_IN_PLANE)
    assert truth.shape == (OUTPUT_SLICES, len(FINDINGS))


def test_the_middle_of_a_crop_is_what_its_masks_outline():
    sampler = Sampler([patient("a", 1)], seed=2)
    rng = np.random.default_rng(2)
    for _ in range(10):
        volume, positive, *_ = sampler.crop(rng)
        inner = volume[2:-2]
        assert (inner[positive > 0] > 50).all()
        assert not positive.any() or (inner[positive == 0] < 50).all()


def test_a_batch_follows_from_the_seed_and_its_number_alone():
    patients = [patient("a", 1), patient("c", None)]
    first, again, other = Sampler(patients, seed=5), Sampler(patients, seed=5), Sampler(patients, seed=6)
    first.batch(0)
    for one, two in zip(first.batch(7), again.batch(7), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.batch(7)[0], other.batch(7)[0])


def test_sets_of_which_there_is_nobody_are_an_error():
    with pytest.raises(ConfigError, match="nobody to learn from in rsna-2019"):
        Sampler([patient("a", 1)], seed=1, shares={"rsna-2019": 1.0})


def test_slices_that_show_too_little_of_a_drawn_bleed_count_neither_way():
    positive = np.zeros((3, 4, 4), dtype=np.uint8)
    positive[1:, 0, 0] = 3
    truth, unknown = truth_of(positive, np.array([0, 0, 3], dtype=np.uint8))
    assert truth[:, 0].tolist() == truth[:, 1].tolist() == [0, 1, UNKNOWN]
    assert not truth[:, 2:].any()
    assert unknown[:, 2, 2].tolist() == [0, 0, 3]


def test_thin_slices_are_averaged_with_their_truth_as_the_node_does():
    hounsfield = np.full((20, 64, 64), 30, dtype=np.int16)
    hounsfield[8:12, 20:40, 20:40] = 70
    truth = np.zeros((20, 64, 64, len(FINDINGS)), dtype=np.uint8)
    truth[8:12, 20:40, 20:40, 0] = 1
    slice_truth = np.zeros((20, len(FINDINGS)), dtype=np.uint8)
    slice_truth[8:12, 0], slice_truth[12:, 0] = 1, UNKNOWN
    volume = Volume(hounsfield, np.arange(20) * 1.25, (0.9, 0.9))
    prepared = prepare(LabelledVolume("site", "x", volume, truth, slice_truth))
    assert prepared.pixels.volume.shape == (5, DETECTION_IN_PLANE, DETECTION_IN_PLANE)
    assert prepared.slice_truth[:, 0].tolist() == [0, 0, 1, UNKNOWN, UNKNOWN]
    assert [bool(plane.any()) for plane in prepared.pixels.positive] == [False, False, True, False, False]


@pytest.mark.parametrize("seed", [1001, 1007, 1037])
def test_what_a_simulated_head_calls_blood_looks_like_blood_also_when_it_is_thin_and_on_the_skull(seed):
    labelled = simulated_patient(seed)
    outlined = labelled.volume.hounsfield[labelled.truth[..., FINDINGS.index("edh_sdh")] == 1]
    assert outlined.size > 50
    assert 20 < np.median(outlined) < 90
    assert outlined.max() <= 150
    area = labelled.truth[..., 0].sum(axis=(1, 2)) * np.prod(labelled.volume.pixel_spacing_mm)
    expected = [1 if mm2 >= 20 else UNKNOWN if mm2 > 0 else 0 for mm2 in area]
    assert labelled.slice_truth[:, 0].tolist() == expected


def test_masks_follow_the_geometry_of_augmentation():
    sampler = Sampler([patient("a", 1)], seed=2)
    batch = next(batch for i in range(50) if (batch := sampler.batch(i))[1].any())
    volume, positive, _ = augment(*map(tf.constant, batch[:3]), keras.random.SeedGenerator(5))
    inner, mask = volume.numpy()[:, 2:-2], positive.numpy() > 0
    assert inner[mask].mean() > 60
    assert inner[~mask & (inner > -100)].mean() < 45
    assert not np.array_equal(mask, batch[1] > 0)


def test_what_is_unknown_costs_nothing():
    rng = np.random.default_rng(0)
    shape = (1, 2, 16, 16)
    outputs = {
        "mask": tf.constant(rng.normal(size=(*shape, 5)), tf.float32),
        "slice": tf.constant(rng.normal(size=(1, 2, 5)), tf.float32),
        "pooled": tf.constant(rng.normal(size=(1, 2, 5)), tf.float32),
    }
    nothing = tf.zeros(shape, tf.int32)
    all_unknown = tf.fill(shape, 31)
    blind = loss(outputs, nothing, all_unknown, tf.fill((1, 2, 5), UNKNOWN))
    told = loss(outputs, nothing, nothing, tf.zeros((1, 2, 5), tf.int32))
    assert float(blind) == pytest.approx(0, abs=1e-6)
    assert float(told) > 1


def test_a_better_answer_costs_less():
    positive = np.zeros((1, 2, 32, 32), dtype=np.int32)
    positive[0, 0, 8:20, 8:20] = 3
    truth = np.array([[[1, 1, 0, 0, 0], [0] * 5]])
    voxel = np.stack([(positive & (1 << c)) > 0 for c in range(5)], axis=-1)

    def cost(sharpness: float) -> float:
        slices = tf.constant(sharpness * (2.0 * truth - 1), tf.float32)
        outputs = {"mask": tf.constant(sharpness * (2.0 * voxel - 1), tf.float32), "slice": slices, "pooled": slices}
        return float(loss(outputs, tf.constant(positive), tf.zeros_like(positive), tf.constant(truth, tf.int32)))

    assert cost(6.0) < 0.2 < cost(0.0) < cost(-2.0)


def test_no_patient_is_in_two_folds_and_each_fold_has_both_classes():
    patients = [patient(f"p{i}", 1 if i % 2 == 0 else None, slices=8) for i in range(4 * FOLDS)]
    folds = fold_of(patients)
    assert len(folds) == 4 * FOLDS
    for fold in range(FOLDS):
        learned, aside = split(patients, fold)
        assert {p.patient for p in learned} | {p.patient for p in aside} == {p.patient for p in patients}
        assert not {p.patient for p in learned} & {p.patient for p in aside}
        assert {bool((p.slice_truth == 1).any()) for p in aside} == {True, False}
    assert len(split(patients, None)[0]) == len(patients)


def test_two_sets_that_show_the_same_patient_keep_it_in_one_fold():
    twice = [patient(f"p{i}", None, source, 8) for i in range(10) for source in ("rsna-2019", "bhsd")]
    learned, aside = split(twice, None)
    assert {p.patient for p in learned} & {p.patient for p in aside} == set()
    assert len(aside) == 4


def test_what_pretraining_has_seen_is_never_measured():
    names = [f"{i:04d}" for i in (0, 1, HELD_OUT_FROM, HELD_OUT_FROM + 1)]
    others = [patient(f"h{i}", 1, "phe-sich", 8) for i in range(20)]
    others += [patient(name, 1, "simulated", 8) for name in names]
    kept = {p.patient for p in split(others, None)[1]}
    assert kept >= set(names[2:])
    assert not kept & set(names[:2])
    assert {p.patient for p in split(others, 0)[1]} == kept
    assert not split(others, 3)[1]
    assert all({p.patient for p in split(others, fold)[0]}.isdisjoint(kept) for fold in range(FOLDS))


def test_patients_are_prepared_once_and_their_pixels_read_only_when_asked_for(tmp_path, monkeypatch):
    hounsfield = np.full((8, 64, 64), 30, dtype=np.int16)
    truth = np.zeros((8, 64, 64, len(FINDINGS)), dtype=np.uint8)
    truth[3, 20:40, 20:40, 0] = 1
    labelled = LabelledVolume("site", "x", Volume(hounsfield, np.arange(8) * 5.0, (0.9, 0.9)), truth, truth.max((1, 2)))
    asked = []
    monkeypatch.setitem(ALL_SETS, "site", ("set", lambda folder: ["x"], lambda *who: asked.append(who) or labelled))
    load_patients(tmp_path, tmp_path / "prepared", "site")
    (stored,) = load_patients(tmp_path, tmp_path / "prepared", "site")
    assert asked == [(tmp_path / "set", "x")]
    assert (stored.source, stored.patient, stored.child) == ("site", "x", False)
    np.testing.assert_array_equal(stored.slice_truth, truth.max((1, 2)))
    for name, array in vars(prepare(labelled).pixels).items():
        np.testing.assert_array_equal(getattr(stored.pixels, name), array)
    (tmp_path / "prepared" / "site_x.npz").unlink()
    assert stored.pixels.volume.any()  # read lately, so kept


def flat_patient(folder, name):
    """A reader that processes can be sent: it leaves the number of the one that called it."""
    (folder / name).write_text(str(os.getpid()))
    hounsfield = np.full((8, 64, 64), int(name), dtype=np.int16)
    truth = np.zeros((8, 64, 64, len(FINDINGS)), dtype=np.uint8)
    return LabelledVolume("site", name, Volume(hounsfield, np.arange(8) * 5.0, (0.9, 0.9)), truth, truth.max((1, 2)))


def test_many_patients_are_prepared_by_other_processes_as_one_alone_would_be(tmp_path, monkeypatch):
    names = [str(number) for number in range(WORTH_PROCESSES)]
    (tmp_path / "set").mkdir()
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setitem(ALL_SETS, "site", ("set", lambda folder: names, flat_patient))
    stored = load_patients(tmp_path, tmp_path / "prepared", "site")
    assert [p.patient for p in stored] == names
    assert [int(p.pixels.volume.max()) for p in stored] == list(range(WORTH_PROCESSES))
    assert str(os.getpid()) not in {(tmp_path / "set" / name).read_text() for name in names}
    assert len(list((tmp_path / "prepared").iterdir())) == len(names)


def test_a_patient_known_to_bleed_but_not_where_is_dealt_out_as_one_and_never_learned_from_as_healthy(
    tmp_path, monkeypatch
):
    hounsfield = np.full((8, 64, 64), 30, dtype=np.int16)
    unknown = np.full((8, len(FINDINGS)), UNKNOWN, dtype=np.uint8)
    voxels = np.full((8, 64, 64, len(FINDINGS)), UNKNOWN, dtype=np.uint8)
    study_truth = np.array([1, 1, UNKNOWN, 0, UNKNOWN], dtype=np.uint8)
    volume = Volume(hounsfield, np.arange(8) * 5.0, (0.9, 0.9))
    labelled = LabelledVolume("site", "x", volume, voxels, unknown, study_truth=study_truth)
    monkeypatch.setitem(ALL_SETS, "site", ("set", lambda folder: ["x"], lambda *who: labelled))
    (tmp_path / "set").mkdir()
    load_patients(tmp_path, tmp_path / "prepared", "site")
    (stored,) = load_patients(tmp_path, tmp_path / "prepared", "site")
    np.testing.assert_array_equal(stored.study_truth, study_truth)
    assert bleeds(stored)
    healthy = [patient(f"h{i}", None, "site") for i in range(FOLDS)]
    assert fold_of([healthy[0], stored, *healthy[1:]])["site", "x"] == 0  # the first of those that bleed
    sampler = Sampler([stored, *healthy], 1, {"site": 1.0})
    for index in range(4):
        *_, slice_truth = sampler.batch(index)
        assert (slice_truth[..., 0] != UNKNOWN).all()
    assert not sampler.donors


def test_a_run_that_was_cut_short_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.train_hemorrhage.build", lambda slices=None: build(SMALL, slices))
    monkeypatch.setattr("serving.train_hemorrhage.SAVE_EVERY", 1)
    monkeypatch.setattr("serving.crops.CROPS", 1)
    # in float32, where the order in which threads add up matters little
    monkeypatch.setattr("keras.mixed_precision.set_global_policy", lambda policy: None)
    keras.utils.set_random_seed(0)
    patients = [patient("a", 1), patient("c", None)]
    build(SMALL).save_weights(tmp_path / "first.weights.h5")
    start = tmp_path / "first.weights.h5"
    train(patients, tmp_path / "whole.weights.h5", steps=3, seed=1, label="whole", start=start)

    class Killed(BaseException):
        pass

    save = UnfinishedRun.save

    def killed(self, done, loss):
        save(self, done, loss)
        if done == 1:
            raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(UnfinishedRun, "save", killed)
        with pytest.raises(Killed):
            train(patients, tmp_path / "cut.weights.h5", steps=3, seed=1, label="cut", start=start)
    assert (tmp_path / "cut.state.npz").exists()
    asked, batch = [], Sampler.batch
    monkeypatch.setattr(Sampler, "batch", lambda self, index: asked.append(index) or batch(self, index))
    train(patients, tmp_path / "cut.weights.h5", steps=3, seed=1, label="cut", start=start)
    assert min(asked) == 1
    assert not (tmp_path / "cut.state.npz").exists()
    kernels = []
    for name in ("first", "whole", "cut"):
        model = build(SMALL)
        model.load_weights(tmp_path / f"{name}.weights.h5")
        kernels.append(np.concatenate([v.numpy().ravel() for v in model.trainable_variables]))
    first, whole, cut = kernels
    moved = np.abs(whole - first).mean()
    assert moved > 1e-5
    assert np.abs(cut - whole).mean() < 0.2 * moved


def test_a_state_of_another_recipe_is_neither_gone_on_with_nor_lost(tmp_path):
    variables = [keras.Variable(np.zeros(2))]
    weights = tmp_path / "a.weights.h5"
    UnfinishedRun(weights, {"seed": 1, "rate": 2}, variables).save(5, 0.5)
    variables[0].assign([7.0, 7.0])
    same, other = (UnfinishedRun(weights, {"seed": seed, "rate": 2}, variables) for seed in (1, 3))
    assert (same.resume(), same.done, same.loss) == (True, 5, 0.5)
    assert not variables[0].numpy().any()
    with pytest.raises(ConfigError, match="another seed; give the same again, or remove the file"):
        other.resume()
    assert (tmp_path / "a.state.npz").exists()


@pytest.mark.parametrize("shares", ["nowhere=1", "ct-ich", "ct-ich=much"])
def test_shares_that_cannot_be_read_are_named(shares, capsys):
    with pytest.raises(SystemExit):
        main(["--pretrain", "--shares", shares])
    assert shares.partition("=")[0] in capsys.readouterr().err


def test_a_fold_is_scored_with_weights_that_never_saw_its_patients_or_not_at_all(tmp_path, monkeypatch):
    asked = []
    work = tmp_path / "work"
    ours, shipped = (root / "of_3_folds" / str(DETECTION_IN_PLANE) for root in (work, tmp_path / "weights"))
    ours.mkdir(parents=True)
    shipped.mkdir(parents=True)
    monkeypatch.setattr("serving.train_hemorrhage.WEIGHTS", tmp_path / "weights" / "hemorrhage.weights.h5")
    monkeypatch.setattr("serving.train_hemorrhage.load_patients", lambda data, work, source: [])
    monkeypatch.setattr("serving.train_hemorrhage.score", lambda weights, aside, out, *_: asked.append(weights) or
                        out.mkdir(parents=True, exist_ok=True))  # fmt: skip
    (shipped / "fold1.weights.h5").touch()
    main(["--score", "1", "--folds", "3", "--work", str(work)])
    (ours / "fold1.weights.h5").touch()
    main(["--score", "1", "--folds", "3", "--work", str(work)])
    assert asked == [shipped / "fold1.weights.h5", ours / "fold1.weights.h5"]
    with pytest.raises(ConfigError, match=r"no weights of fold 1 of 5 .*--folds 5 --fold 1"):
        main(["--score", "1", "--folds", "5", "--work", str(work)])  # both are of other folds


def test_training_starts_from_given_weights_and_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.train_hemorrhage.SAVE_EVERY", 2)
    monkeypatch.setattr("serving.train_hemorrhage.build", lambda slices=None: build(SMALL, slices))
    build(SMALL).save_weights(tmp_path / "first.weights.h5")
    train([patient("a", 1), patient("c", None)], tmp_path / "second.weights.h5", steps=2, seed=1, label="second",
          start=tmp_path / "first.weights.h5")  # fmt: skip
    models = [build(SMALL), build(SMALL)]
    for model, name in zip(models, ("first", "second"), strict=True):
        model.load_weights(tmp_path / f"{name}.weights.h5")
    first, second = (model.get_layer("down1_conv").kernel.numpy() for model in models)
    assert not np.array_equal(first, second)
    assert np.abs(first - second).max() < 0.05


# --- figures ---------------------------------------------------------------------------------------------------------


def test_auc_counts_ties_half():
    truth = np.array([True, True, False, False])
    assert auc(np.array([2.0, 1.0, 1.0, 0.0]), truth) == pytest.approx(0.875)
    assert np.isnan(auc(np.array([1.0]), np.array([True])))


def test_wilson_interval_is_that_of_the_literature():
    assert wilson(17, 18) == pytest.approx([0.9444, 0.7424, 0.9901], abs=1e-3)


def test_bootstrap_draws_whole_patients():
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(20), 30)
    truth = owner % 2 == 0
    scores = rng.normal(size=20)[owner] + truth
    width = [np.subtract(*bootstrap_interval(scores, truth, o, rounds=200)) for o in (None, owner)]
    assert abs(width[1]) > 2 * abs(width[0])


def test_the_operating_point_reaches_the_sensitivity_asked_for_and_no_more():
    scores, truth = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 2.5]), np.array([True, True, True, True, False, False])
    threshold = sensitivity_threshold(scores, truth, 0.75)
    assert 2.5 < threshold < 3.0
    assert (scores[truth] >= sensitivity_threshold(scores, truth, 0.95)).all()


def test_the_operating_point_gives_up_sensitivity_where_too_many_healthy_would_be_paged():
    scores = np.array([9.0, 8.0, 0.0, *np.arange(1.0, 6.0)])
    truth = np.array([True] * 3 + [False] * 5)
    assert operating_point(scores, truth, sensitivity=0.95, specificity=0.8) == 6.5  # the third would cost all five
    assert operating_point(scores, truth, sensitivity=0.95, specificity=0.0) < 0
    assert operating_point(scores, truth, sensitivity=0.6, specificity=0.8) == 6.5
    assert operating_point(scores[3:], truth[3:], 0.95, 0.8) > 5


def test_of_operating_points_that_find_as_many_the_one_that_spares_most_is_taken():
    scores = np.array([9.0, 3.5, 0.0, *np.arange(1.0, 6.0)])
    truth = np.array([True] * 3 + [False] * 5)
    chosen = [operating_point(scores, truth, 0.95, specificity) for specificity in (0.2, 0.6, 0.8)]
    assert chosen == [3.25, 3.25, 7.0]  # 1.5 would find no more than 3.25 does, and 4.5 no more than 7


def test_platt_scaling_recovers_the_slope():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=4000)
    truth = rng.random(4000) < 1 / (1 + np.exp(-(1.5 * scores - 0.5)))
    assert platt(scores, truth) == pytest.approx((1.5, -0.5), abs=0.15)


def test_evaluation_calibrates_on_mixed_patients_and_reports_each_set_apart(tmp_path):
    rng = np.random.default_rng(3)
    for i in range(24):
        bleeds = i % 2 == 0 or i >= 20
        slice_truth = np.zeros((9, 5), dtype=np.uint8)
        slice_truth[3:6] = bleeds
        logits = rng.normal(-3, 0.3, (9, 5)) + 5 * slice_truth
        source = "ct-ich" if i < 20 else "phe-sich"
        folder = tmp_path / f"fold{i % 2}"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text('{"folds": 5}')
        overlaps = np.linspace(0.1, 0.7, len(MASK_OFFSETS))[:, None] * np.ones(9)
        np.savez(folder / f"{source}_{i:03d}.npz", slice=logits, pooled=logits, slice_truth=slice_truth,
                 study_truth=slice_truth.max(axis=0), child=i % 4 == 0, dice=overlaps,
                 outlined=slice_truth[:, 0])  # fmt: skip
    for i in range(5):  # of these it is known whether they bleed, and of the last not even that
        slice_truth = np.full((9, 5), 0 if i < 2 else UNKNOWN, dtype=np.uint8)
        study_truth = np.full(5, (0, 0, 1, 1, UNKNOWN)[i], dtype=np.uint8)
        logits = rng.normal((-3, -3, 2, 2, 2)[i], 0.3, (9, 5))
        np.savez(tmp_path / "fold0" / f"cq500_{i:03d}.npz", slice=logits, pooled=logits, slice_truth=slice_truth,
                 study_truth=study_truth, child=False, dice=np.zeros((len(MASK_OFFSETS), 9)),
                 outlined=np.zeros(9))  # fmt: skip
    result = evaluate(tmp_path)
    metrics: dict = result["metrics"]
    assert metrics["cq500"]["patients"] == 5
    assert metrics["cq500"]["any"]["positive"] == 2
    assert metrics["cq500"]["any"]["sensitivity"][0] == metrics["cq500"]["any"]["specificity"][0] == 1.0
    assert "slice_auc" not in metrics["cq500"]["any"]
    area, low, high = metrics["ct-ich"]["any"]["patient_auc"]
    assert (area, high) == (1.0, 1.0)
    assert 0.7 < low < 0.95  # told apart perfectly, but of twenty patients only
    assert metrics["ct-ich"]["any"]["sensitivity"][0] == 1.0
    assert result["mask_offset"] == [MASK_OFFSETS[-1]]  # where the outlines fit best
    assert metrics["ct-ich"]["dice_of_outlined_slices"] == pytest.approx(0.7)
    assert result["obtained"].endswith("2 of 5 folds")
    assert metrics["phe-sich"] == metrics["phe-sich"] | {"patients": 4}
    assert "specificity" not in metrics["phe-sich"]["any"]
    assert [metrics[f"ct-ich fold{fold}"]["patients"] for fold in (0, 1)] == [10, 10]
    assert metrics["ct-ich children"]["patients"] + metrics["ct-ich adults"]["patients"] == 20
    assert all(-3 < t < 2 for t in result["threshold"])


def test_the_threshold_is_moved_to_the_scale_of_the_shipped_weights(tmp_path):
    rng = np.random.default_rng(4)
    for i in range(24):
        slice_truth = np.zeros((9, 5), dtype=np.uint8)
        slice_truth[3:6] = i % 2
        logits = rng.normal(-3, 0.3, (9, 5)) + 5 * slice_truth
        source = "ct-ich" if i < 12 else "simulated"
        for folder, beyond in (("fold0", 0.0), ("shipped", -0.7)):
            if folder == "fold0" or source == "simulated":
                (tmp_path / folder).mkdir(exist_ok=True)
                np.savez(tmp_path / folder / f"{source}_{i:03d}.npz", slice=logits + beyond, pooled=logits + beyond,
                         slice_truth=slice_truth, study_truth=slice_truth.max(axis=0), child=False,
                         dice=np.full((len(MASK_OFFSETS), 9), 0.5),
                         outlined=slice_truth[:, 0])  # fmt: skip
    (tmp_path / "fold0" / "run.json").write_text('{"folds": 3}')
    (tmp_path / "shipped" / "ranges.json").write_text('{"windows": 6.0}')
    result = evaluate(tmp_path)
    assert result["ranges"] == {"windows": 6.0}  # of the weights that are exported
    np.testing.assert_allclose(np.subtract(result["threshold"], result["threshold_of_folds"]), -0.7)
    assert result["metrics"]["simulated"]["patients"] == 12
    assert result["metrics"]["simulated"]["any"]["specificity"][0] == 1.0
    for file in (tmp_path / "shipped").iterdir():
        file.unlink()
    without = evaluate(tmp_path)
    assert without["threshold"] == pytest.approx(result["threshold_of_folds"])
    assert "ranges" not in without


def test_scores_of_other_weights_are_not_left_among_those_of_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("serving.score_hemorrhage.build", lambda: build(SMALL))
    build(SMALL).save_weights(tmp_path / "a.weights.h5")
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold0" / "ct-ich_073.npz").touch()
    monkeypatch.setattr("serving.score_hemorrhage.as_served", lambda *_: (dict, {}))
    score(tmp_path / "a.weights.h5", [], tmp_path / "fold0", "scoring", [])
    assert [path.name for path in (tmp_path / "fold0").iterdir()] == ["ranges.json"]


def test_the_outlines_that_are_measured_are_the_ones_that_the_node_draws(tmp_path, monkeypatch):
    voxels = np.full((3, 32, 32, 5), -20.0, np.float32)
    voxels[0, 2:6, 2:6], voxels[2, 20:26, 20:26] = 5.0, 0.1  # sure, and doubtful elsewhere
    logits = np.zeros((3, 5), np.float32)
    said = {"mask": voxels, "slice": logits, "pooled": logits}
    truth = np.zeros((3, 32, 32), np.uint8)
    truth[0, 2:6, 2:6], truth[2, 20:26, 20:26] = 1, 1
    pixels = Pixels(np.zeros((3, 32, 32), np.int16), truth, np.zeros_like(truth), np.zeros_like(truth))
    flags = np.zeros((3, 5), np.uint8)
    monkeypatch.setattr("serving.score_hemorrhage.build", lambda: build(SMALL))
    monkeypatch.setattr("serving.score_hemorrhage.as_served", lambda *_: (lambda _: said, {}))
    build(SMALL).save_weights(tmp_path / "a.weights.h5")
    scored = Prepared("ct-ich", "049", flags, flags[0], False, lambda: pixels)
    score(tmp_path / "a.weights.h5", [scored], tmp_path / "fold0", "scoring", [scored])
    with np.load(tmp_path / "fold0" / "ct-ich_049.npz") as file:
        at_half = MASK_OFFSETS.index(0.0)
        np.testing.assert_array_equal(file["dice"][at_half, [0, 2]], [1.0, 0.0])
        assert np.unpackbits(file["found"][at_half], axis=-1).sum(axis=(1, 2)).tolist() == [16, 0, 0]


def test_a_fold_of_six_keeps_aside_only_whom_a_fold_of_three_did_so_that_its_training_may_go_on_from_there():
    people = [patient(f"{i:03d}", 1 if i % 5 < 2 else None, "ct-ich") for i in range(41)]
    for fold in range(6):
        six, three = ({identity(p) for p in split(people, fold % folds, folds)[1]} for folds in (6, 3))
        assert six
        assert six < three


def test_a_patient_scored_in_two_folds_is_refused_by_name(tmp_path):
    for fold in (0, 1):
        (tmp_path / f"fold{fold}").mkdir()
        (tmp_path / f"fold{fold}" / "run.json").write_text('{"folds": 3}')
        np.savez(tmp_path / f"fold{fold}" / "ct-ich_073.npz", slice=np.zeros((9, 5)), pooled=np.zeros((9, 5)))
    with pytest.raises(ConfigError, match="ct-ich 073 was scored by fold0 and fold1"):
        evaluate(tmp_path)


def test_a_kind_is_measured_as_it_is_served_no_likelier_than_any():
    logits = np.array([[-2.0, 3.0, 0.0], [1.0, 3.0, -1.0]])
    np.testing.assert_allclose(served(logits, np.array([1.0, 0.5, 2.0]), np.array([0.0, 1.0, 0.0])),
                               [[-2, -2, -2], [1, 1, -2]])  # fmt: skip


def test_pretraining_sees_nobody_of_the_cross_validated_set_by_whatever_name(tmp_path, monkeypatch):
    people = [patient("a", 1, "phe-sich"), patient("049", 1, "ct-ich"), patient("049", 1, "ct-ich-nifti")]
    learned = []
    monkeypatch.setattr("serving.train_hemorrhage.load_patients", lambda data, work, source: [
        p for p in people if p.source == source])  # fmt: skip
    monkeypatch.setattr("serving.train_hemorrhage.train", lambda patients, *_: learned.extend(patients))
    monkeypatch.setattr("serving.crops.fold_of", lambda patients, *_: {identity(p): 1 for p in patients})
    main(["--pretrain", "--shares", "phe-sich=0.5,ct-ich=0.2,ct-ich-nifti=0.3", "--work", str(tmp_path)])
    assert [p.source for p in learned] == ["phe-sich"]


def test_sets_are_compared_with_weights_that_never_saw_who_is_kept_aside(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("serving.train_hemorrhage.load_patients", lambda data, work, source: [])
    monkeypatch.setattr("serving.train_hemorrhage.load", asked.append)
    monkeypatch.setattr("serving.train_hemorrhage.compare", lambda *_: {})
    main(["--sets", "ct-ich", "phe-sich", "--folds", "6", "--work", str(tmp_path)])
    assert asked == [WEIGHTS.parent / "of_6_folds" / str(DETECTION_IN_PLANE) / "fold0.weights.h5"]


def test_scores_of_folds_dealt_out_differently_are_not_pooled(tmp_path):
    for fold, folds in ((0, 3), (1, 5)):
        (tmp_path / f"fold{fold}").mkdir()
        (tmp_path / f"fold{fold}" / "run.json").write_text(f'{{"folds": {folds}}}')
    with pytest.raises(ConfigError, match="scores of 3 and of 5 folds; remove"):
        evaluate(tmp_path)


def test_evaluation_without_scores_says_what_to_run(tmp_path):
    with pytest.raises(ConfigError, match="--fold"):
        evaluate(tmp_path)

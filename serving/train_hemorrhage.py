"""Train the haemorrhage model: `python -m serving.train hemorrhage`.

    --prepare     read and cut every series once                          (.work/hemorrhage/prepared-*)
    --pretrain    learn from every set but CT-ICH                         (.work/hemorrhage/pretrained.weights.h5)
    --fold K ...  go on with CT-ICH without the patients of these folds, one model each, and score them
    --all         go on with every patient of CT-ICH, and score these     (serving/weights/hemorrhage.weights.h5)
                  weights on what nobody learned from (--score-shipped: only that)
    --score K ... only score these folds, with their weights, ours of --folds 6 where none were trained here
    --evaluate    pool the scores of the folds, calibrate, measure        (serving/weights/hemorrhage.json)
                  and report them with pictures, never to be committed    (--report, .work/hemorrhage/report.html)
    --sets A B    measure how well two sets can be told apart, and whether the detector's score does
    --changed     measure whether answers hold when the heads that folds keep aside are scanned otherwise

The whole of it: --prepare, --pretrain, --fold 0 1 2 3 4, --all, --evaluate. A run that is cut short goes on from its
last saved step when it is started again. Every run repeats from its seed, as far as the threads of the machine allow.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras  # type: ignore[import-untyped]
from keras import ops
from rich.console import Console
from rich.progress import Progress as Bar

from herald.errors import ConfigError
from herald.signatures import CONTEXT_SLICES, DETECTION_IN_PLANE, FINDINGS
from serving.crops import (
    ALL_SETS,
    CROSS_VALIDATED,
    FOLDS,
    OUTPUT_SLICES,
    PRETRAINING,
    SHARES,
    Prepared,
    Sampler,
    Tensor,
    augment,
    identity,
    load_patients,
    split,
)
from serving.drawn import PX
from serving.evaluation_report import check_report_path, report, write_report
from serving.hemorrhage import WEIGHTS, build, load
from serving.progress import progress
from serving.readers import UNKNOWN
from serving.robustness import answers, score_changed
from serving.score_hemorrhage import SHIPPED, cases, evaluate, score
from serving.set_identity import compare
from serving.unfinished import UnfinishedRun

CALIBRATION = WEIGHTS.with_name("hemorrhage.json")

SEED = 20
PRETRAINING_STEPS = 700
STEPS = 600
LEARNING_RATE = 2e-3  # the highest at which batches this small stay stable
FINE_TUNING_RATE = 1.5e-3  # when a run starts from trained weights
WARM_UP = 25  # steps; normalisation must see some batches first
WEIGHT_DECAY = 1e-4
SAVE_EVERY = 20  # steps, so that a run that is cut short loses little
VOXEL_POSITIVE_WEIGHT = 3.0  # blood is 1 voxel in 500
FINDING_WEIGHTS = (1.0, 0.4, 0.3, 0.4, 0.5)  # `any` decides whether somebody is paged
DICE_SMOOTH = 10.0 * PX**2  # 30 mm2, which keep the smallest slices from ruling
DICE_WEIGHT, VOXEL_WEIGHT, SLICE_WEIGHT, POOLED_WEIGHT = 0.5, 4.0, 0.5, 0.7


def loss(outputs: Mapping[str, Tensor], positive: Tensor, unknown: Tensor, truth: Tensor) -> Tensor:
    """Dice and cross-entropy of voxels, cross-entropy of slices by both routes; what is UNKNOWN counts nothing."""
    bits = ops.convert_to_tensor([1 << c for c in range(len(FINDINGS))], "int32")
    depth, rows, columns = outputs["mask"].shape[1:-1]
    coarse = ops.reshape(outputs["mask"], (-1, rows, columns, len(FINDINGS)))
    coarse = ops.average_pool(coarse, 2, 2, "valid", "channels_last")
    mask = ops.reshape(coarse, (-1, depth, rows // 2, columns // 2, len(FINDINGS)))  # a quarter of the work
    positive, unknown = positive[:, :, ::2, ::2, None], unknown[:, :, ::2, ::2, None]
    known = ops.cast(ops.equal(ops.bitwise_and(unknown, bits), 0), "float32")  # (B, D, H / 2, W / 2, C)
    voxel = ops.cast(ops.bitwise_and(positive, bits) > 0, "float32") * known
    probability = ops.sigmoid(mask) * known
    entropy = VOXEL_POSITIVE_WEIGHT * voxel * ops.softplus(-mask) + (1 - voxel) * ops.softplus(mask)
    voxel_loss = ops.mean(entropy * known, axis=(0, 1, 2, 3))  # (C,)
    overlap = ops.sum(probability * voxel, axis=(2, 3))  # (B, D, C): every slice counts alike
    outlined = ops.sum(voxel, axis=(2, 3))
    dice = 1 - (2 * overlap + DICE_SMOOTH) / (ops.sum(probability, axis=(2, 3)) + outlined + DICE_SMOOTH)
    total = DICE_WEIGHT * _mean(dice, ops.cast(outlined > 0, "float32")) + VOXEL_WEIGHT * voxel_loss
    slice_known, slice_target = (ops.cast(flag, "float32") for flag in (truth != UNKNOWN, ops.equal(truth, 1)))
    for output, weight in (("slice", SLICE_WEIGHT), ("pooled", POOLED_WEIGHT)):
        entropy = ops.softplus(outputs[output]) - slice_target * outputs[output]
        total = total + weight * _mean(entropy, slice_known)
    return ops.sum(total * ops.convert_to_tensor(FINDING_WEIGHTS, "float32"))


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over crops and slices of what is counted: (B, D, C) -> (C,)."""
    return ops.sum(values * counted, axis=(0, 1)) / ops.maximum(ops.sum(counted, axis=(0, 1)), 1.0)


class Learner(keras.Model):  # type: ignore[misc]
    """The detector with what it learns by: (volume, positive, unknown), truth -> loss, on any backend of Keras."""

    def __init__(self, detector: keras.Model, seed: int) -> None:
        super().__init__()
        self.detector = detector
        self.random = keras.random.SeedGenerator(seed)

    def call(self, crops: tuple[Tensor, Tensor, Tensor], training: bool = False) -> dict[str, Tensor]:
        """Outputs of the detector for crops changed at random, and their masks, changed alike."""
        volume, positive, unknown = augment(*crops, self.random)
        return {**self.detector(volume, training=training), "positive": positive, "unknown": unknown}

    def compute_loss(
        self, x: object, y: Tensor, y_pred: Mapping[str, Tensor], sample_weight: object, training: bool = True
    ) -> Tensor:
        """The loss of one batch."""
        return loss(y_pred, y_pred["positive"], y_pred["unknown"], ops.cast(y, "int32"))


class Progress(keras.callbacks.Callback):  # type: ignore[misc]
    """Show on `bar` how far training is, and save where it stands after every epoch of SAVE_EVERY steps."""

    def __init__(self, bar: Bar, run: UnfinishedRun, label: str, steps: int) -> None:
        super().__init__()
        self.bar, self.run, self.label, self.steps = bar, run, label, steps
        self.task = bar.add_task(label, total=steps, completed=run.done)
        if run.done:
            bar.console.print(f"{label}: goes on from step {run.done}")

    def on_train_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        """Advance the bar."""
        self.bar.advance(self.task)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float]) -> None:
        """Save, and say the loss of the epoch, smoothed."""
        value = float(logs["loss"])
        smooth = value if self.run.loss is None else 0.5 * self.run.loss + 0.5 * value
        self.run.save((epoch + 1) * SAVE_EVERY, smooth)
        self.bar.console.print(f"{self.label}: step {self.run.done} of {self.steps}, loss {smooth:.3f}")


def train(
    patients: Sequence[Prepared],
    weights: Path,
    steps: int,
    seed: int,
    label: str,
    start: Path | None = None,
    rate: float | None = None,
    shares: Mapping[str, float] = SHARES,
) -> None:
    """Train from scratch, or from the weights `start`, and write `weights`; a run that was cut short goes on.

    `steps` is rounded up to whole epochs of SAVE_EVERY.
    """
    keras.utils.set_random_seed(seed)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")  # halves the step where the CPU has AMX or AVX512-BF16
    model = build(slices=OUTPUT_SLICES + CONTEXT_SLICES - 1)
    keras.mixed_precision.set_global_policy("float32")
    if start is not None:
        model.load_weights(start)
    rate = rate or (LEARNING_RATE if start is None else FINE_TUNING_RATE)
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 20, max(steps - WARM_UP, 1), alpha=0.02, warmup_target=rate, warmup_steps=WARM_UP
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY, clipnorm=2.0)
    optimizer.build(model.trainable_variables)
    learner = Learner(model, seed)
    learner.compile(optimizer)
    from_what = hashlib.sha256(start.read_bytes()).hexdigest() if start is not None else None
    who = sorted((p.source, p.patient) for p in patients)
    recipe = {
        "seed": seed,
        "number of steps": steps,
        "rate": rate,
        "shares": dict(shares),
        "start": from_what,
        "patients": hashlib.sha256(repr(who).encode()).hexdigest(),
    }
    run = UnfinishedRun(weights, recipe, [*learner.variables, *optimizer.variables])
    run.resume()
    epochs = -(-steps // SAVE_EVERY)
    batches = Sampler(patients, seed, shares).batches(run.done, epochs * SAVE_EVERY)
    with progress() as bar:
        learner.fit(
            (((volume, positive, unknown), truth) for volume, positive, unknown, truth in batches),
            steps_per_epoch=SAVE_EVERY,
            initial_epoch=run.done // SAVE_EVERY,
            epochs=epochs,
            shuffle=False,  # they are drawn at random
            verbose=0,
            callbacks=[Progress(bar, run, label, epochs * SAVE_EVERY)],
        )
    model.save_weights(weights)
    run.finish()


# --- command ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Train, score, evaluate as asked."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.train hemorrhage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prepare", action="store_true", help="only prepare the data")
    parser.add_argument("--pretrain", action="store_true", help="learn from every set but CT-ICH")
    parser.add_argument("--fold", type=int, nargs="+", default=[], help="train without it, then score it")
    parser.add_argument("--score", type=int, nargs="+", default=[], help="only score these folds")
    parser.add_argument("--folds", type=int, default=FOLDS, help="how many there are")
    parser.add_argument("--all", action="store_true", help="train on every patient and write the shipped weights")
    kept = "only score the weights of all patients on what nobody learned from: it moves the threshold to their scale"
    parser.add_argument("--score-shipped", action="store_true", help=kept)
    parser.add_argument("--evaluate", action="store_true", help="pool the folds' scores, calibrate, measure")
    told_apart = "measure how well two sets can be told apart, on patients that fold 0 keeps aside"
    parser.add_argument("--sets", nargs=2, metavar=("A", "B"), choices=("simulated", *ALL_SETS), help=told_apart)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=Path(".work/hemorrhage"), help="cache, weights of folds, scores")
    parser.add_argument("--weights", type=Path, help="weights of --all or --score instead of the usual ones")
    parser.add_argument("--report", type=Path, help="page of --evaluate (default: report.html in the folder of --work)")
    parser.add_argument(
        "--start", type=Path, help="weights to start from (default: the pretrained ones where there are)"
    )
    parser.add_argument(
        "--shares", type=_shares, help=f"SET=SHARE,... of crops; sets: simulated, {', '.join(ALL_SETS)}"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float, help="highest learning rate, instead of the usual one")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--changed", action="store_true", help="measure what other scans would change (15 min)")
    args = parser.parse_args(argv)
    wants_patients = args.prepare or args.pretrain or args.fold or args.score or args.all or args.score_shipped
    if not (wants_patients or args.evaluate or args.sets or args.changed):
        parser.error(
            "say what to do: --prepare, --pretrain, --fold K, --score K, --all, --evaluate, --sets A B or --changed"
        )
    if wrong := [fold for fold in (*args.fold, *args.score) if not 0 <= fold < args.folds]:
        parser.error(f"there is no fold {wrong[0]} of {args.folds}; they count from 0")
    of_fold = {fold: args.weights or _of_fold(args.work, fold, args.folds) for fold in args.score}
    of_fold |= {fold: args.work / _name(fold, args.folds) for fold in args.fold}
    prepared = args.work / f"prepared-{DETECTION_IN_PLANE}-seen"
    if wants_patients:
        shares = args.shares or (PRETRAINING if args.pretrain else SHARES)
        patients = [p for source in shares for p in load_patients(args.data, prepared, source)]
    pretrained = args.work / "pretrained.weights.h5"
    if args.pretrain:
        learned = [p for p in split(patients, None, args.folds)[0] if identity(p)[0] != CROSS_VALIDATED]
        train(
            learned,
            pretrained,
            args.steps or PRETRAINING_STEPS,
            args.seed,
            "pretraining",
            args.start,
            args.rate,
            shares,
        )
    start = args.start or (pretrained if pretrained.exists() else None)
    for fold in args.fold:
        learned, _ = split(patients, fold, args.folds)
        train(learned, of_fold[fold], args.steps or STEPS, args.seed + fold, f"fold {fold}", start, args.rate, shares)
    for fold, weights in of_fold.items():
        learned, aside = split(patients, fold, args.folds)
        scores = args.work / "scores" / f"fold{fold}"
        score(weights, aside, scores, f"scoring fold {fold}", learned)
        run = {"fold": fold, "folds": args.folds, "learned_from": len(learned), "seed": args.seed + fold}
        (scores / "run.json").write_text(json.dumps(run) + "\n", encoding="utf-8")
    if args.all:
        learned, _ = split(patients, None, args.folds)
        weights = args.weights or WEIGHTS
        train(learned, weights, args.steps or STEPS, args.seed + FOLDS, "all patients", start, args.rate, shares)
    if args.all or args.score_shipped:
        learned, aside = split(patients, None, args.folds)
        scores = args.work / "scores" / SHIPPED
        score(args.weights or WEIGHTS, aside, scores, "scoring the weights of all patients", learned)
    if args.sets:
        patients = [p for source in args.sets for p in load_patients(args.data, prepared, source)]
        _, aside = split(patients, 0, args.folds)
        # the shipped ones have seen whom fold 0 keeps aside
        weights = args.weights or _of_fold(args.work, 0, args.folds)
        Console().print_json(json.dumps(compare(load(weights), aside, *args.sets)))
    if args.changed:
        threshold = json.loads(CALIBRATION.read_text(encoding="utf-8"))["threshold_of_folds"][0]
        models = [_of_fold(args.work, fold, args.folds) for fold in range(args.folds)]
        patients = load_patients(args.data, prepared, CROSS_VALIDATED)
        Console().print_json(json.dumps(answers(score_changed(models, patients, args.data), threshold)))
    if args.evaluate:
        page = args.report or args.work / "report.html"
        check_report_path(page)
        result = evaluate(args.work / "scores")
        CALIBRATION.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        Console(stderr=True).print_json(json.dumps(result))
        about = {
            "Obtained": result["obtained"],
            "Truth": "CT-ICH: experts' outlines, no pixel size given, so that ml are rough; PHE-SICH: experts' boxes",
            "Operating point": "chosen on CT-ICH as a whole, so that its sensitivity and specificity are optimistic",
        }
        write_report(page, *report(cases(args.work / "scores", result, args.data), "Haemorrhage: evaluation", about))
        Console(stderr=True).print(f"figures by type and volume, with pictures: {page}")


def _name(fold: int, folds: int) -> Path:
    """Fold 0 of three keeps other patients aside than fold 0 of five, and a size has weights of its own."""
    return Path(f"of_{folds}_folds", str(DETECTION_IN_PLANE), f"fold{fold}.weights.h5")


def _of_fold(work: Path, fold: int, folds: int) -> Path:
    """Weights that never saw the patients of a fold: trained here, or else those that the card's figures come from."""
    for root in (work, WEIGHTS.parent):
        if (path := root / _name(fold, folds)).exists():
            return path
    raise ConfigError(f"no weights of fold {fold} of {folds} in {work}; train them: --folds {folds} --fold {fold}")


def _shares(text: str) -> dict[str, float]:
    """`SET=SHARE,...`; raises argparse's error where a set is unknown or a share no number."""
    shares = {}
    for part in text.split(","):
        name, _, share = part.partition("=")
        if name not in ("simulated", *ALL_SETS):
            raise argparse.ArgumentTypeError(f"{name!r} is no set; there are simulated, {', '.join(ALL_SETS)}")
        try:
            shares[name] = float(share)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"the share of {name} is {share!r}; write it as 0.3") from error
    return shares

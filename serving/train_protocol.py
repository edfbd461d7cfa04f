"""Train, calibrate and evaluate the protocol model: `python -m serving.train protocol [--calibrate] [--evaluate]`.

Samples are drawn anew for every step (`serving.protocol_samples`).
`--heads FILE --labels CSV` trains other heads from a site's own series (`serving.site_series`), `--start WEIGHTS` from
a trained trunk. A run that was cut short goes on when it is started again, to the weights that it would have had.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from herald.errors import ConfigError, SignatureMismatch
from herald.heads import TRIAGE_HEADS, Head, Heads, read_heads
from serving.evaluation_report import check_report_path, report, write_report
from serving.progress import progress
from serving.protocol_samples import SEED, SHARES, WORKERS, Batch, Drawable, Source, prepare
from serving.score_protocol import EVALUATION_SETS, HELD_OUT_SUBJECTS, calibrate, evaluate, predictor, scorer
from serving.site_series import SiteSeries, held_out, prepare_site, read_labels

CYCLES = ((1500, 2e-3),)  # (steps, peak rate): the loss falls when a cosine comes down
STEPS = sum(steps for steps, _ in CYCLES)
WEIGHT_DECAY = 1e-4
LABEL_SMOOTHING = 0.02  # keeps the softmaxes from certainty on what the simulation makes too easy
SAVE_EVERY = 50  # steps, about a minute: what an interruption costs

DATA = Path(os.environ.get("HERALD_DATA", "../shared/data"))
CACHE = Path(".work/protocol")
HERE = Path(__file__).parent
WEIGHTS = HERE / "weights" / "protocol.weights.h5"
HEADS_FILE = HERE / "heads" / "default.toml"


class Plan(msgspec.Struct, frozen=True):
    """What a training run is made of, besides its series; a run is taken up again only with the same plan."""

    heads: dict[str, Head]
    channels: tuple[int, ...] = ()  # of the stages, where they are not those of the start or the default
    cycles: tuple[tuple[int, float], ...] = CYCLES
    seed: int = SEED
    start: str = ""  # weights from which it was fine-tuned
    keep: float = 0.0  # their share in what is written
    series: str = ""  # where they came from

    @property
    def steps(self) -> int:
        """Of all cycles."""
        return sum(steps for steps, _ in self.cycles)


def train(
    source: Source,
    weights: Path,
    plan: Plan,
    save_every: int = SAVE_EVERY,
    console: Console | None = None,
) -> None:
    """Train by AdamW, and write the weights and their description.

    Every `save_every` steps, all that the next one depends on is saved beside the weights, and a run that was cut short
    goes on from there. With `plan.keep` the weights written are a mean of those before, so much, and after: what is new
    is answered nearly as well as by those after, and less is forgotten (Wortsman et al. 2022, arXiv 2109.01903). Raises
    ConfigError where the plan of a run that was cut short was another, or where what is begun anew has nothing to keep.
    """
    import keras  # type: ignore[import-untyped]
    import tensorflow as tf  # type: ignore[import-untyped]

    from serving.protocol import SIZES, Description, build, describe, fine_tunable, write_description
    from serving.unfinished import UnfinishedRun

    console = console or Console(stderr=True)
    with suppress(RuntimeError):  # TensorFlow was already at work in this process
        tf.config.threading.set_intra_op_parallelism_threads(WORKERS)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    # saves no time here, and TensorFlow 2.21's fails now and then: the same run would round otherwise
    tf.config.optimizer.set_experimental_options({"remapping": False})
    keras.utils.set_random_seed(plan.seed)
    if plan.start:
        model, kept = fine_tunable(Path(plan.start), plan.heads)
        sizes = describe(Path(plan.start)).sizes
        anew = [name for name in plan.heads if name not in kept]
        console.print(f"kept of {plan.start}: {', '.join(['trunk', *kept])}; begun anew: {', '.join(anew) or 'none'}")
        if plan.keep and anew:
            raise ConfigError(f"{plan.start} has no {', '.join(anew)} of which to keep a share; leave --keep out")
    else:
        sizes = msgspec.structs.replace(SIZES, channels=plan.channels) if plan.channels else SIZES
        model = build(plan.heads, sizes)
    before = model.get_weights()
    model.compile(
        optimizer=keras.optimizers.AdamW(_rate(plan.cycles), weight_decay=WEIGHT_DECAY, clipnorm=1.0),
        loss={name: keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING) for name in plan.heads},
        loss_weights={name: head.loss_weight for name, head in plan.heads.items()},
        weighted_metrics={name: [keras.metrics.CategoricalAccuracy(name="accuracy")] for name in plan.heads},
        jit_compile=False,  # XLA is slower than oneDNN on a CPU
    )
    model.optimizer.build(model.trainable_variables)
    recipe: Mapping[str, object] = json.loads(msgspec.json.encode(plan))
    run = UnfinishedRun(weights, recipe, [*model.variables, *model.optimizer.variables])
    if run.resume():
        console.print(f"going on after step {run.done} of {plan.steps}")
    with progress() as bar:
        task = bar.add_task("training", total=plan.steps, completed=run.done)
        while run.done < plan.steps:
            count = min(save_every, plan.steps - run.done)
            told = model.fit(_batches(source, run.done, count), epochs=1, shuffle=False, verbose=0).history
            run.save(run.done + count, told["loss"][-1])
            accuracy = ", ".join(f"{name} {told[_metric(told, name)][-1]:.2f}" for name in plan.heads)
            bar.console.print(f"step {run.done}: loss {told['loss'][-1]:.3f}, accuracy: {accuracy}")
            bar.update(task, completed=run.done)
    bare = build(plan.heads, sizes)  # without the optimizer's variables
    keep = plan.keep
    bare.set_weights([keep * was + (1 - keep) * now for was, now in zip(before, model.get_weights(), strict=True)])
    weights.parent.mkdir(parents=True, exist_ok=True)
    bare.save_weights(weights)
    write_description(weights, Description(dict(plan.heads), sizes))
    run.finish()


def _rate(cycles: Sequence[tuple[int, float]]) -> Any:
    """One warm-up and cosine after another."""
    import keras

    class Cycles(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
        def __call__(self, step: Any) -> Any:
            rate, first = 0.0, 0
            for steps, peak in cycles:
                decay = keras.optimizers.schedules.CosineDecay(
                    peak / 10, steps - steps // 20, 0.01, warmup_target=peak, warmup_steps=steps // 20
                )
                rate = keras.ops.where(step >= first, decay(step - first), rate)
                first += steps
            return rate

        def get_config(self) -> dict[str, Any]:
            return {"cycles": cycles}

    return Cycles()


def _metric(told: Mapping[str, Any], name: str) -> str:
    """Keras leaves the name of an only output out."""
    return f"{name}_accuracy" if f"{name}_accuracy" in told else "accuracy"


def _batches(source: Source, first: int, steps: int) -> Any:
    """Batches `first` to `first + steps` as Keras reads them, drawn in a thread ahead of the training."""
    import keras

    class Batches(keras.utils.PyDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return steps

        def __getitem__(self, step: int) -> Batch:
            return source.batch(first + step)

    return Batches(workers=1, max_queue_size=6)


def main(argv: Sequence[str]) -> int:
    """Train the protocol model, calibrate it, or evaluate its weights."""
    try:
        return _main(_options(argv))
    except (ConfigError, SignatureMismatch) as error:
        print(error, file=sys.stderr)
        return 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving.train protocol", description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data sets")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for prepared series")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="weights to write, to calibrate or to evaluate")
    parser.add_argument("--heads", type=Path, help="TOML of heads and classes (default: those of triage)")
    parser.add_argument(
        "--labels", type=Path, help="CSV of your own series: path, patient and columns named after heads"
    )
    parser.add_argument(
        "--site-share", type=float, default=1.0, help="of samples from --labels; others are the built-in"
    )
    parser.add_argument("--start", type=Path, help="weights to fine-tune; heads with other classes begin anew")
    parser.add_argument(
        "--keep", type=float, default=0.0, help="share of --start in the weights written; 0.5 forgets less (default: 0)"
    )
    parser.add_argument("--steps", type=int, help=f"of one cycle (default: {len(CYCLES)} cycles, {STEPS} steps)")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of --steps")
    parser.add_argument("--channels", type=int, nargs="+", help="of each stage (default: those of the shipped model)")
    parser.add_argument("--seed", type=int, default=SEED, help="same seed, same series: same weights")
    parser.add_argument("--prepare", action="store_true", help="only prepare the training series")
    parser.add_argument("--calibrate", action="store_true", help="only fit a temperature for each head of --weights")
    parser.add_argument(
        "--simulate", type=int, default=HELD_OUT_SUBJECTS, help="simulated series to calibrate or to evaluate on"
    )
    parser.add_argument("--evaluate", action="store_true", help="only evaluate")
    parser.add_argument(
        "--report", type=Path, default=CACHE / "report.html", help="page of the evaluation, pictures too"
    )
    parser.add_argument(
        "--sets", nargs="*", choices=EVALUATION_SETS, help="what to evaluate on (default: all, none beside --labels)"
    )
    options = parser.parse_args(argv)
    if options.start and options.channels:
        parser.error("--channels are those of --start: leave one of the two out")
    if not 0 <= options.keep < 1 or (options.keep and not options.start):
        parser.error("--keep is at least 0 and below 1, and is of --start: name the weights to keep a share of")
    if not 0 < options.site_share <= 1:
        parser.error("--site-share is above 0 and at most 1")
    if options.sets is None:
        options.sets = () if options.labels else EVALUATION_SETS
    return options


def _main(options: argparse.Namespace) -> int:
    from serving.protocol import describe

    console = Console(width=140)
    training = not (options.evaluate or options.calibrate)
    check_report_path(options.report)  # now, and not after an hour
    heads = read_heads(options.heads or HEADS_FILE) if training else dict(describe(options.weights).heads)
    rows = read_labels(options.labels, heads) if options.labels else []
    site = prepare_site(rows, options.cache / "site") if rows else []
    if training:
        series, _ = held_out(site)
        pools: dict[str, Sequence[Drawable]] = {"site": series}
        shares = {"site": options.site_share, **{k: v * (1 - options.site_share) for k, v in SHARES.items()}}
        if not site:
            shares = dict(SHARES)
        built_in = not site or options.site_share < 1
        unknown = [name for name in heads if not _labelled(name, heads, site, built_in)]
        if unknown:
            raise ConfigError(f"no series tells {', '.join(unknown)}; add a column of that name to the CSV of --labels")
        if built_in:
            pools |= prepare(options.cache, options.data)
        if options.prepare:
            return 0
        plan = Plan(
            heads=heads,
            channels=tuple(options.channels or ()),
            cycles=((options.steps, options.rate),) if options.steps else CYCLES,
            seed=options.seed,
            start=str(options.start or ""),
            keep=options.keep,
            series=_described(options, site),
        )
        train(Source(pools, heads, shares, options.seed), options.weights, plan)
    if options.calibrate:
        calibrate(scorer(options.weights), options.weights, options.data, site, options.simulate, console)
        return 0
    cases = evaluate(predictor(options.weights), options.data, options.sets, console, heads, site, options.simulate)
    about = {"Weights": options.weights.name, "Sets": ", ".join([*(["site"] if site else []), *options.sets])}
    write_report(options.report, *report(cases, "Protocol: evaluation", about))
    console.print(f"figures with pictures, not to be committed where they are of patients: {options.report}")
    return 0


def _labelled(name: str, heads: Heads, site: Sequence[SiteSeries], built_in: bool) -> bool:
    """Whether some training series has a label of a head."""
    known = name in TRIAGE_HEADS and set(TRIAGE_HEADS[name].classes) & set(heads[name].classes)
    return (built_in and bool(known)) or any(one.row.labels.get(name) for one in site)


def _described(options: argparse.Namespace, site: Sequence[SiteSeries]) -> str:
    """Which series a run draws from, so that it is not taken up again with others."""
    known = [(one.patient, one.pixels.name, dict(one.row.labels)) for one in site]
    digest = hashlib.sha256(repr(known).encode()).hexdigest()[:16]
    return f"site {digest}, share {options.site_share}" if site else "built-in"

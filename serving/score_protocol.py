"""Evaluate the protocol model on series that training never saw, and calibrate it on others.

Keras is imported where a model is asked for: training forks before, and --help does not wait for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from herald.header import Claim, header_claim
from herald.heads import TRIAGE_HEADS, Heads, aggregate
from herald.signatures import PROTOCOL_IN_PLANE, PROTOCOL_SLICES
from herald.volume import AIR_HOUNSFIELD, Volume, protocol_batch, read_datasets, volume_from_datasets
from serving import readers
from serving.calibration import LEAST, Scored, fit_temperature, measure, out_of_fold, tempered
from serving.evaluation import wilson
from serving.evaluation_report import Case, picture
from serving.phantom import CONTRAST_PHASES, OTHER_REGIONS, simulate
from serving.progress import progress
from serving.protocol_samples import PLANELESS, SEED, patients_of, read_patient
from serving.site_series import SiteSeries, held_out

HELD_OUT_SUBJECTS = 64  # simulated, for evaluation and, others, for calibration
EVALUATION_SEED = 40_000_000  # those of 10_000_000 and 30_000_000 were looked at when the recipe was changed
CALIBRATION_SEED = 20_000_000

HEAD_SCAN = {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}
DICOM_SERIES: Mapping[str, Mapping[str, str]] = {
    "ge-head": HEAD_SCAN,
    "philips-phantom/soft-5mm": {"orientation": "axial", "kernel": "soft", "region": "head"},
    "philips-phantom/bone-1mm": {"orientation": "axial", "kernel": "bone", "region": "head"},
    "lidc-body": {"orientation": "axial", "region": "other"},
}
EVALUATION_SETS = ("dicom", *readers.SETS, "simulated")
Predict = Callable[[NDArray[np.int16]], Mapping[str, NDArray[np.float32]]]


def scorer(weights: Path) -> Predict:
    """The trained model as a function of int16 (B, 8, 256, 256): softmaxes (B, C) by head, not calibrated."""
    from serving.protocol import load

    model = load(weights)
    return lambda batch: {name: np.asarray(scores) for name, scores in model.predict_on_batch(batch).items()}


def predictor(weights: Path) -> Predict:
    """As `scorer`, but calibrated, and the chunks of one series made one: (C,) by head, as the node has it."""
    from serving.protocol import describe

    score, described = scorer(weights), describe(weights)

    def predict(batch: NDArray[np.int16]) -> Mapping[str, NDArray[np.float32]]:
        return {
            name: aggregate(
                tempered(scores, described.calibration.temperature.get(name, 1.0)), described.heads[name].aggregation
            )
            for name, scores in score(batch).items()
        }

    return predict


Evaluated = tuple[str, str, Volume, Mapping[str, str], bool | None, Claim | None]
"""Set, name, volume, labels where known, child, claim of the header."""


def site_sets(site: Sequence[SiteSeries], aside_only: bool = False) -> Iterator[Evaluated]:
    """A site's own series, those kept aside first."""
    training, aside = held_out(site)
    for group, series in (("site, held out", aside), ("site, trained on", () if aside_only else training)):
        for one in series:
            labels = {name: label for name, label in one.row.labels.items() if label is not None}
            volume, _ = one.row.volume()
            yield group, f"{one.patient} line {one.row.line}", volume, labels, None, None


def evaluation_sets(
    data: Path, sets: Sequence[str], aside_only: bool = False, simulated: int = HELD_OUT_SUBJECTS
) -> Iterator[Evaluated]:
    """Everything in `sets`, or only what of it was kept from training; labels only where known."""
    for name, labels in DICOM_SERIES.items():
        files = sorted((data / name).glob("*.dcm"))
        if files and "dicom" in sets:
            datasets = read_datasets(files)
            volume = volume_from_datasets(datasets)
            yield "dicom", name, volume, labels, None, header_claim(datasets[0], volume.orientation)
    for source in [source for source in readers.SETS if source in sets]:
        for aside in (True,) if aside_only else (True, False):
            for name in patients_of(data, source, aside):
                patient = read_patient(data, source, name)
                positions = np.arange(len(patient.stack)) * np.float64(patient.spacing_mm)
                volume = Volume(patient.stack, positions, (patient.pixel_mm, patient.pixel_mm))
                group = f"{source}, {'held out' if aside else 'trained on'}"
                yield group, patient.name, volume, HEAD_SCAN, patient.child, None
    for i in range(simulated if "simulated" in sets else 0):
        # our own writer's headers would be right by construction
        yield "simulated, held out", str(i), *_simulated(i), None, None


def _simulated(i: int, first: int = EVALUATION_SEED) -> tuple[Volume, Mapping[str, str]]:
    """The i-th simulated series for evaluation or, by another `first` seed, calibration; training uses neither."""
    rng = np.random.default_rng((SEED, first, i))
    region = "head" if i % 4 else str(rng.choice(OTHER_REGIONS))
    series = simulate(
        first + i,
        region=region,
        contrast=str(rng.choice(["non_contrast", str(rng.choice(CONTRAST_PHASES))])),
        orientation=("axial", "axial", "coronal", "sagittal")[(i // 4) % 4],
        kernel=("soft", "bone")[i % 2],
        slices=16,
        matrix=512,
    )
    labels = dict(series.labels)
    if region != "head":
        labels.pop("contrast")
    if region in PLANELESS:
        labels.pop("orientation")
    return series.volume, labels


def evaluate(
    predict: Predict,
    data: Path,
    sets: Sequence[str],
    console: Console,
    heads: Heads = TRIAGE_HEADS,
    site: Sequence[SiteSeries] = (),
    simulated: int = HELD_OUT_SUBJECTS,
) -> list[Case]:
    """Print every DICOM series and every wrong decision, then right ones by set and head; returns all as cases.

    A label that a head does not know, as of a body part, is not counted. Where the heads of triage are asked, the last
    line of a set tells how often a plain axial head in a soft kernel was told from everything else.
    """
    right: dict[str, dict[str, list[float]]] = {}
    cases: list[Case] = []
    for group, name, volume, known, child, claim in chain(
        site_sets(site), evaluation_sets(data, sets, simulated=simulated)
    ):
        labels = {h: label for h, label in known.items() if h in heads and label in heads[h].classes}
        if not labels:
            continue
        batch = protocol_batch(volume)
        answer = predict(batch)
        cases += _cases(group, name, volume, labels, child, claim, answer, _overview(batch[0]), heads)
        told, wrong = [], False
        for head, classes in ((h, head.classes) for h, head in heads.items()):
            best = int(np.argmax(answer[head]))
            told.append(f"{classes[best]} {answer[head][best]:.2f}")
            if head in labels:
                hit = classes[best] == labels[head]
                wrong |= not hit
                sure = float(answer[head][classes.index(labels[head])])
                right.setdefault(group, {}).setdefault(head, []).append(sure if hit else -sure)
                told[-1] += "" if hit else f" (WRONG: {labels[head]})"
        wanted = is_head_scan(known)
        if wanted is not None and heads.keys() >= HEAD_SCAN.keys():
            of_wanted = [(answer[h], heads[h].classes.index(label)) for h, label in HEAD_SCAN.items()]
            passed = all(int(np.argmax(scores)) == index for scores, index in of_wanted)
            sure = min(float(scores[index]) for scores, index in of_wanted)
            sure = sure if wanted else 1 - sure
            right.setdefault(group, {}).setdefault("all at once", []).append(sure if passed == wanted else -sure)
        if wrong or group == "dicom":
            console.print(f"{group} {name}: {', '.join(told)}")
    table = Table("set", "head", "right", "95 % Wilson interval", "above 0.75", title="decisions of the protocol model")
    for group, of_heads in right.items():
        for head, outcomes in of_heads.items():
            k, n = sum(v > 0 for v in outcomes), len(outcomes)
            _, low, high = wilson(k, n)
            table.add_row(group, head, f"{k}/{n}", f"{low:.3f} to {high:.3f}", f"{sum(v > 0.75 for v in outcomes)}/{n}")
    console.print(table)
    return cases


def is_head_scan(labels: Mapping[str, str]) -> bool | None:
    """Whether a series is what the detector may see: an axial head without contrast in a soft kernel; None: unknown."""
    if any(labels[head] != label for head, label in HEAD_SCAN.items() if head in labels):
        return False
    return True if labels.keys() >= HEAD_SCAN.keys() else None


def _cases(
    group: str,
    name: str,
    volume: Volume,
    labels: Mapping[str, str],
    child: bool | None,
    claim: Claim | None,
    answer: Mapping[str, NDArray[np.float32]],
    overview: bytes,
    heads: Heads,
) -> list[Case]:
    """One series as a case of each head whose label is known."""
    patient, _, row = name.partition(" line ")
    return [
        Case(
            task=head,
            source=name.partition("/")[0] if group == "dicom" else group,  # a head and a phantom are no set
            patient=patient,
            name=row,
            truth=labels[head],
            probability=dict(zip(classes, answer[head].tolist(), strict=True)),
            unit="series",
            simulated=group.startswith("simulated"),
            trained_on=group.endswith("trained on"),
            child=child,
            kernel=labels.get("kernel", "") if head != "kernel" else "",
            thickness_mm=volume.slice_spacing_mm,
            header=None if claim is None or head not in claim else claim[head] or "",
            picture=overview,
            picture_shows="eight slices, window 40/400",
        )
        for head, classes in ((name, head.classes) for name, head in heads.items())
        if head in labels
    ]


def calibrate(
    score: Predict, weights: Path, data: Path, site: Sequence[SiteSeries], series: int, console: Console
) -> None:
    """Fit a temperature for each head on series that training never saw, and store it beside the weights.

    Log loss and calibration error are those of temperatures fitted without the series that they are measured on.
    Real and simulated sets weigh the same. A head with fewer than `LEAST` series, or of a single class, keeps 1, and so
    does one whose log loss is not lower for it.
    """
    from serving.protocol import Calibration, describe, write_description

    described = describe(weights)
    cases: dict[str, list[Scored]] = {name: [] for name in described.heads}
    counts: dict[str, int] = {}
    with progress() as bar:
        real = chain(site_sets(site, aside_only=True), evaluation_sets(data, tuple(readers.SETS), aside_only=True))
        simulated = (("simulated", str(i), *_simulated(i, CALIBRATION_SEED), None, None) for i in range(series))
        for group, _, volume, labels, _, _ in bar.track(chain(real, simulated), total=None, description="scoring"):
            scores = score(protocol_batch(volume))
            counts[group] = counts.get(group, 0) + 1
            for name, head in described.heads.items():
                if (label := labels.get(name)) in head.classes:
                    cases[name].append(Scored(scores[name], head.classes.index(label), group))
    temperature, measured = {}, {}
    table = Table(
        "head", "series", "temperature", "log loss", "calibration error", "", title="before, after out of fold"
    )
    for name, head in described.heads.items():
        of_head, how = cases[name], head.aggregation
        if len(of_head) < LEAST or len({case.truth for case in of_head}) < 2:
            table.add_row(name, str(len(of_head)), "1", "", "", "too few series, or of one class")
            continue
        fitted = fit_temperature(of_head, how)
        before = measure(of_head, [1.0] * len(of_head), how)
        after = measure(of_head, out_of_fold(of_head, how), how)
        kept = after.log_loss < before.log_loss
        if kept:
            temperature[name] = fitted
        measured[name] = {"fitted": fitted, "kept": kept, "before": asdict(before), "after": asdict(after)}
        table.add_row(
            name,
            str(before.series),
            f"{fitted:.2f}" if kept else "1",
            f"{before.log_loss:.4f}, {after.log_loss:.4f}",
            f"{before.calibration_error:.4f}, {after.calibration_error:.4f}",
            "" if kept else f"{fitted:.2f} would not be better",
        )
    console.print(table)
    obtained = ", ".join(f"{count} {group.partition(',')[0]}" for group, count in counts.items())
    calibration = Calibration(temperature, f"{obtained} series kept from training", measured)
    write_description(weights, msgspec.structs.replace(described, calibration=calibration))


def _overview(chunk: NDArray[np.int16]) -> bytes:
    """The eight slices that the model saw at once, three in a row."""
    tiles = np.full((9, PROTOCOL_IN_PLANE // 2, PROTOCOL_IN_PLANE // 2), AIR_HOUNSFIELD, np.int16)
    tiles[:PROTOCOL_SLICES] = chunk[:, ::2, ::2]
    return picture(np.block([list(row) for row in tiles.reshape(3, 3, *tiles.shape[1:])]), center=40, width=400)

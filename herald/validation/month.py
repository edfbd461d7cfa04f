"""A simulated month: what thirty days of two scanners would leave in the ledger, one of which drifts from day 18 on.

    python -m herald.validation.month FOLDER --seed 0

Nothing in it is measured. Truth, scores, readers and times are drawn, so that the report can be seen and tested on a
record whose truth is known. It goes through the tables that the services write, then through `collect` and `append`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import msgspec
import numpy as np
import typer
from sqlalchemy import Table, insert, update

from herald import __version__
from herald.config import Config, load_config
from herald.errors import ConfigError
from herald.events import Disposition, Finding, Label, SeriesTriaged
from herald.ledger import Ledger, adjudications, labels, open_ledger, pages, results, reviews, series
from herald.superseded import SUPERSEDED
from herald.validation.chain import append
from herald.validation.collect import collect
from herald.validation.report import SIMULATED
from herald.validation.turnaround import waits

START = datetime(2026, 3, 1, tzinfo=UTC)
DAYS = 30
DRIFT_DAY = 18
"""First day (0-based) on which the second scanner is noisier and the model sees more in its heads."""
DRIFT_NOISE = 1.2
DRIFT_LOGIT = 1.0
PREVALENCE = 0.09
REFERENCE_DAYS = 14

ROOT = "1.2.826.0.1.3680043.8.498"
HOURS = np.array([2, 2, 1, 1, 1, 2, 3, 5, 7, 8, 8, 8, 7, 8, 8, 8, 7, 6, 6, 5, 5, 4, 4, 3], dtype=float)
"""How busy an emergency department's scanner is by the hour."""
KINDS = ("iph", "ivh", "sah", "edh_sdh")
KIND_SHARES = (0.35, 0.1, 0.2, 0.35)
BLEED_LOGIT, CLEAN_LOGIT = (1.9, 1.5), (-2.5, 1.2)
VERDICT_OF_POSITIVE, VERDICT_OF_NEGATIVE = 0.95, 0.55
VERDICT_OF_EXCLUSION = 0.3
BLIND = 0.2
FOLLOWS = 0.25
"""How often a reader who is wrong about the prediction's side follows what is on the screen."""
MINUTES_OF_READING = 8.0
LABELS = (("ris-report", "report", 0.6, 0.985), ("registry", "label", 0.25, 0.998))
"""Source, kind, share of the studies that it knows, and how often it is right."""
SHIFTS = ("reader-night", "reader-day", "reader-evening")

HEADS = {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}
EXTRA_SERIES = (
    (0.15, "kernel", "bone", "bone kernel"),
    (0.05, "contrast", "contrast", "with contrast medium"),
    (0.05, "orientation", "coronal", "coronal"),
    (0.03, "region", "other", "not a head"),
)
"""Chance of a further series of a study that the protocol excludes: head, label and its words."""
THIN, LOCALIZER = 0.10, 0.04
"""Chance of a thin series of the same head, which is analysed too, and of a localizer."""
THIN_MM = 1.25


@dataclass(frozen=True)
class Scanner:
    """One scanner of the simulated site and what it usually gives."""

    name: str
    ae_title: str
    kernel: str
    bone_kernel: str
    slice_thickness_mm: float
    slices: int
    tissue_hounsfield: float
    noise_hounsfield: float
    drifts: bool = False


SCANNERS = (
    Scanner("CT-NORTH", "CTN", "J40s", "J70h", 5.0, 32, 36.0, 3.9),
    Scanner("CT-SOUTH", "CTS", "FC21", "FC81", 5.0, 36, 34.5, 4.5, drifts=True),
)


@dataclass
class _Month:
    """Rows of each table as they grow, and the one source of chance."""

    seed: int
    random: np.random.Generator
    rows: dict[Table, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, table: Table, **values: Any) -> None:
        self.rows.setdefault(table, []).append(values)

    def chance(self, share: float) -> bool:
        return bool(self.random.random() < share)

    def around(self, middle: float, spread: float) -> float:
        return float(self.random.normal(middle, spread))

    def seconds(self, least: float, mean_more: float) -> timedelta:
        return timedelta(seconds=round(least + float(self.random.exponential(mean_more)), 3))

    def new_id(self) -> str:
        return str(UUID(bytes=self.random.bytes(16), version=4))


@dataclass
class _Study:
    uid: str
    accession_number: str
    scanner: Scanner
    at: datetime
    bleeds: bool
    kind: str
    drifted: bool
    hardness: float
    """How its head looks to the model, in standard deviations; what its series have in common."""


@dataclass
class _Decided:
    """One result and what is needed to read it."""

    event: SeriesTriaged
    study: _Study
    rightly: bool = True
    """Of an exclusion, whether it is right."""


def simulate(ledger: Ledger, config: Config, series_count: int = 3000, seed: int = 0) -> int:
    """Fill an empty ledger with a month and its record; gives the number of entries. Same seed, same record.

    Raises LedgerError.
    """
    month = _Month(seed, np.random.default_rng(seed))
    decided = _received(month, series_count)
    _read(month, decided)
    ledger.create_tables()
    with ledger.begin() as connection:
        for table, rows in month.rows.items():
            connection.execute(insert(table), rows)
        connection.execute(update(results).values(superseded=SUPERSEDED))
    now = START + timedelta(days=DAYS + 2)
    with ledger.read() as connection:
        collected = list(collect(connection, config, now))
    return append(ledger, collected, now)


# --- what comes ------------------------------------------------------------------------------------------------------


def _received(month: _Month, series_count: int) -> list[_Decided]:
    """Series of studies until there are enough, in the order of their arrival."""
    extra = sum(chance for chance, *_ in EXTRA_SERIES) + THIN + LOCALIZER
    studies = int(series_count / (1 + extra)) + 1
    hours = month.random.choice(24, size=2 * studies, p=HOURS / HOURS.sum())
    minutes = month.random.integers(DAYS, size=2 * studies) * 1440 + hours * 60 + month.random.random(2 * studies) * 60
    times = np.sort(minutes[: studies + studies // 10])  # a few more than are needed on average
    month.random.shuffle(times)  # so that where the count is reached, the month does not end early
    decided: list[_Decided] = []
    count = 0
    for number, minute in enumerate(times):
        if count >= series_count:
            break
        study = _study(month, number, START + timedelta(seconds=round(float(minute) * 60, 1)))
        for result in _series_of(month, study, series_count - count):
            count += 1
            decided += result
    return sorted(decided, key=lambda d: (d.study.at, d.event.series_instance_uid, d.event.revision))


def _study(month: _Month, number: int, at: datetime) -> _Study:
    scanner = SCANNERS[int(month.chance(0.45))]
    return _Study(
        uid=f"{ROOT}.{month.seed}.{number}",
        accession_number=f"SIM{month.seed}-{number:06d}",
        scanner=scanner,
        at=at,
        bleeds=month.chance(PREVALENCE),
        kind=str(month.random.choice(KINDS, p=KIND_SHARES)),
        drifted=scanner.drifts and at >= START + timedelta(days=DRIFT_DAY),
        hardness=month.around(0, 1),
    )


def _series_of(month: _Month, study: _Study, most: int) -> list[list[_Decided]]:
    """The results of each series of a study: none of one that is unfinished, two of one that was reopened."""
    found = [_main_series(month, study)]
    number = 2
    for share, head, label, words in EXTRA_SERIES:
        if month.chance(share):
            found.append([_excluded(month, study, number, head, label, words)])
            number += 1
    if month.chance(THIN):
        found.append([_Decided(_analysed(month, study, 1, number, thin=True), study)])
        number += 1
    if month.chance(LOCALIZER):
        reason = ("localizer: 2 scout images, no axial scan",)
        found.append([_Decided(_event(month, study, number, 1, "not_eligible", reasons=reason, slices=2), study)])
    return found[:most]


def _main_series(month: _Month, study: _Study) -> list[_Decided]:
    """The axial soft-tissue head: analysed nearly always."""
    fate = month.random.random()
    if fate < 0.005:
        _event(month, study, 1, 1, None)
        return []
    if fate < 0.017:
        error = str(month.random.choice(["PixelDataError", "VolumeError", "ServingUnavailable"]))
        reasons = (f"{error}: simulated",)
        return [_Decided(_event(month, study, 1, 1, "failed", reasons=reasons), study)]
    if fate < 0.030:
        return [_Decided(_too_few(month, study), study)]
    if fate < 0.045:
        return [_excluded(month, study, 1, "kernel", "bone", "bone kernel", rightly=False)]
    if fate < 0.065:
        return [_Decided(_too_few(month, study), study), _Decided(_analysed(month, study, 2), study)]
    return [_Decided(_analysed(month, study, 1), study)]


def _too_few(month: _Month, study: _Study) -> SeriesTriaged:
    reasons = ("too few slices: 5, a head scan has at least 8 (router.min_slices)",)
    return _event(month, study, 1, 1, "not_eligible", reasons=reasons, slices=5)


def _excluded(
    month: _Month, study: _Study, number: int, head: str, label: str, words: str, rightly: bool = True
) -> _Decided:
    truth = {**HEADS, head: label} if rightly else HEADS
    protocol = _protocol(month, {head: label})
    header = _header(month, truth)
    says = f"the header says {header[head]}" if header[head] else "the header says nothing"
    event = _event(
        month,
        study,
        number,
        1,
        "not_eligible",
        reasons=(f"{head}: {words} ({protocol[head].probability:.2f}) from the pixels, {says}",),
        protocol=protocol,
        header=header,
        bone=label == "bone" and rightly,
    )
    return _Decided(event, study, rightly)


def _analysed(month: _Month, study: _Study, revision: int, number: int = 1, thin: bool = False) -> SeriesTriaged:
    middle, spread = BLEED_LOGIT if study.bleeds else CLEAN_LOGIT
    logit = middle + spread * (0.8 * study.hardness + 0.6 * month.around(0, 1)) + DRIFT_LOGIT * study.drifted
    probability = round(float(1 / (1 + np.exp(-logit))), 4)
    leading = study.kind if study.bleeds and month.chance(0.85) else str(month.random.choice(KINDS, p=KIND_SHARES))
    volume = round(float(month.random.lognormal(2.0, 1.0)), 1) if probability >= 0.5 else 0.0
    findings = [Finding("any", probability, volume, 14, f"{study.uid}.1.14")]
    for kind in KINDS:
        share = 0.95 if kind == leading else float(month.random.random()) * 0.4
        found = volume if kind == leading else 0.0
        findings.append(Finding(kind, round(probability * share, 4), found, 14, f"{study.uid}.1.14"))
    uncertain = month.chance(0.04)
    header = _header(month, HEADS)
    reasons = ("uncertain: kernel: soft-tissue kernel (0.66) from the pixels, the header says nothing",)
    return _event(
        month,
        study,
        number,
        revision,
        "positive" if probability >= 0.5 else "negative",
        findings=tuple(findings),
        protocol=_protocol(month, {}),
        header=header,
        uncertain=uncertain,
        reasons=reasons if uncertain else (),
        thin=thin,
    )


def _protocol(month: _Month, other: Mapping[str, str]) -> dict[str, Label]:
    said = {**HEADS, **other}
    return {head: Label(label, round(float(month.random.uniform(0.8, 1.0)), 4)) for head, label in said.items()}


def _header(month: _Month, truth: Mapping[str, str]) -> dict[str, str | None]:
    """What headers say: often nothing of contrast, and now and then something else of the kernel."""
    claim: dict[str, str | None] = dict(truth)
    if month.chance(0.4):
        claim["contrast"] = None
    if month.chance(0.06):
        claim["kernel"] = "bone" if truth["kernel"] == "soft" else "soft"
    if month.chance(0.1):
        claim["region"] = None
    return claim


def _event(
    month: _Month,
    study: _Study,
    number: int,
    revision: int,
    disposition: Disposition | None,
    *,
    slices: int | None = None,
    bone: bool = False,
    thin: bool = False,
    **decision: Any,
) -> SeriesTriaged:
    """The series in the receiver's table and its result in the web UI's; None leaves it without a result."""
    scanner = study.scanner
    uid = f"{study.uid}.{number}"
    count = slices or (4 if thin else 1) * (scanner.slices + int(month.random.integers(-3, 4)))
    first = study.at + timedelta(seconds=40 * number) + (timedelta(minutes=7) if revision > 1 else timedelta())
    last = first + timedelta(seconds=count * 0.15) + month.seconds(1, 4)
    quiet = month.chance(0.06)
    closed = last + (timedelta(seconds=60) if quiet else month.seconds(0.4, 0.6))
    reason = "quiet" if quiet else "released-and-even"
    about: dict[str, Any] = {
        "study_instance_uid": study.uid,
        "series_instance_uid": uid,
        "revision": revision,
        "accession_number": study.accession_number,
        "modality": "CT",
        "scanner": scanner.name,
        "calling_ae_title": scanner.ae_title,
        "instance_count": count,
        "close_reason": reason,
        "first_image_at": first,
        "last_image_at": last,
    }
    month.add(series, **about, closed_at=closed, published_at=closed + timedelta(milliseconds=20))
    started = closed + month.seconds(0.05, 0.5)
    asked = "protocol" in decision
    searched = "findings" in decision
    classified = started + month.seconds(0.4, 0.3) if asked else None
    detected = classified + month.seconds(2.0, 1.5) if classified and searched else None
    triaged = (detected or classified or started) + timedelta(milliseconds=80)
    noise = scanner.noise_hounsfield * (2.2 if bone else 1.5 if thin else 1.0) + DRIFT_NOISE * study.drifted
    header = decision.get("header", {})
    protocol = decision.get("protocol") or {}
    versions = {"protocol": "1"} if asked else {}
    event = SeriesTriaged(
        disposition=disposition or "failed",
        occurred_at=triaged,
        received_at=closed + timedelta(milliseconds=20),
        started_at=started,
        classified_at=classified,
        detected_at=detected,
        acquired_at=first - month.seconds(25, 30),
        convolution_kernel=scanner.bone_kernel if bone else scanner.kernel,
        slice_thickness_mm=THIN_MM if thin else scanner.slice_thickness_mm,
        pixel_spacing_mm=round(month.around(0.45, 0.02), 3),
        tissue_hounsfield=round(month.around(scanner.tissue_hounsfield, 1.2), 2),
        noise_hounsfield=round(max(0.5, month.around(noise, 0.5)), 2),
        slice_count=count,
        disagreements=tuple(h for h, said in header.items() if said and h in protocol and said != protocol[h].label),
        model_versions={**versions, "hemorrhage": "1"} if searched else versions,
        software_version=__version__,
        config_version=SIMULATED,
        **about,
        **decision,
    )
    if disposition is not None:
        _add_result(month, event)
    return event


def _add_result(month: _Month, event: SeriesTriaged) -> None:
    kinds = [finding for finding in event.findings if finding.kind != "any"]
    positive = event.disposition == "positive"
    month.add(
        results,
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        study_instance_uid=event.study_instance_uid,
        accession_number=event.accession_number,
        scanner=event.scanner,
        disposition=event.disposition,
        probability=event.findings[0].probability if event.findings else None,
        uncertain=event.uncertain,
        event=msgspec.to_builtins(event),
        triaged_at=event.occurred_at,
        posted_at=event.occurred_at + month.seconds(0.05, 0.1),
        leading_finding=max(kinds, key=lambda finding: finding.probability).kind if positive else None,
        disagreement=bool(event.disagreements),
    )


# --- what becomes of it ----------------------------------------------------------------------------------------------


def _read(month: _Month, decided: list[_Decided]) -> None:
    """Pages, verdicts in the order of arrival by one reader at a time, labels and adjudications."""
    newest = {d.event.series_instance_uid: d.event.revision for d in decided}
    current = [d for d in decided if newest[d.event.series_instance_uid] == d.event.revision]
    worst: dict[str, _Decided] = {}  # a reader judges the series that shows most
    for d in current:
        if d.event.findings:
            before = worst.setdefault(d.study.uid, d)
            if d.event.findings[0].probability > before.event.findings[0].probability:
                worst[d.study.uid] = d
    analysed = list(worst.values())
    arrives = np.array([((d.event.last_image_at or START) - START).total_seconds() / 60 for d in analysed])
    order = np.argsort(arrives, kind="stable")
    lasts = month.random.exponential(MINUTES_OF_READING, len(analysed))
    waited = waits(arrives[order], np.full(len(order), np.inf), lasts, 1)
    for place, one in enumerate(order):
        decision = analysed[one]
        minutes = float(arrives[one] + waited[place] + lasts[place])
        at = max(START + timedelta(seconds=round(minutes * 60, 1)), decision.event.occurred_at + timedelta(seconds=20))
        _judged(month, decision, at)
    for decision in current:
        if decision.event.disposition == "not_eligible" and month.chance(VERDICT_OF_EXCLUSION):
            at = decision.event.occurred_at + month.seconds(1800, 7200)
            _verdict(month, decision.event, "agree" if decision.rightly else "disagree", None, True, at)


def _judged(month: _Month, decision: _Decided, at: datetime) -> None:
    """One analysed study: its page, the reader's verdict, labels from reports, and who decides where these differ."""
    event, study = decision.event, decision.study
    positive = event.disposition == "positive"
    answers = []
    if positive:
        _paged(month, event, at)
    if month.chance(VERDICT_OF_POSITIVE if positive else VERDICT_OF_NEGATIVE):
        blind = month.chance(BLIND)
        sees = study.bleeds if month.chance(0.975 if study.bleeds else 0.99) else not study.bleeds
        if not blind and sees != positive and month.chance(FOLLOWS * 0.2):
            sees = positive  # what is on the screen is believed
        if month.chance(0.01):
            _verdict(month, event, "unsure", None, not blind, at)
        else:
            kind = study.kind if study.bleeds else "edh_sdh"
            _verdict(month, event, "agree" if sees == positive else "disagree", kind if sees else None, not blind, at)
            answers.append(sees)
    for source, kind_of_label, share, right in LABELS:
        if month.chance(share):
            says = study.bleeds if month.chance(right) else not study.bleeds
            answers.append(says)
            month.add(
                labels,
                accession_number=study.accession_number,
                haemorrhage=says,
                source=source,
                imported_at=START + timedelta(days=DAYS + 1),
                kind=kind_of_label,
            )
    if len(set(answers)) > 1 and month.chance(0.6):
        month.add(
            adjudications,
            study_instance_uid=study.uid,
            haemorrhage=study.bleeds,
            finding_kind=study.kind if study.bleeds else None,
            reader="panel",
            occurred_at=START + timedelta(days=DAYS + 1, hours=12),
        )


def _paged(month: _Month, event: SeriesTriaged, read_at: datetime) -> None:
    due = event.occurred_at + timedelta(milliseconds=300)
    sent = due + month.seconds(0.2, 0.5)
    acknowledged = min(sent + month.seconds(20, 200), read_at)
    month.add(
        pages,
        page_id=month.new_id(),
        study_instance_uid=event.study_instance_uid,
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        step=0,
        state="acknowledged",
        mode="live",
        channel="smtp",
        recipient="on-call:radiology",
        subject="simulated",
        body="simulated",
        finding_at=event.occurred_at,
        due_at=due,
        sent_at=sent,
        acknowledged_at=max(acknowledged, sent),
        acknowledged_by="reader-on-call",
        attempts=1,
        policy="",
        site=event.scanner.removeprefix("CT-").lower(),
    )


def _verdict(
    month: _Month, event: SeriesTriaged, action: str, kind: str | None, prediction_shown: bool, at: datetime
) -> None:
    month.add(
        reviews,
        review_id=month.new_id(),
        study_instance_uid=event.study_instance_uid,
        series_instance_uid=event.series_instance_uid,
        revision=event.revision,
        action=action,
        finding_kind=kind,
        reader=SHIFTS[at.hour // 8],
        prediction_shown=prediction_shown,
        occurred_at=at,
        published_at=at + timedelta(milliseconds=50),
    )


# --- command ---------------------------------------------------------------------------------------------------------

SETTINGS = """\
# A simulated month: nothing in it is measured.
[node]
data_dir = {folder}

[ledger]
url = "sqlite:///ledger.sqlite"

[notifier]
mode = "live"

[[notifier.sites]]
name = "north"
scanners = ["CT-NORTH"]

[[notifier.sites]]
name = "south"
scanners = ["CT-SOUTH"]

[validation]
reference_days = {reference_days}
window_days = 7
"""


def main(
    folder: Annotated[Path, typer.Argument(help="Where to put ledger.sqlite and herald.toml; made if need be.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same record.", min=0)] = 0,
    series_count: Annotated[int, typer.Option("--series", help="How many series.", min=1)] = 3000,
) -> None:
    """Write a simulated month of two scanners, one of which drifts from day 18 on, into a fresh ledger."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "ledger.sqlite").exists():
        raise ConfigError(f"{folder} has a ledger already; give another folder, or remove it")
    path = folder / "herald.toml"
    quoted = msgspec.json.encode(str(folder)).decode()
    path.write_text(SETTINGS.format(folder=quoted, reference_days=REFERENCE_DAYS), encoding="utf-8")
    config = load_config(path, {})
    ledger = open_ledger(config.ledger)
    try:
        entries = simulate(ledger, config, series_count, seed)
    finally:
        ledger.close()
    last = (START + timedelta(days=DAYS - 1)).date()
    print(f"{entries} entries of a simulated month. Next:")
    print(f"herald --config {path} report --from {START.date()} --to {last} --html report.html --json report.json")


if __name__ == "__main__":
    typer.run(main)

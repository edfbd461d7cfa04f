"""Answers against the reference standard: by series, by study, by group and by where the reference is from."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

import numpy as np

from herald.discrimination import Scores, Truth
from herald.validation.row import GivenLabel, Reading, ValidationRow
from herald.validation.statistics import (
    Calibration,
    ControlPoint,
    Corrected,
    Estimate,
    auc,
    begg_greenes,
    calibration,
    not_estimable,
    p_chart,
    roc_points,
    share,
)

FEW = 5
"""Cases with a reference below which a group is shown with a warning."""
UNEVEN = 0.10
"""Difference of the verified shares of positives and negatives from which the words warn of it."""

REFERENCES = (
    "adjudication",
    "imported labels",
    "report text by rule",
    "blind readings",
    "unblinded readings",
)
"""What may say alone whether there is haemorrhage; a blind reading was given before the prediction was shown."""


@dataclass(frozen=True)
class Case:
    """What is judged: one analysed series, or one study, positive where any of its analysed series is."""

    study_instance_uid: str
    series_instance_uid: str
    """Of a study, the one with the highest probability."""
    revision: int
    at: datetime
    positive: bool
    probability: float
    scanner: str
    kernel: str
    site: str
    leading: str
    """Most probable kind of bleed by the model, empty when it is not known."""
    readings: tuple[Reading, ...]
    labels: tuple[GivenLabel, ...]
    adjudicated: bool | None

    @cached_property
    def truth(self) -> bool | None:
        """The reference standard, as `ValidationRow.reference`."""
        return self.adjudicated if self.adjudicated is not None else _agreed(self._answers())

    @property
    def disputed(self) -> bool:
        """Whether its answers differ and nobody has decided between them."""
        return self.adjudicated is None and len(set(self._answers())) > 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of bleed that readers named; none where the reference says that there is no bleed."""
        return tuple(sorted({r.finding_kind for r in self.readings if r.haemorrhage and r.finding_kind}))

    def truth_by(self, reference: str) -> bool | None:
        """What one of REFERENCES says alone."""
        if reference == "adjudication":
            return self.adjudicated
        if reference in ("imported labels", "report text by rule"):
            kind = "label" if reference == "imported labels" else "report"
            return _agreed([label.haemorrhage for label in self.labels if label.kind == kind])
        shown = reference != "blind readings"
        said = [reading for reading in self.readings if reading.prediction_shown == shown]
        return _agreed([reading.haemorrhage for reading in said if reading.haemorrhage is not None])

    def _answers(self) -> list[bool]:
        read = [reading.haemorrhage for reading in self.readings if reading.haemorrhage is not None]
        return [label.haemorrhage for label in self.labels] + read


def _agreed(answers: Sequence[bool]) -> bool | None:
    return answers[0] if len(set(answers)) == 1 else None


def arrived_at(row: ValidationRow) -> datetime | None:
    """When a series came: its first image, or the first time that is known of it."""
    return row.first_image_at or row.last_image_at or row.closed_at or row.triaged_at or row.acquired_at


def series_cases(rows: Iterable[ValidationRow]) -> list[Case]:
    """Every analysed series that no later revision replaced."""
    return [_case([row]) for row in _analysed(rows)]


def study_cases(rows: Iterable[ValidationRow]) -> list[Case]:
    """Every study with an analysed series; what is said of any of its series is said of the study."""
    by_study: dict[str, list[ValidationRow]] = {}
    for row in _analysed(rows):
        by_study.setdefault(row.study_instance_uid, []).append(row)
    return [_case(by_study[uid]) for uid in sorted(by_study)]


def _analysed(rows: Iterable[ValidationRow]) -> list[ValidationRow]:
    known = [row for row in rows if row.analysed and not row.superseded and arrived_at(row) is not None]
    return sorted(known, key=lambda row: (row.study_instance_uid, row.series_instance_uid, row.revision))


def _case(rows: Sequence[ValidationRow]) -> Case:
    worst = max(rows, key=lambda row: (row.disposition == "positive", _probability(row)))
    kinds = {kind: p for kind, p in worst.finding_probabilities.items() if kind != "any"}
    decided = [row.adjudicated for row in rows if row.adjudicated is not None]
    return Case(
        study_instance_uid=worst.study_instance_uid,
        series_instance_uid=worst.series_instance_uid,
        revision=worst.revision,
        at=min(at for row in rows if (at := arrived_at(row)) is not None),
        positive=worst.disposition == "positive",
        probability=max(_probability(row) for row in rows),
        scanner=worst.scanner or worst.calling_ae_title,
        kernel=worst.convolution_kernel,
        site=worst.site,
        leading=max(sorted(kinds), key=lambda kind: kinds[kind]) if kinds else "",
        readings=_by_reader([reading for row in rows for reading in row.readings]),
        labels=tuple(dict.fromkeys(label for row in rows for label in row.labels)),
        adjudicated=decided[-1] if decided else None,
    )


def _by_reader(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    """What each reader says of the whole study: who saw blood in one series saw it, else the last answer."""
    said: dict[str, Reading] = {}
    for reading in sorted(readings, key=lambda r: (bool(r.haemorrhage), r.haemorrhage is not None, r.at)):
        said[reading.reader] = reading
    return tuple(said[reader] for reader in sorted(said))


def _probability(row: ValidationRow) -> float:
    """Of a row that has none, what its disposition says."""
    return row.probability if row.probability is not None else float(row.disposition == "positive")


# --- 2x2 -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoByTwo:
    """The counts, what follows from them, and in words what does not."""

    n: int
    tp: int
    fp: int
    fn: int
    tn: int
    disputed: int
    unverified_positives: int
    unverified_negatives: int
    sensitivity: Estimate
    specificity: Estimate
    ppv: Estimate
    npv: Estimate
    accuracy: Estimate
    corrected: Corrected | None
    """For partial verification; None where all are verified, or none of one answer is."""
    auc: Estimate
    warnings: tuple[str, ...]


def two_by_two(cases: Sequence[Case], truth: Callable[[Case], bool | None] = lambda case: case.truth) -> TwoByTwo:
    """Answers of `cases` against `truth`; sensitivity is not estimable where no negative was verified."""
    told = [(case, said) for case in cases if (said := truth(case)) is not None]
    tp = sum(case.positive and said for case, said in told)
    fp = sum(case.positive and not said for case, said in told)
    fn = sum(not case.positive and said for case, said in told)
    tn = sum(not case.positive and not said for case, said in told)
    positives = sum(case.positive for case in cases)
    negatives = len(cases) - positives
    both = bool(tp + fp and fn + tn)
    missing = len(told) < len(cases)
    return TwoByTwo(
        n=len(cases),
        tp=tp,
        fp=fp,
        fn=fn,
        tn=tn,
        disputed=sum(case.disputed and truth(case) is None for case in cases),
        unverified_positives=positives - tp - fp,
        unverified_negatives=negatives - fn - tn,
        sensitivity=share(tp, tp + fn) if both or not negatives else not_estimable(),
        specificity=share(tn, tn + fp) if both or not positives else not_estimable(),
        ppv=share(tp, tp + fp),
        npv=share(tn, tn + fn),
        accuracy=share(tp + tn, len(told)) if both else not_estimable(),
        corrected=begg_greenes(tp, fp, fn, tn, positives, negatives) if both and missing else None,
        auc=auc(*arrays(cases, truth)) if both else not_estimable(),
        warnings=_warnings(tp + fp, positives, fn + tn, negatives),
    )


def _warnings(verified_positives: int, positives: int, verified_negatives: int, negatives: int) -> tuple[str, ...]:
    said = []
    if positives > verified_positives:
        said.append(f"{positives - verified_positives} of {positives} positives have no reference standard.")
    if negatives and not verified_negatives:
        said.append(
            "No negative has a reference standard (verification bias): sensitivity, specificity, NPV, accuracy and AUC "
            "cannot be estimated. Have a random share of the negatives read, or import labels for all studies."
        )
    elif positives and not verified_positives:
        said.append(
            "No positive has a reference standard: PPV, sensitivity, specificity, accuracy and AUC cannot be estimated."
        )
    elif positives and negatives:
        of_positives, of_negatives = verified_positives / positives, verified_negatives / negatives
        if abs(of_positives - of_negatives) > UNEVEN:
            said.append(
                f"{of_positives:.0%} of the positives and {of_negatives:.0%} of the negatives have a reference "
                "standard (partial verification): sensitivity and specificity as counted are biased, and so are "
                "accuracy and AUC. The corrected figures hold where it is chance which of the positives, and which of "
                "the negatives, have one."
            )
    return tuple(said)


def arrays(
    cases: Sequence[Case], truth: Callable[[Case], bool | None] = lambda case: case.truth
) -> tuple[Scores, Truth]:
    """Probability and truth (N,) of the cases with a reference."""
    told = [(case.probability, said) for case in cases if (said := truth(case)) is not None]
    return np.array([p for p, _ in told], dtype=float), np.array([said for _, said in told], dtype=bool)


@dataclass(frozen=True)
class Discrimination:
    """The ROC curve, where on it the node works, and calibration, of the studies with a reference."""

    points: list[tuple[float, float]]
    operating_point: tuple[float, float] | None
    """1 - specificity and sensitivity of the dispositions."""
    calibration: Calibration


def discrimination(cases: Sequence[Case]) -> Discrimination:
    """ROC and calibration of cases; without points where only one answer was verified."""
    counts = two_by_two(cases)
    scores, truth = arrays(cases)
    estimable = counts.auc.value is not None
    point = None
    if estimable and counts.sensitivity.value is not None and counts.specificity.value is not None:
        point = (1 - counts.specificity.value, counts.sensitivity.value)
    return Discrimination(
        points=roc_points(scores, truth) if estimable else [],
        operating_point=point,
        calibration=calibration(scores, truth) if estimable else calibration(scores[:0], truth[:0]),
    )


# --- groups ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """One scanner, kernel, site or reference with its own 2x2; `few` warns of fewer than FEW cases."""

    name: str
    counts: TwoByTwo
    few: bool


@dataclass(frozen=True)
class KindOfBleed:
    """One kind: how many of those that readers saw were found, and how many of those called so were bleeds."""

    name: str
    sensitivity: Estimate
    auc: Estimate
    """Of these beside all without haemorrhage."""
    ppv: Estimate
    few: bool


def by_group(cases: Sequence[Case], name: Callable[[Case], str]) -> list[Group]:
    """A 2x2 for each name, largest group first."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(name(case) or "not known", []).append(case)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [_group(group, members, lambda case: case.truth) for group, members in ordered]


def by_reference(cases: Sequence[Case]) -> list[Group]:
    """The same cases against each reference standard alone."""
    return [
        _group(reference, cases, lambda case, reference=reference: case.truth_by(reference))  # type: ignore[misc]
        for reference in REFERENCES
        if any(case.truth_by(reference) is not None for case in cases)
    ]


def _group(name: str, cases: Sequence[Case], truth: Callable[[Case], bool | None]) -> Group:
    counts = two_by_two(cases, truth)
    return Group(name, counts, counts.tp + counts.fp + counts.fn + counts.tn < FEW)


def by_kind(cases: Sequence[Case]) -> list[KindOfBleed]:
    """By kind of bleed: sensitivity by what readers saw, PPV by what the model thought likeliest."""
    names = sorted({kind for case in cases for kind in case.kinds} | {c.leading for c in cases if c.positive} - {""})
    estimable = two_by_two(cases).sensitivity.value is not None
    clean = [case for case in cases if case.truth is False]
    found = []
    for name in names:
        bleeding = [case for case in cases if case.truth and name in case.kinds]
        called = [case for case in cases if case.positive and case.leading == name and case.truth is not None]
        seen = share(sum(case.positive for case in bleeding), len(bleeding))
        found.append(
            KindOfBleed(
                name=name,
                sensitivity=seen if estimable else not_estimable(len(bleeding)),
                auc=auc(*arrays([*bleeding, *clean])) if estimable else not_estimable(len(bleeding)),
                ppv=share(sum(bool(case.truth) for case in called), len(called)),
                few=min(len(bleeding), len(called)) < FEW,
            )
        )
    return found


# --- PPV per week ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Week:
    """One week from the first day of the period on."""

    start: datetime
    point: ControlPoint


def ppv_by_week(cases: Sequence[Case], start: datetime, end: datetime) -> tuple[float | None, list[Week]]:
    """PPV of the studies of each week with its control limits, and the overall PPV that they stand around."""
    starts = []
    while start < end:
        starts.append(start)
        start += timedelta(days=7)
    counts = []
    for first in starts:
        of_week = [
            case
            for case in cases
            if case.positive and case.truth is not None and first <= case.at < first + timedelta(days=7)
        ]
        counts.append((sum(bool(case.truth) for case in of_week), len(of_week)))
    overall, points = p_chart(counts)
    return overall, [Week(first, point) for first, point in zip(starts, points, strict=True)]

"""The flow diagram: every series revision received ends in exactly one box (STARD 2015, item 19; CONSORT-AI item 4)."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from herald import errors
from herald.validation.row import ValidationRow

Excluded = Literal["input quality", "protocol"]

_BY_PIXELS = re.compile(r"^(?:uncertain: )?(\w+): (.+?) \(\d(?:\.\d+)?\) from the pixels")
_OF_INPUT = ("too few slices", "the series has no instance", "incomplete")
_INPUT_ERRORS = frozenset(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.DicomError)
)


@dataclass(frozen=True)
class Box:
    """A box at the side: what left the study and how many."""

    name: str
    n: int


@dataclass(frozen=True)
class Arm:
    """The series of one answer, by what the reference standard says of them."""

    n: int
    haemorrhage: int
    no_haemorrhage: int
    disputed: int
    """Their answers differ, and nobody has decided between them."""
    without_reference: int


@dataclass(frozen=True)
class Flow:
    """All boxes; each is the sum of those that it leads to."""

    received: int
    studies: int
    superseded: int
    unfinished: int
    failed_by_input: tuple[Box, ...]
    failed_by_software: tuple[Box, ...]
    excluded_by_input: tuple[Box, ...]
    excluded_by_protocol: tuple[Box, ...]
    several_reasons: int
    """Excluded for more than one reason; they are counted at the first."""
    analysed: int
    uncertain: int
    """Analysed although the protocol was uncertain or images were left out."""
    positive: Arm
    negative: Arm


def place(row: ValidationRow) -> tuple[str, ...]:
    """The way of a row to its box, from the coarsest name to the finest."""
    if row.superseded:
        return ("superseded",)
    if row.disposition == "unfinished":
        return ("unfinished",)
    if row.disposition == "failed":
        error = _error_class(row)
        return ("failed", "input" if error in _INPUT_ERRORS else "software", error)
    if row.disposition == "not_eligible":
        kind, name = exclusion(row)
        return ("not eligible", kind, name)
    return ("analysed", row.disposition, _reference_of(row))


def exclusion(row: ValidationRow) -> tuple[Excluded, str]:
    """Whether input or protocol kept a series from analysis, and the first reason without its figures."""
    reason = row.reasons[0] if row.reasons else "no reason given"
    if said := _BY_PIXELS.match(reason):
        return "protocol", f"{said[1]}: {said[2]}"
    name = reason.partition(":")[0].strip()[:60]
    return ("input quality" if name.startswith(_OF_INPUT) else "protocol"), name


def flow(rows: Iterable[ValidationRow]) -> Flow:
    """Count every row in its box."""
    rows = list(rows)
    places = Counter(place(row) for row in rows)

    def boxes(*way: str) -> tuple[Box, ...]:
        found = [(where[-1], n) for where, n in places.items() if where[: len(way)] == way]
        return tuple(Box(name, n) for name, n in sorted(found, key=lambda box: (-box[1], box[0])))

    def arm(answer: str) -> Arm:
        by_reference = {where[-1]: n for where, n in places.items() if where[:2] == ("analysed", answer)}
        return Arm(
            n=sum(by_reference.values()),
            haemorrhage=by_reference.get("haemorrhage", 0),
            no_haemorrhage=by_reference.get("no haemorrhage", 0),
            disputed=by_reference.get("disputed", 0),
            without_reference=by_reference.get("none", 0),
        )

    current = [row for row in rows if not row.superseded]
    positive, negative = arm("positive"), arm("negative")
    return Flow(
        received=len(rows),
        studies=len({row.study_instance_uid for row in rows}),
        superseded=places[("superseded",)],
        unfinished=places[("unfinished",)],
        failed_by_input=boxes("failed", "input"),
        failed_by_software=boxes("failed", "software"),
        excluded_by_input=boxes("not eligible", "input quality"),
        excluded_by_protocol=boxes("not eligible", "protocol"),
        several_reasons=sum(row.disposition == "not_eligible" and len(row.reasons) > 1 for row in current),
        analysed=positive.n + negative.n,
        uncertain=sum(row.analysed and row.uncertain for row in current),
        positive=positive,
        negative=negative,
    )


def _error_class(row: ValidationRow) -> str:
    said = row.reasons[0].partition(":")[0].strip() if row.reasons else ""
    return said if re.fullmatch(r"[A-Za-z_][\w.]*", said) else "error of no known class"


def _reference_of(row: ValidationRow) -> str:
    if row.reference is None:
        return "disputed" if row.needs_adjudication else "none"
    return "haemorrhage" if row.reference else "no haemorrhage"

"""Rows of the validation record for the tests of its report."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from herald.events import Label
from herald.validation.row import GivenLabel, Reading, ValidationRow

START = datetime(2026, 3, 1, tzinfo=UTC)
END = datetime(2026, 4, 1, tzinfo=UTC)
ROOT = "1.2.826.0.1.3680043.8.498"
WANTED = {"contrast": "non_contrast", "orientation": "axial", "kernel": "soft", "region": "head"}


def received(number: int, disposition: Any, day: float = 0.0, **changes: Any) -> ValidationRow:
    """Series 1 of study `number`, on a day of March."""
    first = START + timedelta(days=day, minutes=number % 600)
    row = ValidationRow(
        study_instance_uid=f"{ROOT}.{number}",
        series_instance_uid=f"{ROOT}.{number}.1",
        revision=1,
        scanner="CT-1",
        modality="CT",
        convolution_kernel="H30s",
        disposition=disposition,
        first_image_at=first,
        last_image_at=first + timedelta(seconds=10),
        closed_at=first + timedelta(seconds=12),
        triaged_at=first + timedelta(seconds=20),
        slice_count=32,
    )
    return replace(row, **changes)


def analysed(
    number: int, positive: bool = True, truth: bool | None = None, day: float = 0.0, **changes: Any
) -> ValidationRow:
    """An analysed series, with a reader's verdict that says `truth`; None is no verdict."""
    probability = 0.5 + (number * 37 % 49) / 100 if positive else (number * 37 % 49) / 100
    values: dict[str, Any] = {
        "probability": probability,
        "finding_probabilities": {"any": probability, "iph": probability * 0.9, "sah": probability * 0.1},
        "protocol": {head: Label(label, 0.97) for head, label in WANTED.items()},
        "header": dict(WANTED),
    }
    if truth is not None:
        values["readings"] = (reading(truth, agrees=positive == truth, day=day + 0.5),)
    return received(number, "positive" if positive else "negative", day, **{**values, **changes})


def excluded(
    number: int, head: str = "kernel", label: str = "bone", verdict: str = "", **changes: Any
) -> ValidationRow:
    """A series that the protocol excluded by one head, with a verdict on that."""
    said = reading(None, agrees=verdict == "agree") if verdict else None
    values: dict[str, Any] = {
        "reasons": (f"{head}: {label} kernel (0.98) from the pixels, the header says nothing",),
        "protocol": {h: Label(label if h == head else wanted, 0.98) for h, wanted in WANTED.items()},
        "header": {**WANTED, head: None},
        "readings": (said,) if said else (),
    }
    return received(number, "not_eligible", **{**values, **changes})


def reading(
    haemorrhage: bool | None,
    agrees: bool = True,
    shown: bool = True,
    reader: str = "rita",
    kind: str = "",
    day: float = 1,
) -> Reading:
    """A verdict of a reader."""
    return Reading(
        reader=reader,
        action="agree" if agrees else "disagree",
        haemorrhage=haemorrhage,
        finding_kind=kind or None,
        prediction_shown=shown,
        at=START + timedelta(days=day),
    )


def label(haemorrhage: bool, source: str = "registry", kind: Any = "label") -> GivenLabel:
    """An imported answer."""
    return GivenLabel(source=source, kind=kind, haemorrhage=haemorrhage)

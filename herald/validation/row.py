"""One row of the validation record: everything that is known of one series revision, without identity of a patient."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from herald.events import Label

RowDisposition = Literal["positive", "negative", "not_eligible", "failed", "unfinished"]
LabelKind = Literal["label", "report"]


@dataclass(frozen=True, kw_only=True)
class GivenLabel:
    """What somebody outside of Herald said of the study: an answer, or one drawn by rule from a report's text."""

    source: str
    kind: LabelKind
    haemorrhage: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The verdict that counts of one reader: the last one that was not taken back."""

    reader: str
    action: str
    """agree, disagree or unsure."""
    haemorrhage: bool | None
    """What it says of the head; None for unsure, and where there was nothing to agree with."""
    finding_kind: str | None
    prediction_shown: bool
    """Whether the prediction was on the screen before the verdict."""
    at: datetime


@dataclass(frozen=True, kw_only=True)
class ValidationRow:
    """One series revision, from first image to last verdict; times are UTC, None where a step did not happen.

    A later row of the same series revision replaces an earlier one, which stays in the record.
    """

    # which
    study_instance_uid: str
    series_instance_uid: str
    revision: int
    accession_number: str = ""
    site: str = ""
    """Name of one of `notifier.sites`, empty when it is of none."""
    scanner: str = ""
    calling_ae_title: str = ""
    modality: str = ""
    superseded: bool = False
    """A later revision of the series has a result, and was searched for haemorrhage if this one was."""

    # when
    acquired_at: datetime | None = None
    """By the scanner's clock; every other time is by ours."""
    first_image_at: datetime | None = None
    last_image_at: datetime | None = None
    closed_at: datetime | None = None
    started_at: datetime | None = None
    classified_at: datetime | None = None
    detected_at: datetime | None = None
    triaged_at: datetime | None = None
    posted_at: datetime | None = None
    paged_at: datetime | None = None
    """First page of the study, or when it would have been sent in shadow mode."""
    acknowledged_at: datetime | None = None
    read_at: datetime | None = None
    """First verdict of a reader."""

    # what came
    close_reason: str = ""
    instance_count: int = 0
    slice_count: int = 0
    slice_thickness_mm: float | None = None
    pixel_spacing_mm: float | None = None
    convolution_kernel: str = ""
    tissue_hounsfield: float | None = None
    noise_hounsfield: float | None = None

    # what was decided
    disposition: RowDisposition
    reasons: tuple[str, ...] = ()
    uncertain: bool = False
    protocol: dict[str, Label] = field(default_factory=dict)
    """Answer from the pixels by head; empty when the model was not asked."""
    header: dict[str, str | None] = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()
    probability: float | None = None
    """Of any haemorrhage; None when detection did not run."""
    finding_probabilities: dict[str, float] = field(default_factory=dict)
    finding_volumes_ml: dict[str, float] = field(default_factory=dict)
    model_versions: dict[str, str] = field(default_factory=dict)
    software_version: str = ""
    config_version: str = ""

    # what became of it
    mode: str = ""
    """shadow or live: of its pages, else of its site now."""
    page_state: str = ""
    """State of the study's last page, empty without one."""
    readings: tuple[Reading, ...] = ()
    """One for each reader, oldest first."""
    labels: tuple[GivenLabel, ...] = ()
    """The newest of each source, for the study's accession number."""
    adjudicated: bool | None = None
    """Whether the study shows haemorrhage by adjudication; None while nobody has decided."""

    @property
    def analysed(self) -> bool:
        """Whether the detector saw it."""
        return self.disposition in ("positive", "negative")

    @property
    def answers(self) -> tuple[bool, ...]:
        """Every answer to whether the study shows haemorrhage: imported labels, and verdicts that say so."""
        read = tuple(reading.haemorrhage for reading in self.readings if reading.haemorrhage is not None)
        return tuple(label.haemorrhage for label in self.labels) + read

    @property
    def needs_adjudication(self) -> bool:
        """Whether its answers differ and nobody has decided between them."""
        return self.adjudicated is None and len(set(self.answers)) > 1

    @property
    def reference(self) -> bool | None:
        """The reference standard: adjudication, else what all answers agree on; None where they differ or lack."""
        if self.adjudicated is not None:
            return self.adjudicated
        answers = set(self.answers)
        return answers.pop() if len(answers) == 1 else None

"""The contract between the services: what happened, as frozen dataclasses, each with its topic.

Events carry UIDs, the accession number and technical facts, never a name and never pixels. `event_id` is derived
from the cause, so that a redelivered cause repeats the same id and consumers can upsert on it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal
from uuid import UUID, uuid5

import msgspec

from herald.errors import EventDecodeError

SCHEMA_VERSION = 1

_NAMESPACE = UUID("6f0b9ad4-6c7e-4c2b-9d8a-2f6e3c1b7a10")

Disposition = Literal["positive", "negative", "not_eligible", "failed"]
Action = Literal["acknowledge", "agree", "disagree", "unsure"]


def utc_now() -> datetime:
    """Now, aware of its time zone, which is always UTC between services."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of every event: what it is about, and when it happened (UTC)."""

    topic: ClassVar[str]

    study_instance_uid: str
    series_instance_uid: str
    revision: int
    occurred_at: datetime = field(default_factory=utc_now)

    @property
    def cause(self) -> str:
        """What makes this event the same event when it is produced again."""
        return f"{self.study_instance_uid}/{self.series_instance_uid}/{self.revision}"

    @property
    def event_id(self) -> UUID:
        """Identity derived from the cause."""
        return uuid5(_NAMESPACE, f"{type(self).__name__}/{self.cause}")

    def to_json(self) -> bytes:
        """Encode with type, schema version and event id."""
        envelope = {"type": type(self).__name__, "schema": SCHEMA_VERSION, "event_id": self.event_id}
        return msgspec.json.encode({**envelope, **msgspec.to_builtins(self)})


@dataclass(frozen=True, kw_only=True)
class SeriesReceived(Event):
    """A series is complete in the store: receiver -> router."""

    topic: ClassVar[str] = "series"

    accession_number: str
    modality: str
    scanner: str
    """StationName, else the calling AE title."""
    calling_ae_title: str
    instance_count: int
    close_reason: str
    """Why the receiver took the series for complete: `released-and-even`, `quiet`, ..."""
    first_image_at: datetime
    last_image_at: datetime
    missing: tuple[str, ...] = ()
    """What is known to be missing of it, in words."""


@dataclass(frozen=True)
class Label:
    """One answer of one head of the protocol model."""

    label: str
    probability: float


@dataclass(frozen=True)
class Finding:
    """One kind of haemorrhage: study probability, extent, and the original slice where it is hottest."""

    kind: str
    probability: float
    volume_ml: float
    slice: int
    """1-based position of that slice in the series as displayed."""
    sop_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class SeriesTriaged(Event):
    """A series has its disposition: router -> notifier -> web UI."""

    topic: ClassVar[str] = "results"

    disposition: Disposition
    reasons: tuple[str, ...] = ()
    """Why it is not eligible, or what failed and what to do, in words."""
    uncertain: bool = False
    protocol: dict[str, Label] | None = None
    """Decision from the pixels by head; None when no model was asked."""
    header: dict[str, str | None] = field(default_factory=dict)
    """The headers' claim by head; None where the header says nothing."""
    disagreements: tuple[str, ...] = ()
    """Heads where header and pixels differ."""
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    """What was unusual in the geometry."""
    accession_number: str = ""
    modality: str = ""
    scanner: str = ""
    calling_ae_title: str = ""
    instance_count: int = 0
    slice_count: int = 0
    close_reason: str = ""
    first_image_at: datetime | None = None
    last_image_at: datetime | None = None
    received_at: datetime | None = None
    """When the receiver published SeriesReceived."""
    started_at: datetime | None = None
    """When the router took the series up."""
    classified_at: datetime | None = None
    detected_at: datetime | None = None
    acquired_at: datetime | None = None
    """When the scanner says that it acquired the series: earliest AcquisitionDateTime, or date and time."""
    convolution_kernel: str = ""
    """As the header has it (0018,1210)."""
    slice_thickness_mm: float | None = None
    """As the header has it (0018,0050)."""
    pixel_spacing_mm: float | None = None
    """Distance of rows."""
    tissue_hounsfield: float | None = None
    """Median of the soft tissue of the middle slices; what drifts with a scanner's calibration."""
    noise_hounsfield: float | None = None
    """Standard deviation of the noise there; what drifts with dose and kernel."""
    model_versions: dict[str, str] = field(default_factory=dict)
    software_version: str = ""
    config_version: str = ""
    """`herald.config.version` of the settings by which it was decided."""


@dataclass(frozen=True, kw_only=True)
class SeriesReviewed(Event):
    """A reader acknowledged or judged a result: web UI -> notifier."""

    topic: ClassVar[str] = "reviews"

    review_id: str
    action: Action
    reader: str

    @property
    def cause(self) -> str:
        """A review is its own cause: a reader may change a verdict."""
        return f"{super().cause}/{self.review_id}"


EVENT_TYPES: dict[str, type[Event]] = {t.__name__: t for t in (SeriesReceived, SeriesTriaged, SeriesReviewed)}


def event_from_json(message: bytes) -> Event:
    """Decode a message; raises EventDecodeError that says what is wrong with it.

    Unknown fields are ignored, so that an older consumer reads a newer producer of the same schema version.
    """
    try:
        body: Any = msgspec.json.decode(message)
        if not isinstance(body, dict):
            raise EventDecodeError(f"a message is not an event: expected a JSON object, got {type(body).__name__}")
        kind, schema = body.get("type"), body.get("schema")
        if not isinstance(kind, str) or kind not in EVENT_TYPES:
            raise EventDecodeError(f"unknown event type {kind!r}; known are {', '.join(EVENT_TYPES)}")
        if schema != SCHEMA_VERSION:
            raise EventDecodeError(f"{kind} has schema version {schema!r}, this software reads {SCHEMA_VERSION}")
        return msgspec.convert(body, EVENT_TYPES[kind])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise EventDecodeError(f"a message is not one of our events: {error}") from error

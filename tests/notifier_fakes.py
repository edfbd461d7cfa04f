"""What the notifier's tests share: an event with everything in it, and a configuration with secrets."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from herald.config import Config, NotifierConfig, WebuiConfig
from herald.events import Finding, Label, SeriesTriaged

NOON = datetime(2026, 3, 29, 12, 0, tzinfo=UTC)

FINDINGS = (
    Finding("any", 0.971, 12.34, 14, "1.2.3.4.14"),
    Finding("iph", 0.953, 11.8, 14, "1.2.3.4.14"),
    Finding("sah", 0.61, 0.5, 9, "1.2.3.4.9"),
    Finding("ivh", 0.12, 0.0, 3, "1.2.3.4.3"),
)


def triaged(
    disposition: str = "positive", study: str = "1.2.3", series: str = "1.2.3.4", revision: int = 1, **changes: Any
) -> SeriesTriaged:
    event = SeriesTriaged(
        study_instance_uid=study,
        series_instance_uid=series,
        revision=revision,
        occurred_at=NOON,
        disposition=disposition,  # type: ignore[arg-type]
        protocol={"contrast": Label("non_contrast", 0.99), "kernel": Label("soft", 0.97)},
        findings=FINDINGS if disposition == "positive" else (),
        accession_number="ACC20260329",
        scanner="CT-EAST",
        calling_ae_title="EAST1",
        slice_count=32,
        last_image_at=datetime(2026, 3, 29, 1, 15, 30, tzinfo=UTC),
    )
    return replace(event, **changes)


def configured(**notifier: Any) -> Config:
    return Config(
        notifier=NotifierConfig(**notifier),
        webui=WebuiConfig(token="token-for-tests", secret_key="key-for-tests", public_url="https://herald.example"),
    )

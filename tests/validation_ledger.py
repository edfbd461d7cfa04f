"""A ledger with what the services would have written, for tests of the validation record."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import Connection, insert
from webui_site import triaged

from herald.config import LedgerConfig
from herald.events import SeriesTriaged
from herald.ledger import Ledger, adjudications, labels, open_ledger, pages, results, reviews, series

NOON = datetime(2026, 3, 29, 12, 0, 0, 123456, tzinfo=UTC)
ROOT = "1.2.826.0.1.3680043.8.498"


def study_of(number: int) -> str:
    return f"{ROOT}.{number}"


def series_of(number: int) -> str:
    return f"{ROOT}.{number}.1"


def decided(number: int, disposition: str = "positive", **changes: Any) -> SeriesTriaged:
    """A decision about series `number`, whose first image came at noon and one minute later for each number."""
    event = triaged(number, disposition)
    start = NOON + timedelta(minutes=number)
    now = event.occurred_at
    moved = {
        name: start + (at - event.first_image_at)
        for name in ("first_image_at", "last_image_at", "received_at", "started_at", "classified_at", "detected_at")
        if (at := getattr(event, name)) is not None and event.first_image_at is not None
    }
    assert event.first_image_at is not None
    given = {"scanner": "CT-EAST", "occurred_at": start + (now - event.first_image_at), **moved, **changes}
    return replace(event, **given)


@dataclass
class Month:
    """A ledger, and one method for each thing that a service writes into it."""

    ledger: Ledger

    @classmethod
    @contextmanager
    def opened(cls, url: str) -> Iterator["Month"]:
        ledger = open_ledger(LedgerConfig(url=url))
        try:
            yield cls(ledger)
        finally:
            ledger.close()

    def _insert(self, table: Any, **values: Any) -> None:
        with self.ledger.begin() as connection:
            connection.execute(insert(table).values(**values))

    def receive(self, number: int, *, closed: bool = True, **values: Any) -> datetime:
        at = NOON + timedelta(minutes=number)
        row = {
            "series_instance_uid": series_of(number),
            "revision": 1,
            "study_instance_uid": study_of(number),
            "accession_number": f"ACC{number:05d}",
            "modality": "CT",
            "scanner": "CT-EAST",
            "calling_ae_title": "CT1",
            "instance_count": 24,
            "first_image_at": at,
            "last_image_at": at + timedelta(seconds=9),
            "closed_at": at + timedelta(seconds=12) if closed else None,
            "close_reason": "quiet" if closed else None,
        }
        self._insert(series, **{**row, **values})
        return at

    def triage(self, number: int, disposition: str = "positive", **changes: Any) -> SeriesTriaged:
        event = decided(number, disposition, **changes)
        with self.ledger.begin() as connection:
            self.post(connection, event)
        return event

    def post(self, connection: Connection, *events: SeriesTriaged) -> None:
        """What the web UI keeps of results."""
        connection.execute(
            insert(results),
            [
                {
                    "series_instance_uid": event.series_instance_uid,
                    "revision": event.revision,
                    "study_instance_uid": event.study_instance_uid,
                    "accession_number": event.accession_number[:16],
                    "scanner": event.scanner,
                    "disposition": event.disposition,
                    "probability": event.findings[0].probability if event.findings else None,
                    "uncertain": event.uncertain,
                    "event": msgspec.json.decode(event.to_json()),
                    "triaged_at": event.occurred_at,
                    "posted_at": event.occurred_at + timedelta(seconds=1),
                }
                for event in events
            ],
        )

    def fill(self, count: int) -> None:
        """Many analysed series, each tenth read twice and labelled."""
        first = decided(1, "positive"), decided(1, "negative")
        events = [
            replace(
                first[number % 11 > 0],
                study_instance_uid=study_of(number),
                series_instance_uid=series_of(number),
                accession_number=f"ACC{number:05d}",
            )
            for number in range(1, count + 1)
        ]
        with self.ledger.begin() as connection:
            self.post(connection, *events)
        for number in range(10, count + 1, max(10, count // 100)):
            self.review(number, "agree", "rita", NOON)
            self.review(number, "disagree", "omar", NOON)
            self.label(f"ACC{number:05d}", True, "ris")

    def page(self, number: int, **values: Any) -> None:
        row = {
            "page_id": str(uuid4()),
            "study_instance_uid": study_of(number),
            "series_instance_uid": series_of(number),
            "revision": 1,
            "step": 0,
            "mode": "live",
            "channel": "email",
            "recipient": "pager@example.org",
            "subject": "a page",
            "body": "a page",
            "finding_at": NOON,
            "due_at": NOON,
            "attempts": 1,
        }
        self._insert(pages, **{**row, **values})

    def review(self, number: int, action: str, reader: str, at: datetime, **values: Any) -> None:
        row = {
            "review_id": str(uuid4()),
            "study_instance_uid": study_of(number),
            "series_instance_uid": series_of(number),
            "revision": 1,
            "action": action,
            "reader": reader,
            "prediction_shown": True,
            "occurred_at": at,
        }
        self._insert(reviews, **{**row, **values})

    def label(self, accession_number: str, haemorrhage: bool, source: str, **values: Any) -> None:
        row = {"kind": "label", "imported_at": NOON, **values}
        self._insert(labels, accession_number=accession_number, haemorrhage=haemorrhage, source=source, **row)

    def adjudicate(self, number: int, haemorrhage: bool, at: datetime = NOON) -> None:
        row = {"study_instance_uid": study_of(number), "haemorrhage": haemorrhage}
        self._insert(adjudications, **row, reader="ada", occurred_at=at)

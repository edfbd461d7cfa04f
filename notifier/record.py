"""The notifier's rows in the ledger, `pages` and `deliveries`, and the one look at the web UI's `reviews`."""

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from uuid import UUID, uuid5

import msgspec
from sqlalchemy import Connection, and_, delete, insert, or_, select, update

from herald.events import SeriesTriaged
from herald.ledger import deliveries, pages, reviews
from herald.sites import Mode

State = Literal["due", "sent", "acknowledged", "escalated", "exhausted", "withdrawn", "failed"]

Outcome = Literal["sent", "shadow", "unavailable", "refused", "covered"]

_NAMESPACE = UUID("b1d8a1de-0c3e-4a77-8a53-6d1f5f5f1c0b")


@dataclass(frozen=True, kw_only=True)
class Page:
    """One row of `pages`: what one step of the policy tells one recipient about one study."""

    page_id: str
    study_instance_uid: str
    series_instance_uid: str
    revision: int
    step: int
    state: State
    mode: Mode
    channel: str
    recipient: str
    subject: str
    body: str
    finding_at: datetime
    due_at: datetime
    sent_at: datetime | None = None
    acknowledged_at: datetime | None = None
    acknowledged_by: str | None = None
    attempts: int = 0
    next_attempt_at: datetime | None = None
    error: str | None = None
    policy: str | None = None
    """Name of the policy whose steps are taken; empty, or None in rows of an earlier version: `notifier.steps`."""
    site: str | None = None
    event: dict[str, Any] | None = None
    """The SeriesTriaged that is paged, as JSON; None in rows of an earlier version."""
    made_at: datetime | None = None
    """When the study's first page was made, which every step keeps; None in rows of an earlier version."""

    @property
    def triaged(self) -> SeriesTriaged | None:
        """The event that is paged."""
        return None if self.event is None else msgspec.convert(self.event, SeriesTriaged)


@dataclass(frozen=True)
class Review:
    """A reader's look at a series revision, from the event or from the web UI's table."""

    series_instance_uid: str
    revision: int
    reader: str
    occurred_at: datetime


def page_id(study_instance_uid: str, step: int) -> str:
    """One id per study and step, whatever is redelivered."""
    return str(uuid5(_NAMESPACE, f"{study_instance_uid}/{step}"))


def load_page(connection: Connection, identity: str) -> Page | None:
    """The page with this id."""
    row = connection.execute(select(pages).where(pages.c.page_id == identity)).one_or_none()
    return None if row is None else Page(**row._mapping)


def pages_of_study(connection: Connection, study_instance_uid: str) -> list[Page]:
    """The study's pages in the order of the policy."""
    statement = select(pages).where(pages.c.study_instance_uid == study_instance_uid).order_by(pages.c.step)
    return [Page(**row._mapping) for row in connection.execute(statement)]


def open_pages(connection: Connection) -> list[Page]:
    """Every page that the clock has to see to, the earliest due first."""
    untold = and_(pages.c.state == "exhausted", pages.c.next_attempt_at.is_not(None))
    statement = select(pages).where(or_(pages.c.state.in_(("due", "sent")), untold)).order_by(pages.c.due_at)
    return [Page(**row._mapping) for row in connection.execute(statement)]


def add_page(connection: Connection, page: Page) -> None:
    """Write the row of a page that is new, or that begins anew."""
    connection.execute(delete(pages).where(pages.c.page_id == page.page_id))
    connection.execute(insert(pages).values(**vars(page)))


def change_page(connection: Connection, page: Page, **changes: Any) -> Page:
    """The page with these columns changed, in the ledger too."""
    connection.execute(update(pages).where(pages.c.page_id == page.page_id).values(**changes))
    return replace(page, **changes)


def drop_pages(connection: Connection, study_instance_uid: str) -> None:
    """Forget the study's pages, none of which reached anybody; what was tried stays in `deliveries`."""
    connection.execute(delete(pages).where(pages.c.study_instance_uid == study_instance_uid))


def reviews_of_study(connection: Connection, study_instance_uid: str) -> list[Review]:
    """Every review of the study's series, the earliest first."""
    statement = (
        select(reviews.c.series_instance_uid, reviews.c.revision, reviews.c.reader, reviews.c.occurred_at)
        .where(reviews.c.study_instance_uid == study_instance_uid)
        .order_by(reviews.c.occurred_at)
    )
    return [Review(*row) for row in connection.execute(statement)]


def covered_series(connection: Connection, study: list[Page]) -> set[str]:
    """Further positive series that the pages of a study stand for."""
    statement = select(deliveries.c.series_instance_uid).where(
        deliveries.c.page_id.in_([page.page_id for page in study]), deliveries.c.outcome == "covered"
    )
    return set(connection.scalars(statement))


def note_delivery(
    connection: Connection,
    *,
    at: datetime,
    series_instance_uid: str,
    revision: int,
    page: str | None,
    channel: str,
    recipient: str,
    outcome: Outcome,
    error: str | None = None,
    duration_s: float | None = None,
) -> None:
    """Add a row when the outcome is another than the last time: an outage is one row, not one per retry."""
    last = connection.scalar(
        select(deliveries.c.outcome)
        .where(
            deliveries.c.series_instance_uid == series_instance_uid,
            deliveries.c.revision == revision,
            deliveries.c.page_id == page if page else deliveries.c.page_id.is_(None),
            deliveries.c.channel == channel,
            deliveries.c.recipient == recipient,
        )
        .order_by(deliveries.c.delivery_id.desc())
        .limit(1)
    )
    if last == outcome:
        return
    connection.execute(
        insert(deliveries).values(
            occurred_at=at,
            series_instance_uid=series_instance_uid,
            revision=revision,
            page_id=page,
            channel=channel,
            recipient=recipient,
            outcome=outcome,
            error=error,
            duration_s=duration_s,
        )
    )

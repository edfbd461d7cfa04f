"""Studies that were to be paged and that nobody has answered, for the operators, the web UI and `herald check`.

And whether there is a notifier at all: what a dead one has not taken from the bus, the ledger knows nothing of.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import groupby

from sqlalchemy import Connection, RowMapping, and_, exists, func, or_, select

from herald.config import NotifierConfig
from herald.ledger import alarms, pages, reviews, watches

OVERDUE = timedelta(minutes=2)
"""How late a page may be before the notifier is taken to have stopped; longer than any pause between two attempts."""


@dataclass(frozen=True)
class Undelivered:
    """A study whose live pages have come to an end without an answer, or wait for a notifier that does nothing.

    `reached` says whether any channel took a page, `overdue` that one waits; `pages` are rows of the ledger by step.
    """

    study_instance_uid: str
    series_instance_uid: str
    revision: int
    finding_at: datetime
    last_at: datetime
    """When the last page was sent, or was to be."""
    reached: bool
    overdue: bool
    pages: tuple[RowMapping, ...]


def notifier_seen(connection: Connection, now: datetime) -> tuple[datetime | None, bool]:
    """When a notifier last gave a sign of life, as it does every 15 s, None if none ever has; and if one is alive."""
    seen_at: datetime | None = connection.scalar(select(func.max(watches.c.seen_at)))
    return seen_at, seen_at is not None and seen_at >= now - OVERDUE


def undelivered(connection: Connection, config: NotifierConfig, now: datetime) -> list[Undelivered]:
    """Every such study that no reader has acknowledged or reviewed since, the latest finding first.

    Pages of shadow mode are none: nobody was to be told.
    """
    found = [study for rows in _unanswered(connection) if (study := _judged(rows, config, now)) is not None]
    return sorted(found, key=lambda study: study.finding_at, reverse=True)


def _unanswered(connection: Connection) -> Iterator[list[RowMapping]]:
    """The live pages of each study that has one which may have failed and is not answered, in the order of steps."""
    # as `answers` of the notifier's policy has it, but for the slack of clocks: arithmetic on times is not portable in
    # SQL, and a review within the slack settles the page as soon as the notifier sees it
    same_series = reviews.c.series_instance_uid == pages.c.series_instance_uid
    of_page = and_(reviews.c.revision >= pages.c.revision, reviews.c.occurred_at >= pages.c.finding_at)
    made_at = func.coalesce(pages.c.made_at, pages.c.finding_at)
    answered = exists().where(
        reviews.c.study_instance_uid == pages.c.study_instance_uid,
        or_(and_(same_series, of_page), and_(~same_series, reviews.c.occurred_at >= made_at)),
    )
    studies = select(pages.c.study_instance_uid).where(
        pages.c.mode == "live", pages.c.state.in_(("due", "sent", "exhausted", "failed")), ~answered
    )
    statement = (
        select(pages)
        .where(pages.c.mode == "live", pages.c.study_instance_uid.in_(studies))
        .order_by(pages.c.study_instance_uid, pages.c.step)
    )
    rows = connection.execute(statement).mappings().all()
    for _, of_study in groupby(rows, key=lambda row: row["study_instance_uid"]):
        yield list(of_study)


def _judged(rows: list[RowMapping], config: NotifierConfig, now: datetime) -> Undelivered | None:
    """The study of these pages when its paging has failed or stands still, else None."""
    states = {row["state"] for row in rows}
    waiting = [row for row in rows if row["state"] in ("due", "sent")]
    late = [row for row in waiting if _next_at(row, config) < now - OVERDUE]
    settled = bool(states & {"acknowledged", "withdrawn"})
    ended = bool(states & {"exhausted", "failed"})
    if settled or (waiting and not late) or not (waiting or ended):
        return None
    last = rows[-1]
    return Undelivered(
        study_instance_uid=last["study_instance_uid"],
        series_instance_uid=last["series_instance_uid"],
        revision=last["revision"],
        finding_at=last["finding_at"],
        last_at=last["sent_at"] or last["due_at"],
        reached=any(row["sent_at"] for row in rows),
        overdue=bool(late),
        pages=tuple(rows),
    )


def _next_at(row: RowMapping, config: NotifierConfig) -> datetime:
    """When the notifier was to see to a page that is due or sent."""
    if row["state"] == "due":
        due: datetime = row["next_attempt_at"] or row["due_at"]
        return due
    steps = next((policy.steps for policy in config.policies if policy.name == row["policy"]), config.steps)
    sent: datetime = row["sent_at"] or row["due_at"]
    if row["step"] + 1 < len(steps):
        following: datetime = row["finding_at"] + timedelta(minutes=steps[row["step"] + 1].after_minutes)
        return max(following, sent)
    return sent + timedelta(minutes=config.exhausted_after_minutes)


def holding(connection: Connection) -> list[RowMapping]:
    """The rows of `alarms` whose cause lasts, the oldest first, but for studies that a reader has answered since."""
    answered = exists().where(
        alarms.c.kind == "undelivered",
        reviews.c.study_instance_uid == alarms.c.about,
        reviews.c.occurred_at >= alarms.c.raised_at,
    )
    statement = select(alarms).where(alarms.c.cleared_at.is_(None), ~answered).order_by(alarms.c.raised_at)
    return list(connection.execute(statement).mappings())

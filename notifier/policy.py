"""When a page does what: pure functions of a page, the policy in the configuration and the time."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from herald.config import NotifierConfig
from notifier.record import Page, Review

RETRY_FIRST_S = 2.0
RETRY_LONGEST_S = 30.0
CLOCK_SLACK = timedelta(seconds=60)
"""How far a clock is set back before the times in the ledger are no longer believed."""


@dataclass(frozen=True)
class Move:
    """What an open page needs next, and from when."""

    kind: Literal["send", "escalate", "exhaust"]
    at: datetime


def next_move(page: Page, config: NotifierConfig, now: datetime) -> Move | None:
    """The next move of a page; None when its state is final.

    due: send at `due_at`, then at each `next_attempt_at`. sent: escalate when the next step's `after_minutes` since
    the finding are over; on the last step, exhaust `exhausted_after_minutes` after it was sent.
    """
    if page.state == "due":
        if page.next_attempt_at is not None:
            return Move("send", _believed(page.next_attempt_at, timedelta(seconds=2 * RETRY_LONGEST_S), now))
        waiting = config.steps[page.step].after_minutes if page.step < len(config.steps) else 0.0
        return Move("send", _believed(page.due_at, timedelta(minutes=waiting), now))
    if page.state == "sent":
        if (following := following_step(page, config)) is not None:
            wait = timedelta(minutes=config.steps[following].after_minutes)
            return Move("escalate", _believed(page.finding_at + wait, wait, now))
        wait = timedelta(minutes=config.exhausted_after_minutes)
        return Move("exhaust", _believed((page.sent_at or page.due_at) + wait, wait, now))
    return None


def following_step(page: Page, config: NotifierConfig) -> int | None:
    """The step after the page's, None after the last."""
    return page.step + 1 if page.step + 1 < len(config.steps) else None


def _believed(at: datetime, longest: timedelta, now: datetime) -> datetime:
    """A time further ahead than was ever scheduled means that the clock was set back: then act now, not hours late."""
    return now if at > now + longest + CLOCK_SLACK else at


def retry_pause_s(attempt: int) -> float:
    """Pause after the first, second, ... attempt, before jitter."""
    return min(RETRY_FIRST_S * 2.0 ** min(attempt - 1, 16), RETRY_LONGEST_S)


def attempts_allowed(retry_for_s: float) -> int:
    """How many attempts fit into the time that a channel is retried; counted, so that no clock can shorten it."""
    attempts, spent_s = 1, 0.0
    while spent_s < retry_for_s:
        spent_s += retry_pause_s(attempts)
        attempts += 1
    return attempts


def answers(review: Review, page: Page) -> bool:
    """Whether a reader has seen what the page is about.

    A review of the page's series does, unless it is of an earlier revision; a review of another series of the study
    does only after the finding: agreeing beforehand that another series is clear must not stop the page.
    """
    same_series = review.series_instance_uid == page.series_instance_uid and review.revision >= page.revision
    return same_series or review.occurred_at >= page.finding_at


def newer(series_instance_uid: str, revision: int, page: Page) -> bool:
    """Whether a result came after the one that the page was made for."""
    return series_instance_uid != page.series_instance_uid or revision > page.revision


def untold(page: Page, live: bool) -> bool:
    """Whether a page ended without reaching anybody, so that a newer finding may use it again."""
    if page.mode == "shadow" and live:
        return True
    return page.sent_at is None and page.state in ("withdrawn", "failed", "exhausted")

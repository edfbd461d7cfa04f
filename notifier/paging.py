"""Paging: a durable state machine over the ledger's `pages`.

    due ──> sent ──> acknowledged           a reader reviewed the study
     │       ├─────> escalated              nobody did: the next step's page is due
     │       └─────> exhausted              nobody did, and there is no further step
     ├─────> withdrawn                      a later revision is negative, and nothing was sent yet
     ├─────> failed                         the channel refused or stayed away: the next step's page is due
     └─────> exhausted                      as failed, and there is no further step: the operator is told

Every change is one transaction. An attempt is marked before it is made, so a crash between sending and marking costs
a second message with the same Message-ID rather than a page that was never sent.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from herald.config import Config
from herald.errors import ChannelRefused, ChannelUnavailable, LedgerError
from herald.events import SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import Ledger
from notifier import policy, record
from notifier.channels import Channel, Message
from notifier.message import PageText, page_text
from notifier.record import Mode, Outcome, Page, Review, State

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"""The paging clock looks up at least this often, so that a suspended host or a changed clock is noticed."""

LEDGER_PAUSE_S = 2.0


@dataclass(frozen=True)
class _Attempt:
    outcome: Outcome
    at: datetime
    duration_s: float
    error: str | None = None


class Paging:
    """Pages for one ledger: event handlers for the bus, and `run` for the paging clock's own thread."""

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        channels: Sequence[Channel],
        now: Callable[[], datetime] = utc_now,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`channels` reach the recipients of `config.notifier.steps`, in the same order."""
        self._ledger = ledger
        self._config = config
        self._policy = config.notifier
        self._channels = channels
        self._now = now
        self._jitter = jitter
        self._lock = threading.Lock()  # around transactions, never around sending
        self._settling = threading.Lock()  # around looking for an unrecorded attempt and recording it
        self._sending: set[str] = set()
        self._unrecorded: dict[str, tuple[Page, _Attempt]] = {}  # made while the ledger was away
        self._wake = threading.Event()

    # --- events ------------------------------------------------------------------------------------------------------

    def on_triaged(self, event: SeriesTriaged) -> None:
        """Page on a positive result, at once; withdraw what a negative later revision supersedes."""
        if event.disposition == "positive":
            due = self._open(event)
        else:
            due = []
            if event.disposition == "negative":
                self._withdraw(event)
        for page_id in due:
            self._send(page_id)
        self._wake.set()

    def on_reviewed(self, event: SeriesReviewed) -> None:
        """Acknowledge the study's open pages, whatever the reader's verdict."""
        review = Review(event.series_instance_uid, event.revision, event.reader, event.occurred_at)
        with self._lock, self._ledger.begin() as connection:
            for page in record.pages_of_study(connection, event.study_instance_uid):
                if page.state in ("due", "sent", "exhausted") and policy.answers(review, page):
                    _acknowledge(connection, page, review)
        self._wake.set()

    def _open(self, event: SeriesTriaged) -> list[str]:
        """Make the study's first page unless there is one; the ids of pages that wait to be sent."""
        text = page_text(event, self._config)
        now = self._now()
        live = self._policy.mode == "live"
        with self._lock, self._ledger.begin() as connection:
            known = record.pages_of_study(connection, event.study_instance_uid)
            fresh = all(
                policy.untold(page, live) and policy.newer(event.series_instance_uid, event.revision, page)
                for page in known
            )
            if not fresh:
                self._note_covered(connection, event, known[0], now)
                return [page.page_id for page in known if page.state == "due"]
            record.drop_pages(connection, event.study_instance_uid)
            finding_at = min(event.occurred_at, now)  # another host's clock may be ahead
            page = self._first_page(event, text, finding_at)
            record.save_page(connection, page)
        log.info("study %s is to be paged to %s (%s)", page.study_instance_uid, page.recipient, page.mode)
        return [page.page_id]

    def _first_page(self, event: SeriesTriaged, text: PageText, finding_at: datetime) -> Page:
        steps = self._policy.steps
        return Page(
            page_id=record.page_id(event.study_instance_uid, 0),
            study_instance_uid=event.study_instance_uid,
            series_instance_uid=event.series_instance_uid,
            revision=event.revision,
            step=0,
            state="due",
            mode=self._policy.mode,
            channel=steps[0].channel if steps else "none",
            recipient=self._channels[0].recipient[:256] if steps else "",
            subject=text.subject,
            body=text.body,
            finding_at=finding_at,
            due_at=finding_at + timedelta(minutes=steps[0].after_minutes if steps else 0.0),
        )

    def _note_covered(self, connection: Connection, event: SeriesTriaged, page: Page, now: datetime) -> None:
        if not policy.newer(event.series_instance_uid, event.revision, page):
            return
        record.note_delivery(
            connection,
            at=now,
            series_instance_uid=event.series_instance_uid,
            revision=event.revision,
            page=page.page_id,
            channel=page.channel,
            recipient=page.recipient,
            outcome="covered",
            error=f"the study has its page already, for series {page.series_instance_uid} revision {page.revision}",
        )

    def _withdraw(self, event: SeriesTriaged) -> None:
        with self._lock, self._ledger.begin() as connection:
            study = record.pages_of_study(connection, event.study_instance_uid)
            if record.covered_series(connection, study) - {event.series_instance_uid}:
                return  # another series of the study is positive, and these pages stand for it too
            for page in study:
                superseded = page.series_instance_uid == event.series_instance_uid and page.revision < event.revision
                if superseded and page.state == "due" and page.page_id not in self._sending:
                    _to(connection, page, "withdrawn", f"revision {event.revision} of the series is negative")

    # --- sending -----------------------------------------------------------------------------------------------------

    def _send(self, page_id: str) -> None:
        """Attempt a page that is due, and at once the next step's when this one's channel has failed for good."""
        following: str | None = page_id
        while following is not None:
            page = self._claim(following)
            if page is None:
                return
            try:
                self._unrecorded[page.page_id] = page, self._attempt(page)
            finally:
                self._sending.discard(page.page_id)
                self._wake.set()
            following = self._settle(page.page_id)

    def _settle(self, page_id: str) -> str | None:
        """Record the attempt of a page; until the ledger has taken it, the page is not attempted again."""
        with self._settling:
            made = self._unrecorded.get(page_id)
            if made is None:  # the other thread was faster
                return None
            following = self._record(*made)
            del self._unrecorded[page_id]
            return following

    def _claim(self, page_id: str) -> Page | None:
        """Mark the attempt in the ledger; None when there is nothing to send now."""
        with self._lock:
            if page_id in self._sending or page_id in self._unrecorded:
                return None
            now = self._now()
            with self._ledger.begin() as connection:
                page = record.load_page(connection, page_id)
                move = None if page is None else policy.next_move(page, self._policy, now)
                if page is None or move is None or move.kind != "send" or move.at > now:
                    return None
                if _answered(connection, page):
                    return None
                attempts = page.attempts + 1
                pause_s = policy.retry_pause_s(attempts) * self._jitter(0.8, 1.2)
                page = replace(page, attempts=attempts, next_attempt_at=now + timedelta(seconds=pause_s))
                record.save_page(connection, page)
            self._sending.add(page_id)
            return page

    def _attempt(self, page: Page) -> _Attempt:
        if self._mode(page) == "shadow":
            return _Attempt("shadow", self._now(), 0.0)
        started = time.perf_counter()
        outcome: Outcome = "sent"
        reason: str | None = None
        try:
            if page.step >= len(self._channels):
                raise ChannelRefused(f"the policy has no step {page.step + 1} any more; see [[notifier.steps]]")
            self._channels[page.step].send(Message(page.page_id, page.subject, page.body))
        except ChannelRefused as error:
            outcome, reason = "refused", str(error)
        except ChannelUnavailable as error:
            outcome, reason = "unavailable", str(error)
        except Exception as error:  # a broken channel must not take paging down: it is retried, then passed over
            log.exception("the channel %s to %s broke", page.channel, page.recipient)
            outcome, reason = "unavailable", f"the channel broke: {type(error).__name__}: {error}"
        return _Attempt(outcome, self._now(), time.perf_counter() - started, reason)

    def _record(self, page: Page, attempt: _Attempt) -> str | None:
        """Write what an attempt came to; the next step's page when that is due now."""
        with self._lock, self._ledger.begin() as connection:
            record.note_delivery(
                connection,
                at=attempt.at,
                series_instance_uid=page.series_instance_uid,
                revision=page.revision,
                page=page.page_id,
                channel=page.channel,
                recipient=page.recipient,
                outcome=attempt.outcome,
                error=attempt.error,
                duration_s=attempt.duration_s,
            )
            current = record.load_page(connection, page.page_id) or page
            if attempt.outcome in ("sent", "shadow"):
                # a reader may have acknowledged meanwhile: that stays
                state: State = "sent" if current.state == "due" else current.state
                told = replace(current, state=state, mode=self._mode(page), sent_at=attempt.at, error=None)
                record.save_page(connection, told)
                log.info("study %s: %s to %s", page.study_instance_uid, attempt.outcome, page.recipient)
                return None
            if current.state != "due":
                return None
            spent = page.attempts >= policy.attempts_allowed(self._policy.retry_for_s)
            if attempt.outcome == "refused" or spent:
                return self._step_on(connection, current, "failed", attempt.error or "")
            record.save_page(connection, replace(current, error=attempt.error))
            log.warning("study %s: page to %s waits: %s", page.study_instance_uid, page.recipient, attempt.error)
            return None

    def _step_on(self, connection: Connection, page: Page, state: State, reason: str) -> str | None:
        """Leave a page for the next step's, whose id is returned, or for the operator when there is none."""
        study = page.study_instance_uid
        following = policy.following_step(page, self._policy)
        if following is None:
            _to(connection, page, "exhausted", reason)
            level = logging.ERROR if page.mode == "live" else logging.INFO
            log.log(
                level,
                "paging of study %s (series %s) is exhausted: %s; nobody has answered: call the radiologist, and "
                "check the channels in [notifier]",
                study,
                page.series_instance_uid,
                reason,
            )
            return None
        _to(connection, page, state, reason)
        step = self._policy.steps[following]
        next_page = replace(
            page,
            page_id=record.page_id(study, following),
            step=following,
            state="due",
            mode=self._mode(page),
            channel=step.channel,
            recipient=self._channels[following].recipient[:256],
            due_at=self._now(),
            sent_at=None,
            attempts=0,
            next_attempt_at=None,
            error=None,
        )
        record.save_page(connection, next_page)
        log.warning("study %s: %s at step %d (%s); next is %s", study, state, page.step, reason, next_page.recipient)
        return next_page.page_id

    def _mode(self, page: Page) -> Mode:
        """Live only if the node is live now and was when the page was made."""
        return "live" if page.mode == "live" and self._policy.mode == "live" else "shadow"

    # --- the paging clock --------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Send, retry, escalate and exhaust pages when their time comes, until `stop` is set and `wake` called."""
        outage = False
        while not stop.is_set():
            self._wake.clear()
            try:
                soonest = self.tick()
                wait_s = LONGEST_WAIT_S
                if soonest is not None:
                    wait_s = min(max((soonest - self._now()).total_seconds(), 0.01), LONGEST_WAIT_S)
                if outage:
                    log.info("the ledger answers again; paging goes on")
                outage = False
            except LedgerError as error:
                if not outage:
                    log.error("paging waits for the ledger: %s", error)
                outage, wait_s = True, LEDGER_PAUSE_S
            self._wake.wait(wait_s)

    def wake(self) -> None:
        """Have the paging clock look at once."""
        self._wake.set()

    def tick(self) -> datetime | None:
        """Make every move whose time has come; returns when the next one is due."""
        for page_id in tuple(self._unrecorded):
            if following := self._settle(page_id):
                self._send(following)
        for page, move in self._moves():
            if move.at > self._now():
                continue
            if move.kind == "send":
                self._send(page.page_id)
            else:
                self._give_up_waiting(page.page_id)
        return min((move.at for _, move in self._moves()), default=None)

    def _moves(self) -> list[tuple[Page, policy.Move]]:
        with self._ledger.read() as connection:
            found = record.open_pages(connection)
        now = self._now()
        moves = ((page, policy.next_move(page, self._policy, now)) for page in found)
        return [(page, move) for page, move in moves if move is not None and page.page_id not in self._sending]

    def _give_up_waiting(self, page_id: str) -> None:
        """Nobody answered in time: on to the next step, or exhausted."""
        with self._lock, self._ledger.begin() as connection:
            page = record.load_page(connection, page_id)
            move = None if page is None else policy.next_move(page, self._policy, self._now())
            if page is None or move is None or move.kind == "send" or move.at > self._now():
                return
            if _answered(connection, page):
                return
            following = self._step_on(connection, page, "escalated", "nobody has acknowledged in time")
        if following is not None:
            self._send(following)


def _to(connection: Connection, page: Page, state: State, reason: str) -> None:
    record.save_page(connection, replace(page, state=state, error=reason, next_attempt_at=None))


def _acknowledge(connection: Connection, page: Page, review: Review) -> None:
    acknowledged = replace(
        page,
        state="acknowledged",
        acknowledged_at=review.occurred_at,
        acknowledged_by=review.reader,
        next_attempt_at=None,
    )
    record.save_page(connection, acknowledged)
    log.info("study %s: step %d acknowledged by %s", page.study_instance_uid, page.step, review.reader)


def _answered(connection: Connection, page: Page) -> bool:
    """Whether a review is in the ledger already: its event may come after the page's."""
    review = record.first_review(connection, page)
    if review is not None:
        _acknowledge(connection, page, review)
    return review is not None

"""Paging: a durable state machine over the ledger's `pages`.

    due ──> sent ──> acknowledged           a reader reviewed the study
     │       ├─────> escalated              nobody did: the next step's page is due
     │       └─────> exhausted              nobody did, and there is no further step: the operators are told
     ├─────> withdrawn                      a later revision is negative, and no page of the study was sent yet
     ├─────> failed                         the channel refused or stayed away: the next step's page is due
     └─────> exhausted                      as failed, and there is no further step: the operators are told

Every change is one transaction. An attempt is marked before it is made, so a crash between sending and marking costs
a second message with the same Message-ID rather than a page that was never sent. Handlers and the clock only write and
hand over: sending is done by other threads, so that a channel that hangs holds up neither of them.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import msgspec
from sqlalchemy import Connection

from herald.config import Config, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError, LedgerError
from herald.events import SeriesReviewed, SeriesTriaged, utc_now
from herald.ledger import Ledger
from herald.metrics import NOTIFIER_FINDING_SECONDS, NOTIFIER_PAGES
from herald.sites import Mode, mode_of, site_of
from notifier import policy, record
from notifier.channels import Channel, Message
from notifier.message import PageText, page_text, short_text
from notifier.record import Outcome, Page, Review, State

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 60.0
"""The paging clock looks up at least this often, so that a suspended host or a changed clock is noticed."""

LEDGER_PAUSE_S = 2.0
TELL_AGAIN = timedelta(seconds=30)
"""How long after operators could not be told they are told again."""

Reach = Callable[[PagingStep], Channel]
"""The channel to a step's recipient; raises ConfigError for a bad address."""

Submit = Callable[[str, Callable[[], None]], object]
"""Has work for a channel, named by its kind, done soon."""


def at_once(channel: str, work: Callable[[], None]) -> None:
    """Do the work here and now, in the thread of who asks."""
    work()


def tell_nobody(page: Page, reason: str) -> None:
    """What a node without operators does."""


def no_pictures(event: SeriesTriaged) -> bytes | None:
    """No key slice."""
    return None


def nobody_on_call(role: str, at: datetime) -> str:
    """What a node without a roster answers."""
    raise ChannelRefused(f"nobody is on call for {role}: there is no roster; set notifier.roster")


@dataclass(frozen=True)
class _Attempt:
    outcome: Outcome
    at: datetime
    duration_s: float
    channel: str
    recipient: str
    error: str | None = None


class Paging:
    """Pages for one ledger: event handlers for the bus, and `run` for the paging clock's own thread."""

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        reach: Reach,
        *,
        on_call: Callable[[str, datetime], str] = nobody_on_call,
        submit: Submit = at_once,
        on_undelivered: Callable[[Page, str], None] = tell_nobody,
        picture: Callable[[SeriesTriaged], bytes | None] = no_pictures,
        now: Callable[[], datetime] = utc_now,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`reach` opens channels, `on_call` looks a role up in the roster, `submit` has pages sent.

        `on_undelivered` is called by the clock, within no lock and no transaction, for the last page of a live study
        that reached nobody or that nobody acknowledged, with the reason: at least once, again if it raised, and again
        after a crash. `picture` makes the key slice of an event.
        """
        self._ledger = ledger
        self._config = config
        self._reach = reach
        self._on_call = on_call
        self._submit_work = submit
        self._on_undelivered = on_undelivered
        self._picture = picture
        self._now = now
        self._jitter = jitter
        self._lock = threading.Lock()  # around transactions, never around sending
        self._settling = threading.Lock()  # around looking for an unrecorded attempt and recording it
        self._waiting: set[str] = set()  # pages handed over that no sender has taken up
        self._sending: set[str] = set()
        self._unrecorded: dict[str, tuple[Page, _Attempt]] = {}  # made while the ledger was away
        self._wake = threading.Event()
        self._looks_at: datetime | None = None  # when the clock looks next; None while it looks
        self._refused = False  # whether a sender found the ledger away
        self._broken: Exception | None = None  # a bug that a sender met

    # --- events ------------------------------------------------------------------------------------------------------

    def on_triaged(self, event: SeriesTriaged) -> None:
        """Page on a positive result, at once; withdraw what a negative later revision supersedes.

        The page is durable on return, and sent by another thread.
        """
        if event.disposition == "positive":
            for page in self._open(event):
                self._see_to(page)
        elif event.disposition == "negative":
            self._withdraw(event)

    def on_reviewed(self, event: SeriesReviewed) -> None:
        """Acknowledge the study's open pages, whatever the reader's verdict."""
        review = Review(event.series_instance_uid, event.revision, event.reader, event.occurred_at)
        with self._lock, self._ledger.begin() as connection:
            for page in record.pages_of_study(connection, event.study_instance_uid):
                if page.state in ("due", "sent", "exhausted") and policy.answers(review, page):
                    _acknowledge(connection, page, review)

    def _open(self, event: SeriesTriaged) -> list[Page]:
        """Make the study's first page unless there is one; the pages that wait to be sent."""
        text = page_text(event, self._config)
        now = self._now()
        live = mode_of(site_of(event, self._config), self._config) == "live"
        with self._lock, self._ledger.begin() as connection:
            known = record.pages_of_study(connection, event.study_instance_uid)
            fresh = all(
                policy.untold(page, live) and policy.newer(event.series_instance_uid, event.revision, page)
                for page in known
            )
            if not fresh:
                self._note_covered(connection, event, known[0], now)
                return [page for page in known if page.state == "due"]
            if known:
                record.drop_pages(connection, event.study_instance_uid)
            page = self._first_page(event, text, now)
            record.add_page(connection, page)
        log.info(
            "study %s is to be paged to %s (%s, %s)",
            page.study_instance_uid,
            page.recipient,
            page.mode,
            f"policy {page.policy}" if page.policy else "notifier.steps",
        )
        return [page]

    def _first_page(self, event: SeriesTriaged, text: PageText, now: datetime) -> Page:
        chosen = policy.choose(event, self._config, now)
        site = site_of(event, self._config)
        first = chosen.steps[0] if chosen.steps else None
        finding_at = min(event.occurred_at, now)  # another host's clock may be ahead
        return Page(
            page_id=record.page_id(event.study_instance_uid, 0),
            study_instance_uid=event.study_instance_uid,
            series_instance_uid=event.series_instance_uid,
            revision=event.revision,
            step=0,
            state="due",
            mode=mode_of(site, self._config),
            channel=first.channel if first else "none",
            recipient=self._planned(first) if first else "",
            subject=text.subject,
            body=text.body,
            finding_at=finding_at,
            due_at=finding_at + timedelta(minutes=first.after_minutes if first else 0.0),
            policy=chosen.name,
            site=site,
            event=msgspec.json.decode(event.to_json()),
            made_at=now,
        )

    def _planned(self, step: PagingStep) -> str:
        """The recipient for the ledger before there is an attempt: who is on call is looked up when it is made."""
        if step.to.startswith(policy.ON_CALL):
            return step.to[:256]
        return self._channel(step.channel, step.to).recipient[:256]

    def _channel(self, kind: str, to: str) -> Channel:
        # without the rest of the step, so that one channel serves every step to this recipient
        return self._reach(PagingStep(to=to, channel=kind))  # type: ignore[arg-type]

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
            if any(page.sent_at for page in study):
                return  # somebody was told: without an answer the next in line is, too
            if record.covered_series(connection, study) - {event.series_instance_uid}:
                return  # another series of the study is positive, and these pages stand for it too
            for page in study:
                superseded = page.series_instance_uid == event.series_instance_uid and page.revision < event.revision
                under_way = page.page_id in self._sending or page.page_id in self._unrecorded
                if superseded and page.state == "due" and not under_way:
                    _end(connection, page, "withdrawn", f"revision {event.revision} of the series is negative")

    # --- sending -----------------------------------------------------------------------------------------------------

    def _see_to(self, page: Page) -> None:
        """Hand a page that is due now to a sender; have the clock look in time for any other move."""
        now = self._now()
        move = policy.next_move(page, self._config, now)
        if move is None:
            return
        if move.kind == "send" and move.at <= now:
            self._submit(page)
        elif self._looks_at is None or move.at < self._looks_at:
            self._wake.set()

    def _submit(self, page: Page) -> None:
        if page.page_id not in self._waiting:
            self._waiting.add(page.page_id)
            self._submit_work(page.channel, partial(self._work, page.page_id))

    def _work(self, page_id: str) -> None:
        """What a sender does: attempt a page and record what came of it."""
        self._waiting.discard(page_id)
        try:
            self._send(page_id)
        except LedgerError as error:
            if not self._refused:
                log.error("a page waits for the ledger: %s", error)
            self._refused = True
            self._wake.set()
        except Exception as error:  # nobody waits for a sender's outcome: the clock ends with it
            self._broken = error
            self._wake.set()

    def _send(self, page_id: str) -> None:
        page = self._claim(page_id)
        if page is None:
            return
        try:
            self._unrecorded[page.page_id] = page, self._attempt(page)
        finally:
            self._sending.discard(page.page_id)
        self._settle(page.page_id)

    def _settle(self, page_id: str) -> None:
        """Record the attempt of a page; until the ledger has taken it, the page is not attempted again."""
        with self._settling:
            made = self._unrecorded.get(page_id)
            if made is None:  # another thread was faster
                return
            changed = self._record(*made)
            del self._unrecorded[page_id]
        _count(*made)
        self._see_to(changed)

    def _claim(self, page_id: str) -> Page | None:
        """Mark the attempt in the ledger; None when there is nothing to send now."""
        with self._lock:
            if page_id in self._sending or page_id in self._unrecorded:
                return None
            now = self._now()
            with self._ledger.begin() as connection:
                page = record.load_page(connection, page_id)
                move = None if page is None else policy.next_move(page, self._config, now)
                if page is None or move is None or move.kind != "send" or move.at > now:
                    return None
                if _answered(connection, page):
                    return None
                attempts = page.attempts + 1
                pause_s = policy.retry_pause_s(attempts) * self._jitter(0.8, 1.2)
                next_attempt_at = now + timedelta(seconds=pause_s)
                page = record.change_page(connection, page, attempts=attempts, next_attempt_at=next_attempt_at)
            self._sending.add(page_id)
            return page

    def _attempt(self, page: Page) -> _Attempt:
        """Send the page, or in shadow mode find out all that sending would need."""
        mode = self._mode(page)
        channel, recipient = page.channel, page.recipient
        outcome: Outcome = "sent" if mode == "live" else "shadow"
        reason: str | None = None
        started = time.perf_counter()
        try:
            step = policy.step_of(page, self._config)
            if step is not None:
                channel, to = step.channel, step.to
                if to.startswith(policy.ON_CALL):
                    recipient = to[:256]
                    to = self._on_call(to.removeprefix(policy.ON_CALL), self._now())
                reached = self._channel(channel, to)
                recipient = reached.recipient[:256]
                if mode == "live":
                    reached.send(self._message(page))
            elif mode == "live":
                steps = f"policy {page.policy}" if page.policy else "notifier.steps"
                raise ChannelRefused(f"{steps} has no step {page.step + 1} any more; see [[notifier.steps]]")
        except (ChannelRefused, ConfigError) as error:
            outcome, reason = "refused", str(error)
        except ChannelUnavailable as error:
            outcome, reason = "unavailable", str(error)
        except Exception as error:  # a broken channel must not take paging down: it is retried, then passed over
            log.exception("the channel %s to %s broke", channel, recipient)
            outcome, reason = "unavailable", f"the channel broke: {type(error).__name__}: {error}"
        return _Attempt(outcome, self._now(), time.perf_counter() - started, channel, recipient, reason)

    def _message(self, page: Page) -> Message:
        """What the page says; subject and body are those of the row, whatever has become of the configuration."""
        event = page.triaged
        if event is None:  # a page of an earlier version
            return Message(page.page_id, page.subject, page.body, short=short_text(page.subject))
        text = page_text(event, self._config)
        picture = partial(self._picture, event)
        return Message(page.page_id, page.subject, page.body, text.short, text.link, event, picture)

    def _record(self, page: Page, attempt: _Attempt) -> Page:
        """Write what an attempt came to: the page that has a move next, this one or the next step's."""
        with self._lock, self._ledger.begin() as connection:
            record.note_delivery(
                connection,
                at=attempt.at,
                series_instance_uid=page.series_instance_uid,
                revision=page.revision,
                page=page.page_id,
                channel=attempt.channel,
                recipient=attempt.recipient,
                outcome=attempt.outcome,
                error=attempt.error,
                duration_s=attempt.duration_s,
            )
            current = record.load_page(connection, page.page_id) or page
            whom = {"channel": attempt.channel, "recipient": attempt.recipient, "error": attempt.error}
            if attempt.outcome in ("sent", "shadow"):
                # a reader may have acknowledged meanwhile: that stays
                state: State = "sent" if current.state == "due" else current.state
                told = record.change_page(
                    connection, current, state=state, mode=self._mode(page), sent_at=attempt.at, **whom
                )
                log.info("study %s: %s to %s", page.study_instance_uid, attempt.outcome, attempt.recipient)
                return told
            if current.state != "due":
                return current
            current = record.change_page(connection, current, **whom)
            spent = page.attempts >= policy.attempts_allowed(self._config.notifier.retry_for_s)
            if attempt.outcome == "refused" or spent:
                return self._step_on(connection, current, "failed", attempt.error or "")
            log.warning("study %s: page to %s waits: %s", page.study_instance_uid, attempt.recipient, attempt.error)
            return current

    def _step_on(self, connection: Connection, page: Page, state: State, reason: str) -> Page:
        """Leave a page for the next step's, which is returned, or for the operators when there is none."""
        study = page.study_instance_uid
        following = policy.following_step(page, self._config)
        if following is None:
            live = self._mode(page) == "live"
            log.log(
                logging.ERROR if live else logging.INFO,
                "paging of study %s (series %s) is exhausted: %s; nobody has answered: call the radiologist, and "
                "check the channels in [notifier]",
                study,
                page.series_instance_uid,
                reason,
            )
            tell_at = self._now() if live else None
            return record.change_page(connection, page, state="exhausted", error=reason, next_attempt_at=tell_at)
        _end(connection, page, state, reason)
        step = policy.steps_of(page, self._config)[following]
        next_page = replace(
            page,
            page_id=record.page_id(study, following),
            step=following,
            state="due",
            mode=self._mode(page),
            channel=step.channel,
            recipient=self._planned(step),
            due_at=self._now(),
            sent_at=None,
            attempts=0,
            next_attempt_at=None,
            error=None,
        )
        record.add_page(connection, next_page)
        log.warning("study %s: %s at step %d (%s); next is %s", study, state, page.step, reason, next_page.recipient)
        return next_page

    def _mode(self, page: Page) -> Mode:
        """Live only if the page's site is live now and was when the page was made."""
        return "live" if page.mode == mode_of(page.site or "", self._config) == "live" else "shadow"

    # --- the paging clock --------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Send, retry, escalate and exhaust pages when their time comes, until `stop` is set and `wake` called.

        Raises what a sender met that was no trouble of a channel or of the ledger.
        """
        outage = False
        while True:
            self._wake.clear()
            self._looks_at = None
            if stop.is_set():
                return
            if self._refused:  # senders found the ledger away, and would at once again
                self._refused = False
                stop.wait(LEDGER_PAUSE_S)
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
            self._looks_at = self._now() + timedelta(seconds=wait_s)
            self._wake.wait(wait_s)

    def wake(self) -> None:
        """Have the paging clock look at once."""
        self._wake.set()

    def tick(self) -> datetime | None:
        """Make every move whose time has come, without waiting for a channel; returns when the next one is due."""
        if self._broken is not None:
            raise self._broken
        for page_id in tuple(self._unrecorded):
            self._settle(page_id)
        moves = self._moves()
        now = self._now()
        due = [(page, move) for page, move in moves if move.at <= now]
        for page, move in due:
            if move.kind == "send":
                self._submit(page)
            elif move.kind == "tell":
                self._tell(page)
            else:
                self._give_up_waiting(page.page_id)
        if due:
            moves = self._moves()
        return min((move.at for _, move in moves), default=None)

    def _moves(self) -> list[tuple[Page, policy.Move]]:
        """What the open pages need next, without those that senders have in hand."""
        in_hand = self._waiting | self._sending
        with self._ledger.read() as connection:
            found = record.open_pages(connection)
        now = self._now()
        moves = ((page, policy.next_move(page, self._config, now)) for page in found)
        return [(page, move) for page, move in moves if move is not None and page.page_id not in in_hand]

    def _give_up_waiting(self, page_id: str) -> None:
        """Nobody answered in time: on to the next step, or exhausted."""
        with self._lock, self._ledger.begin() as connection:
            page = record.load_page(connection, page_id)
            move = None if page is None else policy.next_move(page, self._config, self._now())
            if page is None or move is None or move.kind not in ("escalate", "exhaust") or move.at > self._now():
                return
            if _answered(connection, page):
                return
            changed = self._step_on(connection, page, "escalated", "nobody has acknowledged in time")
        if changed.state == "exhausted" and changed.next_attempt_at is not None:
            self._tell(changed)
        else:
            self._see_to(changed)

    def _tell(self, page: Page) -> None:
        """Tell the operators of a page that reached nobody, and note that they were told only then."""
        again_at: datetime | None = None
        try:
            self._on_undelivered(page, page.error or "")
        except LedgerError:
            raise
        except Exception:  # paging goes on whatever is wrong with the operators' alarm
            log.exception("the operators could not be told that study %s reached nobody", page.study_instance_uid)
            again_at = self._now() + TELL_AGAIN
        with self._lock, self._ledger.begin() as connection:
            current = record.load_page(connection, page.page_id)
            if current is not None and (current.state, current.next_attempt_at) == ("exhausted", page.next_attempt_at):
                record.change_page(connection, current, next_attempt_at=again_at)


def _count(page: Page, attempt: _Attempt) -> None:
    NOTIFIER_PAGES.labels(attempt.channel, attempt.outcome).inc()
    if page.step == 0 and attempt.outcome in ("sent", "shadow"):
        NOTIFIER_FINDING_SECONDS.labels(attempt.outcome).observe((attempt.at - page.finding_at).total_seconds())


def _end(connection: Connection, page: Page, state: State, reason: str) -> None:
    record.change_page(connection, page, state=state, error=reason, next_attempt_at=None)


def _acknowledge(connection: Connection, page: Page, review: Review) -> None:
    record.change_page(
        connection,
        page,
        state="acknowledged",
        acknowledged_at=review.occurred_at,
        acknowledged_by=review.reader,
        next_attempt_at=None,
    )
    log.info("study %s: step %d acknowledged by %s", page.study_instance_uid, page.step, review.reader)


def _answered(connection: Connection, page: Page) -> bool:
    """Whether a review is in the ledger already: its event may come after the page's."""
    given = record.reviews_of_study(connection, page.study_instance_uid)
    review = next((one for one in given if policy.answers(one, page)), None)
    if review is not None:
        _acknowledge(connection, page, review)
    return review is not None

"""Alarms: what the operators are told when paging or triage itself fails; a durable state machine over `alarms`.

    raised ──> sent ──> cleared: a message that it is over
      │         └─────> sent again as a reminder, every hour at most, while it holds
      ├───────> cleared before anybody was told: no message
      └───────> nobody can be reached within `retry_for_s`: tried again an hour after it was raised

The row comes before the message and each attempt is noted before it is made, so a crash costs a second message of the
same id and never a first one. Every step of `notifier.operators` is told at once; their `after_minutes` mean nothing
here. In shadow mode rows are written and nobody is told.
"""

import logging
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid5

from sqlalchemy import Connection, RowMapping, func, insert, select, update

from herald.config import Config, PagingStep
from herald.errors import ChannelRefused, ChannelUnavailable, ConfigError, LedgerError
from herald.events import utc_now
from herald.ledger import Ledger, alarms
from herald.metrics import NOTIFIER_ALARMS
from notifier import policy
from notifier.channels import Message
from notifier.paging import Reach, nobody_on_call

log = logging.getLogger(__name__)

Kind = Literal["silence", "models", "undelivered", "heartbeat", "ledger"]

TITLES: dict[str, str] = {
    "silence": "no series is triaged",
    "models": "triage stands still",
    "undelivered": "a page reached nobody",
    "heartbeat": "paging works",
    "ledger": "the ledger is away, nothing is paged",
}

REMINDER = timedelta(hours=1)
LOOK_S = 1.0
"""How soon a stop is noticed."""
LEDGER_PAUSE_S = 2.0
SHORT_LENGTH = 160

_NAMESPACE = UUID("5e4f6f0e-21b5-4b6f-8a65-0d8a1b0f7a52")


@dataclass(frozen=True)
class _Round:
    """One message about an alarm: the first one, an hourly reminder or the last, that it is over."""

    number: int
    """0 is the first, then the hour of the reminder."""
    over: bool

    def message_id(self, alarm_id: str) -> str:
        return alarm_id if not self.number and not self.over else _identity(f"{alarm_id}/{self.number}/{self.over}")


class Alarms:
    """The alarms of one ledger: `raise_alarm` and `clear` from any thread, `run` in a thread of its own."""

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        reach: Reach,
        *,
        on_call: Callable[[str, datetime], str] = nobody_on_call,
        now: Callable[[], datetime] = utc_now,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """Touches neither ledger nor network; `reach` opens channels and `on_call` looks a role up, as in `Paging`."""
        self._ledger = ledger
        self._config = config
        self._operators = config.notifier.operators
        self._live = policy.any_live(config)
        self._reach = reach
        self._on_call = on_call
        self._now = now
        self._jitter = jitter
        self._lock = threading.Lock()  # around transactions, never around sending
        self._wake = threading.Event()
        self._reached: dict[str, set[int]] = {}  # message id -> operators who have it
        if not self._operators:
            log.warning(
                "nobody is told when paging or triage fails: add [[notifier.operators]]; `herald check` and the web UI "
                "show it all the same"
            )

    # --- raising and clearing ----------------------------------------------------------------------------------------

    def raise_alarm(self, kind: Kind, about: str, detail: str) -> None:
        """Have the operators told, unless they have been of the same kind and `about`; `detail` may change meanwhile.

        Raises LedgerError. `detail` says what is wrong and what to do, without identity: it leaves the house.
        """
        now = self._now()
        with self._lock, self._ledger.begin() as connection:
            held = _held(connection, kind, about)
            if held is None:
                self._insert(connection, _identity(f"{kind}/{about}/{now.isoformat()}"), kind, about, detail, now)
                log.error("ALARM, %s: %s", TITLES[kind], detail)
            else:
                change: dict[str, Any] = {"detail": detail}
                if held["next_attempt_at"] is None and self._sends:  # raised in shadow mode, or without operators
                    change |= {"mode": "live", "next_attempt_at": now, "attempts": 0}
                if any(held[name] != value for name, value in change.items()):
                    _change(connection, held["alarm_id"], **change)
        if held is None:
            NOTIFIER_ALARMS.labels(kind).inc()
        self._wake.set()

    def clear(self, kind: Kind, about: str = "") -> None:
        """The cause is gone: whoever was told is told that too. Nothing happens unless it holds; raises LedgerError."""
        now = self._now()
        with self._lock, self._ledger.begin() as connection:
            held = _held(connection, kind, about)
            if held is None:
                return
            tell = held["sent_at"] is not None and self._live
            _change(
                connection,
                held["alarm_id"],
                cleared_at=now,
                next_attempt_at=now if tell else None,
                attempts=0,
                error=None,
            )
        log.warning("alarm over, %s%s", TITLES[kind], f" ({about})" if about else "")
        self._wake.set()

    def holding(self) -> set[tuple[str, str]]:
        """Kind and `about` of every alarm that holds; raises LedgerError."""
        statement = select(alarms.c.kind, alarms.c.about).where(alarms.c.cleared_at.is_(None))
        with self._ledger.read() as connection:
            return {(row.kind, row.about) for row in connection.execute(statement)}

    def heartbeat(self, day: str, detail: Callable[[Connection], str]) -> bool:
        """Tell the operators that paging works, once per `day`; False when they have been. Raises LedgerError."""
        identity = _identity(f"heartbeat/{day}")
        with self._lock, self._ledger.begin() as connection:
            known = select(func.count()).select_from(alarms).where(alarms.c.alarm_id == identity)
            if connection.scalar(known):
                return False
            now = self._now()
            self._insert(connection, identity, "heartbeat", day, detail(connection), now, cleared_at=now)
        self._wake.set()
        return True

    def tell(self, kind: Kind, detail: str) -> None:
        """Tell the operators at once and without a row, for when the ledger itself is what is missing."""
        NOTIFIER_ALARMS.labels(kind).inc()
        log.error("ALARM, %s: %s", TITLES[kind], detail)
        now = self._now()
        if self._sends:
            message = self._message(_identity(f"{kind}/{now.isoformat()}"), kind, detail, now, None, _Round(0, False))
            for outcome in self._send(message, range(len(self._operators))).values():
                if outcome is not None:
                    log.error("an operator was not reached: %s", outcome)

    @property
    def _sends(self) -> bool:
        return self._live and bool(self._operators)

    def _insert(
        self,
        connection: Connection,
        identity: str,
        kind: Kind,
        about: str,
        detail: str,
        now: datetime,
        cleared_at: datetime | None = None,
    ) -> None:
        connection.execute(
            insert(alarms).values(
                alarm_id=identity,
                kind=kind,
                about=about,
                detail=detail,
                mode="live" if self._live else "shadow",
                raised_at=now,
                cleared_at=cleared_at,
                next_attempt_at=now if self._sends else None,
                error="nobody is to be told: add [[notifier.operators]]" if self._live and not self._sends else None,
            )
        )

    # --- sending -----------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Send, retry and remind until `stop` is set; one line in the log per outage of the ledger."""
        outage = False
        look_at = self._now()
        while not stop.is_set():
            if self._wake.is_set() or self._now() >= look_at or look_at > self._now() + REMINDER:
                self._wake.clear()
                try:
                    look_at = self.tick() or self._now() + REMINDER
                    if outage:
                        log.info("the ledger answers again; alarms go on")
                    outage = False
                except LedgerError as error:
                    if not outage:
                        log.error("alarms wait for the ledger: %s", error)
                    outage, look_at = True, self._now() + timedelta(seconds=LEDGER_PAUSE_S)
            self._wake.wait(min(max((look_at - self._now()).total_seconds(), 0.0), LOOK_S))

    def tick(self) -> datetime | None:
        """Send whatever is due; when there will be more to send, None when never. Raises LedgerError."""
        for alarm_id in self._due():
            self._attend(alarm_id)
        with self._ledger.read() as connection:
            soonest: datetime | None = connection.scalar(select(func.min(alarms.c.next_attempt_at)))
        return soonest

    def _due(self) -> list[str]:
        now = self._now()
        with self._ledger.read() as connection:
            waiting = connection.execute(
                select(alarms.c.alarm_id, alarms.c.next_attempt_at)
                .where(alarms.c.next_attempt_at.is_not(None))
                .order_by(alarms.c.next_attempt_at)
            ).all()
        # a time further ahead than was ever scheduled means that the clock was set back
        return [identity for identity, at in waiting if at <= now or at > now + REMINDER + policy.CLOCK_SLACK]

    def _attend(self, alarm_id: str) -> None:
        """Make one attempt to tell everybody who has not been told, and note what it came to."""
        now = self._now()
        with self._lock, self._ledger.begin() as connection:
            alarm = _load(connection, alarm_id)
            if not self._sends or alarm["mode"] != "live":  # the node has gone to shadow mode since
                _change(connection, alarm_id, next_attempt_at=None)
                return
            attempts = alarm["attempts"] + 1
            pause_s = policy.retry_pause_s(attempts) * self._jitter(0.8, 1.2)
            _change(connection, alarm_id, attempts=attempts, next_attempt_at=now + timedelta(seconds=pause_s))
        over = alarm["cleared_at"] is not None and alarm["kind"] != "heartbeat"
        hours = 0 if over or alarm["kind"] == "heartbeat" else max(0, (now - alarm["raised_at"]) // REMINDER)
        this = _Round(hours, over)
        message_id = this.message_id(alarm_id)
        has_it = self._reached.setdefault(message_id, set())
        message = self._message(
            message_id, alarm["kind"], alarm["detail"], alarm["raised_at"], alarm["cleared_at"], this
        )
        outcomes = self._send(message, [i for i in range(len(self._operators)) if i not in has_it])
        has_it |= {i for i, failed in outcomes.items() if failed is None}
        errors = [failed for failed in outcomes.values() if failed is not None]
        retriable = any(isinstance(error, ChannelUnavailable) for error in errors)
        done = not retriable or attempts >= policy.attempts_allowed(self._config.notifier.retry_for_s)
        for error in errors:
            log.log(logging.ERROR if done else logging.WARNING, "an operator was not reached: %s", error)
        self._note(alarm, this, bool(has_it), "; ".join(map(str, errors)) or None, done)
        if done:
            self._reached.pop(message_id, None)

    def _note(self, alarm: RowMapping, this: _Round, told: bool, error: str | None, done: bool) -> None:
        now = self._now()
        with self._lock, self._ledger.begin() as connection:
            current = _load(connection, alarm["alarm_id"])
            change: dict[str, Any] = {"error": error, "sent_at": current["sent_at"] or (now if told else None)}
            if current["cleared_at"] != alarm["cleared_at"]:  # cleared while this was sent
                change |= {"attempts": 0, "error": None, "next_attempt_at": now if change["sent_at"] else None}
            elif done and alarm["cleared_at"] is None:
                change |= {"attempts": 0, "next_attempt_at": alarm["raised_at"] + (this.number + 1) * REMINDER}
            elif done:
                change |= {"next_attempt_at": None}
            _change(connection, alarm["alarm_id"], **change)

    def _send(self, message: Message, operators: Any) -> dict[int, ChannelRefused | ChannelUnavailable | None]:
        """Tell these operators side by side, so that one slow channel holds up no other; None where it was taken."""
        chosen = list(operators)
        if not chosen:
            return {}
        with ThreadPoolExecutor(len(chosen), thread_name_prefix="operator") as threads:
            return dict(zip(chosen, threads.map(lambda i: self._tell_one(i, message), chosen), strict=True))

    def _tell_one(self, operator: int, message: Message) -> ChannelRefused | ChannelUnavailable | None:
        step = self._operators[operator]
        where, to = step.to if step.to.startswith(policy.ON_CALL) else f"operator {operator + 1}", step.to
        try:
            if to.startswith(policy.ON_CALL):
                to = self._on_call(to.removeprefix(policy.ON_CALL), self._now())
            channel = self._reach(PagingStep(to=to, channel=step.channel))
            where = channel.recipient
            channel.send(message)
        except ChannelRefused as error:
            return ChannelRefused(f"{where}: {error}")
        except (ChannelUnavailable, ConfigError) as error:  # a roster may name an address that is none, and be mended
            return ChannelUnavailable(f"{where}: {error}")
        except Exception as error:  # a broken channel must not take the others down
            log.exception("the channel of %s broke", where)
            return ChannelUnavailable(f"{where}: the channel broke: {type(error).__name__}: {error}")
        log.info("operator %s was told", where)
        return None

    def _message(
        self, identity: str, kind: str, detail: str, raised_at: datetime, cleared_at: datetime | None, this: _Round
    ) -> Message:
        title = TITLES[kind]
        if kind == "heartbeat":
            subject, times = f"Herald: {title}", [f"Made {_time(raised_at)}."]
        elif this.over:
            assert cleared_at is not None
            subject, times = f"Herald: over: {title}", [f"From {_time(raised_at)} to {_time(cleared_at)}."]
        else:
            again = f", since {this.number} h" if this.number else ""
            subject, times = f"Herald ALARM: {title}{again}", [f"Since {_time(raised_at)}."]
        link = f"{(self._config.webui.public_url or self._config.notifier.webui_url).rstrip('/')}/operations"
        # what to do would mislead once it is over
        was = f"It was: {detail.partition('. ')[0].rstrip('.')}." if this.over else detail
        body = "\n".join([subject, "", was, *times, "", "Operations page:", link, ""])
        short = f"{subject}. {was}"
        if len(short) > SHORT_LENGTH:
            short = f"{short[: SHORT_LENGTH - 1].rstrip()}…"
        return Message(identity, subject, body, short, link)


def _identity(name: str) -> str:
    return str(uuid5(_NAMESPACE, name))


def _held(connection: Connection, kind: str, about: str) -> RowMapping | None:
    """The alarm of this kind and about this that holds."""
    statement = select(alarms).where(alarms.c.kind == kind, alarms.c.about == about, alarms.c.cleared_at.is_(None))
    return connection.execute(statement).mappings().first()


def _load(connection: Connection, alarm_id: str) -> RowMapping:
    return connection.execute(select(alarms).where(alarms.c.alarm_id == alarm_id)).mappings().one()


def _change(connection: Connection, alarm_id: str, **values: Any) -> None:
    connection.execute(update(alarms).where(alarms.c.alarm_id == alarm_id).values(values))


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"

"""The dead-man's watch: raises an alarm when what ought to happen does not, and says daily that paging works.

Silence is measured by this process's own monotonic clock, from its start or the last sign that it saw itself: neither
another host's clock, nor a clock that is set, nor a restart can make a silence or hide one. A sign is a change: of the
newest result, or of a router's row in `vitals`; an alarm is over at the next sign and not for want of evidence.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as time_of_day

from sqlalchemy import Connection, exists, func, select

from herald.config import Config
from herald.errors import ConfigError, LedgerError
from herald.events import SeriesTriaged, utc_now
from herald.ledger import Ledger, pages, results, vitals, watches
from herald.undelivered import OVERDUE, Undelivered, undelivered
from herald.vital import SignOfLife
from notifier.alarms import Alarms, Kind
from notifier.message import accession_suffix
from notifier.policy import zone_of

log = logging.getLogger(__name__)

LOOK_S = 5.0
STOP_S = 0.5
"""How soon a stop is noticed."""
LIVE_S = 60.0
"""A router whose row has changed within so many seconds is alive; it writes every 15 s."""
TELL_AGAIN_S = 3600.0
SIGN_S = 15.0


@dataclass(frozen=True)
class _Moment:
    """The same instant on both clocks: seconds for what has passed since, UTC for words."""

    at_s: float
    time: datetime


@dataclass
class _Router:
    """What this process has seen of a router's row itself; None until it changes."""

    seen_at: datetime
    models_answered_at: datetime | None
    error: str | None
    seen: _Moment | None = None
    answered: _Moment | None = None


class Watch:
    """Looks at results, routers and pages of one ledger; `seen` from the consumer of results, `run` in a thread."""

    def __init__(
        self,
        ledger: Ledger,
        config: Config,
        alarms: Alarms,
        now: Callable[[], datetime] = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConfigError for a `notifier.heartbeat_at` that is no time of day."""
        self._ledger = ledger
        self._config = config
        self._alarms = alarms
        self._now = now
        self._monotonic = monotonic
        self._heartbeat_at = _time_of_day(config.notifier.heartbeat_at)
        self._zone = zone_of(config)
        self._blind_until = self._moment()  # nothing was seen before: our start, or the end of an outage of the ledger
        self._triaged: _Moment | None = None
        self._newest: datetime | None = None
        self._first = True
        self._routers: dict[str, _Router] = {}
        self._heartbeat_day: str | None = None
        self._held: set[tuple[str, str]] = set()
        self._ledger_seen = self._blind_until
        self._outage = False
        self._told_at_s: float | None = None
        self._wake = threading.Event()
        self._sign = SignOfLife(ledger, watches)
        self._signed_at_s: float | None = None

    def seen(self, event: SeriesTriaged) -> None:
        """A result has come; one that failed is no sign of triage. Waits for nothing and never raises."""
        if event.disposition != "failed":
            self._triaged = self._moment()

    def wake(self) -> None:
        """Look at once: a page has come to nothing."""
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Look every few seconds until `stop` is set."""
        look_at_s = 0.0
        while not stop.is_set():
            if self._wake.wait(STOP_S) or self._monotonic() >= look_at_s:
                self._wake.clear()
                self.look()
                look_at_s = self._monotonic() + LOOK_S

    def look(self) -> None:
        """Raise and clear what is to be raised and cleared now; a ledger that is away is told without it."""
        try:
            with self._ledger.read() as connection:
                if self._passed_s(self._ledger_seen) > LIVE_S:  # routers could not write either
                    self._blind_until = self._moment()
                self._read(connection)
                found = undelivered(connection, self._config.notifier, self._now())
            self._held = self._alarms.holding()
            self._watch_results()
            self._watch_routers()
            self._watch_pages(found)
            self._beat()
            self._show_life()
        except LedgerError as error:
            self._ledger_away(error)
            return
        self._first = False
        self._ledger_seen = self._moment()
        if self._outage:
            log.warning("the ledger answers again; the watch goes on")
        self._outage, self._told_at_s = False, None

    def _show_life(self) -> None:
        """Leave this notifier's own sign of life, which the web UI and `herald check` look for."""
        if self._signed_at_s is None or self._monotonic() - self._signed_at_s >= SIGN_S:
            self._sign.write(self._now())
            self._signed_at_s = self._monotonic()

    def _moment(self) -> _Moment:
        return _Moment(self._monotonic(), self._now())

    def _passed_s(self, since: _Moment) -> float:
        return self._monotonic() - since.at_s

    def _silent_for(self, sign: _Moment | None, minutes: float) -> bool:
        """Whether nothing has come since the sign for so long, as far as we could have seen it."""
        since = max((sign or self._blind_until), self._blind_until, key=_at_s)
        return self._passed_s(since) > minutes * 60.0

    def _clear(self, kind: Kind, about: str = "") -> None:
        if (kind, about) in self._held:
            self._alarms.clear(kind, about)

    # --- signs -------------------------------------------------------------------------------------------------------

    def _read(self, connection: Connection) -> None:
        """Take note of what has changed since the last look."""
        moment = self._moment()
        statement = select(func.max(results.c.triaged_at)).where(results.c.disposition != "failed")
        newest: datetime | None = connection.scalar(statement)
        if newest != self._newest and not self._first:
            self._triaged = moment
        self._newest = newest
        known = self._routers
        self._routers = {}
        for row in connection.execute(select(vitals)).mappings():
            router = known.get(row["router"])
            if router is None:
                router = _Router(row["seen_at"], row["models_answered_at"], row["error"])
                if not self._first:  # a router that has just come; at our own start it may be long gone
                    router.seen = moment
                    router.answered = moment if row["models_answered_at"] else None
            elif row["seen_at"] != router.seen_at:
                router.seen = moment
                if row["models_answered_at"] != router.models_answered_at:
                    router.answered = moment
                router.seen_at, router.models_answered_at = row["seen_at"], row["models_answered_at"]
                router.error = row["error"]
            self._routers[row["router"]] = router

    # --- results -----------------------------------------------------------------------------------------------------

    def _watch_results(self) -> None:
        minutes = self._config.notifier.silence_minutes
        if minutes and self._silent_for(self._triaged, minutes):
            self._alarms.raise_alarm(
                "silence",
                "",
                f"{self._since(self._triaged, 'no series has been triaged')}; {minutes:g} min are allowed "
                "(notifier.silence_minutes). Check that the scanners send, and that receiver and router run: "
                "`herald check`.",
            )
        elif not minutes or self._triaged:
            self._clear("silence")

    # --- routers and the model server --------------------------------------------------------------------------------

    def _watch_routers(self) -> None:
        minutes = self._config.notifier.models_silent_minutes
        if not minutes:
            self._clear("models")
            return
        wrong = self._wrong_routers(minutes)
        if wrong:
            self._alarms.raise_alarm("models", "", wrong)
        elif self._routers_well():
            self._clear("models")

    def _live(self) -> dict[str, _Router]:
        return {name: r for name, r in self._routers.items() if r.seen and self._passed_s(r.seen) <= LIVE_S}

    def _wrong_routers(self, minutes: float) -> str:
        """What is wrong for longer than is allowed, in words; empty while nothing is."""
        seen = max((r.seen for r in self._routers.values() if r.seen), key=_at_s, default=None)
        if self._silent_for(seen, minutes):
            return (
                f"{self._since(seen, 'no router has been alive')}: series wait and no bleed is found. "
                "Start it with `herald run router`, and look into its log."
            )
        answered = max((r.answered for r in self._routers.values() if r.answered), key=_at_s, default=None)
        for name, router in sorted(self._live().items()):
            since = router.answered or answered  # a router that has only come takes over the others' evidence
            if self._silent_for(since, minutes):
                return (
                    f"{self._since(since, f'the model server has not answered router {name}')}: series wait and no "
                    f"bleed is found. {router.error or 'Start it with `herald run serving`, and look into its log.'}"
                )
        return ""

    def _routers_well(self) -> bool:
        """Whether there is a live router, and each live one has had an answer lately."""
        live = self._live().values()
        return bool(live) and all(r.answered and self._passed_s(r.answered) <= LIVE_S for r in live)

    # --- pages -------------------------------------------------------------------------------------------------------

    def _watch_pages(self, found: list[Undelivered]) -> None:
        """Tell of every study whose paging came to nothing; late pages count once there was time to send them."""
        in_time = self._passed_s(self._blind_until) <= OVERDUE.total_seconds()
        failed = {study.study_instance_uid: study for study in found if not (study.overdue and in_time)}
        for study_instance_uid, study in failed.items():
            self._alarms.raise_alarm("undelivered", study_instance_uid, undelivered_detail(study))
        for kind, about in self._held:
            if kind == "undelivered" and about not in failed and self._known(about):
                self._clear("undelivered", about)

    def _known(self, study_instance_uid: str) -> bool:
        """Whether the study has pages, so that their being well means something."""
        with self._ledger.read() as connection:
            statement = select(exists().where(pages.c.study_instance_uid == study_instance_uid))
            return bool(connection.scalar(statement))

    # --- heartbeat ---------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Once a local day, at `heartbeat_at` or as soon after it as this process runs."""
        if self._heartbeat_at is None:
            return
        now = self._now()
        today = now.astimezone(self._zone).date()
        # a time that daylight saving skips comes an hour later, one that it repeats counts the first time
        due = datetime.combine(today, self._heartbeat_at)
        due = due.replace(tzinfo=self._zone) if self._zone else due.astimezone()
        if now < due.astimezone(UTC) or self._heartbeat_day == today.isoformat():
            return
        if self._alarms.heartbeat(today.isoformat(), self._heartbeat_detail):
            log.info("the daily message to the operators is made")
        self._heartbeat_day = today.isoformat()

    def _heartbeat_detail(self, connection: Connection) -> str:
        day_ago = self._now() - timedelta(days=1)
        statement = (
            select(results.c.disposition, func.count().label("number"))
            .where(results.c.triaged_at >= day_ago)
            .group_by(results.c.disposition)
        )
        counts = {row.disposition: row.number for row in connection.execute(statement)}
        words = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in sorted(counts))
        return f"The daily sign of life. Series triaged in the last 24 h: {sum(counts.values())}" + (
            f" ({words})." if words else "."
        )

    # --- ledger ------------------------------------------------------------------------------------------------------

    def _ledger_away(self, error: LedgerError) -> None:
        """Without the ledger no page is claimed, so this is told from memory: once, then hourly."""
        if not self._outage:
            log.error("the watch waits for the ledger: %s", error)
        self._outage = True
        minutes, now_s = self._config.notifier.models_silent_minutes, self._monotonic()
        if not minutes or self._passed_s(self._ledger_seen) <= minutes * 60.0:
            return
        if self._told_at_s is None or now_s - self._told_at_s > TELL_AGAIN_S:
            self._told_at_s = now_s
            self._alarms.tell(
                "ledger", f"since {_utc(self._ledger_seen.time)}, and no page is sent until it is back: {error}."
            )

    def _since(self, sign: _Moment | None, what: str) -> str:
        """`what` with the time since when; without any sign, since we could have seen one."""
        return f"{what} since {_utc((sign or self._blind_until).time)}"


def undelivered_detail(study: Undelivered) -> str:
    """What the operators read about a study whose paging came to nothing: no UID and no identity."""
    event = next((row["event"] for row in reversed(study.pages) if row["event"]), None) or {}
    scanner = event.get("scanner") or event.get("calling_ae_title") or "unknown"
    what = "nobody has answered the page of" if study.reached else "no page could be sent of"
    if study.overdue:
        what = "the notifier is late with the page of"
    last = next((row["error"] for row in reversed(study.pages) if row["error"] and not row["sent_at"]), None)
    return (
        f"{what} a suspected haemorrhage found at {_utc(study.finding_at)} (scanner {scanner}, accession "
        f"{accession_suffix(event.get('accession_number') or '')}). Call the radiologist now, then acknowledge the "
        f"study on the web page.{f' Last error: {last}' if last else ''}"
    )


def _time_of_day(text: str) -> time_of_day | None:
    if not text:
        return None
    try:
        return datetime.strptime(text, "%H:%M").time()
    except ValueError as error:
        raise ConfigError(f"notifier.heartbeat_at {text!r} is no time of day; write it as 08:00") from error


def _at_s(moment: _Moment) -> float:
    return moment.at_s


def _utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"

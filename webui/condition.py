"""The condition of the node, as an administrator sees it: the bus, the store, the figures, and where instances are."""

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from herald.bus import GROUPS, DeadLetter, Queue, open_bus
from herald.config import Config
from herald.errors import EventDecodeError, HeraldError, StoreError
from herald.events import EVENT_TYPES, Event, event_from_json, utc_now
from herald.ledger import Ledger
from herald.reconcile import Reconciliation, reconcile
from herald.store import StudyStore
from webui import figures
from webui.parts import Part, Parts

log = logging.getLogger(__name__)

WITHIN_S = 2.5
"""How long the page waits for a part."""
MOST_LETTERS = 50
"""So many dead letters are shown, the newest; `herald dead-letters` lists all."""
LATE = timedelta(minutes=2)
"""An event that waits for longer is nothing that a busy hour explains."""

TOPICS = tuple(event_type.topic for event_type in EVENT_TYPES.values())


@dataclass(frozen=True)
class Letter:
    """A dead letter, and the event in it if it is one."""

    letter: DeadLetter
    event: Event | None


@dataclass(frozen=True)
class Letters:
    """The newest dead letters, and how many there are."""

    newest: tuple[Letter, ...]
    total: int


@dataclass(frozen=True)
class Disk:
    """The disk of the store, in bytes, with the watermarks of the configuration."""

    total: int
    free: int
    refuses_below: int
    removes_below: int


@dataclass(frozen=True)
class Account:
    """The latest reconciliation: under way since `since`, or done `at` with its outcome or why there is none."""

    since: datetime | None = None
    at: datetime | None = None
    outcome: Reconciliation | None = None
    problem: str = ""


class Condition:
    """Reads the parts of the page, and reconciles in the background, for one application."""

    def __init__(self, config: Config, ledger: Ledger, store: StudyStore) -> None:
        self._config, self._ledger, self._store = config, ledger, store
        self._parts = Parts()
        self._lock = threading.Lock()
        self._account = Account()

    def read(self) -> dict[str, Part]:
        """Every part within seconds, whatever is down."""
        return self._parts.read(
            {
                "queues": self._queues,
                "letters": self._letters,
                "traffic": self._of_ledger(figures.traffic, utc_now()),
                "waterfall": self._of_ledger(figures.waterfall, utc_now()),
                "models": self._of_ledger(figures.models),
                "disk": self._disk,
            },
            WITHIN_S,
        )

    def _of_ledger(self, ask: Callable[..., Any], *about: object) -> Callable[[], Any]:
        def read() -> Any:
            with self._ledger.read() as connection:
                return ask(connection, *about)

        return read

    def _queues(self) -> list[Queue]:
        with closing(open_bus(self._config.bus)) as bus:
            return bus.queues(GROUPS)

    def _disk(self) -> Disk:
        store = self._config.store
        try:
            total = shutil.disk_usage(self._store.root).total
        except OSError as error:
            raise StoreError(
                f"the disk of store.root cannot be asked: {error.strerror}; check that it is there"
            ) from error
        return Disk(
            total=total,
            free=self._store.free_bytes(),
            refuses_below=int(store.min_free_gb * 1e9),
            removes_below=int(store.remove_below_gb * 1e9),
        )

    # --- dead letters ------------------------------------------------------------------------------------------------

    def _letters(self) -> Letters:
        with closing(open_bus(self._config.bus)) as bus:
            found = [letter for topic in TOPICS for letter in bus.dead_letters(topic)]
        found.sort(key=lambda letter: letter.died_at, reverse=True)
        return Letters(tuple(map(_opened, found[:MOST_LETTERS])), len(found))

    def find_letter(self, topic: str, letter_id: str) -> Letter | None:
        """A dead letter that still waits; raises BusError."""
        with closing(open_bus(self._config.bus)) as bus:
            found = (letter for letter in bus.dead_letters(topic) if letter.letter_id == letter_id)
            return next(map(_opened, found), None)

    def replay(self, letter: DeadLetter) -> None:
        """Hand a dead letter to its group again, one at a time: a second click finds it gone; raises BusError."""
        with self._lock, closing(open_bus(self._config.bus)) as bus:
            bus.replay(letter)

    # --- reconciliation ----------------------------------------------------------------------------------------------

    @property
    def account(self) -> Account:
        """The latest reconciliation, of this process."""
        return self._account

    def reconcile(self) -> bool:
        """Begin to reconcile, in the background; False when that is under way already."""
        with self._lock:
            if self._account.since is not None:
                return False
            self._account = replace(self._account, since=utc_now())
        threading.Thread(target=self._reconcile, name="reconcile", daemon=True).start()
        return True

    def _reconcile(self) -> None:
        try:
            account = Account(outcome=reconcile(self._config), at=utc_now())
        except HeraldError as error:
            account = Account(problem=str(error), at=utc_now())
        except Exception as error:  # or the page would say for ever that it is under way
            log.exception("reconciling broke; please report it")
            account = Account(problem=f"{type(error).__name__}; see the log of the web UI", at=utc_now())
        self._account = account


def _opened(letter: DeadLetter) -> Letter:
    try:
        return Letter(letter, event_from_json(letter.message))
    except EventDecodeError:
        return Letter(letter, None)

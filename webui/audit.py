"""Who saw which study, in the audit table: every view of a page, and pictures that are asked for without one."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from flask import current_app
from flask_login import current_user  # type: ignore[import-untyped]

from webui import record
from webui.context import context
from webui.session import address

EXTENSION = "herald.audit"
REMEMBERED_S = 3600.0
"""Pictures asked for within so long belong to the view that was noted."""
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True)
class Seen:
    """Views that were noted lately, in memory; safe to use from several threads."""

    _noted: OrderedDict[tuple[str, str, str], float] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def remember(self, user: str, at: str, series_instance_uid: str) -> None:
        """A view was noted now."""
        key = (user, at, series_instance_uid)
        with self._lock:
            self._noted[key] = time.monotonic()
            self._noted.move_to_end(key)
            while len(self._noted) > _MOST_REMEMBERED:
                self._noted.popitem(last=False)

    def lately(self, user: str, at: str, series_instance_uid: str) -> bool:
        """Whether a view was noted within `REMEMBERED_S`."""
        with self._lock:
            noted = self._noted.get((user, at, series_instance_uid))
        return noted is not None and time.monotonic() - noted < REMEMBERED_S


def add_view(
    study_instance_uid: str, series_instance_uid: str | None, action: str = "view-series", who: str = ""
) -> None:
    """Note that a page about a study was opened, by who is logged in unless `who` says another name."""
    name = who or current_user.name
    record.add_audit(context().ledger, name, address(), action, study_instance_uid, series_instance_uid)
    if series_instance_uid:
        _seen().remember(name, address(), series_instance_uid)


def add_picture_view(study_instance_uid: str, series_instance_uid: str) -> None:
    """Note that pictures or a volume of a series were asked for, unless a view of it was noted within the hour."""
    if not _seen().lately(current_user.name, address(), series_instance_uid):
        add_view(study_instance_uid, series_instance_uid, "view-pictures")


def _seen() -> Seen:
    seen: Seen = current_app.extensions.setdefault(EXTENSION, Seen())
    return seen

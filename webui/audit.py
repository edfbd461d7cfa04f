"""Who saw which study, in the audit table: every view of a page, and whatever else shows something of a series."""

import threading
import time
from collections import OrderedDict

from flask import Flask, Response, current_app, request
from flask_login import current_user  # type: ignore[import-untyped]

from herald.errors import LedgerError
from webui import record
from webui.context import context
from webui.session import address

EXTENSION = "herald.audit"
REMEMBERED_S = 3600.0
"""What is asked for within so long belongs to the view that was noted."""
_MOST_REMEMBERED = 10_000


class Noted:
    """Views that were noted lately, in memory; safe to use from several threads."""

    def __init__(self) -> None:
        self._at: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._lock = threading.Lock()

    def remember(self, *view: str) -> None:
        """A view was noted now."""
        with self._lock:
            self._at[view] = time.monotonic()
            self._at.move_to_end(view)
            while len(self._at) > _MOST_REMEMBERED:
                self._at.popitem(last=False)

    def lately(self, *view: str) -> bool:
        """Whether a view was noted within `REMEMBERED_S`."""
        with self._lock:
            at = self._at.get(view)
        return at is not None and time.monotonic() - at < REMEMBERED_S


def init_app(app: Flask) -> None:
    """Note every answer about a series or study that its view has not noted itself, so that none can be forgotten."""
    app.extensions[EXTENSION] = Noted()
    app.after_request(_note_rest)


def add_view(
    study_instance_uid: str, series_instance_uid: str | None, action: str = "view-series", who: str = ""
) -> None:
    """Note that a page about a study was opened, by who is logged in unless `who` says another name."""
    name = who or current_user.name
    record.add_audit(context().ledger, name, address(), action, study_instance_uid, series_instance_uid)
    for uid in (study_instance_uid, series_instance_uid):
        if uid:
            _noted().remember(name, address(), uid)


def _note_rest(response: Response) -> Response:
    """Pictures, volumes and facts belong to the view of their page within the hour; without one they are a view."""
    asked = request.view_args or {}
    uid = asked.get("series_instance_uid") or asked.get("study_instance_uid")
    shown = response.status_code in (200, 206, 304) and request.method in ("GET", "HEAD")
    if not (uid and shown and current_user.is_authenticated) or _noted().lately(current_user.name, address(), uid):
        return response
    try:
        series = asked.get("series_instance_uid")
        study = asked.get("study_instance_uid") or record.study_of(context().ledger, uid)
        add_view(study, series, "view-part")
    except LedgerError as error:  # nothing is shown that cannot be noted
        return current_app.make_response(current_app.handle_user_exception(error))
    return response


def _noted() -> Noted:
    noted: Noted = current_app.extensions[EXTENSION]
    return noted

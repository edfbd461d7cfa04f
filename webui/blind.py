"""Blind reading: of which series a reader judges before the prediction is shown, and to whom it has been shown.

In shadow mode that is every analysed series. In live mode it is `webui.blind_fraction` of them, drawn by a keyed hash
of the SeriesInstanceUID, so that nobody can choose or foresee it and every revision is drawn alike. It is decided once,
when the result is posted, and stays in `results.blind`.

A finding never waits for it. In live mode a positive that nobody has acknowledged is shown to everybody, drawn or not,
whether its page was sent or failed; once somebody has acknowledged it, it is hidden again from those who have not seen
it. Otherwise a hidden row of the worklist would mean that Herald found nothing.
"""

import hmac

from herald.config import Config, required_secret
from herald.events import SeriesTriaged
from herald.ledger import Ledger
from herald.sites import mode_of, site_of
from herald.superseded import ANALYSED
from webui import record
from webui.context import context
from webui.record import CHOSEN, OPEN, SHADOW, Blind
from webui.session import address, user

_SALT = b"herald.blind"


def drawn(config: Config, event: SeriesTriaged) -> Blind:
    """Why a reader of this series must judge before the prediction is shown, or OPEN."""
    if event.disposition not in ANALYSED:
        return OPEN
    if mode_of(site_of(event, config), config) == "shadow":
        return SHADOW
    return CHOSEN if _share(config, event.series_instance_uid) < config.webui.blind_fraction else OPEN


def draw_missing(config: Config, ledger: Ledger) -> int:
    """Decide about results that an earlier version posted; gives their number."""
    undecided = record.find_undecided(ledger)
    for event in undecided:
        record.set_blind(ledger, event, drawn(config, event))
    return len(undecided)


def reader() -> str:
    """Who is logged in, where predictions may be hidden from them: researchers and administrators see all."""
    return user().name if user().role == "reader" else ""


def is_hidden(event: SeriesTriaged) -> bool:
    """Whether who is logged in must judge before the prediction is shown."""
    return record.is_hidden(context().ledger, event, reader())


def is_unseen(event: SeriesTriaged) -> bool:
    """Whether who is logged in has not been shown the prediction of a blind series: judged, it is shown by the page."""
    return record.is_unseen(context().ledger, event, reader())


def note_shown(*events: SeriesTriaged) -> None:
    """Note that who is logged in sees these predictions: once for each series, which is the first time."""
    analysed = [event for event in events if event.disposition in ANALYSED]
    record.note_shown(context().ledger, user().name, address(), analysed)


def _share(config: Config, series_instance_uid: str) -> float:
    """A number from 0 to 1 for a series, even over all series; raises ConfigError without `webui.secret_key`."""
    key = required_secret(config.webui.secret_key, "webui.secret_key").encode()
    digest = hmac.digest(hmac.digest(key, _SALT, "sha256"), series_instance_uid.encode(), "sha256")
    return int.from_bytes(digest[:8]) / 2**64

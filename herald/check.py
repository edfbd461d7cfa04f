"""`herald check`: does every part of the node answer?"""

import smtplib
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import requests
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from sqlalchemy import Connection

from herald.bus import GROUPS, open_bus
from herald.calling import CallingEntity
from herald.config import Config
from herald.errors import BusError, ChannelUnavailable, HeraldError, NotificationError, StoreFullError
from herald.events import utc_now
from herald.ledger import open_ledger
from herald.store import StudyStore
from herald.undelivered import Undelivered, holding, notifier_seen, undelivered

TIMEOUT_S = 3.0

CALIBRATED_POINT = 0.5
"""Exported haemorrhage models put their operating point there."""


@dataclass(frozen=True)
class Outcome:
    """One thing that was checked: what, whether it is well, and what was seen or what to do."""

    what: str
    ok: bool
    detail: str


def check(config: Config, quick: bool = False) -> list[Outcome]:
    """Ask every part; `quick` leaves out what matters to an operator only, such as the pager and dead letters."""
    parts: dict[str, Callable[[Config], str]] = {
        "ledger": _ledger,
        "bus": _bus,
        "models": _models,
        "web UI": _webui,
        "receiver": _receiver,
    }
    if not quick:
        parts |= {
            "disk": _disk,
            "pager": _pager,
            "notifier": _notifier,
            "pages": _pages,
            "alarms": _alarms,
            "dead letters": _dead_letters,
        }
    return [_outcome(what, ask, config) for what, ask in parts.items()]


def _outcome(what: str, ask: Callable[[Config], str], config: Config) -> Outcome:
    try:
        return Outcome(what, True, ask(config))
    except HeraldError as error:
        return Outcome(what, False, str(error))


def _receiver(config: Config) -> str:
    host = "127.0.0.1" if config.receiver.host == "0.0.0.0" else config.receiver.host
    where = f"{config.receiver.ae_title}@{host}:{config.receiver.port}"
    try:
        socket.create_connection((host, config.receiver.port), TIMEOUT_S).close()
    except OSError as error:
        raise ChannelUnavailable(f"{where} does not listen ({error}); start it with `herald run receiver`") from error
    ae = CallingEntity(ae_title="HERALD-CHECK")
    ae.add_requested_context(Verification)
    ae.connection_timeout = ae.acse_timeout = ae.dimse_timeout = TIMEOUT_S
    assoc = ae.associate(host, config.receiver.port, ae_title=config.receiver.ae_title)
    if not assoc.is_established:
        raise ChannelUnavailable(
            f"{where} does not accept an association; if receiver.allowed_senders is set, add HERALD-CHECK"
        )
    status = assoc.send_c_echo()
    assoc.release()
    if getattr(status, "Status", None) != 0:
        raise ChannelUnavailable(f"{where} did not answer C-ECHO; look into the receiver's log")
    return f"{where} answers C-ECHO"


def _bus(config: Config) -> str:
    bus = open_bus(config.bus)
    try:
        bus.check()
        waiting = {f"{group}/{topic}": bus.backlog(group, topic) for group, topic in GROUPS}
    finally:
        bus.close()
    return f"{config.bus.url.partition('://')[0]}; waiting: " + ", ".join(f"{k} {n}" for k, n in waiting.items())


@contextmanager
def _reading(config: Config) -> Iterator[Connection]:
    """The ledger, open for the block."""
    with closing(open_ledger(config.ledger)) as ledger, ledger.read() as connection:
        yield connection


def _notifier(config: Config) -> str:
    """Whether one is alive: what it has not taken from the bus is neither paged nor on the worklist."""
    with _reading(config) as connection:
        seen_at, alive = notifier_seen(connection, utc_now())
    if seen_at is None:
        raise NotificationError("none has ever been alive; start it with `herald run notifier`")
    seen = f"last seen {seen_at:%Y-%m-%d %H:%M:%S} UTC"
    if not alive:
        raise NotificationError(f"{seen}; nobody is paged: start it with `herald run notifier`, and look into its log")
    return seen


def _pages(config: Config) -> str:
    """Live pages that reached nobody in the last day, or that the notifier is late with."""
    now = utc_now()
    with _reading(config) as connection:
        found = [
            study
            for study in undelivered(connection, config.notifier, now)
            if study.overdue or study.last_at > now - timedelta(days=1)
        ]
    if not found:
        return "none of the last 24 h is unanswered, none is late"
    told = [f"{study.study_instance_uid} ({_page_fault(study, now)})" for study in found]
    advice = f"call the radiologist, then acknowledge them on the web page; see {_operations(config)}"
    if any(study.overdue for study in found):
        advice += "; the notifier is late: look into its log, start it with `herald run notifier`"
    raise NotificationError(f"{len(found)} {'study' if len(found) == 1 else 'studies'}: {', '.join(told)}; {advice}")


def _page_fault(study: Undelivered, now: datetime) -> str:
    if study.overdue:
        return f"late, found {(now - study.finding_at).total_seconds() / 60:.0f} min ago"
    return "paged, nobody has answered" if study.reached else "could not be paged"


def _alarms(config: Config) -> str:
    with _reading(config) as connection:
        held = holding(connection)
    if not held:
        return "none holds"
    told = [
        f"{alarm['kind']} since {alarm['raised_at']:%Y-%m-%d %H:%M} UTC"
        f"{' of study ' + alarm['about'] if alarm['about'] else ''}: {alarm['detail']}"
        f"{'' if alarm['sent_at'] or alarm['mode'] == 'shadow' else ' No operator was reached.'}"
        for alarm in held
    ]
    raise NotificationError(f"{' | '.join(told)} See {_operations(config)}")


def _operations(config: Config) -> str:
    return f"{(config.webui.public_url or config.notifier.webui_url).rstrip('/')}/operations"


def _dead_letters(config: Config) -> str:
    bus = open_bus(config.bus)
    try:
        letters = [letter for topic in ("series", "results", "reviews") for letter in bus.dead_letters(topic)]
    finally:
        bus.close()
    if letters:
        raise BusError(f"{len(letters)} dead letters; see `herald dead-letters`, mend the cause, then add --replay")
    return "none"


def _ledger(config: Config) -> str:
    ledger = open_ledger(config.ledger)
    try:
        ledger.check()
    finally:
        ledger.close()
    return ledger.url


def _models(config: Config) -> str:
    from router.inference import InferenceClient

    client = InferenceClient(config.router.serving_address, TIMEOUT_S)
    try:
        served = client.check()
    finally:
        client.close()
    told = [
        f"{name} {model.version}: {describe_model(model.card, config.router.operating_point)}"
        for name, model in served.items()
    ]
    return f"{config.router.serving_address} serves the expected signatures; {'; '.join(told)}"


def describe_model(card: Mapping[str, Any], operating_point: float) -> str:
    """Operating point and calibration of a served model in words, from its card; what it does not say is not there."""
    if not card:
        return "says nothing of its calibration; export it again"
    calibration = card.get("calibration") or {}
    if "heads" in card:
        return f"tells {', '.join(card['heads'])}; {_temperatures(calibration)}"
    words = [f"operating point {operating_point:.2f}"]
    if operating_point != CALIBRATED_POINT:
        words.append(f"(router.operating_point; the model is calibrated for {CALIBRATED_POINT:.2f})")
    if target := card.get("target_sensitivity"):
        words.append(f"chosen for sensitivity {target:.2f}")
    words[-1] += ";"
    if not {"scale", "threshold"} <= calibration.keys():
        return " ".join([*words, "not calibrated"])
    words.append(f"calibrated on {card.get('obtained') or 'data that the model does not name'}")
    measured = card.get("measured") or {}
    sets = [f"{of_set['patients']} of {name}" for name, of_set in measured.items() if " " not in name]
    if sets:
        words.append(f"({', '.join(sets)})")
    return " ".join(words)


def _temperatures(calibration: Mapping[str, Any]) -> str:
    """How the softmaxes of a protocol model are calibrated, and what error that leaves where it was measured."""
    by_head = ", ".join(f"{head} {value:.2f}" for head, value in (calibration.get("temperature") or {}).items())
    measured = calibration.get("measured") or {}
    if not by_head and not measured:
        return "not calibrated"
    words = f"temperatures {by_head}, others 1" if by_head else "temperatures 1, as no other is better"
    found = {
        head: of_head.get("after" if of_head.get("kept") else "before") or {} for head, of_head in measured.items()
    }
    errors = [f"{head} {e['calibration_error']:.3f}" for head, e in found.items() if "calibration_error" in e]
    left = f", calibration error {', '.join(errors)}" if errors else ""
    return f"{words}{left}, on {calibration.get('obtained') or 'series that the model does not name'}"


def _webui(config: Config) -> str:
    url = f"{config.notifier.webui_url}/health"
    try:
        answer = requests.get(url, timeout=TIMEOUT_S)
    except requests.RequestException as error:
        raise ChannelUnavailable(f"{url} does not answer ({type(error).__name__}); start `herald run webui`") from error
    if answer.status_code != 200:
        raise ChannelUnavailable(f"{url} answers {answer.status_code}; look into the web UI's log")
    return config.notifier.webui_url


def _disk(config: Config) -> str:
    free_gb, refuse_gb, remove_gb = _free_gb(config), config.store.min_free_gb, config.store.remove_below_gb
    free = f"{free_gb:.1f} GB free at {config.store.root}"
    if free_gb >= max(refuse_gb, remove_gb):
        removes = f"removes studies below {remove_gb:g}" if remove_gb else "is off"
        return f"{free}; retention {removes}, the receiver refuses images below {refuse_gb:g}"
    removable = _removable(config) if free_gb < remove_gb else 0
    if removable:
        advice = f"retention may remove {removable} finished studies"
    elif remove_gb:
        advice = "retention cannot free any: no study in the store is finished; see `herald reconcile`"
    else:
        advice = "retention is off: free some, or set store.remove_below_gb"
    if free_gb < refuse_gb:
        raise StoreFullError(f"{free}, below store.min_free_gb: the receiver answers `out of resources`; {advice}")
    if not removable:
        raise StoreFullError(f"{free}, below store.remove_below_gb; {advice}")
    return f"{free}, below store.remove_below_gb; {advice}"


def _free_gb(config: Config) -> float:
    return StudyStore(config.store).free_bytes() / 1e9


def _removable(config: Config) -> int:
    from receiver.retention import finished_studies

    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            return len(finished_studies(connection))
    finally:
        ledger.close()


def _pager(config: Config) -> str:
    if config.notifier.mode == "shadow":
        return "shadow mode: pages are recorded, none is sent"
    if any(step.channel == "smtp" for step in config.notifier.steps):
        where = f"{config.notifier.smtp_host}:{config.notifier.smtp_port}"
        try:
            with smtplib.SMTP(config.notifier.smtp_host, config.notifier.smtp_port, timeout=TIMEOUT_S) as smtp:
                smtp.noop()
        except (OSError, smtplib.SMTPException) as error:
            raise ChannelUnavailable(
                f"SMTP server {where} does not answer: {error}; check notifier.smtp_host"
            ) from error
        return f"live mode; SMTP server {where} answers"
    return f"live mode; {len(config.notifier.steps)} steps"

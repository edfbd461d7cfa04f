"""Everything that happened to a study, series or instance, step by step, from the ledger and the dead letters."""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, or_, select

from herald.bus import open_bus
from herald.config import Config
from herald.errors import BusError
from herald.events import EVENT_TYPES, event_from_json
from herald.ledger import deliveries, instances, open_ledger, pages, rejections, results, reviews, series

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One thing that happened, when (UTC), and how long after the step before it of the same series."""

    at: datetime
    step: str
    detail: str
    study_instance_uid: str = ""
    series_instance_uid: str = ""
    revision: int | None = None
    after_s: float | None = None


def trace(config: Config, what: str) -> list[Step]:
    """The dated steps of what a Study, Series or SOP Instance UID or an accession number names, series by series.

    Empty when nothing is known; raises LedgerError when the ledger cannot be read. A bus that is down is logged, and
    its dead letters are left out.
    """
    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            uids = _series_of(connection, what)
            steps = [step for uid in uids for step in _steps(connection, uid)]
            steps += _rejected(connection, what, uids)
    finally:
        ledger.close()
    if uids:
        steps += _dead_letters(config, uids)
    return _timed(steps)


def _series_of(connection: Connection, what: str) -> list[str]:
    """SeriesInstanceUIDs, oldest first."""
    found: dict[str, None] = {}
    for table in (series, instances, results):
        columns = [c for c in table.c if c.name in _NAMES]
        query = select(table.c.series_instance_uid).where(or_(*(column == what for column in columns))).distinct()
        found |= dict.fromkeys(connection.execute(query).scalars())
    return list(found)


_NAMES = {"study_instance_uid", "series_instance_uid", "sop_instance_uid", "accession_number"}


def _steps(connection: Connection, uid: str) -> Iterator[Step]:
    study = ""
    for step in (
        *_received(connection, uid),
        *_closed(connection, uid),
        *_triaged(connection, uid),
        *_paged(connection, uid),
        *_reviewed(connection, uid),
    ):
        study = study or step.study_instance_uid
        yield replace(step, study_instance_uid=step.study_instance_uid or study, series_instance_uid=uid)


def _rows(connection: Connection, table: Any, uid: str) -> Any:
    return connection.execute(select(table).where(table.c.series_instance_uid == uid)).mappings().all()


def _received(connection: Connection, uid: str) -> Iterator[Step]:
    rows = sorted(_rows(connection, instances, uid), key=lambda row: row["received_at"])
    if not rows:
        return
    senders = sorted({f"{row['calling_ae_title'] or 'unknown'} ({row['calling_address'] or '?'})" for row in rows})
    size = sum(row["size_bytes"] for row in rows) / 1e6
    repeated = sum(row["copies"] - 1 for row in rows)
    conflicts = sum(row["conflict"] for row in rows)
    detail = f"{len(rows)} instances, {size:.1f} MB from {', '.join(senders)}"
    if repeated:
        detail += f"; {repeated} sent again"
    if conflicts:
        detail += f"; {conflicts} with other bytes under the same UID"
    study = rows[0]["study_instance_uid"]
    yield Step(rows[0]["received_at"], "first image", detail, study)
    yield Step(rows[-1]["received_at"], "last image", f"instance {rows[-1]['sop_instance_uid']}", study)


def _closed(connection: Connection, uid: str) -> Iterator[Step]:
    for row in _rows(connection, series, uid):
        study, revision = row["study_instance_uid"], row["revision"]
        scanner = f"{row['modality'] or 'no modality'} of {row['scanner'] or 'unknown scanner'}"
        if revision > 1:
            yield Step(
                row["first_image_at"], "opened again", f"late images make revision {revision}", study, "", revision
            )
        if row["closed_at"] is None:
            yield Step(row["last_image_at"], "open", f"{scanner}; waiting for more images", study, "", revision)
            continue
        detail = f"revision {revision}: {row['instance_count']} instances, {row['close_reason']}; {scanner}"
        yield Step(row["closed_at"], "closed", detail, study, "", revision)
        if row["published_at"] is not None:
            yield Step(row["published_at"], "published", "SeriesReceived is on the bus", study, "", revision)


def _triaged(connection: Connection, uid: str) -> Iterator[Step]:
    for row in _rows(connection, results, uid):
        study, revision, event = row["study_instance_uid"], row["revision"], row["event"] or {}
        for field, step in (
            ("started_at", "taken up by the router"),
            ("classified_at", "classified"),
            ("detected_at", "detected"),
        ):
            if event.get(field):
                yield Step(datetime.fromisoformat(event[field]), step, "", study, "", revision)
        parts = [str(row["disposition"]), *event.get("reasons", ())]
        if row["probability"] is not None:
            parts.insert(1, f"probability {row['probability']:.2f}")
        if row["uncertain"]:
            parts.append("uncertain")
        yield Step(row["triaged_at"], "disposition", "; ".join(parts), study, "", revision)
        yield Step(row["posted_at"], "on the worklist", "", study, "", revision)


def _paged(connection: Connection, uid: str) -> Iterator[Step]:
    for row in _rows(connection, pages, uid):
        study, revision = row["study_instance_uid"], row["revision"]
        whom = f"step {row['step'] + 1} by {row['channel']} to {row['recipient']}"
        fault = f"; {row['error']}" if row["error"] else ""
        yield Step(row["due_at"], "page due", f"{whom}, {row['mode']}: {row['state']}{fault}", study, "", revision)
        if row["sent_at"] is not None:
            yield Step(row["sent_at"], "page sent", f"{whom}, {row['mode']}", study, "", revision)
        if row["acknowledged_at"] is not None:
            yield Step(row["acknowledged_at"], "page acknowledged", f"by {row['acknowledged_by']}", study, "", revision)
    for row in _rows(connection, deliveries, uid):
        fault = f": {row['error']}" if row["error"] else ""
        detail = f"{row['outcome']} by {row['channel']} to {row['recipient']}{fault}"
        yield Step(row["occurred_at"], "delivery", detail, revision=row["revision"])


def _reviewed(connection: Connection, uid: str) -> Iterator[Step]:
    for row in _rows(connection, reviews, uid):
        kind = f", {row['finding_kind']}" if row["finding_kind"] else ""
        detail = f"{row['action']}{kind} by {row['reader']}"
        yield Step(row["occurred_at"], "review", detail, row["study_instance_uid"], "", row["revision"])
        if row["undone_at"] is not None:
            yield Step(row["undone_at"], "review undone", detail, row["study_instance_uid"], "", row["revision"])


def _rejected(connection: Connection, what: str, uids: list[str]) -> Iterator[Step]:
    """Refusals of the instance that was asked for, or of an instance of these series."""
    of_series = select(instances.c.sop_instance_uid).where(instances.c.series_instance_uid.in_(uids))
    named = or_(rejections.c.sop_instance_uid == what, rejections.c.sop_instance_uid.in_(of_series))
    for row in connection.execute(select(rejections).where(named)).mappings():
        detail = f"instance {row['sop_instance_uid']} with 0x{row['status']:04X}: {row['error']}"
        yield Step(row["occurred_at"], "refused", detail, series_instance_uid=uids[0] if len(uids) == 1 else "")


def _dead_letters(config: Config, uids: list[str]) -> list[Step]:
    steps = []
    try:
        bus = open_bus(config.bus)
        try:
            letters = [letter for event in EVENT_TYPES.values() for letter in bus.dead_letters(event.topic)]
        finally:
            bus.close()
    except BusError as error:
        log.warning("dead letters are left out: %s", error)
        return []
    for letter in letters:
        try:
            event = event_from_json(letter.message)
        except BusError:
            continue  # it names no series
        if event.series_instance_uid in uids:
            detail = f"{type(event).__name__} of {letter.group}: {letter.error}"
            study = event.study_instance_uid
            steps.append(Step(letter.died_at, "dead letter", detail, study, event.series_instance_uid, event.revision))
    return steps


def _timed(steps: Iterable[Step]) -> list[Step]:
    """Series by series in the order of their first step, each step with the time since the one before."""
    by_series: dict[str, list[Step]] = {}
    for step in sorted(steps, key=lambda step: step.at):
        of_series = by_series.setdefault(step.series_instance_uid, [])
        after_s = (step.at - of_series[-1].at).total_seconds() if of_series else None
        of_series.append(replace(step, after_s=after_s))
    return [step for of_series in by_series.values() for step in of_series]

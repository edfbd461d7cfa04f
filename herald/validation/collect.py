"""What is known of each series revision, from the tables of every service: the rows of the validation record.

The text of a reason may come from another library, and name an instance, a path or a value of a header. The record
keeps what Herald says itself: of a failure the class of the error, of images left out their number. The rest is told
by `herald trace` while the ledger keeps it.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import msgspec
from sqlalchemy import Connection, Table, and_, or_, select, union

from herald.config import Config
from herald.events import SeriesTriaged
from herald.ledger import adjudications, labels, pages, results, reviews, series
from herald.sites import mode_of, site_of
from herald.superseded import ANALYSED
from herald.validation.row import GivenLabel, LabelKind, Reading, RowDisposition, ValidationRow

log = logging.getLogger(__name__)

VERDICTS = ("agree", "disagree", "unsure")
OPEN_PAGES = ("due", "sent")

AT_ONCE = 500
"""Series of which the tables are asked at a time: few enough for a statement, enough to ask seldom."""

LONGEST_ROUTE = timedelta(days=1)
"""Longest time from the decision on a series to its result in the ledger that `changed` foresees."""

_UID = re.compile(r"\b\d+(?:\.\d+){4,}\b")
_PATH = re.compile(r"(?<!\w)/[^\s,;:]+")
_ERROR_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*(?=:|$)")


def collect(
    connection: Connection, config: Config, now: datetime, series_instance_uids: Collection[str] | None = None
) -> Iterator[ValidationRow]:
    """Every series revision with a disposition, or only those of some series, in the order of their UIDs.

    A complete series that has no result after `validation.unfinished_minutes` is unfinished; open ones and younger ones
    are left out. Raises what the connection raises.
    """
    uids = iter(_known(connection) if series_instance_uids is None else sorted(set(series_instance_uids)))
    while some := list(islice(uids, AT_ONCE)):
        yield from _Collected(connection, some).rows(config, now)


def changed(connection: Connection, config: Config, since: datetime, now: datetime) -> set[str]:
    """The series of which a row may have changed since a time, as far as a time or an open page tells it.

    What it cannot see, such as a result that took more than a day or another site in the configuration, a full
    `collect` finds.
    """
    unfinished = timedelta(minutes=config.validation.unfinished_minutes)
    of_label = select(labels.c.accession_number).where(
        or_(labels.c.imported_at >= since, labels.c.superseded_at >= since)
    )
    of_study = union(
        select(pages.c.study_instance_uid).where(
            or_(
                pages.c.state.in_(OPEN_PAGES),
                pages.c.due_at >= since,
                pages.c.sent_at >= since,
                pages.c.acknowledged_at >= since,
            )
        ),
        select(adjudications.c.study_instance_uid).where(adjudications.c.occurred_at >= since),
    )
    statement = union(
        select(series.c.series_instance_uid).where(
            series.c.closed_at >= since - unfinished, series.c.closed_at <= now - unfinished
        ),
        select(results.c.series_instance_uid).where(
            results.c.triaged_at >= since - LONGEST_ROUTE,
            or_(results.c.posted_at >= since, results.c.triaged_at >= since, results.c.acknowledged_at >= since),
        ),
        select(reviews.c.series_instance_uid).where(or_(reviews.c.occurred_at >= since, reviews.c.undone_at >= since)),
        *(
            select(table.c.series_instance_uid).where(table.c.study_instance_uid.in_(select(of_study.subquery())))
            for table in (results, series)
        ),
        *(
            select(table.c.series_instance_uid).where(
                table.c.accession_number != "", table.c.accession_number.in_(of_label)
            )
            for table in (results, series)
        ),
    )
    return set(connection.execute(statement).scalars())


def says_haemorrhage(action: str, disposition: str) -> bool | None:
    """What a verdict on a decision says of the head; None for unsure, and where nothing was decided."""
    if action not in ("agree", "disagree") or disposition not in ANALYSED:
        return None
    return (action == "agree") == (disposition == "positive")


def _known(connection: Connection) -> list[str]:
    both = union(*(select(table.c.series_instance_uid) for table in (series, results)))
    return sorted(connection.execute(both).scalars())


def _by(rows: Iterable[Any], key: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found


class _Collected:
    """The rows of all tables that concern some series, each table asked once."""

    def __init__(self, connection: Connection, uids: list[str]) -> None:
        def ask(table: Table, column: str, values: Collection[str], order: str, *where: Any) -> list[Any]:
            statement = select(table).where(table.c[column].in_(sorted(values)), *where).order_by(table.c[order])
            return list(connection.execute(statement).mappings())

        self.received = {
            (row["series_instance_uid"], row["revision"]): row
            for row in ask(series, "series_instance_uid", uids, "revision")
        }
        self.decided = {
            (row["series_instance_uid"], row["revision"]): row
            for row in ask(results, "series_instance_uid", uids, "revision")
        }
        known = [*self.received.values(), *self.decided.values()]
        studies = {row["study_instance_uid"] for row in known}
        accessions = {row["accession_number"] for row in known} - {""}
        counting = and_(reviews.c.action.in_(VERDICTS), reviews.c.undone_at.is_(None))
        self.verdicts = _by(ask(reviews, "series_instance_uid", uids, "occurred_at", counting), "series_instance_uid")
        self.pages = _by(ask(pages, "study_instance_uid", studies, "step"), "study_instance_uid")
        self.adjudicated = {
            row["study_instance_uid"]: row["haemorrhage"]
            for row in ask(adjudications, "study_instance_uid", studies, "adjudication_id")
        }
        valid = labels.c.superseded_at.is_(None)
        self.labels = _by(ask(labels, "accession_number", accessions, "label_id", valid), "accession_number")

    def rows(self, config: Config, now: datetime) -> Iterator[ValidationRow]:
        unfinished_before = now - timedelta(minutes=config.validation.unfinished_minutes)
        newest = dict(sorted(self.decided))
        searched = dict(sorted(key for key, row in self.decided.items() if row["disposition"] in ANALYSED))
        for uid, revision in sorted({*self.received, *self.decided}):
            received, decided = self.received.get((uid, revision)), self.decided.get((uid, revision))
            if decided is None and (
                received is None or received["closed_at"] is None or received["closed_at"] > unfinished_before
            ):
                continue
            # only a search replaces a search, or a failed revision would take a paged positive out of the accuracy
            over = searched if revision <= searched.get(uid, 0) else newest
            yield self._row(received, decided, over.get(uid, 0) > revision, config)

    def _row(self, received: Any, decided: Any, superseded: bool, config: Config) -> ValidationRow:
        either = decided or received
        event = _event(received, decided)
        disposition: RowDisposition = decided["disposition"] if decided else "unfinished"
        site = site_of(event, config)
        sent = self.pages.get(either["study_instance_uid"], ())
        verdicts = [
            row for row in self.verdicts.get(either["series_instance_uid"], ()) if row["revision"] == either["revision"]
        ]
        return ValidationRow(
            study_instance_uid=either["study_instance_uid"],
            series_instance_uid=either["series_instance_uid"],
            revision=either["revision"],
            accession_number=event.accession_number,
            site=site,
            scanner=event.scanner,
            calling_ae_title=event.calling_ae_title,
            modality=event.modality,
            superseded=superseded,
            acquired_at=_utc(event.acquired_at),
            first_image_at=_utc(event.first_image_at),
            last_image_at=_utc(event.last_image_at),
            closed_at=_utc(received["closed_at"] if received else event.received_at),
            started_at=_utc(event.started_at),
            classified_at=_utc(event.classified_at),
            detected_at=_utc(event.detected_at),
            triaged_at=decided["triaged_at"] if decided else None,
            posted_at=decided["posted_at"] if decided else None,
            paged_at=_first(page["sent_at"] for page in sent),
            acknowledged_at=_first(
                (decided["acknowledged_at"] if decided else None, *(page["acknowledged_at"] for page in sent))
            ),
            read_at=_first(row["occurred_at"] for row in verdicts),
            close_reason=event.close_reason,
            instance_count=event.instance_count,
            slice_count=event.slice_count,
            slice_thickness_mm=event.slice_thickness_mm,
            pixel_spacing_mm=event.pixel_spacing_mm,
            convolution_kernel=event.convolution_kernel,
            tissue_hounsfield=event.tissue_hounsfield,
            noise_hounsfield=event.noise_hounsfield,
            disposition=disposition,
            reasons=tuple(_own_words(reason, disposition) for reason in event.reasons),
            uncertain=event.uncertain,
            protocol=event.protocol or {},
            header=event.header,
            disagreements=event.disagreements,
            probability=decided["probability"] if decided else None,
            finding_probabilities={finding.kind: finding.probability for finding in event.findings},
            finding_volumes_ml={finding.kind: finding.volume_ml for finding in event.findings},
            model_versions=event.model_versions,
            software_version=event.software_version,
            config_version=event.config_version,
            mode=sent[-1]["mode"] if sent else mode_of(site, config),
            page_state=sent[-1]["state"] if sent else "",
            readings=_readings(verdicts, disposition),
            labels=tuple(_given(self.labels.get(event.accession_number[:16], ()))),
            adjudicated=self.adjudicated.get(either["study_instance_uid"]),
        )


def _event(received: Any, decided: Any) -> SeriesTriaged:
    """What was decided; of a series without a result, what the receiver knows, in the same words.

    A stored event that cannot be read leaves what the ledger's own columns tell: one must not stop the record of all.
    """
    if decided:
        try:
            return msgspec.convert(decided["event"], SeriesTriaged)
        except msgspec.ValidationError as error:
            log.error(
                "the stored event of series %s, revision %d, cannot be read (%s); its row of the validation record has "
                "the columns of table results only; mend the event, and the row follows",
                decided["series_instance_uid"],
                decided["revision"],
                error,
            )
            columns = ("study_instance_uid", "series_instance_uid", "revision", "accession_number", "scanner")
            told: dict[str, Any] = {name: decided[name] for name in (*columns, "disposition", "uncertain")}
            return SeriesTriaged(reasons=(f"{type(error).__name__}: the stored event cannot be read",), **told)
    same = ("study_instance_uid", "series_instance_uid", "revision", "accession_number", "modality", "scanner")
    when = ("calling_ae_title", "instance_count", "first_image_at", "last_image_at")
    known: dict[str, Any] = {name: received[name] for name in same + when}
    return SeriesTriaged(disposition="failed", close_reason=received["close_reason"] or "", **known)


def _readings(verdicts: list[Any], disposition: str) -> tuple[Reading, ...]:
    """The last verdict of each reader, oldest first; `verdicts` are in the order of their times."""
    last = {row["reader"]: row for row in verdicts}
    return tuple(
        Reading(
            reader=row["reader"],
            action=row["action"],
            haemorrhage=says_haemorrhage(row["action"], disposition),
            finding_kind=row["finding_kind"],
            prediction_shown=row["prediction_shown"],
            at=row["occurred_at"],
        )
        for row in sorted(last.values(), key=lambda row: (row["occurred_at"], row["reader"]))
    )


def _given(rows: Iterable[Any]) -> Iterator[GivenLabel]:
    newest = {row["source"]: row for row in rows}
    for source, row in sorted(newest.items()):
        kind: LabelKind = "report" if row["kind"] == "report" else "label"
        yield GivenLabel(source=source, kind=kind, haemorrhage=row["haemorrhage"])


def _own_words(reason: str, disposition: str) -> str:
    """A reason without what other libraries or headers may have put into it."""
    if disposition == "failed":
        named = _ERROR_CLASS.match(reason)
        return named.group() if named else "error"
    if reason.startswith("incomplete:"):
        reason = reason.partition(",")[0]
    return _PATH.sub("PATH", _UID.sub("UID", reason))


def _first(times: Iterable[datetime | None]) -> datetime | None:
    return min((at for at in times if at is not None), default=None)


def _utc(at: datetime | None) -> datetime | None:
    return at.astimezone(UTC) if at is not None else None

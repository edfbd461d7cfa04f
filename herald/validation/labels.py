"""`herald label import`: what others say of a study, from a CSV of accession numbers, answers and their source."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, insert, select, text, update

from herald.errors import HeraldError
from herald.ledger import Ledger, labels, results, series
from herald.validation.report_text import read_report
from herald.validation.row import LabelKind

COLUMNS = {
    "accession": ("accession", "accession_number", "accessionnumber", "accession number"),
    "source": ("source",),
    "label": ("label",),
    "report": ("report",),
}
"""Columns by what they are called, whatever the case; others are ignored."""

_HAEMORRHAGE = {"haemorrhage", "hemorrhage", "bleed", "bleeding", "blood"}
YES = _HAEMORRHAGE | {"1", "1.0", "yes", "y", "true", "positive", "pos", "ja", "positiv", "blutung"}
NO = {f"no {word}" for word in _HAEMORRHAGE} | {"keine blutung", "nein", "negativ"}
NO |= {"0", "0.0", "no", "n", "false", "negative", "neg", "none", "normal"}

LONGEST_ACCESSION = 16  # VR SH, PS3.5 6.2
LONGEST_SOURCE = 64
LARGEST_CELL = 1 << 20
AT_ONCE = 500


class LabelError(HeraldError):
    """Raised when a file of labels cannot be imported as asked."""


@dataclass(frozen=True)
class BadLine:
    """A line that is not imported, counted from 1, and why."""

    line: int
    why: str


@dataclass(frozen=True)
class ReadLabel:
    """One answer of the file; `detail` are the words of a report that decided."""

    line: int
    accession_number: str
    source: str
    haemorrhage: bool
    kind: LabelKind
    detail: str | None


@dataclass(frozen=True)
class LabelImport:
    """What an import did, or a dry run would do; lines that say the same of a study count once."""

    new: int = 0
    unchanged: int = 0
    changed: int = 0
    """The same source had said something else of the study, which is superseded now."""
    undecided: int = 0
    """Reports that are in doubt, or say nothing of haemorrhage; they make no label."""
    unknown: int = 0
    """Labels for accession numbers that Herald has not seen yet; they are kept and count when it does."""
    bad: tuple[BadLine, ...] = ()
    ignored_columns: tuple[str, ...] = ()


@dataclass
class _File:
    """What the lines of a file say, before the ledger is asked."""

    given: list[ReadLabel] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    undecided: int = 0
    ignored_columns: tuple[str, ...] = ()


def import_labels(
    ledger: Ledger,
    path: Path,
    now: datetime,
    *,
    strict: bool = False,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> LabelImport:
    """Import a CSV of `accession`, `source` and `label`, or `report` with a report's text; again changes nothing.

    `label` is yes or no in many words. Of a report, its rule-based answer is kept, never its text. Lines that cannot be
    used are left out and told. Raises LabelError for a file without these columns, and with `strict` for any bad line,
    before anything is written; LedgerError.
    """
    file = _read(path)
    if strict and file.bad:
        told = "; ".join(f"line {bad.line}: {bad.why}" for bad in file.bad[:5])
        more = f"; and {len(file.bad) - 5} more" if len(file.bad) > 5 else ""
        raise LabelError(f"{path}: {told}{more}. Nothing was imported; correct these lines, or leave out --strict")
    new = unchanged = changed = unknown = done = 0
    rest = iter(file.given)
    while some := list(islice(rest, AT_ONCE)):
        accessions = {given.accession_number for given in some}
        with ledger.begin() as connection:
            if not dry_run:
                _lock(connection)
            before = _valid(connection, accessions)
            seen = _seen(connection, accessions)
            fresh: list[ReadLabel] = []
            for given in some:
                old = before.get((given.accession_number, given.source))
                unknown += given.accession_number not in seen
                if old is not None and old[1:] == (given.haemorrhage, given.kind):
                    unchanged += 1
                    continue
                fresh.append(given)
                new, changed = new + (old is None), changed + (old is not None)
            if not dry_run:
                _write(connection, fresh, before, now)
        done += len(some)
        on_progress(done, len(file.given))
    return LabelImport(new, unchanged, changed, file.undecided, unknown, tuple(file.bad), file.ignored_columns)


# --- the file --------------------------------------------------------------------------------------------------------


def _read(path: Path) -> _File:
    try:
        written = path.read_bytes()
    except OSError as error:
        raise LabelError(f"cannot read {path}: {error.strerror}; name a CSV of accession, label and source") from error
    try:
        content = written.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = written.count(b"\n", 0, error.start) + 1
        raise LabelError(f"{path}, line {line}: not UTF-8; save it as CSV UTF-8") from error
    if "\0" in content:
        raise LabelError(f"{path} is no text: it has zero bytes; save it as CSV UTF-8")
    header, delimiter = _header(path, content)
    places = {name: header.index(known) for name, aliases in COLUMNS.items() for known in aliases if known in header}
    missing = [name for name in ("accession", "source") if name not in places]
    if not {"label", "report"} & set(places):
        missing.append("label or report")
    if missing:
        raise LabelError(f"{path} has no column {', no column '.join(missing)}; its first line must name the columns")
    used = set(places.values())
    file = _File(ignored_columns=tuple(name for i, name in enumerate(header) if i not in used and name))
    for line, cells in _lines(content, delimiter, file):
        if len(cells) != len(header):
            file.bad.append(BadLine(line, f"{len(cells)} cells where the first line names {len(header)} columns"))
            continue
        _take(file, line, {name: cells[place].strip() for name, place in places.items()})
    file.given, contradicting = _agreeing(file.given)
    file.bad = sorted([*file.bad, *contradicting], key=lambda bad: bad.line)
    return file


def _header(path: Path, content: str) -> tuple[list[str], str]:
    """The names of the columns and what separates them: whatever makes a column of accession numbers."""
    first = next((line for line in content.splitlines() if line.strip()), "")
    for delimiter in (",", ";", "\t", "|"):
        names = [name.strip().lower() for name in next(csv.reader([first], delimiter=delimiter), [])]
        if len(names) > 1 and set(COLUMNS["accession"]) & set(names):
            return names, delimiter
    raise LabelError(
        f"{path} has no column accession: its first line must name the columns, such as accession,label,source or"
        " accession;report;source"
    )


def _lines(content: str, delimiter: str, file: _File) -> Iterator[tuple[int, list[str]]]:
    """The number of the first line of each record after the header, and its cells."""
    before = csv.field_size_limit(LARGEST_CELL)
    try:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        header = True
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                file.bad.append(BadLine(line, f"this cannot be read as CSV: {error}"))
                continue
            if header and any(cells):
                header = False
            elif any(cell.strip() for cell in cells):
                yield line, cells
    finally:
        csv.field_size_limit(before)


def _take(file: _File, line: int, cells: dict[str, str]) -> None:
    """Note what a line says, or why it cannot be used."""
    accession, source = cells["accession"], cells["source"]
    label, report = cells.get("label", ""), cells.get("report", "")
    word = " ".join(label.lower().split())
    why = ""
    if not accession:
        why = "the accession number is missing"
    elif len(accession) > LONGEST_ACCESSION:
        why = f"the accession number has {len(accession)} characters; DICOM allows {LONGEST_ACCESSION} (VR SH)"
    elif not source:
        why = "the source is missing; say who labelled it"
    elif len(source) > LONGEST_SOURCE:
        why = f"the source has {len(source)} characters; use {LONGEST_SOURCE} at most"
    elif not label and not report:
        why = "neither label nor report says anything" if {"label", "report"} <= set(cells) else "the label is missing"
    elif label and word not in YES | NO:
        why = f"the label {label[:20]!r} is neither yes nor no; use 1 or 0"
    if why:
        file.bad.append(BadLine(line, why))
    elif label:
        file.given.append(ReadLabel(line, accession, source, word in YES, "label", None))
    else:
        answer = read_report(report)
        if answer.haemorrhage is None:
            file.undecided += 1
            return
        words = "; ".join(answer.words)
        file.given.append(ReadLabel(line, accession, source, answer.haemorrhage, "report", words))


def _agreeing(given: list[ReadLabel]) -> tuple[list[ReadLabel], list[BadLine]]:
    """One label of each study and source, and the lines that contradict one another, of which none is taken."""
    by_source: dict[tuple[str, str], list[ReadLabel]] = {}
    for label in given:
        by_source.setdefault((label.accession_number, label.source), []).append(label)
    taken, bad = [], []
    for same in by_source.values():
        if len({(label.haemorrhage, label.kind) for label in same}) == 1:
            taken.append(same[0])
            continue
        lines = ", ".join(str(label.line) for label in same)
        bad += [BadLine(label.line, f"lines {lines} contradict one another: same study, same source") for label in same]
    return taken, bad


# --- the ledger ------------------------------------------------------------------------------------------------------


def _lock(connection: Connection) -> None:
    """Keep a second import out until this transaction ends."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("lock table labels in share row exclusive mode"))
    else:
        connection.exec_driver_sql("begin immediate")


def _valid(connection: Connection, accessions: set[str]) -> dict[tuple[str, str], tuple[int, bool, str]]:
    """By study and source, what counts: its label_id, answer and kind."""
    statement = select(labels).where(labels.c.accession_number.in_(accessions), labels.c.superseded_at.is_(None))
    return {
        (row["accession_number"], row["source"]): (row["label_id"], row["haemorrhage"], row["kind"] or "label")
        for row in connection.execute(statement.order_by(labels.c.label_id)).mappings()
    }


def _seen(connection: Connection, accessions: set[str]) -> set[str]:
    return {
        accession
        for table in (series, results)
        for accession in connection.execute(
            select(table.c.accession_number).where(table.c.accession_number.in_(accessions)).distinct()
        ).scalars()
    }


def _write(
    connection: Connection,
    fresh: list[ReadLabel],
    before: dict[tuple[str, str], tuple[int, bool, str]],
    now: datetime,
) -> None:
    old = [before[key][0] for given in fresh if (key := (given.accession_number, given.source)) in before]
    if old:
        connection.execute(update(labels).where(labels.c.label_id.in_(old)).values(superseded_at=now))
    if fresh:
        connection.execute(
            insert(labels),
            [
                {
                    "accession_number": given.accession_number,
                    "haemorrhage": given.haemorrhage,
                    "source": given.source,
                    "imported_at": now,
                    "kind": given.kind,
                    "detail": given.detail,
                }
                for given in fresh
            ],
        )

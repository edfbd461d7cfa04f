"""`herald export`: the record as one flat table without identity, for whoever does the statistics.

The columns are the schema: `docs/validation-schema.md` is written from them (`python -m herald.validation.export`). The
same record, period and salt give the same bytes.
"""

import hmac
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pandas as pd  # type: ignore[import-untyped]

from herald.errors import ConfigError
from herald.signatures import FINDINGS, HEADS
from herald.validation.row import Reading, ValidationRow

FORMATS = ("csv", "parquet")
Kind = Literal["string", "Int64", "Float64", "boolean", "datetime64[us, UTC]"]

TIME: Kind = "datetime64[us, UTC]"
_UID = re.compile(r"\b\d+(?:\.\d+){4,}\b")

Pseudonym = Callable[[str], str | None]


@dataclass(frozen=True)
class ExportColumn:
    """One column: its pandas dtype, unit, meaning, the fields of ValidationRow that it tells, and its value."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    of: tuple[str, ...]
    value: Callable[[ValidationRow, Pseudonym], Any]


def pseudonymise(salt: str) -> Pseudonym:
    """HMAC-SHA256 of an identifier with a secret salt, 16 hex digits; None for an empty one. Raises ConfigError."""
    if not salt:
        raise ConfigError(
            "validation.salt has no value, and without a secret everybody could find out whom an export is about: run"
            " `herald init`, which makes secrets/validation-salt, and set validation.salt ="
            ' "file:secrets/validation-salt". Keep it: another salt gives other pseudonyms'
        )
    key = salt.encode()
    return lambda text: hmac.digest(key, text.encode(), "sha256").hex()[:16] if text else None


def read_salt(path: Path) -> str:
    """A salt from a file; raises ConfigError when it cannot be read or is empty."""
    try:
        salt = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the salt {path}: {error}; name a text file with a secret") from error
    if not salt:
        raise ConfigError(f"the salt {path} is empty; write a secret into it")
    return salt


# --- the columns -----------------------------------------------------------------------------------------------------


def _same(name: str, kind: Kind, unit: str, meaning: str) -> ExportColumn:
    """A field as it is; empty text is no value."""

    def value(row: ValidationRow, _: Pseudonym) -> Any:
        found = getattr(row, name)
        return None if found == "" else found

    return ExportColumn(name, kind, unit, meaning, (name,), value)


def _hashed(name: str, of: str, meaning: str) -> ExportColumn:
    return ExportColumn(name, "string", "", meaning, (of,), lambda row, pseudonym: pseudonym(getattr(row, of)))


def _of_dict(name: str, kind: Kind, unit: str, meaning: str, of: str, key: str, part: str = "") -> ExportColumn:
    """One key of a field that is a dict, or a part of what stands there."""

    def value(row: ValidationRow, _: Pseudonym) -> Any:
        found = getattr(row, of).get(key)
        return getattr(found, part) if part and found is not None else found

    return ExportColumn(name, kind, unit, meaning, (of,), value)


def _agreed(answers: Iterable[bool | None]) -> bool | None:
    """What all say who say something; None where they differ or nobody does."""
    said = {answer for answer in answers if answer is not None}
    return said.pop() if len(said) == 1 else None


def _reasons(row: ValidationRow, _: Pseudonym) -> str | None:
    """Our own sentences; of a failure only the class of the error, whatever an older record may hold."""
    own = row.reasons
    if row.disposition == "failed":
        own = tuple(reason.partition(":")[0] for reason in own)
    return _UID.sub("UID", "; ".join(own)) or None


def _readings(row: ValidationRow, pseudonym: Pseudonym) -> str | None:
    def told(reading: Reading) -> dict[str, Any]:
        return {**msgspec.to_builtins(reading), "reader": pseudonym(reading.reader)}

    return msgspec.json.encode([told(reading) for reading in row.readings]).decode() if row.readings else None


def _labels_of(kind: str) -> Callable[[ValidationRow, Pseudonym], bool | None]:
    return lambda row, _: _agreed(label.haemorrhage for label in row.labels if label.kind == kind)


_UTC = "UTC"
_OTHER_HEADS = "Answers of other heads of the protocol model as JSON: head to label and probability"

COLUMNS: tuple[ExportColumn, ...] = (
    _hashed("study", "study_instance_uid", "Pseudonym of the study"),
    _hashed("series", "series_instance_uid", "Pseudonym of the series"),
    _same("revision", "Int64", "", "1, and one more whenever late images reopened the series"),
    _hashed("accession", "accession_number", "Pseudonym of the accession number"),
    _same("site", "string", "", "Name of one of notifier.sites; empty when it is of none"),
    _same("scanner", "string", "", "StationName, else the calling AE title"),
    _same("calling_ae_title", "string", "", "Who sent it"),
    _same("modality", "string", "", "As the header has it"),
    _same(
        "superseded",
        "boolean",
        "",
        "A later revision has a result, and was analysed if this one was; leave it out",
    ),
    _same(
        "acquired_at", TIME, _UTC, "When the scanner says that it acquired the series; every other time is by our clock"
    ),
    _same("first_image_at", TIME, _UTC, "First image received"),
    _same("last_image_at", TIME, _UTC, "Last image received"),
    _same("closed_at", TIME, _UTC, "Series taken for complete"),
    _same("started_at", TIME, _UTC, "Taken up for analysis"),
    _same("classified_at", TIME, _UTC, "Protocol recognised"),
    _same("detected_at", TIME, _UTC, "Searched for haemorrhage"),
    _same("triaged_at", TIME, _UTC, "Decided; empty when unfinished"),
    _same("posted_at", TIME, _UTC, "On the worklist"),
    _same("paged_at", TIME, _UTC, "First page of the study, or when it would have been sent in shadow mode"),
    _same("acknowledged_at", TIME, _UTC, "First acknowledgement or verdict"),
    _same("read_at", TIME, _UTC, "First verdict of a reader"),
    _same("close_reason", "string", "", "Why the series was taken for complete"),
    _same("instance_count", "Int64", "instances", "Instances received"),
    _same("slice_count", "Int64", "slices", "Slices of the volume; 0 when none was made"),
    _same("slice_thickness_mm", "Float64", "mm", "As the header has it (0018,0050)"),
    _same("pixel_spacing_mm", "Float64", "mm", "Distance of rows"),
    _same("convolution_kernel", "string", "", "As the header has it (0018,1210)"),
    _same("tissue_hounsfield", "Float64", "HU", "Median of the soft tissue of the middle slices"),
    _same("noise_hounsfield", "Float64", "HU", "Standard deviation of the noise there"),
    _same("disposition", "string", "", "positive, negative, not_eligible, failed or unfinished"),
    ExportColumn(
        "reasons",
        "string",
        "",
        "Why, in Herald's words, parted by semicolons; of a failure its class",
        ("reasons",),
        _reasons,
    ),
    _same("uncertain", "boolean", "", "Analysed although the protocol model was unsure, or images were missing"),
    *(
        column
        for head in HEADS
        for column in (
            _of_dict(
                f"protocol_{head}",
                "string",
                "",
                f"Answer of the head {head} from the pixels",
                "protocol",
                head,
                "label",
            ),
            _of_dict(
                f"protocol_{head}_probability", "Float64", "0 to 1", "Its probability", "protocol", head, "probability"
            ),
            _of_dict(
                f"header_{head}", "string", "", "What the header claims; empty when it says nothing", "header", head
            ),
        )
    ),
    ExportColumn(
        "protocol_other",
        "string",
        "",
        _OTHER_HEADS,
        ("protocol",),
        lambda row, _: _json({head: label for head, label in row.protocol.items() if head not in HEADS}),
    ),
    ExportColumn(
        "header_other",
        "string",
        "",
        "What the header claims of other heads, as JSON",
        ("header",),
        lambda row, _: _json({head: claim for head, claim in row.header.items() if head not in HEADS}),
    ),
    ExportColumn(
        "disagreements",
        "string",
        "",
        "Heads where header and pixels differ, parted by semicolons",
        ("disagreements",),
        lambda row, _: "; ".join(row.disagreements) or None,
    ),
    _same("probability", "Float64", "0 to 1", "Of any haemorrhage; empty when it was not searched for"),
    *(
        _of_dict(f"probability_{kind}", "Float64", "0 to 1", f"Of the finding {kind}", "finding_probabilities", kind)
        for kind in FINDINGS
    ),
    *(
        _of_dict(f"volume_{kind}_ml", "Float64", "ml", f"Volume of the finding {kind}", "finding_volumes_ml", kind)
        for kind in FINDINGS
    ),
    _of_dict("model_protocol", "string", "", "Version of the protocol model", "model_versions", "protocol"),
    _of_dict("model_hemorrhage", "string", "", "Version of the haemorrhage model", "model_versions", "hemorrhage"),
    _same("software_version", "string", "", "Version of Herald"),
    _same("config_version", "string", "", "Changes with whatever setting may change a decision or a page"),
    _same("mode", "string", "", "shadow or live"),
    _same("page_state", "string", "", "State of the study's last page; empty without one"),
    ExportColumn(
        "reading_count",
        "Int64",
        "readers",
        "Readers whose verdict counts",
        ("readings",),
        lambda row, _: len(row.readings),
    ),
    ExportColumn(
        "reading_haemorrhage",
        "boolean",
        "",
        "What all their verdicts say of the head; empty where they differ or lack",
        ("readings",),
        lambda row, _: _agreed(reading.haemorrhage for reading in row.readings),
    ),
    ExportColumn(
        "readings",
        "string",
        "",
        "One verdict for each reader as JSON, oldest first: pseudonym of the reader, action, haemorrhage, finding_kind,"
        " prediction_shown, at",
        ("readings",),
        _readings,
    ),
    ExportColumn(
        "label_count", "Int64", "sources", "Imported labels, of both kinds", ("labels",), lambda row, _: len(row.labels)
    ),
    ExportColumn(
        "label_haemorrhage",
        "boolean",
        "",
        "What all imported answers say; empty where they differ or lack",
        ("labels",),
        _labels_of("label"),
    ),
    ExportColumn(
        "report_haemorrhage",
        "boolean",
        "",
        "What reports say by rule (herald.validation.report_text), no truth by itself",
        ("labels",),
        _labels_of("report"),
    ),
    _same(
        "adjudicated", "boolean", "", "Whether the study shows haemorrhage by adjudication; empty while nobody decided"
    ),
    ExportColumn(
        "reference",
        "boolean",
        "",
        "Reference standard: adjudication, else what all verdicts and labels agree on",
        ("adjudicated", "labels", "readings"),
        lambda row, _: row.reference,
    ),
    ExportColumn(
        "needs_adjudication",
        "boolean",
        "",
        "Answers differ and nobody has decided",
        ("adjudicated", "labels", "readings"),
        lambda row, _: row.needs_adjudication,
    ),
)


def _json(found: dict[str, Any]) -> str | None:
    return msgspec.json.encode(found, order="sorted").decode() if found else None


# --- the table -------------------------------------------------------------------------------------------------------

TIMES = [column.name for column in COLUMNS if column.kind == TIME]
READ_CSV: dict[str, Any] = {
    "parse_dates": TIMES,
    "date_format": "ISO8601",
    "keep_default_na": False,
    "na_values": [""],
    "dtype": {column.name: column.kind for column in COLUMNS if column.kind != TIME},
}
"""What `pandas.read_csv` needs to give an exported CSV the types of the Parquet file."""


def table(rows: Sequence[ValidationRow], salt: str) -> Any:
    """The rows as a DataFrame of `COLUMNS`, in their order; raises ConfigError without a salt."""
    pseudonym = pseudonymise(salt)
    values = {column.name: [column.value(row, pseudonym) for row in rows] for column in COLUMNS}
    return pd.DataFrame({column.name: pd.Series(values[column.name], dtype=column.kind) for column in COLUMNS})


def export(rows: Sequence[ValidationRow], path: Path, file_format: str, salt: str) -> None:
    """Write the rows in one of `FORMATS`; raises ConfigError without a salt, or where nothing can be written."""
    found = table(rows, salt)
    try:
        if file_format == "parquet":
            found.to_parquet(path, engine="pyarrow", index=False)
            return
        for name in TIMES:
            found[name] = pd.Series([None if at is pd.NaT else _iso(at) for at in found[name]], dtype="string")
        found.to_csv(path, index=False, lineterminator="\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _iso(at: datetime) -> str:
    return at.isoformat(timespec="microseconds")


def schema() -> str:
    """The documentation of the columns, in Markdown."""
    lines = [
        "# The exported validation record",
        "",
        "`herald export rows.parquet --from 2026-03-01 --to 2026-03-31` writes one row for each series revision whose",
        "first image came within the period (both days included, UTC), as the record knows it last. Every series that",
        "was received is there: exclusions, failures and what never got a result too. `rows.csv` is the same in CSV.",
        "",
        "There is no identity: study, series and accession number are HMAC-SHA256 pseudonyms under the secret",
        "`validation.salt`, 16 hex digits, and so are readers. The same salt gives the same pseudonyms, so that later",
        "exports can be joined; who has no salt cannot compute them. Notes, texts of reports and sources of labels are",
        "not exported. Times are exact: shift them where your data protection officer counts dates as identity.",
        "",
        "Same record, period and salt: same bytes. In pandas:",
        "",
        "```python",
        'pd.read_parquet("rows.parquet")',
        'pd.read_csv("rows.csv", **herald.validation.export.READ_CSV)',
        "```",
        "",
        "Without Herald at hand, `pd.read_csv` needs `parse_dates` for the columns that end in `_at`, `dtype` for the",
        'others as the table says, and `keep_default_na=False, na_values=[""]`: only an empty cell is a missing value.',
        "",
        "| Column | Type | Unit | Meaning |",
        "|---|---|---|---|",
        *(f"| `{column.name}` | {column.kind} | {column.unit} | {column.meaning} |" for column in COLUMNS),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(schema(), end="")

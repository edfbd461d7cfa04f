"""The record as a flat table: loads with its types, the same bytes each time, and nobody's identity."""

import re
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner
from validation_ledger import NOON, Month, decided, series_of, study_of

from herald.cli import app
from herald.config import Config
from herald.errors import ConfigError
from herald.events import Label
from herald.validation import chain, export
from herald.validation.collect import collect
from herald.validation.row import GivenLabel, Reading, ValidationRow

SALT = "a salt for tests"
SCHEMA = Path(__file__).parents[1] / "docs" / "validation-schema.md"


def reading(reader: str, action: str, haemorrhage: bool | None, kind: str | None = None) -> Reading:
    return Reading(
        reader=reader, action=action, haemorrhage=haemorrhage, finding_kind=kind, prediction_shown=False, at=NOON
    )


FULL = ValidationRow(
    study_instance_uid=study_of(1),
    series_instance_uid=series_of(1),
    revision=2,
    accession_number="A-1",
    site="North",
    scanner="CT-EAST",
    calling_ae_title="CT1",
    modality="CT",
    acquired_at=NOON,
    first_image_at=NOON,
    triaged_at=NOON.replace(microsecond=0),
    slice_count=24,
    slice_thickness_mm=5.0,
    disposition="positive",
    reasons=("uncertain: kernel: bone kernel (0.61) from the pixels, the header says nothing",),
    protocol={"kernel": Label("soft", 0.91), "body_part": Label("chest", 0.5)},
    header={"kernel": "bone", "contrast": None, "body_part": "chest"},
    disagreements=("kernel",),
    probability=0.93,
    finding_probabilities={"any": 0.93, "iph": 0.88},
    finding_volumes_ml={"any": 11.4},
    model_versions={"protocol": "1", "hemorrhage": "2"},
    readings=(reading("rita", "agree", True, "iph"), reading("omar", "unsure", None)),
    labels=(
        GivenLabel(source="Dr Smith", kind="label", haemorrhage=True),
        GivenLabel(source="ris", kind="report", haemorrhage=False),
    ),
)
BARE = ValidationRow(study_instance_uid="1.2", series_instance_uid="1.2.3", revision=1, disposition="unfinished")


def written(tmp_path: Path, file_format: str, rows: list[ValidationRow]) -> Path:
    path = tmp_path / f"rows.{file_format}"
    export.export(rows, path, file_format, SALT)
    return path


def loaded(tmp_path: Path, file_format: str, rows: list[ValidationRow]) -> Any:
    path = written(tmp_path, file_format, rows)
    return pd.read_parquet(path) if file_format == "parquet" else pd.read_csv(path, **export.READ_CSV)


@pytest.mark.parametrize("file_format", export.FORMATS)
@pytest.mark.parametrize("rows", [[FULL, BARE], [BARE], []], ids=["both", "bare", "none"])
def test_a_table_loads_in_pandas_in_one_line_with_its_types(
    tmp_path: Path, file_format: str, rows: list[ValidationRow]
) -> None:
    found = loaded(tmp_path, file_format, rows)
    assert list(found.columns) == [column.name for column in export.COLUMNS]
    assert len(found) == len(rows)
    for column in export.COLUMNS:
        dtype = str(found[column.name].dtype)
        if column.kind == export.TIME:
            times = found[column.name]
            assert not len(times.dropna()) or re.fullmatch(r"datetime64\[[mun]s, UTC\]", dtype), (column.name, dtype)
        else:
            assert dtype.split("[")[0] == column.kind, column.name


@pytest.mark.parametrize("file_format", export.FORMATS)
def test_every_value_is_there(tmp_path: Path, file_format: str) -> None:
    found = loaded(tmp_path, file_format, [FULL, BARE])
    first, second = found.iloc[0], found.iloc[1]
    assert first["acquired_at"] == NOON
    assert (first["revision"], first["site"], first["slice_thickness_mm"]) == (2, "North", 5.0)
    assert (first["protocol_kernel"], first["protocol_kernel_probability"]) == ("soft", 0.91)
    assert (first["header_kernel"], first["disagreements"]) == ("bone", "kernel")
    assert first["protocol_other"] == '{"body_part":{"label":"chest","probability":0.5}}'
    assert (first["probability_iph"], first["volume_any_ml"], first["model_hemorrhage"]) == (0.88, 11.4, "2")
    assert (first["reading_count"], first["reading_haemorrhage"]) == (2, True)
    assert (first["label_haemorrhage"], first["report_haemorrhage"]) == (True, False)
    assert (first["needs_adjudication"], first["reference"] is pd.NA) == (True, True)
    assert first["reasons"] == FULL.reasons[0]
    assert (second["disposition"], second["reading_count"]) == ("unfinished", 0)
    empty = ("accession", "site", "probability", "triaged_at", "readings", "reasons", "adjudicated", "protocol_kernel")
    assert all(pd.isna(second[name]) for name in empty)


def test_text_that_looks_like_a_missing_value_is_text(tmp_path: Path) -> None:
    found = loaded(tmp_path, "csv", [replace(FULL, scanner="NA", site="None", convolution_kernel="1e10")])
    assert (found.iloc[0]["scanner"], found.iloc[0]["site"]) == ("NA", "None")
    assert found.iloc[0]["convolution_kernel"] == "1e10"


@pytest.mark.parametrize("file_format", export.FORMATS)
def test_the_same_rows_and_salt_give_the_same_bytes_and_another_salt_others(tmp_path: Path, file_format: str) -> None:
    first = written(tmp_path, file_format, [FULL, BARE]).read_bytes()
    assert written(tmp_path, file_format, [FULL, BARE]).read_bytes() == first
    export.export([FULL, BARE], tmp_path / "other", file_format, "another salt")
    assert (tmp_path / "other").read_bytes() != first


def test_pseudonyms_join_and_say_nothing_without_the_salt(tmp_path: Path) -> None:
    found = loaded(tmp_path, "csv", [FULL, replace(FULL, revision=3), BARE])
    assert re.fullmatch("[0-9a-f]{16}", found["study"][0])
    assert found["study"][0] == found["study"][1] != found["study"][2]
    # RFC 4231, test case 2
    assert export.pseudonymise("Jefe")("what do ya want for nothing?") == "5bdcc146bf60754e"


def test_without_a_salt_nothing_is_exported_and_how_to_make_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"herald init.*validation-salt"):
        export.export([FULL], tmp_path / "rows.csv", "csv", "")
    assert not (tmp_path / "rows.csv").exists()


def test_a_place_that_cannot_be_written_to_is_told(tmp_path: Path) -> None:
    for file_format in export.FORMATS:
        with pytest.raises(ConfigError, match="cannot write"):
            export.export([FULL], tmp_path / "none" / "rows", file_format, SALT)


def test_every_field_of_a_row_is_told_by_a_column() -> None:
    told = {name for column in export.COLUMNS for name in column.of}
    assert told == {field.name for field in fields(ValidationRow)}


def test_names_of_columns_are_unique_and_times_end_in_at() -> None:
    names = [column.name for column in export.COLUMNS]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.endswith("_at")] == export.TIMES


def test_the_schema_in_the_documentation_is_that_of_the_columns() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == export.schema(), (
        "run python -m herald.validation.export > docs/validation-schema.md"
    )


# --- identity --------------------------------------------------------------------------------------------------------

IDENTITY = ("DOE^JOHN", "John Doe", "PID-4711", "19500101", "Dr Smith", "rita", "omar")


def test_nothing_of_a_patient_s_or_reader_s_identity_comes_into_record_and_export(tmp_path: Path) -> None:
    with Month.opened(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as month:
        failed = "VolumeError: cannot read /store/DOE^JOHN/PID-4711.dcm of 19500101"
        month.triage(1, "failed", reasons=(failed,), accession_number="A-1")
        incomplete = f"incomplete: 2 images left out, instance {series_of(2)}.7 of DOE^JOHN: broken"
        month.triage(2, reasons=(incomplete,), notes=("John Doe moved",), accession_number="A-2")
        month.review(2, "agree", "rita", NOON, note="John Doe, PID-4711")
        month.review(2, "disagree", "omar", NOON)
        month.label("A-2", True, "Dr Smith", detail="DOE^JOHN")
        month.page(2, state="sent", body="John Doe", recipient="John Doe", error="PID-4711")
        with month.ledger.read() as connection:
            rows = list(collect(connection, Config(), NOON + timedelta(hours=1)))
        chain.append(month.ledger, rows, NOON)
        with month.ledger.read() as connection:
            kept = chain.latest(connection)
    record = "".join(chain.encode(row) for row in kept)
    assert len(kept) == 2
    for name in IDENTITY[:4]:  # of patients: sources and readers are part of the record
        assert name not in record
    for file_format in export.FORMATS:
        content = loaded(tmp_path, file_format, kept).to_csv()
        raw = written(tmp_path, file_format, kept).read_bytes()
        for name in (*IDENTITY, study_of(2), series_of(2), "A-2", "1.2.826"):
            assert name not in content
            assert name.encode() not in raw
        assert "VolumeError" in content


def test_a_row_has_no_field_for_identity() -> None:
    words = {word for field in fields(ValidationRow) for word in field.name.split("_")}
    assert not words & {"patient", "name", "birth", "sex", "age", "address", "physician", "note", "notes"}


def test_reasons_of_an_older_record_lose_what_is_not_ours(tmp_path: Path) -> None:
    old = replace(FULL, disposition="failed", reasons=("VolumeError: DOE^JOHN 1.2.3.4.5.6",))
    assert loaded(tmp_path, "csv", [old])["reasons"][0] == "VolumeError"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_the_rows_of_a_period(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Month.opened(url) as month:
        month.triage(1)
        day = timedelta(days=1)
        month.triage(2, first_image_at=decided(2).first_image_at + day)
        with month.ledger.read() as connection:
            chain.append(month.ledger, list(collect(connection, Config(), NOON)), NOON)
    (tmp_path / "herald.toml").write_text("")
    (tmp_path / "salt").write_text(SALT)
    environment = {"HERALD_LEDGER__URL": url, "HERALD_CONFIG": str(tmp_path / "herald.toml")}

    def run(*arguments: str, **more: str) -> Any:
        return CliRunner().invoke(app, ["export", *arguments], env={**environment, **more})

    path = tmp_path / "rows.parquet"
    refused = run(str(path))
    assert isinstance(refused.exception, ConfigError)
    done = run(str(path), "--from", "2026-03-29", "--to", "2026-03-29", HERALD_VALIDATION__SALT=SALT)
    assert done.exit_code == 0, done.output
    assert "1 rows" in " ".join(done.stderr.split())
    (series,) = pd.read_parquet(path)["series"]
    assert series == export.pseudonymise(SALT)(series_of(1))
    done = run(str(tmp_path / "all"), "--format", "csv", "--salt", str(tmp_path / "salt"))
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "all", **export.READ_CSV)) == 2
    assert run(str(tmp_path / "rows.xlsx"), HERALD_VALIDATION__SALT=SALT).exit_code == 2

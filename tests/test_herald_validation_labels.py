"""Labels of others, from a CSV: what is taken, what is refused and told, and what a second import changes."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner
from validation_ledger import NOON, Month

from herald.cli import app
from herald.config import Config, LedgerConfig
from herald.ledger import Ledger, labels
from herald.validation.collect import collect
from herald.validation.labels import BadLine, LabelError, LabelImport, import_labels

LATER = NOON + timedelta(hours=3)


@pytest.fixture
def month(ledger_url: str) -> Iterator[Month]:
    with Month.opened(ledger_url) as month:
        for number in (1, 2, 3):
            month.triage(number, accession_number=f"A-{number}")
        yield month


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "labels.csv"


def written(ledger: Ledger, *, valid: bool = True) -> list[tuple[Any, ...]]:
    statement = select(labels.c.accession_number, labels.c.source, labels.c.haemorrhage, labels.c.kind)
    if valid:
        statement = statement.where(labels.c.superseded_at.is_(None))
    with ledger.read() as connection:
        return sorted(tuple(row) for row in connection.execute(statement))


@pytest.mark.parametrize(
    "content",
    [
        b"accession,label,source\nA-1,1,ris\nA-2,0,ris\n",
        b"\xef\xbb\xbfAccession;Label;Source\r\nA-1;yes;ris\r\nA-2;No;ris\r\n",
        b"source\tfinding\tdate\taccession_number\tlabel\nris\tSDH\t-\tA-1\tbleed\nris\t\t\tA-2\tno hemorrhage\n",
        b'\naccession,source,label\n\nA-1 , "ris",TRUE\n A-2,ris,negative\n,,\n',
        b"accession;label;source\nA-1;positiv;ris\nA-2;keine Blutung;ris",
    ],
    ids=["commas", "semicolons and BOM", "tabs and other columns", "blanks", "German"],
)
def test_a_table_is_read_however_it_was_saved(month: Month, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    done = import_labels(month.ledger, path, LATER)
    assert (done.new, done.bad) == (2, ())
    assert written(month.ledger) == [("A-1", "ris", True, "label"), ("A-2", "ris", False, "label")]


def test_importing_the_same_file_again_changes_nothing(month: Month, path: Path) -> None:
    path.write_text("accession,label,source\nA-1,1,ris\nA-1,1,ris\nA-1,0,follow-up\nA-2,0,ris\n")
    assert import_labels(month.ledger, path, NOON) == LabelImport(new=3)
    before = written(month.ledger, valid=False)
    assert import_labels(month.ledger, path, LATER) == LabelImport(unchanged=3)
    assert written(month.ledger, valid=False) == before


def test_a_source_that_says_something_else_supersedes_itself_and_no_other(month: Month, path: Path) -> None:
    path.write_text("accession,label,source\nA-1,1,ris\nA-1,1,follow-up\n")
    import_labels(month.ledger, path, NOON)
    path.write_text("accession,label,source\nA-1,0,ris\n")
    assert import_labels(month.ledger, path, LATER) == LabelImport(changed=1)
    assert written(month.ledger) == [("A-1", "follow-up", True, "label"), ("A-1", "ris", False, "label")]
    with month.ledger.read() as connection:
        old = select(labels).where(labels.c.superseded_at.is_not(None))
        (row,) = connection.execute(old).mappings()
        assert (row["haemorrhage"], row["superseded_at"]) == (True, LATER)
        (first, *_) = collect(connection, Config(), LATER)
    assert [(label.source, label.haemorrhage) for label in first.labels] == [("follow-up", True), ("ris", False)]


def test_reports_become_labels_by_rule_and_their_text_is_nowhere(
    month: Month, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text(
        "accession,report,source\n"
        'A-1,"FINDINGS: Mr Doe.\nIMPRESSION:\nAcute subdural hematoma, told Dr Smith.",ris\n'
        'A-2,"No acute intracranial hemorrhage in Mr Doe.",ris\n'
        "A-3,Possible SAH in Mr Doe.,ris\n"
    )
    with caplog.at_level("DEBUG"):
        done = import_labels(month.ledger, path, LATER)
    assert (done.new, done.undecided, done.bad) == (2, 1, ())
    assert written(month.ledger) == [("A-1", "ris", True, "report"), ("A-2", "ris", False, "report")]
    with month.ledger.read() as connection:
        details = connection.execute(select(labels.c.detail).order_by(labels.c.accession_number)).scalars().all()
    assert details == ["subdural hematoma", "no: hemorrhage"]
    assert "Doe" not in caplog.text


def test_a_table_may_have_answers_and_reports(month: Month, path: Path) -> None:
    path.write_text("accession,label,report,source\nA-1,0,Acute SDH.,ris\nA-2,,Acute SDH.,ris\nA-3,,,ris\n")
    done = import_labels(month.ledger, path, LATER)
    assert written(month.ledger) == [("A-1", "ris", False, "label"), ("A-2", "ris", True, "report")]
    assert done.bad == (BadLine(4, "neither label nor report says anything"),)


BAD = """accession,label,source
A-1,1,ris
A-2,maybe,ris
,1,ris
A-3,1,
A-4,,ris
A-5,1
12345678901234567,1,ris
A-6,1,ris
A-6,0,ris
"""


def test_bad_lines_are_left_out_and_told_with_their_number(month: Month, path: Path) -> None:
    path.write_text(BAD)
    done = import_labels(month.ledger, path, LATER)
    assert written(month.ledger) == [("A-1", "ris", True, "label")]
    told = {bad.line: bad.why for bad in done.bad}
    assert sorted(told) == [3, 4, 5, 6, 7, 8, 9, 10]
    assert "'maybe' is neither yes nor no" in told[3]
    assert "accession number is missing" in told[4]
    assert "source is missing" in told[5]
    assert "label is missing" in told[6]
    assert "2 cells where the first line names 3 columns" in told[7]
    assert "17 characters" in told[8]
    assert told[9] == told[10] == "lines 9, 10 contradict one another: same study, same source"


def test_the_line_of_a_report_over_several_lines_is_its_first(month: Month, path: Path) -> None:
    path.write_text('accession,report,source\nA-1,"No\nbleed\n",ris\nA-2,"No\nbleed",\n')
    assert [bad.line for bad in import_labels(month.ledger, path, LATER).bad] == [5]


def test_strict_refuses_all_of_a_file_with_a_bad_line(month: Month, path: Path) -> None:
    path.write_text(BAD)
    with pytest.raises(LabelError, match=r"line 3: the label 'maybe'.*and 3 more\. Nothing was imported"):
        import_labels(month.ledger, path, LATER, strict=True)
    assert written(month.ledger) == []


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no column accession"),
        (b"study,label,source\n1,1,ris\n", "no column accession"),
        (b"accession,label\nA-1,1\n", "no column source"),
        (b"accession,source\nA-1,ris\n", "no column label or report"),
        (b"accession,label,source\nA-1,1,B\xe4r\n", "line 2: not UTF-8"),
        (b"a\0b", "zero bytes"),
    ],
)
def test_a_file_that_is_no_table_of_labels_is_refused_with_the_reason(
    month: Month, path: Path, content: bytes, why: str
) -> None:
    path.write_bytes(content)
    with pytest.raises(LabelError, match=why):
        import_labels(month.ledger, path, LATER)


def test_a_file_that_is_not_there_is_refused(month: Month, path: Path) -> None:
    with pytest.raises(LabelError, match="No such file"):
        import_labels(month.ledger, path, LATER)


def test_a_quote_that_never_ends_is_a_bad_line(month: Month, path: Path) -> None:
    path.write_text('accession,label,source\nA-1,1,ris\nA-2,"1,ris\nA-3,1,ris\n')
    done = import_labels(month.ledger, path, LATER)
    assert [bad.line for bad in done.bad] == [3]
    assert written(month.ledger) == [("A-1", "ris", True, "label")]


def test_accession_numbers_that_herald_has_not_seen_are_kept_and_counted(month: Month, path: Path) -> None:
    path.write_text("accession,label,source\nA-1,1,ris\nB-9,1,ris\n")
    done = import_labels(month.ledger, path, LATER)
    assert (done.new, done.unknown) == (2, 1)
    month.triage(9, accession_number="B-9")
    with month.ledger.read() as connection:
        assert next(row for row in collect(connection, Config(), LATER) if row.accession_number == "B-9").labels


def test_a_dry_run_tells_the_same_and_writes_nothing(month: Month, path: Path) -> None:
    path.write_text(BAD)
    told = import_labels(month.ledger, path, LATER, dry_run=True)
    assert written(month.ledger) == []
    assert import_labels(month.ledger, path, LATER) == told


def test_progress_is_told_up_to_the_last_line(month: Month, path: Path) -> None:
    path.write_text("accession,label,source\n" + "".join(f"A-{number},1,ris\n" for number in range(1200)))
    told: list[tuple[int, int]] = []
    import_labels(month.ledger, path, LATER, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(500, 1200), (1000, 1200), (1200, 1200)]


def test_the_command_imports_tells_and_says_which_lines_are_bad(tmp_path: Path, path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    environment = {"HERALD_LEDGER__URL": url, "HERALD_CONFIG": str(tmp_path / "herald.toml")}
    (tmp_path / "herald.toml").write_text("")
    path.write_text("accession,label,source,date\nA-1,1,ris,x\nA-2,maybe,ris,x\n")
    done = CliRunner().invoke(app, ["label", "import", str(path), "--json"], env=environment)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["new"], told["unknown"], [bad["line"] for bad in told["bad"]]) == (1, 1, [3])
    again = CliRunner().invoke(app, ["label", "import", str(path)], env=environment)
    assert "1 unchanged" in again.stdout
    assert "line 3: the label 'maybe' is neither" in again.stderr
    assert "date" in again.stderr
    ledger = Ledger(LedgerConfig(url=url))
    assert written(ledger) == [("A-1", "ris", True, "label")]
    ledger.close()

"""From the tables of every service to rows of the validation record."""

import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update
from validation_ledger import NOON, Month, series_of, study_of

from herald.config import Config, NotifierConfig, PagingSite
from herald.events import Finding, Label
from herald.ledger import results, reviews
from herald.validation.collect import changed, collect
from herald.validation.row import GivenLabel, ValidationRow

LATER = NOON + timedelta(hours=3)


@pytest.fixture
def month(ledger_url: str) -> Iterator[Month]:
    with Month.opened(ledger_url) as month:
        yield month


def rows(month: Month, config: Config | None = None, now: datetime = LATER, **which: Any) -> list[ValidationRow]:
    with month.ledger.read() as connection:
        return list(collect(connection, config or Config(), now, **which))


def test_a_row_holds_everything_from_the_first_image_to_the_last_verdict(month: Month) -> None:
    at = month.receive(1, accession_number="A-1")
    given = month.triage(1, accession_number="A-1", acquired_at=NOON - timedelta(minutes=1), slice_thickness_mm=5.0)
    month.page(1, state="acknowledged", sent_at=at + timedelta(seconds=30), acknowledged_at=at + timedelta(minutes=4))
    month.review(1, "agree", "rita", at + timedelta(minutes=5), finding_kind="sah")
    month.label("A-1", True, "ris")
    month.adjudicate(1, True)
    config = Config(notifier=NotifierConfig(sites=(PagingSite(name="North", scanners=("CT-EAST",)),)))
    (row,) = rows(month, config)
    assert (row.study_instance_uid, row.series_instance_uid, row.revision) == (study_of(1), series_of(1), 1)
    assert (row.site, row.scanner, row.accession_number, row.superseded) == ("North", "CT-EAST", "A-1", False)
    assert row.acquired_at == NOON - timedelta(minutes=1)
    assert (row.first_image_at, row.closed_at) == (at, at + timedelta(seconds=12))
    assert (row.triaged_at, row.posted_at) == (given.occurred_at, given.occurred_at + timedelta(seconds=1))
    assert (row.paged_at, row.page_state, row.mode) == (at + timedelta(seconds=30), "acknowledged", "live")
    assert (row.acknowledged_at, row.read_at) == (at + timedelta(minutes=4), at + timedelta(minutes=5))
    assert (row.disposition, row.probability, row.slice_thickness_mm) == ("positive", 0.93, 5.0)
    assert row.protocol["kernel"] == Label("soft", 0.91)
    assert row.finding_probabilities["iph"] == 0.88
    assert row.finding_volumes_ml["iph"] == 11.4
    (reading,) = row.readings
    assert (reading.reader, reading.haemorrhage, reading.finding_kind) == ("rita", True, "sah")
    assert row.labels == (GivenLabel(source="ris", kind="label", haemorrhage=True),)
    assert row.adjudicated is True


@pytest.mark.parametrize(
    ("disposition", "action", "says"),
    [
        ("positive", "agree", True),
        ("positive", "disagree", False),
        ("negative", "agree", False),
        ("negative", "disagree", True),
        ("positive", "unsure", None),
        ("not_eligible", "agree", None),
        ("failed", "disagree", None),
    ],
)
def test_a_verdict_says_of_the_head_what_it_says_of_the_decision(
    month: Month, disposition: str, action: str, says: bool | None
) -> None:
    month.triage(1, disposition)
    month.review(1, action, "rita", LATER)
    (row,) = rows(month)
    assert row.readings[0].haemorrhage is says


def test_the_last_verdict_of_each_reader_counts_and_none_that_was_taken_back(month: Month) -> None:
    month.triage(1)
    minute = timedelta(minutes=1)
    month.review(1, "acknowledge", "rita", NOON)
    month.review(1, "agree", "rita", NOON + minute)
    month.review(1, "disagree", "rita", NOON + 2 * minute)
    month.review(1, "agree", "omar", NOON + 3 * minute)
    month.review(1, "unsure", "omar", NOON + 4 * minute, undone_at=NOON + 5 * minute)
    month.review(1, "agree", "zoe", NOON, undone_at=NOON + minute)
    (row,) = rows(month)
    assert [(reading.reader, reading.action) for reading in row.readings] == [("rita", "disagree"), ("omar", "agree")]
    assert row.read_at == NOON + minute
    assert row.needs_adjudication


def test_series_without_a_result_are_rows_once_they_are_complete_for_long_enough(month: Month) -> None:
    month.receive(1, closed=False)
    month.receive(2)
    closed = NOON + timedelta(seconds=12, minutes=2)
    assert rows(month, now=closed + timedelta(minutes=59)) == []
    (row,) = rows(month, now=closed + timedelta(minutes=60))
    assert (row.series_instance_uid, row.disposition, row.probability) == (series_of(2), "unfinished", None)
    assert (row.triaged_at, row.mode, row.scanner, row.close_reason) == (None, "shadow", "CT-EAST", "quiet")


def test_exclusions_are_rows_as_well_and_an_earlier_revision_is_superseded(month: Month) -> None:
    month.triage(1, "not_eligible")
    month.triage(2, "failed")
    month.triage(3, "negative")
    month.triage(3, "positive", revision=2)
    found = [(row.series_instance_uid, row.revision, row.disposition, row.superseded) for row in rows(month)]
    assert found == [
        (series_of(1), 1, "not_eligible", False),
        (series_of(2), 1, "failed", False),
        (series_of(3), 1, "negative", True),
        (series_of(3), 2, "positive", False),
    ]


@pytest.mark.parametrize("later", ["failed", "not_eligible", "unfinished"])
def test_a_later_revision_that_was_not_searched_takes_no_analysed_one_out_of_the_accuracy(
    month: Month, later: str
) -> None:
    month.triage(1, "failed")
    month.triage(1, "positive", revision=2)
    if later == "unfinished":
        month.receive(1, revision=3)
    else:
        month.triage(1, later, revision=3)
    found = [(row.revision, row.disposition, row.superseded) for row in rows(month)]
    assert found == [(1, "failed", True), (2, "positive", False), (3, later, False)]


@pytest.mark.parametrize(
    ("disposition", "reason", "kept"),
    [
        ("failed", "VolumeError: cannot read /store/DOE^JOHN/1.2.3.4.5.6.dcm", "VolumeError"),
        ("failed", "something without a class", "error"),
        ("not_eligible", "too few slices: 8, a head scan has at least 12 (router.min_slices)", None),
        ("negative", "kernel: bone kernel (0.61) from the pixels, the header says nothing", None),
        ("negative", "incomplete: 2 images left out, instance 1.2.3.4.5.6: DOE^JOHN", "incomplete: 2 images left out"),
        ("not_eligible", "odd 1.2.840.10008.5.1 in /data/x y", "odd UID in PATH y"),
    ],
)
def test_reasons_keep_our_own_words_only(month: Month, disposition: str, reason: str, kept: str | None) -> None:
    month.triage(1, disposition, reasons=(reason,))
    (row,) = rows(month)
    assert row.reasons == (kept or reason,)


@pytest.mark.parametrize("damaged", [{"disposition": "positive"}, {"revision": "first"}, ["no", "event"], "none"])
@pytest.mark.parametrize(
    ("disposition", "reason"),
    [("positive", "ValidationError: the stored event cannot be read"), ("failed", "ValidationError")],
)
def test_a_stored_event_that_cannot_be_read_costs_its_details_and_no_other_row(
    month: Month, caplog: pytest.LogCaptureFixture, damaged: Any, disposition: str, reason: str
) -> None:
    for i in (1, 2, 3):
        month.receive(i)
        month.triage(i, disposition=disposition)
    with month.ledger.begin() as connection:
        connection.execute(
            update(results).where(results.c.series_instance_uid == series_of(2)).values(event=damaged, probability=0.7)
        )
    first, second, third = rows(month)
    assert (first.disposition, third.disposition) == (disposition, disposition)
    assert (second.study_instance_uid, second.series_instance_uid) == (study_of(2), series_of(2))
    assert (second.disposition, second.probability) == (disposition, 0.7)
    assert second.reasons == (reason,)
    assert second.triaged_at is not None
    (record,) = caplog.records
    assert series_of(2) in record.getMessage()
    assert "mend the event" in record.getMessage()


def test_a_row_has_the_newest_label_of_each_source_and_the_newest_adjudication(month: Month) -> None:
    month.triage(1, accession_number="A-1")
    month.label("A-1", True, "ris", superseded_at=LATER)
    month.label("A-1", False, "ris")
    month.label("A-1", True, "follow-up", kind="report")
    month.label("A-2", True, "ris")
    month.adjudicate(1, False)
    month.adjudicate(1, True)
    (row,) = rows(month)
    assert row.labels == (
        GivenLabel(source="follow-up", kind="report", haemorrhage=True),
        GivenLabel(source="ris", kind="label", haemorrhage=False),
    )
    assert row.adjudicated is True


def test_studies_without_an_accession_number_share_no_label(month: Month) -> None:
    month.triage(1, accession_number="")
    month.label("", True, "ris")
    (row,) = rows(month)
    assert row.labels == ()


def test_the_rows_of_some_series_are_those_of_all(month: Month) -> None:
    for number in range(1, 6):
        month.receive(number)
        month.triage(number)
    some = [series_of(2), series_of(4), "1.2.3"]
    assert rows(month, series_instance_uids=some) == [row for row in rows(month) if row.series_instance_uid in some]


def change_review(month: Month) -> None:
    month.review(1, "agree", "rita", LATER)


def change_undone(month: Month) -> None:
    with month.ledger.begin() as connection:
        connection.execute(update(reviews).where(reviews.c.reader == "omar").values(undone_at=LATER))


def change_label(month: Month) -> None:
    month.label("A-1", True, "ris", imported_at=LATER)


def change_page(month: Month) -> None:
    month.page(1, state="exhausted", due_at=NOON, sent_at=LATER)


def change_adjudication(month: Month) -> None:
    month.adjudicate(1, True, LATER)


def change_result(month: Month) -> None:
    month.triage(1, revision=2, occurred_at=LATER)


CHANGES = [change_review, change_undone, change_label, change_page, change_adjudication, change_result]


@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
def test_a_look_finds_what_has_changed_and_nothing_else(month: Month, change: Any) -> None:
    since = LATER - timedelta(minutes=1)
    for number in (1, 2):
        month.receive(number, accession_number=f"A-{number}")
        month.triage(number, accession_number=f"A-{number}")
        month.review(number, "disagree", "omar" if number == 1 else "zoe", NOON)
    with month.ledger.read() as connection:
        assert changed(connection, Config(), since, LATER) == set()
    change(month)
    with month.ledger.read() as connection:
        assert changed(connection, Config(), since, LATER) == {series_of(1)}


def test_a_look_finds_a_series_at_the_time_that_it_becomes_unfinished(month: Month) -> None:
    month.receive(1)
    due = NOON + timedelta(seconds=12, minutes=61)
    for minutes, expected in ((-1, set()), (1, {series_of(1)}), (200, set())):
        now = due + timedelta(minutes=minutes)
        with month.ledger.read() as connection:
            assert changed(connection, Config(), now - timedelta(minutes=1.5), now) == expected


def test_ten_thousand_rows_take_few_statements_and_seconds(tmp_path: Path) -> None:
    with Month.opened(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as month:
        month.fill(10_000)
        statements = []
        event.listen(month.ledger.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
        started = time.process_time()
        found = rows(month)
        assert time.process_time() - started < 15
        assert len(found) == 10_000
        assert len([s for s in statements if s.lower().startswith("select")]) < 10_000 / 50


def test_the_fields_of_an_event_reach_the_row_unchanged(month: Month) -> None:
    given = month.triage(
        1,
        convolution_kernel="H30s",
        tissue_hounsfield=31.5,
        noise_hounsfield=3.25,
        pixel_spacing_mm=0.45,
        config_version="0123456789ab",
        findings=(Finding("any", 0.5, 1.5, 3, "1.2"),),
    )
    (row,) = rows(month)
    same = ("convolution_kernel", "tissue_hounsfield", "noise_hounsfield", "pixel_spacing_mm", "config_version")
    same += ("header", "disagreements", "protocol", "model_versions", "software_version", "slice_count", "modality")
    assert [getattr(row, name) for name in same] == [getattr(given, name) for name in same]

"""The record that is only added to, and how it shows that somebody did otherwise."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, delete, select, text, update
from validation_ledger import NOON, Month, series_of

from herald.config import Config, LedgerConfig
from herald.errors import LedgerError
from herald.ledger import Ledger, validation
from herald.validation import chain
from herald.validation.collect import collect
from herald.validation.row import GivenLabel, ValidationRow

LATER = NOON + timedelta(hours=3)


@pytest.fixture
def month(ledger_url: str) -> Iterator[Month]:
    with Month.opened(ledger_url) as month:
        yield month


def row(number: int, **values: Any) -> ValidationRow:
    given: dict[str, Any] = {"disposition": "negative", "first_image_at": NOON + timedelta(minutes=number)}
    return ValidationRow(
        study_instance_uid="1.2", series_instance_uid=series_of(number), **{"revision": 1, **given, **values}
    )


def newest(ledger: Ledger, *between: Any) -> list[ValidationRow]:
    with ledger.read() as connection:
        return chain.latest(connection, *between)


def tamper(ledger: Ledger, *statements: Any) -> None:
    """Change the table as somebody with rights on the database could."""
    with ledger.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("alter table validation disable trigger all"))
        else:
            connection.execute(text("drop trigger validation_no_update"))
            connection.execute(text("drop trigger validation_no_delete"))
        for statement in statements:
            connection.execute(statement)


def of(entry: int) -> Any:
    return update(validation).where(validation.c.entry == entry)


def test_a_row_is_written_once_and_again_when_it_says_something_new(month: Month) -> None:
    assert chain.append(month.ledger, [row(1), row(2)], LATER) == 2
    assert chain.append(month.ledger, [row(1), row(2)], LATER) == 0
    assert chain.append(month.ledger, [row(1, uncertain=True), row(2)], LATER) == 1
    assert newest(month.ledger) == [row(1, uncertain=True), row(2)]
    with month.ledger.read() as connection:
        kept = connection.execute(select(validation.c.entry, validation.c.series_instance_uid)).all()
    assert sorted(kept) == [(1, series_of(1)), (2, series_of(2)), (3, series_of(1))]
    assert chain.verify(month.ledger).fault is None


def test_every_row_comes_back_from_the_record_exactly(month: Month) -> None:
    month.receive(1)
    month.receive(2)
    month.triage(1, accession_number="A-1", acquired_at=NOON)
    month.review(1, "disagree", "rita", LATER, finding_kind="sah")
    month.page(1, state="sent", sent_at=LATER)
    month.label("A-1", False, "ris")
    month.triage(3, "not_eligible")
    with month.ledger.read() as connection:
        rows = list(collect(connection, Config(), LATER))
    assert len(rows) == 3
    assert chain.append(month.ledger, rows, LATER) == 3
    assert newest(month.ledger) == rows


@given(
    values=st.fixed_dictionaries(
        {
            "probability": st.none() | st.floats(0, 1),
            "finding_volumes_ml": st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
            "scanner": st.text(max_size=16),
            "reasons": st.lists(st.text(max_size=20), max_size=3).map(tuple),
            "acquired_at": st.none() | st.datetimes().map(lambda at: at.replace(tzinfo=NOON.tzinfo)),
            "labels": st.lists(
                st.builds(GivenLabel, source=st.text(max_size=5), kind=st.just("label"), haemorrhage=st.booleans()),
                max_size=2,
            ).map(tuple),
        }
    )
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_row_holds_decodes_to_the_same(values: dict[str, Any]) -> None:
    values["finding_volumes_ml"] = {k: v for k, v in values["finding_volumes_ml"].items() if abs(v) < 1e300}
    given = row(1, **values)
    assert chain.decode(chain.encode(given)) == given


def test_canonical_json_has_sorted_keys_no_blanks_and_times_in_utc() -> None:
    body = chain.encode(row(1, scanner="CT 1", model_versions={"b": "1", "a": "2"}))
    assert '"first_image_at":"2026-03-29T12:01:00.123456Z"' in body
    assert '"model_versions":{"a":"2","b":"1"}' in body
    assert body.index('"accession_number"') < body.index('"revision"') < body.index('"uncertain"')
    assert " " not in body.replace("CT 1", "")


def test_an_entry_of_an_older_version_is_read_with_defaults_and_not_written_again(month: Month) -> None:
    body = chain.encode(row(1)).replace('"noise_hounsfield":null,', "").replace("{", '{"of_old":1,', 1)
    with month.ledger.begin() as connection:
        entry = {"series_instance_uid": series_of(1), "revision": 1, "written_at": LATER, "row": body}
        sha256 = chain.digest(1, LATER, body, chain.START)
        connection.execute(validation.insert().values(entry=1, **entry, previous_sha256=chain.START, sha256=sha256))
    assert chain.append(month.ledger, [row(1)], LATER) == 0
    assert chain.verify(month.ledger) == chain.Verification(1, sha256)


def test_the_mode_of_a_row_without_a_page_stays_what_it_was_when_it_was_written(month: Month) -> None:
    chain.append(month.ledger, [row(1, mode="shadow"), row(2, mode="shadow")], LATER)
    assert chain.append(month.ledger, [row(1, mode="live"), row(2, mode="live", page_state="sent")], LATER) == 1
    assert [one.mode for one in newest(month.ledger)] == ["shadow", "live"]


def test_the_newest_rows_between_two_times_are_those_whose_first_image_came_between(month: Month) -> None:
    late = row(9, first_image_at=None, triaged_at=NOON + timedelta(minutes=3))
    chain.append(month.ledger, [row(4), row(3), row(2), row(1), late], LATER)
    between = newest(month.ledger, NOON + timedelta(minutes=2), NOON + timedelta(minutes=4))
    assert between == [row(2), row(3), late]


def test_rows_are_read_back_in_a_transaction_or_not_at_all(month: Month) -> None:
    def rows() -> Iterator[ValidationRow]:
        yield row(1)
        raise LedgerError("the ledger went away")

    with pytest.raises(LedgerError):
        chain.append(month.ledger, rows(), LATER)
    assert newest(month.ledger) == []


@pytest.mark.parametrize("statement", [of(1).values(row="{}"), delete(validation)], ids=["update", "delete"])
def test_the_database_refuses_to_change_or_delete_an_entry(month: Month, statement: Any) -> None:
    chain.append(month.ledger, [row(1)], LATER)
    with pytest.raises(LedgerError, match="append-only"), month.ledger.begin() as connection:
        connection.execute(statement)
    assert newest(month.ledger) == [row(1)]


CHANGED = chain.encode(row(3, disposition="positive"))


@pytest.mark.parametrize(
    ("statements", "entry", "why"),
    [
        ([of(3).values(row=CHANGED)], 3, "was changed after it was written"),
        ([of(3).values(written_at=NOON)], 3, "was changed after it was written"),
        ([of(3).values(sha256="0" * 64)], 3, "was changed after it was written"),
        ([of(3).values(previous_sha256="0" * 64)], 3, "removed or put in another order"),
        ([of(3).values(revision=2)], 3, "its columns name another series revision"),
        ([delete(validation).where(validation.c.entry == 3)], 3, "entries were removed"),
        ([delete(validation).where(validation.c.entry <= 2)], 1, "entries were removed"),
        ([of(3).values(entry=0)], 1, "stands where none can be"),
        (
            [delete(validation).where(validation.c.entry == 3), of(4).values(entry=3), of(5).values(entry=4)],
            3,
            "removed or put in another order",
        ),
        ([of(3).values(entry=99), of(4).values(entry=3), of(99).values(entry=4)], 3, "put in another order"),
    ],
    ids=["row", "time", "hash", "link", "columns", "gap", "start", "zero", "renumbered", "swapped"],
)
def test_tampering_shows_at_the_first_entry_that_is_wrong(
    month: Month, statements: list[Any], entry: int, why: str
) -> None:
    chain.append(month.ledger, [row(number) for number in range(1, 6)], LATER)
    tamper(month.ledger, *statements)
    found = chain.verify(month.ledger)
    assert found.fault is not None
    assert found.fault.entry == entry
    assert why in found.fault.why
    assert found.entries == entry - 1


def forge(connection: Connection, entry: int, body: str) -> None:
    """Replace an entry together with its hash."""
    where = validation.c.entry == entry
    old = connection.execute(select(validation).where(where)).mappings().one()
    sha256 = chain.digest(entry, old["written_at"], body, old["previous_sha256"])
    connection.execute(update(validation).where(where).values(row=body, sha256=sha256))


def test_an_entry_that_was_replaced_with_its_hash_breaks_the_link_of_the_next(month: Month) -> None:
    chain.append(month.ledger, [row(number) for number in range(1, 6)], LATER)
    tamper(month.ledger)
    with month.ledger.begin() as connection:
        forge(connection, 3, CHANGED)
    found = chain.verify(month.ledger)
    assert found.fault is not None
    assert found.fault.entry == 4
    assert "does not follow from the entry before" in found.fault.why


def test_an_entry_that_is_no_row_is_a_fault_and_no_error(month: Month) -> None:
    chain.append(month.ledger, [row(1)], LATER)
    tamper(month.ledger)
    with month.ledger.begin() as connection:
        forge(connection, 1, "[1]")
    found = chain.verify(month.ledger)
    assert found.fault is not None
    assert "none of the validation record" in found.fault.why


def test_a_last_entry_that_was_written_down_shows_that_the_end_was_cut_off(month: Month) -> None:
    chain.append(month.ledger, [row(number) for number in range(1, 6)], LATER)
    noted = chain.verify(month.ledger)
    assert (noted.entries, noted.fault) == (5, None)
    chain.append(month.ledger, [row(6)], LATER)
    assert chain.verify(month.ledger, noted.head_sha256, noted.entries).fault is None
    tamper(month.ledger, delete(validation).where(validation.c.entry >= 5))
    assert chain.verify(month.ledger) == chain.Verification(4, chain.verify(month.ledger).head_sha256)
    for head, entries in ((noted.head_sha256, 5), (noted.head_sha256, None), ("", 5)):
        found = chain.verify(month.ledger, head, entries)
        assert found.fault is not None
        assert "cut off" in found.fault.why


def test_a_last_entry_that_was_written_down_shows_that_the_record_was_made_anew(month: Month) -> None:
    chain.append(month.ledger, [row(1), row(2)], LATER)
    noted = chain.verify(month.ledger)
    tamper(month.ledger, delete(validation))
    chain.append(month.ledger, [row(1), row(2, uncertain=True), row(3)], LATER)
    assert chain.verify(month.ledger).fault is None
    found = chain.verify(month.ledger, noted.head_sha256, noted.entries)
    assert found.fault is not None
    assert found.fault.entry == 2
    assert "made anew" in found.fault.why


def test_an_empty_record_holds(month: Month) -> None:
    assert chain.verify(month.ledger) == chain.Verification(0, chain.START)


def test_many_writers_at_once_make_one_chain_without_gaps(month: Month, ledger_url: str) -> None:
    errors: list[BaseException] = []
    ready = threading.Barrier(4)

    def write(writer: int) -> None:
        ledger = Ledger(LedgerConfig(url=ledger_url))
        try:
            ready.wait(30)
            for number in range(5):
                rows = [row(100 * writer + 10 * number + i) for i in range(3)]
                chain.append(ledger, [*rows, row(1, probability=writer / 10 + number / 100)], LATER)
        except BaseException as error:
            errors.append(error)
        finally:
            ledger.close()

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    found = chain.verify(month.ledger)
    assert found.fault is None
    assert found.entries == 80
    assert len(newest(month.ledger)) == 61


def test_a_row_that_two_writers_bring_is_written_once(month: Month, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = chain._lock

    def late(connection: Connection) -> None:
        monkeypatch.setattr(chain, "_lock", lock)
        chain.append(month.ledger, [row(1)], LATER)  # somebody else is faster after we looked
        lock(connection)

    monkeypatch.setattr(chain, "_lock", late)
    assert chain.append(month.ledger, [replace(row(1))], LATER) == 0
    assert chain.verify(month.ledger).entries == 1

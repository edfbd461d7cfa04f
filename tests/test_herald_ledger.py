"""The ledger, on SQLite and on a real PostgreSQL, with the statements of the receiver."""

import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from receiver_fakes import ListBus, Receiver, config_under, ct_series, send_all
from sqlalchemy import Connection, inspect, select, text, update

from herald.config import LedgerConfig
from herald.errors import ConfigError, LedgerError
from herald.instance import InstanceHeader
from herald.ledger import Ledger, instances, metadata, open_ledger, rejections, removals, series
from herald.store import StoredInstance
from receiver.record import (
    Arrival,
    Recorder,
    Rejection,
    close_series,
    mark_published,
    open_series,
    record_instances,
    record_rejection,
    still_open,
    unpublished,
)
from receiver.statuses import StoreStatus

KEY = ("1.2.3", "1.2.3.4")
NOON = datetime(2026, 3, 29, 12, 0, 0, 123456, tzinfo=UTC)


def arrival(uid: str = "1.1", new: bool = True, at: datetime = NOON, sha256: str = "ab" * 32) -> Arrival:
    header = InstanceHeader("1.2", uid, *KEY, "1.2.840.10008.1.2.1", "A-1", "CT", "CT-EAST", True, None)
    stored = StoredInstance(Path(f"/store/{uid}.dcm"), 1000, new=new, conflict=False)
    stored.__dict__["sha256"] = sha256  # there is no file to take it of
    return Arrival(header, stored, f"1.2.3/1.2.3.4/{uid}.dcm", "CT1", "10.0.0.1", at)


def opened(connection: Connection, first: Arrival) -> None:
    record_instances(connection, [first])
    open_series(connection, KEY, first.header, first.calling_ae_title, first.received_at)


def test_tables_are_created_once_whoever_comes_first(ledger_url: str) -> None:
    config, errors = LedgerConfig(url=ledger_url), []

    def create() -> None:
        try:
            open_ledger(config).close()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    ledger = open_ledger(config)
    assert set(inspect(ledger.engine).get_table_names()) == set(metadata.tables)
    ledger.close()


def make_old(url: str) -> None:
    """Make the ledger one of an earlier version, with a row: without the columns that came since."""
    ledger = open_ledger(LedgerConfig(url=url))
    with ledger.begin() as connection:
        opened(connection, arrival())
        for table, columns in SINCE.items():
            for column in columns:
                connection.execute(text(f"alter table {table} drop column {column}"))
        connection.execute(text("drop table removals"))
    ledger.close()


SINCE = {"instances": ("removed_at",), "series": ("settle_s", "largest_gap_s"), "pages": ("made_at",)}


def columns_of(url: str, table: str) -> set[str]:
    ledger = Ledger(LedgerConfig(url=url))
    found = {column["name"] for column in inspect(ledger.engine).get_columns(table)}
    ledger.close()
    return found


def test_an_old_ledger_gets_the_columns_that_came_since_and_keeps_its_rows(ledger_url: str) -> None:
    make_old(ledger_url)
    assert not columns_of(ledger_url, "instances") & set(SINCE["instances"])
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    with ledger.begin() as connection:
        (row,) = connection.execute(select(instances)).mappings()
        assert (row["sop_instance_uid"], row["received_at"], row["removed_at"]) == ("1.1", NOON, None)
        (row,) = connection.execute(select(series)).mappings()
        assert (row["series_instance_uid"], row["settle_s"], row["largest_gap_s"]) == ("1.2.3.4", None, None)
        connection.execute(update(instances).values(removed_at=NOON))
        assert connection.execute(select(instances.c.removed_at)).scalar_one() == NOON
        assert connection.execute(select(removals)).all() == []
    ledger.close()


OPEN = """
import sys
from herald.config import LedgerConfig
from herald.ledger import open_ledger
print("ready", flush=True)
sys.stdin.readline()
open_ledger(LedgerConfig(url=sys.argv[1])).close()
"""


def test_several_processes_open_an_old_ledger_at_the_same_time(ledger_url: str) -> None:
    make_old(ledger_url)
    command = [sys.executable, "-c", OPEN, ledger_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60.0)
        assert process.returncode == 0, errors
    for table, columns in SINCE.items():
        assert set(columns) <= columns_of(ledger_url, table)


def test_a_complete_ledger_is_opened_while_somebody_writes_to_it(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    with ledger.begin() as connection:
        record_instances(connection, [arrival()])
        open_ledger(LedgerConfig(url=ledger_url)).close()  # would wait for the lock of the writer
    ledger.close()


def test_times_come_back_in_utc_to_the_microsecond(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    in_bern = NOON.astimezone(timezone(timedelta(hours=2)))
    with ledger.begin() as connection:
        record_instances(connection, [arrival(at=in_bern)])
    with ledger.read() as connection:
        received_at = connection.execute(select(instances.c.received_at)).scalar_one()
    assert received_at == NOON
    assert received_at.tzinfo is UTC
    ledger.close()


def test_a_time_without_zone_is_refused(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    with pytest.raises(LedgerError, match="without a zone"), ledger.begin() as connection:
        record_instances(connection, [arrival(at=datetime(2026, 1, 1))])
    ledger.close()


def test_a_failed_transaction_leaves_nothing(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))

    def half() -> None:
        with ledger.begin() as connection:
            record_instances(connection, [arrival()])
            connection.execute(text("insert into no_such_table values (1)"))

    with pytest.raises(LedgerError):
        half()
    with ledger.read() as connection:
        assert connection.execute(select(instances)).all() == []
    ledger.close()


def test_a_database_that_is_not_there_is_a_retriable_ledger_error(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/none/ledger.sqlite", "postgresql+psycopg://herald:secret@127.0.0.1:1/herald"):
        with pytest.raises(LedgerError, match=r"check ledger\.url") as caught:
            open_ledger(LedgerConfig(url=url))
        assert caught.value.retriable
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["no url", "nosuch://host/herald"])
def test_an_address_that_is_none_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigError, match=r"ledger\.url"):
        open_ledger(LedgerConfig(url=url))


def test_a_series_opens_closes_and_is_published_as_the_next_revision_each_time(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    later = NOON + timedelta(seconds=5)
    with ledger.begin() as connection:
        opened(connection, arrival("1.1"))
        opened(connection, arrival("1.2", at=later))  # already open: no second revision
        assert still_open(connection) == [KEY]
        first = close_series(connection, KEY, "quiet", later)
        assert first is not None
        assert close_series(connection, KEY, "quiet", later) is None
        assert (first.revision, first.instance_count, first.close_reason) == (1, 2, "quiet")
        assert (first.first_image_at, first.last_image_at, first.occurred_at) == (NOON, later, later)
        assert (first.scanner, first.accession_number, first.modality) == ("CT-EAST", "A-1", "CT")
        assert unpublished(connection) == [first]
        mark_published(connection, first, later)
        assert unpublished(connection) == []
        opened(connection, arrival("1.3", at=later))
        second = close_series(connection, KEY, "quiet", later)
        assert second is not None
        assert (second.revision, second.instance_count, second.first_image_at) == (2, 3, later)
        assert unpublished(connection) == [second]
    ledger.close()


def test_copies_are_counted_and_a_lost_row_is_made_again(ledger_url: str) -> None:
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    with ledger.begin() as connection:
        record_instances(connection, [arrival("1.1")])
        record_instances(connection, [arrival("1.1", new=False)])
        record_instances(connection, [arrival("1.2", new=False)])
        rows = connection.execute(select(instances.c.sop_instance_uid, instances.c.copies)).all()
    assert sorted(rows) == [("1.1", 2), ("1.2", 1)]
    ledger.close()


def test_an_impossible_statement_does_not_hold_up_the_others(ledger_url: str, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(LedgerConfig(url=ledger_url))
    rejection = Rejection(NOON, "CT1", "10.0.0.1", "1.1", StoreStatus.CANNOT_DECODE, "why")
    done = [recorder.submit(lambda c: record_rejection(c, rejection)) for _ in range(3)]
    bad = recorder.submit(lambda c: record_rejection(c, replace(rejection, error=None)))  # type: ignore[arg-type]
    done += [recorder.submit(lambda c: record_rejection(c, rejection)) for _ in range(3)]
    recorder.start()
    for future in done:
        future.result(10.0)
    assert bad.exception(10.0) is not None
    recorder.stop(10.0)
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    with ledger.read() as connection:
        assert len(connection.execute(select(rejections)).all()) == 6
    ledger.close()
    assert "refuses a statement for good" in caplog.text


def test_the_receiver_runs_on_either_database(tmp_path: Path, ledger_url: str) -> None:
    config = replace(config_under(tmp_path), ledger=LedgerConfig(url=ledger_url))
    receiver = Receiver(config, ListBus())
    receiver.start()
    try:
        assert send_all(receiver.port, ct_series(8)) == [0] * 8
        (event,) = receiver.bus.wait_for(1)
        assert event.instance_count == 8
    finally:
        receiver.stop()
    ledger = open_ledger(config.ledger)
    with ledger.read() as connection:
        assert len(connection.execute(select(instances)).all()) == 8
        (row,) = connection.execute(select(series)).mappings()
        assert row["published_at"] >= row["closed_at"] >= row["last_image_at"] > row["first_image_at"]
    ledger.close()

"""The thread that writes the validation record: it keeps up, waits out an outage, and may be killed at any moment."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update
from validation_ledger import NOON, Month, series_of
from webui_site import open_site

from herald.config import Config
from herald.errors import LedgerError
from herald.events import utc_now
from herald.ledger import Ledger, pages
from herald.validation import chain
from herald.validation.collect import collect
from webui import recorder as recording
from webui.recorder import ValidationRecorder
from webui.service import serve


@pytest.fixture
def month(tmp_path: Path) -> Iterator[Month]:
    with Month.opened(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as month:
        yield month


def recorded(ledger: Ledger) -> list[Any]:
    with ledger.read() as connection:
        return chain.latest(connection)


def known(ledger: Ledger) -> list[Any]:
    with ledger.read() as connection:
        return list(collect(connection, Config(), utc_now()))


def same(ledger: Ledger) -> bool:
    return {chain.encode(row) for row in recorded(ledger)} == {chain.encode(row) for row in known(ledger)}


def test_a_look_records_what_has_changed_and_writes_nothing_when_nothing_has(month: Month) -> None:
    stop = threading.Event()
    recorder = ValidationRecorder(month.ledger, Config())
    for number in range(1, 4):
        month.triage(number)
    assert recorder.catch_up(stop) == 3
    now = utc_now()
    assert recorder.look(now, stop) == 0
    month.review(2, "disagree", "rita", now + timedelta(seconds=1))
    month.triage(4, occurred_at=now + timedelta(seconds=1))
    assert recorder.look(now, stop) == 2
    assert recorder.look(now, stop) == 0
    assert same(month.ledger)
    assert chain.verify(month.ledger).entries == 5


def test_a_page_that_ends_without_a_time_is_found_by_the_look_after(month: Month) -> None:
    stop = threading.Event()
    recorder = ValidationRecorder(month.ledger, Config())
    month.triage(1)
    month.page(1, state="sent", sent_at=NOON)
    recorder.catch_up(stop)
    recorder.look(utc_now(), stop)
    with month.ledger.begin() as connection:
        connection.execute(update(pages).values(state="exhausted"))
    assert recorder.look(utc_now(), stop) == 1
    assert recorded(month.ledger)[0].page_state == "exhausted"


def test_the_record_waits_out_an_outage_of_the_ledger_and_catches_up(
    month: Month, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "RETRY_S", 0.01)
    monkeypatch.setattr(recording, "LOOK_S", 0.01)
    refused, written, stop = threading.Event(), threading.Event(), threading.Event()
    down = threading.Event()
    down.set()
    append = chain.append

    def watched(*given: Any) -> int:
        if down.is_set():
            refused.set()
            raise LedgerError("the ledger is down for this test")
        count = append(*given)
        written.set()
        return count

    monkeypatch.setattr(recording, "append", watched)
    month.triage(1)
    with caplog.at_level("INFO"):
        thread = threading.Thread(target=ValidationRecorder(month.ledger, Config()).run, args=(stop,))
        thread.start()
        try:
            assert refused.wait(10)
            assert not written.is_set()
            down.clear()
            assert written.wait(10)
        finally:
            stop.set()
            thread.join()
    assert same(month.ledger)
    assert len(recorded(month.ledger)) == 1
    assert caplog.text.count("waits for the ledger") == 1


def test_an_error_that_nobody_foresaw_is_logged_and_the_record_goes_on(
    month: Month, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "RETRY_S", 0.0)
    stop = threading.Event()
    recorder = ValidationRecorder(month.ledger, Config())
    tries = iter([1, 0])

    def breaks_once(_: threading.Event) -> int:
        if next(tries):
            raise ZeroDivisionError
        stop.set()
        return 0

    monkeypatch.setattr(recorder, "catch_up", breaks_once)
    recorder.run(stop)
    assert "could not be written; it is tried again" in caplog.text


WRITER = """
import sys, threading
from herald.config import Config, LedgerConfig
from herald.ledger import Ledger, pages
from herald.validation import chain
from webui import recorder

written = chain._write
def told(connection, rows, now):
    written(connection, rows, now)
    print("in a transaction", flush=True)
chain._write = told
recorder.AT_ONCE = 7
recorder.ValidationRecorder(Ledger(LedgerConfig(url=sys.argv[1])), Config()).run(threading.Event())
"""


def test_a_recorder_that_is_killed_leaves_a_whole_record_and_the_next_one_catches_up(month: Month) -> None:
    month.fill(150)
    committed = 0
    for transactions in (1, 2, 5):
        command = [sys.executable, "-c", WRITER, str(month.ledger.engine.url)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(transactions):
                assert process.stdout.readline() == "in a transaction\n"
            process.kill()  # before or after the commit, as it happens
        found = chain.verify(month.ledger)
        assert found.fault is None
        committed += transactions - 1
        assert found.entries % 7 == 0
        assert 7 * committed <= found.entries < 150
    assert ValidationRecorder(month.ledger, Config()).catch_up(threading.Event()) == 150 - found.entries
    assert same(month.ledger)
    assert chain.verify(month.ledger).fault is None


def test_the_web_ui_keeps_the_record_while_it_runs(tmp_path: Path) -> None:
    with open_site(tmp_path, port=0) as site:
        event = site.add(1)
        stop, written = threading.Event(), threading.Event()
        append = chain.append

        def watched(*given: Any) -> int:
            count = append(*given)
            written.set()
            return count

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recording, "append", watched)
            thread = threading.Thread(target=serve, args=(site.config, stop))
            thread.start()
            try:
                assert written.wait(30)
            finally:
                stop.set()
                thread.join()
        assert [row.series_instance_uid for row in recorded(site.ledger)] == [event.series_instance_uid]
        assert series_of(1) == event.series_instance_uid

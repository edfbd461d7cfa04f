import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import requests
from webui_site import PASSWORD, open_site, served, triaged

from herald.config import LedgerConfig
from herald.errors import LedgerError
from herald.ledger import Ledger, open_ledger, series
from webui import live, record, users
from webui.live import Live


class Looked:
    """A ledger that changes when the test says so."""

    def __init__(self) -> None:
        self.version, self.looks, self.down = "a", 0, False
        self.threads: set[str] = set()
        self.looked = threading.Event()

    def __call__(self) -> str:
        self.looks += 1
        self.threads.add(f"{threading.current_thread().name} {threading.get_ident()}")
        self.looked.set()
        if self.down:
            raise LedgerError("the ledger is down for this test")
        return self.version


@pytest.fixture
def looked(monkeypatch) -> Looked:
    monkeypatch.setattr(live, "LOOK_S", 0.01)
    return Looked()


@pytest.fixture
def watched(looked):
    watched = Live(looked)
    yield watched
    watched.stop()


def messages(watched, stream, seen="", may_go_on=lambda: True, is_gone=lambda: False):
    return (m for m in watched.messages(stream, seen, may_go_on, is_gone) if not m.startswith("retry"))


def test_every_stream_is_told_of_a_change_and_one_thread_looks_for_all(watched, looked):
    told = [messages(watched, watched.open(f"reader {number}")) for number in range(5)]
    assert [next(of) for of in told] == ["id: a\ndata: changed\n\n"] * 5
    looked.version = "b"
    assert [next(of) for of in told] == ["id: b\ndata: changed\n\n"] * 5
    assert len(looked.threads) == 1


def test_a_browser_that_comes_back_is_not_told_what_it_has_seen(watched, looked, monkeypatch):
    monkeypatch.setattr(live, "KEEP_ALIVE_S", 0.0)
    monkeypatch.setattr(live, "NOTICE_S", 0.05)
    told = messages(watched, watched.open("rita"), seen="a")
    assert next(told) == ": still here\n\n"
    looked.version = "b"
    assert "id: b\ndata: changed\n\n" in [next(told) for _ in range(50)]


def test_nobody_looks_while_no_worklist_is_open(watched, looked):
    stream = watched.open("rita")
    assert looked.looked.wait(5)
    watched.close(stream)
    for thread in threading.enumerate():
        if thread.name == "worklist":
            thread.join(5)
    looks = looked.looks
    assert not looked.looked.clear()
    assert not looked.looked.wait(0.1)
    assert looked.looks == looks
    watched.open("rita")
    assert looked.looked.wait(5)


def test_a_ledger_that_answers_slowly_is_asked_less_often(looked, monkeypatch):
    times = []

    def slow() -> str:
        times.append(time.monotonic())
        time.sleep(0.02)
        looked.looked.set() if len(times) == 3 else None
        return "a"

    watched = Live(slow)
    watched.open("rita")
    assert looked.looked.wait(10)
    watched.stop()
    assert min(after - before for before, after in pairwise(times)) >= 0.02 / live.MOST_LOOKING


def test_streams_go_on_when_the_ledger_was_down(watched, looked, caplog):
    looked.down = True
    stream = watched.open("rita")
    assert looked.looked.wait(5)
    looked.down = False
    assert next(messages(watched, stream)) == "id: a\ndata: changed\n\n"
    assert caplog.text.count("open worklists are not told of changes") == 1


def test_there_are_only_so_many_streams_and_a_closed_one_makes_room(watched, monkeypatch):
    monkeypatch.setattr(live, "MOST_STREAMS", 2)
    first = watched.open("rita")
    assert watched.open("rita")
    assert watched.open("remi") is None
    watched.close(first)
    watched.close(first)
    assert watched.open("remi")
    assert watched.open_streams == 2


@pytest.mark.parametrize("end", ["stop", "log-out", "may not go on", "gone", "lasts"])
def test_a_stream_ends(watched, looked, monkeypatch, end):
    good, here = [True], [True]
    stream, other = watched.open("rita"), watched.open("remi")
    told = messages(watched, stream, may_go_on=lambda: good[0], is_gone=lambda: not here[0])
    assert next(told)
    if end == "stop":
        watched.stop()
        assert watched.open("rita") is None
    elif end == "log-out":
        watched.close_all_of("rita")
        assert next(messages(watched, other))
    elif end == "may not go on":
        good[0] = False
        looked.version = "b"  # what has changed is not told either
    elif end == "gone":
        here[0] = False
    else:
        monkeypatch.setattr(live, "LASTS_S", 0.0)
    assert list(told) == []


# --- what counts as a change ---


def change(ledger: Ledger, kind: str) -> None:
    event = triaged(1)
    if kind == "result":
        record.upsert_result(ledger, triaged(2))
    elif kind == "result again":
        record.upsert_result(ledger, replace(event, disposition="negative", findings=event.findings[1:]))
    elif kind == "revision":
        record.upsert_result(ledger, replace(event, revision=2))
    elif kind in ("acknowledge", "agree"):
        kept = record.find_result(ledger, event.series_instance_uid, 1)
        record.add_review(ledger, kept.event, kind, "rita", prediction_shown=True)
    elif kind == "undo":
        record.undo_verdict(ledger, event, "remi")
    else:
        column, _, value = kind.partition("=")
        with ledger.begin() as connection:
            connection.execute(series.update().values({column: int(value) if value else event.last_image_at}))


@pytest.fixture
def ledger(ledger_url):
    ledger = open_ledger(LedgerConfig(url=ledger_url))
    event = triaged(1)
    record.upsert_result(ledger, event)
    record.add_review(ledger, event, "unsure", "remi", prediction_shown=True)
    with ledger.begin() as connection:
        connection.execute(
            series.insert().values(
                series_instance_uid="1.2.3",
                revision=1,
                study_instance_uid="1.2",
                instance_count=1,
                first_image_at=event.first_image_at,
                last_image_at=event.first_image_at,
            )
        )
    yield ledger
    ledger.close()


def test_the_version_is_another_after_every_change_that_a_worklist_shows_and_after_no_other(ledger):
    versions = [record.worklist_version(ledger)]
    kinds = ("result", "undo", "result again", "revision", "acknowledge", "agree")
    of_series = ("instance_count=2", "last_image_at", "closed_at", "published_at")
    for kind in kinds + of_series:
        change(ledger, kind)
        versions.append(record.worklist_version(ledger))
        assert versions[-1] != versions[-2], kind
    record.add_audit(ledger, "rita", "127.0.0.1", "view-series", "1.2", "1.2.3")
    assert record.worklist_version(ledger) == versions[-1]


# --- over the wire ---


@pytest.fixture
def site(tmp_path):
    with open_site(tmp_path) as site, served(site) as running:
        yield running


class Reader:
    """A browser that is logged in."""

    def __init__(self, site, name: str = "rita") -> None:
        self.url = site.config.webui.public_url
        self.http = requests.Session()
        self.post("/login", name=name, password=PASSWORD)

    def post(self, path: str, **form: str) -> None:
        page = self.http.get(f"{self.url}/login", timeout=30).text
        token = re.findall(r'name="csrf_token" value="([^"]+)"', page)[0]
        answer = self.http.post(
            f"{self.url}{path}", data={"csrf_token": token, **form}, allow_redirects=False, timeout=30
        )
        assert answer.status_code == 303, answer.text

    @contextmanager
    def listening(self):
        """The lines of a stream that are no comments and no fields of the protocol."""
        with self.http.get(f"{self.url}/worklist/events", stream=True, timeout=30) as answer:
            assert answer.status_code == 200
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert answer.headers["X-Accel-Buffering"] == "no"
            yield (line for line in answer.iter_lines(chunk_size=1, decode_unicode=True) if line.startswith("data:"))


def test_a_new_result_is_told_within_two_seconds(site):
    with Reader(site).listening() as told:
        assert next(told) == "data: changed"
        site.put(triaged(1))
        started = time.monotonic()
        assert next(told) == "data: changed"
        assert time.monotonic() - started < 2


def test_the_service_stops_at_once_however_many_listen(tmp_path):
    with open_site(tmp_path) as site:
        serving = served(site)
        reader = Reader(serving.__enter__())
        streams = [reader.listening() for _ in range(3)]
        told = [stream.__enter__() for stream in streams]
        assert [next(of) for of in told] == ["data: changed"] * 3
        started = time.monotonic()
        serving.__exit__(None, None, None)
        assert time.monotonic() - started < 4
        assert [list(of) for of in told] == [[], [], []]  # ended as HTTP ends an answer, not cut off
        for stream in streams:
            stream.__exit__(None, None, None)


def test_beyond_the_cap_a_reader_is_refused_a_stream_and_still_gets_rows(site, monkeypatch):
    monkeypatch.setattr(live, "MOST_STREAMS", 1)
    reader = Reader(site)
    with reader.listening() as told:
        assert next(told)
        refused = reader.http.get(f"{reader.url}/worklist/events", timeout=30)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "60")
        assert reader.http.get(f"{reader.url}/worklist/rows", timeout=30).ok


def test_a_browser_that_went_away_makes_room(site, monkeypatch):
    monkeypatch.setattr(live, "MOST_STREAMS", 1)
    monkeypatch.setattr(live, "NOTICE_S", 0.05)
    reader, status = Reader(site), 503
    with reader.listening() as told:
        assert next(told)
    deadline, pause = time.monotonic() + 10, threading.Event()
    while status == 503 and time.monotonic() < deadline:
        with reader.http.get(f"{reader.url}/worklist/events", stream=True, timeout=30) as answer:
            status = answer.status_code
        pause.wait(0.05)
    assert status == 200


def test_logging_out_ends_the_streams_of_this_reader_only(site):
    rita, remi = Reader(site), Reader(site, "remi")
    with rita.listening() as hers, remi.listening() as his:
        assert next(hers)
        assert next(his)
        rita.post("/logout")
        assert list(hers) == []
        site.put(triaged(1))
        assert next(his) == "data: changed"


@pytest.mark.parametrize("end", ["password", "time"])
def test_a_session_that_has_ended_ends_its_stream(tmp_path, monkeypatch, end):
    monkeypatch.setattr(live, "KEEP_ALIVE_S", 0.2)
    monkeypatch.setattr(live, "NOTICE_S", 0.1)
    with open_site(tmp_path, **({"session_hours": 3 / 3600} if end == "time" else {})) as site, served(site) as site:
        reader = Reader(site)
        with reader.listening() as told:
            assert next(told)
            if end == "password":
                users.add_user(site.ledger, "rita", "another password for tests", "reader")
            assert list(told) == []

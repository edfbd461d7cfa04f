"""The router's process: what becomes of a series is said, also when the router could not live to say it."""

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from router_fakes import received
from served_models import eventually

from herald.bus import open_bus
from herald.config import BusConfig, Config, LedgerConfig, RouterConfig, StoreConfig
from herald.events import SeriesTriaged
from router.service import GROUP, serve


def config_under(folder: Path) -> Config:
    return Config(
        store=StoreConfig(root=folder / "store", min_free_gb=0),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}", most_attempts=2),
        ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"),
        router=RouterConfig(serving_address="127.0.0.1:1"),
    )


@pytest.fixture
def refusing() -> Iterator[str]:
    """The address of a server that has nothing of what a model server has."""
    server = grpc.server(ThreadPoolExecutor(2))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield address
    server.stop(None).wait()


@pytest.mark.parametrize(("there", "level"), [(False, logging.INFO), (True, logging.WARNING)])
def test_a_model_server_that_is_not_there_yet_is_no_warning_at_the_start_but_one_that_refuses_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, refusing: str, there: bool, level: int
) -> None:
    config = config_under(tmp_path)
    if there:
        config = replace(config, router=RouterConfig(serving_address=refusing))
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    with caplog.at_level(logging.INFO, "router.service"):
        thread.start()
        eventually(lambda: "for model protocol" in caplog.text)
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert [record.levelno for record in caplog.records if "for model protocol" in record.message] == [level]


def test_a_series_that_ends_the_router_each_time_is_failed_and_says_what_to_do(tmp_path: Path) -> None:
    config = config_under(tmp_path)
    event = received()
    for _ in range(2):
        with closing(open_bus(config.bus)) as ended:  # as a router ends whose process dies
            ended.publish(event)
            assert ended.fetch(GROUP, ("series",), timeout_s=20) is not None
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    thread.start()
    with closing(open_bus(config.bus)) as bus:
        try:
            delivery = bus.fetch("test", ("results",), timeout_s=60)
            eventually(lambda: bus.backlog(GROUP, "series") == 0)
        finally:
            stop.set()
            thread.join(30)
        assert not thread.is_alive()
        assert delivery is not None
        triaged = delivery.event
        assert isinstance(triaged, SeriesTriaged)
        assert (triaged.disposition, triaged.cause) == ("failed", event.cause)
        (letter,) = bus.dead_letters("series")
        assert triaged.reasons == (letter.error,)
        assert letter.error.startswith("NeverFinished: router began this 2 times")

"""The router's process: what becomes of a series is said, also when the router could not live to say it."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode
from router_fakes import received
from served_models import eventually

from herald.bus import open_bus
from herald.config import BusConfig, Config, LedgerConfig, RouterConfig, StoreConfig
from herald.events import SeriesTriaged
from router.service import GROUP, serve
from serving.stubs import prediction_service_pb2_grpc


def config_under(folder: Path) -> Config:
    return Config(
        store=StoreConfig(root=folder / "store", min_free_gb=0),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}", most_attempts=2),
        ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"),
        router=RouterConfig(serving_address="127.0.0.1:1"),
    )


@pytest.mark.parametrize(
    ("code", "level"), [(StatusCode.UNAVAILABLE, logging.INFO), (StatusCode.INVALID_ARGUMENT, logging.WARNING)]
)
def test_models_that_are_still_loading_are_no_warning_at_the_start_but_a_server_that_refuses_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: StatusCode, level: int
) -> None:
    class Refusing(prediction_service_pb2_grpc.PredictionServiceServicer):
        def GetModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
            context.abort(code, "not now")

    server = grpc.server(ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Refusing(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    config = replace(config_under(tmp_path), router=RouterConfig(serving_address=address))
    stop = threading.Event()
    with caplog.at_level(logging.INFO, "router.service"):
        thread = threading.Thread(target=serve, args=(config, stop))
        thread.start()
        eventually(lambda: "not now" in caplog.text)
        stop.set()
        thread.join(30)
    server.stop(None).wait()
    assert not thread.is_alive()
    assert [record.levelno for record in caplog.records if "not now" in record.message] == [level]


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

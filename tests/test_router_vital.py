"""The router's sign of life, against a model server over real gRPC and a ledger that comes and goes."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from receiver_fakes import ct_slice
from router_fakes import received
from served_models import build, eventually
from sqlalchemy import RowMapping, insert, select

from herald.bus import open_bus
from herald.config import BusConfig, Config, LedgerConfig, RouterConfig, ServingConfig, StoreConfig
from herald.errors import ConfigError, LedgerError, ServingError, ServingUnavailable
from herald.events import SeriesTriaged
from herald.ledger import Ledger, open_ledger, vitals
from herald.signatures import SIGNATURES
from herald.store import StudyStore
from router import vital
from router.inference import InferenceClient
from router.service import serve
from router.vital import Vital, signs_of_life
from serving.server import ModelServer
from serving.stubs import get_model_status_pb2, model_service_pb2_grpc

AVAILABLE = get_model_status_pb2.ModelVersionStatus.AVAILABLE
LOADING = get_model_status_pb2.ModelVersionStatus.LOADING
NOON = datetime(2026, 3, 28, 12, 0, tzinfo=UTC)


class Status(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus of a model server; `refusal` answers every request, `held` hangs until it is let go."""

    def __init__(self) -> None:
        self.states: dict[str, int] = dict.fromkeys(SIGNATURES, AVAILABLE)
        self.refusal: grpc.StatusCode | None = None
        self.let_go = threading.Event()
        self.let_go.set()
        self.asked = threading.Event()
        self.address = ""

    def GetModelStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.asked.set()
        self.let_go.wait(30)
        if self.refusal:
            context.abort(self.refusal, "for this test")
        if request.model_spec.name not in self.states:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(version=1, state=self.states[request.model_spec.name])
        return response


@pytest.fixture
def status() -> Iterator[Status]:
    servicer = Status()
    server = grpc.server(ThreadPoolExecutor(2))
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    servicer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    servicer.let_go.set()
    server.stop(None).wait()


@pytest.fixture
def client(status: Status) -> Iterator[InferenceClient]:
    with InferenceClient(status.address, deadline_s=20) as client:
        yield client


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = open_ledger(LedgerConfig(url=f"sqlite:///{tmp_path / 'ledger.sqlite'}"))
    yield ledger
    ledger.close()


def rows(ledger: Ledger) -> list[RowMapping]:
    with ledger.read() as connection:
        return list(connection.execute(select(vitals).order_by(vitals.c.seen_at)).mappings())


def test_a_beat_writes_when_the_router_lived_and_when_the_model_server_answered(
    ledger: Ledger, client: InferenceClient
) -> None:
    Vital(ledger, client, now=lambda: NOON).beat()
    (row,) = rows(ledger)
    assert (row["started_at"], row["seen_at"], row["models_answered_at"], row["error"]) == (NOON, NOON, NOON, None)


def test_a_model_server_that_stops_answering_leaves_the_time_of_its_last_answer_and_the_reason(
    ledger: Ledger, client: InferenceClient, status: Status
) -> None:
    moments = iter(NOON + timedelta(seconds=s) for s in range(100))
    beating = Vital(ledger, client, now=lambda: next(moments))
    beating.beat()
    (before,) = rows(ledger)
    status.refusal = grpc.StatusCode.UNAVAILABLE
    beating.beat()
    (after,) = rows(ledger)
    assert after["models_answered_at"] == before["models_answered_at"]
    assert after["seen_at"] > before["seen_at"]
    assert "did not answer" in after["error"]
    status.refusal = None
    beating.beat()
    (again,) = rows(ledger)
    assert again["error"] is None
    assert again["models_answered_at"] > after["models_answered_at"]


def test_the_embedded_server_answers_once_its_models_are_loaded(tmp_path_factory: pytest.TempPathFactory) -> None:
    models = build(tmp_path_factory.getbasetemp()) / "contract"
    server = ModelServer(ServingConfig(port=0, models=models, poll_s=0.05))
    server.start()
    try:
        eventually(lambda: not server.repository.missing())
        with InferenceClient(f"127.0.0.1:{server.port}", deadline_s=20) as client:
            client.ask()
    finally:
        server.stop()


def test_a_model_that_is_not_loaded_is_no_answer(client: InferenceClient, status: Status) -> None:
    client.ask()
    status.states["hemorrhage"] = LOADING
    with pytest.raises(ServingUnavailable, match="no version of model hemorrhage"):
        client.ask()
    del status.states["hemorrhage"]
    with pytest.raises(ServingUnavailable, match="does not serve model hemorrhage yet"):
        client.ask()
    status.refusal = grpc.StatusCode.PERMISSION_DENIED
    with pytest.raises(ServingError):
        client.ask()


def test_routers_that_have_been_gone_for_a_day_are_forgotten_by_the_next_that_starts(
    ledger: Ledger, client: InferenceClient
) -> None:
    with ledger.begin() as connection:
        for name, hours in (("old:1", 25), ("other:2", 23)):
            seen_at = NOON - timedelta(hours=hours)
            connection.execute(insert(vitals).values(router=name, started_at=seen_at, seen_at=seen_at))
    beating = Vital(ledger, client, now=lambda: NOON)
    beating.beat()
    beating.beat()
    names = [row["router"] for row in rows(ledger)]
    assert names[0] == "other:2"
    assert len(names) == 2


def test_signs_of_life_come_at_once_and_go_on_until_the_stop(
    ledger: Ledger, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vital, "BEAT_S", 0.01)
    config = Config(
        ledger=LedgerConfig(url=str(ledger.engine.url)), router=RouterConfig(serving_address=status.address)
    )
    with signs_of_life(config):
        assert status.asked.wait(20)
        status.asked.clear()
        assert status.asked.wait(20)
    assert len(rows(ledger)) == 1


def test_a_ledger_that_is_away_stops_no_beat_and_is_told_once(
    client: InferenceClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vital, "BEAT_S", 0.0)
    stop, beats = threading.Event(), iter(range(10))

    class Away(Vital):
        def beat(self) -> None:
            number = next(beats)
            if number == 9:
                stop.set()
            elif number == 4:
                raise ZeroDivisionError("a bug")
            else:
                raise LedgerError("the ledger is away")

    Away(Ledger(LedgerConfig(url="sqlite://")), client).run(stop)
    assert len([r for r in caplog.records if "without signs of life" in r.message]) == 1
    assert "please report it" in caplog.text


def test_a_stop_waits_neither_for_a_ledger_nor_for_a_model_server_that_hangs(tmp_path: Path, status: Status) -> None:
    status.let_go.clear()
    config = Config(
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'ledger.sqlite'}"),
        router=RouterConfig(serving_address=status.address),
    )
    with signs_of_life(config):
        assert status.asked.wait(20)
        started = time.monotonic()
    assert time.monotonic() - started < vital.STOP_S + 10
    status.let_go.set()


def test_a_ledger_url_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"ledger\.url"), signs_of_life(Config(ledger=LedgerConfig(url="nonsense"))):
        pass


def test_the_router_triages_while_its_ledger_cannot_be_reached(tmp_path: Path, status: Status) -> None:
    config = Config(
        store=StoreConfig(root=tmp_path / "store", min_free_gb=0),
        bus=BusConfig(url=f"sqlite:///{tmp_path / 'bus.sqlite'}"),
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'nowhere' / 'ledger.sqlite'}"),
        router=RouterConfig(serving_address=status.address, deadline_s=5),
    )
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    bus = open_bus(config.bus)
    content = BytesIO()
    ct_slice("1.2.3", "1.2.3.4", 0.0).save_as(content, enforce_file_format=True)
    StudyStore(config.store).write_instance("1.2.3", "1.2.3.4", "1.2.3.4.1", [content.getvalue()])
    bus.publish(received())
    thread.start()
    try:
        delivery = bus.fetch("test", ("results",), timeout_s=60)
    finally:
        stop.set()
        thread.join(30)
        bus.close()
    assert not thread.is_alive()
    assert delivery is not None
    assert isinstance(delivery.event, SeriesTriaged)

"""Metrics: scraped over HTTP from services at work, without identity; the dashboard asks for what exists."""

import json
import re
import socket
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
import yaml
from notifier_fakes import triaged
from prometheus_client.parser import text_string_to_metric_families
from pydicom.uid import generate_uid
from receiver_fakes import association, config_under, ct_series, ct_slice, send_all
from served_models import eventually
from webui_site import Site, open_site

from herald import node
from herald.bus import open_bus
from herald.config import Config, MetricsConfig, NotifierConfig, PagingStep, RouterConfig, ServingConfig, WebuiConfig
from herald.events import utc_now
from herald.metrics import PORTS, REGISTRIES, CountedRequests, serve_metrics
from notifier.service import serve as notify
from receiver.service import serve as receive
from router.inference import InferenceClient
from router.service import serve as route
from serving.server import ModelServer
from serving.stubs import get_model_status_pb2, model_service_pb2_grpc
from webui.measured import LOG_INS, measure

DEPLOY = Path(__file__).parents[1] / "deploy"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def free_port(count: int = 1) -> int:
    """The first of `count` ports in a row that are free."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first: int = probe.getsockname()[1]
        if first + count < 65536 and all(is_free(port) for port in range(first, first + count)):
            return first


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text: str = answer.read().decode()
        return text


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Measured:
    """What a service's endpoint says, as the difference to the beginning of the test."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._before = self.now()

    def now(self) -> Samples:
        return samples(scrape(self._port))

    def __call__(self, name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return self.now().get(key, 0.0) - self._before.get(key, 0.0)


@contextmanager
def measured(service: str) -> Iterator[Measured]:
    first = free_port(len(PORTS))
    with serve_metrics(service, MetricsConfig(port=first)) as port:
        assert port == first + PORTS[service]
        yield Measured(port)
    assert not listens(port)


@contextmanager
def running(serve: Callable[[Config, threading.Event], None], config: Config) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=serve, args=(config, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()


# --- the services at work ---


def test_the_receiver_counts_instances_by_status_bytes_associations_and_series(tmp_path: Path) -> None:
    config = config_under(tmp_path, port=free_port())
    with running(receive, config), measured("receiver") as metric:
        eventually(lambda: listens(config.receiver.port))
        assert send_all(config.receiver.port, ct_series(8)) == [0] * 8
        with association(config.receiver.port) as assoc:
            eventually(lambda: metric.now()["herald_receiver_associations", frozenset()] >= 1)
            assert assoc.send_c_store(ct_slice("1.2.3", "", 0.0)).Status == 0xC002
        eventually(lambda: metric("herald_receiver_series_closed_total", reason="released-and-even") == 1)
        assert metric("herald_receiver_instances_total", status="success") == 8
        assert metric("herald_receiver_instances_total", status="no_series_instance_uid") == 1
        stored = sum(path.stat().st_size for path in (tmp_path / "store").rglob("*.dcm"))
        assert metric("herald_receiver_stored_bytes_total") == stored > 0
        eventually(lambda: metric.now()["herald_receiver_associations", frozenset()] == 0)
        assert metric.now()["herald_receiver_store_free_bytes", frozenset()] > 0


def test_the_router_counts_dispositions_steps_and_errors_of_the_model_server(tmp_path: Path) -> None:
    config = config_under(tmp_path, port=free_port())
    config = replace(
        config,
        bus=replace(config.bus, retry_for_s=0.1, retry_first_s=0.02),
        router=RouterConfig(serving_address=f"127.0.0.1:{free_port()}"),
    )
    with running(receive, config), running(route, config), measured("router") as metric:
        eventually(lambda: listens(config.receiver.port))
        send_all(config.receiver.port, ct_series(8, ImageType=["DERIVED", "PRIMARY", "LOCALIZER"]))
        send_all(config.receiver.port, ct_series(12))
        eventually(lambda: metric("herald_router_series_total", disposition="failed") == 1)
        eventually(lambda: metric("herald_router_series_total", disposition="not_eligible") == 1)
        assert metric("herald_router_model_errors_total", kind="unavailable") >= 1
        assert metric("herald_router_step_seconds_count", step="taken_up") >= 1
        assert metric("herald_router_step_seconds_count", step="complete") == 2
        assert metric("herald_router_triage_seconds_count") == 2
        assert 0 < metric("herald_router_triage_seconds_sum") < 60


def test_the_notifier_counts_pages_their_delay_and_alarms(tmp_path: Path) -> None:
    unreachable = PagingStep(to=f"127.0.0.1:{free_port()}", channel="hl7")
    config = replace(
        config_under(tmp_path),
        notifier=NotifierConfig(
            mode="live",
            steps=(unreachable,),
            retry_for_s=0.0,
            webui_url=f"http://127.0.0.1:{free_port()}",
            operators=(unreachable,),
        ),
        webui=WebuiConfig(token="token", secret_key="key"),
    )
    shadow = replace(config, notifier=replace(config.notifier, mode="shadow"))
    bus = open_bus(config.bus)
    with measured("notifier") as metric:
        with running(notify, config):
            bus.publish(triaged(occurred_at=utc_now()))
            eventually(lambda: metric("herald_notifier_pages_total", channel="hl7", outcome="unavailable") == 1)
            eventually(lambda: metric("herald_notifier_alarms_total", kind="undelivered") == 1)
        with running(notify, shadow):
            bus.publish(triaged(study_instance_uid=str(generate_uid()), occurred_at=utc_now()))
            eventually(lambda: metric("herald_notifier_pages_total", channel="hl7", outcome="shadow") == 1)
        assert metric("herald_notifier_finding_to_page_seconds_count", outcome="shadow") == 1
        assert metric("herald_notifier_finding_to_page_seconds_count", outcome="sent") == 0
    bus.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as site:
        measure(site.app)
        yield site


def test_the_web_ui_counts_requests_by_endpoint_and_failed_log_ins(site: Site) -> None:
    with measured("webui") as metric:
        event = site.add(1)
        client = site.client("rita")
        client.get(f"/series/{event.series_instance_uid}/1")
        client.get("/1.2.840.113619.2.55.3")
        client.open("/", method="BREW")
        site.client().post("/login", data={"name": "rita", "password": "not the password"})
        requests = "herald_webui_requests_total"
        assert metric(requests, endpoint="series.show", method="GET", status="200") == 1
        assert metric(requests, endpoint="unknown", method="GET", status="404") == 1
        assert metric(requests, endpoint="unknown", method="other", status="405") == 1
        assert metric("herald_webui_request_seconds_count", endpoint="series.show") == 1
        assert metric("herald_webui_log_ins_failed_total") == 1
        assert set(site.app.view_functions) >= LOG_INS


def test_a_live_stream_counts_while_it_is_open(site: Site) -> None:
    with measured("webui") as metric:
        answer = site.client("rita").get("/worklist/events", buffered=False)
        assert metric("herald_webui_live_streams") == 1
        answer.close()
        assert metric("herald_webui_live_streams") == 0


class Status(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """Says of every model that it is available, but of one that breaks."""

    def GetModelStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.model_spec.name == "broken":
            raise RuntimeError("a bug for this test")
        response = get_model_status_pb2.GetModelStatusResponse()
        response.model_version_status.add(version=1, state=get_model_status_pb2.ModelVersionStatus.AVAILABLE)
        return response


def test_a_grpc_server_counts_requests_by_model_method_and_code() -> None:
    server = grpc.server(ThreadPoolExecutor(2), interceptors=[CountedRequests()])
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(Status(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with measured("serving") as metric, InferenceClient(f"127.0.0.1:{port}") as client:
        client.ask()
        broken = get_model_status_pb2.GetModelStatusRequest()
        broken.model_spec.name = "broken"
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError):
            model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(broken)
        requests, method = "herald_serving_requests_total", "GetModelStatus"
        assert metric(requests, model="protocol", method=method, code="OK") == 1
        assert metric(requests, model="hemorrhage", method=method, code="OK") == 1
        eventually(lambda: metric(requests, model="other", method=method, code="UNKNOWN") == 1)
        assert metric("herald_serving_request_seconds_count", model="protocol", method=method) == 1
        assert metric.now()["process_resident_memory_bytes", frozenset()] > 10_000_000
    server.stop(None).wait()


def test_the_model_server_counts_what_it_refuses(tmp_path: Path) -> None:
    server = ModelServer(ServingConfig(port=0, models=tmp_path / "none"))
    server.start()
    try:
        with measured("serving") as metric, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            asked = get_model_status_pb2.GetModelStatusRequest()
            asked.model_spec.name = "hemorrhage"
            with pytest.raises(grpc.RpcError):
                model_service_pb2_grpc.ModelServiceStub(channel).GetModelStatus(asked)
            labels = {"model": "hemorrhage", "method": "GetModelStatus", "code": "NOT_FOUND"}
            eventually(lambda: metric("herald_serving_requests_total", **labels) == 1)
    finally:
        server.stop(1.0)


# --- no identity ---


def test_no_series_that_runs_through_leaves_its_identity_in_any_label(tmp_path: Path) -> None:
    config = replace(
        config_under(tmp_path, port=free_port()),
        router=RouterConfig(serving_address=f"127.0.0.1:{free_port()}"),
        notifier=NotifierConfig(webui_url=f"http://127.0.0.1:{free_port()}"),
        webui=WebuiConfig(token="token", secret_key="key"),
    )
    config = replace(config, bus=replace(config.bus, retry_for_s=0.1, retry_first_s=0.02))
    sent = ct_series(12, AccessionNumber="ACC-77421", StationName="CT-NORTH-7")
    with (
        running(receive, config),
        running(route, config),
        running(notify, config),
        open_site(tmp_path) as site,
        measured("router") as router,
    ):
        measure(site.app)
        eventually(lambda: listens(config.receiver.port))
        send_all(config.receiver.port, sent)
        eventually(lambda: router("herald_router_series_total", disposition="failed") == 1)
        event = site.add(1, accession_number="ACC-77421")
        site.client("rita").get(f"/series/{event.series_instance_uid}/1?study={event.study_instance_uid}")
    for service in PORTS:
        with measured(service) as metric:
            text = scrape(metric._port)
        assert re.findall(r"\d+(?:\.\d+){3,}", text) == [], f"{service} tells a UID or an address"
        for word in ("ACC-77421", "CT-NORTH-7", "SECRET", "Never", "CT1", "rita", "@", str(tmp_path)):
            assert word not in text, f"{service} tells {word}"


# --- the endpoint ---


def test_without_a_port_nothing_listens() -> None:
    with serve_metrics("router", MetricsConfig()) as port:
        assert port is None


def test_a_port_that_is_taken_costs_a_warning_and_never_the_service(caplog: pytest.LogCaptureFixture) -> None:
    config = MetricsConfig(port=free_port(len(PORTS)))
    with serve_metrics("router", config) as first, serve_metrics("router", config) as second:
        assert first is not None
        assert second is None
        assert samples(scrape(first))
    assert "HERALD_METRICS__PORT" in caplog.text
    assert f"127.0.0.1:{first}" in caplog.text


@pytest.mark.parametrize("config", [MetricsConfig(port=65535), MetricsConfig(host="no.such.host.invalid", port=9400)])
def test_an_address_that_there_is_not_costs_a_warning(config: MetricsConfig, caplog: pytest.LogCaptureFixture) -> None:
    with serve_metrics("webui", config) as port:
        assert port is None
    assert "no metrics of the webui" in caplog.text


def test_a_service_of_the_node_has_its_endpoint_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    first, seen = free_port(len(PORTS)), []
    service = ModuleType("service_of_this_test")
    service.serve = lambda config, stop: seen.append(scrape(first + 3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, service.__name__, service)
    monkeypatch.setitem(node.SERVICES, "notifier", service.__name__)  # type: ignore[arg-type]
    monkeypatch.setattr(node.signal, "signal", lambda *_: None)
    monkeypatch.setattr(node, "configure_logging", lambda *_: None)
    assert node.run_service("notifier", Config(metrics=MetricsConfig(port=first))) == 0
    assert "herald_notifier_pages_total" in seen[0]
    assert not listens(first + 3)


def test_every_service_of_the_node_has_a_port_of_its_own() -> None:
    assert PORTS.keys() == node.SERVICES.keys()
    assert sorted(PORTS.values()) == list(range(len(PORTS)))


@pytest.mark.parametrize("service", PORTS)
def test_names_follow_the_conventions_of_prometheus(service: str) -> None:
    for family in REGISTRIES[service].collect():
        if not family.name.startswith("process_"):
            prefix = "herald_build" if family.type == "info" else f"herald_{service}_"
            assert family.name.startswith(prefix), family.name
            assert family.documentation.endswith("."), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")


# --- dashboard and scrape configuration ---


def known_names() -> dict[str, set[str]]:
    """Every name that a query may use, with its labels, `service` of deploy/prometheus.yml among them."""
    names: dict[str, set[str]] = {}
    for registry in REGISTRIES.values():
        for family in registry.collect():
            labels = {"service"} | {label for sample in family.samples for label in sample.labels}
            suffixes = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_count", "_sum")}
            for suffix in suffixes.get(family.type, ("",)):
                names[family.name + suffix] = labels
        for metric in set(registry._names_to_collectors.values()):
            for name in registry._get_names(metric):
                names.setdefault(name, {"service"}).update(getattr(metric, "_labelnames", ()))
    return names


def expressions() -> list[str]:
    dashboard = json.loads((DEPLOY / "grafana" / "herald.json").read_text(encoding="utf-8"))
    assert dashboard["schemaVersion"] >= 36
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


WORDS_OF_PROMQL = {
    *("sum", "min", "max", "count", "by", "rate", "increase", "histogram_quantile", "on", "group_left", "le"),
}


@pytest.mark.parametrize("expression", expressions())
def test_every_query_of_the_dashboard_asks_for_metrics_and_labels_that_exist(expression: str) -> None:
    bare = re.sub(r'"[^"]*"|\[\w+\]', "", expression)
    words = set(re.findall(r"[a-z_]\w*", bare)) - WORDS_OF_PROMQL
    names = known_names()
    metrics = {word for word in words if word in names}
    assert metrics, expression
    labels = set().union(*(names[metric] for metric in metrics))
    assert words - metrics - labels == set(), expression
    for counter in re.findall(r"(?:rate|increase)\((\w+)", expression):
        assert counter.endswith(("_total", "_bucket", "_count", "_sum")), f"{counter} is no counter"


def test_the_dashboard_has_a_row_for_each_service_and_panels_that_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "herald.json").read_text(encoding="utf-8"))["panels"]
    assert len([panel for panel in panels if panel["type"] == "row"]) == len(PORTS)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_prometheus_is_told_every_service_at_its_port() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    told = {one["labels"]["service"]: one["targets"] for one in job["static_configs"]}
    assert told == {service: [f"127.0.0.1:{9400 + offset}"] for service, offset in PORTS.items()}

"""Prometheus metrics of every service: what is measured, and the endpoint `/metrics`.

Each service has a registry of its own, so that its endpoint tells of it alone. Labels are words of ours (statuses,
steps, channels, endpoints): no UID, accession number, AE title or address, so that metrics carry no identity and the
number of time series stays small. Counting is always on and costs about a microsecond; `metrics.port` opens the
endpoint.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from herald import __version__
from herald.config import MetricsConfig
from herald.signatures import SIGNATURES

log = logging.getLogger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second time series for each one, which no query of ours uses

PORTS: Mapping[str, int] = {"receiver": 0, "router": 1, "serving": 2, "notifier": 3, "webui": 4}
"""Service -> what is added to `metrics.port`."""


def _registry(service: str) -> CollectorRegistry:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)  # resident memory, CPU seconds, open files
    Info("herald_build", "What runs here.", registry=registry).info({"version": __version__})
    return registry


REGISTRIES: Mapping[str, CollectorRegistry] = {service: _registry(service) for service in PORTS}

# --- receiver --------------------------------------------------------------------------------------------------------

_receiver = REGISTRIES["receiver"]
RECEIVER_INSTANCES = Counter(
    "herald_receiver_instances_total", "C-STORE requests answered, by status.", ["status"], registry=_receiver
)
RECEIVER_STORED_BYTES = Counter(
    "herald_receiver_stored_bytes_total", "Bytes of the instances that were stored.", registry=_receiver
)
RECEIVER_ASSOCIATIONS = Gauge("herald_receiver_associations", "Associations that are open.", registry=_receiver)
RECEIVER_SERIES_CLOSED = Counter(
    "herald_receiver_series_closed_total",
    "Series that were closed and published, by why they were taken for complete.",
    ["reason"],
    registry=_receiver,
)
RECEIVER_FREE_BYTES = Gauge("herald_receiver_store_free_bytes", "Free disk of the store.", registry=_receiver)
RECEIVER_MIN_FREE_BYTES = Gauge(
    "herald_receiver_store_min_free_bytes", "Free disk below which instances are refused.", registry=_receiver
)

# --- router ----------------------------------------------------------------------------------------------------------

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 30, 60, 120, 300, 900)
_router = REGISTRIES["router"]
ROUTER_SERIES = Counter(
    "herald_router_series_total", "Series revisions that have their disposition.", ["disposition"], registry=_router
)
ROUTER_STEP_SECONDS = Histogram(
    "herald_router_step_seconds",
    "Seconds that each step took: complete, taken_up, classified, detected, decided.",
    ["step"],
    buckets=_SECONDS,
    registry=_router,
)
ROUTER_TRIAGE_SECONDS = Histogram(
    "herald_router_triage_seconds",
    "Seconds from the last image of a series to its disposition.",
    buckets=_SECONDS,
    registry=_router,
)
ROUTER_MODEL_ERRORS = Counter(
    "herald_router_model_errors_total",
    "Attempts at a series that the model server failed: unavailable, mismatch or refused.",
    ["kind"],
    registry=_router,
)
ROUTER_DISAGREEMENTS = Counter(
    "herald_router_disagreements_total",
    "Series of which header and pixels differ, by head of the protocol model.",
    ["head"],
    registry=_router,
)

# --- serving ---------------------------------------------------------------------------------------------------------

_serving = REGISTRIES["serving"]
SERVING_REQUESTS = Counter(
    "herald_serving_requests_total", "Requests answered.", ["model", "method", "code"], registry=_serving
)
SERVING_SECONDS = Histogram(
    "herald_serving_request_seconds",
    "Seconds that a request took, those that it waited for its turn included.",
    ["model", "method"],
    buckets=_SECONDS,
    registry=_serving,
)

# --- notifier --------------------------------------------------------------------------------------------------------

_notifier = REGISTRIES["notifier"]
NOTIFIER_PAGES = Counter(
    "herald_notifier_pages_total",
    "Attempts to page: sent, shadow, unavailable or refused.",
    ["channel", "outcome"],
    registry=_notifier,
)
NOTIFIER_FINDING_SECONDS = Histogram(
    "herald_notifier_finding_to_page_seconds",
    "Seconds from a finding to its first page, by whether that was sent or shadow.",
    ["outcome"],
    buckets=_SECONDS,
    registry=_notifier,
)
NOTIFIER_ALARMS = Counter(
    "herald_notifier_alarms_total", "Alarms raised for the operators.", ["kind"], registry=_notifier
)

# --- web UI ----------------------------------------------------------------------------------------------------------

_webui = REGISTRIES["webui"]
WEBUI_REQUESTS = Counter(
    "herald_webui_requests_total",
    "Requests answered, by name of the endpoint.",
    ["endpoint", "method", "status"],
    registry=_webui,
)
WEBUI_SECONDS = Histogram(
    "herald_webui_request_seconds",
    "Seconds to the beginning of an answer.",
    ["endpoint"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10),
    registry=_webui,
)
WEBUI_LOG_INS_FAILED = Counter("herald_webui_log_ins_failed_total", "Log-ins that were refused.", registry=_webui)
WEBUI_STREAMS = Gauge("herald_webui_live_streams", "Pages that are kept up to date live.", registry=_webui)


@contextmanager
def serve_metrics(service: str, config: MetricsConfig) -> Iterator[int | None]:
    """Serve the service's metrics for the block, from threads of their own; gives the port, None where it is off.

    A port that cannot be opened costs a warning and the metrics, never the service.
    """
    port = config.port + PORTS[service] if config.port else 0
    if not port:
        yield None
        return
    try:
        server, thread = start_http_server(port, config.host, REGISTRIES[service])
    except (OSError, OverflowError) as error:
        log.warning(
            "no metrics of the %s: %s:%d cannot be opened: %s; stop what listens there, or give this process another "
            "HERALD_METRICS__PORT (a second %s on one host needs its own)",
            service,
            config.host,
            port,
            error,
            service,
        )
        yield None
        return
    log.info("metrics of the %s on http://%s:%d/metrics", service, config.host, port)
    try:
        yield port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class CountedRequests:
    """Interceptor of a gRPC server: counts requests by model, method and status code, and their seconds.

    A model that is not one of ours counts as `other`, for clients may ask for any name.
    """

    def intercept_service(self, continuation: Callable[[Any], Any], call: Any) -> Any:
        """The handler of a call, measured if it takes one request and gives one answer."""
        handler = continuation(call)
        if handler is None or handler.unary_unary is None:
            return handler
        method = str(call.method).rpartition("/")[2]

        def counted(request: Any, context: Any) -> Any:
            asked = getattr(getattr(request, "model_spec", None), "name", "")
            model = (asked if asked in SIGNATURES else "other") if asked else "none"
            started, code = time.perf_counter(), "UNKNOWN"
            try:
                answer = handler.unary_unary(request, context)
                code = "OK"
                return answer
            finally:
                code = getattr(context.code(), "name", code)
                SERVING_SECONDS.labels(model, method).observe(time.perf_counter() - started)
                SERVING_REQUESTS.labels(model, method, code).inc()

        return handler._replace(unary_unary=counted)

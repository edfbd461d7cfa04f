"""The router's process: SeriesReceived in, SeriesTriaged out, exactly one disposition per series revision."""

import logging
import threading
from dataclasses import replace

from herald.bus import handle, open_bus
from herald.config import Config, version
from herald.errors import ServingError, ServingUnavailable, SignatureMismatch
from herald.events import Event, SeriesReceived, SeriesTriaged
from herald.metrics import (
    ROUTER_DISAGREEMENTS,
    ROUTER_MODEL_ERRORS,
    ROUTER_SERIES,
    ROUTER_STEP_SECONDS,
    ROUTER_TRIAGE_SECONDS,
)
from herald.store import StudyStore
from router.inference import InferenceClient
from router.triage import failed, triage_series
from router.vital import signs_of_life

log = logging.getLogger(__name__)

GROUP = "router"


def serve(config: Config, stop: threading.Event) -> None:
    """Triage every series that the receiver announces, until `stop` is set."""
    store = StudyStore(config.store)
    bus = open_bus(config.bus)
    client = InferenceClient(config.router.serving_address, config.router.deadline_s)
    config_version = version(config)

    def triage(event: Event) -> None:
        assert isinstance(event, SeriesReceived)
        try:
            triaged = triage_series(event, store, client, config.router)
        except ServingError as error:
            ROUTER_MODEL_ERRORS.labels(_kind(error)).inc()
            raise
        triaged = replace(triaged, config_version=config_version)
        bus.publish(triaged)
        _count(triaged)
        log.info(
            "series %s revision %d: %s%s %s",
            event.series_instance_uid,
            event.revision,
            triaged.disposition,
            " (uncertain)" if triaged.uncertain else "",
            "; ".join(triaged.reasons),
        )
        for head in triaged.disagreements:
            pixels = triaged.protocol[head].label if triaged.protocol else "nothing"
            log.warning(
                "series %s: %s is %s by the pixels, %s by the header",
                event.series_instance_uid,
                head,
                pixels,
                triaged.header.get(head),
            )

    def give_up(event: Event, error: BaseException) -> None:
        assert isinstance(event, SeriesReceived)
        given_up = replace(failed(event, error), config_version=config_version)
        bus.publish(given_up)
        _count(given_up)

    try:
        with signs_of_life(config):
            _log_models(client)
            handle(bus, GROUP, {SeriesReceived: triage}, stop, config.bus, on_dead=give_up)
    finally:
        client.close()
        bus.close()


def _count(triaged: SeriesTriaged) -> None:
    """Count a disposition, and how long its steps took; clocks of two hosts may make a step seem negative."""
    ROUTER_SERIES.labels(triaged.disposition).inc()
    for head in triaged.disagreements:
        ROUTER_DISAGREEMENTS.labels(head).inc()
    before = triaged.last_image_at
    for step, at in (
        ("complete", triaged.received_at),
        ("taken_up", triaged.started_at),
        ("classified", triaged.classified_at),
        ("detected", triaged.detected_at),
        ("decided", triaged.occurred_at),
    ):
        if before is not None and at is not None:
            ROUTER_STEP_SECONDS.labels(step).observe(max((at - before).total_seconds(), 0.0))
        before = at or before
    if triaged.last_image_at is not None:
        ROUTER_TRIAGE_SECONDS.observe(max((triaged.occurred_at - triaged.last_image_at).total_seconds(), 0.0))


def _kind(error: ServingError) -> str:
    if isinstance(error, ServingUnavailable):
        return "unavailable"
    return "mismatch" if isinstance(error, SignatureMismatch) else "refused"


def _log_models(client: InferenceClient) -> None:
    """Say at the start whether the models are there and right; `router.vital` tells of a server that stays away."""
    try:
        client.check()
        log.info("the model server has both models with the expected signatures")
    except ServingUnavailable as error:  # it may have been started at the same time, and is loading them
        log.info("series wait for the models: %s", error)
    except ServingError as error:
        log.warning("%s", error)

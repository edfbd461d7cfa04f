"""The router's process: SeriesReceived in, SeriesTriaged out, exactly one disposition per series revision."""

import logging
import threading
from dataclasses import replace

from herald.bus import handle, open_bus
from herald.config import Config, version
from herald.errors import ServingError
from herald.events import Event, SeriesReceived
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
        triaged = replace(triage_series(event, store, client, config.router), config_version=config_version)
        bus.publish(triaged)
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
        bus.publish(replace(failed(event, error), config_version=config_version))

    try:
        with signs_of_life(config):
            _log_models(client)
            handle(bus, GROUP, {SeriesReceived: triage}, stop, config.bus, on_dead=give_up)
    finally:
        client.close()
        bus.close()


def _log_models(client: InferenceClient) -> None:
    """Say at the start whether the models are there and right; series that come meanwhile wait on the bus."""
    try:
        client.check()
        log.info("the model server has both models with the expected signatures")
    except ServingError as error:
        log.warning("%s", error)

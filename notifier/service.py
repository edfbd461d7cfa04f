"""The notifier: pages readers about positive results, and posts every result to the web UI.

Paging and posting are two consumer groups of the bus, so that a web UI that is down never holds up a page.
"""

import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from herald.bus import handle, open_bus
from herald.config import Config, required_secret
from herald.errors import ConfigError
from herald.events import Event, SeriesReviewed, SeriesTriaged
from herald.ledger import open_ledger
from notifier.channels import Channel, open_channel
from notifier.channels.webui import WebuiChannel
from notifier.paging import Paging
from notifier.posting import Posting

log = logging.getLogger(__name__)

Handlers = Mapping[type[Event], Callable[[Any], None]]

PAGING_GROUP = "notifier"
POSTING_GROUP = "notifier-webui"


def serve(config: Config, stop: threading.Event) -> None:
    """Page and post until `stop` is set; raises ConfigError when the policy or a secret is missing.

    Three threads: paging's consumer, the paging clock and posting's consumer. One that dies sets `stop` and raises
    here, so that the process ends and is started again rather than half working.
    """
    channels = open_channels(config)
    required_secret(config.webui.secret_key, "webui.secret_key")
    webui = WebuiChannel(config)
    ledger = open_ledger(config.ledger)
    paging = Paging(ledger, config, channels)
    posting = Posting(ledger, webui)

    def end(_: "Future[None]") -> None:
        stop.set()
        paging.wake()

    log.info("the notifier is %s, %d steps; results go to %s", config.notifier.mode, len(channels), webui.recipient)
    with ThreadPoolExecutor(3, thread_name_prefix="notifier") as threads:
        pages: Handlers = {SeriesTriaged: paging.on_triaged, SeriesReviewed: paging.on_reviewed}
        work = [
            threads.submit(paging.run, stop),
            threads.submit(_consume, config, PAGING_GROUP, pages, stop, _not_paged),
            threads.submit(_consume, config, POSTING_GROUP, {SeriesTriaged: posting.on_triaged}, stop, _not_posted),
        ]
        for future in work:
            future.add_done_callback(end)
    ledger.close()
    for future in work:
        future.result()


def open_channels(config: Config) -> tuple[Channel, ...]:
    """One channel per step of the policy, without touching the network; raises ConfigError."""
    if config.notifier.mode == "live" and not config.notifier.steps:
        raise ConfigError(
            "notifier.mode is live, but nobody is to be paged: add to herald.toml\n"
            '[[notifier.steps]]\nto = "radiologist@hospital.example"\n'
            'or set notifier.mode = "shadow"'
        )
    return tuple(open_channel(step, config.notifier) for step in config.notifier.steps)


def _consume(
    config: Config,
    group: str,
    handlers: Handlers,
    stop: threading.Event,
    on_dead: Callable[[Event, BaseException], None],
) -> None:
    bus = open_bus(config.bus)
    patient = replace(config.bus, retry_for_s=math.inf)  # no outage is so long that a page or a result may be dropped
    try:
        handle(bus, group, handlers, stop, patient, on_dead)
    finally:
        bus.close()


def _not_paged(event: Event, error: BaseException) -> None:
    if isinstance(event, SeriesTriaged) and event.disposition == "positive":
        log.error(
            "study %s is POSITIVE and nobody was paged: %s; call the radiologist, then replay the dead letter",
            event.study_instance_uid,
            error,
        )


def _not_posted(event: Event, error: BaseException) -> None:
    log.error(
        "series %s revision %d is missing on the worklist: %s; mend the cause, then replay the dead letter",
        event.series_instance_uid,
        event.revision,
        error,
    )

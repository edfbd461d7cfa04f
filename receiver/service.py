"""The receiver's process: wiring, start and clean stop."""

import logging
import math
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError

from herald.bus import Bus, open_bus
from herald.config import BusConfig, Config, StoreConfig
from herald.errors import HeraldError, StoreError
from herald.events import SeriesReceived
from herald.metrics import (
    RECEIVER_ASSOCIATIONS,
    RECEIVER_FREE_BYTES,
    RECEIVER_MIN_FREE_BYTES,
    RECEIVER_SERIES_CLOSED,
)
from herald.store import StudyStore
from receiver.assembly import SeriesAssembler
from receiver.record import Recorder
from receiver.retention import Retention
from receiver.scp import StorageServer
from receiver.upper_layer import ReceivingAssociation

log = logging.getLogger(__name__)

RESUME_WAIT_S = 10.0
"""How long the port stays closed while the ledger is caught up; then images are taken in all the same."""


def serve(config: Config, stop: threading.Event) -> None:
    """Receive until `stop` is set; raises ConfigError or StoreError when the port or the store cannot be used."""
    store = StudyStore(config.store)
    _measure(store, config.store)
    remove_leftovers(store)
    recorder = Recorder(config.ledger)
    publisher = _Publisher(config.bus)
    assembler = SeriesAssembler(config.receiver, store, recorder, publisher)
    retention = Retention(config.store, store, recorder, assembler.holds)
    server = StorageServer(config.receiver, store, recorder, assembler, short_of_space=retention.wake)
    recorder.start()
    retention.start()  # before the assembler reads the store: what a crash left half removed is removed first
    resumed = assembler.start()
    try:
        try:
            resumed.result(RESUME_WAIT_S)
        except FutureTimeoutError:
            log.warning("the ledger does not answer yet; receiving without it, rows follow")
        except HeraldError as error:
            log.error("what the last run left cannot be taken up: %s; receiving all the same", error)
        server.start()
        try:
            stop.wait()
        finally:
            server.stop(config.node.stop_timeout_s / 3)
    finally:
        assembler.stop(config.node.stop_timeout_s / 6)
        retention.stop(config.node.stop_timeout_s / 6)
        recorder.stop(config.node.stop_timeout_s / 3)
        publisher.close()


def _measure(store: StudyStore, config: StoreConfig) -> None:
    """What is asked when somebody reads the metrics, and costs nothing otherwise."""

    def free_bytes() -> float:
        try:
            return store.free_bytes()
        except StoreError:
            return math.nan

    RECEIVER_MIN_FREE_BYTES.set(config.min_free_gb * 1e9)
    RECEIVER_FREE_BYTES.set_function(free_bytes)
    RECEIVER_ASSOCIATIONS.set_function(
        lambda: sum(isinstance(thread, ReceivingAssociation) for thread in threading.enumerate())
    )


def remove_leftovers(store: StudyStore) -> None:
    """Remove what an earlier process was writing when it ended: none of it was ever acknowledged."""
    leftovers = list(store.leftovers())
    for path in leftovers:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"cannot remove {path}: {error.strerror}; check the rights on store.root") from error
    if leftovers:
        log.info("removed %d unfinished files, none of which was acknowledged", len(leftovers))


class _Publisher:
    """The bus, opened when it is first needed, so that reception starts while it is down."""

    def __init__(self, config: BusConfig) -> None:
        self._config = config
        self._bus: Bus | None = None

    def __call__(self, event: SeriesReceived) -> None:
        """Publish; raises BusError when the bus cannot be reached."""
        if self._bus is None:
            self._bus = open_bus(self._config)
        self._bus.publish(event)
        RECEIVER_SERIES_CLOSED.labels(event.close_reason).inc()

    def close(self) -> None:
        """Let go of the bus."""
        if self._bus is not None:
            self._bus.close()

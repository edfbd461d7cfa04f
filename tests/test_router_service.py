"""The router's process: what becomes of a series is said, also when the router could not live to say it."""

import threading
from contextlib import closing
from pathlib import Path

from router_fakes import received
from served_models import eventually

from herald.bus import open_bus
from herald.config import BusConfig, Config, LedgerConfig, RouterConfig, StoreConfig
from herald.events import SeriesTriaged
from router.service import GROUP, serve


def test_a_series_that_ends_the_router_each_time_is_failed_and_says_what_to_do(tmp_path: Path) -> None:
    config = Config(
        store=StoreConfig(root=tmp_path / "store", min_free_gb=0),
        bus=BusConfig(url=f"sqlite:///{tmp_path / 'bus.sqlite'}", most_attempts=2),
        ledger=LedgerConfig(url=f"sqlite:///{tmp_path / 'ledger.sqlite'}"),
        router=RouterConfig(serving_address="127.0.0.1:1"),
    )
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

"""Latency of the bus, from the call of `publish` to the call of the handler in another process.

    python benchmarks/bus.py [--events 300] [--every-ms 30] [--kafka HOST:PORT]

A real Kafka broker (`make kafka`) is measured when one is named. Prints one JSON object; times in milliseconds,
`idle_cpu_percent` is the share of one core that a waiting consumer takes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from herald.bus import handle, open_bus
from herald.config import BusConfig
from herald.events import Event, SeriesReceived, utc_now

IDLE_S = 5.0


def event(number: int) -> SeriesReceived:
    now = utc_now()
    return SeriesReceived(
        study_instance_uid=f"1.2.{number}",
        series_instance_uid=f"1.2.{number}.1",
        revision=1,
        accession_number="A",
        modality="CT",
        scanner="CT1",
        calling_ae_title="CT1",
        instance_count=30,
        close_reason="quiet",
        first_image_at=now,
        last_image_at=now,
    )


def consume(url: str, count: int) -> None:
    """The other process: prints for each event when its handler was called."""
    config = BusConfig(url=url)
    stop = threading.Event()
    arrivals: list[tuple[str, float]] = []
    idle_cpu = 0.0

    def work(event: Event) -> None:
        nonlocal idle_cpu
        arrivals.append((event.study_instance_uid, time.time()))
        if len(arrivals) == 1:  # the warm-up; what follows is waiting
            idle_cpu = time.process_time()
            print("ready", flush=True)
        if len(arrivals) == 2:
            idle_cpu = time.process_time() - idle_cpu
        if len(arrivals) == count + 1:
            stop.set()

    started = time.process_time()
    handle(open_bus(config), "benchmark", {SeriesReceived: work}, stop, config)
    print(json.dumps({"arrivals": arrivals, "idle_cpu_s": idle_cpu, "cpu_s": time.process_time() - started}))


def measure(url: str, count: int, every_s: float) -> dict[str, float]:
    bus = open_bus(BusConfig(url=url))
    bus.publish(event(0))
    consumer = subprocess.Popen(
        [sys.executable, __file__, "--consume", url, "--events", str(count)], stdout=subprocess.PIPE, text=True
    )
    assert consumer.stdout is not None
    consumer.stdout.readline()
    time.sleep(IDLE_S)
    published: dict[str, float] = {}
    confirmed: list[float] = []
    for number in range(1, count + 1):
        sent = event(number)
        published[sent.study_instance_uid] = time.time()
        bus.publish(sent)
        confirmed.append(time.time() - published[sent.study_instance_uid])
        time.sleep(every_s)
    result = json.loads(consumer.communicate()[0])
    bus.close()
    latency = [1000 * (at - published[study]) for study, at in result["arrivals"] if study in published]
    percentiles = statistics.quantiles(latency, n=100)
    confirmation = statistics.quantiles([1000 * s for s in confirmed], n=100)
    return {
        "events": len(latency),
        "publish_ms_p50": round(confirmation[49], 2),
        "publish_ms_p99": round(confirmation[98], 2),
        "latency_ms_p50": round(percentiles[49], 2),
        "latency_ms_p99": round(percentiles[98], 2),
        "idle_cpu_percent": round(100 * result["idle_cpu_s"] / IDLE_S, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--every-ms", type=float, default=30.0)
    parser.add_argument("--kafka", metavar="HOST:PORT", help="measure this broker, too")
    parser.add_argument("--consume", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.consume:
        consume(arguments.consume, arguments.events)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {"sqlite": measure(f"sqlite:///{folder}/bus.sqlite", arguments.events, arguments.every_ms / 1000)}
    if arguments.kafka:
        url = f"kafka://{arguments.kafka}/benchmark-{os.getpid()}."
        results["kafka"] = measure(url, arguments.events, arguments.every_ms / 1000)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

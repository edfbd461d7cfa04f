"""How fast the worklist answers over thousands of series, and how soon an open one is told of a new result.

    python benchmarks/worklist.py [--results 10000] [--requests 200] [--told 20] [--ledger URL]

The ledger is filled with results of which one in eleven is positive and forty positives wait for somebody, with
verdicts on two thirds, and with the receiver's row of every series; none is in flight. The web UI runs as its service
behind waitress, in a process of its own. A reader who is logged in asks for each address `--requests` times, one after
another over one connection: the whole page, and the rows by which an open worklist keeps itself up to date, without
and with filters. `in_shadow_mode`: the same for a reader who judges blind.

`told`: from posting a result until the stream of an open worklist names a change, and until the rows have been fetched.
`parts`: the statements behind a page alone, in this process. Prints one JSON object; times in milliseconds.
`server_cpu` is what a request costs the service's process; it depends less than the rest on what else the machine does,
whose `loadavg` is given before and after. Exit status 1 when a p95 is above the target.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import requests
from sqlalchemy import insert

from herald.bus import Bus, open_bus
from herald.config import BusConfig, Config, LedgerConfig, NotifierConfig, StoreConfig, WebuiConfig
from herald.events import Disposition, Finding, Label, SeriesTriaged, utc_now
from herald.ledger import Ledger, open_ledger, results, reviews, series
from herald.signatures import FINDINGS
from herald.store import StudyStore
from herald.superseded import ANALYSED
from webui import operations, record
from webui.app import create_app
from webui.service import serve
from webui.users import add_user

TARGET_MS = 150.0
"""p95 of every address."""
ROOT_UID = "1.2.826.0.1.3680043.8.498.88"
PASSWORD = "a password for the benchmark"
SCANNERS = ("CT-EMERGENCY", "CT-WARD", "CT-NEURO", "CT-2")
WAITING = 40
"""Positives that nobody has acknowledged."""
EVERY = timedelta(minutes=4)
"""Between two series."""
ADDRESSES = {
    "page": "/",
    "rows": "/worklist/rows",
    "rows, last page": "/worklist/rows?page={last}",
    "rows, positive": "/worklist/rows?disposition=positive",
    "rows, finding": "/worklist/rows?finding=sah",
    "rows, scanner and day": "/worklist/rows?scanner=CT-WARD&from={day}&to={day}",
    "rows, not yet reviewed": "/worklist/rows?unreviewed=1",
    "rows, header and pixels differ": "/worklist/rows?disagreement=1",
    "rows, search": "/worklist/rows?search=77",
    "rows, all filters": "/worklist/rows?disposition=negative&scanner=CT-WARD&to={day}&unreviewed=1&disagreement=1",
    "page, all filters": "/?disposition=negative&scanner=CT-WARD&to={day}&unreviewed=1&disagreement=1",
}


# --- the ledger ------------------------------------------------------------------------------------------------------


def triaged(number: int, chance: random.Random) -> SeriesTriaged:
    """A result with as much in it as the router writes; the larger its number, the older."""
    disposition: Disposition = chance.choices(("positive", "negative", "not_eligible", "failed"), (9, 55, 33, 2))[0]
    analysed = disposition in ANALYSED
    last_image = utc_now() - number * EVERY
    uid = f"{ROOT_UID}.{number}"
    floor = 0.5 if disposition == "positive" else 0.0
    return SeriesTriaged(
        study_instance_uid=uid,
        series_instance_uid=f"{uid}.1",
        revision=1,
        occurred_at=last_image + timedelta(seconds=6),
        disposition=disposition,
        reasons=() if analysed else ("the kernel is bone, not soft tissue", "the series has 3 slices, 12 are needed"),
        uncertain=chance.random() < 0.05,
        protocol={
            head: Label(label, chance.uniform(0.6, 1))
            for head, label in (
                ("contrast", "non_contrast"),
                ("orientation", "axial"),
                ("kernel", "soft"),
                ("region", "head"),
            )
        },
        header={"contrast": "non_contrast", "orientation": "axial", "kernel": "bone", "region": None},
        disagreements=("kernel",) if chance.random() < 0.1 else (),
        findings=tuple(Finding(kind, floor + chance.uniform(0, 0.5), 4.2, 17, f"{uid}.1.17") for kind in FINDINGS)
        if analysed
        else (),
        notes=("gantry tilt +18.5 degrees",),
        accession_number=f"B{number:07d}",
        modality="CT",
        scanner=chance.choice(SCANNERS),
        calling_ae_title="CT1",
        instance_count=32,
        slice_count=32,
        close_reason="released-and-even",
        first_image_at=last_image - timedelta(seconds=9),
        last_image_at=last_image,
        received_at=last_image + timedelta(seconds=1),
        started_at=last_image + timedelta(seconds=1.1),
        classified_at=last_image + timedelta(seconds=1.6),
        detected_at=last_image + timedelta(seconds=5.9) if analysed else None,
        model_versions={"protocol": "1", "hemorrhage": "1"},
        software_version="0.1.0",
        config_version="0123456789abcdef",
    )


def fill(ledger: Ledger, count: int, blind: record.Blind, seed: int = 1) -> None:
    """Results as `upsert_result` writes them, with reviews and the receiver's rows; in bulk, not one by one."""
    chance = random.Random(seed)
    of_results: list[dict[str, Any]] = []
    of_reviews: list[dict[str, Any]] = []
    of_series: list[dict[str, Any]] = []
    waiting = WAITING
    for number in range(1, count + 1):
        event = triaged(number, chance)
        keys = {
            "series_instance_uid": event.series_instance_uid,
            "revision": 1,
            "study_instance_uid": event.study_instance_uid,
        }
        waits = event.disposition == "positive" and waiting > 0
        waiting -= waits
        seen_at = None if waits or (chance.random() < 0.3 and event.disposition != "positive") else event.occurred_at
        of_results.append(
            {
                **keys,
                "accession_number": event.accession_number,
                "scanner": event.scanner,
                "disposition": event.disposition,
                "probability": record.study_probability(event),
                "uncertain": event.uncertain,
                "event": json.loads(event.to_json()),
                "triaged_at": event.occurred_at,
                "posted_at": event.occurred_at + timedelta(seconds=1),
                "acknowledged_at": seen_at,
                "acknowledged_by": "rita" if seen_at else None,
                "superseded": False,
                "leading_finding": record.leading_finding(event),
                "disagreement": bool(event.disagreements),
                "blind": blind if event.disposition in ANALYSED else record.OPEN,
            }
        )
        of_series.append(
            {
                **keys,
                "accession_number": event.accession_number,
                "scanner": event.scanner,
                "modality": "CT",
                "calling_ae_title": "CT1",
                "instance_count": 32,
                "first_image_at": event.first_image_at,
                "last_image_at": event.last_image_at,
                "closed_at": event.received_at,
                "close_reason": event.close_reason,
                "published_at": event.received_at,
            }
        )
        if seen_at and event.disposition in ANALYSED:
            of_reviews.append(
                {
                    **keys,
                    "review_id": f"{number:036d}",
                    "action": chance.choice(record.VERDICTS),
                    "reader": chance.choice(("rita", "remi")),
                    "prediction_shown": True,
                    "occurred_at": event.occurred_at + timedelta(minutes=5),
                    "published_at": event.occurred_at + timedelta(minutes=5),
                }
            )
    with ledger.begin() as connection:
        connection.execute(insert(results), of_results)
        connection.execute(insert(series), of_series)
        connection.execute(insert(reviews), of_reviews)


# --- the service -----------------------------------------------------------------------------------------------------


def config_of(folder: Path, port: int, mode: str, ledger_url: str) -> Config:
    return Config(
        store=StoreConfig(root=folder / "store", min_free_gb=0),
        ledger=LedgerConfig(url=ledger_url or f"sqlite:///{folder / f'{mode}.sqlite'}"),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}"),
        notifier=NotifierConfig(mode=cast(Any, mode)),
        webui=WebuiConfig(
            token="token of the benchmark",
            secret_key="secret key of the benchmark",
            port=port,
            public_url=f"http://127.0.0.1:{port}",
        ),
    )


def serve_until_input_ends(config: Config) -> None:
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    serve(config, stop)


@contextlib.contextmanager
def running(folder: Path, config: Config, mode: str, ledger_url: str) -> Iterator[tuple[str, int]]:
    """The service in a process of its own: its address and process id."""
    command = [sys.executable, __file__, "--serve", str(folder), "--port", str(config.webui.port), "--mode", mode]
    url = config.webui.public_url
    with subprocess.Popen([*command, "--ledger", ledger_url], stdin=subprocess.PIPE) as process:
        try:
            while True:
                try:
                    requests.get(f"{url}/health", timeout=10).raise_for_status()
                    break
                except requests.RequestException:
                    if process.poll() is not None:
                        raise SystemExit("the web UI did not start") from None
                    time.sleep(0.1)
            yield url, process.pid
        finally:
            assert process.stdin is not None
            process.stdin.close()


def logged_in(url: str) -> requests.Session:
    http = requests.Session()
    (token,) = re.findall(r'name="csrf_token" value="([^"]+)"', http.get(f"{url}/login", timeout=60).text)
    form = {"csrf_token": token, "name": "rita", "password": PASSWORD}
    http.post(f"{url}/login", data=form, timeout=60).raise_for_status()
    return http


# --- measuring -------------------------------------------------------------------------------------------------------


def spread(times_ms: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(times_ms, n=100, method="inclusive")
    return {"p50": round(cuts[49], 1), "p95": round(cuts[94], 1), "max": round(max(times_ms), 1)}


def timed(count: int, work: Callable[[], object]) -> dict[str, float]:
    times: list[float] = []
    work()  # warm
    for _ in range(count):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return spread(times)


def processor_s(process: int) -> float:
    """What a process has had of the processors until now (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_addresses(url: str, server: int, results_count: int, count: int) -> dict[str, dict[str, float]]:
    http = logged_in(url)
    half_way = utc_now() - EVERY * (results_count // 2)
    known = {
        "day": max(utc_now() - timedelta(days=3), half_way).date(),
        "last": -(-results_count // record.PAGE_SIZE),
    }

    def ask(address: str) -> None:
        answer = http.get(url + address, timeout=60)
        assert answer.ok, f"{address}: {answer.status_code}"
        assert "<table" in answer.text, f"{address} lists nothing"

    found = {}
    for name, address in ADDRESSES.items():
        ask(address.format(**known))
        before = processor_s(server)
        found[name] = timed(count, partial(ask, address.format(**known)))
        found[name]["server_cpu"] = round(1000 * (processor_s(server) - before) / (count + 1), 1)
    return found


def measure_told(url: str, token: str, count: int) -> dict[str, Any]:
    """A new positive until the stream tells of it, and until its row has come."""
    listening, asking, posting = logged_in(url), logged_in(url), requests.Session()
    chance = random.Random(2)
    told, fetched = [], []
    with listening.get(f"{url}/worklist/events", stream=True, timeout=60) as stream:
        lines = (line for line in stream.iter_lines(chunk_size=1) if line.startswith(b"data:"))
        next(lines)
        for number in range(count):
            uid = f"{ROOT_UID}.0.{number}"
            event = replace(
                triaged(0, chance),
                study_instance_uid=uid,
                series_instance_uid=f"{uid}.1",
                accession_number=f"N{number}",
            )
            time.sleep(chance.uniform(0.1, 0.9))  # at any moment between two looks
            started = time.perf_counter()
            posting.put(
                f"{url}/api/results/{event.series_instance_uid}/1",
                data=event.to_json(),
                headers={"Authorization": f"Bearer {token}"},
                timeout=60,
            ).raise_for_status()
            next(lines)
            told.append(1000 * (time.perf_counter() - started))
            rows = asking.get(f"{url}/worklist/rows?search=N{number}", timeout=60).text
            assert event.accession_number in rows
            fetched.append(1000 * (time.perf_counter() - started))
    return {"told": spread(told), "rows_fetched": spread(fetched)}


def measure_parts(config: Config, ledger: Ledger, bus: Bus, count: int) -> dict[str, dict[str, float]]:
    app = create_app(config, ledger, StudyStore(config.store), bus)
    query = record.WorklistQuery(blind_reader="rita")
    with app.app_context():
        return {
            "find_worklist": timed(count, lambda: record.find_worklist(ledger, query)),
            "find_in_flight": timed(count, lambda: record.find_in_flight(ledger)),
            "find_scanners": timed(count, lambda: record.find_scanners(ledger)),
            "next_unread": timed(count, lambda: record.next_unread(ledger, ("", None), "rita")),
            "worklist_version, every 0.5 s": timed(count, lambda: record.worklist_version(ledger)),
            "find_banner, on every page": timed(count, operations.find_banner),
        }


def measure(arguments: argparse.Namespace, mode: str, folder: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = config_of(folder, port, mode, arguments.ledger)
    ledger, bus = open_ledger(config.ledger), open_bus(config.bus)
    try:
        add_user(ledger, "rita", PASSWORD, "reader")
        fill(ledger, arguments.results, record.SHADOW if mode == "shadow" else record.OPEN)
        with running(folder, config, mode, arguments.ledger) as (url, server):
            addresses = measure_addresses(url, server, arguments.results, arguments.requests)
            found: dict[str, Any] = {"addresses": addresses}
            if mode == "live":
                found |= measure_told(url, config.webui.token, arguments.told)
        if mode == "live":
            found["parts"] = measure_parts(config, ledger, bus, arguments.requests // 4)
        return found
    finally:
        bus.close()
        ledger.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=200, help="of each address")
    parser.add_argument("--told", type=int, default=20, help="new results that an open worklist is told of")
    parser.add_argument("--ledger", default="", metavar="URL", help="an empty database; else SQLite; live mode only")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_until_input_ends(config_of(arguments.serve, arguments.port, arguments.mode, arguments.ledger))
        return
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        live = measure(arguments, "live", Path(folder))
        shadow = {} if arguments.ledger else measure(arguments, "shadow", Path(folder))
    addresses = live["addresses"] | {f"{name} in shadow mode": p for name, p in shadow.get("addresses", {}).items()}
    slowest = max(addresses, key=lambda name: addresses[name]["p95"])
    answer = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "loadavg": {"before": [round(n, 1) for n in before], "after": [round(n, 1) for n in os.getloadavg()]},
        "results": arguments.results,
        "requests": arguments.requests,
        "target_ms": TARGET_MS,
        "slowest": {slowest: addresses[slowest]},
        **live,
        "in_shadow_mode": shadow.get("addresses"),
    }
    print(json.dumps(answer, indent=2))
    sys.exit(addresses[slowest]["p95"] > TARGET_MS)


if __name__ == "__main__":
    main()

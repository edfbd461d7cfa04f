"""From a result on the bus to its page accepted by an SMTP server: how long, and what faults do to it.

    python benchmarks/paging.py [--bus sqlite kafka] [--only latency|faults] [--short]

Latency: positive results are published at fixed rates, whatever becomes of the earlier ones (an open loop), and the
time counts from when each was to be published until the SMTP server accepts its page. The peer, in turn with it in
every round, is a bare loop over smtplib that sends the same e-mail with neither bus nor ledger. The notifier is the
service as `herald run notifier` starts it, with its settings' defaults: pages carry the key slice.

Faults: `--results` results, `--positives` of them positive, while the SMTP server answers 4xx, 5xx or too late, the
notifier is killed (SIGKILL) and started again, results are delivered again, and the ledger is locked by somebody else.
lost: positive studies of which no page was accepted. doubled: accepted e-mails with different Message-IDs for the same
study and recipient. The same Message-ID twice, which a mail system shows once, is counted apart: it cannot be avoided
where an acceptance was not heard, because the answer was late or the notifier died. Exit status 1 when one is lost or
doubled.

Prints one JSON object; times in milliseconds. Kafka needs Java (`make tools`): a broker of its own is started, or
`--kafka HOST:PORT` names one.
"""

import argparse
import asyncio
import hashlib
import json
import os
import platform
import random
import re
import shutil
import smtplib
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b32decode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from aiosmtpd.controller import Controller
from sqlalchemy import func, select

from herald.bus import Bus, open_bus
from herald.config import Config, load_config
from herald.errors import BusError, LedgerError
from herald.events import Finding, SeriesTriaged, utc_now
from herald.ledger import Ledger, open_ledger, pages
from herald.node import SUPERVISED
from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from herald.store import Prediction, StudyStore
from notifier.record import page_id
from notifier.service import PAGING_GROUP

ROOT = Path(__file__).parents[1]
TARGET_MS = 300.0
"""p99 at 10 pages/s."""
RECIPIENTS = ("first@pager.example", "second@pager.example", "third@pager.example")
"""Of the steps of the policy; a later one is paged when the one before has refused for good."""
UIDS = "1.2.826.0.1.3680043.8.498.77"
SLICES = 32
DRAIN_S = 900.0
SMTP_TIMEOUT_S = 2.0
"""In the run with faults; an answer that is too late comes after twice that."""
SMTP_FAULTS = {"4xx": 0.06, "disconnected": 0.02, "silent": 0.02, "late": 0.02}
"""Chance at each e-mail; `silent` never accepts, `late` accepts and says so when nobody listens any more."""
REFUSED = 0.1
"""Share of pages that the first two recipients refuse for good (5xx)."""
REDELIVERED = 0.1
LONG_BUSY_S = 35.0
"""Longer than the ledger waits for a lock, so that an error comes of it; once, unless the run is short."""


# --- the server at the other end -------------------------------------------------------------------------------------


@dataclass
class Accepted:
    """One accepted e-mail, as the SMTP server wrote it down."""

    at: float
    to: str
    message_id: str
    study_mark: str
    """Hexadecimal digits of the page's link, which name the study; taken from the text, not from the Message-ID."""
    late: bool


class Mailbox:
    """The SMTP server's handler: writes down when it accepts what, with faults by a seed."""

    def __init__(self, folder: Path, seed: int | None) -> None:
        self._log = (folder / "accepted.jsonl").open("a", buffering=1)
        self._sample = folder / "sample.eml"
        self._faults = (folder / "faults.jsonl").open("a", buffering=1)
        self._random = random.Random(seed)
        self._seed = seed

    async def handle_DATA(self, _server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's
        """Accept, or do what the fault says."""
        content: bytes = envelope.content
        message_id = _find(rb"(?im)^message-id:\s*<([^>]+)>", content)
        fault = self._fault(message_id, envelope.rcpt_tos[0])
        if fault:
            self._faults.write(json.dumps(fault) + "\n")
        if fault == "5xx":
            return "550 5.1.1 No such pager"
        if fault == "4xx":
            return "451 4.3.0 Try again later"
        if fault == "disconnected":
            session.loop.call_soon(_server.transport.close)
            return "421 4.3.2 Going away"
        if fault == "silent":
            await asyncio.sleep(2 * SMTP_TIMEOUT_S)
            return "451 4.3.0 Try again later"
        token = _find(rb"/page/([a-z2-7]{32})", content)
        mark = b32decode(token, casefold=True)[:8].hex() if token else ""
        line = {"at": time.time(), "to": envelope.rcpt_tos[0], "message_id": message_id, "study_mark": mark}
        self._log.write(json.dumps({**line, "late": fault == "late"}) + "\n")
        if fault == "late":
            await asyncio.sleep(2 * SMTP_TIMEOUT_S)
        if not self._sample.exists() and token:
            self._sample.write_bytes(content)
        return "250 2.0.0 Accepted"

    def _fault(self, message_id: str, to: str) -> str:
        if self._seed is None or message_id.startswith("peer-"):
            return ""
        # whoever refuses for good does so each time, as a mail system does; the last recipient takes everything
        share = int(hashlib.sha256(f"{self._seed} {message_id} {to}".encode()).hexdigest()[:8], 16) / 16**8
        if to != RECIPIENTS[-1] and share < REFUSED:
            return "5xx"
        chance = self._random.random()
        for fault, share in SMTP_FAULTS.items():
            if chance < share:
                return fault
            chance -= share
        return ""


class Worklist(BaseHTTPRequestHandler):
    """Takes results as the web UI does."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        """Answer 201."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def receive(folder: Path, smtp_port: int, http_port: int, seed: int | None) -> None:
    """The process at the other end, until its standard input closes."""
    controller = Controller(Mailbox(folder, seed), hostname="127.0.0.1", port=smtp_port, ready_timeout=60)
    controller.start()
    web = ThreadingHTTPServer(("127.0.0.1", http_port), Worklist)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    controller.stop()
    web.shutdown()


class Receiver:
    """That process, and what it has accepted so far."""

    def __init__(self, folder: Path, seed: int | None) -> None:
        self.folder = folder
        self.smtp_port, self.http_port = free_port(), free_port()
        command = [sys.executable, __file__, "--receive", str(folder), str(self.smtp_port), str(self.http_port)]
        command += [] if seed is None else ["--seed", str(seed), "--with-faults"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise SystemExit("the SMTP server did not start")
        self._read_to = 0
        self._accepted: list[Accepted] = []

    def accepted(self) -> list[Accepted]:
        """Everything accepted so far."""
        with (self.folder / "accepted.jsonl").open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                self._accepted.append(Accepted(**json.loads(line)))
        return self._accepted

    def faults(self) -> Counter[str]:
        """How often it did what it should not."""
        return Counter(json.loads(line) for line in (self.folder / "faults.jsonl").read_text().splitlines())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


# --- Herald ----------------------------------------------------------------------------------------------------------


class Herald:
    """A notifier of its own under `folder`, with its bus, ledger and store."""

    def __init__(self, folder: Path, bus_url: str, receiver: Receiver, picture: bool, **notifier: object) -> None:
        steps = [{"to": to, "after_minutes": 600.0 * i} for i, to in enumerate(RECIPIENTS)]
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HERALD_")},
            "PYTHONPATH": str(ROOT),
            SUPERVISED: "1",  # it ends with this process, however that ends
            "HERALD_NODE__DATA_DIR": str(folder),
            "HERALD_NODE__LOG_LEVEL": "error",
            "HERALD_BUS__URL": bus_url,
            "HERALD_STORE__MIN_FREE_GB": "0",
            "HERALD_NOTIFIER__MODE": "live",
            "HERALD_NOTIFIER__STEPS": json.dumps(steps),
            "HERALD_NOTIFIER__SMTP_PORT": str(receiver.smtp_port),
            "HERALD_NOTIFIER__WEBUI_URL": f"http://127.0.0.1:{receiver.http_port}",
            "HERALD_NOTIFIER__PICTURE": str(picture).lower(),
            "HERALD_NOTIFIER__MODELS_SILENT_MINUTES": "0",
            "HERALD_WEBUI__TOKEN": "benchmark",
            "HERALD_WEBUI__SECRET_KEY": "benchmark",
            **{f"HERALD_NOTIFIER__{name.upper()}": str(value) for name, value in notifier.items()},
        }
        self._folder = folder
        self.config: Config = load_config(environment=self._environment)
        self.ledger: Ledger = open_ledger(self.config.ledger)
        self.bus: Bus = open_bus(self.config.bus)
        self._store = StudyStore(self.config.store)
        self._prediction = folder / "prediction.npz"
        if picture:
            shutil.move(self._store.write_prediction("1", "1", 1, prediction()), self._prediction)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the notifier, as `herald run` does."""
        with (self._folder / "notifier.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "herald", "run", "notifier"],
                env=self._environment,
                cwd=self._folder,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self._process is not None
        self._process.kill()
        self._process.communicate()

    def publish(self, event: SeriesTriaged) -> None:
        """Put the result on the bus; its prediction is in the store already, as the router leaves it."""
        if event.disposition == "positive" and self._prediction.exists():
            uids = event.study_instance_uid, event.series_instance_uid
            path = self._store.prediction_path(*uids, event.revision)
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                path.hardlink_to(self._prediction)
        while True:
            try:
                self.bus.publish(event)
                return
            except BusError:
                time.sleep(0.1)

    def is_drained(self) -> bool:
        """Whether every result was handled and no page waits to be sent."""
        try:
            with self.ledger.read() as connection:
                due = connection.scalar(select(func.count()).select_from(pages).where(pages.c.state == "due"))
            return due == 0 and self.bus.backlog(PAGING_GROUP, SeriesTriaged.topic) == 0
        except (BusError, LedgerError):
            return False

    def states(self) -> dict[str, int]:
        """Pages by state."""
        statement = select(pages.c.state, func.count()).group_by(pages.c.state)
        with self.ledger.read() as connection:
            return {state: count for state, count in connection.execute(statement)}  # noqa: C416 - rows, not pairs

    def close(self) -> None:
        """End the notifier as a stop of the node does; its log is shown when it ends otherwise."""
        if self._process is not None:
            self._process.communicate(timeout=60)  # closes its standard input
            status = self._process.returncode
            log = (self._folder / "notifier.log").read_text(errors="replace")
            if status != 0:
                raise SystemExit(f"the notifier ended with status {status}:\n{log[-4000:]}")
        self.bus.close()
        self.ledger.close()


def prediction() -> Prediction:
    """A head with a bleed, as large in the store as a real one, so that a picture takes its usual time."""
    row, column = np.mgrid[:DETECTION_IN_PLANE, :DETECTION_IN_PLANE].astype(np.float32) * (256 / DETECTION_IN_PLANE)
    noise = np.random.default_rng(1)
    hounsfield = np.full((SLICES, DETECTION_IN_PLANE, DETECTION_IN_PLANE), -1000.0, dtype=np.float32)
    head = np.hypot((row - 128) / 115, (column - 128) / 92)
    hounsfield[:, head < 1] = 900
    hounsfield[:, head < 0.92] = 34
    bleed = np.hypot((row - 108) / 20, (column - 172) / 15) < 1
    hounsfield[12:16, bleed] = 68
    mask = np.zeros((SLICES, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS)), dtype=np.uint8)
    mask[12:16, bleed, :2] = 240
    slice_probability = np.full((SLICES, len(FINDINGS)), 0.03, dtype=np.float32)
    slice_probability[12:16, :2] = 0.93
    return Prediction(
        hounsfield=(hounsfield + noise.normal(0, 4, hounsfield.shape)).astype(np.int16),
        mask=mask,
        slice_probability=slice_probability,
        probability=slice_probability.max(axis=0),
        placement=np.array([0, 0, 512, 512, 512]),
        first_source=np.arange(SLICES),
        last_source=np.arange(SLICES),
        sop_instance_uids=np.array([f"{UIDS}.{i}" for i in range(SLICES)]),
        pixel_spacing_mm=np.array([0.45, 0.45]),
    )


def result(study: int, positive: bool = True, series: int = 1) -> SeriesTriaged:
    """The result of one series."""
    now = utc_now()
    high = (0.93, 0.91, 0.04, 0.12, 0.03)
    return SeriesTriaged(
        study_instance_uid=f"{UIDS}.{study}",
        series_instance_uid=f"{UIDS}.{study}.{series}",
        revision=1,
        occurred_at=now,
        disposition="positive" if positive else "negative",
        findings=tuple(
            Finding(kind, high[i] if positive else 0.02, 11.4 if positive and i < 2 else 0.0, 14, f"{UIDS}.13")
            for i, kind in enumerate(FINDINGS)
        ),
        accession_number=f"ACC{study:08d}",
        modality="CT",
        scanner="CT-EMERGENCY",
        calling_ae_title="CT1",
        instance_count=SLICES,
        slice_count=SLICES,
        first_image_at=now,
        last_image_at=now,
    )


def mark(study_instance_uid: str) -> str:
    """What names the study in the link of its pages: see `herald.links`."""
    return page_id(study_instance_uid, 0).replace("-", "")[:16]


# --- latency ---------------------------------------------------------------------------------------------------------


def at_rate(rate: float, count: int, act: Callable[[int], None]) -> list[float]:
    """Call `act` at a fixed rate, late where it takes too long; the times at which each call was to be made."""
    start = time.time()
    planned = [start + i / rate for i in range(count)]
    for i, moment in enumerate(planned):
        time.sleep(max(0.0, moment - time.time()))
        act(i)
    return planned


def send_bare(email: bytes, port: int, number: int) -> None:
    """What the peer does for a page."""
    own = re.sub(rb"(?im)^message-id:.*$", b"Message-ID: <peer-%d@localhost>" % number, email, count=1)
    with smtplib.SMTP("127.0.0.1", port, local_hostname="localhost", timeout=30) as smtp:
        smtp.sendmail("herald@localhost", [RECIPIENTS[0]], own)


def measure(
    folder: Path, bus_url: str, rates: Sequence[float], seconds: float, rounds: int, picture: bool
) -> dict[str, object]:
    """Latency at each rate, Herald and its peer in turn."""
    receiver = Receiver(folder, None)
    herald = Herald(folder, bus_url, receiver, picture)
    herald.start()
    number = 0
    blocks: dict[float, list[tuple[list[float], list[float]]]] = {rate: [] for rate in rates}
    accepted_per_s: dict[float, list[float]] = {rate: [] for rate in rates}
    unsent = 0
    try:
        for number in range(1, 4):  # the first pages open what later ones find open
            herald.publish(result(number))
            wait_for(lambda count=number: len(receiver.accepted()) >= count, 120.0, "the first pages")  # type: ignore[misc]
        email = (folder / "sample.eml").read_bytes()
        for _ in range(rounds):
            for rate in rates:
                count = max(2, round(rate * seconds))
                first, number = number + 1, number + count
                base = first
                planned = at_rate(rate, count, lambda i, base=base: herald.publish(result(base + i)))  # type: ignore[misc]
                of_study = {mark(f"{UIDS}.{first + i}"): at for i, at in enumerate(planned)}
                moments = arrivals(receiver, of_study, "study_mark", 60.0 + 20.0 * seconds)
                unsent += count - len(moments)
                own = latencies(moments, of_study)
                accepted_per_s[rate].append(len(own) / (max(moments.values(), default=0.0) - planned[0]))
                planned = at_rate(rate, count, lambda i, base=base: send_bare(email, receiver.smtp_port, base + i))  # type: ignore[misc]
                of_id = {f"peer-{first + i}@localhost": at for i, at in enumerate(planned)}
                bare = latencies(arrivals(receiver, of_id, "message_id", 120.0), of_id)
                blocks[rate].append((own, bare))
                told = f"{bus_url.partition(':')[0]}, {rate:g}/s: p50 {percentile(own, 50)}, p99 {percentile(own, 99)}"
                print(f"{told} ms; bare loop p50 {percentile(bare, 50)} ms", file=sys.stderr, flush=True)
    finally:
        herald.close()
        receiver.close()
    answer: dict[str, object] = {
        f"{rate:g}_per_s": {
            "pages": sum(len(own) for own, _ in of_rate),
            "accepted_per_s": round(statistics.median(accepted_per_s[rate]), 1),
            "herald_ms_p50": percentile([t for own, _ in of_rate for t in own], 50),
            "herald_ms_p99": percentile([t for own, _ in of_rate for t in own], 99),
            "bare_smtplib_ms_p50": percentile([t for _, bare in of_rate for t in bare], 50),
            "bare_smtplib_ms_p99": percentile([t for _, bare in of_rate for t in bare], 99),
            # of each round first, then the median: what drifts between rounds cancels
            "herald_over_bare_p50": round(
                statistics.median(percentile(own, 50) / percentile(bare, 50) for own, bare in of_rate), 2
            ),
        }
        for rate, of_rate in blocks.items()
    }
    if 10.0 in blocks:
        p99 = percentile([t for own, _ in blocks[10.0] for t in own], 99)
        answer["target"] = {"p99_below_ms_at_10_per_s": TARGET_MS, "is_met": p99 < TARGET_MS}
    return {**answer, "picture": picture, "email_bytes": len(email), "not_accepted_in_time": unsent}


def arrivals(receiver: Receiver, planned: dict[str, float], key: str, within_s: float) -> dict[str, float]:
    """When each was first accepted, of those accepted in time; all of them are waited for."""

    def first() -> dict[str, float]:
        found: dict[str, float] = {}
        for accepted in receiver.accepted():
            name: str = getattr(accepted, key)
            if name in planned and not (key == "study_mark" and accepted.message_id.startswith("peer-")):
                found.setdefault(name, accepted.at)
        return found

    with suppress(TimeoutError):
        wait_for(lambda: len(first()) == len(planned), within_s, "acceptance")
    return first()


def latencies(moments: dict[str, float], planned: dict[str, float]) -> list[float]:
    """Milliseconds from when each was planned until it was accepted."""
    return [1000 * (at - planned[name]) for name, at in moments.items()]


def percentile(values: Sequence[float], number: int) -> float:
    """A percentile of milliseconds."""
    return round(float(np.percentile(values, number)), 1) if values else float("nan")


# --- faults ----------------------------------------------------------------------------------------------------------


@dataclass
class Disturbance:
    """What was done to the notifier."""

    kills: int = 0
    busy: int = 0
    longest_busy_s: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)


def endure(
    folder: Path, bus_url: str, results: int, positives: float, kills: int, rate: float, seed: int, long_busy: bool
) -> dict[str, object]:
    """The run with faults, and what became of its pages."""
    chance = random.Random(seed)
    events, redelivered = deliveries(results, positives, chance)
    studies = {event.study_instance_uid for event in events if event.disposition == "positive"}
    receiver = Receiver(folder, seed)
    herald = Herald(folder, bus_url, receiver, picture=False, smtp_timeout_s=SMTP_TIMEOUT_S)
    herald.start()
    disturbance = Disturbance()
    others = [
        threading.Thread(target=kill_often, args=(herald, receiver, kills, len(events) / rate, chance, disturbance)),
        threading.Thread(target=keep_busy, args=(herald, long_busy, random.Random(seed + 1), disturbance)),
    ]
    started = time.monotonic()
    try:
        for thread in others:
            thread.start()
        at_rate(rate, len(events), lambda i: herald.publish(events[i]))
        published_s = time.monotonic() - started
        others[0].join()
        disturbance.stop.set()
        others[1].join()
        wait_for(herald.is_drained, DRAIN_S, "the last page", every_s=0.5)
        drained_s = time.monotonic() - started
        put_aside = len(herald.bus.dead_letters(SeriesTriaged.topic))
        states = herald.states()
    finally:
        disturbance.stop.set()
        for thread in others:
            thread.join()
        herald.close()
        receiver.close()
    return {
        "results": results,
        "positive_studies": len(studies),
        "delivered_again": redelivered,
        "notifier_killed": disturbance.kills,
        "ledger_locked": {"times": disturbance.busy, "longest_s": round(disturbance.longest_busy_s, 1)},
        "smtp_faults": dict(receiver.faults()),
        **account(studies, receiver.accepted()),
        "states": states,
        "dead_letters": put_aside,
        "published_in_s": round(published_s, 1),
        "drained_in_s": round(drained_s, 1),
    }


def account(studies: set[str], accepted: Sequence[Accepted]) -> dict[str, object]:
    """What was lost and what came twice, by the text and the recipient of each e-mail, not by its Message-ID."""
    of_mark = {mark(study): study for study in studies}
    message_ids: dict[tuple[str, str], Counter[str]] = {}
    strays = 0
    late = Counter(one.message_id for one in accepted if one.late)
    for one in accepted:
        study = of_mark.get(one.study_mark)
        if study is None:
            strays += 1
            continue
        message_ids.setdefault((study, one.to), Counter())[one.message_id] += 1
    reached = {study for study, _ in message_ids}
    again = {name: count - 1 for counts in message_ids.values() for name, count in counts.items() if count > 1}
    return {
        "pages_accepted": len(message_ids),
        "pages_lost": len(studies - reached),
        "pages_doubled": sum(len(counts) > 1 for counts in message_ids.values()),
        "pages_of_no_positive_study": strays,
        "same_message_id_again": {
            "after_a_late_answer": sum(min(count, late[name]) for name, count in again.items()),
            "after_a_kill": sum(max(0, count - late[name]) for name, count in again.items()),
        },
    }


def deliveries(results: int, positives: float, chance: random.Random) -> tuple[list[SeriesTriaged], int]:
    """Results in the order of delivery, and how many come again: of the same cause, triaged anew, some time later."""
    planned: list[tuple[float, SeriesTriaged]] = []
    redelivered, study = 0, 0
    for number in range(results):
        before = planned[-1][1] if planned else None
        alone = before is not None and before.disposition == "positive" and before.series_instance_uid.endswith(".1")
        second = alone and chance.random() < 0.1  # a tenth of positive studies have another positive series: one page
        study = study if second else study + 1
        event = result(study, second or chance.random() < positives, 2 if second else 1)
        planned.append((number, event))
        if chance.random() < REDELIVERED:
            redelivered += 1
            planned.insert(-1, (number + chance.uniform(1, 200), replace(event, detected_at=utc_now())))
    return [event for _, event in sorted(planned, key=lambda item: item[0])], redelivered


def kill_often(
    herald: Herald, receiver: Receiver, kills: int, seconds: float, chance: random.Random, made: Disturbance
) -> None:
    """Kill the notifier at work, soon after it has sent something, and start it again."""
    while made.kills < kills and not made.stop.is_set():
        if made.stop.wait(chance.uniform(0.3, 1.2) * seconds / kills):
            return
        before, deadline = len(receiver.accepted()), time.monotonic() + 20.0
        while len(receiver.accepted()) == before and time.monotonic() < deadline:
            if made.stop.wait(0.005):
                return
        made.stop.wait(chance.uniform(0.0, 0.05))
        herald.kill()
        made.kills += 1
        herald.start()


def keep_busy(herald: Herald, long_busy: bool, chance: random.Random, made: Disturbance) -> None:
    """Hold the ledger's write lock now and then, as somebody's backup does."""
    path = herald.config.ledger.url.removeprefix("sqlite:///")
    long_due = long_busy
    while not made.stop.wait(chance.uniform(0.5, 3.0)):
        other = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            other.execute("BEGIN IMMEDIATE")
            held_s = LONG_BUSY_S if long_due and made.busy >= 3 else chance.uniform(0.05, 1.0)
            long_due = long_due and held_s != LONG_BUSY_S
            made.busy += 1
            made.longest_busy_s = max(made.longest_busy_s, held_s)
            made.stop.wait(held_s)
            other.execute("ROLLBACK")
        except sqlite3.OperationalError:  # the notifier held it for longer: busy enough
            continue
        finally:
            other.close()


# --- the command -----------------------------------------------------------------------------------------------------


def wait_for(holds: Callable[[], bool], within_s: float, what: str, every_s: float = 0.02) -> None:
    """Look until it holds; raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {within_s:.0f} s")
        time.sleep(every_s)


def free_port() -> int:
    """A port that is free together with the next one, which Kafka's controller takes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@contextmanager
def running_kafka(folder: Path) -> Iterator[str]:
    """A broker of our own; gives HOST:PORT."""
    from herald.bus.kafka import KafkaBus

    port = free_port()
    command = [sys.executable, str(ROOT / "deploy/kafka/broker.py"), "run", "--port", str(port), "--data", str(folder)]
    with (folder / "output.txt").open("ab") as output:
        broker = subprocess.Popen(command, stdout=output, stderr=output)

    def answers() -> bool:
        if broker.poll() is not None:
            raise SystemExit(f"the Kafka broker ended:\n{(folder / 'output.txt').read_text()[-2000:]}")
        bus = KafkaBus(f"127.0.0.1:{port}")
        try:
            bus.check()
            return True
        except BusError:
            return False
        finally:
            bus.close()

    try:
        wait_for(answers, 180.0, "the Kafka broker", every_s=0.2)
        yield f"127.0.0.1:{port}"
    finally:
        broker.kill()
        broker.wait()


def _find(pattern: bytes, content: bytes) -> str:
    found = re.search(pattern, content)
    return found.group(1).decode("ascii", "replace") if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bus", nargs="+", choices=["sqlite", "kafka"], default=["sqlite", "kafka"])
    parser.add_argument("--kafka", metavar="HOST:PORT", help="use this broker instead of one of our own")
    parser.add_argument("--only", choices=["latency", "faults"])
    parser.add_argument("--short", action="store_true", help="a minute or two, to see that everything works")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 10.0, 100.0], help="pages per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each rate and round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--no-picture", action="store_true", help="e-mails without the key slice")
    parser.add_argument("--results", type=int, default=10000)
    parser.add_argument("--positives", type=float, default=0.05)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--result-rate", type=float, default=40.0, help="results per second in the run with faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--receive", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--with-faults", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.receive:
        where, smtp_port, http_port = given.receive
        receive(Path(where), int(smtp_port), int(http_port), given.seed if given.with_faults else None)
        return
    if given.short:
        given.rates, given.seconds, given.rounds = [10.0], 5.0, 1
        given.results, given.positives, given.kills = min(given.results, 300), max(given.positives, 0.2), 3
    found: dict[str, object] = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"}
    failed = False
    for name in given.bus:
        with tempfile.TemporaryDirectory(prefix="herald-paging-") as work, buses(name, given.kafka, Path(work)) as url:
            of_bus: dict[str, Any] = {}
            if given.only != "faults":
                folder = Path(work) / "latency"
                folder.mkdir()
                picture = not given.no_picture
                of_bus["latency"] = measure(folder, url(folder), given.rates, given.seconds, given.rounds, picture)
            if given.only != "latency":
                folder = Path(work) / "faults"
                folder.mkdir()
                of_bus["faults"] = endure(
                    folder,
                    url(folder),
                    given.results,
                    given.positives,
                    given.kills,
                    given.result_rate,
                    given.seed,
                    long_busy=not given.short and given.results >= 5000,
                )
                failed = failed or bool(of_bus["faults"]["pages_lost"] or of_bus["faults"]["pages_doubled"])
            found[name] = of_bus
    print(json.dumps(found, indent=2))
    raise SystemExit(1 if failed else 0)


@contextmanager
def buses(name: str, servers: str | None, work: Path) -> Iterator[Callable[[Path], str]]:
    """Makes the URL of an empty bus for a folder."""
    if name == "sqlite":
        yield lambda folder: f"sqlite:///{folder / 'bus.sqlite'}"
    elif servers:
        yield lambda folder: f"kafka://{servers}/paging-{os.getpid()}-{folder.name}."
    else:
        data = work / "kafka"
        data.mkdir()
        with running_kafka(data) as own:
            yield lambda folder: f"kafka://{own}/{folder.name}."


if __name__ == "__main__":
    main()

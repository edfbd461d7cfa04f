"""A whole node for tests: every service its own process, on loopback, with a real SMTP server at the end."""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from herald.config import Config, load_config
from herald.ledger import Ledger, open_ledger, pages, results
from herald.node import SERVICES, Supervisor
from herald.send import SendReport, send
from herald.smtp_sink import SmtpSink

MODELS = Path(__file__).parent.parent / "herald-data" / "models"
TOKEN = "token-of-the-tests"
SECRET_KEY = "secret-key-of-the-tests"
TIMEOUT_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def smtp_sink() -> Iterator[SmtpSink]:
    sink = SmtpSink(free_port())
    sink.start()
    try:
        yield sink
    finally:
        sink.stop()


def settings(folder: Path, smtp_port: int, **more: str) -> dict[str, str]:
    """The environment of a live node under `folder`, ports chosen; `more` is TABLE__KEY=value."""
    if not any(MODELS.glob("*/*/saved_model.pb")):
        pytest.fail("the models are not exported; run `make models`")
    serving, web = free_port(), free_port()
    chosen = {
        "NODE__DATA_DIR": str(folder),
        "RECEIVER__HOST": "127.0.0.1",
        "RECEIVER__PORT": str(free_port()),
        "RECEIVER__QUIET_S": "3",
        "STORE__MIN_FREE_GB": "0.1",
        "SERVING__PORT": str(serving),
        "SERVING__MODELS": str(MODELS),
        "ROUTER__SERVING_ADDRESS": f"127.0.0.1:{serving}",
        "NOTIFIER__MODE": "live",
        "NOTIFIER__STEPS": json.dumps([{"to": "oncall@hospital.example"}]),
        "NOTIFIER__SMTP_PORT": str(smtp_port),
        "NOTIFIER__WEBUI_URL": f"http://127.0.0.1:{web}",
        "WEBUI__PORT": str(web),
        "WEBUI__TOKEN": TOKEN,
        "WEBUI__SECRET_KEY": SECRET_KEY,
        **more,
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HERALD_")}
    return inherited | {f"HERALD_{name}": value for name, value in chosen.items()}


@dataclass(frozen=True)
class WholeNode:
    """Talks to a running node and reads its ledger."""

    config: Config
    environment: Mapping[str, str]
    ledger: Ledger

    @contextmanager
    def running(self, *names: str) -> Iterator[None]:
        """These services, all without names, supervised for the block."""
        stop = threading.Event()
        supervisor = Supervisor(self.config, names or tuple(SERVICES), self.environment)
        thread = threading.Thread(target=supervisor.run, args=(stop,))
        thread.start()
        try:
            if "receiver" in (names or SERVICES):
                wait_for_port(self.config.receiver.port)
            yield
        finally:
            stop.set()
            thread.join()

    def send(self, folder: Path) -> SendReport:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        to = f"{self.config.receiver.ae_title}@127.0.0.1:{self.config.receiver.port}"
        return send(files, to)

    def results(self) -> dict[str, Any]:
        """Newest result of every series, by its UID."""
        with self.ledger.read() as connection:
            rows = connection.execute(select(results).order_by(results.c.revision)).all()
        return {row.series_instance_uid: row for row in rows}

    def pages(self) -> Sequence[Any]:
        with self.ledger.read() as connection:
            return connection.execute(select(pages)).all()

    def wait_for_results(self, series: Sequence[str], timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        until(lambda: set(series) <= set(self.results()), f"results of {len(series)} series", timeout_s)
        return self.results()


def series_of(report: SendReport) -> list[str]:
    return list(dict.fromkeys(outcome.series_instance_uid for outcome in report.stored))


def until(what: Any, why: str, timeout_s: float = TIMEOUT_S) -> Any:
    """Poll the state of other processes, of which no event tells us."""
    deadline = time.monotonic() + timeout_s
    while not (seen := what()):
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {why}"
        time.sleep(0.1)
    return seen


def wait_for_port(port: int) -> None:
    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    until(answers, f"something listens on port {port}")


@contextmanager
def whole_node(folder: Path, smtp_port: int, **more: str) -> Iterator[WholeNode]:
    """A node that is set up but not running."""
    environment = settings(folder, smtp_port, **more)
    config = load_config(None, environment)
    folder.mkdir(parents=True, exist_ok=True)
    ledger = open_ledger(config.ledger)
    try:
        yield WholeNode(config, environment, ledger)
    finally:
        ledger.close()

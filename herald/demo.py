"""`herald demo`: the whole node on embedded defaults, fed by a real association, paging over a real SMTP session."""

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import func, select

from herald.config import Config, load_config
from herald.errors import HeraldError, NotDicomError
from herald.ledger import Ledger, open_ledger, pages, results, series
from herald.node import SERVICES, Supervisor
from herald.send import SendReport, send
from herald.signatures import HEADS, SIGNATURES
from herald.smtp_sink import SmtpSink

log = logging.getLogger(__name__)

RECIPIENT = "radiologist-on-call@hospital.example"
READER = "demo"
READY_TIMEOUT_S = 120.0

console = Console(stderr=True)


class DemoError(HeraldError):
    """Raised when the demonstration cannot reach its end."""


@dataclass(frozen=True)
class Demo:
    """A running node with what a person needs to try it."""

    config: Config
    ledger: Ledger
    sink: SmtpSink
    password: str


def run_demo(dicom: Path | None, once: bool, as_json: bool, data: Path | None, timeout_s: float) -> int:
    """Run the demonstration; returns the exit status, 0 when every series has its disposition."""
    with ExitStack() as stack:
        demo = stack.enter_context(_running_node(data))
        files = _files(dicom) if dicom else _simulated(demo.config.node.data_dir / "simulated")
        report = _send(files, demo.config)
        with console.status("waiting for every series to get its disposition"):
            complete = _wait(demo, _series_of(report), timeout_s)
        told = _told(demo, _series_of(report))
        if as_json:
            print(json.dumps(told, indent=2))
        else:
            _print(told, demo)
        if not complete:
            console.print(f"[red]not every series had its disposition within {timeout_s:.0f} s; see the log above")
        if not once:
            _wait_for_interrupt()
    return 0 if complete else 1


# --- the node --------------------------------------------------------------------------------------------------------


@contextmanager
def _running_node(data: Path | None) -> Iterator[Demo]:
    """Start SMTP sink and node under a fresh data folder; both stop at the end."""
    with ExitStack() as stack:
        folder = data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="herald-demo-")))
        environment = {**_settings(folder.absolute()), **os.environ}
        config = load_config(None, environment)
        folder.mkdir(parents=True, exist_ok=True)
        _export_models(config)
        sink = SmtpSink(config.notifier.smtp_port)
        sink.start()
        stack.callback(sink.stop)
        ledger = open_ledger(config.ledger)
        stack.callback(ledger.close)
        password = _add_reader(ledger)
        _start(config, environment, stack)
        yield Demo(config, ledger, sink, password)


def _settings(data_dir: Path) -> dict[str, str]:
    """Embedded defaults as environment, which the caller's own environment overrides."""
    serving, webui, smtp, scp = (_free_port(port) for port in (8500, 8080, 2525, 11112))
    return {
        "HERALD_NODE__DATA_DIR": str(data_dir),
        "HERALD_RECEIVER__HOST": "127.0.0.1",
        "HERALD_RECEIVER__PORT": str(scp),
        "HERALD_STORE__MIN_FREE_GB": "0.5",
        "HERALD_SERVING__PORT": str(serving),
        "HERALD_SERVING__MODELS": str(load_config(None, os.environ).serving.models),
        "HERALD_ROUTER__SERVING_ADDRESS": f"127.0.0.1:{serving}",
        "HERALD_NOTIFIER__MODE": "live",
        "HERALD_NOTIFIER__STEPS": json.dumps([{"to": RECIPIENT, "channel": "smtp"}]),
        "HERALD_NOTIFIER__SMTP_HOST": "127.0.0.1",
        "HERALD_NOTIFIER__SMTP_PORT": str(smtp),
        "HERALD_NOTIFIER__WEBUI_URL": f"http://127.0.0.1:{webui}",
        "HERALD_WEBUI__PORT": str(webui),
        "HERALD_WEBUI__TOKEN": token_urlsafe(32),
        "HERALD_WEBUI__SECRET_KEY": token_urlsafe(32),
    }


def _free_port(preferred: int) -> int:
    """The usual port when nobody has it, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise DemoError("no free port on 127.0.0.1")


def _export_models(config: Config) -> None:
    """Make the SavedModels when they are not there: TensorFlow is needed for this only, so in a process of its own."""
    if all(any((config.serving.models / name).glob("*/saved_model.pb")) for name in SIGNATURES):
        return
    with console.status("exporting the models (once)"):
        done = subprocess.run(
            [sys.executable, "-m", "serving.export", "--out", str(config.serving.models)],
            stdout=sys.stderr,
            check=False,
        )
    if done.returncode:
        raise DemoError(f"python -m serving.export failed with status {done.returncode}; its message is above")


def _add_reader(ledger: Ledger) -> str:
    from webui.users import add_user

    password = token_urlsafe(9)
    add_user(ledger, READER, password, "admin")
    return password


def _start(config: Config, environment: Mapping[str, str], stack: ExitStack) -> None:
    """Supervise every service in a thread, and return when each answers."""
    stop = threading.Event()
    broken: list[BaseException] = []

    def supervise() -> None:
        try:
            Supervisor(config, tuple(SERVICES), environment).run(stop)
        except HeraldError as error:
            broken.append(error)

    thread = threading.Thread(target=supervise, name="supervisor")
    thread.start()
    stack.callback(thread.join)
    stack.callback(stop.set)
    from herald.check import check

    with console.status("starting receiver, router, model server, notifier and web UI"):
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            faults = [outcome for outcome in check(config, quick=True) if not outcome.ok]
            if broken:
                raise broken[0]
            if not faults:
                return
            if time.monotonic() > deadline:
                raise DemoError("; ".join(f"{fault.what}: {fault.detail}" for fault in faults))
            time.sleep(0.1)  # other processes start: there is no event of theirs to wait for yet


# --- sending and waiting ---------------------------------------------------------------------------------------------


def _simulated(folder: Path) -> list[Path]:
    from serving.phantom import write_demo_study

    with console.status("simulating two head CT studies, one with a haemorrhage"):
        write_demo_study(folder)
    return sorted(folder.rglob("*.dcm"))


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else [folder]
    if not files or not folder.exists():
        raise NotDicomError(f"{folder} holds no file; give a folder of DICOM files")
    return files


def _send(files: list[Path], config: Config) -> SendReport:
    """Send the files with a progress bar; what is no DICOM is named and passed over."""
    to = f"{config.receiver.ae_title}@127.0.0.1:{config.receiver.port}"
    with Progress(
        TextColumn("C-STORE to " + to), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        task = bar.add_task("send", total=len(files))
        report = send(files, to, on_progress=lambda done, total: bar.update(task, completed=done, total=total))
    for outcome in report.failed:
        console.print(f"[yellow]{outcome.path.name}: {outcome.error}")
    if not report.stored:
        raise DemoError("none of the files could be sent; the reasons are above")
    return report


def _series_of(report: SendReport) -> list[str]:
    return list(dict.fromkeys(outcome.series_instance_uid for outcome in report.stored))


def _wait(demo: Demo, expected: list[str], timeout_s: float) -> bool:
    """Wait until the newest revision of every series has a disposition, and a positive one its page."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with demo.ledger.read() as connection:
            newest = dict(
                connection.execute(
                    select(series.c.series_instance_uid, func.max(series.c.revision))
                    .where(series.c.series_instance_uid.in_(expected))
                    .group_by(series.c.series_instance_uid)
                )
                .tuples()
                .all()
            )
            done = {
                (row.series_instance_uid, row.revision)
                for row in connection.execute(select(results).where(results.c.series_instance_uid.in_(expected)))
            }
            due = connection.execute(select(func.count()).select_from(pages).where(pages.c.state == "due")).scalar_one()
        if len(newest) == len(expected) and set(newest.items()) <= done and not due:
            return True
        time.sleep(0.1)  # the ledger tells nobody of its changes
    return False


def _wait_for_interrupt() -> None:
    console.print("the node keeps running; Ctrl-C stops it")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        console.print("stopping")


# --- telling ---------------------------------------------------------------------------------------------------------


def _told(demo: Demo, expected: list[str]) -> dict[str, Any]:
    """What happened as one JSON object."""
    newest = select(results.c.series_instance_uid, func.max(results.c.revision).label("revision")).group_by(
        results.c.series_instance_uid
    )
    newest_results = newest.subquery()
    with demo.ledger.read() as connection:
        rows = connection.execute(
            select(results)
            .join(
                newest_results,
                (results.c.series_instance_uid == newest_results.c.series_instance_uid)
                & (results.c.revision == newest_results.c.revision),
            )
            .where(results.c.series_instance_uid.in_(expected))
        ).all()
        sent = {
            row.series_instance_uid: row.sent_at
            for row in connection.execute(select(pages).where(pages.c.sent_at.is_not(None)))
            if row.mode == "live"
        }
    by_uid = {row.series_instance_uid: row for row in rows}
    return {
        "series": [_series(by_uid[uid], sent.get(uid)) for uid in expected if uid in by_uid],
        "pages": [{"to": mail.to, "subject": mail.subject, "body": mail.body} for mail in demo.sink.messages],
        "url": demo.config.webui.public_url,
    }


def _series(row: Any, paged_at: datetime | None) -> dict[str, Any]:
    event: dict[str, Any] = row.event
    at = {
        key: datetime.fromisoformat(event[key]) if event.get(key) else None
        for key in (
            "first_image_at",
            "last_image_at",
            "received_at",
            "started_at",
            "classified_at",
            "detected_at",
            "occurred_at",
        )
    }
    told_at = paged_at or row.posted_at
    return {
        "series_instance_uid": row.series_instance_uid,
        "study_instance_uid": row.study_instance_uid,
        "revision": row.revision,
        "disposition": row.disposition,
        "reasons": event["reasons"],
        "uncertain": row.uncertain,
        "protocol": event["protocol"],
        "header": {head: event["header"].get(head) for head in HEADS},
        "findings": [
            {key: finding[key] for key in ("kind", "probability", "volume_ml", "slice")}
            for finding in event["findings"]
        ],
        "notes": event["notes"],
        "latency_s": {
            "receive": _seconds(at["first_image_at"], at["last_image_at"]),
            "complete": _seconds(at["last_image_at"], at["received_at"]),
            "classify": _seconds(at["started_at"], at["classified_at"]),
            "detect": _seconds(at["classified_at"], at["detected_at"]),
            "notify": _seconds(at["occurred_at"], told_at),
            "total": _seconds(at["last_image_at"], told_at),
        },
        "paged": paged_at is not None,
    }


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else round((end - start).total_seconds(), 3)


def _print(told: Mapping[str, Any], demo: Demo) -> None:
    """The same in words, for a person."""
    out = Console()
    for one in told["series"]:
        colour = {"positive": "red", "negative": "green", "not_eligible": "yellow"}.get(one["disposition"], "magenta")
        uncertain = " (uncertain)" if one["uncertain"] else ""
        out.print(f"\n[bold {colour}]{one['disposition'].upper()}{uncertain}[/]  series {one['series_instance_uid']}")
        for reason in one["reasons"]:
            out.print(f"  {reason}")
        if one["protocol"]:
            heads = (
                f"{head} {answer['label']} {answer['probability']:.2f}" for head, answer in one["protocol"].items()
            )
            out.print("  protocol: " + ", ".join(heads))
            claims = (f"{head} {claim or 'not stated'}" for head, claim in one["header"].items())
            out.print("  header:   " + ", ".join(claims))
        for finding in one["findings"]:
            out.print(
                f"  {finding['kind']:<8} probability {finding['probability']:.3f}, "
                f"{finding['volume_ml']:.1f} ml, slice {finding['slice']}"
            )
        steps = (f"{step} {took:.2f} s" for step, took in one["latency_s"].items() if took is not None)
        out.print("  " + ", ".join(steps))
    for page in told["pages"]:
        out.print(f"\n[bold]Page to {page['to']}")
        out.print(f"{page['subject']}\n{page['body']}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"\nReview at [bold]{told['url']}[/] as user [bold]{READER}[/], password [bold]{demo.password}[/]")

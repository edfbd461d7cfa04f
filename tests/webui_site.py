"""A web UI with synthetic results for its tests: a head that is an ellipse, a bleed that is a bright blob."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock
from urllib.parse import urlsplit
from uuid import NAMESPACE_OID, uuid5

import numpy as np
import requests
from argon2 import PasswordHasher
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import insert, select

from herald.bus import Bus
from herald.config import BusConfig, Config, LedgerConfig, NotifierConfig, StoreConfig, WebuiConfig
from herald.errors import BusError
from herald.events import Event, Finding, Label, SeriesTriaged, utc_now
from herald.ledger import Ledger, open_ledger, pages
from herald.links import page_link
from herald.signatures import FINDINGS
from herald.store import Prediction, StudyStore
from webui import record, users
from webui.app import create_app
from webui.context import EXTENSION
from webui.publisher import ReviewPublisher
from webui.service import serve

PASSWORD = "a password for tests"
USERS = {"rita": "reader", "remi": "researcher", "ada": "admin"}
SLICES = 12
SEEN = 256  # rows and columns; stored predictions may be of any
HOTTEST = 7  # 0-based
ROOT = "1.2.826.0.1.3680043.8.498"


class FakeBus:
    """Keeps what is published; refuses while `down`."""

    def __init__(self) -> None:
        self.published: list[Event] = []
        self.down = False

    def publish(self, event: Event) -> None:
        if self.down:
            raise BusError("the bus is down for this test")
        self.published.append(event)


@dataclass
class Site:
    config: Config
    ledger: Ledger
    store: StudyStore
    bus: FakeBus
    app: Flask

    @property
    def publisher(self) -> ReviewPublisher:
        return self.app.extensions[EXTENSION].publisher

    def client(self, name: str | None = None) -> FlaskClient:
        """A browser, logged in as `name` when there is one."""
        client = self.app.test_client()
        if name is not None:
            answer = client.post("/login", data={"name": name, "password": PASSWORD})
            assert answer.status_code == 303, answer.text
        return client

    def put(self, event: SeriesTriaged, token: str | None = None, **request: Any) -> Any:
        """Post a result as the notifier does."""
        headers = {"Authorization": f"Bearer {token or self.config.webui.token}"}
        address = f"/api/results/{event.series_instance_uid}/{event.revision}"
        return self.app.test_client().put(address, data=event.to_json(), headers=headers, **request)

    def add(self, number: int, disposition: str = "positive", **changes: Any) -> SeriesTriaged:
        """A series in store and ledger; analysed ones have a prediction."""
        event = triaged(number, disposition, **changes)
        if disposition in ("positive", "negative"):
            self.store.write_prediction(
                event.study_instance_uid, event.series_instance_uid, event.revision, prediction(disposition)
            )
        assert self.put(event).status_code == 201
        return event

    def shown(self, event: SeriesTriaged) -> dict[str, str]:
        """What a form carries of a page that is loaded now: which result of the series revision it shows."""
        result = record.find_result(self.ledger, event.series_instance_uid, event.revision)
        return {"decided_at": result.event.occurred_at.isoformat()} if result else {}

    def link(self, event: SeriesTriaged) -> str:
        """The path of a link to the page of a series revision; the page is made unless there is one."""
        known = select(pages.c.page_id).where(
            pages.c.series_instance_uid == event.series_instance_uid, pages.c.revision == event.revision
        )
        with self.ledger.read() as connection:
            page_id = connection.execute(known).scalar()
        return urlsplit(page_link(self.config.webui, page_id or add_page(self.ledger, event))).path


def add_page(ledger: Ledger, event: SeriesTriaged, page_id: str = "", **changes: Any) -> str:
    """A page for a series revision that was sent and waits for an answer; its id."""
    now = utc_now()
    row = {
        "page_id": page_id or str(uuid5(NAMESPACE_OID, f"{event.series_instance_uid}/{event.revision}")),
        "study_instance_uid": event.study_instance_uid,
        "series_instance_uid": event.series_instance_uid,
        "revision": event.revision,
        "step": 0,
        "state": "sent",
        "mode": "live",
        "channel": "smtp",
        "recipient": "reader@hospital.example",
        "subject": "",
        "body": "",
        "finding_at": now,
        "due_at": now,
        "sent_at": now,
        "attempts": 1,
    }
    with ledger.begin() as connection:
        connection.execute(insert(pages).values(**{**row, **changes}))
    return str(row["page_id"])


@contextmanager
def open_site(folder: Path, *, mode: str = "live", csrf: bool = False, **webui: Any) -> Iterator[Site]:
    """A site of its own on SQLite under `folder`, with one user per role."""
    config = Config(
        store=StoreConfig(root=folder / "store", min_free_gb=0),
        ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}"),
        notifier=NotifierConfig(mode=cast(Any, mode)),
        webui=WebuiConfig(token="token for tests", secret_key="secret key for tests", **webui),
    )
    ledger, store, bus = open_ledger(config.ledger), StudyStore(config.store), FakeBus()
    app = create_app(config, ledger, store, cast(Bus, bus))
    app.config["WTF_CSRF_ENABLED"] = csrf
    cheap = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    try:
        with mock.patch.object(users, "_hasher", cheap):
            for name, role in USERS.items():
                users.add_user(ledger, name, PASSWORD, role)
            yield Site(config, ledger, store, bus, app)
    finally:
        ledger.close()


@contextmanager
def served(site: Site) -> Iterator[Site]:
    """The site as the real service on a free port, for the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    site.config = replace(site.config, webui=replace(site.config.webui, port=port, public_url=url))
    with running(serve, site.config) as stop:
        for _ in range(200):
            try:
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            except requests.ConnectionError:
                stop.wait(0.05)
        else:
            raise AssertionError("the web UI did not come up")
        yield site


@contextmanager
def running(service: Callable[[Config, threading.Event], None], config: Config) -> Iterator[threading.Event]:
    """A service in a thread for the block; gives the event that stops it."""
    stop = threading.Event()
    thread = threading.Thread(target=service, args=(config, stop))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive(), "the service did not stop"


def triaged(number: int, disposition: str = "positive", **changes: Any) -> SeriesTriaged:
    """A decision about series `number`, two minutes old."""
    analysed = disposition in ("positive", "negative")
    high = disposition == "positive"
    last_image = utc_now() - timedelta(minutes=2, seconds=number)
    event = SeriesTriaged(
        study_instance_uid=f"{ROOT}.{number}",
        series_instance_uid=f"{ROOT}.{number}.1",
        revision=1,
        occurred_at=last_image + timedelta(seconds=5),
        disposition=cast(Any, disposition),
        reasons=() if analysed else ("the kernel is bone, not soft tissue",),
        protocol={
            "contrast": Label("non_contrast", 0.98),
            "orientation": Label("axial", 0.999),
            "kernel": Label("soft" if analysed else "bone", 0.91),
            "region": Label("head", 0.97),
        },
        header={"contrast": "non_contrast", "orientation": "axial", "kernel": "bone", "region": None},
        disagreements=("kernel",) if analysed else (),
        findings=tuple(
            Finding(
                kind,
                (0.93, 0.88, 0.04, 0.12, 0.03)[i] if high else 0.02 + 0.01 * i,
                11.4 if high and i < 2 else 0.0,
                2 * HOTTEST + 1,
                f"{ROOT}.{number}.1.{HOTTEST}",
            )
            for i, kind in enumerate(FINDINGS)
        )
        if analysed
        else (),
        notes=("gantry tilt +18.5 degrees",),
        accession_number=f"ACC{number:05d}",
        modality="CT",
        scanner="CT-EMERGENCY",
        calling_ae_title="CT1",
        instance_count=2 * SLICES,
        slice_count=2 * SLICES,
        close_reason="released-and-even",
        first_image_at=last_image - timedelta(seconds=9),
        last_image_at=last_image,
        received_at=last_image + timedelta(seconds=1),
        started_at=last_image + timedelta(seconds=1.1),
        classified_at=last_image + timedelta(seconds=1.6),
        detected_at=last_image + timedelta(seconds=4.8) if analysed else None,
        model_versions={"protocol": "1", "hemorrhage": "1"},
        software_version="0.1.0",
    )
    return replace(event, **changes)


@cache
def prediction(disposition: str = "positive", number: int = 1) -> Prediction:
    """A head of twelve slices of two images each; a positive one bleeds around slice `HOTTEST`."""
    row, column = np.mgrid[:SEEN, :SEEN].astype(np.float32)
    random = np.random.default_rng(3)
    hounsfield = np.full((SLICES, SEEN, SEEN), -1000, dtype=np.float32)
    mask = np.zeros((SLICES, SEEN, SEEN, len(FINDINGS)), dtype=np.uint8)
    slice_probability = np.full((SLICES, len(FINDINGS)), 0.03, dtype=np.float32)
    for i in range(SLICES):
        size = 1 - 0.45 * abs(i - SLICES / 2) / SLICES
        radius = np.hypot((row - 128) / (115 * size), (column - 128) / (92 * size))
        hounsfield[i][radius < 1] = 900
        hounsfield[i][radius < 0.92] = 34
        ventricle = np.hypot((row - 125) / (26 * size), (np.abs(column - 128) - 11) / (8 * size)) < 1
        hounsfield[i][ventricle & (radius < 0.9)] = 8
        if disposition == "positive":
            bleed = np.exp(-(((row - 108) / 20) ** 2 + ((column - 172) / 15) ** 2) - ((i - HOTTEST) / 1.6) ** 2)
            hounsfield[i][(bleed > 0.4) & (radius < 0.9)] = 68
            mask[i, ..., 0] = mask[i, ..., 1] = np.rint(np.clip(bleed * 1.35, 0, 1) * 255)
            slice_probability[i, :2] = 0.91 * np.exp(-(((i - HOTTEST) / 1.8) ** 2)) + 0.02
    hounsfield += random.normal(0, 4, hounsfield.shape)
    return Prediction(
        hounsfield=hounsfield.astype(np.int16),
        mask=mask,
        slice_probability=slice_probability,
        probability=slice_probability.max(axis=0),
        placement=np.array([0, 0, 512, 512, 512]),
        first_source=np.arange(SLICES) * 2,
        last_source=np.arange(SLICES) * 2 + 1,
        sop_instance_uids=np.array([f"{ROOT}.{number}.1.{i}" for i in range(SLICES)]),
        pixel_spacing_mm=np.array([0.45, 0.45]),
    )

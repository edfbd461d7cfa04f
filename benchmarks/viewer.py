"""How soon a reader sees the first picture of a series, and how soon the volume viewer has taken over.

    python benchmarks/viewer.py [--rounds 10] [--slices 32] [--chromium /usr/bin/chromium] [--gpu]

The web UI runs as its service behind waitress, in a process of its own, over a store with the predictions of as many
analysed series as there are rounds, none of which has been looked at before, and their original images, two of 512x512
for each of the model's slices. In every round Debian's Chromium, without anything in its cache, opens the page of the
next series on loopback as a reader who is logged in:

`first_picture`: from asking for the page until the picture is on the screen, as the browser's Element Timing says.
`volume`: until the volume viewer has drawn the same slice in its place.
`original`: from pressing `o` until the original images are drawn.
`without_webgl`: the first two cannot differ there; the first picture, and from pressing `o` until an original is shown.

Without `--gpu` WebGL runs on the processor (SwiftShader), as on a machine without a graphics card. Prints one JSON
object; times in milliseconds. `loadavg` is that of the machine, before and after. Exit status 1 when the median of the
first picture is above the target. Needs `make viewer` and Chromium (`make tools`).
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import requests
from playwright.sync_api import Browser, Page, expect, sync_playwright
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from worklist import serve_until_input_ends

from herald.config import BusConfig, Config, LedgerConfig, NotifierConfig, StoreConfig, WebuiConfig
from herald.events import Finding, SeriesTriaged, utc_now
from herald.ledger import open_ledger
from herald.signatures import DETECTION_IN_PLANE, FINDINGS
from herald.store import INSTANCE_SUFFIX, Prediction, StudyStore
from webui import record
from webui.users import add_user
from webui.viewer import VOLUME_VIEWER

TARGET_MS = 1000.0
"""First picture of a series of 32 slices."""
ROOT_UID = "1.2.826.0.1.3680043.8.498.89"
READER, PASSWORD = "rita", "a password for the benchmark"
MATRIX = 512
PATIENCE_MS = 120_000
WITHOUT_GPU = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")
WITHOUT_WEBGL = ("--disable-gpu", "--disable-3d-apis")
ALWAYS = ("--no-sandbox", "--no-first-run", "--disable-background-networking", "--disable-component-update")

FIRST_PICTURE = """() => new Promise((done) => new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (entry.identifier === "picture") done(entry.renderTime);
}).observe({ type: "element", buffered: true }))"""
VOLUME = "() => performance.getEntriesByName('herald-volume')[0].startTime"


# --- the site --------------------------------------------------------------------------------------------------------


def config_of(folder: Path, port: int) -> Config:
    return Config(
        store=StoreConfig(root=folder / "store", min_free_gb=0),
        ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}"),
        notifier=NotifierConfig(mode="live"),
        webui=WebuiConfig(
            token="token of the benchmark",
            secret_key="secret key of the benchmark",
            port=port,
            public_url=f"http://127.0.0.1:{port}",
        ),
    )


def head(slices: int, side: int) -> np.ndarray:
    """An ellipse of brain with noise in a ring of bone, (D, H, W) HU, with a bleed in the middle slices."""
    row, column = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / side - 0.5
    radius = np.hypot(row / 0.45, column / 0.36)
    plane = np.where(radius < 0.92, 34, np.where(radius < 1, 900, -1000)).astype(np.float32)
    noise = np.random.default_rng(1).normal(0, 4, (slices, side, side)).astype(np.float32)
    volume = plane + noise
    volume[slices // 2 - 2 : slices // 2 + 2][:, np.hypot(row + 0.08, column - 0.17) < 0.06] = 68
    return volume.astype(np.int16)


def store_series(store: StudyStore, uid: str, slices: int, seen: np.ndarray, originals: np.ndarray) -> SeriesTriaged:
    """A series as receiver and router leave it behind."""
    series = f"{uid}.1"
    folder = store.series_folder(uid, series)
    folder.mkdir(parents=True)
    for i, plane in enumerate(originals):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, f"{series}.{i}"
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = uid, series, "CT", i + 1
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 2.5 * i]
        ds.PixelSpacing, ds.Rows, ds.Columns = [0.45, 0.45], MATRIX, MATRIX
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = 1, 0, plane.tobytes()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.save_as(folder / f"{ds.SOPInstanceUID}{INSTANCE_SUFFIX}", enforce_file_format=True)
    mask = np.zeros((slices, DETECTION_IN_PLANE, DETECTION_IN_PLANE, len(FINDINGS)), np.uint8)
    mask[seen == 68] = 240
    probability = np.where(mask.any(axis=(1, 2, 3)), 0.9, 0.02).astype(np.float32)
    prediction = Prediction(
        hounsfield=seen,
        mask=mask,
        slice_probability=np.repeat(probability[:, None], len(FINDINGS), axis=1),
        probability=np.full(len(FINDINGS), 0.9, np.float32),
        placement=np.array([0, 0, MATRIX, MATRIX, MATRIX]),
        first_source=2 * np.arange(slices),
        last_source=2 * np.arange(slices) + 1,
        sop_instance_uids=np.array([f"{series}.{2 * k + 1}" for k in range(slices)]),
        pixel_spacing_mm=np.array([0.45, 0.45]),
    )
    store.write_prediction(uid, series, 1, prediction)
    now = utc_now()
    return SeriesTriaged(
        study_instance_uid=uid,
        series_instance_uid=series,
        revision=1,
        occurred_at=now,
        disposition="positive",
        findings=tuple(Finding(kind, 0.9, 4.2, slices, f"{series}.{slices}") for kind in FINDINGS),
        accession_number="B0000001",
        scanner="CT-EMERGENCY",
        instance_count=len(originals),
        slice_count=len(originals),
        last_image_at=now,
    )


def fill(config: Config, count: int, slices: int) -> list[str]:
    """Series in store and ledger, with a reader; gives the paths of their pages."""
    store, ledger = StudyStore(config.store), open_ledger(config.ledger)
    seen, originals = head(slices, DETECTION_IN_PLANE), head(2 * slices, MATRIX)
    try:
        add_user(ledger, READER, PASSWORD, "reader")
        events = [store_series(store, f"{ROOT_UID}.{n}", slices, seen, originals) for n in range(1, count + 1)]
        for event in events:
            record.upsert_result(ledger, event, record.OPEN)
    finally:
        ledger.close()
    return [f"/series/{event.series_instance_uid}/1" for event in events]


@contextlib.contextmanager
def running(folder: Path, config: Config) -> Iterator[None]:
    command = [sys.executable, __file__, "--serve", str(folder), "--port", str(config.webui.port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            while True:
                try:
                    requests.get(f"{config.webui.public_url}/health", timeout=10).raise_for_status()
                    break
                except requests.RequestException:
                    if process.poll() is not None:
                        raise SystemExit("the web UI did not start") from None
                    time.sleep(0.1)
            yield
        finally:
            assert process.stdin is not None
            process.stdin.close()


# --- measuring -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def logged_in(browser: Browser, url: str) -> Iterator[Page]:
    """A page of a reader with an empty cache."""
    context = browser.new_context(base_url=url, viewport={"width": 1366, "height": 900})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto("/login")
    page.get_by_label("Name").fill(READER)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/")
    # what the log-in brought into the cache goes: scripts and styles count as well
    context.new_cdp_session(page).send("Network.clearBrowserCache")
    yield page
    context.close()


def measure(browser: Browser, url: str, path: str, *, volume: bool) -> dict[str, float]:
    with logged_in(browser, url) as page:
        page.goto(path)
        times = {"first_picture": page.evaluate(FIRST_PICTURE)}
        if volume:
            page.locator("#stage.volume").wait_for()
            times["volume"] = page.evaluate(VOLUME)
        started = time.perf_counter()
        page.keyboard.press("o")
        expect(page.locator("#position")).to_contain_text("Original slice", timeout=PATIENCE_MS)
        page.evaluate("document.getElementById('picture').decode()")
        times["original"] = 1000 * (time.perf_counter() - started)
        return times


def spread(times_ms: list[float]) -> dict[str, float]:
    return {"p50": round(statistics.median(times_ms), 1), "max": round(max(times_ms), 1)}


def benchmark(rounds: int, slices: int, chromium: str, gpu: bool) -> dict[str, Any]:
    if not VOLUME_VIEWER.exists():
        raise SystemExit("the volume viewer is not built; run `make viewer`")
    before = os.getloadavg()
    taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe, sync_playwright() as playwright:
        probe.bind(("127.0.0.1", 0))
        config = config_of(Path(name), probe.getsockname()[1])
        probe.close()
        paths = fill(config, 2 * rounds, slices)
        with_webgl = playwright.chromium.launch(executable_path=chromium, args=[*ALWAYS, *(() if gpu else WITHOUT_GPU)])
        without = playwright.chromium.launch(executable_path=chromium, args=[*ALWAYS, *WITHOUT_WEBGL])
        with running(Path(name), config):
            for first, second in zip(paths[::2], paths[1::2], strict=True):
                taken["with"].append(measure(with_webgl, config.webui.public_url, first, volume=True))
                taken["without"].append(measure(without, config.webui.public_url, second, volume=False))
        versions = with_webgl.version
        with_webgl.close()
        without.close()
    told = {way: {key: spread([t[key] for t in times]) for key in times[0]} for way, times in taken.items()}
    return {
        "slices": slices,
        "rounds": rounds,
        "webgl": "graphics card" if gpu else "processor",
        **told["with"],
        "without_webgl": told["without"],
        "target_ms": TARGET_MS,
        "chromium": versions,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "loadavg": {"before": before[0], "after": os.getloadavg()[0]},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--slices", type=int, default=32)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--gpu", action="store_true", help="WebGL as Chromium chooses, not on the processor")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve_until_input_ends(config_of(asked.serve, asked.port))
        return 0
    told = benchmark(asked.rounds, asked.slices, asked.chromium, asked.gpu)
    print(json.dumps(told, indent=2))
    return 0 if told["first_picture"]["p50"] <= TARGET_MS else 1


if __name__ == "__main__":
    sys.exit(main())

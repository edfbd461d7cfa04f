"""Compare the executors of the model server on this machine: `python benchmarks/executor.py > executors.json`.

Runs the SavedModels under --models (`make models`). The executors take turns within one process, because a machine's
speed drifts: only the ratios hold, not the milliseconds. Differences are against TensorFlow on the same input, in
probability (mask: of 255).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from herald.signatures import (
    DETECTION_IN_PLANE,
    HEMORRHAGE,
    PROTOCOL,
    PROTOCOL_IN_PLANE,
    PROTOCOL_SLICES,
    SIGNATURE_NAME,
)
from serving.executor import Executor, ExecutorOptions, OpenVinoExecutor, TensorFlowExecutor, read_signatures

REFERENCE = "tensorflow f32"


def head(depth: int, side: int) -> np.ndarray:
    """A ball of brain with a bleed in a shell of bone, with noise: (depth, side, side) int16 Hounsfield units."""
    z, y, x = np.mgrid[-1 : 1 : depth * 1j, -1 : 1 : side * 1j, -1 : 1 : side * 1j]
    radius = np.sqrt(0.5 * z**2 + y**2 + x**2)
    bleed = (z**2 + (y - 0.2) ** 2 + (x + 0.3) ** 2) < 0.02
    hounsfield = np.select([radius < 0.75, radius < 0.85], [np.where(bleed, 68, 32), 900], -1000)
    return (hounsfield + np.random.default_rng(0).normal(0, 6, hounsfield.shape)).astype(np.int16)


def timed(executor: Executor, volume: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    begin = time.perf_counter()
    outputs = executor.run(SIGNATURE_NAME, {"volume": volume})
    return (time.perf_counter() - begin) * 1e3, outputs


def compare(folder: Path, volume: np.ndarray, other_shape: np.ndarray, threads: int, repeats: int) -> dict[str, Any]:
    """Load one SavedModel in every executor and let them take turns on `volume`."""
    signatures = read_signatures(folder)
    makers: dict[str, Callable[[], Executor]] = {
        REFERENCE: lambda: TensorFlowExecutor(folder, ExecutorOptions(threads=threads)),
        "openvino f32": lambda: OpenVinoExecutor(folder, signatures, ExecutorOptions(precision="f32", threads=threads)),
        "openvino bf16": lambda: OpenVinoExecutor(
            folder, signatures, ExecutorOptions(precision="bf16", threads=threads)
        ),
    }
    executors: dict[str, Executor] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        begin = time.perf_counter()
        executors[name] = make()
        rows[name] = {"load_s": round(time.perf_counter() - begin, 3)}
        rows[name]["first_ms"] = round(timed(executors[name], volume)[0], 1)
        timed(executors[name], volume)
        rows[name]["first_of_another_shape_ms"] = round(timed(executors[name], other_shape)[0], 1)
    times: dict[str, list[float]] = {name: [] for name in executors}
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for _ in range(repeats):
        for name, executor in executors.items():
            took, outputs[name] = timed(executor, volume)
            times[name].append(took)
    for name, row in rows.items():
        row["median_ms"] = round(statistics.median(times[name]), 1)
        row["ratio"] = round(statistics.median(a / b for a, b in zip(times[name], times[REFERENCE], strict=True)), 3)
        row["largest_difference"] = {
            alias: float(f"{np.abs(value.astype(np.float64) - outputs[REFERENCE][alias]).max():.2g}")
            for alias, value in sorted(outputs[name].items())
        }
    return {"input": list(volume.shape), "executors": rows}


def latest(root: Path, name: str) -> Path | None:
    versions = [p.parent for p in (root / name).glob("*/saved_model.pb") if p.parent.name.isdecimal()]
    return max(versions, key=lambda p: int(p.name), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("herald-data/models"), help="folder of SavedModels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--slices", type=int, default=32, help="slices of the study for the haemorrhage model")
    arguments = parser.parse_args()
    chunk = head(PROTOCOL_SLICES, PROTOCOL_IN_PLANE)
    inputs = {
        PROTOCOL.model: (chunk[None], np.stack([chunk] * 3)),
        HEMORRHAGE.model: (head(arguments.slices, DETECTION_IN_PLANE), head(arguments.slices + 1, DETECTION_IN_PLANE)),
    }
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "models": {},
    }
    for name, (volume, other) in inputs.items():
        folder = latest(arguments.models, name)
        if folder is None:
            raise SystemExit(f"no model {name} in {arguments.models}; export it: make models")
        report["models"][name] = compare(folder, volume, other, arguments.threads, arguments.repeats)
    json.dump(report, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()

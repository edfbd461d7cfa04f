"""Time per 32-slice study through the embedded model server, gRPC and all: `python benchmarks/inference.py`.

The server runs in a process of its own, as in the node, with the exported models (`make models`). In turn with it, in
the same run, TensorFlow runs the same detector as it was trained, on a window of five slices for every slice: the peer
that the whole-volume pass is measured against. Prints one JSON object; `memory_mb` is the server's peak of resident
memory.
"""

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from executor import head

from herald.config import load_config
from herald.errors import ServingError
from herald.signatures import CONTEXT_SLICES, DETECTION_IN_PLANE, PROTOCOL_IN_PLANE, PROTOCOL_SLICES
from router.inference import InferenceClient

ROOT = Path(__file__).parents[1]
WINDOWS_AT_ONCE = 8


def start_server(models: Path, threads: int, precision: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {
        "HERALD_SERVING__PORT": str(port),
        "HERALD_SERVING__MODELS": str(models),
        "HERALD_SERVING__THREADS": str(threads),
        "HERALD_SERVING__PRECISION": precision,
        "HERALD_NODE__LOG_LEVEL": "warning",
    }
    command = [sys.executable, "-m", "herald", "run", "serving"]
    return subprocess.Popen(command, env={**os.environ, **settings}, cwd=ROOT), f"127.0.0.1:{port}"


def peak_memory_mb(process: subprocess.Popen[bytes]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return round(int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3)


def windows_by_tensorflow(threads: int) -> Callable[[np.ndarray], None]:
    """The trained network on one window of five slices for each slice."""
    import tensorflow as tf  # type: ignore[import-untyped]

    from serving import hemorrhage

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    model = hemorrhage.load()
    traced = tf.function(lambda windows: model(windows, training=False))
    margin = CONTEXT_SLICES // 2

    def run(volume: np.ndarray) -> None:
        padded = np.concatenate([volume[:1]] * margin + [volume] + [volume[-1:]] * margin).astype(np.float32)
        windows = np.stack([padded[i : i + CONTEXT_SLICES] for i in range(len(volume))])
        for start in range(0, len(windows), WINDOWS_AT_ONCE):
            traced(tf.constant(windows[start : start + WINDOWS_AT_ONCE]))

    return run


def milliseconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=load_config().serving.models, help="folder of SavedModels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("auto", "f32", "bf16"), default="auto")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--slices", type=int, default=32)
    options = parser.parse_args()
    study, sample = head(options.slices, DETECTION_IN_PLANE), head(PROTOCOL_SLICES, PROTOCOL_IN_PLANE)
    process, address = start_server(options.models.absolute(), options.threads, options.precision)
    try:
        client = InferenceClient(address)
        for _ in range(240):
            try:
                client.check()
                break
            except ServingError:
                time.sleep(0.5)
        windows = windows_by_tensorflow(options.threads)
        turns: dict[str, Callable[[], object]] = {
            "protocol": lambda: client.classify_protocol(sample[None]),
            "haemorrhage": lambda: client.detect_hemorrhage(study),
            "tensorflow_windows": lambda: windows(study),
        }
        times: dict[str, list[float]] = {name: [] for name in turns}
        for repeat in range(options.repeats + 1):  # the first warms everything up
            for name, action in turns.items():
                took = milliseconds(action)
                if repeat:
                    times[name].append(took)
        memory = peak_memory_mb(process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    ratio = statistics.median(w / h for w, h in zip(times["tensorflow_windows"], times["haemorrhage"], strict=True))
    report = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "precision": options.precision,
        "slices": options.slices,
        "median_ms": {name: round(statistics.median(values), 1) for name, values in times.items()},
        "fastest_ms": {name: round(min(values), 1) for name, values in times.items()},
        "tensorflow_windows_over_haemorrhage": round(ratio, 1),
        "memory_mb": memory,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

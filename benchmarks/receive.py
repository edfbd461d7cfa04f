"""Images per second of receivers, sent by dcmtk's storescu: Herald (durable) beside Orthanc and dcmtk's storescp.

    python benchmarks/receive.py [--rounds 5] [--associations 1 4 8] [--slices 200] [--only herald storescp]

Each association sends a series of its own of 512x512 16-bit slices. In every round every receiver is measured once per
number of associations, in turn, so that the ratios hold although the machine's speed drifts. Both ends run with
TCP_NODELAY=1, without which Debian's dcmtk and Orthanc stall at some 20 images/s. Prints one JSON object. The peers are
Debian's: `apt-get install dcmtk orthanc`; Orthanc and storescp do not fsync, Herald does.
`--long 2000` measures Herald's resident memory while one series of so many slices comes instead.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}
ROUND_MARK, ASSOCIATION_MARK, SLICE_MARK = b"700700", b"800800", b"900900"  # in the UIDs; replaced at equal length


@dataclass
class Receiver:
    """A running receiver: its process, port, and where its files go."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    stored: Callable[[], int]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def count_files(folder: Path, pattern: str = "*") -> int:
    return sum(1 for path in folder.rglob(pattern) if path.is_file())


def start_herald(folder: Path) -> Receiver:
    port = free_port()
    settings = {
        "HERALD_NODE__DATA_DIR": str(folder),
        "HERALD_NODE__LOG_LEVEL": "warning",
        "HERALD_RECEIVER__HOST": "127.0.0.1",
        "HERALD_RECEIVER__PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "herald", "run", "receiver"], env={**ENVIRONMENT, **settings}, cwd=ROOT
    )
    return Receiver("herald", process, port, lambda: count_files(folder / "store", "*.dcm"))


def start_orthanc(folder: Path) -> Receiver:
    port = free_port()
    config = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "DicomPort": port,
        "HttpServerEnabled": False,
    }
    folder.mkdir()
    (folder / "orthanc.json").write_text(json.dumps(config))
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    process = subprocess.Popen(
        [program, str(folder / "orthanc.json")], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return Receiver("orthanc", process, port, lambda: count_files(folder / "storage", "*-*-*"))


def start_storescp(name: str, options: list[str]) -> Callable[[Path], Receiver]:
    def start(folder: Path) -> Receiver:
        port = free_port()
        folder.mkdir()
        process = subprocess.Popen(
            ["storescp", *options, "--output-directory", str(folder), str(port)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return Receiver(name, process, port, lambda: count_files(folder))

    return start


STARTERS: dict[str, Callable[[Path], Receiver]] = {
    "herald": start_herald,
    "orthanc": start_orthanc,
    "storescp": start_storescp("storescp", ["--fork"]),
    "storescp-tuned": start_storescp("storescp-tuned", ["--fork", "+B", "-pdu", "131072"]),
}


def template() -> bytes:
    """One slice as a Part 10 file whose UIDs hold the marks."""
    random = np.random.default_rng(1)
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.StudyInstanceUID = f"1.2.826.0.1.3680043.8.498.{ROUND_MARK.decode()}.{ASSOCIATION_MARK.decode()}"
    ds.SeriesInstanceUID = f"{ds.StudyInstanceUID}.1"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(f"{ds.SeriesInstanceUID}.{SLICE_MARK.decode()}")
    ds.PatientName, ds.PatientID, ds.Modality = "Benchmark", "B", "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.ImagePositionPatient = ["-100", "-100", SLICE_MARK.decode()]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing = [0.5, 0.5]
    ds.Rows = ds.Columns = 512
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = random.integers(0, 4000, (512, 512), dtype=np.int16).tobytes()
    buffer = BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write_series(folder: Path, slice_file: bytes, number: int, associations: int, slices: int) -> list[Path]:
    """A folder of slices per association, with UIDs that no earlier run had."""
    folders = []
    for association in range(associations):
        series = folder / f"{association}"
        series.mkdir(parents=True)
        of_series = slice_file.replace(ROUND_MARK, b"%06d" % (100000 + number))
        of_series = of_series.replace(ASSOCIATION_MARK, b"%06d" % (100000 + association))
        for z in range(slices):
            (series / f"{z:04}.dcm").write_bytes(of_series.replace(SLICE_MARK, b"%06d" % (100000 + z)))
        folders.append(series)
    return folders


def send(port: int, folders: list[Path]) -> float:
    """Seconds until every sender has ended; raises when one failed."""
    started = time.perf_counter()
    senders = [
        subprocess.Popen(
            ["storescu", "-R", "-aec", "HERALD", "+sd", "127.0.0.1", str(port), str(folder)],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
        )
        for folder in folders
    ]
    for sender in senders:
        if sender.wait() != 0:
            raise SystemExit(f"storescu ended with status {sender.returncode}")
    return time.perf_counter() - started


def wait_until_listening(receiver: Receiver) -> None:
    for _ in range(600):
        if receiver.process.poll() is not None:
            raise SystemExit(f"{receiver.name} ended with status {receiver.process.returncode}; is it installed?")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", receiver.port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"{receiver.name} does not listen")


def peak_memory_mb(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3


def measure(
    names: list[str], rounds: int, counts: list[int], slices: int, work: Path, images: Path
) -> dict[str, object]:
    slice_file = template()
    receivers = [STARTERS[name](work / name) for name in names]
    rates: dict[int, dict[str, list[float]]] = {count: {name: [] for name in names} for count in counts}
    expected = dict.fromkeys(names, 0)
    try:
        for receiver in receivers:
            wait_until_listening(receiver)
        number = 0
        for round_number in range(rounds + 1):  # the first warms everything up
            for count in counts:
                for receiver in receivers[round_number % len(names) :] + receivers[: round_number % len(names)]:
                    number += 1
                    folders = write_series(images / str(number), slice_file, number, count, slices)
                    os.sync()  # what the run before left to be written must not slow this one
                    seconds = send(receiver.port, folders)
                    shutil.rmtree(images / str(number))
                    expected[receiver.name] += count * slices
                    if round_number:
                        rates[count][receiver.name].append(count * slices / seconds)
                        print(
                            f"{count} x {receiver.name}: {count * slices / seconds:.0f}/s", file=sys.stderr, flush=True
                        )
        stored = {receiver.name: receiver.stored() for receiver in receivers}
        if stored != expected:
            raise SystemExit(f"not everything was stored: {stored}, sent {expected}")
        memory = {receiver.name: round(peak_memory_mb(receiver.process)) for receiver in receivers}
    finally:
        for receiver in receivers:
            receiver.process.send_signal(signal.SIGTERM)
            receiver.process.wait(30)
    medians = {count: {name: statistics.median(values) for name, values in of.items()} for count, of in rates.items()}
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "slices_per_association": slices,
        "rounds": rounds,
        "images_per_s": {count: {name: round(value, 1) for name, value in of.items()} for count, of in medians.items()},
        "herald_over": {
            # of each round first, then the median: what drifts between rounds cancels
            count: {
                name: round(statistics.median(h / p for h, p in zip(of["herald"], of[name], strict=True)), 2)
                for name in names
                if name != "herald"
            }
            for count, of in rates.items()
        },
        "peak_memory_mb": memory,
        "all_stored": True,
    }


def measure_long(slices: int, work: Path, images: Path) -> dict[str, object]:
    receiver = start_herald(work / "herald")
    try:
        wait_until_listening(receiver)
        idle = peak_memory_mb(receiver.process)
        folders = write_series(images, template(), 1, 1, slices)
        seconds = send(receiver.port, folders)
        return {
            "slices": slices,
            "images_per_s": round(slices / seconds, 1),
            "idle_memory_mb": round(idle),
            "peak_memory_mb": round(peak_memory_mb(receiver.process)),
            "all_stored": receiver.stored() == slices,
        }
    finally:
        receiver.process.send_signal(signal.SIGTERM)
        receiver.process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--associations", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--slices", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=STARTERS, default=list(STARTERS))
    parser.add_argument("--long", type=int, metavar="SLICES")
    options = parser.parse_args()
    memory_disk = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # what is sent must not wait for a disk
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory(dir=memory_disk) as images:
        if options.long:
            found = measure_long(options.long, Path(work), Path(images))
        else:
            names = [name for name in STARTERS if name in {"herald", *options.only}]
            found = measure(names, options.rounds, options.associations, options.slices, Path(work), Path(images))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

"""Small DICOM instances, senders and a bus in memory, for the tests of the receiver and its commands."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pynetdicom import AE
from pynetdicom.presentation import build_context

from herald.config import BusConfig, Config, LedgerConfig, ReceiverConfig, StoreConfig
from herald.errors import BusError
from herald.events import SeriesReceived
from herald.store import StudyStore
from receiver.assembly import SeriesAssembler
from receiver.record import Recorder
from receiver.scp import StorageServer

UPRIGHT = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def config_under(folder: Path, **receiver: Any) -> Config:
    """A node's configuration with everything under `folder`, a free port and short waits."""
    waits = {"port": 0, "host": "127.0.0.1", "settle_s": 0.1, "quiet_s": 60.0, "network_timeout_s": 10.0, **receiver}
    return Config(
        receiver=replace(ReceiverConfig(), **waits),
        store=StoreConfig(root=folder / "store", min_free_gb=0.0),
        ledger=LedgerConfig(url=f"sqlite:///{folder / 'ledger.sqlite'}"),
        bus=BusConfig(url=f"sqlite:///{folder / 'bus.sqlite'}"),
    )


def ct_slice(
    study: str, series: str, z: float | None, number: int = 1, sop_class: str = CTImageStorage, **values: Any
) -> Dataset:
    """One small CT image at `z` mm; `values` overrides any attribute, and None removes it."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = generate_uid()
    ds.StudyInstanceUID = study
    ds.SeriesInstanceUID = series
    ds.Modality = "CT"
    ds.PatientName = "Never^Logged"
    ds.PatientID = "SECRET-ID"
    ds.AccessionNumber = "A-1"
    ds.StationName = "CT-EAST"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.InstanceNumber = number
    if z is not None:
        ds.ImagePositionPatient = [-100.0, -120.0, z]
        ds.ImageOrientationPatient = UPRIGHT
    ds.Rows, ds.Columns = 8, 8
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.PixelData = bytes(range(128))
    for keyword, value in values.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", sop_class)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.get("SOPInstanceUID", generate_uid())
    return ds


def ct_series(count: int, spacing: float = 5.0, study: str | None = None, **values: Any) -> list[Dataset]:
    """An even stack of small CT images."""
    study, series = study or generate_uid(), generate_uid()
    return [ct_slice(study, series, i * spacing, i + 1, **values) for i in range(count)]


class ListBus:
    """Keeps what is published; `down` makes it refuse, `published` counts for waiting."""

    def __init__(self) -> None:
        self.events: list[SeriesReceived] = []
        self.down = False
        self.refused = 0
        self._changed = threading.Condition()

    def __call__(self, event: SeriesReceived) -> None:
        with self._changed:
            self._changed.notify_all()
            if self.down:
                self.refused += 1
                raise BusError("the test's bus is down")
            self.events.append(event)

    def wait_for(self, count: int, timeout_s: float = 10.0) -> list[SeriesReceived]:
        """The events, once there are `count`."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= count, timeout_s), self.events
            return list(self.events)

    def wait_refused(self, timeout_s: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.refused > 0, timeout_s)


class Receiver:
    """The receiver in this process, on a free port."""

    def __init__(self, config: Config, bus: ListBus) -> None:
        self.config = config
        self.bus = bus
        self.store = StudyStore(config.store)
        self.recorder = Recorder(config.ledger)
        self.assembler = SeriesAssembler(config.receiver, self.store, self.recorder, bus)
        self.server = StorageServer(config.receiver, self.store, self.recorder, self.assembler)

    @property
    def port(self) -> int:
        return self.server.port

    def start(self) -> None:
        self.recorder.start()
        resumed = self.assembler.start()
        resumed.result(10.0)
        self.server.start()

    def stop(self) -> None:
        self.server.stop(5.0)
        self.assembler.stop(5.0)
        self.recorder.stop(5.0)


@contextmanager
def receiving(config: Config, bus: ListBus | None = None) -> Iterator[Receiver]:
    """A running receiver for the block."""
    receiver = Receiver(config, bus or ListBus())
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


@contextmanager
def association(port: int, contexts: Iterable[tuple[str, str]] = (), **kwargs: Any) -> Iterator[Any]:
    """An association of a sender, proposing CT in Explicit VR Little Endian unless told; released at the end."""
    ae = AE(ae_title=kwargs.pop("calling", "CT1"))
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    proposed = list(contexts) or [(CTImageStorage, ExplicitVRLittleEndian)]
    assoc = ae.associate(
        "127.0.0.1", port, ae_title="HERALD", contexts=[build_context(a, s) for a, s in proposed], **kwargs
    )
    connection = assoc.dul.socket.socket if assoc.is_established and assoc.dul.socket is not None else None
    try:
        yield assoc
    finally:
        if assoc.is_established:
            assoc.release()
        elif connection is not None:  # pynetdicom forgets to close a socket whose peer is gone
            assoc.join(5.0)
            connection.close()


def send_all(port: int, datasets: Iterable[Dataset]) -> list[int]:
    """Send over one association; the statuses."""
    datasets = list(datasets)
    contexts = {(str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID)) for ds in datasets}
    with association(port, sorted(contexts)) as assoc:
        return [int(assoc.send_c_store(ds).Status) for ds in datasets]

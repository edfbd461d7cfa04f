"""The storage SCU: every file has its outcome."""

import gc
import threading
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG4HP41, CTImageStorage, JPEG2000Lossless
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.transport import AssociationSocket
from receiver_fakes import config_under, ct_series, ct_slice, receiving
from served_models import eventually

from herald.calling import CallingEntity
from herald.errors import ConfigError
from herald.send import MOST_CONTEXTS, _by_contexts, _Item, send
from herald.send import FileOutcome as Outcome


def saved(folder: Path, count: int = 3) -> list[Path]:
    paths = []
    for i, image in enumerate(ct_series(count)):
        paths.append(folder / f"{i}.dcm")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def test_every_file_is_stored_and_progress_is_told(tmp_path: Path) -> None:
    paths, told = saved(tmp_path), []
    with receiving(config_under(tmp_path)) as receiver:
        report = send(
            paths, f"HERALD@127.0.0.1:{receiver.port}", on_progress=lambda done, total: told.append((done, total))
        )
    assert [outcome.path for outcome in report.stored] == paths
    assert len({outcome.series_instance_uid for outcome in report.stored}) == 1
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_file_that_is_not_dicom_is_skipped_with_a_message_and_the_rest_is_sent(tmp_path: Path) -> None:
    paths = saved(tmp_path)
    (tmp_path / "notes.txt").write_text("not an image")
    paths.insert(1, tmp_path / "notes.txt")
    paths.append(tmp_path / "missing.dcm")
    with receiving(config_under(tmp_path)) as receiver:
        report = send(paths, f"HERALD@127.0.0.1:{receiver.port}")
    assert len(report.stored) == 3
    text, missing = report.failed
    assert text.path.name == "notes.txt"
    assert "is not a DICOM file" in text.error
    assert "cannot read" in missing.error


def test_a_refused_file_carries_status_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "image.dcm"
    ct_slice("1.2.3", "1.2.3.4", 0.0, StudyInstanceUID=None).save_as(path, enforce_file_format=True)
    with receiving(config_under(tmp_path)) as receiver:
        report = send([path], f"HERALD@127.0.0.1:{receiver.port}")
    (outcome,) = report.failed
    assert outcome.status == 0xC001
    assert "StudyInstanceUID" in outcome.error


def test_a_syntax_that_the_receiver_does_not_take_is_named(tmp_path: Path) -> None:
    path = tmp_path / "film.dcm"
    image = ct_slice("1.2.3", "1.2.3.4", 0.0, PixelData=encapsulate([b"a film"]))
    image.file_meta.TransferSyntaxUID = MPEG4HP41
    image["PixelData"].VR = "OB"
    image.save_as(path, enforce_file_format=True)
    with receiving(config_under(tmp_path)) as receiver:
        (outcome,) = send([path], f"HERALD@127.0.0.1:{receiver.port}").failed
    assert "does not accept CT Image Storage in MPEG-4" in outcome.error


def test_a_receiver_that_is_not_there_fails_every_file_with_what_to_do(tmp_path: Path) -> None:
    report = send(saved(tmp_path), "HERALD@127.0.0.1:1")
    gc.collect()  # a socket left open would be an error here
    assert len(report.failed) == 3
    assert all("cannot be reached; check host and port" in outcome.error for outcome in report.failed)


def test_a_refused_association_fails_every_file_with_the_reason(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path, allowed_senders=("CT1",))) as receiver:
        report = send(saved(tmp_path), f"HERALD@127.0.0.1:{receiver.port}", "STRANGER")
    assert all("Calling AE title not recognised" in outcome.error for outcome in report.failed)
    assert len(report.failed) == 3


class LooksLate(threading.Event):
    """What the asking thread waits for; it goes on only when the connection has been closed already."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait(timeout) and self.closed.wait(10.0)


def test_a_refusal_that_has_come_and_gone_before_it_is_looked_for_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close(self: AssociationSocket, original: Any = AssociationSocket.close) -> None:
        original(self)
        if isinstance(self._ready, LooksLate):
            self._ready.closed.set()

    def create(self: Any, *of: Any, original: Any = CallingEntity._create_socket) -> AssociationSocket:
        connection: AssociationSocket = original(self, *of)
        connection._ready = LooksLate()
        return connection

    monkeypatch.setattr(AssociationSocket, "close", close)
    monkeypatch.setattr(CallingEntity, "_create_socket", create)
    with receiving(config_under(tmp_path, allowed_senders=("CT1",))) as receiver:
        report = send(saved(tmp_path), f"HERALD@127.0.0.1:{receiver.port}", "STRANGER")
    assert ["Calling AE title not recognised" in outcome.error for outcome in report.failed] == [True] * 3


class Overtaking(threading.Event):
    """Where the thread of an association waits its turn; it is slow to go on, and then first to see the answer."""

    def __init__(self, answers: Queue[Any]) -> None:
        super().__init__()
        self.answers = answers
        self.slow, self.looked = threading.Event(), threading.Event()
        self.set()

    def clear(self) -> None:
        assert self.slow.wait(10.0)
        super().clear()

    def wait(self, timeout: float | None = None) -> bool:
        if self.slow.is_set():
            self.looked.set()
        its_turn = super().wait(timeout)
        if not self.slow.is_set():
            self.slow.set()
            eventually(lambda: not self.answers.empty())
        return its_turn


def test_an_answer_that_the_other_thread_of_the_association_takes_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(self: Any, assoc: Any, *of: Any, original: Any = CallingEntity._create_socket) -> AssociationSocket:
        assoc._reactor_checkpoint = Overtaking(assoc.dimse.msg_queue)
        connection: AssociationSocket = original(self, assoc, *of)
        return connection

    def get_msg(self: Any, block: bool = False, original: Any = DIMSEServiceProvider.get_msg) -> Any:
        if block and isinstance(self.assoc._reactor_checkpoint, Overtaking):
            assert self.assoc._reactor_checkpoint.looked.wait(10.0)
        return original(self, block)

    monkeypatch.setattr(CallingEntity, "_create_socket", create)
    monkeypatch.setattr(DIMSEServiceProvider, "get_msg", get_msg)
    with receiving(config_under(tmp_path)) as receiver:
        report = send(saved(tmp_path), f"HERALD@127.0.0.1:{receiver.port}", timeout_s=10.0)
    assert report.failed == ()


@pytest.mark.parametrize("to", ["HERALD", "HERALD@host", "@host:1", "HERALD@host:99999", "TOO_LONG_FOR_AN_AE@h:1"])
def test_an_address_that_is_none_is_a_configuration_error(to: str) -> None:
    with pytest.raises(ConfigError, match="AE_TITLE@HOST:PORT"):
        send([], to)


def test_a_calling_ae_title_that_is_none_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="calling AE title"):
        send([], "HERALD@127.0.0.1:1", "TOO_LONG_FOR_AN_AE_TITLE")


def test_no_association_proposes_more_contexts_than_there_are_ids() -> None:
    items = [
        _Item(i, Path(f"{i}"), (f"{CTImageStorage}.{i % 200}", JPEG2000Lossless), Outcome(Path(f"{i}")))
        for i in range(600)
    ]
    groups = list(_by_contexts(items))
    assert [item for group in groups for item in group] == items
    assert max(len({item.context for item in group}) for group in groups) == MOST_CONTEXTS

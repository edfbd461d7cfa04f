"""Faults injected into a receiver at work: what got 0x0000 is on disk as it was sent, and nothing is left over.

`make test` takes a sample; `make faults` the counts that take minutes.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID
from receiver_fakes import config_under, ct_series, ct_slice, receiving
from receiver_faults import (
    ABORT,
    ABORTED,
    LONG,
    RELEASE,
    RELEASE_RP,
    Acknowledged,
    RawSender,
    ReceiverProcess,
    acknowledged_by_dcmtk,
    assert_accounted,
    assert_durable,
    assert_log_is_clean,
    associate_rq,
    at_once,
    data_set_bytes,
    dcmtk_sender,
    echoes,
    encoded,
    send_over,
    sha256,
    store_pdus,
    times,
)

from receiver.statuses import StoreStatus

pytestmark = pytest.mark.timeout(1800 if LONG else 180)

IMPATIENT_S = 1.0
"""`receiver.network_timeout_s` of the tests with peers that go silent."""


def image_series(count: int, side: int) -> list[Dataset]:
    """An even stack of side x side images with random pixels, no two alike."""
    pixels = random.Random(side).randbytes(2 * side * side)
    images = ct_series(count, Rows=side, Columns=side)
    for i, image in enumerate(images):
        image.PixelData = i.to_bytes(4, "little") + pixels[4:]
    return images


def files_of(images: list[Dataset], folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = [folder / f"{i:04}.dcm" for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save_as(file, enforce_file_format=True)
    return files


@contextmanager
def running(folder: Path, prefix: tuple[str, ...] = (), **settings: str) -> Iterator[ReceiverProcess]:
    """A receiver process for the block, killed if the test has not ended it."""
    folder.mkdir(parents=True, exist_ok=True)
    receiver = ReceiverProcess(folder, prefix, **settings)
    try:
        receiver.start()
        yield receiver
    finally:
        if receiver.process.poll() is None:
            receiver.end(signal.SIGKILL)


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["storescu", "dcmsend"] if LONG else ["storescu"])
def test_killed_at_random_moments_it_has_what_it_acknowledged_and_takes_the_rest_later(
    tmp_path: Path, program: str
) -> None:
    moments = random.Random(program)
    acknowledged: Acknowledged = {}
    duration_s, in_the_middle = 0.8, 0
    kills = times(1, 30)
    with running(tmp_path) as receiver:
        for kill in range(kills):
            images = image_series(200, 96 if kill % 3 else 300)  # one PDU each, and two
            files = files_of(images, tmp_path / "sent" / str(kill))
            uids = {file: str(image.SOPInstanceUID) for file, image in zip(files, images, strict=True)}
            output = tmp_path / f"{program}-{kill}.txt"

            sender = dcmtk_sender(program, receiver.port, files, output)
            time.sleep(moments.uniform(0.1, 1.1 * duration_s))  # the moment itself is what is tried
            receiver.end(signal.SIGKILL)
            sender.wait(60.0)
            answered = acknowledged_by_dcmtk(output, files)
            in_the_middle += 0 < len(answered) < 200
            acknowledged |= {uids[file]: sha256(data_set_bytes(file)) for file in answered}
            assert_durable(receiver.store, acknowledged)

            receiver.start()
            assert list(receiver.store.rglob("*.partial")) == []
            started = time.monotonic()
            assert dcmtk_sender(program, receiver.port, files, output).wait(60.0) == 0, output.read_text()
            duration_s = time.monotonic() - started
            assert acknowledged_by_dcmtk(output, files) == files
            acknowledged |= {uids[file]: sha256(data_set_bytes(file)) for file in files}
            receiver.wait_published(images[0].SeriesInstanceUID, 200)
            shutil.rmtree(tmp_path / "sent" / str(kill))
        assert in_the_middle >= kills // 4, "the kills did not hit the sends"
        assert len(acknowledged) == 200 * kills
        receiver.end_accounted(acknowledged)


def test_killed_again_and_again_in_one_send_it_publishes_the_whole_series_once_per_revision(tmp_path: Path) -> None:
    moments = random.Random(4)
    images = image_series(200, 96)
    files = files_of(images, tmp_path / "sent")
    with running(tmp_path) as receiver:
        for kill in range(times(2, 10)):
            sender = dcmtk_sender("dcmsend", receiver.port, files, tmp_path / f"{kill}.txt")
            time.sleep(moments.uniform(0.05, 0.4))
            receiver.end(signal.SIGKILL)
            sender.wait(60.0)
            receiver.start()
        acknowledged = send_over(receiver.port, images)
        assert len(acknowledged) == 200
        receiver.wait_published(images[0].SeriesInstanceUID, 200)
        receiver.end_accounted(acknowledged)
        assert receiver.published()[-1].instance_count == 200


# --- the disk --------------------------------------------------------------------------------------------------------


def test_success_is_answered_only_after_the_file_and_its_folder_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9 does not show this: what the kernel holds survives a process, and not a power cut."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink()}")

    def noted_rename(source: str, target: str) -> None:
        rename(source, target)
        done.append(f"rename {source} {target}")

    images = ct_series(2, study="1.2.3")
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "rename", noted_rename)
        folder = receiver.store.series_folder("1.2.3", images[0].SeriesInstanceUID)
        for image, again in ((images[0], False), (images[1], False), (images[0], True)):
            done.clear()
            assert sender.store(image) == 0
            so_far = [line for line in done if str(receiver.store.root) in line]
            if not again:
                renamed = next(line for line in so_far if line.startswith("rename"))
                _, temporary, place = renamed.split()
                assert place == f"{folder}/{image.SOPInstanceUID}.dcm"
                assert so_far.index(f"fsync {temporary}") < so_far.index(renamed)
            # also when it is repeated: the first may still be on its way over another association
            assert so_far[-1] == f"fsync {folder}"
            assert not again or not any(line.startswith("rename") for line in so_far)
        sender.release()
        monkeypatch.undo()


def test_a_disk_that_fills_up_is_out_of_resources_and_the_association_lives_on(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes every longer file fail, the ledger's too, wherever and as whomever the tests run."""
    small, large = image_series(3, 64), image_series(6, 300)  # 8 KB and 180 KB
    with running(tmp_path) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        acknowledged = {str(small[0].SOPInstanceUID): sha256(encoded(small[0]))}
        assert sender.store(small[0]) == 0
        receiver.within(10.0, lambda: "series" in tables(receiver), "the ledger is there")
        limits = psutil.Process(receiver.process.pid).rlimit(psutil.RLIMIT_FSIZE)
        psutil.Process(receiver.process.pid).rlimit(psutil.RLIMIT_FSIZE, (100_000, limits[1]))
        for image in large:
            assert sender.store(image) == StoreStatus.OUT_OF_RESOURCES
        assert list((receiver.store / "incoming").iterdir()) == []
        assert sender.store(small[1]) == 0
        assert sender.store(small[2]) == 0
        psutil.Process(receiver.process.pid).rlimit(psutil.RLIMIT_FSIZE, limits)
        for image in large:
            assert sender.store(image) == 0
        sender.release()
        acknowledged |= {str(image.SOPInstanceUID): sha256(encoded(image)) for image in (*small, *large)}
        receiver.wait_published(small[0].SeriesInstanceUID, 3)
        receiver.wait_published(large[0].SeriesInstanceUID, 6)
        receiver.end_accounted(acknowledged)


def tables(receiver: ReceiverProcess) -> set[str]:
    with closing(sqlite3.connect(receiver.folder / "ledger.sqlite")) as ledger:
        return {name for (name,) in ledger.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A tmpfs of so many megabytes at `folder`; what is yielded changes its size."""
    rights = [] if os.geteuid() == 0 else ["sudo", "-n"]

    def mount(options: str) -> subprocess.CompletedProcess[str]:
        command = [*rights, "mount", "-t", "tmpfs", "-o", f"{options},mode=0777", "tmpfs", str(folder)]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            return subprocess.CompletedProcess(command, 1, "", str(error))

    folder.mkdir()
    done = mount(f"size={megabytes}m")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here ({done.stderr.strip()}); RLIMIT_FSIZE stands in, see above")
    try:
        yield lambda size: mount(f"remount,size={size}m").check_returncode()
    finally:
        subprocess.run([*rights, "umount", "-l", str(folder)], check=True)


def test_a_small_tmpfs_that_fills_up_takes_the_rest_of_the_series_once_there_is_space(tmp_path: Path) -> None:
    images = image_series(60, 300)  # 11 MB
    with (
        small_disk(tmp_path / "disk", 4) as resize,
        running(tmp_path, STORE__ROOT=str(tmp_path / "disk" / "store")) as receiver,
    ):
        receiver.config.store.__dict__["root"] = tmp_path / "disk" / "store"
        with RawSender(receiver.port) as sender:
            sender.associate()
            statuses = [sender.store(image) for image in images]
            assert set(statuses) == {StoreStatus.SUCCESS, StoreStatus.OUT_OF_RESOURCES}
            stored = statuses.count(0)
            assert statuses == [0] * stored + [StoreStatus.OUT_OF_RESOURCES] * (60 - stored)
            assert len(list(receiver.store.glob("*/*/*.dcm"))) == stored
            assert list((receiver.store / "incoming").iterdir()) == []
            resize(64)
            assert [sender.store(image) for image in images] == [0] * 60
            sender.release()
        receiver.wait_published(images[0].SeriesInstanceUID, 60)
        receiver.end_accounted({str(image.SOPInstanceUID): sha256(encoded(image)) for image in images})


def without_overriding() -> tuple[str, ...]:
    """How to run a process for which file modes count, as they do not for root."""
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


def test_a_store_that_becomes_read_only_refuses_and_recovers_without_a_restart(tmp_path: Path) -> None:
    images = ct_series(9)
    with running(tmp_path, without_overriding()) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        assert sender.store(images[0]) == 0
        incoming, series = receiver.store / "incoming", receiver.store / images[0].StudyInstanceUID
        command, *data_set = store_pdus(images[1], fragment=200)
        sender.send(command, data_set[0])
        receiver.within(10.0, lambda: any(incoming.iterdir()), "the instance is being written")
        folders = [incoming, *series.iterdir(), series, receiver.store]
        for folder in folders:
            folder.chmod(0o555)
        sender.send(*data_set[1:])  # it can be neither placed nor removed now
        assert sender.response()[1] == StoreStatus.OUT_OF_RESOURCES
        assert sender.store(images[2]) == StoreStatus.OUT_OF_RESOURCES
        assert echoes(receiver.port)
        for folder in folders:
            folder.chmod(0o755)
        assert [sender.store(image) for image in images] == [0] * 9
        sender.release()
        receiver.wait_published(images[0].SeriesInstanceUID, 9)
        assert_log_is_clean(receiver.log)
        assert receiver.end(signal.SIGTERM) == 0
        receiver.start()  # what could not be removed goes now
        receiver.end_accounted({str(image.SOPInstanceUID): sha256(encoded(image)) for image in images})


# --- ledger and bus --------------------------------------------------------------------------------------------------


def test_a_ledger_that_somebody_locks_delays_neither_images_nor_loses_rows(tmp_path: Path) -> None:
    images = ct_series(12)
    with running(tmp_path) as receiver:
        receiver.within(10.0, lambda: "series" in tables(receiver), "the ledger is there")
        with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as locker:
            locker.execute("BEGIN EXCLUSIVE")
            started = time.monotonic()
            acknowledged = send_over(receiver.port, images)
            assert len(acknowledged) == 12
            assert time.monotonic() - started < 2.0
            time.sleep(times(2, 20))  # the lock is held, also for longer than SQLite waits by itself
            assert receiver.process.poll() is None
            locker.execute("ROLLBACK")
        receiver.wait_published(images[0].SeriesInstanceUID, 12)
        receiver.end_accounted(acknowledged)


def test_a_ledger_that_is_removed_is_made_again_from_the_files_at_the_next_start(tmp_path: Path) -> None:
    before, after = ct_series(10), ct_series(10)
    with running(tmp_path, RECEIVER__SETTLE_S="2.5", RECEIVER__QUIET_S="3") as receiver:
        acknowledged = send_over(receiver.port, before)
        for file in tmp_path.glob("ledger.sqlite*"):
            file.unlink()
        acknowledged |= send_over(receiver.port, after)
        assert len(acknowledged) == 20
        assert echoes(receiver.port)
        receiver.end(signal.SIGTERM)
        receiver.start()
        for images in (before, after):
            receiver.wait_published(images[0].SeriesInstanceUID, 10)
        receiver.end_accounted(acknowledged)


def test_a_bus_that_is_down_delays_the_events_and_not_the_images(tmp_path: Path) -> None:
    images = ct_series(10)
    with running(tmp_path, BUS__URL=f"sqlite:///{tmp_path}/later/bus.sqlite") as receiver:
        acknowledged = send_over(receiver.port, images)
        assert len(acknowledged) == 10
        receiver.within(15.0, lambda: "closed series wait and reception goes on" in receiver.log, "it says so")
        assert echoes(receiver.port)
        (tmp_path / "later").mkdir()
        receiver.within(15.0, lambda: "the bus answers again" in receiver.log, "it publishes")
        assert receiver.end(signal.SIGTERM) == 0
        (tmp_path / "later" / "bus.sqlite").rename(tmp_path / "bus.sqlite")
        assert [(event.revision, event.instance_count) for event in receiver.published()] == [(1, 10)]
        assert_durable(receiver.store, acknowledged)
        assert_accounted(receiver, acknowledged)
        assert receiver.log.count("closed series wait") == 1


# --- peers that fail -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """One receiver for all the peers below, so that what one leaves behind the next one finds."""
    folder = tmp_path_factory.mktemp("impatient")
    with running(folder, RECEIVER__NETWORK_TIMEOUT_S=str(IMPATIENT_S)) as receiver:
        for _ in range(3):
            send_over(receiver.port, ct_series(2))
            echoes(receiver.port)
        yield receiver
        receiver.end_accounted({})


@pytest.fixture(scope="module")
def at_rest(impatient: ReceiverProcess) -> tuple[int, int]:
    """Threads and descriptors of the receiver before the first peer."""
    return impatient.at_rest()


def vanish(connection: socket.socket) -> None:
    """Be gone without FIN or RST, as a machine that lost its power; without the right to, just never say a word."""
    tcp_repair = 19  # linux/tcp.h
    with contextlib.suppress(PermissionError):
        connection.setsockopt(socket.IPPROTO_TCP, tcp_repair, 1)
        connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def silent_from_the_start(sender: RawSender, image: Dataset) -> None:
    """Nothing is sent at all."""


def silent_within_the_request(sender: RawSender, image: Dataset) -> None:
    sender.send(associate_rq()[:40])


def silent_in_the_association(sender: RawSender, image: Dataset) -> None:
    sender.associate()


def silent_between_command_and_data_set(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(store_pdus(image)[0])


def silent_within_a_pdu(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(b"".join(store_pdus(image))[:-50])


def silent_within_a_pdu_header(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    command, *data_set = store_pdus(image, fragment=500)
    sender.send(command, data_set[0], data_set[1][:3])


def vanishing_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    silent_within_a_pdu(sender, image)
    vanish(sender.socket)


def vanishing_in_the_association(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    vanish(sender.socket)


def trickling(sender: RawSender, image: Dataset) -> None:
    """A byte now and then, never silent for long."""
    sender.associate()
    command, *data_set = store_pdus(image)
    sender.send(command)
    with contextlib.suppress(OSError):
        for byte in b"".join(data_set)[: int(10 * IMPATIENT_S / 0.25)]:
            sender.send(bytes([byte]))
            time.sleep(0.25)
    sender.socket.close()


def trickling_within_the_request(sender: RawSender, image: Dataset) -> None:
    with contextlib.suppress(OSError):
        for byte in associate_rq()[: int(10 * IMPATIENT_S / 0.25)]:
            sender.send(bytes([byte]))
            time.sleep(0.25)
    sender.socket.close()


def aborting_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(*store_pdus(image, fragment=500)[:-1], ABORTED)
    sender.wait_closed()


def releasing_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(*store_pdus(image, fragment=500)[:-1], RELEASE)
    assert sender.read_pdu()[0] == RELEASE_RP
    sender.socket.close()


def resetting_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    silent_within_a_pdu(sender, image)
    reset(sender.socket)


def closing_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    silent_within_a_pdu(sender, image)
    sender.socket.close()


def closing_before_the_answer(sender: RawSender, image: Dataset) -> None:
    """The whole request and then nobody to answer: stored or not, but not half."""
    sender.associate()
    sender.send(*store_pdus(image))
    reset(sender.socket)


def resetting_at_once(sender: RawSender, image: Dataset) -> None:
    reset(sender.socket)


def claiming_a_pdu_of_four_gigabytes(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(struct.pack(">BxL", 4, 0xFFFFFFFF), bytes(1000))
    assert ABORT in sender.wait_closed()


def claiming_a_fragment_beyond_its_pdu(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(store_pdus(image)[0], struct.pack(">BxLLBB", 4, 20, 5000, 1, 0), bytes(14))
    assert ABORT in sender.wait_closed()


def sending_a_command_within_a_data_set(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    command, *data_set = store_pdus(image, fragment=500)
    sender.send(command, data_set[0], command)
    assert ABORT in sender.wait_closed()


def sending_http(sender: RawSender, image: Dataset) -> None:
    sender.send(b"GET / HTTP/1.1\r\nHost: scanner\r\n\r\n")
    assert sender.wait_closed() == [ABORT]


def asking_for_an_association_twice(sender: RawSender, image: Dataset) -> None:
    sender.associate()
    sender.send(*store_pdus(image, fragment=500)[:2], associate_rq())
    assert sender.read_pdu()[0] == ABORT
    sender.socket.close()


PEERS: list[Callable[[RawSender, Dataset], None]] = [
    silent_from_the_start,
    silent_within_the_request,
    silent_in_the_association,
    silent_between_command_and_data_set,
    silent_within_a_pdu,
    silent_within_a_pdu_header,
    vanishing_within_a_data_set,
    vanishing_in_the_association,
    trickling,
    trickling_within_the_request,
    aborting_within_a_data_set,
    releasing_within_a_data_set,
    resetting_within_a_data_set,
    closing_within_a_data_set,
    closing_before_the_answer,
    resetting_at_once,
    claiming_a_pdu_of_four_gigabytes,
    claiming_a_fragment_beyond_its_pdu,
    sending_a_command_within_a_data_set,
    sending_http,
    asking_for_an_association_twice,
]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_a_failing_peer_costs_nobody_else_anything_and_leaves_nothing(
    impatient: ReceiverProcess, at_rest: tuple[int, int], peer: Callable[[RawSender, Dataset], None]
) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 0.0)
    before = len(list(impatient.store.glob("*/*/*.dcm")))
    threads, descriptors = at_rest
    with contextlib.ExitStack() as peers:
        senders = [peers.enter_context(RawSender(impatient.port)) for _ in range(times(3, 20))]
        at_once([lambda sender=sender: peer(sender, image) for sender in senders])  # type: ignore[misc]
        assert echoes(impatient.port), "somebody else is served meanwhile"
        impatient.wait_idle(threads, descriptors + 4, seconds=4 * IMPATIENT_S + 6.0)
        # silence ends with the receiver's A-ABORT or its closing, never with the peer's patience
    impatient.wait_idle(threads, descriptors + 4)
    assert list(impatient.store.rglob("*.partial")) == []
    stored = list((impatient.store / "1.2.3" / "1.2.3.4").glob(f"{image.SOPInstanceUID}*"))
    if peer is closing_before_the_answer:
        assert all(data_set_bytes(path) == encoded(image) for path in stored)
    else:
        assert stored == []
        assert len(list(impatient.store.glob("*/*/*.dcm"))) == before
    acknowledged = send_over(impatient.port, ct_series(2))
    assert len(acknowledged) == 2
    assert_durable(impatient.store, acknowledged)
    assert_log_is_clean(impatient.log)


# --- many ------------------------------------------------------------------------------------------------------------


def test_a_thousand_associations_in_a_row_leave_memory_threads_and_descriptors_flat(tmp_path: Path) -> None:
    count = times(100, 1000)
    acknowledged: Acknowledged = {}
    images = image_series(count, 64)
    with running(tmp_path, RECEIVER__SETTLE_S="3", RECEIVER__SETTLE_MIN_S="3") as receiver:
        for image in images[: count // 4]:
            acknowledged |= send_over(receiver.port, [image])
        threads, descriptors = receiver.at_rest()
        resident_mb = receiver.resident_mb
        for image in images[count // 4 :]:
            acknowledged |= send_over(receiver.port, [image])
        receiver.wait_idle(threads, descriptors + 4)
        grown_mb = receiver.resident_mb - resident_mb
        print(f"{count} associations: {resident_mb:.0f} MB resident, {grown_mb:+.1f} MB after the last three quarters")
        assert grown_mb < 8.0
        assert len(acknowledged) == count
        receiver.wait_published(images[0].SeriesInstanceUID, count)
        receiver.end_accounted(acknowledged)
        assert [event.revision for event in receiver.published()] == [1]


def test_thirty_associations_at_once_make_one_whole_series(tmp_path: Path) -> None:
    images = image_series(30 * times(5, 40), 96)
    with running(tmp_path, RECEIVER__SETTLE_S="1.5") as receiver:
        threads, descriptors = receiver.at_rest()
        parts = at_once([lambda i=i: send_over(receiver.port, images[i::30]) for i in range(30)])  # type: ignore[misc]
        acknowledged: Acknowledged = {uid: digest for part in parts for uid, digest in part.items()}
        assert len(acknowledged) == len(images)
        receiver.wait_published(images[0].SeriesInstanceUID, len(images))
        receiver.wait_idle(threads, descriptors + 8)  # and the ledger's and the bus's files
        receiver.end_accounted(acknowledged)
        assert [(event.revision, event.instance_count) for event in receiver.published()] == [(1, len(images))]


def test_thirty_senders_of_the_same_series_at_once_store_it_once(tmp_path: Path) -> None:
    images = image_series(times(10, 60), 96)
    with running(tmp_path, RECEIVER__SETTLE_S="1.5") as receiver:
        parts = at_once([lambda: send_over(receiver.port, images)] * 30)
        assert all(len(part) == len(images) for part in parts)
        receiver.wait_published(images[0].SeriesInstanceUID, len(images))
        assert len(list(receiver.store.glob("*/*/*.dcm"))) == len(images)
        receiver.end_accounted(parts[0])


def test_a_series_of_two_thousand_slices_stays_under_200_megabytes(tmp_path: Path) -> None:
    count = times(100, 2000)
    images = image_series(100, 512)
    with running(tmp_path, RECEIVER__QUIET_S="30") as receiver:
        most_mb = 0.0
        with RawSender(receiver.port) as sender:
            sender.associate()
            for i in range(count):
                image = images[i % 100]
                image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.4.{i}")
                image.ImagePositionPatient = [-100.0, -120.0, i * 0.5]
                assert sender.store(image) == 0
                if i % 20 == 0:
                    most_mb = max(most_mb, receiver.resident_mb)
            sender.release()
        receiver.wait_published(images[0].SeriesInstanceUID, count)
        most_mb = max(most_mb, receiver.resident_mb)
        print(f"{count} slices: at most {most_mb:.0f} MB resident")
        assert most_mb < 200.0
        receiver.end_accounted({})

"""Odd and rare input, each with the outcome that is promised for it: stored as it came and read right, or refused."""

import base64
import hashlib
import logging
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from receiver_fakes import UPRIGHT, Receiver, config_under, ct_series, ct_slice, receiving, send_all
from receiver_faults import (
    COMMAND,
    LAST,
    RawSender,
    ReceiverProcess,
    associate_rq,
    data_set_bytes,
    dcmtk,
    echo_command,
    echoes,
    encoded,
    p_data,
    pdv,
    response_in,
    send_over,
    sha256,
    store_command,
    store_pdus,
)
from sqlalchemy import select

from herald.ledger import instances, series
from herald.volume import read_datasets, volume_from_datasets
from receiver.statuses import StoreStatus
from router.eligibility import axial_candidates

PIXELS = (np.arange(256).reshape(16, 16) * 13 - 1000).astype(np.int16)
LARGE_PIXELS = np.random.default_rng(1).integers(-1000, 3000, (300, 300)).astype(np.int16)

HTJ2K_PIXELS = base64.b64decode(
    """
    /0//UQApQAAAAAAQAAAAEAAAAAAAAAAAAAAAEAAAABAAAAAAAAAAAAABjwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJCQ
    kJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAHwAAf+TwAAl9ADHdAAAwAASwAATAOwBB3QA2P4DB3QAwAATQAATgDT9AIJ0
    AGhH+wCjVADAABUQAAVYGGP8qnACdQCmmzZt+sBCAey2AMAAKyAAFpCIiIiI58Cnp6fCeACePT09PT09Pf2MYHv2MYHsugD/2Q==
    """
)
"""PIXELS by OpenJPH 0.26.3 through imagecodecs 2026.3.6; no encoder for HTJ2K is among what Herald installs."""


@pytest.fixture(autouse=True)
def _stopping_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("receiver.scp.POLL_S", 0.01)


def photograph(pixels: NDArray[np.int16] = PIXELS, **values: Any) -> Dataset:
    """A CT image of these pixels."""
    rows, columns = pixels.shape
    image = ct_slice("1.2.3", "1.2.3.4", 0.0, Rows=rows, Columns=columns, PixelSpacing=[0.5, 0.5], **values)
    image.PixelData = pixels.tobytes()
    return image


def only_file(receiver: Receiver) -> Path:
    (path,) = receiver.store.all_instances()
    return path


def rows_of(receiver: Receiver, table: Any) -> list[Any]:
    receiver.recorder.submit(lambda connection: None).result(10.0)
    with receiver.recorder.ledger.read() as connection:
        return list(connection.execute(select(table)).mappings())


def store_bytes(sender: RawSender, data: bytes, uid: str, sop_class: str = CTImageStorage, message_id: int = 1) -> int:
    """C-STORE of any bytes; the status."""
    pieces = [data[i : i + 16000] for i in range(0, len(data), 16000)] or [b""]
    sender.send(
        p_data(pdv(1, COMMAND | LAST, store_command(sop_class, uid, message_id))),
        *(p_data(pdv(1, 0, piece)) for piece in pieces[:-1]),
        p_data(pdv(1, LAST, pieces[-1])),
    )
    answered, status = sender.response()
    assert answered == message_id
    return status


# --- transfer syntaxes -----------------------------------------------------------------------------------------------


def by_dcmtk(program: str, *options: str) -> Callable[[Dataset, Path], Dataset]:
    def compressed(image: Dataset, folder: Path) -> Dataset:
        image.save_as(folder / "plain.dcm", enforce_file_format=True)
        command = [dcmtk(program), *options, str(folder / "plain.dcm"), str(folder / "compressed.dcm")]
        subprocess.run(command, check=True, capture_output=True)
        return dcmread(folder / "compressed.dcm")

    return compressed


def by_pydicom(syntax: UID) -> Callable[[Dataset, Path], Dataset]:
    def compressed(image: Dataset, folder: Path) -> Dataset:
        image.compress(syntax, generate_instance_uid=False)
        return image

    return compressed


def as_htj2k(image: Dataset, folder: Path) -> Dataset:
    image.PixelData = encapsulate([HTJ2K_PIXELS])
    image["PixelData"].VR = "OB"
    image.file_meta.TransferSyntaxUID = HTJ2KLossless
    return image


def in_syntax(syntax: UID) -> Callable[[Dataset, Path], Dataset]:
    def as_it_is(image: Dataset, folder: Path) -> Dataset:
        image.file_meta.TransferSyntaxUID = syntax
        if syntax == ExplicitVRBigEndian:
            image.PixelData = np.frombuffer(image.PixelData, "<i2").astype(">i2").tobytes()
        return image

    return as_it_is


ENCODERS: dict[UID, Callable[[Dataset, Path], Dataset]] = {
    ExplicitVRLittleEndian: in_syntax(ExplicitVRLittleEndian),
    ImplicitVRLittleEndian: in_syntax(ImplicitVRLittleEndian),
    ExplicitVRBigEndian: in_syntax(ExplicitVRBigEndian),
    DeflatedExplicitVRLittleEndian: in_syntax(DeflatedExplicitVRLittleEndian),
    RLELossless: by_pydicom(RLELossless),
    JPEGLossless: by_dcmtk("dcmcjpeg", "+el"),
    JPEGLosslessSV1: by_dcmtk("dcmcjpeg", "+e1"),
    JPEGLSLossless: by_dcmtk("dcmcjpls", "+el"),
    JPEG2000Lossless: by_pydicom(JPEG2000Lossless),  # which needs some size for its resolutions
    HTJ2KLossless: as_htj2k,
}


@pytest.mark.parametrize("syntax", ENCODERS, ids=lambda syntax: UID(syntax).name)
def test_every_transfer_syntax_is_stored_as_it_came_and_decoded_to_the_right_pixels(
    tmp_path: Path, syntax: UID
) -> None:
    pixels = LARGE_PIXELS if syntax == JPEG2000Lossless else PIXELS
    image = ENCODERS[syntax](photograph(pixels), tmp_path)
    assert image.file_meta.TransferSyntaxUID == syntax
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port, [(CTImageStorage, syntax)]) as sender:
            sender.associate()
            assert sender.store(image) == 0
        path = only_file(receiver)
        assert data_set_bytes(path) == encoded(image)
        (row,) = rows_of(receiver, instances)
    assert row["transfer_syntax_uid"] == syntax
    volume = volume_from_datasets(read_datasets([path]))
    assert volume.unreadable == ()
    assert np.array_equal(volume.hounsfield[0], pixels)


# --- what comes twice, late or incomplete ----------------------------------------------------------------------------


def test_one_sop_instance_uid_in_two_series_is_two_instances(tmp_path: Path) -> None:
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    one = ct_slice("1.2.3", "1.2.3.4", 0.0, ImageType=scout, SOPInstanceUID="1.2.3.9")
    other = ct_slice("1.2.3", "1.2.3.5", 0.0, ImageType=scout, SOPInstanceUID="1.2.3.9")
    with receiving(config_under(tmp_path)) as receiver:
        assert send_all(receiver.port, [one, other]) == [0, 0]
        events = receiver.bus.wait_for(2)
        rows = rows_of(receiver, instances)
    assert {(event.series_instance_uid, event.instance_count) for event in events} == {("1.2.3.4", 1), ("1.2.3.5", 1)}
    assert [(row["conflict"], row["copies"]) for row in rows] == [(False, 1)] * 2


def test_repetitions_change_nothing_and_other_bytes_are_kept_beside(tmp_path: Path) -> None:
    images = ct_series(8)
    other = ct_slice(
        images[0].StudyInstanceUID, images[0].SeriesInstanceUID, 0.0, SOPInstanceUID=images[0].SOPInstanceUID
    )
    other.PixelData = bytes(128)
    with receiving(config_under(tmp_path)) as receiver:
        assert send_all(receiver.port, [*images, *images, other, other]) == [0] * 18
        (event,) = receiver.bus.wait_for(1)
        rows = rows_of(receiver, instances)
        assert len(list(receiver.store.all_instances())) == 9
    assert (event.instance_count, event.close_reason) == (8, "released-and-even")
    assert sorted((row["conflict"], row["copies"]) for row in rows) == [(False, 2)] * 8 + [(True, 2)]


def without(keyword: str) -> Callable[[list[Dataset]], list[Dataset]]:
    def removed(images: list[Dataset]) -> list[Dataset]:
        for image in images:
            if keyword in image:
                delattr(image, keyword)
        return images

    return removed


def named(images: list[Dataset]) -> list[Dataset]:
    for image in images:
        image.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        image.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"
        image.InstitutionName = "東病院"
    return images


SERIES: dict[str, tuple[Callable[[list[Dataset]], list[Dataset]], str]] = {
    "in order": (list, "released-and-even"),
    "backwards": (lambda images: images[::-1], "released-and-even"),
    "odd ones first": (lambda images: images[1::2] + images[::2], "released-and-even"),
    "without InstanceNumber": (without("InstanceNumber"), "released-and-even"),
    "without Manufacturer": (without("Manufacturer"), "released-and-even"),
    "without ImagePositionPatient": (without("ImagePositionPatient"), "quiet"),
    "without ImageOrientationPatient": (without("ImageOrientationPatient"), "quiet"),
    "without StationName and AccessionNumber": (
        lambda images: without("StationName")(without("AccessionNumber")(images)),
        "released-and-even",
    ),
    "with names in kanji": (named, "released-and-even"),
}


@pytest.mark.parametrize("how", SERIES)
def test_a_series_closes_and_stacks_however_it_comes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    caplog.set_level(logging.INFO)
    change, reason = SERIES[how]
    images = ct_series(10)
    for i, image in enumerate(images):
        image.Manufacturer = "Herald"
        image.PixelData = bytes([i, 0] * 64)
    sent = change(images)
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        acknowledged = send_over(receiver.port, sent)
        (event,) = receiver.bus.wait_for(1)
        paths = receiver.store.series_paths(event.study_instance_uid, event.series_instance_uid)
    assert len(acknowledged) == 10
    assert (event.instance_count, event.close_reason, event.revision) == (10, reason, 1)
    assert {path.stem: sha256(data_set_bytes(path)) for path in paths} == acknowledged
    assert event.scanner == ("RAW" if "StationName" in how else "CT-EAST")
    volume = volume_from_datasets(read_datasets(paths))
    assert volume.slice_count == 10
    assert volume.hounsfield[:, 0, 0].tolist() == list(range(10))
    assert "Never" not in caplog.text
    assert "Yamada" not in caplog.text
    assert "山田" not in caplog.text


# --- character sets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("character_set", "station"),
    [
        ("ISO_IR 192", "КТ-東 Süd"),
        ("ISO_IR 100", "CT-Süd"),
        ("ISO_IR 101", "CT-Łódź"),
        ("ISO_IR 144", "КТ-1"),
        ("ISO_IR 126", "ΑΤ-1"),
        ("ISO_IR 127", "قسم"),
        ("ISO_IR 138", "חדר"),
        ("ISO_IR 166", "ห้อง"),
        ("ISO_IR 13", "ｼｰﾃｨ"),
        ("GB18030", "东区"),
        ("GBK", "东区"),
        (["", "ISO 2022 IR 87"], "CT-東"),
        (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ｼ東"),
        (["", "ISO 2022 IR 149"], "동관"),
        (["ISO 2022 IR 100", "ISO 2022 IR 144"], "Süd КТ"),
    ],
    ids=str,
)
def test_accession_number_and_station_name_are_read_in_their_character_set(
    tmp_path: Path, character_set: Any, station: str
) -> None:
    image = photograph(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    image.SpecificCharacterSet = character_set
    image.StationName = image.AccessionNumber = station
    with receiving(config_under(tmp_path)) as receiver:
        assert len(send_over(receiver.port, [image])) == 1
        (event,) = receiver.bus.wait_for(1)
        (row,) = rows_of(receiver, series)
    assert (event.scanner, event.accession_number) == (station, station)
    assert (row["scanner"], row["accession_number"]) == (station, station)


@pytest.mark.parametrize(
    ("declared", "value", "read"),
    [
        (None, "CT-Süd".encode(), "CT-Süd"),
        (None, "CT-Süd".encode("latin-1"), "CT-Süd"),
        ("ISO_IR 6", "CT-Süd".encode("latin-1"), "CT-Süd"),
        ("ISO_IR 999", "CT-東".encode(), "CT-東"),
        ("\\ISO 2022 IR 58", b"\x1b$)A\xb6\xab\xc7\xf8", "东区"),  # which pydicom writes without the escape sequence
        ("ISO_IR 192", b"CT-\xff\xfe", "CT-\ufffd\ufffd"),
        ("ISO_IR 100", b"CT\x1b\x07\x00-1", "CT-1"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings(
    "ignore:Failed to decode byte string:UserWarning", "ignore:Found unknown escape:UserWarning"
)
def test_text_that_contradicts_its_character_set_is_read_as_well_as_can_be(
    tmp_path: Path, declared: str | None, value: bytes, read: str
) -> None:
    image = photograph(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], StationName="X" * (len(value) + len(value) % 2))
    if declared is not None:
        image.SpecificCharacterSet = "ISO_IR 999" if declared == "ISO_IR 999" else declared
    data = encoded_leniently(image).replace(image.StationName.encode(), value.ljust(len(value) + len(value) % 2))
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        assert store_bytes(sender, data, str(image.SOPInstanceUID)) == 0
        sender.release()
        (event,) = receiver.bus.wait_for(1)
    assert event.scanner == read


def encoded_leniently(image: Dataset) -> bytes:
    """Also with a SpecificCharacterSet that is none."""
    declared = image.get("SpecificCharacterSet")
    if declared != "ISO_IR 999":
        return encoded(image)
    image.SpecificCharacterSet = "ISO_IR 100"
    return encoded(image).replace(b"ISO_IR 100", b"ISO_IR 999")


# --- objects that are no slice ---------------------------------------------------------------------------------------


def enhanced_ct(frames: int) -> Dataset:
    """An enhanced multi-frame CT image whose frame i is i everywhere, 5 mm apart (PS3.3 A.38)."""
    image = photograph(SOPClassUID=EnhancedCTImageStorage, ImagePositionPatient=None, ImageOrientationPatient=None)
    del image.PixelSpacing
    image.NumberOfFrames = frames
    shared, orientation, measures, transformation = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = UPRIGHT
    measures.PixelSpacing = [0.5, 0.5]
    transformation.RescaleSlope, transformation.RescaleIntercept = 1, 0
    shared.PlaneOrientationSequence = Sequence([orientation])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([transformation])
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    per_frame = []
    for i in range(frames):
        frame, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-100.0, -120.0, 5.0 * i]
        frame.PlanePositionSequence = Sequence([position])
        per_frame.append(frame)
    image.PerFrameFunctionalGroupsSequence = Sequence(per_frame)
    image.PixelData = np.repeat(np.arange(frames, dtype=np.int16), 256).tobytes()
    return image


def test_an_enhanced_multi_frame_ct_is_one_instance_that_is_no_stack_and_whose_frames_the_router_stacks(
    tmp_path: Path,
) -> None:
    image = enhanced_ct(24)
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port, [(EnhancedCTImageStorage, ExplicitVRLittleEndian)]) as sender:
            sender.associate()
            assert sender.store(image) == 0
            sender.release()
        (event,) = receiver.bus.wait_for(1)
        path = only_file(receiver)
        assert data_set_bytes(path) == encoded(image)
    assert (event.instance_count, event.close_reason) == (1, "released-and-not-a-stack")
    slices, obstacles = axial_candidates(read_datasets([path]), min_slices=8, most_images=2000)
    assert obstacles == ()
    volume = volume_from_datasets(slices)
    assert volume.hounsfield[:, 0, 0].tolist() == list(range(24))
    assert np.diff(volume.positions_mm).tolist() == [5.0] * 23


def test_a_private_sop_class_is_refused_by_name_and_the_rest_of_the_association_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private = "1.3.12.2.1107.5.9.1"
    image = photograph()
    with receiving(config_under(tmp_path)) as receiver:
        contexts = [(CTImageStorage, ExplicitVRLittleEndian), (private, ExplicitVRLittleEndian)]
        with RawSender(receiver.port, contexts) as sender:
            sender.associate()
            assert sender.store(image) == 0
            sender.send(*store_pdus(image, context_id=3))  # all the same
            assert sender.wait_closed() == [7]
        assert data_set_bytes(only_file(receiver)) == encoded(image)
    assert (
        f"RAW (127.0.0.1) proposed what is not accepted here (SOP class or transfer syntax): {private}" in caplog.text
    )
    assert "presentation context 3, which was not accepted" in caplog.text


# --- data sets that are cut off, empty, or large ---------------------------------------------------------------------


def refused_as(tmp_path: Path, data: bytes, syntax: UID, uid: str) -> int:
    """The status that these bytes get, after which the association takes a good image and nothing else is stored."""
    good = ENCODERS[syntax](photograph(LARGE_PIXELS), tmp_path)
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port, [(CTImageStorage, syntax)]) as sender:
            sender.associate()
            status = store_bytes(sender, data, uid)
            assert sender.store(good) == 0
            sender.release()
        assert only_file(receiver).stem == good.SOPInstanceUID
    return status


@pytest.mark.parametrize("long", [False, True], ids=["in memory", "beyond 64 KiB"])
@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
        RLELossless,
        JPEG2000Lossless,
    ],
    ids=lambda syntax: UID(syntax).name,
)
def test_a_data_set_cut_off_in_its_pixels_cannot_be_understood(tmp_path: Path, syntax: UID, long: bool) -> None:
    image = ENCODERS[syntax](photograph(LARGE_PIXELS if long else LARGE_PIXELS[:64, :64].copy()), tmp_path)
    data = encoded(image)
    assert (len(data) > 70_000) == long
    assert refused_as(tmp_path, data[:-40], syntax, str(image.SOPInstanceUID)) == StoreStatus.CANNOT_DECODE


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "ImagePositionPatient", "private"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_a_data_set_cut_off_in_its_header_is_not_stored(tmp_path: Path, syntax: UID, keyword: str) -> None:
    image = in_syntax(syntax)(photograph(SeriesInstanceUID="1.2.3.4.5.6.7.8"), tmp_path)
    image.add_new(0x00291010, "UN", b"0123456789" * 10)
    mark = {"SeriesInstanceUID": b"1.2.3.4.5.6.7.8", "ImagePositionPatient": b"-100.0", "private": b"0123456789"}[
        keyword
    ]
    data = encoded(image)
    status = refused_as(tmp_path, data[: data.index(mark) + 5], syntax, str(image.SOPInstanceUID))
    assert status == StoreStatus.CANNOT_DECODE


@pytest.mark.parametrize("tag", [0x00091010, 0x00291010], ids=["before the identity", "before the pixels"])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_a_header_longer_than_what_is_kept_in_memory_is_read_from_the_file(
    tmp_path: Path, syntax: UID, tag: int
) -> None:
    image = in_syntax(syntax)(photograph(), tmp_path)
    image.add_new(tag, "UN", np.random.default_rng(1).bytes(200_000))
    data = encoded(image)
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port, [(CTImageStorage, syntax)]) as sender:
            sender.associate()
            assert store_bytes(sender, data[:-200], str(image.SOPInstanceUID)) == StoreStatus.CANNOT_DECODE
            assert sender.store(image, 2) == 0
            sender.release()
        path = only_file(receiver)
        assert data_set_bytes(path) == data
        (row,) = rows_of(receiver, series)
    assert (row["series_instance_uid"], row["scanner"]) == ("1.2.3.4", "CT-EAST")
    assert np.array_equal(volume_from_datasets(read_datasets([path])).hounsfield[0], PIXELS)


def test_an_empty_data_set_and_a_command_without_one_are_refused(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        assert store_bytes(sender, b"", "1.2.3.9") == StoreStatus.NO_SOP_INSTANCE_UID
        sender.send(p_data(pdv(1, COMMAND | LAST, store_command(CTImageStorage, "1.2.3.9", has_data_set=False))))
        assert sender.response()[1] == StoreStatus.CANNOT_DECODE
        assert sender.store(photograph()) == 0
        sender.release()
        assert len(list(receiver.store.all_instances())) == 1


@pytest.mark.filterwarnings("ignore:Expected explicit VR:UserWarning")
def test_a_deflated_stream_of_zeros_that_inflates_to_sixty_megabytes_does_no_harm(tmp_path: Path) -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(1 << 22)) for _ in range(16)) + deflater.flush()
    status = refused_as(tmp_path, bomb, DeflatedExplicitVRLittleEndian, "1.2.3.9")
    assert status == StoreStatus.NO_SOP_INSTANCE_UID


def test_an_instance_of_a_hundred_megabytes_is_stored_while_memory_stays_flat(tmp_path: Path) -> None:
    rows, frames = 512, 220
    image = enhanced_ct(frames)
    image.Rows = image.Columns = rows
    del image.PixelData
    pixel_bytes = 2 * rows * rows * frames
    header = encoded(image) + struct.pack("<HH2sHL", 0x7FE0, 0x0010, b"OW", 0, pixel_bytes)
    block = np.random.default_rng(1).bytes(130_000)
    digest = hashlib.sha256(header)
    receiver = ReceiverProcess(tmp_path)
    receiver.start()
    try:
        with RawSender(receiver.port, [(EnhancedCTImageStorage, ExplicitVRLittleEndian)], timeout_s=60.0) as sender:
            sender.associate()
            small = enhanced_ct(4)
            assert sender.store(small) == 0
            before_mb = most_mb = receiver.resident_mb
            command = store_command(EnhancedCTImageStorage, str(image.SOPInstanceUID), 2)
            sender.send(
                p_data(pdv(1, COMMAND | LAST, command)),
                *(p_data(pdv(1, 0, header[i : i + 100_000])) for i in range(0, len(header), 100_000)),
            )
            for start in range(0, pixel_bytes, len(block)):
                part = block[: pixel_bytes - start]
                digest.update(part)
                sender.send(p_data(pdv(1, LAST if start + len(block) >= pixel_bytes else 0, part)))
                if start // len(block) % 50 == 0:
                    most_mb = max(most_mb, receiver.resident_mb)
            assert sender.response() == (2, 0)
            most_mb = max(most_mb, receiver.resident_mb)
            sender.release()
        (path,) = receiver.store.glob(f"*/*/{image.SOPInstanceUID}.dcm")
        assert path.stat().st_size > 110_000_000
        assert sha256(data_set_bytes(path)) == digest.hexdigest()
        assert most_mb - before_mb < 20.0
    finally:
        receiver.end(9)


# --- odd negotiation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [0, 7, 8, 13, 128, 2**32 - 1])
def test_responses_come_in_pdus_as_long_as_the_sender_takes(tmp_path: Path, longest: int) -> None:
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.send(associate_rq(longest=longest))
        assert sender.read_pdu()[0] == 2
        sender.send(p_data(pdv(3, COMMAND | LAST, echo_command())))
        command, last = b"", False
        while not last:
            kind, body = sender.read_pdu()
            assert kind == 4
            assert longest == 0 or len(body) <= longest
            command += body[6:]
            last = bool(body[5] & LAST)
        assert response_in(bytes(6) + command) == (1, 0)
        assert sender.store(photograph()) == 0
        sender.release()


@pytest.mark.parametrize("longest", [1, 6])
def test_a_sender_that_takes_no_pdu_that_holds_anything_is_refused(tmp_path: Path, longest: int) -> None:
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.send(associate_rq(longest=longest))
        assert sender.wait_closed() == [7]


def test_a_sender_that_does_not_say_how_long_its_pdus_may_be_is_served(tmp_path: Path) -> None:
    request = associate_rq()
    at = request.index(b"\x50\x00")  # User Information, whose first sub-item is the Maximum Length
    assert request[at + 4] == 0x51
    length = int.from_bytes(request[at + 2 : at + 4], "big") - 8
    request = request[: at + 2] + length.to_bytes(2, "big") + request[at + 12 :]
    request = request[:2] + (len(request) - 6).to_bytes(4, "big") + request[6:]
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.send(request)
        assert sender.read_pdu()[0] == 2
        assert sender.echo() == 0
        assert sender.store(photograph()) == 0
        sender.release()


def test_an_abort_for_a_reason_that_is_none_is_an_abort(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port) as sender:
            sender.associate()
            sender.send(struct.pack(">BxLBBBB", 7, 4, 0, 0, 2, 3))
            sender.wait_closed()
        assert echoes(receiver.port)
    assert "nobody foresaw" not in caplog.text


# --- how PDUs and PDVs are cut ---------------------------------------------------------------------------------------


def pieces_of(command: bytes, data_set: bytes, size: int) -> list[bytes]:
    """Command and data set as presentation data values of so many bytes."""
    values = []
    for kind, whole in ((COMMAND, command), (0, data_set)):
        parts = [whole[i : i + size] for i in range(0, len(whole), size)]
        values += [pdv(1, kind, part) for part in parts[:-1]] + [pdv(1, kind | LAST, parts[-1])]
    return values


SPLITS: dict[str, Callable[[bytes, bytes], list[bytes]]] = {
    "one PDV of one byte in each PDU": lambda c, d: [p_data(value) for value in pieces_of(c, d, 1)],
    "PDVs of one byte in one PDU": lambda c, d: [p_data(*pieces_of(c, d, 1))],
    "odd sizes": lambda c, d: [p_data(value) for value in pieces_of(c, d, 77)],
    "command over many PDUs": lambda c, d: [
        *(p_data(value) for value in pieces_of(c, d, 9) if value[5] & COMMAND),
        p_data(pdv(1, LAST, d)),
    ],
    "command and data set in one PDU": lambda c, d: [p_data(pdv(1, COMMAND | LAST, c), pdv(1, LAST, d))],
    "an empty last PDV": lambda c, d: [
        p_data(pdv(1, COMMAND | LAST, c)),
        p_data(pdv(1, 0, d)),
        p_data(pdv(1, LAST, b"")),
    ],
    "empty PDVs and PDUs between": lambda c, d: [
        p_data(pdv(1, COMMAND, b""), pdv(1, COMMAND, c[:11])),
        p_data(),
        p_data(pdv(1, COMMAND | LAST, c[11:]), pdv(1, 0, b""), pdv(1, 0, d[:13]), pdv(1, 0, b"")),
        p_data(),
        p_data(pdv(1, LAST, d[13:])),
    ],
}


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "byte by byte"])
@pytest.mark.parametrize("split", SPLITS)
def test_an_instance_is_the_same_however_its_pdus_are_cut(tmp_path: Path, split: str, at_once: bool) -> None:
    images = [photograph(SOPInstanceUID=generate_uid()) for _ in range(2)]
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        for i, image in enumerate(images):
            command = store_command(CTImageStorage, str(image.SOPInstanceUID), i + 1)
            stream = b"".join(SPLITS[split](command, encoded(image)))
            if at_once:
                sender.send(stream)
            else:
                for byte in range(0, len(stream), 3):
                    sender.send(stream[byte : byte + 3])
            assert sender.response() == (i + 1, 0)
        sender.release()
        stored = {path.stem: data_set_bytes(path) for path in receiver.store.all_instances()}
    assert stored == {str(image.SOPInstanceUID): encoded(image) for image in images}


def test_two_instances_and_an_echo_in_one_pdu_are_all_answered_in_their_order(tmp_path: Path) -> None:
    one, two = photograph(), photograph(SOPInstanceUID=generate_uid())
    with receiving(config_under(tmp_path)) as receiver, RawSender(receiver.port) as sender:
        sender.associate()
        sender.send(
            p_data(
                *pieces_of(store_command(CTImageStorage, str(one.SOPInstanceUID), 1), encoded(one), 500),
                *pieces_of(store_command(CTImageStorage, str(two.SOPInstanceUID), 2), encoded(two), 500),
                pdv(3, COMMAND | LAST, echo_command(3)),
            )
        )
        assert [sender.response() for _ in range(3)] == [(1, 0), (2, 0), (3, 0)]
        sender.release()
        assert len(list(receiver.store.all_instances())) == 2

"""The header that places an instance: the walk through bytes in memory says what pydicom says."""

from io import BytesIO
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from real_data import DATA, needs_real_data
from receiver_fakes import ct_slice

from herald.errors import NotDicomError
from herald.instance import Head, read_head

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]


def encoded(ds: Dataset, syntax: UID) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = syntax.is_implicit_VR, True
    write_dataset(buffer, ds)
    return buffer.getvalue()


def outcome(source: Any, syntax: UID) -> Head | str:
    try:
        return read_head(source, syntax)
    except NotDicomError:
        return "not DICOM"


def nested(undefined: bool, depth: int) -> Sequence:
    item = Dataset()
    item.CodeValue = "1"
    item.StudyInstanceUID = "9.9.9"  # must not be taken for the study's
    if depth:
        item.ConceptNameCodeSequence = nested(undefined, depth - 1)
        item["ConceptNameCodeSequence"].is_undefined_length = undefined
    item.is_undefined_length_sequence_item = undefined
    return Sequence([item])


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("undefined", [False, True])
def test_sequences_are_stepped_over_however_they_are_written(syntax: UID, undefined: bool) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 7.5, SOPInstanceUID="1.2.3.4.5")
    image.ProcedureCodeSequence = nested(undefined, 3)
    image["ProcedureCodeSequence"].is_undefined_length = undefined
    image.add_new(0x00091010, "UN", b"private")
    data = encoded(image, syntax)
    head = read_head(data, syntax)
    assert head == read_head(BytesIO(data), syntax)
    assert (head.header.study_instance_uid, head.header.series_instance_uid) == ("1.2.3", "1.2.3.4")
    assert head.header.plane is not None
    assert head.header.plane.position == (-100.0, -120.0, 7.5)
    assert (head.whole, head.end) == (True, len(data))


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_the_end_of_the_pixel_data_is_known_before_they_came(syntax: UID) -> None:
    data = encoded(ct_slice("1.2.3", "1.2.3.4", 7.5), syntax)
    assert read_head(data[:-100], syntax).end == len(data)


def test_a_header_that_is_cut_short_is_not_whole() -> None:
    data = encoded(ct_slice("1.2.3", "1.2.3.4", 7.5), ExplicitVRLittleEndian)
    at = data.index(b"\x20\x00\x32\x00DS")
    assert not read_head(data[:at], ExplicitVRLittleEndian).whole


@pytest.mark.parametrize(("written", "negotiated"), [SYNTAXES, SYNTAXES[::-1]])
def test_another_encoding_than_negotiated_is_left_to_pydicom(written: UID, negotiated: UID) -> None:
    data = encoded(ct_slice("1.2.3", "1.2.3.4", 7.5), written)
    assert outcome(data, negotiated) == outcome(BytesIO(data), negotiated)


@pytest.mark.filterwarnings("ignore:.*")  # pydicom warns of what it meets in damaged bytes
@settings(max_examples=300, deadline=None)
@given(data=st.data(), syntax=st.sampled_from(SYNTAXES))
def test_damaged_bytes_never_give_another_instance_than_pydicom_reads(data: st.DataObject, syntax: UID) -> None:
    image = ct_slice("1.2.3", "1.2.3.4", 7.5, SOPInstanceUID="1.2.3.4.5")
    image.ProcedureCodeSequence = nested(True, 1)
    image["ProcedureCodeSequence"].is_undefined_length = True
    raw = bytearray(encoded(image, syntax))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    walked, read = outcome(bytes(raw), syntax), outcome(BytesIO(bytes(raw)), syntax)
    if isinstance(walked, Head) and isinstance(read, Head):
        assert walked.header == read.header
        assert walked.end == read.end or None in (walked.end, read.end)


@needs_real_data
def test_real_headers_read_alike() -> None:
    files = [path for name in ("ge-head", "philips-phantom") for path in (DATA / name).rglob("*") if path.is_file()]
    compared = 0
    for path in files:
        ds = dcmread(path, stop_before_pixels=True, force=True)
        syntax = ds.file_meta.get("TransferSyntaxUID") if "TransferSyntaxUID" in ds.file_meta else None
        if syntax is None:
            continue
        raw = path.read_bytes()
        data = raw[144 + int.from_bytes(raw[140:144], "little") :]
        assert read_head(data, syntax) == read_head(BytesIO(data), syntax)
        compared += 1
    assert compared > 80

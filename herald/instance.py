"""The header elements that identify one instance and place it in its series, read without touching pixels.

Values are taken from their encoded bytes, so that a malformed value elsewhere in the header disturbs nothing.
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pydicom.charset import convert_encodings, decode_bytes, python_encoding
from pydicom.dataelem import RawDataElement
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MRImageStorage,
)
from pydicom.valuerep import TEXT_VR_DELIMS

from herald.errors import NotDicomError, StoreError

MOST_SCOUTS = 2
"""Images of another orientation or matrix that are no part of a scan: a frontal and a lateral scout."""

_SPECIFIC_CHARACTER_SET = 0x00080005
_IMAGE_TYPE = 0x00080008
_SOP_CLASS_UID = 0x00080016
_SOP_INSTANCE_UID = 0x00080018
_ACCESSION_NUMBER = 0x00080050
_MODALITY = 0x00080060
_STATION_NAME = 0x00081010
_STUDY_INSTANCE_UID = 0x0020000D
_SERIES_INSTANCE_UID = 0x0020000E
_IMAGE_POSITION_PATIENT = 0x00200032
_IMAGE_ORIENTATION_PATIENT = 0x00200037
_TAGS = [
    _IMAGE_TYPE,
    _SOP_CLASS_UID,
    _SOP_INSTANCE_UID,
    _ACCESSION_NUMBER,
    _MODALITY,
    _STATION_NAME,
    _STUDY_INSTANCE_UID,
    _SERIES_INSTANCE_UID,
    _IMAGE_POSITION_PATIENT,
    _IMAGE_ORIENTATION_PATIENT,
]
_LAST = max(_TAGS)
_PIXEL_DATA = 0x7FE00008  # FloatPixelData; DoubleFloatPixelData and PixelData follow
_PIXEL_DATA_TAGS = range(_PIXEL_DATA, 0x7FE00011)
_UNDEFINED_LENGTH = 0xFFFFFFFF
_DEFLATED_HEADER_BYTES = 1 << 20  # so much of an inflated data set is looked at for its header
_PREAMBLE_BYTES = 132
_READ = frozenset({*_TAGS, _SPECIFIC_CHARACTER_SET})
_WALKED = frozenset({ImplicitVRLittleEndian}) | {
    syntax
    for syntax in AllTransferSyntaxes
    if not (syntax.is_implicit_VR or syntax.is_deflated) and syntax.is_little_endian
}
_IMPLICIT = struct.Struct("<HHL")
_EXPLICIT = struct.Struct("<HH2sH")
_LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_VRS = _LONG_VRS | frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)
_Values = Mapping[int, bytes]
_ESCAPE = b"\x1b"  # of ISO 2022: what follows is in another character set
_UNPRINTABLE = re.compile(r"\x1b[\x20-\x2f]+[\x30-\x7e]|[\x00-\x1f\x7f]")  # escape sequences whole (ISO 2022)

STACKED_SOP_CLASSES = frozenset({CTImageStorage, MRImageStorage})
"""SOP classes with one plane per instance, whose series is complete only as a stack of planes."""


@dataclass(frozen=True)
class Plane:
    """Where one image lies: ImagePositionPatient (mm) and ImageOrientationPatient (PS3.3 C.7.6.2)."""

    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class InstanceHeader:
    """What identifies one instance; a UID that is missing is the empty string."""

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    accession_number: str
    modality: str
    station_name: str
    stacked: bool
    """One plane of a stack: a CT or MR image that is not a localizer."""
    plane: Plane | None


@dataclass(frozen=True)
class Head:
    """The start of a data set: its header, and where its pixel data end."""

    header: InstanceHeader
    whole: bool
    """The pixel data were reached, so that more bytes would not change it."""
    end: int | None
    """Offset after the last element that was begun, which is PixelData in an image; None where its length is undefined,
    or the data set is deflated or broken."""
    fragments: int | None
    """Offset of the first fragment of encapsulated pixel data."""


def header_from_dataset(encoded: BinaryIO, transfer_syntax_uid: str) -> InstanceHeader:
    """Read from an encoded data set without preamble and File Meta; raises NotDicomError when it cannot be decoded."""
    return read_head(encoded, transfer_syntax_uid).header


def read_head(encoded: bytes | BinaryIO, transfer_syntax_uid: str) -> Head:
    """Read up to the pixel data, whose bytes need not be there; raises NotDicomError when it cannot be decoded.

    A structure that is broken after the header, before the pixel data, is left to whoever decodes the pixels.
    Bytes in memory are walked through directly; what is unusual about them, and files, are read by pydicom.
    """
    syntax = UID(transfer_syntax_uid)
    if isinstance(encoded, bytes):
        if syntax in _WALKED:
            with contextlib.suppress(ValueError, struct.error, RecursionError):
                return _head(_walk(encoded, explicit=not syntax.is_implicit_VR), syntax)
        encoded = BytesIO(encoded)
    try:
        if syntax == DeflatedExplicitVRLittleEndian:
            return _head(_Found(_read_until(BytesIO(_inflated(encoded.read())), syntax, _PIXEL_DATA).values), syntax)
        start = encoded.tell()
        try:
            found = _read_until(encoded, syntax, _PIXEL_DATA)
        except Exception:  # see below
            encoded.seek(start)
            found = _Found(_read_until(encoded, syntax, _LAST + 1).values)
        return _head(found, syntax)
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors: all mean the same
        raise NotDicomError(
            f"the data set cannot be decoded as {syntax.name} ({type(error).__name__}: {error}); "
            "check the sender's encoding and send the instance again"
        ) from error


class _Found(NamedTuple):
    values: dict[int, bytes]
    """Encoded values of the elements that the header is made of."""
    whole: bool = False
    end: int | None = None
    fragments: int | None = None


def _head(found: _Found, syntax: UID) -> Head:
    return Head(_header(found.values, str(syntax)), found.whole, found.end, found.fragments)


def _stopped(values: dict[int, bytes], tag: int, start: int, length: int) -> _Found:
    """At the value of PixelData, or of what follows it."""
    if length != _UNDEFINED_LENGTH:
        return _Found(values, True, start + length)
    return _Found(values, True, None, start if tag in _PIXEL_DATA_TAGS else None)


def _inflated(deflated: bytes) -> bytes:
    """The start of a deflated data set; raises ValueError when it is short and yet not whole."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(deflated, _DEFLATED_HEADER_BYTES)
    if not inflater.eof and len(inflated) < _DEFLATED_HEADER_BYTES:
        raise ValueError("the deflated stream is cut off")
    return inflated


def _read_until(encoded: BinaryIO, syntax: UID, first_unread: int) -> _Found:
    """By pydicom; offsets count from where `encoded` stands."""
    origin = encoded.tell()
    stopped_at = length_there = value_at = 0

    def stop(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal stopped_at, length_there, value_at
        if int(tag) < first_unread:
            return False
        stopped_at, length_there, value_at = int(tag), length, encoded.tell()
        return True

    ds = read_dataset(
        encoded, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=stop, specific_tags=list(_TAGS)
    )
    values: dict[int, bytes] = {}
    for tag in _READ:
        element = ds.get_item(tag)
        if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
            values[tag] = element.value
            if len(element.value) < element.length:
                raise EOFError(f"{element.tag} is cut off")
    if not stopped_at:
        return _Found(values, False, encoded.tell() - origin)  # beyond the last byte where the last value is cut off
    return _stopped(values, stopped_at, value_at - origin, length_there)


def _walk(encoded: bytes, explicit: bool) -> _Found:
    """Go from element to element (PS3.5 7.1), little endian, and keep what the header is made of.

    On the way of every image, where pydicom takes several times as long. Raises ValueError or struct.error for anything
    that is not plainly well-formed.
    """
    if not explicit and encoded[4:6] in _VRS:
        raise ValueError("explicit VR where implicit VR was negotiated")
    values: dict[int, bytes] = {}
    offset = 0
    while offset < len(encoded):
        tag, start, length = _element(encoded, offset, explicit)
        if tag >= _PIXEL_DATA:
            return _stopped(values, tag, start, length)
        if length == _UNDEFINED_LENGTH:
            offset = _after_sequence(encoded, start, explicit)
            continue
        offset = start + length
        if tag in _READ:
            values[tag] = encoded[start:offset]
    if offset > len(encoded):
        raise ValueError("the last value is cut off")
    return _Found(values, False, offset)


def _element(encoded: bytes, offset: int, explicit: bool) -> tuple[int, int, int]:
    """Tag, start of the value, and its length."""
    if not explicit:
        group, element, length = _IMPLICIT.unpack_from(encoded, offset)
        return group << 16 | element, offset + 8, length
    group, element, vr, length = _EXPLICIT.unpack_from(encoded, offset)
    if vr in _LONG_VRS:
        length = int.from_bytes(encoded[offset + 8 : offset + 12], "little")
        if vr == b"UN" and length == _UNDEFINED_LENGTH:
            raise ValueError("UN of undefined length holds implicit VR (PS3.5 6.2.2)")
        return group << 16 | element, offset + 12, length
    if vr not in _VRS:
        raise ValueError(f"{vr!r} is no VR")
    return group << 16 | element, offset + 8, length


def _after_sequence(encoded: bytes, offset: int, explicit: bool) -> int:
    """Where a sequence of undefined length ends (PS3.5 7.5)."""
    while True:
        group, element, length = _IMPLICIT.unpack_from(encoded, offset)
        offset += 8
        if (group, element) == (0xFFFE, 0xE0DD):
            return offset
        if (group, element) != (0xFFFE, 0xE000):
            raise ValueError("no item where one must be")
        offset = _after_item(encoded, offset, explicit) if length == _UNDEFINED_LENGTH else offset + length


def _after_item(encoded: bytes, offset: int, explicit: bool) -> int:
    while encoded[offset : offset + 4] != b"\xfe\xff\x0d\xe0":
        _, start, length = _element(encoded, offset, explicit)
        offset = _after_sequence(encoded, start, explicit) if length == _UNDEFINED_LENGTH else start + length
    return offset + 8


def fragments_end(file: BinaryIO, start: int) -> int:
    """Where encapsulated pixel data end whose first fragment is at `start` (PS3.5 A.4); beyond a file that is cut off.

    What is no fragment is left to whoever decodes the pixels.
    """
    file.seek(start)
    while len(item := file.read(8)) == 8:
        tag, length = item[:4], int.from_bytes(item[4:], "little")
        if tag != b"\xfe\xff\x00\xe0":
            return file.tell()
        file.seek(length, os.SEEK_CUR)
    return file.tell() - len(item) + 8


def read_header(path: Path) -> InstanceHeader:
    """Read from a Part 10 file; raises NotDicomError when it is none, StoreError when it cannot be read."""
    try:
        with path.open("rb") as file:
            prefix = file.read(_PREAMBLE_BYTES)
            if prefix[128:] != b"DICM":
                raise NotDicomError(f"{path.name} is not a DICOM file: the prefix DICM is missing (PS3.10 7.1)")
            syntax, start = _file_meta(path)
            file.seek(start)
            return header_from_dataset(file, syntax)
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error


def _file_meta(path: Path) -> tuple[str, int]:
    """TransferSyntaxUID, and where the data set starts."""
    try:
        meta = read_file_meta_info(path)
        length = int(meta[0x00020000].value)  # FileMetaInformationGroupLength counts from after itself
        return str(meta.TransferSyntaxUID), _PREAMBLE_BYTES + 12 + length
    except OSError:
        raise
    except Exception as error:  # see header_from_dataset
        raise NotDicomError(f"{path.name} has no readable File Meta Information ({error}); PS3.10 7.1") from error


def _header(values: _Values, transfer_syntax_uid: str) -> InstanceHeader:
    sop_class_uid = _text(values, _SOP_CLASS_UID, 64)
    return InstanceHeader(
        sop_class_uid=sop_class_uid,
        sop_instance_uid=_text(values, _SOP_INSTANCE_UID, 65),
        study_instance_uid=_text(values, _STUDY_INSTANCE_UID, 65),
        series_instance_uid=_text(values, _SERIES_INSTANCE_UID, 65),
        transfer_syntax_uid=transfer_syntax_uid,
        accession_number=_text(values, _ACCESSION_NUMBER, 16),
        modality=_text(values, _MODALITY, 16),
        station_name=_text(values, _STATION_NAME, 64),
        stacked=sop_class_uid in STACKED_SOP_CLASSES and "LOCALIZER" not in _text(values, _IMAGE_TYPE, 256).split("\\"),
        plane=_plane(values),
    )


def _text(values: _Values, tag: int, longest: int) -> str:
    encoded = values.get(tag, b"").strip(b" \0")
    text = encoded.decode("ascii") if encoded.isascii() and _ESCAPE not in encoded else _decoded(values, encoded)
    return _UNPRINTABLE.sub("", text)[:longest]


def _decoded(values: _Values, encoded: bytes) -> str:
    """By SpecificCharacterSet (PS3.3 C.12.1.1.2); where it says nothing or is wrong, by what the bytes look like."""
    declared = values.get(_SPECIFIC_CHARACTER_SET, b"").decode("latin-1").rstrip("\0")
    terms = [term.strip() for term in declared.split("\\")]
    if any(terms) and all(term in python_encoding for term in terms):
        return decode_bytes(encoded, convert_encodings(terms), TEXT_VR_DELIMS)
    with contextlib.suppress(UnicodeDecodeError):
        return encoded.decode("utf-8")
    return encoded.decode("latin-1")


def _plane(values: _Values) -> Plane | None:
    position = _numbers(values, _IMAGE_POSITION_PATIENT, 3)
    orientation = _numbers(values, _IMAGE_ORIENTATION_PATIENT, 6)
    if position is None or orientation is None:
        return None
    x, y, z = position
    a, b, c, d, e, f = orientation
    return Plane((x, y, z), (a, b, c, d, e, f))


def _numbers(values: _Values, tag: int, count: int) -> list[float] | None:
    try:
        numbers = [float(part) for part in values.get(tag, b"").rstrip(b"\0").split(b"\\")]
    except ValueError:
        return None
    finite = all(abs(number) < 1e9 for number in numbers)  # also false for NaN
    return numbers if finite and len(numbers) == count else None

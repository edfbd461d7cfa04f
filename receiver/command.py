"""The two command sets of the hot path, C-STORE-RQ and C-STORE-RSP, straight from and to bytes (PS3.7 9.3.1, annex E).

A command set is always Implicit VR Little Endian with a group length first. All other commands go through pynetdicom.
"""

import struct
from dataclasses import dataclass
from typing import Final

C_STORE_RQ: Final = 0x0001
C_STORE_RSP: Final = 0x8001
NO_DATA_SET: Final = 0x0101

_GROUP_LENGTH: Final = 0x0000
_AFFECTED_SOP_CLASS_UID: Final = 0x0002
_COMMAND_FIELD: Final = 0x0100
_MESSAGE_ID: Final = 0x0110
_MESSAGE_ID_BEING_RESPONDED_TO: Final = 0x0120
_COMMAND_DATA_SET_TYPE: Final = 0x0800
_STATUS: Final = 0x0900
_ERROR_COMMENT: Final = 0x0902
_AFFECTED_SOP_INSTANCE_UID: Final = 0x1000

_ELEMENT = struct.Struct("<HHL")  # group, element, length
_US = struct.Struct("<H")


@dataclass(frozen=True)
class StoreRequest:
    """What a C-STORE-RQ says of the instance that follows."""

    context_id: int
    message_id: int
    sop_class_uid: str
    sop_instance_uid: str
    has_data_set: bool


def command_elements(encoded: bytes) -> dict[int, bytes]:
    """Values of the elements (0000,xxxx) by element number; raises ValueError when the bytes are no command set."""
    elements: dict[int, bytes] = {}
    offset = 0
    while offset < len(encoded):
        if offset + _ELEMENT.size > len(encoded):
            raise ValueError("the command set ends within an element")
        group, element, length = _ELEMENT.unpack_from(encoded, offset)
        offset += _ELEMENT.size
        if group != 0 or offset + length > len(encoded):
            raise ValueError(f"element ({group:04X},{element:04X}) of length {length} does not belong in a command set")
        elements[element] = encoded[offset : offset + length]
        offset += length
    return elements


def command_field(elements: dict[int, bytes]) -> int:
    """Which command it is; raises ValueError when it does not say so."""
    return _number(elements, _COMMAND_FIELD)


def announces_data_set(elements: dict[int, bytes]) -> bool:
    """Whether a data set follows the command; raises ValueError when it does not say so."""
    return _number(elements, _COMMAND_DATA_SET_TYPE) != NO_DATA_SET


def store_request(elements: dict[int, bytes], context_id: int) -> StoreRequest:
    """The request in a C-STORE-RQ; raises ValueError when a mandatory element is missing or has the wrong length."""
    return StoreRequest(
        context_id=context_id,
        message_id=_number(elements, _MESSAGE_ID),
        sop_class_uid=_uid(elements, _AFFECTED_SOP_CLASS_UID),
        sop_instance_uid=_uid(elements, _AFFECTED_SOP_INSTANCE_UID),
        has_data_set=announces_data_set(elements),
    )


def store_response(request: StoreRequest, status: int, error_comment: str = "") -> bytes:
    """The C-STORE-RSP to a request, as a command set."""
    elements = [
        (_AFFECTED_SOP_CLASS_UID, _padded(request.sop_class_uid, b"\0")),
        (_COMMAND_FIELD, _US.pack(C_STORE_RSP)),
        (_MESSAGE_ID_BEING_RESPONDED_TO, _US.pack(request.message_id)),
        (_COMMAND_DATA_SET_TYPE, _US.pack(NO_DATA_SET)),
        (_STATUS, _US.pack(status)),
        (_AFFECTED_SOP_INSTANCE_UID, _padded(request.sop_instance_uid, b"\0")),
    ]
    if error_comment:
        elements.insert(5, (_ERROR_COMMENT, _padded(error_comment, b" ")))
    body = b"".join(_ELEMENT.pack(0, element, len(value)) + value for element, value in elements)
    return _ELEMENT.pack(0, _GROUP_LENGTH, 4) + struct.pack("<L", len(body)) + body


def _number(elements: dict[int, bytes], element: int) -> int:
    value = elements.get(element, b"")
    if len(value) != _US.size:
        raise ValueError(f"element (0000,{element:04X}) must be one unsigned short and has {len(value)} bytes")
    return int.from_bytes(value, "little")


def _uid(elements: dict[int, bytes], element: int) -> str:
    return elements.get(element, b"").strip(b"\0 ").decode("ascii", "replace")


def _padded(text: str, padding: bytes) -> bytes:
    encoded = text.encode("ascii", "replace")
    return encoded + padding * (len(encoded) % 2)

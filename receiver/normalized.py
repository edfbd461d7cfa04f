"""What the DIMSE-N services of the receiver share: their statuses, reading a request's data set, and refusing it.

No value of a data set is logged but UIDs: these requests carry names.
"""

import logging
from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar, cast

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pynetdicom import evt

from herald.store import is_uid
from receiver.upper_layer import ReceivingAssociation

log = logging.getLogger(__name__)

T = TypeVar("T")


class NormalizedStatus(IntEnum):
    """The statuses of N-ACTION, N-CREATE and N-SET that the receiver uses (PS3.7 annex C)."""

    SUCCESS = 0x0000
    INVALID_ATTRIBUTE_VALUE = 0x0106
    PROCESSING_FAILURE = 0x0110
    DUPLICATE_SOP_INSTANCE = 0x0111
    NO_SUCH_SOP_INSTANCE = 0x0112
    INVALID_ARGUMENT_VALUE = 0x0115
    INVALID_SOP_INSTANCE = 0x0117
    NO_SUCH_SOP_CLASS = 0x0118
    CLASS_INSTANCE_CONFLICT = 0x0119
    MISSING_ATTRIBUTE = 0x0120
    MISSING_ATTRIBUTE_VALUE = 0x0121
    NO_SUCH_ACTION = 0x0123
    RESOURCE_LIMITATION = 0x0213


class Refused(Exception):
    """A request is not carried out: its status, the reason, and an ErrorID where the standard defines one."""

    def __init__(self, status: NormalizedStatus, reason: str, error_id: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.error_id = error_id


def answer(event: evt.Event, act: Callable[[evt.Event], Dataset | None]) -> tuple[int | Dataset, Dataset | None]:
    """Carry out a request by `act`; status and data set of the response, whatever happens."""
    try:
        return int(NormalizedStatus.SUCCESS), act(event)
    except Refused as refusal:
        reason = str(refusal)
        log.warning(
            "refused %s of %s with 0x%04X: %s",
            type(event.request).__name__.replace("_", "-"),
            cast(ReceivingAssociation, event.assoc).who,
            refusal.status,
            reason,
        )
        response = Dataset()
        response.Status = int(refusal.status)
        response.ErrorComment = reason[:64]
        if refusal.error_id is not None:
            response.ErrorID = refusal.error_id
        return response, None
    except Exception:  # whatever happens here, the sender gets a status and the association lives on
        log.exception("an error that nobody foresaw; please report it")
        return int(NormalizedStatus.PROCESSING_FAILURE), None


def decoded(read: Callable[[], T]) -> T:
    """What `read` makes of a request's data set; Refused when it cannot be decoded."""
    try:
        return read()
    except Refused:
        raise
    except Exception as error:  # a decoder fed with arbitrary bytes raises arbitrary errors, which may quote values
        raise Refused(
            NormalizedStatus.PROCESSING_FAILURE, f"the data set cannot be decoded ({type(error).__name__})"
        ) from error


def sequence(ds: Dataset, keyword: str, invalid: NormalizedStatus) -> list[Dataset]:
    """The items of a sequence; none when it is missing or empty. Refused with `invalid` when it is no sequence."""
    value = ds.get(keyword)
    if value is None:
        return []
    if not isinstance(value, Sequence):
        raise Refused(invalid, f"{keyword} is not a sequence")
    return list(value)


def required_sequence(ds: Dataset, keyword: str, invalid: NormalizedStatus) -> list[Dataset]:
    """The items of a sequence that must have some; Refused otherwise."""
    items = sequence(ds, keyword, invalid)
    if not items:
        raise _missing(ds, keyword)
    return items


def required_uid(ds: Dataset, keyword: str, invalid: NormalizedStatus) -> str:
    """A UID that must be there; Refused when it is missing or, with `invalid`, when it is none."""
    value = ds.get(keyword)
    if value is None or value == "":
        raise _missing(ds, keyword)
    if not is_uid(value):
        raise Refused(invalid, f"{keyword} is not a UID (PS3.5 9.1)")
    return str(value)


def _missing(ds: Dataset, keyword: str) -> Refused:
    if keyword in ds:
        return Refused(NormalizedStatus.MISSING_ATTRIBUTE_VALUE, f"{keyword} is empty")
    return Refused(NormalizedStatus.MISSING_ATTRIBUTE, f"{keyword} is missing")

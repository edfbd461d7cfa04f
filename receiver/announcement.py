"""What a series will hold, as modalities and archives announce it: MPPS and Instance Availability Notification.

A performed procedure step (PS3.4 annex F) that is COMPLETED lists the instances of each series; so does a notification
(annex R). Both only ever help a series to close early, so a request that can be used is used: the COMPLETED of a step
that nobody here knows any more, as after a restart, is answered with success although the standard has 0x0112 for it.
The scanner could not do anything about it, and would show its operator an error. Of these requests, which carry names,
nothing is kept or logged but UIDs.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import evt
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    InstanceAvailabilityNotification,
    ModalityPerformedProcedureStep,
)

from herald.store import is_uid
from receiver.normalized import (
    NormalizedStatus,
    Refused,
    answer,
    decoded,
    required_sequence,
    required_uid,
    sequence,
)

log = logging.getLogger(__name__)

ABSTRACT_SYNTAXES: Final[tuple[str, ...]] = (str(ModalityPerformedProcedureStep), str(InstanceAvailabilityNotification))
"""The SOP classes that `Announcements` serves."""

Series = dict[str, set[str]]
"""SOP Instance UIDs by Series Instance UID."""

_IN_PROGRESS, _COMPLETED, _DISCONTINUED = "IN PROGRESS", "COMPLETED", "DISCONTINUED"
_MAY_NO_LONGER_BE_UPDATED = 0xA710  # Error ID (PS3.4 table F.7.2-2)
_INVALID = NormalizedStatus.INVALID_ATTRIBUTE_VALUE


@dataclass
class _Known:
    """A procedure step or a notification that came."""

    sop_class_uid: str
    final: bool = False
    series: Series | None = None
    """What the step has listed so far; None while it has listed nothing, and again when it is final."""

    @property
    def size(self) -> int:
        return 1 + sum(len(uids) for uids in (self.series or {}).values())


class Announcements:
    """Handlers of evt.EVT_N_CREATE and evt.EVT_N_SET; `announce(series, instances)` is called in their threads."""

    MOST_KEPT = 100_000
    """UIDs that are kept in memory; beyond that the oldest step or notification is forgotten."""

    def __init__(self, announce: Callable[[str, Collection[str]], None]) -> None:
        self._announce = announce
        self._lock = threading.Lock()
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._kept = 0

    def created(self, event: evt.Event) -> tuple[int | Dataset, Dataset | None]:
        """Handler of evt.EVT_N_CREATE: a step begins, or instances are available."""
        return answer(event, self._create)

    def changed(self, event: evt.Event) -> tuple[int | Dataset, Dataset | None]:
        """Handler of evt.EVT_N_SET: a step goes on or ends."""
        return answer(event, self._set)

    def _create(self, event: evt.Event) -> Dataset | None:
        request: Any = event.request
        if request.AffectedSOPClassUID == ModalityPerformedProcedureStep:
            known, announced = decoded(lambda: _new_step(event.attribute_list)), None
        elif request.AffectedSOPClassUID == InstanceAvailabilityNotification:
            announced = decoded(lambda: _available(event.attribute_list))
            known = _Known(InstanceAvailabilityNotification, final=True)
        else:
            raise Refused(NormalizedStatus.NO_SUCH_SOP_CLASS, "only procedure steps and notifications are created here")
        uid = request.AffectedSOPInstanceUID
        if uid is not None and not is_uid(uid):
            raise Refused(NormalizedStatus.INVALID_SOP_INSTANCE, "the SOP Instance UID is not a UID (PS3.5 9.1)")
        attributes = None
        if uid is None:  # then the SCP assigns it (PS3.7 10.1.5.1.4)
            uid = generate_uid()
            attributes = Dataset()
            attributes.AffectedSOPInstanceUID = uid
        with self._lock:
            if uid in self._known:
                raise Refused(NormalizedStatus.DUPLICATE_SOP_INSTANCE, f"{uid} came before")
            self._keep(uid, known)
        self._tell(announced)
        return attributes

    def _set(self, event: evt.Event) -> None:
        request: Any = event.request
        if request.RequestedSOPClassUID != ModalityPerformedProcedureStep:
            raise Refused(NormalizedStatus.NO_SUCH_SOP_CLASS, "only procedure steps are changed here")
        uid = str(request.RequestedSOPInstanceUID)
        status, series = decoded(lambda: _change(event.modification_list))
        with self._lock:
            step = self._known.get(uid)
            if step is None:
                if status != _COMPLETED or not series:
                    raise Refused(NormalizedStatus.NO_SUCH_SOP_INSTANCE, f"{uid} is not known")
                step = _Known(ModalityPerformedProcedureStep)
            if step.sop_class_uid != ModalityPerformedProcedureStep:
                raise Refused(NormalizedStatus.CLASS_INSTANCE_CONFLICT, f"{uid} is not a procedure step")
            if step.final:
                raise Refused(
                    NormalizedStatus.PROCESSING_FAILURE,
                    "Performed Procedure Step Object may no longer be updated",
                    _MAY_NO_LONGER_BE_UPDATED,
                )
            listed = series if series is not None else step.series  # an N-SET replaces a sequence as a whole
            if status == _COMPLETED and not listed:
                raise Refused(
                    NormalizedStatus.MISSING_ATTRIBUTE if listed is None else NormalizedStatus.MISSING_ATTRIBUTE_VALUE,
                    "a COMPLETED step has a PerformedSeriesSequence",
                )
            final = status in (_COMPLETED, _DISCONTINUED)
            self._keep(uid, _Known(step.sop_class_uid, final, None if final else listed))
        if status == _COMPLETED:
            self._tell(listed)

    def _keep(self, uid: str, known: _Known) -> None:
        earlier = self._known.pop(uid, None)
        self._kept += known.size - (earlier.size if earlier is not None else 0)
        self._known[uid] = known
        while self._kept > self.MOST_KEPT:
            _, oldest = self._known.popitem(last=False)
            self._kept -= oldest.size

    def _tell(self, announced: Series | None) -> None:
        for series_instance_uid, sop_instance_uids in (announced or {}).items():
            if not sop_instance_uids:
                continue
            try:
                self._announce(series_instance_uid, frozenset(sop_instance_uids))
            except Exception:  # the announcement is a hint; the sender has done its part
                log.exception("the announcement of series %s is lost", series_instance_uid)


# --- data sets -------------------------------------------------------------------------------------------------------


def _new_step(attributes: Dataset) -> _Known:
    status = _status(attributes)
    if status is None:
        raise Refused(NormalizedStatus.MISSING_ATTRIBUTE, "PerformedProcedureStepStatus is missing")
    if status != _IN_PROGRESS:
        raise Refused(_INVALID, "a procedure step is created IN PROGRESS")
    return _Known(str(ModalityPerformedProcedureStep), series=_performed(attributes))


def _change(modifications: Dataset) -> tuple[str | None, Series | None]:
    return _status(modifications), _performed(modifications)


def _status(ds: Dataset) -> str | None:
    """PerformedProcedureStepStatus; None when it is missing, Refused when it is none of the three."""
    if "PerformedProcedureStepStatus" not in ds:
        return None
    value = ds.PerformedProcedureStepStatus
    if not value:
        raise Refused(NormalizedStatus.MISSING_ATTRIBUTE_VALUE, "PerformedProcedureStepStatus is empty")
    if value not in (_IN_PROGRESS, _COMPLETED, _DISCONTINUED):
        raise Refused(_INVALID, "PerformedProcedureStepStatus is none of the three (PS3.3 C.4.14)")
    return str(value)


def _performed(ds: Dataset) -> Series | None:
    """What a step lists, None when it has no such sequence (PS3.3 C.4.15)."""
    if "PerformedSeriesSequence" not in ds:
        return None
    series: Series = {}
    for item in sequence(ds, "PerformedSeriesSequence", _INVALID):
        uids = series.setdefault(required_uid(item, "SeriesInstanceUID", _INVALID), set())
        for keyword in ("ReferencedImageSequence", "ReferencedNonImageCompositeSOPInstanceSequence"):
            for reference in sequence(item, keyword, _INVALID):
                uids.add(required_uid(reference, "ReferencedSOPInstanceUID", _INVALID))
    return series


def _available(ds: Dataset) -> Series:
    """What a notification lists, but for what is not available (PS3.3 C.4.23)."""
    required_uid(ds, "StudyInstanceUID", _INVALID)
    series: Series = {}
    for item in required_sequence(ds, "ReferencedSeriesSequence", _INVALID):
        uids = series.setdefault(required_uid(item, "SeriesInstanceUID", _INVALID), set())
        for reference in required_sequence(item, "ReferencedSOPSequence", _INVALID):
            uid = required_uid(reference, "ReferencedSOPInstanceUID", _INVALID)
            if reference.get("InstanceAvailability") != "UNAVAILABLE":
                uids.add(uid)
    return series

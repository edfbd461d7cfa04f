"""Storage SCU: send DICOM files as they are, and say of each what became of it."""

import logging
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydicom.uid import UID, MediaStorageDirectoryStorage
from pynetdicom import AE, _config, evt
from pynetdicom.presentation import build_context

from herald.calling import CallingEntity, reached
from herald.errors import ConfigError, NotDicomError, StoreError
from herald.instance import read_header

log = logging.getLogger(__name__)

MOST_CONTEXTS = 128
"""Presentation context ids are the odd numbers from 1 to 255 (PS3.8 9.3.2.2)."""

_ADDRESS = re.compile(r"(?P<ae_title>[^@]{1,16})@(?P<host>\[[^\]]+\]|[^:@]+):(?P<port>\d{1,5})")


@dataclass(frozen=True)
class FileOutcome:
    """What became of one file: stored, or the reason in `error` and the C-STORE status if there was one."""

    path: Path
    series_instance_uid: str = ""
    sop_instance_uid: str = ""
    status: int | None = None
    error: str = ""

    @property
    def stored(self) -> bool:
        """The receiver answered success, or a warning after storing (PS3.4 B.2.3)."""
        return self.status is not None and (self.status == 0 or self.status & 0xF000 == 0xB000)


@dataclass(frozen=True)
class SendReport:
    """Outcomes in the order of the paths."""

    outcomes: tuple[FileOutcome, ...]

    @property
    def stored(self) -> tuple[FileOutcome, ...]:
        """What the receiver has."""
        return tuple(outcome for outcome in self.outcomes if outcome.stored)

    @property
    def failed(self) -> tuple[FileOutcome, ...]:
        """What it does not have, each with the reason."""
        return tuple(outcome for outcome in self.outcomes if not outcome.stored)


@dataclass(frozen=True)
class _Item:
    """One file that can be sent, with the presentation context it needs."""

    index: int
    path: Path
    context: tuple[str, str]
    outcome: FileOutcome


def send(
    paths: Iterable[Path],
    to: str,
    calling_ae_title: str = "HERALD-SCU",
    on_progress: Callable[[int, int], None] | None = None,
    timeout_s: float = 60.0,
) -> SendReport:
    """Send files to `to`, written AE_TITLE@HOST:PORT; `on_progress` is told (files done, files in all).

    A file that is not DICOM is skipped with the reason in its outcome, a refused one carries its status, and nothing is
    tried twice. Raises ConfigError when `to` or the calling AE title cannot be used.
    """
    files = list(paths)
    ae = _application_entity(calling_ae_title, timeout_s)
    called = _ADDRESS.fullmatch(to)
    if called is None or int(called["port"]) > 65535:
        raise ConfigError(f"{to!r} is no address of a storage SCP; write AE_TITLE@HOST:PORT")
    outcomes: list[FileOutcome | None] = [None] * len(files)
    done = 0

    def settle(index: int, outcome: FileOutcome) -> None:
        nonlocal done
        outcomes[index] = outcome
        done += 1
        if on_progress is not None:
            on_progress(done, len(files))

    items = []
    for index, path in enumerate(files):
        item = _examined(index, path)
        if isinstance(item, _Item):
            items.append(item)
        else:
            settle(index, item)
    for group in _by_contexts(items):
        _send_group(ae, called, group, settle)
    return SendReport(tuple(outcome for outcome in outcomes if outcome is not None))


def _application_entity(calling_ae_title: str, timeout_s: float) -> AE:
    _config.STORE_SEND_CHUNKED_DATASET = True  # the bytes of the file as they are, in its own transfer syntax
    try:
        ae = CallingEntity(ae_title=calling_ae_title)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the calling AE title {calling_ae_title!r} cannot be used: {error}") from error
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_s
    ae.connection_timeout = min(timeout_s, 10.0)
    ae.maximum_pdu_size = 131072
    return ae


def _examined(index: int, path: Path) -> _Item | FileOutcome:
    try:
        header = read_header(path)
    except (NotDicomError, StoreError) as error:
        return FileOutcome(path, error=f"skipped: {error}")
    if header.sop_class_uid == MediaStorageDirectoryStorage:
        return FileOutcome(path, error="skipped: a DICOMDIR is the index of a medium, not an instance")
    if not header.sop_class_uid or not header.sop_instance_uid:
        return FileOutcome(path, header.series_instance_uid, error="skipped: no SOPClassUID or no SOPInstanceUID")
    outcome = FileOutcome(path, header.series_instance_uid, header.sop_instance_uid)
    return _Item(index, path, (header.sop_class_uid, header.transfer_syntax_uid), outcome)


def _by_contexts(items: Sequence[_Item]) -> Iterator[list[_Item]]:
    """Groups of at most 128 different presentation contexts, in order."""
    group: list[_Item] = []
    contexts: set[tuple[str, str]] = set()
    for item in items:
        if item.context not in contexts and len(contexts) == MOST_CONTEXTS:
            yield group
            group, contexts = [], set()
        contexts.add(item.context)
        group.append(item)
    if group:
        yield group


def _send_group(ae: AE, called: re.Match[str], group: list[_Item], settle: Callable[[int, FileOutcome], None]) -> None:
    """One association for files whose contexts fit into it."""
    needed = dict.fromkeys(item.context for item in group)
    where = called[0]
    assoc = ae.associate(
        called["host"].strip("[]"),
        int(called["port"]),
        contexts=[build_context(sop_class_uid, syntax) for sop_class_uid, syntax in needed],
        ae_title=called["ae_title"],
        evt_handlers=[(evt.EVT_CONN_OPEN, _without_delay)],
    )
    try:
        for number, item in enumerate(group):
            if assoc.is_established:
                outcome = _sent(assoc, item, number % 65535 + 1, where)
            else:
                outcome = replace(item.outcome, error=f"not sent: {_why_not(assoc, item, where)}")
            settle(item.index, outcome)
    finally:
        if assoc.is_established:
            assoc.release()


def _without_delay(event: evt.Event) -> None:
    connection = event.assoc.dul.socket
    if connection is not None and connection.socket is not None:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _sent(assoc: Any, item: _Item, message_id: int, where: str) -> FileOutcome:
    sop_class_uid, transfer_syntax_uid = item.context
    accepted = any(
        context.abstract_syntax == sop_class_uid and context.transfer_syntax == [transfer_syntax_uid]
        for context in assoc.accepted_contexts
    )
    if not accepted:
        return replace(item.outcome, error=f"not sent: {_not_accepted(item, where)}")
    try:
        response = assoc.send_c_store(item.path, msg_id=message_id)
    except (OSError, ValueError, RuntimeError, AttributeError) as error:
        return replace(item.outcome, error=f"not sent: {type(error).__name__}: {error}")
    status = getattr(response, "Status", None)
    if status is None:
        return replace(item.outcome, error=f"no answer: the association with {where} broke; send it again")
    outcome = replace(item.outcome, status=int(status))
    if outcome.stored:
        return outcome
    comment = str(getattr(response, "ErrorComment", "")) or "the receiver's log says why"
    return replace(outcome, error=f"refused with 0x{status:04X}: {comment}")


def _why_not(assoc: Any, item: _Item, where: str) -> str:
    if not reached(assoc):
        return f"{where} cannot be reached; check host and port, and that it runs"
    if assoc.is_rejected:
        answer = assoc.acceptor.primitive
        reason = answer.reason_str if answer is not None else "no reason given"
        return f"{where} refused the association ({reason}); check the AE titles and who may connect there"
    if assoc.rejected_contexts and not assoc.accepted_contexts:  # then pynetdicom aborts by itself
        return _not_accepted(item, where)
    return f"the association with {where} was aborted; its log says why"


def _not_accepted(item: _Item, where: str) -> str:
    sop_class_uid, transfer_syntax_uid = item.context
    return f"{where} does not accept {UID(sop_class_uid).name} in {UID(transfer_syntax_uid).name}"

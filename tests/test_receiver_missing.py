"""A series of which something is known to be missing waits for its sender, says so, and is never a plain negative."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydicom.dataset import Dataset
from receiver_fakes import Receiver, association, config_under, ct_series, receiving, send_all
from receiver_faults import ABORTED, RawSender, store_pdus
from router_fakes import FixedModels, received

from herald.config import RouterConfig
from herald.errors import StoreFullError
from herald.events import SeriesReceived, event_from_json
from herald.instance import InstanceHeader, Plane
from receiver.assembly import ANNOUNCED_AND_COMPLETE, QUIET, RELEASED_AND_EVEN, Assembly, Closed
from receiver.settle import Settling
from receiver.statuses import StoreStatus
from router.triage import triage_series

KEY = ("1.2.3", "1.2.3.4")
OTHER = ("1.2.3", "1.2.3.5")
ONE_MISSING = ("1 instance was announced or sent and is not there",)
BROKEN = ("the connection of its sender broke before a release",)


def header(key: tuple[str, str], number: int) -> InstanceHeader:
    plane = Plane((0.0, 0.0, 5.0 * number), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    return InstanceHeader("1.2", uid(key, number), *key, "1.2.840.10008.1.2.1", "A", "CT", "CT-EAST", True, plane)


def uid(key: tuple[str, str], number: int) -> str:
    return f"{key[1]}.{number}"


def assembly() -> Assembly:
    return Assembly(Settling(first_s=0.5, min_s=0.5, max_s=5.0), quiet_s=10.0, min_even_slices=4)


def send(a: Assembly, *numbers: int, now: float, key: tuple[str, str] = KEY, over: int = 1) -> None:
    for number in numbers:
        a.image(key, header(key, number), over, "CT1", now)


def told(closed: list[Closed]) -> list[tuple[tuple[str, str], str, tuple[str, ...]]]:
    return [(one.key, one.reason, one.missing) for one in closed]


# --- state machine ---


def test_an_even_series_of_which_an_instance_was_not_stored_waits_until_it_is_quiet_and_says_so() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    a.not_stored(uid(KEY, 8), KEY, 1)
    a.association_ended(1, now=1.0)
    assert a.due(9.9) == []
    assert told(a.due(10.0)) == [(KEY, QUIET, ONE_MISSING)]


def test_an_instance_whose_series_nobody_can_tell_belongs_to_the_one_that_was_sent_last() -> None:
    a = assembly()
    send(a, *range(8), now=0.0, key=OTHER)
    send(a, *range(8), now=0.0)
    a.not_stored(uid(KEY, 8), None, 1)
    a.association_ended(1, now=1.0)
    assert told(a.due(10.0)) == [(OTHER, RELEASED_AND_EVEN, ()), (KEY, QUIET, ONE_MISSING)]


def test_an_instance_that_was_not_stored_and_comes_later_is_missing_no_more() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    a.not_stored(uid(KEY, 8), KEY, 1)
    a.association_ended(1, now=1.0)
    send(a, 8, now=1.1, over=2)
    a.association_ended(2, now=1.1)
    assert told(a.due(1.6)) == [(KEY, RELEASED_AND_EVEN, ())]


def test_what_was_not_stored_before_its_series_began_or_after_it_was_closed_is_remembered() -> None:
    a = assembly()
    a.not_stored(uid(KEY, 8), KEY, 1)
    send(a, *range(7), now=0.0)
    a.association_ended(1, now=0.0)
    assert told(a.due(10.0)) == [(KEY, QUIET, ONE_MISSING)]
    send(a, *range(8), now=20.0, over=2)
    a.association_ended(2, now=20.0)
    assert told(a.due(30.0)) == [(KEY, QUIET, ONE_MISSING)]
    send(a, *range(9), now=40.0, over=3)
    a.association_ended(3, now=40.0)
    assert told(a.due(40.5)) == [(KEY, RELEASED_AND_EVEN, ())], "nobody announced it, so that it rests as ever"


def test_an_instance_that_is_there_and_is_refused_when_it_comes_again_is_not_missing() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    a.not_stored(uid(KEY, 3), KEY, 1)
    a.association_ended(1, now=0.0)
    assert told(a.due(0.5)) == [(KEY, RELEASED_AND_EVEN, ())]


def test_announced_instances_that_did_not_come_are_counted_when_the_series_closes() -> None:
    a = assembly()
    a.announce(KEY[1], [uid(KEY, number) for number in range(36)])
    send(a, *range(20), now=0.0)
    a.association_ended(1, now=0.0)
    assert told(a.due(10.0)) == [(KEY, QUIET, ("16 instances were announced or sent and are not there",))]


def test_series_whose_connection_broke_wait_and_the_one_that_was_being_sent_says_so() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    send(a, *range(8), now=0.0, key=OTHER)
    a.association_ended(1, now=1.0, broken=True)
    assert a.due(9.9) == []
    assert told(a.due(10.0)) == [(KEY, QUIET, ()), (OTHER, QUIET, BROKEN)]


def test_a_connection_that_breaks_within_the_first_image_of_a_series_leaves_the_series_before_it_unmarked() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    a.not_stored(uid(OTHER, 0), OTHER, 1)
    a.association_ended(1, now=1.0, broken=True)
    assert told(a.due(10.0)) == [(KEY, QUIET, ())]


def test_a_sender_that_comes_back_after_its_connection_broke_closes_the_series_at_its_release() -> None:
    a = assembly()
    send(a, *range(8), now=0.0)
    a.association_ended(1, now=1.0, broken=True)
    send(a, 8, now=1.1, over=2)
    a.association_ended(2, now=1.1)
    assert told(a.due(1.6)) == [(KEY, RELEASED_AND_EVEN, ())]


def test_the_release_of_another_association_makes_up_for_none_that_broke() -> None:
    a = assembly()
    send(a, *range(0, 8, 2), now=0.0)
    send(a, *range(1, 8, 2), now=0.0, over=2)
    a.association_ended(1, now=0.1, broken=True)
    send(a, 8, now=0.2, over=2)
    a.association_ended(2, now=0.2)
    assert told(a.due(10.2)) == [(KEY, QUIET, BROKEN)]


def test_the_ledger_is_told_of_what_is_missing_once_and_not_at_every_release() -> None:
    a = assembly()
    a.announce(KEY[1], [uid(KEY, number) for number in range(3)])
    send(a, 0, now=0.0)
    assert a.association_ended(1, now=0.0) == [KEY]
    assert a.more_missing(KEY) == [uid(KEY, 1), uid(KEY, 2)]
    send(a, 1, now=0.1, over=2)
    assert a.association_ended(2, now=0.1) == [KEY]
    assert a.more_missing(KEY) == []


def test_a_resumed_series_still_misses_what_the_store_does_not_hold() -> None:
    a = assembly()
    a.resume(KEY, 0.0, [uid(KEY, 7), uid(KEY, 8)])
    a.earlier(KEY, [header(KEY, number) for number in range(8)])
    assert told(a.due(10.0)) == [(KEY, QUIET, ONE_MISSING)]


# --- real associations ---


def triaged(receiver: Receiver, event: SeriesReceived) -> Any:
    models: Any = FixedModels(bleeds=False)
    return triage_series(event, receiver.store, models, RouterConfig())


def begin_and_abort(sender: RawSender, image: Dataset) -> None:
    sender.send(*store_pdus(image, fragment=500)[:-1], ABORTED)


def begin_and_break(sender: RawSender, image: Dataset) -> None:
    sender.send(*store_pdus(image, fragment=500)[:-1])
    sender.socket.close()


def begin_nothing_and_break(sender: RawSender, image: Dataset) -> None:
    sender.socket.close()


@pytest.mark.parametrize(
    ("end", "missing"),
    [
        (begin_and_abort, ONE_MISSING),
        (begin_and_break, ONE_MISSING + BROKEN),
        (begin_nothing_and_break, BROKEN),
    ],
)
def test_half_a_head_whose_sender_broke_off_is_uncertain_and_says_why(
    tmp_path: Path, end: Any, missing: tuple[str, ...]
) -> None:
    images = ct_series(24)
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        with RawSender(receiver.port) as sender:
            sender.associate()
            assert [sender.store(image) for image in images[:12]] == [0] * 12
            end(sender, images[12])
        (event,) = receiver.bus.wait_for(1)
        result = triaged(receiver, event)
    assert (event.close_reason, event.instance_count, event.missing) == (QUIET, 12, missing)
    assert event_from_json(event.to_json()) == event
    assert (result.disposition, result.uncertain) == ("negative", True)
    assert result.reasons == tuple(f"incomplete: {what}" for what in missing)


def test_a_head_that_is_sent_again_after_its_sender_broke_off_is_whole(tmp_path: Path) -> None:
    images = ct_series(24)
    with receiving(config_under(tmp_path)) as receiver:
        with RawSender(receiver.port) as sender:
            sender.associate()
            assert [sender.store(image) for image in images[:12]] == [0] * 12
            begin_and_break(sender, images[12])
        assert send_all(receiver.port, images) == [0] * 24
        (event,) = receiver.bus.wait_for(1)
        result = triaged(receiver, event)
    assert (event.close_reason, event.instance_count, event.missing) == (RELEASED_AND_EVEN, 24, ())
    assert (result.disposition, result.uncertain, result.reasons) == ("negative", False, ())


def full_from(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> None:
    def refuse() -> None:
        raise StoreFullError("the disk is at its watermark")

    monkeypatch.setattr(receiver.store, "require_space", refuse)


def test_images_refused_for_want_of_space_are_missing_until_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ct_series(24)
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        with association(receiver.port) as assoc:
            assert [assoc.send_c_store(image).Status for image in images[:20]] == [0] * 20
            full_from(monkeypatch, receiver)
            refused = [assoc.send_c_store(image).Status for image in images[20:]]
            assert refused == [StoreStatus.OUT_OF_RESOURCES] * 4
        (event,) = receiver.bus.wait_for(1)
        monkeypatch.undo()
        assert triaged(receiver, event).uncertain
        assert send_all(receiver.port, images[20:]) == [0] * 4
        _, whole = receiver.bus.wait_for(2)
    assert (event.close_reason, event.missing) == (QUIET, ("4 instances were announced or sent and are not there",))
    assert (whole.revision, whole.instance_count, whole.missing) == (2, 24, ())


def test_less_than_was_announced_is_uncertain_and_all_of_it_is_not(tmp_path: Path) -> None:
    images = ct_series(36)
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        receiver.assembler.announce(images[0].SeriesInstanceUID, [image.SOPInstanceUID for image in images])
        send_all(receiver.port, images[:20])
        (half,) = receiver.bus.wait_for(1)
        result = triaged(receiver, half)
        send_all(receiver.port, images[20:])
        _, whole = receiver.bus.wait_for(2)
    assert (half.close_reason, half.instance_count) == (QUIET, 20)
    assert result.uncertain
    assert result.reasons == ("incomplete: 16 instances were announced or sent and are not there",)
    assert (whole.close_reason, whole.instance_count, whole.missing) == (ANNOUNCED_AND_COMPLETE, 36, ())


@pytest.mark.parametrize("comes", [False, True])
def test_what_is_missing_of_an_open_series_is_known_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    images = ct_series(12)
    with receiving(config_under(tmp_path)) as receiver:
        with association(receiver.port) as assoc:
            assert [assoc.send_c_store(image).Status for image in images[:10]] == [0] * 10
            full_from(monkeypatch, receiver)
            assert assoc.send_c_store(images[10]).Status == StoreStatus.OUT_OF_RESOURCES
        monkeypatch.undo()
        receiver.assembler.announce(images[0].SeriesInstanceUID, [image.SOPInstanceUID for image in images])
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        if comes:
            send_all(receiver.port, images[10:])
        (event,) = receiver.bus.wait_for(1)
    if comes:
        assert (event.close_reason, event.instance_count, event.missing) == (RELEASED_AND_EVEN, 12, ())
    else:
        assert event.missing == ("2 instances were announced or sent and are not there",)


def test_what_was_missing_of_a_closed_series_is_published_by_the_next_process(tmp_path: Path) -> None:
    images = ct_series(10)
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        receiver.bus.down = True
        receiver.assembler.announce(images[0].SeriesInstanceUID, [image.SOPInstanceUID for image in images])
        send_all(receiver.port, images[:9])
        receiver.bus.wait_refused()
    with receiving(config_under(tmp_path)) as receiver:
        (event,) = receiver.bus.wait_for(1)
    assert (event.close_reason, event.missing) == (QUIET, ONE_MISSING)


def test_an_event_of_an_earlier_version_misses_nothing() -> None:
    event = received(missing=ONE_MISSING)
    body = json.loads(event.to_json())
    assert body.pop("missing") == list(ONE_MISSING)
    assert event_from_json(json.dumps(body).encode()) == replace(event, missing=())

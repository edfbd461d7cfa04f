"""When a series counts as complete: the geometry, the state machine, and the thread that publishes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import DATA, needs_real_data
from receiver_fakes import ListBus, config_under, ct_series, ct_slice, receiving, send_all

from herald.errors import StoreError
from herald.instance import InstanceHeader, Plane, read_header
from receiver.assembly import QUIET, RELEASED_AND_EVEN, RELEASED_AND_NOT_A_STACK, Assembly, Closed
from receiver.geometry import is_even
from receiver.settle import Settling

KEY = ("1.2.3", "1.2.3.4")


def planes(positions: list[float], tilt: bool = False) -> list[Plane | None]:
    orientation = (1.0, 0.0, 0.0, 0.0, 0.95, -0.31) if tilt else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    return [Plane((-100.0, -120.0, z), orientation) for z in positions]


def header(z: float | None, uid: str, stacked: bool = True) -> InstanceHeader:
    plane = None if z is None else planes([z])[0]
    return InstanceHeader("1.2", uid, *KEY, "1.2.840.10008.1.2.1", "A", "CT", "CT-EAST", stacked, plane)


# --- geometry ---


def test_even_slices_are_even_in_any_order() -> None:
    assert is_even(planes([20, 0, 10, 5, 15, 30, 25, 35]), 8)


def test_fewer_slices_than_asked_are_not_even() -> None:
    assert not is_even(planes([0, 5, 10, 15, 20, 25, 30]), 8)


def test_a_missing_slice_is_a_gap() -> None:
    assert not is_even(planes([0, 5, 10, 15, 25, 30, 35, 40, 45]), 8)


def test_two_spacings_end_to_end_are_even() -> None:
    assert is_even(planes([0, 4, 8, 12, 16, 17.1, 24.1, 31.1, 38.1, 45.1]), 8)


def test_two_spacings_with_a_gap_between_them_are_not_even() -> None:
    assert not is_even(planes([0, 4, 8, 12, 16, 30, 37, 44, 51, 58]), 8)


def test_a_tilted_stack_is_even() -> None:
    assert is_even(planes([float(z) for z in range(0, 50, 5)], tilt=True), 8)


def test_a_slice_without_position_is_not_even() -> None:
    assert not is_even([*planes([float(z) for z in range(0, 50, 5)]), None], 8)


def test_a_second_pass_that_is_half_sent_is_not_even() -> None:
    stack = [float(z) for z in range(0, 50, 5)]
    assert not is_even(planes(stack + stack[:4]), 8)
    assert is_even(planes(stack + stack), 8)


def test_a_scout_within_the_series_does_not_disturb() -> None:
    scout = Plane((0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    assert is_even([scout, *planes([float(z) for z in range(0, 50, 5)])], 8)


def tilted(positions: list[float], degrees: float) -> list[Plane | None]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [Plane((-100.0, -120.0 + z * sine, z * cosine), (1.0, 0.0, 0.0, 0.0, cosine, -sine)) for z in positions]


def test_two_stacks_of_different_tilt_are_even_when_each_of_them_is() -> None:
    lower, upper = tilted([5.0 * i for i in range(12)], 20), tilted([60 + 5.0 * i for i in range(10)], 0)
    assert is_even([*lower, *upper], 8)
    assert not is_even([*lower, *upper[:4], *upper[5:]], 8), "a gap in the smaller stack"
    assert not is_even([*lower[:4], *lower[5:], *upper], 8), "a gap in the larger stack"
    assert not is_even([*lower[:6], *upper[:6]], 8), "neither has enough"


def test_more_images_of_other_orientations_than_scouts_are_not_ignored() -> None:
    axial = planes([5.0 * i for i in range(12)])
    scouts = [Plane((0.0, 0.0, 0.0), (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)), *tilted([0.0], 90)]
    assert is_even([*scouts, *axial], 8)
    assert not is_even([*scouts, *tilted([0.0], 45), *axial], 8)


def test_every_image_of_another_orientation_is_not_even_and_soon_judged() -> None:
    assert not is_even([plane for i in range(180) for plane in tilted([0.0], float(i))], 8)


def test_a_position_that_occurs_twice_is_not_even() -> None:
    stack = [5.0 * i for i in range(12)]
    for twice in stack:
        assert not is_even(planes([*stack, twice]), 8)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even() -> None:
    assert is_even(planes([round(0.625 * i, 1) for i in range(200)]), 8)


def test_a_step_beyond_the_wider_spacing_between_two_stacks_is_a_gap() -> None:
    lower = [4.2 * i for i in range(8)]
    assert is_even(planes(lower + [lower[-1] + 7.4 * (i + 1) for i in range(8)]), 8)
    assert not is_even(planes(lower + [lower[-1] + 1.1 + 7.4 * (i + 1) for i in range(8)]), 8)


@given(
    counts=st.tuples(st.integers(4, 30), st.integers(4, 30)),
    spacings=st.tuples(st.floats(0.5, 4), st.floats(5, 12)),
    joint=st.floats(0.05, 0.85),  # a joint as long as a wide step would be the wide stack's first
    degrees=st.floats(-30, 30),
    data=st.data(),
)
def test_two_spacings_end_to_end_are_even_and_with_a_slice_missing_within_one_of_them_they_are_not(
    counts: tuple[int, int], spacings: tuple[float, float], joint: float, degrees: float, data: st.DataObject
) -> None:
    positions = [spacings[0] * i for i in range(counts[0])]
    positions += [positions[-1] + joint * spacings[1] + spacings[1] * i for i in range(counts[1])]
    assert is_even(tilted(data.draw(st.permutations(positions)), degrees), 4)
    inner = [i for i in range(1, len(positions) - 1) if i not in (counts[0] - 1, counts[0])]
    missing = data.draw(st.sampled_from(inner))
    assert not is_even(tilted(positions[:missing] + positions[missing + 1 :], degrees), 4)


@given(
    count=st.integers(9, 60),
    spacing=st.floats(0.3, 10),
    start=st.floats(-1000, 1000),
    data=st.data(),
)
def test_any_even_stack_is_even_and_with_any_inner_slice_missing_it_is_not(
    count: int, spacing: float, start: float, data: st.DataObject
) -> None:
    positions = [start + i * spacing for i in range(count)]
    missing = data.draw(st.integers(1, count - 2))
    assert is_even(planes(data.draw(st.permutations(positions))), 8)
    if 4 <= missing <= count - 5:  # nearer to an end the rest is one stack and a stray slice: also not even
        assert not is_even(planes(positions[:missing] + positions[missing + 1 :]), 4)
    assert not is_even(planes(positions[:missing] + positions[missing + 1 :]), 4)


@needs_real_data
@pytest.mark.parametrize(
    ("folder", "joints"),
    [("ge-head", {13}), ("lidc-body", set()), ("philips-phantom/soft-5mm", set()), ("philips-phantom/bone-1mm", set())],
)
def test_real_series_are_even_and_without_any_inner_slice_they_are_not(folder: str, joints: set[int]) -> None:
    headers = [read_header(path) for path in sorted((DATA / folder).glob("*"))]
    assert all(h.stacked for h in headers)
    stack = sorted((h.plane for h in headers if h.plane is not None), key=lambda plane: plane.position[2])
    assert is_even(stack, 8)
    inner = range(1, len(stack) - 1)
    # the step over the last slice of the narrow stack is no longer than one of the wide stack
    assert {i for i in inner if is_even(stack[:i] + stack[i + 1 :], 8)} == joints


# --- state machine ---


def assembly() -> Assembly:
    return Assembly(Settling(first_s=0.5, min_s=0.2, max_s=5.0), quiet_s=10.0, min_even_slices=4)


def closed(due: list[Closed]) -> list[tuple[tuple[str, str], str]]:
    return [(series.key, series.reason) for series in due]


def test_an_even_series_closes_after_the_settle_time_once_released() -> None:
    a = assembly()
    for i in range(4):
        a.image(KEY, header(5.0 * i, f"1.{i}"), 1, "CT1", now=float(i) / 10)
    a.association_ended(1, now=1.0)
    assert a.deadline() == 1.5
    assert a.due(1.49) == []
    assert closed(a.due(1.5)) == [(KEY, RELEASED_AND_EVEN)]
    assert len(a) == 0
    assert a.deadline() is None


def test_a_series_waits_while_another_association_sends_it() -> None:
    a = assembly()
    for i in range(4):
        a.image(KEY, header(5.0 * i, f"1.{i}"), i % 2, "CT1", now=0.0)
    a.association_ended(0, now=0.1)
    assert a.due(5.0) == []
    a.association_ended(1, now=5.0)
    assert closed(a.due(5.5)) == [(KEY, RELEASED_AND_EVEN)]


def test_two_slices_wait_for_the_quiet_period() -> None:
    a = assembly()
    a.image(KEY, header(0.0, "1.1"), 1, "CT1", now=0.0)
    a.image(KEY, header(5.0, "1.2"), 1, "CT1", now=0.0)
    a.association_ended(1, now=0.1)
    assert a.due(9.9) == []
    assert closed(a.due(10.0)) == [(KEY, QUIET)]


def test_a_report_closes_once_released_because_there_is_nothing_to_wait_for() -> None:
    a = assembly()
    a.image(KEY, header(None, "1.1", stacked=False), 1, "CT1", now=0.0)
    a.association_ended(1, now=0.1)
    assert closed(a.due(0.6)) == [(KEY, RELEASED_AND_NOT_A_STACK)]


def test_an_association_that_stays_open_does_not_hold_a_series_for_ever() -> None:
    a = assembly()
    a.image(KEY, header(0.0, "1.1"), 1, "CT1", now=0.0)
    assert closed(a.due(10.0)) == [(KEY, QUIET)]


def test_known_bytes_open_nothing_but_prolong_an_open_series() -> None:
    a = assembly()
    assert not a.image(KEY, header(0.0, "1.1"), 1, "CT1", now=0.0, new=False)
    assert KEY not in a
    assert a.image(KEY, header(0.0, "1.1"), 1, "CT1", now=0.0)
    assert not a.image(KEY, header(0.0, "1.1"), 1, "CT1", now=6.0, new=False)
    assert a.due(15.9) == []
    assert closed(a.due(16.0)) == [(KEY, QUIET)]


def test_a_resumed_series_waits_for_its_sender_and_is_judged_with_its_earlier_slices() -> None:
    a = assembly()
    a.resume(KEY, now=0.0)
    a.earlier(KEY, [header(5.0 * i, f"1.{i}") for i in range(4)])
    assert a.deadline() == 10.0, "even, but its sender was cut off"
    a.image(KEY, header(20.0, "1.4"), 1, "CT1", now=3.0)
    a.association_ended(1, now=3.1)
    assert closed(a.due(3.6)) == [(KEY, RELEASED_AND_EVEN)]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("image"), st.integers(0, 2), st.integers(0, 3), st.integers(0, 9)),
            st.tuples(st.just("ended"), st.integers(0, 2), st.just(0), st.just(0)),
        ),
        max_size=60,
    ),
    st.lists(st.floats(0, 3), min_size=60, max_size=60),
)
def test_whatever_happens_every_image_is_in_a_series_that_closes_once_per_opening(
    happenings: list[tuple[str, int, int, int]], pauses: list[float]
) -> None:
    a = assembly()
    now, opened, closed = 0.0, 0, 0
    for (what, association, of_series, z), pause in zip(happenings, pauses, strict=False):
        now += pause
        closed += len(a.due(now))
        if what == "image":
            key = ("1", f"1.{of_series}")
            slice_header = replace(header(5.0 * z, f"{of_series}.{z}"), series_instance_uid=key[1])
            opened += a.image(key, slice_header, association, "CT1", now)
            assert key in a
        else:
            a.association_ended(association, now)
        deadline = a.deadline()
        assert deadline is None or now - 1e-9 <= deadline <= now + 10.0
    closed += len(a.due(now + 10.0))
    assert closed == opened
    assert len(a) == 0


# --- thread, with a real association ---


def test_an_even_series_is_published_with_what_the_router_needs(tmp_path: Path) -> None:
    images = ct_series(10)
    with receiving(config_under(tmp_path)) as receiver:
        assert send_all(receiver.port, images) == [0] * 10
        (event,) = receiver.bus.wait_for(1)
    assert event.close_reason == RELEASED_AND_EVEN
    assert (event.revision, event.instance_count) == (1, 10)
    assert (event.accession_number, event.modality, event.scanner) == ("A-1", "CT", "CT-EAST")
    assert event.calling_ae_title == "CT1"
    assert event.first_image_at < event.last_image_at <= event.occurred_at
    assert b"Never" not in event.to_json()
    assert b"SECRET" not in event.to_json()


def test_the_scanner_is_the_calling_ae_title_where_the_header_names_no_station(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, ct_series(8, StationName=None))
        (event,) = receiver.bus.wait_for(1)
    assert event.scanner == "CT1"


def test_a_late_slice_makes_the_next_revision_of_the_whole_series(tmp_path: Path) -> None:
    images = ct_series(12)
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, images[:11])
        receiver.bus.wait_for(1)
        send_all(receiver.port, images[11:])
        first, second = receiver.bus.wait_for(2)
    assert (first.revision, first.instance_count) == (1, 11)
    assert (second.revision, second.instance_count) == (2, 12)
    assert second.close_reason == RELEASED_AND_EVEN, "judged with the slices of revision 1"
    assert second.event_id != first.event_id
    assert second.first_image_at > first.occurred_at


def test_sending_the_same_series_again_publishes_nothing_new(tmp_path: Path) -> None:
    images, other = ct_series(8), ct_series(8)
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, images)
        receiver.bus.wait_for(1)
        send_all(receiver.port, images)
        send_all(receiver.port, other)
        events = receiver.bus.wait_for(2)
    assert [event.series_instance_uid for event in events] == [
        images[0].SeriesInstanceUID,
        other[0].SeriesInstanceUID,
    ]


def test_a_localizer_closes_without_the_quiet_period(tmp_path: Path) -> None:
    image = ct_slice("1.2.3", "1.2.3.9", 0.0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, [image])
        (event,) = receiver.bus.wait_for(1)
    assert event.close_reason == RELEASED_AND_NOT_A_STACK


def test_two_slices_close_after_the_quiet_period(tmp_path: Path) -> None:
    with receiving(config_under(tmp_path, quiet_s=1.0)) as receiver:
        send_all(receiver.port, ct_series(2))
        (event,) = receiver.bus.wait_for(1)
    assert (event.close_reason, event.instance_count) == (QUIET, 2)


def test_a_bus_that_is_down_delays_publication_and_not_reception(tmp_path: Path) -> None:
    bus = ListBus()
    bus.down = True
    with receiving(config_under(tmp_path), bus) as receiver:
        send_all(receiver.port, ct_series(8))
        bus.wait_refused()
        assert send_all(receiver.port, ct_series(8)) == [0] * 8
        bus.down = False
        assert len(bus.wait_for(2)) == 2


def test_what_was_closed_and_not_published_is_published_by_the_next_process(tmp_path: Path) -> None:
    config, bus = config_under(tmp_path), ListBus()
    bus.down = True
    with receiving(config, bus) as receiver:
        send_all(receiver.port, ct_series(8))
        bus.wait_refused()
    with receiving(config) as receiver:
        (event,) = receiver.bus.wait_for(1)
        assert (event.revision, event.close_reason) == (1, RELEASED_AND_EVEN)
    with receiving(config) as receiver:
        send_all(receiver.port, [ct_slice("1.2", "1.2.9", 0.0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])])
        assert [event.series_instance_uid for event in receiver.bus.wait_for(1)] == ["1.2.9"], "published only once"


def test_a_series_that_was_open_is_taken_up_by_the_next_process(tmp_path: Path) -> None:
    images = ct_series(16)
    config = config_under(tmp_path, settle_s=60.0)
    with receiving(config) as receiver:
        send_all(receiver.port, images[:15])
        assert receiver.bus.events == []
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, images[15:])
        (event,) = receiver.bus.wait_for(1)
    assert (event.revision, event.instance_count, event.close_reason) == (1, 16, RELEASED_AND_EVEN)


def test_a_store_that_cannot_be_read_at_the_start_holds_back_nothing_that_the_ledger_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed, still_open, bus = ct_series(8), ct_series(16), ListBus()
    bus.down = True
    with receiving(config_under(tmp_path), bus) as receiver:
        send_all(receiver.port, closed)
        bus.wait_refused()
    with receiving(config_under(tmp_path, settle_s=60.0), bus) as receiver:
        send_all(receiver.port, still_open[:15])

    def broken(*_: object) -> int:
        raise StoreError("cannot read the store: Input/output error")

    monkeypatch.setattr("receiver.assembly.restore_index", broken)
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, still_open[15:])
        events = receiver.bus.wait_for(2)
    assert {(event.series_instance_uid, event.instance_count) for event in events} == {
        (closed[0].SeriesInstanceUID, 8),
        (still_open[0].SeriesInstanceUID, 16),
    }
    assert "Input/output error; run `herald reconcile --rebuild`" in caplog.text

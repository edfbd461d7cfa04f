"""How soon a series is closed: what is learned of its sender, what is announced of it, and what a restart keeps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receiver_fakes import ListBus, association, config_under, ct_series, ct_slice, receiving, send_all
from sqlalchemy import insert, select, update

from herald.config import Config
from herald.events import utc_now
from herald.instance import InstanceHeader, Plane, read_header
from herald.ledger import open_ledger, series
from receiver.assembly import (
    ANNOUNCED_AND_COMPLETE,
    MOST_ANNOUNCED,
    QUIET,
    RELEASED_AND_EVEN,
    RELEASED_AND_NOT_A_STACK,
    Assembly,
    Closed,
)
from receiver.geometry import is_even
from receiver.settle import KNOWN_AFTER_SERIES, MOST_SENDERS, REMEMBERED_SERIES, Settling

KEY = ("1.2.3", "1.2.3.4")
OTHER = ("1.2.3", "1.2.3.5")


def header(key: tuple[str, str], number: int, stacked: bool = True) -> InstanceHeader:
    plane = Plane((0.0, 0.0, 5.0 * number), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    uid = f"{key[1]}.{number}"
    return InstanceHeader("1.2", uid, *key, "1.2.840.10008.1.2.1", "A", "CT", "CT-EAST", stacked, plane)


def uids(key: tuple[str, str], *numbers: int) -> list[str]:
    return [f"{key[1]}.{number}" for number in numbers]


# --- the rest of a sender ---


def settling() -> Settling:
    return Settling(first_s=0.7, min_s=0.3, max_s=5.0)


def known(learned: Settling, sender: str = "CT1", pause_s: float = 0.0) -> Settling:
    for number in range(KNOWN_AFTER_SERIES):
        learned.note(sender, number, pause_s)
    return learned


def test_a_sender_that_nobody_knows_is_given_the_first_rest() -> None:
    assert settling().rest_s({"CT1"}) == 0.7
    assert settling().rest_s(()) == 0.7


def test_a_sender_without_pauses_is_given_the_shortest_rest_once_several_of_its_series_were_seen() -> None:
    learned = settling()
    for number in range(KNOWN_AFTER_SERIES):
        assert learned.rest_s({"CT1"}) == 0.7
        learned.note("CT1", number, 0.0)
        learned.note("CT1", number, 0.0)  # its next revision is not another series
    assert learned.rest_s({"CT1"}) == 0.3
    assert learned.rest_s({"CT2"}) == 0.7


def test_a_pause_lengthens_the_rest_of_its_sender_at_once_and_of_nobody_else() -> None:
    learned = known(known(settling(), "CT1"), "CT2")
    learned.note("CT1", "paused", 0.9)
    assert 0.9 < learned.rest_s({"CT1"}) <= 5.0
    assert learned.rest_s({"CT2"}) == 0.3


def test_a_series_that_several_sent_is_given_the_longest_of_their_rests() -> None:
    learned = known(settling(), "CT1")
    learned.note("CT2", "paused", 0.9)
    assert learned.rest_s({"CT1", "CT2"}) == learned.rest_s({"CT2"}) > learned.rest_s({"CT1"})


def test_a_pause_in_the_series_itself_counts_before_anything_else_is_known() -> None:
    assert settling().rest_s({"CT1"}, pause_s=1.0) > 1.0


def test_the_oftener_pauses_were_seen_the_less_is_added_to_the_longest() -> None:
    seldom, often = settling(), settling()
    seldom.note("CT1", 0, 0.9)
    for number in range(100):
        often.note("CT1", number, 0.9)
    assert 0.9 < often.rest_s({"CT1"}) < seldom.rest_s({"CT1"})


def test_a_pause_of_minutes_is_a_persons_and_changes_nothing() -> None:
    learned = known(settling())
    learned.note("CT1", "by hand", 180.0)
    assert learned.rest_s({"CT1"}) == 0.3


def test_a_pause_is_forgotten_after_many_series_without_one() -> None:
    learned = settling()
    learned.note("CT1", "paused", 4.0)
    for number in range(REMEMBERED_SERIES - 1):
        learned.note("CT1", number, 0.0)
        assert learned.rest_s({"CT1"}) == 5.0
    learned.note("CT1", "one more", 0.0)
    assert learned.rest_s({"CT1"}) == 0.3


def test_senders_that_make_up_names_cannot_fill_the_memory() -> None:
    learned = known(settling(), "CT1")
    for number in range(MOST_SENDERS - 1):
        learned.note(f"MADE-UP-{number}", 0, 0.0)
    assert learned.rest_s({"CT1"}) == 0.3
    learned.note("ONE-MORE", 0, 0.0)
    assert learned.rest_s({"CT1"}) == 0.7


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 10)), max_size=300), st.floats(0, 10))
def test_whatever_was_seen_a_rest_stays_within_its_bounds_and_bridges_every_pause_that_can_be_bridged(
    seen: list[tuple[int, float]], own: float
) -> None:
    learned = settling()
    for number, pause_s in seen:
        learned.note("CT1", number, pause_s)
    rest = learned.rest_s({"CT1"}, own)
    assert 0.3 <= rest <= 5.0
    assert rest >= max((pause_s for _, pause_s in seen if pause_s <= 5.0), default=0.0)
    assert rest >= min(own, 5.0)


# --- learning in the state machine ---


def assembly(first_s: float = 0.5, min_s: float = 0.2, max_s: float = 5.0) -> Assembly:
    return Assembly(Settling(first_s, min_s, max_s), quiet_s=10.0, min_even_slices=4)


def send_one_by_one(a: Assembly, key: tuple[str, str], pauses: list[float], now: float) -> tuple[float, list[Closed]]:
    """One association per image, with these pauses before each; returns the time and what was closed meanwhile."""
    closed = []
    for number, pause in enumerate(pauses):
        now += pause
        closed += a.due(now)
        if a.image(key, header(key, number), association=hash((key, number)), sender="CT1", now=now):
            a.earlier(key, [header(key, earlier) for earlier in range(number)])
        a.association_ended(hash((key, number)), now)
    return now, closed


def test_the_pause_that_closed_a_series_too_early_is_learned_from_the_late_image() -> None:
    a = assembly()
    now, closed = send_one_by_one(a, KEY, [0.1] * 6 + [0.8] * 6, now=0.0)
    assert [(early.key, early.reason) for early in closed] == [(KEY, RELEASED_AND_EVEN)], "premature, and only once"
    (whole,) = a.due(now + 10)
    assert (whole.key, whole.reason) == (KEY, RELEASED_AND_EVEN)
    assert closed[0].settle_s == 0.5
    assert closed[0].largest_gap_s == pytest.approx(0.1)
    assert whole.largest_gap_s == pytest.approx(0.8)
    assert whole.settle_s > 0.8
    now, closed = send_one_by_one(a, OTHER, [0.1] * 6 + [0.8] * 6, now + 20)
    assert closed == []
    assert [(later.key, later.reason) for later in a.due(now + 5)] == [(OTHER, RELEASED_AND_EVEN)]


def test_an_image_that_comes_minutes_late_opens_the_series_and_teaches_nothing() -> None:
    a = assembly()
    now, _ = send_one_by_one(a, KEY, [0.0] * 6, now=0.0)
    (early,) = a.due(now + 0.5)
    a.image(KEY, header(KEY, 6), 1, "CT1", now + 120)
    a.association_ended(1, now + 120)
    (late,) = a.due(now + 140)
    assert (early.settle_s, late.settle_s) == (0.5, 0.5)
    assert late.largest_gap_s == 0.0


def test_a_sender_without_pauses_is_soon_closed_faster() -> None:
    a = assembly()
    settled = []
    for number in range(KNOWN_AFTER_SERIES + 1):
        key, now = ("1.2", f"1.2.{number}"), 100.0 * number
        for image in range(6):
            a.image(key, header(key, image), 1, "CT1", now)
        a.association_ended(1, now)
        (closed,) = a.due(now + 10)
        settled.append(closed.due_at - now)
    assert settled[:KNOWN_AFTER_SERIES] == pytest.approx([0.5] * KNOWN_AFTER_SERIES)
    assert settled[KNOWN_AFTER_SERIES:] == pytest.approx([0.2])


def test_a_resumed_series_without_pauses_is_no_evidence_of_any() -> None:
    a = assembly()
    a.resume(KEY, now=0.0)
    (closed,) = a.due(10.0)
    assert (closed.reason, closed.largest_gap_s) == (QUIET, None)


def test_the_same_bytes_again_are_no_pause() -> None:
    a = assembly()
    send_one_by_one(a, KEY, [0.0] * 6, now=0.0)
    a.image(KEY, header(KEY, 0), 99, "CT1", now=0.4, new=False)
    a.association_ended(99, now=0.4)
    (closed,) = a.due(0.9)
    assert closed.largest_gap_s == 0.0


def test_two_thousand_slices_over_as_many_associations_are_judged_once_and_not_at_every_release(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged = 0

    def counted(planes: Any, fewest: int) -> bool:
        nonlocal judged
        judged += 1
        return is_even(planes, fewest)

    monkeypatch.setattr("receiver.assembly.is_even", counted)
    a = assembly()
    now, closed = send_one_by_one(a, KEY, [0.02] * 2000, now=0.0)
    assert closed == []
    assert judged == 0
    assert [(whole.key, whole.reason) for whole in a.due(now + 1)] == [(KEY, RELEASED_AND_EVEN)]
    assert judged == 1
    assert len(a._alarms) + len(a._sent_over) + len(a._released_at) < 5, "nothing piles up"


# --- announcements ---


def send(a: Assembly, key: tuple[str, str], *numbers: int, now: float, release: bool = True) -> None:
    for number in numbers:
        a.image(key, header(key, number), 1, "CT1", now)
    if release:
        a.association_ended(1, now)


def reasons(closed: list[Closed]) -> list[tuple[tuple[str, str], str]]:
    return [(one.key, one.reason) for one in closed]


def test_what_was_announced_before_closes_at_the_release_without_a_rest() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0, 2))
    send(a, KEY, 0, 2, now=1.0, release=False)
    assert a.due(1.9) == [], "its association is still open"
    a.association_ended(1, now=2.0)
    assert reasons(a.due(2.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_what_is_announced_while_it_comes_closes_at_the_release() -> None:
    a = assembly()
    send(a, KEY, 0, 1, now=1.0, release=False)
    a.announce(KEY[1], uids(KEY, 0, 1, 2))
    send(a, KEY, 2, now=1.5)
    assert reasons(a.due(1.5)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_what_is_announced_after_it_came_closes_at_once() -> None:
    a = assembly()
    send(a, KEY, 0, 3, now=1.0)
    assert a.due(5.0) == []
    a.announce(KEY[1], uids(KEY, 0, 3))
    deadline = a.deadline()
    assert deadline is not None
    assert deadline <= 5.0
    assert reasons(a.due(5.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_an_even_stack_of_which_announced_images_are_missing_closes_only_when_it_is_quiet() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, *range(12)))
    send(a, KEY, *range(11), now=1.0)
    assert a.due(10.9) == []
    assert reasons(a.due(11.0)) == [(KEY, QUIET)]


def test_a_missing_image_that_comes_late_completes_the_next_revision_at_once() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, *range(12)))
    send(a, KEY, *range(11), now=1.0)
    a.due(11.0)
    a.image(KEY, header(KEY, 11), 2, "CT1", now=20.0)
    a.earlier(KEY, [header(KEY, number) for number in range(11)])
    a.association_ended(2, now=20.0)
    assert reasons(a.due(20.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_several_announcements_add_up() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0, 1))
    a.announce(KEY[1], uids(KEY, 2))
    send(a, KEY, 0, 1, now=1.0)
    assert a.due(5.0) == []
    a.announce(KEY[1], uids(KEY, 3))
    send(a, KEY, 2, now=6.0)
    assert a.due(8.0) == []
    send(a, KEY, 3, now=9.0)
    assert reasons(a.due(9.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_more_than_was_announced_is_complete_too() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0))
    send(a, KEY, 0, 7, now=1.0)
    assert reasons(a.due(1.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_what_the_store_already_held_counts_as_there() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0, 1))
    send(a, KEY, 1, now=1.0)
    assert a.due(2.0) == []
    a.earlier(KEY, [header(KEY, 0)])
    assert reasons(a.due(2.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_objects_that_are_no_stack_wait_for_what_is_announced() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0, 1))
    a.image(KEY, header(KEY, 0, stacked=False), 1, "CT1", now=0.0)
    a.association_ended(1, now=0.0)
    assert a.due(5.0) == []
    a.image(KEY, header(KEY, 1, stacked=False), 2, "CT1", now=6.0)
    a.association_ended(2, now=6.0)
    assert reasons(a.due(6.0)) == [(KEY, ANNOUNCED_AND_COMPLETE)]


def test_a_late_announcement_of_a_closed_series_changes_nothing() -> None:
    a = assembly()
    send(a, KEY, *range(8), now=1.0)
    assert reasons(a.due(1.5)) == [(KEY, RELEASED_AND_EVEN)]
    a.announce(KEY[1], uids(KEY, *range(8)))
    assert KEY not in a
    assert a.deadline() is None


def test_an_announcement_of_nothing_says_nothing() -> None:
    a = assembly()
    a.announce(KEY[1], [])
    send(a, KEY, 0, 1, now=1.0)
    assert a.due(5.0) == []


def test_an_announcement_that_is_fulfilled_is_spent() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0))
    send(a, KEY, 0, now=1.0)
    a.due(1.0)
    send(a, KEY, 1, now=20.0)
    assert a.due(20.0) == [], "what nobody announced rests as ever"


def test_announcements_of_series_that_never_come_are_forgotten_oldest_first() -> None:
    a = assembly()
    a.announce(KEY[1], uids(KEY, 0, 1))
    for number in range(MOST_ANNOUNCED // 50):
        a.announce(f"9.{number}", ["9.9"])
    send(a, KEY, 0, 1, now=1.0)
    assert a.due(1.0) == []
    last = ("9", f"9.{MOST_ANNOUNCED // 50 - 1}")
    a.image(last, replace(header(last, 0), sop_instance_uid="9.9"), 2, "CT1", now=1.0)
    a.association_ended(2, now=1.0)
    assert reasons(a.due(1.0)) == [(last, ANNOUNCED_AND_COMPLETE)]


def test_one_announcement_beyond_all_bounds_is_not_kept() -> None:
    a = assembly()
    a.announce(KEY[1], [f"1.{number}" for number in range(MOST_ANNOUNCED + 1)])
    send(a, KEY, *range(8), now=1.0)
    assert reasons(a.due(1.5)) == [(KEY, RELEASED_AND_EVEN)]


# --- the alarms against a plain model ---


@dataclass
class PlainSeries:
    last_image: float
    last_change: float
    images: set[int] = field(default_factory=set)
    associations: set[int] = field(default_factory=set)
    announced: set[int] = field(default_factory=set)


class PlainAssembly:
    """What is due, found by looking at every series; rests are constant."""

    REST_S, QUIET_S = 0.5, 10.0

    def __init__(self) -> None:
        self.open: dict[int, PlainSeries] = {}
        self.announced: dict[int, set[int]] = {}

    def image(self, number: int, image: int, association: int, now: float) -> None:
        entry = self.open.get(number)
        if entry is None:
            entry = self.open[number] = PlainSeries(now, now, announced=self.announced.pop(number, set()))
        entry.images.add(image)
        entry.associations.add(association)
        entry.last_image = entry.last_change = now

    def association_ended(self, association: int, now: float) -> None:
        for entry in self.open.values():
            if association in entry.associations:
                entry.associations.remove(association)
                entry.last_change = now

    def announce(self, number: int, images: set[int]) -> None:
        entry = self.open.get(number)
        if entry is not None:
            entry.announced |= images
        else:
            self.announced[number] = self.announced.get(number, set()) | images

    def due(self, now: float) -> dict[int, str]:
        found = {number: due[1] for number, entry in self.open.items() if (due := self._due(entry))[0] <= now}
        for number in found:
            missing = self.open[number].announced - self.open[number].images
            if missing:
                self.announced[number] = missing
            del self.open[number]
        return found

    def _due(self, entry: PlainSeries) -> tuple[float, str]:
        quiet = entry.last_image + self.QUIET_S, QUIET
        if entry.associations or entry.announced - entry.images:
            return quiet
        if entry.announced:
            return entry.last_change, ANNOUNCED_AND_COMPLETE
        ordered = sorted(entry.images)
        even = len(ordered) >= 4 and len({b - a for a, b in pairwise(ordered)}) == 1
        return min(quiet, (entry.last_change + self.REST_S, RELEASED_AND_EVEN)) if even else quiet


HAPPENINGS = st.one_of(
    st.tuples(st.just("image"), st.integers(0, 2), st.integers(0, 5), st.integers(0, 2)),
    st.tuples(st.just("ended"), st.integers(0, 2), st.just(0), st.just(0)),
    st.tuples(st.just("announced"), st.integers(0, 2), st.integers(1, 6), st.just(0)),
)


@given(st.lists(st.tuples(HAPPENINGS, st.sampled_from([0.0, 0.1, 0.3, 0.6, 4.0, 11.0])), max_size=80))
def test_series_close_when_and_why_a_plain_model_closes_them(
    happenings: list[tuple[tuple[str, int, int, int], float]],
) -> None:
    a, plain = assembly(first_s=0.5, min_s=0.5, max_s=0.5), PlainAssembly()
    keys = {number: ("1.2", f"1.2.{number}") for number in range(3)}
    stored: dict[int, set[int]] = {number: set() for number in keys}
    now = 0.0
    for (what, number, value, link), pause in [*happenings, (("ended", 0, 0, 0), 11.0)]:
        now = round(now + pause, 6)
        closed = a.due(now)
        assert {one.key: one.reason for one in closed} == {keys[n]: why for n, why in plain.due(now).items()}
        if what == "image":
            if a.image(keys[number], header(keys[number], value), link, "CT1", now):
                a.earlier(keys[number], [header(keys[number], image) for image in stored[number]])
                plain.image(number, value, link, now)
                plain.open[number].images |= stored[number]
            plain.image(number, value, link, now)
            stored[number].add(value)
        elif what == "ended":
            a.association_ended(number, now)
            plain.association_ended(number, now)
        else:
            a.announce(keys[number][1], uids(keys[number], *range(value)))
            plain.announce(number, set(range(value)))
        assert len(a) == len(plain.open)


# --- thread, with real associations ---


def rows_of(config: Config) -> list[Any]:
    ledger = open_ledger(config.ledger)
    try:
        with ledger.read() as connection:
            return list(connection.execute(select(series).order_by(series.c.closed_at, series.c.revision)).all())
    finally:
        ledger.close()


def in_ledger(config: Config, change: Callable[[Any], None]) -> None:
    """A change of the ledger while no receiver runs."""
    ledger = open_ledger(config.ledger)
    try:
        ledger.create_tables()
        with ledger.begin() as connection:
            change(connection)
    finally:
        ledger.close()


def test_what_is_announced_closes_at_once_and_what_is_missing_is_waited_for(tmp_path: Path) -> None:
    two, even = ct_series(2), ct_series(12)
    with receiving(config_under(tmp_path)) as receiver:
        receiver.assembler.announce(even[0].SeriesInstanceUID, [image.SOPInstanceUID for image in even])
        send_all(receiver.port, even[:11])
        send_all(receiver.port, two)
        receiver.assembler.announce(two[0].SeriesInstanceUID, [image.SOPInstanceUID for image in two])
        (first,) = receiver.bus.wait_for(1)
        assert (first.close_reason, first.instance_count) == (ANNOUNCED_AND_COMPLETE, 2)
        assert receiver.assembler.holds(even[0].StudyInstanceUID), "an image is missing, though the rest is even"
        send_all(receiver.port, even[11:])
        _, second = receiver.bus.wait_for(2)
        assert (second.close_reason, second.instance_count, second.revision) == (ANNOUNCED_AND_COMPLETE, 12, 1)
        assert not receiver.assembler.holds(even[0].StudyInstanceUID)


def test_an_open_series_is_held_and_a_closed_one_is_not(tmp_path: Path) -> None:
    images = ct_series(8)
    study = images[0].StudyInstanceUID
    with receiving(config_under(tmp_path)) as receiver:
        assert not receiver.assembler.holds(study)
        with association(receiver.port) as assoc:
            assert assoc.send_c_store(images[0]).Status == 0
            assert receiver.assembler.holds(study)
            for image in images[1:]:
                assert assoc.send_c_store(image).Status == 0
        receiver.bus.wait_for(1)
        assert not receiver.assembler.holds(study)


def test_a_sender_that_pauses_between_its_associations_closes_early_once_and_then_no_more(tmp_path: Path) -> None:
    config = config_under(tmp_path, settle_s=0.1, settle_min_s=0.1, settle_max_s=30.0)
    with receiving(config) as receiver:
        first = ct_series(9)
        send_all(receiver.port, first[:8])
        receiver.bus.wait_for(1)  # the pause lasts until it was closed
        send_all(receiver.port, first[8:])
        receiver.bus.wait_for(2)
        second = ct_series(9)
        send_all(receiver.port, second[:8])
        assert receiver.assembler.holds(second[0].StudyInstanceUID)
        send_all(receiver.port, second[8:])
        events = receiver.bus.wait_for(3)
    assert [(event.revision, event.instance_count) for event in events] == [(1, 8), (2, 9), (1, 9)]
    early, late, learned = rows_of(config)
    assert (early.settle_s, early.largest_gap_s) == (0.1, 0.0)
    assert late.largest_gap_s > 0.1
    assert min(late.settle_s, learned.settle_s) > late.largest_gap_s


def closed_rows(count: int, calling_ae_title: str, largest_gap_s: float | None) -> Iterator[dict[str, Any]]:
    for number in range(count):
        at = utc_now() - timedelta(hours=count - number)
        yield {
            "series_instance_uid": f"1.9.{number}",
            "revision": 1,
            "study_instance_uid": "1.9",
            "calling_ae_title": calling_ae_title,
            "first_image_at": at,
            "last_image_at": at,
            "closed_at": at,
            "published_at": at,
            "close_reason": RELEASED_AND_EVEN,
            "largest_gap_s": largest_gap_s,
        }


@pytest.mark.parametrize(
    ("count", "gap", "settle"),
    [
        (KNOWN_AFTER_SERIES, 0.0, 0.05),
        (KNOWN_AFTER_SERIES - 1, 0.0, 0.2),
        (KNOWN_AFTER_SERIES, None, 0.2),
        (1, 0.1, 0.4),
    ],
)
def test_what_was_learned_of_a_sender_is_taken_up_from_the_ledger(
    tmp_path: Path, count: int, gap: float | None, settle: float
) -> None:
    config = config_under(tmp_path, settle_s=0.2, settle_min_s=0.05)
    in_ledger(config, lambda connection: connection.execute(insert(series), list(closed_rows(count, "CT1", gap))))
    with receiving(config) as receiver:
        send_all(receiver.port, ct_series(8))
        receiver.bus.wait_for(1)
    assert rows_of(config)[-1].settle_s == pytest.approx(settle)


def test_headers_of_images_that_arrive_are_not_read_again_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counted(path: Path) -> InstanceHeader:
        read.append(path)
        return read_header(path)

    monkeypatch.setattr("receiver.assembly.read_header", counted)
    images = ct_series(60)
    with receiving(config_under(tmp_path)) as receiver:
        send_all(receiver.port, images[:50])
        receiver.bus.wait_for(1)
        assert len(read) <= 1, "at most the one that opened the series"
        read.clear()
        send_all(receiver.port, images[50:])
        receiver.bus.wait_for(2)
        assert 50 <= len(read) <= 51, "what the closed revision held, once"


# --- restart ---


def test_a_close_that_was_committed_and_not_published_is_published_by_the_next_process(tmp_path: Path) -> None:
    config = config_under(tmp_path)
    with receiving(config) as receiver:
        send_all(receiver.port, ct_series(8))
        (before,) = receiver.bus.wait_for(1)
    in_ledger(config, lambda connection: connection.execute(update(series).values(published_at=None)))
    with receiving(config) as receiver:
        (again,) = receiver.bus.wait_for(1)
    assert again.to_json() == before.to_json(), "published or not, it is the same event with the same id"
    with receiving(config) as receiver:
        assert receiver.bus.events == []
        send_all(receiver.port, [ct_slice("1.2", "1.2.9", 0.0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])])
        assert [event.series_instance_uid for event in receiver.bus.wait_for(1)] == ["1.2.9"]


def test_a_series_that_was_closing_when_the_process_ended_is_closed_by_the_next(tmp_path: Path) -> None:
    config = config_under(tmp_path, quiet_s=1.0)
    images = ct_series(8)
    with receiving(config) as receiver:
        send_all(receiver.port, images)
        receiver.bus.wait_for(1)
    unclosed = {"closed_at": None, "close_reason": None, "published_at": None}
    in_ledger(config, lambda connection: connection.execute(update(series).values(unclosed)))
    with receiving(config) as receiver:
        (event,) = receiver.bus.wait_for(1)
    assert (event.revision, event.instance_count, event.close_reason) == (1, 8, QUIET)


def test_a_resumed_series_closes_at_once_when_all_of_it_is_announced(tmp_path: Path) -> None:
    images = ct_series(8)
    with receiving(config_under(tmp_path, settle_s=60.0)) as receiver:
        send_all(receiver.port, images)
    with receiving(config_under(tmp_path)) as receiver:
        receiver.assembler.announce(images[0].SeriesInstanceUID, [image.SOPInstanceUID for image in images])
        (event,) = receiver.bus.wait_for(1)
    assert (event.revision, event.instance_count, event.close_reason) == (1, 8, ANNOUNCED_AND_COMPLETE)


def test_objects_that_are_no_stack_and_not_announced_close_once_released(tmp_path: Path) -> None:
    bus = ListBus()
    with receiving(config_under(tmp_path), bus) as receiver:
        receiver.assembler.announce("1.2.9", [])
        send_all(receiver.port, [ct_slice("1.2", "1.2.9", 0.0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])])
        (event,) = bus.wait_for(1)
    assert event.close_reason == RELEASED_AND_NOT_A_STACK

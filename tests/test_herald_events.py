"""Events round trip as JSON, say what is wrong with a message, and keep their identity."""

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herald.errors import BusError, EventDecodeError
from herald.events import EVENT_TYPES, Event, SeriesReceived, SeriesReviewed, SeriesTriaged, event_from_json

WHEN = datetime(2026, 3, 1, 12, tzinfo=UTC)

st.register_type_strategy(
    datetime,
    st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2100, 1, 1), timezones=st.just(UTC)),
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(int, st.integers(min_value=-(2**63), max_value=2**63 - 1))


def reviewed(**changes: Any) -> SeriesReviewed:
    review = SeriesReviewed(
        study_instance_uid="1.2",
        series_instance_uid="1.2.3",
        revision=1,
        occurred_at=WHEN,
        review_id="r1",
        action="agree",
        reader="reader",
    )
    return dataclasses.replace(review, **changes)


@given(st.one_of([st.from_type(event_type) for event_type in EVENT_TYPES.values()]))
def test_every_event_comes_back_from_json_as_it_was(event: Event) -> None:
    assert event_from_json(event.to_json()) == event


def test_a_time_in_another_zone_comes_back_as_the_same_instant() -> None:
    event = reviewed(occurred_at=WHEN.astimezone(timezone(timedelta(hours=5, minutes=30))))
    assert event_from_json(event.to_json()).occurred_at == WHEN


def test_fields_of_a_newer_producer_are_ignored() -> None:
    body = json.loads(reviewed().to_json())
    assert event_from_json(json.dumps({**body, "mood": "good"}).encode()) == reviewed()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "not one of our events"),
        (b"\xff\xfe not text", "not one of our events"),
        (b"{", "not one of our events"),
        (b"[1, 2]", "expected a JSON object, got list"),
        (b"[" * 100_000, "not one of our events"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{}", "unknown event type None; known are SeriesReceived"),
        (b'{"type": "SeriesLost", "schema": 1}', "unknown event type 'SeriesLost'"),
        (b'{"type": ["SeriesReviewed"], "schema": 1}', "unknown event type"),
        (b'{"type": "SeriesReviewed", "schema": 2}', "schema version 2, this software reads 1"),
        (b'{"type": "SeriesReviewed"}', "schema version None"),
        (b'{"type": "SeriesReviewed", "schema": 1}', "study_instance_uid"),
    ],
)
def test_a_message_that_is_no_event_is_refused_with_the_reason(message: bytes, reason: str) -> None:
    with pytest.raises(EventDecodeError, match=reason) as raised:
        event_from_json(message)
    assert isinstance(raised.value, BusError)
    assert not raised.value.retriable


@pytest.mark.parametrize(
    ("field", "value"), [("revision", "one"), ("action", "shrug"), ("occurred_at", "yesterday"), ("reader", None)]
)
def test_a_field_of_the_wrong_type_is_named(field: str, value: object) -> None:
    body = json.loads(reviewed().to_json()) | {field: value}
    with pytest.raises(EventDecodeError, match=rf"\$\.{field}"):
        event_from_json(json.dumps(body).encode())


@given(st.from_type(SeriesReceived), st.from_type(SeriesReceived))
def test_the_same_cause_always_has_the_same_id(first: SeriesReceived, other: SeriesReceived) -> None:
    again = dataclasses.replace(
        other,
        study_instance_uid=first.study_instance_uid,
        series_instance_uid=first.series_instance_uid,
        revision=first.revision,
    )
    assert again.event_id == first.event_id
    assert json.loads(first.to_json())["event_id"] == str(first.event_id)


def test_ids_do_not_change_between_versions_of_this_software() -> None:
    assert str(reviewed().event_id) == "49b7af29-2a5d-5890-8920-1dfed72086f9"


def test_another_cause_has_another_id() -> None:
    triaged = SeriesTriaged(study_instance_uid="1.2", series_instance_uid="1.2.3", revision=1, disposition="negative")
    events = [
        triaged,
        dataclasses.replace(triaged, revision=2),
        reviewed(),
        reviewed(review_id="r2"),
        reviewed(revision=2),
        reviewed(series_instance_uid="1.2.4"),
    ]
    assert len({event.event_id for event in events}) == len(events)


def test_events_have_no_field_for_who_the_patient_is() -> None:
    names = {field.name for event_type in EVENT_TYPES.values() for field in dataclasses.fields(event_type)}
    assert not {name for name in names if "patient" in name or "birth" in name}

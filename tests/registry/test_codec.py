"""Encoding of records: records of older versions are read, and records that those versions can read do not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.model import MAX_REASON, Condition, ConditionState, WallTime
from nomad_watchdog.registry.codec import PoisonError, decode, encode
from tests.registry.records import record

OLD = (
    b'{"address":"127.0.0.1","agent_class":"default","changed_at":1.5,"epoch":3,"generation":1,'
    b'"id":"cam","instance":"","labels":{},"presence":"present","slug":"%s","v":1}'
) % record("cam").slug.encode()


def test_a_record_of_before_is_read_and_written_as_it_was() -> None:
    """A record without an event's mark is decoded, and encoded to the same bytes."""
    assert decode(OLD).event_at == 0
    assert encode(decode(OLD)) == OLD


@given(st.integers(1, 2**62), st.lists(st.from_regex(r"\A[0-9a-f]{12}\Z"), max_size=16).map(tuple))
def test_an_events_mark_survives(at: int, marks: tuple[str, ...]) -> None:
    """The time and the marks of an event are read as written."""
    marked = replace(record("cam"), event_at=at, event_marks=marks)
    assert decode(encode(marked)) == marked


@given(
    st.sampled_from(ConditionState),
    st.floats(allow_nan=False, allow_infinity=False).map(WallTime),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=MAX_REASON),
    st.integers(0, 2**62),
)
def test_a_condition_survives(
    state: ConditionState, since: WallTime, reason: str, misses: int
) -> None:
    """A device's condition is read as written."""
    sick = replace(record("cam"), condition=Condition(state, since, reason, misses))
    assert decode(encode(sick)) == sick


@pytest.mark.parametrize(
    "more",
    [
        b'"event_at":-1',
        b'"event_at":1.5',
        b'"event_at":1,"event_marks":"0123456789ab"',
        b'"event_at":1,"event_marks":["x"]',
        b'"event_at":1,"event_marks":[5]',
        b'"event_on":1',
        b'"condition":null',
        b'"condition":{"misses":1,"reason":"","since":1.5}',
        b'"condition":{"misses":1,"reason":"","since":1.5,"state":"suspect"}',
        b'"condition":{"misses":-1,"reason":"","since":1.5,"state":"offline"}',
        b'"condition":{"misses":1,"reason":"","since":"x","state":"offline"}',
        b'"condition":{"misses":1,"reason":"","since":1.5,"state":"offline","more":1}',
        b'"condition":{"misses":1,"reason":"%s","since":1.5,"state":"offline"}' % (b"x" * 301),
    ],
)
def test_marks_that_we_would_not_write_are_poison(more: bytes) -> None:
    """A time or a mark in another form, or a field with another name, is poison (S9)."""
    with pytest.raises(PoisonError):
        decode(OLD[:-1] + b"," + more + b"}")

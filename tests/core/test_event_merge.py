"""Which events a successor publishes: its own, from what was published before."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.event_merge import is_shared, state, subject, unpublished
from nomad_watchdog.ids import Slug

D = Slug("d")


@dataclass(frozen=True)
class Said:
    kind: str
    at: float
    slug: Slug = D
    data: dict[str, object] = field(default_factory=dict)


STATES = ("verdict.watched", "verdict.suspect", "verdict.offline")


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STATES), st.floats(2.0, 60.0)), min_size=1, max_size=20
    ),
    published=st.integers(0, 20),
    lags=st.lists(st.floats(-0.9, 0.9), min_size=20, max_size=20),
)
def test_two_who_saw_the_same_tell_each_change_once(
    steps: list[tuple[str, float]], published: int, lags: list[float]
) -> None:
    """Two replicas see the same changes, each some tenths of a second earlier or later; however many the first has
    published, the second publishes the rest, in order."""
    changes: list[Said] = []
    at = 0.0
    for kind, pause in steps:
        at += pause
        if not changes or changes[-1].kind != kind:
            changes.append(Said(kind, at))
    published = min(published, len(changes))
    ours = [Said(one.kind, one.at + lag) for one, lag in zip(changes, lags, strict=False)]
    last = {subject(one): (state(one), one.at) for one in changes[:published]}
    assert unpublished(ours, last, float("-inf")) == ours[published:]  # type: ignore[arg-type]


def test_what_was_told_otherwise_is_not_told_from_before() -> None:
    """If a device's last published state was never seen here, only later events are published."""
    ours = [Said("verdict.watched", 10.0), Said("verdict.suspect", 30.0)]
    last = {(Slug("d"), "verdict"): ("verdict.offline", 20.0)}
    assert unpublished(ours, last, 0.0) == ours[1:]


def test_of_what_is_not_known_only_the_recent_is_told() -> None:
    """For a subject without published events, only those since the start of the log are published."""
    ours = [Said("flapping", 10.0), Said("steady", 30.0)]
    assert unpublished(ours, {}, 20.0) == ours[1:]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (
            Said("present", 1, data={"generation": 1}),
            Said("present", 2, data={"generation": 1}),
            True,
        ),
        (
            Said("present", 1, data={"generation": 1}),
            Said("present", 2, data={"generation": 3}),
            False,
        ),
        (
            Said("repair.done", 1, data={"number": 1}),
            Said("repair.done", 2, data={"number": 2}),
            False,
        ),
        (Said("verdict.offline", 1), Said("verdict.offline", 9), True),
        (
            Said("incident.updated", 1, data={"count": 4}),
            Said("incident.updated", 2, data={"count": 8}),
            False,
        ),
    ],
)
def test_what_counts_as_the_same_change(one: Said, other: Said, *, same: bool) -> None:
    """A desired state is identified by its generation, a repair by its number, an incident's update by its count."""
    assert is_shared(one)
    assert subject(one) == subject(other)
    assert (state(one) == state(other)) is same


def test_what_only_one_replica_knows_is_not_shared() -> None:
    """An audit, a refusal and a hold are published by whichever replica sees them; an incident's end without its group,
    as written by a restart, can be read only by its own replica."""
    for kind in ("audit.pause", "refused", "breaker.held", "departures.held", "events.stored"):
        assert not is_shared(Said(kind, 1.0))
    assert subject(Said("incident.closed", 1.0)) is None


def test_a_restored_registry_that_all_replicas_notice_is_one_change() -> None:
    """The same restore, noticed at different moments, is published once; the next restore is another change. Nodes and
    replicas are distinguished by their names."""
    first, late = (Said("registry.restored", at, Slug(""), {"index": 70}) for at in (1.0, 4.0))
    again = Said("registry.restored", 9.0, Slug(""), {"index": 95})
    assert all(map(is_shared, (first, late, again)))
    assert subject(first) == subject(late) == subject(again)
    assert state(first) == state(late) != state(again)
    assert not is_shared(Said("registry.unreadable", 1.0, Slug("")))
    nodes = [Said("node.draining", 1.0, Slug(""), {"node": name}) for name in ("n1", "n2")]
    replicas = [Said("replica.gone", 1.0, Slug(""), {"replica": name}) for name in ("n1", "n2")]
    assert len({subject(one) for one in (*nodes, *replicas)}) == 4
    assert all(map(is_shared, (*nodes, *replicas)))
    assert not is_shared(Said("shards.taken", 1.0, Slug(""), {"replica": "n1"}))

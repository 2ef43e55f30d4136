"""Incomplete lists from Nomad are detected (S7, S3)."""

from __future__ import annotations

from nomad_watchdog.model import PlacementState
from nomad_watchdog.schedulers.nomad._list_check import unlisted
from nomad_watchdog.schedulers.vanished import MAX_CHECKED, Vanished
from tests.core.world import placement


def alloc(job: str, **changed: object) -> dict[str, object]:
    return {
        "JobID": job,
        "ClientStatus": "running",
        "DesiredStatus": "run",
        "CreateIndex": 5,
        **changed,
    }


def test_a_running_allocation_of_an_unlisted_job_gives_the_list_away() -> None:
    """Such an allocation counts only if it existed before the list was read and is meant to run."""
    rows = [
        alloc("listed"),
        alloc("hidden"),
        alloc("newer", CreateIndex=10),
        alloc("ended", ClientStatus="complete"),
        alloc("stopping", DesiredStatus="stop"),
    ]

    assert unlisted({"listed"}, rows, 10) == {"hidden"}


def test_what_was_alive_and_is_listed_no_more_is_asked_for() -> None:
    """A full read remembers all live jobs, a partial one only its own; dead ones may disappear."""
    a, b = placement("a", 1, ref="job-a"), placement("b", 1, ref="job-b")
    memory = Vanished()
    memory.remember({a.slug: (a,), b.slug: (b,)}, None)
    assert memory.vanished({"job-a"}, None) == ["job-b"]
    assert memory.vanished(set(), frozenset({a.slug})) == ["job-a"]
    memory.remember({b.slug: (placement("b", 1, PlacementState.DEAD, ref="job-b"),)}, {b.slug})
    assert memory.vanished(set(), None) == ["job-a"]
    memory.remember({}, None)
    assert memory.vanished(set(), None) == []


def test_a_whole_fleet_that_vanished_costs_few_questions() -> None:
    """A thousand missing jobs do not cost a thousand calls."""
    memory = Vanished()
    found = [placement(f"d{n}", 1, ref=f"job-{n}") for n in range(1000)]
    memory.remember({one.slug: (one,) for one in found}, None)

    assert len(memory.vanished(set(), None)) == MAX_CHECKED

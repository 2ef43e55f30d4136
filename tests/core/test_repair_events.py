"""Events about repairs: one per attempt, with a text that names it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.repair_events import UNDER_WAY, in_words, news
from nomad_watchdog.core.verdict import Evidence, judge
from nomad_watchdog.model import (
    AgentState,
    Limits,
    Monotonic,
    PlacementState,
    RepairAttempt,
    Repairs,
    VerdictState,
)
from tests.core.test_verdict import report
from tests.core.world import placement, record


def attempt(number: int, outcome: str = "no help") -> RepairAttempt:
    return RepairAttempt(number, f"interface eth{number}", outcome, "", 0.0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 6))
def test_every_attempt_that_ends_is_told_once(ends: list[int], shown: int) -> None:
    """However reports fall between the steps, and however few of the last attempts they contain, each attempt is
    published exactly once, when it has ended."""
    seen: list[int] = []
    attempts: list[RepairAttempt] = []
    before = Repairs()
    for number, pause in enumerate(ends, 1):
        attempts.append(attempt(number, "running"))
        for outcome in ("running", "verifying", "recovered")[-pause or 3 :]:
            attempts[-1] = replace(attempts[-1], outcome=outcome)
            after = Repairs(attempts=tuple(attempts[-shown:]))
            seen += [one.number for one in news(before, after)]
            before = after
    assert seen == [one.number for one in attempts if one.outcome not in UNDER_WAY]


def test_a_control_plane_that_has_just_begun_tells_nothing_old() -> None:
    """Without an earlier report nothing is published; after an empty one every ended attempt is."""
    told = Repairs(attempts=(attempt(1), attempt(2, "running")))
    assert news(None, told) == ()
    assert [one.number for one in news(Repairs(), told)] == [1]
    assert news(told, None) == ()


def test_an_exhausted_ladder_names_what_was_tried() -> None:
    """The reason of offline lists what did not help, and nothing while steps are left."""
    seen = Evidence(
        placement=placement("a", 1, PlacementState.RUNNING),
        report=report(
            state=AgentState.OFFLINE,
            misses=3,
            confirmed=True,
            reason="icmp: no echo",
            received_at=Monotonic(199.0),
            repairs=Repairs(exhausted=True, attempts=(attempt(1), attempt(2, "failed"))),
        ),
        health=None,
        waiting_since=Monotonic(0.0),
    )
    verdict = judge(record("a", epoch=1), seen, Limits(), Monotonic(200.0))
    assert verdict.state is VerdictState.OFFLINE
    assert verdict.reason == (
        "icmp: no echo; tried: interface eth1 (no help), interface eth2 (failed)"
    )
    assert in_words(Repairs(exhausted=False, attempts=(attempt(1),))) == ""

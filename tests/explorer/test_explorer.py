"""Every interleaving of a small world: nothing breaks with the guards, and each missing guard is
found."""

from __future__ import annotations

import pytest

from tests.explorer.__main__ import DEEP, QUICK, Guard, Scope, explore, main

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(900)]
FOUND = {
    Guard.INSTANCE: ("S1", Scope(devices=1, requests=1, faults=1)),
    Guard.CAS: ("S2", Scope(requests=1, faults=0)),
    Guard.RETURN_WHEN_STORED: ("S4", Scope(requests=1, faults=0)),
    Guard.BREAKER: ("S7", Scope(requests=2, faults=0, placed=True)),
    Guard.REREAD: ("S7", Scope(requests=0, faults=1, placed=True)),
    Guard.FRESHNESS: ("S3", Scope(devices=1, requests=1, faults=1)),
    Guard.LISTING: ("S1", Scope(devices=1, requests=1, faults=1)),
    Guard.REST: ("S2", Scope(devices=1, requests=2, faults=1, placed=True)),
    Guard.FENCE_EACH: ("S4", Scope(requests=2, faults=0)),
    Guard.FLOOR: ("S2", Scope(devices=1, requests=2, faults=0, placed=True, burials=1)),
    Guard.LISTED: ("S3", Scope(devices=1, requests=3, faults=0, burials=1)),
}
"""The promise of each guard, and the smallest world that shows it."""


@pytest.mark.slow_because("computes every state of a world")
@pytest.mark.parametrize("scope", QUICK, ids=str)
def test_every_promise_holds_in_every_state(scope: Scope) -> None:
    """S1 to S4 and S7 hold in every reachable state, and from each of them L1 follows."""
    found = explore(scope)
    assert found.complete
    assert not found.broken, str(found)
    assert found.states > 1000


@pytest.mark.long
@pytest.mark.timeout(900)  # two minutes alone; it has what the other workers leave it
@pytest.mark.xdist_group("explorer")  # one world at a time: the largest takes a GB
@pytest.mark.lasts(30.0)
@pytest.mark.parametrize("scope", DEEP, ids=str)
def test_every_promise_holds_in_a_larger_world(scope: Scope) -> None:
    """The same in worlds of a hundred thousand states and more."""
    found = explore(scope, most=4_000_000)
    assert not found.broken, str(found)
    assert found.complete


@pytest.mark.slow_because("computes every state of a world, with the guard and without")
@pytest.mark.parametrize("guard", list(Guard))
def test_a_missing_guard_is_found(guard: Guard) -> None:
    """Without any one guard the explorer finds its promise broken; with it the same world has no
    violation."""
    promise, scope = FOUND[guard]
    found = explore(scope, frozenset({guard}))
    assert found.broken.startswith(promise), f"{guard}: {found}"
    assert found.trace, "a violation without a way to it"
    if scope not in QUICK + DEEP:  # those are explored with all guards above
        assert not explore(scope).broken


def test_the_trace_is_the_shortest() -> None:
    """A start without its compare-and-set is found after the four steps that it takes, and no
    more."""
    found = explore(Scope(requests=1, faults=0), frozenset({Guard.CAS}))
    assert len(found.trace) == 4
    assert found.trace[-1] == "r0 fences a start of a/1 with nothing"


def test_the_command_prints_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits 1 and prints the steps when a promise is broken, and 0 when none is."""
    small = ["--devices", "1", "--requests", "1", "--faults", "0"]
    assert main(small) == 0
    assert "all promises held" in capsys.readouterr().out
    assert main([*small, "--without", "cas"]) == 1
    assert "4. r0 fences a start of a/1 with nothing" in capsys.readouterr().out

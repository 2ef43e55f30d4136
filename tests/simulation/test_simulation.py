"""The real loop in virtual time under seeded faults: it holds, it is deterministic, and it can
fail."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from nomad_watchdog.core import planner
from nomad_watchdog.fleet.listing_freshness import ListingFreshness
from nomad_watchdog.ids import Slug
from tests.simulation.fakes import Store
from tests.simulation.planted import assert_found
from tests.simulation.simulator import check_seeds, main, run_seed
from tests.simulation.virtual_time import StuckError, VirtualLoop

pytestmark = [pytest.mark.usefixtures("yielding"), pytest.mark.timeout(900)]
SEEDS = 300
CHUNK = 25
OFTEN = 50
"""Seeds below this are played by each run, the rest with the long tests."""


@pytest.mark.slow_because("computes 25 histories of a fleet")
@pytest.mark.parametrize(
    "first",
    [
        *range(0, OFTEN, CHUNK),
        *(pytest.param(n, marks=pytest.mark.long) for n in range(OFTEN, SEEDS, CHUNK)),
    ],
)
def test_every_seed_holds(first: int) -> None:
    """In each of 300 histories S1 to S5, S7 and S8 hold at every step, and L1 and L2 at its end."""
    outcomes = check_seeds(first, CHUNK)
    assert len(outcomes) == CHUNK
    assert all(outcome.settled_s >= 0 for outcome in outcomes)
    assert min(outcome.events for outcome in outcomes) > 20


@pytest.mark.slow_because("plays the same histories in more than one process")
def test_the_same_seed_is_the_same_history() -> None:
    """Two processes with different hash seeds get equal digests from equal seeds, and different
    ones otherwise."""
    code = (
        "from tests.simulation.simulator import run_seed\n"
        "print(hash('cam'), [run_seed(seed).digest for seed in range(12)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        check=True,
        text=True,
        timeout=120,
    ).stdout
    hashed, _, theirs = printed.strip().partition(" ")
    assert int(hashed) != hash("cam")
    mine = [run_seed(seed).digest for seed in range(12)]
    assert str(mine) == theirs
    assert len(set(mine)) == len(mine)


def test_a_simulation_leaves_the_caller_s_chance_alone() -> None:
    """The global random source is unchanged."""
    before = random.getstate()
    run_seed(0)
    assert random.getstate() == before


def _no_cas(store: Store, rows: Sequence[tuple[Slug, int, bytes]]) -> list[int | None]:
    return _COMMIT(store, [(slug, store.rows.get(slug, (0,))[0], body) for slug, _, body in rows])


_COMMIT = Store.commit


def _no_breaker(*call: object) -> object:
    return call[0], planner.NO_STOPS, ""


PLANTED: dict[str, tuple[object, str, Callable[..., object], set[str]]] = {
    "a listing older than the record is believed": (
        ListingFreshness, "premature", lambda *_: False, {"S3", "S2"},
    ),
    "the registry stores without comparing": (Store, "commit", _no_cas, {"S1", "S2", "S4", "S5"}),
    "no breaker": (planner, "_breaker", _no_breaker, {"S7"}),
}  # fmt: skip
SHOWN_BY = {"a listing older than the record is believed": 15}
"""Bug → a seed that shows it, if no earlier one does."""


@pytest.mark.slow_because("plays histories until one is broken")
@pytest.mark.parametrize("planted", list(PLANTED))
def test_a_planted_bug_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one guard of the real code removed, a seed below 300 shows a promise that the guard
    kept."""
    begin = SHOWN_BY.get(planted, 0)
    assert_found(PLANTED[planted], lambda seed: run_seed(seed).wrong, SEEDS, monkeypatch, begin)


@pytest.mark.slow_because("plays histories until one is broken")
def test_a_failing_seed_says_how_to_replay_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report of a broken seed contains the promise, the command, and the step at which it
    broke."""
    monkeypatch.setattr(Store, "commit", _no_cas)  # the first seeds show it
    bad = next(seed for seed in range(SEEDS) if run_seed(seed).wrong)
    with pytest.raises(AssertionError) as told:
        check_seeds(bad, 1)
    assert f"python -m tests.simulation.simulator --seed {bad} --trace" in str(told.value)
    assert "BROKEN" in str(told.value)
    assert main(["--seed", str(bad)]) == 1
    assert f"--seed {bad} --trace" in capsys.readouterr().out


def test_virtual_time_jumps_to_the_next_timer() -> None:
    """An hour of sleep passes at once, and timers fire in the order of their times."""

    async def sleepers() -> tuple[list[float], float]:
        woken: list[float] = []

        async def one(delay: float) -> None:
            await asyncio.sleep(delay)
            woken.append(delay)

        async with asyncio.TaskGroup() as group:
            for delay in (3600.0, 5.0, 60.0):
                group.create_task(one(delay))
        return woken, asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        assert runner.run(sleepers()) == ([5.0, 60.0, 3600.0], 3600.0)


def test_waiting_for_nothing_is_said() -> None:
    """A task that waits forever, a spinning one and a thread are errors, not a hang."""

    async def for_ever() -> None:
        await asyncio.get_running_loop().create_future()

    async def spin() -> None:
        while True:
            await asyncio.sleep(0)

    async def thread() -> None:
        await asyncio.to_thread(print)

    for stuck in (for_ever, spin, thread):
        loop = VirtualLoop()
        task = loop.create_task(stuck())
        with pytest.raises(StuckError):
            loop.run_until_complete(task)
        task.cancel()
        with pytest.raises((asyncio.CancelledError, StuckError)):
            loop.run_until_complete(task)
        loop.close()

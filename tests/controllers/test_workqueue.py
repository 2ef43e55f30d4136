"""The work queue: one worker per key, the newest item wins, urgent items first, and nothing starves."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.controllers.agents.retry_budget import RetryBudget
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.model import Limits, Monotonic, WallTime


@dataclass
class HandClock:
    """A clock that the test moves."""

    now: float = 100.0
    moves: list[float] = field(default_factory=list)

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)

    def wall(self) -> WallTime:
        return WallTime(self.now)


ops = st.lists(
    st.tuples(
        st.sampled_from(["put", "urgent", "take", "done", "delay", "tick", "drop"]),
        st.integers(0, 4),
    ),
    max_size=80,
)


@settings(max_examples=400, deadline=None)
@given(ops)
def test_a_key_is_never_in_work_twice_and_the_newest_item_wins(history: list) -> None:
    """Through any history: one worker per key, the last item put is the one taken, and no item is lost."""
    clock = HandClock()
    queue: WorkQueue[int, int] = WorkQueue(clock)
    latest: dict[int, int] = {}
    active: set[int] = set()
    count = 0
    for op, key in history:
        count += 1
        if op in ("put", "urgent"):
            queue.put(key, count, urgent=op == "urgent")
            latest[key] = count
        elif op == "take":
            for taken, item in queue.take_nowait(1):
                assert taken not in active
                assert item == latest.pop(taken)
                active.add(taken)
        elif op == "done" and key in active:
            active.discard(key)
            queue.done(key)
        elif op == "delay":
            queue.delay(key, Monotonic(clock.now + key))
        elif op == "drop":
            queue.drop(key)
            latest.pop(key, None)
        else:
            clock.now += key
    for key in active:
        queue.done(key)
    clock.now += 100.0
    assert dict(queue.take_nowait(100)) == latest


def test_l4_an_urgent_item_passes_a_storm_and_the_storm_still_moves() -> None:
    """One urgent item is taken before 1,000 others; a stream of urgent items leaves every fifth take to bulk items."""
    queue: WorkQueue[int, str] = WorkQueue(HandClock())
    for key in range(1000):
        queue.put(key, "bulk")
    queue.put(5000, "urgent", urgent=True)
    assert queue.take_nowait(1) == [(5000, "urgent")]
    for key in range(2000, 2100):
        queue.put(key, "urgent", urgent=True)
    taken = [item for _, item in queue.take_nowait(50)]

    assert 8 <= taken.count("bulk") <= 12


def test_s9_a_delayed_key_waits_and_holds_up_nobody() -> None:
    """A key in back-off is not taken before its time; others are."""
    clock = HandClock()
    queue: WorkQueue[str, int] = WorkQueue(clock)
    queue.delay("poison", Monotonic(200.0))
    queue.put("poison", 1)
    queue.put("good", 2)

    assert queue.take_nowait(9) == [("good", 2)]
    clock.now = 200.0
    assert queue.take_nowait(9) == [("poison", 1)]


async def test_take_wakes_for_a_put() -> None:
    """A waiting worker receives an item that is put later."""
    queue: WorkQueue[str, int] = WorkQueue(HandClock())
    async with asyncio.TaskGroup() as group:
        taker = group.create_task(queue.take(1))
        await asyncio.sleep(0)
        queue.put("a", 1)

    assert taker.result() == [("a", 1)]


@given(st.lists(st.floats(0.0, 400.0), min_size=1, max_size=60))
def test_s9_a_device_never_gets_more_starts_than_its_budget(gaps: list[float]) -> None:
    """However often a start is requested, at most 20 happen within any hour."""
    limits = Limits(starts_per_hour=20)
    budget = RetryBudget()
    now = 0.0
    started: list[float] = []
    for gap in gaps * 3:
        now += gap
        if budget.may_start(limits, Monotonic(now)) <= now:
            started.append(now)
            budget.started(limits, Monotonic(now))
    for first in started:
        assert sum(first <= s < first + 3600.0 for s in started) <= 20


@given(st.integers(1, 30))
def test_backoff_stays_within_its_ceiling(failures: int) -> None:
    """The delay after n failures is at least half the first delay and never above the maximum."""
    limits = Limits(backoff_initial_s=1.0, backoff_max_s=30.0)
    budget = RetryBudget()
    for _ in range(failures):
        again = budget.failed(limits, Monotonic(1000.0))
        assert 0.5 <= again - 1000.0 <= 30.0

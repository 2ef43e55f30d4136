"""What only a clock can show of the performer, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from nomad_watchdog.core import planner
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.model import Action, Device, Limits
from nomad_watchdog.performer import FENCE_S, Performer
from nomad_watchdog.testing.fakes import Cluster, FakeRegistry, FakeScheduler, Line, Store
from nomad_watchdog.testing.simulation import SPEC
from nomad_watchdog.testing.virtual_time import VirtualClock, VirtualLoop
from nomad_watchdog.workqueue import WorkQueue

T = TypeVar("T")


class SlowLine(Line):
    """Every start takes a while to be answered."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if what == "scheduler.ensure":
            await asyncio.sleep(self.takes_s)
        return await super().call(what, effect)


async def start_two(first_takes_s: float) -> list[str]:
    """Start two devices with one slot; the outcomes in order."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    cluster.prepare([SPEC.agent_class])
    clock = VirtualClock(asyncio.get_running_loop())
    fleet = Fleet(FakeRegistry(store), Limits(concurrency=1), clock)
    done: list[str] = []
    performer = Performer(
        fleet,
        FakeScheduler(cluster, SlowLine(first_takes_s)),
        {SPEC.agent_class: SPEC},
        WorkQueue(clock),
        lambda _action, outcome, _took_s: done.append(outcome),
    )
    await fleet.register([Device(DeviceId(name), SPEC.agent_class, "127.0.0.1") for name in "ab"])
    hashes = {SPEC.agent_class: SPEC.spec_hash}
    actions: list[Action] = []
    for record in fleet.records.values():
        actions.extend(planner.decide(record, (), hashes))
    await performer.perform(actions)
    assert len(cluster.jobs) == done.count("ok")
    return done


def run(first_takes_s: float) -> list[str]:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(start_two(first_takes_s))


def test_s2_a_fence_is_good_for_a_while_only() -> None:
    """A start that waited longer than FENCE_S for a slot is dropped; one that waited less is done."""
    assert run(FENCE_S + 1) == ["ok", "fenced"]
    assert run(FENCE_S - 1) == ["ok", "ok"]

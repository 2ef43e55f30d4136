"""The reconciler over real processes and a real SQLite registry: L1, L2, S1, S2, S4, S7, S8, S9."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentSpec,
    AgentState,
    Device,
    Epoch,
    Limits,
    PlacementState,
    Presence,
    Report,
    VerdictState,
)
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.schedulers.local import LocalScheduler
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

LIMITS = Limits(resync_s=1.0, backoff_initial_s=0.2, startup_grace_s=5.0)


def spec(*command: str, name: str = "default", version: str = "h1") -> AgentSpec:
    line = json.dumps(list(command or ("sleep", "600")))
    return AgentSpec(name, version, version, variables={"command": line})


class Plane:
    """A control plane in this process."""

    def __init__(self, root: Path, agents: Path, *specs: AgentSpec, limits: Limits) -> None:
        self.agents = agents
        self.registry = SqliteRegistry(path=root / "registry.db")
        self.scheduler = LocalScheduler(directory=agents, backoff_initial_s=0.2, poll_s=0.2)
        self.metrics = Metrics()
        self.fleet = Fleet(self.registry, limits, SystemClock())
        by_name = {s.agent_class: s for s in specs or (spec(),)}
        self.reconciler = Reconciler(self.fleet, self.scheduler, by_name, self.metrics)

    async def register(self, *names: str, kind: str = "default") -> None:
        await self.fleet.records.register([Device(DeviceId(n), kind, "127.0.0.1") for n in names])

    def pids(self, name: str = "") -> set[int]:
        return pids_of(self.agents, slug_of(DeviceId(name)) if name else "")

    def settled(self) -> bool:
        """L1: each present device has one running placement at its epoch, and no other device has
        any."""
        records = self.fleet.records
        for slug, record in records.items():
            live = [
                p for p in self.fleet.placements.get(slug, ()) if p.state is not PlacementState.DEAD
            ]
            wanted = 1 if record.presence is Presence.PRESENT else 0
            if len(live) != wanted or any(
                p.epoch != record.epoch or p.state is not PlacementState.RUNNING for p in live
            ):
                return False
        present = sum(r.presence is Presence.PRESENT for r in records.values())
        return len(self.pids()) == present and not len(self.reconciler.queue)


@asynccontextmanager
async def control_plane(
    root: Path, agents: Path, *specs: AgentSpec, limits: Limits = LIMITS
) -> AsyncIterator[Plane]:
    plane = Plane(root, agents, *specs, limits=limits)
    await plane.registry.initialise()
    task = asyncio.get_running_loop().create_task(plane.reconciler.run())
    try:
        await asyncio.wait_for(plane.fleet.readiness.event.wait(), 10.0)
        yield plane
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await plane.scheduler.close()
        await plane.registry.close()


Until = Callable[..., Awaitable[Any]]


async def test_l1_each_present_device_gets_one_agent_and_loses_it_when_it_leaves(
    tmp_path: Path, directory: Path
) -> None:
    """Twenty devices are added, five are removed: twenty, then fifteen processes, one per
    device."""
    async with control_plane(tmp_path, directory) as plane:
        names = [f"d{n}" for n in range(20)]
        await plane.register(*names)
        await eventually(lambda: plane.settled() and len(plane.pids()) == 20)
        await plane.fleet.records.deregister([DeviceId(n) for n in names[:5]])
        await eventually(lambda: plane.settled() and len(plane.pids()) == 15)

        assert all(r.epoch == 1 for r in plane.fleet.records.values())


async def test_l2_a_new_reconciler_finds_everything_in_order(
    tmp_path: Path, directory: Path
) -> None:
    """Restarting the reconciler starts nothing, stops nothing and writes nothing."""
    async with control_plane(tmp_path, directory) as first:
        await first.register(*(f"d{n}" for n in range(10)))
        await eventually(first.settled)
        pids, index = first.pids(), (await first.registry.read()).index
    async with control_plane(tmp_path, directory) as second:
        await eventually(second.settled)
        for _ in range(3):
            await second.scheduler.snapshot()
            second.reconciler.reconcile()

        assert second.pids() == pids
        assert (await second.registry.read()).index == index


async def test_l2_a_crash_between_commit_and_start_uses_the_epoch_that_was_committed(
    tmp_path: Path, directory: Path
) -> None:
    """K5: the epoch is in the registry, but no agent was started: the next reconciler starts that
    epoch."""
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    fleet = Fleet(registry, LIMITS, SystemClock())
    (made,) = await fleet.records.register([Device(DeviceId("a"), "default", "127.0.0.1")])
    from nomad_watchdog.core import presence

    await registry.commit([presence.advance(made.record, Epoch(4))])
    await registry.close()
    async with control_plane(tmp_path, directory) as plane:
        await eventually(plane.settled)

        assert plane.fleet.records[made.record.slug].epoch == 4


async def test_s7_a_mass_departure_is_held_until_a_second_read_agrees(
    tmp_path: Path, directory: Path
) -> None:
    """Thirty of forty devices leave at once: nothing stops at first, an event reports it, then they
    stop."""
    async with control_plane(tmp_path, directory) as plane:
        names = [f"d{n}" for n in range(40)]
        await plane.register(*names)
        await eventually(lambda: plane.settled() and len(plane.pids()) == 40)
        await plane.fleet.records.deregister([DeviceId(n) for n in names[:30]])
        await eventually(lambda: plane.reconciler.breaker.held)
        assert len(plane.pids()) == 40
        await eventually(lambda: plane.settled() and len(plane.pids()) == 10, 60.0)

        kinds = [e.kind for e in plane.fleet.events.after(0, 10_000)[0]]
        assert kinds.count("breaker.held") == 1


async def test_s7_what_a_plan_shows_as_held_can_be_confirmed(
    tmp_path: Path, directory: Path
) -> None:
    """The stops of the last pass are on hold; if an operator was shown a newer plan, that one can
    be approved."""
    async with control_plane(tmp_path, directory) as plane:
        await plane.register(*(f"d{n}" for n in range(12)))
        await eventually(lambda: plane.settled() and len(plane.pids()) == 12)
        reconciler = plane.reconciler
        # As the watch would report it, before the next pass.
        plane.fleet.records.reset({}, plane.fleet.records.reached)
        shown: Any = reconciler.plan_builder.view()
        assert reconciler.breaker.held_id != shown["held"]["id"]
        reconciler.hold_now()
        assert reconciler.breaker.held_id == shown["held"]["id"]
        assert len(reconciler.breaker.held) == 12


async def test_s7_a_registry_that_lost_its_keys_stops_nothing_until_an_operator_says_so(
    tmp_path: Path, directory: Path
) -> None:
    """Records are wiped but the sentinel is kept: the agents keep running, however often the
    registry is read."""
    import sqlite3

    async with control_plane(tmp_path, directory) as plane:
        await plane.register(*(f"d{n}" for n in range(12)))
        await eventually(plane.settled)
        with sqlite3.connect(tmp_path / "registry.db") as db:
            table = _record_table(db)
            db.execute(f"DELETE FROM {table}")
        db.close()
        await eventually(lambda: plane.reconciler.breaker.held, 60.0)
        await plane.reconciler._second_read()
        plane.reconciler.reconcile()
        assert len(plane.pids()) == 12
        assert plane.reconciler.confirm_stops() == 12
        await eventually(lambda: not plane.pids())


def _record_table(db: Any) -> str:
    names = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")]
    for name in names:
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({name})")]
        if "slug" in columns:
            return str(name)
    raise AssertionError(names)


async def test_s9_a_poison_device_delays_nobody(tmp_path: Path, directory: Path) -> None:
    """A class whose agent cannot start at all costs only its own back-off; the other agents start
    at once."""
    bad = spec("/nonexistent/agent", name="broken")
    async with control_plane(tmp_path, directory, spec(), bad) as plane:
        await plane.register("poison", kind="broken")
        await plane.register(*(f"d{n}" for n in range(10)))
        await eventually(lambda: len(plane.pids()) == 10, 60.0)
        poison = slug_of(DeviceId("poison"))
        await eventually(
            lambda: (
                plane.fleet.verdicts.judge(poison).state
                in {VerdictState.UNWATCHED, VerdictState.FAILING, VerdictState.STARTING}
                and plane.fleet.verdicts.judge(poison).reason
            )
        )
        epochs = plane.fleet.records[poison].epoch

        assert epochs <= 5


async def test_a_new_spec_rolls_through_the_fleet_with_new_epochs(
    tmp_path: Path, directory: Path
) -> None:
    """A changed spec replaces each agent once: epoch 2, the new hash, never two processes at
    once."""
    async with control_plane(tmp_path, directory) as old:
        await old.register(*(f"d{n}" for n in range(6)))
        await eventually(old.settled)
    limits = Limits(resync_s=1.0, backoff_initial_s=0.2, replace_at_once=100)
    async with control_plane(tmp_path, directory, spec(version="h2"), limits=limits) as new:
        await eventually(
            lambda: new.settled() and {r.epoch for r in new.fleet.records.values()} == {2},
            20.0,
        )
        hashes = {
            p.spec_hash
            for found in new.fleet.placements.values()
            for p in found
            if p.state is not PlacementState.DEAD
        }

        assert hashes == {"h2"}


async def test_a_killed_agent_comes_back_in_the_same_placement(
    tmp_path: Path, directory: Path
) -> None:
    """After kill -9 of the process the scheduler restarts it, the epoch stays, and the verdict has
    the reason."""
    async with control_plane(tmp_path, directory) as plane:
        await plane.register("a")
        await eventually(plane.settled)
        (before,) = plane.pids("a")
        os.kill(before, signal.SIGKILL)
        await eventually(lambda: plane.settled() and plane.pids("a") - {before})

        assert plane.fleet.records[slug_of(DeviceId("a"))].epoch == 1


async def test_s1_the_second_instance_at_an_epoch_is_refused(
    tmp_path: Path, directory: Path
) -> None:
    """The instance that the scheduler lists is bound. Another one at the same epoch is refused as
    soon as a listing is younger than the binding, even after a restart, because the binding is in
    the registry; it is never accepted."""
    slug = slug_of(DeviceId("a"))

    def told(instance: str, epoch: int = 1) -> Report:
        return Report(
            DeviceId("a"), slug, Epoch(epoch), instance, 1, True, AgentState.OK, True, 0, False,
            "", "", "1",
        )  # fmt: skip

    async def refused(plane: Plane) -> bool:
        said = (await plane.fleet.reports.receive(told("impostor"))).kind
        assert said in {AcceptanceKind.UNSURE, AcceptanceKind.REFUSED}
        return said is AcceptanceKind.REFUSED

    async with control_plane(tmp_path, directory) as plane:
        await plane.register("a")
        await eventually(plane.settled)
        (mine,) = plane.fleet.placements[slug][0].instances
        assert (await plane.fleet.reports.receive(told(mine))).kind is AcceptanceKind.ACCEPTED
        await eventually(lambda: refused(plane))
        assert plane.fleet.verdicts.judge(slug).state is VerdictState.WATCHED
    async with control_plane(tmp_path, directory) as again:
        await eventually(lambda: refused(again))
        assert (await again.fleet.reports.receive(told(mine))).kind is AcceptanceKind.ACCEPTED
        assert (await again.fleet.reports.receive(told(mine, 0))).kind is AcceptanceKind.REFUSED
        assert (await again.fleet.reports.receive(told(mine, 2))).kind is AcceptanceKind.UNSURE


async def test_s2_two_reconcilers_at_once_make_one_agent_each(
    tmp_path: Path, directory: Path
) -> None:
    """Both plan the same thirty starts over one store: compare-and-set lets only one of them win
    each start."""
    async with (
        control_plane(tmp_path, directory) as one,
        control_plane(tmp_path, directory) as two,
    ):
        await one.register(*(f"d{n}" for n in range(30)))
        await eventually(lambda: one.settled() and two.settled(), 60.0)

        assert {r.epoch for r in one.fleet.records.values()} <= {1, 2}
        assert len(one.pids()) == 30


async def test_a_wish_is_not_acknowledged_from_an_old_cache(
    tmp_path: Path, directory: Path
) -> None:
    """S4, S8: if another process deregistered the device, registering it again really registers
    it."""
    async with control_plane(tmp_path, directory) as plane:
        await plane.register("a")
        other = Fleet(SqliteRegistry(path=tmp_path / "registry.db"), LIMITS, SystemClock())
        slug = slug_of(DeviceId("a"))
        stored = await other.registry.get(slug)
        assert stored is not None
        other.records.learn([stored])
        await other.records.deregister([DeviceId("a")])
        for _ in range(5):
            try:
                await plane.register("a")
                break
            except ConflictError as error:
                assert "try again" in str(error)
        now = await other.registry.get(slug)
        await other.registry.close()

        assert now is not None
        assert now.presence is Presence.PRESENT


@pytest.mark.parametrize("number", [1, 3])
async def test_s4_registered_devices_survive_kill_9(
    tmp_path: Path, directory: Path, number: int
) -> None:
    """If a process is killed the moment it acknowledges registrations, none is lost."""
    code = f"""
import asyncio, sys
from pathlib import Path
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.model import Device, Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry
async def main():
    registry = SqliteRegistry(path={str(tmp_path / "registry.db")!r})
    await registry.initialise()
    fleet = Fleet(registry, Limits(), SystemClock())
    for n in range({number}):
        await fleet.records.register([Device(DeviceId(f"d{{n}}"), "default", "127.0.0.1")])
    print("registered", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    assert child.stdout is not None
    assert await asyncio.wait_for(child.stdout.readline(), 20.0) == b"registered\n"
    child.kill()
    await child.wait()
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    found = await registry.read()
    await registry.close()

    assert len(found.records) == number

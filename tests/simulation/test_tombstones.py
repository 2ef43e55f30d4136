"""A device that left long ago is forgotten, and comes back above all of its epochs; in virtual
time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.placement_gc import TOMBSTONE_REST_S
from nomad_watchdog.errors import TransientError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Shard, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Device, Limits, PlacementState
from nomad_watchdog.replicas.leases import SoleOwner, Term
from nomad_watchdog.schedulers import Snapshot
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Store
from tests.simulation.simulator import SPEC
from tests.simulation.virtual_time import VirtualClock, VirtualLoop

PUMP = Device(DeviceId("pump"), SPEC.agent_class, "127.0.0.1")
OTHER = Device(DeviceId("other"), SPEC.agent_class, "127.0.0.1")
SLUG = slug_of(PUMP.id)
TTL_S = 300.0


@dataclass
class Idle(SoleOwner):
    """Holds no shard."""

    def terms(self) -> Mapping[Shard, Term]:
        return {}


async def lives() -> None:
    store, cluster = Store(), Cluster()
    store.initialise("test")
    clock = VirtualClock(asyncio.get_running_loop())
    limits, specs = Limits(tombstone_ttl_s=TTL_S), {SPEC.agent_class: SPEC}
    fleets = [Fleet(FakeRegistry(store), limits, clock) for _ in range(2)]
    leases = (SoleOwner(), Idle())
    tasks = [
        asyncio.ensure_future(
            Reconciler(fleet, FakeScheduler(cluster), specs, Metrics(), one).run()
        )
        for fleet, one in zip(fleets, leases, strict=True)
    ]
    try:
        await fleets[0].records.register([PUMP, OTHER])
        highest = 0
        for _ in range(3):
            await asyncio.sleep(60.0)
            (placement,) = fleets[0].placements[SLUG]
            assert placement.state is PlacementState.RUNNING
            assert placement.epoch == fleets[0].records[SLUG].epoch > highest
            highest = placement.epoch
            await fleets[0].records.deregister([PUMP.id])
            await asyncio.sleep(TTL_S - 10.0)
            assert all(SLUG in fleet.records for fleet in fleets)
            await asyncio.sleep(TOMBSTONE_REST_S + 200.0)
            assert store.record(SLUG) is None, fleets[0].placements.get(SLUG)
            assert not any(SLUG in fleet.records for fleet in fleets)
            assert slug_of(OTHER.id) in fleets[1].records
            # On the replica that has not deleted it.
            await fleets[1].records.register([PUMP])
        for fleet in fleets:
            assert not [e for e in fleet.events.own.recent() if e.kind.startswith("registry.")]
        assert fleets[0].records.floor.epoch == highest
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task


def test_l1_a_forgotten_device_comes_back_above_its_epochs() -> None:
    """Its record is kept for the retention time and then deleted on all replicas, without reports
    of a lost registry; each time the device is registered again one agent runs, at a higher
    epoch."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(lives())


class CutOff(FakeScheduler):
    """A scheduler that can't be read while `away`."""

    away = False

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        """The fake's snapshot, or an error."""
        if self.away:
            raise TransientError("connection refused")
        return await super().snapshot(only)


async def cut_off() -> None:
    store = Store()
    store.initialise("test")
    fleet = Fleet(
        FakeRegistry(store),
        Limits(tombstone_ttl_s=TTL_S),
        VirtualClock(asyncio.get_running_loop()),
    )
    scheduler = CutOff(Cluster())
    reconciler = Reconciler(fleet, scheduler, {SPEC.agent_class: SPEC}, Metrics(), SoleOwner())
    task = asyncio.ensure_future(reconciler.run())
    try:
        await fleet.records.register([PUMP])
        await asyncio.sleep(60.0)
        await fleet.records.deregister([PUMP.id])
        await asyncio.sleep(60.0)
        scheduler.away = True
        await asyncio.sleep(TTL_S + TOMBSTONE_REST_S + 1200.0)
        assert store.record(SLUG) is not None
        scheduler.away = False
        await asyncio.sleep(300.0)
        assert store.record(SLUG) is None
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_s3_no_tombstone_is_deleted_on_an_old_listing() -> None:
    """A replica that can't read the scheduler keeps a tombstone, however old: its last listing may
    not show an agent started since. It deletes the tombstone once the scheduler is readable."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(cut_off())

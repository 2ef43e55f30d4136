"""The floor of the epochs: damaged, or unknown to the replica that needs it."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.fence import Fence
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.core import planner
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.tombstones import EpochFloor
from nomad_watchdog.errors import DamagedError, UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import NEVER, Device, DeviceRecord, Limits
from nomad_watchdog.registry import Registry, RegistryDocument, backup
from nomad_watchdog.registry.epoch_floor import FLOOR, floor_of
from tests.registry.conftest import Store
from tests.registry.test_backup import fill, whole
from tests.simulation import fakes
from tests.simulation.simulator import SPEC

GOALS = Goals({SPEC.agent_class: SPEC.spec_hash})


def fence_of(executor: ActionExecutor) -> Fence:
    return Fence(executor.fleet, executor.leases)


def performer_of(fleet: Fleet) -> ActionExecutor:
    return ActionExecutor(
        fleet,
        fakes.FakeScheduler(fakes.Cluster()),
        {SPEC.agent_class: SPEC},
        WorkQueue(SystemClock()),
        lambda *_: None,
    )


DAMAGED = (
    b"{",
    b"[]",
    b'{"v": 1}',
    b'{"v": null, "epoch": 1, "generation": 1}',
    b'{"v": 1, "epoch": -1, "generation": 1}',
    b'{"v": 1, "epoch": 1.5, "generation": 1}',
    b'{"v": 1, "epoch": "7", "generation": 1}',
    b"\xff\xfe",
)


@pytest.mark.parametrize("body", DAMAGED, ids=ascii)
async def test_s1_an_import_repairs_a_damaged_floor(registry: Registry, body: bytes) -> None:
    """The fix that the error names works: the export and its import write a new floor, above every epoch. Devices that
    the registry has forgotten are restored without an epoch; the others keep theirs."""
    saved = await fill(registry)
    old = backup.parse(io.StringIO("\n".join(await backup.lines(registry))))
    assert await registry.forget([saved[6]]) == [True]
    stored = await registry.document(FLOOR)
    assert await registry.commit_document(FLOOR, RegistryDocument(body, stored.index))
    with pytest.raises(DamagedError, match=r"epoch-floor .*registry export.*registry import"):
        floor_of(await registry.document(FLOOR))
    highest = max(record.epoch for record in saved)
    assert (await backup.restore(registry, *old, dry_run=True)).rebuilt
    with pytest.raises(DamagedError):
        floor_of(await registry.document(FLOOR))
    done = await backup.restore(registry, *old)
    assert done.rebuilt
    assert floor_of(await registry.document(FLOOR)).epoch > highest
    found = {one.slug: one for one in await whole(registry)}
    assert found[saved[6].slug].epoch == NEVER
    assert found[saved[7].slug] == replace(saved[7], index=0)
    assert not (await backup.restore(registry, *old)).rebuilt


async def test_a_floor_of_a_newer_program_is_left_alone(registry: Registry) -> None:
    """An import does not overwrite a floor that was written by a newer version."""
    await fill(registry)
    old = backup.parse(io.StringIO("\n".join(await backup.lines(registry))))
    body = b'{"v": 2, "epoch": 9}'
    stored = await registry.commit_document(FLOOR, RegistryDocument(body, 0))
    assert stored is not None
    with pytest.raises(UserError, match="epoch-floor is of version 2"):
        await backup.restore(registry, *old)
    assert (await registry.document(FLOOR)).body == body


async def test_s2_a_replica_that_knows_no_floor_gives_no_epoch_again(store: Store) -> None:
    """A replica registers a device whose tombstone another replica has just deleted, with the generation that it knows:
    below the tombstone's. In each of several lives, the first agent gets an epoch above the deleted one."""
    clock = SystemClock()
    first, second = (Fleet(store.open(), Limits(), clock) for _ in range(2))
    await first.registry.initialise()
    device = Device(DeviceId("pump"), SPEC.agent_class, "127.0.0.1")
    slug, highest = slug_of(device.id), 0
    for life in range(1, 4):
        await second.records.register([device])
        action = planner.decide(second.records[slug], (), GOALS)
        (record,) = await fence_of(performer_of(second)).pass_all(list(action))
        assert isinstance(record, DeviceRecord)
        assert record.epoch > highest
        highest = record.epoch
        for generation in range(3):  # its generation becomes well above the next one
            snapshot = await first.registry.read()
            first.records.reset(snapshot.records, snapshot.index)
            await first.records.register([replace(device, address=f"127.0.{life}.{generation}")])
        await first.records.deregister([device.id])
        assert await first.records.forget([first.records[slug]]) == 1
        second.records.floor = EpochFloor()  # it has not read the registry since
        gone = await second.registry.read()
        second.records.reset(gone.records, gone.index)
        assert slug not in second.records


async def test_s9_a_damaged_floor_costs_the_first_starts_only(registry: Registry) -> None:
    """In one batch, a device with an earlier agent gets its next epoch. A device without one gets none, and the error
    names the document and the fix."""
    fleet = Fleet(registry, Limits(), SystemClock())
    devices = [Device(DeviceId(name), SPEC.agent_class, "127.0.0.1") for name in ("old", "new")]
    await fleet.records.register(devices[:1])
    executor = performer_of(fleet)
    slugs = [slug_of(device.id) for device in devices]
    await fence_of(executor).pass_all(list(planner.decide(fleet.records[slugs[0]], (), GOALS)))
    bound = replace(fleet.records[slugs[0]], instance="i-1")
    fleet.records.learn([one for one in await fleet.records.commit([bound]) if one is not None])
    await fleet.records.register(devices[1:])
    assert await registry.commit_document(FLOOR, RegistryDocument(b"{", 0))
    batch = [one for slug in slugs for one in planner.decide(fleet.records[slug], (), GOALS)]
    done, failed = await fence_of(executor).pass_all(batch)
    assert isinstance(done, DeviceRecord)
    assert done.epoch == 2
    assert isinstance(failed, DamagedError)
    assert "epoch-floor" in str(failed)
    assert "registry import" in str(failed)
    assert fleet.records[slugs[1]].epoch == NEVER

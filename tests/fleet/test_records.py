"""Changes of records by a replica whose copy of the registry is behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.core import presence
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Device, DeviceRecord, Epoch, Limits, Presence
from nomad_watchdog.registry import COMMIT_TRIES
from nomad_watchdog.registry.sqlite import SqliteRegistry

PUMP = Device(DeviceId("pump"), "default", "10.0.0.1")
SLUG = slug_of(PUMP.id)


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Fleet, Fleet]]:
    """Two replicas on one registry that both know the same device; neither follows the other's writes."""
    registries = [SqliteRegistry(path=tmp_path / "registry.db") for _ in range(2)]
    await registries[0].initialise()
    behind, other = (Fleet(registry, Limits(), SystemClock()) for registry in registries)
    for fleet in (behind, other):
        fleet.records.reset({}, 0)
    await other.records.register([PUMP])
    behind.records.learn(list(other.records.values()))
    yield behind, other
    for registry in registries:
        await registry.close()


async def _advance(fleet: Fleet) -> None:
    """The reconciler's write when it starts an agent."""
    record = fleet.records[SLUG]
    (stored,) = await fleet.records.commit([presence.advance(record, Epoch(record.epoch + 1))])
    assert stored is not None
    fleet.records.learn([stored])


async def test_a_repeated_registration_is_no_conflict_while_an_agent_is_started(
    two: tuple[Fleet, Fleet],
) -> None:
    """The answer is "unchanged", with the record as it is stored."""
    behind, other = two
    await _advance(other)
    (done,) = await behind.records.register([PUMP])
    assert (done.changed, done.record) == (False, other.records[SLUG])
    assert behind.records[SLUG] == other.records[SLUG]


async def test_a_request_that_seems_to_change_nothing_is_decided_on_the_stored_record(
    two: tuple[Fleet, Fleet],
) -> None:
    """The device left and returned, or returned and left, and the replica does not know of the last
    change."""
    behind, other = two
    await other.records.deregister([PUMP.id])
    (done,) = await behind.records.register([PUMP])
    assert done.changed
    assert done.record.presence is Presence.PRESENT
    await behind.records.deregister([PUMP.id])
    other.records.learn([behind.records[SLUG]])
    await other.records.register([PUMP])
    (left,) = await behind.records.deregister([PUMP.id])
    assert left is not None
    assert left.changed
    stored = await other.registry.get(SLUG)
    assert stored is not None
    assert stored.presence is Presence.ABSENT


async def test_a_device_that_another_replica_registered_can_be_removed_at_once(
    two: tuple[Fleet, Fleet],
) -> None:
    """This replica does not know the device yet."""
    behind, other = two
    valve = Device(DeviceId("valve"), "default", "10.0.0.2")
    await other.records.register([valve])
    (left,) = await behind.records.deregister([valve.id])
    assert left is not None
    assert left.changed


async def test_a_record_that_changes_at_every_read_ends_with_a_conflict(
    two: tuple[Fleet, Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After COMMIT_TRIES the caller gets the error."""
    behind, other = two
    reads = 0
    get = behind.registry.get

    async def changed_before(slug: Slug) -> DeviceRecord | None:
        nonlocal reads
        reads += 1
        await _advance(other)
        return await get(slug)

    monkeypatch.setattr(behind.registry, "get", changed_before)
    with pytest.raises(ConflictError, match="try again"):
        await behind.records.register([PUMP])
    assert reads == 2 * COMMIT_TRIES

"""When the leader reads the scheduler's statistics of hosts, and what of them counts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import cast

import pytest

from nomad_watchdog.controllers.host_usage import HostUsageController
from nomad_watchdog.errors import TransientError
from nomad_watchdog.fleet.host_pressures import USAGE_STALE_S
from nomad_watchdog.host_pressure import HostPressure, HostUsage, Resource, Stall
from nomad_watchdog.ids import Shard
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import FIRST, SoleOwner
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler
from tests.fleet.test_event_recorder import Site

BLIND = HostPressure(unreadable="no /proc/pressure")
KNOWN = HostPressure(cpu=Stall(1.0, 1.0))


class Statistics:
    """A scheduler with statistics, which can fail."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.fails = False

    async def host_usage(self, hosts: Collection[str]) -> Mapping[str, HostUsage]:
        self.asked.append(list(hosts))
        if self.fails:
            raise TransientError("no answer")
        return {host: HostUsage(25.0, 50.0) for host in hosts}


class Held(SoleOwner):
    """Of the only replica, while it is the leader."""

    leads = True

    def terms(self) -> dict[Shard, object]:  # type: ignore[override]
        return {Shard(0): FIRST} if self.leads else {}


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


async def test_only_the_leader_asks_and_only_for_hosts_without_pressure(site: Site) -> None:
    """A host whose pressure is known or was never asked for is not read. If the scheduler fails, the last statistics count
    until they are stale. A replica that leads no more drops them."""
    scheduler, leases = Statistics(), Held()
    controller = HostUsageController(
        site.fleet, cast("Scheduler", scheduler), ShardOwnership(leases)
    )
    (north,), (south,), _ = (site.add(1, name) for name in ("north", "south", "west"))
    await controller.poll()
    assert not scheduler.asked
    await site.say(north, pressure=BLIND)
    await site.say(south, pressure=KNOWN)
    await controller.poll()
    assert scheduler.asked == [["north"]]
    rows = {one.name: one.usage for one in site.fleet.hosts.rows()}
    assert rows == {"north": HostUsage(25.0, 50.0), "south": None, "west": None}
    shares = [("north", Resource.CPU, 0.25), ("north", Resource.MEMORY, 0.5)]
    assert list(site.fleet.hosts.usages()) == shares
    scheduler.fails = True
    site.clock.now += USAGE_STALE_S
    await controller.poll()
    assert list(site.fleet.hosts.usages()) == shares
    site.clock.now += 1.0
    assert not list(site.fleet.hosts.usages())
    scheduler.fails = False
    await controller.poll()
    assert list(site.fleet.hosts.usages()) == shares
    leases.leads = False
    await controller.poll()
    assert not list(site.fleet.hosts.usages())
    assert len(scheduler.asked) == 3


async def test_what_can_not_be_read_is_asked_for_less_often(site: Site) -> None:
    """The pause doubles up to ten minutes while nothing is read, and ends with the first statistics."""
    scheduler = Statistics()
    scheduler.fails = True
    controller = HostUsageController(
        site.fleet, cast("Scheduler", scheduler), ShardOwnership(Held())
    )
    (north,) = site.add(1, "north")
    await site.say(north, pressure=BLIND)
    pauses = []
    for _ in range(7):
        await controller.poll()
        pauses.append(controller._pause_s)
    assert pauses == [60.0, 120.0, 240.0, 480.0, 600.0, 600.0, 600.0]
    scheduler.fails = False
    await controller.poll()
    assert controller._pause_s == 30.0

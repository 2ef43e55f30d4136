"""The pool controller does what the scaling decision says, once, on one replica, and publishes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import (
    ConflictError,
    NotFoundError,
    PreconditionError,
    TransientError,
    UserError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Shard
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.pools import PoolStatus, Usage
from nomad_watchdog.pools.controller import PoolController
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import FIRST, SoleOwner, Term


class Memory:
    """A driver whose workers are a number: the drivers' own tests cover real processes. `broken`: the error that it
    raises."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.scaled: list[tuple[str, int]] = []
        self.cpu: float | None = 50.0
        self.broken = ""
        self.bug: Exception | None = None
        self.busy = False

    async def list_pools(self) -> Mapping[str, PoolStatus]:
        return {name: PoolStatus(count, count) for name, count in self.counts.items()}

    async def status(self, name: str) -> PoolStatus | None:
        if self.bug:
            raise self.bug
        return (await self.list_pools()).get(name)

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        if self.broken:
            raise TransientError(self.broken)
        self.counts.setdefault(name, pool.min)

    async def scale(self, name: str, count: int, reason: str) -> None:
        if self.busy:
            raise ConflictError("job scaling blocked due to active deployment")
        self.counts[name] = count
        self.scaled.append((name, count))

    async def remove(self, name: str) -> None:
        self.counts.pop(name, None)

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        return None if self.cpu is None else Usage(self.cpu, 0.0)

    async def run(self, ours: object) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        return


class Held(SoleOwner):
    """Leases from which shard 0 can be taken away."""

    mine = True

    def terms(self) -> Mapping[Shard, Term]:
        return {Shard(0): FIRST} if self.mine else {Shard(1): FIRST}


def pool(**more: object) -> PoolSettings:
    return PoolSettings.model_validate(
        {
            "command": ("x",),
            "max": 9,
            "cooldown_up": 0.0,
            "metric": ({"kind": "cpu", "target": 50.0},),
            "interval": 0.1,
        }
        | more
    )


class World:
    def __init__(self, registry: SqliteRegistry) -> None:
        self.fleet = Fleet(registry, Limits(), SystemClock())
        self.metrics, self.leases, self.driver = Metrics(), Held(), Memory()

    def keeper(self, **pools: PoolSettings) -> PoolController:
        return PoolController(self.fleet, self.metrics, self.leases, self.driver, pools)

    def events(self) -> list[tuple[str, str]]:
        return [(event.kind, event.text) for event in self.fleet.events.own.recent()]

    def metric(self, line: str) -> float:
        text = self.metrics.render().decode()
        found = [row for row in text.splitlines() if row.startswith(f"nomad_watchdog_pool_{line} ")]
        return float(found[0].split()[-1])


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    registry = SqliteRegistry(path=tmp_path / "r.db")
    yield World(registry)
    await registry.close()


async def test_a_metric_above_its_target_adds_workers_and_says_why(world: World) -> None:
    """Twice the target doubles the pool; event, metric and the displayed row say so."""
    keeper = world.keeper(p=pool(min=2))
    world.driver.cpu = 100.0
    await keeper.reconcile("p")

    assert world.driver.scaled == [("p", 4)]
    (event,) = world.events()
    assert event[0] == "pool.scaled"
    assert "scaled from 2 to 4 workers: metric 100, 50 a worker" in event[1]
    assert world.metric('scalings_total{direction="up",pool="p"}') == 1
    (row,) = await keeper.rows()
    assert (row["count"], row["value"], row["advised"]) == (4, 100.0, 4)


async def test_the_same_look_again_does_nothing(world: World) -> None:
    """At the target nothing is scaled and no event is published (S5)."""
    keeper = world.keeper(p=pool(min=2))
    for _ in range(3):
        await keeper.reconcile("p")

    assert (world.driver.scaled, world.events()) == ([], [])


async def test_a_dry_run_tells_once_and_does_nothing(world: World) -> None:
    """One event per action that would be taken, however often the pool is checked."""
    keeper = world.keeper(p=pool(min=2, dry_run=True))
    world.driver.cpu = 100.0
    for _ in range(5):
        await keeper.reconcile("p")

    assert world.driver.scaled == []
    assert [kind for kind, _ in world.events()] == ["pool.would_scale"]


async def test_a_metric_that_is_lost_is_told_once_and_when_it_is_back(world: World) -> None:
    """No change while it is missing; one event when it is lost, one when it returns."""
    keeper = world.keeper(p=pool(min=2))
    world.driver.cpu = None
    for _ in range(3):
        await keeper.reconcile("p")
    world.driver.cpu = 50.0
    await keeper.reconcile("p")

    assert world.driver.scaled == []
    assert [kind for kind, _ in world.events()] == ["pool.problem", "pool.recovered"]


async def test_a_scheduler_that_fails_is_a_problem_of_the_pool_alone(world: World) -> None:
    """Its error is displayed for the pool, the other pool is scaled, and nothing is raised (S9)."""
    world.driver.counts["q"] = 2
    keeper = world.keeper(p=pool(min=2), q=pool(min=2))
    world.driver.broken = "no answer"
    await keeper.reconcile("p")
    world.driver.broken = ""
    world.driver.cpu = 100.0
    await keeper.reconcile("q")

    assert (await keeper.rows())[0]["problem"] == "no answer"
    assert world.driver.scaled == [("q", 4)]


async def test_a_pool_that_is_being_replaced_is_scaled_later_and_is_no_trouble(
    world: World,
) -> None:
    """A refusal because of a deployment is no event; the next pass tries again, without starting a cool-down."""
    keeper = world.keeper(p=pool(min=2))
    world.driver.cpu = 100.0
    world.driver.busy = True
    await keeper.reconcile("p")
    assert (world.driver.scaled, world.events()) == ([], [])
    world.driver.busy = False
    await keeper.reconcile("p")

    assert world.driver.scaled == [("p", 4)]


async def test_an_external_pool_is_made_and_left_alone(world: World) -> None:
    """Its job is created, its metric may be read, and its count is never changed, not even manually."""
    keeper = world.keeper(p=pool(min=2, scaler="external"))
    world.driver.cpu = 500.0
    await keeper.reconcile("p")
    with pytest.raises(PreconditionError, match="external"):
        await keeper.scale("p", 3, "x")

    assert (world.driver.counts, world.driver.scaled) == ({"p": 2}, [])


async def test_only_the_holder_of_shard_0_acts(world: World) -> None:
    """Without that lease no pass has an effect; with it, passes have."""
    world.leases.mine = False
    world.driver.cpu = 100.0
    keeper = world.keeper(p=pool(min=2))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(keeper.run())
        await asyncio.sleep(0.5)
        assert (world.driver.counts, world.driver.scaled) == ({}, [])
        world.leases.mine = True
        async with asyncio.timeout(60):
            while not world.driver.scaled:
                await asyncio.sleep(0.02)
            while not world.metric('workers_wanted{pool="p"}') > 0:
                await asyncio.sleep(0.02)
            world.leases.mine = False
            while world.metric('workers_wanted{pool="p"}') != 0:
                await asyncio.sleep(0.02)
        task.cancel()


async def test_a_bug_costs_one_pool_and_not_the_control_plane(world: World) -> None:
    """An unexpected exception of a driver is reported as the pool's problem, and the next pass continues (S9)."""
    keeper = world.keeper(p=pool(min=2))
    world.driver.bug = KeyError("status")
    await keeper.reconcile("p")
    (row,) = await keeper.rows()
    assert row["problem"] == "internal error: KeyError"
    world.driver.bug = None
    await keeper.reconcile("p")
    (row,) = await keeper.rows()
    assert row["problem"] == ""


async def test_by_hand_a_pool_has_any_number_within_its_bounds(world: World) -> None:
    """Within the bounds: done and published. Outside them: rejected with the bounds. An unknown pool is rejected
    too."""
    keeper = world.keeper(p=pool(min=2, scaler="none"))
    await keeper.reconcile("p")
    await keeper.scale("p", 5, "an operator's word")
    await keeper.reconcile("p")
    with pytest.raises(UserError, match="2 to 9"):
        await keeper.scale("p", 10, "x")
    with pytest.raises(NotFoundError):
        await keeper.scale("z", 1, "x")

    assert world.driver.scaled == [("p", 5)]
    assert [kind for kind, _ in world.events()] == ["pool.scaled"]


async def test_a_pool_that_is_no_longer_configured_waits_for_a_word(world: World) -> None:
    """It is listed and keeps running, and `remove` stops it; a configured pool can't be removed."""
    world.driver.counts["old"] = 3
    keeper = world.keeper(p=pool())
    await keeper.reconcile("p")
    rows = {row["name"]: row["configured"] for row in await keeper.rows()}
    assert rows == {"old": False, "p": True}
    with pytest.raises(PreconditionError, match="remove its block first"):
        await keeper.remove("p")
    await keeper.remove("old")

    assert world.driver.counts == {"p": 1}

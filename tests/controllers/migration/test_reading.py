"""How a replica that changes, reads or can't read the migrations document behaves, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from nomad_watchdog.controllers import migration
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState
from nomad_watchdog.core.migration import Migration
from nomad_watchdog.core.placement_gc import REST_S
from nomad_watchdog.core.planner import NO_STOPS
from nomad_watchdog.daemon import one_shot
from nomad_watchdog.errors import ConflictError
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Epoch, Presence, WallTime
from nomad_watchdog.registry import RegistryDocument
from nomad_watchdog.testing.conformance import record_of
from tests.controllers.migration.two_sites import TwoSites, requests_of
from tests.simulation.virtual_time import VirtualLoop

MOVE = Migration("m", "north", "south", WallTime(0.0), "test")


def replica_of(world: TwoSites) -> Reconciler:
    """A replica with no running tasks."""
    replica = world.replicas[0]
    replica.build()
    return replica.reconciler


def in_virtual_time(story: Callable[[TwoSites], Awaitable[None]]) -> None:
    """Run a scenario of two sites without any fault."""
    world = TwoSites(0, Metrics())
    world.weather.calm()

    async def told() -> None:
        await story(world)

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(told())


async def slow_listing(reconciler: Reconciler, meanwhile: Callable[[], object]) -> None:
    """Make the scheduler's listing take longer than the migrations document is considered fresh."""
    read = reconciler.informer.read

    async def late() -> None:
        await read()
        meanwhile()
        await asyncio.sleep(2 * migration.FRESH_S)

    reconciler.informer.read = late  # type: ignore[method-assign,assignment]
    await one_shot.read_all(reconciler)


def test_a_plan_after_a_slow_reading_has_something_to_do() -> None:
    """A one-shot plan reads the document again at the end, and is refused if the document has changed meanwhile."""

    async def story(world: TwoSites) -> None:
        reconciler = replica_of(world)
        await reconciler.fleet.records.commit([replace(record_of("cam 1"), index=0)])
        await slow_listing(reconciler, lambda: None)
        assert [a.kind.value for a in reconciler.plan_builder.make(NO_STOPS).actions] == ["start"]
        kept = MigrationState("north", frozenset({"north", "south"}), (MOVE,))

        def begun() -> None:
            world.store.commit_document(FORMAT.name, RegistryDocument(FORMAT.encode(kept)))

        with pytest.raises(ConflictError, match="a migration has changed"):
            await slow_listing(reconciler, begun)

    in_virtual_time(story)


def test_who_begins_or_undoes_a_move_decides_nothing_before_a_look_at_both() -> None:
    """A listing made without the other scheduler's agents does not allow the replica that adds it to decide."""

    async def story(world: TwoSites) -> None:
        await replica_of(world).fleet.records.commit([replace(record_of("cam 1"), index=0)])
        for word in ("begin", "undo"):
            reconciler = replica_of(world)
            await one_shot.read_all(reconciler)
            assert reconciler.ownership.shards()
            if word == "begin":
                await requests_of(reconciler).begin(MOVE)
            else:
                await requests_of(reconciler).control("undo")
            assert not reconciler.ownership.shards(), word
            await reconciler.informer.read()
            assert reconciler.ownership.shards()
            over = MigrationState("north", frozenset({"south"}), (replace(MOVE, done=True),))
            world.usual = "south"
            found = world.store.document(FORMAT.name)
            stored = replace(found, body=FORMAT.encode(over))
            assert world.store.commit_document(FORMAT.name, stored)

    in_virtual_time(story)


def test_a_tombstone_is_buried_once() -> None:
    """Without a watch that reports it, one commit is enough, and its result is known."""

    async def story(world: TwoSites) -> None:
        gone = replace(record_of("cam 1"), presence=Presence.ABSENT, epoch=Epoch(3), index=0)
        kept = MigrationState("north", frozenset({"north", "south"}), (replace(MOVE, done=True),))
        world.store.commit_document(FORMAT.name, RegistryDocument(FORMAT.encode(kept)))
        reconciler = replica_of(world)
        await reconciler.fleet.records.commit([gone])
        await one_shot.read_all(reconciler)
        reconciler.fleet.readiness.event.set()
        for _ in range(int(REST_S) + 60):
            await reconciler.migrations.poll()
            await asyncio.sleep(1.0)
        assert not reconciler.migrations.problem
        buried = world.store.record(gone.slug)
        assert buried is not None
        assert (buried.epoch, buried.home) == (4, "south")
        assert reconciler.fleet.records[gone.slug] == buried

    in_virtual_time(story)


def test_a_document_that_cannot_be_read_is_told_where_people_look() -> None:
    """`status` and `explain` report why nothing is decided, with the error, until it is fixed."""

    async def story(world: TwoSites) -> None:
        reconciler = replica_of(world)
        one = record_of("cam 1")
        await reconciler.fleet.records.commit([replace(one, index=0)])
        await one_shot.read_all(reconciler)
        assert reconciler.migrations.status() == {}
        world.store.documents[FORMAT.name] = RegistryDocument(b'{"v": 9}', 98)
        await asyncio.sleep(migration.FRESH_S + 1.0)
        await reconciler.migrations.poll()
        told = str(reconciler.migrations.status()["migration"])
        assert "version 9" in told
        explain = reconciler.fleet.views.explain_parts
        assert "nothing is decided" in str(explain(one.slug)["next"])
        assert "version 9" in str(explain(one.slug)["next"])
        world.store.documents[FORMAT.name] = RegistryDocument(b"", 99)
        await reconciler.migrations.poll()
        assert reconciler.migrations.status() == {}
        assert str(explain(one.slug)["next"]).startswith("start")

    in_virtual_time(story)

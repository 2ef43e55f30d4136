"""Several schedulers behind the interface of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import replace

import pytest

from nomad_watchdog.errors import ConflictError, StaleError, TransientError, UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers import Hint, Scheduler, Snapshot, open_hosts
from nomad_watchdog.schedulers.multi import MultiScheduler
from nomad_watchdog.testing.conformance import CHECKS
from tests.core.world import record
from tests.schedulers.test_fake_conformance import fake_rig
from tests.simulation.cluster import Cluster
from tests.simulation.fakes import FakeScheduler

SPEC = AgentSpec("default", "1", "h")


class Site(FakeScheduler):
    """A fake that can be made unreachable."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.closed = False
        self.while_listing: asyncio.Event | None = None

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        found = await super().snapshot(only)
        if self.while_listing is not None:
            await self.while_listing.wait()
        return found

    async def close(self) -> None:
        self.closed = True


class Both:
    """Two sites, one of which is open."""

    def __init__(self) -> None:
        self.clusters = {"north": Cluster(), "south": Cluster()}
        self.refused = ""
        self.made: dict[str, Site] = {}
        self.moving = MultiScheduler(
            "north", self.make, lambda site, spec: replace(spec, version=site)
        )

    def make(self, name: str) -> Site:
        if self.refused == name:
            raise UserError(f"no way to {name}")
        self.made[name] = Site(self.clusters[name])
        return self.made[name]


async def test_an_agent_starts_where_its_record_says_and_is_stopped_where_it_is() -> None:
    """A record without a home is placed on the base scheduler, one with a home on that scheduler;
    each placement names its scheduler."""
    both = Both()
    await both.moving.prepare([SPEC])
    await both.moving.open("south")
    here, there = record("a", epoch=1), replace(record("b", epoch=1), home="south")
    for one in (here, there):
        await both.moving.ensure(one, Epoch(1), SPEC)
    found = (await both.moving.snapshot()).placements
    assert [found[one.slug][0].backend for one in (here, there)] == ["", "south"]
    assert [len(c.jobs) for c in both.clusters.values()] == [1, 1]
    # each spec in the scheduler's own version
    assert next(iter(both.clusters["south"].jobs.values())).spec.version == "south"
    await both.moving.retire(found[there.slug][0], 1.0)
    assert next(iter(both.clusters["south"].jobs.values())).stopped
    assert not next(iter(both.clusters["north"].jobs.values())).stopped
    with pytest.raises(TransientError, match="west"):
        await both.moving.ensure(replace(here, home="west"), Epoch(2), SPEC)


async def test_hosts_are_those_of_the_scheduler_that_runs_the_agents() -> None:
    """As long as agents run on several of them, hosts can't be compared, and that is refused with their names."""
    both = Both()
    both.clusters["south"].nodes = {"s1": True, "s2": False}
    await both.moving.prepare([SPEC])
    await both.moving.open("south")
    assert await open_hosts(both.moving) == {"n1", "n2"}
    await both.moving.ensure(replace(record("b", epoch=1), home="south"), Epoch(1), SPEC)
    await both.moving.snapshot()
    assert await open_hosts(both.moving) == {"s1"}
    await both.moving.ensure(record("a", epoch=1), Epoch(1), SPEC)
    await both.moving.snapshot()
    with pytest.raises(ConflictError, match="several schedulers: north, south"):
        await open_hosts(both.moving)


async def test_without_all_of_them_there_is_no_snapshot() -> None:
    """If a required scheduler can't be opened or listed, every snapshot fails; when it is back, the
    next snapshot includes both."""
    both = Both()
    both.refused = "south"
    assert both.moving.require(["south"])
    with pytest.raises(TransientError, match="no way to south"):
        await both.moving.snapshot()
    both.refused = ""
    assert set((await both.moving.snapshot()).placements) == set()
    both.clusters["south"].broken = True
    for only in (None, [record("a").slug]):
        with pytest.raises(TransientError, match="can't be read"):
            await both.moving.snapshot(only)
    assert not both.moving.require(["south"])


async def test_a_snapshot_that_began_before_another_came_is_none() -> None:
    """A listing that began before another scheduler was opened does not count as complete."""
    both = Both()
    waits = both.made["north"].while_listing = asyncio.Event()
    listing = asyncio.ensure_future(both.moving.snapshot())
    await asyncio.sleep(0.01)
    await both.moving.open("south")
    waits.set()
    with pytest.raises(StaleError, match="another scheduler"):
        await listing


async def test_one_that_takes_no_agents_is_not_opened() -> None:
    """If the new scheduler rejects the templates, it is closed, and snapshots still cover only the
    previous one."""
    both = Both()
    await both.moving.prepare([SPEC])

    async def refuse(_specs: Collection[AgentSpec], **_more: object) -> None:
        raise UserError("template: no")

    def make(name: str) -> Scheduler:
        site = both.make(name)
        site.prepare = refuse  # type: ignore[method-assign]
        return site

    both.moving._make = make
    with pytest.raises(UserError, match="template"):
        await both.moving.open("south")
    assert set(both.moving.parts) == {"north"}
    assert both.made["south"].closed
    await both.moving.snapshot()


async def test_hints_come_from_one_that_was_opened_later() -> None:
    """The watch continues, and emits a resync for the new scheduler first."""
    both = Both()
    await both.moving.prepare([SPEC])
    async with aclosing(both.moving.watch()) as hints, asyncio.timeout(60.0):  # type: ignore[type-var]
        assert (await anext(hints)).slugs is None
        await both.moving.open("south")
        assert (await anext(hints)).slugs is None
        one = replace(record("b", epoch=1), home="south")
        await both.moving.ensure(one, Epoch(1), SPEC)
        assert (await anext(hints)).slugs == {one.slug}


async def test_a_watch_that_breaks_is_not_silent() -> None:
    """An exception in one scheduler's watch reaches the reader of the hints."""
    both = Both()

    async def broken() -> AsyncIterator[Hint]:
        yield Hint(None)
        raise RuntimeError("a bug")

    both.made["north"].watch = broken  # type: ignore[method-assign]
    async with asyncio.timeout(60.0):
        with pytest.raises(ExceptionGroup):
            async for _ in both.moving.watch():
                pass


async def test_an_answer_is_only_seen_in_a_snapshot_that_has_it() -> None:
    """Answers of two schedulers are numbered by a common sequence, as their indexes can't be
    compared."""
    both = Both()
    await both.moving.prepare([SPEC])
    await both.moving.open("south")
    both.clusters["north"].index, both.clusters["south"].index = 10_000, 50
    there = replace(record("b", epoch=1), home="south")
    number = await both.moving.ensure(there, Epoch(1), SPEC)
    behind = both.clusters["south"].index
    both.clusters["south"].index = 5  # as if the listing were older than the answer
    both.made["south"]._index = 0
    early = await both.moving.snapshot()
    assert (early.index >= number, early.behind) == (True, {there.slug})
    both.clusters["south"].index = behind
    assert (await both.moving.snapshot()).behind == frozenset()


async def test_one_that_is_full_holds_up_no_other() -> None:
    """There is capacity as long as one scheduler has some, and the full ones are named."""
    both = Both()
    await both.moving.open("south")
    both.clusters["south"].blocked = "nodes are full"
    room = await both.moving.capacity()
    assert (room.room, room.full) == (True, {"south": "nodes are full"})
    both.clusters["north"].blocked = "here too"
    assert not (await both.moving.capacity()).room


@pytest.mark.parametrize("name", list(CHECKS))
async def test_two_of_them_keep_the_contract_of_one(name: str) -> None:
    """Every check of the interface also passes with a second scheduler beside the first."""
    async with fake_rig() as rig:
        beside = Cluster()

        def both() -> MultiScheduler:
            parts = {"fake": rig.scheduler, "beside": lambda: FakeScheduler(beside)}
            moving = MultiScheduler("fake", lambda name: parts[name]())
            moving.require(["beside"])
            return moving

        await CHECKS[name](replace(rig, scheduler=both))

"""The simulated world of `tests.simulation.simulator` with its cluster split in two: a job belongs to one site, and
each site's scheduler knows only its own jobs. An operator migrates devices between them all the time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Final

from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState
from nomad_watchdog.core.migration import NEVER_MIGRATED, Migration, tombs
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.errors import TransientError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentSpec,
    DeviceRecord,
    Epoch,
    PlacementState,
    Presence,
    WallTime,
)
from nomad_watchdog.registry import RegistryDocument
from nomad_watchdog.replicas.leases import Leases, SoleOwner
from nomad_watchdog.schedulers import Snapshot
from nomad_watchdog.schedulers.multi import MultiScheduler
from tests.simulation.fakes import FakeRegistry
from tests.simulation.faults import BadLine
from tests.simulation.lease_board import BoardLeases
from tests.simulation.replica import Replica, WatchedReconciler, WatchedScheduler
from tests.simulation.simulator import World, play
from tests.simulation.virtual_time import VirtualClock

SITES: Final = ("north", "south")
MOVES_S: Final = 350.0
"""Without faults, a migration of the whole fleet ends within this virtual time: in the worst case one device at a time,
each with a stop, a start and a first report."""


def requests_of(reconciler: Reconciler) -> MigrationRequests:
    """The requests that users can send to this replica."""
    return MigrationRequests(reconciler.fleet, reconciler.migrations)


class SiteScheduler(WatchedScheduler):
    """One site's scheduler."""

    def __init__(self, world: TwoSites, site: str, line: BadLine, owner: str) -> None:
        super().__init__(world.cluster, line, owner, world.audit)
        self._world = world
        self.name = site

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        return await self._line.call(
            "scheduler.ensure",
            lambda: self._world.placed(self.name, record, epoch, spec, self._owner),
        )

    async def snapshot(self, only: Collection[Slug] | None = None) -> Snapshot:
        if self.name in self._world.dark:
            raise TransientError(f"{self.name} can't be listed")
        found = await super().snapshot(only)
        sites = self._world.sites
        mine = {
            slug: kept
            for slug, some in found.placements.items()
            if (kept := tuple(p for p in some if sites.get(p.ref) == self.name))
        }
        return replace(found, placements=mine)


@dataclass
class MovingReplica(Replica):
    """A control plane process that knows both sites."""

    world: TwoSites

    def build(self) -> None:
        world = self.world
        self.clock = VirtualClock(asyncio.get_running_loop(), world.chance.uniform(1e9, 2e9))
        self._line = BadLine(world.weather, self.crash)
        registry = FakeRegistry(world.store, self._line)
        line = self._line
        scheduler = MultiScheduler(
            world.usual, lambda site: SiteScheduler(world, site, line, self.name)
        )
        self.fleet = Fleet(registry, world.limits, self.clock)
        self.leases: Leases = SoleOwner()
        if world.board is not None:
            self.leases = BoardLeases(world.board, self.name, self.clock, world.weather)
        specs = {world.spec.agent_class: world.spec}
        made = WatchedReconciler(
            self.fleet, scheduler, specs, world.metrics, self.leases, strategies=world.strategies
        )
        made.audit, made.who = world.audit, self.name
        self.reconciler = made


class TwoSites(World):
    """Like `World`, with an operator who sends a request every few seconds."""

    def __init__(self, seed: int, metrics: Metrics) -> None:
        super().__init__(seed, metrics)
        self.replicas = [MovingReplica(one.name, self) for one in self.replicas]
        # With a percentage, the number of agents is unknown while many end; a number is exact.
        self.limits = self.audit.limits = replace(self.limits, breaker_fraction=0.0)
        self.usual = SITES[0]
        self.sites: dict[str, str] = {}
        """Ref of a placement → its site."""
        self.dark: set[str] = set()
        """Sites that can't be listed."""
        self.said: list[str] = []
        commit = self.store.commit_document

        def traced(name: str, document: RegistryDocument) -> RegistryDocument | None:
            stored = commit(name, document)
            if stored is not None and name == "migration":
                moves = [f"{m.source} to {m.goal} {m.state}" for m in self.kept().moves]
                self.audit.trace.say(f"moves: {moves}, looked at: {sorted(self.kept().backends)}")
            return stored

        self.store.commit_document = traced  # type: ignore[method-assign]

    def placed(
        self, site: str, record: DeviceRecord, epoch: Epoch, spec: AgentSpec, owner: str
    ) -> int:
        """A start reaches a site: an epoch only ever has a job on one site."""
        others = {
            self.sites[job.ref]
            for job in self.cluster.jobs.values()
            if (job.slug, job.epoch) == (record.slug, epoch)
        }
        if others - {site}:
            self.audit.broken("S2", f"{record.device.id} at epoch {epoch} in both sites")
            return 0
        before = set(self.cluster.jobs)
        index = self.cluster.ensure(record, epoch, spec, owner)
        for ref in self.cluster.jobs.keys() - before:
            self.sites[ref] = site
        return index

    def kept(self) -> MigrationState:
        return FORMAT.decode(self.store.document("migration").body)

    # -- the operator ---------------------------------------------------------------------------

    async def _trouble(self, ends: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(super()._trouble(ends))
            group.create_task(self._operate(ends))

    async def _operate(self, ends: float) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < ends:
            await asyncio.sleep(self.chance.uniform(1.0, 12.0))
            what = self.chance.choice(
                ["begin", "begin", "pause", "resume", "undo", "dark", "usual"]
            )
            if what == "dark":
                await self._darken()
            elif what == "usual":
                self._follow_hint()
            else:
                await self._say(what)

    async def _purge(self) -> None:
        """Disabled: a site that can't be listed for long would widen what docs/limits.md states about purging."""

    async def _darken(self) -> None:
        site = self.chance.choice(SITES)
        self.dark.add(site)
        self.audit.trace.say(f"{site} can't be listed")
        await asyncio.sleep(self.chance.uniform(0.5, 20.0))
        self.dark.discard(site)

    def _follow_hint(self) -> None:
        """The operator follows the hint in the status: sets another `backend`, and restarts every replica."""
        up = [one for one in self.replicas if one.up]
        if up and up[0].reconciler.migrations.hint():
            last = self.kept().moves[-1].heads_for
            self.audit.trace.say(f"backend = {last}")
            self.usual = last
            for one in self.replicas:
                one.crash()

    async def _say(self, what: str, *, whole: bool = False) -> bool:
        up = [one for one in self.replicas if one.up]
        if not up:
            return False
        replica = self.chance.choice(up)
        requests = requests_of(replica.reconciler)
        if what == "begin":
            source, goal = self.chance.sample(SITES, 2)
            some = frozenset(
                self.chance.sample(self.names, self.chance.randint(1, len(self.names)))
            )
            target = None if whole or self.chance.random() < 0.5 else Target(devices=some)
            move = Migration(
                f"{self.chance.getrandbits(48):012x}", source, goal, WallTime(1.0), "test",
                target=target, at_once=self.chance.choice((0, 0, 1)),
            )  # fmt: skip
            answer: Any = await replica.serve(requests.begin(move))
        else:
            answer = await replica.serve(requests.control(what))
        if answer is not None:
            self.said.append(what)
            self.audit.trace.say(f"operator: {what} {answer['from']} to {answer['to']}")
        return answer is not None

    # -- the end --------------------------------------------------------------------------------

    async def _calm(self) -> None:
        self.dark.clear()
        await super()._calm()
        # The last request is completed; nothing may stay paused for the audit.
        for _ in range(30):
            moves = self.kept().moves
            if not moves or not moves[-1].paused or await self._say("resume"):
                break
            await asyncio.sleep(1.0)

    async def _converge(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while astray := self._astray():
            if loop.time() - began > MOVES_S:
                self.audit.broken("L1", f"{astray[0]}, {MOVES_S:.0f} s after the last word")
                return
            await asyncio.sleep(1.0)
        await super()._converge()

    def _astray(self) -> list[str]:
        """Devices that are not where the operator wants them, and unfinished migrations."""
        kept = self.kept()
        found = []
        for move in kept.moves:
            if not move.done:
                found.append(f"the move to {move.goal} is {move.state}")
        for slug, present in self.wanted.items():
            record = self.store.record(slug)
            if record is None or record.presence is not Presence.PRESENT or not present:
                continue
            move = next((m for m in reversed(kept.moves) if m.covers(record)), None)
            for job in self.cluster.jobs.values():
                if job.slug != slug or self.cluster.state(job) is PlacementState.DEAD:
                    continue
                home = record.home or kept.base or SITES[0]
                if self.sites[job.ref] != home:
                    found.append(f"{job.device_id} is in {self.sites[job.ref]}, its home is {home}")
                if move is not None and self.sites[job.ref] != move.heads_for:
                    found.append(f"{job.device_id} is in {self.sites[job.ref]}")
        return found + self._unburied()

    def _unburied(self) -> list[str]:
        """Devices that have left, and that would come back to the site that a migration leaves."""
        up = (one.reconciler.migrations.homes() for one in self.replicas if one.up)
        homes = next(up, NEVER_MIGRATED)
        records = {slug: one for slug in self.store.rows if (one := self.store.record(slug))}
        return [
            f"{one.device.id}, which has left, would come back to {move.leaves}"
            for move in homes.moves
            for one in tombs(move, homes, records)
        ]


@dataclass(frozen=True)
class Outcome:
    """Result of one seed."""

    wrong: list[str]
    lines: list[str]
    said: list[str]
    homes: set[str]


def run_seed(seed: int) -> Outcome:
    """One simulated history, reproducible by seed."""
    world = play(seed, lambda: TwoSites(seed, Metrics()))
    homes = {record.home for slug in world.store.rows if (record := world.store.record(slug))}
    return Outcome(world.audit.wrong, list(world.audit.trace.lines), world.said, homes)

"""The real loop, in one to three replicas, over fakes, in virtual time, with faults from a seed.

Everything above the registry's and the scheduler's interfaces is the real code. In half of the
seeds every replica believes that it holds all devices, the worst case, which must be safe; in the
others they share shards by leases, some of which are wrong for a while.

Replay one seed with its trace: ``python -m tests.simulation.simulator --seed N --trace``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.core.rollout_steps import Strategy
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, AgentState, Device, Limits, Presence, Report
from tests.simulation.auditor import Auditor, BrokenPromiseError
from tests.simulation.cluster import Cluster, Pace, Process
from tests.simulation.fakes import Store
from tests.simulation.faults import SLOWEST_S, Weather
from tests.simulation.lease_board import Board
from tests.simulation.replica import Replica
from tests.simulation.virtual_time import StuckError, VirtualLoop

FAULTS_S: Final = 120.0
"""Virtual time with faults."""
CONVERGES_S: Final = 180.0
"""L1, L2: without faults, everything is as requested within this virtual time …"""
STAYS_S: Final = 40.0
"""… and nothing more is done for this time, which is longer than a resync."""
BEAT_S: Final = 5.0
LIMITS: Final = Limits(backoff_max_s=15.0, starts_per_hour=10_000, resync_s=15.0)
SPEC: Final = AgentSpec(agent_class="default", version="1", spec_hash="h1")


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one seed."""

    seed: int
    digest: str
    wrong: list[str]
    events: int
    lines: list[str]
    settled_s: float
    """Virtual seconds from the last fault until everything was as requested."""

    @property
    def replay(self) -> str:
        """The command that replays it."""
        return f"python -m tests.simulation.simulator --seed {self.seed} --trace"


class World:
    """One registry, one cluster, some replicas, devices that come and go, and faults."""

    faults_s: float = FAULTS_S
    strategies: Mapping[str, Strategy] = {}
    loop: type[VirtualLoop] = VirtualLoop

    def __init__(self, seed: int, metrics: Metrics) -> None:
        self.seed = seed
        self.metrics = metrics
        self.chance = random.Random(seed)
        chance = self.chance
        self.weather = Weather.of(random.Random(chance.getrandbits(64)))
        move = (2.0, 20.0) if chance.random() < 0.5 else None
        pace = Pace((0.0, 2.0), (0.0, 3.0), (0.0, 8.0), (0.2, 2.0), move)
        nodes = {f"n{i}": True for i in range(chance.randint(1, 3))}
        self.cluster = Cluster(pace, random.Random(chance.getrandbits(64)), nodes)
        self.store = Store()
        self.store.initialise("simulated")
        self.limits = replace(LIMITS, breaker_min=chance.choice((1, 2, 5)))
        self.audit = Auditor(self.store, self.cluster, self.limits)
        self.cluster.on_process = self._born
        self.replicas = [Replica(f"r{i}", self) for i in range(chance.randint(1, 3))]
        many = chance.random() < 0.2
        self.names = [f"dev {i}" for i in range(20 if many else chance.randint(2, 6))]
        self.spec = SPEC
        self.board: Board | None = None
        if chance.random() < 0.5:
            self.board = Board(chance.choice((1, 4)), blurred=chance.random() < 0.5)
        self.wanted: dict[Slug, bool] = {}
        self.over = False
        self.group: asyncio.TaskGroup
        self._busy = {name: asyncio.Lock() for name in self.names}
        self._unsure_until: dict[str, float] = {}
        self.settled_s = -1.0

    async def run(self) -> None:
        """Faults, calm, and the audit."""
        async with asyncio.TaskGroup() as self.group:
            for replica in self.replicas:
                replica.start()
            ends = asyncio.get_running_loop().time() + self.faults_s
            troubles = [self.group.create_task(self._life(name, ends)) for name in self.names]
            troubles.append(self.group.create_task(self._trouble(ends)))
            await asyncio.wait(troubles)
            await self._calm()
            if not self.audit.wrong:
                await self._converge()
            self._stop()

    def _stop(self) -> None:
        """End all of the world's tasks."""
        self.over = True
        for replica in self.replicas:
            replica.crash()
        for process in list(self.cluster.processes.values()):
            process.alive = False

    # -- agents ---------------------------------------------------------------------------------

    def _born(self, process: Process) -> None:
        self.audit.process_began(process)
        self.group.create_task(self._agent(process))

    async def _agent(self, process: Process) -> None:
        sequence = 0
        await asyncio.sleep(self.chance.uniform(0.1, 3.0))
        while process.alive and not self.over:
            up = [replica for replica in self.replicas if replica.up]
            if up and not process.term:
                sequence += 1
                answer = await self._report(process, self.chance.choice(up), sequence)
                if answer is not None and answer.kind is AcceptanceKind.REFUSED and process.alive:
                    self.audit.trace.say(f"agent {process.pid} is refused: {answer.reason}")
                    self.cluster.exit(process, 0)
                    return
            await asyncio.sleep(BEAT_S * self.chance.uniform(0.8, 1.2))

    async def _report(self, process: Process, replica: Replica, sequence: int) -> Acceptance | None:
        weather = self.weather
        if weather.hits(weather.refused):
            return None
        asked_at = self.audit.now()
        report = Report(
            process.device_id, process.slug, process.epoch, process.instance, sequence,
            ready=True, state=AgentState.OK, was_ready=True, misses=0, confirmed=False,
            reason="", listen="", version="1",
        )  # fmt: skip
        answer = await replica.serve(replica.fleet.reports.receive(report))
        if answer is not None and answer.kind is AcceptanceKind.ACCEPTED:
            self.audit.accepted(process, asked_at)
        return None if weather.hits(weather.lost) else answer

    # -- requests -------------------------------------------------------------------------------

    async def _life(self, name: str, ends: float) -> None:
        """One device comes and goes."""
        loop = asyncio.get_running_loop()
        while loop.time() < ends:
            await self._wish(name, present=self.chance.random() < 0.7)
            await asyncio.sleep(min(self.chance.expovariate(1 / 20), 30.0))

    async def _wish(self, name: str, *, present: bool) -> bool:
        """Send one request to a replica; returns whether it was acknowledged."""
        async with self._busy[name]:
            up = [replica for replica in self.replicas if replica.up]
            if not up:
                return False
            replica = self.chance.choice(up)
            asked_at = self.audit.now()
            answer = await self._ask(replica, name, present=present)
            word = "present" if present else "absent"
            self.audit.trace.say(f"{name} {word} by {replica.name}: {answer}")
            if not answer:
                self._unsure_until[name] = self.audit.now() + SLOWEST_S
                return False
            if asked_at >= self._unsure_until.get(name, 0.0):
                self._check_kept(name, present=present)
                if self.chance.random() < 0.3:
                    await self._check_again(replica, name, present=present)
            return True

    async def _ask(self, replica: Replica, name: str, *, present: bool) -> bool:
        if present:
            device = Device(DeviceId(name), SPEC.agent_class, "127.0.0.1")
            return bool(await replica.serve(replica.fleet.records.register([device])))
        return await replica.serve(replica.fleet.records.deregister([DeviceId(name)])) is not None

    def _check_kept(self, name: str, *, present: bool) -> None:
        record = self.store.record(slug_of(DeviceId(name)))
        stored = record is not None and record.presence is Presence.PRESENT
        if stored is not present:
            self.audit.broken("S4", f"{name} was acknowledged and is not stored")

    async def _check_again(self, replica: Replica, name: str, *, present: bool) -> None:
        slug = slug_of(DeviceId(name))
        before = self.store.record(slug)
        if await self._ask(replica, name, present=present):
            after = self.store.record(slug)
            if before and after and before.generation != after.generation:
                self.audit.broken("S5", f"{name}: the same wish again changed the record")

    # -- faults ---------------------------------------------------------------------------------

    async def _trouble(self, ends: float) -> None:
        """All faults other than those of a line."""
        loop = asyncio.get_running_loop()
        kinds = [
            self._crash,
            self._lose_node,
            self._agent_dies,
            self._purge,
            self._jump,
            self._mass,
        ]
        kinds = [kind for kind in kinds if self.chance.random() < 0.6]
        while loop.time() < ends:
            await asyncio.sleep(min(self.chance.expovariate(1 / 8), 30.0))
            if kinds:
                await self.chance.choice(kinds)()

    async def _crash(self) -> None:
        self.chance.choice(self.replicas).crash()

    async def _lose_node(self) -> None:
        node = self.chance.choice(list(self.cluster.nodes))
        if self.cluster.nodes[node]:
            power = self.chance.random() < 0.5
            self.audit.trace.say(f"node {node} is lost, power {'off' if power else 'on'}")
            self.cluster.lose(node, power=power)
            loop = asyncio.get_running_loop()
            loop.call_later(self.chance.uniform(1.0, 60.0), self._find, node)

    def _find(self, node: str) -> None:
        self.audit.trace.say(f"node {node} is back")
        self.cluster.find(node)

    async def _agent_dies(self) -> None:
        alive = list(self.cluster.processes.values())
        if alive:
            process = self.chance.choice(alive)
            code = self.chance.choice((1, 137, 0))
            self.audit.trace.say(f"agent {process.pid} exits {code}")
            self.cluster.exit(process, code)

    async def _purge(self) -> None:
        if self.cluster.jobs:
            ref = self.chance.choice(list(self.cluster.jobs))
            self.audit.purged(self.cluster.jobs[ref])
            self.cluster.purge(ref)
        elif self.chance.random() < 0.5:
            self.cluster.parents.clear()

    async def _upgrade(self) -> None:
        """A new version of the class: all replicas are restarted with it, and roll it out."""
        if self.spec is SPEC:
            self.audit.trace.say("a new version of the class")
            self.spec = replace(SPEC, version="2", spec_hash="h2")
            for replica in self.replicas:
                replica.crash()

    async def _jump(self) -> None:
        self.chance.choice(self.replicas).clock.wall_offset_s += self.chance.uniform(-1e5, 1e5)

    async def _mass(self) -> None:
        present = self.chance.random() < 0.5
        self.audit.trace.say(f"all devices {'come' if present else 'leave'}")
        await asyncio.gather(*(self._wish(name, present=present) for name in self.names))

    # -- the end --------------------------------------------------------------------------------

    async def _calm(self) -> None:
        self.weather.calm()
        self.audit.trace.say("calm")
        for node, heard in self.cluster.nodes.items():
            if not heard:
                self._find(node)
        await asyncio.sleep(2 * SLOWEST_S)  # requests on the wire arrive
        for name in self.names:
            present = self.chance.random() < 0.6
            for _ in range(30):
                if await self._wish(name, present=present):
                    break
                await asyncio.sleep(1.0)
            else:
                self.audit.broken("L2", f"no wish for {name} is taken with all faults off")
            slug = slug_of(DeviceId(name))
            if present or self.store.record(slug) is not None:
                self.wanted[slug] = present

    def _hash_at_end(self) -> str:
        """Hash of the spec that all agents should have."""
        return self.spec.spec_hash

    async def _converge(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        while missing := self.audit.unsettled(self.wanted, self._hash_at_end()):
            if loop.time() - began > CONVERGES_S:
                for one in missing:
                    promise, _, text = one.partition(": ")
                    self.audit.broken(promise, f"{text}, {CONVERGES_S:.0f} s after the last fault")
                return
            await asyncio.sleep(1.0)
        self.settled_s = loop.time() - began
        await asyncio.sleep(5.0)
        done = self.audit.actions
        await asyncio.sleep(STAYS_S)
        if self.audit.actions != done:
            self.audit.broken("L1", "all was as asked, and yet something was done")


W = TypeVar("W", bound=World)


def play(seed: int, make: Callable[[], W]) -> W:
    """Create a world and run it to its end, seeding the back-off's jitter, without logs."""
    state = random.getstate()
    level = logging.root.manager.disable
    random.seed(seed)
    logging.disable(logging.CRITICAL)
    world = make()
    try:
        with asyncio.Runner(loop_factory=world.loop) as runner:
            runner.run(world.run())
    except (StuckError, ExceptionGroup) as error:
        world.audit.wrong.append(f"crashed: {error!r}")
    finally:
        logging.disable(level)
        random.setstate(state)
    return world


def run_seed(seed: int, metrics: Metrics | None = None) -> Outcome:
    """One simulated history. The same seed gives the same digest."""
    return outcome_of(seed, play(seed, lambda: World(seed, metrics or Metrics())))


def outcome_of(seed: int, world: World) -> Outcome:
    """The result of a world that was played."""
    audit = world.audit
    return Outcome(
        seed, audit.trace.digest, audit.wrong, audit.trace.count, list(audit.trace.lines),
        world.settled_s,
    )  # fmt: skip


def _until_broken(lines: list[str]) -> list[str]:
    """The lines up to the first broken promise."""
    for number, line in enumerate(lines, 1):
        if "BROKEN" in line:
            return lines[:number]
    return lines


def check_seeds(first: int, count: int) -> list[Outcome]:
    """Run seeds first … first + count - 1; raises BrokenPromiseError with how to replay the first
    bad one."""
    metrics = Metrics()
    outcomes = []
    for seed in range(first, first + count):
        outcome = run_seed(seed, metrics)
        outcomes.append(outcome)
        if outcome.wrong:
            raise BrokenPromiseError(
                f"seed {seed}: {outcome.wrong[0]}\nreplay: {outcome.replay}\n"
                + "\n".join(_until_broken(outcome.lines)[-60:])
            )
    return outcomes


def replay(program: str, run: Callable[[int], Outcome]) -> int:
    """The command line of a simulation: run seeds and print what did not hold; exit code 1 if anything did not."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="number of seeds")
    parser.add_argument("--trace", action="store_true", help="print every step")
    options = parser.parse_args()
    bad = 0
    for seed in range(options.seed, options.seed + options.count):
        outcome = run(seed)
        if options.trace:
            print("\n".join(outcome.lines))
        for line in outcome.wrong:
            print(f"seed {seed}: {line}")
        bad += bool(outcome.wrong)
    print(f"{options.count} seeds, {bad} broken")
    return 1 if bad else 0


def main(arguments: list[str] | None = None) -> int:
    """Run seeds and print what did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation.simulator")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds from there on")
    parser.add_argument("--trace", action="store_true", help="print each step")
    options = parser.parse_args(arguments)
    metrics = Metrics()
    bad = 0
    for seed in range(options.seed, options.seed + options.count):
        outcome = run_seed(seed, metrics)
        if options.trace:
            print("\n".join(outcome.lines))
        if outcome.wrong or options.count == 1:
            verdict = "; ".join(outcome.wrong[:3]) or f"held, settled in {outcome.settled_s:.0f} s"
            print(f"seed {seed} digest {outcome.digest} events {outcome.events}: {verdict}")
        if outcome.wrong:
            bad += 1
            print(f"  replay: {outcome.replay}")
    print(f"{options.count} seeds, {bad} broken")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""The simulation with roll-outs in steps: versions come, some of them bad, and an operator promotes,
pauses, aborts and undoes them, while answers are lost and replicas die.

Replay one seed with its trace: ``python -m tests.simulation.rollouts --seed N --trace``.
"""

from __future__ import annotations

import asyncio
import random
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Final

from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.controllers.rollout_state import RolloutState
from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy, complete
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentSpec,
    AgentState,
    Device,
    DeviceRecord,
    Epoch,
    Placement,
    Report,
)
from nomad_watchdog.registry import RegistryDocument
from tests.simulation.cluster import FAILS, Process
from tests.simulation.replica import Replica, WatchedScheduler
from tests.simulation.rollout_auditor import FORMAT, RolloutAuditor
from tests.simulation.simulator import SPEC, Outcome, World, outcome_of, play, replay
from tests.simulation.virtual_time import LoopWithThreads

CLASS: Final = SPEC.agent_class
KIND: Final = "kind"
"""Variable of a spec: what its agents do."""
GOOD, NEVER, DIES, BLAMES, CRASHES = "good", "never ready", "dies", "blames", "crashes"
BAD: Final = (NEVER, DIES, BLAMES, CRASHES)
ENDS_S: Final = 600.0
"""Without faults, the last roll-out is complete within this virtual time: in the worst case one device at a time, each
with a stop, a start, a first report and the soaks."""
ACTS: Final = ("promote", "promote", "promote-all", "pause", "resume", "abort", "retry", "undo")
STEPS: Final = (
    (RolloutStep(count=1, soak_s=8.0),),
    (RolloutStep(count=1, soak_s=6.0), RolloutStep(pause=True), RolloutStep(fraction=0.5, soak_s=6.0)),
    (
        RolloutStep(count=2, soak_s=8.0, selector={"site": "a"}),
        RolloutStep(fraction=1.0, by="site", soak_s=6.0),
    ),
)  # fmt: skip


class RolloutScheduler(WatchedScheduler):
    """Remembers when requests were sent."""

    _audit: RolloutAuditor

    async def ensure(self, record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> int:
        sent_at = self._audit.now()

        def effect() -> int:
            self._audit.sent_at = sent_at
            return self._cluster.ensure(record, epoch, spec, self._owner)

        return await self._line.call("scheduler.ensure", effect)

    async def retire(self, placement: Placement, grace_s: float) -> None:
        self._audit.stop_sent(placement.slug, placement.epoch)
        await super().retire(placement, grace_s)


@dataclass
class RolloutReplica(Replica):
    """A control plane process that users can send requests about roll-outs to."""

    world: RolloutWorld
    requests: RolloutRequests = field(init=False)

    def build(self) -> None:
        super().build()
        controller, audit = self.reconciler.classes.rollouts, self.world.audit
        changed = self.reconciler.wake
        self.requests = RolloutRequests(
            self.fleet, controller, self.reconciler.classes.changes, changed
        )
        read = controller.read

        async def watched() -> None:
            began = audit.now()
            await read()
            audit.read(self.name, began)

        controller.read = watched  # type: ignore[method-assign]

    def _scheduler(self) -> RolloutScheduler:
        world = self.world
        return RolloutScheduler(world.cluster, self._line, self.name, world.audit)


class RolloutWorld(World):
    """A world in which the class of all devices is rolled out in steps."""

    faults_s = 180.0
    loop = LoopWithThreads
    audit: RolloutAuditor

    def __init__(self, seed: int, metrics: Metrics) -> None:
        super().__init__(seed, metrics)
        chance = self.chance
        self.weather.crash = chance.choice((0.0, 0.0, 0.001, 0.003))  # else no step ever passes
        self.weather.short = 0.0  # no window counts devices that the registry does not list
        window = chance.choice((1, 1, 2))
        self.limits = replace(self.limits, replace_at_once=window, replace_fraction=0.0)
        self.names = [f"dev {n}" for n in range(chance.choice((2, 4, 6, 10)))]
        self._busy = {name: asyncio.Lock() for name in self.names}
        strategy = Strategy(
            steps=complete(chance.choice(STEPS)),
            progress_deadline_s=60.0,
            abort_share=chance.choice((0.2, 0.5)),
            abort_min=chance.choice((1, 3)),
            well_before_s=10.0,
            back=chance.random() < 0.8,
        )
        self.strategies = {CLASS: strategy}
        single = len(self.replicas) == 1 or (self.board is not None and not self.board.blur_s)
        # docs/limits.md: replicas with their own shards, and answers that do not come.
        is_exact = single and (self.board is None or len(self.board.holders) == 1)
        is_exact = is_exact and not (self.weather.lost or self.weather.slow)
        self.audit = RolloutAuditor(
            self.store,
            self.cluster,
            self.limits,
            strategy,
            window=window if is_exact else len(self.names),
            single=single,
        )
        self.replicas: list[Any] = [RolloutReplica(one.name, self) for one in self.replicas]
        self._version = 1
        self._deaths = random.Random(chance.getrandbits(64))

    async def run(self) -> None:
        if self.chance.random() < 0.9:
            self.store.commit_document(FORMAT.name, RegistryDocument(proven_by(SPEC)))
        await super().run()

    # -- agents ---------------------------------------------------------------------------------

    def _born(self, process: Process) -> None:
        super()._born(process)
        if process.spec.variables.get(KIND) == DIES:
            code = self._deaths.choice((0, 1))
            loop = asyncio.get_running_loop()
            loop.call_later(self._deaths.uniform(3.0, 15.0), self.cluster.exit, process, code)

    async def _report(self, process: Process, replica: Replica, sequence: int) -> Acceptance | None:
        weather, kind = self.weather, process.spec.variables.get(KIND, GOOD)
        if weather.hits(weather.refused):
            return None
        asked_at, blames = self.audit.now(), kind == BLAMES
        report = Report(
            process.device_id, process.slug, process.epoch, process.instance, sequence,
            ready=kind != NEVER, state=AgentState.OFFLINE if blames else AgentState.OK,
            was_ready=kind != NEVER, misses=3 * blames, confirmed=blames,
            reason="", listen="", version=process.spec.version,
        )  # fmt: skip
        answer = await replica.serve(replica.fleet.reports.receive(report))
        if answer is not None and answer.kind is AcceptanceKind.ACCEPTED:
            self.audit.accepted(process, asked_at)
            self.audit.reported(process, ready=report.ready)
            for other in self.replicas:
                if other is not replica and other.up and not weather.hits(weather.lost):
                    other.fleet.reports.accept_replicated(report)
        return None if weather.hits(weather.lost) else answer

    # -- requests -------------------------------------------------------------------------------

    async def _life(self, name: str, ends: float) -> None:
        """Every other device stays."""
        if self.names.index(name) % 2:
            await super()._life(name, ends)
        while not await self._wish(name, present=True):
            await asyncio.sleep(1.0)

    async def _ask(self, replica: Replica, name: str, *, present: bool) -> bool:
        if not present:
            return await super()._ask(replica, name, present=False)
        site = "ab"[self.names.index(name) // 2 % 2]
        device = Device(DeviceId(name), CLASS, "127.0.0.1", {"site": site})
        return bool(await replica.serve(replica.fleet.records.register([device])))

    async def _operate(self, ends: float) -> None:
        loop, kinds = asyncio.get_running_loop(), (GOOD, GOOD, GOOD, GOOD, *BAD)
        await asyncio.sleep(25.0)
        await self._change(self.chance.choice(kinds))
        while loop.time() < ends:
            await asyncio.sleep(self.chance.uniform(2.0, 20.0))
            if self.chance.random() < 0.15:
                await self._change(self.chance.choice(kinds))
            else:
                await self._say(self.chance.choice(ACTS))

    async def _change(self, kind: str) -> None:
        """The configuration is changed: some replicas are restarted with it, the others read it again."""
        self._version += 1
        number, fails = str(self._version), {FAILS: "1"} if kind == CRASHES else {}
        self.spec = AgentSpec(CLASS, number, f"h{number}", variables={KIND: kind} | fails)
        self.audit.trace.say(f"version {number} is configured, {kind}")
        self.audit.configured(self.spec)
        for replica in self.replicas:
            if not replica.up or self.chance.random() < 0.5:
                replica.crash()
                continue
            classes = replica.reconciler.classes
            call = classes.configure({CLASS: self.spec}, strategies=self.strategies)
            self.group.create_task(self._reload(replica, call))

    @staticmethod
    async def _reload(replica: RolloutReplica, call: Any) -> None:
        process = replica.fleet
        await replica.serve(call)
        if replica.up and replica.fleet is process and replica.reconciler.classes.rollouts.problem:
            replica.crash()

    async def _say(self, what: str) -> bool:
        """The operator sends a request to a replica; returns whether it was acknowledged."""
        up = [one for one in self.replicas if one.up]
        if not up:
            return False
        replica, asked_at = self.chance.choice(up), self.audit.now()
        spec = replica.reconciler.classes.rollouts.configured[CLASS]
        answer = await replica.serve(replica.requests.control(CLASS, what, "op"))
        if answer is None:
            return False
        self.audit.trace.say(f"operator: {what} by {replica.name}: {answer['state']}")
        if what in ("abort", "undo") and answer["spec"] == spec.spec_hash:
            self.audit.read(replica.name, asked_at)
            if self.audit.given_up_at.get(spec.spec_hash, -1.0) < asked_at:
                self.audit.broken("R2", f"{what} of version {spec.version} is not stored")
        return True

    # -- faults ---------------------------------------------------------------------------------

    async def _trouble(self, ends: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(super()._trouble(ends))
            group.create_task(self._operate(ends))

    async def _mass(self) -> None:
        """Disabled: with all devices gone there is nothing to roll out."""

    # -- the end --------------------------------------------------------------------------------

    async def _converge(self) -> None:
        if self.chance.random() < 0.5:
            await self._take_back()
        else:
            await self._finish()
        if not self.audit.wrong:
            await super()._converge()

    def _hash_at_end(self) -> str:
        good = self.audit.state.good
        return good.spec_hash if good is not None else ""

    async def _take_back(self) -> None:
        """What is rolled out now is taken back, whatever its state is; then the proven version must be everywhere."""
        state, spec_hash = self.audit.state, self.spec.spec_hash
        is_complete = state.good is not None and state.good.spec_hash == spec_hash
        back = state.before if is_complete else state.good
        if back is None or back.variables.get(KIND, GOOD) != GOOD:
            await self._finish()  # there is no version to go back to
            return
        for _ in range(30):
            state = self.audit.state
            if state.bad == spec_hash and not state.keeps:
                return
            await self._say("undo")
            await asyncio.sleep(2.0)
        self.audit.broken("R2", f"{spec_hash} can't be taken back with all faults off")

    async def _finish(self) -> None:
        """A good version is rolled out, with or without promotion; then it must be everywhere."""
        loop = asyncio.get_running_loop()
        if self.spec.variables.get(KIND, GOOD) != GOOD:
            await self._change(GOOD)
        hurry, until = self.chance.random() < 0.5, loop.time() + ENDS_S
        while loop.time() < until:
            await asyncio.sleep(2.0)
            state, spec_hash = self.audit.state, self.spec.spec_hash
            if state.good is not None and state.good.spec_hash == spec_hash:
                return
            if state.bad == spec_hash:
                await self._say("retry")
            elif (at := state.progress) is not None and at.spec == spec_hash:
                step = self.strategies[CLASS].steps[at.step]
                if at.paused_by:
                    await self._say("resume")
                elif step.pause or (hurry and not at.promoted):
                    await self._say("promote-all" if hurry else "promote")
        self.audit.broken("L1", f"version {self.spec.version} is not complete after {ENDS_S:.0f} s")


def proven_by(spec: AgentSpec) -> bytes:
    """The document of a class whose version is proven."""
    return FORMAT.encode(RolloutState().proved(spec))


def run_seed(seed: int, metrics: Metrics | None = None) -> Outcome:
    """One simulated history with roll-outs. The same seed gives the same digest."""
    return outcome_of(seed, play(seed, lambda: RolloutWorld(seed, metrics or Metrics())))


if __name__ == "__main__":
    sys.exit(replay("tests.simulation.rollouts", run_seed))

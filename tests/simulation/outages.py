"""The simulation with failing devices: dead ones, dead services on live hosts, and agents that
can't probe or are refused by the API, while agents are replaced, nodes are lost, classes roll out
and control planes die.

What each replica shows is compared with the actual state:

- V1 a condition outlives agents and control planes: it does not flap while the device stays as it
is.
- V2 silence is never healthy: watched needs an accepted report younger than `report_stale`.
- V3 a suspicion ends within its limit, and confirmed states are shown: dead is offline, half-dead
is degraded.
- S6 no false offline, and no false degraded: only for a device that was so since it was registered.

Replay: ``python -m tests.simulation.outages --seed N``.
"""

from __future__ import annotations

import asyncio
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.core.acceptance import Acceptance, AcceptanceKind
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentState,
    Condition,
    ConditionState,
    DeviceRecord,
    Presence,
    Report,
    VerdictState,
)
from tests.simulation.cluster import Process
from tests.simulation.replica import Replica
from tests.simulation.simulator import (
    CONVERGES_S,
    Outcome,
    World,
    outcome_of,
    play,
    replay,
)

MISSES: Final = 3
SETTLES_S: Final = 60.0
"""For this time after a device has broken or recovered, a report from before may still be shown."""
CHECK_S: Final = 1.0
SUSPECT_S: Final = 30.0
SLACK_S: Final = 5.0
OK, HALF, DEAD = "ok", "half", "dead"
_TRUE: Final = {
    OK: VerdictState.WATCHED,
    HALF: VerdictState.DEGRADED,
    DEAD: VerdictState.OFFLINE,
}
_OF: Final = {HALF: ConditionState.DEGRADED, DEAD: ConditionState.OFFLINE}


@dataclass(slots=True)
class Mind:
    """What an agent knows of its device (a short form of
    `watchdog_agent.detection.failure_detector`)."""

    misses: int = 0
    answered: bool = False
    adopted: Condition | None = None

    def look(self, truth: str) -> tuple[AgentState, bool]:
        """One round of probes and its confirmation: the state, and whether it is confirmed."""
        if truth == OK:
            self.misses, self.answered, self.adopted = 0, True, None
            return AgentState.OK, False
        self.misses += 1
        if truth == HALF:
            self.answered = True
            return (AgentState.DEGRADED if self.misses >= MISSES else AgentState.SUSPECT), False
        taken = self.adopted is not None and self.adopted.state is ConditionState.OFFLINE
        if self.answered and (taken or self.misses >= MISSES):
            return AgentState.OFFLINE, True
        return AgentState.SUSPECT, False

    def adopt(self, condition: Condition) -> None:
        """Take over what a predecessor knew, unless the device has answered since."""
        if self.adopted is None and not self.answered:
            self.adopted = condition
            self.answered = condition.state is ConditionState.OFFLINE


class OutageWorld(World):
    """A world whose devices break, and whose agents may be refused by the API or unable to
    probe."""

    def __init__(self, seed: int, metrics: Metrics) -> None:
        super().__init__(seed, metrics)
        self.limits = replace(self.limits, suspect_max_s=SUSPECT_S)
        self.audit.limits = self.limits
        self.truth: dict[Slug, str] = defaultdict(lambda: OK)
        self.since: dict[Slug, float] = defaultdict(float)
        """When the actual state last changed."""
        self.ever: dict[Slug, set[str]] = defaultdict(lambda: {OK})
        self.refused: set[Slug] = set()
        """Devices whose agents' reports the API refuses: another key, a wrong token."""
        self.blind: set[str] = set()
        """Nodes whose agents can't probe: no resolver, no route."""
        self._heard: dict[tuple[str, Slug], float] = {}
        self._minds: dict[int, Mind] = {}
        store_written = self.store.on_write

        def written(before: DeviceRecord | None, after: DeviceRecord) -> None:
            store_written(before, after)
            if before is not None and before.condition != after.condition:
                self.audit.actions -= 1  # knowledge about a device, not an action
            self._check_write(before, after)

        self.store.on_write = written

    # -- agents ---------------------------------------------------------------------------------

    async def _report(self, process: Process, replica: Replica, sequence: int) -> Acceptance | None:
        slug, weather = process.slug, self.weather
        if weather.hits(weather.refused):
            return None
        if slug in self.refused:
            replica.fleet.reports.refused(401, slug, process.epoch)
            return None
        mind = self._minds.setdefault(process.pid, Mind())
        state, confirmed = AgentState.UNABLE, False
        if process.node not in self.blind:
            state, confirmed = mind.look(self.truth[slug])
        asked_at = self.audit.now()
        report = Report(
            process.device_id, slug, process.epoch, process.instance, sequence,
            ready=True, state=state, was_ready=mind.answered, misses=mind.misses,
            confirmed=confirmed, reason=f"the truth is {self.truth[slug]}", listen="", version="1",
        )  # fmt: skip
        fleet = replica.fleet
        answer = await replica.serve(fleet.reports.receive(report))
        if answer is not None and answer.kind is AcceptanceKind.ACCEPTED:
            self.audit.accepted(process, asked_at)
            self._heard[replica.name, slug] = self.audit.now()
        if weather.hits(weather.lost):
            return None
        if answer is not None and answer.kind is AcceptanceKind.ACCEPTED:
            known = fleet.reports.inherited(report)
            if known is not None:
                mind.adopt(known)
        return answer

    # -- faults ---------------------------------------------------------------------------------

    async def _trouble(self, ends: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(super()._trouble(ends))
            group.create_task(self._break(ends))
            looking = group.create_task(self._look())
            await asyncio.sleep(max(0.0, ends - asyncio.get_running_loop().time()))
            looking.cancel()

    async def _break(self, ends: float) -> None:
        loop = asyncio.get_running_loop()
        kinds = (self._turn, self._turn, self._turn, self._deaf, self._blind, self._upgrade)
        while loop.time() < ends:
            await asyncio.sleep(min(self.chance.expovariate(1 / 12), 30.0))
            chosen = self.chance.choice(kinds)
            await chosen()

    async def _turn(self) -> None:
        """A device breaks, or recovers."""
        self._become(
            slug_of(DeviceId(self.chance.choice(self.names))), self.chance.choice((OK, HALF, DEAD))
        )

    def _become(self, slug: Slug, truth: str) -> None:
        if self.truth[slug] == truth:
            return
        self.audit.trace.say(f"device {slug[:12]} is {truth}")
        self.truth[slug], self.since[slug] = truth, self.audit.now()
        self.ever[slug].add(truth)

    async def _deaf(self) -> None:
        """The key of the agents is replaced, for one device or for all, and perhaps restored."""
        slugs = {slug_of(DeviceId(name)) for name in self.names}
        if self.refused:
            self.refused = set()
        elif self.chance.random() < 0.5:
            self.refused = slugs
        else:
            self.refused = {self.chance.choice(sorted(slugs))}
        self.audit.trace.say(f"{len(self.refused)} agents are refused")

    async def _blind(self) -> None:
        """A node loses its resolver, or has it back."""
        self.blind ^= {self.chance.choice(list(self.cluster.nodes))}
        self.audit.trace.say(f"blind: {sorted(self.blind)}")

    # -- shown states ---------------------------------------------------------------------------

    def _check_write(self, before: DeviceRecord | None, after: DeviceRecord) -> None:
        slug, truth = after.slug, self.truth[after.slug]
        lasts = self.audit.now() - self.since[slug] > SETTLES_S
        had = before is not None and before.condition is not None
        if had and after.condition is None and after.presence is Presence.PRESENT:
            self.audit.trace.say(f"registry: the condition of {after.device.id} ends")
            if lasts and truth != OK:
                self.audit.broken(
                    "V1", f"{after.device.id} is {truth}, and its condition was ended"
                )

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            for replica in self.replicas:
                if replica.up:
                    self._check(replica)

    def _check(self, replica: Replica) -> None:
        fleet, now = replica.fleet, self.audit.now()
        for slug, record in list(fleet.records.items()):
            fleet.verdicts.refresh(slug)  # as the API does before it reads
            view = fleet.views.device(slug)
            if view is None or record.presence is not Presence.PRESENT:
                continue
            state, truth = view.verdict.state, self.truth[slug]
            what = f"{replica.name} shows {record.device.id} as {state}, which is {truth}"
            for false, real in ((VerdictState.OFFLINE, DEAD), (VerdictState.DEGRADED, HALF)):
                if state is false and real not in self.ever[slug]:
                    self.audit.broken("S6", f"{what} and never was {real}")
            heard = self._heard.get((replica.name, slug), float("-inf"))
            if state is VerdictState.WATCHED and now - heard > self.limits.report_stale_s + SLACK_S:
                self.audit.broken("V2", f"{what}; its last report came {now - heard:.0f} s ago")
            if state is VerdictState.SUSPECT and view.since_s > SUSPECT_S + SLACK_S:
                self.audit.broken("V3", f"{what}, for {view.since_s:.0f} s")
            kept = record.condition
            lasts = now - self.since[slug] > SETTLES_S
            known = kept is not None and lasts and _OF.get(truth) is kept.state
            if known and kept is not None and state is not _TRUE[truth]:
                self.audit.broken("V1", f"{what}; the registry says {kept.state}")

    # -- the end --------------------------------------------------------------------------------

    async def _calm(self) -> None:
        self.refused, self.blind = set(), set()
        await super()._calm()

    async def _converge(self) -> None:
        """All is as requested, and shown correctly: what broke while all was calm is offline, or
        degraded."""
        await super()._converge()
        slugs = [slug for slug, present in self.wanted.items() if present]
        for truth in (OK, DEAD, HALF, DEAD, OK):
            for slug in slugs:
                self._become(slug, truth)
            await self._shown(slugs, truth)

    async def _shown(self, slugs: list[Slug], truth: str) -> None:
        loop = asyncio.get_running_loop()
        ends = loop.time() + CONVERGES_S
        while wrong := self._untrue(slugs, truth):
            if loop.time() > ends:
                self.audit.broken("V3", f"all devices are {truth}, and {'; '.join(wrong[:3])}")
                return
            await asyncio.sleep(CHECK_S)
            for replica in self.replicas:
                if replica.up:
                    self._check(replica)

    def _untrue(self, slugs: list[Slug], truth: str) -> list[str]:
        """The states that are shown or stored incorrectly."""
        wrong = [
            f"{replica.name} shows {slug[:12]} as {view.verdict.state}"
            for replica in self.replicas
            for slug in slugs
            if replica.up
            and (view := replica.fleet.views.device(slug)) is not None
            and view.verdict.state is not _TRUE[truth]
        ]
        for slug in slugs:
            record = self.store.record(slug)
            stored = record.condition if record is not None else None
            if (stored.state if stored is not None else None) is not _OF.get(truth):
                wrong.append(f"the registry has {stored} of {slug[:12]}")
        return wrong


def run_seed(seed: int, metrics: Metrics | None = None) -> Outcome:
    """One simulated history with outages. The same seed gives the same digest."""
    return outcome_of(seed, play(seed, lambda: OutageWorld(seed, metrics or Metrics())))


if __name__ == "__main__":
    sys.exit(replay("tests.simulation.outages", run_seed))

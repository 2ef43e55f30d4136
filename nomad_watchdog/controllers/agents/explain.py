"""What the loop is about to do, and what is in its way: for `status`, `explain` and verdicts. Reads only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.controllers import rollout_words
from nomad_watchdog.controllers.agents.executor import ActionExecutor
from nomad_watchdog.controllers.agents.placement_informer import PlacementInformer
from nomad_watchdog.controllers.agents.plan_builder import PlanBuilder
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.controllers.agents.workqueue import WorkQueue
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import (
    DeviceRecord,
    Placement,
    PlacementState,
    Presence,
    Unheard,
    VerdictState,
)
from nomad_watchdog.replicas.leases import Lease, Leases
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import waiting

_IDLE: Final = "nothing to do: the agent is running and ready"


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """The parts of one reconciler, and what it decided last."""

    fleet: Fleet
    backend: str
    classes: PreparedClasses
    queue: WorkQueue[Slug, Action]
    executor: ActionExecutor
    informer: PlacementInformer
    leases: Leases
    ownership: ShardOwnership
    plan_builder: PlanBuilder
    migrations: MigrationController

    @property
    def breaker(self) -> MassStopBreaker:
        """What is on hold."""
        return self.plan_builder.breaker

    def obstacle(self, slug: Slug) -> str:
        """Why this device can't have an agent now, in words; "" = nothing is in the way."""
        record = self.fleet.records.get(slug)
        if record is not None and (why := self.classes.unprepared.get(record.device.agent_class)):
            every = f"{self.fleet.limits.resync_s:g} s"
            name = record.device.agent_class
            return f"agent class {name!r} can't be prepared: {why}; it is tried again every {every}"
        if record is not None and record.device.agent_class not in self.classes.hashes:
            known = ", ".join(sorted(self.classes.hashes))
            return f"agent class {record.device.agent_class!r} is not configured; known: {known}"
        homes = self.migrations.homes()
        if record is not None and not homes.is_known(record):
            return (
                f"its agent lives on {homes.of(record)}, which is neither `backend` nor part of a "
                "migration: move it with `nomad-watchdog migrate`"
            )
        return self.executor.obstacles.get(slug, "") or self.plan_builder.capacity.no_room

    def status(self) -> dict[str, object]:
        """The loop's part of the status."""
        return {
            "backend": self.backend,
            "queue": len(self.queue),
            "in_work": self.queue.in_work,
            "breaker": {
                "held": len(self.breaker.held),
                "reason": self.breaker.reason,
                "id": self.breaker.held_id,
                "next": self.breaker.next_step,
            },
            "unprepared_classes": dict(self.classes.unprepared),
            "waiting_rollout": self.plan_builder.last.waiting_rollout,
            "starts_held": self.plan_builder.capacity.no_room or self._waiting(),
            "replica": self.leases.replica,
            "holds": f"{len(self.leases.terms())} of {self.leases.shards} shards",
            "leases": self.leases.problem,
        }

    def _waiting(self) -> str:
        """How many agents wait for a node, and why, in words; "" = none."""
        found = (one for some in self.fleet.placements.values() for one in some)
        return waiting(
            [one.reason for one in found if one.queued and one.state is not PlacementState.DEAD]
        )

    def explain(self, slug: Slug) -> dict[str, object]:
        """What comes next for one device, and when."""
        wait_s = self.queue.wait_s(slug)
        held = any(stop[0] == slug for stop in self.breaker.held)
        lease = self.leases.all()[self.ownership.shard(slug)]
        if not self.leases.current:
            lease = replace(lease, holder="", api="")
        rollout = self._rollout(slug)
        next_ = self._next(slug, lease)
        if held:
            next_ = f"held: {self.breaker.reason}; {self.breaker.next_step}"
        elif next_ == _IDLE and rollout:
            next_ = rollout
        return {
            "next": next_,
            "next_in_s": round(wait_s, 1) if wait_s > 0 else None,
            "shard": lease.shard,
            "holder": lease.holder,
            "next_resync_in_s": round(self.informer.until_resync_s, 1),
            **self._home(slug),
            **({"rollout": rollout} if rollout else {}),
        }

    def _home(self, slug: Slug) -> dict[str, object]:
        """Where the agent lives and should live, in a fleet that was ever migrated."""
        homes, record = self.migrations.homes(), self.fleet.records.get(slug)
        if record is None or not (home := homes.of(record)):
            return {}
        return {"home": home, "should_live_on": homes.goal(record)}

    def _rollout(self, slug: Slug) -> str:
        """What the roll-out of its class means for a device; "" = nothing."""
        record = self.fleet.records.get(slug)
        if record is None:
            return ""
        return rollout_words.of_device(self.classes.rollouts, self.fleet, record)

    def _next(self, slug: Slug, lease: Lease) -> str:
        """What happens next for a device, and what it waits for; never empty."""
        if (
            self.fleet.readiness.registry_gone
        ):  # and the leases with it, if they are in the same store
            return "nothing until the registry is back; its agent goes on (see `status`)"
        if lease.shard not in self.leases.terms():
            return (
                f"decided by {lease.holder}, who holds its shard"
                if lease.holder
                else "nothing until a replica takes its shard; no replica holds it now"
            )
        if slug in self.fleet.records.unreadable:
            return "nothing until its registry record can be read; its agent is left as it is"
        expected = self.executor.expectations.get(slug)
        if expected is not None:
            return (
                f"the agent of epoch {expected.epoch} has been started; waiting until the scheduler "
                "lists it"
            )
        if self.queue.is_active(slug):
            return "an action is under way"
        if resting := self._resting(slug):
            return resting
        if blind := self.migrations.blind():
            return blind
        record = self.fleet.records.get(slug)
        found = self.fleet.placements.get(slug, ())
        steps = list(
            planner.decide(record, found, self.plan_builder.goals())
            if record is not None
            else planner.decide_stray(found)
        )
        if not steps:
            return self._waits(record, found)
        return "; ".join(
            f"{step.kind.value}: {step.reason}{self._held_back(step)}" for step in steps
        )

    def _resting(self, slug: Slug) -> str:
        """Why nothing is done for a device now, and until when; "" = something may be."""
        fleet = self.fleet
        record = fleet.records.get(slug)
        pause = fleet.presence.pause_of(record) if record is not None else None
        if pause is not None:
            left = "" if pause.ends is None else f", in {pause.ends - fleet.clock.wall():.0f} s"
            return f"nothing until the pause {pause.id} ends{left or ' (`nomad-watchdog resume`)'}"
        kept = fleet.presence.kept_for(slug)
        return f"its agent is stopped unless the device comes back: {kept}" if kept else ""

    def _held_back(self, step: Action) -> str:
        """Why this step is not taken at once, in words; "" = it is."""
        now = self.fleet.clock.monotonic()
        wait_s = self.queue.wait_s(step.slug)
        if wait_s > 0 and (why := self.executor.obstacles.get(step.slug)):
            return f"; {why}; next try in {wait_s:.0f} s"
        if wait_s > 0:
            return f"; it was started often lately: not before {wait_s:.0f} s from now"
        if step.kind is ActionKind.START and (
            full := self.plan_builder.capacity.no_room
            or self.plan_builder.capacity.full.get(step.home)
        ):
            return f"; waits for room: {full}"
        if step.kind is ActionKind.REPLACE and (waits := self.plan_builder.waits(step)):
            return f"; {waits}"
        circuits = (self.executor.circuit, self.executor.registry_circuit)
        if refused := max(one.wait_s(now) for one in circuits):
            return f"; the server refuses calls for all devices: next try in {refused:.0f} s"
        if self.informer.freshness.premature(step):
            return "; after the next read of the scheduler"
        return ""

    def _waits(self, record: DeviceRecord | None, found: tuple[Placement, ...]) -> str:
        """What is waited for where no action is to be taken."""
        live = [one for one in found if one.state is not PlacementState.DEAD]
        if record is None or record.presence is Presence.ABSENT:
            return (
                "its agent is being stopped; nothing after that"
                if live
                else "nothing: the device has left"
            )
        name = record.device.agent_class
        if name in self.classes.unprepared:
            rest = "its agent goes on as it is" if live else "it gets an agent then"
            return f"nothing until agent class {name!r} can be prepared ({self.classes.unprepared[name]}); {rest}"
        if name not in self.classes.hashes:
            rest = "its agent goes on as it is" if live else "it gets an agent then"
            return f"nothing until agent class {name!r} is configured; {rest}"
        agent = next((one for one in live if one.epoch == record.epoch), live[0] if live else None)
        if agent is None:
            return "an agent is started with the next pass"
        if agent.state is PlacementState.RUNNING:
            return self._of_running(record, agent)
        return self._of_scheduler(record, agent)

    def _of_scheduler(self, record: DeviceRecord, agent: Placement) -> str:
        """What the scheduler does next with an agent that does not run."""
        why = f": {agent.reason}" if agent.reason else ""
        match agent.state:
            case PlacementState.STOPPING:
                return "the old agent is being stopped; then a new one is started"
            case PlacementState.LOST:
                node = agent.node or "its node"
                return (
                    f"waiting for the scheduler: {node} does not answer, and a new agent is started when the "
                    f"old one is known to be gone{why}"
                )
            case PlacementState.RESTARTING:
                return f"the scheduler restarts the agent{why}{self._patience(agent)}"
            case PlacementState.PENDING:
                waiting = "waiting until the scheduler finds a node for the agent"
                return f"{waiting}{why}{self._patience(agent)}"
            case _:
                return f"{self._until_ready(record, agent.state)}{self._patience(agent)}"

    def _of_running(self, record: DeviceRecord, agent: Placement) -> str:
        """What follows for a device whose agent is running."""
        judged = self.fleet.verdicts.last(record.slug)[0]
        if judged.unheard is Unheard.REFUSED:
            return (
                "nothing until a report of the agent is accepted: fix what the reason names; "
                "`nomad-watchdog doctor` checks the way of the reports (docs/runbooks.md, AgentsUnheard)"
            )
        if refused := self.fleet.verdicts.refused(record.slug):
            return (
                f"the agent's reports are refused: {refused}; if none is accepted within "
                f"{self.fleet.limits.report_stale_s:g} s after the last one, the device is unwatched"
            )
        if self.fleet.agents.has_ready_agent(record.slug):
            next_ = self._of_device(judged.state, agent.node)
        else:
            next_ = self._until_ready(record, agent.state)
        if not agent.reason:
            return next_ or _IDLE
        return f"{agent.reason}; {next_}" if next_ else agent.reason

    def _patience(self, agent: Placement) -> str:
        return f"; {then}" if (then := self.plan_builder.patience(agent)) else ""

    def _of_device(self, state: VerdictState, node: str) -> str:
        """What follows for a device whose agent is running and ready; "" = nothing."""
        match state:
            case VerdictState.SUSPECT:
                return (
                    "the agent confirms the misses by another path; within "
                    f"{self.fleet.limits.suspect_max_s:.0f} s (agents.suspect_max, longer for slow probes) the "
                    "device becomes watched, degraded, offline or unwatched"
                )
            case VerdictState.REPAIRING:
                return "the agent runs a repair step, and then reports whether the device answers"
            case VerdictState.DEGRADED:
                return (
                    "the agent goes on probing until the device is well; fix what the reason names"
                )
            case VerdictState.OFFLINE:
                return (
                    "the agent goes on probing until the device answers; check the device, its power "
                    "and its network"
                )
            case VerdictState.UNWATCHED:
                host = f"{node}, the host of the agent" if node else "the agent's host"
                return (
                    "the agent goes on trying; check what the reason names on "
                    f"{host}, the device's address and the probes of its class"
                )
        return ""

    def _until_ready(self, record: DeviceRecord, state: PlacementState) -> str:
        fleet = self.fleet
        placed_at = fleet.recorder.dispatched_at(record)
        grace_s = fleet.recorder.grace(record).seconds
        left_s = 0.0 if placed_at is None else placed_at + grace_s - fleet.clock.monotonic()
        waiting = f"waiting for the agent to report that it is ready (it is {state.value})"
        if placed_at is None:
            return f"{waiting}: this replica did not start it, and no report of it has come since"
        if left_s > 0:
            return f"{waiting}; if it is not within {left_s:.0f} s, the device counts as unwatched"
        return f"{waiting}; its start-up grace of {grace_s:.0f} s is over: see `nomad-watchdog agents logs`"

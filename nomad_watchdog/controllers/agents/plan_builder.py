"""What the views of this moment call for: a plan over the shards that are ours, and what it holds back (S7).

No I/O: the views are the fleet's, and `core.planner` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nomad_watchdog.controllers.agents.capacity import CapacityMonitor
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.controllers.held_changes import report_hold
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.controllers.rollout_words import announced
from nomad_watchdog.core import planner, rollout
from nomad_watchdog.core.actions import Action, ActionKind, Move
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.holds import STOPS
from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker
from nomad_watchdog.core.moves import Requested, combined
from nomad_watchdog.core.planner import Plan, Stop
from nomad_watchdog.core.report_addresses import Reachability
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.core.stuck_placements import StuckPlacements
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.serializers import plan_json
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Placement, PlacementState, Presence, VerdictState
from nomad_watchdog.replicas.ownership import ShardOwnership


@dataclass(slots=True)
class PlanBuilder:
    """The plans of one reconciler."""

    fleet: Fleet
    ownership: ShardOwnership
    classes: PreparedClasses
    metrics: Metrics
    migrations: MigrationController
    capacity: CapacityMonitor
    breaker: MassStopBreaker = field(default_factory=MassStopBreaker)
    waiting: StuckPlacements = field(default_factory=StuckPlacements)
    """How long placements have made no progress."""
    last: Plan = field(default_factory=lambda: Plan(()))
    """The plan of the last pass."""
    sources: list[Callable[[], Requested]] = field(default_factory=list)
    """Controllers that ask for placements to be left."""
    is_active: Callable[[Slug], bool] = lambda _slug: False
    """Whether an action of a device has begun."""
    in_hand: Callable[[], Sequence[Action]] = list
    """The actions that have begun."""

    def make(self, confirmed: frozenset[Stop]) -> Plan:
        """Decide for every device of ours; the `confirmed` stops are not held."""
        fleet = self.fleet
        records, placements = self.ownership.of(fleet.records), self.ownership.of(fleet.placements)
        resting = (
            fleet.presence.resting() | fleet.records.unreadable | self.migrations.unsure(records)
        )
        readiness = Readiness(
            fleet.agents.unready(),
            fleet.agents.is_stuck,
            self.classes.rollouts.soaking(),
            self.classes.rollouts.halted() | self.classes.behind(),
            ready=fleet.agents.has_ready_agent,
            in_work=self.is_active,
            leaving=frozenset(
                one.slug
                for one in self.in_hand()
                if one.kind is ActionKind.REPLACE and fleet.agents.has_ready_agent(one.slug)
            ),
            unwell=lambda slug: fleet.verdicts.last(slug)[0].state is not VerdictState.WATCHED,
        )
        readiness = self.migrations.with_moves(
            readiness, self.migrations.homes(), resting, self.classes.hashes
        )
        return planner.plan(
            records,
            placements,
            self.goals(),
            fleet.limits,
            readiness=readiness,
            confirmed=confirmed,
            resting=resting,
            stalled_room=0 if self.capacity.no_room else self._stalled_room(),
        )

    def goals(self) -> Goals:
        """What the agents should be now."""
        return Goals(
            self.classes.hashes,
            trials=self.classes.trials(),
            given_up=self.classes.rollouts.given_up(),
            homes=self.migrations.homes(),
            changes=self.classes.changes,
            stalled=self.stalled,
            reach=self.reach(),
            requested=self.requested(),
        )

    def requested(self) -> Requested:
        """The placements that controllers ask to leave."""
        return combined(*(source() for source in self.sources))

    def stalled(self, placement: Placement) -> str:
        """Why a placement that waits is given up, in words; "" = it is not, or not yet."""
        now, most_s = self.fleet.clock.monotonic(), self._start_max_s(placement)
        if not self.waiting.is_stalled(placement, most_s, now):
            return ""
        waited, limit = (
            round(self.waiting.lasts_s(placement, now)),
            self.waiting.limit_s(placement, most_s),
        )
        where = f" on {placement.node}" if placement.node else ""
        why = f": {placement.reason}" if placement.reason else ""
        return (
            f"the agent has been {placement.state.value}{where} for {waited} s without progress, longer than "
            f"{limit:.0f} s (agents.start_max){why}"
        )

    def stalls(self) -> int:
        """Placements of ours that wait for longer than they may."""
        found = self.ownership.of(
            {s: self.fleet.placements.get(s, ()) for s in self.waiting.slugs()}
        )
        return sum(bool(self.stalled(one)) for some in found.values() for one in some)

    def patience(self, placement: Placement) -> str:
        """What follows if a placement that waits makes no progress, in words; "" = nothing."""
        now, most_s = self.fleet.clock.monotonic(), self._start_max_s(placement)
        if not most_s or placement.queued:
            return ""
        left_s = self.waiting.limit_s(placement, most_s) - self.waiting.lasts_s(placement, now)
        return f"without progress for {max(0.0, left_s):.0f} s more the next epoch is started"

    def _start_max_s(self, placement: Placement) -> float:
        fleet, record = self.fleet, self.fleet.records.get(placement.slug)
        most_s = fleet.limits.start_max_s
        if not most_s or record is None:
            return most_s
        grace = fleet.recorder.grace(record)
        return most_s if grace.source == "setting" else max(most_s, grace.seconds)

    def _stalled_room(self) -> int:
        fleet = self.fleet
        most = rollout.window(self._present(), fleet.limits)
        return self.waiting.room(most, fleet.limits.start_max_s, fleet.clock.monotonic())

    def _present(self) -> int:
        return sum(r.presence is Presence.PRESENT for r in self.fleet.records.values())

    def waits_for_room(self) -> bool:
        """Whether the last pass made fewer starts than it wanted."""
        return bool(self.capacity.is_short() or self.last.waiting_rollout or self.stalls())

    def reach(self) -> Reachability:
        """The addresses of running replicas, and the devices whose agents do not report."""
        addresses = self.classes.addresses.complete()
        return Reachability(addresses or frozenset(), self.fleet.verdicts.totals.silent)

    def waits(self, action: Action) -> str:
        """Why a replacement is not in the last plan, in words; "" = it is."""
        plan = self.last
        if any(one.slug == action.slug for one in plan.actions):
            return ""
        if action.move is Move.STRANDED and not plan.held:
            return ""
        fleet, name = self.fleet, action.placement.agent_class if action.placement else ""
        if plan.held:
            return "waits: no agent is replaced while stops are held"
        if action.waits_for:
            return f"waits: {action.waits_for}"
        if action.move is Move.STALLED:
            if full := self.capacity.no_room:
                return f"waits for room: {full}"
            most, every_s = rollout.window(self._present(), fleet.limits), fleet.limits.start_max_s
            return (
                f"waits for its turn: at most {most} waiting agents are given up in {every_s:.0f} s"
            )
        if name in self.classes.rollouts.halted():
            return f"waits: the roll-out of class {name} is halted, see `nomad-watchdog status`"
        if name in self.classes.behind():
            return f"waits until the scheduler is prepared for class {name}"
        most, unready = rollout.window(self._present(), fleet.limits), fleet.agents.unready()
        soaking = self.classes.rollouts.soaking()
        soak = f", {soaking} soak" if soaking else ""
        return (
            f"waits for its turn: {len(plan.waiting)} devices wait, {most} at a time, "
            f"{unready} have no ready agent now{soak}"
        )

    def hold(self, plan: Plan) -> None:
        """Hold what this plan holds, and say so when that begins."""
        was = bool(self.breaker.held)
        self.breaker.update(plan, self.fleet.records)
        if was != bool(plan.held):
            self.metrics.breaker_held(held=not was)
        if plan.held and not was:
            report_hold(self.fleet, STOPS, plan.hold_reason)

    def view(self) -> dict[str, object]:
        """What the next pass would do, for the API and the CLI."""
        return self.shown(self.make(self.breaker.confirmed))

    def shown(self, plan: Plan) -> dict[str, object]:
        """A plan as JSON."""
        fleet = self.fleet
        shown = plan_json(
            plan,
            fleet.records.index,
            fleet.placements,
            window=rollout.window(self._present(), fleet.limits),
            changes=self.classes.changes,
        )
        return shown | {
            "specs": self.classes.rollouts.configured_hashes(),
            "not_in_force": list(self.classes.in_force.differences()),
            "preparing": sorted(self.classes.behind()),
            "staged": list(announced(self.classes.rollouts, self.classes.changes)),
            "unprepared_classes": dict(self.classes.unprepared),
            "unplaced": self._unplaced(),
        }

    def _unplaced(self) -> int:
        """Present devices of ours without a running agent at the registry's epoch, but for those that are
        left alone."""
        fleet = self.fleet
        resting = fleet.presence.resting()
        return sum(
            record.presence is Presence.PRESENT
            and slug not in resting
            and not any(
                one.epoch == record.epoch and one.state is PlacementState.RUNNING
                for one in fleet.placements.get(slug, ())
            )
            for slug, record in self.ownership.of(fleet.records).items()
        )

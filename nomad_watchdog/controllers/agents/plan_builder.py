"""What the views of this moment call for: a plan over the shards that are ours, and what it holds back (S7).

No I/O: the views are the fleet's, and `core.planner` decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nomad_watchdog.controllers.held_changes import report_hold
from nomad_watchdog.controllers.migration import MigrationController
from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.core import planner, rollout
from nomad_watchdog.core.actions import Action
from nomad_watchdog.core.holds import STOPS
from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker
from nomad_watchdog.core.planner import Changes, Plan, Stop, no_words
from nomad_watchdog.core.report_addresses import UNKNOWN, Reachability
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.core.stuck_placements import StuckPlacements
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.serializers import plan_json
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Placement, PlacementState, Presence
from nomad_watchdog.replicas.ownership import ShardOwnership


@dataclass(slots=True)
class PlanBuilder:
    """The plans of one reconciler."""

    fleet: Fleet
    ownership: ShardOwnership
    rollouts: RolloutController
    specs: Mapping[str, AgentSpec]
    """By class, those that the scheduler was last asked to be prepared for."""
    hashes: Mapping[str, str]
    """By class, of the versions that the scheduler is prepared for."""
    unprepared: Mapping[str, str]
    """Agent class → why it can't be prepared."""
    metrics: Metrics
    migrations: MigrationController
    changes: Changes = no_words
    """What the spec of a class changes for agents of another hash, in words."""
    breaker: MassStopBreaker = field(default_factory=MassStopBreaker)
    waiting: StuckPlacements = field(default_factory=StuckPlacements)
    """How long placements have made no progress."""
    no_room: Callable[[], str] = lambda: ""
    """Why no start is made now, in words; "" when there is room."""
    differs: Callable[[], Sequence[str]] = tuple
    """Classes that are configured here otherwise than they are in force."""
    reach: Callable[[], Reachability] = lambda: UNKNOWN

    def make(self, confirmed: frozenset[Stop]) -> Plan:
        """Decide for every device of ours; the `confirmed` stops are not held."""
        fleet = self.fleet
        records, placements = self.ownership.of(fleet.records), self.ownership.of(fleet.placements)
        homes = self.migrations.homes()
        resting = (
            fleet.presence.resting() | fleet.records.unreadable | self.migrations.unsure(records)
        )
        readiness = Readiness(
            fleet.verdicts.unready(),
            fleet.verdicts.is_stuck,
            self.rollouts.soaking(),
            self.rollouts.halted() | self.behind_rollouts(),
            ready=fleet.verdicts.has_ready_agent,
        )
        readiness = self.migrations.with_moves(readiness, homes, resting, self.hashes)
        return planner.plan(
            records,
            placements,
            self.hashes,
            fleet.limits,
            readiness=readiness,
            confirmed=confirmed,
            resting=resting,
            homes=homes,
            changes=self.changes,
            stalled=self.stalled,
            stalled_room=0 if self.no_room() else self._stalled_room(),
            reach=self.reach(),
        )

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

    def behind_rollouts(self) -> frozenset[str]:
        """Classes with another version in force than the one that the scheduler was asked to be prepared for,
        and those that are no longer configured. One that it refused is not among them."""
        specs, asked = self.rollouts.specs(), self.specs
        new = {n for n, s in specs.items() if n not in asked or asked[n].spec_hash != s.spec_hash}
        return frozenset(new | (asked.keys() - specs.keys()))

    def waits(self, action: Action, plan: Plan) -> str:
        """Why a replacement is not in this plan, in words; "" = it is."""
        if any(one.slug == action.slug for one in plan.actions):
            return ""
        if action.at_once and not plan.held:
            return ""
        fleet, name = self.fleet, action.placement.agent_class if action.placement else ""
        if plan.held:
            return "waits: no agent is replaced while stops are held"
        if action.stalled:
            if full := self.no_room():
                return f"waits for room: {full}"
            most, every_s = rollout.window(self._present(), fleet.limits), fleet.limits.start_max_s
            return (
                f"waits for its turn: at most {most} waiting agents are given up in {every_s:.0f} s"
            )
        if name in self.rollouts.halted():
            return f"waits: the roll-out of class {name} is halted, see `nomad-watchdog status`"
        if name in self.behind_rollouts():
            return f"waits until the scheduler is prepared for class {name}"
        most, unready = rollout.window(self._present(), fleet.limits), fleet.verdicts.unready()
        soaking = self.rollouts.soaking()
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
            changes=self.changes,
        )
        return shown | {
            "specs": self.rollouts.wished(),
            "not_in_force": list(self.differs()),
            "preparing": sorted(self.behind_rollouts()),
            "unprepared_classes": dict(self.unprepared),
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

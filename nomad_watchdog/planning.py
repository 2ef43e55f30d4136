"""What the views of this moment call for: a plan over the shards that are ours, and what it holds back (S7).

No I/O: the views are the fleet's, and `core.planner` decides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from nomad_watchdog.breaker import Breaker
from nomad_watchdog.core import planner
from nomad_watchdog.core.planner import Plan, Stop
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.migrations import Migrations
from nomad_watchdog.rollouts import Rollouts
from nomad_watchdog.shown import shown_plan
from nomad_watchdog.territory import Territory

log = logging.getLogger(__name__)


class Planning:
    """The plans of one reconciler."""

    def __init__(
        self,
        fleet: Fleet,
        territory: Territory,
        rollouts: Rollouts,
        hashes: Mapping[str, str],
        metrics: Metrics,
        migrations: Migrations,
    ) -> None:
        self.fleet = fleet
        self.territory = territory
        self.rollouts = rollouts
        self.hashes = hashes
        """By class, of the versions that the scheduler is prepared for."""
        self.metrics = metrics
        self.migrations = migrations
        self.breaker = Breaker()

    def make(self, confirmed: frozenset[Stop]) -> Plan:
        """Decide for every device of ours; the `confirmed` stops are not held."""
        fleet = self.fleet
        records, placements = self.territory.of(fleet.records), self.territory.of(fleet.placements)
        homes = self.migrations.homes()
        resting = fleet.resting() | fleet.unreadable | self.migrations.unsure(records)
        readiness = Readiness(
            fleet.unready(),
            fleet.is_stuck,
            self.rollouts.soaking(),
            self.rollouts.halted() | self.behind_rollouts(),
        )
        if homes is not None:
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
        )

    def behind_rollouts(self) -> frozenset[str]:
        """Classes with another version in force than the one that is planned with."""
        specs = self.rollouts.specs().items()
        return frozenset(name for name, spec in specs if self.hashes[name] != spec.spec_hash)

    def hold(self, plan: Plan) -> None:
        """Hold what this plan holds, and say so when that begins."""
        was = bool(self.breaker.held)
        self.breaker.settle(plan, self.fleet.records)
        if was != bool(plan.held):
            self.metrics.breaker_held(held=not was)
        if plan.held and not was:
            log.error("stops held", extra={"reason": plan.hold_reason})
            self.fleet.history.add(
                at=self.fleet.clock.wall(),
                kind="breaker.held",
                device_id="",
                slug=Slug(""),
                text=plan.hold_reason,
                data={},
            )

    def view(self) -> dict[str, object]:
        """What the next pass would do, for the API and the CLI."""
        plan = self.make(self.breaker.confirmed)
        return shown_plan(plan, self.fleet.index, self.fleet.placements)

"""What the loop is about to do, and what is in its way: for `status`, `explain` and verdicts. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nomad_watchdog.breaker import Breaker
from nomad_watchdog.core import planner
from nomad_watchdog.core.migration import Homes
from nomad_watchdog.core.planner import Plan
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.informer import Informer
from nomad_watchdog.leases import Lease, Leases
from nomad_watchdog.model import Action
from nomad_watchdog.performer import Performer
from nomad_watchdog.territory import Territory
from nomad_watchdog.workqueue import WorkQueue


@dataclass(frozen=True, slots=True)
class Outlook:
    """The parts of one reconciler, and what it decided last."""

    fleet: Fleet
    backend: str
    hashes: Mapping[str, str]
    queue: WorkQueue[Slug, Action]
    performer: Performer
    breaker: Breaker
    informer: Informer
    leases: Leases
    territory: Territory
    last_plan: Callable[[], Plan]
    no_room: Callable[[], str]
    """Why no start is made now, in words; "" when there is room."""
    homes: Callable[[], Homes | None] = lambda: None
    blind: Callable[[], str] = lambda: ""
    """Why nothing is decided for any device now, in words; "" when that is not so."""

    def obstacle(self, slug: Slug) -> str:
        """Why this device can't have an agent now, in words; "" = nothing is in the way."""
        record = self.fleet.records.get(slug)
        if record is not None and record.device.agent_class not in self.hashes:
            known = ", ".join(sorted(self.hashes))
            return f"agent class {record.device.agent_class!r} is not configured; known: {known}"
        homes = self.homes()
        if homes is not None and record is not None and not homes.is_known(record):
            return (
                f"its agent lives on {homes.of(record)}, which is neither `backend` nor part of a "
                "migration: move it with `nomad-watchdog migrate`"
            )
        return self.performer.obstacles.get(slug, "") or self.no_room()

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
            },
            "waiting_rollout": self.last_plan().waiting_rollout,
            "starts_held": self.no_room(),
            "replica": self.leases.replica,
            "holds": f"{len(self.leases.terms())} of {self.leases.shards} shards",
            "leases": self.leases.problem,
        }

    def explain(self, slug: Slug) -> dict[str, object]:
        """What comes next for one device, and when."""
        wait_s = self.queue.wait_s(slug)
        held = any(stop[0] == slug for stop in self.breaker.held)
        lease = self.leases.all()[self.territory.shard(slug)]
        return {
            "next": f"held: {self.breaker.reason}; {self.breaker.mend}"
            if held
            else self._next(slug, lease),
            "next_in_s": round(wait_s, 1) if wait_s > 0 else None,
            "shard": lease.shard,
            "holder": lease.holder,
            "next_resync_in_s": round(self.informer.until_resync_s, 1),
            **self._home(slug),
        }

    def _home(self, slug: Slug) -> dict[str, object]:
        """Where the agent lives and should live, in a fleet that was ever moved."""
        homes, record = self.homes(), self.fleet.records.get(slug)
        if homes is None or record is None:
            return {}
        return {"home": homes.of(record), "should_live_on": homes.goal(record)}

    def _next(self, slug: Slug, lease: Lease) -> str:
        if lease.shard not in self.leases.terms():
            return f"decided by {lease.holder or 'nobody at the moment'}, who holds its shard"
        expected = self.performer.expectations.get(slug)
        if expected is not None:
            return f"waiting for a snapshot that shows epoch {expected.epoch}"
        if self.queue.is_active(slug):
            return "an action is under way"
        if self.fleet.is_resting(slug):
            return "nothing: it is paused, or its agent waits for it (see attendance)"
        if blind := self.blind():
            return blind
        record = self.fleet.records.get(slug)
        found = self.fleet.placements.get(slug, ())
        steps = list(
            planner.decide(record, found, self.hashes, self.homes())
            if record is not None
            else planner.decide_stray(found)
        )
        return "; ".join(f"{step.kind.value}: {step.reason}" for step in steps) or "nothing to do"

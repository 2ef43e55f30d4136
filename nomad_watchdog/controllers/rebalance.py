"""Carries out a rebalance: the leader decides which agents leave their hosts, and stores that in the registry.

Every replica reads the document, and asks its planner to replace the agents of its own shards that the document names. So
there are never more moves in progress than the leader has allowed, however many replicas there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Final

from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.controllers.rebalance_state import FORMAT, rebalance_json
from nomad_watchdog.core import rebalance, rollout
from nomad_watchdog.core.host_balance import plan_moves
from nomad_watchdog.core.moves import NONE_REQUESTED, Requested
from nomad_watchdog.core.rebalance import AgentsByHost, Conditions, Rebalance
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.hosts import HostWatcher
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import DeviceRecord, Monotonic, Presence, VerdictState
from nomad_watchdog.registry.document import Document
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler, open_hosts

log = logging.getLogger(__name__)

IDLE_S: Final = 5.0
"""Interval at which the document is read while no rebalance is in progress, seconds; else it is read at each poll."""
PATIENCE_S: Final = 60.0
"""Time without any move after which a rebalance ends although devices might become healthy and be moved later, seconds."""
_LONG_AGO: Final = Monotonic(float("-inf"))


class RebalanceController:
    """The rebalance of one fleet."""

    def __init__(  # the parts of one reconciler
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        ownership: ShardOwnership,
        classes: PreparedClasses,
        metrics: Metrics,
        hosts: HostWatcher,
    ) -> None:
        self.problem = ""
        """Why the document or the hosts can't be read now."""
        self._fleet = fleet
        self._scheduler = scheduler
        self._ownership = ownership
        self._classes = classes
        self._metrics = metrics
        self._hosts = hosts
        self._document = Document(fleet.registry, FORMAT)
        self._read_at = _LONG_AGO
        self._moved_at = _LONG_AGO
        """When the last change of the rebalance was seen."""
        self._waiting = 0
        """Number of further moves that are needed, as the leader last saw it."""
        fleet.views.add_status(self.status)

    @property
    def now(self) -> Rebalance | None:
        """The last rebalance as last read; None = there was none."""
        return self._document.value

    @property
    def steers(self) -> bool:
        """Whether the scheduler prefers hosts with few agents when it is asked to."""
        return self._scheduler.capabilities.steers

    # -- what the planner and the executor ask ---------------------------------------------------

    def requested(self) -> Requested:
        """The placements to leave now."""
        now = self.now
        return NONE_REQUESTED if now is None else rebalance.requested(now, self._fleet.records)

    def avoid(self, record: DeviceRecord) -> Collection[str]:
        """The hosts to avoid at the start of this record's epoch."""
        return () if self.now is None else rebalance.avoided_by(self.now, record)

    # -- control loop ----------------------------------------------------------------------------

    async def poll(self) -> bool:
        """Read the document and, as the leader, decide on the next moves; whether something has changed."""
        now = self._fleet.clock.monotonic()
        if not self._in_progress and now - self._read_at < IDLE_S:
            return False
        try:
            changed = await self.refresh()
            self._read_at = now
            if self._in_progress and self._fleet.readiness.ready and self._ownership.may_lead():
                changed |= await self._step()
        except WatchdogError as error:
            if not self.problem:
                log.warning("rebalance waits", extra={"reason": str(error)})
            self.problem = str(error)
            return False
        self.problem = ""
        self._count()
        return changed

    @property
    def _in_progress(self) -> bool:
        return self.now is not None and bool(not self.now.is_over or self.now.going)

    async def refresh(self) -> bool:
        """Read the document; whether it has changed. Raises as `Document.refresh`."""
        changed = await self._document.refresh()
        if changed:
            self._moved_at = self._fleet.clock.monotonic()
        return changed

    async def change(self, how: Callable[[Rebalance | None], Rebalance]) -> None:
        """Store what `how` makes of the stored rebalance. Durable when it returns. Raises as `Document.update`."""
        await self._document.update(how)
        self._moved_at = self._fleet.clock.monotonic()
        self._count()

    async def _step(self) -> bool:
        before = self.now
        assert before is not None
        view = await self.view(before)
        idle_s = self._fleet.clock.monotonic() - self._moved_at
        after = rebalance.step(before, view, self.window(), is_idle=idle_s > PATIENCE_S)
        needed = plan_moves(view.counts, view.movable, view.in_flight).leave
        self._waiting = 0 if after.is_over else min(len(needed), after.left)
        if after == before:
            return False
        stored = await self._document.update(lambda kept: after if kept == before else kept)
        if stored:
            self._moved_at = self._fleet.clock.monotonic()
            if after.is_over and not before.is_over:
                self.report(after.state.value, after, after.reason)
        return stored

    def window(self) -> int:
        """Maximum number of agents that are being moved at a time."""
        records = self._fleet.records.values()
        present = sum(one.presence is Presence.PRESENT for one in records)
        return rollout.window(present, self._fleet.limits)

    async def view(self, now: Rebalance) -> AgentsByHost:
        """The agents per host. Raises as `schedulers.open_hosts`."""
        hosts = await open_hosts(self._scheduler)
        fleet, classes = self._fleet, self._classes
        stopped = classes.rollouts.halted() | classes.behind()

        def may_leave(record: DeviceRecord) -> bool:
            slug, name = record.slug, record.device.agent_class
            return (
                name in classes.hashes
                and name not in stopped
                and not fleet.presence.is_resting(slug)
                and fleet.agents.has_ready_agent(slug)
                and fleet.verdicts.last(slug)[0].state is VerdictState.WATCHED
            )

        conditions = Conditions(may_leave, fleet.agents.has_ready_agent, fleet.agents.is_stuck)
        closed = self._hosts.closed.keys()
        return rebalance.survey(now, fleet.records, fleet.placements, hosts, closed, conditions)

    # -- what users see --------------------------------------------------------------------------

    def _count(self) -> None:
        now = self.now
        on_way = 0 if now is None else len(now.going)
        moved = 0 if now is None or now.is_over else now.arrived
        waiting = self._waiting if now is not None and not now.is_over else 0
        self._metrics.moving("rebalance", moved, on_way, waiting)

    def report(self, what: str, now: Rebalance, more: str) -> None:
        """Publish an event about a rebalance, and log it."""
        log.warning("rebalance", extra={"state": what, "reason": more})
        self._fleet.events.note_fleet(f"rebalance.{what}", more or what, {"rebalance": now.id})

    def status(self) -> dict[str, object]:
        """For the status: the rebalance in progress, and why it can't continue."""
        now = self.now
        fields: dict[str, object] = {"problem": self.problem} if self.problem else {}
        if now is not None and not now.is_over:
            shown = rebalance_json(now)
            fields |= {name: shown[name] for name in ("state", "moved", "on_way")}
            fields["waiting"] = self._waiting
        return {"rebalance": fields} if fields else {}

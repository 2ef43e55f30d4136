"""Has agents leave hosts that are being drained (`core.node_drain`), and reports the hosts that they cannot leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nomad_watchdog.controllers.agents.capacity import CapacityMonitor
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.core.moves import NONE_REQUESTED, Requested
from nomad_watchdog.core.node_drain import DrainPlanner, DrainView, LeavingHost
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.hosts import HostWatcher
from nomad_watchdog.model import VerdictState
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import ClosedHost


class NodeDrainController:
    """Decides at each pass which placements are to be left. No I/O."""

    def __init__(
        self,
        fleet: Fleet,
        ownership: ShardOwnership,
        classes: PreparedClasses,
        capacity: CapacityMonitor,
        hosts: HostWatcher,
    ) -> None:
        self._fleet = fleet
        self._ownership = ownership
        self._classes = classes
        self._capacity = capacity
        self._planner = DrainPlanner()
        self._requested: Requested = NONE_REQUESTED
        self._hosts = hosts

    def requested(self) -> Requested:
        """What the last call of `look` found."""
        return self._requested

    def look(self) -> None:
        """Decide from what is known now, and publish what has changed."""
        fleet, ownership = self._fleet, self._ownership
        leaving = tuple(leaving_hosts(self._hosts.closed, fleet.limits.leaves))
        resting = (fleet.presence.resting() | fleet.records.unreadable) if leaving else frozenset()
        found = self._planner.decide(
            DrainView(
                leaving,
                fleet.records,
                fleet.placements,
                shard=ownership.shard,
                ours=ownership.shards(),
                rests=resting.__contains__,
                unwell=lambda slug: fleet.verdicts.last(slug)[0].state is not VerdictState.WATCHED,
                no_room=self._capacity.no_room,
                blocked=self._blocked,
                now=fleet.clock.monotonic(),
            )
        )
        self._requested = found.requested
        self._hosts.waits(found.waits)

    def _blocked(self, agent_class: str) -> str:
        classes = self._classes
        if why := classes.unprepared.get(agent_class, ""):
            return f"agent class {agent_class!r} can't be prepared: {why}"
        if agent_class not in classes.hashes:
            return f"agent class {agent_class!r} is not configured"
        if agent_class in classes.behind():
            return f"the scheduler is not prepared for class {agent_class!r} yet"
        return ""


def leaving_hosts(
    closed: Mapping[str, ClosedHost], leaves: frozenset[str]
) -> Iterator[LeavingHost]:
    """Those of the closed hosts that agents are to leave. `leaves`: as of `Limits`."""
    for name, host in closed.items():
        if not host.nodes:
            kind = "draining" if host.draining else "cordoned" if host.cordoned else ""
            if kind in leaves:
                yield LeavingHost(name, host.state, is_last=host.is_last)
            continue
        ids = frozenset(
            node
            for node, draining in host.nodes.items()
            if ("draining" if draining else "ineligible") in leaves
        )
        if ids:
            yield LeavingHost(name, host.state, ids, host.is_last)

"""The controllers that ask for agents to leave their hosts, but for relief, which needs the daemon's settings."""

from __future__ import annotations

from collections.abc import Callable

from nomad_watchdog.controllers.agents.capacity import CapacityMonitor
from nomad_watchdog.controllers.agents.prepared_classes import PreparedClasses
from nomad_watchdog.controllers.node_drain import NodeDrainController
from nomad_watchdog.controllers.rebalance import RebalanceController
from nomad_watchdog.core.moves import Requested
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.hosts import HostWatcher
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.replicas.ownership import ShardOwnership
from nomad_watchdog.schedulers import Scheduler


class Movers:
    """Those of one reconciler."""

    def __init__(
        self,
        fleet: Fleet,
        scheduler: Scheduler,
        ownership: ShardOwnership,
        classes: PreparedClasses,
        metrics: Metrics,
        capacity: CapacityMonitor,
    ) -> None:
        self.hosts = HostWatcher(fleet)
        metrics.hosts.drains_waiting(lambda: self.hosts.waiting)
        self.rebalances = RebalanceController(
            fleet, scheduler, ownership, classes, metrics, self.hosts
        )
        self.drains = NodeDrainController(fleet, ownership, classes, capacity, self.hosts)

    def sources(self) -> list[Callable[[], Requested]]:
        """What each asks for."""
        return [self.drains.requested, self.rebalances.requested]

"""The state of the application, which every handler uses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aiohttp import web

from nomad_watchdog.api.audit_limits import AuditLimits
from nomad_watchdog.api.auth import Authenticator
from nomad_watchdog.api.body_memory import BodyMemory
from nomad_watchdog.api.routing import Route
from nomad_watchdog.api.services import ConfigReloader, Operator
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.controllers.rebalance_requests import RebalanceRequests
from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.pools.controller import PoolController
from nomad_watchdog.replicas.event_replication import EventReplicator
from nomad_watchdog.replicas.leases import Leases


@dataclass(slots=True)
class Context:
    """The application's own state."""

    fleet: Fleet
    metrics: Metrics
    artifact: Path | None
    max_body_bytes: int
    bodies: BodyMemory
    authenticator: Authenticator
    routes: tuple[Route, ...]
    routed: dict[web.AbstractRoute, Route] = field(default_factory=dict)
    """The router's route → the route of the table."""
    departures: ExpiryController | None = None
    """Lets devices expire; None if there is no such controller."""
    operator: Operator | None = None
    """Approves held stops; None without a reconciler."""
    leases: Leases | None = None
    fetch_file: Callable[[str], Awaitable[None]] | None = None
    """Fetches the agent file with this SHA-256 from another replica that has it; None if there are no others."""
    feed: EventReplicator | None = None
    """Publishes the events of other replicas; None if there are no others."""
    pools: PoolController | None = None
    """Controls worker pools; None if the backend has none."""
    reloads: ConfigReloader | None = None
    """Reloads the configuration; None if there is none."""
    migrations: MigrationRequests | None = None
    """Moves agents between schedulers; None without a reconciler."""
    rollouts: RolloutRequests | None = None
    """Controls roll-outs; None without a reconciler."""
    rebalances: RebalanceRequests | None = None
    """Moves agents to hosts that have fewer; None without a reconciler."""
    page_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    page: tuple[float, str] = (float("-inf"), "")
    """When the status page was last rendered (monotonic seconds), and its text."""
    claims: Counter[str] = field(default_factory=Counter)
    """Source → number of devices that requests in progress add to it."""
    audits: AuditLimits = field(default_factory=AuditLimits)
    followers: dict[asyncio.Task[object], tuple[str, str]] = field(default_factory=dict)
    """Event streams: the task of each → its client and the share that it counts for."""


CONTEXT: Final = web.AppKey("context", Context)

"""What every handler needs, and the table that routes and their description are both made from."""

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
from nomad_watchdog.api.services import Operator, Reloads
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.migration_requests import MigrationRequests
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
    """What the router found → the route of the table."""
    departures: ExpiryController | None = None
    """Who lets devices leave; None where nobody does."""
    operator: Operator | None = None
    """Who holds stops back; None where nobody reconciles."""
    leases: Leases | None = None
    fetch_file: Callable[[str], Awaitable[None]] | None = None
    """Has the agent file with this SHA-256 fetched from another replica, if one has it; None where there are none."""
    feed: EventReplicator | None = None
    """Who tells what other replicas saw; None where there are none."""
    pools: PoolController | None = None
    """Who keeps pools; None where the backend has none."""
    reloads: Reloads | None = None
    """Who reads the configuration again; None where there is none."""
    migrations: MigrationRequests | None = None
    """Who moves the fleet between schedulers; None where nobody reconciles."""
    page_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    page: tuple[float, str] = (float("-inf"), "")
    """When the status page was last made (monotonic seconds), and its text."""
    claims: Counter[str] = field(default_factory=Counter)
    """Source → devices that requests in progress add to it."""
    audits: AuditLimits = field(default_factory=AuditLimits)
    followers: dict[asyncio.Task[object], tuple[str, str]] = field(default_factory=dict)
    """Event streams: the task of each, its client, and whose share it takes."""


CONTEXT: Final = web.AppKey("context", Context)

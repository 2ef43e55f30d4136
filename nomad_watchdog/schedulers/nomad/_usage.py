"""The use of hosts by the statistics of their Nomad clients. Reading them needs the right `node { policy = "read" }`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import ClientStats
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.host_pressure import HostUsage, percent
from nomad_watchdog.schedulers.nomad.nodes import RIGHT, Nodes

log = logging.getLogger(__name__)

_AT_ONCE: Final = 4
_TIMEOUT_S: Final = 5.0
"""Of one client, which the servers ask for its statistics."""


async def read_usage(
    client: NomadClient, nodes: Nodes, hosts: Collection[str]
) -> Mapping[str, HostUsage]:
    """The use of these hosts. Those whose client does not answer are left out, and those whose name several ready nodes
    have."""
    room = asyncio.Semaphore(_AT_ONCE)
    found: dict[str, HostUsage] = {}

    async def read(host: str, node_id: str) -> None:
        try:
            async with room, asyncio.timeout(_TIMEOUT_S):
                answer = await client.get("/v1/client/stats", RIGHT, {"node_id": node_id})
        except (WatchdogError, TimeoutError) as error:
            log.debug("host statistics not read", extra={"host": host, "reason": str(error)})
        else:
            found[host] = usage_of(answer.body)

    async with asyncio.TaskGroup() as group:
        for host in hosts:
            ready = [one for one in nodes.by_name.get(host, ()) if one.status == "ready"]
            if len(ready) == 1:
                group.create_task(read(host, ready[0].id))
    return found


def usage_of(stats: ClientStats | None) -> HostUsage:
    """From the answer of /v1/client/stats; nothing is known from one of another form, such as `null` of a client that
    can't collect them."""
    try:
        return _usage(stats or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        return HostUsage(None, None)


def _usage(stats: ClientStats) -> HostUsage:
    idle = [one["Idle"] for one in stats.get("CPU") or () if "Idle" in one]
    memory = stats.get("Memory") or {}
    total = memory.get("Total", 0)
    return HostUsage(
        cpu=percent(100.0 - sum(idle) / len(idle), 100.0) if idle else None,
        memory=percent(total - memory["Available"], total) if "Available" in memory else None,
    )

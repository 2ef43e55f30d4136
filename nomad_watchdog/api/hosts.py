"""Hosts: their agents, their state, and their pressure."""

from __future__ import annotations

from dataclasses import asdict

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.pagination import check_query
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.fleet.host_view import HostRow
from nomad_watchdog.host_pressure import Resource


async def list_hosts(request: web.Request) -> web.StreamResponse:
    """All hosts with agents. `pressure` is null without a fresh reading, and so is a resource that cannot be read. Then
    `usage` has the scheduler's statistics, in percent, if there are any."""
    check_query(request, set())
    rows = request.app[CONTEXT].fleet.hosts.rows()
    return json_response({"items": [_json(row) for row in rows]})


def _json(row: HostRow) -> dict[str, object]:
    pressure = None
    if row.pressure is not None:
        stalls = {one.value: row.pressure.of(one) for one in Resource}
        pressure = {name: None if one is None else asdict(one) for name, one in stalls.items()}
    return {
        "host": row.name,
        "agents": row.agents,
        "state": row.state,
        "pressure": pressure,
        "usage": None if row.usage is None else asdict(row.usage),
        "age_s": None if row.age_s is None else round(row.age_s, 1),
        "unreadable": row.unreadable,
    }

"""Who reconciles what, and since when."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import NotFoundError


async def list_leases(request: web.Request) -> web.StreamResponse:
    """Every shard with its holder, and every replica with what it holds."""
    leases = request.app[CONTEXT].leases
    if leases is None:
        raise NotFoundError("nobody reconciles here")
    held = list(leases.all())
    shards = [
        {
            "shard": one.shard,
            "holder": one.holder,
            "api": one.api,
            "since": one.since,
            "term": one.term,
        }
        for one in held
    ]
    replicas = [
        {
            "id": one.id,
            "api": one.api,
            "since": one.since,
            "version": one.version,
            "config": one.config,
            "shards": sum(lease.holder == one.id for lease in held),
        }
        for one in leases.replicas()
    ]
    answer = {
        "replica": leases.replica,
        "problem": leases.problem,
        "shards": shards,
        "replicas": replicas,
    }
    return json_response(answer)

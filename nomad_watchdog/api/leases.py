"""Leases: which replica holds which shard, and since when."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.errors import NotFoundError


async def list_leases(request: web.Request) -> web.StreamResponse:
    """Every shard with its holder, and every replica with the number of its shards. While the leases can't be read,
    `holder` is empty and `last_known` is set."""
    leases = request.app[CONTEXT].leases
    if leases is None:
        raise NotFoundError("this server has no leases")
    known = list(leases.all())
    # Leases that can't be read may have another holder by now, or none.
    held = known if leases.current else []
    now = {one.shard: one for one in held}
    shards = [
        {
            "shard": one.shard,
            "holder": one.holder if one.shard in now else "",
            "last_known": one.holder,
            "api": one.api if one.shard in now else "",
            "since": one.since,
            "term": one.term,
        }
        for one in known
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

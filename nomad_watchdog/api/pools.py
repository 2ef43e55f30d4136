"""Pools: what there is, and an operator's word on it."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import PoolScaleIn
from nomad_watchdog.errors import ConflictError, NotFoundError
from nomad_watchdog.pools.controller import PoolController
from nomad_watchdog.replicas.ownership import LEADER_SHARD


async def list_pools(request: web.Request) -> web.StreamResponse:
    """Of a replica that does not keep them only the counts are told: it decides nothing."""
    keeper = request.app[CONTEXT].pools
    items = await keeper.rows() if keeper is not None else []
    return json_response({"items": items, "keeper": keeper is not None and keeper.is_leader()})


async def scale_pool(request: web.Request) -> web.StreamResponse:
    body = await read(request, PoolScaleIn)
    keeper, name = _keeper(request), request.match_info["id"]
    await keeper.scale(name, body.count, "an operator's word")
    audit(request, "scale", "scaled", pool=name, count=body.count)
    return json_response({"pool": name, "count": body.count})


async def remove_pool(request: web.Request) -> web.StreamResponse:
    keeper, name = _keeper(request), request.match_info["id"]
    await keeper.remove(name)
    audit(request, "remove", "removed", pool=name)
    return json_response({"pool": name, "removed": True})


def _keeper(request: web.Request) -> PoolController:
    """Raises NotFoundError where there are no pools, ConflictError on a replica that does not keep them."""
    keeper = request.app[CONTEXT].pools
    if keeper is None:
        raise NotFoundError("this backend has no pools")
    if not keeper.is_leader():
        raise ConflictError(
            f"another replica manages the pools: the leader, which holds shard {LEADER_SHARD}"
        )
    return keeper

"""Worker pools: list, scale, remove."""

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
    """All pools. A replica that does not control them knows only their counts."""
    controller = request.app[CONTEXT].pools
    items = await controller.rows() if controller is not None else []
    controls = controller is not None and controller.is_leader()
    return json_response({"items": items, "keeper": controls})


async def scale_pool(request: web.Request) -> web.StreamResponse:
    body = await read(request, PoolScaleIn)
    controller, name = _controller(request), request.match_info["id"]
    await controller.scale(name, body.count, "set by an operator")
    audit(request, "scale", "scaled", pool=name, count=body.count)
    return json_response({"pool": name, "count": body.count})


async def remove_pool(request: web.Request) -> web.StreamResponse:
    controller, name = _controller(request), request.match_info["id"]
    await controller.remove(name)
    audit(request, "remove", "removed", pool=name)
    return json_response({"pool": name, "removed": True})


def _controller(request: web.Request) -> PoolController:
    """Raises NotFoundError without pools, ConflictError on a replica that does not control them."""
    controller = request.app[CONTEXT].pools
    if controller is None:
        raise NotFoundError("this backend has no pools")
    if not controller.is_leader():
        raise ConflictError(
            f"another replica controls the pools: the leader, which holds shard {LEADER_SHARD}"
        )
    return controller

"""Heartbeats of devices."""

from __future__ import annotations

import logging

from aiohttp import web

from nomad_watchdog.api.auth import ACTOR, check_prefix, permit_of
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.devices import device_id_of
from nomad_watchdog.api.name_checks import unknown
from nomad_watchdog.api.responses import json_response
from nomad_watchdog.api.schemas import HeartbeatsIn
from nomad_watchdog.ids import DeviceId, slug_of

log = logging.getLogger(__name__)


async def heartbeat(request: web.Request) -> web.StreamResponse:
    """404 for a device that is unknown or was removed. The registry is read before that, because the cache may be
    old."""
    device_id = device_id_of(request)
    _check(request, device_id)
    fleet = request.app[CONTEXT].fleet
    if await fleet.presence.record_heartbeats([device_id]) != [True]:
        fresh = await fleet.registry.get(slug_of(device_id))
        fleet.records.learn([fresh] if fresh is not None else [])
        _check(request, device_id)
        if await fleet.presence.record_heartbeats([device_id]) != [True]:
            raise unknown(device_id)
    return web.Response(status=204)


async def heartbeats(request: web.Request) -> web.StreamResponse:
    """Heartbeats of many devices. Unknown devices are listed and do not affect the others."""
    body = await read(request, HeartbeatsIn)
    for name in body.ids:
        _check(request, DeviceId(name))
    received = await request.app[CONTEXT].fleet.presence.record_heartbeats(body.ids)
    unknown_ids = [name for name, known in zip(body.ids, received, strict=True) if not known]
    return json_response({"heard": len(body.ids) - len(unknown_ids), "unknown": unknown_ids})


def _check(request: web.Request, device_id: DeviceId) -> None:
    """Raises RequestError (403) for a device that this token may not change. An unknown device has no labels, and
    its heartbeat changes nothing."""
    check_prefix(request, device_id)
    if request[ACTOR].labels:
        fleet = request.app[CONTEXT].fleet
        slug = fleet.records.slug_by_id.get(device_id)
        record = None if slug is None else fleet.records.get(slug)
        if record is not None:
            permit_of(request)(record.device)

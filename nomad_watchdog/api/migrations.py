"""Migrations from one scheduler to another."""

from __future__ import annotations

from aiohttp import web

from nomad_watchdog.api.audit import audit
from nomad_watchdog.api.auth import ACTOR
from nomad_watchdog.api.body import read
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.name_checks import check_class_name, check_devices
from nomad_watchdog.api.schemas import MigrateIn
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.core.migration import Migration
from nomad_watchdog.errors import NotFoundError, TransientError, UserError
from nomad_watchdog.fleet.pauses import new_id


def _migrations(request: web.Request) -> MigrationRequests:
    found = request.app[CONTEXT].migrations
    if found is None:
        raise NotFoundError("this server has no controller for migrations")
    return found


async def list_migrations(request: web.Request) -> web.StreamResponse:
    """All migrations that are in force, the newest last."""
    return web.json_response(await _migrations(request).view())


async def begin_migration(request: web.Request) -> web.StreamResponse:
    """Start a migration. Both schedulers are listed first, so nothing moves to one that does not answer.

    Raises UserError (400) if the source has no agent of these devices, ConflictError (409) while another migration
    is in progress, TransientError (503) before the fleet has been read."""
    body = await read(request, MigrateIn)
    context = request.app[CONTEXT]
    migrations = _migrations(request)
    if not context.fleet.readiness.ready:
        raise TransientError("the fleet has not been read yet", retry_after_s=1.0)
    shards = context.leases.shards if context.leases is not None else 1
    if wrong := [one for one in body.shards if one >= shards]:
        raise UserError(f"there is no shard {min(wrong)}; there are {shards}, counted from 0")
    await check_devices(context.fleet, body.devices)
    if body.agent_class:
        check_class_name(context.fleet, body.agent_class)
    by = request[ACTOR].name
    move = Migration(
        id=new_id(),
        source=body.source,
        goal=body.goal,
        began=context.fleet.clock.wall(),
        by=f"{by} ({body.by})" if body.by else by,
        target=body.target(),
        shards=frozenset(body.shards),
        of_shards=shards,
        at_once=body.at_once,
    )
    if body.dry_run:
        return web.json_response(await migrations.preview(move))
    begun = await migrations.begin(move)
    audit(request, "migrate", "started", migration=move.id)
    return web.json_response(begun, status=201)


async def pause_migration(request: web.Request) -> web.StreamResponse:
    return await _change(request, "pause")


async def resume_migration(request: web.Request) -> web.StreamResponse:
    return await _change(request, "resume")


async def undo_migration(request: web.Request) -> web.StreamResponse:
    return await _change(request, "undo")


async def _change(request: web.Request, what: str) -> web.StreamResponse:
    changed = await _migrations(request).control(what)
    audit(request, "migrate", what, migration=changed["id"])
    return web.json_response(changed)

"""Composition root: from settings to a running control plane, and down again in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from nomad_watchdog import artifact, backup, failpoints, logs, notify, once
from nomad_watchdog.api import RUNNER_OPTIONS, make_app
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.door import door_of
from nomad_watchdog.api.serving import Listener
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config import Settings
from nomad_watchdog.departures import Departures
from nomad_watchdog.discovery import ConsulHealth
from nomad_watchdog.errors import UserError, WatchdogError
from nomad_watchdog.event_feed import EventFeed
from nomad_watchdog.fleet import Fleet
from nomad_watchdog.inventory import Inventory
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import DeviceRecord
from nomad_watchdog.peers import Peers
from nomad_watchdog.pools.keeper import Keeper
from nomad_watchdog.reconciler import Reconciler
from nomad_watchdog.registry import Registry
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.told import Told
from nomad_watchdog.wiring import (
    consul_client,
    open_events,
    open_leases,
    open_pools,
    open_registry,
    open_scheduler,
    open_told,
)

log = logging.getLogger(__name__)

SHUTDOWN_S: Final = 5.0
"""Open requests get so long to end after a signal."""
_NEW_OBJECTS: Final = 10_000
"""So many more make Python look for cycles among them; its own number, 700, is one webhook's or two."""


async def initialise(settings: Settings) -> str:
    """Write the registry's sentinel unless it is there; the installation's id."""
    async with open_registry(settings) as registry:
        return await registry.initialise()


async def export_registry(settings: Settings) -> list[str]:
    """The registry as lines, for `import_registry`."""
    async with open_registry(settings) as registry:
        return await backup.lines(registry)


async def import_registry(
    settings: Settings, installation: str, records: Sequence[DeviceRecord], *, dry_run: bool
) -> backup.Restored:
    """See `backup.restore`."""
    async with open_registry(settings) as registry:
        return await backup.restore(registry, installation, records, dry_run=dry_run)


def collect_seldom() -> None:
    """For a process that serves: what is loaded is never garbage, and a fleet's records seldom are.

    Each look of the collector walks what came since the last ones, and now and then the whole fleet. With
    fewer of them signed webhooks come in a fifth faster (bench/intake.py).
    https://docs.python.org/3/library/gc.html#gc.set_threshold"""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


async def serve(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit code: 0 after a signal."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    collect_seldom()
    stop_logging = logs.setup(settings.log.level, settings.log.format)
    loop.set_exception_handler(logs.LoopTrouble())
    try:
        failpoints.arm(os.environ)
        async with open_registry(settings) as registry:
            installation = await _installation(settings, registry)
            clock = SystemClock()
            async with (
                open_scheduler(settings, installation) as scheduler,
                open_leases(settings, clock) as leases,
                open_events(settings) as (history, store),
                open_told(settings, history.origin) as told,
                open_pools(settings, installation) as driver,
            ):
                metrics = Metrics()
                fleet = Fleet(registry, settings.limits(), clock, history)
                fleet.chronicle.follow(store.status, store.left_open)
                fleet.on_commit = metrics.committed
                reconciler = Reconciler(fleet, scheduler, settings.specs(), metrics, leases)
                pools = settings.agent_pool
                keeper = Keeper(fleet, metrics, leases, driver, pools) if driver else None
                await _run(settings, reconciler, metrics, keeper, told, stop)
    except* WatchdogError as group:
        # One task failed for good and took the others with it: its own words are what helps.
        raise _first(group) from None
    finally:
        stop_logging()
    return 0


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _installation(settings: Settings, registry: Registry) -> str:
    # The embedded default needs no ceremony: a new file on this machine is a new installation. A
    # shared store is initialised by hand once, so that a wiped one is never mistaken for a new one.
    if settings.registry_kind == "sqlite":
        return await registry.initialise()
    return await registry.installation()


async def _run(
    settings: Settings,
    reconciler: Reconciler,
    metrics: Metrics,
    keeper: Keeper | None,
    told: Told | None,
    stop: asyncio.Event,
) -> None:
    fleet = reconciler.fleet
    pyz = Path(settings.data_dir) / "watchdog-agent.pyz"
    pyz.parent.mkdir(parents=True, exist_ok=True)
    artifact.build_agent(pyz)
    door = door_of(settings.api)
    departures = Departures(fleet, metrics, reconciler.territory)
    inventory = Inventory(settings.inventory, fleet, departures, metrics)
    app = make_app(
        fleet,
        metrics=metrics,
        artifact=pyz,
        max_body_bytes=settings.api.max_body,
        operator=reconciler,
        leases=reconciler.leases,
        door=door,
    )
    app[CONTEXT].departures = departures
    app[CONTEXT].pools = keeper
    app[CONTEXT].migrations = reconciler.migrations
    runner = web.AppRunner(app, shutdown_timeout=SHUTDOWN_S, **RUNNER_OPTIONS)
    await runner.setup()
    listener = Listener(runner, settings.api)
    outgoing = (door.own_token, lambda: listener.outgoing, settings.certified)
    peers = Peers(fleet, reconciler.leases, *outgoing)
    feed = None
    if told is not None:
        feed = EventFeed(fleet, told, reconciler.leases, *outgoing)
        app[CONTEXT].feed = feed
    try:
        await listener.start()
    except UserError:
        await runner.cleanup()
        raise

    def look_again() -> None:
        inventory.look_now()
        if settings.api.secure:
            listener.renew.set()

    if settings.api.secure or settings.inventory:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, look_again)
    log.info("serving", extra={"listen": settings.api.listen, "backend": settings.backend})
    try:
        others = [peers.run, departures.run, inventory.run]
        others += [one.run for one in (feed, keeper) if one is not None]
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(listener.follow())
            await _reconcile_until(stop, settings, reconciler, metrics, feed, others)
            renewing.cancel()
    finally:
        notify.stopping()
        await runner.cleanup()
        log.info("stopped")


async def _reconcile_until(
    stop: asyncio.Event,
    settings: Settings,
    reconciler: Reconciler,
    metrics: Metrics,
    feed: EventFeed | None,
    others: Sequence[Callable[[], Coroutine[Any, Any, None]]],
) -> None:
    fleet = reconciler.fleet
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(reconciler.leases.run()),
            group.create_task(reconciler.run()),
            group.create_task(_say_ready(fleet)),
            *(group.create_task(run()) for run in others),
        ]
        if settings.agent_consul:
            tasks.append(group.create_task(_follow_health(settings, fleet, metrics)))
        await stop.wait()
        if feed is not None:
            feed.stop()
        # First of all, so that a successor need not wait for what we do before we end.
        await reconciler.leases.release()
        for task in tasks:
            task.cancel()


async def _say_ready(fleet: Fleet) -> None:
    await fleet.ready_event.wait()
    log.info("ready", extra={"devices": len(fleet.records)})
    notify.ready()
    while True:
        await asyncio.sleep(notify.watchdog_interval_s() or 60.0)
        notify.watchdog()


async def _follow_health(settings: Settings, fleet: Fleet, metrics: Metrics) -> None:
    """One shared watch on Consul. Evidence only: its absence starts and stops nothing."""
    client = consul_client(settings)
    health = ConsulHealth(client, settings.consul.service)
    try:
        while True:
            with suppress(WatchdogError):
                async for view in health.watch():
                    fleet.health = view
                    metrics.consul_view_age(health.age_s)
            await asyncio.sleep(1.0)
    finally:
        await client.close()


async def plan_once(settings: Settings) -> dict[str, Any]:
    """Read both sides once and say what would be done; nothing is changed."""
    async with open_registry(settings) as registry:
        installation = await registry.installation()
        async with open_scheduler(settings, installation) as scheduler:
            reconciler = await _look_once(settings, registry, scheduler)
            return reconciler.planning.view()


async def apply_once(
    settings: Settings, *, registry_index: int | None = None, allow_stops: bool = False
) -> dict[str, Any]:
    """Make a plan and carry it out. Refuses when the registry is no longer at `registry_index`."""
    async with open_registry(settings) as registry:
        installation = await registry.installation()
        async with open_scheduler(settings, installation) as scheduler:
            await scheduler.prepare(list(settings.specs().values()))
            reconciler = await _look_once(settings, registry, scheduler)
            return await once.apply(reconciler, registry_index, allow_stops=allow_stops)


async def _look_once(settings: Settings, registry: Registry, scheduler: Scheduler) -> Reconciler:
    fleet = Fleet(registry, settings.limits(), SystemClock())
    reconciler = Reconciler(fleet, scheduler, settings.specs(), Metrics())
    await once.look(reconciler)
    return reconciler

"""Composition root: from settings to a running control plane, and down again in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nomad_watchdog import failpoints, logs
from nomad_watchdog.api import Runner, make_app
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.api.listener import ApiListener
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.inventory import InventoryController
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.controllers.registry_writes import RegistryWrites
from nomad_watchdog.daemon import preflight, systemd
from nomad_watchdog.daemon.factory import (
    consul_client,
    open_events,
    open_leases,
    open_pools,
    open_registry,
    open_scheduler,
    open_told,
)
from nomad_watchdog.daemon.reload import Reloader, warn_of_old_names
from nomad_watchdog.errors import UserError, WatchdogError
from nomad_watchdog.events.merged_log import MergedLog
from nomad_watchdog.fleet.consul_health import ConsulHealth
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.pools.controller import PoolController
from nomad_watchdog.registry import Registry
from nomad_watchdog.replicas.event_replication import EventReplicator
from nomad_watchdog.replicas.replica_events import ReplicaWatcher
from nomad_watchdog.replicas.report_replication import AgentFiles, ReportReplicator
from nomad_watchdog.schedulers import agent_zipapp
from nomad_watchdog.schedulers.multi import MultiScheduler

log = logging.getLogger(__name__)

SHUTDOWN_S: Final = 5.0
"""Open requests get so long to end after a signal."""
_NEW_OBJECTS: Final = 10_000
"""So many more make Python look for cycles among them; its own number, 700, is one webhook's or two."""


def collect_seldom() -> None:
    """For a process that serves: what is loaded is never garbage, and a fleet's records seldom are.

    Each look of the collector walks what came since the last ones, and now and then the whole fleet. With
    fewer of them signed webhooks come in a fifth faster (bench/intake.py).
    https://docs.python.org/3/library/gc.html#gc.set_threshold"""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


async def serve(settings: Settings, load: Callable[[], Settings] | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit code: 0 after a signal. `load`: reads the settings anew on
    SIGHUP; None = they stay as they are."""
    stop, asked = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # From the first moment: by default this signal ends a process. What comes early is done when it can be.
    loop.add_signal_handler(signal.SIGHUP, asked.set)
    collect_seldom()
    stop_logging = logs.setup(settings.log.level, settings.log.format)
    loop.set_exception_handler(logs.LoopTrouble())
    try:
        failpoints.arm(os.environ)
        await asyncio.to_thread(_check_inventories, settings)
        warn_of_old_names(settings)
        for setting, found, fix in preflight.exposed(settings):
            log.warning("not private", extra={"setting": setting, "reason": found, "fix": fix})
        async with open_registry(settings) as registry:
            installation = await _installation(settings, registry)
            clock = SystemClock()
            async with (
                open_scheduler(settings, installation) as scheduler,
                open_leases(settings, clock) as leases,
                open_events(settings) as (history, store, verdicts),
                open_told(settings, history.origin) as told,
                open_pools(settings, installation) as driver,
            ):
                metrics = Metrics()
                fleet = Fleet(registry, settings.limits(), clock, history)
                fleet.recorder.use_store(store.status, store.left_open)
                fleet.verdicts.restore(verdicts)
                fleet.records.committed.connect(metrics.committed)
                specs, unreadable = settings.readable_specs()
                reconciler = Reconciler(
                    fleet,
                    scheduler,
                    specs,
                    metrics,
                    leases,
                    read_specs=lambda: asyncio.to_thread(settings.readable_specs),
                    unreadable=unreadable,
                    place=settings.placer(),
                )
                pools = settings.agent_pool
                keeper = PoolController(fleet, metrics, leases, driver, pools) if driver else None
                reload = _Reload(asked, load or (lambda: settings), scheduler)
                await _run(settings, reconciler, metrics, keeper, told, stop, reload)
    except* WatchdogError as group:
        # One task failed for good and took the others with it: its own words are what helps.
        raise _first(group) from None
    finally:
        # A closed loop would leave the default, which ends a process that is about to exit with its own code.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_logging()
    return 0


def _check_inventories(settings: Settings) -> None:
    """Raises UserError for one that is not there: while the service runs it keeps its last good content, and at
    the start there is none."""
    for path in settings.inventory:
        try:
            inventory_file.signature(path)
        except UserError as error:
            raise UserError(
                f"inventory {error}; put the file there, or take it out of `inventory`"
            ) from error


@dataclass(frozen=True, slots=True)
class _Reload:
    """What a reload of the configuration needs from the start of the process."""

    asked: asyncio.Event
    load: Callable[[], Settings]
    scheduler: MultiScheduler


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
    keeper: PoolController | None,
    told: MergedLog | None,
    stop: asyncio.Event,
    reload: _Reload,
) -> None:
    fleet = reconciler.fleet
    data_dir = Path(settings.data_dir)
    agent_zipapp.publish(data_dir)
    authenticator = authenticator_of(settings.api)
    departures = ExpiryController(fleet, metrics, reconciler.ownership)
    inventory = InventoryController(
        settings.inventory, fleet, departures, metrics, frozenset(settings.agent_class)
    )
    app = make_app(
        fleet,
        metrics=metrics,
        artifact=data_dir / "watchdog-agent.pyz",
        max_body_bytes=settings.api.max_body,
        operator=reconciler,
        leases=reconciler.leases,
        authenticator=authenticator,
    )
    app[CONTEXT].departures = departures
    app[CONTEXT].pools = keeper
    app[CONTEXT].migrations = MigrationRequests(fleet, reconciler.migrations)
    runner = Runner(app, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    listener = ApiListener(runner, settings.api, metrics)
    outgoing = (authenticator.own_token, lambda: listener.outgoing, settings.certified)
    peers = ReportReplicator(fleet, reconciler.leases, *outgoing)
    app[CONTEXT].fetch_file = AgentFiles(data_dir, peers.others, *outgoing[1:]).fetch
    feed = None
    if told is not None:
        feed = EventReplicator(fleet, told, reconciler.leases, *outgoing)
        app[CONTEXT].feed = feed
    try:
        await listener.start()
    except UserError:
        await runner.cleanup()
        raise

    reloader = Reloader(
        settings,
        reload.load,
        reconciler,
        reload.scheduler,
        inventory,
        authenticator,
        metrics,
        reload.asked,
        listener.renew.set,
    )
    app[CONTEXT].reloads = reloader
    log.info("serving", extra={"listen": settings.api.listen, "backend": settings.backend})
    try:
        replicas_seen = ReplicaWatcher(fleet, reconciler.leases)
        writes = RegistryWrites(fleet, metrics)
        others = [
            writes.run,
            replicas_seen.run,
            peers.run,
            departures.run,
            inventory.run,
            reloader.run,
        ]
        others += [one.run for one in (feed, keeper) if one is not None]
        async with asyncio.TaskGroup() as group:
            renewing = group.create_task(listener.follow())
            await _reconcile_until(stop, settings, reconciler, metrics, feed, others)
            renewing.cancel()
    finally:
        systemd.stopping()
        await runner.cleanup()
        log.info("stopped")


async def _reconcile_until(
    stop: asyncio.Event,
    settings: Settings,
    reconciler: Reconciler,
    metrics: Metrics,
    feed: EventReplicator | None,
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
    await fleet.readiness.event.wait()
    log.info("ready", extra={"devices": len(fleet.records)})
    systemd.ready()
    while True:
        await asyncio.sleep(systemd.watchdog_interval_s() or 60.0)
        systemd.watchdog()


async def _follow_health(settings: Settings, fleet: Fleet, metrics: Metrics) -> None:
    """One shared watch on Consul. Evidence only: its absence starts and stops nothing."""
    client = consul_client(settings)
    health = ConsulHealth(client, settings.consul.service)
    try:
        while True:
            with suppress(WatchdogError):
                async for view in health.watch():
                    fleet.verdicts.health = view
                    metrics.consul_view_age(health.age_s)
            await asyncio.sleep(1.0)
    finally:
        await client.close()

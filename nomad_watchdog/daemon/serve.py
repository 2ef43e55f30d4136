"""Composition root: starts a control plane from its settings, and stops it in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from nomad_watchdog import failpoints, logs
from nomad_watchdog.api import Runner, make_app
from nomad_watchdog.api.auth import Authenticator, authenticator_of
from nomad_watchdog.api.context import CONTEXT, Context
from nomad_watchdog.api.listener import ApiListener
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers import inventory_file
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.expiry import ExpiryController
from nomad_watchdog.controllers.host_usage import HostUsageController
from nomad_watchdog.controllers.inventory import InventoryController
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.controllers.rebalance_requests import RebalanceRequests
from nomad_watchdog.controllers.registry_writes import RegistryWrites
from nomad_watchdog.controllers.relief import ReliefController
from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.daemon import preflight, systemd
from nomad_watchdog.daemon.factory import (
    consul_client,
    open_events,
    open_leases,
    open_merged_log,
    open_pools,
    open_registry,
    open_scheduler,
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
"""Maximum time for open requests to end after a signal."""
_NEW_OBJECTS: Final = 10_000
"""Number of new objects that starts a garbage collection. Python's default of 700 is reached by one or two webhooks."""


def collect_seldom() -> None:
    """Make garbage collections rare, for a long-running service.

    A collection walks the objects created since the last one, and sometimes those of the whole fleet, few of which are
    garbage. With fewer collections signed webhooks are handled a fifth faster (bench/intake.py).
    https://docs.python.org/3/library/gc.html#gc.set_threshold"""
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS, 10, 10)


async def serve(settings: Settings, load: Callable[[], Settings] | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit code: 0 after a signal. `load`: rereads the settings on SIGHUP;
    None = they do not change."""
    stop, reload_requested = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    # Set first, because SIGHUP ends a process by default. An early signal is handled when the service runs.
    loop.add_signal_handler(signal.SIGHUP, reload_requested.set)
    collect_seldom()
    stop_logging = logs.setup(settings.log.level, settings.log.format)
    loop.set_exception_handler(logs.LoopErrors())
    try:
        failpoints.arm(os.environ)
        await asyncio.to_thread(_check_inventories, settings)
        warn_of_old_names(settings)
        for setting, found, fix in preflight.exposed(settings):
            log.warning("not private", extra={"setting": setting, "reason": found, "fix": fix})
        async with _control_plane(settings, load or (lambda: settings), reload_requested) as plane:
            await plane.run(stop)
    except* WatchdogError as group:
        # The first task that failed cancelled the others: its error is the cause.
        raise _first(group) from None
    finally:
        # Without a handler SIGHUP would end a process that is about to exit with its own code.
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop_logging()
    return 0


def _check_inventories(settings: Settings) -> None:
    """Raises UserError for an inventory file that does not exist. A running service keeps the last valid content, but
    at its start there is none."""
    for path in settings.inventory:
        try:
            inventory_file.signature(path)
        except UserError as error:
            raise UserError(
                f"inventory {error}; create the file, or remove it from `inventory`"
            ) from error


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _installation(settings: Settings, registry: Registry) -> str:
    # A new SQLite file is a new installation. A shared store must be initialised with `init`, so that a wiped one
    # is not mistaken for a new one.
    if settings.registry_kind == "sqlite":
        return await registry.initialise()
    return await registry.installation()


@asynccontextmanager
async def _control_plane(
    settings: Settings, load: Callable[[], Settings], reload_requested: asyncio.Event
) -> AsyncIterator[_ControlPlane]:
    """The components that the settings name, closed at the end. Raises WatchdogError."""
    async with open_registry(settings) as registry:
        installation = await _installation(settings, registry)
        clock = SystemClock()
        async with (
            open_scheduler(settings, installation) as scheduler,
            open_leases(settings, clock) as leases,
            open_events(settings) as (event_log, store, verdicts),
            open_merged_log(settings, event_log.origin) as merged_log,
            open_pools(settings, installation) as driver,
        ):
            metrics = Metrics()
            fleet = Fleet(registry, settings.limits(), clock, event_log)
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
                strategies=settings.strategies(),
            )
            pools = (
                PoolController(fleet, metrics, leases, driver, settings.agent_pool)
                if driver
                else None
            )
            yield _ControlPlane(
                settings, load, reload_requested, scheduler, reconciler, metrics, pools, merged_log
            )


Loop = Callable[[], Coroutine[object, object, None]]


@dataclass(slots=True)
class _ControlPlane:
    """One control plane: its components, and how they run together."""

    settings: Settings
    load: Callable[[], Settings]
    reload_requested: asyncio.Event
    scheduler: MultiScheduler
    reconciler: Reconciler
    metrics: Metrics
    pools: PoolController | None
    merged_log: MergedLog | None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve the API and run all control loops until `stop` is set. Raises UserError if the API can't listen."""
        settings, fleet = self.settings, self.reconciler.fleet
        agent_zipapp.publish(Path(settings.data_dir))
        authenticator = authenticator_of(settings.api)
        departures = ExpiryController(fleet, self.metrics, self.reconciler.ownership)
        inventory = InventoryController(
            settings.inventory, fleet, departures, self.metrics, frozenset(settings.agent_class)
        )
        app = self._app(authenticator, departures)
        runner = Runner(app, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        listener = ApiListener(runner, settings.api, self.metrics)
        replicators, events = self._replicators(app[CONTEXT], authenticator, listener)
        try:
            await listener.start()
        except UserError:
            await runner.cleanup()
            raise
        relief, reconciler = self._relief(), self.reconciler
        usage = HostUsageController(reconciler.fleet, self.scheduler, reconciler.ownership)
        self.metrics.hosts.usages = reconciler.fleet.hosts.usages
        reloader = self._reloader(inventory, authenticator, listener, relief)
        app[CONTEXT].reloads = reloader
        log.info("serving", extra={"listen": settings.api.listen, "backend": settings.backend})
        loops = [*replicators, departures.run, inventory.run, reloader.run, relief.run, usage.run]
        try:
            async with asyncio.TaskGroup() as group:
                certificates = group.create_task(listener.follow())
                await self._reconcile_until(stop, events, loops)
                certificates.cancel()
        finally:
            systemd.stopping()
            await runner.cleanup()
            log.info("stopped")

    def _app(self, authenticator: Authenticator, departures: ExpiryController) -> web.Application:
        app = make_app(
            self.reconciler.fleet,
            metrics=self.metrics,
            artifact=Path(self.settings.data_dir) / "watchdog-agent.pyz",
            max_body_bytes=self.settings.api.max_body,
            operator=self.reconciler,
            leases=self.reconciler.leases,
            authenticator=authenticator,
        )
        app[CONTEXT].departures = departures
        app[CONTEXT].pools = self.pools
        app[CONTEXT].migrations = MigrationRequests(
            self.reconciler.fleet, self.reconciler.migrations
        )
        classes = self.reconciler.classes
        app[CONTEXT].rollouts = RolloutRequests(
            self.reconciler.fleet, classes.rollouts, classes.changes, classes.changed.emit
        )
        app[CONTEXT].rebalances = RebalanceRequests(
            self.reconciler.fleet, self.reconciler.movers.rebalances
        )
        return app

    def _replicators(
        self, context: Context, authenticator: Authenticator, listener: ApiListener
    ) -> tuple[list[Loop], EventReplicator | None]:
        """The control loops between replicas, and the one that replicates events, if there can be other replicas."""
        fleet, leases = self.reconciler.fleet, self.reconciler.leases
        calls = (authenticator.own_token, lambda: listener.outgoing, self.settings.certified)
        reports = ReportReplicator(fleet, leases, *calls)
        files = AgentFiles(Path(self.settings.data_dir), reports.others, *calls[1:])
        context.fetch_file = files.fetch
        loops: list[Loop] = [
            RegistryWrites(fleet, self.metrics).run,
            ReplicaWatcher(fleet, leases).run,
            reports.run,
        ]
        if self.merged_log is None:
            return loops, None
        events = EventReplicator(fleet, self.merged_log, leases, *calls)
        context.feed = events
        return [*loops, events.run], events

    def _relief(self) -> ReliefController:
        reconciler = self.reconciler
        relief = ReliefController(
            reconciler.fleet, reconciler.ownership, self.metrics, reconciler.wake
        )
        relief.configure(self.settings.relief_rules())
        reconciler.plan_builder.sources.append(relief.requested)
        reconciler.executor.avoids.append(relief.avoids)
        return relief

    def _reloader(
        self,
        inventory: InventoryController,
        authenticator: Authenticator,
        listener: ApiListener,
        relief: ReliefController,
    ) -> Reloader:
        return Reloader(
            self.settings,
            self.load,
            self.reconciler,
            self.scheduler,
            inventory,
            authenticator,
            self.metrics,
            self.reload_requested,
            listener.renew.set,
            relief.configure,
        )

    async def _reconcile_until(
        self, stop: asyncio.Event, events: EventReplicator | None, loops: Sequence[Loop]
    ) -> None:
        reconciler = self.reconciler
        fleet = reconciler.fleet
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(reconciler.leases.run()),
                group.create_task(reconciler.run()),
                group.create_task(_notify_systemd(fleet)),
                *(group.create_task(run()) for run in loops),
            ]
            if self.pools is not None:
                tasks.append(group.create_task(self.pools.run()))
            if self.settings.agent_consul:
                health = _follow_health(self.settings, fleet, self.metrics)
                tasks.append(group.create_task(health))
            await stop.wait()
            if events is not None:
                events.stop()
            # Leases are released first, so that a successor does not wait for the rest of the shutdown.
            await reconciler.leases.release()
            for task in tasks:
                task.cancel()


async def _notify_systemd(fleet: Fleet) -> None:
    await fleet.readiness.event.wait()
    log.info("ready", extra={"devices": len(fleet.records)})
    systemd.ready()
    while True:
        await asyncio.sleep(systemd.watchdog_interval_s() or 60.0)
        systemd.watchdog()


async def _follow_health(settings: Settings, fleet: Fleet, metrics: Metrics) -> None:
    """One shared watch on Consul. Its data is evidence only: if it is missing, nothing starts or stops."""
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

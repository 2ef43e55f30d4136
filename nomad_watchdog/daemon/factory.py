"""From settings to the registry and the backend that they name. What is not used is not imported."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomad_watchdog import private_files, schedulers
from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.clock import Clock, SystemClock
from nomad_watchdog.config.blocks import ConsulSettings, NomadSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.events.audit_store import SplitStore
from nomad_watchdog.events.log import EventLog
from nomad_watchdog.events.merged_log import MergedLog
from nomad_watchdog.events.store import EventStore
from nomad_watchdog.ids import Slug
from nomad_watchdog.pools import Driver
from nomad_watchdog.pools.local import LocalPools
from nomad_watchdog.registry import Registry
from nomad_watchdog.registry.consul import ConsulRegistry
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.consul_leases import ConsulLeases
from nomad_watchdog.replicas.file_lease import FileLeases
from nomad_watchdog.replicas.lease_keys import read_replicas
from nomad_watchdog.replicas.leases import Leases, Replica
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.schedulers.credentialed import TokenIssuingScheduler
from nomad_watchdog.schedulers.multi import MultiScheduler
from nomad_watchdog.secret_files import SecretFile, read_keys

if TYPE_CHECKING:
    from nomad_watchdog.clients.kubernetes import KubernetesAccess
    from nomad_watchdog.clients.nomad import NomadAccess

Verdicts = Sequence[tuple[Slug, str, float]]
"""The last verdict event of each device: slug, kind and unix seconds."""


def consul_client(settings: Settings) -> ConsulClient:
    """A client of the Consul that the settings name."""
    return ConsulClient(consul_settings(settings))


def consul_settings(settings: Settings, env: Mapping[str, str] | None = None) -> ConsulAccess:
    """How Consul is reached: the block `consul`, which holds Consul's own variables already, and the token of
    `env` (None = this process's) where no file of one is named."""
    return ConsulAccess.from_env(env, **_reached(settings.consul))


def nomad_settings(settings: Settings, env: Mapping[str, str] | None = None) -> NomadAccess:
    """As `consul_settings`, of Nomad."""
    from nomad_watchdog.clients.nomad import NomadAccess  # noqa: PLC0415  # only when used

    return NomadAccess.from_env(env, region=settings.nomad.region or "", **_reached(settings.nomad))


def _reached(block: NomadSettings | ConsulSettings) -> dict[str, Any]:
    """What both blocks say; what is not set must not come from the environment a second time."""
    names = ("address", "namespace", "ca_cert", "ca_path", "client_cert", "client_key")
    told = {name: getattr(block, name) or "" for name in (*names, "tls_server_name")}
    token = {"token_file": block.token_file} if block.token_file else {}
    return told | token | {"tls_skip_verify": block.tls_skip_verify}


def kubernetes_settings(settings: Settings) -> KubernetesAccess:
    """How the Kubernetes API is reached: the block `kubernetes`, then what kubectl would take."""
    from nomad_watchdog.clients.kubernetes import KubernetesAccess  # noqa: PLC0415  # only when used

    chosen = settings.kubernetes
    return KubernetesAccess.discover(
        chosen.kubeconfig or "",
        chosen.context or "",
        service_account=chosen.service_account or "",
    )


@asynccontextmanager
async def open_registry(settings: Settings) -> AsyncIterator[Registry]:
    """The registry that the settings name, closed at the end."""
    if settings.registry_kind == "sqlite":
        private_files.folder(settings.registry_path.parent)
        sqlite = SqliteRegistry(path=settings.registry_path)
        try:
            yield sqlite
        finally:
            await sqlite.close()
        return
    client = consul_client(settings)
    try:
        yield ConsulRegistry(client=client, prefix=settings.consul.prefix)
    finally:
        await client.close()


@asynccontextmanager
async def open_leases(settings: Settings, clock: Clock) -> AsyncIterator[Leases]:
    """Leases where the registry is: locks in Consul, or a lock file beside the SQLite file. What is held at
    the end is let go of."""
    replica = f"{_host()}-{secrets.token_hex(4)}"
    if settings.registry_kind == "sqlite":
        path = settings.registry_path
        file = FileLeases(
            path.with_name(f"{path.name}.lease"),
            shards=settings.shards,
            replica=replica,
            api=settings.own_address,
            clock=clock,
            advertise=settings.advertise,
        )
        try:
            yield file
        finally:
            await file.release()
        return
    client = consul_client(settings)
    leases = ConsulLeases(
        client,
        prefix=settings.consul.prefix,
        shards=settings.shards,
        replica=replica,
        api=settings.own_address,
        clock=clock,
        ttl_s=settings.lease_ttl,
        advertise=settings.advertise,
    )
    try:
        yield leases
    finally:
        await leases.release()
        await client.close()


def _host() -> str:
    """The machine's name as a part of a Consul service id."""
    name = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")
    return name[:32] or "replica"


@asynccontextmanager
async def open_events(settings: Settings) -> AsyncIterator[tuple[EventLog, SplitStore, Verdicts]]:
    """The history of this control plane, going on where the last run ended, its file, and the last verdict
    of each device in it. A file that can't be used stops nothing: the store says what is wrong."""
    origin = f"{_host()}-{secrets.token_hex(4)}"
    store = _store(settings, settings.events_path, settings.audit_path, origin)
    found = await store.open()
    history = EventLog(found.origin, store)
    history.resume(found.seq, found.events)
    try:
        yield history, store, found.verdicts
    finally:
        await store.close()


def _store(settings: Settings, events: Path, audit: Path, origin: str) -> SplitStore:
    kept = settings.events
    return SplitStore(
        EventStore(events, origin=origin, most=kept.keep, max_age_s=kept.max_age),
        EventStore(
            audit,
            origin=origin,
            most=kept.audit_keep,
            max_age_s=kept.audit_max_age,
            per_actor=True,
        ),
    )


@asynccontextmanager
async def open_told(settings: Settings, origin: str) -> AsyncIterator[MergedLog | None]:
    """The events of all replicas, and their file; None where there is one replica at a time. `origin`:
    that of our own events."""
    if settings.registry_kind == "sqlite":
        yield None
        return
    store = _store(settings, settings.told_path, settings.audit_told_path, origin)
    found = await store.open()
    told = MergedLog(EventLog(origin, store, is_copied=True))
    told.resume(found.events, found.verdicts, found.origins)
    try:
        yield told
    finally:
        await store.close()


@asynccontextmanager
async def open_pools(settings: Settings, installation: str) -> AsyncIterator[Driver | None]:
    """What keeps pools on the backend that the settings name; None where that can't keep any."""
    if settings.backend == "local":
        driver: Driver = LocalPools(settings.pools_directory)
    elif settings.backend == "nomad":
        from nomad_watchdog.clients.nomad import NomadClient  # noqa: PLC0415  # only when used
        from nomad_watchdog.pools.nomad import NomadPools  # noqa: PLC0415

        # A client of its own: what the agents need never waits for a pool.
        client = NomadClient(nomad_settings(settings))
        driver = NomadPools(client, installation=installation, prefix=settings.nomad.job_prefix)
    elif settings.backend == "kubernetes":
        from nomad_watchdog.clients.kubernetes import KubernetesClient  # noqa: PLC0415
        from nomad_watchdog.pools.kubernetes import KubernetesPools  # noqa: PLC0415

        driver = KubernetesPools(
            KubernetesClient(kubernetes_settings(settings)),
            namespace=settings.kubernetes.namespace,
            installation=installation,
        )
    else:
        yield None
        return
    try:
        yield driver
    finally:
        await driver.close()


@asynccontextmanager
async def open_scheduler(settings: Settings, installation: str) -> AsyncIterator[MultiScheduler]:
    """The backend that the settings name, found by entry point, with room for others that the fleet is
    moved to or from; all closed at the end."""
    keys = None
    if settings.api.agent_key_file:
        keys = SecretFile(
            "api.agent_key_file", Path(settings.api.agent_key_file), read_keys
        ).required()

    def made(backend: str) -> Scheduler:
        make: Any = schedulers.load(backend)
        one: Scheduler = make(**_options(settings, backend, installation))
        return one if keys is None else TokenIssuingScheduler(one, keys, SystemClock())

    scheduler = MultiScheduler(settings.backend, made, settings.spec_on)
    try:
        yield scheduler
    finally:
        await scheduler.close()


def _options(settings: Settings, backend: str, installation: str) -> dict[str, Any]:
    """Keyword settings for a backend. One that we do not know gets what every backend may need."""
    if backend == "local":
        options: dict[str, Any] = {
            "directory": settings.local_directory,
            "token_file": settings.api.agent_token_file or "",
            "fork": settings.local.fork,
        }
        return options | ({"python": settings.local.python} if settings.local.python else {})
    if backend == "nomad":
        return {
            "settings": nomad_settings(settings),
            "strategy": settings.nomad.strategy,
            "shards": settings.shards,
            "installation": installation,
            "prefix": settings.nomad.job_prefix,
        }
    shared = {"installation": installation, "shards": settings.shards}
    if backend == "kubernetes":
        return {
            **shared,
            "settings": kubernetes_settings(settings),
            "namespace": settings.kubernetes.namespace,
            "namespaces": settings.kubernetes.namespaces,
        }
    return shared


async def replicas(settings: Settings) -> list[Replica]:
    """The control planes of this installation that run now, as the leases tell."""
    if settings.registry_kind == "sqlite":
        async with open_leases(settings, SystemClock()) as leases:
            holders = {lease.holder: lease for lease in leases.all() if lease.holder}
        return [Replica(one.holder, one.api, one.since, 0, "") for one in holders.values()]
    client = consul_client(settings)
    try:
        return await read_replicas(client, settings.consul.prefix)
    finally:
        await client.close()

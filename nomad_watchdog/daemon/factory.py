"""Creates the registry, the schedulers and the stores that the settings name. Imports only what is used."""

from __future__ import annotations

import re
import secrets
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

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
    """How to connect to Consul: the block `consul`, which includes Consul's own variables, and the token of `env`
    (None = this process's environment) if the block names no file."""
    return ConsulAccess.from_env(env, **_access(settings.consul))


def nomad_settings(settings: Settings, env: Mapping[str, str] | None = None) -> NomadAccess:
    """As `consul_settings`, of Nomad."""
    from nomad_watchdog.clients.nomad import NomadAccess  # noqa: PLC0415  # only when used

    return NomadAccess.from_env(env, region=settings.nomad.region or "", **_access(settings.nomad))


_ACCESS: Final = frozenset(
    {"address", "namespace", "ca_cert", "ca_path", "client_cert", "client_key", "tls_server_name"}
)


def _access(block: NomadSettings | ConsulSettings) -> dict[str, object]:
    """The settings that both blocks have. Those that are not set are empty, so that they do not come from the
    environment a second time."""
    set_ = {name: value or "" for name, value in block.model_dump(include=set(_ACCESS)).items()}
    token = {"token_file": block.token_file} if block.token_file else {}
    return {**set_, **token, "tls_skip_verify": block.tls_skip_verify}


def kubernetes_settings(settings: Settings) -> KubernetesAccess:
    """How to connect to the Kubernetes API: the block `kubernetes`, else as kubectl does."""
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
    """Leases in the registry's store: locks in Consul, or a lock file beside the SQLite file. Released at the end."""
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
    """The event log of this control plane, continued from the last run, its store, and the last verdict of each
    device in it. A file that can't be used stops nothing: the store reports the problem."""
    origin = f"{_host()}-{secrets.token_hex(4)}"
    store = _store(settings, settings.events_path, settings.audit_path, origin)
    found = await store.open()
    event_log = EventLog(found.origin, store)
    event_log.resume(found.seq, found.events)
    try:
        yield event_log, store, found.verdicts
    finally:
        await store.close()


def _store(settings: Settings, events: Path, audit: Path, origin: str) -> SplitStore:
    block = settings.events
    return SplitStore(
        EventStore(events, origin=origin, max_events=block.keep, max_age_s=block.max_age),
        EventStore(
            audit,
            origin=origin,
            max_events=block.audit_keep,
            max_age_s=block.audit_max_age,
            per_actor=True,
        ),
    )


@asynccontextmanager
async def open_merged_log(settings: Settings, origin: str) -> AsyncIterator[MergedLog | None]:
    """The events of all replicas; None if there is only one replica at a time. `origin`: that of this replica's
    own events."""
    if settings.registry_kind == "sqlite":
        yield None
        return
    store = _store(settings, settings.published_events_path, settings.published_audit_path, origin)
    found = await store.open()
    merged = MergedLog(EventLog(origin, store, is_copied=True))
    merged.resume(found.events, found.verdicts, found.origins)
    try:
        yield merged
    finally:
        await store.close()


@asynccontextmanager
async def open_pools(settings: Settings, installation: str) -> AsyncIterator[Driver | None]:
    """The driver of worker pools for the backend in the settings; None if that backend has none."""
    if settings.backend == "local":
        driver: Driver = LocalPools(settings.pools_directory)
    elif settings.backend == "nomad":
        from nomad_watchdog.clients.nomad import NomadClient  # noqa: PLC0415  # only when used
        from nomad_watchdog.pools.nomad import NomadPools  # noqa: PLC0415

        # A client of its own, so that calls for agents never wait for calls for pools.
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
    """The backend in the settings, found by its entry point, and others for migrations as they are needed; all
    closed at the end."""
    keys = None
    if settings.api.agent_key_file:
        keys = SecretFile(
            "api.agent_key_file", Path(settings.api.agent_key_file), read_keys
        ).required()

    def create(backend: str) -> Scheduler:
        one: Scheduler = schedulers.load(backend)(**_options(settings, backend, installation))
        return one if keys is None else TokenIssuingScheduler(one, keys, SystemClock())

    scheduler = MultiScheduler(settings.backend, create, settings.spec_on)
    try:
        yield scheduler
    finally:
        await scheduler.close()


def _options(settings: Settings, backend: str, installation: str) -> dict[str, object]:
    """Keyword arguments for the constructor of a backend. A third-party one gets what every backend may need."""
    if backend == "local":
        options: dict[str, object] = {
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
            "drain": settings.nomad.drain,
        }
    shared: dict[str, object] = {"installation": installation, "shards": settings.shards}
    if backend == "kubernetes":
        return {
            **shared,
            "settings": kubernetes_settings(settings),
            "namespace": settings.kubernetes.namespace,
            "namespaces": settings.kubernetes.namespaces,
            "leave_cordoned": settings.kubernetes.leave_cordoned,
        }
    return shared


async def replicas(settings: Settings) -> list[Replica]:
    """The control planes of this installation that run now, according to the leases."""
    if settings.registry_kind == "sqlite":
        async with open_leases(settings, SystemClock()) as leases:
            holders = {lease.holder: lease for lease in leases.all() if lease.holder}
        return [Replica(one.holder, one.api, one.since, 0, "") for one in holders.values()]
    client = consul_client(settings)
    try:
        return await read_replicas(client, settings.consul.prefix)
    finally:
        await client.close()

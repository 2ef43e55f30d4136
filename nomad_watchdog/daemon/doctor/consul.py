"""Checks of Consul and of the registry."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import aiohttp

from nomad_watchdog.clients.nomad_features import versions
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers import migration_state
from nomad_watchdog.controllers.migration_state import MigrationState
from nomad_watchdog.daemon.doctor.base import (
    TIMEOUT_S,
    Check,
    CheckStatus,
    ServerClient,
    clock_check,
    denied_check,
    mapping,
    objects,
    open_server,
)
from nomad_watchdog.daemon.factory import consul_settings, open_registry
from nomad_watchdog.errors import DeniedError, NoRegistryError, UserError, WatchdogError

CONSUL_MINIMUM: Final = (1, 14, 0)
"""The oldest Consul that the tests run on."""


async def check_consul(
    settings: Settings, env: Mapping[str, str], agents: dict[str, str]
) -> list[Check]:
    """Also adds the registered agents to `agents`: `host:port` → device."""
    reached = consul_settings(settings, env)
    headers = {"X-Consul-Token": reached.read_token(), "X-Consul-Namespace": reached.namespace}
    async with open_server(reached, headers) as server:
        status, leader = await server.call("GET", "/v1/status/leader")
        if status != 200 or not leader:
            fix = "check the logs of the Consul servers: they need a majority"
            return [Check("consul leader", CheckStatus.FAIL, f"none (HTTP {status})", fix)]
        checks = [
            Check("consul leader", CheckStatus.OK, str(leader)),
            clock_check("consul", server.date),
        ]
        status, agent = await server.call("GET", "/v1/agent/self")
        checks.append(_consul_version(status, agent))
        checks.append(await _consul_session(server))
        checks.append(await _consul_kv(server, settings.consul.prefix))
        rows: object = None
        with suppress(
            aiohttp.ClientError, TimeoutError
        ):  # of a large catalogue; the checks above are complete
            _, rows = await server.call("GET", f"/v1/catalog/service/{settings.consul.service}")
        for row in objects(rows):
            host = row.get("ServiceAddress") or row.get("Address", "")
            device = mapping(row.get("ServiceMeta")).get("device_id", row.get("ServiceID", ""))
            agents[f"{host}:{row.get('ServicePort', 0)}"] = str(device)
        return checks


def _consul_version(status: int, agent: object) -> Check:
    if status != 200 or not isinstance(agent, dict):
        # No other call needs that right, so the shipped policy does not grant it.
        found = "not visible to this token, which does not need that right; Consul 1.14 or later is required"
        return Check("consul version", CheckStatus.OK, found)
    version = str(mapping(agent.get("Config")).get("Version", "?"))
    if versions([version]) >= [CONSUL_MINIMUM]:
        return Check("consul version", CheckStatus.OK, version)
    return Check("consul version", CheckStatus.FAIL, version, "upgrade Consul to 1.14 or later")


_SESSION: Final = 'grant session "NODE" { policy = "write" }, for the node of this Consul agent'


async def _consul_session(server: ServerClient) -> Check:
    body = {"Name": "nomad-watchdog-doctor", "TTL": "10s", "Behavior": "delete"}
    status, made = await server.call("PUT", "/v1/session/create", body)
    if status != 200:
        return Check("consul session", CheckStatus.FAIL, f"HTTP {status}", _SESSION)
    status, _ = await server.call("PUT", f"/v1/session/destroy/{mapping(made).get('ID')}")
    ok = status == 200
    fix = "" if ok else _SESSION
    return Check(
        "consul session", CheckStatus.OK if ok else CheckStatus.FAIL, "created and destroyed", fix
    )


async def _consul_kv(server: ServerClient, prefix: str) -> Check:
    # A compare-and-set that can't succeed (no key has index 1) needs the right and writes nothing.
    path = f"/v1/kv/{prefix}/doctor?cas=1"
    status, _ = await server.call("PUT", path, "")
    if status == 403:
        fix = f'grant key_prefix "{prefix}/" write to the token'
        return Check("consul kv", CheckStatus.FAIL, "writing is denied", fix)
    return Check(
        "consul kv", CheckStatus.OK if status == 200 else CheckStatus.WARN, f"HTTP {status}"
    )


_NO_REGISTRY: Final = (
    "for a new installation run `nomad-watchdog init`; if there were records here, restore them with "
    "`nomad-watchdog registry import FILE`"
)
_LOST_REGISTRY: Final = (
    "restore the records with `nomad-watchdog registry import FILE`; without a backup, save the devices that the "
    "control plane still has in memory with `nomad-watchdog devices export` before you restart it"
)


async def check_registry(settings: Settings, *, runs: bool) -> tuple[Check, bytes]:
    """The check of the registry, and its document of migrations. `runs`: a control plane answers, so there was a
    registry when it started."""
    if settings.registry_kind == "sqlite" and not settings.registry_path.exists():
        where = f"{settings.registry_path} does not exist yet"
        return Check("registry", CheckStatus.OK, where, "the first run, or `init`, creates it"), b""
    try:
        async with asyncio.timeout(TIMEOUT_S * 2), open_registry(settings) as registry:
            installation = await registry.installation()
            count = len((await registry.read()).records)
            document = await registry.document(migration_state.FORMAT.name)
    except NoRegistryError:
        if runs:
            what = "the registry was wiped or replaced while the control plane runs"
            return Check("registry", CheckStatus.FAIL, what, _LOST_REGISTRY), b""
        return Check("registry", CheckStatus.WARN, "not initialised yet", _NO_REGISTRY), b""
    except UserError as error:
        return Check("registry", CheckStatus.FAIL, str(error), "see registry"), b""
    except DeniedError as error:
        return denied_check("registry", error), b""
    except (WatchdogError, TimeoutError, OSError) as error:
        why = str(error) or "no answer in time"
        fix = "make the store reachable; see registry"
        return Check("registry", CheckStatus.FAIL, why, fix), b""
    found = f"installation {installation}, {count} records"
    return Check("registry", CheckStatus.OK, found), document.body


def check_migration(settings: Settings, kept: MigrationState) -> Check:
    """Which backends run the agents, and whether `backend` is one of them."""
    lives = " and ".join(sorted(kept.backends))
    if hint := migration_state.settings_hint(kept, settings.backend):
        return Check("migration", CheckStatus.WARN, f"the fleet has moved to {lives}", hint)
    under_way = [move for move in kept.moves if not move.done]
    state = f", one from {under_way[0].source} is {under_way[0].state}" if under_way else ""
    return Check("migration", CheckStatus.OK, f"agents run on {lives}{state}")

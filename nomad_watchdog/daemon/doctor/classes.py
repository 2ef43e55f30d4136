"""Checks whether the replicas and this configuration have the class specs that are in force. Changes nothing."""

from __future__ import annotations

import asyncio
from typing import Final

from nomad_watchdog.config.class_set import ClassSetStore, InForce, in_words
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.class_set import OwnClasses
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus
from nomad_watchdog.daemon.factory import consul_client, open_registry
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.replicas.lease_keys import read_replicas
from nomad_watchdog.replicas.leases import Replica
from nomad_watchdog.units import utc

TIMEOUT_S: Final = 10.0
_NAME: Final = "classes in force"
_FIX: Final = (
    "give all control planes the same file, then reload or restart them; see docs/configuration.md, "
    "Replicas with different configurations"
)


async def checks(settings: Settings) -> list[Check]:
    """One check; none if there is no registry yet, or it can't be read, which another check reports."""
    if settings.registry_kind == "sqlite" and not settings.registry_path.exists():
        return []
    try:
        async with asyncio.timeout(TIMEOUT_S), open_registry(settings) as registry:
            await registry.installation()
    except (WatchdogError, TimeoutError, OSError):
        return []
    try:
        async with asyncio.timeout(TIMEOUT_S), open_registry(settings) as registry:
            kept = await ClassSetStore(registry).read()
            replicas = await _replicas(settings)
        specs, unreadable = settings.readable_specs()
    except (WatchdogError, TimeoutError, OSError) as error:
        return [
            Check(
                _NAME,
                CheckStatus.FAIL,
                str(error) or "no answer in time",
                "until then each replica uses its own class specs",
            )
        ]
    if kept is None:
        what = "none yet: the first control plane that starts brings its class specs into force"
        return [Check(_NAME, CheckStatus.OK, what, "")]
    return [_compared(kept, OwnClasses(specs, unreadable), replicas)]


async def _replicas(settings: Settings) -> list[Replica]:
    if settings.registry_kind == "sqlite":
        return []
    client = consul_client(settings)
    try:
        return await read_replicas(client, settings.consul.prefix)
    finally:
        await client.close()


def _compared(kept: InForce, own: OwnClasses, replicas: list[Replica]) -> Check:
    here = f"configuration {kept.standing.digest}, since {utc(kept.since)}"
    wrong = [
        f"{one.id} is configured with {one.config or 'an older version of nomad-watchdog'}"
        for one in replicas
        if one.config != kept.standing.digest
    ]
    if differing := own.differences(kept):
        wrong.append(f"this file differs in class {in_words(differing)}")
    if not wrong:
        return Check(_NAME, CheckStatus.OK, f"{here}; all replicas are configured with it", "")
    return Check(_NAME, CheckStatus.WARN, f"{here}; {'; '.join(wrong)}", _FIX)

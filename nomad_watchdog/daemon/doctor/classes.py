"""Whether the replicas, and this configuration, have the class specs that are in force: a check of doctor.

Gives (name, "ok", "warn" or "fail", what was found, what to do). Nothing is changed.
"""

from __future__ import annotations

import asyncio
from typing import Final

from nomad_watchdog.config.class_set import ClassSetStore, InForce, in_words
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.class_set import OwnClasses
from nomad_watchdog.daemon.factory import consul_client, open_registry
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.replicas.lease_keys import read_replicas
from nomad_watchdog.replicas.leases import Replica
from nomad_watchdog.units import utc

TIMEOUT_S: Final = 10.0
Found = tuple[str, str, str, str]
_NAME: Final = "classes in force"
_MEND: Final = (
    "give all control planes the same file, then reload or restart them; see docs/configuration.md, "
    "Replicas with different configurations"
)


async def checks(settings: Settings) -> list[Found]:
    """One finding; none where there is no registry yet, or it can't be read, which is a finding of its own."""
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
        return [(_NAME, "fail", str(error) or "no answer in time", "each replica goes by its own")]
    if kept is None:
        what = "none yet: the first control plane that starts brings its own into force"
        return [(_NAME, "ok", what, "")]
    return [_compared(kept, OwnClasses(specs, unreadable), replicas)]


async def _replicas(settings: Settings) -> list[Replica]:
    if settings.registry_kind == "sqlite":
        return []
    client = consul_client(settings)
    try:
        return await read_replicas(client, settings.consul.prefix)
    finally:
        await client.close()


def _compared(kept: InForce, own: OwnClasses, replicas: list[Replica]) -> Found:
    here = f"configuration {kept.standing.digest}, since {utc(kept.since)}"
    wrong = [
        f"{one.id} is configured with {one.config or 'an older version of nomad-watchdog'}"
        for one in replicas
        if one.config != kept.standing.digest
    ]
    if differing := own.differences(kept):
        wrong.append(f"this file differs in class {in_words(differing)}")
    if not wrong:
        return _NAME, "ok", f"{here}; all replicas are configured with it", ""
    return _NAME, "warn", f"{here}; {'; '.join(wrong)}", _MEND

"""Whether the environment will carry us: each check says what was found and how to mend it.

Checks only look, but for one Consul session that is made and destroyed. They never raise: what a
check can't do is its finding. Where a limit comes from is said beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.migration_state import FORMAT, MigrationState
from nomad_watchdog.daemon import preflight
from nomad_watchdog.daemon.doctor import agents as doctor_agents
from nomad_watchdog.daemon.doctor import api as doctor_api
from nomad_watchdog.daemon.doctor import classes
from nomad_watchdog.daemon.doctor.base import (
    Check,
    Status,
    _guarded,
)
from nomad_watchdog.daemon.doctor.consul import _consul, _migration, _registry
from nomad_watchdog.daemon.doctor.kubernetes import _kubernetes
from nomad_watchdog.daemon.doctor.machine import _machine
from nomad_watchdog.daemon.doctor.nomad import _nomad
from nomad_watchdog.errors import (
    UserError,
)
from nomad_watchdog.secret_values import hide


async def examine(
    settings: Settings, env: Mapping[str, str], config: Path | None = None
) -> list[Check]:
    """All checks that make sense for these settings, in the order in which to fix them. `config`: the file that
    was read."""
    return [
        replace(check, found=hide(check.found), mend=hide(check.mend))
        for check in await _examine(settings, env, config)
    ]


async def _examine(settings: Settings, env: Mapping[str, str], config: Path | None) -> list[Check]:
    checks = [Check("config", Status.OK, f"valid, backend {settings.backend}"), _api(settings)]
    checks += [_deprecated(text) for text in settings.deprecated]
    checks += _files(settings, env)
    for name, found, mend in preflight.exposed(settings, config):
        checks.append(Check(name, Status.WARN, found, mend))
    api = await doctor_api.checks(settings)
    checks += [Check(name, Status(status), found, mend) for name, status, found, mend in api]
    runs = ("api.advertise", "ok") in [one[:2] for one in api]
    heard, registered = (await doctor_api.agents(settings) if runs else {}), dict[str, str]()
    if settings.registry_kind == "consul" or settings.agent_consul:
        checks += await _guarded("consul", lambda: _consul(settings, env, registered))
    # First those that only Consul knows: no report of them has been accepted here.
    agents = {k: v for k, v in registered.items() if k not in heard} | heard
    for name, status, found, mend in await doctor_agents.checks(agents, runs=runs):
        checks.append(Check(name, Status(status), found, mend))
    registry, document = await _registry(settings, runs=runs)
    checks.append(registry)
    for name, status, found, mend in await classes.checks(settings):
        checks.append(Check(name, Status(status), found, mend))
    try:
        kept = FORMAT.decode(document)
    except UserError as error:
        mend = "nothing is decided until it can be read"
        checks.append(Check("migration", Status.FAIL, str(error), mend))
        kept = MigrationState()
    if kept.base:
        checks.append(_migration(settings, kept))
    backends = {settings.backend, *kept.backends}
    if "nomad" in backends:
        checks += await _guarded("nomad", lambda: _nomad(settings, env))
    if "kubernetes" in backends:
        checks += await _guarded("kubernetes", lambda: _kubernetes(settings))
    if settings.backend == "local" or settings.registry_kind == "sqlite":
        checks += _machine(settings)
    return checks


def _deprecated(text: str) -> Check:
    found, _, fix = text.partition("; ")
    return Check("config", Status.WARN, found, fix)


def _files(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """What `run` reads: a finding for each file, class or setting that it could not use."""
    mend = "see docs/configuration.md; `nomad-watchdog config check` names the lines"
    found = []
    for path, text in preflight.misfits(settings, env):
        what, separator, fix = text.rpartition("; ")
        if not (separator and fix.startswith(("chmod ", "chown "))):
            what, fix = text, mend
        found.append(Check(".".join(map(str, path)), Status.FAIL, what, fix))
    named = "tokens, keys, certificates, templates and inventories"
    return found or [Check("files", Status.OK, f"{named} can be read")]


def _api(settings: Settings) -> Check:
    api = settings.api
    if api.loopback or api.guarded:
        return Check("api", Status.OK, f"listens on {api.listen}")
    return Check(
        "api",
        Status.WARN,
        f"listens on {api.listen} and lets everybody do everything (api.open)",
        "set api.token_file, or listen on 127.0.0.1",
    )

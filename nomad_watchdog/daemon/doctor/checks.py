"""All checks of `doctor`. Each reports what was found and how to fix it.

Checks change nothing, except that they create and destroy one Consul session. They do not raise: a failed call
is the result of its check.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers.migration_state import FORMAT
from nomad_watchdog.daemon import preflight
from nomad_watchdog.daemon.doctor import agents as doctor_agents
from nomad_watchdog.daemon.doctor import api as doctor_api
from nomad_watchdog.daemon.doctor import classes
from nomad_watchdog.daemon.doctor.base import (
    Check,
    CheckStatus,
    guarded,
)
from nomad_watchdog.daemon.doctor.consul import check_consul, check_migration, check_registry
from nomad_watchdog.daemon.doctor.kubernetes import check_kubernetes
from nomad_watchdog.daemon.doctor.machine import check_machine
from nomad_watchdog.daemon.doctor.nomad import check_nomad
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
        check._replace(found=hide(check.found), fix=hide(check.fix))
        for check in await _examine(settings, env, config)
    ]


async def _examine(settings: Settings, env: Mapping[str, str], config: Path | None) -> list[Check]:
    checks = [Check("config", CheckStatus.OK, f"valid, backend {settings.backend}"), _api(settings)]
    checks += [_deprecated(text) for text in settings.deprecated]
    checks += _files(settings, env)
    for name, found, fix in preflight.exposed(settings, config):
        checks.append(Check(name, CheckStatus.WARN, found, fix))
    api_checks = await doctor_api.checks(settings)
    checks += api_checks
    runs = any(one.name == "api.advertise" and one.status is CheckStatus.OK for one in api_checks)
    checks += await _consul_and_agents(settings, env, runs=runs)
    registry, document = await check_registry(settings, runs=runs)
    checks.append(registry)
    checks += await classes.checks(settings)
    migration_checks, backends = _migrations(settings, document)
    checks += migration_checks
    checks += await _servers(settings, env, {settings.backend, *backends})
    if settings.backend == "local" or settings.registry_kind == "sqlite":
        checks += check_machine(settings)
    return checks


async def _consul_and_agents(
    settings: Settings, env: Mapping[str, str], *, runs: bool
) -> list[Check]:
    reported = await doctor_api.agents(settings) if runs else {}
    registered: dict[str, str] = {}
    checks: list[Check] = []
    if settings.registry_kind == "consul" or settings.agent_consul:
        checks += await guarded("consul", lambda: check_consul(settings, env, registered))
    # First those that only Consul knows: the control plane has accepted no report of them.
    agents = {k: v for k, v in registered.items() if k not in reported} | reported
    return checks + await doctor_agents.checks(agents, runs=runs)


def _migrations(settings: Settings, document: bytes) -> tuple[list[Check], frozenset[str]]:
    """The check of the migrations in the registry, and the backends that they name."""
    try:
        state = FORMAT.decode(document)
    except UserError as error:
        fix = "the control plane decides nothing until the document can be read"
        return [Check("migration", CheckStatus.FAIL, str(error), fix)], frozenset()
    return [check_migration(settings, state)] if state.base else [], state.backends


async def _servers(settings: Settings, env: Mapping[str, str], backends: set[str]) -> list[Check]:
    checks: list[Check] = []
    if "nomad" in backends:
        checks += await guarded("nomad", lambda: check_nomad(settings, env))
    if "kubernetes" in backends:
        checks += await guarded("kubernetes", lambda: check_kubernetes(settings))
    return checks


def _deprecated(text: str) -> Check:
    found, _, fix = text.partition("; ")
    return Check("config", CheckStatus.WARN, found, fix)


def _files(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """A check per file, class or setting that `run` could not use."""
    general_fix = "see docs/configuration.md; `nomad-watchdog config check` prints the line numbers"
    found = []
    for path, text in preflight.misfits(settings, env):
        what, separator, fix = text.rpartition("; ")
        if not (separator and fix.startswith(("chmod ", "chown "))):
            what, fix = text, general_fix
        found.append(Check(".".join(map(str, path)), CheckStatus.FAIL, what, fix))
    named = "tokens, keys, certificates, templates and inventories"
    return found or [Check("files", CheckStatus.OK, f"{named} can be read")]


def _api(settings: Settings) -> Check:
    api = settings.api
    if api.loopback or api.guarded:
        return Check("api", CheckStatus.OK, f"listens on {api.listen}")
    return Check(
        "api",
        CheckStatus.WARN,
        f"listens on {api.listen} without authentication (api.open)",
        "set api.token_file, or listen on 127.0.0.1",
    )

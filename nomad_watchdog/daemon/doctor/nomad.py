"""Checks of Nomad."""

from __future__ import annotations

from collections.abc import Mapping

from nomad_watchdog.clients import nomad
from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import MINIMUM as NOMAD_MINIMUM
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor import nodes
from nomad_watchdog.daemon.doctor.base import (
    Check,
    CheckStatus,
    ServerClient,
    clock_check,
    mapping,
    objects,
    open_server,
)
from nomad_watchdog.daemon.factory import nomad_settings
from nomad_watchdog.errors import DeniedError, UserError
from nomad_watchdog.schedulers.nomad import jobs as _jobs
from nomad_watchdog.text_files import did_you_mean


async def check_nomad(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    reached = nomad_settings(settings, env)
    place = {"namespace": reached.namespace}
    place |= {"region": reached.region} if reached.region else {}
    token = reached.read_token()
    async with open_server(reached, {"X-Nomad-Token": token}, place) as server:
        if token:  # raises for one that Nomad does not know
            await server.call("GET", nomad.OWN_TOKEN, params={})
        if elsewhere := await _nomad_place(server, reached):
            return [elsewhere]
        status, leader = await server.call("GET", "/v1/status/leader")
        if status != 200 or not leader:
            fix = "check the logs of the Nomad servers: they need a majority"
            return [Check("nomad leader", CheckStatus.FAIL, f"none (HTTP {status})", fix)]
        checks = [
            Check("nomad leader", CheckStatus.OK, str(leader)),
            clock_check("nomad", server.date),
        ]
        checks += await _nomad_features(settings, env)
        checks += await _nomad_classes(settings, env)
        status, agent = await server.call("GET", "/v1/agent/self")
        if status == 200:
            checks += _nomad_limits(agent)
        else:
            fix = 'grant  agent { policy = "read" }  to the token to check the limits'
            checks.append(Check("nomad limits", CheckStatus.WARN, f"HTTP {status}", fix))
        checks += await nodes.checks(server.call)
        checks.append(await _nomad_rights(server, settings))
        return checks


async def _nomad_place(server: ServerClient, reached: NomadAccess) -> Check | None:
    """A failed check if the region or the namespace does not exist, else None."""
    status, answer = await server.call("GET", "/v1/regions", params={})
    regions = [str(one) for one in answer] if isinstance(answer, list) else []
    if reached.region and status == 200 and reached.region not in regions:
        hint = did_you_mean(reached.region, regions)
        found = f"there is no region {reached.region!r}; {hint}there are: {', '.join(regions)}"
        return Check("nomad region", CheckStatus.FAIL, found, "set nomad.region or NOMAD_REGION")
    status, _ = await server.call("GET", f"/v1/namespace/{reached.namespace}")
    if status == 404:
        found = f"there is no namespace {reached.namespace!r}"
        fix = f"nomad namespace apply {reached.namespace}, or set nomad.namespace"
        return Check("nomad namespace", CheckStatus.FAIL, found, fix)
    return None


async def _nomad_classes(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """Whether Nomad accepts the job of each class: its template, its variables and its node pool."""
    client = NomadClient(nomad_settings(settings, env))
    specs, _ = settings.readable_specs()  # those that can't be read are reported already
    checks = []
    try:
        for name, spec in specs.items():
            adapted = settings.spec_on("nomad", spec)
            try:
                await _jobs.build(client, adapted, f"{settings.nomad.job_prefix}-doctor", "")
            except UserError as error:
                fix = f'fix agent_class "{name}"; until then its devices get no agent'
                checks.append(Check(f"class {name}", CheckStatus.FAIL, str(error), fix))
            except DeniedError as error:
                fix = "grant parse-job and read-job in the namespace"
                checks.append(Check(f"class {name}", CheckStatus.WARN, str(error), fix))
    finally:
        await client.close()
    return checks or [Check("classes", CheckStatus.OK, f"Nomad accepts {', '.join(sorted(specs))}")]


async def _nomad_features(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """The version of the servers, and the consequence of each feature that they lack."""
    client = NomadClient(nomad_settings(settings, env))
    try:
        features = await client.features()
    except DeniedError as error:
        return [
            Check("nomad version", CheckStatus.WARN, str(error), "grant parse-job to the token")
        ]
    finally:
        await client.close()
    if features.version < NOMAD_MINIMUM:
        fix = "upgrade Nomad to 1.6 or later: it has no node pools"
        return [Check("nomad version", CheckStatus.FAIL, str(features), fix)]
    exact = features.exact
    fix = "" if exact else 'grant  node { policy = "read" }  to the token to see the exact version'
    status = CheckStatus.OK if exact else CheckStatus.WARN
    checks = [Check("nomad version", status, str(features), fix)]
    for feature in features.missing():
        since = ".".join(map(str, feature.since))
        found = f"no {feature.title} (from Nomad {since}): {feature.without}"
        checks.append(Check("nomad feature", CheckStatus.OK, found))
    return checks


def _nomad_limits(agent: object) -> list[Check]:
    config = mapping(mapping(agent).get("config"))
    checks = []
    size = mapping(config.get("Server")).get("EventBufferSize")
    if isinstance(size, int) and size < 100:
        fix = (
            "raise server.event_buffer_size to 100 or more: events get lost, and passes get slower"
        )
        checks.append(Check("nomad event buffer", CheckStatus.WARN, str(size), fix))
    limit = mapping(config.get("Limits")).get("HTTPMaxConnsPerClient")
    if isinstance(limit, int):
        low = 0 < limit < 100
        fix = "raise limits.http_max_conns_per_client to 100 or more, or lower retry.concurrency"
        status = CheckStatus.WARN if low else CheckStatus.OK
        checks.append(Check("nomad connections", status, f"{limit} per client", fix if low else ""))
    return checks


async def _nomad_rights(server: ServerClient, settings: Settings) -> Check:
    prefix, namespace = settings.nomad.job_prefix, settings.nomad.namespace
    status, jobs = await server.call("GET", f"/v1/jobs?prefix={prefix}")
    if status != 200 or not isinstance(jobs, list):
        fix = "grant list-jobs, read-job, submit-job and dispatch-job in the namespace"
        return Check("nomad jobs", CheckStatus.FAIL, f"HTTP {status} in {namespace}", fix)
    missing = []
    for capability, path, body in _calls(prefix):
        # Nomad checks the capability first, and none of these calls changes anything.
        status, _ = await server.call("POST", path, body)
        if status == 403:
            missing.append(capability)
    if missing:
        lacks = ", ".join(missing)
        fix = f"grant {lacks} in the namespace; jobs/policies/nomad-reconciler.hcl has all"
        return Check("nomad jobs", CheckStatus.FAIL, f"the token lacks {lacks}", fix)
    parents = [job for job in objects(jobs) if job.get("ParameterizedJob")]
    if settings.nomad.strategy == "register" or parents:
        return Check("nomad jobs", CheckStatus.OK, f"{len(jobs)} jobs, {len(parents)} parents")
    return Check("nomad jobs", CheckStatus.OK, "no parent job yet", "the first run registers it")


def _calls(prefix: str) -> list[tuple[str, str, dict[str, object]]]:
    """Capability, path and body of a call that needs it and has no effect."""
    missing = f"{prefix}-doctor-asks"
    task = {"Name": "t", "Driver": "raw_exec", "Config": {"command": "/bin/true"}}
    group = {"Name": "g", "Count": 0, "Tasks": [task]}
    job = {
        "ID": missing,
        "Name": missing,
        "Type": "batch",
        "Datacenters": ["*"],
        "TaskGroups": [group],
    }
    return [
        ("dispatch-job", f"/v1/job/{missing}/dispatch", {}),
        ("submit-job", f"/v1/job/{missing}/plan", {"Job": job}),
        ("parse-job", "/v1/jobs/parse", {"JobHCL": ""}),
    ]

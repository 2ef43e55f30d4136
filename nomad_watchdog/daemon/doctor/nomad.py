"""Checks of Nomad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nomad_watchdog.clients import nomad
from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import MINIMUM as NOMAD_MINIMUM
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor import nodes
from nomad_watchdog.daemon.doctor.base import Check, Status, _Server, _server, _skew
from nomad_watchdog.daemon.factory import nomad_settings
from nomad_watchdog.errors import DeniedError, UserError
from nomad_watchdog.schedulers.nomad import jobs as _jobs
from nomad_watchdog.text_files import did_you_mean


async def _nomad(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    reached = nomad_settings(settings, env)
    place = {"namespace": reached.namespace}
    place |= {"region": reached.region} if reached.region else {}
    token = reached.read_token()
    async with _server(reached, {"X-Nomad-Token": token}, place) as server:
        if token:  # raises for one that Nomad does not know
            await server.call("GET", nomad.OWN_TOKEN, params={})
        if elsewhere := await _nomad_place(server, reached):
            return [elsewhere]
        status, leader = await server.call("GET", "/v1/status/leader")
        if status != 200 or not leader:
            mend = "look at the Nomad servers' logs: they need a majority"
            return [Check("nomad leader", Status.FAIL, f"none (HTTP {status})", mend)]
        checks = [Check("nomad leader", Status.OK, str(leader)), _skew("nomad", server.date)]
        checks += await _nomad_features(settings, env)
        checks += await _nomad_classes(settings, env)
        status, self_ = await server.call("GET", "/v1/agent/self")
        if status == 200:
            checks += _nomad_limits(self_)
        else:
            mend = 'grant  agent { policy = "read" }  to the token to check the limits'
            checks.append(Check("nomad limits", Status.WARN, f"HTTP {status}", mend))
        for name, status_, found, mend in await nodes.checks(server.call):
            checks.append(Check(name, Status(status_), found, mend))
        checks.append(await _nomad_rights(server, settings))
        return checks


async def _nomad_place(server: _Server, reached: NomadAccess) -> Check | None:
    """What is wrong with the region or the namespace; None when both are there."""
    status, regions = await server.call("GET", "/v1/regions", params={})
    if reached.region and status == 200 and reached.region not in regions:
        hint = did_you_mean(reached.region, regions)
        found = f"there is no region {reached.region!r}; {hint}there are: {', '.join(regions)}"
        return Check("nomad region", Status.FAIL, found, "set nomad.region or NOMAD_REGION")
    status, _ = await server.call("GET", f"/v1/namespace/{reached.namespace}")
    if status == 404:
        found = f"there is no namespace {reached.namespace!r}"
        mend = f"nomad namespace apply {reached.namespace}, or set nomad.namespace"
        return Check("nomad namespace", Status.FAIL, found, mend)
    return None


async def _nomad_classes(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """Whether Nomad takes the job of each class: its template, its variables and its node pool."""
    client = NomadClient(nomad_settings(settings, env))
    specs, _ = settings.readable_specs()  # those that can't be read are findings already
    checks = []
    try:
        for name, spec in specs.items():
            adapted = settings.spec_on("nomad", spec)
            try:
                await _jobs.build(client, adapted, f"{settings.nomad.job_prefix}-doctor", "")
            except UserError as error:
                mend = f'fix agent_class "{name}"; until then its devices get no agent'
                checks.append(Check(f"class {name}", Status.FAIL, str(error), mend))
            except DeniedError as error:
                mend = "grant parse-job and read-job in the namespace"
                checks.append(Check(f"class {name}", Status.WARN, str(error), mend))
    finally:
        await client.close()
    return checks or [Check("classes", Status.OK, f"Nomad takes {', '.join(sorted(specs))}")]


async def _nomad_features(settings: Settings, env: Mapping[str, str]) -> list[Check]:
    """The version of the servers, and what each feature that they lack means."""
    client = NomadClient(nomad_settings(settings, env))
    try:
        features = await client.features()
    except DeniedError as error:
        return [Check("nomad version", Status.WARN, str(error), "grant parse-job to the token")]
    finally:
        await client.close()
    if features.version < NOMAD_MINIMUM:
        mend = "upgrade Nomad to 1.6 or later: it has no node pools"
        return [Check("nomad version", Status.FAIL, str(features), mend)]
    exact = features.exact
    mend = "" if exact else 'grant  node { policy = "read" }  to the token to see the exact version'
    status = Status.OK if exact else Status.WARN
    checks = [Check("nomad version", status, str(features), mend)]
    for feature in features.missing():
        since = ".".join(map(str, feature.since))
        found = f"no {feature.title} (from Nomad {since}): {feature.without}"
        checks.append(Check("nomad feature", Status.OK, found))
    return checks


def _nomad_limits(self_: Mapping[str, Any]) -> list[Check]:
    config = self_.get("config") or {}
    checks = []
    size = (config.get("Server") or {}).get("EventBufferSize")
    if isinstance(size, int) and size < 100:
        mend = "raise server.event_buffer_size to 100 or more: hints get lost, passes get slower"
        checks.append(Check("nomad event buffer", Status.WARN, str(size), mend))
    limit = (config.get("Limits") or {}).get("HTTPMaxConnsPerClient")
    if isinstance(limit, int):
        low = 0 < limit < 100
        mend = "raise limits.http_max_conns_per_client to 100 or more, or lower retry.concurrency"
        status = Status.WARN if low else Status.OK
        checks.append(Check("nomad connections", status, f"{limit} a client", mend if low else ""))
    return checks


async def _nomad_rights(server: _Server, settings: Settings) -> Check:
    prefix, namespace = settings.nomad.job_prefix, settings.nomad.namespace
    status, jobs = await server.call("GET", f"/v1/jobs?prefix={prefix}")
    if status != 200 or not isinstance(jobs, list):
        mend = "grant list-jobs, read-job, submit-job and dispatch-job in the namespace"
        return Check("nomad jobs", Status.FAIL, f"HTTP {status} in {namespace}", mend)
    missing = []
    for capability, path, body in _asked_for(prefix):
        # Nomad asks for the right before it looks at anything else, and none of these changes anything.
        status, _ = await server.call("POST", path, body)
        if status == 403:
            missing.append(capability)
    if missing:
        lacks = ", ".join(missing)
        mend = f"grant {lacks} in the namespace; jobs/policies/nomad-reconciler.hcl has all"
        return Check("nomad jobs", Status.FAIL, f"the token lacks {lacks}", mend)
    parents = [job["ID"] for job in jobs if job.get("ParameterizedJob")]
    if settings.nomad.strategy == "register" or parents:
        return Check("nomad jobs", Status.OK, f"{len(jobs)} jobs, {len(parents)} parents")
    return Check("nomad jobs", Status.OK, "no parent job yet", "the first run registers it")


def _asked_for(prefix: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Capability, path and body of a call that needs it and has no effect."""
    nobody = f"{prefix}-doctor-asks"
    task = {"Name": "t", "Driver": "raw_exec", "Config": {"command": "/bin/true"}}
    group = {"Name": "g", "Count": 0, "Tasks": [task]}
    job = {
        "ID": nobody,
        "Name": nobody,
        "Type": "batch",
        "Datacenters": ["*"],
        "TaskGroups": [group],
    }
    return [
        ("dispatch-job", f"/v1/job/{nobody}/dispatch", {}),
        ("submit-job", f"/v1/job/{nobody}/plan", {"Job": job}),
        ("parse-job", "/v1/jobs/parse", {"JobHCL": ""}),
    ]

"""Whether the environment will carry us: each check says what was found and how to mend it.

Checks only look, but for one Consul session that is made and destroyed. They never raise: what a
check can't do is its finding. Where a limit comes from is said beside it.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import aiohttp

from nomad_watchdog.clients import consul, nomad
from nomad_watchdog.clients.consul import ConsulAccess
from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.clients.nomad_features import MINIMUM as NOMAD_MINIMUM
from nomad_watchdog.clients.nomad_features import versions
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.controllers import migration
from nomad_watchdog.controllers.migration import MigrationState
from nomad_watchdog.daemon import preflight
from nomad_watchdog.daemon.doctor import agents as doctor_agents
from nomad_watchdog.daemon.doctor import api as doctor_api
from nomad_watchdog.daemon.doctor import classes, nodes
from nomad_watchdog.daemon.factory import (
    consul_settings,
    kubernetes_settings,
    nomad_settings,
    open_registry,
)
from nomad_watchdog.errors import (
    DeniedError,
    NoRegistryError,
    NotFoundError,
    TransientError,
    UserError,
    WatchdogError,
)
from nomad_watchdog.schedulers.kubernetes import _names as names
from nomad_watchdog.schedulers.kubernetes import _objects
from nomad_watchdog.schedulers.kubernetes._namespaces import known_namespaces
from nomad_watchdog.schedulers.nomad import _jobs
from nomad_watchdog.secret_values import hide
from nomad_watchdog.text_files import did_you_mean

CONSUL_MINIMUM: Final = (1, 14, 0)
"""The oldest Consul that the tests run on."""
KUBERNETES_MINIMUM: Final = (1, 34)
_ALL: Final = ("get", "list", "watch", "create", "patch", "delete")
KUBERNETES_RIGHTS: Final = (
    ("apps", "deployments", _ALL),
    ("apps", "statefulsets", _ALL),
    ("", "pods", _ALL),
    ("", "pods/log", ("get",)),
    ("", "secrets", ("create", "patch", "delete")),
)
_RECORD_RIGHTS: Final = (("create", ""), ("get", names.RECORD), ("patch", names.RECORD))
"""On the ConfigMap of the first namespace that remembers how many there are: verb and name."""
SKEW_S: Final = 5.0
TIMEOUT_S: Final = 5.0
WANTED_FILES: Final = 1024


class Status(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    found: str
    mend: str = ""


class _Server:
    """GET, PUT and POST of JSON as the control plane itself asks: the same address, token, namespace, region
    and TLS. Nothing is retried: doctor reports what is."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: NomadAccess | ConsulAccess,
        params: Mapping[str, str],
    ) -> None:
        self._session, self._settings, self._params = session, settings, params
        self._tls = settings.ssl_context() or True
        self.date = ""

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
    ) -> tuple[int, Any]:
        async with self._session.request(
            method,
            f"{self._settings.address}{path}",
            json=body,
            params=self._params if params is None else params,
            ssl=self._tls,
            server_hostname=self._settings.tls_server_name or None,
            allow_redirects=False,
        ) as answer:
            self.date = answer.headers.get("Date", "")
            text = await answer.text()
            if answer.status >= 400 and (unknown := _unknown_token(self._settings, text)):
                raise DeniedError(unknown)
            if "json" in answer.headers.get("Content-Type", "") or text[:1] in '{["':
                try:
                    return answer.status, (await answer.json(content_type=None))
                except ValueError:
                    return answer.status, text
            return answer.status, text


def _unknown_token(settings: NomadAccess | ConsulAccess, said: str) -> str:
    """What is wrong, if the server does not know the token: then no check says anything about its rights."""
    if isinstance(settings, ConsulAccess):
        return consul.NOT_KNOWN if consul.is_unknown_token(said) else ""
    return nomad.NOT_KNOWN if nomad.is_unknown_token(said) else ""


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
        kept = migration.decode(document)
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


async def _guarded(name: str, checks: Callable[[], Awaitable[list[Check]]]) -> list[Check]:
    try:
        return await checks()
    except (aiohttp.ClientError, TimeoutError, OSError, TransientError) as error:
        why = str(error) or type(error).__name__
        where = "kubeconfig" if name == "kubernetes" else "address, ca_cert and the token"
        mend = f"start it, or set {name}.{where}"
        return [Check(f"{name} reachable", Status.FAIL, why, mend)]
    except DeniedError as error:
        return [_refused(f"{name} token", error)]
    except WatchdogError as error:
        return [Check(f"{name} settings", Status.FAIL, str(error), f"see the {name} block")]


def _refused(name: str, error: DeniedError) -> Check:
    """What the server denies, and what the error says to do about it."""
    found, _, mend = str(error).rpartition("; ")
    return Check(
        name, Status.FAIL, found or mend, mend if found else "grant the rights to the token"
    )


@asynccontextmanager
async def _server(
    settings: NomadAccess | ConsulAccess,
    headers: Mapping[str, str],
    params: Mapping[str, str] | None = None,
) -> AsyncIterator[_Server]:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    sent = {name: value for name, value in headers.items() if value}
    async with aiohttp.ClientSession(timeout=timeout, headers=sent) as session:
        yield _Server(session, settings, params or {})


async def _consul(
    settings: Settings, env: Mapping[str, str], agents: dict[str, str]
) -> list[Check]:
    """Adds the agents that are registered to `agents`: `host:port` → device."""
    reached = consul_settings(settings, env)
    headers = {"X-Consul-Token": reached.read_token(), "X-Consul-Namespace": reached.namespace}
    async with _server(reached, headers) as server:
        status, leader = await server.call("GET", "/v1/status/leader")
        if status != 200 or not leader:
            mend = "look at the Consul servers' logs: they need a majority"
            return [Check("consul leader", Status.FAIL, f"none (HTTP {status})", mend)]
        checks = [
            Check("consul leader", Status.OK, str(leader)),
            _skew("consul", server.date),
        ]
        status, self_ = await server.call("GET", "/v1/agent/self")
        checks.append(_consul_version(status, self_))
        checks.append(await _consul_session(server))
        checks.append(await _consul_kv(server, settings.consul.prefix))
        rows: object = None
        with suppress(
            aiohttp.ClientError, TimeoutError
        ):  # a large catalogue; the checks above stand
            _, rows = await server.call("GET", f"/v1/catalog/service/{settings.consul.service}")
        for row in rows if isinstance(rows, list) else ():
            host = row.get("ServiceAddress") or row.get("Address", "")
            device = (row.get("ServiceMeta") or {}).get("device_id", row.get("ServiceID", ""))
            agents[f"{host}:{row.get('ServicePort', 0)}"] = str(device)
        return checks


def _consul_version(status: int, self_: Any) -> Check:
    if status != 200 or not isinstance(self_, dict):
        # Nothing else needs that right, so the policy that we ship does not have it.
        found = "not shown to this token, which needs no right to see it; Consul 1.14 or later is required"
        return Check("consul version", Status.OK, found)
    version = str((self_.get("Config") or {}).get("Version", "?"))
    if versions([version]) >= [CONSUL_MINIMUM]:
        return Check("consul version", Status.OK, version)
    return Check("consul version", Status.FAIL, version, "upgrade Consul to 1.14 or later")


_SESSION: Final = 'grant session "NODE" { policy = "write" }, for the node of this Consul agent'


async def _consul_session(server: _Server) -> Check:
    body = {"Name": "nomad-watchdog-doctor", "TTL": "10s", "Behavior": "delete"}
    status, made = await server.call("PUT", "/v1/session/create", body)
    if status != 200:
        return Check("consul session", Status.FAIL, f"HTTP {status}", _SESSION)
    status, _ = await server.call("PUT", f"/v1/session/destroy/{made['ID']}")
    ok = status == 200
    mend = "" if ok else _SESSION
    return Check("consul session", Status.OK if ok else Status.FAIL, "made and destroyed", mend)


async def _consul_kv(server: _Server, prefix: str) -> Check:
    # A compare-and-set that cannot win (no key has index 1) asks for the right and writes nothing.
    path = f"/v1/kv/{prefix}/doctor?cas=1"
    status, _ = await server.call("PUT", path, "")
    if status == 403:
        mend = f'grant key_prefix "{prefix}/" write to the token'
        return Check("consul kv", Status.FAIL, "writing is denied", mend)
    return Check("consul kv", Status.OK if status == 200 else Status.WARN, f"HTTP {status}")


_NO_REGISTRY: Final = (
    "for a new installation run `nomad-watchdog init`; if there were records here, bring them back with "
    "`nomad-watchdog registry import FILE`"
)
_LOST_REGISTRY: Final = (
    "bring the records back with `nomad-watchdog registry import FILE`; without a backup, save what the control "
    "plane still knows with `nomad-watchdog devices export` before you restart it"
)


async def _registry(settings: Settings, *, runs: bool) -> tuple[Check, bytes]:
    """Whether it can be read, and its document of migrations. `runs`: a control plane answers, which it does only
    if there was a registry when it started."""
    if settings.registry_kind == "sqlite" and not settings.registry_path.exists():
        where = f"{settings.registry_path} is not there yet"
        return Check("registry", Status.OK, where, "the first run, or `init`, makes it"), b""
    try:
        async with asyncio.timeout(TIMEOUT_S * 2), open_registry(settings) as registry:
            installation = await registry.installation()
            count = len((await registry.read()).records)
            document = await registry.document(migration.NAME)
    except NoRegistryError:
        if runs:
            what = "the registry was wiped or replaced while the control plane runs"
            return Check("registry", Status.FAIL, what, _LOST_REGISTRY), b""
        return Check("registry", Status.WARN, "not initialised yet", _NO_REGISTRY), b""
    except UserError as error:
        return Check("registry", Status.FAIL, str(error), "see registry"), b""
    except DeniedError as error:
        return _refused("registry", error), b""
    except (WatchdogError, TimeoutError, OSError) as error:
        why = str(error) or "no answer in time"
        mend = "make the store reachable; see registry"
        return Check("registry", Status.FAIL, why, mend), b""
    found = f"installation {installation}, {count} records"
    return Check("registry", Status.OK, found), document.body


def _migration(settings: Settings, kept: MigrationState) -> Check:
    """Where the fleet lives, and whether `backend` says so."""
    lives = " and ".join(sorted(kept.backends))
    if hint := migration.hint(kept, settings.backend):
        return Check("migration", Status.WARN, f"the fleet has moved to {lives}", hint)
    under_way = [move for move in kept.moves if not move.done]
    state = f", one from {under_way[0].source} is {under_way[0].state}" if under_way else ""
    return Check("migration", Status.OK, f"agents live on {lives}{state}")


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


async def _kubernetes(settings: Settings) -> list[Check]:
    client = KubernetesClient(kubernetes_settings(settings))
    try:
        version = str((await client.get("/version")).get("gitVersion", "?"))
        found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        good = found >= KUBERNETES_MINIMUM
        mend = "" if good else "upgrade the control plane to 1.34 or later"
        status = Status.OK if good else Status.WARN
        checks = [
            Check(
                "kubernetes api", Status.OK, f"{client.settings.server}, {client.settings.source}"
            ),
            Check("kubernetes version", status, version, mend),
        ]
        first, spread = settings.kubernetes.namespace, settings.kubernetes.namespaces
        try:
            known = await known_namespaces(client, first, spread)
        except DeniedError:
            known = spread  # the rights in the first one, below, say which is missing
        for number in range(known):
            space = names.namespace_of(first, number)
            checks += await _kubernetes_namespace(client, space, first=number == 0)
        return checks + _kubernetes_images(settings)
    finally:
        await client.close()


def _kubernetes_images(settings: Settings) -> list[Check]:
    """Whether the SHA-256 of what runs is verified: the container runtime does it for an image with a digest."""
    checks = []
    for name, spec in settings.readable_specs()[0].items():
        try:
            image = _objects.unverified_image(_objects.build(settings.spec_on("kubernetes", spec)))
        except UserError as error:
            mend = f'fix agent_class "{name}"; until then its devices get no agent'
            checks.append(Check(f"class {name}", Status.FAIL, str(error), mend))
            continue
        what = f"{image!a} has no digest, so that nothing verifies which agent runs"
        mend = "set the variable image to NAME@sha256:..."
        checks.append(
            Check(f"image of class {name}", Status.WARN, what, mend)
            if image
            else Check(f"image of class {name}", Status.OK, "is verified by its digest")
        )
    return checks


async def _kubernetes_namespace(
    client: KubernetesClient, namespace: str, *, first: bool
) -> list[Check]:
    name = f"kubernetes namespace {namespace}"
    try:
        await client.get(f"/api/v1/namespaces/{namespace}")
        there = Check(name, Status.OK, "is there")
    except NotFoundError:
        return [Check(name, Status.FAIL, "is not there", f"kubectl create namespace {namespace}")]
    except DeniedError:
        mend = "grant get on namespaces; jobs/kubernetes/rbac.yaml has all rights"
        there = Check(name, Status.WARN, "may not be looked at", mend)
    return [there, await _kubernetes_rights(client, namespace, first=first)]


async def _kubernetes_rights(client: KubernetesClient, namespace: str, *, first: bool) -> Check:
    name = f"kubernetes rights in {namespace}"
    asked = [
        (verb, group, resource, "")
        for group, resource, verbs in KUBERNETES_RIGHTS
        for verb in verbs
    ]
    if first:
        asked += [(verb, "", "configmaps", record) for verb, record in _RECORD_RIGHTS]
    answers = await asyncio.gather(
        *(
            _kubernetes_allows(client, namespace, group, resource, verb, only)
            for verb, group, resource, only in asked
        )
    )
    missing = [
        f"{verb} {resource}" + (f"/{only}" if only else "")
        for (verb, _, resource, only), allowed in zip(asked, answers, strict=True)
        if not allowed
    ]
    if not missing:
        return Check(name, Status.OK, "all that is needed")
    mend = f"grant {', '.join(missing)} in {namespace}; jobs/kubernetes/rbac.yaml has all"
    return Check(name, Status.FAIL, f"lacks {', '.join(missing)}", mend)


async def _kubernetes_allows(  # the parts of one question
    client: KubernetesClient, namespace: str, group: str, resource: str, verb: str, only: str
) -> bool:
    kind, _, below = resource.partition("/")
    asked = {"namespace": namespace, "group": group, "resource": kind, "verb": verb}
    asked |= {"subresource": below} if below else {}
    asked |= {"name": only} if only else {}
    # every user may ask this of themselves, and it changes nothing
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": asked},
    }
    told = await client.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", review)
    return bool((told.get("status") or {}).get("allowed"))


def _skew(name: str, date: str) -> Check:
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return Check(f"{name} clock", Status.WARN, "the answer had no date")
    skew = SystemClock().wall() - there
    if abs(skew) <= SKEW_S:
        return Check(f"{name} clock", Status.OK, f"differs by less than {SKEW_S:g} s")
    mend = "run a time daemon on both machines: certificates, tokens and ages depend on it"
    return Check(f"{name} clock", Status.WARN, f"differs by {skew:.0f} s", mend)


def _machine(settings: Settings) -> list[Check]:
    checks = []
    folders = {"state directory": settings.registry_path.parent}
    if settings.backend == "local":
        folders["agents directory"] = settings.local_directory
    for name, folder in folders.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        good = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        mend = "" if good else f"make {there} a directory that uid {os.getuid()} can write to"
        checks.append(Check(name, Status.OK if good else Status.FAIL, str(folder), mend))
    # The service raises its soft limit as far as the hard one allows.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(WANTED_FILES, 2 * settings.api.max_connections)
    enough = most == resource.RLIM_INFINITY or most >= wanted
    found = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    mend = (
        "" if enough else f"ulimit -Hn {wanted} (systemd: LimitNOFILE=), twice api.max_connections"
    )
    checks.append(Check("open files", Status.OK if enough else Status.WARN, found, mend))
    if any(p.kind == "icmp" for c in settings.agent_class.values() for p in (*c.probe, *c.confirm)):
        checks.append(_ping())
    return checks


def _ping() -> Check:
    try:
        text = Path("/proc/sys/net/ipv4/ping_group_range").read_text(encoding="ascii")
        low, high = (int(part) for part in text.split())
    except (OSError, ValueError):
        return Check("icmp", Status.WARN, "net.ipv4.ping_group_range is not readable")
    groups = {os.getegid(), *os.getgroups()}
    if os.geteuid() == 0:
        return Check("icmp", Status.OK, "agents may ping: they run as root")
    if any(low <= group <= high for group in groups):
        return Check("icmp", Status.OK, f"agents may ping: ping_group_range {low} {high}")
    mend = 'sysctl -w net.ipv4.ping_group_range="0 2147483647", or give CAP_NET_RAW'
    return Check(
        "icmp",
        Status.WARN,
        f"agents may not ping: ping_group_range {low} {high} does not include their group",
        mend,
    )

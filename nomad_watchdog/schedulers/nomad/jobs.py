"""Specs as Nomad jobs: parents for `dispatch`, one service job per device for `register`."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Final, TypedDict

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_features import Feature
from nomad_watchdog.clients.nomad_rows import Job
from nomad_watchdog.core.report_addresses import is_at
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch
from nomad_watchdog.schedulers import agent_document, job_templates
from nomad_watchdog.schedulers.nomad._view import API, SOURCE

log = logging.getLogger(__name__)

MAX_PAYLOAD: Final = 16 * 1024
"""Nomad's limit of a dispatch payload, in bytes before base64."""
_MIB: Final = 1024 * 1024
PARENT_SPEC: Final = "parent_spec"
"""Key in a parent's meta, which its children inherit: the spec of their template and resources."""
OURS: Final = frozenset({"agent_source", "agent_checksum", "token_file", "workload"})
"""Variables that every class gets, or that are for another scheduler. A template need not declare them."""


class Dispatch(TypedDict):
    """Body of a dispatch request."""

    Meta: dict[str, str]
    Payload: str
    IdempotencyToken: str
    IdPrefixTemplate: str


def template_of(spec: AgentSpec) -> job_templates.Template:
    """The template of a class. Raises UserError when there is none, or when it lacks a variable of the class."""
    template = job_templates.load(spec.template, spec.text)
    job_templates.check_variables(template, spec.variables.keys() - OURS)
    return template


async def build(client: NomadClient, spec: AgentSpec, job_id: str, installation: str) -> Job:
    """The parent job of a class: its template parsed and validated by Nomad, and linted.

    Its meta contains a hash of the job, so that an unchanged one is not registered again, and the URL of the
    replica that agents are downloaded from, which the hash does not cover. Raises UserError with all errors."""
    template = template_of(spec)
    variables = {
        "cpu": str(spec.cpu_mhz),
        "memory": str(max(10, spec.memory_bytes // _MIB)),
        "kill_timeout": f"{max(1, round(spec.kill_timeout_s * 1000))}ms",
        **spec.variables,
    }
    features = await client.features()
    disconnect = features.has(Feature.DISCONNECT)
    try:
        job = await client.parse(template.text, job_templates.variables_text(variables))
    except UserError as error:
        if disconnect or "disconnect" not in str(error):
            raise
        raise UserError(
            f"template {template.name!r}: Nomad {features} has no block `disconnect`: write"
            f" `max_client_disconnect`, and `replace_lost` in the group's meta ({error})"
        ) from error
    findings = job_templates.lint(job, disconnect=disconnect)
    if errors := [str(one) for one in findings if one.level == "error"]:
        raise UserError(f"template {template.name!r}: {'; '.join(errors)}")
    for finding in findings:
        log.warning("template warning", extra={"template": template.name, "reason": str(finding)})
    job_templates.adapt(job, disconnect=disconnect)
    job |= {"ID": job_id, "Name": job_id}
    meta = {
        **(job.get("Meta") or {}),
        "installation": installation,
        PARENT_SPEC: spec.spec_hash,
    }
    job["Meta"] = meta
    parameterized = job["ParameterizedJob"]
    assert parameterized is not None, "lint reports a job without parameters as an error"
    optional = parameterized.get("MetaOptional") or []
    parameterized["MetaOptional"] = [*optional, *({API} - set(optional))]
    await client.validate(job)
    text = json.dumps(job, sort_keys=True)
    source = variables.get("agent_source", "")
    if not (source in text and is_at(source, agent_document.api_of(spec))):
        source = ""
    text = text.replace(source, SOURCE) if source else text
    parent_hash = hashlib.sha256(text.encode()).hexdigest()[:16]
    job["Meta"] = {**meta, "parent_hash": parent_hash, SOURCE: source}
    return job


def payload(record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> bytes:
    """The agent's document as UTF-8. Raises UserError when it is too large."""
    document = agent_document.document(record, epoch, spec.agent_config)
    return agent_document.serialize(document, MAX_PAYLOAD)


def meta(record: DeviceRecord, epoch: Epoch, spec: AgentSpec, shard: int) -> dict[str, str]:
    api = agent_document.api_of(spec)
    return {
        "device_id": record.device.id,
        "slug": record.slug,
        "epoch": str(epoch),
        "spec_hash": spec.spec_hash,
        "agent_class": spec.agent_class,
        "shard": str(shard),
        **({API: " ".join(api)} if api else {}),
    }


def dispatch_body(document: bytes, meta: Mapping[str, str]) -> Dispatch:
    """`meta` as from `meta`: its slug and epoch make the idempotency token."""
    return {
        "Meta": dict(meta),
        "Payload": base64.b64encode(document).decode(),
        "IdempotencyToken": f"{meta['slug']}:{meta['epoch']}",
        "IdPrefixTemplate": meta["slug"],
    }


def service_job(
    parent: Job, job_id: str, document: bytes, meta: Mapping[str, str], *, waits: bool = True
) -> Job:
    """The parent as the job of one device, with the document in the environment.

    `waits`: on a draining node Nomad leaves it alone until the deadline of the drain, as it does with batch jobs.
    Otherwise Nomad moves the jobs of all devices at once, because each is a group of one."""
    job = copy.deepcopy(parent)
    job |= {"ID": job_id, "Name": job_id, "Type": "service", "ParameterizedJob": None}
    job["Meta"] = {**(job.get("Meta") or {}), **meta}
    # no deployments: a failed one would keep Nomad from rescheduling the agent
    job["Update"] = {"MaxParallel": 0}
    for group in job["TaskGroups"] or []:
        group["Count"] = 1
        group["Update"] = {"MaxParallel": 0}
        if waits:
            group["Migrate"] = {"MaxParallel": 0}
        for task in group["Tasks"] or []:
            task["DispatchPayload"] = None
            env = {**(task.get("Env") or {})}
            env.pop("WATCHDOG_CONFIG", None)
            env["WATCHDOG_CONFIG_B64"] = base64.b64encode(document).decode()
            task["Env"] = env
    return job

"""Specs as Nomad jobs: parents for `dispatch`, one service job a device for `register`."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from nomad_watchdog import templates
from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch
from nomad_watchdog.schedulers import documents

log = logging.getLogger(__name__)

MAX_PAYLOAD: Final = 16 * 1024
"""Nomad's limit on a dispatch payload, bytes before base64."""
_MIB: Final = 1024 * 1024


async def build(
    client: NomadClient, spec: AgentSpec, job_id: str, installation: str
) -> dict[str, Any]:
    """The parent job of a class: template parsed, linted and validated by Nomad.

    Its meta holds a hash of the rest, so that an unchanged one is not registered again. Raises
    UserError with all that is wrong."""
    template = templates.load(spec.template)
    variables = {
        "cpu": str(spec.cpu_mhz),
        "memory": str(max(10, spec.memory_bytes // _MIB)),
        "kill_timeout": f"{max(1, round(spec.kill_timeout_s * 1000))}ms",
        **spec.variables,
    }
    job = await client.parse(template.text, templates.variables_text(variables))
    findings = templates.lint(job)
    if errors := [str(one) for one in findings if one.level == "error"]:
        raise UserError(f"template {template.name!r}: {'; '.join(errors)}")
    for finding in findings:
        log.warning("template warning", extra={"template": template.name, "reason": str(finding)})
    job |= {"ID": job_id, "Name": job_id}
    job["Meta"] = {**(job.get("Meta") or {}), "installation": installation}
    await client.validate(job)
    text = json.dumps(job, sort_keys=True)
    job["Meta"]["parent_hash"] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return job


def payload(record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> bytes:
    """The agent's document. Raises UserError when it is too large."""
    told = documents.document(record, epoch, documents.class_part(spec))
    return documents.packed(told, MAX_PAYLOAD)


def meta(record: DeviceRecord, epoch: Epoch, spec: AgentSpec, shard: int) -> dict[str, str]:
    return {
        "device_id": record.device.id,
        "slug": record.slug,
        "epoch": str(epoch),
        "spec_hash": spec.spec_hash,
        "agent_class": spec.agent_class,
        "shard": str(shard),
    }


def dispatch_body(data: bytes, told: Mapping[str, str]) -> dict[str, Any]:
    return {
        "Meta": dict(told),
        "Payload": base64.b64encode(data).decode(),
        "IdempotencyToken": f"{told['slug']}:{told['epoch']}",
        "IdPrefixTemplate": told["slug"],
    }


def service_job(
    parent: Mapping[str, Any], job_id: str, data: bytes, told: Mapping[str, str]
) -> dict[str, Any]:
    """The parent as a job of one device: the document goes into the environment."""
    job = copy.deepcopy(dict(parent))
    job |= {"ID": job_id, "Name": job_id, "Type": "service", "ParameterizedJob": None}
    job["Meta"] = {**(job.get("Meta") or {}), **told}
    # no deployments: a failed one would keep Nomad from rescheduling the agent
    job["Update"] = {"MaxParallel": 0}
    for group in job["TaskGroups"]:
        group["Count"] = 1
        group["Update"] = {"MaxParallel": 0}
        for task in group["Tasks"]:
            task["DispatchPayload"] = None
            env = {**(task.get("Env") or {})}
            env.pop("WATCHDOG_CONFIG", None)
            env["WATCHDOG_CONFIG_B64"] = base64.b64encode(data).decode()
            task["Env"] = env
    return job

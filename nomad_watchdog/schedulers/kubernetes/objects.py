"""Specs as Kubernetes objects: one Deployment, StatefulSet or Pod per device."""

from __future__ import annotations

import base64
import copy
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, cast

import yaml
from watchdog_agent.runtime.parsing import whole

from nomad_watchdog.clients.kubernetes_objects import (
    EnvVar,
    KubernetesObject,
    NodeAffinity,
    ObjectMeta,
    PodSpec,
    PodTemplate,
    WorkloadSpec,
)
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch
from nomad_watchdog.schedulers import agent_document, job_templates
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes.names import KINDS, Kind

DEFAULTS: Final[Mapping[str, str]] = {
    "image": "agntup/watchdog-agent",
    "cpu_request": "100m",
    "cpu_limit": "200m",
    "lost_after": "10",
    "consul_addr": "",
}
"""Variables of the shipped template that a class may set."""
RESERVED: Final = ("workload", "token_secret")
"""Variables that the control plane uses itself; a template need not use them."""
TOKEN_FOLDER: Final = "/var/run/watchdog"  # noqa: S105  # a folder
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]{0,63})\}")
_NUMBERS: Final = re.compile(r".*(Seconds|Threshold|[pP]ort|runAsUser|runAsGroup|fsGroup)$")
_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}\Z")
_MIB: Final = 1024 * 1024
_MAX_DOCUMENT: Final = 72 * 1024
"""In base64 it stays below 128 KiB, Linux's limit of one environment variable."""

_PREFERRED: Final = "preferredDuringSchedulingIgnoredDuringExecution"
_POD: Final = {
    "metadata": {"labels": {}, "annotations": {}},
    "spec": {
        "containers": [{"name": str, "env": [{"name": str}], "volumeMounts": [{}]}],
        "tolerations": [{"key": str}],
        "affinity": {"nodeAffinity": {_PREFERRED: [{}]}},
        "nodeSelector": {},
        "volumes": [{}],
    },
}
_SHAPE: Final = {"spec": {"strategy": {}, "template": _POD}}
"""The parts of a template that are read or extended here. The API server validates the rest."""


@dataclass(frozen=True, slots=True)
class Built:
    """A class's template with its variables replaced."""

    kind: Kind
    pod: PodTemplate
    """`spec.template` of the template: metadata and spec of the pod."""
    token_secret: str


def build(spec: AgentSpec) -> Built:
    """The template of a class, with its variables replaced and checked. Raises UserError with all errors."""
    template = job_templates.load_yaml(spec.template, spec.text)
    kind = next((one for one in KINDS if one == spec.variables.get("workload", KINDS[0])), None)
    if kind is None:
        raise UserError(f"workload {spec.variables['workload']!r}: allowed are {', '.join(KINDS)}")
    try:
        document = yaml.safe_load(template.text)
    except yaml.YAMLError as error:
        raise UserError(f"template {template.name!r} is not YAML: {str(error)[:300]}") from None
    filled, used = _fill(document, _variables(spec))
    unused = spec.variables.keys() - used - set(RESERVED)
    if unused:
        raise job_templates.UndeclaredError(template.name, min(unused), used)
    if wrong := list(_lint(filled)):
        raise UserError(f"template {template.name!r}: {'; '.join(wrong)}")
    pod = cast("KubernetesObject", filled)["spec"][
        "template"
    ]  # of the shape that _lint has checked
    assert pod is not None
    return Built(kind, pod, spec.variables.get("token_secret", ""))


def unverified_image(built: Built) -> str:
    """The image of the agent if it has no digest, so that its tag can change what runs; "" = it has one."""
    image = next(
        str(one.get("image", ""))
        for one in built.pod["spec"]["containers"] or []
        if one.get("name") == "agent"
    )
    return "" if _DIGEST.search(image) else image


def _variables(spec: AgentSpec) -> dict[str, str]:
    memory = max(4, math.ceil(spec.memory_bytes / _MIB))
    return {
        **DEFAULTS,
        "memory_request": f"{memory}Mi",
        "memory_limit": f"{2 * memory}Mi",
        "kill_timeout": str(max(1, math.ceil(spec.kill_timeout_s))),
        "version": spec.version,
        **spec.variables,
    }


def _fill(value: object, variables: Mapping[str, str], key: str = "") -> tuple[object, set[str]]:
    """The document with each ``${name}`` in its texts replaced, and the names used. Variables are replaced after
    parsing, so no value can change the structure of the document."""
    used: set[str] = set()
    if isinstance(value, dict):
        filled: dict[object, object] = {}
        for name, one in value.items():
            filled[name], more = _fill(one, variables, str(name))
            used |= more
        return filled, used
    if isinstance(value, list):
        pairs = [_fill(one, variables, key) for one in value]
        return [one for one, _ in pairs], used.union(*(more for _, more in pairs))
    if not isinstance(value, str):
        return value, used

    def replaced(found: re.Match[str]) -> str:
        if found[1] not in variables:
            known = ", ".join(sorted(variables))
            raise UserError(f"template variable {found[1]!r} is not set; expected one of: {known}")
        used.add(found[1])
        return variables[found[1]]

    text = _VARIABLE.sub(replaced, value)
    if _NUMBERS.fullmatch(key) and text != value:
        try:
            return whole(text), used
        except ValueError as error:
            raise UserError(f"template {key}: {error}") from None
    return text, used


def _wrong_types(value: object, shape: object, where: str) -> Iterator[str]:
    """Parts of the document with another type than in `shape`. Keys may be missing, and values null."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} is not a mapping"
            return
        for name, one in shape.items():
            if value.get(name) is not None:
                yield from _wrong_types(value[name], one, f"{where}.{name}" if where else name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is not a list"
            return
        for at, one in enumerate(value):
            yield from _wrong_types(one, shape[0], f"{where}[{at}]")
    elif not isinstance(value, str):
        yield f"{where} is not text"


def _lint(document: object) -> Iterator[str]:
    if not isinstance(document, dict) or document.get("kind") != "Deployment":
        yield "is not a Deployment (its pod template is also used for other workloads)"
        return
    if wrong := list(_wrong_types(document, _SHAPE, "")):
        yield from wrong
        return
    spec = cast("KubernetesObject", document).get("spec") or {}
    if spec.get("replicas", 1) != 1:
        yield f"replicas is {spec['replicas']}; it must be 1, as a device has one agent"
    if (spec.get("strategy") or {}).get("type", "Recreate") != "Recreate":
        yield "strategy must be Recreate, so that a device never has two agents"
    yield from _lint_pod((spec.get("template") or {}).get("spec") or {})


def _lint_pod(pod: PodSpec) -> Iterator[str]:
    if pod.get("restartPolicy", "Always") != "Always":
        yield "restartPolicy must be Always, so that the kubelet restarts a crashed agent"
    if not [one for one in pod.get("containers") or [] if one.get("name") == "agent"]:
        yield "has no container named agent"
    tolerated = {one.get("key") for one in pod.get("tolerations") or []}
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if key not in tolerated:
            yield f"has no toleration of {key}: Kubernetes would wait five minutes for a lost node"


def document_of(record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> tuple[bytes, str]:
    """The agent's document as UTF-8 without its credential, and the credential. Raises UserError when the document
    is too large."""
    part = dict(spec.agent_config)
    credential = str(part.pop(agent_document.CREDENTIAL, ""))
    document = agent_document.document(record, epoch, part)
    return agent_document.serialize(document, _MAX_DOCUMENT), credential


def labels_of(
    record: DeviceRecord,
    epoch: Epoch,
    spec: AgentSpec,
    *,
    kind: Kind,
    shard: int,
    installation: str,
) -> dict[str, str]:
    """Labels of the object and of its pod."""
    return {
        names.APP: names.AGENT,
        names.MANAGED: names.DOMAIN,
        names.INSTALLATION: names.label(installation, "installation"),
        names.SLUG: record.slug,
        names.CLASS: names.label(spec.agent_class, "agent class"),
        names.VERSION: names.version_label(spec.version),
        names.EPOCH: str(epoch),
        names.SHARD: str(shard),
        names.WORKLOAD: kind,
    }


def workload(
    built: Built,
    record: DeviceRecord,
    spec: AgentSpec,
    *,
    labels: Mapping[str, str],
    document: bytes,
    secret: str,
) -> KubernetesObject:
    """The object of one device, for server-side apply. `secret`: name of the Secret with the agent's token, or ""."""
    name = names.name_of(record.slug)
    annotations = {names.DEVICE_ID: record.device.id, names.SPEC_HASH: spec.spec_hash}
    if api := agent_document.api_of(spec):
        annotations[names.API] = " ".join(api)
    pod = copy.deepcopy(built.pod)
    own: ObjectMeta = pod.get("metadata") or {}
    pod_meta: ObjectMeta = {
        **own,
        "labels": {**(own.get("labels") or {}), **labels},
        "annotations": {**(own.get("annotations") or {}), **annotations},
    }
    pod["metadata"] = pod_meta
    _add_to_agent(pod["spec"], record, document, secret)
    if spec.avoid:
        _prefer_others(pod["spec"], spec.avoid)
    if built.kind == "pod":
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {**pod_meta, "name": name},
            "spec": cast("WorkloadSpec", pod["spec"]),
        }
    meta: ObjectMeta = {"name": name, "labels": dict(labels), "annotations": annotations}
    body: WorkloadSpec = {
        "replicas": 1,
        "revisionHistoryLimit": 0,
        "selector": {"matchLabels": {names.SLUG: record.slug, names.APP: names.AGENT}},
        "template": pod,
    }
    if built.kind == "deployment":
        body["strategy"] = {"type": "Recreate"}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": body}
    # Parallel: with the default a pod that never becomes ready would block the version that fixes it.
    body |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": body}


def _add_to_agent(pod: PodSpec, record: DeviceRecord, document: bytes, secret: str) -> None:
    """Add the device's data to the container named agent."""
    agent = next(one for one in pod["containers"] or [] if one.get("name") == "agent")
    ours = {
        # escaped, so that it cannot refer to another variable (S11)
        "DEVICE_ID": record.device.id.replace("$", "$$"),
        "WATCHDOG_CONFIG_B64": base64.b64encode(document).decode(),
    }
    if secret:
        ours["WATCHDOG_TOKEN_FILE"] = f"{TOKEN_FOLDER}/token"
        mount = {"name": "watchdog-token", "mountPath": TOKEN_FOLDER, "readOnly": True}
        agent["volumeMounts"] = [*(agent.get("volumeMounts") or []), mount]
        volume: dict[str, object] = {
            "name": "watchdog-token",
            "secret": {"secretName": secret, "defaultMode": 0o440},
        }
        pod["volumes"] = [*(pod.get("volumes") or []), volume]
    others = [one for one in agent.get("env") or [] if one.get("name") not in ours]
    own: list[EnvVar] = [{"name": name, "value": value} for name, value in ours.items()]
    agent["env"] = [*others, *own]


def _prefer_others(pod: PodSpec, avoid: Collection[str]) -> None:
    """Add a preference for nodes other than these, with the highest weight that Kubernetes allows."""
    others = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in avoid]
    affinity = pod.get("affinity") or {}
    of_nodes = affinity.get("nodeAffinity") or {}
    preferred = of_nodes.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    own: dict[str, object] = {"weight": 100, "preference": {"matchFields": others}}
    changed: NodeAffinity = {
        **of_nodes,
        "preferredDuringSchedulingIgnoredDuringExecution": [*preferred, own],
    }
    pod["affinity"] = {**affinity, "nodeAffinity": changed}


def token_secret(name: str, labels: Mapping[str, str], credential: str) -> KubernetesObject:
    """The Secret with the credential of one agent, which is valid only for its device and epoch."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": dict(labels)},
        "type": "Opaque",
        "data": {"token": base64.b64encode(credential.encode()).decode()},
    }


def expecting(body: KubernetesObject, found: KubernetesObject | None) -> KubernetesObject:
    """The body as a compare-and-set against what was found. No object ever has version 1: with this version the
    object is created, and an existing one is a conflict (S2)."""
    meta: ObjectMeta = {**body["metadata"], "resourceVersion": "1"}
    if found is not None:
        meta["uid"] = found["metadata"]["uid"]
        meta["resourceVersion"] = found["metadata"]["resourceVersion"]
    return {**body, "metadata": meta}

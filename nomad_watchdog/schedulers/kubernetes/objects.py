"""Specs as Kubernetes objects: one Deployment, StatefulSet or Pod a device."""

from __future__ import annotations

import base64
import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

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
"""Variables that are ours, whatever the template."""
TOKEN_FOLDER: Final = "/var/run/watchdog"  # noqa: S105  # a folder
_CREDENTIAL: Final = "credential"
_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]{0,63})\}")
_NUMBERS: Final = re.compile(r".*(Seconds|Threshold|[pP]ort|runAsUser|runAsGroup|fsGroup)$")
_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}\Z")
_MIB: Final = 1024 * 1024
_MAX_DOCUMENT: Final = 72 * 1024
"""Base64 of it stays below the 128 KiB that Linux allows one variable of the environment."""

_POD: Final = {
    "metadata": {"labels": {}, "annotations": {}},
    "spec": {
        "containers": [{"name": str, "env": [{"name": str}], "volumeMounts": [{}]}],
        "tolerations": [{"key": str}],
        "volumes": [{}],
    },
}
_SHAPE: Final = {"spec": {"strategy": {}, "template": _POD}}
"""As far as we look into a template or add to it; the rest is the API server's to judge."""

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Built:
    """A class's template, filled."""

    kind: Kind
    pod: Object
    """`spec.template` of the template: metadata and spec of the pod."""
    token_secret: str


def build(spec: AgentSpec) -> Built:
    """The template of a class, parsed, filled and looked through. Raises UserError with all that is wrong."""
    template = job_templates.load_yaml(spec.template, spec.text)
    kind = next((one for one in KINDS if one == spec.variables.get("workload", KINDS[0])), None)
    if kind is None:
        raise UserError(f"workload {spec.variables['workload']!r}: allowed are {', '.join(KINDS)}")
    try:
        document = yaml.safe_load(template.text)
    except yaml.YAMLError as error:
        raise UserError(f"template {template.name!r} is no YAML: {str(error)[:300]}") from None
    filled, used = _fill(document, _variables(spec))
    unused = spec.variables.keys() - used - set(RESERVED)
    if unused:
        raise job_templates.UndeclaredError(template.name, min(unused), used)
    if wrong := list(_lint(filled)):
        raise UserError(f"template {template.name!r}: {'; '.join(wrong)}")
    return Built(kind, filled["spec"]["template"], spec.variables.get("token_secret", ""))


def unverified_image(built: Built) -> str:
    """The image of the agent if it has no digest, so that the container runtime runs whatever its tag means at the
    time; "" = it has one."""
    image = next(
        str(one.get("image", ""))
        for one in built.pod["spec"]["containers"]
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


def _fill(value: Any, variables: Mapping[str, str], key: str = "") -> tuple[Any, set[str]]:
    """The document with each ``${name}`` in its texts replaced, and the names used. Filled after it was
    parsed: no value can become another part of the document."""
    used: set[str] = set()
    if isinstance(value, dict):
        filled: Any = {}
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
            raise UserError(f"template variable {found[1]!r} is not set; known are {known}")
        used.add(found[1])
        return variables[found[1]]

    text = _VARIABLE.sub(replaced, value)
    if _NUMBERS.fullmatch(key) and text != value:
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"template {key}: {text!r} is no whole number")
        return int(text), used
    return text, used


def _misshapen(value: Any, shape: Any, where: str) -> Iterator[str]:
    """Where the document is not built as a Deployment is. What is left out, or null, is left out."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{where} is no mapping"
            return
        for name, one in shape.items():
            if value.get(name) is not None:
                yield from _misshapen(value[name], one, f"{where}.{name}" if where else name)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{where} is no list"
            return
        for at, one in enumerate(value):
            yield from _misshapen(one, shape[0], f"{where}[{at}]")
    elif not isinstance(value, shape):
        yield f"{where} is no text"


def _lint(document: Any) -> Iterator[str]:
    if not isinstance(document, dict) or document.get("kind") != "Deployment":
        yield "is no Deployment (for another workload too: its pod template is taken)"
        return
    if wrong := list(_misshapen(document, _SHAPE, "")):
        yield from wrong
        return
    spec = document.get("spec") or {}
    if spec.get("replicas", 1) != 1:
        yield f"replicas is {spec['replicas']}; a device has one agent"
    if (spec.get("strategy") or {}).get("type", "Recreate") != "Recreate":
        yield "strategy must be Recreate: never two at once"
    pod = ((spec.get("template") or {}).get("spec")) or {}
    if pod.get("restartPolicy", "Always") != "Always":
        yield "restartPolicy must be Always: the kubelet restarts a crashed agent"
    if not [one for one in pod.get("containers") or [] if one.get("name") == "agent"]:
        yield "has no container named agent"
    asked = {one.get("key") for one in pod.get("tolerations") or []}
    for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        if key not in asked:
            yield f"no toleration of {key}: Kubernetes would wait five minutes for a lost node"


def document_of(record: DeviceRecord, epoch: Epoch, spec: AgentSpec) -> tuple[bytes, str]:
    """The agent's document without its credential, and that. Raises UserError when it is too large."""
    part = agent_document.class_part(spec)
    credential = str(part.pop(_CREDENTIAL, ""))
    return agent_document.packed(
        agent_document.document(record, epoch, part), _MAX_DOCUMENT
    ), credential


def labels_of(
    record: DeviceRecord,
    epoch: Epoch,
    spec: AgentSpec,
    *,
    kind: Kind,
    shard: int,
    installation: str,
) -> dict[str, str]:
    """Of the object and of its pod."""
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
) -> dict[str, Any]:
    """The object of one device, for server-side apply. `secret`: the one with the agent's token, or empty."""
    name = names.name_of(record.slug)
    annotations = {names.DEVICE_ID: record.device.id, names.SPEC_HASH: spec.spec_hash}
    if api := agent_document.api_of(spec):
        annotations[names.API] = " ".join(api)
    pod = copy.deepcopy(dict(built.pod))
    own = pod.get("metadata") or {}
    pod["metadata"] = {
        **own,
        "labels": {**(own.get("labels") or {}), **labels},
        "annotations": {**(own.get("annotations") or {}), **annotations},
    }
    _equip(pod["spec"], record, document, secret)
    meta = {"name": name, "labels": dict(labels), "annotations": annotations}
    if built.kind == "pod":
        meta = {**pod["metadata"], "name": name}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod["spec"]}
    body: dict[str, Any] = {
        "replicas": 1,
        "revisionHistoryLimit": 0,
        "selector": {"matchLabels": {names.SLUG: record.slug, names.APP: names.AGENT}},
        "template": pod,
    }
    if built.kind == "deployment":
        body["strategy"] = {"type": "Recreate"}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": body}
    # Parallel: with the default a pod that never gets ready would hold up the version that mends it.
    body |= {"serviceName": name, "podManagementPolicy": "Parallel"}
    return {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": body}


def _equip(pod: dict[str, Any], record: DeviceRecord, document: bytes, secret: str) -> None:
    """Give the container named agent what only we know."""
    agent = next(one for one in pod["containers"] if one.get("name") == "agent")
    ours = {
        "DEVICE_ID": record.device.id.replace("$", "$$"),  # no reference to another variable (S11)
        "WATCHDOG_CONFIG_B64": base64.b64encode(document).decode(),
    }
    if secret:
        ours["WATCHDOG_TOKEN_FILE"] = f"{TOKEN_FOLDER}/token"
        mount = {"name": "watchdog-token", "mountPath": TOKEN_FOLDER, "readOnly": True}
        agent["volumeMounts"] = [*(agent.get("volumeMounts") or []), mount]
        volume = {"name": "watchdog-token", "secret": {"secretName": secret, "defaultMode": 0o440}}
        pod["volumes"] = [*(pod.get("volumes") or []), volume]
    kept = [one for one in agent.get("env") or [] if one.get("name") not in ours]
    agent["env"] = [*kept, *({"name": name, "value": value} for name, value in ours.items())]


def token_secret(name: str, labels: Mapping[str, str], credential: str) -> dict[str, Any]:
    """The Secret with the credential of one agent, good for its device and epoch only."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": dict(labels)},
        "type": "Opaque",
        "data": {"token": base64.b64encode(credential.encode()).decode()},
    }


def expecting(body: Mapping[str, Any], found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The body as a compare-and-set against what was found. Nothing ever has version 1, so that with it
    an object is made, and one that is there already is a conflict (S2)."""
    meta = dict(body["metadata"])
    if found is None:
        meta["resourceVersion"] = "1"
    else:
        meta |= {key: found["metadata"][key] for key in ("uid", "resourceVersion")}
    return {**body, "metadata": meta}

"""Reads pod specs and builds pod status. Pure, except for the directory of the volumes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

MARK: Final = "NOMAD_WATCHDOG_DEV_POD"
"""Variable in the environment of each process with the directory of its pod, so that none is left behind."""
_REFERENCE: Final = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
_UNITS: Final = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 1024.0, "Mi": 1024.0**2, "Gi": 1024.0**3,
}  # fmt: skip

Object = Mapping[str, Any]


class CannotRunError(Exception):
    """The container cannot be created from this spec; the message is put into its status."""


@dataclass(frozen=True, slots=True)
class Image:
    """Replacement for an image: its command and its environment."""

    entrypoint: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Run:
    """The state and history of one container."""

    ready: bool = False
    started: bool = False
    restarts: int = 0
    pid: int = 0
    """0 without a process: no process has this number in /proc."""
    began: float = 0.0
    state: dict[str, Any] = field(
        default_factory=lambda: {"waiting": {"reason": "ContainerCreating"}}
    )
    last: dict[str, Any] = field(default_factory=dict)

    def status(self, container: Object) -> dict[str, Any]:
        return {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last,
        }


def quantity(text: str) -> float:
    """Parse a Kubernetes quantity such as 100m or 128Mi."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS:
        raise CannotRunError(f"not a quantity: {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def memory_limit(container: Object) -> float | None:
    """The memory limit in bytes; None = no limit."""
    limit = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    return None if limit is None else quantity(str(limit))


def field_of(pod: Object, path: str, ip: str) -> str:
    """The value of a downward API field."""
    meta, spec = pod["metadata"], pod["spec"]
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path):
        return str((meta.get(found[1]) or {}).get(found[2], ""))
    known = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.podIP": ip,
        "status.hostIP": "127.0.0.1",
    }
    if path not in known:
        raise CannotRunError(f"fieldRef {path!r} is not known here")
    return str(known[path])


def environment(
    pod: Object, container: Object, image: Image, ip: str, secrets: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:
    """The container's environment, with ``$(NAME)`` replaced by variables set earlier.

    Raises CannotRunError for an invalid reference."""
    env = dict(image.env)
    for one in container.get("env") or []:
        source = one.get("valueFrom")
        if not source:
            env[one["name"]] = expand(str(one.get("value") or ""), env)
        elif "fieldRef" in source:
            env[one["name"]] = field_of(pod, source["fieldRef"]["fieldPath"], ip)
        elif "secretKeyRef" in source:
            asked = source["secretKeyRef"]
            held = secrets.get(asked["name"], {})
            if asked["key"] in held:
                env[one["name"]] = held[asked["key"]]
            elif not asked.get("optional"):
                raise CannotRunError(f"couldn't find key {asked['key']} in Secret {asked['name']}")
        else:
            raise CannotRunError(f"env {one['name']}: its source is not known here")
    return env


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace ``$(NAME)`` from the environment and ``$$`` by a dollar sign; unknown names are not changed."""
    return _REFERENCE.sub(
        lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]), text
    )


def secret_names(container: Object) -> set[str]:
    """Names of the Secrets that the container's environment refers to."""
    sources = [one.get("valueFrom") or {} for one in container.get("env") or []]
    return {one["secretKeyRef"]["name"] for one in sources if "secretKeyRef" in one}


def moved(text: str, mounts: Mapping[str, str]) -> str:
    """Convert a path in the container to a path on this machine, because there is no separate file system. `mounts`:
    mount path → directory."""
    for path, folder in sorted(mounts.items(), reverse=True):  # the innermost one first
        if text == path or text.startswith(f"{path}/"):
            return folder + text[len(path) :]
    return text


def command(container: Object, image: Image, env: Mapping[str, str]) -> list[str]:
    argv: Sequence[str] = container.get("command") or image.entrypoint
    arguments: Sequence[str] = container.get("args") or ()
    return [expand(str(one), env) for one in (*argv, *arguments)]


def pod_status(
    pod: Object, runs: Sequence[Run], *, ip: str, phase: str, started_at: str, now: str
) -> dict[str, Any]:
    """A patch of the status; an unchanged condition keeps its time."""
    known = {one["type"]: one for one in (pod.get("status") or {}).get("conditions") or []}
    ready = bool(runs) and all(run.ready for run in runs) and phase == "Running"
    truth = {"Initialized": True, "ContainersReady": ready, "Ready": ready}
    conditions = []
    for kind, value in truth.items():
        word = "True" if value else "False"
        before = known.get(kind) or {}
        since = before.get("lastTransitionTime") if before.get("status") == word else now
        told = {"type": kind, "status": word, "lastTransitionTime": since or now}
        conditions.append(told if value else told | {"reason": "ContainersNotReady"})
    containers = pod["spec"]["containers"]
    return {
        "phase": phase,
        "hostIP": "127.0.0.1",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "startTime": started_at,
        "conditions": conditions,
        "containerStatuses": [run.status(one) for run, one in zip(runs, containers, strict=True)],
    }

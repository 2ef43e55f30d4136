"""A pool as Kubernetes objects: a Deployment, and for `scaler = "external"` a HorizontalPodAutoscaler.

Pure: values in, manifests out. The Deployment never says `replicas`: whoever applies it must not take the
count from the one who scales it (server-side apply would).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Final

from watchdog_agent.runtime.parsing import finite

from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.core.pool_scaling import Measure
from nomad_watchdog.errors import UserError

LABEL: Final = "nomad-watchdog/pool"
INSTALLATION: Final = "nomad-watchdog/pool-of"
"""Not the label of agents: what is listed by that is an agent."""
POOL_HASH: Final = "nomad-watchdog/pool-hash"
WORKER_HASH: Final = "nomad-watchdog/worker-hash"
_MAX_WINDOW_S: Final = 3600
_MAX_PERIOD_S: Final = 1800
"""Of `behavior`, by the API's own validation (autoscaling/v2)."""


def manifests(
    name: str, pool: PoolSettings, *, namespace: str, installation: str
) -> list[dict[str, Any]]:
    """The objects of a pool, in the order in which they are applied. The first is the Deployment.

    Raises UserError for a pool that Kubernetes can't have."""
    if not pool.image:
        raise UserError(f"pool {name}: kubernetes needs an image")
    labels = {
        "app.kubernetes.io/name": "nomad-watchdog-pool",
        "app.kubernetes.io/managed-by": "nomad-watchdog",
        LABEL: name,
        INSTALLATION: installation,
    }
    meta = {"name": object_name(name), "namespace": namespace, "labels": labels}
    found = [_deployment(name, pool, meta, labels)]
    if pool.scaler == "external":
        found.append(_autoscaler(name, pool, meta))
    return found


def unfinished(deployment: Mapping[str, Any]) -> dict[str, Any]:
    """As it stands until all objects of the pool are as the settings say."""
    meta = deployment["metadata"]
    annotations = {key: told for key, told in meta["annotations"].items() if key != POOL_HASH}
    return {**deployment, "metadata": {**meta, "annotations": annotations}}


def object_name(name: str) -> str:
    """No agent's object is called so: their names are slugs, which end in a hash."""
    return f"pool-{name}"


def _deployment(
    name: str, pool: PoolSettings, meta: dict[str, Any], labels: dict[str, str]
) -> dict[str, Any]:
    env = [{"name": key, "value": value} for key, value in sorted(pool.env.items())]
    env.append({"name": "WORKER_POOL", "value": name})
    share = {"cpu": f"{pool.cpu}m", "memory": str(pool.memory)}
    container: dict[str, Any] = {
        "name": "worker",
        "image": pool.image,
        "env": env,
        "resources": {"requests": share, "limits": {"memory": share["memory"]}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    if pool.command:
        container["args"] = list(pool.command)
    spec = {
        "containers": [container],
        "terminationGracePeriodSeconds": math.ceil(pool.kill_timeout),
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    }
    whole = hashlib.sha256(pool.model_dump_json().encode()).hexdigest()[:16]
    annotations = {WORKER_HASH: pool.worker_hash(""), POOL_HASH: whole}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta | {"annotations": annotations},
        "spec": {
            "selector": {"matchLabels": {key: labels[key] for key in (LABEL, INSTALLATION)}},
            "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def _autoscaler(name: str, pool: PoolSettings, meta: dict[str, Any]) -> dict[str, Any]:
    if pool.min < 1:
        raise UserError(f"pool {name}: min must be 1 or more, as kubernetes scales none to 0")
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": meta,
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": meta["name"]},
            "minReplicas": pool.min,
            "maxReplicas": pool.max,
            "metrics": [_metric(name, pool.metric[0])],
            "behavior": {
                "scaleUp": _rules(0.0, pool.step_up, pool.cooldown_up),
                "scaleDown": _rules(pool.settle, pool.step_down, pool.cooldown_down),
            },
        },
    }


def _rules(window_s: float, step: int, cooldown_s: float) -> dict[str, Any]:
    """A step once a cool-down; the API allows no period below a second."""
    period_s = max(1, min(_MAX_PERIOD_S, math.ceil(cooldown_s)))
    return {
        "stabilizationWindowSeconds": min(_MAX_WINDOW_S, math.ceil(window_s)),
        "policies": [{"type": "Pods", "value": step, "periodSeconds": period_s}],
        "selectPolicy": "Max",
    }


def _metric(name: str, metric: MetricSettings) -> dict[str, Any]:
    if metric.kind in ("cpu", "memory"):
        target = {"type": "Utilization", "averageUtilization": max(1, round(metric.target))}
        return {"type": "Resource", "resource": {"name": metric.kind, "target": target}}
    if not metric.name:
        raise UserError(
            f'pool {name}: metric "{metric.kind}" needs name: what the metrics adapter calls it'
        )
    # AverageValue is the sum shared by the pods, Value what is compared as it is.
    kind = "AverageValue" if metric.measure is Measure.ALL else "Value"
    key = "averageValue" if kind == "AverageValue" else "value"
    external = {
        "metric": {"name": metric.name},
        "target": {"type": kind, key: _quantity(metric.target)},
    }
    return {"type": "External", "external": external}


def _quantity(value: float) -> str:
    """As Kubernetes writes numbers: whole, or in thousandths; the least is one thousandth."""
    if value.is_integer():
        return str(int(value))
    return f"{max(1, round(value * 1000))}m"


def used(item: Any, pool: PoolSettings) -> tuple[float, float]:
    """(CPU, memory) of one pod of the metrics API, in percent of what a worker is given.

    Raises ValueError for what makes no sense."""
    try:
        shares = [one["usage"] for one in item["containers"]]
        cpu = sum(number(one["cpu"]) for one in shares)
        memory = sum(number(one["memory"]) for one in shares)
    except (KeyError, TypeError) as error:
        raise ValueError("no usage of a pod") from error
    return 100_000.0 * cpu / pool.cpu, 100.0 * memory / pool.memory


_SUFFIX: Final = {
    "n": 1e-9,
    "u": 1e-6,
    "m": 1e-3,
    "": 1.0,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
}


def number(quantity: str) -> float:
    """What a quantity means: "250m", "12Mi", "31415926n". Raises ValueError."""
    text = quantity.rstrip("abcdefghijklmnopqrstuvwxyzKMGTPE")
    suffix = quantity[len(text) :]
    if suffix not in _SUFFIX:
        raise ValueError(f"quantity {quantity!r}")
    return finite(text) * _SUFFIX[suffix]

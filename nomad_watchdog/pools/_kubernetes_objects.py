"""A pool as Kubernetes objects: a Deployment, and for `scaler = "external"` a HorizontalPodAutoscaler.

Pure: values in, manifests out. The Deployment has no `replicas`, because server-side apply would overwrite the
number that the scaler has set.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.clients.kubernetes_objects import PodMetrics
from nomad_watchdog.clients.kubernetes_quantities import number
from nomad_watchdog.config.pools import MetricSettings, PoolSettings
from nomad_watchdog.core.pool_scaling import Measure
from nomad_watchdog.errors import UserError

LABEL: Final = "nomad-watchdog/pool"
INSTALLATION: Final = "nomad-watchdog/pool-of"
"""Differs from the label of agents, so that lists of agents do not include workers."""
POOL_HASH: Final = "nomad-watchdog/pool-hash"
WORKER_HASH: Final = "nomad-watchdog/worker-hash"
_MAX_WINDOW_S: Final = 3600
_MAX_PERIOD_S: Final = 1800
"""Maximum values of `behavior` in the API (autoscaling/v2)."""


@dataclass(frozen=True, slots=True)
class Manifests:
    """The objects of a pool, for server-side apply."""

    unfinished_deployment: Mapping[str, object]
    """Without the hash of the pool: applied until the pool is complete."""
    deployment: Mapping[str, object]
    autoscaler: Mapping[str, object] | None
    pool_hash: str
    """Annotation POOL_HASH of the complete Deployment."""


def manifests(name: str, pool: PoolSettings, *, namespace: str, installation: str) -> Manifests:
    """The objects of a pool. Raises UserError for a pool that is not possible on Kubernetes."""
    if not pool.image:
        raise UserError(f"pool {name}: kubernetes needs an image")
    labels = {
        "app.kubernetes.io/name": "nomad-watchdog-pool",
        "app.kubernetes.io/managed-by": "nomad-watchdog",
        LABEL: name,
        INSTALLATION: installation,
    }
    meta = {"name": object_name(name), "namespace": namespace, "labels": labels}
    spec = _deployment_spec(name, pool, labels)
    pool_hash = hashlib.sha256(pool.model_dump_json().encode()).hexdigest()[:16]
    workers = {WORKER_HASH: pool.worker_hash("")}
    return Manifests(
        _deployment(meta, workers, spec),
        _deployment(meta, {**workers, POOL_HASH: pool_hash}, spec),
        _autoscaler(name, pool, meta) if pool.scaler == "external" else None,
        pool_hash,
    )


def object_name(name: str) -> str:
    """The name of a pool's objects. It differs from every agent's name, which ends in a hash."""
    return f"pool-{name}"


def _deployment(
    meta: Mapping[str, object], annotations: Mapping[str, str], spec: Mapping[str, object]
) -> dict[str, object]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {**meta, "annotations": annotations},
        "spec": spec,
    }


def _deployment_spec(name: str, pool: PoolSettings, labels: Mapping[str, str]) -> dict[str, object]:
    env = [{"name": key, "value": value} for key, value in sorted(pool.env.items())]
    env.append({"name": "WORKER_POOL", "value": name})
    share = {"cpu": f"{pool.cpu}m", "memory": str(pool.memory)}
    container: dict[str, object] = {
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
    return {
        "selector": {"matchLabels": {key: labels[key] for key in (LABEL, INSTALLATION)}},
        "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
        "template": {"metadata": {"labels": labels}, "spec": spec},
    }


def _autoscaler(name: str, pool: PoolSettings, meta: Mapping[str, object]) -> dict[str, object]:
    if pool.min < 1:
        raise UserError(
            f"pool {name}: min must be at least 1, because kubernetes does not scale to 0"
        )
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


def _rules(window_s: float, step: int, cooldown_s: float) -> dict[str, object]:
    """At most one step per cool-down. The API allows no period below one second."""
    period_s = max(1, min(_MAX_PERIOD_S, math.ceil(cooldown_s)))
    return {
        "stabilizationWindowSeconds": min(_MAX_WINDOW_S, math.ceil(window_s)),
        "policies": [{"type": "Pods", "value": step, "periodSeconds": period_s}],
        "selectPolicy": "Max",
    }


def _metric(name: str, metric: MetricSettings) -> dict[str, object]:
    if metric.kind in ("cpu", "memory"):
        target: dict[str, object] = {
            "type": "Utilization",
            "averageUtilization": max(1, round(metric.target)),
        }
        return {"type": "Resource", "resource": {"name": metric.kind, "target": target}}
    if not metric.name:
        raise UserError(
            f'pool {name}: metric "{metric.kind}" needs `name`, the name in the metrics adapter'
        )
    # AverageValue is divided by the number of pods before it is compared, Value is not.
    kind = "AverageValue" if metric.measure is Measure.ALL else "Value"
    key = "averageValue" if kind == "AverageValue" else "value"
    external = {
        "metric": {"name": metric.name},
        "target": {"type": kind, key: _quantity(metric.target)},
    }
    return {"type": "External", "external": external}


def _quantity(value: float) -> str:
    """A number as Kubernetes writes it: whole, or in thousandths; the minimum is one thousandth."""
    if value.is_integer():
        return str(int(value))
    return f"{max(1, round(value * 1000))}m"


def used(pod: PodMetrics, pool: PoolSettings) -> tuple[float, float]:
    """(CPU, memory) of one pod of the metrics API, in percent of a worker's share.

    Raises ValueError for a pod without valid usage."""
    try:
        shares = [one["usage"] for one in pod["containers"]]
        cpu = sum(number(one["cpu"]) for one in shares)
        memory = sum(number(one["memory"]) for one in shares)
    except (KeyError, TypeError) as error:
        raise ValueError("no usage of a pod") from error
    return 100_000.0 * cpu / pool.cpu, 100.0 * memory / pool.memory

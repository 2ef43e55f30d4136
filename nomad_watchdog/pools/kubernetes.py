"""Pools on Kubernetes: one Deployment per pool; `replicas` is the number of workers.

Only the scale subresource changes the count. The control plane, a HorizontalPodAutoscaler
(`scaler = "external"`) and `kubectl scale` all use it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import ConflictError, NotFoundError, TerminalError
from nomad_watchdog.pools import PoolStatus, Usage, average
from nomad_watchdog.pools import _kubernetes_objects as objects


class KubernetesPools:
    """The driver for the backend `kubernetes`. All pools are in one namespace."""

    def __init__(self, client: KubernetesClient, *, namespace: str, installation: str) -> None:
        self._client = client
        self._namespace = namespace
        self._installation = installation
        self._deployments = f"/apis/apps/v1/namespaces/{namespace}/deployments"
        self._scalers = f"/apis/autoscaling/v2/namespaces/{namespace}/horizontalpodautoscalers"

    async def close(self) -> None:
        await self._client.close()

    async def run(self, is_leader: Callable[[], bool]) -> None:  # noqa: ARG002  # the protocol's signature
        """Kubernetes starts and restarts the workers by itself."""
        await asyncio.Event().wait()

    async def list_pools(self) -> Mapping[str, PoolStatus]:
        mine = f"{objects.INSTALLATION}={self._installation}"
        listed = await self._client.list(self._deployments, labels=mine)
        return {
            _labels(one)[objects.LABEL]: _status(one)
            for one in listed.items
            if not one["metadata"].get("deletionTimestamp") and objects.LABEL in _labels(one)
        }

    async def status(self, name: str) -> PoolStatus | None:
        found = await self._client.find(self._path(name))
        if found is None or not self._is_ours(found) or found["metadata"].get("deletionTimestamp"):
            return None
        return _status(found)

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        wanted = objects.manifests(
            name, pool, namespace=self._namespace, installation=self._installation
        )
        found = await self._client.find(self._path(name))
        if found is not None and not self._is_ours(found):
            raise TerminalError(
                f"deployment {objects.object_name(name)!r} exists and does not belong to this installation"
            )
        if found is not None and found["metadata"].get("deletionTimestamp"):
            raise ConflictError(f"pool {name!r} is being removed")
        if found is not None and await self._is_current(name, found, wanted):
            return
        # Delete an autoscaler first and create it last, so that there is never one with other bounds.
        if wanted.autoscaler is None:
            await self._client.delete(self._scaler(name))
        made = await self._client.apply(self._path(name), wanted.unfinished_deployment)
        await self._scale_into_bounds(name, pool, made, is_new=found is None)
        if wanted.autoscaler is not None:
            await self._client.apply(self._scaler(name), wanted.autoscaler)
        # The hash of the finished pool is written last, so that after a crash all of this is done again.
        await self._client.apply(self._path(name), wanted.deployment)

    async def _is_current(
        self, name: str, found: KubernetesObject, wanted: objects.Manifests
    ) -> bool:
        if _annotations(found).get(objects.POOL_HASH) != wanted.pool_hash:
            return False
        if wanted.autoscaler is None:
            return True
        return await self._client.find(self._scaler(name), metadata=True) is not None

    async def scale(self, name: str, count: int, reason: str) -> None:  # noqa: ARG002  # the protocol's signature
        found = await self._client.find(self._path(name), metadata=True)
        if found is None or not self._is_ours(found) or found["metadata"].get("deletionTimestamp"):
            raise NotFoundError(f"no pool {name!r}")
        await self._scale(name, count)

    async def remove(self, name: str) -> None:
        found = await self._client.find(self._path(name), metadata=True)
        if found is None or not self._is_ours(found):
            return
        await self._client.delete(self._scaler(name))
        await self._client.delete(
            self._path(name), uid=found["metadata"]["uid"], propagation="Background"
        )

    async def usage(self, name: str, pool: PoolSettings) -> Usage | None:
        mine = f"{objects.LABEL}={name},{objects.INSTALLATION}={self._installation}"
        pods = await self._client.list(f"/api/v1/namespaces/{self._namespace}/pods", labels=mine)
        running = {
            pod["metadata"]["name"]
            for pod in pods.items
            if (pod.get("status") or {}).get("phase") == "Running"
            and not pod["metadata"].get("deletionTimestamp")
        }
        path = f"/apis/metrics.k8s.io/v1beta1/namespaces/{self._namespace}/pods"
        try:
            measured = await self._client.get(path, {"labelSelector": mine})
        except NotFoundError:  # the metrics API is not installed
            return None
        shares = [
            objects.used(item, pool)
            for item in measured.get("items") or []
            if item["metadata"]["name"] in running
        ]
        return average(shares, len(running))

    def _path(self, name: str) -> str:
        return f"{self._deployments}/{objects.object_name(name)}"

    def _scaler(self, name: str) -> str:
        return f"{self._scalers}/{objects.object_name(name)}"

    def _is_ours(self, found: KubernetesObject) -> bool:
        return _labels(found).get(objects.INSTALLATION) == self._installation

    async def _scale_into_bounds(
        self, name: str, pool: PoolSettings, made: KubernetesObject, *, is_new: bool
    ) -> None:
        """A new Deployment has one replica by default, so it is scaled to the minimum."""
        count = pool.min if is_new else made["spec"].get("replicas", 1)
        goal = max(pool.min, min(pool.max, count))
        if goal != made["spec"].get("replicas", 1):
            await self._scale(name, goal)

    async def _scale(self, name: str, count: int) -> None:
        await self._client.call(
            "PATCH",
            f"{self._path(name)}/scale",
            body={"spec": {"replicas": count}},
            content="application/merge-patch+json",
        )


def _labels(found: KubernetesObject) -> Mapping[str, str]:
    return found["metadata"].get("labels") or {}


def _annotations(found: KubernetesObject) -> Mapping[str, str]:
    return found["metadata"].get("annotations") or {}


def _status(found: KubernetesObject) -> PoolStatus:
    status = found.get("status") or {}
    count = int(found["spec"].get("replicas", 1))
    running = int(status.get("readyReplicas") or 0)
    failing = [
        f"{one.get('reason', '')}: {one.get('message', '')}"
        for one in status.get("conditions") or []
        if (one["type"], one["status"]) in (("ReplicaFailure", "True"), ("Progressing", "False"))
    ]
    return PoolStatus(
        count=count,
        running=running,
        worker_hash=_annotations(found).get(objects.WORKER_HASH, ""),
        problem="; ".join(failing)[:300] if running < count else "",
    )

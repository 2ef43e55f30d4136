"""Pools on Kubernetes: a Deployment each, whose `replicas` is the number of workers.

The count is changed by the scale subresource only, whoever changes it: we, a HorizontalPodAutoscaler
(`scaler = "external"`), or `kubectl scale`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import ConflictError, NotFoundError, TerminalError
from nomad_watchdog.pools import Usage, View, average
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

    async def run(self, ours: Callable[[], bool]) -> None:  # noqa: ARG002  # as the protocol has it
        """Kubernetes minds the workers by itself."""
        await asyncio.Event().wait()

    async def look(self) -> Mapping[str, View]:
        mine = f"{objects.INSTALLATION}={self._installation}"
        listed = await self._client.list(self._deployments, labels=mine)
        return {
            one["metadata"]["labels"][objects.LABEL]: _view(one)
            for one in listed.items
            if not one["metadata"].get("deletionTimestamp")
            and objects.LABEL in one["metadata"]["labels"]
        }

    async def view(self, name: str) -> View | None:
        found = await self._client.find(self._path(name))
        if found is None or not self._is_ours(found) or found["metadata"].get("deletionTimestamp"):
            return None
        return _view(found)

    async def ensure(self, name: str, pool: PoolSettings) -> None:
        wanted = objects.manifests(
            name, pool, namespace=self._namespace, installation=self._installation
        )
        found = await self._client.find(self._path(name))
        if found is not None and not self._is_ours(found):
            raise TerminalError(
                f"deployment {objects.object_name(name)!r} is not of this installation"
            )
        if found is not None and found["metadata"].get("deletionTimestamp"):
            raise ConflictError(f"pool {name!r} is being removed")
        stands = found is not None and _hash(found) == _hash(wanted[0])
        if stands and len(wanted) > 1:
            stands = await self._client.find(self._scaler(name), metadata=True) is not None
        if not stands:
            # The scaler first where it goes, last where it comes: never one that has other bounds.
            if len(wanted) == 1:
                await self._client.delete(self._scaler(name))
            made = await self._client.apply(self._path(name), objects.unfinished(wanted[0]))
            await self._within(name, pool, made, is_new=found is None)
            for scaler in wanted[1:]:
                await self._client.apply(self._scaler(name), scaler)
            # What says that all is done is written when it is: who dies before begins again.
            await self._client.apply(self._path(name), wanted[0])

    async def scale(self, name: str, count: int, reason: str) -> None:  # noqa: ARG002  # as the protocol
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
        except NotFoundError:  # nobody serves the metrics API
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

    def _is_ours(self, found: Mapping[str, Any]) -> bool:
        labels = found["metadata"].get("labels") or {}
        return bool(labels.get(objects.INSTALLATION) == self._installation)

    async def _within(
        self, name: str, pool: PoolSettings, made: Mapping[str, Any], *, is_new: bool
    ) -> None:
        """A Deployment that was just made has one replica, as nobody said how many."""
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


def _hash(found: Mapping[str, Any]) -> str:
    annotations = found["metadata"].get("annotations") or {}
    return str(annotations.get(objects.POOL_HASH, ""))


def _view(found: Mapping[str, Any]) -> View:
    status = found.get("status") or {}
    annotations = found["metadata"].get("annotations") or {}
    count = int(found["spec"].get("replicas", 1))
    running = int(status.get("readyReplicas") or 0)
    failing = [
        f"{one.get('reason', '')}: {one.get('message', '')}"
        for one in status.get("conditions") or []
        if (one["type"], one["status"]) in (("ReplicaFailure", "True"), ("Progressing", "False"))
    ]
    return View(
        count=count,
        running=running,
        worker_hash=str(annotations.get(objects.WORKER_HASH, "")),
        trouble="; ".join(failing)[:300] if running < count else "",
    )

"""Cordoned nodes, on which Kubernetes places no new pods. A drain (`kubectl drain`) begins with a cordon.

A field selector limits lists and watches to cordoned nodes, so the cost does not grow with the cluster. Only while agents
are on a cordoned node, a page of the others is read, to know whether one of them takes agents. This needs the rights
`list` and `watch` on nodes. Without them nodes are unknown, and nothing is reported about them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from contextlib import aclosing
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject, PodSpec
from nomad_watchdog.errors import DeniedError, WatchdogError
from nomad_watchdog.schedulers import ClosedHost

log = logging.getLogger(__name__)

_PATH: Final = "/api/v1/nodes"
_CORDONED: Final = "spec.unschedulable=true"
_OTHERS: Final = {"fieldSelector": "spec.unschedulable=false", "limit": "50"}
_PAUSE_S: Final = 30.0
"""Pause before the next watch after one that was denied or failed."""
_KEEPS_OUT: Final = ("NoSchedule", "NoExecute")


async def open_nodes(client: KubernetesClient, pods: Collection[PodSpec]) -> frozenset[str] | None:
    """The names of the ready nodes that can take at least one of these pods, by its tolerations and node selector. Other
    constraints of a template are not evaluated. Without pods every open node counts. None without the right to list
    nodes. Raises as `KubernetesClient.list`."""
    try:
        found = await client.list(_PATH)
    except DeniedError:
        return None
    return frozenset(node["metadata"]["name"] for node in found.items if _is_open(node, pods))


async def _is_any_open(client: KubernetesClient, pods: Collection[PodSpec]) -> bool:
    """Whether `open_nodes` would find any. Raises as `KubernetesClient.pages`."""
    async with aclosing(client.pages(_PATH, _OTHERS)) as pages:  # type: ignore[type-var]
        async for page in pages:
            if any(_is_open(node, pods) for node in page.items):
                return True
    return False


def _is_open(node: KubernetesObject, pods: Collection[PodSpec]) -> bool:
    return _is_ready(node) and (not pods or any(_takes(node, pod) for pod in pods))


def _is_ready(node: KubernetesObject) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    ready = any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)
    return ready and not (node.get("spec") or {}).get("unschedulable")


def _takes(node: KubernetesObject, pod: PodSpec) -> bool:
    labels = node["metadata"].get("labels") or {}
    taints = (node.get("spec") or {}).get("taints") or []
    keys = {one.get("key", "") for one in pod.get("tolerations") or []}
    tolerated = "" in keys  # a toleration without a key is one of every taint
    return all(
        labels.get(key) == value for key, value in (pod.get("nodeSelector") or {}).items()
    ) and (
        tolerated
        or all(one.get("key") in keys for one in taints if one.get("effect") in _KEEPS_OUT)
    )


class Cordons:
    """The cordoned nodes as of the last list."""

    def __init__(self, client: KubernetesClient) -> None:
        self._client = client
        self._closed: Mapping[str, ClosedHost] = {}

    async def read(
        self, used: AbstractSet[str], pods: Collection[PodSpec]
    ) -> Mapping[str, ClosedHost]:
        """By name. `used`: the nodes with agents. `pods`: of the agents. If a list fails, the previous result stays; never
        raises."""
        try:
            found = await self._client.list(_PATH, fields=_CORDONED, metadata=True)
            names = [one["metadata"]["name"] for one in found.items]
            is_last = not used.isdisjoint(names) and not await _is_any_open(self._client, pods)
        except WatchdogError as error:
            log.debug("nodes not read", extra={"reason": str(error)})
        else:
            one = ClosedHost(draining=False, state="cordoned", is_last=is_last, cordoned=True)
            self._closed = dict.fromkeys(names, one)
        return self._closed

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when a node was cordoned or uncordoned, until cancelled."""
        while True:
            try:
                version = await self._client.version_of(_PATH)
                on_change()
                while True:
                    version = await self._watch(version, on_change)
                    await asyncio.sleep(1.0)
            except (WatchdogError, ValueError) as error:
                log.debug("nodes are not watched", extra={"reason": str(error)})
            await asyncio.sleep(_PAUSE_S)

    async def _watch(self, version: str, on_change: Callable[[], None]) -> str:
        """One watch from `version`; returns the version of its last event."""
        events = self._client.watch(_PATH, version, fields=_CORDONED, metadata=True)
        async with aclosing(events) as stream:  # type: ignore[type-var]
            async for event in stream:
                version = event.version or version
                if event.kind in ("ADDED", "DELETED"):
                    on_change()
        return version

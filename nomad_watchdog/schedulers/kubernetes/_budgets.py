"""The PodDisruptionBudget of bare pods, which limits how many of them a drain evicts at a time.

Kubernetes supports no percentage for pods without a controller, only the number that must stay available
(https://kubernetes.io/docs/tasks/run-application/configure-pdb/#arbitrary-controllers-and-selectors). So the number
follows the number of pods. It needs the rights get, create and patch on poddisruptionbudgets; without them all bare pods
of a node are evicted at once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from watchdog_agent.runtime.parsing import whole_or

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.clock import Clock
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.model import Monotonic
from nomad_watchdog.schedulers.kubernetes import _pods, _view, names

log = logging.getLogger(__name__)

NAME: Final = "watchdog-pods"
SHARE: Final = 10
"""One of this many pods may be unavailable, as with the other workloads."""
HOLD_S: Final = 300.0
"""The number is lowered only after the pods have been fewer for this time, in seconds: a pod that was evicted is gone
until its successor is created, and must not make room for another eviction."""


def available(pods: int, *, are_moved: bool = False) -> int:
    """How many of these pods must stay available: all but a tenth, rounded up. `are_moved`: all, because they are moved
    before they are evicted."""
    return pods if are_moved else pods - -(-pods // SHARE)


def bare_pods(pods: Iterable[KubernetesObject]) -> dict[str, int]:
    """The number of bare pods that have not ended, by namespace."""
    return Counter(
        pod["metadata"]["namespace"]
        for pod in pods
        if _view.labels_of(pod).get(names.WORKLOAD) == "pod" and _pods.phase(pod) not in _pods.ENDED
    )


def path_of(namespace: str) -> str:
    """Path of the budget in a namespace."""
    return f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/{NAME}"


@dataclass(frozen=True, slots=True)
class _Level:
    """A number of pods, and when there were last that many."""

    pods: int
    at: Monotonic


class PodBudgets:
    """The budgets of one installation, one in each namespace with bare pods. `are_moved`: as of `available`."""

    def __init__(
        self,
        client: KubernetesClient,
        installation: str,
        clock: Clock,
        *,
        are_moved: bool = False,
    ) -> None:
        self._client, self._are_moved = client, are_moved
        self._installation = installation
        self._clock = clock
        self._levels: dict[str, _Level] = {}
        self._written: dict[str, int] = {}
        self.pods: Mapping[str, int] = {}
        """As last listed."""

    async def update(self) -> None:
        """Write the budgets that differ from what the pods require. Never raises: agents do not depend on it."""
        for namespace in self.pods.keys() | self._levels.keys():
            try:
                await self._update(namespace, self.pods.get(namespace, 0))
            except WatchdogError as error:
                facts = {"namespace": namespace, "reason": str(error)}
                log.debug("disruption budget of bare pods not written", extra=facts)

    async def _update(self, namespace: str, pods: int) -> None:
        now = self._clock.monotonic()
        level = self._levels.get(namespace)
        if level is None:
            found = await self._client.find(path_of(namespace))
            level = _Level(_pods_of(found), now)
        if pods >= level.pods or now - level.at >= HOLD_S:
            level = _Level(pods, now)
        self._levels[namespace] = level
        number = available(level.pods, are_moved=self._are_moved)
        if self._written.get(namespace) != number:
            await self._client.apply(path_of(namespace), self._body(namespace, level.pods, number))
            self._written[namespace] = number

    def _body(self, namespace: str, pods: int, number: int) -> Mapping[str, object]:
        labels = {names.MANAGED: names.DOMAIN, names.INSTALLATION: self._installation}
        return {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": NAME,
                "namespace": namespace,
                "labels": labels,
                "annotations": {_PODS: str(pods)},
            },
            "spec": {
                "minAvailable": number,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": {**labels, names.WORKLOAD: "pod"}},
            },
        }


_PODS: Final = f"{names.DOMAIN}/pods"
"""Annotation: the number of pods that a budget was made for."""


def _pods_of(budget: KubernetesObject | None) -> int:
    """The number of pods that a budget was made for; 0 without one."""
    notes = (budget["metadata"].get("annotations") or {}) if budget is not None else {}
    return whole_or(str(notes.get(_PODS, "0")), 0)

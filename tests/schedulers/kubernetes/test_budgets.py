"""The number of bare pods that must stay available."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from nomad_watchdog.daemon.doctor import kubernetes as doctor
from nomad_watchdog.errors import DeniedError
from nomad_watchdog.model import Monotonic, WallTime
from nomad_watchdog.schedulers.kubernetes import _budgets, names
from nomad_watchdog.schedulers.kubernetes._budgets import HOLD_S, PodBudgets, available, bare_pods


class Server:
    """Stores budgets by path, and counts writes."""

    def __init__(self) -> None:
        self.stored: dict[str, dict[str, Any]] = {}
        self.writes = 0
        self.denied = False

    async def find(self, path: str) -> dict[str, Any] | None:
        if self.denied:
            raise DeniedError("no")
        return self.stored.get(path)

    async def apply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self.writes += 1
        self.stored[path] = dict(body)
        return self.stored[path]

    def number(self, namespace: str = "a") -> int:
        number: int = self.stored[_budgets.path_of(namespace)]["spec"]["minAvailable"]
        return number


class Clock:
    """Set by the test."""

    now = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(self.now)

    def wall(self) -> WallTime:
        return WallTime(self.now)


class Plant:
    """The budgets of one control plane; `again` is its successor."""

    def __init__(self, server: Server | None = None) -> None:
        self.server, self.clock = server or Server(), Clock()
        self.budgets = PodBudgets(self.server, "i", self.clock)  # type: ignore[arg-type]

    def see(self, **pods: int) -> None:
        self.budgets.pods = pods
        asyncio.run(self.budgets.update())


@pytest.mark.parametrize(
    ("pods", "stay"), [(0, 0), (1, 0), (2, 1), (10, 9), (11, 9), (100, 90), (101, 90)]
)
def test_a_tenth_may_be_unavailable_and_at_least_one(pods: int, stay: int) -> None:
    """As `maxUnavailable: 10%`, which Kubernetes rounds up."""
    assert available(pods) == stay


def test_no_pod_need_be_evicted_that_is_moved_before() -> None:
    """With `leave_cordoned` the budget permits none, so that `kubectl drain` waits for the moves."""
    plant = Plant()
    plant.budgets = PodBudgets(plant.server, "i", plant.clock, are_moved=True)  # type: ignore[arg-type]
    plant.see(a=20)
    assert plant.server.number() == 20


def test_only_bare_pods_that_have_not_ended_count() -> None:
    """Pods of Deployments have a budget of their own, and an ended pod is not there any more."""

    def pod(kind: str, phase: str, namespace: str = "a") -> Any:
        labels = {names.WORKLOAD: kind}
        return {
            "metadata": {"namespace": namespace, "labels": labels},
            "status": {"phase": phase},
        }

    found = [
        pod("pod", "Running"),
        pod("pod", "Pending"),
        pod("pod", "Failed"),
        pod("deployment", "Running"),
        pod("pod", "Running", "b"),
    ]
    assert bare_pods(found) == {"a": 2, "b": 1}


def test_the_number_rises_at_once_and_falls_late() -> None:
    """A pod that was evicted makes no room for another one, also not for a successor of the control plane; a fleet
    that has shrunk does, after HOLD_S. An unchanged number is not written again."""
    plant = Plant()
    plant.see(a=20, b=10)
    assert (plant.server.number(), plant.server.number("b")) == (18, 9)
    plant.see(a=18, b=10)
    plant.see(a=18, b=10)
    assert (plant.server.number(), plant.server.writes) == (18, 2)
    successor = Plant(plant.server)
    successor.see(a=18)
    assert plant.server.number() == 18
    plant.see(a=40, b=10)
    assert plant.server.number() == 36
    plant.clock.now = HOLD_S
    plant.see(a=10)
    assert (plant.server.number(), plant.server.number("b")) == (9, 0)


def test_without_the_right_nothing_fails() -> None:
    """An older role does not grant it; agents are started all the same."""
    plant = Plant()
    plant.server.denied = True
    plant.see(a=20)
    assert not plant.server.stored


@pytest.mark.parametrize(
    ("denied", "status"),
    [((), "ok"), (("poddisruptionbudgets",), "warn"), (("pods", "poddisruptionbudgets"), "fail")],
)
async def test_doctor_warns_of_the_missing_right(denied: tuple[str, ...], status: str) -> None:
    """Without it agents run, and drains evict too much; a missing right to start agents is an error."""

    class Reviews:
        async def create(self, _path: str, body: Any) -> dict[str, Any]:
            resource = body["spec"]["resourceAttributes"]["resource"]
            return {"status": {"allowed": resource not in denied}}

    found = await doctor._kubernetes_rights(Reviews(), "a", first=False)  # type: ignore[arg-type]
    assert found.status == status
    assert ("evicts all bare pods" in found.found) is (status == "warn")

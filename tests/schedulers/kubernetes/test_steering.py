"""Starts that avoid nodes, and which nodes take agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from nomad_watchdog.clients.kubernetes import KubernetesClient, Listed
from nomad_watchdog.errors import DeniedError
from nomad_watchdog.model import Epoch, PlacementState
from nomad_watchdog.schedulers import open_hosts
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from nomad_watchdog.schedulers.kubernetes._nodes import Cordons, open_nodes
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster
from tests.schedulers.conftest import eventually
from tests.schedulers.kubernetes_rig import kubelet, spec_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]
SPACE = "steering"
SPEC = spec_of()


class Nodes:
    """The client of a cluster with these nodes; None = reading them is denied."""

    def __init__(self, *items: dict[str, Any]) -> None:
        self.items = items

        self.pages_read = 0

    async def list(self, _path: str, fields: str = "", metadata: bool = False) -> Listed:
        if not self.items:
            raise DeniedError("no right")
        cordoned = [one for one in self.items if one["spec"].get("unschedulable")]
        return cast("Listed", type("Found", (), {"items": cordoned if fields else self.items}))

    async def pages(self, _path: str, _params: object) -> AsyncIterator[Listed]:
        """One node per page."""
        for one in self.items:
            if not one["spec"].get("unschedulable"):
                self.pages_read += 1
                yield cast("Listed", type("Found", (), {"items": [one]}))


def node(name: str, *, ready: str = "True", **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"disk": name}},
        "spec": spec,
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


async def test_only_nodes_that_can_take_an_agent_count() -> None:
    """A cordoned or unready node takes none, nor one with a taint that the template does not tolerate, or without a label
    that it selects. Without the right to read nodes they are not known."""
    taint = {"key": "gpu", "effect": "NoSchedule"}
    soft = {"key": "gpu", "effect": "PreferNoSchedule"}
    client = cast(
        "KubernetesClient",
        Nodes(
            node("good"),
            node("cordoned", unschedulable=True),
            node("unready", ready="Unknown"),
            node("tainted", taints=[taint]),
            node("soft", taints=[soft]),
        ),
    )
    assert await open_nodes(client, [{}]) == {"good", "soft"}
    assert await open_nodes(client, [{"tolerations": [{"key": "gpu"}]}]) == {
        "good",
        "soft",
        "tainted",
    }
    assert await open_nodes(client, [{"nodeSelector": {"disk": "soft"}}]) == {"soft"}
    assert await open_nodes(client, []) == {"good", "soft", "tainted"}
    assert await open_nodes(cast("KubernetesClient", Nodes()), [{}]) is None


async def test_other_nodes_are_read_only_while_agents_are_on_a_cordoned_one() -> None:
    """Up to the first that takes an agent; if none does, each cordoned node is the last one."""
    closed, taint = node("cordoned", unschedulable=True), {"key": "gpu", "effect": "NoSchedule"}
    nodes = Nodes(closed, node("tainted", taints=[taint]), node("unready", ready="False"))
    cordons = Cordons(cast("KubernetesClient", nodes))
    (found,) = (await cordons.read({"other", ""}, [{}])).values()
    assert (found.cordoned, found.is_last, nodes.pages_read) == (True, False, 0)
    assert (await cordons.read({"cordoned"}, [{}]))["cordoned"].is_last
    nodes.items += (node("good"), node("another"))
    nodes.pages_read = 0
    assert not (await cordons.read({"cordoned"}, [{}]))["cordoned"].is_last
    assert nodes.pages_read == 3


@pytest.mark.slow_because("starts twelve agents on two stand-ins of a kubelet")
async def test_a_start_goes_to_a_node_that_it_need_not_avoid(
    kube: KubernetesCluster, tmp_path: Path
) -> None:
    """All of these starts go to the one node that they need not avoid, although the other one is empty. If every node is
    to be avoided, agents start all the same. A successor has its own preference."""
    await kube.add_namespace(SPACE)
    names = ("steer-1", "steer-2")
    one = KubernetesScheduler(settings=kube.settings(), namespace=SPACE, installation="steering")

    async def where(devices: list[str], avoid: tuple[str, ...], epoch: int = 1) -> Counter[str]:
        records = [record_of(name) for name in devices]
        for record in records:
            await one.ensure(record, Epoch(epoch), replace(SPEC, avoid=avoid))
        slugs = {record.slug for record in records}

        async def run() -> Counter[str]:
            found = (await one.snapshot()).placements
            nodes = [
                placement.node
                for slug in slugs
                for placement in found.get(slug, ())
                if placement.state is PlacementState.RUNNING and placement.epoch == epoch
            ]
            return Counter(nodes if len(nodes) == len(slugs) else [])

        result: Counter[str] = await eventually(run)
        return result

    async with (
        kubelet(kube, tmp_path / "1", node=names[0], subnet=31),
        kubelet(kube, tmp_path / "2", node=names[1], subnet=32),
    ):
        try:
            await one.prepare([SPEC])

            async def both() -> bool:
                return (await open_hosts(one) or frozenset()) >= set(names)

            await eventually(both)
            first = [f"a{n}" for n in range(6)]
            assert await where(first, names[1:]) == {names[0]: 6}
            assert await where(first[:3], names[:1], epoch=2) == {names[1]: 3}
            assert (await where(["b1", "b2", "b3"], names)).total() == 3
        finally:
            for found in (await one.snapshot()).placements.values():
                for placement in found:
                    await one.retire(placement, 1.0)
            await one.close()

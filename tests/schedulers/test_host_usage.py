"""The use of hosts by the statistics of a real Nomad and of a real metrics server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.nomad import NomadAccess
from nomad_watchdog.host_pressure import HostUsage
from nomad_watchdog.model import Epoch
from nomad_watchdog.schedulers import host_usage
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from nomad_watchdog.schedulers.kubernetes._usage import usage_of
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.schedulers.nomad import _usage as nomad_usage
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster
from servers.metrics_server import MetricsServer
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually
from tests.schedulers.kubernetes_rig import kubelet, spec_of

servers = pytest.mark.servers


@servers
@pytest.mark.asyncio(loop_scope="session")
async def test_nomad_has_the_use_of_its_clients(nomad: NomadServer) -> None:
    """Within 0 and 100 percent; a host that Nomad does not know is left out."""
    one = NomadScheduler(settings=NomadAccess(address=nomad.http_addr), prefix="usage")
    try:
        await one.snapshot()
        (node,) = await nomad.request("GET", "/v1/nodes")
        found = await host_usage(one, [node["Name"], "nowhere"])
    finally:
        await one.close()
    (usage,) = found.values()
    assert found.keys() == {node["Name"]}
    assert len(usage.values()) == 2
    assert all(0 < value <= 100 for value in usage.values().values())


@servers
@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.timeout(240)
@pytest.mark.slow_because("a metrics server needs two polls, 10 s apart")
async def test_kubernetes_has_it_from_its_metrics_server(
    kube: KubernetesCluster, tmp_path: Path
) -> None:
    """Without a metrics server nothing is known, and that is no error."""
    await kube.add_namespace("usage")
    one = KubernetesScheduler(settings=kube.settings(), namespace="usage", installation="usage")
    async with kubelet(kube, tmp_path, node="usage", subnet=33):
        try:
            assert await host_usage(one, ["usage"]) == {}
            await one.ensure(
                record_of("usage"), Epoch(1), spec_of()
            )  # a stand-in uses what its pods use
            async with MetricsServer(kube, tmp_path / "metrics"):

                async def known() -> HostUsage | None:
                    return (await host_usage(one, ["usage", "nowhere"])).get("usage")

                usage = await eventually(known, 120.0)
        finally:
            for found in (await one.snapshot()).placements.values():
                for placement in found:
                    await one.retire(placement, 1.0)
            await one.close()
    assert len(usage.values()) == 2
    assert all(0 <= value <= 100 for value in usage.values().values())


def test_statistics_in_shares_of_the_capacity() -> None:
    """What is missing is not known, and a share is never above 100."""
    nomad = nomad_usage.usage_of(
        {"CPU": [{"Idle": 80.0}, {"Idle": 40.0}], "Memory": {"Total": 200, "Available": 50}}
    )
    assert nomad == HostUsage(cpu=40.0, memory=75.0)
    assert (
        nomad_usage.usage_of({"CPU": None, "Memory": {"Total": 0, "Available": 0}}) == HostUsage()
    )
    used = {"metadata": {"name": "n"}, "usage": {"cpu": "500m", "memory": "3Gi"}}
    assert usage_of(used, {"cpu": "2", "memory": "2Gi"}) == HostUsage(25.0, 100.0)  # type: ignore[arg-type]
    assert usage_of(used, {"cpu": "x"}) == HostUsage()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "body",
    [None, [], "x", 3, {"CPU": 3}, {"CPU": [None]}, {"CPU": [{"Idle": None}]}, {"CPU": {"a": 1}},
     {"Memory": []}, {"Memory": {"Available": None, "Total": 3}}, {"Memory": {"Available": 1, "Total": "3"}}],
)  # fmt: skip
def test_statistics_of_another_form_say_nothing(body: Any) -> None:
    """Nomad answers `null` for a client that can't collect them; whatever a server answers, nothing is raised."""
    assert nomad_usage.usage_of(body) == HostUsage()
    assert usage_of({"usage": body}, {"cpu": "2", "memory": "2Gi"}) == HostUsage()  # type: ignore[typeddict-item]
    assert usage_of(body, {"cpu": "2", "memory": "2Gi"}) == HostUsage()

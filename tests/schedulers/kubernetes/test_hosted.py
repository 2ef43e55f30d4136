"""The control plane on the cluster that it manages, as jobs/kubernetes ships it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.demo.devices import SimulatedFleet
from servers.consul import ConsulServer
from servers.kubelet.__main__ import Kubelet
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.hosted import (
    ACCOUNT,
    CONFIG,
    IMAGES,
    TOKEN,
    ServiceProxy,
    agents_of,
    apply,
    cleaned,
    is_ready,
    pods_of,
    secret_of,
    until,
    with_environment,
)
from tests.schedulers.kubernetes.test_manifests import documents

pytestmark = [pytest.mark.servers, pytest.mark.timeout(300)]

SPACE = "nomad-watchdog"


def shipped(repository: Path, config: str, env: dict[str, str]) -> list[dict[str, Any]]:
    """The kustomization and the Job that creates the registry, with our configuration and these pod
    variables."""
    folder = repository / "jobs" / "kubernetes"
    things = [*documents(folder), *yaml.safe_load_all((folder / "init.yaml").read_text())]
    for thing in things:
        if thing["kind"] == "ConfigMap":
            thing["data"]["nomad-watchdog.hcl"] = config
        if thing["kind"] == "Deployment":
            with_environment(thing, env)
    return [things[0], secret_of(SPACE), *things[1:]]


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.slow_because("waits until the shipped readiness probes of replicas and agents pass")
async def test_two_replicas_of_the_shipped_deployment_keep_a_fleet_and_one_may_be_killed(
    kube: KubernetesCluster,
    admin: KubernetesClient,
    fleet: SimulatedFleet,
    repository: Path,
    tmp_path: Path,
) -> None:
    """Applied as shipped, the Job creates the registry and two replicas run in pods with only the
    service account's permissions. They share the shards by leases in Consul, start an agent for
    each device, and see the reports that it sends to the other replica. After kill -9 of one
    replica the other takes over its shards, no agent is touched, and new devices are served."""
    proxy = ServiceProxy(admin, SPACE, "nomad-watchdog")
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        ConsulServer(tmp_path / "consul") as consul,
        Kubelet(
            kube.kubeconfig, tmp_path / "node", images=IMAGES, node="hosted", subnet=26
        ) as node,
        cleaned(admin, SPACE),
        proxy.serve(),
        aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=5.0)) as session,
    ):
        config = CONFIG.replace("CONSUL", consul.http_addr).replace("PORT", str(fleet.port))
        env = {
            "NOMAD_WATCHDOG_API_LISTEN": "$(POD_IP):9670",  # here 0.0.0.0 covers the whole machine
            "NOMAD_WATCHDOG_API_ADVERTISE": proxy.address,
            "NOMAD_WATCHDOG_KUBERNETES_SERVICE_ACCOUNT": ACCOUNT,
        }
        await apply(admin, shipped(repository, config, env))

        async def call(method: str, path: str, body: object = None, at: str = proxy.address) -> Any:
            async with session.request(method, at + path, json=body) as answer:
                assert answer.status < 300, await answer.text()
                return await answer.json()

        async def two() -> list[dict[str, Any]]:
            pods = await pods_of(admin, SPACE, "nomad-watchdog")
            found = [one for one in pods if is_ready(one)]
            return found if len(found) == 2 else []

        replicas = await until(two, "two ready replicas")
        at = {one["metadata"]["uid"]: f"http://{one['status']['podIP']}:9670" for one in replicas}

        async def holders(place: str = proxy.address) -> set[str]:
            return {one["holder"] for one in (await call("GET", "/v1/leases", at=place))["shards"]}

        async def shared() -> bool:
            found = await holders()
            return len(found) == 2 and "" not in found

        await until(shared, "shards of both")
        told = (await call("GET", "/v1/leases"))["replicas"]
        assert {one["api"] for one in told} == set(at.values()), "each by its own address"

        async def add(*names: str) -> None:
            for name in names:
                address = (await fleet.add(name)).address
                await call("PUT", f"/v1/devices/{name}", {"address": address})

        async def watched(names: set[str], place: str) -> bool:
            items = (await call("GET", "/v1/devices", at=place))["items"]
            return {one["id"] for one in items if one["verdict"] == "watched"} == names

        first = {f"pump-{number}" for number in range(6)}
        await add(*sorted(first))
        for place in at.values():
            await until(lambda place=place: watched(first, place), f"all watched, says {place}")
        agents = await agents_of(admin, node, SPACE)
        assert len(agents) >= len(first)

        victim, survivor = at
        dead = (await call("GET", "/v1/leases", at=at[victim]))["replica"]
        assert dead in await holders()
        for pid in node.processes(victim):
            os.kill(pid, signal.SIGKILL)

        async def moved() -> bool:
            return not {dead, ""} & await holders(at[survivor])

        await until(moved, "the shards of the killed one are held by others", 60.0)
        await add("pump-6", "pump-7")
        await until(
            lambda: watched(first | {"pump-6", "pump-7"}, at[survivor]), "the new ones watched"
        )
        assert agents <= await agents_of(admin, node, SPACE)
        again = await until(two, "two ready replicas again")
        assert {one["metadata"]["uid"] for one in again} == set(at), "restarted in place"

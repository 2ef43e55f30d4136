"""The real servers of a demo on Nomad or Kubernetes."""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from servers.consul import ConsulServer
    from servers.kubelet.__main__ import Kubelet
    from servers.kubernetes import KubernetesCluster


async def _servers(stack: AsyncExitStack, root: Path, clients: int) -> tuple[str, str]:
    from servers.consul import ConsulServer
    from servers.nomad import NomadServer

    consul = await stack.enter_async_context(ConsulServer(root / "consul"))
    agents = [consul]
    for number in range(1, clients):
        agent = ConsulServer(root / f"consul-{number}", node=f"node-{number}", join=consul)
        agents.append(await stack.enter_async_context(agent))
    nomad = await stack.enter_async_context(
        NomadServer(root / "nomad", [agent.http_addr for agent in agents], clients)
    )
    return consul.http_addr, nomad.http_addr


def _consul(root: Path) -> ConsulServer:
    from servers.consul import ConsulServer

    return ConsulServer(root / "consul")


async def _kubernetes(
    stack: AsyncExitStack, root: Path, clients: int
) -> tuple[KubernetesCluster, list[Kubelet]]:
    """Start the cluster and its nodes. A simulated kubelet runs the pods of the agents as processes; their
    image is the agent of this checkout."""
    import watchdog_agent

    from servers.kubelet.__main__ import Kubelet
    from servers.kubelet.spec import Image
    from servers.kubernetes import KubernetesCluster

    cluster = await stack.enter_async_context(KubernetesCluster(root / "kube"))
    await cluster.add_namespace("nomad-watchdog")
    sources = str(Path(watchdog_agent.__file__).parents[1])
    image = Image(
        (sys.executable, "-P", "-S", "-m", "watchdog_agent"),
        {"PYTHONPATH": sources, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    nodes = []
    for number in range(1, clients + 1):
        node = Kubelet(
            cluster.kubeconfig,
            root / f"node-{number}",
            images={"agntup/watchdog-agent": image},
            node=f"node-{number}",
            subnet=20 + number,
        )
        nodes.append(await stack.enter_async_context(node))
    return cluster, nodes

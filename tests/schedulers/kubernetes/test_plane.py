"""The whole program on Kubernetes, with the permissions of the shipped Role and without Consul."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import watchdog_agent

from nomad_watchdog.core.node_drain import NO_OTHER
from servers.kubelet.__main__ import Kubelet
from servers.kubelet.spec import Image
from servers.kubernetes import KubernetesCluster
from servers.replica import ControlPlane
from tests.schedulers.kubernetes.test_manifests import USER, install
from tests.schedulers.kubernetes_rig import images, soon_ready_template

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]
CONFIG = """\
backend  = "kubernetes"
data_dir = "{root}"
resync   = "2s"
api {
  listen    = "127.0.0.1:{port}"
  ADVERTISE
}
kubernetes {
  kubeconfig = "KUBECONFIG"
}
registry {
  kind = "sqlite"
}
consul {
  agent_address = ""
}
agents {
  startup_grace     = "5s"
  startup_grace_min = "1s"
  report_stale      = "5s"
}
"""
CLASS = """\
agent_class "NAME" {
  beat         = "1s"
  kill_timeout = "3s"
  variables    = {
    image       = "IMAGE"
    cpu_request = "CPU"
    cpu_limit   = "CPU"
  }
  probe "tcp" {
    port     = DEVICE
    interval = "1s"
    timeout  = "500ms"
  }
  confirm "icmp" {}
}
"""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def kubeconfig(
    kube: KubernetesCluster, repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Path]:
    """A kubeconfig of the service account, in a cluster with a node that runs the real agent."""
    await install(kube, repository)
    await kube.add_namespace("nomad-watchdog")
    folder = tmp_path_factory.mktemp("plane")
    agent = Image(
        (sys.executable, "-P", "-S", "-m", "watchdog_agent"),
        {"PYTHONPATH": str(Path(watchdog_agent.__file__).parents[1])},
    )
    known = images(folder / "images") | {"agntup/watchdog-agent": agent}
    node = Kubelet(kube.kubeconfig, folder / "kubelet", images=known, node="plane", subnet=51)
    async with node:
        yield await kube.user(USER)


@pytest_asyncio.fixture(loop_scope="session")
async def device() -> AsyncIterator[int]:
    """The port of a server that answers on 127.0.0.1."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


def config(kubeconfig: Path, device: int, advertise: str, **classes: tuple[str, str]) -> str:
    text = CONFIG.replace("KUBECONFIG", str(kubeconfig)).replace("ADVERTISE", advertise)
    for name, (image, cpu) in classes.items():
        one = CLASS.replace("NAME", name).replace("IMAGE", image).replace("CPU", cpu)
        text += one.replace("DEVICE", str(device))
    return text


@pytest.mark.slow_because("an agent counts as failing after some restarts with back-off")
async def test_each_fate_has_its_verdict(kubeconfig: Path, device: int, tmp_path: Path) -> None:
    """A running agent is `watched`; a crashing one is `failing` with its exit code; one with a
    missing image, or that no node takes, is `unwatched` with that reason. Each is our problem, none
    the device's."""
    text = config(
        kubeconfig, device, "",
        good=("agntup/watchdog-agent", "10m"),
        loop=("test/failing", "10m"),
        hog=("test/hog", "10m"),
        lost=("nowhere/nothing:1", "10m"),
        huge=("agntup/watchdog-agent", "900000"),
    )  # fmt: skip
    wanted = {
        "good": ("watched", ""),
        "loop": ("failing", "exit code 1"),
        "hog": ("failing", "OOMKilled"),
        "lost": ("unwatched", "nowhere/nothing:1"),
        "huge": ("unwatched", "no node can run it"),
    }
    async with ControlPlane(tmp_path, "plane", text) as plane:
        for name in wanted:
            await plane.register(name, **{"class": name})
        for name, (verdict, words) in wanted.items():
            await plane.until(
                f"/v1/devices/{name}",
                lambda it, v=verdict, w=words: it["verdict"] == v and w in it["reason"],
                150.0,
            )
        for name in wanted:
            await plane.call("DELETE", f"/v1/devices/{name}")
        await plane.until("/v1/agents", lambda it: not it["items"], 60.0)


@pytest.mark.slow_because("starts an agent, and a control plane twice")
async def test_a_cordoned_node_is_reported_when_that_begins_and_ends(
    kube: KubernetesCluster, kubeconfig: Path, device: int, tmp_path: Path
) -> None:
    """With a resync of ten minutes, `status` shows the node with its agent as soon as it is
    cordoned; each change is one event, and a restart of the control plane does not publish it
    again. The agent stays; with `leave_cordoned` it stays because no other node takes it."""
    text = config(kubeconfig, device, "", good=("agntup/watchdog-agent", "10m"))
    text = text.replace('resync   = "2s"', 'resync   = "10m"')
    admin = kube.client()

    async def cordon(*, on: bool) -> None:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "plane"}}
        await admin.apply(
            "/api/v1/nodes/plane", {**node, "spec": {"unschedulable": on}}, force=True
        )

    async with ControlPlane(tmp_path, "plane", text) as plane:

        async def told() -> list[tuple[str, str]]:
            found = (await plane.call("GET", "/v1/events?kind=node."))["items"]
            assert all(event["data"] == {"node": "plane"} for event in found)
            return [(event["kind"], event["text"]) for event in found]

        await plane.register("pump", **{"class": "good"})
        await plane.until("/v1/devices/pump", lambda it: it["verdict"] == "watched", 90.0)
        try:
            await cordon(on=True)
            status = await plane.until("/v1/status", lambda it: it["closed_nodes"], 60.0)
            assert status["closed_nodes"] == [{"node": "plane", "state": "cordoned", "agents": 1}]
            what = "node plane is cordoned: no new agent is placed on it, 1 agent is there"
            assert await told() == [("node.ineligible", what)]
            await plane.process.terminate(15.0)
            leave = "\nkubernetes {\n  leave_cordoned = true"
            plane.file.write_text(plane.file.read_text().replace("\nkubernetes {", leave))
            await plane.start()
            await plane.ready()
            await plane.until(
                "/v1/status",
                lambda it: any(one.get("waits") == NO_OTHER for one in it["closed_nodes"]),
                60.0,
            )
            waits = f"no agent leaves node plane: {NO_OTHER}; 1 agent is there"
            assert (await told())[1:] == [("node.drain_waits", waits)]
        finally:
            await cordon(on=False)
        await plane.until("/v1/status", lambda it: not it["closed_nodes"], 60.0)
        assert (await told())[2:3] == [("node.open", "node plane takes new agents again")]
        await plane.call("DELETE", "/v1/devices/pump")
        await plane.until("/v1/agents", lambda it: not it["items"], 60.0)
    await admin.close()


@pytest.mark.slow_because("a device is unwatched when the reports that do not come are overdue")
async def test_readiness_is_no_health(kubeconfig: Path, device: int, tmp_path: Path) -> None:
    """If no report arrives, a device whose pod is ready is unwatched, and the reason says what to
    check: readiness only bridges `report_stale`."""
    text = config(
        kubeconfig, device, 'advertise = "http://127.0.0.1:9"',
        quiet=("agntup/watchdog-agent", "10m"),
    )  # fmt: skip
    template = f'template = "{soon_ready_template(tmp_path)}"'
    text = text.replace('beat         = "1s"', f'beat = "1s"\n  {template}')
    async with ControlPlane(tmp_path, "plane", text) as plane:
        await plane.register("quiet", **{"class": "quiet"})
        words = "although the scheduler finds the agent ready; check api.advertise and the API port"
        await plane.until(
            "/v1/devices/quiet",
            lambda it: it["verdict"] == "unwatched" and words in it["reason"],
            90.0,
        )
        await plane.call("DELETE", "/v1/devices/quiet")
        await plane.until("/v1/agents", lambda it: not it["items"], 60.0)

"""Pools scaled by real external autoscalers: Kubernetes' own autoscaler with a real metrics-server, and Nomad
Autoscaler with a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.pools.kubernetes import KubernetesPools
from servers.autoscaler import NomadAutoscaler
from servers.kubelet.__main__ import Kubelet
from servers.kubelet.spec import Image
from servers.kubernetes import KubernetesCluster
from servers.metrics_server import MetricsServer
from servers.nats import NatsServer
from servers.nomad import NomadServer
from servers.prometheus import PrometheusServer
from servers.replica import ControlPlane
from tests.pools.test_queue import check, metric
from tests.pools.work import (
    LEAST,
    MESSAGES,
    MOST,
    WORKER,
    all_done_once,
    arguments,
    config,
    counts,
    process,
    publish,
    waiting,
)

pytestmark = [
    pytest.mark.servers,
    pytest.mark.long,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600),
]
NAME = "jobs-waiting"
EXTERNAL = ("external.metrics.k8s.io", "v1beta1")
BURN = (sys.executable, "-S", "-E", "-c", "while True: pass")
NAP = (sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)")
IMAGES = {
    "test/worker": Image((sys.executable, str(WORKER))),
    "test/burn": Image(BURN),
    "test/nap": Image(NAP),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KubernetesCluster]:
    """A separate control plane for this module, because APIs are added to it, with a node that runs workers."""
    folder = tmp_path_factory.mktemp("autoscalers")
    async with (
        KubernetesCluster(folder / "kube") as made,
        Kubelet(made.kubeconfig, folder / "kubelet", images=IMAGES, node="workers", subnet=57),
    ):
        yield made


def block(cluster: KubernetesCluster, namespace: str) -> str:
    return (
        f'kubernetes {{\n  kubeconfig = "{cluster.kubeconfig}"\n  namespace = "{namespace}"\n}}\n'
        'consul {\n  agent_address = ""\n}\n'
    )


def pod(queue: NatsServer, folder: Path) -> str:
    """The worker as an image and its arguments."""
    folder.mkdir()
    return f'image = "test/worker"\n  command = {json.dumps(arguments(queue, folder))}'


async def followed(plane: ControlPlane, queue: NatsServer, folder: Path) -> None:
    """Whatever scales it: the pool follows the queue up and down within its bounds, no message is lost, and this
    program does not scale it."""

    def settled(found: dict[str, Any]) -> bool:
        return counts(found) == (LEAST, LEAST) and not found["problem"]

    def row(answer: Any) -> dict[str, Any]:
        (found,) = answer["items"]
        assert LEAST <= found["count"] <= MOST, found
        return found

    # a Prometheus that has just started has no series yet
    await plane.until("/v1/pools", lambda a: settled(a["items"][0]), 60.0)
    await publish(queue, range(MESSAGES))
    await plane.until("/v1/pools", lambda a: counts(row(a)) == (MOST, MOST), 90.0)
    async with asyncio.timeout(90.0):
        while await waiting(queue):
            await asyncio.sleep(0.2)
    await plane.until("/v1/pools", lambda a: settled(row(a)), 90.0)

    all_done_once(folder)
    events = await plane.call("GET", "/v1/events?kind=pool.scaled")
    assert events["items"] == []


@asynccontextmanager
async def page(
    answer: Callable[[web.Request], Awaitable[web.Response]],
    port: int,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[None]:
    """Serve all paths on a port of this machine."""
    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "localhost", port, ssl_context=context).start()
        yield
    finally:
        await runner.cleanup()


@asynccontextmanager
async def adapter(cluster: KubernetesCluster, queue: NatsServer) -> AsyncIterator[list[str]]:
    """A metrics adapter: the external metric NAME is the queue's depth. Yields the users that requested it, as named by
    the API server."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        kind = {"apiVersion": "/".join(EXTERNAL), "kind": "ExternalMetricValueList"}
        if request.path.endswith(f"/{NAME}"):
            asked.append(request.headers.get("X-Remote-User", ""))
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            one = {"metricName": NAME, "metricLabels": {}, "timestamp": now}
            one["value"] = str(await waiting(queue))
            return web.json_response(kind | {"metadata": {}, "items": [one]})
        if request.path == f"/apis/{'/'.join(EXTERNAL)}":
            found = {"kind": "APIResourceList", "groupVersion": "/".join(EXTERNAL), "resources": []}
            return web.json_response(found)
        return web.Response(status=404)

    port = free_port()
    cert, key = await cluster.add_api(*EXTERNAL, port)
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH, cafile=str(cluster.data_dir / "pki" / "ca.crt")
    )
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(cert, key)
    try:
        async with page(answer, port, context):
            await cluster.until_served(*EXTERNAL)
            yield asked
    finally:
        await cluster.remove_api(*EXTERNAL)


async def test_workers_on_kubernetes_follow_a_real_queue(
    queue: NatsServer, cluster: KubernetesCluster, tmp_path: Path
) -> None:
    """With the built-in scaler, like on the other schedulers (test_queue.py)."""
    await cluster.add_namespace("builtin")
    folder = tmp_path / "done"
    text = config("kubernetes", pod(queue, folder), metric(queue), block(cluster, "builtin"))
    async with ControlPlane(tmp_path, "a", text) as plane:
        await check(plane, queue, folder)


async def test_kubernetes_own_autoscaler_follows_the_queue(
    queue: NatsServer, cluster: KubernetesCluster, tmp_path: Path
) -> None:
    """The HorizontalPodAutoscaler of this program is enough for its controller, with an external metric."""
    await cluster.add_namespace("hpa")
    folder = tmp_path / "done"
    named = metric(queue, f'name = "{NAME}"')
    text = config("kubernetes", pod(queue, folder), named, block(cluster, "hpa"), scaler="external")
    async with adapter(cluster, queue) as asked, ControlPlane(tmp_path, "a", text) as plane:
        await followed(plane, queue, folder)

    assert set(asked) == {"system:serviceaccount:kube-system:horizontal-pod-autoscaler"}


async def test_by_cpu_a_metrics_server_says_who_is_busy(
    cluster: KubernetesCluster, tmp_path: Path
) -> None:
    """Kubernetes' own autoscaler scales workers that use all their CPU up to the maximum. The built-in scaler reads the
    same source, and finds sleeping workers idle."""
    await cluster.add_namespace("cpu")
    client = cluster.client()
    driver = KubernetesPools(client, namespace="cpu", installation="i-1")
    cpu = {"kind": "cpu", "target": 50.0}
    settings = {"cpu": 20, "max": 3, "metric": (cpu,), "cooldown_up": 1.0}
    busy = PoolSettings.model_validate(settings | {"image": "test/burn", "scaler": "external"})
    idle = PoolSettings.model_validate(settings | {"image": "test/nap", "scaler": "builtin"})
    try:
        async with MetricsServer(cluster, tmp_path), asyncio.timeout(150.0):
            await driver.ensure("busy", busy)
            await driver.ensure("idle", idle)
            while (await driver.list_pools())["busy"].running < 3:
                await asyncio.sleep(0.5)
            while (burnt := await driver.usage("busy", busy)) is None:
                await asyncio.sleep(0.5)
            while (slept := await driver.usage("idle", idle)) is None:
                await asyncio.sleep(0.5)
    finally:
        await driver.remove("busy")
        await driver.remove("idle")
        await driver.close()

    assert burnt.cpu > 50.0
    assert slept.cpu < 50.0
    assert 0 < slept.memory < 100


async def test_nomad_autoscaler_follows_the_queue(
    queue: NatsServer, nomad: NomadServer, tmp_path: Path
) -> None:
    """The `scaling` block of this program is enough for it, with a Prometheus query."""

    async def exported(_: web.Request) -> web.Response:
        return web.Response(text=f"jobs_waiting {await waiting(queue)}\n")

    folder, port = tmp_path / "done", free_port()
    address = f'nomad {{\n  address = "{nomad.http_addr}"\n  job_prefix = "external"\n}}\n'
    async with (
        page(exported, port),
        PrometheusServer(tmp_path / "prometheus", [f"localhost:{port}"]) as prometheus,
        NomadAutoscaler(tmp_path / "autoscaler", nomad.http_addr, prometheus.url),
    ):
        asked = (
            f'metric "prometheus" {{\n    url = "{prometheus.url}"\n'
            '    query  = "sum(jobs_waiting)"\n    target = 10\n  }'
        )
        text = config("nomad", process(queue, folder), asked, address, scaler="external")
        try:
            async with ControlPlane(tmp_path, "a", text) as plane:
                await followed(plane, queue, folder)
                job = await nomad.request("GET", "/v1/job/external.pool.encoder/scale")
                told = [one["Meta"] for one in job["TaskGroups"]["workers"]["Events"]]
                assert any(one and "nomad_autoscaler.count.capped" in one for one in told), told
        finally:
            await nomad.request("DELETE", "/v1/job/external.pool.encoder")

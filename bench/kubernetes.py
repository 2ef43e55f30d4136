"""Cold start of a fleet on Kubernetes against a bare loop of applies on the same API server.

First the API server alone, so that what is compared is the two who ask it: the bare loop runs before and after
ours, with objects that say the same. Then all controllers and KWOK's nodes, in the same order: from the start of
a reconciler whose devices are registered already until every pod is running.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.plane import plane
from bench.rows import Row
from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.config import Settings
from nomad_watchdog.config_load import load
from nomad_watchdog.dev.kubernetes import KubernetesCluster
from nomad_watchdog.model import Epoch
from nomad_watchdog.schedulers.kubernetes import _names as names
from nomad_watchdog.schedulers.kubernetes import _objects as objects
from nomad_watchdog.testing.conformance import record_of

TEMPLATE = Path(__file__).with_name("mock.kubernetes.yaml")
CONFIG = """\
backend  = "kubernetes"
data_dir = "{root}/{namespace}"
kubernetes {{
  kubeconfig = "{kubeconfig}"
  namespace  = "{namespace}"
}}
registry {{
  kind = "sqlite"
}}
consul {{
  agent_address = ""
}}
agent_class "default" {{
  template = "{template}"
  probe "icmp" {{}}
}}
"""
WAIT_S = 600.0


def settings(cluster: KubernetesCluster, root: Path, namespace: str) -> Settings:
    (root / namespace).mkdir(parents=True, exist_ok=True)
    file = root / f"{namespace}.hcl"
    file.write_text(
        CONFIG.format(
            root=root, namespace=namespace, kubeconfig=cluster.kubeconfig, template=TEMPLATE
        )
    )
    return load(file, {})


def bodies(chosen: Settings, count: int) -> list[dict[str, Any]]:
    """What ours would apply, made before the clock runs."""
    spec = chosen.specs()["default"]
    built = objects.build(spec)
    found = []
    for number in range(count):
        record = record_of(f"bare-{number}")
        labels = objects.labels_of(
            record, Epoch(1), spec, kind=built.kind, shard=0, installation="bare"
        )
        document, _ = objects.document_of(record, Epoch(1), spec)
        found.append(
            objects.workload(built, record, spec, labels=labels, document=document, secret="")
        )
    return found


async def bare_loop(
    client: KubernetesClient, namespace: str, things: list[dict[str, Any]], at_once: int
) -> float:
    """Seconds for these applies, `at_once` under way at a time."""
    path = names.collection(namespace, "deployment")
    rest = iter(things)

    async def worker() -> None:
        for thing in rest:
            await client.apply(f"{path}/{thing['metadata']['name']}", thing)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began


async def until_running(client: KubernetesClient, namespace: str, count: int) -> None:
    path = names.collection(namespace, "pod")
    async with asyncio.timeout(WAIT_S):
        while True:
            found = await client.list(path, fields="status.phase=Running", metadata=True)
            if len(found.items) >= count:
                return
            await asyncio.sleep(0.5)


async def bare_start(
    client: KubernetesClient, namespace: str, chosen: Settings, count: int
) -> float:
    """Seconds from the first apply of a bare loop until every pod is running."""
    things = bodies(chosen, count)
    began = time.perf_counter()
    await bare_loop(client, namespace, things, chosen.limits().concurrency)
    await until_running(client, namespace, count)
    return time.perf_counter() - began


async def ours(chosen: Settings, count: int, client: KubernetesClient | None) -> float:
    """Seconds from the start of a reconciler until the last device is started, and with a client until its
    pod is running."""
    async with plane(chosen) as control:
        await control.register([f"device-{n}" for n in range(count)])
        began = time.perf_counter()
        async with control.running():
            await control.until_started(count, WAIT_S)
            if client is not None:
                await until_running(client, chosen.kubernetes.namespace, count)
            return time.perf_counter() - began


async def efficiency(count: int, root: Path) -> Row:
    async with KubernetesCluster(root / "api", controllers=False) as cluster:
        for namespace in ("before", "ours", "after"):
            await cluster.add_namespace(namespace)
        chosen = settings(cluster, root, "ours")
        at_once, things = chosen.limits().concurrency, bodies(chosen, count)
        client = cluster.client()
        try:
            bare_s = await bare_loop(client, "before", things, at_once)
            ours_s = await ours(chosen, count, None)
            bare_s += await bare_loop(client, "after", things, at_once)
        finally:
            await client.close()
    return Row(
        f"Kubernetes: dispatch efficiency, {count:,} devices cold ÷ bare loop",
        bare_s / 2 / ours_s,
        "",
        floor="≥ 0.80",
        aim="≥ 0.95",
        note=f"{count / ours_s:.0f}/s against {2 * count / bare_s:.0f}/s, {at_once} at once",
    )


async def cold_start(count: int, root: Path) -> Row:
    nodes = 1 + count // 1000
    async with KubernetesCluster(root / "all", fake_nodes=nodes) as cluster:
        for namespace in ("before", "ours", "after"):
            await cluster.add_namespace(namespace)
        chosen = settings(cluster, root / "cold", "ours")
        client = cluster.client()
        try:
            bare_s = await bare_start(client, "before", chosen, count)
            ours_s = await ours(chosen, count, client)
            bare_s += await bare_start(client, "after", chosen, count)
            bare_s /= 2
        finally:
            await client.close()
    return Row(
        f"Kubernetes: {count:,} devices cold until every pod runs ÷ bare loop",
        ours_s / bare_s,
        "×",
        floor="≤ 1.25",
        aim="≤ 1.05",
        note=f"{ours_s:.1f} s against {bare_s:.1f} s, {nodes} nodes of KWOK",
    )


async def measure(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        return [
            await efficiency(count, Path(folder)),
            await cold_start(count, Path(folder)),
        ]


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(200 if quick else 2000))

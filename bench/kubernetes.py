"""Cold start of a fleet on Kubernetes compared with a bare loop of applies on the same API server.

First with only the API server, which compares just the two clients: the bare loop runs before and after ours, with
the same objects. Three rounds, each on its own API server; the median counts, because the speed of a shared machine
changes within a round. Then with all controllers and KWOK's nodes, in the same order: from the start of a
reconciler whose devices are already registered until every pod is running.

Then a new control plane starts over this fleet (see `restart.py`), and the fleet idles (see
`kubernetes_idle.py`). For single events see `event.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from bench import event, kubernetes_idle, restart
from bench.cluster import add_namespaces, bare_loop, bodies, settings, spaces
from bench.plane import plane
from bench.rows import Row
from nomad_watchdog.clients.kubernetes import MANAGER, KubernetesClient
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.schedulers.kubernetes import names
from servers.kubernetes import KubernetesCluster

RAW = """
import json, ssl, sys, urllib.request
server, pki, *paths = sys.argv[1:]
context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
context.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
for path in paths:
    token = ""
    while True:
        url = f"{server}{path}?limit=500&continue={token}"
        with urllib.request.urlopen(url, context=context) as answer:
            token = json.loads(answer.read())["metadata"].get("continue", "")
        if not token:
            break
"""
ROUNDS = 3
LOST_AFTER_S = 3600
"""Effectively never: on a busy machine KWOK's nodes are silent for longer than Kubernetes' default of 50 s. Then all
pods would become unready at once, and the benchmark would measure their re-creation."""
WAIT_S = 1800.0


@asynccontextmanager
async def cluster_of(
    count: int, *, controllers: bool
) -> AsyncIterator[tuple[KubernetesCluster, KubernetesClient, Path]]:
    """A separate control plane with the namespaces for this number of devices, three times, and KWOK nodes for
    their pods; and a directory."""
    nodes = 1 + count // 1000 if controllers else 0
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        root = Path(folder)
        async with KubernetesCluster(
            root / "kubernetes",
            fake_nodes=nodes,
            controllers=controllers,
            lost_after_s=LOST_AFTER_S,
        ) as cluster:
            await add_namespaces(cluster, count)
            client = cluster.client()
            try:
                yield cluster, client, root
            finally:
                await client.close()


async def until_running(client: KubernetesClient, first: str, count: int) -> None:
    """Wait until all pods are running. Polls at most a tenth of the time, because polling loads the API server too."""
    paths = [names.collection(space, "pod") for space in spaces(first, count)]
    async with asyncio.timeout(WAIT_S):
        while True:
            began = time.perf_counter()
            lists = [
                await client.list(path, fields="status.phase=Running", metadata=True)
                for path in paths
            ]
            if sum(len(found.items) for found in lists) >= count:
                return
            await asyncio.sleep(max(0.5, 9 * (time.perf_counter() - began)))


async def bare_start(client: KubernetesClient, first: str, chosen: Settings, count: int) -> float:
    """Seconds from the first apply of a bare loop until every pod is running."""
    things = bodies(chosen, count)
    began = time.perf_counter()
    await bare_loop(client, first, things, chosen.limits().concurrency)
    await until_running(client, first, count)
    return time.perf_counter() - began


async def ours(chosen: Settings, count: int, client: KubernetesClient | None) -> float:
    """Seconds from the start of a reconciler until the last device is started, or with a client until its
    pod is running."""
    async with plane(chosen) as control:
        await control.register([f"device-{n}" for n in range(count)])
        began = time.perf_counter()
        async with control.running():
            await control.until_started(count, WAIT_S)
            if client is not None:
                await until_running(client, chosen.kubernetes.namespace, count)
            return time.perf_counter() - began


async def efficiency(count: int) -> tuple[float, float, float, int]:
    """Ratio, our applies per second, those of the bare loop, and the number in progress at a time."""
    async with cluster_of(count, controllers=False) as (cluster, client, root):
        chosen, _ = settings(cluster, root, "ours", count)
        at_once, things = chosen.limits().concurrency, bodies(chosen, count)
        bare_s = await bare_loop(client, "before", things, at_once)
        ours_s = await ours(chosen, count, None)
        bare_s += await bare_loop(client, "after", things, at_once)
    return bare_s / 2 / ours_s, count / ours_s, 2 * count / bare_s, at_once


def efficiency_row(count: int) -> Row:
    rounds = sorted(asyncio.run(efficiency(count)) for _ in range(ROUNDS))
    ratio, ours_rate, bare_rate, at_once = rounds[ROUNDS // 2]
    return Row(
        f"Kubernetes: dispatch efficiency, {count:,} devices cold ÷ bare loop",
        ratio,
        "",
        floor="≥ 0.80",
        aim="≥ 0.95",
        note=f"{ours_rate:.0f}/s against {bare_rate:.0f}/s, {at_once} at once; "
        f"{ROUNDS} rounds from {rounds[0][0]:.2f} to {rounds[-1][0]:.2f}",
    )


async def events(count: int) -> list[Row]:
    async with cluster_of(count, controllers=False) as (cluster, client, root):
        chosen, _ = settings(cluster, root, "ours", count)
        things = bodies(chosen, count)

        async def raw(number: int) -> object:
            return await bare_loop(client, "before", things[number : number + 1], 1)

        ours_s, raw_s = await event.latencies(chosen, raw, count)
    return event.rows_of("Kubernetes: event → apply", "one raw apply", ours_s, raw_s)


def _ours_in(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """When we last wrote to an object; other clients write to its status."""
    fields = meta.get("managedFields") or []
    return tuple(one["time"] for one in fields if one["manager"] == MANAGER)


async def cold_start(count: int, seconds: float = 60.0, *, apart: bool = False) -> list[Row]:
    """`apart`: run the bare loop and ours on separate clusters, once each, because three fleets of this size are too much
    for one API server on this machine."""
    bare_s: list[float] = []
    if apart:
        async with cluster_of(count, controllers=True) as (cluster, client, root):
            chosen, _ = settings(cluster, root, "ours", count)
            bare_s.append(await bare_start(client, "before", chosen, count))
    async with cluster_of(count, controllers=True) as (cluster, client, root):
        chosen, file = settings(cluster, root, "ours", count)
        if not apart:
            bare_s.append(await bare_start(client, "before", chosen, count))
        ours_s = await ours(chosen, count, client)
        if not apart:
            bare_s.append(await bare_start(client, "after", chosen, count))
        used = spaces("ours", count)
        lists = [names.collection(space, kind) for space in used for kind in ("deployment", "pod")]

        async def versions() -> dict[str, Any]:
            found = [
                await client.list(names.collection(space, "deployment"), metadata=True)
                for space in used
            ]
            metas = [item["metadata"] for one in found for item in one.items]
            return {meta["uid"]: _ours_in(meta) for meta in metas}

        pki = str(cluster.data_dir / "pki")
        again = await restart.rows_of(
            "Kubernetes: restart", file, count, ["-c", RAW, cluster.server, pki, *lists], versions
        )
        idling = await kubernetes_idle.rows_of(cluster, file, count, seconds, versions)
    return [
        Row(
            f"Kubernetes: {count:,} devices cold until every pod runs ÷ bare loop",
            ours_s / statistics.mean(bare_s),
            "×",
            floor="≤ 1.25",
            aim="≤ 1.05",
            note=f"{ours_s:.1f} s against {statistics.mean(bare_s):.1f} s; KWOK's nodes, "
            f"namespaces a fleet: {len(used)}",
        ),
        *again,
        *idling,
    ]


def run(*, quick: bool = False, large: bool = False) -> list[Row]:
    """`large`: the fleet of 10,000, from nothing until every pod runs, a restart over it, and idling."""
    if large:
        return asyncio.run(cold_start(10_000, apart=True))
    count = 200 if quick else 2000
    return [
        efficiency_row(count),
        *asyncio.run(events(30 if quick else 300)),
        *asyncio.run(cold_start(count, 10.0 if quick else 60.0)),
    ]

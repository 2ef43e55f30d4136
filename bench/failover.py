"""Time without a leader: from the end of the lease holder to its successor's dispatch of a device.

Two control planes as a user runs them, one shard, real Consul and Nomad. When the holder is signalled, a device
is registered with the successor; the time ends with the successor's dispatch, as recorded by
Nomad. SIGTERM is a graceful end, SIGKILL a crash, SIGSTOP a freeze. After each round the old holder is
started again (or resumed), so that every round has a waiting successor.

For comparison: the time from a registration to its dispatch without a failover.
"""

from __future__ import annotations

import asyncio
import signal
import statistics
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.plane import TEMPLATE
from bench.rows import Row
from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane

PREFIX = "failover"
CONFIG = """\
backend  = "nomad"
data_dir = "{root}"
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address    = "NOMAD"
  job_prefix = "PREFIX"
}
consul {
  address       = "CONSUL"
  prefix        = "PREFIX"
  agent_address = ""
}
agent_class "default" {
  template = "TEMPLATE"
  probe "icmp" {}
}
"""
AIMS = {"SIGTERM": "≤ 0.25", "SIGKILL": "≤ 5", "SIGSTOP": "≤ 5"}
WORDS = {"SIGTERM": "graceful", "SIGKILL": "crash", "SIGSTOP": "frozen"}


async def _dispatched(nomad: NomadServer) -> dict[str, float]:
    jobs: list[Any] = await nomad.request("GET", f"/v1/jobs?prefix={PREFIX}&meta=true")
    return {j["Meta"]["device_id"]: j["SubmitTime"] / 1e9 for j in jobs if j.get("ParentID")}


async def _until_dispatched(nomad: NomadServer, name: str) -> float:
    """Wall-clock time of its dispatch."""
    async with asyncio.timeout(60.0):
        while True:
            found = await _dispatched(nomad)
            if name in found:
                return found[name]
            await asyncio.sleep(0.02)


async def _holder(planes: list[ControlPlane]) -> ControlPlane:
    async with asyncio.timeout(60.0):
        while True:
            for plane in planes:
                if 0 in await plane.held():
                    return plane
            await asyncio.sleep(0.05)


async def _round(
    nomad: NomadServer, planes: list[ControlPlane], end: signal.Signals, name: str
) -> float:
    holder = await _holder(planes)
    heir = next(plane for plane in planes if plane is not holder)
    await heir.until("/v1/leases", lambda said: len(said["replicas"]) == len(planes))
    began = time.time()
    holder.process.send(end)
    await heir.register(name)
    took_s = await _until_dispatched(nomad, name) - began
    if end is signal.SIGSTOP:
        holder.resume()
    else:
        await holder.process.wait(20.0)
        await holder.start()
    await holder.ready()
    return took_s


async def measure(rounds: int) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        root = Path(folder)
        async with (
            ConsulServer(root / "consul") as consul,
            NomadServer(root / "nomad") as nomad,
            AsyncExitStack() as stack,
        ):
            client = ConsulClient(ConsulAccess(address=consul.http_addr))
            await ConsulRegistry(client=client, prefix=PREFIX).initialise()
            await client.close()
            config = CONFIG.replace("NOMAD", nomad.http_addr).replace("CONSUL", consul.http_addr)
            config = config.replace("PREFIX", PREFIX).replace("TEMPLATE", str(TEMPLATE))
            planes = [
                await stack.enter_async_context(ControlPlane(root, name, config))
                for name in ("a", "b")
            ]
            quiet = []
            for number in range(rounds):
                await _holder(planes)
                began = time.time()
                await planes[number % 2].register(f"quiet {number}")
                quiet.append(await _until_dispatched(nomad, f"quiet {number}") - began)
            for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
                took = [
                    await _round(nomad, planes, end, f"{end.name} {number}")
                    for number in range(rounds)
                ]
                rows.append(
                    Row(
                        f"fail-over, {WORDS[end.name]}: signal → heir's dispatch, median",
                        statistics.median(took),
                        "s",
                        floor="≤ 2" if end is signal.SIGTERM else "≤ 23",
                        aim=AIMS[end.name],
                        note=f"{min(took):.2f} to {max(took):.2f} s in {rounds}; without an end "
                        f"{statistics.median(quiet):.2f} s",
                    )
                )
            jobs: list[Any] = await nomad.request("GET", f"/v1/jobs?prefix={PREFIX}&meta=true")
            counts = Counter(j["Meta"]["device_id"] for j in jobs if j.get("ParentID"))
            rows.append(
                Row(
                    "fail-over, devices dispatched twice",
                    sum(count > 1 for count in counts.values()),
                    "",
                    floor="≤ 0",
                    aim="≤ 0",
                    note=f"of {len(counts)}",
                )
            )
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(1 if quick else 5))

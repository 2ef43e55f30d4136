"""CPU use of the control plane for an idle fleet of 10,000 devices with heartbeats every 30 s each.

Ours is the program as a user runs it, on real Nomad (mock driver) and Consul. Gateways send heartbeats for a hundred
devices at a time (`POST /v1/heartbeats`); a second measurement sends them for each device
separately. The naive poller requests the allocations of one device after another from Nomad, in one thread, with
python-nomad; it cannot poll every device every 10 s, so it is always busy.
CPU is that of the control plane's process alone, as a share of one core.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.plane import TEMPLATE, until_placed
from bench.rows import Row
from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.demo.process import Process, clean_environment
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane

GATEWAY = 100
BEAT_S = 30.0
CLIENTS = 8
"""Number of Nomad clients. Placing on a full node is slow: 25 minutes on one node, 8 minutes on these."""
PLACED_S = 1800.0
"""Timeout for Nomad to place all of them on one machine, in seconds."""
CONFIG = """\
backend  = "nomad"
data_dir = "{root}"
api {
  listen = "127.0.0.1:{port}"
  rate   = 100000
  burst  = 100000
}
nomad {
  address    = "NOMAD"
  job_prefix = "idle"
}
consul {
  address       = "CONSUL"
  agent_address = ""
}
agent_class "default" {
  template = "TEMPLATE"
  probe "icmp" {}
}
"""
REPLICATED = """
shards = 4
resync = "5s"
"""
NAIVE = """
import sys, nomad
client = nomad.Nomad(address=sys.argv[1], timeout=15)
jobs = [job["ID"] for job in client.jobs.get_jobs(prefix="idle/dispatch-")]
while True:
    for job in jobs:
        client.job.get_allocations(job)
"""


def cpu_s(pid: int) -> float:
    """User and system time of a process with all its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def share(pid: int, seconds: float) -> float:
    """CPU use over `seconds`, as a share of one core."""
    before, began = cpu_s(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (cpu_s(pid) - before) / (time.monotonic() - began)


async def _beat(plane: ControlPlane, names: list[str], at_a_time: int) -> None:
    """Send heartbeats for all of them every BEAT_S, spread evenly, until cancelled."""
    batches = [names[n : n + at_a_time] for n in range(0, len(names), at_a_time)]
    async with aiohttp.ClientSession(plane.api) as session:
        began, turn = time.monotonic(), 0
        while True:
            for batch in batches:
                due = began + BEAT_S * turn / len(batches)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                turn += 1
                if at_a_time == 1:
                    call = session.post(f"/v1/devices/{batch[0]}/heartbeat")
                else:
                    call = session.post("/v1/heartbeats", json={"ids": batch})
                async with call as answer:
                    assert answer.status in (200, 204), await answer.text()


async def while_beating(
    plane: ControlPlane, names: list[str], at_a_time: int, seconds: float
) -> float:
    """The control plane's share of a core while all devices send heartbeats, `at_a_time` per call."""
    beating = asyncio.ensure_future(_beat(plane, names, at_a_time))
    await asyncio.sleep(5.0)
    used = await share(plane.process.pid, seconds)
    if beating.done():
        beating.result()
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
    return used


async def until_settled(plane: ControlPlane, count: int) -> None:
    """Wait until all agents are seen and no work is left."""

    def settled(status: Any) -> bool:
        return bool(
            status["placements"] == count and status["queue"] == 0 and status["in_work"] == 0
        )

    await plane.until("/v1/status", settled, 600.0)


async def stored(client: ConsulClient, nomad: NomadServer) -> dict[str, int]:
    """Key or job → index of its last write."""
    _, rows = await client.kv_tree("nomad-watchdog/")
    jobs: list[Any] = await nomad.request("GET", "/v1/jobs?prefix=idle")
    return {row.key: row.index for row in rows} | {job["ID"]: job["ModifyIndex"] for job in jobs}


def _fetching(folder: Path) -> Path:
    """A template whose agents fetch their program from the replica that registered the parent job."""
    text, file = TEMPLATE.read_text(), folder / "fetching.nomad.hcl"
    source = "env { SOURCE = var.agent_source }\n      resources {"
    assert text.count("resources {") == 1
    declared = 'variable "agent_source" { default = "" }\n'
    file.write_text(declared + text.replace("resources {", source))
    return file


async def measure_replicas(count: int, seconds: float) -> list[Row]:
    """Like `measure`, but only the writes, with two replicas that share four shards, each with its own address, as in
    the shipped job."""
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # Nomad runs as another user in it
        async with (
            ConsulServer(root / "consul") as consul,
            NomadServer(root / "nomad", unprivileged=True) as nomad,
        ):
            client = ConsulClient(ConsulAccess(address=consul.http_addr))
            await ConsulRegistry(client=client).initialise()
            config = CONFIG.replace("NOMAD", nomad.http_addr).replace("CONSUL", consul.http_addr)
            config = config.replace("TEMPLATE", str(_fetching(root))) + REPLICATED
            names = [f"device-{number}" for number in range(count)]
            async with (
                ControlPlane(root, "one", config) as one,
                ControlPlane(root, "two", config) as two,
            ):
                for plane in (one, two):
                    await plane.until("/v1/status", lambda said: said["holds"] == "2 of 4 shards")
                some = [{"id": name, "address": "127.0.0.1"} for name in names]
                await one.call("POST", "/v1/devices:bulk", {"devices": some})
                await asyncio.gather(until_settled(one, count), until_settled(two, count))
                await until_placed(nomad, PLACED_S)
                await asyncio.sleep(10.0)
                before = await stored(client, nomad)
                await while_beating(one, names, GATEWAY, seconds)
                writes = len((await stored(client, nomad)).items() ^ before.items())
            await client.close()
    return [
        Row(
            "idle, two replicas and four shards, writes to Consul's and Nomad's stores",
            writes,
            "",
            floor="≤ 0",
            aim="≤ 0",
            note=f"in {seconds:.0f} s, {count:,} devices, below our keys and of our jobs",
        )
    ]


async def measure(count: int, seconds: float) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        root = Path(folder)
        root.chmod(0o755)  # Nomad runs as another user in it
        async with (
            ConsulServer(root / "consul") as consul,
            NomadServer(root / "nomad", clients=CLIENTS, unprivileged=True) as nomad,
        ):
            client = ConsulClient(ConsulAccess(address=consul.http_addr))
            await ConsulRegistry(client=client).initialise()
            config = CONFIG.replace("NOMAD", nomad.http_addr).replace("CONSUL", consul.http_addr)
            config = config.replace("TEMPLATE", str(TEMPLATE))
            names = [f"device-{number}" for number in range(count)]
            async with ControlPlane(root, "plane", config) as plane:
                for first in range(0, count, 1000):
                    some = [{"id": n, "address": "127.0.0.1"} for n in names[first : first + 1000]]
                    await plane.call("POST", "/v1/devices:bulk", {"devices": some})

                await until_settled(plane, count)
                # Placements still in progress are events for the control plane, not idling.
                await until_placed(nomad, PLACED_S)
                await asyncio.sleep(10.0)
                before = await stored(client, nomad)
                gateways = await while_beating(plane, names, GATEWAY, seconds)
                singly = await while_beating(plane, names, 1, seconds)
                rss_kb = int(Path(f"/proc/{plane.process.pid}/statm").read_text().split()[1]) * (
                    os.sysconf("SC_PAGE_SIZE") // 1024
                )
                writes = len((await stored(client, nomad)).items() ^ before.items())
            naive_log = root / "naive.log"
            argv = [sys.executable, "-c", NAIVE, nomad.http_addr]
            naive = Process.start(argv, log=naive_log, env=clean_environment())
            try:
                await asyncio.sleep(5.0)
                theirs = await share(naive.pid, seconds / 2)
            finally:
                await naive.kill()
            await client.close()
    return [
        Row(
            f"idle, {count:,} devices beating by gateways, CPU ÷ naive poller",
            gateways / theirs,
            "×",
            floor="≤ 0.1",
            aim="≤ 0.02",
            note=f"{gateways:.1%} of a core against {theirs:.1%}; {rss_kb / count:.1f} KB resident a device",
        ),
        Row(
            f"idle, {count:,} devices beating one by one, CPU ÷ naive poller",
            singly / theirs,
            "×",
            note=f"{singly:.1%} of a core, {count / BEAT_S:.0f} calls a second",
        ),
        Row(
            "idle, writes to Consul's and Nomad's stores",
            writes,
            "",
            floor="≤ 0",
            aim="≤ 0",
            note=f"in {2 * seconds:.0f} s, below our keys and of our jobs",
        ),
    ]


def run(*, quick: bool = False) -> list[Row]:
    rows = asyncio.run(measure(300, 10.0) if quick else measure(10_000, 60.0))
    return rows + asyncio.run(measure_replicas(100, 40.0 if quick else 120.0))

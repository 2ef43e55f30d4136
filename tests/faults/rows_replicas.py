"""Rows 5, 6, 7, 9, 46: two replicas, of which the lease holder freezes, loses its lease, is killed or is cut off."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from urllib.parse import quote

import aiohttp

from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e import audit
from tests.faults.matrix import row
from tests.faults.program import Program
from tests.faults.rows_crash import watched
from tests.faults.rows_hosts import cut_off
from tests.faults.rows_nodes import eligible, nodes
from tests.faults.rows_servers import known_to_run
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World

TTL_S = 2.0
"""`lease_ttl` in row 46."""
SLACK = 10.0
"""Factor by which a repair may exceed the promised time here: the machine runs other rows at the same time, and the
duration of a start varies as much."""


async def holder(world: World, asked: Program) -> str:
    """The API of the replica that holds the only shard, as reported by `asked`."""
    with suppress(aiohttp.ClientError, TimeoutError):
        status, said = await world.call("GET", "/v1/leases", to=asked)
        if status == 200 and said["shards"]:
            return str(said["shards"][0]["api"])
    return ""


async def pair(world: World, count: int) -> tuple[list[str], Program]:
    """Watched devices and a second, waiting replica; the first one holds the lease."""
    names = await watched(world, count)
    other = await world.replicate()

    async def first_holds() -> bool:  # the second one has just started to read it
        return await holder(world, other) == world.program.api

    await until(first_holds, 15.0, "the second replica sees the lease of the first")
    return names, other


async def served(world: World, other: Program, names: list[str], since: float) -> None:
    """The other replica starts agents for new devices while the first can't."""
    world.speaks_to = other
    fresh = world.names(3, "new")
    await world.wishes(*fresh)
    await world.wish(names[0], present=False)
    wanted = {str(slug_of(DeviceId(name))) for name in fresh}
    await until(lambda: wanted <= {one.slug for one in world.agents()}, 45.0, "the successor acts")
    world.notes.append(f"the successor had started agents after {time.monotonic() - since:.1f} s")
    held_by = await until(lambda: holder(world, other), 15.0, "a replica holds the lease")
    if held_by != other.api:
        world.broken.append("S2: agents were started without the lease")


@row("5-successor", "the holder of the lease is frozen, a successor acts, and it goes on (SIGCONT)",
     stake="S1 S2 L2")  # fmt: skip
async def frozen_holder(world: World) -> None:
    names, other = await pair(world, 4)
    before = world.pids()
    began = time.monotonic()
    # frozen with work in progress: its decisions must be invalid when it continues
    work = asyncio.ensure_future(world.wishes(*world.names(6, "late")))
    await asyncio.sleep(0.05)
    world.program.running.send(signal.SIGSTOP)
    try:
        await served(world, other, names, began)
        await work
        world.undisturbed(before, "L3", leaving=1)
    finally:
        world.program.running.send(signal.SIGCONT)
        work.cancel()
    world.speaks_to = None
    await world.settle()


@row("5-killed", "the holder of the lease is killed; its successor acts", stake="S2 L2")
async def killed_holder(world: World) -> None:
    names, other = await pair(world, 4)
    began = time.monotonic()
    world.program.kill_now()
    await served(world, other, names, began)
    await world.program.start()
    world.speaks_to = None
    await world.settle()


@row("6-robbed", "the holder's sessions are destroyed under it, six times, while devices come",
     stake="S1 S2")  # fmt: skip
async def robbed(world: World) -> None:
    names, _ = await pair(world, 4)
    folder = f"{world.where.consul}/v1/kv/{world.where.kv_prefix}/leadership/?recurse"
    robbed_of = 0
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(12, "new")))
        group.create_task(world.wish(names[0], present=False))
        for _ in range(60):
            if robbed_of >= 6:
                break
            await asyncio.sleep(0.5)
            for key in await audit.get(world.session, folder):
                if session := key.get("Session"):
                    url = f"{world.where.consul}/v1/session/destroy/{session}"
                    async with world.session.put(url) as answer:
                        robbed_of += answer.status == 200
    if robbed_of < 6:
        raise BrokenRowError(f"{robbed_of} sessions were destroyed, not 6")
    await world.settle()


@row("7-consul", "the holder is cut off from Consul and not from Nomad; a successor acts",
     stake="S2 L2 L3", lane="cluster")  # fmt: skip
async def holder_without_consul(world: World) -> None:
    names, other = await pair(world, 6)
    began = time.monotonic()
    await world.cluster.net.partition("p1", "c1")
    await cut_off(world, "p1", "c1")
    await served(world, other, names, began)
    await world.cluster.net.heal()
    world.speaks_to = None
    await world.settle()


@row("9-one-way", "Consul hears the holder, which hears no answer, and can write to Nomad",
     stake="S1 S2", lane="cluster")  # fmt: skip
async def holder_deaf_to_consul(world: World) -> None:
    names, other = await pair(world, 6)
    began = time.monotonic()
    await world.cluster.net.cut("c1", "p1")
    await cut_off(world, "p1", "c1")
    await served(world, other, names, began)
    await world.cluster.net.heal()
    world.speaks_to = None
    await world.settle()


def _add(strategy: str) -> None:
    @row(
        f"46-{strategy}",
        "the replica that agents are fetched from is killed, and its agents and a new one have to start on another "
        f"node (strategy {strategy})",
        stake="S1 S2 S3 L1 L2",
        lane="alone",
        strategy=strategy,
        more=f'lease_ttl = "{TTL_S:.0f}s"\n',
    )
    async def play(world: World) -> None:
        await _fetched_from_the_dead(world)


async def _fetched_from_the_dead(world: World) -> None:
    await eligible(world, "-1", is_eligible=False)
    _, other = await pair(world, 0)
    began = time.monotonic()
    await world.wishes(*world.names(5, "one"))
    await _are_ready(world, list(world.wanted))
    start_s = time.monotonic() - began
    await known_to_run(world)
    if {
        job["Meta"]["agent_source"].startswith(world.program.api) for job in await world.jobs()
    } != {True}:
        raise BrokenRowError("not all agents are fetched from the holder")
    await eligible(world, "-1", is_eligible=True)
    path = f"/v1/node/{(await nodes(world))['-0']['ID']}/drain"
    killed = time.monotonic()
    world.program.kill_now()
    world.speaks_to = other
    try:
        await world.servers.nomad.request("POST", path, {"DrainSpec": {"Deadline": -1}})
        await world.wishes(*world.names(1, "new"))
        await _are_ready(world, list(world.wanted), node="data-1")
        took_s = time.monotonic() - killed
        await _is_in_bounds(world, start_s, took_s)
        # S2: everything that runs now was fetched from the remaining replica.
        for job in await world.jobs():
            if not job["Stop"] and not job["Meta"]["agent_source"].startswith(other.api):
                world.broken.append(
                    f"L2: {job['ID']} is fetched from {job['Meta']['agent_source']}"
                )
        await world.settle()
        await world.finish()
    finally:
        await world.servers.nomad.request("POST", path, {"DrainSpec": None, "MarkEligible": True})


async def _is_in_bounds(world: World, start_s: float, took_s: float) -> None:
    promised = TTL_S + start_s
    world.notes.append(
        f"{len(world.wanted)} agents were ready on the other node {took_s:.1f} s after the kill; lease_ttl is "
        f"{TTL_S:.0f} s, and the start of {len(world.wanted) - 1} at once took {start_s:.1f} s before"
    )
    if took_s > SLACK * promised:
        world.broken.append(f"L2: the repair took {took_s:.1f} s, promised are {promised:.1f} s")


async def _are_ready(world: World, names: list[str], *, node: str = "") -> None:
    """The accepted agent of each device has probed it; with `node`, all run below this folder of Nomad."""

    async def ready() -> bool:
        if node and len(audit.processes(world.where.root / node)) != len(names):
            return False
        for name in names:
            path, status = f"/v1/devices/{quote(name, safe='')}/explain", 0
            with suppress(aiohttp.ClientError, TimeoutError):
                status, shown = await world.call("GET", path)
            report = shown["report"] if status == 200 else None
            if not report or not report["ready"] or report["epoch"] != shown["desired"]["epoch"]:
                return False
        return True

    await until(ready, 120.0, f"{len(names)} agents are ready")


_add("dispatch")
_add("register")

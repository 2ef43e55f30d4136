"""Rows 5, 6, 7, 9: two replicas, of which the one that holds the lease freezes, is robbed or cut off."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress

import aiohttp

from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e import audit
from tests.faults.matrix import row
from tests.faults.program import Program
from tests.faults.rows_crash import watched
from tests.faults.rows_hosts import cut_off
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World


async def holder(world: World, asked: Program) -> str:
    """The API of the replica that holds the only shard, as one of them sees it."""
    with suppress(aiohttp.ClientError, TimeoutError):
        status, said = await world.call("GET", "/v1/leases", to=asked)
        if status == 200 and said["shards"]:
            return str(said["shards"][0]["api"])
    return ""


async def pair(world: World, count: int) -> tuple[list[str], Program]:
    """Watched devices, the first replica that holds the lease, and a second that waits."""
    names = await watched(world, count)
    other = await world.replicate()

    async def first_holds() -> bool:  # the second one has just begun to read of it
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
    if await holder(world, other) != other.api:
        world.broken.append("S2: agents were started without the lease")


@row("5-successor", "the holder of the lease is frozen, a successor acts, and it goes on (SIGCONT)",
     stake="S1 S2 L2")  # fmt: skip
async def frozen_holder(world: World) -> None:
    names, other = await pair(world, 4)
    before = world.pids()
    began = time.monotonic()
    # caught with work in hand: what it had decided must be dead when it wakes
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

"""Rows 11 to 15: Consul and Nomad are frozen, killed, restarted; a node goes and comes back."""

from __future__ import annotations

import asyncio

from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World


async def node_status(world: World, name: str) -> str:
    """Status of a Nomad client, as reported by the server."""
    for node in await world.servers.nomad.request("GET", "/v1/nodes"):
        if node["Name"].endswith(name):
            return str(node["Status"])
    raise BrokenRowError(f"no Nomad node {name}")


@row(
    "11-frozen",
    "Consul is frozen for 15 s while devices come and go",
    stake="S4 L3",
    lane="alone",
)
async def consul_frozen(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    world.servers.consul.pause()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(world.wishes(*world.names(3, "new")))
            group.create_task(world.wish(names[0], present=False))
            await asyncio.sleep(15.0)
            world.undisturbed(before, "L3", leaving=1)
            world.servers.consul.resume()
    finally:
        world.servers.consul.resume()
    await world.settle()


@row(
    "11-killed",
    "Consul is killed, is away for 10 s, and is started again",
    stake="S4 S8 L3",
    lane="alone",
)
async def consul_killed(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    await world.servers.consul.kill()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(world.wishes(*world.names(3, "new")))
            group.create_task(world.wish(names[0], present=False))
            await asyncio.sleep(10.0)
            world.undisturbed(before, "L3", leaving=1)
            await world.servers.consul.start()
    finally:
        await world.servers.consul.start()
    await world.acknowledged_is_stored()
    await world.settle()


@row("13-wiped", "all our keys in Consul are deleted, and put back 10 s later", stake="S7 S1")
async def wiped(world: World) -> None:
    await watched(world, 8)
    before = world.pids()
    url = f"{world.where.consul}/v1/kv/{world.where.kv_prefix}/"
    async with world.session.get(f"{url}?recurse") as answer:
        rows = await answer.json()
    async with world.session.delete(f"{url}?recurse") as answer:
        answer.raise_for_status()
    await asyncio.sleep(10.0)
    world.undisturbed(before)
    operations = [
        {"KV": {"Verb": "set", "Key": kept["Key"], "Value": kept["Value"]}} for kept in rows
    ]
    async with world.session.put(f"{world.where.consul}/v1/txn", json=operations) as answer:
        answer.raise_for_status()
    await world.settle()
    world.undisturbed(before)


@row("13-records", "our device keys are deleted, and the sentinels stay", stake="S7")
async def records_gone(world: World) -> None:
    names = await watched(world, 8)
    before = world.pids()
    url = f"{world.where.consul}/v1/kv/{world.where.kv_prefix}/devices/"
    async with world.session.get(f"{url}?recurse") as answer:
        rows = [kept for kept in await answer.json() if not kept["Key"].endswith("/meta")]
    # all at once: a few at a time are not a mass change, and may be stopped
    gone = [{"KV": {"Verb": "delete", "Key": kept["Key"]}} for kept in rows]
    async with world.session.put(f"{world.where.consul}/v1/txn", json=gone) as answer:
        answer.raise_for_status()
    await until(lambda: held(world), 30.0, "the breaker holds the stops")
    await asyncio.sleep(8.0)
    world.undisturbed(before)
    world.epochs_may_fall = True  # the store starts again at 0; the agents' epochs are higher
    await world.wishes(*names)
    await world.settle()


async def held(world: World) -> bool:
    status = await world.status()
    return bool(status["breaker"]["held"])


@row(
    "14-restart",
    "Nomad's server is killed and started again; its stream forgets all",
    stake="L1 S8",
    lane="alone",
)
async def nomad_restarted(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    nomad = world.servers.nomad
    await nomad.kill()
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(3, "new")))
        group.create_task(world.wish(names[0], present=False))
        await asyncio.sleep(5.0)
        world.undisturbed(before, "L3", leaving=1)
        await nomad.restart()
        await nomad.wait_ready()
    await world.settle()


@row("14-frozen", "Nomad's server is frozen for 12 s", stake="L1 L3", lane="alone")
async def nomad_frozen(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    nomad = world.servers.nomad
    nomad.pause()
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(world.wishes(*world.names(3, "new")))
            group.create_task(world.wish(names[0], present=False))
            await asyncio.sleep(12.0)
            world.undisturbed(before, "L3", leaving=1)
            nomad.resume()
    finally:
        nomad.resume()
    await nomad.wait_ready()
    await world.settle()


@row(
    "15-frozen",
    "a Nomad client is frozen until its node is lost, and comes back",
    stake="S1 S3",
    lane="alone",
)
async def client_frozen(world: World) -> None:
    names = await watched(world, 8)
    await known_to_run(world)
    nomad = world.servers.nomad
    before = world.pids()
    nomad.pause(1)
    try:
        await until(lambda: lost(world), 60.0, "the node is lost")
        await world.wish(names[0], present=False)
        await world.wishes(*world.names(2, "new"))
        await asyncio.sleep(5.0)
        world.undisturbed(before, "L3", leaving=1)
    finally:
        nomad.resume(1)
    await nomad.wait_ready()
    await world.settle()


async def known_to_run(world: World) -> None:
    """Wait until Nomad's servers know that each agent runs, which is some tenths of a second after its start. An agent
    that is still pending when its node goes is replaced immediately, whatever `disconnect` says (1.11.3)."""

    async def known() -> bool:
        jobs = {job["ID"] for job in await world.jobs() if job["Status"] != "dead"}
        found = await world.servers.nomad.request("GET", "/v1/allocations")
        return jobs <= {one["JobID"] for one in found if one["ClientStatus"] == "running"}

    await until(known, 20.0, "Nomad knows that all agents run")


async def lost(world: World) -> bool:
    return await node_status(world, "-1") in {"down", "disconnected"}


@row(
    "15-killed",
    "a Nomad client is killed; its agents run on; it comes back",
    stake="S1 S3",
    lane="alone",
)
async def client_killed(world: World) -> None:
    await watched(world, 8)
    await known_to_run(world)
    nomad = world.servers.nomad
    before = world.pids()
    await nomad.kill(1)
    try:
        await until(lambda: lost(world), 60.0, "the node is lost")
        await world.wishes(*world.names(2, "new"))
        world.undisturbed(before, "L3")
    finally:
        await nomad.restart(1)
    await nomad.wait_ready()
    await world.settle()
    world.undisturbed(before, "S3")


@row(
    "34-purged",
    "an operator purges two running agents' jobs and the parent job",
    stake="L1 S1",
    lane="alone",
)
async def purged(world: World) -> None:
    await watched(world, 4)
    # Nomad forgets a purged job immediately, but its process ends only after kill_timeout: it is invisible (S3)
    world.overlap_s = 10.0
    world.notes.append("a purged job's process may overlap its successor for its kill_timeout")
    nomad = world.servers.nomad
    for job in (await world.jobs())[:2]:
        await nomad.request("DELETE", f"/v1/job/{job['ID'].replace('/', '%2F')}?purge=true")
    await nomad.request("DELETE", f"/v1/job/{world.where.job_prefix}?purge=true")
    await world.wishes(*world.names(2, "new"))
    await world.settle()
    await nomad.request("PUT", "/v1/system/gc")


@row(
    "34-stopped",
    "an operator stops two agents' jobs, and Nomad collects its garbage",
    stake="L1 S2",
    lane="alone",
)
async def stopped(world: World) -> None:
    names = await watched(world, 4)
    nomad = world.servers.nomad
    for job in (await world.jobs())[:2]:
        await nomad.request("DELETE", f"/v1/job/{job['ID'].replace('/', '%2F')}")
    await asyncio.sleep(1.0)
    await nomad.request("PUT", "/v1/system/gc")
    await world.wish(names[0], present=False)
    await world.settle()


@row("35-parent", "the parent job is stopped while devices come", stake="S9 L1")
async def parent_stopped(world: World) -> None:
    await watched(world, 2)
    before = world.pids()
    await world.servers.nomad.request("DELETE", f"/v1/job/{world.where.job_prefix}")
    await world.wishes(*world.names(3, "new"))
    await world.settle()
    world.undisturbed(before)

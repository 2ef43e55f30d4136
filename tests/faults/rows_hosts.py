"""Rows 8 to 15 on many hosts: partitions, the death of a leader, a lost quorum, a node behind a dead cable."""

from __future__ import annotations

import asyncio
import socket
import time

from servers.cluster import SERVERS
from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World


async def cut_off(world: World, one: str, other: str, port: int = 4646) -> None:
    """Check that no connection is possible between these two hosts: without a real partition the row proves nothing."""
    loop = asyncio.get_running_loop()
    with world.cluster.net.hosts[one].open_socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            async with asyncio.timeout(1.5):
                await loop.sock_connect(probe, (world.cluster.net.hosts[other].address, port))
        except TimeoutError:
            return
    raise BrokenRowError(f"{one} still reaches {other}")


async def through(world: World, seconds: float, *, gone: str = "") -> None:
    """Requests during the fault: three devices are added, one leaves; the agents keep running."""
    before = world.pids()
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(3, "new"), timeout_s=180.0))
        if gone:
            group.create_task(world.wish(gone, present=False, timeout_s=180.0))
        await asyncio.sleep(seconds)
        world.undisturbed(before, "L3", leaving=1)
        await world.cluster.mend()


@row("8-nomad", "the control plane is cut off from Nomad for 20 s", stake="L1 S9", lane="cluster")
async def cut_from_nomad(world: World) -> None:
    names = await watched(world, 6)
    await world.cluster.net.partition("p1", "c2")
    await cut_off(world, "p1", "c2")
    await through(world, 20.0, gone=names[0])
    await world.settle()


@row("8-one-way", "Nomad hears the control plane, and none of its answers comes back for 20 s",
     stake="S1 S2 S3", lane="cluster")  # fmt: skip
async def deaf_to_nomad(world: World) -> None:
    names = await watched(world, 6)
    await world.cluster.net.cut("c2", "p1")
    await cut_off(world, "p1", "c2")
    await through(world, 20.0, gone=names[0])
    await world.settle()


@row(
    "8-consul",
    "the control plane is cut off from Consul for 20 s",
    stake="S2 S4 L3",
    lane="cluster",
)
async def cut_from_consul(world: World) -> None:
    names = await watched(world, 6)
    await world.cluster.net.partition("p1", "c1")
    await cut_off(world, "p1", "c1")
    await through(world, 20.0, gone=names[0])
    await world.settle()


@row("8-consul-one-way", "Consul hears the control plane, and none of its answers comes back for 20 s",
     stake="S2 S4 S5", lane="cluster")  # fmt: skip
async def deaf_to_consul(world: World) -> None:
    names = await watched(world, 6)
    await world.cluster.net.cut("c1", "p1")
    await cut_off(world, "p1", "c1")
    await through(world, 20.0, gone=names[0])
    await world.settle()


@row("10-agents", "agents of one node can't reach the control plane for 40 s", stake="S6 L3",
     lane="cluster")  # fmt: skip
async def agents_cut_off(world: World) -> None:
    await watched(world, 6)
    before = world.pids()
    await world.cluster.net.partition("p1", "c3")
    await cut_off(world, "c3", "p1", int(world.program.listen.rpartition(":")[2]))
    await asyncio.sleep(40.0)
    world.undisturbed(before, "L3")
    await world.cluster.net.heal()
    await world.settle()
    world.undisturbed(before, "L3")


@row("10-one-way", "reports of one node's agents arrive, and no answer does, for 30 s", stake="S1 S6",
     lane="cluster")  # fmt: skip
async def agents_unheard(world: World) -> None:
    await watched(world, 6)
    before = world.pids()
    await world.cluster.net.cut("p1", "c3")
    await cut_off(world, "c3", "p1", int(world.program.listen.rpartition(":")[2]))
    await asyncio.sleep(30.0)
    world.undisturbed(before, "L3")
    await world.cluster.net.heal()
    await world.settle()
    world.undisturbed(before, "L3")


@row("11-leader", "Consul's leader is killed twice, 20 s apart, of three servers", stake="S4 S8",
     lane="cluster")  # fmt: skip
async def consul_leader_lost(world: World) -> None:
    names = await watched(world, 6)
    for number in range(2):
        leader = await world.cluster.consul_leader()
        await world.cluster.consul[leader].kill()
        async with asyncio.TaskGroup() as group:
            group.create_task(world.wishes(*world.names(2, f"new {number}")))
            group.create_task(world.wish(names[number], present=False))
            await asyncio.sleep(20.0)
        await world.cluster.mend()
        await world.acknowledged_is_stored()
    await world.settle()


@row("12-quorum", "two of three Consul servers are frozen for 30 s", stake="L3 S7", lane="cluster")
async def quorum_lost(world: World) -> None:
    names = await watched(world, 6)
    leader = await world.cluster.consul_leader()
    others = [name for name in SERVERS if name != leader]
    for name in (leader, others[0]):
        world.cluster.consul[name].pause()
    await through(world, 30.0, gone=names[0])
    await world.settle()


@row("14-leader", "Nomad's leader is killed, of three servers", stake="L1 S8", lane="cluster")
async def nomad_leader_lost(world: World) -> None:
    names = await watched(world, 6)
    leader = await world.cluster.nomad_leader()
    await world.cluster.nomad[leader].kill()
    await through(world, 20.0, gone=names[0])
    await world.settle()


@row("14-split", "Nomad's leader is cut off from the other two servers for 25 s", stake="L1 S2 S8",
     lane="cluster")  # fmt: skip
async def nomad_split(world: World) -> None:
    names = await watched(world, 6)
    leader = await world.cluster.nomad_leader()
    others = [name for name in SERVERS if name != leader]
    await world.cluster.net.partition(leader, *others)
    await cut_off(world, leader, others[0])
    await through(world, 25.0, gone=names[0])
    await world.settle()


@row("15-cable", "a node loses its network until Nomad takes it for lost, and gets it back",
     stake="S1 S3 S6", lane="cluster")  # fmt: skip
async def node_cut_off(world: World) -> None:
    names = await watched(world, 9)
    before = world.pids()
    everybody = [name for name in world.cluster.net.hosts if name != "c3"]
    await world.cluster.net.partition("c3", *everybody)
    began = time.monotonic()
    await cut_off(world, "s1", "c3")

    async def lost() -> bool:
        nodes = await world.cluster.request("GET", "/v1/nodes")
        return any(n["Name"] == "c3" and n["Status"] != "ready" for n in nodes)

    await until(lost, 60.0, "the node is lost")
    took_s = time.monotonic() - began
    world.notes.append(f"Nomad took the node for lost {took_s:.0f} s after its cable was cut")
    await world.wish(names[0], present=False)
    await world.wishes(*world.names(2, "new"))
    await asyncio.sleep(10.0)
    world.undisturbed(before, "L3", leaving=1)
    await world.cluster.mend()
    await world.settle()

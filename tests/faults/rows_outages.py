"""Row 41 in full: an outage that outlives its agent, whatever ends the agent, and whichever replica holds the shard."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import aiohttp

from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e import audit
from tests.faults.devices import open_devices
from tests.faults.matrix import row
from tests.faults.program import Program
from tests.faults.rows_nodes import eligible, nodes
from tests.faults.rows_replicas import holder
from tests.faults.rows_servers import known_to_run, lost
from tests.faults.rows_verdicts import CONFIRMED, Outage, all_are, own_devices
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World


@row(
    "41-moves",
    "devices are dead while their agents are stopped and drained, the holder of the shard is killed and its successor "
    "told to end, and the node of their agents is lost",
    stake="S6 S1 S3 L2",
    lane="alone",
    deadline_s=400.0,
    variables='lost_after = "8s"',
)
async def outage_while_agents_move(world: World) -> None:
    async with open_devices(6, ports=2) as devices:
        world.probes = CONFIRMED.format(*devices[0].ports)
        world.configure()
        await eligible(world, "-1", is_eligible=False)
        names = await own_devices(world, devices)
        await known_to_run(world)
        dead, alive = names[:2], names[2:]
        world.may_be_offline.update(dead)
        for device in devices[:2]:
            await device.down()
        await all_are(world, dead, "offline")
        other = await world.replicate()
        async with Outage(world, dead).watched():
            await _stopped(world, dead)
            await _drained(world, dead)
            await _held_by_another(world, other)
            await _lost(world, dead)
            await all_are(world, alive, "watched")
        await _published_once(world, dead)
        for device in devices[:2]:
            await device.up()
        await world.settle()
        await world.finish()


def _slugs(names: Collection[str]) -> set[str]:
    return {str(slug_of(DeviceId(name))) for name in names}


def _instances(world: World, names: Collection[str]) -> dict[str, str]:
    """The running agent of each of these devices that has one."""
    slugs = _slugs(names)
    return {one.slug: one.instance for one in world.agents() if one.slug in slugs}


async def _replaced(
    world: World, names: Collection[str], before: dict[str, str], what: str
) -> None:
    """Wait until each device has a new agent that has confirmed the outage itself. Whether it has a new epoch depends
    on Nomad, which moves the agents of a drained node itself if another node has room."""
    if before.keys() != _slugs(names):
        raise BrokenRowError(f"only {before} of {names} had agents")
    shown: dict[str, Any] = {}

    async def confirmed() -> bool:
        now = _instances(world, names)
        for name in names:
            instance = now.get(str(slug_of(DeviceId(name))), "")
            path = f"/v1/devices/{quote(name, safe='')}/explain"
            with suppress(aiohttp.ClientError, TimeoutError):
                _, shown[name] = await world.call("GET", path)
            report = shown[name]["report"] if name in shown else None
            if instance in {"", *before.values()} or not report or report["instance"] != instance:
                return False
            if not (report["state"] == "offline" and report["confirmed"]):
                return False
        return True

    try:
        await until(confirmed, 90.0, f"new agents confirm the outage after {what}")
    except BrokenRowError as error:
        raise BrokenRowError(f"{error}: {shown}") from None


async def _stopped(world: World, names: Collection[str]) -> None:
    """`nomad job stop` of their agents."""
    before, slugs = _instances(world, names), _slugs(names)
    for job in await world.jobs():
        if job["Meta"]["slug"] in slugs and not job["Stop"]:
            path = f"/v1/job/{job['ID'].replace('/', '%2F')}"
            await world.servers.nomad.request("DELETE", path)
    await _replaced(world, names, before, "their jobs were stopped")


async def _drained(world: World, names: Collection[str]) -> None:
    """Drain the first node immediately; the second takes its agents."""
    before = _instances(world, names)
    await eligible(world, "-1", is_eligible=True)
    path = f"/v1/node/{(await nodes(world))['-0']['ID']}/drain"
    await world.servers.nomad.request("POST", path, {"DrainSpec": {"Deadline": -1}})
    try:
        await _replaced(world, names, before, "the drain")

        def moved() -> bool:
            return not audit.processes(world.where.root / "data-0")

        await until(moved, 60.0, "no agent is left on the drained node")
    finally:
        drained = {"DrainSpec": None, "MarkEligible": True}
        await world.servers.nomad.request("POST", path, drained)


async def _held_by_another(world: World, other: Program) -> None:
    """The holder is killed and restarted; then its successor is stopped in order, and the first holds the shard
    again."""
    first = world.program
    for ends, takes in ((first, other), (other, first)):
        if ends is first:
            ends.kill_now()
        else:
            await ends.running.terminate()
        world.speaks_to = takes

        async def taken(by: Program = takes) -> bool:
            return await holder(world, by) == by.api

        await until(taken, 60.0, "the other replica holds the shard")
        await ends.start()
    world.speaks_to = None


async def _lost(world: World, names: Collection[str]) -> None:
    """The host of their agents is lost immediately, and never takes them back."""
    before, nomad = _instances(world, names), world.servers.nomad
    await known_to_run(world)
    if len(audit.processes(world.where.root / "data-1")) != len(world.wanted):
        raise BrokenRowError("not all agents are on the node that is to be lost")
    await nomad.kill(1)
    for one in audit.processes(world.where.root / "data-1"):
        os.kill(one.pid, signal.SIGKILL)
    try:
        await until(lambda: lost(world), 60.0, "the node is lost")
        await _replaced(world, names, before, "the loss of their node")
        await asyncio.sleep(1.0)  # two more reads of the outage
    finally:
        await nomad.restart(1)
    await nomad.wait_ready()
    await _forget_the_dead(world)


async def _forget_the_dead(world: World) -> None:
    """Killed agents leave critical services in the Consul of their host, which are removed after 5 minutes; deregister
    them, because the audit does not wait for that."""
    consul = world.servers.agents[1].http_addr
    left = await audit.get(world.session, f"{consul}/v1/agent/services")
    for service in left.values():
        if service["Service"] == world.where.service:
            url = f"{consul}/v1/agent/service/deregister/{service['ID']}"
            async with world.session.put(url) as answer:
                answer.raise_for_status()


async def _published_once(world: World, names: Collection[str]) -> None:
    """An ongoing outage is one event, whatever happened to agents and replicas."""
    _, page = await world.call("GET", "/v1/events?limit=1000")
    kinds = {
        name: Counter(
            event["kind"]
            for event in page["items"]
            if event["device"] == name and event["kind"].startswith("verdict.")
        )
        for name in names
    }
    for name, some in kinds.items():
        if some["verdict.offline"] != 1 or some["verdict.watched"] != 1:
            world.broken.append(f"L2: the outage of {name} was published as {dict(some)}")

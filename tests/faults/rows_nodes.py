"""Rows 45: a node is lost for good or drained, and its agents move to another one."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from typing import Any
from urllib.parse import quote

from tests.faults.matrix import row
from tests.faults.program import PROBES
from tests.faults.rows_crash import watched
from tests.faults.rows_servers import known_to_run, lost
from tests.faults.rows_verdicts import all_are, events, metric
from tests.faults.site import JOBS, BrokenRowError, until
from tests.faults.world import UP_S, World

MIGRATES = "sticky = true\n      migrate = true"
"""The setting of older templates, which migrated the disks of agents. Agents that were started with it still exist
after an upgrade."""


async def nodes(world: World) -> dict[str, Any]:
    """The Nomad clients, up or not, by the last two characters of their names."""
    found = await world.servers.nomad.request("GET", "/v1/nodes")
    return {node["Name"][-2:]: node for node in found}


async def eligible(world: World, name: str, *, is_eligible: bool) -> None:
    """Set whether Nomad may place anything on a client."""
    node = (await nodes(world))[name]["ID"]
    body = {"Eligibility": "eligible" if is_eligible else "ineligible"}
    await world.servers.nomad.request("POST", f"/v1/node/{node}/eligibility", body)


async def on_the_second(world: World, count: int) -> list[str]:
    """A running program with this many watched devices, whose agents are all on the second Nomad client."""
    await eligible(world, "-0", is_eligible=False)
    try:
        names = await watched(world, count)
        await known_to_run(world)
    finally:
        await eligible(world, "-0", is_eligible=True)
    return names


@row(
    "45-purged-node",
    "a Nomad client loses its data directory and its node is purged, its agents live on, and Nomad never starts "
    "what it has placed instead",
    stake="S1 S3 L1",
    lane="alone",
    deadline_s=300.0,
    agent_settings='start_max = "60s"',
    variables='lost_after = "8s"',
)
async def node_purged(world: World) -> None:
    """Nomad may forget to replace an agent (row 45-forgotten), and is then reminded up to 20 s later. The scheduler must
    not know any of the agents before the first is given up, so `start_max` is longer than that and the 15 s after
    which an agent counts as unknown to it."""
    template = world.root / "migrates.nomad.hcl"
    text = (JOBS / "device-watchdog.nomad.hcl").read_text()
    template.write_text(text.replace("sticky = true", MIGRATES))
    world.probes = f'template = "{template}"\n  {PROBES.format(port=world.device_port)}'
    world.configure()
    nomad = world.servers.nomad
    names = await on_the_second(world, 4)
    before = world.pids()
    old = (await nodes(world))["-1"]["ID"]
    await nomad.kill(1)
    # Delete what it knows of its allocations and of itself; the agents continue with the files that they have.
    await asyncio.to_thread(shutil.rmtree, nomad.data_dir / "data-1" / "client")
    await until(lambda: lost(world), 60.0, "the node is lost")
    await nomad.request("POST", f"/v1/node/{old}/purge")
    await all_are(world, names, "watched", "does not know the agent", timeout_s=UP_S)
    await _are_pending(world, len(names))
    world.undisturbed(before, "L3")
    await events(world, "agent.unlisted", names)
    await metric(world, "nomad_watchdog_unlisted_agents", len(names))
    # S3: Nomad has given up the node. The old agent ends when its next report is refused (HTTP 410).
    world.overlap_s = 15.0
    world.notes.append("an agent of a purged node may overlap its successor until its next report")
    await nomad.restart(1)
    await until(lambda: not before & world.pids(), 120.0, "the old agents have ended")
    await world.settle()
    await _said_why(world, names)


async def _are_pending(world: World, count: int) -> None:
    """Check that the fault has happened: Nomad has placed the agents again, and no client starts them."""
    found = [
        one
        for job in await world.jobs()
        for one in await world.servers.nomad.request(
            "GET", f"/v1/job/{quote(job['ID'], safe='')}/allocations"
        )
        if one["ClientStatus"] == "pending" and not one["TaskStates"]
    ]
    if len(found) != count:
        raise BrokenRowError(f"{len(found)} of {count} agents are pending")


async def _said_why(world: World, names: list[str]) -> None:
    """Each agent that was replaced at the next epoch was replaced for this reason. The first one that is stopped makes
    the client see its allocations, so that others may start at their own epoch before it is their turn."""
    _, page = await world.call("GET", "/v1/events?limit=1000")
    said = {e["device"]: e["text"] for e in page["items"] if e["kind"] == "plan.replace"}
    world.notes.append(f"{len(said)} of {len(names)} agents were given up")
    words = "without progress, longer than 60 s (agents.start_max)"
    if not said or not all(words in text for text in said.values()):
        raise BrokenRowError(f"the reasons of the replacements are {said}")


@row(
    "45-forgotten",
    "a Nomad client is killed, its node is purged, and Nomad loses the evaluation that was to replace its agents, which "
    "live on",
    stake="S1 S3 L1",
    lane="alone",
    variables='lost_after = "15s"',
)
async def replacement_forgotten(world: World) -> None:
    """A loaded Nomad server loses it by itself: if it evaluates the job some milliseconds before `lost_after` is over,
    it changes nothing, and never evaluates the job again once the node is purged."""
    names = await on_the_second(world, 4)
    nomad, before = world.servers.nomad, world.pids()
    old = (await nodes(world))["-1"]["ID"]
    await nomad.kill(1)
    await until(lambda: _are_unknown(world, len(names)), 60.0, "Nomad waits for all agents")
    await _lose_evaluations(world)
    await nomad.request("POST", f"/v1/node/{old}/purge")
    world.undisturbed(before, "L3")
    # S3: Nomad has given up the node. The old agent ends when its next report is refused (HTTP 410).
    world.overlap_s = 15.0
    world.notes.append("an agent of a purged node may overlap its successor until its next report")
    await until(lambda: not before & world.pids(), UP_S, "the old agents have ended")
    await nomad.restart(1)
    await nomad.wait_ready()
    await world.settle()


async def _are_unknown(world: World, count: int) -> bool:
    found = await world.servers.nomad.request("GET", "/v1/allocations")
    return sum(one["ClientStatus"] == "unknown" for one in found) == count


async def _lose_evaluations(world: World) -> None:
    """Delete the evaluations that Nomad has scheduled for the time when `lost_after` of its unknown agents is over."""
    nomad, path = world.servers.nomad, "/v1/operator/scheduler/configuration"
    allocs = await nomad.request("GET", "/v1/allocations")
    jobs = {one["JobID"] for one in allocs if one["ClientStatus"] == "unknown"}
    config = (await nomad.request("GET", path))["SchedulerConfig"]
    # Nomad deletes evaluations only while it handles none.
    await nomad.request("PUT", path, {**config, "PauseEvalBroker": True})
    try:
        # There may be more per job, and some of the jobs of earlier rows.
        found = [
            one
            for one in await nomad.request("GET", "/v1/evaluations?status=pending")
            if one["TriggeredBy"] == "max-disconnect-timeout" and one["JobID"] in jobs
        ]
        if missing := jobs - {one["JobID"] for one in found}:
            raise BrokenRowError(f"Nomad has scheduled no evaluation of {sorted(missing)}")
        await nomad.request("DELETE", "/v1/evaluations", {"EvalIDs": [one["ID"] for one in found]})
    finally:
        await nomad.request("PUT", path, {**config, "PauseEvalBroker": False})


@row(
    "45-drain",
    "a Nomad client is drained while its agents are frozen, so that each takes seconds to end",
    stake="S1 S3 L1",
    lane="alone",
)
async def drained(world: World) -> None:
    await on_the_second(world, 4)
    nomad, before = world.servers.nomad, world.pids()
    for pid in before:
        os.kill(pid, signal.SIGSTOP)
    path = f"/v1/node/{(await nodes(world))['-1']['ID']}/drain"
    await nomad.request("POST", path, {"DrainSpec": {"Deadline": -1}})
    try:
        # less than `kill_timeout`, 5 s: the witness sees every successor that does not wait
        await asyncio.sleep(3.5)
        for pid in before & world.pids():
            os.kill(pid, signal.SIGCONT)
        await until(lambda: not before & world.pids(), 60.0, "the old agents have ended")
        await world.settle()
    finally:
        await nomad.request("POST", path, {"DrainSpec": None, "MarkEligible": True})


@row(
    "45-drain-killed",
    "a Nomad client is drained with its default deadline, and the control plane is killed while agents move",
    stake="S1 S2 S3 L1 L2",
    lane="alone",
)
async def drained_and_killed(world: World) -> None:
    names = await on_the_second(world, 8)
    nomad, before = world.servers.nomad, world.pids()
    drained, other = (await nodes(world))["-1"]["ID"], (await nodes(world))["-0"]["ID"]
    path = f"/v1/node/{drained}/drain"
    await nomad.request("POST", path, {"DrainSpec": {"Deadline": 3600 * 10**9}})
    try:
        await until(lambda: bool(before - world.pids()), 60.0, "an agent has left")
        world.program.kill_now()
        await world.program.killed()
        left = len(before & world.pids())
        await world.program.start()
        await until(lambda: not before & world.pids(), 120.0, "the node is empty")
        await world.settle()
        await _all_moved_gracefully(world, drained, other, names)
        world.notes.append(f"{left} of {len(before)} agents were on the node when it was killed")
        if not left:
            raise BrokenRowError("the control plane was killed too late")
    finally:
        await nomad.request("POST", path, {"DrainSpec": None, "MarkEligible": True})


async def _all_moved_gracefully(world: World, drained: str, other: str, names: list[str]) -> None:
    """Check that Nomad stopped no agent by itself, that each shut down after its signal, and that all run on the other
    client."""
    ours = {job["ID"] for job in await world.jobs()}

    async def there(node: str) -> list[Any]:
        path = f"/v1/node/{node}/allocations"
        found = await world.servers.nomad.request("GET", path)
        return [one for one in found if one["JobID"] in ours]

    async def all_there() -> bool:
        running = [one for one in await there(other) if one["ClientStatus"] == "running"]
        return len(running) == len(names)

    left = await there(drained)
    if any((one.get("DesiredTransition") or {}).get("Migrate") for one in left):
        raise BrokenRowError("Nomad has moved agents by itself")
    ends = [
        event["Details"].get("exit_code")
        for one in left
        for event in one["TaskStates"]["agent"]["Events"]
        if event["Type"] == "Terminated"
    ]
    if not set(ends) <= {"0", "130", "143"}:  # it retired, or shut down after SIGINT or SIGTERM
        raise BrokenRowError(f"the agents ended with exit codes {ends}")
    await until(all_there, 10.0, "all agents run on the other client")

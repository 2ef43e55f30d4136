"""Rows 47: roll-outs in steps, with a leader that is killed, and with a scheduler that refuses requests."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp

from tests.faults.matrix import row
from tests.faults.proxy import instead
from tests.faults.rows_crash import watched
from tests.faults.rows_replicas import pair
from tests.faults.site import BrokenRowError, until
from tests.faults.world import UP_S, World

STEPS = """\
rollout {
  at_once = 2
  step { count = 2 }
  step { pause = true }
  abort_min = 100
  abort_share = 1.0
}
"""


async def versions(world: World) -> Counter[str]:
    """The versions of the agents that watch their devices."""
    status, page = 0, {}
    with suppress(aiohttp.ClientError, TimeoutError):  # a replica that was killed
        status, page = await world.call("GET", "/v1/devices?limit=1000")
    found = page["items"] if status == 200 else ()  # or that has just started
    return Counter(one["version"] for one in found if one["verdict"] == "watched")


async def rollout(world: World) -> Any:
    _, found = await world.call("GET", "/v1/rollouts/default")
    return found


async def request(world: World, what: str) -> None:
    status, said = await world.call("POST", f"/v1/rollouts/default/{what}", {"by": "row"})
    if status != 200:
        raise BrokenRowError(f"{what} is answered with {status}: {said}")


async def proved(world: World) -> None:
    """Wait until the version that runs is proven: only then is the next one rolled out in steps."""

    async def is_proven() -> bool:
        return bool((await rollout(world))["proven"] == world.version)

    await until(is_proven, UP_S, "the first version is proven")


def roll_out(world: World, version: str) -> None:
    """Have all replicas reload a configuration with this version."""
    world.version = version
    world.configure()
    for program in (world.program, *world.others):
        program.running.send(signal.SIGHUP)


async def tried_two(world: World, version: str, count: int) -> None:
    """Wait until the first step has passed, and check that no other device has the version."""

    async def is_paused() -> bool:
        found = await rollout(world)
        return bool(found["state"] == "paused" and found["version"] == version)

    await until(is_paused, UP_S, "the roll-out waits after two devices")
    await until(lambda: _has(world, {version: 2, "1": count - 2}), UP_S, "two devices have it")


async def _has(world: World, wanted: dict[str, int]) -> bool:
    return await versions(world) == wanted


@row("47-leader", "a class is rolled out in steps; the leader of two is killed (-9) in its first step, and in its last",
     stake="S1 L1 L2", more=STEPS)  # fmt: skip
async def leader_killed(world: World) -> None:
    names, other = await pair(world, 6)
    await proved(world)
    roll_out(world, "2")
    await until(lambda: _one_has(world, "2"), UP_S, "a device has the new version")
    world.program.kill_now()
    world.speaks_to = other
    await tried_two(world, "2", len(names))
    await world.program.start()
    await request(world, "promote")
    await until(lambda: _one_has(world, "2", more_than=2), UP_S, "the last step has begun")
    other.kill_now()
    world.speaks_to = None
    await until(lambda: _has(world, {"2": len(names)}), UP_S, "all devices have the new version")
    await other.start()
    await world.settle()
    kinds = Counter(one["kind"] for one in await _events(world))
    if kinds["rollout.rolled_back"] or not kinds["rollout.done"]:
        raise BrokenRowError(f"the events are {kinds}")


async def _one_has(world: World, version: str, more_than: int = 0) -> bool:
    return (await versions(world))[version] > more_than


async def _events(world: World) -> list[Any]:
    _, page = await world.call("GET", "/v1/events?kind=rollout&limit=1000")
    return list(page["items"])


@row("47-abort", "a roll-out is aborted while Nomad refuses every change and agents of the new version die",
     stake="S1 L1 L4", more=STEPS)  # fmt: skip
async def aborted(world: World) -> None:
    names = await watched(world, 6)
    await proved(world)
    before = world.pids()
    roll_out(world, "2")
    await tried_two(world, "2", len(names))
    tried = world.pids() - before
    await request(world, "promote")
    await until(lambda: _one_has(world, "2", more_than=2), UP_S, "the last step has begun")
    world.nomad.when("PUT", r"^/v1/job", instead(503, b"{}"))
    world.nomad.when("POST", r"^/v1/job", instead(503, b"{}"))
    world.nomad.when("DELETE", r"^/v1/job", instead(503, b"{}"))
    await request(world, "abort")
    started = await _started_with(world, (await rollout(world))["spec"])
    for pid in tried:
        os.kill(pid, signal.SIGKILL)
    world.program.kill_now()
    await world.program.start(wait=False)
    world.nomad.clear()
    await until(lambda: _has(world, {"1": len(names)}), UP_S, "all devices are back")
    if more := await _started_with(world, (await rollout(world))["spec"]) - started:
        world.broken.append(f"L1: {more} agents were started with a version that was given up")
    await world.settle()


async def _started_with(world: World, spec: str) -> int:
    """Number of jobs, also dead ones, that were dispatched with a spec."""
    found = await world.servers.nomad.request("GET", "/v1/jobs?meta=true&prefix=")
    return sum((one.get("Meta") or {}).get("spec_hash") == spec for one in found)

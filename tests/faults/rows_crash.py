"""Rows 1 to 5: the control plane's process dies or freezes at each step, answers get lost, requests arrive twice."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e import audit
from tests.faults import proxy
from tests.faults.matrix import row
from tests.faults.site import until
from tests.faults.world import UP_S, World

DISPATCH = r"/dispatch\?|/dispatch$"
TXN = r"^/v1/txn"
STEPS = {
    "K1": "when a wish was read",
    "K2": "when a wish was stored",
    "K3": "when a wish was acknowledged",
    "K4": "when actions were decided",
    "K5": "when epochs were committed",
    "K6": "when a start was about to be asked for",
    "K7": "when a start was answered",
    "K8": "when a start was remembered",
    "K9": "when a verdict was published",
    "K10": "when an older agent was told to stop",
}


async def watched(world: World, count: int) -> list[str]:
    """A running program with this many watched devices."""
    await world.program.start()
    names = world.names(count)
    await world.wishes(*names)
    await world.settle()
    return names


async def die_at(world: World, point: str) -> None:
    """Start, die at the point during arrivals, departures and a roll-out, and start again."""
    old = await watched(world, 4)
    survivors = world.pids()
    await world.program.running.terminate()
    if point == "K10":  # the only step taken just by a replacement or a departure
        world.version = "2"
        world.configure()
    await world.program.start(f"{point}:kill")
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(4, "new")))
        group.create_task(world.wish(old[0], present=False))
        await world.program.killed()
        await world.acknowledged_is_stored()
        if point != "K10":
            world.undisturbed(survivors, "L3", leaving=1)
        await world.program.start()
    await world.settle()


def _add(point: str, words: str) -> None:
    @row(f"1-{point}", f"kill -9 of the control plane {words}", stake="S2 S4 L2 L3")
    async def play(world: World) -> None:
        await die_at(world, point)


for _point, _words in STEPS.items():
    _add(_point, _words)


@row("1-twice", "kill -9 in the middle of arrivals, three times in a row", stake="S2 L2")
async def thrice(world: World) -> None:
    over = asyncio.Event()

    async def arrivals() -> None:
        for name in world.names(40):
            await world.wish(name)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.5)
            if over.is_set():
                return

    await world.program.start("K7:kill@3")
    async with asyncio.TaskGroup() as group:
        group.create_task(arrivals())
        for following in ("K7:kill@2", "K5:kill", ""):
            await world.program.killed()
            await world.program.start(following)
        over.set()
    await world.settle()


@row("1-sent", "kill -9 while Nomad has the start and before it does it", stake="S2 S3 L2")
async def killed_on_the_way(world: World) -> None:
    await world.program.start()
    rule = world.nomad.when("POST", DISPATCH, proxy.lost_request(world.program.kill_now), times=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(4)))
        await world.program.killed()
        await world.program.start()
    await world.settle()
    await _must_have_hit(rule)


@row("2-killed", "Nomad's answer to a start is lost, and we with it", stake="S1 S3 L2")
async def killed_after_commit(world: World) -> None:
    await world.program.start()
    rule = world.nomad.when("POST", DISPATCH, proxy.lost_answer(world.program.kill_now), times=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(4)))
        await world.program.killed()
        await world.program.start()
    await world.settle()
    await _must_have_hit(rule)


@row("2-start", "Nomad's answers to five starts are lost", stake="S1 S2 S3")
async def lost_starts(world: World) -> None:
    await world.program.start()
    rule = world.nomad.when("POST", DISPATCH, proxy.lost_answer(), times=5)
    await world.wishes(*world.names(6))
    await world.settle()
    await _must_have_hit(rule, 5)


@row("2-stop", "Nomad's answers to stops are lost", stake="S1 L1")
async def lost_stops(world: World) -> None:
    names = await watched(world, 4)
    rule = world.nomad.when("DELETE", "/v1/job/", proxy.lost_answer(), times=3)
    _freeze(world, names[:2])
    await world.wishes(*names[:2], present=False)
    await _must_have_hit(rule)
    await world.settle()


@row("2-commit", "Consul's answers to six transactions are lost", stake="S2 S4 S5")
async def lost_commits(world: World) -> None:
    await world.program.start()
    rule = world.consul.when("PUT", TXN, proxy.lost_answer(), times=6)
    names = world.names(6)
    await world.wishes(*names)
    await world.wish(names[0], present=False)
    await world.settle()
    await _must_have_hit(rule, 6)


async def _allow_raced_starts(world: World) -> None:
    """A Nomad that does not check tokens of concurrent requests starts each of them; all but the oldest run until their
    stop arrives (docs/limits.md)."""
    if not await audit.protected(world.session, world.where):
        world.overlap_s = 15.0


@row("3-start", "every start arrives twice", stake="S1 S5")
async def starts_twice(world: World) -> None:
    await _allow_raced_starts(world)
    rule = world.nomad.when("POST", DISPATCH, proxy.repeated(2))
    await watched(world, 6)
    await _must_have_hit(rule, 6)


@row("3-commit", "every transaction arrives twice, and the second one is answered", stake="S2 S5")
async def commits_twice(world: World) -> None:
    rule = world.consul.when("PUT", TXN, proxy.repeated(2, tell=1))
    names = await watched(world, 4)
    await world.wish(names[0], present=False)
    await world.settle()
    await _must_have_hit(rule, 6)


@row("3-stop", "every stop arrives twice", stake="S5")
async def stops_twice(world: World) -> None:
    names = await watched(world, 4)
    rule = world.nomad.when("DELETE", "/v1/job/", proxy.repeated(2))
    _freeze(world, names[:3])
    await world.wishes(*names[:3], present=False)
    await _must_have_hit(rule, 3)
    await world.settle()


@row(
    "4-race", "each start arrives 16 times at once, and any of the answers is given", stake="S1 S2"
)
async def raced(world: World) -> None:
    await _allow_raced_starts(world)
    rule = world.nomad.when("POST", DISPATCH, proxy.repeated(16, tell=7))
    await watched(world, 4)
    await _must_have_hit(rule, 4)


@row("4-phantom", "a start is answered with a job that does not exist", stake="S1 L1")
async def phantom(world: World) -> None:
    await world.program.start()
    answer = b'{"DispatchedJobID": "phantom/dispatch-x-1-00000000", "Index": 1, "EvalID": ""}'
    rule = world.nomad.when("POST", DISPATCH, proxy.instead(200, answer), times=3)
    await world.wishes(*world.names(4))
    await world.settle()
    await _must_have_hit(rule, 3)


@row("5-frozen", "the control plane is frozen for 20 s (SIGSTOP), and goes on", stake="S1 S6 L3")
async def frozen(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    world.program.running.send(signal.SIGSTOP)
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(3, "new")))
        group.create_task(world.wish(names[0], present=False))
        await asyncio.sleep(20.0)
        world.undisturbed(before, "L3", leaving=1)
        world.program.running.send(signal.SIGCONT)
    await world.settle()


def _freeze(world: World, names: list[str]) -> None:
    """Make sure that only the scheduler ends the agents of these devices. A running agent would end by itself as soon
    as a report is refused, and if that is before its stop, there would be no stop."""
    slugs = {str(slug_of(DeviceId(name))) for name in names}
    for one in world.agents():
        if one.slug in slugs:
            os.kill(one.pid, signal.SIGSTOP)


async def _must_have_hit(rule: proxy.Rule, least: int = 1) -> None:
    """A fault that never happened proves nothing."""
    await until(lambda: rule.hits >= least, UP_S, f"the fault happens {least} times")


__all__ = ["until", "watched"]

"""Rows 18 to 22: streams with gaps, incorrect lists, slow answers, storms of refusals."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from tests.faults import proxy
from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError
from tests.faults.world import World

JOBS = r"^/v1/jobs\?|^/v1/jobs$"
ALLOCATIONS = r"^/v1/allocations"
STREAM = r"^/v1/event/stream"
ANY = r"^/v1/"


async def stop_by_hand(world: World, count: int) -> None:
    """Stop agents without the control plane, as Nomad's own command would."""
    jobs = [job for job in await world.jobs() if not job["Stop"]][:count]
    for job in jobs:
        path = f"/v1/job/{job['ID'].replace('/', '%2F')}"
        await world.servers.nomad.request("DELETE", path)


@row(
    "18-gaps", "two of three lines of Nomad's event stream are missing", stake="L1 S8", resync="10s"
)
async def gaps(world: World) -> None:
    world.nomad.when("GET", STREAM, proxy.lines(lambda n, line: [line] if n % 3 == 0 else []))
    names = await watched(world, 6)
    await stop_by_hand(world, 2)
    await world.wishes(*names[:2], present=False)
    await world.settle()


@row(
    "18-twice",
    "every line of the event stream comes twice, and in the wrong order",
    stake="L1 S5",
)
async def doubled_lines(world: World) -> None:
    kept: list[bytes] = []

    def edit(_number: int, line: bytes) -> list[bytes]:
        kept.append(line)
        return [line, *kept[-3:][::-1]]

    world.nomad.when("GET", STREAM, proxy.lines(edit))
    names = await watched(world, 6)
    await stop_by_hand(world, 2)
    await world.wishes(*names[:2], present=False)
    await world.settle()


@row(
    "18-garbage", "the event stream breaks off again and again, in the middle of a line", stake="L1"
)
async def broken_lines(world: World) -> None:
    def edit(number: int, line: bytes) -> list[bytes]:
        return [line[: len(line) // 2]] if number % 4 == 3 else [line]

    world.nomad.when("GET", STREAM, proxy.lines(edit))
    names = await watched(world, 6)
    await stop_by_hand(world, 2)
    await world.wishes(*names[:2], present=False)
    await world.settle()


@row(
    "19-silent",
    "the event stream is open and says nothing, and a full look is due in 10 min only",
    stake="L1",
    resync="10m",
)
async def silent_stream(world: World) -> None:
    await watched(world, 4)
    released = asyncio.Event()
    rule = world.nomad.when("GET", STREAM, proxy.silent(released))
    await world.program.running.terminate()
    await world.program.start()
    await asyncio.wait_for(rule.hit.wait(), 30.0)
    await stop_by_hand(world, 1)
    try:
        took_s = await world.settle_from_outside()
    finally:
        released.set()
    world.notes.append(f"what the silent stream had hidden was mended after {took_s:.0f} s")


def _empty(_: Any) -> list[Any]:
    return []


async def _lie(world: World, *rules: proxy.Rule, seconds: float = 12.0) -> None:
    """Keep the rules active for a while; no agent may be stopped or started because of them."""
    before = world.pids()
    jobs = {job["ID"] for job in await world.jobs()}
    await asyncio.sleep(seconds)
    for rule in rules:
        if not rule.hits:
            raise BrokenRowError("the lie was never told")
        rule.off()
    world.undisturbed(before)
    more = {job["ID"] for job in await world.jobs()} - jobs
    if more:
        world.broken.append(f"S3: {len(more)} agents were started on the word of a lying list")
    await world.settle()
    world.undisturbed(before)


@row("20-no-jobs", "Nomad's list of jobs is empty for 12 s (200, `[]`)", stake="S7 S3")
async def no_jobs(world: World) -> None:
    await watched(world, 8)
    await _lie(world, world.nomad.when("GET", JOBS, proxy.edited(_empty)))


@row("20-half", "half of Nomad's jobs are missing from its list for 12 s", stake="S7 S3")
async def half_the_jobs(world: World) -> None:
    await watched(world, 8)

    def half(rows: list[Any]) -> list[Any]:
        return rows[: len(rows) // 2]

    await _lie(world, world.nomad.when("GET", JOBS, proxy.edited(half)))


@row("20-no-allocations", "Nomad's list of allocations is empty for 12 s", stake="S7 S3")
async def no_allocations(world: World) -> None:
    await watched(world, 8)
    await _lie(world, world.nomad.when("GET", ALLOCATIONS, proxy.edited(_empty)))


@row("20-nothing", "Nomad's lists are all empty in one look", stake="S7 S3")
async def nothing_once(world: World) -> None:
    await watched(world, 8)
    rules = [
        world.nomad.when("GET", JOBS, proxy.edited(_empty), times=1),
        world.nomad.when("GET", ALLOCATIONS, proxy.edited(_empty), times=1),
    ]
    await _lie(world, *rules)


@row("20-cut", "every list of Nomad and Consul breaks off in the middle for 12 s", stake="S7")
async def cut_lists(world: World) -> None:
    await watched(world, 8)
    await _lie(
        world,
        world.nomad.when("GET", JOBS, proxy.cut(), times=3),  # then allocations are requested too
        world.nomad.when("GET", ALLOCATIONS, proxy.cut()),
        world.consul.when("GET", r"^/v1/kv/", proxy.cut()),
        seconds=40.0,
    )


@row("20-no-records", "Consul's list of our keys is empty for 12 s (200, `[]`)", stake="S7 S4")
async def no_records(world: World) -> None:
    await watched(world, 8)
    before = world.pids()
    rule = world.consul.when("GET", r"^/v1/kv/.*recurse", proxy.edited(_empty))
    await world.program.running.terminate()
    await world.program.start(wait=False)
    await asyncio.wait_for(rule.hit.wait(), 30.0)
    await asyncio.sleep(12.0)
    rule.off()
    world.undisturbed(before)
    await world.settle()
    world.undisturbed(before)


@row(
    "20-no-health",
    "Consul says that no agent is registered (200, `[]`)",
    stake="S6 S7",
)
async def no_health(world: World) -> None:
    await watched(world, 8)
    await _lie(
        world,
        world.consul.when("GET", r"^/v1/health/", proxy.edited(_empty)),
        seconds=40.0,
    )


@row("21-slow", "Nomad answers each call 6 s late", stake="S9 L4")
async def slow(world: World) -> None:
    names = await watched(world, 4)
    world.nomad.when("*", r"^/v1/(?!event)", proxy.late(6.0))
    await world.wishes(*world.names(4, "new"))
    await world.wish(names[0], present=False)
    await asyncio.sleep(20.0)
    world.nomad.clear()
    await world.settle()


@row("21-never", "Nomad takes calls and answers none for 30 s", stake="S9 L1")
async def never(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    world.nomad.when("*", r"^/v1/(?!event)", proxy.late(600.0))
    await world.wishes(*world.names(4, "new"))
    await world.wish(names[0], present=False)
    await asyncio.sleep(30.0)
    world.undisturbed(before, "L3", leaving=1)
    world.nomad.clear()
    await world.settle()


def _storm(name: str, status: int, words: str, most: float, **headers: str) -> None:
    """`most`: maximum calls per second for each of the seven devices that need an action. It follows from their
    back-off (0.5 to 5 s here), the pause of `core/circuit_breaker.py` and the server's Retry-After."""

    @row(
        f"22-{name}",
        f"Nomad answers everything with {words} for 15 s",
        stake="S9",
    )
    async def play(world: World) -> None:
        names = await watched(world, 4)
        before = world.pids()
        fault = proxy.instead(status, b"too much of it", **headers)
        world.nomad.when("*", ANY, fault)
        asked, began = world.nomad.requests, time.monotonic()
        await world.wishes(*world.names(6, "new"))
        await world.wish(names[0], present=False)
        await asyncio.sleep(15.0)
        asked, lasted_s = world.nomad.requests - asked, time.monotonic() - began
        world.nomad.clear()
        world.undisturbed(before, "S7", leaving=1)
        rate = asked / lasted_s / 7
        world.notes.append(f"{rate:.1f} calls a second and device were made into the storm")
        if rate > most:
            world.broken.append(f"S9: {rate:.1f} calls a second and device into the storm")
        await world.settle()


_storm("500", 500, "500", 1.5)
_storm("429", 429, "429 and Retry-After: 3", 1.0, Retry_After="3")
_storm("503", 503, "503 without a word about when", 1.5)


@row("22-consul", "Consul answers everything with 500 for 15 s", stake="S4 S9 L3")
async def consul_storm(world: World) -> None:
    names = await watched(world, 4)
    before = world.pids()
    world.consul.when("*", ANY, proxy.instead(500, b"No cluster leader"))
    async with asyncio.TaskGroup() as group:
        group.create_task(world.wishes(*world.names(3, "new")))
        group.create_task(world.wish(names[0], present=False))
        await asyncio.sleep(15.0)
        world.undisturbed(before, "L3")
        world.consul.clear()
    await world.settle()

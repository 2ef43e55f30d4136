"""Ten thousand devices arrive and vanish at once: this project ("ours") compared with the maximum rate of the server.

The ideal is a bare loop on the same server with the same calls and the same concurrency: as many dispatches before
ours as after, each with its own parent, so that both see on average the same number of jobs and of children per
parent; then as many deregistrations. During the storm, single devices register from time to time: how much longer
does their dispatch take than in a quiet fleet?

Nomad's schedulers are off, as in `dispatch.py`: only the control plane is measured. When all devices vanish, the
mass-change breaker holds the stops until its second read agrees (S7): that wait is part of the figure.
"""

from __future__ import annotations

import asyncio
import time

from bench.plane import Plane, bare_client, bare_loop, nomad_server, plane, settings
from bench.rows import Row, percentile
from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import PlacementState, Presence

QUIET = 60
EVERY_S = 0.25


async def _one(ours: Plane, name: str) -> float:
    """Seconds from a device's durable registration to the answer of its dispatch."""
    await ours.register([name])
    said = time.perf_counter()
    slug = slug_of(DeviceId(name))
    async with asyncio.timeout(120.0):
        while slug not in ours.started:
            await asyncio.sleep(0.001)
    return max(0.0, ours.started[slug] - said)


async def _singles(ours: Plane, found: list[float]) -> None:
    number = 0
    async with asyncio.TaskGroup() as group:
        while True:
            number += 1
            name = f"single {number}"

            async def one(name: str = name) -> None:
                found.append(await _one(ours, name))

            group.create_task(one())
            await asyncio.sleep(EVERY_S)


async def _gone(ours: Plane) -> None:
    """Wait until all placements of the fleet are dead or stopping."""
    over = {PlacementState.DEAD, PlacementState.STOPPING}
    async with asyncio.timeout(600.0):
        while True:
            placed = ours.fleet.placements.values()
            if sum(p.state not in over for found in placed for p in found) == 0:
                return
            await asyncio.sleep(0.1)


async def measure(count: int) -> list[Row]:
    async with nomad_server(schedulers=False) as (server, root):
        chosen, _ = settings(server, root / "ours", "ours")
        at_once = chosen.limits().concurrency
        names = [f"device-{n}" for n in range(count)]
        async with bare_client(server, "before", "after") as client:
            bare_s = await bare_loop(client, "before", count, at_once)
            async with plane(chosen) as ours, ours.running():
                await ours.fleet.readiness.event.wait()
                quiet = [await _one(ours, f"quiet {n}") for n in range(QUIET)]
                mid: list[float] = []
                storm = asyncio.ensure_future(_singles(ours, mid))
                had = len(ours.started)
                began = time.perf_counter()
                await ours.register(names)
                slugs = {slug_of(DeviceId(name)) for name in names}
                async with asyncio.timeout(600.0):
                    while not slugs <= ours.started.keys():
                        await asyncio.sleep(0.02)
                ours_s = time.perf_counter() - began
                storm.cancel()
                await asyncio.gather(storm, return_exceptions=True)
                dispatched = len(ours.started) - had
                bare_s += await bare_loop(client, "after", count, at_once)

                began = time.perf_counter()
                for first in range(0, count, 1000):
                    await ours.fleet.records.deregister(
                        [DeviceId(n) for n in names[first : first + 1000]]
                    )
                await ours.fleet.records.deregister(
                    [
                        r.device.id
                        for r in ours.fleet.records.values()
                        if r.presence is Presence.PRESENT
                    ]
                )
                await _gone(ours)
                vanish_s = time.perf_counter() - began
            stop_s = await _stop_all(client, count, at_once)
    ideal_s = bare_s / 2 / count * dispatched
    return [
        Row(
            f"storm, {count:,} devices arrive at once, drain ÷ ideal",
            ours_s / ideal_s,
            "×",
            floor="≤ 1.3",
            aim="≤ 1.05",
            note=f"{dispatched} dispatches in {ours_s:.1f} s, {ideal_s:.1f} s by a bare loop",
        ),
        Row(
            "storm, single device mid-storm p99 ÷ in a quiet fleet p99",
            percentile(mid, 0.99) / percentile(quiet, 0.99),
            "×",
            floor="≤ 20",
            aim="≤ 3",
            note=f"{percentile(mid, 0.99) * 1000:.0f} ms of {len(mid)} against "
            f"{percentile(quiet, 0.99) * 1000:.0f} ms of {len(quiet)}",
        ),
        Row(
            f"storm, {count:,} devices vanish at once, drain ÷ ideal",
            vanish_s / stop_s,
            "×",
            note=f"{vanish_s:.1f} s with the breaker's second read; {stop_s:.1f} s by a bare loop",
        ),
    ]


async def _stop_all(client: NomadClient, count: int, at_once: int) -> float:
    found = await client.pages("/v1/jobs", "list-jobs", {"prefix": "before/dispatch-"})
    jobs = iter([job["ID"] for job in found.body][:count])

    async def worker() -> None:
        for job in jobs:
            await client.deregister(job)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return time.perf_counter() - began


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(600 if quick else 10_000))

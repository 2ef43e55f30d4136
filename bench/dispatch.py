"""Cold start of a fleet by this project ("ours") compared with a bare loop of dispatches on the same server.

The bare loop runs before and after ours, each time with the same number of devices and its own parent job. Nomad
slows down with the number of objects it stores, so ours in the middle sees the average conditions of the two. The
bare dispatches have the same content as ours: meta, payload, token, ID prefix.

Nomad's schedulers are off: placing the first loop's children would take many times as long as dispatching them, and
would still be in progress when ours begins. Five rounds, each on its own Nomad; the median counts, because the
speed of a shared machine changes within a round.
"""

from __future__ import annotations

import asyncio
import time

from bench.plane import bare_client, bare_loop, nomad_server, plane, settings
from bench.rows import Row

ROUNDS = 5


async def measure(count: int) -> tuple[float, float, float, int]:
    """Ratio, our dispatches per second, those of the bare loop, and the number in progress at a time."""
    async with nomad_server(schedulers=False) as (server, root):
        chosen, _ = settings(server, root / "ours", "ours")
        at_once = chosen.limits().concurrency
        async with bare_client(server, "before", "after") as client:
            bare_s = await bare_loop(client, "before", count, at_once)
            async with plane(chosen) as ours:
                await ours.register([f"device-{n}" for n in range(count)])
                began = time.perf_counter()
                async with ours.running():
                    await ours.until_started(count, 300.0)
                    ours_s = time.perf_counter() - began
            bare_s += await bare_loop(client, "after", count, at_once)
    return bare_s / 2 / ours_s, count / ours_s, 2 * count / bare_s, at_once


def run(*, quick: bool = False) -> list[Row]:
    count = 300 if quick else 5000
    rounds = sorted(asyncio.run(measure(count)) for _ in range(ROUNDS))
    ratio, ours, bare, at_once = rounds[ROUNDS // 2]
    return [
        Row(
            f"dispatch efficiency, {count:,} devices cold ÷ bare loop",
            ratio,
            "",
            floor="≥ 0.80",
            aim="≥ 0.95",
            note=f"{ours:.0f}/s against {bare:.0f}/s, {at_once} at once; "
            f"{ROUNDS} rounds from {rounds[0][0]:.2f} to {rounds[-1][0]:.2f}",
        )
    ]

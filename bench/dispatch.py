"""Cold start of a fleet against a bare loop of dispatches on the same server.

The bare loop runs before and after ours, with as many devices each time, each with a parent job of its own:
Nomad slows down with the children of a parent and with all that it has to keep, so ours in the middle sees
what the two see on average. Its dispatches say the same as ours: meta, payload, token, id prefix.
"""

from __future__ import annotations

import asyncio
import time

from bench.plane import bare_client, bare_loop, nomad_server, plane, settings
from bench.rows import Row


async def measure(count: int) -> list[Row]:
    async with nomad_server() as (server, root):
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
    return [
        Row(
            f"dispatch efficiency, {count:,} devices cold ÷ bare loop",
            bare_s / 2 / ours_s,
            "",
            floor="≥ 0.80",
            aim="≥ 0.95",
            note=f"{count / ours_s:.0f}/s against {2 * count / bare_s:.0f}/s, {at_once} at once",
        )
    ]


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(300 if quick else 5000))

"""Cold start of a fleet against a bare loop of dispatches on the same server.

The bare loop runs before and after ours, with as many devices each time, each with a parent job of its own:
Nomad slows down with all that it has to keep, so ours in the middle sees what the two see on average. Its
dispatches say the same as ours: meta, payload, token, id prefix.

Nomad's schedulers are off: placing the first loop's children costs it many times their dispatch, and would
still be under way when ours begins. Five rounds, each on a Nomad of its own; the middle one counts, as the
speed of a shared machine changes within one.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from statistics import median_low

from bench.plane import bare_client, bare_loop, nomad_server, plane, settings
from bench.rows import Row

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Round:
    """Dispatches a second."""

    bare: float
    ours: float
    at_once: int

    @property
    def ratio(self) -> float:
        return self.ours / self.bare


async def measure(count: int) -> Round:
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
    return Round(2 * count / bare_s, count / ours_s, at_once)


def run(*, quick: bool = False) -> list[Row]:
    count = 300 if quick else 5000
    rounds = {one.ratio: one for one in (asyncio.run(measure(count)) for _ in range(ROUNDS))}
    middle = rounds[median_low(rounds)]
    return [
        Row(
            f"dispatch efficiency, {count:,} devices cold ÷ bare loop",
            middle.ratio,
            "",
            floor="≥ 0.80",
            aim="≥ 0.95",
            note=f"{middle.ours:.0f}/s against {middle.bare:.0f}/s, {middle.at_once} at once; "
            f"{ROUNDS} rounds from {min(rounds):.2f} to {max(rounds):.2f}",
        )
    ]

"""A cold start against the server's own rate: how much of a bare dispatch loop is left.

Ours: a reconciler that starts on a registry of 5,000 devices (SQLite) and a Nomad without an agent of
them, from `run()` to Nomad's answer to the 5,000th dispatch: template checked, parent registered, both
sides read, each epoch committed before its start (S2), snapshots on the way. Bare: as many dispatches of
the same content (token and id prefix too) by aiohttp with as many calls at once, and nothing else.

Both sides are in this process, on one server. It slows down with each agent it has, so the bare loop runs
in two halves, one before ours and one after; a drift that is linear falls on both sides alike.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from bench import rig
from bench.rows import Row
from nomad_watchdog.dev.nomad import NomadServer
from nomad_watchdog.model import Action, ActionKind, Limits

COUNT = 5000
AT_ONCE = Limits().concurrency
_MOST_S = 600.0


async def _ours(nomad: NomadServer, folder: Path, count: int) -> float:
    """Seconds from `run()` to the answer to the last dispatch."""
    path = folder / "registry.db"
    await rig.enrol(path, [f"device-{n:05}" for n in range(count)])
    async with rig.plane(nomad, path, "ours") as plane:
        performer = plane.reconciler.performer
        tell, started, last = performer.done, 0, 0.0
        all_started = asyncio.Event()

        def done(action: Action, outcome: str, took_s: float) -> None:
            nonlocal started, last
            tell(action, outcome, took_s)
            if action.kind is ActionKind.START and outcome == "ok":
                started += 1
                if started == count:
                    last = time.perf_counter()
                    all_started.set()

        performer.done = done
        rig.tidy()
        began = time.perf_counter()
        async with plane.running():
            await asyncio.wait_for(all_started.wait(), _MOST_S)
            await rig.until_running(nomad, "ours", count)
    return last - began


async def _bare(bare: rig.Bare, names: range) -> float:
    contents = [rig.body(f"device-{n:05}") for n in names]
    rig.tidy()
    return (await bare.many(contents, AT_ONCE))[-1]


async def _measure(count: int) -> list[Row]:
    half = count // 2
    async with rig.server() as (nomad, folder):
        bare = rig.Bare(nomad, "bare")
        try:
            await bare.prepare()
            first = await _bare(bare, range(half))
            await rig.until_running(nomad, "bare", half)
            rig.say(f"bare, first half: {half / first:.0f}/s")
            ours = await _ours(nomad, folder, count)
            rig.say(f"ours: {count / ours:.0f}/s")
            second = await _bare(bare, range(half, count))
            await rig.until_running(nomad, "bare", count)
            rig.say(f"bare, second half: {(count - half) / second:.0f}/s")
        finally:
            await bare.close()
    raw = first + second
    return [
        Row(
            f"dispatch efficiency: cold start of {count:,} devices ÷ bare dispatch loop",
            raw / ours,
            "",
            floor="≥ 0.80",
            aim="≥ 0.95",
            note=f"{count / ours:.0f}/s against {count / raw:.0f}/s "
            f"(aiohttp, {AT_ONCE} at once; {half / first:.0f}/s before ours, "
            f"{(count - half) / second:.0f}/s after)",
        )
    ]


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(_measure(200 if quick else COUNT))

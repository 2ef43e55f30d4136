"""Whether the size of a fleet affects one dispatch: the rate at 20,000 agents against the rate at 1,000, alternating
between two Nomads, because the speed of a shared machine changes from one second to the next.

Nomad walks all children of a parent for each idempotency token: with one parent the rate falls with the
fleet's size. Shards give each slice its own parent. Nomad's schedulers are off, so that only the
intake is measured: nothing is placed, and no evaluation competes with it.

Both rates are for the same number of dispatches by our backend's `ensure`; the fleets are made by bare
dispatches of the same form, which have the same cost for Nomad and a lower one for the benchmark.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path

from bench.plane import bare_body, bare_client, nomad_server, settings
from bench.rows import Row
from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.ids import shard_of
from nomad_watchdog.model import AgentSpec, Epoch
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.testing.rig import record_of
from servers.nomad import NomadServer

SHARDS = 64
AT_ONCE = 16
SAMPLE = 150
TURNS = 6


async def _in_turn(count: int, call: Callable[[int], Awaitable[object]]) -> float:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await call(number)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def _grow(client: NomadClient, prefix: str, shards: int, count: int) -> None:
    async def one(number: int) -> None:
        record = record_of(f"grown {number}")
        parent = prefix if shards == 1 else f"{prefix}-s{shard_of(record.slug, shards)}"
        await client.dispatch(parent, bare_body(record.slug))

    await _in_turn(count, one)


async def _take(scheduler: Scheduler, spec: AgentSpec, word: str) -> float:
    """Seconds for one sample."""

    async def one(number: int) -> None:
        await scheduler.ensure(record_of(f"{word} {number}"), Epoch(1), spec)

    return await _in_turn(SAMPLE, one)


async def _rates(fleets: Mapping[int, tuple[NomadServer, Path]], shards: int) -> list[float]:
    """Dispatches per second in each fleet, in the order of `fleets`."""
    prefix = f"flat{shards}"
    async with AsyncExitStack() as stack:
        some: list[tuple[Scheduler, AgentSpec]] = []
        for size, (server, root) in fleets.items():
            client = await stack.enter_async_context(bare_client(server))
            chosen, _ = settings(server, root / prefix, prefix)
            (spec,) = chosen.specs().values()
            scheduler = NomadScheduler(
                settings=NomadAccess(address=server.http_addr), shards=shards, prefix=prefix
            )
            stack.push_async_callback(scheduler.close)
            await scheduler.prepare([spec])
            await _grow(client, prefix, shards, size)
            some.append((scheduler, spec))
        took_s = [0.0] * len(some)
        for turn in range(TURNS):
            for number, (one, its) in enumerate(some):
                took_s[number] += await _take(one, its, f"turn {turn}")
    return [TURNS * SAMPLE / one for one in took_s]


async def measure(small: int, large: int) -> list[Row]:
    rows = []
    async with (
        nomad_server(schedulers=False) as first,
        nomad_server(schedulers=False) as second,
    ):
        for shards in (SHARDS, 1):
            few, many = await _rates({small: first, large: second}, shards)
            sharded = shards > 1
            rows.append(
                Row(
                    f"dispatch rate at {large:,} agents ÷ at {small:,}, shards = {shards}",
                    many / few,
                    "",
                    floor="≥ 0.70" if sharded else "",
                    aim="≥ 0.95" if sharded else "",
                    note=f"{many:.0f}/s against {few:.0f}/s"
                    + ("" if sharded else "; this is why there are shards"),
                )
            )
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(700, 1500) if quick else measure(1_000, 20_000))

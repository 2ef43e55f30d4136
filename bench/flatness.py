"""Is a fleet's size felt by one dispatch? The rate at 20,000 agents against the rate at 1,000.

Nomad walks all children of a parent for each idempotency token: with one parent the rate falls with the
fleet. Shards give each slice a parent of its own. Nomad's schedulers are off, so that what is measured is
the intake: nothing is placed, and no evaluation competes with it.

Both rates are those of the same number of dispatches by our backend's `ensure`; between them the fleet
grows by bare dispatches of the same form, which cost Nomad the same and us less.
"""

from __future__ import annotations

import asyncio
import time

from bench.plane import bare_body, nomad_server, settings
from bench.rows import Row
from nomad_watchdog.clients.nomad import NomadClient, NomadSettings
from nomad_watchdog.ids import shard_of
from nomad_watchdog.model import Epoch
from nomad_watchdog.schedulers import Scheduler
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.testing._bench import record_of

SHARDS = 64
AT_ONCE = 16
SAMPLE = 600


async def _in_turn(count: int, call: object) -> float:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await call(number)  # type: ignore[operator]

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def _grow(client: NomadClient, prefix: str, shards: int, first: int, last: int) -> None:
    async def one(number: int) -> None:
        record = record_of(f"grown {first + number}")
        parent = prefix if shards == 1 else f"{prefix}-s{shard_of(record.slug, shards)}"
        await client.dispatch(parent, bare_body(record.slug))

    await _in_turn(max(0, last - first), one)


async def _rate(scheduler: Scheduler, spec: object, word: str) -> float:
    async def one(number: int) -> None:
        await scheduler.ensure(record_of(f"{word} {number}"), Epoch(1), spec)  # type: ignore[arg-type]

    return SAMPLE / await _in_turn(SAMPLE, one)


async def measure(small: int, large: int) -> list[Row]:
    rows = []
    async with nomad_server(schedulers=False) as (server, root):
        client = NomadClient(NomadSettings(address=server.http_addr))
        try:
            for shards in (SHARDS, 1):
                prefix = f"flat{shards}"
                chosen, _ = settings(server, root / prefix, prefix)
                (spec,) = chosen.specs().values()
                scheduler = NomadScheduler(
                    settings=NomadSettings(address=server.http_addr), shards=shards, prefix=prefix
                )
                await scheduler.prepare([spec])
                await _grow(client, prefix, shards, 0, small - SAMPLE)
                before = await _rate(scheduler, spec, "early")
                await _grow(client, prefix, shards, small, large - SAMPLE)
                after = await _rate(scheduler, spec, "late")
                await scheduler.close()
                sharded = shards > 1
                rows.append(
                    Row(
                        f"dispatch rate at {large:,} agents ÷ at {small:,}, shards = {shards}",
                        after / before,
                        "",
                        floor="≥ 0.70" if sharded else "",
                        aim="≥ 0.95" if sharded else "",
                        note=f"{after:.0f}/s against {before:.0f}/s"
                        + ("" if sharded else "; this is why there are shards"),
                    )
                )
        finally:
            await client.close()
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(700, 1500) if quick else measure(1_000, 20_000))

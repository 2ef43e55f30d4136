"""One device at a time over HTTP: from the API's 2xx to Nomad's response to the dispatch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from bench.plane import bare_body, bare_client, nomad_server, plane, settings
from bench.rows import Row, percentile
from nomad_watchdog.api import Runner, make_app
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.metrics import Metrics


async def latencies(
    chosen: Settings, raw: Callable[[int], Awaitable[object]], count: int
) -> tuple[list[float], list[float]]:
    """Seconds of ours after the 2xx, and of the raw call, one after the other."""
    ours_s: list[float] = []
    raw_s: list[float] = []
    async with plane(chosen) as ours, aiohttp.ClientSession() as session:
        app = make_app(ours.fleet, metrics=Metrics(), artifact=None, max_body_bytes=1 << 20)
        runner = Runner(app)
        await runner.setup()
        port = free_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            async with ours.running():
                await ours.fleet.readiness.event.wait()
                for number in range(count):
                    began = time.perf_counter()
                    await raw(number)
                    raw_s.append(time.perf_counter() - began)
                    name = f"device-{number}"
                    url = f"http://127.0.0.1:{port}/v1/devices/{name}"
                    async with session.put(url, json={"address": "127.0.0.1"}) as answer:
                        assert answer.status == 201, await answer.text()
                    said = time.perf_counter()
                    await ours.until_started(number + 1, 30.0)
                    ours_s.append(max(0.0, ours.started[slug_of(DeviceId(name))] - said))
        finally:
            await runner.cleanup()
    return ours_s, raw_s


def rows_of(what: str, raw: str, ours_s: list[float], raw_s: list[float]) -> list[Row]:
    """The rows of one event. `what`: the result of the event; `raw`: its bare counterpart."""
    rows = []
    for share in (0.5, 0.99):
        mine, bare = percentile(ours_s, share), percentile(raw_s, share)
        rows.append(
            Row(
                f"{what}, p{share * 100:.0f} ÷ {raw}",
                mine / bare,
                "×",
                note=f"{mine * 1000:.1f} ms after the 2xx against {bare * 1000:.1f} ms, "
                f"{len(ours_s)} events",
            )
        )
    return rows


async def measure(count: int) -> list[Row]:
    async with nomad_server() as (server, root):
        chosen, _ = settings(server, root / "ours", "ours")
        async with bare_client(server, "raw") as client:

            async def raw(number: int) -> object:
                return await client.dispatch("raw", bare_body(f"raw-{number}"))

            ours_s, raw_s = await latencies(chosen, raw, count)
    return rows_of("event → dispatch", "one raw dispatch", ours_s, raw_s)


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(30 if quick else 300))

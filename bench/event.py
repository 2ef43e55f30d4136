"""One device at a time over HTTP: from the API's 2xx to Nomad's answer to the dispatch."""

from __future__ import annotations

import asyncio
import time

import aiohttp
from aiohttp import web

from bench.plane import bare_body, bare_client, nomad_server, plane, settings
from bench.rows import Row, percentile
from nomad_watchdog.api import RUNNER_OPTIONS, make_app
from nomad_watchdog.dev.process import free_port
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.metrics import Metrics


async def measure(count: int) -> list[Row]:
    ours_s: list[float] = []
    raw_s: list[float] = []
    async with nomad_server() as (server, root):
        chosen, _ = settings(server, root / "ours", "ours")
        async with (
            bare_client(server, "raw") as client,
            plane(chosen) as ours,
            aiohttp.ClientSession() as session,
        ):
            app = make_app(ours.fleet, metrics=Metrics(), artifact=None, max_body_bytes=1 << 20)
            runner = web.AppRunner(app, **RUNNER_OPTIONS)
            await runner.setup()
            port = free_port()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            try:
                async with ours.running():
                    await ours.fleet.ready_event.wait()
                    for number in range(count):
                        began = time.perf_counter()
                        await client.dispatch("raw", bare_body(f"raw-{number}"))
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
    rows = []
    for share in (0.5, 0.99):
        mine, raw = percentile(ours_s, share), percentile(raw_s, share)
        rows.append(
            Row(
                f"event → dispatch, p{share * 100:.0f} ÷ one raw dispatch",
                mine / raw,
                "×",
                note=f"{mine * 1000:.1f} ms after the 2xx against {raw * 1000:.1f} ms, {count} events",
            )
        )
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(30 if quick else 300))

"""From an event to its dispatch: from the API's 2xx to Nomad's answer, against one raw dispatch.

The control plane is the real one with its HTTP API: `PUT /v1/devices/{id}` commits to SQLite (fsync),
answers, and the reconciler commits the epoch (fsync) and dispatches. The clock starts when the API begins
to send its 2xx and stops at Nomad's answer to the dispatch. Raw: one dispatch by aiohttp on a warm
connection. The two take turns; then as many events come at once, and as many raw dispatches.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web

from bench import rig
from bench.rows import Row, percentile
from nomad_watchdog.api import RUNNER_OPTIONS, make_app
from nomad_watchdog.clients.nomad import Answer, NomadClient, NomadSettings
from nomad_watchdog.dev.process import free_port
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Limits

COUNT = 200
AT_ONCE = Limits().concurrency
_MOST_S = 60.0
_WARM = 10
"""Pairs before any is counted: connections and caches."""


class Watched(NomadClient):
    """The real client; it notes when each dispatch was answered."""

    def __init__(self, settings: NomadSettings) -> None:
        super().__init__(settings)
        self.answered: dict[str, float] = {}

    async def dispatch(self, parent: str, body: Mapping[str, Any]) -> Answer:
        answer = await super().dispatch(parent, body)
        self.answered.setdefault(body["IdPrefixTemplate"], time.perf_counter())
        return answer


class Api:
    """The HTTP API of a plane, and a client of it. `accepted`: when each device's 2xx was sent."""

    def __init__(self, session: aiohttp.ClientSession, base: str) -> None:
        self._session, self._base = session, base
        self.accepted: dict[str, float] = {}

    async def note(self, request: web.Request, response: web.StreamResponse) -> None:
        if 200 <= response.status < 300:
            name = request.path.rpartition("/")[2]
            self.accepted[slug_of(DeviceId(name))] = time.perf_counter()

    async def register(self, name: str) -> str:
        """The device's slug, when it is durable."""
        url = f"{self._base}/v1/devices/{name}"
        async with self._session.put(url, json={"address": "127.0.0.1"}) as answer:
            answer.raise_for_status()
            await answer.read()
        return slug_of(DeviceId(name))


@asynccontextmanager
async def served(plane: rig.Plane) -> AsyncIterator[Api]:
    port = free_port()
    app = make_app(plane.fleet, metrics=plane.metrics, artifact=None)
    async with aiohttp.ClientSession() as session:
        api = Api(session, f"http://127.0.0.1:{port}")
        app.on_response_prepare.append(api.note)
        runner = web.AppRunner(app, **RUNNER_OPTIONS)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", port).start()
            yield api
        finally:
            await runner.cleanup()


async def _one_by_one(
    api: Api, client: Watched, bare: rig.Bare, names: list[str]
) -> tuple[list[float], list[float]]:
    """(2xx → answer, raw dispatch) in seconds, taken in turns."""
    ours: list[float] = []
    raw: list[float] = []
    for name in names:
        content = rig.body(name)
        raw.append(await bare.one(content))
        slug = await api.register(name)
        await rig.until(
            lambda slug=slug: slug in client.answered, "the dispatch", _MOST_S, every_s=0.001
        )
        ours.append(client.answered[slug] - api.accepted[slug])
    return ours, raw


async def _burst(
    api: Api, client: Watched, bare: rig.Bare, count: int
) -> tuple[list[float], list[float]]:
    """(2xx → answer, start → answer of a raw one) in seconds; all come at once."""
    names = [f"burst-{number:04}" for number in range(count)]
    raw = await bare.many([rig.body(name) for name in names], AT_ONCE)
    await rig.until_running(bare.nomad, "bare", _WARM + 2 * count)
    slugs = await asyncio.gather(*(api.register(name) for name in names))
    await rig.until(
        lambda: all(slug in client.answered for slug in slugs), "the burst", _MOST_S, every_s=0.005
    )
    return [client.answered[slug] - api.accepted[slug] for slug in slugs], raw


async def _measure(count: int) -> list[Row]:
    async with rig.server() as (nomad, folder):
        client = Watched(NomadSettings(address=nomad.http_addr))
        bare = rig.Bare(nomad, "bare")
        try:
            await bare.prepare()
            path = folder / "registry.db"
            async with (
                rig.plane(nomad, path, "ours", client=client) as plane,
                plane.running(),
                served(plane) as api,
            ):
                await _one_by_one(api, client, bare, [f"warm-{n:04}" for n in range(_WARM)])
                await rig.until_running(nomad, "ours", _WARM)
                rig.tidy()
                names = [f"event-{n:04}" for n in range(count)]
                ours, raw = await _one_by_one(api, client, bare, names)
                await rig.until_running(nomad, "ours", _WARM + count)
                rig.tidy()
                burst, raw_burst = await _burst(api, client, bare, count)
        finally:
            await bare.close()
    return _rows(count, ours, raw, burst, raw_burst)


def _rows(
    count: int, ours: list[float], raw: list[float], burst: list[float], raw_burst: list[float]
) -> list[Row]:
    rows = []
    for share, floor, aim in ((0.5, "≤ 3", "≤ 1.3"), (0.99, "", "≤ 3")):
        mine, bare = percentile(ours, share), percentile(raw, share)
        rows.append(
            Row(
                f"event to dispatch, p{share * 100:.0f} of {count}: 2xx → answer ÷ raw dispatch",
                mine / bare,
                "×",
                floor=floor,
                aim=aim,
                note=f"{mine * 1e3:.1f} ms against {bare * 1e3:.1f} ms, one at a time",
            )
        )
    mine, bare = percentile(burst, 0.99), percentile(raw_burst, 0.99)
    rows.append(
        Row(
            f"event to dispatch, p99 of a burst of {count} ÷ as many raw dispatches",
            mine / bare,
            "×",
            note=f"{mine * 1e3:.0f} ms against {bare * 1e3:.0f} ms, {AT_ONCE} at once",
        )
    )
    rows.append(
        Row(
            "event to dispatch, p99, one at a time",
            percentile(ours, 0.99) * 1e3,
            "ms",
            floor="≤ 250",
        )
    )
    return rows


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(_measure(20 if quick else COUNT))

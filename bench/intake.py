"""Signed, durable webhooks compared with a handler that does nothing: the share of a bare server's rate.

Ours is the real application: it checks the signature over the raw bytes, detects replays, commits the desired
state to SQLite with a full sync, and only then responds. Each call is for a separate device. The bare
handler reads the body and responds. Both run in this process and are called by the same child process,
alternately; the result is the median of the rounds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from bench.rows import Row
from nomad_watchdog.api import RUNNER_OPTIONS, make_app
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.demo.process import clean_environment
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry

AT_ONCE = 128
ASK = """
import asyncio, base64, hashlib, hmac, json, sys, time
import aiohttp

url, secret, name, count, at_once = sys.argv[1], base64.b64decode(sys.argv[2]), *sys.argv[3:6]
count, at_once = int(count), int(at_once)
calls = []
now = int(time.time())
for number in range(count):
    said = {"event": "connected", "device": {"id": f"{name}-{number}", "address": "127.0.0.1"}}
    body = json.dumps(said).encode()
    told = f"{name}-{number}"
    mac = hmac.new(secret, f"{told}.{now}.".encode() + body, hashlib.sha256).digest()
    calls.append((body, {
        "Content-Type": "application/json", "webhook-id": told, "webhook-timestamp": str(now),
        "webhook-signature": "v1," + base64.b64encode(mac).decode(),
    }))

async def main():
    left, took = iter(calls), []
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:
        async def worker():
            for body, headers in left:
                began = time.perf_counter()
                async with session.post(url, data=body, headers=headers) as answer:
                    text = await answer.text()
                    assert answer.status in (200, 201), (answer.status, text)
                took.append(time.perf_counter() - began)
        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(at_once)))
        print(json.dumps([time.perf_counter() - began, sorted(took)[int(0.99 * count)]]))

asyncio.run(main())
"""


async def _bare(request: web.Request) -> web.StreamResponse:
    await request.read()
    return web.json_response({"ok": True})


@asynccontextmanager
async def _served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, **RUNNER_OPTIONS)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield "http://{}:{}/v1/webhook".format(*runner.addresses[0])
    finally:
        await runner.cleanup()


async def _ask(url: str, secret: str, name: str, count: int) -> tuple[float, float]:
    """Seconds for all calls, and the p99 of a single call."""
    argv = ["-c", ASK, url, secret, name, str(count), str(AT_ONCE)]
    child = await asyncio.create_subprocess_exec(
        sys.executable, *argv, env=clean_environment(), stdout=asyncio.subprocess.PIPE
    )
    said, _ = await child.communicate()
    assert child.returncode == 0
    whole_s, p99_s = json.loads(said)
    return whole_s, p99_s


async def measure(count: int, rounds: int) -> list[Row]:
    secret = base64.b64encode(os.urandom(32)).decode()
    plain = web.Application()
    plain.router.add_post("/v1/webhook", _bare)
    with tempfile.TemporaryDirectory(prefix="nomad-watchdog-bench-") as folder:
        secrets = Path(folder) / "webhook.secrets"
        secrets.touch(mode=0o600)
        secrets.write_text(f"whsec_{secret}\n")
        registry = SqliteRegistry(path=Path(folder) / "registry.db")
        await registry.initialise()
        fleet = Fleet(registry, Limits(), SystemClock())
        fleet.records.reset({}, 0)
        api = ApiSettings(webhook_secrets_file=str(secrets), rate=1_000_000, burst=1_000_000)
        app = make_app(fleet, metrics=Metrics(), artifact=None, authenticator=authenticator_of(api))
        ours: list[tuple[float, float]] = []
        bare: list[tuple[float, float]] = []
        async with _served(app) as our_url, _served(plain) as bare_url:
            for number in range(rounds):
                bare.append(await _ask(bare_url, secret, f"bare{number}", count))
                ours.append(await _ask(our_url, secret, f"ours{number}", count))
        stored = len((await registry.read()).records)
        await registry.close()
    assert stored == count * rounds, (stored, count * rounds)
    ratio = statistics.median(b[0] / o[0] for b, o in zip(bare, ours, strict=True))
    ours_s, bare_s = (statistics.median(one[0] for one in some) for some in (ours, bare))
    p99 = [statistics.median(one[1] for one in some) * 1000 for some in (ours, bare)]
    return [
        Row(
            "signed durable webhooks, rate ÷ bare handler",
            ratio,
            "",
            floor="≥ 0.4",
            aim="≥ 0.7",
            note=f"{count / ours_s:,.0f}/s against {count / bare_s:,.0f}/s, {AT_ONCE} at once; "
            f"p99 {p99[0]:.0f} ms against {p99[1]:.0f} ms",
        )
    ]


def run(*, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(300, 1) if quick else measure(3000, 3))

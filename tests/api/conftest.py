from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from nomad_watchdog.api import Runner, make_app
from nomad_watchdog.api.auth import Authenticator as Gate
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry


@dataclass
class ServedApi:
    """A real server on a free port, a real client, a real registry."""

    fleet: Fleet
    metrics: Metrics
    client: aiohttp.ClientSession
    base: str
    runner: web.AppRunner
    app: web.Application

    @property
    def app_door(self) -> Gate:
        return self.app[CONTEXT].authenticator

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, Any]:
        url = URL(self.base + path, encoded=True)
        async with self.client.request(method, url, **options) as response:
            text = await response.text()
            assert response.content_type == "application/json" or not text, text
            return response.status, await response.json() if text else None


@pytest.fixture
def token() -> str | None:
    return None


@asynccontextmanager
async def served(
    folder: Path, *, max_body_bytes: int = 65_536, **options: Any
) -> AsyncIterator[ServedApi]:
    """The API on a free port, over the registry of this folder; options as `make_app` takes them."""
    registry = SqliteRegistry(path=folder / "registry.db")
    await registry.initialise()
    fleet, metrics = Fleet(registry, Limits(), SystemClock()), Metrics()
    fleet.records.reset({}, 0)
    artifact = folder / "agent.pyz"
    artifact.write_bytes(b"PK-agent")
    app = make_app(
        fleet, metrics=metrics, artifact=artifact, max_body_bytes=max_body_bytes, **options
    )
    runner = Runner(app, shutdown_timeout=2.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as client:
            yield ServedApi(fleet, metrics, client, f"http://{host}:{port}", runner, app)
    finally:
        await runner.cleanup()
        await registry.close()


@pytest.fixture
async def served_api(tmp_path: Path, token: str | None) -> AsyncIterator[ServedApi]:
    gate = None
    if token is not None:
        (tmp_path / "token").write_text(token)
        gate = authenticator_of(ApiSettings(token_file=str(tmp_path / "token")))
    async with served(tmp_path, authenticator=gate) as it:
        yield it

"""The project's own API on a real socket, with a real registry."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from nomad_watchdog.api import make_app
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    started, addresses = threading.Event(), []
    stops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        registry = SqliteRegistry(path=tmp_path / "registry.db")
        await registry.initialise()
        fleet = Fleet(registry, Limits(), SystemClock())
        fleet.records.reset({}, 0)
        fleet.classes = frozenset({"default", "gateway"})
        (tmp_path / "asked").write_text("secret-token-of-the-api")
        authenticator = authenticator_of(ApiSettings(token_file=str(tmp_path / "asked")))
        app = make_app(fleet, metrics=Metrics(), artifact=None, authenticator=authenticator)
        runner = web.AppRunner(app, shutdown_timeout=2.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        addresses.append("http://{}:{}".format(*runner.addresses[0]))
        stop = asyncio.Event()
        stops.append((asyncio.get_running_loop(), stop))
        started.set()
        await stop.wait()
        await runner.cleanup()
        await registry.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    monkeypatch.chdir(tmp_path)
    token = tmp_path / "token"
    token.write_text("secret-token-of-the-api\n")
    monkeypatch.setenv("NOMAD_WATCHDOG_ADDR", addresses[0])
    monkeypatch.setenv("NOMAD_WATCHDOG_TOKEN_FILE", str(token))
    yield addresses[0]
    loop, stop = stops[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    assert not thread.is_alive()

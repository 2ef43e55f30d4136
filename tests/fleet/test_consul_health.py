"""Health from a real Consul with real HTTP checks.

Out of scope: decisions based on it (tests/core).
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.fleet.consul_health import ConsulHealth
from nomad_watchdog.ids import Slug, parse_device_id, slug_of
from nomad_watchdog.model import Health
from servers.consul import ConsulServer

View = Mapping[Slug, Health]


class Targets:
    """An HTTP server that answers /<slug> with the status that a test has set (200)."""

    def __init__(self) -> None:
        self.status: dict[str, int] = {}
        status = self.status

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status.get(self.path.strip("/").partition("?")[0], 200))
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def targets() -> Iterator[Targets]:
    server = Targets()
    yield server
    server.close()


class Agents:
    """Registers and deregisters instances of one service, as agents do."""

    def __init__(self, http: aiohttp.ClientSession, targets: Targets) -> None:
        self.service = f"watchdog-{uuid.uuid4()}"
        self._http = http
        self._targets = targets
        self._ids: set[str] = set()

    async def put(self, path: str, body: dict[str, Any] | None = None) -> None:
        async with self._http.put(path, json=body) as answer:
            assert answer.status == 200, await answer.text()

    async def register(self, name: str, epoch: int = 1) -> Slug:
        slug = slug_of(parse_device_id(name))
        check = {
            "HTTP": f"http://127.0.0.1:{self._targets.port}/{slug}?epoch={epoch}",
            "Interval": "1s",
            "Timeout": "1s",
        }
        body = {"ID": slug, "Name": self.service, "Port": 4711, "Meta": {"epoch": str(epoch)}}
        await self.put("/v1/agent/service/register", body | {"Check": check})
        self._ids.add(slug)
        return slug

    async def deregister(self, slug: str) -> None:
        await self.put(f"/v1/agent/service/deregister/{slug}")
        self._ids.discard(slug)

    async def catalogue(
        self, service_id: str, *, node: str, meta: dict[str, str] | None, **status: str
    ) -> None:
        """Register an instance on a node without a Consul agent; status: check id → status."""
        checks = [
            {
                "Node": node,
                "CheckID": check,
                "Name": check,
                "Status": value,
                "ServiceID": "" if check == "serfHealth" else service_id,
            }
            for check, value in status.items()
        ]
        service = {"ID": service_id, "Service": self.service, "Meta": meta}
        body = {"Node": node, "Address": "127.0.0.9", "Service": service, "Checks": checks}
        await self.put("/v1/catalog/register", body)

    async def close(self) -> None:
        for slug in list(self._ids):
            await self.deregister(slug)


@asynccontextmanager
async def agents_on(address: str, targets: Targets) -> AsyncIterator[Agents]:
    timeout = aiohttp.ClientTimeout(total=5)
    async with aiohttp.ClientSession(address, timeout=timeout) as http:
        agents = Agents(http, targets)
        try:
            yield agents
        finally:
            await agents.close()


@pytest_asyncio.fixture
async def agents(consul: ConsulServer, targets: Targets) -> AsyncIterator[Agents]:
    async with agents_on(consul.http_addr, targets) as opened:
        yield opened


class Watcher:
    """All views of one watch, collected by its own task."""

    def __init__(self, health: ConsulHealth) -> None:
        self.health = health
        self.views: list[View] = []

    async def run(self) -> None:
        async for view in self.health.watch():
            self.views.append(view)

    async def until(self, holds: Callable[[View], bool], timeout_s: float = 60.0) -> View:
        """The last view, as soon as `holds` is true for it."""
        async with asyncio.timeout(timeout_s):
            while not self.views or not holds(self.views[-1]):
                await asyncio.sleep(0.02)
        return self.views[-1]


@asynccontextmanager
async def watching(
    client: ConsulClient, service: str, full_every_s: float = 300.0
) -> AsyncIterator[Watcher]:
    watcher = Watcher(ConsulHealth(client, service, full_every_s=full_every_s))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(watcher.run())
        try:
            yield watcher
        finally:
            task.cancel()


async def test_health_follows_the_agents(
    agents: Agents, targets: Targets, consul_client: ConsulClient
) -> None:
    """Passing, failing, warning and passing again are each seen, and another agent is
    unaffected."""
    slug = await agents.register("cam 1", epoch=4)
    other = await agents.register("cam 2")
    async with watching(consul_client, agents.service) as watcher:
        view = await watcher.until(lambda v: {h.status for h in v.values()} == {"passing"})
        assert view.keys() == {slug, other}
        assert (view[slug].epoch, view[slug].node) == (4, "watchdog-consul")
        assert view[slug].address == "127.0.0.1:4711"
        for answer, status in ((503, "critical"), (429, "warning"), (200, "passing")):
            changed = time.monotonic()
            targets.status[slug] = answer
            view = await watcher.until(lambda v: v[slug].status == status)  # noqa: B023  # used at once
            assert view[other].status == "passing"
            age_s = watcher.health.age_s
            assert age_s <= time.monotonic() - changed


async def test_newer_epoch_is_seen_by_the_next_full_read(
    agents: Agents, consul_client: ConsulClient
) -> None:
    """A higher epoch registered over a passing entry, which wakes no watch, is still seen."""
    slug = await agents.register("again")
    async with watching(consul_client, agents.service, full_every_s=2.0) as watcher:
        await watcher.until(lambda v: slug in v and v[slug].status == "passing")
        await agents.register("again", epoch=2)
        await watcher.until(lambda v: v[slug].epoch == 2)


async def test_new_and_gone_agents_are_seen(agents: Agents, consul_client: ConsulClient) -> None:
    """An agent that registers, and one that deregisters while passing (which the watch does not
    show), are seen within seconds."""
    async with watching(consul_client, agents.service) as watcher:
        assert await watcher.until(lambda v: True) == {}
        slug = await agents.register("late")
        await watcher.until(lambda v: slug in v and v[slug].status == "passing")
        await agents.deregister(slug)
        await watcher.until(lambda v: not v)


async def test_duplicates_resolve_to_the_highest_epoch(
    agents: Agents, consul_client: ConsulClient
) -> None:
    """Of two entries with one id the higher epoch wins even though it is critical, and within one
    epoch the healthier; a node's own failure counts as the agent's."""
    slug = slug_of(parse_device_id("moved"))
    twin = slug_of(parse_device_id("twin"))
    dead = slug_of(parse_device_id("dead node"))
    name = f"n-{uuid.uuid4()}"
    await agents.catalogue(slug, node=f"{name}-a", meta={"epoch": "2"}, own="passing")
    await agents.catalogue(slug, node=f"{name}-b", meta={"epoch": "10"}, own="critical")
    await agents.catalogue(twin, node=f"{name}-c", meta={"epoch": "3"}, own="critical")
    await agents.catalogue(twin, node=f"{name}-d", meta={"epoch": "3"}, own="passing")
    down = {"serfHealth": "critical", "own": "passing"}
    await agents.catalogue(dead, node=f"{name}-e", meta={"epoch": "1"}, **down)
    async with watching(consul_client, agents.service) as watcher:
        view = await watcher.until(lambda v: True)
    assert (view[slug].epoch, view[slug].status, view[slug].node) == (10, "critical", f"{name}-b")
    assert (view[twin].status, view[twin].node) == ("passing", f"{name}-d")
    assert view[dead].status == "critical"


@pytest.mark.parametrize("epoch", [None, "", "-1", "1e3", "٣", "9" * 400, "1; drop"])
async def test_s11_hostile_entries_are_data(
    agents: Agents, consul_client: ConsulClient, epoch: str | None
) -> None:
    """An invalid epoch counts as none, an id that is not a slug is left out, and the rest is
    read."""
    odd, good = slug_of(parse_device_id("odd")), slug_of(parse_device_id("good"))
    name = f"n-{uuid.uuid4()}"
    # Consul itself refuses more than 512 bytes
    meta = None if epoch is None else {"epoch": epoch, "device_id": "\x1b[2J<script>"}
    await agents.catalogue(odd, node=f"{name}-a", meta=meta, own="passing")
    await agents.catalogue('x" or 1==1', node=f"{name}-b", meta={"epoch": "1"}, own="passing")
    await agents.catalogue(good, node=f"{name}-c", meta={"epoch": "1"})
    async with watching(consul_client, agents.service) as watcher:
        view = await watcher.until(lambda v: True)
    assert view.keys() == {odd, good}
    assert view[odd].epoch == 0
    assert (view[good].epoch, view[good].status) == (1, "critical")


@pytest.mark.servers
@pytest.mark.slow_because("a Consul of its own stands still for four seconds")
async def test_s7_a_frozen_consul_never_empties_the_view(tmp_path: Path, targets: Targets) -> None:
    """While the server is stopped no view arrives and the age of the last one grows; afterwards
    changes are seen."""
    async with (
        ConsulServer(tmp_path) as server,
        agents_on(server.http_addr, targets) as agents,
    ):
        client = ConsulClient(ConsulAccess(address=server.http_addr, timeout_s=1.0))
        slug = await agents.register("steady")
        async with watching(client, agents.service) as watcher:
            await watcher.until(lambda v: v[slug].status == "passing")
            before = len(watcher.views)
            server.pause()
            paused = time.monotonic()
            late = Watcher(ConsulHealth(client, agents.service))  # first watch on a dead server
            try:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(4):
                        await late.run()
                assert watcher.health.age_s >= 3
            finally:
                server.resume()
            assert late.views == []
            assert late.health.age_s == float("inf")
            assert time.monotonic() - paused >= 4
            assert all(slug in view for view in watcher.views[before:])
            targets.status[slug] = 500
            await watcher.until(lambda v: v[slug].status == "critical", timeout_s=60)
        await client.close()

"""Five thousand devices on Nomad's mock driver: placed exactly once, and nothing is done twice.

Out of scope: agents. The mock driver starts none, so no verdict gets beyond `unwatched`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.process import Process, clean_environment, free_port
from servers.nomad import NomadServer

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(600)]

DEVICES = 5000
CONFIG = """\
backend  = "nomad"
data_dir = "{root}/data"
resync   = "5s"
api {{
  listen = "127.0.0.1:{port}"
}}
nomad {{
  address = "{nomad}"
}}
registry {{
  kind = "sqlite"
}}
consul {{
  agent_address = ""
}}
agent_class "default" {{
  template = "{template}"
  probe "icmp" {{}}
}}
"""


class Plane:
    """`nomad-watchdog run` as a process, its API and Nomad's view of its work."""

    def __init__(self, root: Path, nomad: NomadServer, session: aiohttp.ClientSession) -> None:
        self.root, self.nomad, self.session = root, nomad, session
        port = free_port()
        self.api = f"http://127.0.0.1:{port}"
        self.config = root / "nomad-watchdog.hcl"
        template = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
        self.config.write_text(
            CONFIG.format(root=root, port=port, nomad=nomad.http_addr, template=template)
        )
        self.process: Process | None = None

    async def start(self) -> None:
        self.process = Process.start(
            [sys.executable, "-m", "nomad_watchdog", "--config", str(self.config), "run"],
            log=self.root / "run.log",
            env=clean_environment(),
        )
        async with asyncio.timeout(30.0):
            while not await self.ready():
                assert self.process.returncode is None, self.process.log_tail()
                await asyncio.sleep(0.1)

    async def ready(self) -> bool:
        try:
            async with self.session.get(f"{self.api}/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def bulk(self, key: str, devices: list[Any]) -> None:
        for first in range(0, len(devices), 1000):
            body = {key: devices[first : first + 1000]}
            async with self.session.post(f"{self.api}/v1/devices:bulk", json=body) as answer:
                assert answer.status < 300, await answer.text()

    async def children(self) -> dict[str, Any]:
        """Job id → (device, stopped, modify index) of all children."""
        jobs: list[Any] = []
        following = ""
        while True:
            path = (
                f"/v1/jobs?prefix=device-watchdog/&meta=true&per_page=1000&next_token={following}"
            )
            async with self.session.get(self.nomad.http_addr + path) as answer:
                jobs += await answer.json()
                following = answer.headers.get("X-Nomad-NextToken", "")
            if not following:
                return {
                    j["ID"]: (j["Meta"]["device_id"], bool(j["Stop"]), j["JobModifyIndex"])
                    for j in jobs
                }

    async def placed(self, wanted: set[str], timeout_s: float) -> dict[str, Any]:
        """Wait until exactly these devices have a live child; returns all children."""
        deadline = time.monotonic() + timeout_s
        while True:
            children = await self.children()
            live = Counter(device for device, stopped, _ in children.values() if not stopped)
            assert max(live.values(), default=0) <= 1, "a device has two live children"
            if live.keys() == wanted:
                return children
            assert time.monotonic() < deadline, f"{len(live)} of {len(wanted)} are placed"
            await asyncio.sleep(1.0)


async def test_five_thousand_devices_are_placed_exactly_once(tmp_path: Path) -> None:
    """Each of 5,000 devices gets one child, 500 that leave lose theirs, 100 new ones get one, and a
    restarted reconciler finds nothing to do."""
    names = [f"device-{n:04}" for n in range(DEVICES)]
    fresh = [f"fresh-{n:03}" for n in range(100)]
    timeout = aiohttp.ClientTimeout(total=30.0)
    async with (
        NomadServer(tmp_path / "nomad") as nomad,
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        plane = Plane(tmp_path, nomad, session)
        await plane.start()
        try:
            await plane.bulk("devices", [{"id": n, "address": "127.0.0.1"} for n in names])
            first = await plane.placed(set(names), 240.0)
            assert len(first) == DEVICES

            await plane.bulk("delete", list(names[:500]))
            await plane.bulk("devices", [{"id": n, "address": "127.0.0.1"} for n in fresh])
            await plane.placed({*names[500:], *fresh}, 120.0)

            before = await plane.children()
            assert plane.process is not None
            await plane.process.kill()
            await plane.start()
            await asyncio.sleep(12.0)  # two full resyncs, by the configuration
            assert await plane.children() == before
        finally:
            if plane.process is not None:
                await plane.process.terminate(10.0)

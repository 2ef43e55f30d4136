"""Attackers without a token against the real control plane, while an operator measures latency."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from servers.replica import ControlPlane
from tests.attacks import attackers
from tests.attacks.table import Attack
from tests.schedulers.conftest import directory

__all__ = ["directory"]

TOKEN = "operators-token-operators-token"
SECRET = "whsec_" + "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="
CONFIG = """\
data_dir = "{root}"
resync   = "1s"
api {
  listen               = "127.0.0.1:{port}"
  token_file           = "{root}/token"
  webhook_secrets_file = "{root}/webhooks"
}
local { directory = "AGENTS" }
presence { grace = "0s" }
agent_class "default" {
  variables = { command = "[\\"sleep\\", \\"600\\"]" }
  probe "tcp" { port = 80 }
}
"""
ATTACKS = (("gzip", 8), ("silent", 250), ("slow", 50), ("deaf", 50), ("webhook", 120))
TTL_S = 5.0
ATTACK_S = 30.0


@pytest.fixture
async def plane(tmp_path: Path, directory: Path) -> AsyncIterator[ControlPlane]:
    root = tmp_path / "plane"
    root.mkdir()
    for name, text in (("token", TOKEN), ("webhooks", SECRET)):
        (root / name).write_text(text)
        (root / name).chmod(0o600)
    config = CONFIG.replace("AGENTS", str(directory))
    async with ControlPlane(tmp_path, "plane", config, token=TOKEN) as plane:
        yield plane


def memory_kb(plane: ControlPlane) -> int:
    text = Path(f"/proc/{plane.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", text)
    assert found is not None
    return int(found[1])


def computed_s(plane: ControlPlane) -> float:
    """Seconds of CPU time that the control plane has used."""
    fields = Path(f"/proc/{plane.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def series(plane: ControlPlane, name: str) -> list[str]:
    """The nonzero series of a metric, with their values."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.get(plane.api + "/metrics") as answer,
    ):
        text = await answer.text()
    found = [line for line in text.splitlines() if line.startswith(name)]
    return [line for line in found if float(line.split()[-1])]


async def counted(plane: ControlPlane, name: str) -> float:
    """The sum of a metric's series."""
    return sum(float(line.split()[-1]) for line in await series(plane, name))


class Operator:
    """Requests the status repeatedly, half of the time over a new connection."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.took_ms: list[float] = []
        self.failed: Counter[str] = Counter()

    async def run(self) -> None:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as kept:
            while True:
                for fresh in (False, True):
                    await self._ask(kept, {"Connection": "close"} if fresh else {})
                    await asyncio.sleep(0.02)  # between two measurements

    async def _ask(self, session: aiohttp.ClientSession, headers: dict[str, str]) -> None:
        began = time.perf_counter()
        try:
            async with session.get(self.plane.api + "/v1/status", headers=headers) as answer:
                await answer.read()
                if answer.status != 200:
                    self.failed[str(answer.status)] += 1
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failed[type(error).__name__] += 1
        self.took_ms.append((time.perf_counter() - began) * 1e3)

    def percentile(self, part: float) -> float:
        return sorted(self.took_ms)[int(len(self.took_ms) * part)]


async def beat(plane: ControlPlane, names: list[str]) -> None:
    while True:
        await plane.call("POST", "/v1/heartbeats", {"ids": names})
        await asyncio.sleep(1.0)  # a fifth of the ttl


@pytest.mark.busy
@pytest.mark.attack(
    "H2",
    "compressed bodies on 8 connections (H1), 350 silent, slow and deaf ones (H2) and 120 webhooks of 1 MiB with a "
    "wrong signature (H4), all at once and made anew when closed",
)
async def test_an_operator_works_beside_all_attackers(
    plane: ControlPlane, tmp_path: Path, attack: Attack
) -> None:
    """While H1, H2 and H4 run together, the operator's p50 is at most 20 ms and p99 at most 250 ms, memory grows by at
    most 40 MB, every resync is followed by a pass, and no device with a heartbeat expires."""
    names = [f"cam-{number}" for number in range(5)]
    for name in names:
        await plane.register(name, ttl=f"{TTL_S:g}s")
    await plane.until("/v1/status", lambda status: status["placements"] == len(names))
    operator = Operator(plane)
    beating = asyncio.ensure_future(beat(plane, names))
    before, passes = memory_kb(plane), await counted(plane, "nomad_watchdog_passes_total")
    began, computed = time.monotonic(), computed_s(plane)
    running = [
        attackers.start(tmp_path, kind, plane.port, "127.0.66.6", count) for kind, count in ATTACKS
    ]
    asking = asyncio.ensure_future(operator.run())
    peak = before
    try:
        while time.monotonic() - began < ATTACK_S:
            await asyncio.sleep(0.25)  # between two readings
            peak = max(peak, memory_kb(plane))
            assert not beating.done()
        passed = await counted(plane, "nomad_watchdog_passes_total") - passes
        lasted, computed = time.monotonic() - began, computed_s(plane) - computed
    finally:
        for task in (asking, beating):
            task.cancel()
        await asyncio.gather(asking, beating, return_exceptions=True)
        for process, _ in running:
            await process.terminate(15.0)
    made = sum(json.loads(log.read_text().splitlines()[-1])["made"] for _, log in running)
    p50, p99, grown = operator.percentile(0.5), operator.percentile(0.99), (peak - before) / 1000
    attack.tried = made
    attack.result = (
        f"operator p50 {p50:.1f} ms, p99 {p99:.0f} ms over {len(operator.took_ms):,} requests, memory +{grown:.0f} MB, "
        f"{passed:.0f} passes in {lasted:.0f} s, no expiry, {computed / lasted:.0%} of one core"
    )
    assert not operator.failed
    assert (await plane.call("GET", "/v1/status"))["placements"] == len(names)
    assert await counted(plane, "nomad_watchdog_expired_devices_total") == 0
    assert passed >= lasted / 1.5, (
        attack.result
    )  # the next one starts a second after the last has ended
    assert p50 <= 20, attack.result
    assert p99 <= 250, attack.result
    assert grown <= 40, attack.result


@pytest.mark.busy
@pytest.mark.timeout(600)
async def test_ten_thousand_devices_behind_one_address_are_all_answered(
    plane: ControlPlane,
) -> None:
    """10,000 simultaneous connections from one address, each with a valid token like an agent's, are all answered with
    200 at the default limits: none is closed to make room, and none is rate-limited."""
    request = (
        f"GET /v1/leases HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n"
        "Connection: close\r\n\r\n"
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)

    def wave(count: int) -> Counter[str]:
        found: Counter[str] = Counter()
        with ExitStack() as stack:
            wires = []
            for _ in range(count):
                wire = stack.enter_context(
                    socket.create_connection(("127.0.0.1", plane.port), timeout=60)
                )
                wire.send(request.encode())
                wires.append(wire)
            for wire in wires:
                try:
                    found[wire.recv(12)[9:].decode() or "closed"] += 1
                except ConnectionError:
                    found["closed"] += 1
        return found

    found: Counter[str] = Counter()
    while (left := 10_000 - found.total()) > 0:  # as many at once as this process may open
        found += await asyncio.to_thread(wave, min(left, soft - 500))
    closings = await series(plane, "nomad_watchdog_api_connections_closed_total")
    assert (found, closings) == ({"200": 10_000}, [])

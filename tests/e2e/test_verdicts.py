"""Correct verdicts, from outside: real agents, a control plane that is killed, a key that is
replaced."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.process import free_port
from tests.agent.world import OK, Listener, says
from tests.e2e.test_program import Program, directory
from tests.schedulers.conftest import eventually, pids_of

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{
  listen = "127.0.0.1:{port}"
  {keys}
}}
agents {{
  report_stale  = "2s"
  startup_grace = "30s"
}}
agent_class "default" {{
  version = "{version}"
  beat    = "500ms"
  probe "tcp" {{
    port     = {device}
    interval = "200ms"
    timeout  = "150ms"
    misses   = 2
  }}
  confirm "http" {{
    port = {other}
    timeout = "500ms"
  }}
}}
"""
SAME_S = 2.0
"""Tolerance between two reads of one start time, for rounding and an agent's clock."""


class Case(Program):
    """The program, one device, and the values read for it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.device = Listener(says(OK))
        self.other = free_port()
        self.keys = ""
        self.seen: list[tuple[str, float]] = []
        """Verdict and its start time, for each read."""
        self.write("1")

    def write(self, version: str) -> None:
        """Write the configuration, with this version of the class."""
        self.file.write_text(
            CONFIG.format(
                root=self.root,
                port=self.port,
                keys=self.keys,
                version=version,
                device=self.device.port,
                other=self.other,
            )
        )

    async def look(self) -> dict[str, Any]:
        """The device as the API shows it, also appended to `seen`."""
        item: dict[str, Any] = await self.get("/v1/devices/a")
        self.seen.append((item["verdict"], time.monotonic() - item["since_s"]))
        return item

    async def until(self, verdict: str, **more: Any) -> dict[str, Any]:
        """The device once it has this verdict and these fields."""

        async def test() -> Any:
            item = await self.look()
            found = {**more, "verdict": verdict}.items() <= item.items()
            return item if found else None

        return await eventually(test, 60.0)  # type: ignore[no-any-return]

    async def aged(self, verdict: str, least_s: float = 3.0) -> float:
        """When this verdict began, once it is old enough for a new start time to show."""

        async def test() -> bool:
            item = await self.look()
            return bool(item["verdict"] == verdict and item["since_s"] > least_s)

        await eventually(test, 60.0)
        return self.seen[-1][1]

    @asynccontextmanager
    async def watched_closely(self) -> AsyncIterator[None]:
        """Read the device repeatedly until the end of the block; ignores an unavailable control
        plane."""
        self.seen.clear()

        async def read() -> None:
            while True:
                with suppress(aiohttp.ClientError, AssertionError):
                    await self.look()
                await asyncio.sleep(0.05)

        reading = asyncio.create_task(read())
        try:
            yield
        finally:
            reading.cancel()
            (end,) = await asyncio.gather(reading, return_exceptions=True)
            assert isinstance(end, asyncio.CancelledError), end


@pytest.fixture
async def case(tmp_path: Path, directory: Path) -> AsyncIterator[Case]:
    """A case whose device answers."""
    it = Case(tmp_path)
    await it.device.start()
    yield it
    await it.device.stop()


async def _kill(service: asyncio.subprocess.Process) -> None:
    service.send_signal(signal.SIGKILL)
    await service.wait()


@pytest.mark.slow_because(
    "a device dies, its agent is killed and rolled out, the control plane is killed"
)
async def test_v1_an_outage_outlives_its_agent_and_the_control_plane(
    case: Case, directory: Path
) -> None:
    """A dead device stays offline with the same start time while its agent is killed, the control
    plane is killed, and its class is rolled out. The new agent confirms it, and sees the device
    come back."""
    async with case.running() as service:
        await case.import_devices("a")
        await case.until("watched")
        await case.device.stop()
        await case.until("offline")
        began = await case.aged("offline")
        epoch = (await case.look())["epoch"]
        async with case.watched_closely():
            for pid in pids_of(directory):
                os.kill(pid, signal.SIGKILL)
            await case.aged("offline", 5.0)
            case.write("2")
            await _kill(service)
            async with case.running():
                item = await case.until("offline", version="2")
                assert item["epoch"] > epoch

                async def confirmed() -> bool:
                    report = (await case.get("/v1/devices/a/explain"))["report"]
                    return bool(report and report["state"] == "offline" and report["ready"])

                await eventually(confirmed, 60.0)
                seen = list(case.seen)
                await case.device.start()
                await case.until("watched")
                events = (await case.get("/v1/events?device=a&kind=verdict"))["items"]
    assert {verdict for verdict, _ in seen} == {"offline"}
    assert max(abs(since - began) for _, since in seen) < SAME_S
    kinds = [event["kind"] for event in events]
    assert kinds.count("verdict.offline") == 1, "\n".join(
        f"{e['at'] % 1000:.2f} {e['kind']} {e['text']} {e['origin']}" for e in events
    )
    assert kinds[-1] == "verdict.watched"


@pytest.mark.slow_because("an agent is killed and restarted by its scheduler")
async def test_a_killed_agent_leaves_an_event(case: Case, directory: Path) -> None:
    """The local backend restarts an agent that was killed: one event, with the reason, and no
    change of the verdict to offline or degraded."""
    async with case.running():
        await case.import_devices("a")
        await case.until("watched")
        for pid in pids_of(directory, (await case.look())["slug"]):
            os.kill(pid, signal.SIGKILL)

        async def told() -> Any:
            return (await case.get("/v1/events?kind=agent.restarted"))["items"]

        (event,) = await eventually(told, 60.0)
        assert (event["device"], event["data"]["restarts"]) == ("a", 1)
        assert event["text"].startswith(
            "the scheduler restarted the agent (restart 1 of its placement)"
        )
        await case.until("watched")
        assert len(await told()) == 1
        assert {verdict for verdict, _ in case.seen} <= {"watched", "starting", "unwatched"}


@pytest.mark.slow_because("waits until reports are stale")
async def test_v2_refused_reports_leave_a_device_unwatched(case: Case) -> None:
    """The agents' key is replaced in place: the device is unwatched with that reason, in the
    status, the events, the metrics and doctor. With the old key back below the new one it is
    watched."""
    file = case.root / "keys"
    old, new = secrets.token_hex(32), secrets.token_hex(32)
    file.write_text(old)
    case.keys = f'agent_key_file = "{file}"'
    case.write("1")
    async with case.running():
        await case.import_devices("a")
        await case.until("watched")
        file.with_suffix(".new").write_text(new)
        file.with_suffix(".new").replace(file)
        item = await case.until("unwatched")
        assert item["reason"].startswith(
            "the agent's reports are refused: HTTP 401 from 127.0.0.1: "
        )
        assert "api.agent_key_file" in item["reason"]
        assert (await case.get("/v1/status"))["unheard"] == {"refused": 1, "silent": 0}
        code, out, _ = await case("doctor")
        assert code == 69
        assert "the reports of 1 running agents are refused" in out
        _, out, _ = await case("doctor", "-o", "json")
        (asked,) = [one for one in json.loads(out)["checks"] if one["name"] == "agents asked"]
        assert asked["status"] == "fail"
        assert "do not arrive: a: its reports are refused by http" in asked["found"]
        (event,) = (await case.get("/v1/events?kind=agent.unheard"))["items"]
        assert (event["device"], event["data"]) == ("a", {"why": "refused"})
        url = f"http://127.0.0.1:{case.port}/metrics"

        async def counted() -> bool:
            async with aiohttp.ClientSession() as http, http.get(url) as answer:
                return 'nomad_watchdog_unheard_agents{reason="refused"} 1.0' in await answer.text()

        await eventually(counted)
        file.with_suffix(".new").write_text(f"{new}\n{old}\n")
        file.with_suffix(".new").replace(file)
        await case.until("watched")
        assert [event["kind"] for event in (await case.get("/v1/events?kind=agent."))["items"]] == [
            "agent.unheard",
            "agent.heard",
        ]


@pytest.mark.slow_because("waits for a confirmation")
async def test_v3_a_dead_service_on_a_live_host_is_degraded(case: Case) -> None:
    """The probe fails and its confirmation succeeds: degraded, not suspect for ever, and watched
    again afterwards."""
    host = Listener(says(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    case.other = host.port
    case.write("1")
    await host.start()
    try:
        async with case.running():
            await case.import_devices("a")
            await case.until("watched")
            await case.device.stop()
            item = await case.until("degraded")
            assert item["reason"]
            assert (await case.get("/v1/status"))["verdicts"]["degraded"] == 1
            await case.device.start()
            await case.until("watched")
    finally:
        await host.stop()


@pytest.mark.slow_because("restarts the control plane twice")
async def test_v6_since_survives_a_restart(case: Case) -> None:
    """A watched and an offline device show the same start time after the control plane was killed,
    and no event repeats their verdicts."""
    async with case.running() as service:
        await case.import_devices("a")
        await case.until("watched")
        watched = await case.aged("watched")
        await _kill(service)
    async with case.running() as service:
        await case.until("watched")
        assert abs(case.seen[-1][1] - watched) < SAME_S
        await case.device.stop()
        await case.until("offline")
        offline = await case.aged("offline")
        await _kill(service)
    async with case.running():
        await case.until("offline")
        assert abs(case.seen[-1][1] - offline) < SAME_S
        events = (await case.get("/v1/events?device=a&kind=verdict"))["items"]
    told = [event["kind"].partition(".")[2] for event in events]
    assert [state for state in told if state in ("watched", "offline")] == ["watched", "offline"]

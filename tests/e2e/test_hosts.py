"""The pressure of a host: from the kernel through a real agent to the list of hosts, and to relief."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from servers.replica import ControlPlane
from tests.agent.world import World, a_world
from tests.schedulers.conftest import directory

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api { listen = "127.0.0.1:{port}" }
local { directory = "AGENTS" }
agent_class "default" {
  beat = "1s"
  probe "tcp" { port = DEVICE }
}
relief {
  signal "memory" {
    high = 0.99
    low  = 0.98
  }
  looks = 1
}
"""


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A device."""
    async with a_world(tmp_path) as it:
        yield it


@pytest.mark.slow_because("starts a control plane and an agent")
async def test_a_real_agent_reports_the_pressure_of_its_host(
    world: World, tmp_path: Path, directory: Path
) -> None:
    """The agent of a registered device is asked, and the host is listed with its pressure, in the metrics, and in the
    status of relief as calm. With a kernel that does not measure it, the host is listed with the reason."""
    config = CONFIG.replace("AGENTS", str(directory)).replace("DEVICE", str(world.device.port))
    async with ControlPlane(tmp_path, "plane", config) as plane:
        await plane.register("pump-7")

        def is_read(answer: Any) -> bool:
            return any(item["pressure"] or item["unreadable"] for item in answer["items"])

        answer = await plane.until("/v1/hosts", is_read, 90.0)
        (item,) = answer["items"]
        if not Path("/proc/pressure/io").exists():
            assert item["unreadable"]
            return
        assert (item["agents"], item["state"], item["unreadable"]) == (1, "open", "")
        assert item["pressure"].keys() == {"cpu", "memory", "io"}
        assert all(0 <= one["avg60"] <= 100 for one in item["pressure"].values())

        def is_calm(status: Any) -> bool:
            return bool(status["relief"]["calm"] == 1)

        status = await plane.until("/v1/status", is_calm, 60.0)
        assert status["relief"] == {
            "dry_run": True, "overloaded": [], "calm": 1, "moving": 0, "waits": "",
        }  # fmt: skip

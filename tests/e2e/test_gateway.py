"""Twelve devices behind one killed gateway: one anomaly, reported once, and no device is repaired
for it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.demo.process import Process, clean_environment, free_port
from servers.consul import ConsulServer
from servers.replica import ControlPlane
from tests import forwarding
from tests.agent.receiver import Receiver
from tests.agent.world import OK, Listener, says, until
from tests.schedulers.conftest import directory

__all__ = ["directory"]

pytestmark = pytest.mark.servers

MANY = 12
SOON_S = 90.0
GATEWAY = "127.0.1.100"
CONFIG = """\
data_dir = "{root}"
api { listen = "127.0.0.1:{port}" }
local { directory = "AGENTS" }
consul {
  agent_address = "CONSUL"
  prefix        = "PREFIX"
  service       = "PREFIX"
}
agent_class "default" {
  beat = "1s"
  probe "http" {
    port     = PORT
    interval = "500ms"
    timeout  = "400ms"
    misses   = 2
  }
  confirm "tcp" { port = PORT }
  gateway {
    address = "GATEWAY"
    kind    = "tcp"
    port    = PORT
  }
  repair "command" {
    command = ["touch", "{root}/repaired"]
  }
  escalate {
    by     = ["gateway"]
    gather = "6s"
    sink "webhook" { url = "RECEIVER" }
  }
}
"""


class Behind:
    """The gateway's process and the devices behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.devices = []
        for number in range(MANY):
            device = Listener(says(OK))
            device.host, device.port = f"127.0.2.{number + 1}", self.port
            self.devices.append(device)
        self.gateway: Process | None = None

    async def open(self) -> None:
        """Start the gateway, and wait until it forwards connections."""
        argv = [sys.executable, "-P", forwarding.__file__, str(self.port), str(MANY)]
        self.gateway = Process.start(argv, log=self.folder / "gateway.log", env=clean_environment())

        async def there() -> bool:
            try:
                _, writer = await asyncio.open_connection(GATEWAY, self.port)
            except OSError:
                return False
            writer.close()
            return True

        await until(there, "the gateway", SOON_S)


@pytest.mark.slow_because(
    "twelve agents find their gateway dead, then alive, then a device dead; and a wait for what must not happen"
)
async def test_twelve_agents_behind_a_killed_gateway(
    tmp_path: Path, directory: Path, consul: ConsulServer
) -> None:
    """The gateway of twelve watched devices gets kill -9: one alert names the gateway and all
    twelve, the control plane opens one incident, and no device is called offline or repaired. Once
    the gateway is back, all of that ends. A device that dies then is repaired, so the repair steps
    were available."""
    receiver = Receiver()
    behind = Behind(tmp_path)
    names = [f"pump-{number + 1}" for number in range(MANY)]
    words = {
        "AGENTS": str(directory),
        "CONSUL": consul.http_addr,
        "PREFIX": f"gateway-{behind.port}",
        "GATEWAY": GATEWAY,
        "RECEIVER": f"http://127.0.0.1:{receiver.port}",
        "PORT": str(behind.port),
    }
    config = CONFIG
    for name, value in words.items():
        config = config.replace(name, value)

    async with ControlPlane(tmp_path, "plane", config) as plane:
        repaired = plane.root / "repaired"

        async def verdicts() -> dict[str, str]:
            found = await plane.call("GET", "/v1/devices")
            return {one["id"]: one["verdict"] for one in found["items"]}

        async def all_are(verdict: str) -> bool:
            return await verdicts() == dict.fromkeys(names, verdict)

        try:
            await receiver.start()
            for device in behind.devices:
                await device.start()
            await behind.open()
            assert behind.gateway is not None
            for number, name in enumerate(names):
                await plane.register(name, address=f"127.0.1.{number + 1}")
            await until(lambda: all_are("watched"), "all are watched", SOON_S)

            await behind.gateway.kill()
            await until(lambda: receiver.delivered, "an alert", SOON_S)
            (alert,) = receiver.delivered
            assert (alert["status"], alert["kind"], alert["count"]) == ("firing", "gateway", MANY)
            assert alert["group"] == ["gateway", GATEWAY]
            assert {one for one, _ in alert["devices"]} == set(names)
            await until(lambda: all_are("unwatched"), "all are unwatched", SOON_S)
            shown = await plane.call("GET", "/v1/devices/pump-7")
            assert f"gateway {GATEWAY} does not answer" in shown["reason"]

            async def incidents() -> list[dict[str, Any]]:
                return (await plane.call("GET", "/v1/incidents"))["items"]

            (incident,) = await until(incidents, "an incident", SOON_S)
            assert (incident["kind"], incident["group"]) == ("gateway", GATEWAY)
            assert incident["count"] == MANY
            await asyncio.sleep(5.0)
            assert len(receiver.attempts) == 1
            assert not repaired.exists()

            await behind.open()
            await until(lambda: all_are("watched"), "all are watched again", SOON_S)
            await until(lambda: receiver.told("resolved"), "the end of the alert", SOON_S)
            assert {one["key"] for one in receiver.told("resolved")} == {
                f"{alert['episode']}.resolved"
            }
            kinds = {one["kind"] for one in (await plane.call("GET", "/v1/events"))["items"]}
            assert "verdict.offline" not in kinds
            assert not [one for one in kinds if one.startswith("repair.")]

            await behind.devices[2].stop()
            await until(repaired.exists, "a repair of the one that died itself", SOON_S)
        finally:
            assert behind.gateway is not None
            await behind.gateway.kill()
            for device in behind.devices:
                await device.stop()
            await receiver.stop()

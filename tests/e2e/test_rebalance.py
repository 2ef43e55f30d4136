"""A node that is added to a real Nomad gets its share of the agents by `rebalance`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.demo.process import clean_environment
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.busy, pytest.mark.timeout(600)]

DEVICES = 12
WINDOW = 2
CONFIG = """\
backend  = "nomad"
resync   = "2s"
data_dir = "{root}"
registry {
  kind = "sqlite"
}
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address  = "NOMAD"
  strategy = "STRATEGY"
}
consul {
  agent_address = ""
}
rollout {
  at_once  = WINDOW
  fraction = 0.0
}
agent_class "default" {
  beat         = "1s"
  kill_timeout = "3s"
  variables = {
    python = "PYTHON"
  }
  probe "tcp" {
    port     = DEVICE
    interval = "3s"
    timeout  = "2s"
  }
}
"""


async def verb(plane: ControlPlane, *words: str) -> tuple[int, str, str]:
    """The result of a command: exit code and both outputs."""
    argv = [sys.executable, "-P", "-m", "nomad_watchdog", "--address", plane.api, *words]
    child = await asyncio.create_subprocess_exec(
        *argv,
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await child.communicate()
    assert child.returncode is not None
    return child.returncode, out.decode(), err.decode()


async def devices(plane: ControlPlane) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await plane.call("GET", "/v1/devices?limit=1000"))["items"]
    return found


async def counts(plane: ControlPlane) -> dict[str, int]:
    answer = await plane.call("GET", "/v1/rebalance")
    return {one["host"]: one["agents"] for one in answer["hosts"]}


async def set_eligible(nomad: NomadServer, name: str, eligibility: str) -> None:
    (node,) = [one for one in await nomad.request("GET", "/v1/nodes") if one["Name"] == name]
    path = f"/v1/node/{node['ID']}/eligibility"
    await nomad.request("POST", path, {"Eligibility": eligibility})


@pytest.mark.slow_because(
    "starts a Nomad with three clients and twelve agents, and moves four of them"
)
@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_a_new_node_is_filled(tmp_path: Path, strategy: str) -> None:
    """Twelve agents are on two nodes when a third one opens. `rebalance --wait` moves only as many as needed, each once,
    and no more at a time than the window. Then each node has four agents, and a second rebalance moves none."""
    device = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = device.sockets[0].getsockname()[1]
    async with device, NomadServer(tmp_path / "nomad", clients=3) as nomad:
        names = sorted(one["Name"] for one in await nomad.request("GET", "/v1/nodes"))
        await set_eligible(nomad, names[2], "ineligible")
        config = CONFIG
        for key, value in {
            "NOMAD": nomad.http_addr, "STRATEGY": strategy, "PYTHON": sys.executable,
            "WINDOW": str(WINDOW), "DEVICE": str(port),
        }.items():  # fmt: skip
            config = config.replace(key, value)
        async with ControlPlane(tmp_path, "plane", config) as plane:
            for number in range(DEVICES):
                await plane.register(f"d{number}")

            async def all_watched() -> bool:
                return {one["verdict"] for one in await devices(plane)} == {"watched"}

            await eventually(all_watched, 180.0)
            before = {one["id"]: one["epoch"] for one in await devices(plane)}
            await set_eligible(nomad, names[2], "eligible")

            async def is_open() -> bool:
                return names[2] in await counts(plane)

            await eventually(is_open)

            async def plan() -> Any:  # a device that is not well for a moment is left out
                code, out, _ = await verb(plane, "rebalance", "--dry-run", "-o", "json")
                assert code == 0
                found = json.loads(out)
                return found if {one["after"] for one in found["hosts"]} == {4} else None

            planned = await eventually(plan)

            waiting = asyncio.create_task(verb(plane, "rebalance", "--wait"))
            without: Counter[int] = Counter()
            while not waiting.done():
                without[sum(not one["instance"] for one in await devices(plane))] += 1
                await asyncio.sleep(0.2)
            code, out, err = await waiting
            assert (code, out) == (0, f"{planned['to_move']} devices move\n"), err
            assert err.splitlines()[-1] == "3 hosts have 4 to 4 agents each"
            assert max(without) <= WINDOW
            assert set((await counts(plane)).values()) == {4}
            moved = Counter(one["epoch"] - before[one["id"]] for one in await devices(plane))
            assert moved == {0: DEVICES - planned["to_move"], 1: planned["to_move"]}
            await eventually(all_watched, 60.0)
            assert (await verb(plane, "rebalance", "--wait"))[:2] == (0, "0 devices move\n")

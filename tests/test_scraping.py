"""The shipped configuration of Prometheus, on a real one: it finds the control plane and its agents."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import BRISK, open_stage
from servers.consul import ConsulServer
from servers.prometheus import PrometheusServer
from tests.agent.world import World, a_world
from tests.schedulers.conftest import eventually
from tests.test_alerts import RULES, rules

FILE = RULES.with_name("prometheus.yml")


def moved(consul: str, api: str, token: Path) -> dict[str, Any]:
    """The shipped file with the addresses, files and intervals of a test."""
    text = FILE.read_text().replace("127.0.0.1:8500", consul.removeprefix("http://"))
    text = text.replace("127.0.0.1:9670", api.removeprefix("http://"))
    text = text.replace("/etc/prometheus/nomad-watchdog.token", str(token))
    text = text.replace("60s", "1s").replace("15s", "1s")
    config = yaml.safe_load(text.replace("nomad-watchdog.rules.yml", str(RULES)))
    assert isinstance(config, dict)
    return config


async def agents_of(world: World, consul: ConsulServer) -> set[str]:
    """Two agents that are registered under the service's own name."""
    service = "device-watchdog-agent"
    started = [
        await world.started(device_id=f"cam-{n}", consul=consul.http_addr, service=service)
        for n in range(2)
    ]
    for n in range(2):
        await world.peer.saw("ready", device_id=f"cam-{n}", ready=True)
    return {agent.config["slug"] for agent in started}


@pytest.mark.servers
@pytest.mark.long
@pytest.mark.lasts(30)
async def test_the_control_plane_and_each_agent_are_scraped(tmp_path: Path) -> None:
    """The control plane with a token, each agent by its entry in Consul, named by its slug; all rules are loaded and
    evaluated without an error."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "token").write_text("secret-token-of-the-api")
    async with (
        ConsulServer(tmp_path / "consul") as consul,
        open_stage("local", tmp_path / "stage", free_port(), pace=BRISK) as stage,
        a_world(tmp_path) as world,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session,
    ):
        slugs = await agents_of(world, consul)
        config = moved(consul.http_addr, stage.api, tmp_path / "token")
        async with PrometheusServer(tmp_path / "prometheus", config=config) as prometheus:

            async def ask(path: str) -> Any:
                async with session.get(f"{prometheus.url}/api/v1/{path}") as answer:
                    return (await answer.json())["data"]

            async def up(job: str) -> set[str]:
                found = await ask(f'query?query=up{{job="{job}"}}==1')
                return {one["metric"]["instance"] for one in found["result"]}

            async def all_up() -> bool:
                planes, agents = await asyncio.gather(up("nomad-watchdog"), up("watchdog-agents"))
                return len(planes) == 1 and agents == slugs

            async def all_evaluated() -> bool:
                groups = (await ask("rules"))["groups"]
                alerts = [one for group in groups for one in group["rules"]]
                assert sum(one["type"] == "alerting" for one in alerts) == len(rules())
                assert all(not one.get("lastError") for one in alerts)
                return all(one["health"] == "ok" for one in alerts)

            await eventually(all_up, 60.0)
            await eventually(all_evaluated, 60.0)
            found = await ask("query?query=watchdog_agent_ready")
            assert {one["metric"]["instance"] for one in found["result"]} == slugs

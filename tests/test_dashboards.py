"""The Grafana dashboards of jobs/grafana: their form, and each of their queries on a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.devices import SimulatedFleet
from nomad_watchdog.demo.process import free_port
from nomad_watchdog.demo.stage import BRISK, open_stage
from nomad_watchdog.metrics import Metrics
from servers.prometheus import PrometheusServer
from tests.schedulers.conftest import eventually

FOLDER = Path(__file__).parents[1] / "jobs" / "grafana"
BOARDS = sorted(FOLDER.glob("*.json"))
COLUMNS = 24
DEVICES = 5
NONE_HERE = (
    "nomad_watchdog_pool_",
    "nomad_watchdog_host_pressure_ratio",
    "nomad_watchdog_host_usage_ratio",
)
"""Metrics whose series begin with the first pool or reading."""


def board(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def queries() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and expression of each query."""
    for path in BOARDS:
        for panel in board(path)["panels"]:
            for target in panel["targets"]:
                yield path.stem, panel["title"], target["expr"]


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_dashboard_can_be_provisioned(path: Path) -> None:
    """It has an ID and a title of its own, a variable for the data source and one for the job and none for devices,
    links to the others, and panels that do not overlap and say what they show."""
    found = board(path)
    assert found["uid"] == f"nomad-watchdog-{path.stem}"
    assert [one["name"] for one in found["templating"]["list"]] == ["datasource", "job"]
    assert found["links"][0]["tags"] == found["tags"] == ["nomad-watchdog"]
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= COLUMNS
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    ids = sorted(panel["id"] for panel in found["panels"])
    assert all(one < other for one, other in pairwise(ids))


def test_dashboards_ask_for_metrics_that_exist() -> None:
    """With labels and values that exist; every metric of docs/metrics.md is on a dashboard but for those of builds."""
    exposed = Metrics().render().decode()
    asked = set()
    for _, title, expression in queries():
        for name, selector in re.findall(r"(nomad_watchdog_\w+)\{([^}]*)\}", expression):
            family = name.removesuffix("_bucket")
            asked.add(family)
            assert f"# TYPE {family} " in exposed, (title, name)
            for label, operator, values in re.findall(r'(\w+)(!?=~?)"([^"]*)"', selector):
                series = re.findall(rf"^{name}\{{(.*)\}} ", exposed, re.MULTILINE)
                if label == "job" or name.startswith(NONE_HERE) or operator == "!=":
                    continue
                for value in values.split("|"):
                    assert any(f'{label}="{value}"' in one for one in series), (name, label, value)
    every = set(re.findall(r"^# TYPE (nomad_watchdog_\w+) ", exposed, re.MULTILINE))
    every = {name for name in every if not name.endswith("_created")}
    assert every - asked <= {"nomad_watchdog_resyncs_total", "nomad_watchdog_breaker_holds_total"}


@pytest.mark.servers
@pytest.mark.long
@pytest.mark.lasts(30)
async def test_each_query_has_an_answer_on_a_real_prometheus(tmp_path: Path) -> None:
    """A real control plane with five watched devices is scraped; the numbers are those of the fleet."""
    fleet = SimulatedFleet(port=free_port())
    (tmp_path / "stage").mkdir()
    try:
        async with (
            open_stage("local", tmp_path / "stage", fleet.port, pace=BRISK) as stage,
            PrometheusServer(
                tmp_path / "prometheus", [stage.api.removeprefix("http://")]
            ) as prometheus,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10.0)) as session,
        ):
            names = [f"device-{n}" for n in range(DEVICES)]
            await stage.register({name: (await fleet.add(name)).address for name in names})

            async def ask(expression: str) -> list[Any]:
                query = expression.replace("$job", "test").replace("$__rate_interval", "10s")
                url = f"{prometheus.url}/api/v1/query"
                async with session.post(url, data={"query": query}) as answer:
                    body = await answer.json()
                assert body["status"] == "success", (expression, body)
                return [float(one["value"][1]) for one in body["data"]["result"]]

            by_title = {(name, title): expr for name, title, expr in reversed(list(queries()))}
            watched = by_title["fleet", "Share of devices that are watched"]
            await eventually(lambda: _equals(ask(watched), [1.0]), 60.0)
            assert await ask(by_title["fleet", "Devices"]) == [DEVICES]
            assert await ask(by_title["fleet", "Offline"]) == [0.0]
            assert await ask(by_title["control-plane", "Replicas"]) == [1.0]
            assert await ask("nomad_watchdog_shards_held") == [1.0]
            assert await ask(by_title["control-plane", "Shards without a holder"]) == [0.0]
            wanted = [expr for _, _, expr in queries() if not any(n in expr for n in NONE_HERE)]

            async def all_answered() -> bool:  # a rate needs two scrapes
                return all(await asyncio.gather(*map(ask, wanted)))

            await eventually(all_answered, 60.0)
    finally:
        await fleet.close()


async def _equals(asked: Any, wanted: list[float]) -> bool:
    return bool(await asked == wanted)

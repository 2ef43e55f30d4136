"""What an agent exposes: metrics in two formats, its history, and probes on demand."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from prometheus_client import openmetrics, parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parsed
from watchdog_agent.reporting.openmetrics import converted, wanted

from tests.agent.world import Agent, World, until

assert openmetrics
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


async def ask(agent: Agent, method: str, path: str, *headers: str) -> tuple[int, str, str]:
    """(status, head, body) of one request."""
    listen = json.loads((agent.folder / "agent.json").read_text())["listen"]
    host, _, port = listen.rpartition(":")
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]
            writer.write("\r\n".join(lines).encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    return int(head.split()[1]), head.decode(), body.decode()


async def test_openmetrics_for_who_asks_and_text_for_others(world: World) -> None:
    """A request like that of Prometheus gets OpenMetrics that its strict parser accepts, with the same samples as the
    text that other clients get."""
    agent = await world.started()
    await world.peer.saw("ready", ready=True)
    _, head, body = await ask(agent, "GET", "/metrics", f"Accept: {PROMETHEUS}")
    assert "application/openmetrics-text; version=1.0.0" in head
    assert body.endswith("# EOF\n")
    modern = {sample.name for family in parsed(body) for sample in family.samples}
    _, head, body = await ask(agent, "GET", "/metrics")
    assert "text/plain; version=0.0.4" in head
    families = parser.text_string_to_metric_families(body)
    assert modern == {sample.name for family in families for sample in family.samples}
    assert "watchdog_agent_probes_total" in modern


@pytest.mark.parametrize(
    ("accept", "is_wanted"),
    [
        (PROMETHEUS, True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; q=0.001", True),
        ("application/openmetrics-text;q=0, text/plain", False),
        ("application/openmetrics-text;q=0.000", False),
        ("text/plain, application/x-openmetrics-text", False),
        ("", False),
    ],
)
def test_accept_is_read_as_http_means_it(accept: str, is_wanted: bool) -> None:
    """OpenMetrics is served where Accept names it, unless with the weight 0."""
    assert wanted(accept) is is_wanted


def test_only_counters_lose_their_suffix() -> None:
    """A gauge whose name ends in _total keeps it; a counter's family loses the suffix, its sample does not."""
    text = (
        b"# HELP a_total A.\n# TYPE a_total counter\na_total 1\n# TYPE b_total gauge\nb_total 2\n"
    )
    assert converted(text).decode().splitlines() == [
        "# HELP a A.",
        "# TYPE a counter",
        "a_total 1",
        "# TYPE b_total gauge",
        "b_total 2",
        "# EOF",
    ]


async def test_status_remembers_the_changes_of_state(world: World) -> None:
    """/status lists the states in their order with time and reason, and at most 32."""
    agent = await world.started()
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await agent.is_in("offline", state="offline")
    await world.device.start()
    status = await agent.is_in("ok again", state="ok")
    told = status["history"]
    assert [one["state"] for one in told][-3:] == ["suspect", "offline", "ok"]
    assert "connection refused" in told[-2]["reason"]
    assert [one["at"] for one in told] == sorted(one["at"] for one in told)
    assert len(told) <= 32


async def test_probes_on_demand_show_and_do_not_convict(world: World) -> None:
    """POST /probe runs each probe and confirmation once; the results are displayed, and do not count as misses."""
    slow = {"interval_s": 60.0}
    agent = await world.started(probes=[{"kind": "tcp", "port": world.device.port, **slow}])
    await world.peer.saw("ready", ready=True)
    assert (await ask(agent, "GET", "/probe"))[0] == 404
    await world.device.stop()
    status, _, body = await ask(agent, "POST", "/probe")
    assert (status, json.loads(body)["run"]) == (202, 1)

    async def done() -> Any:
        told = json.loads((await ask(agent, "GET", "/probe"))[2])
        return told["done"] and told

    told = await until(done, "both results")
    assert [one["ok"] for one in told["results"]] == [False, False]
    assert all("refused" in one["reason"] for one in told["results"])
    assert (await agent.status())["misses"] == 0


async def test_asking_too_often_is_refused(world: World) -> None:
    """Of many simultaneous requests one is accepted per second, and the others get 429."""
    agent = await world.started()
    began = time.monotonic()
    answers = await asyncio.gather(*(ask(agent, "POST", "/probe") for _ in range(10)))
    most = 1 + int(time.monotonic() - began)
    taken = [status for status, _, _ in answers if status == 202]
    assert 1 <= len(taken) <= most
    assert {status for status, _, _ in answers} <= {202, 429}


async def test_post_is_for_probes_alone(world: World) -> None:
    """No other page accepts a POST."""
    agent = await world.started()
    for path in ("/healthz", "/metrics", "/status", "/"):
        assert (await ask(agent, "POST", path))[0] == 404

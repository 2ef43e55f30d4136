"""The pressure of hosts in the API: asked for, checked, and shown."""

from __future__ import annotations

from typing import Any

import pytest

from nomad_watchdog.api.hosts import list_hosts
from nomad_watchdog.api.routes import ROUTES
from nomad_watchdog.core.roles import Right
from nomad_watchdog.ids import parse_device_id, slug_of
from nomad_watchdog.model import Placement, PlacementState
from tests.api.conftest import ServedApi

STALL = {"avg10": 1.5, "avg60": 0}
FULL = {"cpu": STALL, "memory": {"avg10": 100, "avg60": 99.99}, "io": STALL}


async def report(api: ServedApi, pressure: object = None, node: str = "north") -> tuple[int, Any]:
    """Register a device with an agent on this node, and send a report of it."""
    slug = slug_of(parse_device_id("cam"))
    if slug not in api.fleet.placements:
        await api.ask("PUT", "/v1/devices/cam", json={"address": "127.0.0.1"})
        record = api.fleet.records[slug]
        api.fleet.placements[slug] = (
            Placement(
                slug, record.device.id, record.epoch, "default", "h", PlacementState.RUNNING, "r",
                ("i",), node,
            ),
        )  # fmt: skip
    body: dict[str, Any] = {"v": 1, "device_id": "cam", "epoch": api.fleet.records[slug].epoch}
    body |= {"instance": "i", "sequence": 1, "ready": True, "state": "ok", "was_ready": True}
    body |= {"misses": 0, "confirmed": False}
    if pressure is not None:
        body["pressure"] = pressure
    return await api.ask("POST", "/v1/agents/report", json=body)


async def test_an_answer_asks_and_the_reading_is_listed(served_api: ServedApi) -> None:
    """The answer to the report of a chosen agent asks for the pressure, and what it reports is in the list of hosts;
    before that it is null."""
    status, answer = await report(served_api)
    assert (status, answer["pressure"]) == (200, True)
    item = {"host": "north", "agents": 1, "state": "open", "unreadable": ""}
    item["usage"] = None
    empty = {**item, "pressure": None, "age_s": None}
    assert await served_api.ask("GET", "/v1/hosts") == (200, {"items": [empty]})
    assert (await report(served_api, {**FULL, "of_a_later_version": 1}))[0] == 200
    _, found = await served_api.ask("GET", "/v1/hosts")
    assert 0 <= found["items"][0].pop("age_s") < 60
    assert found == {"items": [{**item, "pressure": FULL}]}
    assert (await served_api.ask("GET", "/v1/hosts?x=1"))[0] == 400


async def test_a_reading_of_nothing_states_why(served_api: ServedApi) -> None:
    """A reason is cut and sanitised, is listed, and ends the request for the pressure."""
    _, answer = await report(served_api, {"unreadable": "no\x1b[2J" + "x" * 1_000})
    assert "pressure" not in answer
    _, found = await served_api.ask("GET", "/v1/hosts")
    assert found["items"][0]["unreadable"] == "no\ufffd[2J" + "x" * 194
    assert found["items"][0]["pressure"] is None


@pytest.mark.parametrize(
    "pressure",
    [
        {"cpu": {"avg10": 100.1, "avg60": 0}},
        {"io": {"avg10": 0, "avg60": -0.1}},
        {"memory": {"avg10": 1}},
        {"memory": {"avg10": "1", "avg60": 1}},
        {"memory": {"avg10": True, "avg60": 1}},
        {"cpu": [1, 2]},
        {"unreadable": 5},
        [],
        "x",
    ],
)
async def test_an_impossible_reading_is_rejected(served_api: ServedApi, pressure: object) -> None:
    """A report with a value that is not a percentage is answered 400, and nothing of it is stored."""
    assert (await report(served_api, pressure))[0] == 400
    assert served_api.fleet.pressures.hosts() == []


async def test_the_page_shows_hosts_escaped(served_api: ServedApi) -> None:
    """The name of a host, which is data from outside, is escaped on the page."""
    await report(served_api, node="<script>n</script>")
    await report(served_api, FULL)
    async with served_api.client.get(served_api.base + "/") as response:
        text = await response.text()
    assert "<script>" not in text
    assert "<bdi>&lt;script&gt;n&lt;/script&gt;</bdi>" in text
    assert "<td><bdi>100.0 % 100.0 %</bdi></td>" in text


def test_a_viewer_may_read_the_hosts() -> None:
    """The route needs no more than the right to read."""
    (route,) = [one for one in ROUTES if one.handler is list_hosts]
    assert route.right is Right.READ

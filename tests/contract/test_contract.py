"""Both sides follow docs/agent-contract.md, and old and new versions are compatible."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import pytest
import pytest_asyncio
from watchdog_agent import wire
from watchdog_agent.config import document as configuration

from nomad_watchdog.api.schemas import ReportIn
from nomad_watchdog.config.settings import Settings
from servers.replica import ControlPlane
from tests.agent.receiver import Receiver
from tests.agent.world import World, a_world, probe, until
from tests.schedulers.conftest import directory, pids_of

__all__ = ["directory"]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = HERE / "golden"
MINIMAL = HERE / "minimal_agent.py"
REPORTS = sorted(GOLDEN.glob("report-*.json"))
CONFIG = """\
data_dir = "{root}"
api { listen = "127.0.0.1:{port}" }
local { directory = "AGENTS" }
agent_class "default" {
  variables = { command = "COMMAND" }
  beat      = "1s"
  probe "tcp" { port = DEVICE }
}
"""
ESCALATING = """\
data_dir = "{root}"
api { listen = "127.0.0.1:{port}" }
local { directory = "AGENTS" }
agent_class "default" {
  beat = "1s"
  probe "tcp" {
    port     = DEVICE
    interval = "200ms"
    timeout  = "150ms"
  }
  confirm "http" { port = NOBODY }
  escalate {
    sink "webhook" { url = "http://127.0.0.1:RECEIVER" }
  }
}
"""


def schema(name: str) -> Any:
    return json.loads((ROOT / "agent" / "contract" / f"{name}.schema.json").read_text())


def golden(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@pytest_asyncio.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A device, and a peer in place of the API."""
    async with a_world(tmp_path) as it:
        yield it


def test_schemas_are_schemas() -> None:
    """Both files are valid JSON Schemas."""
    for name in ("report", "config"):
        jsonschema.Draft202012Validator.check_schema(schema(name))


async def test_what_the_agent_says_is_in_the_schema(world: World) -> None:
    """Every report of a real agent, including suspicion and its end, matches the schema and has no other fields."""
    agent = await world.started()
    await world.peer.saw("ok", ready=True)
    await world.device.stop()
    await world.peer.saw("offline", state="offline")
    await agent.signal(signal.SIGTERM)
    told = schema("report")
    assert world.peer.last["stopping"] is True
    for report in world.peer.reports:
        jsonschema.validate(report, told)
        assert report.keys() <= told["properties"].keys()


def test_what_the_control_plane_says_is_in_the_schema() -> None:
    """The document of a default class matches the schema and has no key that is not in it."""
    (spec,) = Settings().specs().values()
    document = wire.agent_config(
        dict(spec.agent_config),
        device_id="pump-7",
        slug="pump-7-abc",
        epoch=3,
        address="127.0.0.1",
        labels={"site": "a"},
    )
    jsonschema.validate(document, schema("config"))
    assert document.keys() <= schema("config")["properties"].keys()


def test_what_an_old_control_plane_wrote_is_a_document(tmp_path: Path) -> None:
    """The first release's document matches the schema, and today's agent accepts it with a later key."""
    document = golden("config-0.1.0")
    jsonschema.validate(document, schema("config"))
    checked = configuration.check({**document, "of_a_later_version": {"x": [1]}})
    assert (checked["epoch"], checked["probes"][0]["port"]) == (3, 80)


async def test_the_agent_of_today_works_from_an_old_document(world: World) -> None:
    """An agent with the first release's document, and a key of a later one, becomes ready and reports."""
    changed = {"api": [f"http://127.0.0.1:{world.peer.port}"], "probes": [probe(world.device.port)]}
    agent = world.agent()
    agent.config = {**golden("config-0.1.0"), **changed, "of_a_later_version": 1}
    await agent.start()
    await world.peer.saw("ready", ready=True, device_id="pump-7", epoch=3)


@pytest.mark.parametrize("file", REPORTS, ids=lambda file: file.stem)
def test_old_reports_are_taken(file: Path) -> None:
    """Reports of the first release and minimal reports are accepted, also with unknown keys."""
    said = json.loads(file.read_text())
    jsonschema.validate(said, schema("report"))
    plain = ReportIn.model_validate_json(file.read_bytes()).report()
    more = json.dumps({**said, "of_a_later_version": {"x": 1}})
    later = ReportIn.model_validate_json(more).report()
    assert plain == later
    assert (plain.epoch, plain.instance, plain.sequence) == (3, "a1b2c3", said["sequence"])


def test_the_schema_and_the_door_want_the_same() -> None:
    """The API requires the fields that the schema requires, and knows every key of the schema."""
    fields = ReportIn.model_fields
    told = schema("report")
    assert {n for n, f in fields.items() if f.is_required()} == set(told["required"])
    assert fields.keys() == told["properties"].keys()


def test_the_page_names_what_the_code_names() -> None:
    """The page contains every environment variable and every exit code of `wire`."""
    page = (ROOT / "docs" / "agent-contract.md").read_text()
    names = set(re.findall(r"``((?:WATCHDOG|CONSUL)_[A-Z0-9_]+)``", str(wire.__doc__)))
    assert len(names) > 5
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []
    assert f"`{wire.DEPARTED}`" in page
    for code in (wire.EXIT_RETIRED, wire.EXIT_CONFIG, wire.EXIT_CRASH):
        assert f"\n| {code} |" in page


async def test_a_removed_device_ends_its_alert(
    world: World, tmp_path: Path, directory: Path
) -> None:
    """In a real control plane, an offline device's agent has alerted a receiver. When the device is removed, the
    receiver gets `resolved`, whether the agent learns of it first from its report or from a signal."""
    receiver = Receiver()
    await receiver.start()
    numbers = {
        "AGENTS": str(directory),
        "DEVICE": str(world.device.port),
        "NOBODY": str(world.dead_port),
        "RECEIVER": str(receiver.port),
    }
    config = ESCALATING
    for name, value in numbers.items():
        config = config.replace(name, value)
    try:
        async with ControlPlane(tmp_path, "plane", config) as plane:
            await plane.register("pump-7")
            await plane.until("/v1/devices/pump-7", lambda it: it["verdict"] == "watched", 60.0)
            await world.device.stop()
            await until(lambda: receiver.told("firing"), "an alert", 60.0)
            await plane.call("DELETE", "/v1/devices/pump-7")
            await until(lambda: receiver.told("resolved"), "its end", 60.0)
            await until(lambda: not pids_of(directory), "the agent's end", 60.0)
        (firing,), (resolved,) = receiver.told("firing"), receiver.told("resolved")
        assert resolved["episode"] == firing["episode"]
        assert resolved["devices"] == [["pump-7", "departed"]]
    finally:
        await receiver.stop()


async def test_a_refusal_says_whether_the_device_has_left(tmp_path: Path, directory: Path) -> None:
    """The control plane's 410 contains `departed` for a device that was removed, and `refused` for an old epoch of a
    device that is still registered."""
    config = CONFIG.replace("COMMAND", '[\\"/bin/false\\"]').replace("AGENTS", str(directory))
    async with ControlPlane(tmp_path, "plane", config.replace("DEVICE", "9")) as plane:
        await plane.register("pump-7")
        shown = await plane.until("/v1/devices/pump-7", lambda it: it["epoch"] >= 1, 60.0)

        async def told(epoch: int) -> tuple[int, str]:
            report = {**golden("report-least"), "device_id": "pump-7", "epoch": epoch}
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{plane.api}{wire.REPORT_PATH}", json=report) as answer,
            ):
                return answer.status, (await answer.json())["error"]["code"]

        assert await told(shown["epoch"] - 1) == (410, "refused")
        await plane.call("DELETE", "/v1/devices/pump-7")

        async def departed() -> bool:
            return await told(shown["epoch"]) == (410, wire.DEPARTED)

        await until(departed, "the word that the device has left", 60.0)


async def test_minimal_agent_obeys_a_410(world: World, tmp_path: Path) -> None:
    """An agent written from the page exits with 0 when its report is answered 410."""
    world.peer.status = 410
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                **golden("config-0.1.0"),
                "api": [f"http://127.0.0.1:{world.peer.port}"],
                "probes": [{"kind": "tcp", "port": world.device.port}],
            }
        )
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(MINIMAL),
        env={"WATCHDOG_CONFIG": str(config), "WATCHDOG_INSTANCE": "one"},
    )
    assert await asyncio.wait_for(process.wait(), 20.0) == 0


async def test_minimal_agent_serves_in_a_real_control_plane(
    world: World, tmp_path: Path, directory: Path
) -> None:
    """An agent of under 80 lines, written from the page, watches its device, and stops when asked to."""
    assert len(MINIMAL.read_text().splitlines()) <= 80
    command = json.dumps([sys.executable, str(MINIMAL)]).replace('"', '\\"')
    config = CONFIG.replace("COMMAND", command).replace("AGENTS", str(directory))
    config = config.replace("DEVICE", str(world.device.port))
    async with ControlPlane(tmp_path, "plane", config) as plane:
        devices = {"devices": [{"id": "pump-7", "address": "127.0.0.1"}]}
        await plane.call("POST", "/v1/devices:bulk", devices)
        await plane.until("/v1/devices/pump-7", lambda it: it["verdict"] == "watched", 60.0)
        (pid,) = pids_of(directory)
        os.kill(pid, signal.SIGKILL)

        async def again() -> bool:
            return len(found := pids_of(directory)) == 1 and found != {pid}

        await until(again, "a new process after a kill", 60.0)
        await plane.until("/v1/devices/pump-7", lambda it: it["verdict"] == "watched", 60.0)
        await plane.call("DELETE", "/v1/devices/pump-7")
        await until(lambda: not pids_of(directory), "its end", 60.0)

"""W4: the configuration is reloaded while the program runs: real processes, signals and files."""

from __future__ import annotations

import asyncio
import configparser
import json
import shlex
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.cli.main import VERBS
from tests.e2e.test_program import Program
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

UNIT = Path(__file__).parents[2] / "jobs" / "systemd" / "nomad-watchdog.service"


@pytest.fixture
def program(tmp_path: Path, directory: Path) -> Program:
    """The program; `directory` stops the agents that it leaves running."""
    return Program(tmp_path)


def edit(program: Program, old: str, new: str) -> None:
    """Change the configuration file, by renaming a new one over it like an editor."""
    text = program.file.read_text()
    assert old in text
    fresh = program.file.with_suffix(".new")
    fresh.write_text(text.replace(old, new))
    fresh.rename(program.file)


async def events_of(program: Program, kind: str) -> list[Any]:
    return list((await program.get(f"/v1/events?kind={kind}"))["items"])


async def config_of(program: Program) -> Any:
    return (await program.get("/v1/status"))["config"]


@pytest.mark.slow_because("starts the program and its agents twice")
async def test_w4_sighup_never_ends_the_program_and_reads_its_file(
    program: Program, directory: Path
) -> None:
    """Without TLS and without an inventory. An unchanged file changes nothing; a changed class
    replaces its agents and the change is described; a new inventory is followed. A change that
    needs a restart is named, and no longer once the file has the old value. SIGTERM still ends the
    program with 0."""
    async with program.running() as service:
        await program.import_devices("a", "b")
        await eventually(lambda: len(pids_of(directory)) == 2)
        before = pids_of(directory)
        service.send_signal(signal.SIGHUP)

        async def reloaded() -> Any:
            return (await config_of(program))["reloaded_s"] is not None

        await eventually(reloaded)
        assert not await events_of(program, "config")
        assert pids_of(directory) == before

        (program.root / "more.json").write_text('[{"id": "c", "address": "127.0.0.1"}]')
        edit(program, "data_dir", f'inventory = "{program.root}/more.json"\ndata_dir')
        edit(program, 'probe "tcp" { port = 80 }', 'probe "tcp" {\n port = 80\n interval = "9s"\n}')
        edit(program, "data_dir", 'shards = 4\nlog { level = "debug" }\ndata_dir')
        service.send_signal(signal.SIGHUP)

        async def replaced() -> Any:
            now = pids_of(directory)
            return len(now) == 3 and not now & before

        await eventually(replaced, 60.0)
        (told,) = await events_of(program, "config.reloaded")
        assert told["data"]["changed"] == [
            "agent_class.default.probe.tcp.interval 5s → 9s",
            f"inventory unset → {program.root}/more.json",
            "log.level info → debug",
        ]
        assert told["data"]["needs_restart"] == ["shards 1 → 4"]
        assert (await config_of(program))["needs_restart"] == ["shards 1 → 4"]
        reasons = {one["text"] for one in await events_of(program, "plan.replace")}
        assert reasons == {
            "agent runs an old version of class `default` (probe.tcp.interval 5s → 9s)"
        }
        edit(program, "shards = 4", "shards = 1")
        service.send_signal(signal.SIGHUP)

        async def settled() -> Any:
            return (await config_of(program))["needs_restart"] == []

        await eventually(settled)
        service.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.wait(), 20.0) == 0


@pytest.mark.slow_because("starts the program and its agents")
async def test_w4_an_invalid_file_changes_nothing_and_is_reported(
    program: Program, directory: Path
) -> None:
    """An invalid file is reported with its line by log, event, metric, status and the API's answer;
    the fixed file is loaded."""
    async with program.running() as service:
        await program.import_devices("a")
        await eventually(lambda: len(pids_of(directory)) == 1)
        before = pids_of(directory)
        edit(program, "port = 80", 'port = 80\n interval = "never"')
        service.send_signal(signal.SIGHUP)

        async def rejected() -> Any:
            return (await config_of(program))["problem"]

        problem = await eventually(rejected)
        assert "interval" in problem
        assert str(program.file) in problem
        (told,) = await events_of(program, "config.rejected")
        assert "interval" in told["text"]
        assert await metric(program, "nomad_watchdog_config_problem") == 1.0
        with pytest.raises(AssertionError, match="interval"):
            await program.ask("POST", "/v1/config:reload")
        program.file.unlink()
        service.send_signal(signal.SIGHUP)

        async def gone() -> Any:
            return "No such file" in (await config_of(program))["problem"]

        await eventually(gone)
        assert pids_of(directory) == before
        fresh = Program(
            program.root
        )  # rewrites the file with another port, which requires a restart
        answer = await program.ask("POST", "/v1/config:reload")
        assert [one.partition(" ")[0] for one in answer["needs_restart"]] == ["api.listen"]
        assert str(fresh.port) in answer["needs_restart"][0]
        assert (await config_of(program))["problem"] == ""
        assert await metric(program, "nomad_watchdog_config_problem") == 0.0
        assert await metric(program, "nomad_watchdog_config_needs_restart") == 1.0
        assert pids_of(directory) == before


async def metric(program: Program, name: str) -> float:
    url = f"http://127.0.0.1:{program.port}/metrics"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        lines = (await answer.text()).splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


@pytest.mark.slow_because("starts the program, which imports for seconds")
async def test_w4_a_signal_before_the_service_is_up_is_not_lost(program: Program) -> None:
    """SIGHUP while the program starts does not end it, and the configuration is read once it is up;
    systemd is notified of the reload and of its end."""
    service = await program.start("run")
    try:
        # Imports are the longest part of a start: the signal is sent during them, repeatedly.
        async def is_up() -> bool:
            if "nomad_watchdog" in Path(f"/proc/{service.pid}/cmdline").read_text() and _ignores(
                service.pid
            ):
                service.send_signal(signal.SIGHUP)
            return await program.is_ready()

        await eventually(is_up, 60.0)

        async def reloaded() -> Any:
            return (await config_of(program))["reloaded_s"] is not None

        await eventually(reloaded)
        assert service.returncode is None
    finally:
        service.send_signal(signal.SIGTERM)
        await asyncio.wait_for(service.communicate(), 60.0)
    assert service.returncode == 0


def _ignores(pid: int) -> bool:
    """Whether the process ignores or handles SIGHUP, which it does from the moment the verb
    runs."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigIgn", "SigCgt"))]
    return any(mask & 1 << (signal.SIGHUP - 1) for mask in masks)


def test_w4_systemctl_reload_sends_the_signal() -> None:
    """The shipped unit runs an existing verb, waits for READY=1, and reloads by SIGHUP."""
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # systemd's names have capitals
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert shlex.split(service["ExecReload"]) == ["/bin/kill", "-HUP", "$MAINPID"]
    start = shlex.split(service["ExecStart"])
    assert Path(start[0]).name == "nomad-watchdog"
    assert start[-1] in VERBS
    assert json.loads(json.dumps(dict(unit["Install"])))["WantedBy"] == "multi-user.target"

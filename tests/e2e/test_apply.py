"""W3: `plan` shows a changed class as a roll-out, and `apply` performs it, with and without the
service."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_program import Program, _register
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

SHORT = 'agents {\n startup_grace = "8s"\n startup_grace_min = "5s"\n}'
NAMES = [f"d{number:02}" for number in range(12)]


class Patient(Program):
    """Its commands may take as long as a roll-out."""

    async def __call__(self, *argv: str) -> tuple[int, str, str]:
        process = await self.start(*argv)
        try:
            out, err = await asyncio.wait_for(process.communicate(), 170.0)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()


@pytest.fixture
def program(tmp_path: Path, directory: Path) -> Program:
    """The program; `directory` stops the agents that it leaves running."""
    return Patient(tmp_path)


def change(program: Program, old: str, new: str) -> None:
    text = program.file.read_text()
    assert old in text
    program.file.write_text(text.replace(old, new))


async def plan_of(program: Program) -> tuple[int, Any, str]:
    """Exit code of `plan --detailed-exitcode`, the plan as JSON, and as human-readable text."""
    code, out, err = await program("plan", "--detailed-exitcode")
    assert err == ""
    return code, await program.json("plan"), out


@pytest.mark.slow_because("replaces the agents of twelve devices in three windows, twice")
async def test_w3_without_the_service(program: Program, directory: Path) -> None:
    """Memory 96Mi → 80Mi: twelve to replace, five at a time, exit code 2. `apply` replaces them
    all, in windows, and then nothing is left to do. If the agents of a change do not run, `apply`
    exits 75 after the first window and names the waiting devices."""
    change(program, 'probe "tcp"', 'memory = "96Mi"\n  probe "tcp"')
    assert (await program("init"))[0] == 0
    await _register(program.root / "registry.db", *NAMES)
    assert (await program("apply", "--auto-approve"))[0] == 0
    await eventually(lambda: len(pids_of(directory)) == 12)
    before = pids_of(directory)
    assert (await program("plan", "--detailed-exitcode"))[0] == 0

    change(program, "96Mi", "80Mi")
    code, plan, text = await plan_of(program)
    assert code == 2
    assert "class default: 12 to replace (5 at a time): memory 96Mi → 80Mi" in text
    assert "0 to start, 12 to replace (5 at a time), 0 to retire" in text
    assert (len(plan["actions"]), plan["waiting_rollout"]) == (5, 7)
    assert {*plan["waiting"], *(one["device"] for one in plan["actions"])} == set(NAMES)
    assert f"7 more wait for a turn: {', '.join(plan['waiting'][:5])}, …" in text
    assert {action["reason"] for action in plan["actions"]} == {
        "agent runs an old version of class `default` (memory 96Mi → 80Mi)"
    }
    assert pids_of(directory) == before, "a plan changes nothing"

    code, out, err = await program("apply", "--auto-approve", "-o", "json")
    assert code == 0, err
    done = json.loads(out)
    assert done["summary"].startswith("0 to start, 12 to replace")
    assert done["outcomes"] == {"ok": 12}, "a replacement is one action"
    assert "0 done, 5 in progress, 7 waiting for their turn" in err
    after = pids_of(directory)
    assert (len(after), after & before) == (12, set())
    assert (await program("plan", "--detailed-exitcode"))[0] == 0

    change(program, '[\\"sleep\\", \\"600\\"]', '[\\"false\\"]')
    change(program, 'memory = "80Mi"', 'memory = "80Mi"\n  kill_timeout = "2s"')
    change(program, "api {", f"{SHORT}\napi {{")
    code, plan, text = await plan_of(program)
    changes = "kill_timeout 10s → 2s, variables.command changed"
    assert (code, plan["rollouts"][0]["changes"]) == (2, changes)
    code, _, err = await program("apply", "--auto-approve")
    assert (code, "no progress" in err, "d00" in err) == (75, True, True)
    assert len(pids_of(directory) & after) == 7, "the window is the most that a bad version costs"


@pytest.mark.slow_because("replaces the agents of twelve devices in three windows")
async def test_w3_with_the_service(program: Program, directory: Path) -> None:
    """The running service reloads its configuration and rolls the change out; `apply` returns when
    it is done. A probe's changed interval is shown, 5s → 10s. An invalid file changes nothing and
    exits 64."""
    change(program, 'probe "tcp"', 'kill_timeout = "2s"\n  probe "tcp"')
    # These agents never report: the service replaces one whose time for a report has passed.
    change(program, "api {", f"{SHORT}\napi {{")
    async with program.running():
        await program.import_devices(*NAMES)
        await eventually(lambda: len(pids_of(directory)) == 12)
        before = pids_of(directory)
        change(program, "port = 80", 'port = 80\n interval = "10s"\n')
        code, _, text = await plan_of(program)
        assert code == 2
        assert "12 to replace (5 at a time): probe.tcp.interval 5s → 10s" in text
        assert (await program.get("/v1/plan"))["actions"] == [], (
            "a service goes by the file it has read"
        )
        plan = program.root / "plan.json"
        plan.write_text((await program("plan", "-o", "json"))[1])
        code, out, err = await program("apply", str(plan), "--auto-approve")
        assert code == 0, err
        assert "ok: 12" in out
        assert re.search(
            r"^\d+ done, \d+ in progress, \d+ waiting for their turn$", err, re.MULTILINE
        )
        assert "without a running agent" not in err
        after = pids_of(directory)
        assert (len(after), after & before) == (12, set())
        told = await program.get("/v1/events?kind=config.reloaded")
        assert told["items"][0]["data"]["changed"] == [
            "agent_class.default.probe.tcp.interval 5s → 10s"
        ]
        assert (await program("plan", "--detailed-exitcode"))[0] == 0
        await program.import_devices("one more")
        change(program, '"10s"', '"11s"')
        code, _, err = await program("apply", str(plan), "--auto-approve")
        assert (code, "has moved" in err) == (75, True)
        change(program, '"11s"', '"never"')
        assert (await program("apply", "--auto-approve"))[0] == 64
        await eventually(lambda: len(pids_of(directory)) == 13)
        assert after < pids_of(directory)


@pytest.mark.slow_because("starts the program and three commands")
async def test_w3_a_service_with_another_file_is_not_overruled(
    program: Program, directory: Path
) -> None:
    """`apply` from a file that the service does not have changes nothing, exits 75 and names the
    class; if the service's API is not at the address in the file, that is reported too."""
    async with program.running():
        await program.import_devices("a")
        await eventually(lambda: len(pids_of(directory)) == 1)
        before = pids_of(directory)
        served = program.file
        program.file = program.root / "other.hcl"
        program.file.write_text(served.read_text().replace("port = 80", "port = 81"))
        code, _, err = await program("apply", "--auto-approve")
        assert (code, "another configuration of class default" in err) == (75, True)
        program.file.write_text(program.file.read_text().replace(str(program.port), "1"))
        code, _, err = await program("apply", "--auto-approve")
        assert (code, "is running" in err) == (75, True)
        assert pids_of(directory) == before


@pytest.mark.slow_because("starts the program and five commands")
async def test_a_class_that_cannot_be_prepared_holds_up_no_other(
    program: Program, directory: Path
) -> None:
    """With and without the service: the other class's agents are started and replaced, and `apply`
    names the wrong class and exits 64, even if there is nothing else to do. Once the class is
    fixed, everything is applied."""
    bad = 'agent_class "other" {\n  kill_timeout = "2s"\n  variables = { comand = "x" }\n  probe "tcp" { port = 81 }\n}\n'
    change(
        program, 'agent_class "default" {', f'{bad}agent_class "default" {{\n  kill_timeout = "2s"'
    )
    assert (await program("init"))[0] == 0
    await _register(program.root / "registry.db", "a")
    code, out, err = await program("apply", "--auto-approve")
    assert (code, "can't be prepared" in err, "other" in err) == (64, True, True), err
    assert "did you mean command?" in out
    before = pids_of(directory)
    assert len(before) == 1
    change(program, "api {", f"{SHORT}\napi {{")
    async with program.running():
        change(program, "port = 80", 'port = 80\n interval = "10s"\n')
        code, out, err = await program("apply", "--auto-approve")
        assert (code, "can't be prepared" in err) == (64, True), err
        assert "did you mean command?" in out
        assert len(pids_of(directory)) == 1
        assert not pids_of(directory) & before
        status = await program.get("/v1/status")
        assert status["unprepared_classes"].keys() == {"other"}
        assert status["config"]["problem"] == ""
        change(program, 'variables = { comand = "x" }', "")
        done = await program.ask("POST", "/v1/config:reload")
        assert done["unprepared_classes"] == {}
        assert (await program("apply", "--auto-approve"))[0] == 0

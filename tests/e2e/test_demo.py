"""The first command of a new user: it converges, reports it, and leaves nothing behind.

Each test takes as long as the steps that it runs: agents are probed and restarted in real time.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nomad_watchdog.demo.display import Show
from nomad_watchdog.demo.process import cache_folder, clean_environment
from tests.e2e.terminal import COLUMNS, ROWS, terminal

STEPS = 7
SCREEN = [
    r"20 devices appear: one agent ready per device",
    (
        r"an agent is killed with kill -9: restarted by the scheduler in the same placement, "
        r"pid \d+ \(was \d+\)"
    ),
    (
        r"a device is switched off and deregistered: its agent \(pid \d+\) shut down gracefully "
        r"and logged it"
    ),
    (
        r"a device stops responding: offline, two probes agree: http:\d+: connection refused; "
        r"tcp:\d+: connection refused"
    ),
    r"a device reboots: detected; the same agent watches it again",
    r"a new device is registered: watched after \d+\.\d s",
    r"the reconciler is killed and restarted: same verdicts, 0 actions, all 20 agents kept running",
]
"""The steps that the local demo prints, with words separated by single blanks."""


def environment(folder: Path, cache: Path) -> dict[str, str]:
    """Our environment, with temporary folders below `folder`, servers built in `cache`, and as if
    not run by make."""
    ours = {name: value for name, value in clean_environment().items() if name != "MAKELEVEL"}
    return {**ours, "TMPDIR": str(folder), "NOMAD_WATCHDOG_CACHE": str(cache)}


@asynccontextmanager
async def demo(tmp_path: Path, backend: str | None, *options: str) -> AsyncIterator[Process]:
    """The demo as a separate process, with its temporary folders below tmp_path."""
    chosen = ["--backend", backend] if backend else []
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", *chosen, "demo", *options,
        stdout=PIPE, stderr=PIPE, env=environment(tmp_path, cache_folder()),
    )  # fmt: skip
    try:
        yield child
    finally:
        if child.returncode is None:  # the test failed or was interrupted
            # if it were killed at once, its servers would stay
            with suppress(ProcessLookupError, TimeoutError):
                child.send_signal(signal.SIGINT)
                async with asyncio.timeout(60.0):
                    await child.communicate()
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def left_behind(folder: Path) -> list[Any]:
    """Processes that refer to the folder, and mounts and files below it."""
    needle = str(folder).encode()
    found: list[Any] = [path.name for path in folder.iterdir()]
    found += [line for line in Path("/proc/self/mounts").read_text().split() if str(folder) in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                # a forked agent has its nursery's command line and environment, and a log of its
                # own
                words += str([fd.readlink() for fd in (entry / "fd").iterdir()]).encode()
                # our own TMPDIR is not enough: pytest's children have it too
                if needle + b"/nomad-watchdog-demo-" in words:
                    found.append((entry.name, (entry / "cmdline").read_bytes()))
    return found


async def wait_for(child: Process, text: str, timeout_s: float = 60.0) -> None:
    """Wait until a printed line contains the text."""
    assert child.stdout is not None
    async with asyncio.timeout(timeout_s):
        while text not in (line := (await child.stdout.readline()).decode()):
            assert line, f"the demo ended before it printed {text!r}"


async def run_to_the_end(tmp_path: Path, backend: str | None, devices: int) -> Any:
    """Return the JSON result; check that each step was printed once to standard error."""
    async with (
        demo(tmp_path, backend, "--devices", str(devices), "-o", "json") as child,
        asyncio.timeout(170.0),
    ):
        out, err = await child.communicate()

    assert child.returncode == 0, err.decode()[-3000:]
    summary = json.loads(out)
    for step in summary["steps"]:
        line = f"{step['took_s']:.1f} s  {step['name']}: {step['detail']}"
        (printed,) = (one for one in err.decode().splitlines() if step["name"] in one)
        assert printed.startswith("ok ")
        assert printed.endswith(line)
    return summary


def story_height(summary: Any) -> int:
    """Number of lines that a run's steps take on a terminal of 80 columns."""
    show = Show()
    show.console = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS, height=ROWS)
    for step in summary["steps"]:
        show.done(step["name"], step["detail"], step["took_s"], converged=step["converged"])
    printed = show.console.file
    assert isinstance(printed, io.StringIO)
    return len(printed.getvalue().splitlines())


@pytest.mark.slow_because("plays the whole demo")
async def test_local_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """All seven steps converge without a server, and no process, file or mount is left."""
    summary = await run_to_the_end(tmp_path, "local", 20)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert (summary["backend"], summary["devices"]) == ("local", 20)
    assert left_behind(tmp_path) == []


@pytest.mark.servers
@pytest.mark.slow_because("plays the whole demo, with servers of its own")
async def test_nomad_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """The same on real Nomad and Consul, which the demo uses by default because both are built."""
    summary = await run_to_the_end(tmp_path, None, 20)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert (summary["backend"], summary["devices"]) == ("nomad", 20)
    assert story_height(summary) <= ROWS - 12  # number of lines printed around it
    assert left_behind(tmp_path) == []


@pytest.mark.servers
@pytest.mark.slow_because("plays the whole demo, with servers of its own")
async def test_kubernetes_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """The same on a real Kubernetes control plane: the agent runs from its pod's own spec, is
    probed as written there, restarted in place, and stopped by SIGTERM."""
    summary = await run_to_the_end(tmp_path, "kubernetes", 10)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert left_behind(tmp_path) == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path, and with the program at the same place as in a checkout."""
    with tempfile.TemporaryDirectory(prefix="wd-", dir="/tmp") as name:
        at = Path(name)
        (at / ".venv").symlink_to(sys.prefix)
        (at / "tmp").mkdir()
        yield at


def bare(folder: Path) -> dict[str, str]:
    """The environment of a new user: no server on PATH, and none was built."""
    return {**environment(folder / "tmp", folder / "cache"), "PATH": str(folder), "TERM": "xterm"}


@pytest.mark.slow_because("plays the whole demo")
def test_whole_story_stands_on_one_screen(folder: Path) -> None:
    """Without servers the demo runs locally. At the end its 80x24 terminal shows each step once,
    the result and the next steps; no word is cut, no line scrolled off or was wider."""
    with terminal([".venv/bin/nomad-watchdog", "demo"], cwd=folder, env=bare(folder)) as it:
        it.read()
        code = it.process.wait(10.0)

    assert code == 0, "\n".join(it.rows)
    assert (it.scrolled_off, it.widest <= COLUMNS) == (0, True)
    result = " ".join(rf"ok +\d+\.\d s {step}" for step in SCREEN)
    assert re.search(
        rf"^20 simulated devices on local processes, in \S+ {result} Every step converged in \d+\.\d s\. "
        r".*built once in about \d+ minutes: \.venv/bin/nomad-watchdog --backend nomad demo$",
        it.text,
    ), "\n".join(it.rows)
    for step in SCREEN:
        assert len(re.findall(step.partition(":")[0], it.text)) == 1
    assert left_behind(folder / "tmp") == []


@pytest.mark.slow_because("plays the whole demo, and runs five commands")
def test_kept_demo_takes_commands_until_ctrl_c(folder: Path) -> None:
    """With --keep everything still fits on the screen, the page answers, each printed command works
    when pasted into another terminal, and Ctrl-C ends the demo with 0 and leaves nothing behind."""
    env = bare(folder)
    argv = [".venv/bin/nomad-watchdog", "demo", "--keep"]
    with terminal(argv, cwd=folder, env=env) as it:
        it.read(until=lambda: "Press Ctrl-C" in it.text)
        assert (it.scrolled_off, it.widest <= COLUMNS) == (0, True), "\n".join(it.rows)
        for step in SCREEN:
            assert len(re.findall(step, it.text)) == 1, "\n".join(it.rows)

        (page,) = re.findall(r"Status page: (\S+)", it.text)
        with urllib.request.urlopen(page, timeout=10.0) as answer:
            assert "device-07" in answer.read().decode()
        pasted = [row for row in it.rows if row.startswith("  .venv/bin/nomad-watchdog ")]
        results = [
            subprocess.run(
                row, shell=True, check=False, cwd=folder, env=env, capture_output=True, timeout=30
            )
            for row in pasted
        ]
        assert [(r.returncode, r.stderr) for r in results] == [(0, b"")] * 5, results
        assert all(r.stdout for r in results)

        it.type(b"\x03")
        it.read()
        code = it.process.wait(20.0)

    assert code == 0, "\n".join(it.rows)
    assert left_behind(folder / "tmp") == []


def test_live_view_fits_the_terminal() -> None:
    """While 200 devices are starting, the view lists as many as fit, counts the others, and
    shortens a reason between words."""
    show = Show()
    show.console = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS, height=ROWS)
    for _ in range(13):  # lines above it during the last step
        show.line("printed")
    reason = "agent running, no report of it " * 5
    show.devices([{"id": f"d-{n}", "verdict": "starting", "reason": reason} for n in range(200)])
    show.running("200 devices appear")
    rows = show.console.render_lines(show._view(), pad=False)
    lines = ["".join(part.text for part in row) for row in rows]

    assert len(lines) + 13 <= ROWS, lines
    assert "devices: 200 starting" in lines
    named = [line for line in lines if line.startswith("  d-")]
    assert named, lines
    assert f"  and {200 - len(named)} more" in lines
    assert max(map(len, lines)) <= COLUMNS
    assert all(line.removesuffix(" ...").endswith(tuple(reason.split())) for line in named)


@pytest.mark.parametrize("moment", ["20 simulated devices", "agent ready", "switched off"])
@pytest.mark.slow_because("plays the demo up to the step that is interrupted")
async def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """Ctrl-C at any moment, twice in a row, ends with 130 within seconds and leaves nothing."""
    async with demo(tmp_path, "local") as child:
        await wait_for(child, moment)
        child.send_signal(signal.SIGINT)
        await asyncio.sleep(0.3)
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
        async with asyncio.timeout(20.0):
            await child.communicate()

    assert child.returncode == 130
    assert left_behind(tmp_path) == []


@pytest.mark.servers
@pytest.mark.slow_because("plays the demo's first step, with servers of its own")
async def test_ctrl_c_takes_the_servers_down(tmp_path: Path) -> None:
    """Ctrl-C while agents run on Nomad stops agents, Nomad and Consul."""
    async with demo(tmp_path, "nomad") as child:
        await wait_for(child, "agent ready", 90.0)
        child.send_signal(signal.SIGINT)
        async with asyncio.timeout(60.0):
            await child.communicate()

    assert child.returncode == 130
    assert left_behind(tmp_path) == []

"""The first command of a newcomer: it converges, says so, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.dev.process import clean_environment

STEPS = 7


@asynccontextmanager
async def demo(tmp_path: Path, backend: str, *options: str) -> AsyncIterator[Process]:
    """The demo as a process of its own, with its temporary folders below tmp_path."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", "--backend", backend, "demo", *options,
        stdout=PIPE, stderr=PIPE, env={**clean_environment(), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def left_behind(folder: Path) -> list[Any]:
    """Processes that name the folder, mounts and files below it."""
    needle = str(folder).encode()
    found: list[Any] = [path.name for path in folder.iterdir()]
    found += [line for line in Path("/proc/self/mounts").read_text().split() if str(folder) in line]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                # a forked agent has its nursery's of both, and the log that it writes for itself
                words += str([fd.readlink() for fd in (entry / "fd").iterdir()]).encode()
                # our own TMPDIR alone says nothing: pytest's children have it too
                if needle + b"/nomad-watchdog-demo-" in words:
                    found.append((entry.name, (entry / "cmdline").read_bytes()))
    return found


async def said(child: Process, text: str, timeout_s: float = 60.0) -> None:
    """Wait until a line on stderr holds text."""
    assert child.stderr is not None
    async with asyncio.timeout(timeout_s):
        while text not in (line := (await child.stderr.readline()).decode()):
            assert line, f"the demo ended before it said {text!r}"


async def run_to_the_end(tmp_path: Path, backend: str, devices: int) -> Any:
    async with (
        demo(tmp_path, backend, "--devices", str(devices), "-o", "json") as child,
        asyncio.timeout(170.0),
    ):
        out, err = await child.communicate()

    assert child.returncode == 0, err.decode()[-3000:]
    return json.loads(out)


async def test_local_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """All seven steps converge without a server, and no process, file or mount stays."""
    summary = await run_to_the_end(tmp_path, "local", 20)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert (summary["backend"], summary["devices"]) == ("local", 20)
    assert left_behind(tmp_path) == []


@pytest.mark.servers
async def test_nomad_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """The same on real Nomad and Consul."""
    summary = await run_to_the_end(tmp_path, "nomad", 20)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert left_behind(tmp_path) == []


@pytest.mark.servers
async def test_kubernetes_demo_converges_and_leaves_nothing(tmp_path: Path) -> None:
    """The same on a real Kubernetes control plane: the agent runs from its pod's own spec, is probed as
    written, restarted in place, and stopped by SIGTERM."""
    summary = await run_to_the_end(tmp_path, "kubernetes", 10)

    assert [step["converged"] for step in summary["steps"]] == [True] * STEPS
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("moment", ["starting the local", "agents ready", "a device vanishes"])
async def test_ctrl_c_leaves_nothing(tmp_path: Path, moment: str) -> None:
    """Ctrl-C at any moment, twice in a row, ends with 130 within seconds and leaves nothing."""
    async with demo(tmp_path, "local") as child:
        await said(child, moment)
        child.send_signal(signal.SIGINT)
        await asyncio.sleep(0.3)
        with suppress(ProcessLookupError):
            child.send_signal(signal.SIGINT)
        async with asyncio.timeout(20.0):
            await child.communicate()

    assert child.returncode == 130
    assert left_behind(tmp_path) == []


@pytest.mark.servers
async def test_ctrl_c_takes_the_servers_down(tmp_path: Path) -> None:
    """Ctrl-C while agents run on Nomad stops agents, Nomad and Consul."""
    async with demo(tmp_path, "nomad") as child:
        await said(child, "agents ready", 90.0)
        child.send_signal(signal.SIGINT)
        async with asyncio.timeout(60.0):
            await child.communicate()

    assert child.returncode == 130
    assert left_behind(tmp_path) == []

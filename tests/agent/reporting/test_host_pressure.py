"""The pressure of the host: read from the kernel, and only by agents that are asked for it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent.reporting import host_pressure

from nomad_watchdog.api.schemas import ReportIn
from tests.agent.world import AGENT, World, until

PLAIN = (
    "some avg10={} avg60={} avg300=0.00 total=1\nfull avg10=9.00 avg60=9.00 avg300=0.00 total=1\n"
)
SCHEMA = json.loads((AGENT / "contract" / "report.schema.json").read_text())


def a_folder(tmp_path: Path, **texts: str) -> str:
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return str(tmp_path)


@given(st.decimals(0, 100, places=2), st.decimals(0, 100, places=2))
def test_what_the_kernel_writes_is_read(short: Any, long: Any) -> None:
    """The line `some` of every value that the kernel can write is read as this value."""
    stall = host_pressure._some(PLAIN.format(short, long))
    assert stall == {"avg10": float(short), "avg60": float(long)}


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            ["some", "full", "avg10=", "avg60=", " ", "\n", "1", ".", "-", "1e9", "nan"]
        )
    ).map("".join)
)
def test_other_text_is_a_value_error_or_a_percentage(text: str) -> None:
    """Any text is rejected with a ValueError, or gives values from 0 to 100."""
    try:
        stall = host_pressure._some(text)
    except ValueError:
        return
    assert 0 <= stall["avg10"] <= 100
    assert 0 <= stall["avg60"] <= 100


def test_what_cannot_be_read_is_missing_and_the_reason_is_stated(tmp_path: Path) -> None:
    """A missing file and one with impossible values are missing in the reading, which states why; the control plane
    accepts the reading."""
    folder = a_folder(tmp_path, cpu=PLAIN.format("1.00", "2.00"), memory="full avg10=1 avg60=1\n")
    found = host_pressure.read(folder)
    assert found["cpu"] == {"avg10": 1.0, "avg60": 2.0}
    assert found.keys() == {"cpu", "unreadable"}
    assert found["unreadable"] == f"{folder}/io: No such file or directory"
    (tmp_path / "io").write_text(PLAIN.format("101.0", "2.00"))
    found = host_pressure.read(folder)
    assert found["unreadable"] == f"{folder}/io: avg10 is not from 0 to 100"
    report = {
        "device_id": "a",
        "instance": "i",
        "state": "ok",
        "pressure": found,
        "v": 1,
        "epoch": 1,
    }
    report |= {"sequence": 1, "ready": True, "was_ready": True, "misses": 0, "confirmed": False}
    jsonschema.validate(report, SCHEMA)
    pressure = ReportIn.model_validate_json(json.dumps(report)).report().pressure
    assert pressure is not None
    assert pressure.cpu is not None
    assert (pressure.cpu.avg60, pressure.memory) == (2.0, None)


def test_a_kernel_without_pressure_is_stated(tmp_path: Path) -> None:
    """Without the folder nothing is read, and the reason is stated."""
    found = host_pressure.read(str(tmp_path / "none"))
    assert found == {"unreadable": f"{tmp_path}/none/io: No such file or directory"}


async def test_only_an_agent_that_is_asked_reads_the_pressure(world: World) -> None:
    """A report contains the pressure from the first answer that asks for it to the first that does not. The module is
    imported only then."""
    script = f"""
import os, sys
sys.path.insert(0, {str(AGENT)!r})
from watchdog_agent.reporting import reporter
apply = reporter.Reporter._apply
def applied(self, body):
    apply(self, body)
    loaded = "watchdog_agent.reporting.host_pressure" in sys.modules
    with open({str(world.folder / "loaded")!r}, "a") as file:
        file.write(f"{{int(loaded)}}")
reporter.Reporter._apply = applied
from watchdog_agent import main
main.main()
"""
    await world.started(argv=[sys.executable, "-I", "-S", "-c", script])
    await until(lambda: len(world.peer.reports) > 3, "reports")
    assert not any("pressure" in one for one in world.peer.reports)
    assert "1" not in (world.folder / "loaded").read_text()
    world.peer.body = b'{"pressure": true}'
    report = await until(lambda: "pressure" in world.peer.last and world.peer.last, "pressure")
    jsonschema.validate(report, SCHEMA)
    measured = Path("/proc/pressure/io").exists()
    assert report["pressure"].keys() >= ({"cpu", "memory", "io"} if measured else {"unreadable"})
    world.peer.body = b"{}"
    await until(lambda: "pressure" not in world.peer.last, "no pressure")


async def test_a_buffered_report_has_the_pressure_of_when_it_is_sent(world: World) -> None:
    """Reports that were buffered while no answer came have a reading each: it was read when they were sent, so a
    report that was made before the agent was asked has one too."""
    await world.started(beat_s=600.0)
    await world.peer.saw("ok", state="ok")
    world.peer.status, world.peer.body = 503, b'{"pressure": true}'
    await world.device.stop()
    await until(lambda: world.peer.refused > 1, "refused reports")
    before = len(world.peer.reports)
    await asyncio.sleep(0)
    world.peer.status = 200
    await until(lambda: len(world.peer.reports) >= before + 2, "the buffered reports")
    assert "pressure" not in world.peer.reports[before]
    assert "pressure" in world.peer.reports[before + 1]

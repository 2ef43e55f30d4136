"""Presence with the real program and real processes: leases, short disconnects, files and
pauses."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.ids import DeviceId, slug_of
from tests.e2e.test_program import Program
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

TIMES = """
presence {
  grace          = "GRACE"
  flap_half_life = "3s"
}
"""


@pytest.fixture
def program(tmp_path: Path, directory: Path) -> Program:
    """The program with a short flap memory; `directory` stops the agents."""
    return Program(tmp_path)


def settings(program: Program, grace: str = "2s", more: str = "") -> None:
    text = TIMES.replace("GRACE", grace)
    program.file.write_text(program.file.read_text() + text + more)


def pids(directory: Path, name: str) -> set[int]:
    return pids_of(directory, slug_of(DeviceId(name)))


@pytest.mark.slow_because("a lease and a grace period pass in real time")
async def test_a_silent_device_leaves_and_a_heartbeat_brings_it_back(
    program: Program, directory: Path
) -> None:
    """A device that sends heartbeats stays. A silent one expires, loses its agent after the grace
    period, and has one again after one heartbeat."""
    settings(program)
    async with program.running():
        # concurrently: starting a program for each takes as long as their ttl on a busy machine
        wish = {"class": "default", "address": "127.0.0.1"}
        wishes = [{"id": name, "ttl": "3s", **wish} for name in ("silent", "beats")]
        body = {"devices": [*wishes, {"id": "forever", **wish}]}
        await program.ask("POST", "/v1/devices:bulk", body)

        async def silent_has_left() -> bool:
            await program.ask("POST", "/v1/heartbeats", {"ids": ["beats"]})
            found = await program.ask("GET", "/v1/devices/silent")
            return found["presence"] == "absent" and not pids(directory, "silent")

        await eventually(lambda: len(pids_of(directory)) == 3)
        await eventually(silent_has_left, 40.0)
        assert pids(directory, "forever")
        assert (await program.ask("GET", "/v1/devices/beats"))["presence"] == "present"
        events = (await program.json("explain", "silent"))["events"]
        assert "expired" in [event["kind"] for event in events]
        await program.ask("POST", "/v1/devices/silent/heartbeat")
        await eventually(lambda: pids(directory, "silent"), 60.0)


@pytest.mark.slow_because(
    "a downtime longer than a lease, and then a whole lease, pass in real time"
)
async def test_nobody_expires_for_a_restart_of_ours(program: Program, directory: Path) -> None:
    """After a downtime longer than the ttl the devices and their agents are still there, and they
    expire no sooner than a whole ttl after the new start."""
    settings(program, grace="0s")
    names = ["a", "b"]
    items = [{"id": name, "address": "127.0.0.1", "ttl": "4s"} for name in names]

    async def are_watched() -> bool:
        await program.ask("POST", "/v1/heartbeats", {"ids": names})
        return len(pids_of(directory)) == 2

    async with program.running() as service:
        await program.ask("POST", "/v1/devices:bulk", {"devices": items, "delete": []})
        await eventually(are_watched)
        service.kill()
        await service.wait()
    before = pids_of(directory)
    await asyncio.sleep(
        4.5
    )  # the downtime is what is tested: nothing happens that could be awaited
    assert pids_of(directory) == before
    started = time.time()
    async with program.running():
        await eventually(lambda: not pids_of(directory), 60.0)
        events = (await program.ask("GET", "/v1/events"))["items"]
        expired = [event["at"] for event in events if event["kind"] == "expired"]
        assert len(expired) == 2
        assert min(expired) >= started + 4.0


@pytest.mark.slow_because("leases of twelve devices pass in real time")
async def test_s7_too_many_silent_devices_are_held(program: Program, directory: Path) -> None:
    """Twelve of twelve devices go silent: none leaves, the hold is reported, a device that is
    registered again is no longer on hold, and the operator's approval releases only the displayed
    departures."""
    settings(program, grace="0s")
    async with program.running():
        names = [f"d{n}" for n in range(12)]
        items = [{"id": name, "address": "127.0.0.1", "ttl": "5s"} for name in names]
        await program.ask("POST", "/v1/devices:bulk", {"devices": items, "delete": []})

        async def held(count: int) -> Any:
            found = await program.ask("GET", "/v1/departures")
            return found["count"] == count and found

        await eventually(lambda: held(12), 60.0)
        await eventually(lambda: len(pids_of(directory)) == 12, 60.0)
        found = await program.json("departures", "ls")
        status = await program.json("status")
        assert status["departures"]["id"] == found["id"]
        assert found["id"] in (await program("explain", "d3"))[1]
        assert (await program("departures", "confirm", "0" * 12))[0] == 75
        back = {"address": "127.0.0.1", "ttl": "1h"}
        await program.ask("PUT", "/v1/devices/d3", back)
        fewer = await eventually(lambda: held(11), 60.0)
        assert (await program("departures", "confirm", found["id"]))[0] == 75
        code, _, err = await program("departures", "confirm", fewer["id"])
        assert code == 0, err
        # The stop limit needs a second read before it releases them; that takes no operator.
        await eventually(lambda: pids_of(directory) == pids(directory, "d3"), 60.0)
        gone = await program.json("departures", "ls")
        assert gone["count"] == 0


@pytest.mark.slow_because(
    "a device that flapped counts as steady after some half-lives of three seconds"
)
async def test_a_blink_costs_no_agent_and_flapping_is_held(
    program: Program, directory: Path
) -> None:
    """A device that disconnects and reconnects keeps its process. One that does so often is
    reported as flapping and is kept beyond the grace period, until it has settled as
    disconnected."""
    settings(program, grace="1s")
    device = {"id": "cam", "address": "127.0.0.1"}
    came = {"event": "connected", "device": device}
    left = {"event": "disconnected", "device": {"id": "cam"}}
    async with program.running():
        await program.ask("POST", "/v1/webhook", came)
        (pid,) = await eventually(lambda: pids(directory, "cam"))
        for _ in range(4):
            await program.ask("POST", "/v1/webhook", left)
            await program.ask("POST", "/v1/webhook", came)
        await program.ask("POST", "/v1/webhook", left)
        item = await program.ask("GET", "/v1/devices/cam")
        assert item["flapping"]
        assert pids(directory, "cam") == {pid}
        await eventually(lambda: not pids(directory, "cam"), 40.0)
        kinds = [e["kind"] for e in (await program.json("explain", "cam"))["events"]]
        assert kinds.index("steady") < kinds.index("plan.retire")
        assert kinds.count("plan.retire") == 1


@pytest.mark.slow_because("a device that a file lists no more leaves after a grace period")
async def test_an_inventory_is_followed_and_a_bad_file_changes_nothing(
    program: Program, directory: Path
) -> None:
    """Devices that a file lists are watched, and those no longer listed are not. Truncated, empty
    and missing files change nothing and are named; a device of the API is not taken over."""
    file, link = program.root / "real.json", program.root / "devices.json"
    file.write_text("")
    link.symlink_to(file)
    settings(program, more=f'inventory = ["{link}"]\n')

    def write(*names: str) -> None:
        lines = (json.dumps({"id": name, "address": "127.0.0.1"}) for name in names)
        new = program.root / f"new-{len(list(program.root.iterdir()))}.json"
        new.write_text("\n".join(lines))
        swap = program.root / "swap"
        swap.symlink_to(new)
        swap.replace(link)  # like configuration management tools

    async def inventory() -> Any:
        return (await program.ask("GET", "/v1/status"))["inventory"][0]

    async with program.running() as service:
        await eventually(lambda: _says(inventory, "problem"), 20.0)  # it lists no device yet
        await program("devices", "add", "mine", "--address", "127.0.0.1")
        write("a", "b", "c", "mine")
        await eventually(lambda: len(pids_of(directory)) == 4, 60.0)
        await eventually(lambda: _says(inventory, "conflicts"), 60.0)
        assert (await inventory())["conflicting"] == ["mine"]
        code, _, err = await program("devices", "rm", "a")
        assert (code, "inventory:" in err) == (64, True)

        write("a", "b", "mine")
        await eventually(lambda: not pids(directory, "c"), 60.0)
        before = pids_of(directory)
        for text in ("{", "", '{"id": "a"}'):
            bad = program.root / "bad.json"
            bad.write_text(text)
            swap = program.root / "swap"
            swap.symlink_to(bad)
            swap.replace(link)
            if text == "{":
                service.send_signal(signal.SIGHUP)
            await eventually(lambda: _says(inventory, "problem"), 60.0)
            assert pids_of(directory) == before
            write("a", "b", "mine")
            await eventually(lambda: _silent(inventory), 60.0)
        link.unlink()
        await eventually(lambda: _says(inventory, "problem"), 60.0)
        assert pids_of(directory) == before
        assert (await program.json("status"))["departures"]["held"] == 0


async def _says(ask_for: Any, field: str) -> bool:
    return bool((await ask_for())[field])


async def _silent(ask_for: Any) -> bool:
    return not (await ask_for())["problem"]


@pytest.mark.slow_because("starts ten agents, and the file is read again in real time")
async def test_s7_an_inventory_that_lost_most_of_its_lines_is_held(
    program: Program, directory: Path
) -> None:
    """Nine of ten lines vanish from a good file: no device leaves, and fixing the file ends the
    hold."""
    file = program.root / "devices.hcl"
    blocks = [f'device "d{n}" {{ address = "127.0.0.1" }}\n' for n in range(10)]
    file.write_text("".join(blocks))
    settings(program, more=f'inventory = "{file}"\n')
    async with program.running():
        await eventually(lambda: len(pids_of(directory)) == 10, 40.0)
        file.write_text(blocks[0])

        async def held(count: int) -> bool:
            return bool((await program.ask("GET", "/v1/departures"))["count"] == count)

        await eventually(lambda: held(9), 60.0)
        assert len(pids_of(directory)) == 10
        file.write_text("".join(blocks))
        await eventually(lambda: held(0), 60.0)
        assert len(pids_of(directory)) == 10


@pytest.mark.slow_because("starts the program a dozen times")
async def test_a_paused_device_is_left_alone_until_its_pause_ends(
    program: Program, directory: Path
) -> None:
    """A new device gets no agent and a removed one keeps its agent, even across a restart; once
    resumed, both get what was requested."""
    settings(program)
    async with program.running():
        await program("devices", "add", "old", "--address", "127.0.0.1", "--label", "site=a")
        kept = await eventually(lambda: pids(directory, "old"))
        code, _, err = await program("pause", "--selector", "site=a", "--reason", "new lens")
        assert code == 0, err
        await program("devices", "add", "new", "--address", "127.0.0.1", "--label", "site=a")
        assert (await program("devices", "rm", "old"))[0] == 0
        await program("devices", "add", "free", "--address", "127.0.0.1")
        await eventually(lambda: pids(directory, "free"))
        assert (await program.json("plan"))["actions"] == []
        told = await program.json("explain", "new")
        assert told["attendance"]["paused"]["reason"] == "new lens"
    async with program.running():
        assert (await program.json("status"))["paused"] == 2
        assert pids(directory, "old") == kept
        assert not pids(directory, "new")
        assert (await program("resume", "old"))[0] == 66
        assert (await program("resume", "--selector", "site=a"))[0] == 0
        await eventually(lambda: pids(directory, "new") and not pids(directory, "old"), 60.0)


@pytest.mark.slow_because("a pause of four seconds ends in real time")
async def test_a_pause_ends_by_itself(program: Program, directory: Path) -> None:
    """A device in a window of four seconds gets its agent without any action."""
    settings(program)
    async with program.running():
        window = await program.json("maintenance", "add", "--selector", "site=a", "--for", "4s")
        assert window["window"] is True
        body = {"address": "127.0.0.1", "labels": {"site": "a"}}
        await program.ask("PUT", "/v1/devices/cam", body)
        await eventually(lambda: pids(directory, "cam"), 60.0)
        assert (await program.json("maintenance", "ls"))["items"] == []

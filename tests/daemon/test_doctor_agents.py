"""How `doctor` reports the answers of running agents."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack

import pytest

from nomad_watchdog.daemon.doctor import agents as doctor_agents
from nomad_watchdog.demo.process import free_port
from tests.agent.world import Listener, says

REFUSED = "its reports are refused by http://10.0.0.5:9670 with 401: unknown credential"


def status(trouble: object) -> bytes:
    body = json.dumps({"reports": {"trouble": trouble}})
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@pytest.mark.parametrize("runs", [True, False])
async def test_agents_that_say_that_their_reports_are_refused_are_named(runs: bool) -> None:
    """Several agents answer, one of them with a problem; another does not answer, and one sends an invalid status. That
    is a failure, or a warning while no control plane runs that they could reach."""
    said = {"well": status(""), "refused": status(REFUSED), "odd": b"HTTP/1.1 200 OK\r\n\r\n[]"}
    async with AsyncExitStack() as stack:
        agents = {f"127.0.0.1:{free_port()}": "away"}
        for name, answer in said.items():
            listener = Listener(says(answer))
            await listener.start()
            stack.push_async_callback(listener.stop)
            agents[f"127.0.0.1:{listener.port}"] = name
        ((name, found, text, mend),) = await doctor_agents.checks(agents, runs=runs)
        assert (name, found) == ("agents asked", "fail" if runs else "warn")
        assert text == (
            f"2 of 4 agents answer here; the reports of 1 of them do not arrive: refused: {REFUSED}"
        )
        assert mend
        well = {listen: name for listen, name in agents.items() if name == "well"}
        assert await doctor_agents.checks(well, runs=runs) == [
            ("agents asked", "ok", "1 of 1 agents answer here; their reports arrive", "")
        ]
    assert await doctor_agents.checks({}, runs=runs) == []


async def test_only_so_many_are_asked_and_only_at_an_address() -> None:
    """A limited number of agents is queried; an address with a path, an invalid name or an invalid port is not."""
    many = {f"127.0.0.1:{free_port()}": str(number) for number in range(3)}
    listener = Listener(says(status("bad")))
    await listener.start()
    try:
        at = f"127.0.0.1:{listener.port}"
        claimed = (
            f"{at}/x?y=1#",
            f"{at}#:80",
            "a b:80",
            "127.0.0.1:99999",
            "127.0.0.1",
            ":",
            "x:y",
        )
        odd = dict.fromkeys(claimed, "odd")
        ((_, found, text, _),) = await doctor_agents.checks(many | odd, runs=True)
        assert (found, text) == ("ok", f"0 of {len(many) + len(odd)} agents answer here")
        first = {f"127.0.0.{n}:1": str(n) for n in range(1, doctor_agents.MAX_ASKED + 1)}
        ((_, _, text, _),) = await doctor_agents.checks(first | {at: "last"}, runs=True)
        assert text == f"0 of {doctor_agents.MAX_ASKED} agents answer here"
    finally:
        await listener.stop()


async def test_an_answer_in_two_segments_is_read_whole() -> None:
    """The data after the first segment belongs to the answer too."""
    answer = status(REFUSED)

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer[:-20])
        await writer.drain()
        for _ in range(100):  # the other side, on this loop, reads that
            await asyncio.sleep(0)
        writer.write(answer[-20:])
        await writer.drain()

    listener = Listener(speak)
    await listener.start()
    try:
        agents = {f"127.0.0.1:{listener.port}": "pump"}
        ((_, found, text, _),) = await doctor_agents.checks(agents, runs=True)
    finally:
        await listener.stop()
    assert (found, text.endswith(f"pump: {REFUSED}")) == ("fail", True)

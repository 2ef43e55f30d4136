"""One real agent process: its reports and pages as its device, its API and its own process change."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.demo.stage import began_to_shut_down
from nomad_watchdog.schedulers.agent_zipapp import build_agent
from tests.agent.world import OK, Agent, Listener, Peer, World, probe, says, silent, tcp, until


async def smoke(world: World, argv: list[str] | None = None) -> None:
    agent = await world.started(argv=argv)
    first = await world.peer.saw("first report", ready=True, state="ok")
    assert (first["device_id"], first["epoch"], first["was_ready"]) == ("pump-7", 3, True)
    assert first["instance"] == json.loads((agent.folder / "agent.json").read_text())["instance"]
    assert await agent.get("/healthz") == (200, "ok\n")
    assert (await agent.get("/ready"))[0] == 200
    assert (await agent.get("/nothing"))[0] == 404
    assert 'watchdog_agent_state{state="ok"} 1' in (await agent.get("/metrics"))[1]
    assert (await agent.status())["pid"] == agent.pid
    assert agent.log[0]["msg"] == "agent started"
    assert await agent.signal(signal.SIGTERM) == 128 + signal.SIGTERM
    assert world.peer.last["stopping"] is True


async def test_ready_first_report_and_pages(world: World) -> None:
    """A started agent becomes ready, reports it, serves its four pages, and sends a last report."""
    await smoke(world)


async def test_single_file_agent(world: World, tmp_path: Path) -> None:
    """The single-file agent does the same with an isolated Python that does not import site."""
    path = tmp_path / "agent.pyz"
    build_agent(path)
    await smoke(world, [sys.executable, "-I", "-S", str(path)])


async def test_ready_agent_is_small(world: World, tmp_path: Path) -> None:
    """A single-file agent that is ready and reporting uses at most 16 MB, and loads no IDNA tables."""
    build_agent(tmp_path / "agent.pyz")
    agent = await world.started(argv=[sys.executable, "-I", "-S", str(tmp_path / "agent.pyz")])
    await world.peer.saw("ready", ready=True)
    await until(lambda: len(world.peer.reports) > 3, "a few reports")
    assert agent.kilobytes("VmRSS") < 16_000
    assert "unicodedata" not in Path(f"/proc/{agent.pid}/maps").read_text()


async def test_device_goes_and_comes_back(world: World) -> None:
    """A device that stops answering is suspect, then offline with a confirmation, then ok when it is back."""
    await world.started()
    await world.peer.saw("ok", state="ok", ready=True)
    await world.device.stop()
    offline = await world.peer.saw("offline", state="offline")
    assert offline["confirmed"] is True
    assert offline["misses"] >= 3
    assert "connection refused" in offline["reason"]
    states = [r["state"] for r in world.peer.reports]
    assert "suspect" in states[: states.index("offline")]
    await world.device.start()
    back = await world.peer.saw("back", state="ok")
    assert (back["confirmed"], back["misses"]) == (False, 0)


async def test_an_answering_confirmation_prevents_offline(world: World) -> None:
    """While the confirmation answers, missed probes make a device degraded and never offline (S6)."""
    world.device.speak = says(OK)
    agent = await world.started(confirm=[tcp(world.peer.port)])
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(
        lambda: (
            "answers" in world.peer.last.get("reason", "") or world.peer.last.get("misses", 0) > 8
        ),
        "many misses",
    )
    assert "offline" not in [r["state"] for r in world.peer.reports]
    seen = await agent.status()
    assert seen["state"] == "degraded"
    assert seen["reason"].endswith(f"but tcp:{world.peer.port} answers")


async def test_never_answering_device_is_never_offline(world: World) -> None:
    """A device that never answered stays suspect however often it misses (S6)."""
    await world.device.stop()
    agent = await world.started()
    await world.peer.saw("suspect", state="suspect", was_ready=False)
    await until(lambda: world.peer.last["misses"] > 12, "12 misses")
    assert {r["state"] for r in world.peer.reports} <= {"ok", "suspect"}
    assert (await agent.status())["confirmed"] is False


async def test_two_probes_of_one_port_do_not_hide_each_other(world: World) -> None:
    """A failing probe is detected beside a working one of the same kind and port."""
    good = probe(world.device.port, path="/")
    bad = probe(world.device.port, path="/bad", expect_status=204)
    agent = await world.started(probes=[good, bad], confirm=[tcp(world.device.port)])
    await agent.is_in("degraded", state="degraded", was_ready=True)


async def test_probes_are_listed_in_the_order_of_the_configuration(world: World) -> None:
    """Whichever probe ends first, /status lists them in the order of the configuration."""
    world.device.speak = silent
    slow = probe(world.device.port, path="/slow")
    quick = [probe(world.peer.port, path="/quick"), tcp(world.peer.port, interval_s=0.1, misses=3)]
    agent = await world.started(probes=[slow, *quick])

    async def names() -> list[str]:
        return list((await agent.status())["probes"])

    async def all_three() -> bool:
        return len(await names()) == 3

    await until(all_three, "three results")
    assert [name.partition(":")[0] for name in await names()] == ["0", "1", "2"]


async def test_retires_on_410(world: World) -> None:
    """An agent that receives 410 exits with 0, and its log says that it shut down."""
    agent = await world.started()
    assert not began_to_shut_down((agent.folder / "log").read_text())
    world.peer.status = 410
    await world.device.stop()
    assert agent.process is not None
    assert await agent.process.wait(60.0) == 0
    assert began_to_shut_down((agent.folder / "log").read_text())


async def test_409_is_said_again(world: World) -> None:
    """A report answered with 409 is sent again after Retry-After until it is accepted."""
    world.peer.status, world.peer.headers = 409, "Retry-After: 1\r\n"
    await world.started()
    await until(lambda: world.peer.refused >= 1, "a refused report")
    world.peer.status = 200
    report = await world.peer.saw("accepted", ready=True)
    assert world.peer.reports[0]["sequence"] == 1
    assert report["dropped"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_with_everything_wedged(world: World, number: signal.Signals) -> None:
    """With a device and an API that accept and never answer, the agent still exits with 128+n within 3 s."""
    world.device.speak = silent
    world.peer.status = None
    agent = await world.started(
        probes=[probe(world.device.port, timeout_s=60.0)],
        consul=f"http://127.0.0.1:{world.peer.port}",
    )
    await until(lambda: len(world.device._tasks) >= 1, "a hanging probe")
    assert await agent.signal(number, 3.0) == 128 + number
    assert began_to_shut_down((agent.folder / "log").read_text())


async def test_api_away_then_back(world: World) -> None:
    """With the API down the agent keeps probing, drops what its buffer can't hold, and reports the last state when the
    API is back (L3)."""
    await world.peer.stop()
    flip = 0

    async def flaky(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal flip
        await reader.readuntil(b"\r\n\r\n")  # a confirmation only connects
        flip += 1
        writer.write(OK if flip % 2 else b"HTTP/1.1 500 X\r\n\r\n")

    world.device.speak = flaky
    agent = await world.started(
        probes=[probe(world.device.port, interval_s=0.05, misses=1)],
        confirm=[tcp(world.device.port)],
    )

    async def dropping() -> bool:
        return (await agent.status())["reports"]["dropped"] > 5

    await until(dropping, "drops", 60.0)
    world.device.speak = says(OK)
    await agent.is_in("ok", state="ok")
    await world.peer.start()

    def arrived() -> bool:
        last = world.peer.last
        return last.get("state") == "ok" and last["misses"] == 0 and last["dropped"] > 5

    await until(arrived, "the last state", 40.0)
    assert len(world.peer.reports) <= 66
    sequences = [r["sequence"] for r in world.peer.reports]
    assert sequences == sorted(set(sequences))


async def test_what_was_confirmed_while_nobody_was_heard_is_confirmed_anew(world: World) -> None:
    """An agent that lost its API together with its device claims nothing against the device when it reconnects: its
    buffered reports state "not confirmed", then it is in doubt, and only another confirmation counts (S6)."""
    agent = await world.started()
    await world.peer.saw("ok", state="ok", ready=True)
    await world.peer.stop()
    await world.device.stop()
    await agent.is_in("offline", state="offline", confirmed=True)
    heard = len(world.peer.reports)
    await world.peer.start()
    await until(lambda: any(r["confirmed"] for r in world.peer.reports[heard:]), "a claim", 40.0)
    since = world.peer.reports[heard:]
    states = [r["state"] for r in since[: [r["confirmed"] for r in since].index(True)]]
    assert "offline" in states
    assert states[-1] == "suspect"
    assert any("not heard" in r["reason"] for r in since if r["state"] == "suspect")


async def unanswered(agent: Agent, **wanted: Any) -> None:
    """Wait until the agent is in this state and one of its reports has failed."""

    async def check() -> bool:
        now = await agent.status()
        return now["reports"]["failed"] > 0 and wanted.items() <= now.items()

    await until(check, f"no answer and {wanted}")


async def test_a_confirmation_asked_for_while_nobody_was_heard_does_not_count(world: World) -> None:
    """If one round fails while the API is down, and the second is in flight when it is back, neither counts, and two
    more are required before a claim (S6)."""
    asked = 0
    answered = asyncio.Event()

    async def second_waits(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        if asked == 2:
            await answered.wait()

    second = Listener(second_waits)
    await second.start()
    try:
        agent = await world.started(confirm=[probe(second.port, timeout_s=60.0)])
        await world.peer.saw("ok", state="ok", ready=True)
        await world.peer.stop()
        await unanswered(agent)
        await world.device.stop()
        await until(lambda: asked == 2, "a second round")
        heard = len(world.peer.reports)
        await world.peer.start()
        # the second is sent when the answer to the first has been read
        await until(lambda: len(world.peer.reports) > heard + 1, "two reports", 40.0)
        missed = (await agent.status())["misses"]
        await until(lambda: world.peer.last["misses"] > missed, "another miss")
        answered.set()
        await world.peer.saw("offline", state="offline", confirmed=True)
        assert asked == 4
    finally:
        await second.stop()


async def test_what_was_confirmed_alone_is_no_claim_of_the_next_run(world: World) -> None:
    """Killed after it confirmed an outage without an answer from the API, an agent whose reports are answered from its
    start on begins with "suspect" (S6)."""
    agent = await world.started()
    await world.peer.saw("ok", state="ok", ready=True)
    world.peer.status = None
    await world.device.stop()
    await unanswered(agent, state="offline", confirmed=True)
    assert agent.process is not None
    await agent.process.kill()
    world.peer.status = 200
    heard = len(world.peer.reports)
    await agent.start()
    await until(lambda: len(world.peer.reports) > heard, "a report")
    first = world.peer.reports[heard]
    assert (first["state"], first["confirmed"], first["was_ready"]) == ("suspect", False, True)
    await world.peer.saw("offline", state="offline", confirmed=True)


async def test_a_run_that_nobody_hears_does_not_claim_what_it_found_kept(world: World) -> None:
    """An agent that restores "offline" from an earlier run, and gets no answer at first, reports "not confirmed" when
    it reconnects, then is in doubt, and only another confirmation counts (S6)."""
    agent = await world.started()
    await world.peer.saw("ok", state="ok", ready=True)
    await world.device.stop()
    await world.peer.saw("offline", state="offline", confirmed=True)
    assert agent.process is not None
    await agent.process.kill()
    await world.peer.stop()
    heard = len(world.peer.reports)
    await agent.start()
    await unanswered(agent, state="offline", confirmed=True)
    await world.peer.start()
    await until(lambda: any(r["confirmed"] for r in world.peer.reports[heard:]), "a claim", 40.0)
    since = world.peer.reports[heard:]
    states = [r["state"] for r in since[: [r["confirmed"] for r in since].index(True)]]
    assert states[0] == "offline"
    assert states[-1] == "suspect"


async def test_an_agent_learns_where_the_other_replicas_are(world: World) -> None:
    """An answer names a second API; when the first one stops, reports go there."""
    second = Peer()
    await second.start()
    try:
        world.peer.body = json.dumps({"api": [f"http://127.0.0.1:{second.port}"]}).encode()
        agent = await world.started(beat_s=0.2)
        await world.peer.saw("a report", ready=True)
        await world.peer.stop()
        await second.saw("a report", ready=True)
        assert await agent.signal(signal.SIGTERM) == 143
    finally:
        await second.stop()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"api": 5}',
        b'{"api": {"a": 1}}',
        b'{"api": [5]}',
        b'{"api": ["ftp://127.0.0.1:1"]}',
        b'{"api": ["https://127.0.0.1:1"]}',
        b'{"api": ["http://127.0.0.1:1/\\r\\nX: y"]}',
        b"[" * 30_000,
    ],
)
async def test_an_answer_that_makes_no_sense_moves_no_agent(world: World, body: bytes) -> None:
    """Whatever else the answer contains, the agent keeps reporting to the same address."""
    world.peer.body = body
    await world.started(beat_s=0.1)
    await until(lambda: len(world.peer.reports) >= 4, "four reports")


async def test_state_survives_a_kill(world: World) -> None:
    """After kill -9 a new run knows that the device had answered, and does not assume that it is back."""
    agent = await world.started()
    await agent.is_in("ok", was_ready=True)
    await world.device.stop()
    before = await world.peer.saw("offline", state="offline")
    assert agent.process is not None
    await agent.process.kill()
    world.peer.reports.clear()
    await agent.start()
    first = await until(lambda: world.peer.reports, "a report")
    assert (first[0]["state"], first[0]["was_ready"]) == ("offline", True)
    assert first[0]["sequence"] > 1
    assert first[0]["instance"] != before["instance"]
    await world.device.start()
    await world.peer.saw("back", state="ok")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"state": 5, "crc32": 1}',
        b'{"state": {"was_ready": true, "device_id": "pump-7"}, "crc32": 1}',
        b"[" * 60_000,
        b'{"state": {"was_ready": true, "dev',
    ],
)
async def test_corrupt_state_starts_clean(world: World, text: bytes) -> None:
    """An unusable state file is reported in the log, and the agent starts as new."""
    agent = world.agent()
    agent.folder.mkdir()
    (agent.folder / "state.json").write_bytes(text)
    await agent.start()
    await world.peer.saw("ok", state="ok", ready=True)
    assert [line for line in agent.log if "starting clean" in line["msg"]]


async def test_state_of_another_device_is_not_used(world: World) -> None:
    """A state folder that another device left is not used as history."""
    agent = await world.started()
    await agent.is_in("ok", was_ready=True)
    assert await agent.signal(signal.SIGTERM) == 143
    await world.device.stop()
    agent.config["device_id"] = "pump-8"
    await agent.start()
    assert (await agent.status())["was_ready"] is False
    assert [line for line in agent.log if "another device" in line["msg"]]


@pytest.mark.parametrize(
    "device_id", ["a/../../b", '"}{$(reboot)', "ping 日本 🚰", "x" * 128, "%s%n'"]
)
async def test_hostile_ids_come_back_as_they_were(world: World, device_id: str) -> None:
    """Any device ID arrives unchanged in its reports and its status."""
    agent = await world.started(device_id=device_id)
    assert (await world.peer.saw("a report", ready=True))["device_id"] == device_id
    assert (await agent.status())["device_id"] == device_id


async def test_a_reader_that_stopped_reading_stderr_does_not_stop_it(world: World) -> None:
    """If its stderr is full and is not read, the agent continues and exits on a signal."""
    agent = world.agent(argv=["/bin/sh", "-c", f"exec {sys.executable} -c '{_FULL}'"])
    await agent.start()
    await world.peer.saw("a report", ready=True)
    assert await agent.signal(signal.SIGTERM) == 143


_FULL = (
    'import os;r,w=os.pipe();os.set_blocking(w,False);os.write(w,b"x"*65536);'
    "os.set_blocking(w,True);os.dup2(w,2);from watchdog_agent.main import main;main()"
)

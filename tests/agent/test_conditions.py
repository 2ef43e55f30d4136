"""What outlives an agent, and how it reports that its reports do not arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
from watchdog_agent.detection.probe_stats import KEPT
from watchdog_agent.detection.thresholds import Thresholds
from watchdog_agent.reporting import reporter

from tests.agent.receiver import Receiver
from tests.agent.world import OK, Listener, World, probe, says, silent, tcp, until


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A listening receiver of escalations."""
    it = Receiver()
    await it.start()
    yield it
    await it.stop()


def answer(**condition: Any) -> bytes:
    """The body of an answer to a report with this condition."""
    return json.dumps({"accepted": True, "api": [], "condition": condition}).encode()


BROKEN = b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n"
OFFLINE = {"state": "offline", "age_s": 500.0, "reason": "http: dead; icmp: no echo", "misses": 9}


# -- V1: the condition is the device's, not the agent's


async def test_a_new_agent_of_a_dead_device_takes_the_outage_over_and_confirms_it(
    world: World,
) -> None:
    """V1: a new agent whose device does not answer becomes ready with its first round, is never ok, and after the first
    answer reports the condition and age from the control plane; then it confirms it by itself."""
    await world.device.stop()
    world.peer.body = answer(**OFFLINE)
    agent = await world.started()
    report = await world.peer.saw("offline", state="offline", ready=True, confirmed=True)
    assert report["was_ready"] is True
    assert report["misses"] >= 9
    assert report["state_age_s"] >= 500.0
    assert world.peer.reports[0]["state"] == "suspect"
    assert [line for line in agent.log if line["msg"] == "condition taken over"]
    world.peer.body = b"{}"
    own = await until(
        lambda: f"tcp:{world.dead_port}" in world.peer.last["reason"] and world.peer.last, "its own"
    )
    assert own["state"] == "offline"
    assert own["state_age_s"] >= 500.0
    assert {r["state"] for r in world.peer.reports} == {"suspect", "offline"}
    await world.device.start()
    back = await world.peer.saw("ok", state="ok")
    assert back["state_age_s"] < 500.0


async def test_a_condition_is_refuted_by_a_confirmation_or_a_success(world: World) -> None:
    """If the host answers without the service, the device is degraded. When the service answers it is ok, and a
    condition received later changes nothing."""
    await world.device.stop()
    world.peer.body = answer(**OFFLINE)
    agent = await world.started(confirm=[tcp(world.peer.port)])
    await world.peer.saw("offline", state="offline")
    await world.peer.saw("degraded", state="degraded")
    await world.device.start()
    await world.peer.saw("ok", state="ok")
    heard = len(world.peer.reports)
    await until(lambda: len(world.peer.reports) > heard + 5, "more reports")
    assert {r["state"] for r in world.peer.reports[heard:]} == {"ok"}
    assert len([line for line in agent.log if line["msg"] == "condition taken over"]) == 1


async def test_another_cause_of_a_state_that_lasts_is_reported_at_once(world: World) -> None:
    """If a service that refused connections now answers 503, on a host that was up all the time, the new cause is
    reported and logged at once, although the next scheduled report is far away."""
    agent = await world.started(confirm=[tcp(world.peer.port)], beat_s=600.0)
    await world.peer.saw("ok", state="ok")
    await world.device.stop()
    await world.peer.saw("degraded", state="degraded")
    broken = Listener(says(BROKEN), world.device.port)
    world.others.append(broken)
    await broken.start()
    report = await until(lambda: "503" in world.peer.last["reason"] and world.peer.last, "503")
    assert report["state"] == "degraded"
    assert report["reason"].endswith(
        "status 503, not 200; but tcp:" + str(world.peer.port) + " answers"
    )
    assert [line for line in agent.log if "503" in line.get("reason", "")]


async def test_an_outage_that_ends_in_part_is_never_reported_with_its_old_reason(
    world: World,
) -> None:
    """If the host comes back with a service that answers 503, there is one report of degraded, with the 503."""
    host = Listener(silent, world.dead_port)
    world.others.append(host)
    await world.started(beat_s=600.0)
    await world.peer.saw("ok", state="ok")
    await world.device.stop()
    await world.peer.saw("offline", state="offline")
    broken = Listener(says(BROKEN), world.device.port)
    world.others.append(broken)
    await broken.start()
    await host.start()
    await world.peer.saw("degraded", state="degraded")
    reasons = [one["reason"] for one in world.peer.reports if one["state"] == "degraded"]
    assert len(reasons) == 1
    assert "503" in reasons[0]
    await broken.stop()
    world.device = Listener(says(OK), world.device.port)
    await world.device.start()
    await world.peer.saw("ok", state="ok")


async def test_a_device_that_comes_back_whole_is_not_degraded(world: World) -> None:
    """If both the service and the confirmation come back, the probe in flight at that time counts for the outage."""
    host = Listener(silent, world.dead_port)
    world.others.append(host)
    hangs = Listener(silent, world.device.port)
    world.others.append(hangs)
    await world.started(probes=[probe(world.device.port, timeout_s=0.3)], beat_s=600.0)
    await world.peer.saw("ok", state="ok")
    await world.device.stop()
    await hangs.start()
    await world.peer.saw("offline", state="offline")
    await hangs.stop()
    await host.start()
    await world.device.start()
    await world.peer.saw("ok", state="ok")
    assert "degraded" not in {one["state"] for one in world.peer.reports}


async def test_a_degraded_condition_is_taken_over(world: World) -> None:
    """A degraded device stays degraded with its age while the new agent's own round misses."""
    await world.device.stop()
    world.peer.body = answer(state="degraded", age_s=60.5, reason="http: dead", misses=4)
    await world.started(confirm=[tcp(world.peer.port)])
    report = await world.peer.saw("degraded", state="degraded", confirmed=False)
    assert report["state_age_s"] >= 60.5


@pytest.mark.parametrize(
    "condition",
    [
        None,
        5,
        [],
        {},
        {"state": "ok"},
        {"state": ["offline"]},
        {"state": "unable", "age_s": 1.0},
        {"state": "repairing", "age_s": 1.0, "reason": "r", "misses": 3},
    ],
)
async def test_a_condition_that_makes_no_sense_is_ignored(world: World, condition: Any) -> None:
    """The agent relies on what it found itself."""
    await world.device.stop()
    world.peer.body = json.dumps({"condition": condition}).encode()
    await world.started()
    await until(lambda: len(world.peer.reports) > 4, "reports")
    assert {r["state"] for r in world.peer.reports} == {"suspect"}


@pytest.mark.parametrize("strange", [{"age_s": "x"}, {"age_s": -5}, {"reason": 5}, {"misses": "9"}])
async def test_a_condition_with_a_strange_part_is_taken_without_it(
    world: World, strange: dict[str, Any]
) -> None:
    """A wrong age is ignored, a wrong reason or number of misses is replaced."""
    await world.device.stop()
    world.peer.body = answer(**{**OFFLINE, **strange})
    await world.started()
    report = await world.peer.saw("offline", state="offline")
    assert report["state_age_s"] >= 0
    assert report["misses"] > 0
    assert report["reason"]


async def test_an_age_beyond_all_bounds_is_bounded(world: World) -> None:
    """An age of 1e14 seconds is limited to ten years."""
    await world.device.stop()
    world.peer.body = answer(**{**OFFLINE, "age_s": 10.0**14})
    await world.started()
    report = await world.peer.saw("offline", state="offline")
    assert 3.15e8 < report["state_age_s"] < 3.16e8


async def test_the_age_of_a_state_goes_on_over_a_restart(world: World) -> None:
    """The state file records how long the device has been offline; a restart adds the time it took."""
    await world.device.stop()
    world.peer.body = answer(**OFFLINE)
    agent = await world.started()
    await world.peer.saw("offline", state="offline")
    assert agent.process is not None
    await agent.process.kill()
    world.peer.body = b"{}"
    world.peer.reports.clear()
    await agent.start()
    await until(lambda: world.peer.reports, "a report")
    first = world.peer.reports[0]
    assert (first["state"], first["ready"]) == ("offline", True)
    assert first["state_age_s"] >= 499.0


def test_v6_a_report_that_waited_says_when_its_state_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """The age of a state in a report that is sent again includes the time that the report has waited; otherwise each
    restart of the control plane would move the start of the state."""
    now, bodies = [100.0], []

    def ask(_loop: object, _url: object, data: bytes, *_rest: object) -> object:
        bodies.append(json.loads(data.partition(b"\r\n\r\n")[2]))
        return object()

    monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(reporter.transport, "send", ask)
    loop: Any = SimpleNamespace(later=lambda *_: [0.0, 0, None])
    one = reporter.Reporter(
        loop,
        {"api": ["http://127.0.0.1:1"]},
        lambda number, _dropped, _stopping: {"sequence": number, "state_age_s": 5.0},
        lambda *_: None,
        lambda *_, **__: None,
    )
    one.changed()
    now[0] += 4.0
    one._answered(None, {}, b"", "connection refused")
    now[0] += 6.0
    one._send()
    assert [(body["sequence"], body["state_age_s"]) for body in bodies] == [(1, 5.0), (1, 15.0)]


# -- V2: an agent reports that its reports are not accepted


REFUSED = b'{"error": {"code": "unauthorized", "message": "the credential does not fit"}}'


@pytest.mark.slow_because("a refused agent waits longer before each report")
@pytest.mark.parametrize("status", [401, 403, 404, 400])
async def test_refused_reports_are_told_in_status_log_and_health_check(
    world: World, status: int
) -> None:
    """V2: the health check's output (its status stays 200), /status, the metrics and the log state that reports are
    rejected and why, the log once; when they are accepted again, all of them state that."""
    world.peer.status, world.peer.body = status, REFUSED
    agent = await world.started(beat_s=0.1)
    await until(lambda: world.peer.refused >= 5, "five refusals", 30.0)
    words = (
        f"its reports are refused by http://127.0.0.1:{world.peer.port} with {status}: "
        "the credential does not fit"
    )
    assert await agent.get("/healthz") == (200, words + "\n")
    assert (await agent.status())["reports"]["trouble"] == words
    assert "watchdog_agent_reports_in_trouble 1\n" in (await agent.get("/metrics"))[1]
    lines = [line["msg"] for line in agent.log if "report" in line["msg"]]
    assert lines == [f"report refused with {status}: the credential does not fit"]
    world.peer.status, world.peer.body = 200, b"{}"
    await world.peer.saw("a report", ready=True, timeout_s=40.0)
    await until(lambda: any("accepted again" in line["msg"] for line in agent.log), "the log")
    assert await agent.get("/healthz") == (200, "ok\n")
    assert (await agent.status())["reports"]["trouble"] == ""


async def test_a_missing_answer_is_told_after_three_and_another_reason_in_its_place(
    world: World,
) -> None:
    """One lost answer changes nothing; three are reported, with the address; a rejection after that is reported at
    once."""
    await world.peer.stop()
    agent = await world.started(beat_s=0.1)
    url = f"http://127.0.0.1:{world.peer.port}"

    async def health(words: str) -> bool:
        return (await agent.get("/healthz"))[1] == words

    words = f"no answer from {url} to its reports: connection refused\n"
    await until(lambda: health(words), "no answer", 30.0)
    world.peer.status, world.peer.body = 403, REFUSED
    await world.peer.start()
    words = f"its reports are refused by {url} with 403: the credential does not fit\n"
    await until(lambda: health(words), "refused", 40.0)


# -- V3, V7: degraded


async def test_v3_a_dead_web_service_on_a_live_host_is_degraded(world: World) -> None:
    """README's own class: an http probe, confirmed by icmp. If the service dies and its host answers, the device is
    degraded."""
    await world.started(confirm=[{"kind": "icmp", "timeout_s": 0.5}])
    await world.peer.saw("ok", state="ok", ready=True)
    await world.device.stop()
    report = await world.peer.saw("degraded", state="degraded", confirmed=False)
    assert report["misses"] >= 3
    assert "connection refused" in report["reason"]
    assert report["reason"].endswith(("icmp answers", "tcp:7 answers"))
    states = [r["state"] for r in world.peer.reports]
    assert "offline" not in states
    await world.device.start()
    await world.peer.saw("ok", state="ok")


async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers after a delay."""
    await reader.readuntil(b"\r\n\r\n")
    await asyncio.sleep(0.1)  # the time that the probe measures
    writer.write(OK)


@pytest.mark.parametrize("name", ["warn_time_s", "max_time_s"])
async def test_an_answer_that_takes_too_long_is_degraded_and_no_miss(
    world: World, name: str
) -> None:
    """Slow answers make the device degraded after as many consecutive runs as make it suspect, and end the same way;
    `max_time` is the old name of `warn_time`."""
    world.device.speak = slow
    limited = probe(world.device.port, timeout_s=5.0, interval_s=0.2, **{name: 0.05})
    agent = await world.started(probes=[limited])
    report = await world.peer.saw("degraded", state="degraded", misses=0, was_ready=True)
    assert "(warn_time is 0.05 s)" in report["reason"]
    assert list((await agent.status())["evidence"]["warnings"]) == [f"0:http:{world.device.port}"]
    world.device.speak = says(OK)
    agent.config["probes"][0][name] = 2.0
    assert agent.process is not None
    await agent.process.kill()
    await agent.start()
    await world.peer.saw("ok", state="ok")
    assert {r["state"] for r in world.peer.reports} == {"ok", "degraded"}


def test_a_slow_time_begins_and_ends_with_as_many_runs_as_make_suspect() -> None:
    """Two slow runs of three cause no warning; a single fast one does not end it."""
    it = Thresholds({"misses": 3, "warn_time_s": 1.0})
    took = [2.0, 2.0, 0.1, 2.0, 2.0, 2.0, 0.1, 0.1, 2.0, 0.1, 0.1, 0.1, 2.0]
    shown = [bool(it.record(True, one, 3)) for one in took]
    assert shown == [False] * 5 + [True] * 6 + [False] * 2
    assert it.record(None, 9.0, 3) == ""


def test_loss_is_warned_of_from_twenty_runs_on_and_an_outage_is_none() -> None:
    """If a tenth of the probes is lost, a threshold of 5 % causes a warning with the share; it ends at half the
    threshold. A run of misses that makes the device suspect is excluded."""
    it = Thresholds({"misses": 3, "warn_loss": 0.05})
    lost = [number % 10 == 0 for number in range(1, 61)]
    shown = [it.record(not one, 0.1, 3) for one in lost]
    assert shown[:19] == [""] * 19
    assert shown[19] == "10% of the last 20 probes were lost (warn_loss is 0.05)"
    assert all(shown[19:])
    healthy = [bool(it.record(True, 0.1, 3)) for _ in range(KEPT)]
    assert healthy[0]
    assert not healthy[-1]
    for _ in range(5):
        it.record(False, 1.0, 3)
    assert [it.record(True, 0.1, 3) for _ in range(KEPT)] == [""] * KEPT


async def test_a_degraded_device_is_escalated_only_if_the_class_says_so(
    world: World, receiver: Receiver
) -> None:
    """With `degraded` in escalate, one alert is sent while the device is degraded, and its end when the device is ok.
    Without it, none is sent."""
    hook = [{"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}]
    told = await world.started(
        confirm=[tcp(world.peer.port)], escalate={"sinks": hook, "degraded": True}
    )
    silent = await world.started(
        device_id="pump-8", confirm=[tcp(world.peer.port)], escalate={"sinks": hook}
    )
    for agent in (told, silent):
        await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    for agent in (told, silent):
        await agent.is_in("degraded", state="degraded")
    await until(lambda: receiver.told("firing"), "an alert")
    await world.device.start()
    await until(lambda: receiver.told("resolved"), "its end")
    assert (await silent.status())["escalations"]["sent"] == 0
    assert [(one["kind"], one["status"], one["devices"][0][0]) for one in receiver.delivered] == [
        ("degraded", "firing", "pump-7"),
        ("degraded", "resolved", "pump-7"),
    ]


async def test_a_degraded_device_is_repaired_by_the_steps_that_are_for_that(
    world: World, receiver: Receiver
) -> None:
    """If the service dies and its host answers, only the step for degraded is taken, and when it does not help, that is
    escalated."""
    done = world.folder / "done"
    step = {"kind": "command", "verify_s": 0.3, "cooldown_s": 0.0}
    agent = await world.started(
        confirm=[tcp(world.peer.port)],
        repairs=[
            {**step, "command": ["touch", str(world.folder / "wrong")], "when": "offline"},
            {**step, "command": ["touch", str(done)], "when": "degraded"},
        ],
        escalate={
            "sinks": [{"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}],
            "degraded": True,
        },
    )
    await world.peer.saw("ok", state="ok", ready=True)
    await world.device.stop()
    await until(done.exists, "the step")
    await until(lambda: receiver.told("firing"), "an alert")
    alert = receiver.told("firing")[0]
    assert alert["kind"] == "degraded"
    assert [one["outcome"] for one in alert["evidence"]["repairs"]] == ["no help"]
    assert not (world.folder / "wrong").exists()
    await world.device.start()
    await until(lambda: receiver.told("resolved"), "its end")
    assert (await agent.status())["state"] == "ok"

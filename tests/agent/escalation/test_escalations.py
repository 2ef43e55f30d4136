"""What an agent escalates by itself, and its requests to the sinks."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from watchdog_agent.config import escalation
from watchdog_agent.config.document import ConfigError
from watchdog_agent.config.document import check as check_config
from watchdog_agent.escalation import sinks
from watchdog_agent.runtime.loop import Loop

from tests.agent.receiver import Receiver
from tests.agent.world import Listener, World, document, probe, until


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A listening receiver."""
    it = Receiver()
    await it.start()
    yield it
    await it.stop()


def rules(receiver: Receiver, *kinds: str, **changes: Any) -> dict[str, Any]:
    url = f"http://127.0.0.1:{receiver.port}"
    found = [{"kind": kind, "url": url} for kind in kinds or ("webhook",)]
    return {"sinks": found, "retry_s": 0.1, **changes}


async def test_an_offline_device_is_escalated_once_and_its_return_is_told(
    world: World, receiver: Receiver
) -> None:
    """One firing alert with the evidence is sent while the device is down, one resolved when it is back, and a second
    episode has another key."""
    agent = await world.started(escalate=rules(receiver))
    await agent.is_in("ok", state="ok", was_ready=True)
    keys = []
    for episode in (1, 2):
        await world.device.stop()
        await until(lambda n=episode: len(receiver.told("firing")) == n, "an escalation")
        alert = receiver.told("firing")[-1]
        assert (alert["kind"], alert["count"], alert["group"]) == ("offline", 1, None)
        assert alert["devices"][0][0] == "pump-7"
        assert "connection refused" in alert["evidence"]["reason"]
        assert receiver.attempts[-1]["headers"]["idempotency-key"] == alert["key"]
        keys.append(alert["key"])
        shown = (await agent.status())["escalations"]
        assert [one["key"] for one in shown["open"]] == ["offline"]
        await world.device.start()
        await until(lambda n=episode: len(receiver.told("resolved")) == n, "the end")
        assert receiver.told("resolved")[-1]["episode"] == alert["episode"]
    assert len(set(keys)) == 2
    assert len(receiver.attempts) == 4


async def test_a_sink_that_fails_is_tried_again_under_the_same_key(
    world: World, receiver: Receiver
) -> None:
    """While a sink answers 503 the alert is retried with one key, and counted as sent once."""
    receiver.status = 503
    agent = await world.started(escalate=rules(receiver))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: len(receiver.attempts) >= 3, "three tries")
    receiver.status = 200
    await until(lambda: receiver.told("firing"), "an escalation", 60.0)
    assert len({one["headers"]["idempotency-key"] for one in receiver.attempts}) == 1

    async def counted() -> bool:
        return "watchdog_agent_escalations_sent_total 1" in (await agent.get("/metrics"))[1]

    await until(counted, "one sent")


async def test_receivers_at_ipv6_addresses_are_told(world: World, receiver: Receiver) -> None:
    """A webhook and an Alertmanager at ::1 get the alert, with the address in brackets in the Host header."""
    await receiver.stop()
    receiver.host = "::1"
    await receiver.start()
    url = f"http://[::1]:{receiver.port}"
    sinks_ = [{"kind": kind, "url": url} for kind in ("webhook", "alertmanager")]
    agent = await world.started(escalate={"sinks": sinks_, "retry_s": 0.1})
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: len(receiver.delivered) == 2, "both are told")
    assert {one["headers"]["host"] for one in receiver.attempts} == {f"[::1]:{receiver.port}"}


async def test_an_open_escalation_outlives_a_kill(world: World, receiver: Receiver) -> None:
    """After kill -9 a delivered alert is not sent again, and its end still carries its key; an undelivered one is sent
    under the key it had."""
    receiver.status = 503
    agent = await world.started(escalate=rules(receiver))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.attempts, "a try")
    assert agent.process is not None
    await agent.process.kill()
    receiver.status = 200
    await agent.start()
    await until(lambda: receiver.told("firing"), "told by the second run")
    assert len({one["headers"]["idempotency-key"] for one in receiver.attempts}) == 1
    await until(lambda: '"told": true' in (agent.folder / "state.json").read_text(), "kept")
    await agent.process.kill()
    await agent.start()
    await agent.is_in("offline as before", state="offline")
    await world.device.start()
    await until(lambda: receiver.told("resolved"), "the end")
    assert len(receiver.told("firing")) == 1
    assert receiver.told("resolved")[0]["episode"] == receiver.told("firing")[0]["episode"]
    assert await agent.signal(signal.SIGTERM) == 143


async def test_a_return_while_the_agent_was_away_is_told(world: World, receiver: Receiver) -> None:
    """If a device came back while its agent was dead, the next run reports the return, even if only one of two probes
    has answered yet."""
    slow = probe(world.dead_port, kind="tcp", interval_s=60.0, timeout_s=0.2, misses=3)
    agent = await world.started(escalate=rules(receiver), probes=[probe(world.device.port), slow])
    await agent.is_in("ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an escalation", 60.0)
    await until(lambda: '"told": true' in (agent.folder / "state.json").read_text(), "kept")
    assert agent.process is not None
    await agent.process.kill()
    await world.device.start()
    await agent.start()
    await until(lambda: receiver.told("resolved"), "the end")


DEPARTED = b'{"error": {"code": "departed", "message": "the device has left"}}'


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("kind", ["webhook", "alertmanager"])
async def test_an_alert_ends_with_the_departure_of_its_device(
    world: World, receiver: Receiver, kind: str, *, signalled: bool
) -> None:
    """An agent that receives `departed`, in answer to a report or to its last one after a signal, resolves its alerts
    before it exits; its state lists none of them as open."""
    agent = await world.started(escalate=rules(receiver, kind))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.delivered, "an escalation")
    world.peer.body = DEPARTED
    if signalled:
        world.peer.status = None
        await asyncio.sleep(0.5)  # so that no heartbeat has the answer before the signal
        world.peer.status = 410
        code = await agent.signal(signal.SIGTERM)
    else:
        world.peer.status = 410
        assert agent.process is not None
        code = await agent.process.wait(60.0)
    assert code in ((0, 143) if signalled else (0,))
    assert len(receiver.delivered) == 2
    firing, ended = receiver.delivered
    if kind == "webhook":
        assert (ended["status"], ended["episode"]) == ("resolved", firing["episode"])
        assert ended["devices"] == [["pump-7", "departed"]]
    else:
        assert ended[0]["labels"] == firing[0]["labels"]
        assert ended[0]["endsAt"] < firing[0]["endsAt"]
    assert json.loads((agent.folder / "state.json").read_text())["state"]["escalations"] == []


async def test_a_slow_receiver_hears_the_end_of_a_device_that_has_left(
    world: World, receiver: Receiver
) -> None:
    """With a receiver and an API that each take a second, the end of an alert is not lost when a signal arrives first;
    the agent is gone within five seconds."""
    slow = Listener(receiver.speak)
    delays = iter((0.0, 1.0))

    async def later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(next(delays, 0.0))
        await receiver.speak(reader, writer)

    slow.speak = later
    await slow.start()
    try:
        agent = await world.started(escalate=rules(slow))  # type: ignore[arg-type]  # it has a port
        await agent.is_in("ok", state="ok", was_ready=True)
        await world.device.stop()
        await until(lambda: receiver.told("firing"), "an escalation")
        answer = world.peer.speak

        async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.8)  # the answer is still in flight when the signal arrives
            await answer(reader, writer)

        world.peer.speak, world.peer.body, world.peer.status = slowly, DEPARTED, 410
        assert await agent.signal(signal.SIGTERM) in (0, 143)
        assert len(receiver.told("resolved")) == 1
    finally:
        await slow.stop()


async def test_an_agent_that_is_replaced_leaves_its_alert_open(
    world: World, receiver: Receiver
) -> None:
    """A 410 that is not about the device, such as for an outdated epoch, resolves nothing."""
    agent = await world.started(escalate=rules(receiver))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an escalation")
    world.peer.body, world.peer.status = DEPARTED.replace(b"departed", b"refused"), 410
    assert agent.process is not None
    assert await agent.process.wait(60.0) == 0
    assert len(receiver.attempts) == 1


async def test_a_sink_that_is_away_does_not_hold_up_a_departure(
    world: World, receiver: Receiver
) -> None:
    """If a sink does not answer, an agent whose device has left ends within four seconds."""
    agent = await world.started(escalate=rules(receiver))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an escalation")
    receiver.status = None
    world.peer.body, world.peer.status = DEPARTED, 410
    assert agent.process is not None
    assert await agent.process.wait(4.0) == 0


async def test_nobody_is_called_while_the_ladder_is_climbed(
    world: World, receiver: Receiver
) -> None:
    """An offline device is not escalated while a repair step is running; it is escalated once, with what was tried,
    when no step is left."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        step = {"kind": "http", "url": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        step |= {"budget": 1, "window_s": 3600.0, "cooldown_s": 0.0, "timeout_s": 4.0}
        agent = await world.started(escalate=rules(receiver), repairs=[step], beat_s=0.1)
        await agent.is_in("ok", state="ok", was_ready=True)
        await world.device.stop()
        await world.peer.saw("a repair", state="repairing")
        seen = len(world.peer.reports)
        await until(lambda: len(world.peer.reports) > seen + 3, "more beats")
        assert receiver.attempts == []
        await until(lambda: receiver.told("firing"), "an escalation", 60.0)
    (tried,) = receiver.told("firing")[0]["evidence"]["repairs"]
    assert (tried["outcome"], tried["reason"]) == ("failed", "took longer than 4 s")


async def test_alertmanager_is_told_as_its_api_wants_it(world: World, receiver: Receiver) -> None:
    """Firing and resolved carry the same labels and start time; the end time is in the future for the first and not for
    the second."""
    agent = await world.started(escalate=rules(receiver, "alertmanager"))
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: len(receiver.attempts) == 1, "a firing alert")
    await world.device.start()
    await until(lambda: len(receiver.attempts) == 2, "a resolved alert")
    (firing,), (resolved,) = [one["body"] for one in receiver.attempts]
    assert {one["path"] for one in receiver.attempts} == {"/api/v2/alerts"}
    assert firing["labels"] == resolved["labels"]
    assert firing["labels"]["alertname"] == "WatchdogOffline"
    assert firing["labels"]["device_id"] == "pump-7"
    assert firing["startsAt"] == resolved["startsAt"]
    assert resolved["endsAt"] < firing["endsAt"]


async def test_a_bearer_comes_from_its_file_and_shows_nowhere(
    world: World, receiver: Receiver
) -> None:
    """A sink's token is sent, and appears in no page, log or kept state (S10)."""
    secret = world.folder / "secret"
    secret.write_text("not-a-secret\n")
    escalate = rules(receiver)
    escalate["sinks"][0]["token_file"] = str(secret)
    agent = await world.started(escalate=escalate)
    await agent.is_in("ok", state="ok", was_ready=True)
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an escalation")
    assert receiver.attempts[0]["headers"]["authorization"] == "Bearer not-a-secret"
    pages = [(await agent.get(path))[1] for path in ("/status", "/metrics")]
    files = [(agent.folder / name).read_text() for name in ("log", "state.json")]
    assert "not-a-secret" not in "".join(pages + files)


OPTIONAL = (
    "watchdog_agent.config.escalation",
    "watchdog_agent.consul.kept_state",
    "watchdog_agent.consul.kv",
    "watchdog_agent.reporting.loki",
)


async def test_without_escalation_nothing_of_it_is_loaded(world: World) -> None:
    """An agent without escalation, log shipping and state in Consul loads none of their modules."""
    code = (
        "import sys; from watchdog_agent import main; from watchdog_agent.config.document import check; "
        "import json, os; a = main.Agent(check(json.load(open(os.environ['WATCHDOG_CONFIG']))), {}); "
        "a._write_address = lambda: None; "
        f"found = [n for n in sys.modules if n in {OPTIONAL} or n.startswith('watchdog_agent.escalation')]; "
        "open(os.environ['WATCHDOG_STATE_DIR'] + '/found', 'w').write(repr(found)); main.main()"
    )
    import sys

    assert all(importlib.util.find_spec(name) for name in OPTIONAL)
    agent = world.agent(argv=[sys.executable, "-c", code])
    await agent.start()
    assert (agent.folder / "found").read_text() == "[]"


def test_a_full_queue_drops_the_oldest_and_counts() -> None:
    """If a sink accepts nothing, the alert in flight and the newest ones stay, and dropped alerts are reported as not
    sent."""
    config = checked(sinks=[{"kind": "webhook", "url": "http://127.0.0.1:1"}])
    loop = Loop()
    sink = sinks.Sink(loop, config["escalate"]["sinks"][0], config, "i", lambda *_a, **_k: None)
    answers: dict[int, bool] = {}
    for number in range(sink.MAX_QUEUED + 3):
        alert = {"key": str(number), "number": number}
        sink.put(alert, lambda ok, n=number: answers.__setitem__(n, ok))
    kept = [one[0]["number"] for one in sink.waiting]
    assert sink.fetch is not None
    sink.fetch.cancel()
    loop.close()
    assert kept == [0, *range(4, sink.MAX_QUEUED + 3)]
    assert sink.dropped == 3
    assert answers == {1: False, 2: False, 3: False}


def checked(**rules: Any) -> dict[str, Any]:
    return check_config(document(probes=[probe(80)], escalate=rules))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sinks": []}, "1 to 8 sinks"),
        ({"sinks": [{"kind": "pager"}]}, "webhook, alertmanager, consul_event"),
        ({"sinks": [{"kind": "webhook"}]}, "http:// or https://"),
        ({"sinks": [{"kind": "webhook", "url": "ftp://a"}]}, "http:// or https://"),
        ({"sinks": [{"kind": "consul_event"}]}, "needs a url"),
        ({"sinks": [{"kind": "consul_event", "url": "http://a", "name": "a/b"}]}, "letters"),
        ({"sinks": [{"kind": "webhook", "url": "http://a", "token_file": 5}]}, "path of a file"),
        ({"sinks": [{"kind": "webhook", "url": "http://a"}], "by": ["rack"]}, "gateway, site"),
        ({"sinks": [{"kind": "webhook", "url": "http://a"}], "window_s": 0}, "1 to 3600"),
        ([], "an object"),
    ],
)
def test_wrong_rules_are_refused_in_words(wrong: Any, said: str) -> None:
    """Invalid rules are rejected with what is allowed."""
    with pytest.raises(ConfigError, match=said):
        check_config(document(probes=[probe(80)], escalate=wrong))


@pytest.mark.parametrize(
    "wrong",
    [{"state": "disk"}, {"loki": {"url": 5}}, {"loki": []}, {"prefix": "a b"}, {"prefix": 7}],
)
def test_wrong_neighbours_are_refused_too(wrong: dict[str, Any]) -> None:
    """Kept state, log shipping and the prefix are validated the same way."""
    with pytest.raises(ConfigError):
        escalation.check(wrong)

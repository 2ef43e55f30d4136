"""Fifty agents behind one dead gateway and a real Consul: one of them alerts, whichever is killed."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.demo.process import free_port
from servers.consul import ConsulServer
from tests.agent.receiver import Receiver
from tests.agent.world import Agent, World, probe, tcp, until

pytestmark = pytest.mark.servers

MANY = 50
SOON_S = 60.0
"""For what takes a second or two on an idle machine."""


@pytest_asyncio.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """A listening receiver."""
    it = Receiver()
    await it.start()
    yield it
    await it.stop()


def kv(consul: ConsulServer, prefix: str) -> list[dict[str, Any]]:
    """All entries below our folder of this prefix."""
    url = f"{consul.http_addr}/v1/kv/{prefix}/?recurse=true"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return []


def member(world: World, receiver: Receiver, consul_addr: str, number: int, **more: Any) -> Agent:
    """One lightweight agent of the gateway, which registers no check of its own."""
    prefix = more.pop("prefix", f"test-{world.folder.name}".replace("_", "-"))
    gateway = more.pop("gateway", "127.0.0.2")
    return world.agent(
        device_id=f"pump-{number}",
        slug=f"pump-{number}",
        consul=consul_addr,
        prefix=prefix,
        service=f"service-{prefix}"[:60],
        check_interval="60s",
        labels={"gateway": gateway},
        # no process listens there: a dead gateway on this host
        gateway={"kind": "tcp", "port": world.dead_port, "timeout_s": 0.5},
        probes=[probe(world.device.port, interval_s=1.0, timeout_s=0.9, misses=2)],
        confirm=[tcp(world.dead_port, timeout_s=0.5)],
        api=[],
        escalate={
            "sinks": [{"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}],
            "gather_s": 4.0,
            "window_s": 30.0,
            "retry_s": 0.5,
            "session_ttl_s": 10.0,
            "consul_wait_s": 60.0,
            **more,
        },
    )


async def all_started(agents: list[Agent]) -> None:
    """Start the agents, several at a time, and wait until each has seen its device."""
    few = asyncio.Semaphore(8)

    async def one(agent: Agent) -> None:
        async with few:
            await agent.start()
            await agent.is_in("ok", SOON_S, state="ok", was_ready=True)

    async with asyncio.TaskGroup() as group:
        for agent in agents:
            group.create_task(one(agent))


async def told_to_all(agents: list[Agent], episode: str, timeout_s: float = SOON_S) -> None:
    """Wait until each agent knows that its anomaly was alerted in this episode."""

    async def check(agent: Agent) -> bool:
        open_ = (await agent.status())["escalations"]["open"]
        return bool(open_) and open_[0]["told"] and open_[0]["episode"] == episode

    for agent in agents:
        await until(lambda agent=agent: check(agent), f"told: {agent.folder.name}", timeout_s)


@pytest.mark.slow_because("starts fifty agents")
async def test_fifty_agents_of_a_dead_gateway_tell_once_and_their_return_once(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """When fifty devices die together, one alert names all fifty and no agent adds another; when all are back, one
    alert reports it, and the notes and sessions are gone."""
    agents = [member(world, receiver, consul.http_addr, number) for number in range(MANY)]
    await all_started(agents)
    prefix = agents[0].config["prefix"]
    assert kv(consul, prefix) == [], "in peace nothing is written"
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    (alert,) = receiver.told("firing")
    assert (alert["count"], alert["group"]) == (MANY, ["gateway", "127.0.0.2"])
    assert {name for name, _ in alert["devices"]} == {f"pump-{one}" for one in range(MANY)}
    assert alert["uncoordinated"] is False
    await told_to_all(agents, alert["episode"])
    assert len(receiver.attempts) == 1
    await world.device.start()
    await until(lambda: receiver.told("resolved"), "the end", SOON_S)
    assert {one["key"] for one in receiver.told("resolved")} == {f"{alert['episode']}.resolved"}
    assert len(receiver.told("firing")) == 1
    assert receiver.told("update") == []

    def quiet() -> bool:
        left = kv(consul, prefix)
        return not [one for one in left if "/_" not in one["Key"] or one.get("Session")]

    await until(quiet, "no note and no lock is left", SOON_S)


@pytest.mark.slow_because("starts fifty agents, and Consul frees the lock of a dead one late")
async def test_the_elected_one_is_killed_and_another_tells(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """If the leader is killed with -9 while its alert is in flight, another agent delivers the same alert under the
    same key, with the killed agent's device in it; it is delivered once."""
    receiver.status = None
    agents = [member(world, receiver, consul.http_addr, number) for number in range(MANY)]
    await all_started(agents)
    await world.device.stop()
    first = (await until(lambda: receiver.attempts, "an alert on its way", SOON_S))[0]
    elected = first["body"]["by"]["device_id"]
    (victim,) = [agent for agent in agents if agent.config["device_id"] == elected]
    assert victim.process is not None
    os.kill(victim.pid, signal.SIGKILL)
    await victim.process.wait(SOON_S)
    receiver.status = 200
    # Consul releases the lock of a dead session after at most twice the TTL of 10 s
    await until(lambda: receiver.told("firing"), "an heir's alert", 2 * 10.0 + SOON_S)
    (alert,) = receiver.told("firing")
    assert alert["by"]["device_id"] != elected
    assert alert["key"] == first["body"]["key"]
    assert (alert["count"], alert["devices"]) == (MANY, first["body"]["devices"])
    others = [agent for agent in agents if agent is not victim]
    await told_to_all(others, alert["episode"])
    assert [one["key"] for one in receiver.delivered] == [alert["key"]]
    await victim.start()
    await told_to_all([victim], alert["episode"])
    assert len(receiver.delivered) == 1, "nor does the dead one tell it again when it is back"


async def test_an_elected_one_that_is_told_to_stop_hands_over_at_once(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """SIGTERM releases the lock without waiting for the TTL: even with a TTL of a minute another agent alerts within
    seconds."""
    receiver.status = None
    agents = [
        member(world, receiver, consul.http_addr, number, session_ttl_s=60.0, gather_s=2.0)
        for number in range(3)
    ]
    await all_started(agents)
    await world.device.stop()
    first = (await until(lambda: receiver.attempts, "an alert on its way", SOON_S))[0]
    (victim,) = [
        one for one in agents if one.config["device_id"] == first["body"]["by"]["device_id"]
    ]
    assert await victim.signal(signal.SIGTERM) == 143
    receiver.status = 200
    await until(lambda: receiver.told("firing"), "an heir's alert", 50.0)
    assert receiver.told("firing")[0]["key"] == first["body"]["key"]
    assert receiver.told("firing")[0]["count"] == 3


@pytest.mark.slow_because(
    "another agent is elected when the first one has stepped back for a while"
)
async def test_an_elected_one_that_the_sink_refuses_steps_back(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """If a sink rejects the leader's alert, another agent sends the same alert under the same key."""
    receiver.status = 403
    agents = [
        member(world, receiver, consul.http_addr, number, gather_s=2.0, window_s=20.0)
        for number in range(3)
    ]
    await all_started(agents)
    await world.device.stop()
    first = (await until(lambda: receiver.attempts, "a refused alert", SOON_S))[0]["body"]
    receiver.status = 200
    await until(lambda: receiver.told("firing"), "another one's alert", 60.0)
    (alert,) = receiver.told("firing")
    assert alert["by"]["device_id"] != first["by"]["device_id"]
    assert (alert["key"], alert["count"]) == (first["key"], 3)
    await told_to_all(agents, alert["episode"])
    assert len(receiver.delivered) == 1


async def test_a_lone_anomaly_shows_no_group_and_another_gateway_is_another_alert(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Two devices behind two gateways that die together cause two alerts with one device each."""
    agents = [
        member(world, receiver, consul.http_addr, number, gateway=f"g{number}", gather_s=1.0)
        for number in range(2)
    ]
    await all_started(agents)
    await world.device.stop()
    await until(lambda: len(receiver.told("firing")) == 2, "two alerts", SOON_S)
    assert {(one["count"], one["group"]) for one in receiver.delivered} == {(1, None)}
    assert {one["devices"][0][0] for one in receiver.delivered} == {"pump-0", "pump-1"}


@pytest.mark.slow_because("two devices die one after the other, and agents confirm each death")
async def test_who_joins_within_the_window_is_told_in_an_update(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """A device of the same gateway that dies after the alert, within the window, is added by an update of the same
    episode that names both."""
    late = member(world, receiver, consul.http_addr, 1, gather_s=0.5, window_s=8.0)
    late.config["probes"] = [probe(world.peer.port, kind="tcp", interval_s=0.3, timeout_s=0.2)]
    early = member(world, receiver, consul.http_addr, 0, gather_s=0.5, window_s=8.0)
    await all_started([early, late])
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    await world.peer.stop()
    await until(lambda: receiver.told("update"), "an update", SOON_S)
    (firing,), (update,) = receiver.told("firing"), receiver.told("update")
    assert update["episode"] == firing["episode"]
    assert update["key"] != firing["key"]
    assert (firing["count"], update["count"]) == (1, 2)
    assert {name for name, _ in update["devices"]} == {"pump-0", "pump-1"}


@pytest.mark.slow_because("a step of a ladder takes nine seconds, longer than the others' ladders")
async def test_ladders_that_fail_together_are_told_as_one(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Five devices of a gateway die, and each agent climbs its ladder to the end before any alert, one after the other:
    one alert names those that have failed by then, an update of the same episode names all, and each step was taken
    once. No failed ladder causes an alert of its own."""
    agents = []
    for number in range(5):
        rules = {"gather_s": 3.0, "window_s": 12.0, "gateway": "g-north"}
        agent = member(world, receiver, consul.http_addr, number, **rules)
        wait = 9.0 if number == 4 else 0.5 * number
        step = {"kind": "command", "command": ["sleep", str(wait)], "timeout_s": 30.0}
        agent.config["repairs"] = [{**step, "verify_s": 0.2, "cooldown_s": 0.0}]
        agent.config["api"] = [f"http://127.0.0.1:{world.peer.port}"]
        agent.config["beat_s"] = 60.0
        agents.append(agent)
    await all_started(agents)
    await until(lambda: len({one["device_id"] for one in world.peer.reports}) == 5, "accepted")
    await world.device.stop()
    (alert,) = await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    assert alert["kind"] == "offline"
    assert alert["count"] >= 4
    assert alert["evidence"]["repairs"][0]["outcome"] == "no help"
    await told_to_all(agents, alert["episode"])
    last = receiver.delivered[-1]
    assert last["episode"] == alert["episode"]
    assert {name for name, _ in last["devices"]} == {f"pump-{number}" for number in range(5)}
    assert len(receiver.told("firing")) == 1
    for agent in agents:
        assert len((await agent.status())["repairs"]["attempts"]) == 1


@pytest.mark.slow_because("two agents confirm a death, and leave one after the other")
async def test_the_last_device_of_an_episode_that_leaves_ends_it(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """If one of two alerted devices leaves the registry, the alert stays open; when the other leaves too, the alert
    ends once, and no note is left."""
    api = [f"http://127.0.0.1:{world.peer.port}"]
    agents = [member(world, receiver, consul.http_addr, n, gather_s=1.0) for n in range(2)]
    for agent in agents:
        agent.config["api"] = api
    await all_started(agents)
    await world.device.stop()
    (alert,) = await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    assert alert["count"] == 2
    await told_to_all(agents, alert["episode"])
    world.peer.body = b'{"error": {"code": "departed", "message": "the device has left"}}'
    for number, agent in enumerate(agents):
        # the peer gives all agents the same answer, so the other is suspended meanwhile
        for other in agents[number + 1 :]:
            assert other.process is not None
            other.process.send(signal.SIGSTOP)
        await asyncio.sleep(0.5)  # wait for reports that were in flight before the stop
        world.peer.status = 410
        assert agent.process is not None
        assert await agent.process.wait(SOON_S) == 0
        world.peer.status = 200
        assert len(receiver.told("resolved")) == number
        for other in agents[number + 1 :]:
            assert other.process is not None
            other.process.send(signal.SIGCONT)
    (ended,) = receiver.told("resolved")
    assert ended["key"] == f"{alert['episode']}.resolved"
    left = kv(consul, agents[0].config["prefix"])
    assert [one["Key"] for one in left if "/_" not in one["Key"]] == []


async def test_the_last_device_back_ends_the_episode_though_its_agent_did_not_know_of_it(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Two devices are in one alert sent by one agent; the other agent polls rarely and does not know of it yet when its
    device, the last one, is back: the episode still ends."""
    agents = [member(world, receiver, consul.http_addr, n, gather_s=1.0) for n in range(2)]
    agents[1].config["probes"] = [probe(world.peer.port, kind="tcp", interval_s=0.3, timeout_s=0.2)]
    agents[1].config["escalate"] |= {"gather_s": 120.0, "window_s": 120.0}
    await all_started(agents)
    await world.peer.stop()

    async def waits() -> bool:
        return bool((await agents[1].status())["escalations"]["open"])

    await until(waits, "it takes part", SOON_S)
    await world.device.stop()
    (alert,) = await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    assert alert["count"] == 2
    await told_to_all(agents[:1], alert["episode"])
    assert (await agents[1].status())["escalations"]["open"][0]["told"] is False
    await world.device.start()
    prefix = agents[0].config["prefix"]

    def notes() -> set[str]:
        return {
            one["Key"].rpartition("/")[2] for one in kv(consul, prefix) if "/_" not in one["Key"]
        }

    await until(lambda: notes() == {"pump-1"}, "the note of the one that is back is gone", SOON_S)
    assert receiver.told("resolved") == []
    await world.peer.start()
    (ended,) = await until(lambda: receiver.told("resolved"), "the end", SOON_S)
    assert ended["key"] == f"{alert['episode']}.resolved"
    await until(lambda: notes() == set(), "no note is left", SOON_S)


async def test_an_alert_whose_sender_recovers_before_the_answer_is_not_sent_again(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Two devices are down, and the leader's device is back before the receiver answers its alert: the alert counts as
    sent. The other agent does not send it again, and its device's return ends it."""
    agents = [member(world, receiver, consul.http_addr, n, gather_s=0.5) for n in range(2)]
    agents[1].config["probes"] = [probe(world.peer.port, kind="tcp", interval_s=0.3, timeout_s=0.2)]
    # It joins, and polls long after the leader was elected.
    agents[1].config["escalate"] |= {"gather_s": 6.0}
    await all_started(agents)
    receiver.holds.clear()
    await world.peer.stop()

    async def waits() -> bool:
        return bool((await agents[1].status())["escalations"]["open"])

    await until(waits, "the second takes part", SOON_S)
    await world.device.stop()
    await until(lambda: receiver.attempts, "the alert is on its way", SOON_S)
    await world.device.start()
    await agents[0].is_in("the first is back", SOON_S, state="ok")
    receiver.holds.set()

    def told() -> bool:
        found = [
            one for one in kv(consul, agents[0].config["prefix"]) if one["Key"].endswith("_told")
        ]
        return bool(found) and b'"told"' in base64.b64decode(found[0]["Value"])

    await until(told, "the alert counts as sent", SOON_S)
    await told_to_all(agents[1:], receiver.attempts[0]["body"]["episode"])
    await world.peer.start()
    (ended,) = await until(lambda: receiver.told("resolved"), "the end", SOON_S)
    assert ended["key"] == f"{receiver.attempts[0]['body']['episode']}.resolved"
    assert [one["body"]["status"] for one in receiver.attempts] == ["firing", "resolved"]


@pytest.mark.slow_because("a note of a dead agent grows old in real time")
async def test_the_note_of_a_dead_agent_holds_up_no_end_for_long(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Three devices are in one alert. One agent is killed for good and its note expires. A second device stays down:
    its note is renewed for longer than one lasts, and delays the end. When it is back too, the episode ends, and the
    dead agent's note is gone."""
    quick = {"gather_s": 1.0, "window_s": 2.0, "note_s": 4.0}
    agents = [member(world, receiver, consul.http_addr, n, **quick) for n in range(3)]
    agents[1].config["probes"] = [probe(world.peer.port, kind="tcp", interval_s=0.3, timeout_s=0.2)]
    await all_started(agents)
    await world.device.stop()
    await world.peer.stop()
    (alert,) = await until(lambda: receiver.told("firing"), "an alert", SOON_S)
    assert alert["count"] == 3
    await told_to_all(agents, alert["episode"])
    prefix = agents[0].config["prefix"]

    def notes() -> set[str]:
        return {
            one["Key"].rpartition("/")[2]
            for one in kv(consul, prefix)
            if "/_" not in one["Key"] and not one.get("Session")
        }

    await until(lambda: len(notes()) == 3, "three notes without a lock", SOON_S)
    assert agents[2].process is not None
    await agents[2].process.kill()
    await asyncio.sleep(14.0)  # a note expires after 3 x note_s = 12 s of real time
    await world.device.start()
    await agents[0].is_in("back", SOON_S, state="ok")
    await until(lambda: notes() == {"pump-1"}, "one young note is left", SOON_S)
    await asyncio.sleep(1.0)  # time in which the end could be sent too early
    assert receiver.told("resolved") == []
    await world.peer.start()
    await until(lambda: receiver.told("resolved"), "the end", SOON_S)
    assert {one["key"] for one in receiver.told("resolved")} == {f"{alert['episode']}.resolved"}
    await until(lambda: notes() == set(), "no note is left", SOON_S)


async def test_an_elected_one_sweeps_the_groups_of_the_gone(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """Keys of a group whose agents are all gone are deleted by the leader of another group; a fresh note of a third
    group stays."""
    agent = member(world, receiver, consul.http_addr, 0, gather_s=0.3, window_s=1.0)
    prefix = agent.config["prefix"]
    now = time.time()
    left = {
        "site-old/pump-7": {"id": "1", "until": now - 60},
        "site-old/_told": {"state": "told", "at": now - 86400},
        "site-old/_leader": {},
        "site-new/pump-8": {"id": "2", "until": now + 600},
    }
    for key, value in left.items():
        url = f"{consul.http_addr}/v1/kv/{prefix}/anomalies/{key}"
        request = urllib.request.Request(url, json.dumps(value).encode(), method="PUT")
        urllib.request.urlopen(request, timeout=5).close()
    await all_started([agent])
    await world.device.stop()
    await until(lambda: receiver.told("firing"), "an alert", SOON_S)

    def swept() -> bool:
        keys = {one["Key"].removeprefix(f"{prefix}/anomalies/") for one in kv(consul, prefix)}
        return keys & left.keys() == {"site-new/pump-8"}

    await until(swept, "only the young note is left", SOON_S)


async def test_without_consul_each_tells_alone_and_says_so(
    world: World, receiver: Receiver
) -> None:
    """With Consul down, each agent escalates on its own after the wait, marked as uncoordinated."""
    nobody = f"http://127.0.0.1:{free_port()}"
    agents = [
        member(world, receiver, nobody, number, consul_wait_s=1.0, gather_s=0.5)
        for number in range(2)
    ]
    await all_started(agents)
    await world.device.stop()
    await until(lambda: len(receiver.told("firing")) == 2, "two alerts", SOON_S)
    assert [one["uncoordinated"] for one in receiver.delivered] == [True, True]
    assert {one["devices"][0][0] for one in receiver.delivered} == {"pump-0", "pump-1"}
    await world.device.start()
    await until(lambda: len(receiver.told("resolved")) == 2, "both ends", SOON_S)


async def test_consul_that_stands_still_silences_nobody(
    world: World, receiver: Receiver, tmp_path: Path
) -> None:
    """If Consul accepts connections but does not answer, the alert is still sent."""
    async with ConsulServer(tmp_path / "consul") as consul:
        agent = member(world, receiver, consul.http_addr, 0, consul_wait_s=2.0, gather_s=0.5)
        await all_started([agent])
        consul.pause()
        try:
            await world.device.stop()
            await until(lambda: receiver.told("firing"), "an alert", SOON_S)
        finally:
            consul.resume()
        assert receiver.told("firing")[0]["uncoordinated"] is True


async def test_a_consul_event_is_fired(
    world: World, receiver: Receiver, consul: ConsulServer
) -> None:
    """The sink consul_event fires a Consul event with key, status and count."""
    agent = member(world, receiver, consul.http_addr, 0, gather_s=0.5)
    name = f"bell-{world.folder.name}".replace("_", "-")[:60]
    agent.config["escalate"]["sinks"] = [{"kind": "consul_event", "name": name}]
    await all_started([agent])
    await world.device.stop()
    url = f"{consul.http_addr}/v1/event/list?name={name}"

    def fired() -> list[dict[str, Any]]:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.loads(answer.read())

    (event,) = await until(fired, "an event", SOON_S)
    import base64

    said = json.loads(base64.b64decode(event["Payload"]))
    assert (said["status"], said["count"]) == ("firing", 1)

"""State in a real Consul, for agents without a folder; and the shipped ACL policy."""

from __future__ import annotations

import base64
import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.demo.process import Process, free_port
from servers.consul import ConsulServer
from tests.agent.receiver import Receiver
from tests.agent.world import Agent, World, tcp, until

pytestmark = pytest.mark.servers


class Homeless(Agent):
    """An agent without a folder of its own, at an address that is known in advance."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        super().__init__(folder, config)
        self.listen = f"127.0.0.1:{free_port()}"
        self.extra = {"WATCHDOG_STATE_DIR": "", "WATCHDOG_LISTEN": self.listen}

    async def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        env = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "agent"),
            "WATCHDOG_CONFIG": str(self.folder / "config.json"),
            **self.extra,
        }
        self.process = Process.start(self.argv, log=self.folder / "log", env=env)
        (self.folder / "agent.json").write_text(json.dumps({"listen": self.listen}))
        await until(self._serves, "serving", 60.0)

    async def _serves(self) -> bool:
        self._ended()
        try:
            return (await self.get("/healthz"))[0] == 200
        except OSError:
            return False


def homeless(world: World, consul: str, **changes: Any) -> Homeless:
    """An agent that keeps its state in Consul, and registers there."""
    plain = world.agent(
        consul=consul,
        state="consul",
        prefix=f"test-{world.folder.name}".replace("_", "-"),
        service="homeless",
        **changes,
    )
    world.agents.remove(plain)
    agent = Homeless(plain.folder.with_name(f"homeless-{len(world.agents)}"), plain.config)
    world.agents.append(agent)
    return agent


def kept(consul: ConsulServer, agent: Agent) -> dict[str, Any] | None:
    """This agent's state in Consul, with its ModifyIndex as `index`."""
    where = f"{agent.config['prefix']}/agent-state/{agent.config['slug']}"
    try:
        with urllib.request.urlopen(f"{consul.http_addr}/v1/kv/{where}", timeout=5) as answer:
            (entry,) = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        assert error.code == 404
        return None
    raw = base64.b64decode(entry["Value"])
    assert len(raw) <= 2048
    return json.loads(raw) | {"index": entry["ModifyIndex"]}


async def test_what_was_believed_survives_without_a_folder(
    world: World, consul: ConsulServer
) -> None:
    """After kill -9 a new run knows that the device was offline, does not escalate it again, and continues with a
    higher sequence."""
    receiver = Receiver()
    await receiver.start()
    sink = {"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"}
    agent = homeless(world, consul.http_addr, escalate={"sinks": [sink], "by": []})
    try:
        await agent.start()
        await agent.is_in("ok", state="ok", was_ready=True)
        await world.device.stop()
        await until(lambda: receiver.told("firing"), "an escalation")

        def told() -> bool:
            state = (kept(consul, agent) or {}).get("state", {})
            open_ = state.get("escalations", [])
            return state.get("state") == "offline" and bool(open_) and open_[0]["told"]

        await until(told, "kept", 40.0)
        before = world.peer.last["sequence"]
        assert agent.process is not None
        await agent.process.kill()
        world.peer.reports.clear()
        await agent.start()
        first = (await until(lambda: world.peer.reports, "a report"))[0]
        assert (first["state"], first["was_ready"]) == ("offline", True)
        assert first["sequence"] > before
        await world.device.start()
        await until(lambda: receiver.told("resolved"), "the end")
        assert len(receiver.told("firing")) == 1
    finally:
        await receiver.stop()


@pytest.mark.slow_because("a hundred reports are awaited")
async def test_a_quiet_agent_writes_nothing_more(world: World, consul: ConsulServer) -> None:
    """Reports and saved rounds that change nothing cause no write to Consul."""
    agent = homeless(world, consul.http_addr, beat_s=0.1)
    await agent.start()
    first = await until(lambda: kept(consul, agent), "kept", 60.0)
    seen = len(world.peer.reports)
    await until(lambda: len(world.peer.reports) > seen + 100, "100 beats", 60.0)
    again = kept(consul, agent)
    assert again is not None
    assert again["index"] == first["index"]


async def test_an_older_epoch_never_overwrites_a_newer_one(
    world: World, consul: ConsulServer
) -> None:
    """A replaced agent that keeps running does not overwrite its successor's state; the successor takes over the state
    that the older one wrote."""
    old = homeless(world, consul.http_addr, epoch=3)
    await old.start()
    await until(lambda: kept(consul, old), "kept", 60.0)
    new = homeless(world, consul.http_addr, epoch=4)
    await new.start()
    await new.is_in("knows the past", was_ready=True)
    await world.device.stop()
    await until(
        lambda: (found := kept(consul, new)) and found["epoch"] == 4, "the heir's state", 40.0
    )

    def gave_up() -> bool:
        return any("newer epoch" in line["msg"] for line in old.log)

    await until(gave_up, "the old one has noticed", 60.0)
    found = kept(consul, new)
    assert found is not None
    assert found["epoch"] == 4


async def test_the_state_of_a_device_that_has_left_is_taken_away(
    world: World, consul: ConsulServer
) -> None:
    """An agent that receives `departed` leaves nothing in Consul; one that is merely replaced leaves its state to its
    successor."""
    for code, left in (("refused", True), ("departed", False)):
        agent = homeless(world, consul.http_addr)
        await agent.start()
        await until(lambda agent=agent: kept(consul, agent), "kept", 60.0)
        await world.peer.saw("a report", ready=True)
        world.peer.body = json.dumps({"error": {"code": code, "message": "x"}}).encode()
        world.peer.status = 410
        assert agent.process is not None
        assert await agent.process.wait(60.0) == 0
        assert (kept(consul, agent) is not None) is left
        world.peer.status = 200
        world.peer.reports.clear()


async def test_a_dead_consul_holds_up_no_start(world: World) -> None:
    """With Consul down, an agent that keeps its state there probes and reports within seconds."""
    agent = homeless(world, f"http://127.0.0.1:{free_port()}")
    await agent.start()
    await world.peer.saw("a report", state="ok", was_ready=True)
    assert await agent.signal(signal.SIGTERM) == 143


async def test_a_consul_that_stands_still_holds_up_a_start_for_a_second(
    world: World, tmp_path: Path
) -> None:
    """A Consul that accepts connections but does not answer delays a start by one second, and this is logged."""
    async with ConsulServer(tmp_path / "consul") as consul:
        consul.pause()
        try:
            agent = homeless(world, consul.http_addr)
            await agent.start()
            await world.peer.saw("a report", state="ok", was_ready=True)
            assert any("state in Consul" in line["msg"] for line in agent.log)
        finally:
            consul.resume()


async def test_the_shipped_rights_are_enough(
    world: World, acl_consul: ConsulServer, repository: Path
) -> None:
    """With only the permissions of jobs/policies/consul-agent.hcl, two agents elect one that alerts for both, fire
    Consul events and keep their state; access to an unrelated key is denied (S10)."""
    rules = (repository / "jobs" / "policies" / "consul-agent.hcl").read_text()
    receiver = Receiver()
    await receiver.start()
    headers = {"X-Consul-Token": acl_consul.token}
    async with aiohttp.ClientSession(acl_consul.http_addr, headers=headers) as http:
        policy = {"Name": "watchdog-agent", "Rules": acl_consul.sessions(rules)}
        async with http.put("/v1/acl/policy", json=policy) as answer:
            assert answer.status == 200, await answer.text()
        made = {"Policies": [{"Name": "watchdog-agent"}]}
        async with http.put("/v1/acl/token", json=made) as answer:
            token = (await answer.json())["SecretID"]
        (world.folder / "token").write_text(token)
        sinks = [
            {"kind": "webhook", "url": f"http://127.0.0.1:{receiver.port}"},
            {"kind": "consul_event"},
        ]
        try:
            agents = []
            for number in range(2):
                agent = homeless(
                    world,
                    acl_consul.http_addr,
                    device_id=f"acl-{number}",
                    slug=f"acl-{number}",
                    labels={"site": "north"},
                    confirm=[tcp(world.dead_port)],
                    escalate={"sinks": sinks, "gather_s": 2.0},
                )
                agent.config |= {"prefix": "nomad-watchdog", "service": "device-watchdog-agent"}
                agent.extra["CONSUL_HTTP_TOKEN_FILE"] = str(world.folder / "token")
                agents.append(agent)
                await agent.start()
                await agent.is_in("ready", 20.0, ready=True, was_ready=True)
            await world.device.stop()
            await until(lambda: receiver.told("firing"), "an alert", 60.0)
            (alert,) = receiver.told("firing")
            assert (alert["count"], alert["group"]) == (2, ["site", "north"])

            async def has(path: str) -> bool:
                async with http.get(path) as answer:
                    return answer.status == 200 and bool(await answer.json())

            await until(lambda: has("/v1/event/list?name=watchdog-escalation"), "an event", 60.0)
            for agent in agents:
                path = f"/v1/kv/nomad-watchdog/agent-state/{agent.config['slug']}"
                await until(lambda path=path: has(path), "kept", 60.0)
            stranger = "/v1/kv/nomad-watchdog/devices/meta"
            async with http.put(stranger, data=b"{}", headers={"X-Consul-Token": token}) as answer:
                assert answer.status == 403
        finally:
            await receiver.stop()

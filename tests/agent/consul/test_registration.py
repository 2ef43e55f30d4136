"""The agent with a real Consul."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from watchdog_agent.consul.registration import Registration
from watchdog_agent.runtime.loop import Loop

from nomad_watchdog.demo.process import free_port
from servers.consul import ConsulServer
from tests.agent.world import World, until

pytestmark = pytest.mark.servers

SERVICE = "agent-test"


def call(consul: ConsulServer, method: str, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{consul.http_addr}/v1{path}", data, method=method)
    with urllib.request.urlopen(request, timeout=5) as response:
        text = response.read()
    return json.loads(text) if text else None


def registered(consul: ConsulServer, slug: str) -> dict[str, Any] | None:
    return call(consul, "GET", "/agent/services").get(slug)


@pytest.mark.slow_because("waits for Consul's first check, twice")
async def test_registration_and_its_ends(consul: ConsulServer, world: World) -> None:
    """The agent registers with its metadata, passes its check, registers again after being deregistered, and is gone
    after SIGTERM."""
    agent = await world.started(
        device_id="pump 日本",
        consul=consul.http_addr,
        service=SERVICE,
        check_interval="1s",
        register_every_s=0.5,
    )
    slug = agent.config["slug"]
    report = await world.peer.saw("ready", ready=True)
    service = registered(consul, slug)
    assert service is not None
    assert (service["ID"], service["Service"], service["Tags"]) == (slug, SERVICE, [slug])
    assert f"{service['Address']}:{service['Port']}" == report["listen"]
    assert service["Meta"] == {
        "device_id": "pump 日本",
        "slug": slug,
        "epoch": "3",
        "version": "0.1.0",
        "agent_class": "default",
        "spec_hash": "abc",
        "instance": report["instance"],
    }

    def check() -> dict[str, Any]:
        return call(consul, "GET", "/agent/checks")[f"{slug}-healthz"]

    await until(lambda: check()["Status"] == "passing", "a passing check", 60.0)
    assert "ok" in check()["Output"]
    call(consul, "PUT", f"/agent/service/deregister/{slug}")
    await until(lambda: registered(consul, slug), "registered again", 60.0)
    await until(lambda: check()["Status"] == "passing", "passing again", 60.0)
    assert await agent.signal(signal.SIGTERM) == 143
    assert registered(consul, slug) is None


@pytest.mark.slow_because("waits for Consul's first check, then reads it a hundred times")
async def test_repeated_registration_keeps_the_check_passing(
    consul: ConsulServer, world: World
) -> None:
    """Registering again without changes never sets a passing check back to critical."""
    agent = await world.started(
        device_id="steady",
        consul=consul.http_addr,
        service=SERVICE,
        check_interval="1s",
        register_every_s=0.1,
    )
    path = f"/health/checks/{SERVICE}?filter=ServiceID%3D%3D%22{agent.config['slug']}%22"

    def states() -> list[str]:
        return [c["Status"] for c in call(consul, "GET", path)]

    await until(lambda: states() == ["passing"], "a passing check", 60.0)
    seen = []
    await until(lambda: seen.append(states()) or len(seen) >= 100, "100 looks", 60.0)
    assert [s for s in seen if s != ["passing"]] == []


async def test_retired_agent_leaves_consul(consul: ConsulServer, world: World) -> None:
    """An agent that receives 410 deregisters before it exits with 0."""
    agent = await world.started(device_id="retired", consul=consul.http_addr, service=SERVICE)
    await world.peer.saw("ready", ready=True)
    world.peer.status = 410
    assert agent.process is not None
    assert await agent.process.wait(60.0) == 0
    assert registered(consul, agent.config["slug"]) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_after_a_410_does_not_cut_the_deregistration_short(
    world: World, tmp_path: Path, number: signal.Signals
) -> None:
    """If the scheduler stops an agent that already received 410 and is waiting for a slow Consul, the agent still
    deregisters and exits with 0."""
    async with ConsulServer(tmp_path / "own-consul") as server:
        agent = await world.started(consul=server.http_addr, service=SERVICE)
        await world.peer.saw("ready", ready=True)
        server.pause()
        world.peer.status = 410
        await world.device.stop()
        await until(
            lambda: any(x["msg"] == "retired by the control plane" for x in agent.log),
            "retired by the control plane",
        )
        assert agent.process is not None
        agent.process.send(number)
        await until(lambda: any(x["msg"] == "signal" for x in agent.log), "the signal is seen")
        server.resume()
        assert await agent.process.wait(10.0) == 0
        assert registered(server, agent.config["slug"]) is None


async def test_dead_consul_harms_nobody(world: World) -> None:
    """Without Consul the agent is not ready, but it probes its device and reports; and it stops in time."""
    agent = await world.started(consul=f"http://127.0.0.1:{free_port()}")
    report = await world.peer.saw("a report", state="ok", was_ready=True)
    assert report["ready"] is False
    assert (await agent.get("/ready"))[0] == 503
    assert (await agent.get("/healthz"))[0] == 200
    await world.device.stop()
    await world.peer.saw("offline", state="offline")
    assert await agent.signal(signal.SIGTERM) == 143


@pytest.mark.slow_because("starts a Consul of its own twice")
async def test_consul_that_dies_and_returns(world: World, tmp_path: Path) -> None:
    """A running agent survives a Consul outage, and registers again when Consul returns without its data."""
    async with ConsulServer(tmp_path / "own-consul") as server:
        agent = await world.started(
            consul=server.http_addr, service=SERVICE, check_interval="1s", register_every_s=0.3
        )
        await world.peer.saw("ready", ready=True)
        await server.kill()
        await world.device.stop()
        offline = await world.peer.saw("offline", state="offline")
        assert offline["ready"] is True
        await server.start()
        call(server, "PUT", f"/agent/service/deregister/{agent.config['slug']}")
        await until(lambda: registered(server, agent.config["slug"]), "registered again", 40.0)
        assert await agent.signal(signal.SIGTERM) == 143


async def test_an_agent_leaves_the_registration_of_another_instance(
    consul: ConsulServer, world: World
) -> None:
    """What another instance of the device registered under the same ID is still there after SIGTERM; raced starts can
    create two."""
    agent = await world.started(device_id="raced", consul=consul.http_addr, service=SERVICE)
    await world.peer.saw("ready", ready=True)
    slug = agent.config["slug"]
    other = {"ID": slug, "Name": SERVICE, "Meta": {"instance": "another"}}
    call(consul, "PUT", "/agent/service/register", other)

    assert await agent.signal(signal.SIGTERM) == 143

    found = registered(consul, slug)
    call(consul, "PUT", f"/agent/service/deregister/{slug}")
    assert found is not None
    assert found["Meta"] == {"instance": "another"}


async def test_an_agent_that_is_accepted_late_registers_again(
    consul: ConsulServer, world: World
) -> None:
    """An agent whose reports were deferred while another instance was accepted registers in Consul as soon as it is
    accepted, not only at its next scheduled registration."""
    agent = await world.started(
        device_id="late", consul=consul.http_addr, service=SERVICE, register_every_s=3600.0
    )
    slug = agent.config["slug"]
    await world.peer.saw("ready", ready=True)
    world.peer.status = 409
    await world.device.stop()
    await until(lambda: world.peer.refused, "a report that is put off", 60.0)
    call(consul, "PUT", f"/agent/service/deregister/{slug}")
    world.peer.status = 200

    await until(lambda: registered(consul, slug), "registered again", 60.0)

    assert await agent.signal(signal.SIGTERM) == 143


@pytest.mark.parametrize("later", [200, 503, None])
async def test_a_later_answer_does_not_cancel_the_deregistration(
    consul: ConsulServer, later: int | None
) -> None:
    """An agent whose reports were deferred and that then receives 410 deregisters: another answer meanwhile, or a
    report that ends without one, changes nothing."""
    slug = f"retired-{later}"
    config = {"device_id": slug, "slug": slug, "epoch": 3, "service": SERVICE}
    config |= {"consul": consul.http_addr}
    loop = Loop()
    ends: list[str] = []

    def deregister() -> None:
        assert registered(consul, slug) is not None
        one.answered(409)
        one.answered(410)
        one.close(lambda: [ends.append("deregistered"), loop.stop()])
        one.answered(later)

    one = Registration(
        loop,
        config,
        "an-instance",
        "127.0.0.1:1",
        log=lambda _text: None,
        registered=lambda: loop.later(0.0, deregister),
    )
    one.start()
    loop.later(30.0, loop.stop)
    loop.run()
    loop.close()

    assert ends == ["deregistered"]
    assert registered(consul, slug) is None

"""The agent with a real Consul that serves https and requires a client certificate."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import trustme
from watchdog_agent.config import document as config
from watchdog_agent.consul.registration import place, trusted_by

from servers.consul import ConsulServer
from tests.agent.consul.test_kept_state import homeless, kept
from tests.agent.consul.test_registration import SERVICE, call, registered
from tests.agent.world import World, until


@dataclass
class Guarded:
    """A Consul, the CA that it trusts and that signed its certificate, and a certificate from this CA for an agent."""

    server: ConsulServer
    authority: trustme.CA
    cert: Path
    key: Path

    def issue(self, authority: trustme.CA) -> None:
        """Replace the agent's certificate with a new one."""
        made = authority.issue_cert("agent.example")
        self.key.write_bytes(made.private_key_pem.bytes())
        self.cert.write_bytes(b"".join(part.bytes() for part in made.cert_chain_pems))

    def told(self) -> dict[str, str]:
        """The settings for it in an agent's document."""
        ca = self.authority.cert_pem.bytes().decode()
        return {"ca_cert": ca, "client_cert": str(self.cert), "client_key": str(self.key)}


@pytest_asyncio.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    folder = tmp_path / "guarded"
    folder.mkdir()
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.private_key_pem.write_to_path(str(folder / "server.key"))
    made.cert_chain_pems[0].write_to_path(str(folder / "server.crt"))
    authority.cert_pem.write_to_path(str(folder / "ca.crt"))
    tls = {
        "ca_file": str(folder / "ca.crt"),
        "cert_file": str(folder / "server.crt"),
        "key_file": str(folder / "server.key"),
        "verify_incoming": True,
    }
    async with ConsulServer(folder / "consul", tls=tls) as server:
        found = Guarded(server, authority, folder / "agent.crt", folder / "agent.key")
        found.issue(authority)
        yield found


@pytest.mark.servers
@pytest.mark.parametrize("way", ["document", "environment"])
async def test_all_that_it_says_to_consul_goes_over_https(
    guarded: Guarded, world: World, tmp_path: Path, way: str
) -> None:
    """The agent registers, keeps its state, fires events and deregisters with its certificate, however it is
    configured."""
    sink = {"kind": "consul_event", "name": "bell"}
    agent = homeless(world, "", escalate={"sinks": [sink], "by": []})
    if way == "document":
        agent.config |= {"consul": guarded.server.https_addr, "consul_tls": guarded.told()}
    else:
        ca = tmp_path / "ca.pem"
        guarded.authority.cert_pem.write_to_path(str(ca))
        agent.extra |= {
            "CONSUL_HTTP_ADDR": guarded.server.https_addr.removeprefix("https://"),
            "CONSUL_HTTP_SSL": "true",
            "CONSUL_CACERT": str(ca),
            "CONSUL_CLIENT_CERT": str(guarded.cert),
            "CONSUL_CLIENT_KEY": str(guarded.key),
        }
    await agent.start()
    slug = agent.config["slug"]
    await world.peer.saw("ready", ready=True)
    assert registered(guarded.server, slug) is not None
    await until(lambda: kept(guarded.server, agent), "kept", 60.0)
    await world.device.stop()
    (event,) = await until(
        lambda: call(guarded.server, "GET", "/event/list?name=bell"), "an event", 40.0
    )
    assert json.loads(base64.b64decode(event["Payload"]))["status"] == "firing"
    assert await agent.signal(signal.SIGTERM) == 143
    assert registered(guarded.server, slug) is None


@pytest.mark.servers
async def test_without_its_certificate_it_watches_on_and_a_new_one_is_taken(
    guarded: Guarded, world: World
) -> None:
    """If Consul rejects its certificate, the agent logs it and keeps watching its device; a replaced certificate is
    used at the next attempt, without a restart."""
    guarded.issue(trustme.CA())
    agent = await world.started(
        consul=guarded.server.https_addr, consul_tls=guarded.told(), service=SERVICE
    )
    report = await world.peer.saw("a report", state="ok", was_ready=True)
    assert report["ready"] is False
    await until(
        lambda: [line for line in agent.log if "consul: " in line["msg"]], "a line about Consul"
    )
    assert registered(guarded.server, agent.config["slug"]) is None
    guarded.issue(guarded.authority)
    await until(lambda: registered(guarded.server, agent.config["slug"]), "registered", 40.0)
    await world.peer.saw("ready", ready=True)


def document(**changes: Any) -> dict[str, Any]:
    base = {"v": 1, "device_id": "a", "slug": "a", "epoch": 1, "address": "127.0.0.1"}
    return {**base, "probes": [{"kind": "tcp", "port": 1}], **changes}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([], "consul_tls must be an object"),
        ({"client_cert": 7}, "client_cert must be the path"),
        ({"client_key": "/k"}, "client_key needs client_cert"),
        ({"client_cert": "/nowhere/agent.pem"}, "client_cert: "),
        ({"ca_cert": "/nowhere/ca.pem"}, "ca_cert: "),
    ],
)
def test_what_can_not_be_used_is_refused_at_the_start(told: Any, message: str) -> None:
    """A wrong `consul_tls` makes the document invalid."""
    with pytest.raises(config.ConfigError) as caught:
        config.check(document(consul="https://127.0.0.1:1", consul_tls=told))
    assert message in str(caught.value)


@pytest.mark.parametrize("told", [{"client_cert": "/nowhere"}, {"trust": 7}, ["trust"]])
def test_over_http_no_certificate_is_read(told: Any) -> None:
    """With an http:// address no TLS is loaded, whatever `consul_tls` contains."""
    assert trusted_by(config.check(document(consul="http://c:1", consul_tls=told))) is None
    assert trusted_by(config.check(document(consul_tls=told))) is None


@pytest.mark.parametrize(
    ("address", "port"),
    [("http://c", 80), ("https://c", 443), ("https://c:8501", 8501)],
)
def test_the_port_is_the_one_that_the_control_plane_takes(address: str, port: int) -> None:
    """Without a port, agent and control plane use the default port of the scheme, as Consul's own command does."""
    assert place(config.check(document(consul=address))).port == port

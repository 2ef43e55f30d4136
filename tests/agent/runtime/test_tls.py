"""The agent over https: what it trusts, what it reveals, and what it costs."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from watchdog_agent.errors import ConfigError
from watchdog_agent.runtime import tls, tls_trust
from watchdog_agent.runtime.http import reason_of

from nomad_watchdog.schedulers.agent_zipapp import build_agent
from tests.agent.world import Agent, World, a_world, until

CREDENTIAL = "wda1.pump-7-abc.3.c0ffee-secret"


@pytest.fixture
async def secure(tmp_path: Path) -> Any:
    """A world whose peer serves TLS, and the CA of its certificate."""
    authority = trustme.CA()
    async with a_world(tmp_path) as world:
        await world.peer.stop()
        world.peer.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1", "localhost").configure_cert(world.peer.tls)
        await world.peer.start()
        yield world, authority.cert_pem.bytes().decode()


def agent_of(world: World, ca: str, **changes: Any) -> Agent:
    api = [f"https://127.0.0.1:{world.peer.port}"]
    return world.agent(**{"api": api, "ca_cert": ca, "credential": CREDENTIAL, **changes})


async def test_reports_over_https_with_its_credential(secure: Any, tmp_path: Path) -> None:
    """The single-file agent trusts the CA in its document, sends its credential instead of the token in a file, sends
    its last report, and reveals the credential nowhere (S10)."""
    world, ca = secure
    build_agent(tmp_path / "agent.pyz")
    (tmp_path / "token").write_text("shared-token")
    agent = agent_of(world, ca)
    agent.argv = [sys.executable, "-I", "-S", str(tmp_path / "agent.pyz")]
    agent.extra = {"WATCHDOG_TOKEN_FILE": str(tmp_path / "token")}
    await agent.start()
    await world.peer.saw("a report", ready=True)
    assert world.peer.bearer == CREDENTIAL
    pages = [(await agent.get(path))[1] for path in ("/status", "/metrics", "/healthz")]
    arguments = Path(f"/proc/{agent.pid}/cmdline").read_bytes().decode()
    environment = Path(f"/proc/{agent.pid}/environ").read_bytes().decode()
    assert await agent.signal(signal.SIGTERM) == 143
    assert world.peer.last["stopping"] is True
    said = [*pages, arguments, environment, str(agent.log), str(world.peer.reports)]
    assert not any("c0ffee" in text for text in said)


@pytest.mark.parametrize("way", ["file in the document", "file in the environment", "name"])
async def test_other_ways_to_trust(secure: Any, tmp_path: Path, way: str) -> None:
    """A path in the document, a path in the environment, and a host name instead of an address work."""
    world, ca = secure
    file = tmp_path / "ca.pem"
    file.write_text(ca)
    agent = agent_of(world, str(file) if way == "file in the document" else ca)
    if way == "file in the environment":
        agent.config["ca_cert"] = trustme.CA().cert_pem.bytes().decode()
        agent.extra = {"WATCHDOG_CA_CERT": str(file)}
    if way == "name":
        agent.config["api"] = [f"https://localhost:{world.peer.port}"]
    await agent.start()
    await world.peer.saw("a report", ready=True)


async def test_a_server_that_is_not_trusted_gets_nothing(secure: Any) -> None:
    """With another CA nothing is sent, the log states why, and the agent keeps watching."""
    world, _ = secure
    agent = agent_of(world, trustme.CA().cert_pem.bytes().decode())
    await agent.start()

    def said() -> bool:
        return any("report failed: TLS: " in line["msg"] for line in agent.log)

    await until(said, "a reason in the log")
    assert world.peer.bearer == ""
    assert (await agent.status())["was_ready"] is True
    assert await agent.signal(signal.SIGTERM) == 143


async def test_wedged_handshakes_hold_up_nothing(secure: Any) -> None:
    """With a peer that accepts the connection and never shakes hands, then one that does not speak TLS, the agent keeps
    answering, and ends within 3 s of a signal."""
    world, ca = secure
    await world.peer.stop()
    world.peer.tls, met = None, asyncio.Event()

    async def mute(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        met.set()
        while await reader.read(4096):
            pass

    world.peer.speak = mute
    await world.peer.start()
    agent = agent_of(world, ca)
    await agent.start()
    async with asyncio.timeout(20):
        await met.wait()
    assert (await agent.get("/healthz"))[0] == 200

    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

    world.peer.speak = rude
    await until(lambda: any("TLS: " in line["msg"] for line in agent.log), "no TLS", 60.0)
    assert await agent.signal(signal.SIGTERM) == 143


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ca_cert": "/nowhere/ca.pem"}, "ca_cert: no such file"),
        ({"ca_cert": "-----BEGIN CERTIFICATE-----\nx"}, "ca_cert"),
        ({"ca_cert": 5}, "ca_cert is 5"),
        ({"credential": "c0ffee secret"}, "credential must be printable"),
        ({"credential": ["c0ffee"]}, "credential must be printable"),
    ],
)
async def test_what_can_not_be_used_is_said_at_start(
    secure: Any, change: dict[str, Any], words: str
) -> None:
    """A wrong CA or credential ends the start with exit code 64 and a line that names it, and never the credential."""
    world, ca = secure
    agent = agent_of(world, ca, **change)
    with pytest.raises(AssertionError):
        await agent.start()
    assert agent.process is not None
    assert await agent.process.wait(60.0) == 64
    assert words in str(agent.log)
    assert "c0ffee" not in str(agent.log)


async def test_tls_costs_only_who_uses_it(secure: Any, tmp_path: Path) -> None:
    """An agent with an http address has not loaded the TLS library; one with https uses at most 22 MB."""
    world, ca = secure
    build_agent(tmp_path / "agent.pyz")
    argv = [sys.executable, "-I", "-S", str(tmp_path / "agent.pyz")]
    plain, secured = agent_of(world, ca), agent_of(world, ca)
    plain.config["api"] = [f"http://127.0.0.1:{world.dead_port}"]
    plain.argv = secured.argv = argv
    await plain.start()
    await secured.start()
    await world.peer.saw("a report", ready=True)
    await until(lambda: len(world.peer.reports) > 3, "a few reports")
    assert "_ssl" not in Path(f"/proc/{plain.pid}/maps").read_text()
    assert "_ssl" in Path(f"/proc/{secured.pid}/maps").read_text()
    assert secured.kilobytes("VmRSS") < 22_000, secured.kilobytes("VmRSS")


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_pem_files_with_a_byte_order_mark_are_taken(tmp_path: Path, mark: str) -> None:
    """Files that the control plane accepts, its agents accept too: a CA as a file and as text, and a client certificate
    with its key in one file or in two, with a comment that is not ASCII."""
    authority = trustme.CA()
    leaf = authority.issue_cert("agent.test")
    chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems).decode()
    key = leaf.private_key_pem.bytes().decode()
    texts = {
        "ca": authority.cert_pem.bytes().decode(),
        "cert": chain,
        "key": key,
        "both": key + chain,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(f"{mark}{text}# Gerät\n", encoding="utf-8")
    ca = tmp_path / "ca"
    for trusted in (str(ca), ca.read_text(encoding="utf-8")):
        (found,) = tls.trusting(trusted).get_ca_certs()
        assert found["subject"] == found["issuer"]
    spec: Any = {"verify": True, "ca_cert": str(ca)}
    for cert, private in (("cert", str(tmp_path / "key")), ("both", "")):
        tls_trust.context_of(spec | {"client_cert": str(tmp_path / cert), "client_key": private})
    left = []
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            left.append(str(one.readlink()))
    assert not [target for target in left if "memfd:pem" in target]


def pair_in(folder: Path) -> dict[str, Any]:
    """TLS settings of a probe with a new client certificate and its key, always of the same size and time."""
    leaf = trustme.CA().issue_cert("agent.test")
    for name, pem in (("cert", leaf.cert_chain_pems[0]), ("key", leaf.private_key_pem)):
        (folder / name).write_bytes(pem.bytes().ljust(4096, b"\n"))
        os.utime(folder / name, (1e9, 1e9))
    files = {"client_cert": str(folder / "cert"), "client_key": str(folder / "key")}
    return {"verify": False, "ca_cert": "", **files}


def test_a_pair_that_is_changed_in_place_is_noticed(tmp_path: Path) -> None:
    """A new pair of the same size and modification time is used for the next connection."""
    spec: Any = pair_in(tmp_path)
    trust = tls_trust.Trust(spec)
    before, made = trust.now(), (tmp_path / "key").stat().st_ctime_ns
    assert trust.now() is before
    while (tmp_path / "key").stat().st_ctime_ns == made:  # until the file system's clock goes on
        pair_in(tmp_path)
    assert trust.now() is not before


@pytest.mark.parametrize("mode", [0o602, 0o666])
def test_a_key_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The error names the mode, so that the user can correct it."""
    spec: Any = pair_in(tmp_path)
    (tmp_path / "key").chmod(mode)
    with pytest.raises(ConfigError, match=f"client_cert: can be written by everybody .*{mode:o}"):
        tls_trust.context_of(spec)


def test_a_number_of_the_tls_library_is_not_taken_for_one_of_the_kernel() -> None:
    """A TLS error whose number is also an errno (8, ENOEXEC) is reported as a TLS error."""
    hung_up = ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
    assert reason_of(hung_up) == "TLS: eof occurred in violation of protocol"

"""TLS and client certificates on a real socket, and the CLI that uses them."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from nomad_watchdog.api import Runner
from nomad_watchdog.api import listener as serving
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.api.listener import ApiListener
from nomad_watchdog.api.schemas import ReportIn
from nomad_watchdog.cli.main import _code
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.errors import UserError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import AgentState, Device, Epoch
from nomad_watchdog.replicas.leases import Replica, SoleOwner
from nomad_watchdog.replicas.report_replication import ReportReplicator
from tests.api.conftest import served
from tests.api.test_api import WISH, _report

KEY = "k" * 40


def write_pair(folder: Path, authority: trustme.CA, name: str = "server") -> None:
    """Write a certificate for 127.0.0.1 and its key, renamed into place as a tool would."""
    pair = authority.issue_cert("127.0.0.1", common_name=name)
    for file, pems in (("key", [pair.private_key_pem]), ("cert", pair.cert_chain_pems)):
        fresh = folder / f"{name}.{file}.new"
        fresh.write_bytes(b"".join(pem.bytes() for pem in pems))
        fresh.rename(folder / f"{name}.{file}")


@dataclass
class Secure:
    """An API that serves TLS."""

    folder: Path
    url: str
    listener: ApiListener
    fleet: Fleet

    def trust(self, authority: trustme.CA, name: str = "") -> ssl.SSLContext:
        """SSL context of a client that trusts this authority, and presents the certificate with this name."""
        context = ssl.create_default_context()
        authority.configure_trust(context)
        if name:
            context.load_cert_chain(self.folder / f"{name}.cert", self.folder / f"{name}.key")
        return context

    async def get(
        self, path: str, context: ssl.SSLContext, method: str = "GET", **options: Any
    ) -> int:
        """Status of a request over a new connection."""
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
            session.request(method, self.url + path, ssl=context, **options) as answer,
        ):
            await answer.read()
            return answer.status


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@asynccontextmanager
async def secure(folder: Path, authority: trustme.CA, **changes: Any) -> AsyncIterator[Secure]:
    """The API over TLS on a free port, which follows changes of its files."""
    write_pair(folder, authority)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    api = ApiSettings(
        listen="127.0.0.1:0",
        tls_cert=str(folder / "server.cert"),
        tls_key=str(folder / "server.key"),
        **changes,
    )
    async with served(folder, authenticator=authenticator_of(api)) as served_api:
        runner = Runner(served_api.app, shutdown_timeout=2.0)
        await runner.setup()
        listener = ApiListener(runner, api, served_api.metrics)
        await listener.start()
        async with asyncio.TaskGroup() as group:
            following = group.create_task(listener.follow())
            try:
                url = f"https://127.0.0.1:{listener.port}"
                yield Secure(folder, url, listener, served_api.fleet)
            finally:
                following.cancel()
                await runner.cleanup()


async def took_over(api: Secure, authority: trustme.CA) -> None:
    """Wait until new connections get a certificate of this authority."""
    async with asyncio.timeout(20):
        while True:
            try:
                assert await api.get("/healthz", api.trust(authority)) == 200
            except aiohttp.ClientConnectorCertificateError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_only_tls_is_spoken(tmp_path: Path, authority: trustme.CA) -> None:
    """A client that trusts the authority is answered; another client, and plain HTTP, are not."""
    async with secure(tmp_path, authority) as api:
        assert await api.get("/v1/status", api.trust(authority)) == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await api.get("/v1/status", api.trust(trustme.CA()))
        host, port = "127.0.0.1", api.listener.port
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        async with asyncio.timeout(10):
            assert not (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_new_certificate_is_taken_over(tmp_path: Path, authority: trustme.CA) -> None:
    """After new files and a SIGHUP (the event that it sets) new connections get only the new certificate, and an open
    connection is kept."""
    other = trustme.CA()
    async with (
        secure(tmp_path, authority) as api,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as kept,
    ):
        url, old = api.url + "/healthz", api.trust(authority)
        async with kept.get(url, ssl=old) as answer:
            assert answer.status == 200
        write_pair(tmp_path, other)
        api.listener.renew.set()
        await took_over(api, other)
        async with kept.get(url, ssl=old) as answer:
            assert answer.status == 200
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await api.get("/healthz", old)


async def test_a_pair_that_does_not_fit_changes_nothing(
    tmp_path: Path,
    authority: trustme.CA,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of a new pair is logged and not used; when the other half arrives, the pair is used without a signal."""
    monkeypatch.setattr(serving, "CHECK_EVERY_S", 0.05)
    other = trustme.CA()
    pair = other.issue_cert("127.0.0.1")
    async with secure(tmp_path, authority) as api:
        (tmp_path / "server.cert").write_bytes(pair.cert_chain_pems[0].bytes())
        async with asyncio.timeout(20):
            while not any(r.message.startswith("certificates not") for r in caplog.records):
                await asyncio.sleep(0.02)
        assert await api.get("/healthz", api.trust(authority)) == 200
        (tmp_path / "server.key").write_bytes(pair.private_key_pem.bytes())
        await took_over(api, other)


async def test_a_key_that_is_changed_in_place_is_noticed(
    tmp_path: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new pair of the same size and modification time is used without a signal."""
    monkeypatch.setattr(serving, "CHECK_EVERY_S", 0.05)
    names, size = ("server.cert", "server.key"), 4096
    other = trustme.CA()
    pair = other.issue_cert("127.0.0.1")
    new = (pair.cert_chain_pems[0].bytes(), pair.private_key_pem.bytes())

    def write(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content.ljust(size, b"\n"))
        os.utime(tmp_path / name, (1e9, 1e9))

    async with secure(tmp_path, authority) as api:
        for name in names:
            write(name, (tmp_path / name).read_bytes())
        async with asyncio.timeout(20):
            while api.listener._state != serving._state_of(api.listener.api):
                await asyncio.sleep(0.02)
        for name, content in zip(names, new, strict=True):
            write(name, content)
        await took_over(api, other)


async def test_client_certificates_are_asked_for(tmp_path: Path, authority: trustme.CA) -> None:
    """With `client_ca`, a request without a certificate is 403, except for health checks, the agent's file and an
    agent's own report. A client with a certificate of another authority gets no connection; one of our authority is
    answered."""
    clients = trustme.CA()
    (tmp_path / "keys").write_text(KEY)
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    write_pair(tmp_path, clients, "alice")
    write_pair(tmp_path, trustme.CA(), "mallory")
    changes = {
        "client_ca": str(tmp_path / "clients.pem"),
        "agent_key_file": str(tmp_path / "keys"),
    }
    async with secure(tmp_path, authority, **changes) as api:
        nobody, alice = api.trust(authority), api.trust(authority, "alice")
        for path in ("/healthz", "/artifacts/watchdog-agent.pyz"):
            assert await api.get(path, nobody) == 200
        assert await api.get("/ready", nobody) == 503
        for path in ("/v1/status", "/metrics", "/", "/nothing"):
            assert await api.get(path, nobody) == 403
        assert await api.get("/v1/devices/cam", nobody, "PUT", json=WISH) == 403
        assert await api.get("/v1/devices/cam", alice, "PUT", json=WISH) == 201
        claim = TokenClaim(slug_of(DeviceId("cam")), Epoch(0))
        headers = {"Authorization": f"Bearer {issue(KEY.encode(), claim)}"}
        report: dict[str, Any] = {"json": _report(), "headers": headers}
        assert await api.get("/v1/agents/report", nobody, "POST", **report) == 200
        assert await api.get("/v1/agents/report", nobody, "POST", json=_report()) == 403
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await api.get("/healthz", api.trust(authority, "mallory"))


async def test_an_authority_of_clients_can_be_changed(
    tmp_path: Path, authority: trustme.CA
) -> None:
    """After a new file and a SIGHUP, clients with certificates of the old authority get no connection, and those of the
    new one are answered."""
    old, new = trustme.CA(), trustme.CA()
    (tmp_path / "keys").write_text(KEY)
    file = tmp_path / "clients.pem"
    old.cert_pem.write_to_path(file)
    write_pair(tmp_path, old, "before")
    write_pair(tmp_path, new, "after")
    changes = {"client_ca": str(file), "agent_key_file": str(tmp_path / "keys")}
    async with secure(tmp_path, authority, **changes) as api:
        before, after = api.trust(authority, "before"), api.trust(authority, "after")
        assert await api.get("/v1/status", before) == 200
        new.cert_pem.write_to_path(file)
        api.listener.renew.set()
        async with asyncio.timeout(20):
            while True:
                try:
                    assert await api.get("/v1/status", after) == 200
                except (aiohttp.ClientError, ssl.SSLError, ConnectionError):
                    await asyncio.sleep(0.02)
                else:
                    break
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await api.get("/v1/status", before)


async def test_the_authority_of_other_replicas_can_be_changed(
    tmp_path: Path, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a new file of `api.ca_cert` alone, without a signal, other replicas are verified with the new authority."""
    monkeypatch.setattr(serving, "CHECK_EVERY_S", 0.05)
    file = tmp_path / "replicas.pem"
    trustme.CA().cert_pem.write_to_path(file)
    async with secure(tmp_path, authority, ca_cert=str(file)) as api:

        async def trusted() -> bool:
            assert api.listener.outgoing is not None
            try:
                return await api.get("/healthz", api.listener.outgoing) == 200
            except aiohttp.ClientConnectorCertificateError:
                return False

        assert not await trusted()
        authority.cert_pem.write_to_path(file)
        async with asyncio.timeout(20):
            while not await trusted():
                await asyncio.sleep(0.02)


async def test_a_certificate_is_named_in_the_audit(tmp_path: Path, authority: trustme.CA) -> None:
    """The event of a change contains the common name of the client certificate."""
    (tmp_path / "keys").write_text(KEY)
    authority.cert_pem.write_to_path(tmp_path / "clients.pem")
    write_pair(tmp_path, authority, "alice")
    changes = {
        "client_ca": str(tmp_path / "clients.pem"),
        "agent_key_file": str(tmp_path / "keys"),
    }
    async with (
        secure(tmp_path, authority, **changes) as api,
        aiohttp.ClientSession() as session,
    ):
        alice = api.trust(authority, "alice")
        async with session.put(api.url + "/v1/devices/cam", json=WISH, ssl=alice) as answer:
            assert answer.status == 201
        async with session.get(api.url + "/v1/events", ssl=alice) as answer:
            items = (await answer.json())["items"]
    (audit,) = [item for item in items if item["kind"] == "audit.register"]
    assert audit["data"]["certificate"] == "alice"


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("server.cert", b"", "api.tls_cert"),
        ("server.key", b"nonsense", "api.tls_cert"),
        ("server.key", None, "No such file"),
        ("clients.pem", b"nonsense", "api.client_ca"),
    ],
)
async def test_certificates_that_are_none_are_refused_at_start(
    tmp_path: Path, authority: trustme.CA, file: str, content: bytes | None, words: str
) -> None:
    """A missing or invalid TLS file is a UserError that names the setting and discloses no key (S10)."""
    write_pair(tmp_path, authority)
    authority.cert_pem.write_to_path(tmp_path / "clients.pem")
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    api = ApiSettings(
        listen="127.0.0.1:0",
        tls_cert=str(tmp_path / "server.cert"),
        tls_key=str(tmp_path / "server.key"),
        client_ca=str(tmp_path / "clients.pem"),
    )
    with pytest.raises(UserError, match=words):
        serving.tls_context(api)


async def test_the_cli_speaks_tls(
    tmp_path: Path,
    authority: trustme.CA,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CACERT, CLIENT_CERT and CLIENT_KEY the status is displayed. Without the authority it is not, unless
    verification is skipped. Without the certificate access is denied (77)."""
    (tmp_path / "keys").write_text(KEY)
    clients = trustme.CA()
    clients.cert_pem.write_to_path(tmp_path / "clients.pem")
    write_pair(tmp_path, clients, "alice")
    changes = {
        "client_ca": str(tmp_path / "clients.pem"),
        "agent_key_file": str(tmp_path / "keys"),
    }
    names = {
        "CACERT": str(tmp_path / "ca.pem"),
        "CLIENT_CERT": str(tmp_path / "alice.cert"),
        "CLIENT_KEY": str(tmp_path / "alice.key"),
    }

    def status(*left_out: str, **more: str) -> int:
        for name in (*names, "SKIP_VERIFY"):
            monkeypatch.delenv(f"NOMAD_WATCHDOG_{name}", raising=False)
        for name, value in (names | more).items():
            if name not in left_out:
                monkeypatch.setenv(f"NOMAD_WATCHDOG_{name}", value)
        return _code(["status"])

    monkeypatch.chdir(tmp_path)
    async with secure(tmp_path, authority, **changes) as api:
        monkeypatch.setenv("NOMAD_WATCHDOG_ADDR", api.url)
        assert await asyncio.to_thread(status) == 0
        assert await asyncio.to_thread(status, "CACERT") == 69
        assert await asyncio.to_thread(lambda: status("CACERT", SKIP_VERIFY="true")) == 0
        assert await asyncio.to_thread(status, "CLIENT_CERT", "CLIENT_KEY") == 77
        assert await asyncio.to_thread(status, "CLIENT_KEY") == 64
        assert await asyncio.to_thread(lambda: status(SKIP_VERIFY="maybe")) == 64
        assert await asyncio.to_thread(lambda: status(CACERT=os.devnull)) in {64, 69}
    capsys.readouterr()


class OnePeer(SoleOwner):
    """Leases with one other replica."""

    def __init__(self, api: str) -> None:
        super().__init__()
        self.api = api

    def replicas(self) -> list[Replica]:
        return [Replica("other", self.api, 0.0, 1, "1")]


async def test_replicas_speak_tls_to_each_other(tmp_path: Path, authority: trustme.CA) -> None:
    """What one replica received from an agent reaches another that requires TLS, a certificate and a token."""
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "token").write_text("operators-s3cret-token")
    authority.cert_pem.write_to_path(tmp_path / "clients.pem")
    changes = {
        "client_ca": str(tmp_path / "clients.pem"),
        "ca_cert": str(tmp_path / "clients.pem"),
        "agent_key_file": str(tmp_path / "keys"),
        "token_file": str(tmp_path / "token"),
    }
    async with secure(tmp_path, authority, **changes) as api:
        fleet, gate = api.fleet, authenticator_of(api.listener.api)
        await fleet.records.register([Device(DeviceId("cam"), "default", "127.0.0.1")])
        said = ReportIn.model_validate_json(json.dumps(_report())).report()
        assert (await fleet.reports.receive(said)).kind is AcceptanceKind.ACCEPTED
        peers = ReportReplicator(
            fleet, OnePeer(api.url), gate.own_token, lambda: api.listener.outgoing
        )
        later = replace(said, sequence=9, state=AgentState.SUSPECT, reason="heard from a peer")
        peers.note(later)
        telling = asyncio.ensure_future(peers.run())
        try:
            async with asyncio.timeout(20):
                while "heard from a peer" not in str(fleet.views.explain(said.slug)["report"]):
                    await asyncio.sleep(0.02)
        finally:
            telling.cancel()
            await asyncio.wait([telling])

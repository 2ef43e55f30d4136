"""Failures that only Consul can have: it does not answer, denies access, or returns half of the data."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient, cas
from nomad_watchdog.clients.consul_sessions import ConsulSessions
from nomad_watchdog.errors import DeniedError, TerminalError, TransientError, UserError
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from tests.attacks.table import Attack
from tests.registry.records import record


@asynccontextmanager
async def client_of(
    server: ConsulServer, token: str = "", **more: Any
) -> AsyncIterator[ConsulClient]:
    client = ConsulClient(ConsulAccess(address=server.http_addr, token=token, **more))
    try:
        yield client
    finally:
        await client.close()


async def acl_token(server: ConsulServer, rules: str) -> str:
    """Create a token with these rules."""
    headers = {"X-Consul-Token": server.token}
    async with aiohttp.ClientSession(server.http_addr, headers=headers) as http:
        name = f"p-{uuid.uuid4()}"
        async with http.put("/v1/acl/policy", json={"Name": name, "Rules": rules}) as answer:
            assert answer.status == 200, await answer.text()
        async with http.put("/v1/acl/token", json={"Policies": [{"Name": name}]}) as answer:
            assert answer.status == 200, await answer.text()
            return str((await answer.json())["SecretID"])


def counted(client: ConsulClient, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The timeouts of the requests that the client makes from now on, in seconds."""
    limits: list[float] = []
    translated = client._translated

    async def count(request: Any, what: str, needs: str, extra_s: float) -> Any:
        limits.append(client.settings.timeout_s + extra_s)
        return await translated(request, what, needs, extra_s)

    monkeypatch.setattr(client, "_translated", count)
    return limits


@pytest.mark.servers
async def test_frozen_server_is_a_transient_error_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the server is stopped by SIGSTOP, each call fails after one request and its timeout; the next call after
    SIGCONT returns the same records."""
    async with ConsulServer(tmp_path) as server, client_of(server) as client:
        registry = ConsulRegistry(client=client)
        await registry.initialise()
        (stored,) = await registry.commit([record("before")])
        assert stored is not None
        requests = counted(client, monkeypatch)
        patient, client.settings = client.settings, replace(client.settings, timeout_s=0.3)
        server.pause()
        for call in (
            registry.read,
            lambda: registry.get(stored.slug),
            lambda: registry.commit([record("during")]),
            lambda: anext(aiter(registry.watch(stored.index))),
        ):
            requests.clear()
            with pytest.raises(TransientError, match="no answer in"):
                await call()
            assert requests == [client.settings.timeout_s]
        server.resume()
        client.settings = patient
        async with asyncio.timeout(60):
            while True:
                try:
                    snapshot = await registry.read()
                    break
                except TransientError:
                    await asyncio.sleep(0.1)
        assert snapshot.records[stored.slug] == stored


@pytest.mark.servers
@pytest.mark.slow_because("starts a Consul of its own twice")
async def test_s4_acknowledged_writes_survive_kill_9(tmp_path: Path) -> None:
    """After SIGKILL and a restart on the same folder, all acknowledged records exist."""
    async with ConsulServer(tmp_path) as server:
        async with client_of(server) as client:
            registry = ConsulRegistry(client=client)
            identity = await registry.initialise()
            stored = await registry.commit([record(f"d {i}") for i in range(200)])
            await server.kill()
            with pytest.raises(TransientError):
                await registry.read()
            await server.start()
            assert await registry.installation() == identity
            records = (await registry.read()).records
        assert [records[one.slug] for one in stored if one] == stored


async def test_shipped_reconciler_policy_is_enough(
    acl_consul: ConsulServer, repository: Path
) -> None:
    """jobs/policies/consul-reconciler.hcl allows everything that the registry and discovery do."""
    rules = (repository / "jobs/policies/consul-reconciler.hcl").read_text()
    token = await acl_token(acl_consul, rules)
    async with client_of(acl_consul, token) as client:
        registry = ConsulRegistry(client=client, prefix="nomad-watchdog")
        await registry.initialise()
        (stored,) = await registry.commit([record("allowed")])
        assert stored is not None
        assert (await registry.read()).records[stored.slug] == stored
        await client.health_service("device-watchdog-agent")
        await client.health_checks("device-watchdog-agent", 'Status != "passing"')
        with pytest.raises(DeniedError, match=r"other/"):
            await client.txn([cas("other/key", b"", 0)])


async def test_shipped_agent_policy_is_enough(acl_consul: ConsulServer, repository: Path) -> None:
    """jobs/policies/consul-agent.hcl lets an agent register and deregister itself, and nothing else."""
    rules = (repository / "jobs/policies/consul-agent.hcl").read_text()
    token = await acl_token(acl_consul, rules)
    body = {"ID": "x", "Name": "device-watchdog-agent", "Check": {"TTL": "60s"}}
    async with aiohttp.ClientSession(
        acl_consul.http_addr, headers={"X-Consul-Token": token}
    ) as http:
        for path, content, status in (
            ("/v1/agent/service/register", body, 200),
            ("/v1/agent/service/deregister/x", None, 200),
            ("/v1/agent/service/register", body | {"Name": "other"}, 403),
            ("/v1/kv/nomad-watchdog/devices/x", None, 403),
        ):
            async with http.put(path, json=content) as answer:
                assert answer.status == status, await answer.text()


RIGHTS = {
    "none": "",
    "sentinel only": 'key "{}/meta" {{ policy = "read" }}',
    "one bucket": 'key_prefix "{0}/devices/0" {{ policy = "read" }} '
    'key "{0}/meta" {{ policy = "read" }} key "{0}/devices/meta" {{ policy = "read" }}',
}


@pytest.mark.parametrize("rights", RIGHTS.values(), ids=RIGHTS)
async def test_s7_missing_rights_are_never_an_empty_registry(
    acl_consul: ConsulServer, rights: str
) -> None:
    """With only some rights, or none, each call raises DeniedError that names the right, or UserError."""
    prefix = f"acl-{uuid.uuid4()}"
    async with client_of(acl_consul, acl_consul.token) as client:
        owner = ConsulRegistry(client=client, prefix=prefix)
        await owner.initialise()
        await owner.commit([record(f"d {i}") for i in range(64)])
    token = await acl_token(acl_consul, rights.format(prefix)) if rights else ""
    async with client_of(acl_consul, token) as client:
        registry = ConsulRegistry(client=client, prefix=prefix)
        with pytest.raises(DeniedError, match="policy"):
            await registry.read()
        with pytest.raises(DeniedError, match="policy"):
            await anext(aiter(registry.watch(0)))
        with pytest.raises(DeniedError, match="denied"):
            await registry.commit([record("new")])


async def test_unknown_token_is_denied_and_never_shown(acl_consul: ConsulServer) -> None:
    """A token that Consul does not know raises DeniedError without the token in its message."""
    token = str(uuid.uuid4())
    async with client_of(acl_consul, token) as client:
        with pytest.raises(DeniedError) as caught:
            await ConsulRegistry(client=client).read()
    assert token not in f"{caught.value!r} {caught.value.__cause__!r} {client.settings!r}"


async def test_token_file_is_read_again_when_denied(
    acl_consul: ConsulServer, tmp_path: Path
) -> None:
    """A token that was replaced in its file is used without a restart."""
    file = tmp_path / "token"
    file.write_text(str(uuid.uuid4()))
    async with client_of(acl_consul, token_file=str(file)) as client:
        with pytest.raises(DeniedError):
            await client.kv_get("any")
        file.write_text(f"{acl_consul.token}\n")
        assert await client.kv_get("any") is None


async def test_explicit_token_beats_the_environment(
    acl_consul: ConsulServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CONSUL_HTTP_TOKEN, which the library itself prefers, does not override an explicit token."""
    monkeypatch.setenv("CONSUL_HTTP_TOKEN", str(uuid.uuid4()))
    settings = ConsulAccess.from_env(address=acl_consul.http_addr, token=acl_consul.token)
    client = ConsulClient(settings)
    assert await client.kv_get("any") is None
    await client.txn([cas(f"any-{uuid.uuid4()}/x", b"1", 0)])
    await client.close()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ("http", "127.0.0.1", 8500)),
        ({"CONSUL_HTTP_ADDR": "10.0.0.1:1"}, ("http", "10.0.0.1", 1)),
        ({"CONSUL_HTTP_ADDR": "c:1", "CONSUL_HTTP_SSL": "true"}, ("https", "c", 1)),
        ({"CONSUL_HTTP_ADDR": "https://c", "CONSUL_HTTP_SSL": "false"}, ("https", "c", 443)),
        ({"CONSUL_HTTP_ADDR": "http://[::1]:2/"}, ("http", "[::1]", 2)),
        ({"CONSUL_HTTP_ADDR": "http://c/p"}, ("http", "c", 80)),
    ],
)
def test_address_comes_from_consul_variables(
    env: dict[str, str], expected: tuple[str, str, int]
) -> None:
    """CONSUL_HTTP_ADDR is read in all forms that Consul's own tools accept over TCP."""
    assert ConsulAccess.from_env(env).endpoint() == expected


@pytest.mark.parametrize("address", ["unix:///x", "http://", "http://h:99999", "h:x", "::1"])
def test_strange_address_is_a_user_error(address: str) -> None:
    """An unusable address is rejected immediately, with the allowed form."""
    with pytest.raises(UserError, match="http://"):
        ConsulAccess.from_env({}, address=address)


async def test_s9_poison_hides_nobody(consul_client: ConsulClient) -> None:
    """Invalid values and keys are named, everything else is read, and `get` reports what is wrong."""
    prefix = f"poison-{uuid.uuid4()}"
    registry = ConsulRegistry(client=consul_client, prefix=prefix)
    await registry.initialise()
    good, bad = await registry.commit([record("good"), record("bad")])
    assert good is not None
    assert bad is not None
    (row,) = [
        row for row in (await consul_client.kv_tree(f"{prefix}/"))[1] if row.key.endswith(bad.slug)
    ]
    moved = f"{prefix}/devices/zz/{bad.slug}"
    await consul_client.txn(
        [
            cas(row.key, b"{", row.index),
            cas(moved, row.value, 0),
            cas(f"{prefix}/devices/", b"", 0),
            cas(f"{prefix}/devices/\x1b[2J\n", b"\xff", 0),
        ]
    )
    assert (await registry.read()).records == {good.slug: good}
    assert len(registry.poisoned) == 4
    with pytest.raises(TerminalError, match="JSON"):
        await registry.get(bad.slug)


async def test_the_index_of_deletions_outlives_consuls_memory_of_them(
    consul_client: ConsulClient,
) -> None:
    """A permanent key has the index of the last deletion, each time: Consul forgets the index of the deletion itself,
    and the folder's index would go back."""
    prefix = f"forget-{uuid.uuid4()}"
    registry = ConsulRegistry(client=consul_client, prefix=prefix)
    identity = await registry.initialise()
    stored = [one for one in await registry.commit([record(f"d {i}") for i in range(150)]) if one]
    for some in (stored[:1], stored[1:]):
        before = (await registry.read()).index
        assert all(await registry.forget(some))
        index, rows = await consul_client.kv_tree(f"{prefix}/devices/")
        (sentinel,) = [row for row in rows if row.key == f"{prefix}/devices/meta"]
        assert sentinel.index == index > before
    assert (await registry.read()).records == {}
    assert await registry.installation() == identity


async def test_wiped_store_is_a_user_error(consul_client: ConsulClient) -> None:
    """If all keys vanish under a running watch, it raises an error instead of returning an empty fleet."""
    prefix = f"wiped-{uuid.uuid4()}"
    registry = ConsulRegistry(client=consul_client, prefix=prefix)
    await registry.initialise()
    watch = registry.watch((await registry.read()).index)
    await registry.commit([record("x")])
    assert len((await anext(watch)).records) == 1
    address = consul_client.settings.address
    async with (
        aiohttp.ClientSession(address) as http,
        http.delete(f"/v1/kv/{prefix}/", params={"recurse": "1"}) as answer,
    ):
        assert answer.status == 200
    with pytest.raises(UserError, match="nomad-watchdog init"):
        async with asyncio.timeout(10):
            await anext(watch)


@pytest.mark.servers
async def test_restored_snapshot_is_shown_by_an_idle_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that is restored while nothing is written reaches a waiting watch, through a server and through a
    client agent: the blocking query that the restore ends answers with an index of the lost history."""
    async with (
        ConsulServer(tmp_path / "server") as server,
        ConsulServer(tmp_path / "agent", join=server, node="agent") as agent,
        aiohttp.ClientSession(server.http_addr) as http,
        client_of(server) as direct,
        client_of(agent) as joined,
    ):
        owner = ConsulRegistry(client=direct)
        await owner.initialise()
        (kept,) = await owner.commit([record("kept")])
        async with http.get("/v1/snapshot") as answer:
            snapshot = await answer.read()
        await owner.commit([record("lost")])
        watches = [ConsulRegistry(client=one).watch(0) for one in (direct, joined)]
        for watch in watches:
            assert len((await anext(watch)).records) == 2
        requests = [counted(client, monkeypatch) for client in (direct, joined)]
        waiting = [asyncio.ensure_future(anext(watch)) for watch in watches]
        async with asyncio.timeout(10):
            while not all(requests):
                await asyncio.sleep(0.01)  # until the blocking queries are in progress
        async with http.put("/v1/snapshot", data=snapshot) as answer:
            assert answer.status == 200, await answer.text()
        for shown in await asyncio.gather(*waiting):
            assert list(shown.records.values()) == [kept]


async def test_refused_connection_is_transient(consul_client: ConsulClient) -> None:
    """If nothing listens, a TransientError names the address."""
    from nomad_watchdog.demo.process import free_port

    client = ConsulClient(ConsulAccess(address=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(TransientError, match=r"127\.0\.0\.1"):
        await client.kv_get("x")
    await client.close()


async def test_too_large_transaction_is_terminal(consul_client: ConsulClient) -> None:
    """A commit that Consul refuses for its size is a TerminalError: retrying does not help."""
    with pytest.raises(TerminalError, match="413"):
        await consul_client.txn([cas(f"large/{i}", b"", 0) for i in range(129)])


@pytest.mark.attack(
    "D2", "a stolen Consul token of the control plane or of an agent, used on other sessions"
)
async def test_a_token_of_ours_ends_no_session_of_another_node(
    acl_consul: ConsulServer, repository: Path, attack: Attack
) -> None:
    """With the shipped policies and the right to sessions of one node, a lease is acquired, kept and released there. A
    session of another node can't be created, renewed or ended, and its lock stays. Without that right no session can be
    created, and the error names what is missing."""
    headers = {"X-Consul-Token": acl_consul.token}
    other = f"other-{uuid.uuid4()}"
    refused = 0
    async with aiohttp.ClientSession(acl_consul.http_addr, headers=headers) as http:
        node = {"Node": other, "Address": "127.0.0.9"}
        async with http.put("/v1/catalog/register", json=node) as answer:
            assert answer.status == 200, await answer.text()
        theirs = {"Node": other, "NodeChecks": [], "TTL": "600s"}
        async with http.put("/v1/session/create", json=theirs) as answer:
            victim = (await answer.json())["ID"]
        lock = f"/v1/kv/{other}/leader"
        async with http.put(lock, params={"acquire": victim}, data=b"x") as answer:
            assert await answer.json() is True
        for policy in ("consul-reconciler", "consul-agent"):
            rules = (repository / f"jobs/policies/{policy}.hcl").read_text()
            token = await acl_token(acl_consul, acl_consul.sessions(rules))
            for path, body in (
                (f"/v1/session/destroy/{victim}", None),
                (f"/v1/session/renew/{victim}", None),
                ("/v1/session/create", theirs),
            ):
                stolen = {"X-Consul-Token": token}
                async with http.put(path, json=body, headers=stolen) as answer:
                    assert answer.status == 403, (path, await answer.text())
                refused += 1
        async with http.get(lock) as answer:
            assert (await answer.json())[0]["Session"] == victim
        async with http.put(f"/v1/session/destroy/{victim}") as answer:
            assert answer.status == 200
        async with http.put("/v1/catalog/deregister", json={"Node": other}) as answer:
            assert answer.status == 200

    rules = (repository / "jobs/policies/consul-reconciler.hcl").read_text()
    name, key = f"replica-{uuid.uuid4()}", f"nomad-watchdog/leases/{uuid.uuid4()}"
    for granted in (acl_consul.sessions(rules), rules):
        token = await acl_token(acl_consul, granted)
        async with client_of(acl_consul, token) as client:
            sessions = ConsulSessions(client)
            await sessions.announce(
                "nomad-watchdog-replica", name, name, 60.0, place=("127.0.0.1", 1)
            )
            if granted is rules:
                with pytest.raises(DeniedError, match='session "NODE"'):
                    await sessions.create("lease", name)
            else:
                session = await sessions.create("lease", name)
                assert await sessions.lock(key, b"{}", session)
                await sessions.renew(name, session)
                await sessions.unlock([key], session, delete=[key])
                await sessions.destroy(session)
            await sessions.retract(name)
    attack.tried, attack.result = (
        refused,
        f"{refused} of {refused} refused with 403, the other program kept its lock",
    )

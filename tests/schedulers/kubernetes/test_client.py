"""The client against a real API server, with certificates and RBAC."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.clients import kubernetes as module
from nomad_watchdog.clients.kubernetes import (
    PAGE,
    FieldConflictError,
    KubernetesAccess,
    KubernetesClient,
)
from nomad_watchdog.errors import ConflictError, DeniedError, NotFoundError, TransientError
from servers.kubernetes import KubernetesCluster

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]
MAPS = "/api/v1/namespaces/default/configmaps"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KubernetesCluster]:
    """A standalone API server that a test may stop and start."""
    folder = tmp_path_factory.mktemp("api")
    async with KubernetesCluster(folder, controllers=False) as cluster:
        yield cluster


@pytest_asyncio.fixture(loop_scope="module")
async def client(api: KubernetesCluster) -> AsyncIterator[KubernetesClient]:
    one = api.client()
    yield one
    await one.close()


def config_map(name: str, value: str = "1", **meta: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {"test": name.partition(".")[0]}, **meta},
        "data": {"value": value},
    }


async def test_a_list_of_many_pages_is_whole(client: KubernetesClient) -> None:
    """Objects of a multi-page list are returned once each, in full and as metadata only."""
    count = 2 * PAGE + 25
    numbers = iter(range(count))

    async def make() -> None:
        for number in numbers:
            await client.create(MAPS, config_map(f"paged.{number}"))

    await asyncio.gather(*(make() for _ in range(16)))
    whole = await client.list(MAPS, labels="test=paged")
    parts = await client.list(MAPS, labels="test=paged", metadata=True)

    assert len({one["metadata"]["name"] for one in whole.items}) == len(whole.items) == count
    assert [one["metadata"]["uid"] for one in parts.items] == [
        one["metadata"]["uid"] for one in whole.items
    ]
    assert all("data" in one for one in whole.items)
    assert not any("data" in one for one in parts.items)


async def test_a_silent_watch_is_noticed(
    api: KubernetesCluster, client: KubernetesClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a server keeps the connection open but sends nothing, the watch ends with a
    TransientError."""
    monkeypatch.setattr(module, "SILENCE_S", 1.0)  # a minute and a half is long for a test
    version = (await client.list(MAPS, labels="test=nobody")).version
    api.pause_process("kube-apiserver")
    try:
        with pytest.raises(TransientError):
            async with asyncio.timeout(10):
                async for _ in client.watch(MAPS, version, labels="test=nobody"):
                    pytest.fail("there was nothing to see")
    finally:
        api.resume_process("kube-apiserver")


async def test_apply_is_a_compare_and_set(client: KubernetesClient) -> None:
    """Version 1 only creates an object, and an object's own version only changes it: every start is
    fenced this way."""
    path = f"{MAPS}/fenced"
    made = await client.apply(path, config_map("fenced", resourceVersion="1"))
    with pytest.raises(ConflictError):
        await client.apply(path, config_map("fenced", "2", resourceVersion="1"))
    version = made["metadata"]["resourceVersion"]
    await client.apply(path, config_map("fenced", "3", resourceVersion=version))
    with pytest.raises(ConflictError):
        await client.apply(path, config_map("fenced", "4", resourceVersion=version))

    assert (await client.get(path))["data"] == {"value": "3"}


async def test_a_field_of_another_manager_is_not_taken(client: KubernetesClient) -> None:
    """The conflict names the field and its manager; fields that we have not set are left to the
    other managers."""
    path = f"{MAPS}/shared"
    await client.apply(path, config_map("shared", "1"))
    theirs = {**config_map("shared"), "data": {"value": "theirs", "more": "x"}}
    await client.apply(path, theirs, manager="somebody", force=True)
    with pytest.raises(FieldConflictError, match=r'data.value.*"somebody"'):
        await client.apply(path, config_map("shared", "2"))
    await client.apply(path, config_map("shared", "theirs"))

    assert (await client.get(path))["data"] == {"value": "theirs", "more": "x"}


async def test_a_watch_goes_on_where_a_list_was(client: KubernetesClient) -> None:
    """From a list's version on, every change is received once, in order, with increasing
    versions."""
    start = (await client.list(MAPS, labels="test=watched")).version
    for value in ("1", "2"):
        await client.apply(f"{MAPS}/watched", config_map("watched", value))
    await client.delete(f"{MAPS}/watched")
    seen = []
    async with asyncio.timeout(20):
        events = client.watch(MAPS, start, labels="test=watched")
        async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
            async for event in stream:
                seen.append(event)
                if event.kind == "DELETED":
                    break

    assert [one.kind for one in seen] == ["ADDED", "MODIFIED", "DELETED"]
    assert sorted(int(one.version) for one in seen) == [int(one.version) for one in seen]


async def test_delete_is_of_one_object_only(client: KubernetesClient) -> None:
    """With another object's uid nothing is deleted; a missing object is not an error."""
    await client.apply(f"{MAPS}/kept", config_map("kept"))
    with pytest.raises(ConflictError):
        await client.delete(f"{MAPS}/kept", uid="00000000-0000-0000-0000-000000000000")

    assert await client.find(f"{MAPS}/kept") is not None
    assert await client.delete(f"{MAPS}/kept")
    assert not await client.delete(f"{MAPS}/kept")
    with pytest.raises(NotFoundError):
        await client.get(f"{MAPS}/kept")


async def test_a_stranger_is_denied_by_name(api: KubernetesCluster) -> None:
    """A user without a role gets an error that names the missing permission."""
    client = KubernetesClient(api.settings(await api.user("stranger", ["nobodies"])))
    try:
        with pytest.raises(DeniedError, match='User "stranger" cannot list resource "configmaps"'):
            await client.list(MAPS)
    finally:
        await client.close()


async def test_a_certificate_of_another_authority_is_not_trusted(
    api: KubernetesCluster, tmp_path: Path
) -> None:
    """Without the cluster's CA the server is not trusted; the error is transient."""
    good = api.settings()
    client = KubernetesClient(KubernetesAccess(good.server, token="x"))
    try:
        with pytest.raises(TransientError, match="does not answer"):
            await client.list(MAPS)
    finally:
        await client.close()


async def test_a_plugin_may_give_a_certificate(api: KubernetesCluster, tmp_path: Path) -> None:
    """An exec credential with a client certificate authenticates as that certificate's user."""
    admin = api.settings()
    plugin = tmp_path / "plugin"
    status = {"clientCertificateData": admin.client_cert, "clientKeyData": admin.client_key}
    packed = base64.b64encode(repr(status).encode()).decode()
    plugin.write_text(
        "#!/usr/bin/env python3\nimport ast, base64, json\n"
        f"status = ast.literal_eval(base64.b64decode('{packed}').decode())\n"
        "print(json.dumps({'status': status}))\n"
    )
    plugin.chmod(0o755)
    client = KubernetesClient(
        KubernetesAccess(admin.server, ca=admin.ca, exec_plugin=module_plugin(str(plugin)))
    )
    try:
        assert (await client.list(MAPS)).version
    finally:
        await client.close()


def module_plugin(command: str) -> Any:
    from nomad_watchdog.clients._kubernetes_settings import ExecPlugin

    return ExecPlugin(command)


async def test_a_server_that_is_gone_is_transient_and_comes_back(api: KubernetesCluster) -> None:
    """Reads and watches of a killed API server raise TransientError; the same client works when the
    server is back."""
    client = api.client()
    try:
        start = await client.version_of(MAPS)
        events = client.watch(MAPS, start)
        async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
            task = asyncio.ensure_future(anext(aiter(stream)))
            await asyncio.sleep(0.3)
            await api.kill_process("kube-apiserver")
            with pytest.raises((TransientError, StopAsyncIteration)):
                await task
        with pytest.raises(TransientError):
            await client.list(MAPS)
        await api.start_process("kube-apiserver")
        assert int((await client.list(MAPS)).version) >= int(start)
    finally:
        await client.close()

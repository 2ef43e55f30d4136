"""On Kubernetes, short watches show that nothing has changed: tested with a real API server, and
with a fake one for answers that a real one can't be made to give."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from nomad_watchdog.clients.kubernetes import ExpiredError, KubernetesAccess, KubernetesClient
from nomad_watchdog.errors import DeniedError, TransientError
from nomad_watchdog.model import AgentSpec, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Snapshot
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler, names
from nomad_watchdog.schedulers.kubernetes import _unchanged as unchanged
from nomad_watchdog.schedulers.kubernetes import _view as view
from nomad_watchdog.schedulers.kubernetes.names import Ref
from nomad_watchdog.testing.conformance import record_of
from servers.kubelet.__main__ import Kubelet
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes.test_client_faults import PODS, Handler, page, served
from tests.schedulers.kubernetes_rig import kubelet, soon_ready, spec_of

SPACE = "still"
EMPTY = Snapshot({}, 7)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def node(
    kube: KubernetesCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Kubelet]:
    await kube.add_namespace(SPACE)
    folder = tmp_path_factory.mktemp("still")
    async with kubelet(kube, folder, node="still", subnet=58) as running:
        yield running


def agent(node: Kubelet) -> AgentSpec:
    return soon_ready(spec_of(), node.folder)


@asynccontextmanager
async def scheduler_of(
    kube: KubernetesCluster, node: Kubelet
) -> AsyncIterator[KubernetesScheduler]:
    """A scheduler with one running agent, which is removed at the end."""
    one = KubernetesScheduler(settings=kube.settings(), namespace=SPACE, installation="still")
    try:
        await one.prepare([agent(node)])
        await one.ensure(record_of("device"), Epoch(1), agent(node))
        await until_running(one)
        yield one
        for some in (await one.snapshot()).placements.values():
            await one.retire(some[0], 1.0)
        async with asyncio.timeout(60.0):
            while (await one.snapshot()).placements:
                await asyncio.sleep(0.2)
    finally:
        await one.close()


async def until_running(one: KubernetesScheduler) -> Snapshot:
    """The snapshot that shows the agent running, once nothing changes any more."""
    async with asyncio.timeout(60.0):
        while True:
            found = await one.snapshot()
            there = placement_of(found)
            # the pod becomes ready some time after running, which would be a change
            runs = there.state is PlacementState.RUNNING and there.ready
            if runs and await one.unchanged_since(found):
                return found
            await asyncio.sleep(0.2)


def placement_of(found: Snapshot) -> Placement:
    ((placement,),) = found.placements.values()
    return placement


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.slow_because("three times a watch has to stay silent for a while")
async def test_a_fleet_that_nobody_touches_is_still_again_and_again(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """Three calls in a row report no change, each for the time since the previous one. Others'
    writes advance the API server's version but are not ours. Preparing again changes nothing."""
    async with scheduler_of(kube, node) as one:
        seen = await until_running(one)
        for number in range(3):
            await kube.add_namespace(f"{SPACE}-noise-{number}")
            await one.prepare([agent(node)])  # as at every resync
            assert await one.unchanged_since(seen)


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.slow_because(
    "reads until nothing moves, three times, and each time a watch has to stay silent"
)
async def test_whatever_happens_to_an_object_or_a_pod_is_no_stillness(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """Someone else's label on the Deployment or on the pod, and a killed pod, each count as a
    change until everything is read again. While a pod is terminating nothing counts as unchanged,
    because no event reports that it is overdue."""
    async with scheduler_of(kube, node) as one:
        client = kube.client()
        try:
            seen = await until_running(one)
            deployment = Ref.parse(placement_of(seen).ref).path
            pods = f"/api/v1/namespaces/{SPACE}/pods"
            (pod,) = (await client.list(pods)).items
            pod_path = f"{pods}/{pod['metadata']['name']}"
            patch = {"metadata": {"labels": {"seen": "yes"}}}
            for path in (deployment, pod_path):
                await client.call("PATCH", path, body=patch, content="application/merge-patch+json")
                assert not await one.unchanged_since(seen)
                seen = await until_running(one)
            node.pause()
            try:
                await client.delete(pod_path, grace_s=30)
                assert not await one.unchanged_since(seen)
                leaving = await one.snapshot()
                assert not await one.unchanged_since(leaving)
            finally:
                node.resume()
        finally:
            await client.close()


@pytest.mark.asyncio(loop_scope="session")
async def test_after_a_write_of_ours_all_is_read_again(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """This also holds for a write that changed nothing, and for one that ends while the list is
    being read."""
    async with scheduler_of(kube, node) as one:
        seen = await until_running(one)
        await one.ensure(record_of("device"), Epoch(1), agent(node))
        assert not await one.unchanged_since(seen)
        reading = asyncio.ensure_future(one.snapshot())
        await one.ensure(record_of("device"), Epoch(1), agent(node))
        assert not await one.unchanged_since(await reading)


@pytest.mark.parametrize("failed", [False, True])
async def test_a_list_that_was_begun_before_a_write_ended_does_not_count(failed: bool) -> None:
    """It is unknown whether such a list shows the write; a failed write may have arrived as
    well."""
    client = KubernetesClient(KubernetesAccess("http://127.0.0.1:9"))
    one = unchanged.ChangeProbe(client, "")
    began = one.begin_read()
    with contextlib.suppress(TransientError), one.writing():
        if failed:
            raise TransientError("no answer")
    one.end_read(began, EMPTY, {})
    assert not await one.unchanged_since(EMPTY)
    one.end_read(one.begin_read(), EMPTY, {})
    assert await one.unchanged_since(EMPTY)


@pytest.mark.asyncio(loop_scope="session")
async def test_a_list_that_is_refused_is_no_stillness(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """A client without permissions never reports "unchanged"."""
    path = f"/api/v1/namespaces/{SPACE}/pods"
    client, nobody = kube.client(), KubernetesClient(kube.settings(await kube.user("nobody")))
    try:
        one = unchanged.ChangeProbe(nobody, "")
        one.end_read(one.begin_read(), EMPTY, {path: await client.version_of(path)})
        assert not await one.unchanged_since(EMPTY)
        with pytest.raises(DeniedError):
            await nobody.version_of(path)
    finally:
        await client.close()
        await nobody.close()


async def version_of(client: KubernetesClient, path: str) -> int:
    """The version, as soon as the restarted API server returns it."""
    async with asyncio.timeout(30.0):
        while True:
            with contextlib.suppress(TransientError):
                return int(await client.version_of(path))
            await asyncio.sleep(0.1)


async def moved_on(client: KubernetesClient, prefix: str) -> None:
    """Advance the store by more than an API server writes when it starts."""
    for number in range(60):
        named = {"metadata": {"name": f"{prefix}{number}"}}
        await client.create("/api/v1/namespaces/n/configmaps", named)


@pytest.mark.servers
@pytest.mark.slow_because("stops and starts an API server and its store, twice")
async def test_what_has_become_of_the_store_is_no_stillness(tmp_path: Path) -> None:
    """A restarted API server has forgotten earlier versions (410). An API server without its store
    reports from memory that nothing happens, and so does one whose store was restored to before the
    list (S8)."""
    store, copy = tmp_path / "kube" / "etcd", tmp_path / "copy"
    async with KubernetesCluster(tmp_path / "kube", controllers=False) as cluster:
        client = cluster.client()
        one = unchanged.ChangeProbe(client, "")

        async def with_store_at_rest(change: Callable[[], object]) -> None:
            for name in ("kube-apiserver", "etcd"):
                await cluster.stop_process(name)
            change()
            for name in ("etcd", "kube-apiserver"):
                await cluster.start_process(name)

        try:
            await cluster.add_namespace("n")
            before = str(await version_of(client, PODS))
            await moved_on(client, "a")
            await with_store_at_rest(lambda: shutil.copytree(store, copy))
            await version_of(client, PODS)
            with pytest.raises(ExpiredError):
                await one._is_silent(PODS, before)
            one.end_read(one.begin_read(), EMPTY, {PODS: before})
            assert not await one.unchanged_since(EMPTY)

            await moved_on(client, "b")
            listed = await version_of(client, PODS)
            one.end_read(one.begin_read(), EMPTY, {PODS: str(listed)})
            assert await one.unchanged_since(EMPTY)
            cluster.pause_process("etcd")
            assert await one._is_silent(PODS, str(listed))
            assert not await one.unchanged_since(EMPTY)
            cluster.resume_process("etcd")
            await version_of(client, PODS)
            assert await one.unchanged_since(EMPTY)

            await with_store_at_rest(lambda: (shutil.rmtree(store), copy.rename(store)))
            assert await version_of(client, PODS) < listed
            assert await one._is_silent(PODS, str(listed))
            assert not await one.unchanged_since(EMPTY)
        finally:
            await client.close()


def thing(slug: str, *, leaving: bool = False) -> dict[str, Any]:
    meta: dict[str, Any] = {"namespace": "n", "labels": {names.SLUG: slug}}
    return {"metadata": meta | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if leaving else {})}


def test_what_time_alone_would_change_is_not_settled() -> None:
    """A terminating pod becomes overdue at some point, and an object that has had no pod for a
    while is checked for the reason."""
    both = [thing("a"), thing("b")]

    assert view.is_settled(both, both)
    assert view.is_settled([], both)  # bare pods
    assert not view.is_settled(both, [thing("a")])
    assert not view.is_settled(both, [thing("a"), thing("b", leaving=True)])


async def holds(handler: Handler) -> bool:
    """Whether a list of pods at version 7 is reported as unchanged."""
    async with served(handler) as client:
        one = unchanged.ChangeProbe(client, "a=b")
        one.end_read(one.begin_read(), EMPTY, {PODS: "7"})
        return await one.unchanged_since(EMPTY)


def event(kind: str) -> bytes:
    thing = {"kind": "Pod", "metadata": {"resourceVersion": "9"}}
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def watched(body: bytes, length_s: float = 1.0) -> Handler:
    """Lists are empty; each watch sends this and ends after `length_s`."""

    async def handler(request: web.Request) -> web.StreamResponse:
        if "watch" not in request.query:
            return page([])
        assert (request.query["resourceVersion"], request.query["timeoutSeconds"]) == ("7", "1")
        answer = web.StreamResponse()
        await answer.prepare(request)
        await answer.write(body)
        await asyncio.sleep(length_s)
        return answer

    return handler


async def test_a_watch_that_has_nothing_to_say_is_a_yes() -> None:
    """A watch without events, or with only a bookmark, means unchanged."""
    assert await holds(watched(b""))
    assert await holds(watched(event("BOOKMARK")))


@pytest.mark.parametrize("kind", ["ADDED", "ERROR", "STRANGE"])
async def test_any_other_word_is_a_no(kind: str) -> None:
    """Any other event means changed, whatever comes before and after it."""
    assert not await holds(watched(event("BOOKMARK") + event(kind) + event("BOOKMARK")))


async def test_a_watch_that_has_not_its_time_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that is cut off early (for example by a server that shuts down) or never ends means
    changed."""
    monkeypatch.setattr(unchanged, "_MAX_S", 2.0)
    for length_s in (0.0, 0.7, 20.0):
        assert not await holds(watched(b"", length_s))

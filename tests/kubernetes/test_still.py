"""That nothing has changed on Kubernetes is told by short watches: on a real API server, and by one that says
what no real one can be made to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from nomad_watchdog.dev.kubelet import Kubelet
from nomad_watchdog.dev.kubernetes import KubernetesCluster
from nomad_watchdog.model import Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Snapshot
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler
from nomad_watchdog.schedulers.kubernetes import _names as names
from nomad_watchdog.schedulers.kubernetes import _still as still
from nomad_watchdog.schedulers.kubernetes import _view as view
from nomad_watchdog.schedulers.kubernetes._names import Ref
from nomad_watchdog.testing.conformance import record_of
from tests.schedulers.kubernetes_rig import kubelet, spec_of

from .test_client_faults import Handler, page, served, status

SPACE = "still"
EMPTY = Snapshot({}, 7)
PODS = "/api/v1/namespaces/n/pods"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def node(
    kube: KubernetesCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Kubelet]:
    await kube.add_namespace(SPACE)
    folder = tmp_path_factory.mktemp("still")
    async with kubelet(kube, folder, node="still", subnet=58) as running:
        yield running


@asynccontextmanager
async def scheduler_of(kube: KubernetesCluster) -> AsyncIterator[KubernetesScheduler]:
    """With one agent that runs; it is gone at the end."""
    one = KubernetesScheduler(settings=kube.settings(), namespace=SPACE, installation="still")
    try:
        await one.prepare([spec_of()])
        await one.ensure(record_of("device"), Epoch(1), spec_of())
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
    """The snapshot that shows it, when nothing has moved since."""
    async with asyncio.timeout(60.0):
        while True:
            found = await one.snapshot()
            there = placement_of(found)
            # ready is said some time after running, and would be news
            runs = there.state is PlacementState.RUNNING and there.ready
            if runs and await one.still(found):
                return found
            await asyncio.sleep(0.2)


def placement_of(found: Snapshot) -> Placement:
    ((placement,),) = found.placements.values()
    return placement


@pytest.mark.asyncio(loop_scope="session")
async def test_a_fleet_that_nobody_touches_is_still_again_and_again(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """Said thrice in a row, and each time of the time that has passed since: others' writes move the API
    server's version, and are not ours. To prepare again what is prepared changes nothing."""
    async with scheduler_of(kube) as one:
        seen = await until_running(one)
        for number in range(3):
            await kube.add_namespace(f"{SPACE}-noise-{number}")
            await one.prepare([spec_of()])  # as is done at every resync
            assert await one.still(seen)


@pytest.mark.asyncio(loop_scope="session")
async def test_whatever_happens_to_an_object_or_a_pod_is_no_stillness(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """Another's label on the Deployment, its own on the pod, and a pod that is killed: each ends it, until all
    was read again. While a pod leaves nothing is called still, for when it is overdue no event says so."""
    async with scheduler_of(kube) as one:
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
                assert not await one.still(seen)
                seen = await until_running(one)
            node.pause()
            try:
                await client.delete(pod_path, grace_s=30)
                assert not await one.still(seen)
                leaving = await one.snapshot()
                assert not await one.still(leaving)
            finally:
                node.resume()
        finally:
            await client.close()


@pytest.mark.asyncio(loop_scope="session")
async def test_after_a_write_of_ours_all_is_read_again(
    kube: KubernetesCluster, node: Kubelet
) -> None:
    """Also after one that changed nothing, and when it ends while the list is being read."""
    async with scheduler_of(kube) as one:
        seen = await until_running(one)
        await one.ensure(record_of("device"), Epoch(1), spec_of())
        assert not await one.still(seen)
        reading = asyncio.ensure_future(one.snapshot())
        await asyncio.sleep(0)
        one._still.wrote()
        assert not await one.still(await reading)


def thing(slug: str, *, leaving: bool = False) -> dict[str, Any]:
    meta: dict[str, Any] = {"namespace": "n", "labels": {names.SLUG: slug}}
    return {"metadata": meta | ({"deletionTimestamp": "2026-01-01T00:00:00Z"} if leaving else {})}


def test_what_time_alone_would_change_is_not_settled() -> None:
    """A pod that leaves is overdue some day, and an object that has had no pod for a while is asked why."""
    both = [thing("a"), thing("b")]

    assert view.is_settled(both, both)
    assert view.is_settled([], both)  # bare pods
    assert not view.is_settled(both, [thing("a")])
    assert not view.is_settled(both, [thing("a"), thing("b", leaving=True)])


async def holds(handler: Handler) -> bool:
    """What is said of a list of pods at version 7."""
    async with served(handler) as client:
        one = still.Stillness(client, "a=b")
        one.read(one.begins(), EMPTY, {PODS: "7"})
        return await one.holds(EMPTY)


def event(kind: str) -> bytes:
    thing = {"kind": "Pod", "metadata": {"resourceVersion": "9"}}
    return json.dumps({"type": kind, "object": thing}).encode() + b"\n"


def watched(body: bytes, length_s: float = 1.0) -> Handler:
    """Lists are empty; each watch says this and ends in time."""

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
    """A bookmark says nothing, either."""
    assert await holds(watched(b""))
    assert await holds(watched(event("BOOKMARK")))


@pytest.mark.parametrize("kind", ["ADDED", "MODIFIED", "DELETED", "ERROR", "STRANGE"])
async def test_any_other_word_is_a_no(kind: str) -> None:
    """Whatever comes before and after it."""
    assert not await holds(watched(event("BOOKMARK") + event(kind) + event("BOOKMARK")))


async def test_what_can_not_be_learnt_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is forgotten, a refusal, a watch that is ended early, one that never ends, and an API
    server that has lost its store, or whose store is an older one: its watches say that nothing happens."""
    monkeypatch.setattr(still, "_MOST_S", 1.5)

    async def forgotten(_: web.Request) -> web.StreamResponse:
        return status(410, "Expired")

    async def refused(_: web.Request) -> web.StreamResponse:
        return status(403, "Forbidden")

    async def lost(request: web.Request) -> web.StreamResponse:
        if "watch" in request.query:
            return await watched(b"")(request)
        return status(500, "InternalError")

    async def put_back(request: web.Request) -> web.StreamResponse:
        return await watched(b"")(request) if "watch" in request.query else page([], version="6")

    cut = (watched(b"", 0.0), watched(b"", 0.7), watched(b"", 20.0))
    for handler in (forgotten, refused, *cut, lost, put_back):
        assert not await holds(handler)


async def test_one_list_that_moved_is_enough() -> None:
    """Of two watched lists one is quiet, and the other is not."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await watched(b"" if request.path == PODS else event("ADDED"))(request)

    async with served(handler) as client:
        one = still.Stillness(client, "")
        one.read(one.begins(), EMPTY, {PODS: "7", f"{PODS}-too": "7"})
        assert not await one.holds(EMPTY)

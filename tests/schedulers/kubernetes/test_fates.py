"""What happens to pods on a real control plane, and what we report about it."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nomad_watchdog.cli._agent_logs import kubernetes_log
from nomad_watchdog.clients.kubernetes import FieldConflictError, KubernetesClient
from nomad_watchdog.config.blocks import KubernetesSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.errors import ConflictError, NotFoundError, TerminalError, TransientError
from nomad_watchdog.model import AgentSpec, DeviceRecord, Epoch, Placement, PlacementState
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler, names
from nomad_watchdog.testing.conformance import record_of
from servers.kubelet.__main__ import Kubelet
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes_rig import kubelet, processes_of, soon_ready, spec_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]
RUNNING = PlacementState.RUNNING


@dataclass
class Site:
    kube: KubernetesCluster
    nodes: dict[str, Kubelet]
    client: KubernetesClient
    scheduler: KubernetesScheduler
    namespace: str

    async def start(self, spec: AgentSpec) -> DeviceRecord:
        record = record_of(f"device-{uuid.uuid4()}")
        await self.scheduler.ensure(record, Epoch(1), spec)
        return record

    async def of(self, record: DeviceRecord) -> tuple[Placement, ...]:
        seen = await self.scheduler.snapshot([record.slug])
        return seen.placements.get(record.slug, ())

    async def until(
        self, record: DeviceRecord, test: Callable[[Placement], bool], timeout_s: float = 90.0
    ) -> Placement:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with suppress(TransientError):
                for one in await self.of(record):
                    if test(one):
                        return one
            await asyncio.sleep(0.1)
        raise AssertionError(f"not within {timeout_s} s; last seen: {await self.of(record)}")

    async def pods(self, record: DeviceRecord) -> list[Any]:
        path = names.collection(self.namespace, "pod")
        return list((await self.client.list(path, labels=f"{names.SLUG}={record.slug}")).items)

    async def retire(self, record: DeviceRecord) -> None:
        for one in await self.of(record):
            await self.scheduler.retire(one, 3.0)

    def pod_path(self, pod: Any) -> str:
        return f"{names.collection(self.namespace, 'pod')}/{pod['metadata']['name']}"


NAMESPACE = "fates"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def nodes(
    kube: KubernetesCluster, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Kubelet]]:
    """Two nodes, and the namespace of this file."""
    await kube.add_namespace(NAMESPACE)
    async with AsyncExitStack() as stack:
        started = {}
        for number, name in ((31, "fate-a"), (32, "fate-b")):
            folder = tmp_path_factory.mktemp(name)
            running = kubelet(kube, folder, node=name, subnet=number)
            started[name] = await stack.enter_async_context(running)
        yield started


@pytest_asyncio.fixture(loop_scope="session")
async def site(kube: KubernetesCluster, nodes: dict[str, Kubelet]) -> AsyncIterator[Site]:
    client = kube.client()
    scheduler = KubernetesScheduler(
        settings=kube.settings(), namespace=NAMESPACE, installation="fates"
    )
    try:
        await scheduler.prepare([spec_of()])
        yield Site(kube, nodes, client, scheduler, NAMESPACE)
    finally:
        await scheduler.close()
        await client.close()


async def test_a_pod_that_no_node_takes_is_pending(site: Site) -> None:
    """If the agent needs more CPU than any node has, it is PENDING, with the scheduler's
    message."""
    record = await site.start(spec_of(variables={"cpu_request": "900000", "cpu_limit": "900000"}))
    found = await site.until(record, lambda one: "no node can run it" in one.reason)

    assert found.state is PlacementState.PENDING
    assert "Insufficient cpu" in found.reason
    assert not (await replace_limit(site, 1)).room
    assert (await replace_limit(site, 10)).room
    await site.retire(record)


async def replace_limit(site: Site, limit: int) -> Any:
    scheduler = KubernetesScheduler(
        settings=site.kube.settings(), namespace=site.namespace, installation="fates",
        blocked_limit=limit,
    )  # fmt: skip
    try:
        return await scheduler.capacity()
    finally:
        await scheduler.close()


async def test_an_image_that_is_not_there_is_named(site: Site) -> None:
    """The agent is STARTING with the image in the reason; this is not a crash and counts no
    restart."""
    record = await site.start(spec_of("nowhere/nothing:9"))
    found = await site.until(record, lambda one: "nowhere/nothing:9" in one.reason)

    assert (found.state, found.restarts) == (PlacementState.STARTING, 0)
    assert found.reason.startswith(("ErrImagePull", "ImagePullBackOff"))
    await site.retire(record)


async def test_too_much_memory_is_told(site: Site) -> None:
    """An agent past its memory limit is RESTARTING with OOMKilled as the reason."""
    record = await site.start(spec_of("test/hog", memory_bytes=32 * 1024 * 1024))
    found = await site.until(record, lambda one: "OOMKilled" in one.reason)

    assert found.state is PlacementState.RESTARTING
    await site.retire(record)


async def test_a_crash_loop_counts(site: Site) -> None:
    """An agent that exits at once is RESTARTING with its exit code, and its restart count
    increases."""
    record = await site.start(spec_of("test/failing"))
    found = await site.until(
        record, lambda one: one.restarts >= 2 and one.state is PlacementState.RESTARTING
    )

    assert "exit code 1" in found.reason
    await site.retire(record)


@pytest.mark.slow_because("an agent crashes for some seconds while no API server runs")
async def test_a_dead_api_server_takes_no_node_with_it(site: Site) -> None:
    """While the API server is down, a node keeps restarting its agents, and reports this
    afterwards."""
    record = await site.start(spec_of("test/failing"))
    before = await site.until(record, lambda one: one.restarts >= 1)
    await site.kube.kill_process("kube-apiserver")
    try:
        await asyncio.sleep(5.0)  # more than one round of the crash loop, each with a status change
    finally:
        await site.kube.start_process("kube-apiserver")
    await site.until(record, lambda one: one.restarts >= before.restarts + 2, 60.0)

    assert all(node.is_running for node in site.nodes.values())
    await site.retire(record)


@pytest.mark.slow_because(
    "the controllers may still look for the API server that was killed before"
)
async def test_an_evicted_agent_is_started_again_elsewhere_in_the_same_epoch(site: Site) -> None:
    """A Deployment replaces an evicted pod: another instance, the same epoch."""
    record = await site.start(spec_of())
    before = await site.until(record, lambda one: one.state is RUNNING)
    (pod,) = await site.pods(record)
    status = {"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}
    await site.client.call(
        "PATCH", f"{site.pod_path(pod)}/status", body={"status": status},
        content="application/merge-patch+json",
    )  # fmt: skip
    after = await site.until(
        record, lambda one: one.state is RUNNING and one.instances != before.instances
    )

    assert after.epoch == before.epoch
    assert len(after.instances) == 1
    await site.retire(record)


async def test_an_evicted_bare_pod_is_dead_with_its_reason_and_swept(site: Site) -> None:
    """A bare pod is not restarted: it is DEAD, so the planner can go to the next epoch."""
    record = await site.start(spec_of(variables={"workload": "pod"}))
    await site.until(record, lambda one: one.state is RUNNING)
    (pod,) = await site.pods(record)
    status = {"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}
    await site.client.call(
        "PATCH", f"{site.pod_path(pod)}/status", body={"status": status},
        content="application/merge-patch+json",
    )  # fmt: skip
    dead = await site.until(record, lambda one: one.state is PlacementState.DEAD)

    assert dead.reason == "Evicted: the node was low on memory"
    assert await site.scheduler.sweep([dead]) == 1
    assert await site.of(record) == ()


async def test_a_drained_agent_moves(site: Site) -> None:
    """The eviction API moves a Deployment's pod: a new instance at the same epoch, the old one stops."""
    record = await site.start(spec_of())
    before = await site.until(record, lambda one: one.state is RUNNING)
    (pod,) = await site.pods(record)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod["metadata"]["name"], "namespace": site.namespace},
    }
    await site.client.create(f"{site.pod_path(pod)}/eviction", eviction)
    after = await site.until(
        record, lambda one: one.state is RUNNING and one.instances != before.instances
    )

    assert (after.epoch, len(after.instances)) == (before.epoch, 1)
    await site.retire(record)


async def lose(site: Site, record: DeviceRecord, before: Placement) -> Kubelet:
    node = site.nodes[before.node]
    node.pause()
    return node


@pytest.mark.slow_because("Kubernetes takes a node for lost some seconds after its last heartbeat")
async def test_a_lost_node_is_handled_in_seconds(site: Site, tmp_path: Path) -> None:
    """A node that stops reporting is seen as LOST; a Deployment's agent is then started elsewhere
    after the toleration time, and only the new instance may be accepted (S3)."""
    record = await site.start(soon_ready(spec_of(variables={"lost_after": "3"}), tmp_path))
    before = await site.until(record, lambda one: one.state is RUNNING)
    (pod,) = await site.pods(record)
    tolerated = {one["key"]: one["tolerationSeconds"] for one in pod["spec"]["tolerations"]}
    lost = {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
    assert tolerated == dict.fromkeys(lost, 3)
    await ready(site, record)
    node = await lose(site, record, before)
    try:
        await site.until(record, lambda one: one.state is PlacementState.LOST)
        after = await site.until(
            record, lambda one: one.state is RUNNING and one.instances != before.instances
        )

        assert after.node != before.node
        assert len(after.instances) == 1
        assert len(processes_of(record.slug)) == 2, "the window of S3: the old process goes on"
    finally:
        node.resume()
    await gone(lambda: _one(record), "the old process is stopped when its node is back")
    await site.retire(record)


@pytest.mark.slow_because("waits for a lost node, and then for what must not happen")
async def test_a_lost_node_leaves_a_statefulset_as_it_is(site: Site, tmp_path: Path) -> None:
    """A StatefulSet's agent is not started elsewhere while a process may be left: LOST, and one
    process."""
    variables = {"lost_after": "1", "workload": "statefulset"}
    record = await site.start(soon_ready(spec_of(variables=variables), tmp_path))
    before = await site.until(record, lambda one: one.state is RUNNING)
    await ready(site, record)
    node = await lose(site, record, before)
    try:
        await site.until(record, lambda one: one.state is PlacementState.LOST)
        await asyncio.sleep(10)  # must not happen, even long after the tolerated second
        (still,) = await site.of(record)

        assert (still.state, still.instances) == (PlacementState.LOST, before.instances)
        assert len(processes_of(record.slug)) == 1
    finally:
        node.resume()
    await site.until(record, lambda one: one.state is RUNNING)
    await site.retire(record)


async def ready(site: Site, record: DeviceRecord) -> None:
    """Wait for the readiness probe."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        for pod in await site.pods(record):
            told = {one["type"]: one["status"] for one in pod["status"].get("conditions") or []}
            if told.get("Ready") == "True":
                return
        await asyncio.sleep(0.2)
    raise AssertionError("the pod did not get ready")


async def _one(record: DeviceRecord) -> bool:
    return len(processes_of(record.slug)) == 1


async def gone(test: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + 90
    while not await test():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.2)


async def test_a_change_by_hand_is_told_and_not_undone(site: Site) -> None:
    """After `kubectl scale` an in-place replacement is refused; the error names the field and its
    manager."""
    record = await site.start(spec_of())
    path = f"{names.collection(site.namespace, 'deployment')}/{names.name_of(record.slug)}"
    scaled = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": names.name_of(record.slug)},
        "spec": {"replicas": 0},
    }
    await site.client.apply(path, scaled, manager="kubectl", force=True)
    with pytest.raises(FieldConflictError, match=r'spec.replicas.*"kubectl"'):
        await site.scheduler.ensure(record, Epoch(2), spec_of())
    await site.retire(record)


async def test_an_epoch_never_goes_back(site: Site) -> None:
    """A late ensure with a lower epoch changes nothing (S2)."""
    record = await site.start(spec_of())
    await site.scheduler.ensure(record, Epoch(2), spec_of())
    with pytest.raises(ConflictError, match="is at epoch 2"):
        await site.scheduler.ensure(record, Epoch(1), spec_of())
    await site.retire(record)


async def test_what_is_not_ours_is_left_alone(site: Site) -> None:
    """An object with our name that someone else or another installation created is neither changed
    nor deleted."""
    record = await site.start(spec_of())
    other = KubernetesScheduler(
        settings=site.kube.settings(), namespace=site.namespace, installation="other"
    )
    try:
        with pytest.raises(TerminalError, match="belongs to installation 'fates'"):
            await other.ensure(record, Epoch(1), spec_of())
        assert (await other.snapshot()).placements == {}
    finally:
        await other.close()
    await site.retire(record)


async def test_a_changed_workload_moves_the_agent(site: Site) -> None:
    """When a class becomes a StatefulSet, the Deployment is gone before the StatefulSet is
    created."""
    record = await site.start(spec_of())
    await site.until(record, lambda one: one.state is RUNNING)
    spec = replace(spec_of(variables={"workload": "statefulset"}), spec_hash="other")

    async def moved() -> bool:
        try:
            await site.scheduler.ensure(record, Epoch(2), spec)
        except TransientError:
            return False
        found = await site.of(record)
        assert len(processes_of(record.slug)) <= 1
        return [(one.epoch, one.state) for one in found] == [(2, RUNNING)]

    await gone(moved, "the StatefulSet runs alone")
    assert "/statefulset/" in (await site.of(record))[0].ref
    await site.retire(record)


async def test_a_credential_is_in_a_secret_that_goes_with_its_owner(
    site: Site, tmp_path: Path
) -> None:
    """The agent's token is a file in its pod, is in no other object, and is deleted with the agent
    (S10)."""
    spec = replace(spec_of(), agent_config={"v": 1, "credential": "hunter2"})
    record = await site.start(spec)
    await site.until(record, lambda one: one.state is RUNNING)
    path = f"/api/v1/namespaces/{site.namespace}/secrets/{names.name_of(record.slug)}-1"
    (pod,) = await site.pods(record)
    files = [
        file.read_text()
        for node in site.nodes.values()
        for file in node.folder.glob(f"{pod['metadata']['uid']}/volumes/*/token")
    ]

    assert files == ["hunter2"]
    assert await site.client.find(path) is not None
    assert "hunter2" not in str(pod)
    await site.retire(record)

    async def both_gone() -> bool:
        return await site.of(record) == () and await site.client.find(path) is None

    await gone(both_gone, "the Secret goes with its owner")


def with_credential() -> AgentSpec:
    return replace(spec_of(), agent_config={"v": 1, "credential": "hunter2"})


def secret_of(site: Site, record: DeviceRecord, epoch: int) -> str:
    return f"/api/v1/namespaces/{site.namespace}/secrets/{names.name_of(record.slug)}-{epoch}"


async def test_a_start_that_is_asked_for_twice_leaves_the_credential_its_owner(site: Site) -> None:
    """Even if the Secret has lost its owner, a second ensure of the epoch restores it: the Secret
    is deleted with the agent (S10)."""
    record = await site.start(with_credential())
    path = secret_of(site, record, 1)
    await site.scheduler.ensure(record, Epoch(1), with_credential())
    (owner,) = (await site.client.get(path))["metadata"]["ownerReferences"]
    orphan = {"metadata": {"ownerReferences": None}}
    await site.client.call("PATCH", path, body=orphan, content="application/merge-patch+json")
    assert "ownerReferences" not in (await site.client.get(path))["metadata"]

    await site.scheduler.ensure(record, Epoch(1), with_credential())

    assert (await site.client.get(path))["metadata"]["ownerReferences"] == [owner]
    assert (owner["kind"], owner["name"]) == ("Deployment", names.name_of(record.slug))
    await site.retire(record)

    async def secret_gone() -> bool:
        return await site.client.find(path) is None

    await gone(secret_gone, "the Secret goes with its owner")


async def test_a_start_that_is_refused_leaves_no_credential(site: Site) -> None:
    """A late ensure, and one that another field manager blocks, delete the Secret that they
    created; the accepted agent keeps its own (S10)."""
    record = await site.start(with_credential())
    await site.scheduler.ensure(record, Epoch(2), with_credential())
    with pytest.raises(ConflictError, match="is at epoch 2"):
        await site.scheduler.ensure(record, Epoch(1), with_credential())
    scaled = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": names.name_of(record.slug)},
        "spec": {"replicas": 0},
    }
    path = f"{names.collection(site.namespace, 'deployment')}/{names.name_of(record.slug)}"
    await site.client.apply(path, scaled, manager="kubectl", force=True)
    with pytest.raises(FieldConflictError):
        await site.scheduler.ensure(record, Epoch(3), with_credential())
    there = [await site.client.find(secret_of(site, record, epoch)) for epoch in (1, 2, 3)]

    assert [one is not None for one in there] == [False, True, False]
    await site.retire(record)


async def test_the_credential_of_another_installation_is_left_alone(site: Site) -> None:
    """Two installations that share a namespace by mistake use the same Secret name: the refused one
    neither overwrites nor deletes the other's."""
    record = await site.start(with_credential())
    path = secret_of(site, record, 1)
    before = await site.client.get(path)
    other = KubernetesScheduler(
        settings=site.kube.settings(), namespace=site.namespace, installation="other"
    )
    theirs = replace(with_credential(), agent_config={"v": 1, "credential": "other"})
    try:
        with pytest.raises(TerminalError, match="belongs to installation 'fates'"):
            await other.ensure(record, Epoch(1), theirs)
    finally:
        await other.close()

    assert (await site.client.get(path))["data"] == before["data"]
    await site.retire(record)


async def test_a_bare_pod_that_must_go_first_leaves_no_credential_behind(site: Site) -> None:
    """The Secret of the next epoch is deleted when the answer is that the old pod has to go first.
    It is created again with the next pod, which uses it (S10)."""
    spec = replace(
        spec_of(variables={"workload": "pod"}), agent_config=with_credential().agent_config
    )
    record = await site.start(spec)
    await site.until(record, lambda one: one.state is RUNNING)
    await site.scheduler.ensure(record, Epoch(2), spec)
    assert await site.client.find(secret_of(site, record, 2)) is None

    async def followed() -> bool:
        with suppress(TransientError):
            await site.scheduler.ensure(record, Epoch(2), spec)
        return [(one.epoch, one.state) for one in await site.of(record)] == [(2, RUNNING)]

    await gone(followed, "the next pod runs")
    assert (await site.client.get(secret_of(site, record, 2)))["metadata"]["ownerReferences"]
    await site.retire(record)


async def test_a_class_is_built_once(site: Site, tmp_path: Path, repository: Path) -> None:
    """A spec that was not prepared, such as one from before an update, is built for the first
    device only: the other devices start even if its template is gone."""
    template = tmp_path / "template.yaml"
    shutil.copy(repository / "jobs" / "kubernetes" / "device-watchdog.yaml", template)
    spec = replace(spec_of(), spec_hash="built-once", template=str(template))
    records = [await site.start(spec)]
    template.unlink()
    records += [await site.start(spec) for _ in range(2)]
    for record in records:
        await site.retire(record)


async def test_the_log_of_an_agent_comes_from_its_kubelet(site: Site) -> None:
    """`agents logs` prints the log of a device's newest pod, and reports when there is no pod."""
    record = await site.start(spec_of())
    await site.until(record, lambda one: one.state is RUNNING)
    settings = Settings(
        backend="kubernetes",
        kubernetes=KubernetesSettings(
            kubeconfig=str(site.kube.kubeconfig), namespace=site.namespace
        ),
    )
    said = ""

    async def told() -> bool:
        nonlocal said
        said = await kubernetes_log(settings, record.slug)
        return bool(said)

    await gone(told, "the agent has written something")

    assert said == f"agent of {record.device.id} serves\n"
    await site.retire(record)
    with pytest.raises(NotFoundError, match="no pod of nobody"):
        await kubernetes_log(settings, "nobody")

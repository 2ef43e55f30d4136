"""A fleet over several namespaces, and the hints from its pods."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from nomad_watchdog.errors import DeniedError, NotFoundError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Placement, PlacementState
from nomad_watchdog.schedulers import Hint
from nomad_watchdog.schedulers.kubernetes import KubernetesScheduler, names
from nomad_watchdog.schedulers.kubernetes.namespaces import known_namespaces, newest_pod
from nomad_watchdog.testing.conformance import record_of
from servers.kubernetes import KubernetesCluster
from tests.schedulers.kubernetes_rig import MOCK, kubelet, processes_of, spec_of

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(240)]
SPEC = replace(spec_of(), template=MOCK, spec_hash="m", variables={})


@asynccontextmanager
async def scheduler(
    kube: KubernetesCluster, namespace: str, namespaces: int = 1
) -> AsyncIterator[KubernetesScheduler]:
    one = KubernetesScheduler(
        settings=kube.settings(), namespace=namespace, namespaces=namespaces, installation="spread"
    )
    try:
        yield one
    finally:
        await one.close()


async def the_newest_pod_is_found(
    kube: KubernetesCluster, placements: Mapping[Slug, tuple[Placement, ...]]
) -> None:
    """A scheduler configured with one namespace finds the pod of a device in the second."""
    slug = next(slug for slug, (one,) in placements.items() if one.ref.startswith("spread-1/"))
    client = kube.client()
    path = ""
    try:
        async with asyncio.timeout(60):
            while not path:
                with contextlib.suppress(NotFoundError):
                    path = await newest_pod(client, "spread", 1, slug)
                await asyncio.sleep(0.1)
    finally:
        await client.close()
    assert path.startswith("/api/v1/namespaces/spread-1/pods/")


async def test_devices_are_spread_and_none_is_lost_when_the_number_changes(
    kube: KubernetesCluster,
) -> None:
    """Two namespaces share twenty devices. A scheduler configured with only one still sees and
    stops all of them and finds their pods, and changing the number moves no agent."""
    for name in ("spread", "spread-1"):
        await kube.add_namespace(name)
    records = [record_of(f"spread-{number}") for number in range(20)]
    async with scheduler(kube, "spread", 2) as two:
        await two.prepare([SPEC])
        await asyncio.gather(*(two.ensure(one, Epoch(1), SPEC) for one in records))
        before = (await two.snapshot()).placements
        spaces = [found.ref.partition("/")[0] for (found,) in before.values()]

        assert len(before) == 20
        assert 4 <= spaces.count("spread-1") <= 16
    async with scheduler(kube, "spread", 1) as one:
        await one.prepare([SPEC])
        after = (await one.snapshot()).placements
        assert {slug: found[0].ref for slug, found in after.items()} == {
            slug: found[0].ref for slug, found in before.items()
        }
        await the_newest_pod_is_found(kube, after)
        await asyncio.gather(*(one.retire(found, 1.0) for (found,) in after.values()))
        async with asyncio.timeout(60):
            while (await one.snapshot()).placements:
                await asyncio.sleep(0.2)


async def test_the_number_of_namespaces_is_lowered_by_hand_only(kube: KubernetesCluster) -> None:
    """A scheduler configured with one namespace still reads two. After a patch as in the guide it
    reads one, and then the number can be raised again."""
    for name in ("lowered", "lowered-1"):
        await kube.add_namespace(name)
    client = kube.client()

    async def known_after(namespaces: int) -> int:
        async with scheduler(kube, "lowered", namespaces) as one:
            await one.prepare([])
        return await known_namespaces(client, "lowered", 1)

    try:
        assert [await known_after(2), await known_after(1)] == [2, 2]
        await client.call(
            "PATCH", names.record_path("lowered"), params={"fieldManager": "kubectl-patch"},
            body={"data": {"namespaces": "1"}}, content="application/merge-patch+json",
        )  # fmt: skip
        assert [await known_after(1), await known_after(2)] == [1, 2]
    finally:
        await client.close()


async def test_a_namespace_that_is_not_there_is_told(kube: KubernetesCluster) -> None:
    """Preparing reports the missing namespace before anything is placed."""
    async with scheduler(kube, "nowhere") as one:
        with pytest.raises((NotFoundError, DeniedError), match='"nowhere" not found'):
            await one.prepare([SPEC])


async def test_a_start_is_calm_news_and_a_crash_is_urgent(
    kube: KubernetesCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From ensure to running every hint of a device is calm; when its process dies, at least one is
    not."""
    await kube.add_namespace("hints")
    seen: list[Hint] = []
    record = record_of("hinted")
    spec = spec_of()
    folder = tmp_path_factory.mktemp("hints")
    async with kubelet(kube, folder, node="hints", subnet=41), scheduler(kube, "hints") as one:
        await one.prepare([spec])

        async def watch() -> None:
            async for hint in one.watch():
                seen.append(hint)

        task = asyncio.ensure_future(watch())
        try:
            async with asyncio.timeout(90):
                while not seen:
                    await asyncio.sleep(0.05)
                await one.ensure(record, Epoch(1), spec)
                found = ()
                while not (found and found[0].state is PlacementState.RUNNING):
                    found = (await one.snapshot([record.slug])).placements.get(record.slug, ())
                    await asyncio.sleep(0.1)
                news = [hint for hint in seen if hint.slugs is not None]
                assert news
                assert all(hint.calm for hint in news)
                for pid in processes_of(record.slug):
                    os.kill(pid, signal.SIGKILL)
                while all(hint.calm or hint.slugs is None for hint in seen):
                    await asyncio.sleep(0.05)
            await one.retire(found[0], 1.0)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    assert {names.name_of(slug) for hint in seen for slug in hint.slugs or ()} == {
        names.name_of(record.slug)
    }

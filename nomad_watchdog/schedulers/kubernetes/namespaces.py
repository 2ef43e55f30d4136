"""The number of namespaces that were ever used, and searches in all of them."""

from __future__ import annotations

import asyncio
from typing import Final

from watchdog_agent.runtime.parsing import whole_or

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import KubernetesObject
from nomad_watchdog.errors import ConflictError, NotFoundError, TransientError
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes.objects import expecting

_TRIES: Final = 4


async def remember_namespaces(client: KubernetesClient, first: str, spread: int) -> int:
    """Store how many namespaces were ever used, at least `spread`, and return it: agents in a namespace that is
    no longer used must still be listed. Raises TransientError when other writers keep changing it."""
    path = names.record_path(first)
    for _ in range(_TRIES):
        found = await client.find(path)
        before = _stored(found)
        if before >= spread:
            return before
        body: KubernetesObject = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": names.RECORD, "labels": {names.MANAGED: names.DOMAIN}},
            "data": {"namespaces": str(spread)},
        }
        try:
            # force: an operator may have lowered it manually, as documented; the version still prevents lost writes
            await client.apply(path, expecting(body, found), force=True)
        except ConflictError:
            continue
        return spread
    raise TransientError(f"{path} was changed by another writer in each of {_TRIES} attempts")


async def known_namespaces(client: KubernetesClient, first: str, spread: int) -> int:
    """The number of namespaces that were ever used, at least `spread`, the number in use now. Raises DeniedError
    without the right to read the record."""
    return max(spread, _stored(await client.find(names.record_path(first))))


async def newest_pod(client: KubernetesClient, first: str, spread: int, slug: str) -> str:
    """The path of the newest pod of a device in any namespace that was ever used. `spread`: the number in use now.
    Raises NotFoundError when there is none."""
    known = await known_namespaces(client, first, spread)
    paths = [names.collection(names.namespace_of(first, number), "pod") for number in range(known)]
    lists = await asyncio.gather(
        *(client.list(path, labels=f"{names.SLUG}={slug}", metadata=True) for path in paths)
    )
    pods = [
        (pod["metadata"]["creationTimestamp"], f"{path}/{pod['metadata']['name']}")
        for path, found in zip(paths, lists, strict=True)
        for pod in found.items
    ]
    if pods:
        return max(pods)[1]
    raise NotFoundError(f"no pod of {slug} in namespace {first}")


def _stored(record: KubernetesObject | None) -> int:
    """The number of namespaces that were ever used; 0 if it is unknown."""
    data = (record.get("data") or {}) if record is not None else {}
    return whole_or(str(data.get("namespaces", "0")), 0)

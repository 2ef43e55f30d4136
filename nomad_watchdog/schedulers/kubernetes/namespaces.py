"""How many namespaces were ever filled, and what is looked for in all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import ConflictError, NotFoundError, TransientError
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes.objects import expecting

_TRIES: Final = 4


async def remember_namespaces(client: KubernetesClient, first: str, spread: int) -> int:
    """Learn how many namespaces were ever used, and say how many are now: agents in one that is no longer
    filled must still be seen. Raises TransientError when others write it all the time."""
    path = names.record_path(first)
    for _ in range(_TRIES):
        found = await client.find(path)
        before = _remembered(found)
        if before >= spread:
            return before
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": names.RECORD, "labels": {names.MANAGED: names.DOMAIN}},
            "data": {"namespaces": str(spread)},
        }
        try:
            # by force: somebody may have lowered it by hand, as the guide says; the version still guards it
            await client.apply(path, expecting(body, found), force=True)
        except ConflictError:
            continue
        return spread
    raise TransientError(f"{path} is changed by others all the time")


async def known_namespaces(client: KubernetesClient, first: str, spread: int) -> int:
    """How many namespaces are read: all that were ever used. `spread`: so many are now. Raises DeniedError
    without the right to the record."""
    return max(spread, _remembered(await client.find(names.record_path(first))))


async def newest_pod(client: KubernetesClient, first: str, spread: int, slug: str) -> str:
    """The path of the newest pod of a device, in whichever namespace was ever used; `spread`: so many are
    now. Raises NotFoundError when there is none."""
    known = await known_namespaces(client, first, spread)
    paths = [names.collection(names.namespace_of(first, number), "pod") for number in range(known)]
    lists = await asyncio.gather(
        *(client.list(path, labels=f"{names.SLUG}={slug}", metadata=True) for path in paths)
    )
    pods = [
        (str(pod["metadata"]["creationTimestamp"]), f"{path}/{pod['metadata']['name']}")
        for path, found in zip(paths, lists, strict=True)
        for pod in found.items
    ]
    if pods:
        return max(pods)[1]
    raise NotFoundError(f"no pod of {slug} in namespace {first}")


def _remembered(record: Mapping[str, Any] | None) -> int:
    """How many namespaces were ever used; 0 when that is not known."""
    held = str(((record or {}).get("data") or {}).get("namespaces", "0"))
    return int(held) if held.isascii() and held.isdigit() else 0

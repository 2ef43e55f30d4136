"""Cordoned nodes, on which Kubernetes places no new pods. A drain (`kubectl drain`) begins with a cordon.

A field selector limits lists and watches to cordoned nodes, so the cost does not grow with the cluster. They need
the rights `list` and `watch` on nodes. Without them nodes are unknown, and nothing is reported about them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import aclosing
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.schedulers import ClosedHost

log = logging.getLogger(__name__)

_PATH: Final = "/api/v1/nodes"
_CORDONED: Final = "spec.unschedulable=true"
_PAUSE_S: Final = 30.0
"""Pause before the next watch after one that was denied or failed."""


class Cordons:
    """The cordoned nodes as of the last list."""

    def __init__(self, client: KubernetesClient) -> None:
        self._client = client
        self._closed: Mapping[str, ClosedHost] = {}

    async def read(self) -> Mapping[str, ClosedHost]:
        """By name. If the list fails, the previous one stays; never raises."""
        try:
            found = await self._client.list(_PATH, fields=_CORDONED, metadata=True)
        except WatchdogError as error:
            log.debug("nodes not read", extra={"reason": str(error)})
        else:
            names = (one["metadata"]["name"] for one in found.items)
            self._closed = {name: ClosedHost(draining=False, state="cordoned") for name in names}
        return self._closed

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when a node was cordoned or uncordoned, until cancelled."""
        while True:
            try:
                version = await self._client.version_of(_PATH)
                on_change()
                while True:
                    version = await self._watch(version, on_change)
                    await asyncio.sleep(1.0)
            except (WatchdogError, ValueError) as error:
                log.debug("nodes are not watched", extra={"reason": str(error)})
            await asyncio.sleep(_PAUSE_S)

    async def _watch(self, version: str, on_change: Callable[[], None]) -> str:
        """One watch from `version`; returns the version of its last event."""
        events = self._client.watch(_PATH, version, fields=_CORDONED, metadata=True)
        async with aclosing(events) as stream:  # type: ignore[type-var]
            async for event in stream:
                version = event.version or version
                if event.kind in ("ADDED", "DELETED"):
                    on_change()
        return version

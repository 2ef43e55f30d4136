"""Nodes that are cordoned: Kubernetes places no new pods on them. A drain (`kubectl drain`) begins with a cordon.

Only these are asked for, by a field selector, so that the cost does not grow with the cluster. The rights `list` and
`watch` on nodes are needed; without them nothing is known of nodes, and nothing is reported.
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
"""Time to the next watch after one that was refused or broke."""


class Cordons:
    """The cordoned nodes as they were listed last."""

    def __init__(self, client: KubernetesClient) -> None:
        self._client = client
        self._closed: Mapping[str, ClosedHost] = {}

    async def read(self) -> Mapping[str, ClosedHost]:
        """By name. Never raises for Kubernetes: where the list fails the last one stays."""
        try:
            found = await self._client.list(_PATH, fields=_CORDONED, metadata=True)
        except WatchdogError as error:
            log.debug("nodes not read", extra={"reason": str(error)})
        else:
            names = (one["metadata"]["name"] for one in found.items)
            self._closed = {name: ClosedHost(draining=False, state="cordoned") for name in names}
        return self._closed

    async def follow(self, news: Callable[[], None]) -> None:
        """Call `news` when a node was cordoned or uncordoned, until cancelled."""
        while True:
            try:
                version = await self._client.version_of(_PATH)
                news()
                while True:
                    events = self._client.watch(_PATH, version, fields=_CORDONED, metadata=True)
                    async with aclosing(events) as stream:  # type: ignore[type-var]
                        async for event in stream:
                            version = event.version or version
                            if event.kind in ("ADDED", "DELETED"):
                                news()
                    await asyncio.sleep(1.0)
            except (WatchdogError, ValueError) as error:
                log.debug("nodes are not watched", extra={"reason": str(error)})
            await asyncio.sleep(_PAUSE_S)

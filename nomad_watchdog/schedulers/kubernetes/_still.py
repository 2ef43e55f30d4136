"""Whether all is as the last full list has it, told without another list: by short watches.

A watch from a list's version begins with all that has happened since
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes). One that has
nothing to say in a second tells that nothing has. What this costs does not grow with the fleet. A bookmark
would be a word, but the API server gives none of a kind of which it has seen no event since it was started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.schedulers import Snapshot

_WATCH_S: Final = 1.0
_LEAST_S: Final = 0.5
"""A watch that is ended sooner was not ended because its time was over."""
_MOST_S: Final = 5.0


class Stillness:
    """`read` after a full snapshot, `wrote` after each write of ours; then `holds` may be asked."""

    def __init__(self, client: KubernetesClient, labels: str) -> None:
        self._client = client
        self._labels = labels
        self._of: Snapshot | None = None
        self._versions: dict[str, str] = {}
        self._writes = 0

    def begins(self) -> int:
        """Call before a list is read; what it gives is for `read`."""
        return self._writes

    def read(self, began: int, snapshot: Snapshot | None, versions: Mapping[str, str]) -> None:
        """`versions`: path of each list → its version. `snapshot` None: what was read may look otherwise
        later, with no event."""
        self._of = snapshot if began == self._writes else None
        self._versions = dict(versions)

    def wrote(self) -> None:
        """Its event may come late; a list begun from now on shows it."""
        self._of = None
        self._writes += 1

    async def holds(self, snapshot: Snapshot) -> bool:
        """Never raises: what can't be learnt is a no."""
        if self._of is not snapshot:
            return False
        if not all(await asyncio.gather(*(self._is_quiet(path) for path in self._versions))):
            return False
        try:
            # Watches are told from memory, by an API server that may have lost its store.
            await self._client.version_of(next(iter(self._versions)))
        except WatchdogError:
            return False
        return self._of is snapshot

    async def _is_quiet(self, path: str) -> bool:
        """Whether nothing has happened there since the list."""
        began = time.monotonic()
        watch = self._client.watch(
            path, self._versions[path], labels=self._labels, metadata=True, length_s=_WATCH_S
        )
        try:
            async with asyncio.timeout(_MOST_S), aclosing(watch) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.kind != "BOOKMARK":
                        return False
        except (WatchdogError, TimeoutError):  # forgotten, or a broken line: a list will tell
            return False
        return time.monotonic() - began > _LEAST_S

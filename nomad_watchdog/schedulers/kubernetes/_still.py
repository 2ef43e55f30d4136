"""Whether all is as the last full list has it, told without another list: by short watches.

A watch from a list's version begins with all that has happened since
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes). It is told from
the API server's memory; that this is as new as the store is what a list of one object asks for before. A watch
that then has nothing to say in a second tells that nothing has happened. What this costs does not grow with the
fleet. A bookmark would be a word, but none is given of a kind that had no event since the API server's start.
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
_LEAST_S: Final = 0.95
"""A watch that is ended sooner was not ended because its time was over."""
_FRESH_S: Final = 2.0
"""After three seconds the API server asks its store instead of its memory, and nothing is known of that."""
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
        quiet = await asyncio.gather(*(self._is_quiet(path) for path in self._versions))
        return all(quiet) and self._of is snapshot

    async def _is_quiet(self, path: str) -> bool:
        """Whether nothing has happened there since the list."""
        since = self._versions[path]
        watch = self._client.watch(
            path, since, labels=self._labels, metadata=True, length_s=_WATCH_S
        )
        try:
            async with asyncio.timeout(_FRESH_S):
                version = await self._client.version_of(path)
            if int(version) < int(since):
                return False  # an older store was put back: its watches are silent
            began = time.monotonic()
            async with asyncio.timeout(_MOST_S), aclosing(watch) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.kind != "BOOKMARK":
                        return False
        except (
            WatchdogError,
            TimeoutError,
            ValueError,
        ):  # forgotten, or a broken line: a list will tell
            return False
        return time.monotonic() - began > _LEAST_S

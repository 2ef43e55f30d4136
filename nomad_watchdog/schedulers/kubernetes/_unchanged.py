"""Whether all is as the last full list has it, told without another list: by short watches.

A watch from a list's version begins with all that has happened since
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes). It is told from
the API server's memory; that this is as new as the store is what a list of one object asks for before. A watch
that then has nothing to say in a second tells that nothing has happened. What this costs does not grow with the
fleet. A bookmark would be a word, but none is given of a kind that had no event since the API server's start.

Of several API servers behind one address another than the list's may answer the watch, and be behind. So own
writes count by themselves (S8); what else it could hide comes with its event, or at the next list.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.schedulers import Snapshot

_WATCH_S: Final = 1.0
_MIN_S: Final = 0.95
"""A watch that is ended sooner was not ended because its time was over."""
_FRESH_S: Final = 2.0
"""After three seconds the API server asks its store instead of its memory, and nothing is known of that."""
_MAX_S: Final = 5.0


class Stillness:
    """`read` after a full snapshot, `writing` around each write of ours; then `holds` may be asked."""

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

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write, whose event may come late, and one that fails may have arrived: only a list that is
        begun after it shows it."""
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Nothing is still before another list was begun."""
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
        try:
            async with asyncio.timeout(_FRESH_S):
                version = await self._client.version_of(path)
            # Less is an older store that was put back, whose watches are silent.
            return int(version) >= int(since) and await self._is_silent(path, since)
        except (WatchdogError, TimeoutError, ValueError):
            return False  # forgotten, or a broken line: a list will tell

    async def _is_silent(self, path: str, since: str) -> bool:
        """Whether a watch had its time and nothing to say. Raises TimeoutError and as `KubernetesClient.watch`."""
        began = time.monotonic()
        watch = self._client.watch(
            path, since, labels=self._labels, metadata=True, length_s=_WATCH_S
        )
        async with asyncio.timeout(_MAX_S), aclosing(watch) as events:  # type: ignore[type-var]
            async for event in events:
                if event.kind != "BOOKMARK":
                    return False
        return time.monotonic() - began > _MIN_S

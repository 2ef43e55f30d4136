"""Detects by short watches, without another list, that nothing has changed since the last full list.

A watch from a list's version begins with everything that has happened since
(https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes). The API server serves
it from its cache. A list of one object is read first, because it makes the API server bring its cache up to date.
If the watch then has no event within a second, nothing has happened. The cost does not grow with the fleet. A
bookmark would be a positive confirmation, but there is none for a kind without events since the API server started.

With several API servers behind one address, the watch may be served by another one, which may be behind. So the
control plane's own writes count as changes by themselves (S8). Other changes that it misses are seen when their
events arrive, or at the next list.
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
"""A watch that ends sooner did not end because of its timeout."""
_FRESH_S: Final = 2.0
"""Timeout of the list of one object. After three seconds the API server reads its store instead of its cache, and
the state of the cache is unknown."""
_MAX_S: Final = 5.0


class ChangeProbe:
    """Call `begin_read` and `end_read` around each full list, and use `writing` around each write."""

    def __init__(self, client: KubernetesClient, labels: str) -> None:
        self._client = client
        self._labels = labels
        self._snapshot: Snapshot | None = None
        self._versions: dict[str, str] = {}
        self._writes = 0

    def begin_read(self) -> int:
        """Call before a list is read. The result is an argument of `end_read`."""
        return self._writes

    def end_read(self, began: int, snapshot: Snapshot | None, versions: Mapping[str, str]) -> None:
        """`versions`: path of each list → its version. `snapshot`: None if the placements may change later without
        an event."""
        self._snapshot = snapshot if began == self._writes else None
        self._versions = dict(versions)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around a write: its event may arrive late, and a write that failed may have taken effect. Only a list that
        begins after it is certain to include it."""
        try:
            yield
        finally:
            self.forget()

    def forget(self) -> None:
        """Report a change until another list has been read."""
        self._snapshot = None
        self._writes += 1

    async def unchanged_since(self, snapshot: Snapshot) -> bool:
        """Whether nothing has changed since this snapshot. False when in doubt; never raises."""
        if self._snapshot is not snapshot:
            return False
        quiet = await asyncio.gather(*(self._is_quiet(path) for path in self._versions))
        return all(quiet) and self._snapshot is snapshot

    async def _is_quiet(self, path: str) -> bool:
        """Whether nothing below this path has changed since the list."""
        since = self._versions[path]
        try:
            async with asyncio.timeout(_FRESH_S):
                version = await self._client.version_of(path)
            # A lower version means that an older store was restored, whose watches have no events.
            return int(version) >= int(since) and await self._is_silent(path, since)
        except (WatchdogError, TimeoutError, ValueError):
            return False  # the version has expired, or the connection failed

    async def _is_silent(self, path: str, since: str) -> bool:
        """Whether a watch ended by its timeout without an event. Raises TimeoutError and as `KubernetesClient.watch`."""
        began = time.monotonic()
        watch = self._client.watch(
            path, since, labels=self._labels, metadata=True, length_s=_WATCH_S
        )
        async with asyncio.timeout(_MAX_S), aclosing(watch) as events:  # type: ignore[type-var]
            async for event in events:
                if event.kind != "BOOKMARK":
                    return False
        return time.monotonic() - began > _MIN_S

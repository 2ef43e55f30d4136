"""Watches of all namespaces, merged into hints. A slow reader does not block the watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from nomad_watchdog.clients.kubernetes import KubernetesClient, WatchEvent
from nomad_watchdog.clients.kubernetes_objects import ObjectMeta
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.ids import Slug, is_slug
from nomad_watchdog.schedulers import Hint
from nomad_watchdog.schedulers.kubernetes import _pods, names
from nomad_watchdog.schedulers.kubernetes._nodes import Cordons

log = logging.getLogger(__name__)

_RECONNECT_MAX_S: Final = 30.0
_SHORTEST_S: Final = 5.0
"""Minimum duration of a watch. The server ends one after minutes; after a shorter one there is a back-off."""
_KINDS: Final[tuple[names.Kind, ...]] = ("pod", "deployment", "statefulset")


class PendingHints:
    """Hints that have not been read yet. Their number is limited by the number of devices."""

    def __init__(self) -> None:
        self._urgent: set[Slug] = set()
        self._calm: set[Slug] = set()
        self._resync = False
        self._index = 0
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()

    def resync(self) -> None:
        self._resync = True
        self._changed.set()

    def add(self, slug: Slug, index: int, *, calm: bool) -> None:
        (self._calm if calm else self._urgent).add(slug)
        self._index = max(self._index, index)
        self._changed.set()

    def fail(self, error: BaseException) -> None:
        """Make `pop` raise this error from now on."""
        self._failure = error
        self._changed.set()

    async def pop(self) -> list[Hint]:
        """Wait until there are hints, and remove all of them, merged. Raises the error of `fail`."""
        await self._changed.wait()
        if self._failure is not None:
            raise self._failure
        self._changed.clear()
        index, calm = self._index, self._calm - self._urgent
        hints = [Hint(None, index)] if self._resync else []
        hints += [Hint(frozenset(self._urgent), index)] if self._urgent else []
        hints += [Hint(frozenset(calm), index, calm=True)] if calm else []
        self._resync, self._urgent, self._calm = False, set(), set()
        return hints


async def hints(
    client: KubernetesClient, namespaces: Callable[[], list[str]], labels: str, cordons: Cordons
) -> AsyncIterator[Hint]:
    """As `Scheduler.watch`. All watches begin before the first hint is returned, so that no change is missed between
    them. An unexpected error of a watch is raised here, because a watch that has ended must not go unnoticed."""
    pending = PendingHints()
    pending.resync()
    started = [asyncio.Event() for _ in namespaces() for _ in _KINDS]
    pairs = [(space, kind) for space in namespaces() for kind in _KINDS]
    tasks = [
        asyncio.ensure_future(
            _WatchLoop(client, names.collection(space, kind), kind, labels, pending, event).run()
        )
        for (space, kind), event in zip(pairs, started, strict=True)
    ]
    tasks.append(asyncio.ensure_future(cordons.follow(pending.resync)))

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            pending.fail(error)
            for event in started:  # wake the task that waits for them
                event.set()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECONNECT_MAX_S):
                await asyncio.gather(*(event.wait() for event in started))
        while True:
            for hint in await pending.pop():
                yield hint
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True)
class _WatchLoop:
    """Watches one kind of objects in one namespace. `started` is set when the first watch begins."""

    client: KubernetesClient
    path: str
    kind: names.Kind
    labels: str
    pending: PendingHints
    started: asyncio.Event
    _failures: int = 0
    _first: bool = True

    async def run(self) -> None:
        """Until cancelled; reconnects with jittered back-off."""
        while True:
            try:
                await self._watch_from_now()
            except (WatchdogError, ValueError) as error:
                log.warning("watch lost", extra={"reason": str(error), "of": self.path})
                if not isinstance(error, TransientError):
                    self._failures += 2  # denied: a longer pause
            self._first = False
            self._failures += 1
            ceiling = min(_RECONNECT_MAX_S, 0.5 * 2 ** min(self._failures, 10))
            await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311  # jitter

    async def _watch_from_now(self) -> NoReturn:
        """Watch again and again from the version of the last event. Raises when a watch fails."""
        version = await self.client.version_of(self.path)
        if not self._first:
            self.pending.resync()  # events may have been missed since the last watch
        self.started.set()
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            events = self.client.watch(
                self.path, version, labels=self.labels, metadata=self.kind != "pod"
            )
            async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
                async for event in stream:
                    self._failures = 0
                    version = event.version or version
                    _add(event, self.kind, self.pending)
            if loop.time() - began < _SHORTEST_S:
                raise TransientError(f"the watch of {self.path} ended as soon as it began")


def _add(event: WatchEvent, kind: names.Kind, pending: PendingHints) -> None:
    if event.kind == "BOOKMARK":
        return
    meta: ObjectMeta = event.object.get("metadata") or {}
    slug = (meta.get("labels") or {}).get(names.SLUG, "")
    if not is_slug(slug):
        return
    index = int(event.version or 0)
    if kind == "pod":
        pending.add(Slug(slug), index, calm=_pods.confirms_pod(event.kind, event.object))
    elif event.kind == "DELETED":
        pending.add(Slug(slug), index, calm=False)
    elif event.kind == "ADDED":
        pending.add(Slug(slug), index, calm=True)

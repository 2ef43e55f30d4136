"""Watches of all our namespaces, merged into hints that wait for no slow reader."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient, WatchEvent
from nomad_watchdog.errors import TransientError, WatchdogError
from nomad_watchdog.ids import Slug, is_slug
from nomad_watchdog.schedulers import Hint
from nomad_watchdog.schedulers.kubernetes import _view as view
from nomad_watchdog.schedulers.kubernetes import names
from nomad_watchdog.schedulers.kubernetes._nodes import Cordons

log = logging.getLogger(__name__)

_RECONNECT_MAX_S: Final = 30.0
_SHORTEST_S: Final = 5.0
"""The server ends a watch after minutes; one that ends sooner is not begun again at once."""
_KINDS: Final[tuple[names.Kind, ...]] = ("pod", "deployment", "statefulset")


class Pending:
    """What is to be said and has not been read yet; bounded by the number of devices."""

    def __init__(self) -> None:
        self._urgent: set[Slug] = set()
        self._calm: set[Slug] = set()
        self._resync = False
        self._index = 0
        self._failure: BaseException | None = None
        self._news = asyncio.Event()

    def resync(self) -> None:
        self._resync = True
        self._news.set()

    def say(self, slug: Slug, index: int, *, calm: bool) -> None:
        (self._calm if calm else self._urgent).add(slug)
        self._index = max(self._index, index)
        self._news.set()

    def fail(self, error: BaseException) -> None:
        """From now on `take` raises this."""
        self._failure = error
        self._news.set()

    async def take(self) -> list[Hint]:
        """All that is pending, as few hints; waits until there is something. Raises what `fail` was given."""
        await self._news.wait()
        if self._failure is not None:
            raise self._failure
        self._news.clear()
        index, calm = self._index, self._calm - self._urgent
        hints = [Hint(None, index)] if self._resync else []
        hints += [Hint(frozenset(self._urgent), index)] if self._urgent else []
        hints += [Hint(frozenset(calm), index, calm=True)] if calm else []
        self._resync, self._urgent, self._calm = False, set(), set()
        return hints


async def hints(
    client: KubernetesClient, namespaces: Callable[[], list[str]], labels: str, cordons: Cordons
) -> AsyncIterator[Hint]:
    """As `Scheduler.watch`. The watches begin before the first hint is given, so that nothing falls
    between it and them. What ends a watch and is no error of ours comes out here: a watch that is gone
    for good must not be silent."""
    pending = Pending()
    pending.resync()
    started = [asyncio.Event() for _ in namespaces() for _ in _KINDS]
    pairs = [(space, kind) for space in namespaces() for kind in _KINDS]
    tasks = [
        asyncio.ensure_future(_follow_watch(client, space, kind, labels, pending, event))
        for (space, kind), event in zip(pairs, started, strict=True)
    ]
    tasks.append(asyncio.ensure_future(cordons.follow(pending.resync)))

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            pending.fail(error)
            for event in started:  # who waits for them must see it
                event.set()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_RECONNECT_MAX_S):
                await asyncio.gather(*(event.wait() for event in started))
        while True:
            for hint in await pending.take():
                yield hint
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _follow_watch(  # one task's own things
    client: KubernetesClient,
    namespace: str,
    kind: names.Kind,
    labels: str,
    pending: Pending,
    started: asyncio.Event,
) -> None:
    path = names.collection(namespace, kind)
    loop = asyncio.get_running_loop()
    failures = 0
    first = True
    while True:
        try:
            # one object is enough to learn the version that a watch can begin at
            version = await client.version_of(path)
            if not first:
                pending.resync()  # news may have been missed
            started.set()
            while True:
                began = loop.time()
                events = client.watch(path, version, labels=labels, metadata=kind != "pod")
                async with contextlib.aclosing(events) as stream:  # type: ignore[type-var]
                    async for event in stream:
                        failures = 0
                        version = event.version or version
                        _say(event, kind, pending)
                if loop.time() - began < _SHORTEST_S:
                    raise TransientError(f"a watch of {path} is ended as soon as it begins")
        except (WatchdogError, ValueError) as error:
            log.warning("watch lost", extra={"reason": str(error), "of": path})
            if not isinstance(error, TransientError):
                failures += 2  # refused: no hurry
        first = False
        failures += 1
        ceiling = min(_RECONNECT_MAX_S, 0.5 * 2 ** min(failures, 10))
        await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311  # jitter


def _say(event: WatchEvent, kind: names.Kind, pending: Pending) -> None:
    if event.kind == "BOOKMARK":
        return
    slug = (event.object.get("metadata", {}).get("labels") or {}).get(names.SLUG, "")
    if not is_slug(slug):
        return
    index = int(event.version or 0)
    if kind == "pod":
        pending.say(Slug(slug), index, calm=view.is_calm(event.kind, event.object))
    elif event.kind == "DELETED":
        pending.say(Slug(slug), index, calm=False)
    elif event.kind == "ADDED":
        pending.say(Slug(slug), index, calm=True)

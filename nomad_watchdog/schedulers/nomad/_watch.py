"""Nomad's event stream as hints."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Iterator
from contextlib import aclosing
from typing import Final

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import Frame, StreamEvent
from nomad_watchdog.errors import TerminalError, TransientError, UserError
from nomad_watchdog.ids import Slug
from nomad_watchdog.schedulers import Hint
from nomad_watchdog.schedulers.nomad._names import JobNames
from nomad_watchdog.schedulers.nomad._view import confirms_allocation, confirms_evaluation
from nomad_watchdog.schedulers.nomad.nodes import NodeList

log = logging.getLogger(__name__)

_RECONNECT_MAX_S: Final = 30.0


class _Watch:
    """The event stream, over many connections."""

    def __init__(self, client: NomadClient, names: JobNames, nodes: NodeList) -> None:
        self._client = client
        self._names = names
        self._nodes = nodes
        self._failures = 0

    async def hints(self) -> AsyncIterator[Hint]:
        while True:
            try:
                async with aclosing(self._connection()) as found:
                    async for hint in found:
                        yield hint
            except (TransientError, TerminalError, UserError, ValueError) as error:
                log.warning("event stream lost", extra={"reason": str(error)})
            self._failures += 1
            ceiling = min(_RECONNECT_MAX_S, 0.5 * 2 ** min(self._failures, 10))
            await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311  # jitter

    async def _connection(self) -> AsyncGenerator[Hint, None]:
        """Hints of one connection, the first a resync. Raises as `NomadClient.events`."""
        start = (await self._client.get("/v1/jobs", "list-jobs", {"per_page": "1"})).index
        # A snapshot that is begun now includes everything up to `start`; the stream has what comes later.
        yield Hint(None, start)
        # Each change of a job creates an evaluation. The topic Job would only repeat it, with the whole job.
        topics = [("topic", "Allocation"), ("topic", "Evaluation")]
        if await self._nodes.visible():
            topics.append(("topic", "Node"))
        first = True
        stream = self._client.events([*topics, ("index", str(start))])
        async with aclosing(stream) as arrivals:  # type: ignore[type-var]
            async for frames in arrivals:
                self._failures = 0
                indexes = [index for frame in frames if (index := int(frame.get("Index") or 0))]
                if first and indexes and indexes[0] > start + 1:
                    yield Hint(None, indexes[0])  # the server's buffer may begin after `start`
                first = first and not indexes
                for hint in self._hints_of(frames, indexes[-1] if indexes else 0):
                    yield hint

    def _hints_of(self, frames: Collection[Frame], index: int) -> Iterator[Hint]:
        if any(map(self._nodes.is_news, _events(frames))):
            yield Hint(None, index)  # only a full snapshot shows which agents are concerned
        for slugs, calm in _slugs_of(frames, self._names):
            yield Hint(slugs, index, calm=calm)


def hints(client: NomadClient, names: JobNames, nodes: NodeList) -> AsyncIterator[Hint]:
    """As `Scheduler.watch`."""
    return _Watch(client, names, nodes).hints()


def _slugs_of(frames: Iterable[Frame], names: JobNames) -> list[tuple[frozenset[Slug], bool]]:
    """Devices that the frames are about, and whether the events only confirm what was requested."""
    found: dict[bool, set[Slug]] = {True: set(), False: set()}
    for event in _events(frames):
        payload = event.get("Payload") or {}
        if (alloc := payload.get("Allocation")) and (slug := names.slug_in(alloc.get("JobID", ""))):
            found[confirms_allocation(alloc)].add(slug)
        if (one := payload.get("Evaluation")) and (slug := names.slug_in(one.get("JobID", ""))):
            found[confirms_evaluation(one)].add(slug)
    return [(frozenset(slugs), calm) for calm, slugs in found.items() if slugs]


def _events(frames: Iterable[Frame]) -> Iterator[StreamEvent]:
    return (event for frame in frames for event in frame.get("Events") or ())

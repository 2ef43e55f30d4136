"""Nomad's event stream as hints."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
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


async def hints(client: NomadClient, names: JobNames, nodes: NodeList) -> AsyncIterator[Hint]:
    """As `Scheduler.watch`."""
    failures = 0
    while True:
        try:
            async with aclosing(_connection(client, names, nodes)) as arrivals:
                async for hint in arrivals:
                    if hint is None:
                        failures = 0
                    else:
                        yield hint
        except (TransientError, TerminalError, UserError, ValueError) as error:
            log.warning("event stream lost", extra={"reason": str(error)})
        failures += 1
        ceiling = min(_RECONNECT_MAX_S, 0.5 * 2 ** min(failures, 10))
        await asyncio.sleep(random.uniform(0.05, ceiling))  # noqa: S311  # jitter


async def _connection(
    client: NomadClient, names: JobNames, nodes: NodeList
) -> AsyncGenerator[Hint | None, None]:
    """Hints of one connection, the first a resync; None when frames arrived. Raises what the client raises."""
    start = (await client.get("/v1/jobs", "list-jobs", {"per_page": "1"})).index
    # A snapshot that is begun now includes everything up to `start`; the stream has what comes later.
    yield Hint(None, start)
    # Each change of a job creates an evaluation. The topic Job would only repeat it, with the whole job.
    topics = [("topic", "Allocation"), ("topic", "Evaluation")]
    if await nodes.visible():
        topics.append(("topic", "Node"))
    first = True
    async with aclosing(
        client.events([*topics, ("index", str(start))])  # type: ignore[type-var]
    ) as arrivals:
        async for frames in arrivals:
            yield None
            index = 0
            for frame in frames:
                index = int(frame.get("Index") or index)
                if first and index > start + 1:
                    yield Hint(None, index)  # the server's buffer may begin after `start`
                first = first and not index
            if any(map(nodes.is_news, _events(frames))):
                yield Hint(None, index)  # only a full snapshot shows which agents are concerned
            for slugs, calm in _slugs_of(frames, names):
                yield Hint(slugs, index, calm=calm)


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

"""The rows of the fault matrix, and how one is played: set the stage, do the fault, audit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e import audit
from tests.faults.site import BrokenRowError, Site, open_cluster, open_site
from tests.faults.world import CONVERGED_S, World, open_world

Play = Callable[[World], Awaitable[None]]
AT_ONCE = 3
"""Rows under way at a time: most of a row is waiting, for Consul's checks above all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. `play` sets it up, does it and ends it; the audit that follows is the same for all."""

    name: str
    fault: str
    stake: str
    """Promises that the fault endangers."""
    play: Play
    quick: bool
    """Belongs to `make test`."""
    deadline_s: float
    cluster: bool
    """Is played on many hosts."""
    alone: bool
    """Harms servers that other rows would need meanwhile."""
    settings: Mapping[str, Any]


@dataclass(slots=True)
class Result:
    """What came of a row."""

    row: Row
    wrong: list[str] = field(default_factory=list)
    audited: list[str] = field(default_factory=list)
    converged_s: float | None = None
    took_s: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        return not self.wrong


ROWS: dict[str, Row] = {}


def row(
    name: str,
    fault: str,
    *,
    stake: str,
    quick: bool = True,
    deadline_s: float = 240.0,
    cluster: bool = False,
    alone: bool = False,
    **settings: Any,
) -> Callable[[Play], Play]:
    """Put a function into the matrix. `settings` go to the World."""

    def add(play: Play) -> Play:
        assert name not in ROWS, name
        ROWS[name] = Row(
            name, fault, stake, play, quick, deadline_s, cluster, alone or cluster, settings
        )
        return play

    return add


async def play_all(
    rows: Sequence[Row], root: Path, told: Callable[[Result], None] = lambda _result: None
) -> list[Result]:
    """Play rows, a few at a time where they leave the servers alone; results in the order of the rows."""
    results: dict[str, Result] = {}
    room = asyncio.Semaphore(AT_ONCE)

    async def one_row(one: Row, site: Site) -> None:
        async with room:
            result = results[one.name] = await play(one, site, root / "rows")
        told(result)

    for cluster, opened in ((False, open_site), (True, open_cluster)):
        chosen = [one for one in rows if one.cluster is cluster]
        if not chosen:
            continue
        async with opened(root / ("many" if cluster else "one")) as site:
            async with asyncio.TaskGroup() as group:
                for one in chosen:
                    if not one.alone:
                        group.create_task(one_row(one, site))
            for one in chosen:
                if one.alone:
                    await one_row(one, site)
    return [results[one.name] for one in rows]


async def play(one: Row, site: Site, root: Path) -> Result:
    """Play a row to its end, whatever happens in it."""
    result = Result(one)
    began = time.monotonic()
    limit = asyncio.timeout(one.deadline_s)
    try:
        async with (
            limit,
            open_world(one.name, root / one.name, site, one.settings, alone=one.alone) as world,
        ):
            await _play(world, result)
    except Exception as error:  # noqa: BLE001  # a row that breaks is a result; the next one is played all the same
        late = f"the row did not end within {one.deadline_s:.0f} s"
        result.wrong += [late] if limit.expired() else list(_words(error))
    result.took_s = time.monotonic() - began
    return result


def _words(error: BaseException) -> Iterator[str]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _words(inner)
    elif isinstance(error, BrokenRowError):
        yield str(error)
    else:
        yield f"the row failed: {type(error).__name__}: {error}"


async def _play(world: World, result: Result) -> None:
    watching = asyncio.ensure_future(world.witness())

    async def finish() -> None:
        if result.converged_s is None:
            await _converge(world, result)

    world.finish = finish
    try:
        await result.row.play(world)
        await finish()
    except Exception:
        result.wrong += list(dict.fromkeys(world.broken))
        raise
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        result.notes += world.notes


async def _converge(world: World, result: Result) -> None:
    """L1: within the published time the audit finds nothing, and a while later it still does not."""
    began = time.monotonic()
    while True:
        found = await _examine(world)
        took_s = time.monotonic() - began
        if not found.wrong or took_s > CONVERGED_S:
            break
        await asyncio.sleep(0.5)
    result.converged_s = took_s
    if not found.wrong:
        before = world.pids()
        await asyncio.sleep(3.0)
        found = await _examine(world)
        world_moved = before != world.pids()
        found.expect(not world_moved, "L1", "agents came or went when all was still")
    result.audited = sorted(found.asked, key=lambda name: (name[0] != "S", int(name[1:])))
    result.wrong += found.wrong


async def _examine(world: World) -> audit.Findings:
    try:
        return await world.examine()
    except Exception as error:  # noqa: BLE001  # a store that does not answer yet is a finding like another
        found = audit.Findings()
        found.expect(False, "L1", f"the audit itself failed: {type(error).__name__}: {error}"[:300])
        return found

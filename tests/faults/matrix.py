"""The rows of the fault matrix, and how a row runs: set up, inject the fault, audit."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nomad_watchdog.errors import WatchdogError
from tests.e2e import audit
from tests.faults.site import BrokenRowError, Site, open_cluster, open_site
from tests.faults.world import CONVERGED_S, World, open_world

Play = Callable[[World], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Lane:
    """Rows that run on the same site. All sites are up at the same time: a row mostly waits, above all for Consul's
    checks."""

    opened: Callable[[Path], AbstractAsyncContextManager[Site]]
    at_once: int = 1
    """Maximum number of rows that run on a site at once. A row that runs alone may stop its servers; they run again
    after it."""
    sites: int = 1
    """Number of sites that share the rows of the lane."""


LANES: Final[Mapping[str, Lane]] = {
    "shared": Lane(open_site, at_once=6),
    "mass": Lane(open_site),
    "alone": Lane(open_site),
    "cluster": Lane(open_cluster, sites=2),
}
"""The lane that takes longest is first. `mass`: keeps a CPU core busy. `cluster`: many hosts."""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. `play` sets it up, injects it and ends it; the audit that follows is the same for all rows."""

    name: str
    fault: str
    stake: str
    """Promises that the fault puts at risk."""
    play: Play
    lane: str
    deadline_s: float
    settings: Mapping[str, Any]


@dataclass(slots=True)
class Result:
    """Result of a row."""

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
    lane: str = "shared",
    deadline_s: float = 240.0,
    **settings: Any,
) -> Callable[[Play], Play]:
    """Add a function to the matrix. `settings` are passed to the World."""

    def add(play: Play) -> Play:
        assert name not in ROWS, name
        ROWS[name] = Row(name, fault, stake, play, lane, deadline_s, settings)
        return play

    return add


def sites_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by site. Each site of a lane gets about the same number."""
    found: dict[str, list[Row]] = defaultdict(list)
    for lane, about in LANES.items():
        for number, one in enumerate(one for one in rows if one.lane == lane):
            found[f"{lane}-{number % about.sites + 1}"].append(one)
    return found


async def play_all(
    sites: Mapping[str, Sequence[Row]],
    root: Path,
    told: Callable[[Result], None] = lambda _result: None,
) -> list[Result]:
    """Run the rows of each site (see `sites_of`) on all sites at the same time."""
    results: dict[str, Result] = {}

    async def on_site(name: str, some: Sequence[Row]) -> None:
        lane = LANES[some[0].lane]
        room = asyncio.Semaphore(lane.at_once)

        async def one_row(one: Row, site: Site) -> None:
            async with room:
                result = results[one.name] = await play(one, site, root / "rows")
            told(result)

        try:
            async with lane.opened(root / name) as site, asyncio.TaskGroup() as group:
                for one in some:
                    group.create_task(one_row(one, site))
        except WatchdogError as error:  # rows on other sites still run
            for one in some:
                if one.name not in results:
                    result = results[one.name] = Result(one, [f"site {name} failed: {error}"])
                    told(result)

    async with asyncio.TaskGroup() as group:
        for name, some in sites.items():
            group.create_task(on_site(name, some))
    return [results[one.name] for some in sites.values() for one in some]


async def play(one: Row, site: Site, root: Path) -> Result:
    """Run a row to its end, whatever happens in it."""
    result = Result(one)
    began = time.monotonic()
    limit = asyncio.timeout(one.deadline_s)
    try:
        async with (
            limit,
            open_world(
                one.name, root / one.name, site, one.settings, alone=LANES[one.lane].at_once == 1
            ) as world,
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
    """L1: within the published time the audit finds nothing, and a while later it still finds nothing."""
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

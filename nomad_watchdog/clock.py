"""The only place where a clock is read. The core takes `now` as a value. Long work is cut into steps here,
so that the loop does not stand still."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol, TypeVar

from nomad_watchdog.model import Monotonic, WallTime

_T = TypeVar("_T")
STEP: Final = 100
"""Items of a bulk request, or records, that are handled in one step of the loop: some milliseconds."""


async def steps(items: Sequence[_T]) -> AsyncIterator[Sequence[_T]]:
    """The items, STEP at a time; in between the loop does what else there is to do."""
    for first in range(0, len(items), STEP):
        if first:
            await asyncio.sleep(0)
        yield items[first : first + STEP]


class Clock(Protocol):
    """What the edges need of time; tests give their own."""

    def monotonic(self) -> Monotonic: ...

    def wall(self) -> WallTime: ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> Monotonic:
        return Monotonic(time.monotonic())

    def wall(self) -> WallTime:
        return WallTime(time.time())  # noqa: TID251  # the one place where it is read

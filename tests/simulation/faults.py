"""Faults between clients and servers, drawn from a seed; none once it is calm."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from nomad_watchdog.errors import StaleError, TransientError
from tests.simulation.fakes import Line

T = TypeVar("T")

TIMEOUT_S: Final = 10.0
"""How long a client waits for an answer."""
SLOWEST_S: Final = 14.0
"""Maximum time after sending at which a request may reach the server, even after its sender gave up
or died."""
_LISTS: Final = frozenset({"registry.read", "registry.watch"})


@dataclass(slots=True)
class Weather:
    """Probability of each fault per call, and the random source."""

    chance: random.Random
    refused: float = 0.0
    """The request does not arrive."""
    lost: float = 0.0
    """The request takes effect, but its answer does not arrive."""
    slow: float = 0.0
    """The request arrives late, perhaps after the client gave up."""
    twice: float = 0.0
    """The request arrives a second time, up to SLOWEST_S later."""
    crash: float = 0.0
    """The client dies: before the request, while it is in transit, or before its answer."""
    partial: float = 0.0
    """A listing reports that it is incomplete."""
    short: float = 0.0
    """A listing of the registry omits records and does not report it."""
    gap: float = 0.0
    """An event is lost unnoticed; a third of the time the connection breaks, which is noticed."""
    silent: float = 0.0
    """A watch sends nothing for up to a minute."""

    @classmethod
    def of(cls, chance: random.Random) -> Weather:
        """Each kind of fault is absent, rare or common: a seed with all of them at once would hide
        the others."""

        def some(*levels: float) -> float:
            return chance.choice((0.0, 0.0, *levels))

        return cls(
            chance,
            refused=some(0.02, 0.2),
            lost=some(0.02, 0.2),
            slow=some(0.01, 0.1),
            twice=some(0.02, 0.2),
            crash=some(0.002, 0.01),
            partial=some(0.02, 0.2),
            short=some(0.02),
            gap=some(0.1, 0.5),
            silent=some(0.02),
        )

    def calm(self) -> None:
        """No faults from now on."""
        self.refused = self.lost = self.slow = self.twice = self.crash = 0.0
        self.partial = self.short = self.gap = self.silent = 0.0

    def hits(self, odds: float) -> bool:
        """Whether a fault of this probability happens now."""
        return odds > 0 and self.chance.random() < odds

    def latency(self) -> float:
        """Seconds one way."""
        if self.hits(self.slow):
            return self.chance.uniform(0.5, SLOWEST_S)
        return self.chance.expovariate(1 / 0.004)


class BadLine(Line):
    """A line with these faults. `crash` kills the calling process; a dead one has no further
    effect."""

    def __init__(self, weather: Weather, crash: Callable[[], None]) -> None:
        self._weather = weather
        self._crash = crash
        self.dead = False

    async def call(self, what: str, effect: Callable[[], T]) -> T:
        if self.dead:
            raise asyncio.CancelledError
        weather = self._weather
        if weather.hits(weather.crash):
            await self._die()
        if weather.hits(weather.refused):
            await asyncio.sleep(weather.latency())
            raise TransientError(f"{what}: connection refused")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        loop.call_later(weather.latency(), self._arrive, effect, answer)
        if weather.hits(weather.twice):
            again: asyncio.Future[T] = loop.create_future()
            again.add_done_callback(lambda done: done.exception())
            loop.call_later(weather.chance.uniform(0.0, SLOWEST_S), self._arrive, effect, again)
        if weather.hits(weather.crash):
            await self._die()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                result = await answer
                await asyncio.sleep(weather.latency())
        except TimeoutError:
            raise TransientError(f"{what}: no answer within {TIMEOUT_S} s") from None
        if weather.hits(weather.crash):
            await self._die()
        if weather.hits(weather.lost):
            raise TransientError(f"{what}: connection lost")
        return self._trimmed(what, result)

    async def hint(self, what: str) -> bool:
        if self.dead:
            raise asyncio.CancelledError
        weather = self._weather
        await asyncio.sleep(weather.latency())
        if weather.hits(weather.silent):
            await asyncio.sleep(weather.chance.uniform(5.0, 60.0))
        if weather.hits(weather.gap):
            if weather.chance.random() < 1 / 3:
                raise TransientError(f"{what}: connection lost")
            # A registry's watch is complete by contract: late, never lost.
            return what in _LISTS
        return True

    async def _die(self) -> None:
        self._crash()
        await asyncio.get_running_loop().create_future()

    @staticmethod
    def _arrive(effect: Callable[[], T], answer: asyncio.Future[T]) -> None:
        try:
            result = effect()
        except Exception as error:  # noqa: BLE001  # the wire brings back whatever the server said
            if not answer.cancelled():
                answer.set_exception(error)
        else:
            if not answer.cancelled():
                answer.set_result(result)

    def _trimmed(self, what: str, result: T) -> T:
        weather = self._weather
        if what == "scheduler.snapshot" and weather.hits(weather.partial):
            raise StaleError("the listing is not complete")
        if what in _LISTS and weather.hits(weather.short):
            index, rows = cast_listing(result)
            kept = [row for row in rows if weather.chance.random() < 0.5]
            return (index, kept)  # type: ignore[return-value]  # a listing, as `what` says
        return result


def cast_listing(listing: Any) -> tuple[int, list[Any]]:
    """A registry's listing: its index and its rows."""
    index, rows = listing
    return index, rows

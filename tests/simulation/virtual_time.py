"""An event loop without a clock: when nothing is ready, time jumps to the next timer.

No sockets, threads or signals. It is deterministic, provided that the code draws randomness from a
seeded source and does not iterate over anything ordered by address or hash.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable
from typing import Any, Final, NoReturn, TypeVar

from nomad_watchdog.model import Monotonic, WallTime

T = TypeVar("T")
MAX_TURNS: Final = 200_000
"""This many turns without time advancing are a livelock."""


class StuckError(AssertionError):
    """Nothing will ever happen again, or everything happens at the same time for ever."""


class VirtualLoop(asyncio.BaseEventLoop):
    """`time()` starts at 0 and moves only in `select`, by exactly the time to the next timer."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._turns = 0
        self._selector = self

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> tuple[()]:
        """Called by `BaseEventLoop` when it would wait for sockets."""
        if timeout is None:
            raise StuckError(f"at {self._now:.3f} s every task waits for something without a timer")
        if timeout > 0:
            self._now += timeout
            self._turns = 0
        else:
            self._turns += 1
            if self._turns > MAX_TURNS:
                raise StuckError(f"time stands at {self._now:.3f} s: a loop that never sleeps")
        return ()

    def _process_events(self, _events: object) -> None:
        """There are none: nothing is read from outside."""

    def _write_to_self(self) -> None:
        """Nothing to wake: the loop never blocks."""

    def run_in_executor(self, *_args: Any) -> NoReturn:  # type: ignore[override]
        raise StuckError("a thread would make the order of events depend on the machine")

    def call_soon_threadsafe(self, *_args: Any, **_more: Any) -> NoReturn:  # type: ignore[override]
        raise StuckError("another thread has no place on this loop")


class LoopWithThreads(VirtualLoop):
    """What the code hands to a thread is computed at once, and its result comes a little later."""

    def run_in_executor(self, _executor: object, call: Callable[..., T], *args: Any) -> Future[T]:  # type: ignore[override]
        found: Future[T] = self.create_future()
        result = call(*args)

        def end() -> None:
            if not found.cancelled():
                found.set_result(result)

        self.call_later(0.002, end)
        return found


class VirtualClock:
    """The clock of one simulated process. Its wall clock may be set wrong; its monotonic one
    not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wall_offset_s: float = 1.7e9) -> None:
        self._loop = loop
        self.wall_offset_s = wall_offset_s

    def monotonic(self) -> Monotonic:
        return Monotonic(self._loop.time() + 1.0)

    def wall(self) -> WallTime:
        return WallTime(self._loop.time() + self.wall_offset_s)

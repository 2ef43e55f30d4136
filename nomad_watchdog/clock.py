"""The only place where a clock is read. The core takes `now` as a value."""

from __future__ import annotations

import time
from typing import Protocol

from nomad_watchdog.model import Monotonic, WallTime


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

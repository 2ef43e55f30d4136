"""`python -m tests.faults.skewed …`: the program with clocks that a file changes while it runs.

The file in FAULTS_CLOCKS holds two numbers, seconds added to the wall clock and to the monotonic clock.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from nomad_watchdog.cli.main import main
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.model import Monotonic, WallTime


def offsets() -> tuple[float, float]:
    wall, monotonic = Path(os.environ["FAULTS_CLOCKS"]).read_text().split()
    return float(wall), float(monotonic)


def _wall(_self: SystemClock) -> WallTime:
    return WallTime(time.time() + offsets()[0])


def _monotonic(_self: SystemClock) -> Monotonic:
    return Monotonic(time.monotonic() + offsets()[1])


if __name__ == "__main__":
    SystemClock.wall = _wall  # type: ignore[method-assign]
    SystemClock.monotonic = _monotonic  # type: ignore[method-assign]
    main()

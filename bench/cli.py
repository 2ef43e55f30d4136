"""What a user waits for `nomad-watchdog --help`, beside an interpreter that does nothing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from bench.rows import Row

RUNS = 15


def _seconds(*argv: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, capture_output=True)
    return time.perf_counter() - began


def run(*, quick: bool = False) -> list[Row]:
    bare, ours = [], []
    for _ in range(3 if quick else RUNS):
        # in turn, so that both have the same neighbours
        bare.append(_seconds("-c", "pass"))
        ours.append(_seconds("-m", "nomad_watchdog", "--help"))
    mine, theirs = statistics.median(ours), statistics.median(bare)
    note = f"{mine * 1000:.0f} ms against {theirs * 1000:.0f} ms"
    return [Row("`--help` ÷ bare interpreter", mine / theirs, "×", note=note)]

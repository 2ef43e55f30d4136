"""Duration of `nomad-watchdog --help`, compared with an interpreter that does nothing."""

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
        # Alternately, so that both run under the same load.
        bare.append(_seconds("-c", "pass"))
        ours.append(_seconds("-m", "nomad_watchdog", "--help"))
    mine, theirs = statistics.median(ours), statistics.median(bare)
    note = f"{mine * 1000:.0f} ms against {theirs * 1000:.0f} ms"
    return [Row("`--help` ÷ bare interpreter", mine / theirs, "×", note=note)]

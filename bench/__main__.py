"""`python -m bench`: all benchmarks or those named, a table on stdout, the same as JSON in a file."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.rows import Row, machine, save, table

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`run(quick=…)` of module bench.<name> gives the rows."""

    name: str
    what: str
    about_s: int
    quick_s: int


BENCHMARKS = (
    Benchmark("noop", "a pass that has nothing to do", 3, 1),
    Benchmark("agent", "an agent's memory and start", 40, 15),
    Benchmark("nomad_client", "python-nomad and aiohttp, 500 dispatches each", 20, 12),
    Benchmark("dispatch", "cold start of 5,000 devices on Nomad", 150, 20),
    Benchmark("event", "from an event to its dispatch", 40, 15),
    Benchmark("restart", "a restart with 10,000 agents on Nomad", 240, 30),
    Benchmark("naive", "the naive orchestrator beside ours", 120, 25),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a floor is missed or a benchmark broke; 2 for wrong arguments (argparse)."""
    names = [one.name for one in BENCHMARKS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument("--json", type=Path, default=ROOT / "build/bench.json", metavar="PATH")
    parser.add_argument(
        "--quick", action="store_true", help="small numbers: to see that all run, not to compare"
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(names)}")
    chosen = [one for one in BENCHMARKS if not options.names or one.name in options.names]
    rows, broken = _run(chosen, quick=options.quick)
    print(table(rows))
    save(rows, options.json)
    _say(f"saved to {options.json}; {machine()}")
    missed = [row for row in rows if row.missed]
    for row in missed:
        _say(f"floor missed: {row.name}: {row.value:.3g} {row.unit}, floor {row.floor}")
    for name in broken:
        _say(f"broke: {name}")
    return 1 if missed or broken else 0


def _run(chosen: Sequence[Benchmark], *, quick: bool) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    broken: list[str] = []
    for number, one in enumerate(chosen, 1):
        about = one.quick_s if quick else one.about_s
        _say(f"[{number}/{len(chosen)}] {one.name}: {one.what} (about {about} s)")
        began = time.perf_counter()
        try:
            rows += importlib.import_module(f"bench.{one.name}").run(quick=quick)
        except Exception:  # noqa: BLE001  # what the others found is not thrown away for it
            traceback.print_exc()
            broken.append(one.name)
        _say(f"      took {time.perf_counter() - began:.0f} s")
    return rows, broken


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

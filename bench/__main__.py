"""Run all benchmarks, print a table and write JSON. Exits 1 if a floor is missed."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from pathlib import Path

from bench.rows import Row, save, table
from nomad_watchdog.daemon.serve import collect_seldom

BENCHES = {
    "cli": "5 s",
    "noop": "10 s",
    "detection": "10 s",
    "agent": "30 s",
    "weight": "3 min",
    "event": "20 s",
    "dispatch": "3 min",
    "restart": "2 min",
    "intake": "30 s",
    "storm": "2 min",
    "idle": "17 min",
    "flatness": "3 min",
    "failover": "1 min",
    "naive": "2 min",
    "kubernetes": "9 min",
}
RESULTS = Path(__file__).parent / "results" / "bench.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", nargs="*", help=f"of {', '.join(BENCHES)}; all without one")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="small numbers: to try the benchmarks")
    parser.add_argument(
        "--large", action="store_true", help="kubernetes: 10,000 devices in place of 2,000"
    )
    chosen = parser.parse_args()
    if unknown := set(chosen.name) - BENCHES.keys():
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name, usual in BENCHES.items():
        if chosen.name and name not in chosen.name:
            continue
        print(f"{name} (about {usual}) …", file=sys.stderr, flush=True)
        began = time.monotonic()
        run = importlib.import_module(f"bench.{name}").run
        collect_seldom()  # as in `nomad-watchdog run`; the bare counterparts have it too
        sizes = {"quick": chosen.quick, "large": chosen.large}
        rows += run(**{k: v for k, v in sizes.items() if k in inspect.signature(run).parameters})
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))
    save(rows, chosen.json)
    missed = [row.name for row in rows if row.missed]
    for name in missed:
        print(f"floor missed: {name}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

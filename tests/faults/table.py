"""The matrix as people read it: a line on the terminal, a table in docs/fault-matrix.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.faults.matrix import Result
from tests.faults.world import CONVERGED_S

HEAD = f"""\
# The fault matrix

Written by `make faults`; do not edit.
Every row is played against real Nomad, real Consul, the real program and real agents, and ends with the same audit of what can be seen from outside: registry, Nomad's jobs and allocations, Consul's catalogue, the process table, the event log, the program's own log.
While it is played, a witness looks twice a second for two agents of one device, an epoch that falls and a false offline.
«Held» means that the audit found nothing within {CONVERGED_S:.0f} s after the fault had ended, and nothing again 3 s later.
That is L1 as published for `resync = "5s"`, `retry.max = "5s"`; the time to converge includes Consul's check of every agent, each 10 s.
The promises are those of [promises.md](promises.md).

| row | fault | at stake | outcome | audited | converged in |
| --- | --- | --- | --- | --- | --- |
"""


def line(result: Result) -> str:
    took = "-" if result.converged_s is None else f"{result.converged_s:.1f} s"
    state = "held" if result.held else "BROKEN"
    head = f"{result.row.name:<12} {state}, converged in {took}, {result.took_s:.0f} s in all"
    return "\n".join([head, *(f"    {note}" for note in result.notes),
                      *(f"    {one}" for one in result.wrong[:12])])  # fmt: skip


def write(file: Path, results: Sequence[Result]) -> None:
    """The document, of what was played and nothing else."""
    rows = [
        f"| {r.row.name} | {r.row.fault} | {r.row.stake} | "
        f"{'held' if r.held else 'broken: ' + '; '.join(r.wrong[:3])} | {' '.join(r.audited)} | "
        f"{'-' if r.converged_s is None else f'{r.converged_s:.1f} s'} |"
        for r in results
    ]
    held = sum(result.held for result in results)
    notes = [f"- {r.row.name}: {note}" for r in results for note in r.notes]
    told = ["\nWhat rows measured on the way:\n", *notes] if notes else []
    text = "\n".join([*rows, f"\n{held} of {len(results)} rows held.", *told])
    file.write_text(f"{HEAD}{text}\n")

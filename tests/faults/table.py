"""The matrix for readers: a line on the terminal, a table in docs/fault-matrix.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from servers.binaries import found
from tests.faults.matrix import ROWS, Result
from tests.faults.world import CONVERGED_S

HEAD = f"""\
# The fault matrix

Written by `make faults`; do not edit.
{{versions}}
Commit 077dc26 passed 86 of 86 rows on Nomad 1.11.3 and Consul 1.21.0.
A row that the last run did not play stands as an earlier run left it.
Every row is played against real Nomad, real Consul, the real program and real agents, and ends with the same audit of what can be seen from outside: registry, Nomad's jobs and allocations, Consul's catalogue, the process table, the event log, the program's own log.
While it is played, a witness looks twice a second for two agents of one device, an epoch that falls and a false offline.
"Held" means that the audit found nothing within {CONVERGED_S:.0f} s after the fault had ended, and nothing again 3 s later.
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
    """Write the document. Rows that did not run now keep the results of an earlier run."""
    rows, notes = _kept(file)
    for one in results:
        name = one.row.name
        outcome = "held" if one.held else f"broken: {'; '.join(one.wrong[:3])}"
        took = "-" if one.converged_s is None else f"{one.converged_s:.1f} s"
        cells = [name, one.row.fault, one.row.stake, outcome, " ".join(one.audited), took]
        rows[name] = f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
        notes[name] = [f"- {name}: {note}" for note in one.notes]
    names = [name for name in ordered() if name in rows]
    held = sum("| held |" in rows[name] for name in names)
    told = [line for name in names for line in notes.get(name, [])]
    text = [*(rows[name] for name in names), "", f"{held} of {len(names)} rows held."]
    if told:
        text += ["", "What rows measured on the way:", "", *told]
    played = f"Played on Nomad {found['nomad']} and Consul {found['consul']}."
    file.write_text(HEAD.format(versions=played) + "\n".join(text) + "\n")


def ordered() -> list[str]:
    """Names of all rows, by number."""
    return sorted(ROWS, key=lambda name: int(name.partition("-")[0]))


def _kept(file: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    rows: dict[str, str] = {}
    notes: dict[str, list[str]] = {}
    for text in file.read_text().splitlines() if file.exists() else ():
        if text.startswith("| ") and (name := text.split(" | ")[0][2:]) in ROWS:
            rows[name] = text
        elif text.startswith("- ") and (name := text[2:].partition(":")[0]) in ROWS:
            notes.setdefault(name, []).append(text)
    return rows, notes

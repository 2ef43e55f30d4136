"""What a benchmark gives, and how it is shown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `floor` and `aim` are words with their direction."""

    name: str
    value: float
    unit: str
    floor: str = ""
    aim: str = ""
    note: str = ""


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | figure | floor | aim | note |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r.name} | {r.value:.3g} {r.unit} | {r.floor} | {r.aim} | {r.note} |" for r in rows
    ]
    return "\n".join(lines)


def save(rows: list[Row], path: Path) -> None:
    """The rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(r) for r in rows], indent=2, ensure_ascii=False) + "\n")

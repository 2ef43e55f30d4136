"""Results of a benchmark, and their output."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `floor` and `aim` are a direction and a number (`≤ 10`), or empty."""

    name: str
    value: float
    unit: str
    floor: str = ""
    aim: str = ""
    note: str = ""

    @property
    def missed(self) -> bool:
        """Whether the floor is missed. A figure that could not be measured (NaN) misses any floor."""
        return not keeps(self.value, self.floor)


def keeps(value: float, limit: str) -> bool:
    """Whether value meets a limit such as `≤ 10` or `≥ 0.8`; every value meets an empty one."""
    if not limit:
        return True
    sign, _, number = limit.partition(" ")
    if sign not in {"≤", "≥"}:
        raise ValueError(f"limit {limit!r}: ≤ or ≥, a space and a number are allowed")
    return value <= float(number) if sign == "≤" else value >= float(number)


def figure(value: float) -> str:
    """Format with three significant digits, never with an exponent."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of the values do not exceed (nearest rank)."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)]


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | figure | floor | aim | note |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r.name} | {figure(r.value)} {r.unit} | {r.floor} | {r.aim} | {r.note} |" for r in rows
    ]
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """The machine on which the figures were measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def save(rows: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON; a figure that could not be measured is null."""
    shown = [
        {**asdict(r), "value": r.value if math.isfinite(r.value) else None, "missed": r.missed}
        for r in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "rows": shown}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")

"""Settings that were renamed. The old name still works, and is reported as deprecated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nomad_watchdog.config.hcl import HclDocument, Path, Problem

_AGENTS: Final = (
    "startup_grace",
    "startup_grace_min",
    "startup_grace_max",
    "report_stale",
    "suspect_max",
    "repairing_max",
    "start_max",
)
RENAMED: Final[Mapping[tuple[str, str], tuple[str, str]]] = {
    **{("presence", name): ("agents", name) for name in _AGENTS},
    ("breaker", "min"): ("mass_change", "min"),
    ("breaker", "fraction"): ("mass_change", "fraction"),
}
"""Old setting → new setting."""


def use_new_names(document: HclDocument) -> list[str]:
    """Move the settings of a file, with their lines, from their old to their new names. Returns the warnings.

    Adds settings that have both names in the file to `document.problems`."""
    warnings = []
    for old, new in RENAMED.items():
        block = document.data.get(old[0])
        if not isinstance(block, dict) or old[1] not in block:
            continue
        line = document.line_of(old)
        target = document.data.setdefault(new[0], {})
        if not isinstance(target, dict):
            continue  # the new block has a wrong type, which is reported
        value = block.pop(old[1])
        if new[1] in target:
            text = (
                f"given twice; this is the old name of {dotted(new)} (line {document.line_of(new)})"
            )
            document.problems.append(Problem(old, text, line))
            continue
        target[new[1]] = value
        document.lines.update(_moved(document.lines, old, new))
        warnings.append(f"{dotted(old)} (line {line}) is deprecated; use {dotted(new)}")
    for block_name in {old for old, _ in RENAMED}:
        if document.data.get(block_name) == {}:
            del document.data[block_name]
    return warnings


def variable_warning(old: str, new: str) -> str:
    """The warning for an environment variable that sets a renamed setting."""
    return f"environment {old} is deprecated; use {new}"


def dotted(setting: tuple[str, str]) -> str:
    """The name of a setting, as in the documentation."""
    return ".".join(setting)


def _moved(lines: Mapping[Path, int], old: Path, new: Path) -> dict[Path, int]:
    return {
        (*new, *path[len(old) :]): line for path, line in lines.items() if path[: len(old)] == old
    }

"""What the API asks of the rest of the process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker


class Operator(Protocol):
    """Who holds stops back, and takes the word that they are meant (the reconciler)."""

    breaker: MassStopBreaker

    def hold_now(self) -> None:
        """Bring what is held up to what a plan shows now."""

    def confirm_stops(self) -> int:
        """Let what is held now go; how many."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload did. Each entry is a setting with its values before and after."""

    changed: tuple[str, ...] = ()
    """In force now."""
    needs_restart: tuple[str, ...] = ()
    """In the configuration, and in force after a restart of the service."""
    unprepared: Mapping[str, str] = field(default_factory=dict)
    """Agent class → why it can't be prepared: its devices keep their agents and get none."""

    def __str__(self) -> str:
        changed = f"changed: {', '.join(self.changed)}" if self.changed else "nothing changed"
        rest = f"; needs a restart: {', '.join(self.needs_restart)}" if self.needs_restart else ""
        bad = f"; classes that can't be prepared: {', '.join(sorted(self.unprepared))}"
        return changed + rest + (bad if self.unprepared else "")


class Reloads(Protocol):
    """Reads the configuration again."""

    async def reload(self) -> Reloaded:
        """Raises UserError or TerminalError when it is not valid; then nothing has changed."""
        ...

"""The interfaces that the API calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nomad_watchdog.core.mass_stop_breaker import MassStopBreaker


class Operator(Protocol):
    """Puts stops on hold, and releases them when they are approved (the reconciler)."""

    breaker: MassStopBreaker

    def hold_now(self) -> None:
        """Update the held stops to those of a plan made now."""

    def confirm_stops(self) -> int:
        """Approve the stops that are on hold now; their number."""


@dataclass(frozen=True, slots=True)
class Reloaded:
    """The result of a reload. Each entry is a setting with its old and new value."""

    changed: tuple[str, ...] = ()
    """In force now."""
    needs_restart: tuple[str, ...] = ()
    """Changed in the configuration, and in force after a restart of the service."""
    unprepared: Mapping[str, str] = field(default_factory=dict)
    """Agent class → why it can't be prepared. Its running agents continue, and no new ones start."""

    def __str__(self) -> str:
        changed = f"changed: {', '.join(self.changed)}" if self.changed else "nothing changed"
        rest = f"; needs a restart: {', '.join(self.needs_restart)}" if self.needs_restart else ""
        bad = f"; classes that can't be prepared: {', '.join(sorted(self.unprepared))}"
        return changed + rest + (bad if self.unprepared else "")


class ConfigReloader(Protocol):
    """Reloads the configuration."""

    async def reload(self) -> Reloaded:
        """Raises UserError or TerminalError when it is not valid; then nothing has changed."""
        ...

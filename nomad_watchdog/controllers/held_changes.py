"""Reports changes that are put on hold (S7), and their confirmation."""

from __future__ import annotations

import logging

from nomad_watchdog.core.holds import HoldKind
from nomad_watchdog.fleet.fleet import Fleet

log = logging.getLogger(__name__)


def report_hold(fleet: Fleet, kind: HoldKind, reason: str) -> None:
    """Changes of this kind are put on hold now."""
    log.error("%s held", kind.name, extra={"reason": reason})
    fleet.events.note_fleet(f"{kind.event}.held", reason)


def report_confirmation(fleet: Fleet, kind: HoldKind, held_id: str, count: int) -> None:
    """An operator confirmed what this ID names."""
    log.warning("%s confirmed", kind.name, extra={"count": count, "held_id": held_id})
    text = f"an operator confirmed {count} {kind.name}"
    fleet.events.note_fleet(f"{kind.event}.confirmed", text, {"held_id": held_id})

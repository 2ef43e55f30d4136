"""Actions that the planner decides on for one device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import Epoch, Placement


class ActionKind(StrEnum):
    START = "start"
    RETIRE = "retire"
    REPLACE = "replace"


class ActionOutcome(StrEnum):
    """How an action ended."""

    OK = "ok"
    FENCED = "fenced"
    """Dropped: its record or our lease has changed since the decision."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Action:
    """One step for one device, and why."""

    kind: ActionKind
    slug: Slug
    device_id: DeviceId
    reason: str
    epoch: Epoch
    """START: the epoch to place. RETIRE, REPLACE: the epoch of the placement to remove."""
    index: int = 0
    """Index of the record that the decision is based on; if it has changed, decide again. 0 = no record."""
    placement: Placement | None = None
    urgent: bool = False
    stalled: bool = False
    """REPLACE: the placement makes no progress (`core.stuck_placements`)."""
    home: str = ""
    """START: the scheduler to place on, REPLACE: the one to move to; "" = unchanged (`core.migration`)."""
    at_once: bool = False
    """REPLACE: does not wait for its turn in a roll-out, because the device has no agent that can report."""

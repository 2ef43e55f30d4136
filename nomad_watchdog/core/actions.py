"""Actions that the planner decides on for one device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

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


class Move(IntEnum):
    """Why an agent is replaced. A lower number gets room in the window first."""

    STRANDED = 0
    """It can't report to any replica. It does not wait for room, because it is of no use where it is."""
    DRAIN = 1
    """Its node is being drained."""
    ROLLBACK = 2
    """It runs a version that was given up."""
    RELIEF = 3
    """Its host is overloaded."""
    STALLED = 4
    """Its placement makes no progress (`core.stuck_placements`)."""
    ROLLOUT = 5
    """It does not run the spec that its device should have."""
    MIGRATION = 6
    """It is to run on another scheduler (`core.migration`)."""
    REBALANCE = 7
    """Its host has more agents than others."""


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
    move: Move = Move.ROLLOUT
    """REPLACE: why."""
    home: str = ""
    """START: the scheduler to place on, REPLACE: the one to move to; "" = unchanged (`core.migration`)."""
    waits_for: str = ""
    """REPLACE: why it may not begin whatever room the window has, in words; "" = it may."""

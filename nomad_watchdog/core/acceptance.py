"""Which report is accepted: S1, decided in one place.

An instance is one run as the scheduler counts it (an allocation, a pod): a task that the scheduler
restarts in place stays the same instance, one that it moves to another node is a new one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from nomad_watchdog.model import DeviceRecord, Epoch, Presence


class AcceptanceKind(StrEnum):
    ACCEPTED = "accepted"
    BIND = "bind"
    """Accept, once the registry has recorded this instance by compare-and-set."""
    REFUSED = "refused"
    """The agent must stop (HTTP 410)."""
    UNSURE = "unsure"
    """We may be behind: look again before anybody is told to stop (HTTP 409)."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    kind: AcceptanceKind
    reason: str = ""
    departed: bool = False
    """Of a refusal: the device itself has left, so that what its agent has told of it is over."""
    rival: bool = False
    """Of a refusal: it stands on what the scheduler last said of another instance."""


def accept(
    record: DeviceRecord | None,
    epoch: Epoch,
    instance: str,
    live: Collection[str],
    *,
    stopping: Collection[str] = (),
    kept: bool = False,
) -> Acceptance:
    """Judge a report of (device, epoch, instance).

    `live`: instances that may hold a process now at this epoch, as the scheduler last said; empty
    when it said nothing. `stopping`: those of them that the scheduler has been told to stop. `kept`:
    the device has left, and its agent waits for it to come back.
    """
    if record is None:
        # A departure leaves a record behind; where there is none, the store may have lost it, and then a
        # refusal would stop the whole fleet past the breaker (S7). Strays are retired by the planner.
        return Acceptance(AcceptanceKind.UNSURE, "no record of the device is found")
    if record.presence is Presence.ABSENT and not kept:
        return Acceptance(AcceptanceKind.REFUSED, "the device has left", departed=True)
    if epoch < record.epoch:
        return Acceptance(
            AcceptanceKind.REFUSED, f"epoch {epoch} is over; the device is at {record.epoch}"
        )
    if epoch > record.epoch:
        return Acceptance(
            AcceptanceKind.UNSURE, f"epoch {epoch} is newer than the {record.epoch} known here"
        )
    if instance == record.instance:
        return Acceptance(AcceptanceKind.ACCEPTED)
    if not record.instance:
        return Acceptance(AcceptanceKind.BIND, "first report at this epoch")
    if record.instance in stopping and instance in live and instance not in stopping:
        # A raced start made two, and the one that reported first is the one that was removed.
        return Acceptance(
            AcceptanceKind.UNSURE, f"the accepted instance {record.instance} is stopping"
        )
    if record.instance in live:
        reason = f"instance {record.instance} is the accepted one at this epoch"
        return Acceptance(AcceptanceKind.REFUSED, reason, rival=True)
    if instance in live:
        return Acceptance(
            AcceptanceKind.BIND, f"the scheduler has replaced instance {record.instance}"
        )
    return Acceptance(
        AcceptanceKind.UNSURE, "the scheduler has not said yet which instance is alive"
    )

"""Decides which reports are accepted (S1).

An instance is one run in the scheduler (an allocation, a pod). A task that is restarted in place keeps its instance;
a task that is moved to another node gets a new one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from nomad_watchdog.model import DeviceRecord, Epoch, Presence


class AcceptanceKind(StrEnum):
    ACCEPTED = "accepted"
    BIND = "bind"
    """Accept after the registry has recorded this instance by compare-and-set."""
    REFUSED = "refused"
    """The agent must stop (HTTP 410)."""
    UNSURE = "unsure"
    """Our data may be out of date: read again before an agent is stopped (HTTP 409)."""


@dataclass(frozen=True, slots=True)
class Acceptance:
    kind: AcceptanceKind
    reason: str = ""
    departed: bool = False
    """For a refusal: the device has left, so everything that its agent reported about it is over."""
    rival: bool = False
    """For a refusal: it is based on the scheduler's last listing of another instance."""


def accept(
    record: DeviceRecord | None,
    epoch: Epoch,
    instance: str,
    live: Collection[str],
    *,
    stopping: Collection[str] = (),
    kept: bool = False,
) -> Acceptance:
    """Decide on a report of (device, epoch, instance).

    `live`: instances that may have a process at this epoch, as last listed by the scheduler; empty = unknown.
    `stopping`: the instances in `live` that the scheduler was asked to stop. `kept`: the device has left, and its
    agent is kept in case it comes back.
    """
    if record is None:
        # A device that has left still has a record. Without one, the registry may have lost it, and a refusal
        # would stop the whole fleet in spite of the breaker (S7). The planner retires strays.
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
        # A race made two instances, and the one that reported first is being removed.
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

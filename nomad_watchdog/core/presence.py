"""Changes of a record: by a new desired state, a new placement or a first report.

Each function takes the stored record and returns the one to store by compare-and-set, or None if nothing changes: the
registry is written only on change (S5), and an epoch only increases (S1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from nomad_watchdog.ids import slug_of
from nomad_watchdog.model import (
    NEVER,
    Departure,
    Device,
    DeviceRecord,
    Epoch,
    Presence,
    WallTime,
)

BY_TOKEN: Final = "token:"  # noqa: S105  # no secret: the start of a source
"""Prefix of the source of a device that was registered with a device token."""


def register(  # by name
    stored: DeviceRecord | None,
    desired: Device,
    now: WallTime,
    source: str | None = None,
    *,
    token: str = "",
    generation: int = 0,
) -> DeviceRecord | None:
    """The record with `desired` as its desired state; None if the stored record already has it.

    `source`: the inventory that requests this, None = the API, which does not change the source of an unchanged
    device. `token`: the device token that registers an absent device; "" = another caller. `generation`: the highest
    generation of any deleted record."""
    if stored is None:
        return DeviceRecord(
            slug=slug_of(desired.id),
            device=desired,
            presence=Presence.PRESENT,
            generation=generation + 1,
            epoch=NEVER,
            instance="",
            changed_at=now,
            source=source or (token and BY_TOKEN + token),
        )
    same = stored.device == desired and source in (None, stored.source)
    if stored.presence is Presence.PRESENT and same:
        return None
    by_token = token and BY_TOKEN + token
    if stored.presence is Presence.PRESENT:
        # It counts against the token that registered it, even if another caller changes it.
        by_token = stored.source if stored.source.startswith(BY_TOKEN) else ""
    return replace(
        stored,
        device=desired,
        presence=Presence.PRESENT,
        generation=stored.generation + 1,
        changed_at=now,
        source=source or by_token,
        left=Departure.REMOVED,
    )


_FIRMNESS: Final = (Departure.EXPIRED, Departure.DISCONNECTED, Departure.REMOVED)


def deregister(
    stored: DeviceRecord, now: WallTime, left: Departure = Departure.REMOVED
) -> DeviceRecord | None:
    """The tombstone of a device; None if it already is one. It keeps the epoch, so that a device that comes back
    can't get an epoch that an old agent still carries.

    A firmer departure replaces a weaker one: the tombstone of an expired device becomes one of a removed device,
    never the reverse."""
    gone = stored.presence is Presence.ABSENT
    if gone and _FIRMNESS.index(left) <= _FIRMNESS.index(stored.left):
        return None
    return replace(
        stored,
        presence=Presence.ABSENT,
        generation=stored.generation + 1,
        changed_at=now,
        left=left,
        condition=None,
    )


def revive(stored: DeviceRecord, now: WallTime) -> DeviceRecord | None:
    """The record of an expired device after a new heartbeat, with its previous desired state; None if it has not
    expired."""
    if stored.presence is Presence.PRESENT or stored.left is not Departure.EXPIRED:
        return None
    return replace(
        stored,
        presence=Presence.PRESENT,
        generation=stored.generation + 1,
        changed_at=now,
        left=Departure.REMOVED,
    )


def restore(stored: DeviceRecord | None, saved: DeviceRecord) -> DeviceRecord | None:
    """The stored record after `saved` is restored from a backup; None = no change.

    The desired state with the higher generation is kept. Restoring never lowers an epoch (S1): the higher one is
    kept, with its own accepted instance. The condition of the device comes from the record with the higher
    generation, or else the higher epoch.
    """
    if stored is None:
        return replace(saved, index=0)
    if saved.epoch > stored.epoch:
        stored_new = replace(
            stored,
            epoch=saved.epoch,
            instance=saved.instance,
            home=saved.home,
            condition=saved.condition
            if saved.generation >= stored.generation
            else stored.condition,
        )
    else:
        stored_new = stored
    if saved.generation > stored.generation:
        stored_new = replace(
            stored_new,
            device=saved.device,
            presence=saved.presence,
            generation=saved.generation,
            changed_at=saved.changed_at,
            event_at=saved.event_at,
            event_marks=saved.event_marks,
            source=saved.source,
            left=saved.left,
            condition=saved.condition,
        )
    elif saved.generation == stored.generation and saved.event_at > stored.event_at > 0:
        # The same request, confirmed by a later event: older events remain late.
        stored_new = replace(stored_new, event_at=saved.event_at, event_marks=saved.event_marks)
    return None if stored_new == stored else stored_new


def advance(stored: DeviceRecord, epoch: Epoch, home: str = "") -> DeviceRecord:
    """The record with a new epoch, at which no instance is accepted yet. `home`: the scheduler of the epoch, "" =
    unchanged.

    Raises ValueError if the epoch would not increase: a bug in the caller.
    """
    if epoch <= stored.epoch:
        raise ValueError(f"epoch must go up: {stored.epoch} to {epoch}")
    return replace(stored, epoch=epoch, instance="", home=home or stored.home)


def bind(stored: DeviceRecord, instance: str) -> DeviceRecord:
    """The record with `instance` as the accepted instance of its epoch."""
    return replace(stored, instance=instance)

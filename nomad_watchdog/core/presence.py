"""What a change of wish, a new placement and a first report do to a record.

Each function takes the stored record and gives the one to store by compare-and-set, or None when
nothing changes: the registry is written only on change (S5), and an epoch only goes up (S1).
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
"""Start of the source of a device that a device token registered."""


def register(  # by name
    stored: DeviceRecord | None,
    wish: Device,
    now: WallTime,
    source: str | None = None,
    *,
    token: str = "",
    generation: int = 0,
) -> DeviceRecord | None:
    """The record that asks for `wish` to be watched; None when the stored one already does.

    `source`: the inventory that asks, None = the API, which leaves an unchanged wish its source. `token`: the
    device token that brings in a device which is not there; "" = another caller. `generation`: the highest one
    of any record that was deleted."""
    if stored is None:
        return DeviceRecord(
            slug=slug_of(wish.id),
            device=wish,
            presence=Presence.PRESENT,
            generation=generation + 1,
            epoch=NEVER,
            instance="",
            changed_at=now,
            source=source or (token and BY_TOKEN + token),
        )
    same = stored.device == wish and source in (None, stored.source)
    if stored.presence is Presence.PRESENT and same:
        return None
    by_token = token and BY_TOKEN + token
    if stored.presence is Presence.PRESENT:
        # It counts against the token that brought it in, whoever changes it.
        by_token = stored.source if stored.source.startswith(BY_TOKEN) else ""
    return replace(
        stored,
        device=wish,
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
    """The tombstone of a device; None when it is one. It keeps the epoch, so that a device that
    comes back can't get an epoch that an old agent still carries.

    Who means it more firmly is heard: a tombstone of an expired device becomes one of a removed
    device, never the other way round."""
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
    """The record of an expired device that was heard again, with the wish that it had; else None."""
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
    """The record that a backup makes of the stored one; None when that needs no change.

    The newer wish stands, by its generation. An epoch never goes back (S1): the higher one stays, with its
    own accepted instance. The condition of the device comes from whichever of the two has the newer wish, or
    else the higher epoch.
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
        # The same request, confirmed by a later event: what is older than that stays late.
        stored_new = replace(stored_new, event_at=saved.event_at, event_marks=saved.event_marks)
    return None if stored_new == stored else stored_new


def advance(stored: DeviceRecord, epoch: Epoch, home: str = "") -> DeviceRecord:
    """The record with a new epoch, at which nobody is accepted yet. `home`: the scheduler that the epoch is
    placed on, "" = the same as before.

    Raises ValueError when the epoch would not go up: that is a bug of the caller, never an input.
    """
    if epoch <= stored.epoch:
        raise ValueError(f"epoch must go up: {stored.epoch} to {epoch}")
    return replace(stored, epoch=epoch, instance="", home=home or stored.home)


def bind(stored: DeviceRecord, instance: str) -> DeviceRecord:
    """The record with `instance` as the one that is accepted at its epoch."""
    return replace(stored, instance=instance)

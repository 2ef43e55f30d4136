"""Checks that the agent classes and devices that a request names exist.

A misspelt name is an error of the request, and does not become a device without an agent.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Final

from nomad_watchdog.errors import NotFoundError, UserError, WatchdogError
from nomad_watchdog.events.log import EventFilter
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Departure, Device, DeviceRecord, Presence
from nomad_watchdog.text_files import did_you_mean
from nomad_watchdog.units import utc

MAX_COMPARED: Final = 500
"""Maximum number of ids that are compared with a misspelt one, so that a hint stays cheap in a large fleet."""
_DEFAULT: Final = "default"


def check_class(fleet: Fleet, device: Device, *, given: bool = True) -> None:
    """Raises UserError for a device of a class that is not configured here.

    `given`: the request named the class. A device that is already registered with this class, or that was only
    disconnected, may be registered again: a class that was removed from the configuration must not make reconnects
    fail. The verdict of the device reports that the class is missing."""
    if fleet.classes is None or device.agent_class in fleet.classes:
        return
    known = fleet.records.get(slug_of(device.id))
    if known is None or known.device.agent_class != device.agent_class or _was_removed(known):
        raise _unknown_class(device.agent_class, fleet.classes, given=given)


def _was_removed(record: DeviceRecord) -> bool:
    return record.presence is Presence.ABSENT and record.left is Departure.REMOVED


def check_class_name(fleet: Fleet, name: str) -> None:
    """Raises UserError for a class that is neither configured here nor that of a device."""
    if fleet.classes is None or name in fleet.classes:
        return
    if not any(record.device.agent_class == name for record in fleet.records.values()):
        raise _unknown_class(name, fleet.classes, given=True)


def _unknown_class(name: str, classes: Collection[str], *, given: bool) -> UserError:
    names = ", ".join(sorted(classes)[:50])
    if not given:
        return UserError(
            f"no class is given, and no agent class {_DEFAULT!r} is configured: name one of {names} "
            "(`class`, or --class)"
        )
    hint = did_you_mean(name, classes)
    return UserError(f"class: unknown agent class {ascii(name)[:80]}; {hint}configured: {names}")


async def check_devices(fleet: Fleet, ids: Iterable[str]) -> None:
    """Raises NotFoundError (404) with the devices that were never registered, and similar ids; also raises as
    `Registry.get`. Unknown ids are looked up in the registry, because the cache may be old."""
    missing = []
    for device_id in ids:
        slug = slug_of(DeviceId(device_id))
        if slug not in fleet.records and await fleet.registry.get(slug) is None:
            missing.append(device_id)
    if len(missing) == 1:
        raise unknown(missing[0], fleet)
    if missing:
        names = ", ".join(ascii(one)[:80] for one in sorted(missing)[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise NotFoundError(f"no such devices are registered: {names}{more}")


async def check_events_of(fleet: Fleet, device_id: str) -> None:
    """Raises NotFoundError (404) for a device that was never registered and has no agent and no stored event."""
    slug = slug_of(DeviceId(device_id))
    if slug in fleet.records or slug in fleet.placements or fleet.events.all.of_device(slug):
        return
    try:
        found = await fleet.registry.get(slug) is not None
        found = found or bool((await fleet.events.all.page(0, 1, EventFilter(device=device_id)))[0])
    except WatchdogError:
        return  # stored events can be listed while the registry can't be read
    if not found:
        raise unknown(device_id, fleet)


async def missing(fleet: Fleet, device_id: str) -> NotFoundError:
    """As `unknown`; the message states if the device was registered before, because its record may be lost.

    Raises TransientError before the registry has been read."""
    fleet.records.check_loaded()
    if not (before := await known_before(fleet, device_id)):
        return unknown(device_id, fleet)
    return NotFoundError(
        f"no device {ascii(device_id)[:200]} is registered; {before}. Register it again if it still exists"
    )


async def known_before(fleet: Fleet, device_id: str) -> str:
    """The last event about a device that is not registered, as text; "" = no event is stored."""
    found = fleet.events.all.of_device(slug_of(DeviceId(device_id)))
    try:
        found = found or (await fleet.events.all.page(0, 1, EventFilter(device=device_id)))[0]
    except WatchdogError:
        return ""
    if not found:
        return ""
    event = found[-1]
    return f"it was registered before (event `{event.kind}` at {utc(event.at)})"


def unknown(device_id: str, fleet: Fleet | None = None) -> NotFoundError:
    """The error for a device that is not registered. `fleet`: suggest a similar id, for callers that may read all
    ids."""
    if fleet is None:
        return NotFoundError(f"no device {ascii(device_id)[:200]} is registered")
    close = difflib.get_close_matches(device_id, _candidates(fleet, device_id), n=1, cutoff=0.7)
    hint = f"did you mean {ascii(close[0])[:200]}? " if close else ""
    return NotFoundError(
        f"no device {ascii(device_id)[:200]} is registered; {hint}"
        "`nomad-watchdog devices ls` lists the devices"
    )


def _candidates(fleet: Fleet, device_id: str) -> list[str]:
    ids = fleet.records.slug_by_id
    if len(ids) <= MAX_COMPARED:
        return list(ids)
    start = device_id[:3]
    return [one for one in ids if one.startswith(start)][:MAX_COMPARED]

"""(devices in an inventory file, records) → which devices to register and which to remove.

A file controls only the devices that were registered from it. A device that the API or another inventory registered
is not changed, and is reported as a conflict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from nomad_watchdog.core.presence import BY_TOKEN
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Departure, Device, DeviceRecord, Presence


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes that make the registry match a file."""

    register: tuple[Device, ...]
    depart: frozenset[Slug]
    conflicts: tuple[str, ...]
    """Ids of devices that the file lists and another source owns."""


def compare(
    listed: Mapping[Slug, Device],
    records: Mapping[Slug, DeviceRecord],
    source: str,
    sources: Collection[str],
) -> Changes:
    """`source`: the source of the file; `sources`: all configured sources. Devices of a file that is no longer
    configured may be taken over."""
    register: list[Device] = []
    conflicts: list[str] = []
    for slug, device in listed.items():
        record = records.get(slug)
        if record is None or _gone(record, source):
            register.append(device)
        elif record.presence is Presence.ABSENT:
            continue  # it expired: its heartbeat brings it back, not the file that still lists it
        elif record.source == source:
            if record.device != device:
                register.append(device)
        elif not record.source or record.source.startswith(BY_TOKEN) or record.source in sources:
            conflicts.append(device.id)
        else:
            register.append(device)
    depart = frozenset(
        slug
        for slug, record in records.items()
        if record.source == source and record.presence is Presence.PRESENT and slug not in listed
    )
    return Changes(tuple(register), depart, tuple(conflicts))


def _gone(record: DeviceRecord, source: str) -> bool:
    expired = record.source == source and record.left is Departure.EXPIRED
    return record.presence is Presence.ABSENT and not expired

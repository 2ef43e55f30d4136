"""Which devices have sent no heartbeat for their whole ttl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Monotonic, Presence, PresenceRules


@dataclass(frozen=True, slots=True)
class Overdue:
    """Devices without a heartbeat for their whole ttl, and when the next one will be overdue."""

    slugs: frozenset[Slug]
    next_at: Monotonic
    """Infinite when no device has a ttl."""
    window_s: float
    """The longest ttl among the overdue devices: one outage makes them overdue within this time."""
    unheard: tuple[Slug, ...] = ()
    """Present devices with a ttl and without any heartbeat: their first ttl begins now."""


def overdue(
    records: Iterable[DeviceRecord],
    heartbeats: Mapping[Slug, Monotonic],
    rules: PresenceRules,
    now: Monotonic,
) -> Overdue:
    """`heartbeats`: the last heartbeats; a device without one is not overdue, see `Overdue.unheard`."""
    unheard: list[Slug] = []
    found: list[Slug] = []
    next_at, window_s = float("inf"), 0.0
    for record in records:
        ttl_s = rules.ttl_of(record.device)
        if ttl_s <= 0 or record.presence is Presence.ABSENT:
            continue
        last = heartbeats.get(record.slug)
        if last is None:
            unheard.append(record.slug)
        elif now - last >= ttl_s:
            found.append(record.slug)
            window_s = max(window_s, ttl_s)
        else:
            next_at = min(next_at, last + ttl_s)
    return Overdue(frozenset(found), Monotonic(next_at), window_s, tuple(unheard))

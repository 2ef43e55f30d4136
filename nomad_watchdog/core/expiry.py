"""Who has left by silence, and how many may leave at once (S7).

A dead gateway, a stopped clock or a torn inventory looks like a fleet that left. So what would take more
than the breaker's share of the devices within one window waits for them to be heard, or for an operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Limits, Monotonic, Presence, PresenceRules

NOBODY: Final[frozenset[Slug]] = frozenset()


@dataclass(frozen=True, slots=True)
class Overdue:
    """Devices that were silent for their whole ttl, and when the next one will have been."""

    slugs: frozenset[Slug]
    next_at: Monotonic
    """Infinite when no device has a ttl."""
    window_s: float
    """The longest ttl among the overdue: one outage makes them overdue within so long."""
    unheard: tuple[Slug, ...] = ()
    """Present devices with a ttl and no sign of life at all: their first ttl is to begin now."""


def overdue(
    records: Iterable[DeviceRecord],
    heard: Mapping[Slug, Monotonic],
    rules: PresenceRules,
    now: Monotonic,
) -> Overdue:
    """`heard`: the last sign of life; a device without one is not overdue, see `Overdue.unheard`."""
    unheard: list[Slug] = []
    found: list[Slug] = []
    next_at, window_s = float("inf"), 0.0
    for record in records:
        ttl_s = rules.ttl_of(record.device)
        if ttl_s <= 0 or record.presence is Presence.ABSENT:
            continue
        sign = heard.get(record.slug)
        if sign is None:
            unheard.append(record.slug)
        elif now - sign >= ttl_s:
            found.append(record.slug)
            window_s = max(window_s, ttl_s)
        else:
            next_at = min(next_at, sign + ttl_s)
    return Overdue(frozenset(found), Monotonic(next_at), window_s, tuple(unheard))


@dataclass(frozen=True, slots=True)
class ExpiryGate:
    """Who may leave now, who must wait, and why."""

    go: frozenset[Slug]
    held: frozenset[Slug] = NOBODY
    reason: str = ""


def gate(
    wanted: AbstractSet[Slug],
    *,
    present: int,
    recent: int,
    limits: Limits,
    confirmed: AbstractSet[Slug],
) -> ExpiryGate:
    """`present`: devices that are present, the wanted ones among them; `recent`: how many left for the
    same cause within the window; `confirmed`: an operator means these."""
    fresh = frozenset(wanted - confirmed)
    allowed = max(limits.breaker_min, int((present + recent) * limits.breaker_fraction))
    if not fresh or len(fresh) + recent <= allowed:
        return ExpiryGate(frozenset(wanted))
    reason = (
        f"{len(fresh) + recent} of {present + recent} devices would leave at once; at most {allowed} "
        "may without an operator's word"
    )
    return ExpiryGate(frozenset(wanted & confirmed), fresh, reason)

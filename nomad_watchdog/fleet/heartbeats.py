"""Who was heard when, who may come back, and who flaps: in memory, never written.

After a restart nothing is known, and that is the safe side: every ttl and every grace begins anew, so
that nobody expires and nobody's agent goes for having been silent while we were down.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core import flap_damping
from nomad_watchdog.core.flap_damping import FlapDamper
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Departure, DeviceRecord, Monotonic, Presence, PresenceRules

_SOFT: Final = frozenset({Departure.EXPIRED, Departure.DISCONNECTED})


@dataclass(slots=True)
class Heartbeats:
    """What is remembered of the devices' coming and going."""

    rules: PresenceRules
    heard: dict[Slug, Monotonic] = field(default_factory=dict)
    """The last sign of life; a device that was never heard gets its first ttl when it is first seen."""
    beats: dict[Slug, Monotonic] = field(default_factory=dict)
    """The last heartbeat proper; for people."""
    leaving: dict[Slug, Monotonic] = field(default_factory=dict)
    """Devices that expired or were disconnected, and since when; out of it once their agent may go."""
    flaps: dict[Slug, FlapDamper] = field(default_factory=dict)

    def learned(self, before: DeviceRecord | None, record: DeviceRecord, now: Monotonic) -> bool:
        """A record was stored or read; whether the device has begun to flap by it."""
        slug = record.slug
        if record.presence is Presence.PRESENT:
            self.leaving.pop(slug, None)
            if before is None or before.generation != record.generation:
                self.heard[slug] = now
        else:
            self.heard.pop(slug, None)
            if record.left not in _SOFT:
                self.leaving.pop(slug, None)  # who removes a device means it
            else:
                self.leaving.setdefault(slug, now)
        if before is None or before.presence is record.presence:
            return False
        was = self.flaps.get(slug)
        flap = flap_damping.changed(was, self.rules, now)
        if flap is None:
            return False
        self.flaps[slug] = flap
        return flap.flapping and not (was is not None and was.flapping)

    def forgotten(self, slug: Slug) -> None:
        """Its record is gone."""
        for memory in (self.heard, self.beats, self.leaving, self.flaps):
            memory.pop(slug, None)

    def answers(self, slug: Slug, now: Monotonic) -> None:
        """Its accepted agent says that the device answers. That is a sign of life of a device that is
        present; it brings no expired one back, for the agent may ask another that has its address."""
        if slug in self.heard:
            self.heard[slug] = now

    def is_flapping(self, slug: Slug, now: Monotonic) -> bool:
        """Whether the device comes and goes too often."""
        flap = self.flaps.get(slug)
        return flap is not None and flap_damping.is_flapping(flap, self.rules, now)

    def keeps(self, slug: Slug, now: Monotonic) -> str:
        """Why the agent of a device that has left is kept, in words; "" = it is not."""
        since = self.leaving.get(slug)
        if since is None:
            return ""
        if self.is_flapping(slug, now):
            return "the device has left; it flaps, so its agent stays until it has settled"
        left_s = self.rules.grace_s - (now - since)
        if left_s <= 0:
            return ""
        return f"the device has left; its agent waits {left_s:.0f} s for it to come back"

    def kept(self, now: Monotonic) -> frozenset[Slug]:
        """Devices that have left and whose agents stay."""
        if not self.leaving:
            return frozenset()
        return frozenset(slug for slug in self.leaving if self.keeps(slug, now))

    def settle(self, now: Monotonic) -> tuple[list[Slug], bool]:
        """Forget what is over: the devices that have ceased to flap, and whether an agent may go."""
        steady: list[Slug] = []
        for slug, flap in list(self.flaps.items()):
            if flap.flapping and not flap_damping.is_flapping(flap, self.rules, now):
                self.flaps[slug] = FlapDamper(flap_damping.penalty_at(flap, self.rules, now), now)
                steady.append(slug)
            elif flap_damping.is_forgotten(flap, self.rules, now):
                del self.flaps[slug]
        over = [slug for slug in self.leaving if not self.keeps(slug, now)]
        for slug in over:
            del self.leaving[slug]
        return steady, bool(over)

    def flapping(self, now: Monotonic) -> int:
        """How many devices flap."""
        return sum(flap_damping.is_flapping(flap, self.rules, now) for flap in self.flaps.values())

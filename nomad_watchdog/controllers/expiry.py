"""Lets devices go that were silent or are listed no more, and holds what would be too many (S7).

A replica lets go only those of its own shards. Heartbeats are in memory, so replicas tell each other of
them (`peers`); and a shard that has just become ours begins with a whole ttl for everybody, for what its
last holder heard may not have come through.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.core import expiry, presence
from nomad_watchdog.core.expiry import NOBODY
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Departure, DeviceRecord, Monotonic, Presence, WallTime
from nomad_watchdog.replicas.ownership import ShardOwnership

log = logging.getLogger(__name__)

EXPIRED: Final = "expired"
LOOK_EVERY_S: Final = 2.0
"""A device leaves at most so long after its ttl; sooner when its end was known at the last look."""
MIN_GAP_S: Final = 0.25
MAX_SHOWN: Final = 1_000


@dataclass(slots=True)
class _Cause:
    """One reason for leaving, and what is held of it."""

    held: frozenset[Slug] = NOBODY
    reason: str = ""
    confirmed: frozenset[Slug] = NOBODY
    recent: deque[Monotonic] = field(default_factory=deque)
    """When devices left without an operator's word."""


class ExpiryController:
    """Who leaves, and who is held."""

    def __init__(self, fleet: Fleet, metrics: Metrics, ownership: ShardOwnership) -> None:
        self.fleet = fleet
        self.ownership = ownership
        self._shards: frozenset[Shard] = frozenset()
        """Those that were ours at the last look."""
        self.metrics = metrics
        self._causes: dict[str, _Cause] = {}
        fleet.views.add_status(self.status)
        fleet.views.add_explain(self.explain)

    async def run(self) -> None:
        """Let the silent ones go, until cancelled."""
        while True:
            try:
                wait_s = await self.expire()
            except WatchdogError as error:
                log.warning("expiry failed", extra={"reason": str(error)})
                wait_s = LOOK_EVERY_S
            await asyncio.sleep(min(max(wait_s, MIN_GAP_S), LOOK_EVERY_S))

    async def expire(self) -> float:
        """One look; seconds until the next device may be overdue."""
        fleet, attendance = self.fleet, self.fleet.presence.heartbeats
        now = fleet.clock.monotonic()
        records = self.ownership.of(fleet.records)
        self._begin_anew(records, now)
        # What is paused is not expected to beat: its ttl begins anew when the pause ends.
        for slug in fleet.presence.paused():
            attendance.answers(slug, now)
        found = expiry.overdue(records.values(), attendance.heard, attendance.rules, now)
        attendance.heard.update(dict.fromkeys(found.unheard, now))  # a store that was put back, say

        def silent(record: DeviceRecord) -> bool:
            heard = attendance.heard.get(record.slug)
            return heard is not None and heard <= now

        left = await self.leave(
            EXPIRED, found.slugs, Departure.EXPIRED, still=silent, window_s=found.window_s
        )
        self.metrics.expired(left)
        # A heartbeat that came while this was being written must not be lost.
        late = [slug for slug in found.slugs if attendance.beats.get(slug, 0.0) > now]
        if late:
            await fleet.records.adjust(late, presence.revive)
        return found.next_at - now

    def _begin_anew(self, records: Mapping[Slug, DeviceRecord], now: Monotonic) -> None:
        gained, self._shards = self.ownership.shards() - self._shards, self.ownership.shards()
        if gained:
            heard = self.fleet.presence.heartbeats.heard
            for slug in records:
                if slug in heard and self.ownership.shard(slug) in gained:
                    heard[slug] = now

    async def leave(
        self,
        cause: str,
        wanted: frozenset[Slug],
        left: Departure,
        *,
        still: Callable[[DeviceRecord], bool],
        window_s: float = 0.0,
    ) -> int:
        """Let these go, or hold them when they are too many; how many went. `still`: asked of each
        stored record, at the last moment. `window_s`: see `departures.gate`.

        Raises what the registry raises, and ConflictError."""
        fleet = self.fleet
        state = self._causes.setdefault(cause, _Cause())
        now = fleet.clock.monotonic()
        while state.recent and now - state.recent[0] > window_s:
            state.recent.popleft()
        state.confirmed &= wanted
        if not wanted:
            self._hold(cause, state, NOBODY, "")
            return 0
        gate = expiry.gate(
            wanted,
            present=sum(
                record.presence is Presence.PRESENT
                for record in self.ownership.of(fleet.records).values()
            ),
            recent=len(state.recent),
            limits=fleet.limits,
            confirmed=state.confirmed,
        )
        self._hold(cause, state, gate.held, gate.reason)
        if not gate.go:
            return 0

        def change(record: DeviceRecord, at: WallTime) -> DeviceRecord | None:
            return presence.deregister(record, at, left) if still(record) else None

        unasked = len(gate.go - state.confirmed)
        count = await fleet.records.adjust(sorted(gate.go), change)
        state.recent.extend([now] * min(unasked, count))
        return count

    def _hold(self, cause: str, state: _Cause, held: frozenset[Slug], reason: str) -> None:
        begins = bool(held) and not state.held
        state.held, state.reason = held, reason
        self.metrics.departures_held(sum(len(c.held) for c in self._causes.values()))
        if begins:
            log.error("departures held", extra={"cause": cause, "reason": reason})
            self._note("departures.held", f"{cause}: {reason}")

    def _note(self, kind: str, text: str) -> None:
        fleet = self.fleet
        fleet.events.own.add(
            at=fleet.clock.wall(), kind=kind, device_id="", slug=Slug(""), text=text, data={}
        )

    @property
    def held_id(self) -> str:
        """Twelve hexadecimal digits that name exactly those who are held; "" = nobody is."""
        text = "\n".join(
            f"{cause} {slug}"
            for cause, state in sorted(self._causes.items())
            for slug in sorted(state.held)
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""

    def confirm(self) -> int:
        """An operator's word that all who are held have left. Returns how many; they go at the next
        look."""
        count = 0
        for state in self._causes.values():
            state.confirmed |= state.held
            count += len(state.held)
        self._note("departures.confirmed", f"an operator confirmed {count} departures")
        return count

    def status(self) -> dict[str, object]:
        """Our part of the status."""
        reasons = {c: s.reason for c, s in sorted(self._causes.items()) if s.held}
        return {
            "departures": {
                "held": sum(len(state.held) for state in self._causes.values()),
                "reason": "; ".join(f"{cause}: {reason}" for cause, reason in reasons.items()),
                "id": self.held_id,
            }
        }

    def explain(self, slug: Slug) -> dict[str, object]:
        """Whether this device is held from leaving."""
        for cause, state in self._causes.items():
            if slug in state.held:
                mend = f"if it is meant: nomad-watchdog departures confirm {self.held_id}"
                return {"departure": f"held ({cause}): {state.reason}; {mend}"}
        return {}

    def shown(self) -> dict[str, object]:
        """Who is held, one by one."""
        rows = [
            {"device": record.device.id, "cause": cause}
            for cause, state in sorted(self._causes.items())
            for slug in sorted(state.held)
            if (record := self.fleet.records.get(slug)) is not None
        ]
        found = self.status()["departures"]
        assert isinstance(found, dict)
        return {"count": found["held"], "reason": found["reason"], "id": found["id"]} | {
            "devices": rows[:MAX_SHOWN]
        }

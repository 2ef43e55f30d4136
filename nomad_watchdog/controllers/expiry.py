"""Lets devices leave that sent no heartbeat or are no longer listed, and puts too many departures on hold (S7).

A replica decides only about the devices of its own shards. Heartbeats are kept in memory and replicated
(`replicas/report_replication.py`). Replication may have missed some, so when a shard becomes ours, the ttl of all
its devices begins again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.controllers.held_changes import report_hold
from nomad_watchdog.core import expiry, holds, presence
from nomad_watchdog.core.holds import DEPARTURES, Hold, HoldDecision
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import Departure, DeviceRecord, Monotonic, Presence, WallTime
from nomad_watchdog.replicas.ownership import ShardOwnership

log = logging.getLogger(__name__)

EXPIRED: Final = "expired"
MAX_GAP_S: Final = 2.0
"""Maximum time between two checks. It is shorter when the last check knew that a device expires before."""
MIN_GAP_S: Final = 0.25
MAX_LISTED: Final = 1_000
_Key = tuple[str, Slug]
"""The cause of a departure, and the device."""


@dataclass(slots=True)
class _Cause(Hold[_Key]):
    """The departures with one cause."""

    recent: deque[Monotonic] = field(default_factory=deque)
    """When devices left without a confirmation."""


class ExpiryController:
    """The departures of one replica's devices."""

    def __init__(self, fleet: Fleet, metrics: Metrics, ownership: ShardOwnership) -> None:
        self.fleet = fleet
        self.ownership = ownership
        self._shards: frozenset[Shard] = frozenset()
        """Those that were ours at the last check."""
        self.metrics = metrics
        self._causes: dict[str, _Cause] = {}
        fleet.views.add_status(self.status)
        fleet.views.add_explain(self.explain)

    async def run(self) -> None:
        """Let overdue devices leave, until cancelled."""
        while True:
            try:
                wait_s = await self.expire()
            except WatchdogError as error:
                log.warning("expiry failed", extra={"reason": str(error)})
                wait_s = MAX_GAP_S
            await asyncio.sleep(min(max(wait_s, MIN_GAP_S), MAX_GAP_S))

    async def expire(self) -> float:
        """Check once; seconds until the next device may be overdue."""
        fleet, attendance = self.fleet, self.fleet.presence.heartbeats
        now = fleet.clock.monotonic()
        records = self.ownership.of(fleet.records)
        self._restart_ttls(records, now)
        # A paused device need not send heartbeats: its ttl begins again when the pause ends.
        for slug in fleet.presence.paused():
            attendance.answers(slug, now)
        found = expiry.overdue(records.values(), attendance.heard, attendance.rules, now)
        attendance.heard.update(dict.fromkeys(found.unheard, now))  # from a restored registry

        def is_silent(record: DeviceRecord) -> bool:
            heard = attendance.heard.get(record.slug)
            return heard is not None and heard <= now

        left = await self.leave(
            EXPIRED, found.slugs, Departure.EXPIRED, still=is_silent, window_s=found.window_s
        )
        self.metrics.expired(left)
        # A heartbeat that came while this was being written must not be lost.
        late = [slug for slug in found.slugs if attendance.beats.get(slug, 0.0) > now]
        if late:
            await fleet.records.adjust(late, presence.revive)
        return found.next_at - now

    def _restart_ttls(self, records: Mapping[Slug, DeviceRecord], now: Monotonic) -> None:
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
        """Let these devices leave, or hold them if they are too many; how many left. `still`: checked for each
        stored record immediately before it is changed. `window_s`: departures within this time count together.

        Raises what the registry raises, and ConflictError."""
        fleet, state = self.fleet, self._causes.setdefault(cause, _Cause())
        now = fleet.clock.monotonic()
        while state.recent and now - state.recent[0] > window_s:
            state.recent.popleft()
        keys = {(cause, slug) for slug in wanted}
        state.confirmed &= keys
        decision = holds.decide(
            DEPARTURES,
            keys,
            state.confirmed,
            fleet.limits,
            total=self._present() if keys else 0,
            recent=len(state.recent),
        )
        self._hold(cause, state, decision)
        if not decision.go:
            return 0

        def change(record: DeviceRecord, at: WallTime) -> DeviceRecord | None:
            return presence.deregister(record, at, left) if still(record) else None

        unconfirmed = len(decision.go - state.confirmed)
        count = await fleet.records.adjust(sorted(slug for _, slug in decision.go), change)
        state.recent.extend([now] * min(unconfirmed, count))
        return count

    def _present(self) -> int:
        records = self.ownership.of(self.fleet.records).values()
        return sum(record.presence is Presence.PRESENT for record in records)

    def _hold(self, cause: str, state: _Cause, decision: HoldDecision[_Key]) -> None:
        begins = bool(decision.held) and not state.held
        state.held, state.reason = decision.held, decision.reason
        self.metrics.departures_held(self._held_count())
        if begins:
            report_hold(self.fleet, DEPARTURES, f"{cause}: {decision.reason}")

    def _held(self) -> Iterator[_Key]:
        for _, state in sorted(self._causes.items()):
            yield from sorted(state.held)

    def _held_count(self) -> int:
        return sum(len(state.held) for state in self._causes.values())

    @property
    def held_id(self) -> str:
        """Identifies exactly the departures that are held; "" = there are none."""
        return holds.hold_id(self._held())

    def confirm(self) -> int:
        """An operator confirms all held departures. Returns how many; the devices leave at the next check."""
        return sum(state.confirm() for state in self._causes.values())

    def _summary(self, name: str) -> dict[str, object]:
        reasons = (f"{c}: {s.reason}" for c, s in sorted(self._causes.items()) if s.held)
        return {
            name: self._held_count(),
            "reason": "; ".join(reasons),
            "id": self.held_id,
        }

    def status(self) -> dict[str, object]:
        """For the status of this replica."""
        return {"departures": self._summary("held")}

    def explain(self, slug: Slug) -> dict[str, object]:
        """Whether the departure of this device is held."""
        for cause, state in self._causes.items():
            if (cause, slug) in state.held:
                command = holds.confirm_command(DEPARTURES, self.held_id)
                return {"departure": f"held ({cause}): {state.reason}; {command}"}
        return {}

    def held_json(self) -> dict[str, object]:
        """The held departures, for the API."""
        rows = [
            {"device": record.device.id, "cause": cause}
            for cause, slug in self._held()
            if (record := self.fleet.records.get(slug)) is not None
        ]
        return self._summary("count") | {"devices": rows[:MAX_LISTED]}

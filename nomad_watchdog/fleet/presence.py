"""Which devices are present: heartbeats, grace periods, flapping and pauses.

A heartbeat costs two dictionary entries. Only a heartbeat that brings an expired device back is written to the
registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import pauses as rules
from nomad_watchdog.core import presence
from nomad_watchdog.core.pauses import Pause
from nomad_watchdog.errors import PreconditionError
from nomad_watchdog.fleet.events import FleetEvents
from nomad_watchdog.fleet.heartbeats import Heartbeats
from nomad_watchdog.fleet.pauses import Pauses
from nomad_watchdog.fleet.records import RecordCache, RecordChange
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    Departure,
    DeviceRecord,
    Placement,
    PlacementState,
    Presence,
    PresenceRules,
)
from nomad_watchdog.signals import Signal

_NOTHING: Final[Mapping[Slug, Pause]] = {}


class PresenceView:
    """Which devices are present, which of them are paused, and whose agents wait for them to return."""

    def __init__(
        self,
        records: RecordCache,
        placements: Mapping[Slug, tuple[Placement, ...]],
        events: FleetEvents,
        clock: Clock,
        rules: PresenceRules,
    ) -> None:
        self._records = records
        self._placements = placements
        self._events = events
        self._clock = clock
        self.heartbeats = Heartbeats(rules)
        self.pauses = Pauses(records.registry, clock)
        self.inventories: frozenset[str] = frozenset()
        """The sources of the configured static inventories."""
        self.heard: Signal[[Sequence[str]]] = Signal()
        """This replica received heartbeats of these device IDs."""
        self.recorded: Signal[[Sequence[str]]] = Signal()
        """Heartbeats of these device IDs were recorded, including those that another replica received."""
        self._paused: tuple[object, int, Mapping[Slug, Pause]] = (None, 0, _NOTHING)
        """Paused devices, with the pauses in force and the version of the records that they were derived from."""
        records.changed.connect(self._records_changed)
        records.forgotten.connect(self._records_forgotten)

    def _records_changed(self, changes: Sequence[RecordChange]) -> None:
        now = self._clock.monotonic()
        for before, record in changes:
            begins_to_flap = self.heartbeats.learned(before, record, now)
            if self._records.loaded and (before is None or before.generation != record.generation):
                kind, text = _event_of(before, record)
                self._events.note(record.slug, kind, text, generation=record.generation)
            if begins_to_flap:
                self._events.note(record.slug, "flapping", "the device comes and goes too often")

    def _records_forgotten(self, slugs: Sequence[Slug]) -> None:
        for slug in slugs:
            self.heartbeats.forgotten(slug)
            self._events.limits.forget(slug)

    async def record_heartbeats(self, ids: Sequence[str]) -> list[bool]:
        """Record heartbeats in memory. False for a device that is unknown or was removed.

        A device that had expired is registered again as it was. Raises as `RecordCache.register`, and
        TransientError until the registry has been read."""
        self._records.check_loaded()
        found, expired = self.touch_many(ids)
        self.heard.emit([name for name, known in zip(ids, found, strict=True) if known])
        if expired:
            await self._records.adjust(expired, presence.revive)
        return found

    def touch(self, ids: Sequence[str]) -> None:
        """Record that these devices exist: a client has just registered them here."""
        self.touch_many(ids, are_heartbeats=False)
        self.heard.emit(ids)

    def touch_many(
        self, ids: Sequence[str], *, are_heartbeats: bool = True
    ) -> tuple[list[bool], list[Slug]]:
        """Record signs of life; for each ID whether the device may be present, and the devices that had expired.
        `are_heartbeats`: the device itself sent them, not a client that registers it."""
        now = self._clock.monotonic()
        found: list[bool] = []
        expired: list[Slug] = []
        heard, slug_by_id = self.heartbeats.heard, self._records.slug_by_id
        beats = self.heartbeats.beats if are_heartbeats else {}
        for device_id in ids:
            slug = slug_by_id.get(device_id)
            record = None if slug is None else self._records.get(slug)
            if slug is None or record is None:
                found.append(False)
            elif record.presence is Presence.PRESENT:
                heard[slug] = beats[slug] = now
                found.append(True)
            else:
                came_back = record.left is Departure.EXPIRED
                if came_back:
                    expired.append(slug)
                    beats[slug] = now
                found.append(came_back)
        if are_heartbeats:
            self.recorded.emit(ids)
        return found, expired

    def ensure_not_from_inventory(self, device_id: DeviceId) -> None:
        """Raises PreconditionError when a configured static inventory lists this device: the inventory would
        revert a change through the API."""
        record = self._records.get(slug_of(device_id))
        if (
            record is not None
            and record.presence is Presence.PRESENT
            and record.source in self.inventories
        ):
            raise PreconditionError(
                f"device {ascii(device_id)[:200]} is listed in {record.source}; change it there"
            )

    def paused(self) -> Mapping[Slug, Pause]:
        """Slug → the pause that covers it now. Constant time while neither pauses nor records change."""
        found = self.pauses.in_force()
        if not found:
            return _NOTHING
        if self._paused[0] is not found or self._paused[1] != self._records.version:
            covered = rules.paused(self._records.values(), found)
            self._paused = (found, self._records.version, covered)
        return self._paused[2]

    def pause_of(self, record: DeviceRecord) -> Pause | None:
        """The pause that covers a device now."""
        return self.paused().get(record.slug)

    def paused_by(self, record: DeviceRecord) -> str:
        """The id of that pause; "" = none."""
        pause = self.pause_of(record)
        return "" if pause is None else pause.id

    def is_resting(self, slug: Slug) -> bool:
        """Whether no action is taken for the device now: it is paused, or its agent waits for it to return."""
        record = self._records.get(slug)
        if record is None:
            return False
        return bool(self.heartbeats.keeps(slug, self._clock.monotonic()) or self.pause_of(record))

    def kept_for(self, slug: Slug) -> str:
        """Why the agent of a device that has left still runs; "" = no agent runs, or it does not wait."""
        found = self._placements.get(slug, ())
        if all(placement.state is PlacementState.DEAD for placement in found):
            return ""
        return self.heartbeats.keeps(slug, self._clock.monotonic())

    def resting(self) -> frozenset[Slug]:
        """Devices for which no action is taken now: paused, or left with an agent that waits for them. Only an
        agent of the record's epoch waits."""
        waiting = {
            slug
            for slug in self.heartbeats.kept(self._clock.monotonic())
            if all(
                placement.epoch == self._records[slug].epoch
                for placement in self._placements.get(slug, ())
                if placement.state is not PlacementState.DEAD
            )
        }
        return frozenset(waiting.union(self.paused()))

    def expire(self) -> bool:
        """End flapping and waiting whose time is over; whether an agent may be stopped because of it."""
        steady, over = self.heartbeats.settle(self._clock.monotonic())
        for slug in steady:
            self._events.note(slug, "steady", "the device no longer flaps")
        return over

    def serialize(self, record: DeviceRecord) -> dict[str, object]:
        """The presence fields of a device in the API."""
        slug, now = record.slug, self._clock.monotonic()
        ttl_s = self.heartbeats.rules.ttl_of(record.device)
        heard = self.heartbeats.heard.get(slug)
        pause = self.pause_of(record)
        gone = record.presence is Presence.ABSENT
        return {
            "source": record.source,
            "ttl": duration_json(record.device.ttl_s),
            "expires_in_s": None
            if not ttl_s or heard is None or gone
            else round(max(0.0, ttl_s - (now - heard)), 1),
            "left": record.left.value if gone else None,
            "flapping": self.heartbeats.is_flapping(slug, now),
            "paused": None if pause is None else pause.id,
        }

    def explain(self, slug: Slug) -> dict[str, object]:
        """Why the device counts as present or not, and whether it is paused."""
        record = self._records.get(slug)
        if record is None:
            return {}
        pause = self.pause_of(record)
        flap = self.heartbeats.flaps.get(slug)
        return {
            "attendance": self.serialize(record)
            | {
                "agent_kept": self.kept_for(slug),
                "changes_counted": 0.0 if flap is None else round(flap.penalty, 2),
                "paused": None if pause is None else pause_json(pause),
            }
        }


def _event_of(before: DeviceRecord | None, record: DeviceRecord) -> tuple[str, str]:
    """Kind and text of the event of a changed registration. An outage that ends by it is named."""
    if record.presence is Presence.PRESENT:
        return "present", f"device registered ({record.device.address})"
    if record.left is Departure.EXPIRED:
        ill = before.condition if before is not None else None
        was = f"; it was {ill.state.value}: {ill.reason}" if ill is not None else ""
        return "expired", f"the device has left: no heartbeat within its ttl{was}"
    if record.left is Departure.DISCONNECTED:
        return "absent", "the device has left: its gateway says that it is disconnected"
    return "absent", "the device has left"


def pause_json(pause: Pause) -> dict[str, object]:
    """A pause as JSON."""
    return {
        "id": pause.id,
        **pause.target.shown(),
        "begins": pause.begins,
        "ends": pause.ends,
        "reason": pause.reason,
        "by": pause.by,
        "window": pause.window,
    }


def duration_json(seconds: float | None) -> str | None:
    """In the syntax of a request: "90s", "1500ms"."""
    if seconds is None:
        return None
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds * 1000:.0f}ms"

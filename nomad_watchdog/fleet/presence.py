"""The records, and who is really here: heartbeats, grace, flapping and pauses come together.

A heartbeat costs two entries in dictionaries. Only one that brings an expired device back is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import pauses as rules
from nomad_watchdog.core import presence
from nomad_watchdog.core.pauses import Pause
from nomad_watchdog.errors import PreconditionError, TransientError
from nomad_watchdog.events.device_limits import DeviceLimits
from nomad_watchdog.events.log import EVERYTHING, Event, EventFilter, EventLog
from nomad_watchdog.fleet.heartbeats import Heartbeats
from nomad_watchdog.fleet.pauses import Pauses
from nomad_watchdog.fleet.records import RecordCache
from nomad_watchdog.fleet.serializers import device_of
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    Departure,
    DeviceRecord,
    Placement,
    PlacementState,
    Presence,
    PresenceRules,
)
from nomad_watchdog.registry import Registry

_NOTHING: Final[Mapping[Slug, Pause]] = {}


class PresenceView(RecordCache):
    """The devices as the registry has them, and what is known of their coming and going."""

    def __init__(
        self, registry: Registry, clock: Clock, rules: PresenceRules, history: EventLog
    ) -> None:
        super().__init__(registry, clock)
        self.history = history
        self.allowance = DeviceLimits(history, clock)
        """How many events a device may cause."""
        self.told = history
        """The events of all replicas; with one replica its own."""
        self.placements: dict[Slug, tuple[Placement, ...]] = {}
        self.loaded = False
        """The registry has been read once; its first snapshot is no news to those who read events."""
        self.attendance = Heartbeats(rules)
        self.pauses = Pauses(registry, clock)
        self.slug_by_id: dict[str, Slug] = {}
        """By id: an id that is known need not be checked and hashed again."""
        self.on_beat: Callable[[Sequence[str]], None] = lambda _ids: None
        """Told of the devices that were heard here, not of those that another replica heard."""
        self._changes = 0
        """Goes up whenever a record is another one."""
        self._paused: tuple[object, int, Mapping[Slug, Pause]] = (None, 0, _NOTHING)
        self.inventories: frozenset[str] = frozenset()
        """The sources of the static inventories that are configured."""

    def learned(self, news: Sequence[tuple[DeviceRecord | None, DeviceRecord]]) -> None:
        """Remember who came and went, and say so."""
        now = self.clock.monotonic()
        self._changes += 1
        for before, record in news:
            if before is None:
                self.slug_by_id[record.device.id] = record.slug
            begins_to_flap = self.attendance.learned(before, record, now)
            if self.loaded and (before is None or before.generation != record.generation):
                self.note(record.slug, *_said_of(before, record), generation=record.generation)
            if begins_to_flap:
                self.note(record.slug, "flapping", "the device comes and goes too often")

    def reset(
        self,
        records: Mapping[Slug, DeviceRecord],
        index: int,
        unreadable: frozenset[Slug] = frozenset(),
    ) -> bool:
        """As `RecordCache.reset`; a store that was put back changes records without telling of each."""
        news = super().reset(records, index, unreadable)
        self._changes += 1
        if len(self.slug_by_id) != len(self.records):
            self.slug_by_id = {str(r.device.id): slug for slug, r in self.records.items()}
        return news

    def forgotten(self, slugs: Sequence[Slug]) -> None:
        """Drop what was known of devices whose record is gone."""
        for slug in slugs:
            self.attendance.forgotten(slug)
            self.allowance.forget(slug)
        self._changes += 1
        gone = set(slugs)
        self.slug_by_id = {name: slug for name, slug in self.slug_by_id.items() if slug not in gone}

    def check_loaded(self) -> None:
        """Raises TransientError before the registry has been read: until then no device is known, and none unknown."""
        if not self.loaded:
            raise TransientError("the registry has not been read yet", retry_after_s=1.0)

    async def beat(self, ids: Sequence[str]) -> list[bool]:
        """Signs of life, in memory only; False for a device that is unknown or was told to leave.

        One that had expired is registered again with the wish that it had. Raises as `register`, and
        TransientError before the registry has been read: nobody is unknown then."""
        self.check_loaded()
        found, expired = self.hear(ids)
        self.on_beat([name for name, known in zip(ids, found, strict=True) if known])
        if expired:
            await self.adjust(expired, presence.revive)
        return found

    def sign(self, ids: Sequence[str]) -> None:
        """Signs of life of devices that have just been registered here."""
        self.hear(ids, beats=False)
        self.on_beat(ids)

    def hear(self, ids: Iterable[str], *, beats: bool = True) -> tuple[list[bool], list[Slug]]:
        """Note signs of life: whether each is of a device that may be there, and who of them had
        expired. `beats`: the device itself was heard, not somebody who speaks of it."""
        now = self.clock.monotonic()
        found: list[bool] = []
        expired: list[Slug] = []
        heard = self.attendance.heard
        told = self.attendance.beats if beats else {}
        for device_id in ids:
            slug = self.slug_by_id.get(device_id)
            record = None if slug is None else self.records.get(slug)
            if slug is None or record is None:
                found.append(False)
            elif record.presence is Presence.PRESENT:
                heard[slug] = told[slug] = now
                found.append(True)
            else:
                came_back = record.left is Departure.EXPIRED
                if came_back:
                    expired.append(slug)
                    told[slug] = now
                found.append(came_back)
        return found, expired

    def own(self, device_id: DeviceId) -> None:
        """Raises PreconditionError when a static inventory that is configured asks for this device: what
        the API changed it would change back."""
        record = self.records.get(slug_of(device_id))
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
        if self._paused[0] is not found or self._paused[1] != self._changes:
            covered = rules.paused(self.records.values(), found)
            self._paused = (found, self._changes, covered)
        return self._paused[2]

    def pause_of(self, record: DeviceRecord) -> Pause | None:
        """The pause that covers a device now."""
        return self.paused().get(record.slug)

    def paused_by(self, record: DeviceRecord) -> str:
        """The id of that pause; "" = none."""
        pause = self.pause_of(record)
        return "" if pause is None else pause.id

    def is_resting(self, slug: Slug) -> bool:
        """Whether nothing is done for the device now: it is paused, or its agent waits for it."""
        record = self.records.get(slug)
        if record is None:
            return False
        return bool(self.attendance.keeps(slug, self.clock.monotonic()) or self.pause_of(record))

    def kept_for(self, slug: Slug) -> str:
        """Why the agent of a device that has left is kept, in words; "" = none is: where no agent is, nothing is
        kept, whatever the time since the device left."""
        found = self.placements.get(slug, ())
        if all(placement.state is PlacementState.DEAD for placement in found):
            return ""
        return self.attendance.keeps(slug, self.clock.monotonic())

    def resting(self) -> frozenset[Slug]:
        """Devices for which nothing is done now: paused, or gone with an agent that waits for them.
        One of another epoch waits for nobody."""
        waiting = {
            slug
            for slug in self.attendance.kept(self.clock.monotonic())
            if all(
                placement.epoch == self.records[slug].epoch
                for placement in self.placements.get(slug, ())
                if placement.state is not PlacementState.DEAD
            )
        }
        return frozenset(waiting.union(self.paused()))

    def settle_presence(self) -> bool:
        """Let time do its part: end what flapped and waited; whether an agent may go by it."""
        steady, over = self.attendance.settle(self.clock.monotonic())
        for slug in steady:
            self.note(slug, "steady", "the device has ceased to flap")
        return over

    def shown_presence(self, record: DeviceRecord) -> dict[str, object]:
        """The public fields of how a device is there."""
        slug, now = record.slug, self.clock.monotonic()
        ttl_s = self.attendance.rules.ttl_of(record.device)
        heard = self.attendance.heard.get(slug)
        pause = self.pause_of(record)
        gone = record.presence is Presence.ABSENT
        return {
            "source": record.source,
            "ttl": shown_duration(record.device.ttl_s),
            "expires_in_s": None
            if not ttl_s or heard is None or gone
            else round(max(0.0, ttl_s - (now - heard)), 1),
            "left": record.left.value if gone else None,
            "flapping": self.attendance.is_flapping(slug, now),
            "paused": None if pause is None else pause.id,
        }

    def explain_presence(self, slug: Slug) -> dict[str, object]:
        """Why the device counts as being there or not, and who keeps hands off it."""
        record = self.records.get(slug)
        if record is None:
            return {}
        pause = self.pause_of(record)
        flap = self.attendance.flaps.get(slug)
        return {
            "attendance": self.shown_presence(record)
            | {
                "agent_kept": self.kept_for(slug),
                "changes_counted": 0.0 if flap is None else round(flap.penalty, 2),
                "paused": None if pause is None else shown_pause(pause),
            }
        }

    # -- events ---------------------------------------------------------------------------------

    def note(self, slug: Slug, kind: str, text: str, **data: object) -> None:
        """Add an event about a device, which may be known from its agents only, as far as it has room for it."""
        record = self.records.get(slug)
        device_id = record.device.id if record is not None else device_of(self.placements, slug)
        self.allowance.add(
            at=self.clock.wall(), kind=kind, device_id=device_id, slug=slug, text=text, data=data
        )

    def events(
        self, since: int, limit: int, wanted: EventFilter = EVERYTHING
    ) -> tuple[list[Event], int]:
        """Events in memory after sequence number `since`, oldest first, and the number to ask with
        next."""
        return self.told.after(since, limit, wanted)


def _said_of(before: DeviceRecord | None, record: DeviceRecord) -> tuple[str, str]:
    """Kind and text of the event that tells of a changed wish. An outage that ends with the device is named."""
    if record.presence is Presence.PRESENT:
        return "present", f"device registered ({record.device.address})"
    if record.left is Departure.EXPIRED:
        ill = before.condition if before is not None else None
        was = f"; it was {ill.state.value}: {ill.reason}" if ill is not None else ""
        return "expired", f"the device has left: no sign of life for its whole ttl{was}"
    if record.left is Departure.DISCONNECTED:
        return "absent", "the device has left: its gateway says that it is disconnected"
    return "absent", "the device has left"


def shown_pause(pause: Pause) -> dict[str, object]:
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


def shown_duration(seconds: float | None) -> str | None:
    """As it may be given again: "90s", "1500ms"."""
    if seconds is None:
        return None
    return f"{seconds:.0f}s" if seconds == int(seconds) else f"{seconds * 1000:.0f}ms"

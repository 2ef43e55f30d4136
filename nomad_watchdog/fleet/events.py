"""The events of a fleet: recorded with time and device, and read from one log."""

from __future__ import annotations

from collections.abc import Mapping

from nomad_watchdog.clock import Clock
from nomad_watchdog.events.device_limits import DeviceLimits
from nomad_watchdog.events.log import EVERYTHING, Event, EventFilter, EventLog
from nomad_watchdog.fleet.serializers import device_of
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Placement


class FleetEvents:
    """Adds events to this control plane's own log, and reads those of all replicas."""

    def __init__(
        self,
        own: EventLog,
        clock: Clock,
        records: Mapping[Slug, DeviceRecord],
        placements: Mapping[Slug, tuple[Placement, ...]],
    ) -> None:
        self.own = own
        """The events of this control plane."""
        self.all = own
        """The events of all replicas; those of this control plane while it is the only one."""
        self.limits = DeviceLimits(own, clock)
        """The number of events that each device may cause."""
        self._clock = clock
        self._records = records
        self._placements = placements

    def read_from(self, merged: EventLog) -> None:
        """Read the events of all replicas from this log from now on."""
        self.all = merged

    def note(self, slug: Slug, kind: str, text: str, **data: object) -> None:
        """Record an event of a device if the device's limit permits it. The device may be known from its agents
        only."""
        record = self._records.get(slug)
        device_id = record.device.id if record is not None else device_of(self._placements, slug)
        self.limits.add(
            at=self._clock.wall(), kind=kind, device_id=device_id, slug=slug, text=text, data=data
        )

    def note_fleet(
        self, kind: str, text: str, data: Mapping[str, object] | None = None, incident: str = ""
    ) -> Event:
        """Record an event that is not about one device. `incident`: the ID of the incident it belongs to."""
        return self.own.add(
            at=self._clock.wall(),
            kind=kind,
            device_id="",
            slug=Slug(""),
            text=text,
            data=data or {},
            incident=incident,
        )

    def after(
        self, since: int, limit: int, wanted: EventFilter = EVERYTHING
    ) -> tuple[list[Event], int]:
        """Events in memory after sequence number `since`, oldest first, and the number to continue with."""
        return self.all.after(since, limit, wanted)

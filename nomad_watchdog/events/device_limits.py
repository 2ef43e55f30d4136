"""Limits the events per device: what its agents report is bounded before it is stored.

A device that has used up its events is still reported: the latest event of each subject (verdict, presence,
agent) waits until there is room, so that the last state is always published. What is left out is counted, and
one event states how many there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from nomad_watchdog.clock import Clock
from nomad_watchdog.core import event_merge
from nomad_watchdog.core.rate_limit import Buckets
from nomad_watchdog.events.log import Event, EventLog
from nomad_watchdog.ids import DeviceId, Slug
from nomad_watchdog.model import WallTime

PER_S: Final = 0.1
AT_ONCE: Final = 60
MAX_DEVICES: Final = 100_000
LEFT_OUT: Final = "events.left_out"


class DeviceLimits:
    """Adds the events of devices to a history, at most AT_ONCE per device, and PER_S per second over time."""

    def __init__(self, history: EventLog, clock: Clock) -> None:
        self.history = history
        self.total = 0
        """Events that were left out since the start."""
        self._clock = clock
        self._buckets = Buckets(PER_S, AT_ONCE, MAX_DEVICES)
        self._left_out: dict[Slug, int] = {}
        self._latest: dict[Slug, dict[str, Callable[[], Event]]] = {}
        """Device → subject → publishes the event that waits."""

    def has_room(self, slug: Slug) -> bool:
        """Whether the next event of this device is stored at once."""
        return slug not in self._left_out and self._buckets.left(slug, self._now()) >= 1.0

    def add(
        self,
        *,
        at: WallTime,
        kind: str,
        device_id: str,
        slug: Slug,
        text: str,
        data: Mapping[str, object],
        incident: str = "",
    ) -> Event | None:
        """As `EventLog.add`; None for an event that is left out, or waits."""
        publish = partial(
            self.history.add,
            at=at,
            kind=kind,
            device_id=device_id,
            slug=slug,
            text=text,
            data=data,
            incident=incident,
        )
        if slug not in self._left_out and not self._buckets.take(slug, self._now()):
            return publish()
        about = event_merge.about(kind)
        waiting = self._latest.setdefault(slug, {})
        if about is None or about in waiting:
            self._left_out[slug] = self._left_out.get(slug, 0) + 1
            self.total += 1
        else:
            self._left_out.setdefault(slug, 0)
        if about is not None:
            waiting[about] = publish
        return None

    def settle(self) -> None:
        """Publish what waits, of the devices that have room again; to be called every few seconds."""
        for slug, count in list(self._left_out.items()):
            waiting = self._latest.get(slug, {})
            if self._buckets.left(slug, self._now()) < len(waiting) + 1:
                continue
            self._buckets.spend(slug, len(waiting) + 1, self._now())
            del self._left_out[slug]
            for publish in self._latest.pop(slug, {}).values():
                publish()
            if count:
                self._report(slug, count)

    def forget(self, slug: Slug) -> None:
        """The device's record is gone."""
        self._left_out.pop(slug, None)
        self._latest.pop(slug, None)

    def _report(self, slug: Slug, count: int) -> None:
        last = next(iter(reversed(self.history.of_device(slug))), None)
        self.history.add(
            at=self._clock.wall(),
            kind=LEFT_OUT,
            device_id=DeviceId(last.device_id if last is not None else ""),
            slug=slug,
            text=f"{count} events of this device were left out: at most {AT_ONCE} at once and "
            f"{PER_S * 60:g} per minute are stored",
            data={"count": count},
        )

    def _now(self) -> float:
        return self._clock.monotonic()

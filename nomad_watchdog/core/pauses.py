"""Pauses and maintenance windows: for which devices all actions are paused, and for how long.

A pause does not change the desired state. It only keeps the planner from acting, so that when it ends the next pass does
what it would have done before. Times are wall-clock times, because people plan with them; a clock that jumps makes a
pause begin or end early or late.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Device, DeviceRecord, WallTime


@dataclass(frozen=True, slots=True)
class Target:
    """Selects devices. All given criteria must match; a target without any matches no device."""

    devices: frozenset[str] = frozenset()
    """Device ids; empty = any."""
    agent_class: str = ""
    """"" = any."""
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def only_devices(self) -> bool:
        """Whether it is a list of devices, without a class and labels."""
        return bool(self.devices) and not (self.agent_class or self.labels)

    def matches(self, device: Device) -> bool:
        """Whether this device is selected."""
        if not (self.devices or self.agent_class or self.labels):
            return False
        return (
            (not self.devices or device.id in self.devices)
            and (not self.agent_class or device.agent_class == self.agent_class)
            and all(device.labels.get(key) == value for key, value in self.labels.items())
        )

    def shown(self) -> dict[str, object]:
        """The target as JSON, in the registry and in the API."""
        return {
            "devices": sorted(self.devices),
            "class": self.agent_class,
            "labels": dict(self.labels),
        }


@dataclass(frozen=True, slots=True)
class Pause:
    """All actions for these devices are paused from `begins` to `ends`."""

    id: str
    target: Target
    begins: WallTime
    ends: WallTime | None
    """None = until a user resumes."""
    reason: str
    by: str
    """The user who requested it, as the API knows them."""
    window: bool = False
    """A maintenance window: planned, with an end, and removed by its ID."""

    def is_over(self, now: WallTime) -> bool:
        return self.ends is not None and self.ends <= now

    def is_active(self, now: WallTime) -> bool:
        return self.begins <= now and not self.is_over(now)


def active(pauses: Iterable[Pause], now: WallTime) -> tuple[Pause, ...]:
    """Pauses in force, the longest first: that one is reported for a device with several pauses."""
    found = [pause for pause in pauses if pause.is_active(now)]
    return tuple(sorted(found, key=lambda p: (p.ends is not None, -(p.ends or 0.0), p.id)))


def paused(records: Iterable[DeviceRecord], in_force: Sequence[Pause]) -> dict[Slug, Pause]:
    """Slug → the pause that covers it. `in_force`: as `active` returns them."""
    if not in_force:
        return {}
    # Pauses that name devices are looked up by device id; only the others are checked for every device.
    broad = [at for at, pause in enumerate(in_force) if not pause.target.devices]
    named: dict[str, list[int]] = {}
    for at, pause in enumerate(in_force):
        for device_id in pause.target.devices:
            named.setdefault(device_id, []).append(at)
    found: dict[Slug, Pause] = {}
    for record in records:
        mine = named.get(record.device.id)
        if mine is None and not broad:
            continue
        for at in sorted([*(mine or ()), *broad]):
            if in_force[at].target.matches(record.device):
                found[record.slug] = in_force[at]
                break
    return found


def next_change(pauses: Iterable[Pause], now: WallTime) -> float:
    """When other pauses may be in force than now; infinite = never."""
    moments = [at for p in pauses for at in (p.begins, p.ends) if at is not None and at > now]
    return min(moments, default=float("inf"))


def add(pauses: Sequence[Pause], new: Pause, now: WallTime) -> tuple[Pause, ...]:
    """Add a pause and drop those that are over. A pause with the same target replaces the old one (S5). A window
    replaces another one only if target and times are equal."""
    kept = [pause for pause in pauses if not pause.is_over(now) and not _same(pause, new)]
    return (*kept, new)


def _same(old: Pause, new: Pause) -> bool:
    if old.window != new.window or old.target != new.target:
        return False
    return not new.window or (old.begins, old.ends) == (new.begins, new.ends)


def resume(pauses: Sequence[Pause], target: Target, now: WallTime) -> tuple[Pause, ...]:
    """Remove the pauses of exactly this target. A list of devices is removed from every pause that names only
    devices. Windows stay: they are removed by their id."""
    kept: list[Pause] = []
    for pause in pauses:
        mine = pause.target
        if pause.is_over(now):
            continue
        if pause.window or not (mine == target or (mine.only_devices and target.only_devices)):
            kept.append(pause)
        elif target.only_devices and (left := mine.devices - target.devices):
            kept.append(replace(pause, target=replace(mine, devices=left)))
    return tuple(kept)


def remove(pauses: Sequence[Pause], pause_id: str, now: WallTime) -> tuple[Pause, ...]:
    """Remove the pause with this id, and those that are over."""
    return tuple(p for p in pauses if p.id != pause_id and not p.is_over(now))

"""What `devices import` would change: the difference between a list and the registered devices. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from nomad_watchdog.cli._answers import Fields
from nomad_watchdog.controllers.device_list import ListedDevice
from nomad_watchdog.model import Device
from nomad_watchdog.terminal import cell, clean
from nomad_watchdog.units import parse_duration


@dataclass(slots=True)
class ImportDiff:
    """IDs of devices, each list in its own order."""

    added: list[str] = field(default_factory=list)
    changed: dict[str, list[str]] = field(default_factory=dict)
    """With what changes, in words."""
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    foreign: int = 0
    """Devices that `prune` leaves, because an inventory file lists them."""

    def lines(self) -> Iterator[str]:
        """A line per device that changes, and the numbers."""
        yield from (f"+ {clean(name)}" for name in self.added)
        yield from (f"~ {clean(name)}: {'; '.join(what)}" for name, what in self.changed.items())
        yield from (f"- {clean(name)}" for name in self.removed)
        yield self.summary()

    def summary(self) -> str:
        """The numbers."""
        kept = f", {self.foreign} kept (inventory)" if self.foreign else ""
        return (
            f"{len(self.added)} to add, {len(self.changed)} to change, {len(self.removed)} to remove, "
            f"{self.unchanged} unchanged{kept}"
        )


def compare(
    wanted: Sequence[ListedDevice], registered: Iterable[Fields], *, prune: bool
) -> ImportDiff:
    """`registered`: devices as the API lists them. `prune`: devices that are not listed are removed, but for those of
    inventory files."""
    present = {
        str(one.get("id")): one for one in registered if one.get("presence", "present") == "present"
    }
    diff = ImportDiff()
    for one in wanted:
        before = present.pop(one.device.id, None)
        if before is None:
            diff.added.append(one.device.id)
        elif what := list(_changes(before, one.device)):
            diff.changed[one.device.id] = what
        else:
            diff.unchanged += 1
    for name, before in present.items() if prune else ():
        if before.get("source"):
            diff.foreign += 1
        else:
            diff.removed.append(name)
    return diff


def _changes(before: Fields, after: Device) -> Iterator[str]:
    pairs = (
        ("address", before.get("address"), after.address),
        ("class", before.get("class"), after.agent_class),
        ("labels", before.get("labels") or {}, dict(after.labels)),
        ("ttl", _seconds(before.get("ttl")), after.ttl_s),
    )
    for name, was, is_ in pairs:
        if was != is_:
            yield f"{name} {_shown(was)} -> {_shown(is_)}"


def _seconds(ttl: object) -> float | None:
    try:
        return None if ttl is None else parse_duration(ttl)
    except ValueError:
        return None


def _shown(value: object) -> str:
    if value is None or (isinstance(value, Mapping) and not value):
        return "none"
    return f"{value:g}s" if isinstance(value, float) else cell(value)

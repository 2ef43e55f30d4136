"""A tiny scheduler and registry as values, to run plans against. Not a fake of any server."""

from __future__ import annotations

from dataclasses import replace

from nomad_watchdog.core import presence
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import (
    Device,
    DeviceRecord,
    Epoch,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)

CLASS = "default"
SPEC = "spec-new"
OLD_SPEC = "spec-old"
GOALS = Goals({CLASS: SPEC})


def record(name: str, *, epoch: int = 0, present: bool = True, instance: str = "") -> DeviceRecord:
    device = Device(DeviceId(name), CLASS, "127.0.0.1")
    return DeviceRecord(
        slug=slug_of(device.id),
        device=device,
        presence=Presence.PRESENT if present else Presence.ABSENT,
        generation=1,
        epoch=Epoch(epoch),
        instance=instance,
        changed_at=WallTime(0.0),
        index=1,
    )


def placement(
    name: str,
    epoch: int,
    state: PlacementState = PlacementState.RUNNING,
    *,
    spec: str = SPEC,
    ref: str = "",
) -> Placement:
    return Placement(
        slug=slug_of(DeviceId(name)),
        device_id=DeviceId(name),
        epoch=Epoch(epoch),
        agent_class=CLASS,
        spec_hash=spec,
        state=state,
        ref=ref or f"{name}:{epoch}",
        instances=() if state is PlacementState.DEAD else (f"i-{name}-{epoch}",),
    )


class World:
    """Registry and scheduler together; `apply` does one action, `settle` lets stops finish."""

    def __init__(self, records: list[DeviceRecord], placements: list[Placement]) -> None:
        self.records: dict[Slug, DeviceRecord] = {r.slug: r for r in records}
        self.placements: dict[Slug, tuple[Placement, ...]] = {}
        for p in placements:
            self.placements[p.slug] = (*self.placements.get(p.slug, ()), p)
        self.started: list[tuple[Slug, Epoch]] = []

    def apply(self, action: Action) -> None:
        stored = self.records.get(action.slug)
        if action.kind is ActionKind.START:
            assert stored is not None
            assert stored.presence is Presence.PRESENT
            live = [p for p in self.placements.get(action.slug, ()) if not is_dead(p)]
            assert not live, "S3: started beside a live placement"
            if action.epoch > stored.epoch:
                stored = self.records[action.slug] = presence.advance(stored, action.epoch)
            assert action.epoch == stored.epoch, "S2: a start without its epoch in the registry"
            self.started.append((action.slug, action.epoch))
            new = placement(str(action.device_id), action.epoch)
            self.placements[action.slug] = (*self.placements.get(action.slug, ()), new)
            self.records[action.slug] = presence.bind(stored, new.instances[0])
        else:
            assert action.placement is not None
            if action.kind is ActionKind.REPLACE:
                assert stored is not None
                epoch = Epoch(action.epoch + 1)
                self.records[action.slug] = presence.advance(stored, epoch)
            self._set(action.placement, PlacementState.STOPPING)

    def _set(self, which: Placement, state: PlacementState) -> None:
        self.placements[which.slug] = tuple(
            replace(p, state=state) if p.ref == which.ref and not is_dead(p) else p
            for p in self.placements[which.slug]
        )

    def settle(self) -> None:
        for found in list(self.placements.values()):
            for p in found:
                if p.state is PlacementState.STOPPING:
                    self._set(p, PlacementState.DEAD)

    def live(self, slug: Slug) -> list[Placement]:
        return [p for p in self.placements.get(slug, ()) if not is_dead(p)]


def is_dead(p: Placement) -> bool:
    return p.state is PlacementState.DEAD

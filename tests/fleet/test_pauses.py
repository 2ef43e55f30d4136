"""Planned work raises no alerts: the effect of a pause on verdicts, counts and incidents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.core.pauses import Pause, Target
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import (
    Device,
    Limits,
    Monotonic,
    PresenceRules,
    VerdictState,
    WallTime,
)
from nomad_watchdog.registry.sqlite import SqliteRegistry


class Clock(SystemClock):
    """A clock that a test advances manually."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> Monotonic:
        return Monotonic(1000.0 + self.ahead_s)

    def wall(self) -> WallTime:
        return WallTime(1e9 + self.ahead_s)


async def fleet_of(folder: Path, clock: Clock, names: list[str], site: str) -> Fleet:
    registry = SqliteRegistry(path=folder / "registry.db")
    await registry.initialise()
    fleet = Fleet(registry, Limits(presence=PresenceRules()), clock)
    fleet.records.reset({}, 0)
    wishes = [Device(DeviceId(n), "default", "127.0.0.1", {"site": site}) for n in names]
    await fleet.records.register(wishes)
    fleet.verdicts.judge_all()
    return fleet


async def told(folder: Path, *, paused: bool) -> tuple[Fleet, list[dict[str, Any]]]:
    """Twelve devices of a site get no agent for an hour; returns the fleet and its events."""
    clock = Clock()
    fleet = await fleet_of(folder, clock, [f"d{n}" for n in range(12)], "north")
    if paused:
        target = Target(labels={"site": "north"})
        await fleet.presence.pauses.add(Pause("p1", target, clock.wall(), None, "", ""))
    clock.ahead_s = 3600.0
    fleet.verdicts.judge_all()
    clock.ahead_s += 60.0
    fleet.verdicts.judge_all()
    await fleet.registry.close()
    events = [event.shown() for event in fleet.events.after(0, 1000)[0]]
    return fleet, events


async def test_a_paused_device_is_told_and_alerts_nobody(tmp_path: Path) -> None:
    """The changed verdict is an event with the pause's id; it is in no count that alerts, takes no
    place in a roll-out, and twelve of them are no incident."""
    fleet, events = await told(tmp_path, paused=True)
    changed = [event for event in events if event["kind"] == "verdict.unwatched"]

    assert len(changed) == 12
    assert {event["data"]["paused"] for event in changed} == {"p1"}
    assert fleet.verdicts.paused_counts() == {VerdictState.UNWATCHED: 12}
    assert fleet.agents.unready() == 0
    assert not [event for event in events if event["kind"].startswith("incident")]


async def test_without_a_pause_the_same_is_an_incident(tmp_path: Path) -> None:
    """What the pause suppresses would have been an incident of the whole site."""
    fleet, events = await told(tmp_path, paused=False)

    assert fleet.agents.unready() == 12
    assert not fleet.verdicts.paused_counts()
    assert [event for event in events if event["kind"].startswith("incident")]
    assert not [event for event in events if "paused" in event.get("data", {})]


async def test_a_pause_ends_with_the_clock_even_when_it_is_set_back(tmp_path: Path) -> None:
    """A wall clock that jumps moves the end, but never keeps the device paused for ever."""
    clock = Clock()
    fleet = await fleet_of(tmp_path, clock, ["d"], "north")
    slug = slug_of(DeviceId("d"))
    end = WallTime(clock.wall() + 100.0)
    await fleet.presence.pauses.add(Pause("p", Target(frozenset({"d"})), clock.wall(), end, "", ""))
    assert fleet.presence.is_resting(slug)
    clock.ahead_s = 101.0
    assert not fleet.presence.is_resting(slug)
    clock.ahead_s = 50.0
    assert fleet.presence.is_resting(slug)
    clock.ahead_s = 100.0
    assert not fleet.presence.resting()
    await fleet.registry.close()

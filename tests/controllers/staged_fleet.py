"""A fleet that is rolled out in steps: real planner, controller and registry; agents and scheduler are values."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from nomad_watchdog.controllers.rollout import RolloutController
from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.core import planner
from nomad_watchdog.core.actions import Action, ActionKind, ActionOutcome
from nomad_watchdog.core.goals import Goals, no_words
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.core.rollout_steps import Strategy, complete
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import (
    AgentSpec,
    AgentState,
    Device,
    DeviceRecord,
    Epoch,
    Limits,
    Placement,
    PlacementState,
    Presence,
    WallTime,
)
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import Leases, SoleOwner
from tests.fleet.test_event_recorder import Site

CLASS = "default"
WINDOW = 3

Behaviour = Callable[[str, Slug], AgentState | None]
"""(version, device) → what its agent reports; None = it is not ready."""


def well(_version: str, _slug: Slug) -> AgentState | None:
    return AgentState.OK


@dataclass
class StagedFleet:
    """One class of devices. `tick` is a second: a poll, a pass, and a report of each agent."""

    registry: SqliteRegistry
    strategy: Strategy
    behaviour: Behaviour = well
    leases: Leases = field(default_factory=SoleOwner)
    metrics: Metrics = field(default_factory=Metrics)
    started: list[tuple[Slug, str]] = field(default_factory=list)
    """Devices whose agents were started, and the versions."""
    refused: dict[str, str] = field(default_factory=dict)
    states: dict[str, PlacementState] = field(default_factory=dict)
    """By version: the state that its placements stay in, if they do not run."""
    in_place: bool = False
    """The scheduler replaces agents in place."""

    def __post_init__(self) -> None:
        self.strategy = replace(self.strategy, steps=complete(self.strategy.steps))
        self.site = Site(self.registry)
        self.fleet = self.site.fleet
        self.fleet.configure(
            Limits(replace_at_once=WINDOW, replace_fraction=0.0, report_stale_s=30.0)
        )
        self.fleet.readiness.event = asyncio.Event()
        self.fleet.readiness.event.set()
        self.configured = self.spec("1")

    def spec(self, version: str) -> AgentSpec:
        return AgentSpec(CLASS, version, f"h{version}")

    def add(self, count: int, **labels: str) -> list[Slug]:
        """So many more devices, without agents."""
        records = dict(self.fleet.records)
        found = []
        for number in range(len(records), len(records) + count):
            name = DeviceId(f"d{number}")
            slug = slug_of(name)
            device = Device(name, CLASS, "127.0.0.1", dict(labels))
            records[slug] = DeviceRecord(
                slug, device, Presence.PRESENT, 1, Epoch(0), "", WallTime(0.0), 1
            )
            found.append(slug)
        self.fleet.records.reset(records, 1)
        return found

    async def begin(self, count: int = 20) -> None:
        """Version 1 on all devices, well for longer than `well_before`."""
        if not self.fleet.records:
            self.add(count)
        self.restart_control_plane("1")
        await self.until(lambda: self.state() == "complete", 60)
        for _ in range(35):  # no device is silent for too long
            self.site.clock.now += 20.0
            await self.report()

    def restart_control_plane(self, version: str = "") -> None:
        """A new controller, configured with this version ("" = as before)."""
        self.configured = self.spec(version) if version else self.configured
        self.rollouts = self.controller(self.leases)
        self.requests = RolloutRequests(self.fleet, self.rollouts, no_words, lambda: None)

    def controller(self, leases: Leases) -> RolloutController:
        """Another replica's controller, on the same registry."""
        specs = {CLASS: self.configured}
        strategies = {CLASS: self.strategy}
        return RolloutController(self.fleet, specs, leases, self.metrics, strategies)

    def configure(self, version: str) -> None:
        """The running controller is configured with this version."""
        self.configured = self.spec(version)
        self.rollouts.configure({CLASS: self.configured})

    # -- time -----------------------------------------------------------------------------------

    async def tick(self) -> None:
        self.site.clock.now += 1.0
        await self.rollouts.poll()
        self.rollouts.refuse(self.refused)
        for action in self.plan().actions:
            self._apply(action)
        await self.report()

    async def until(self, holds: Callable[[], bool], most_s: int = 400) -> None:
        """Tick until it holds; AssertionError after so many seconds."""
        for _ in range(most_s):
            if holds():
                return
            await self.tick()
        raise AssertionError(f"not within {most_s} s: {self.requests.item(CLASS)}")

    async def report(self) -> None:
        for slug, version in self.versions().items():
            state = self.behaviour(version, slug)
            if state is not None:
                await self.site.say(slug, state)
        self.fleet.verdicts.judge_all()

    # -- the scheduler --------------------------------------------------------------------------

    def plan(self) -> planner.Plan:
        goals = Goals(
            {CLASS: self.rollouts.specs()[CLASS].spec_hash},
            trials=self.rollouts.trials(self._prepared()),
            given_up=self.rollouts.given_up(),
        )
        agents = self.fleet.agents
        readiness = Readiness(
            agents.unready(),
            agents.is_stuck,
            self.rollouts.soaking(),
            self.rollouts.halted(),
            ready=agents.has_ready_agent,
        )
        return planner.plan(
            dict(self.fleet.records),
            self.fleet.placements,
            goals,
            self.fleet.limits,
            readiness=readiness,
        )

    def _prepared(self) -> set[str]:
        """Specs on trial that the scheduler is prepared for, as `PreparedClasses` asks it."""
        specs = self.rollouts.trial_specs().values()
        return {spec.spec_hash for spec in specs} - self.refused.keys()

    def _apply(self, action: Action) -> None:
        record = self.fleet.records[action.slug]
        if action.kind is ActionKind.START:
            spec = self.rollouts.spec_for(record)
            assert spec is not None
            self._place(record, spec, action.epoch)
        elif action.kind is ActionKind.REPLACE and self.in_place:
            spec = self.rollouts.spec_for(record, action.move)
            assert spec is not None
            self._place(record, spec, Epoch(action.epoch + 1))
        else:
            epoch = Epoch(action.epoch + 1)
            self.site.change(action.slug, epoch=epoch, instance="")
            self.die(action.slug)
        self.rollouts.action_ended(action, ActionOutcome.OK, 0.0)

    def _place(self, record: DeviceRecord, spec: AgentSpec, epoch: Epoch) -> None:
        instance = f"{record.slug}:{epoch}"
        self.site.change(record.slug, epoch=epoch, instance=instance)
        self.fleet.placements[record.slug] = (
            Placement(
                record.slug, record.device.id, epoch, CLASS, spec.spec_hash,
                self.states.get(spec.version, PlacementState.RUNNING), instance, (instance,),
                f"n{_number(record.slug) % 4}",
            ),
        )  # fmt: skip
        self.started.append((record.slug, spec.version))

    def die(self, slug: Slug) -> None:
        """The agent of a device ends."""
        (old,) = self.fleet.placements[slug]
        self.fleet.placements[slug] = (replace(old, state=PlacementState.DEAD, instances=()),)

    # -- what a test looks at -------------------------------------------------------------------

    def versions(self) -> dict[Slug, str]:
        """Device → the version of its live agent."""
        return {
            slug: one.spec_hash.removeprefix("h")
            for slug, (one,) in self.fleet.placements.items()
            if one.state is PlacementState.RUNNING
        }

    def with_version(self, version: str) -> set[Slug]:
        return {slug for slug, one in self.versions().items() if one == version}

    def state(self) -> str:
        return str(self.requests.item(CLASS)["state"])

    def step(self) -> str:
        return str(self.requests.item(CLASS)["step"])

    def kinds(self) -> list[str]:
        return [
            e.kind
            for e in self.fleet.events.own.recent()
            if e.kind.startswith("rollout") and e.kind != "rollout.changed"
        ]


def _number(slug: Slug) -> int:
    return hashlib.sha256(slug.encode()).digest()[0]

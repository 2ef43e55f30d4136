"""Class versions in the registry: what is stored, which replica judges, and which follow."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from nomad_watchdog.controllers import rollout_state
from nomad_watchdog.controllers.rollout import READ_EVERY_S, RolloutController
from nomad_watchdog.ids import Shard, Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Limits
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import FIRST, Leases, SoleOwner, Term
from tests.fleet.test_event_recorder import Site

GIVEN_UP = "nomad_watchdog_rollouts_given_up 1.0"


class Onlooker(SoleOwner):
    """Holds no shard."""

    def terms(self) -> Mapping[Shard, Term]:
        return {}


@dataclass
class OneOfTwo(SoleOwner):
    """Holds one shard."""

    first: Shard = field(default_factory=lambda: Shard(0))

    def terms(self) -> Mapping[Shard, Term]:
        return {self.first: FIRST}


@dataclass
class Stage:
    """A fleet of six devices that the test moves from version to version."""

    site: Site
    template: Path
    slugs: list[Slug]
    epoch: int = 1
    metrics: Metrics = field(default_factory=Metrics)

    def spec(self, version: str) -> AgentSpec:
        return AgentSpec("default", version, f"h{version}", template=str(self.template))

    def rollouts(self, version: str, leases: Leases | None = None) -> RolloutController:
        wished = {"default": self.spec(version)}
        return RolloutController(self.site.fleet, wished, leases or SoleOwner(), self.metrics)

    async def run(self, version: str, *, restarts: int = 0) -> None:
        """Set all agents to this version, ready."""
        fleet = self.site.fleet
        for slug in self.slugs:
            (old,) = fleet.placements[slug]
            fleet.placements[slug] = (replace(old, spec_hash=f"h{version}", restarts=restarts),)
            await self.site.say(slug)
        fleet.verdicts.judge_all()

    def events(self) -> list[str]:
        return [e.kind for e in self.site.fleet.events.own.recent() if e.kind.startswith("rollout")]

    async def lasts(self, rollouts: RolloutController) -> None:
        await rollouts.poll()
        self.site.clock.now += 11.0
        for slug in self.slugs:
            await self.site.say(slug)
        await rollouts.poll()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    site = Site(registry)
    site.fleet.limits = Limits(soak_s=10.0, soak_deaths=3)
    site.fleet.readiness.event = asyncio.Event()
    site.fleet.readiness.event.set()
    template = tmp_path / "agent.nomad.hcl"
    template.write_text("job {}")
    yield Stage(site, template, site.add(6, "n"))
    await registry.close()


async def test_the_judge_goes_back_and_the_others_follow(stage: Stage) -> None:
    """Version 1 lasts and is stored. With version 2 all agents are restarted during the soak: the judge puts version 1
    in force immediately and another replica some seconds later, also when either is created again. A third version is
    in force as configured."""
    await stage.run("1")
    await stage.lasts(stage.rollouts("1"))
    judge, other = stage.rollouts("2"), stage.rollouts("2", Onlooker())
    assert judge.halted() == {"default"}  # nothing has been read yet
    await other.poll()
    await stage.run("2")
    await judge.poll()
    assert (judge.halted(), judge.soaking(), judge.specs()["default"].version) == (set(), 6, "2")
    await stage.run("2", restarts=1)
    await judge.poll()
    first = replace(stage.spec("1"), text=stage.template.read_text())
    assert judge.specs()["default"] == first
    assert stage.events() == ["rollout.rolled_back"]
    assert GIVEN_UP in stage.metrics.render().decode()
    assert other.specs()["default"].version == "2"
    stage.site.clock.now += READ_EVERY_S
    for follower in (other, stage.rollouts("2"), stage.rollouts("2", Onlooker())):
        await follower.poll()
        assert follower.specs()["default"] == first
    third = stage.rollouts("3")
    await third.poll()
    assert (third.specs()["default"].version, third.halted()) == ("3", set())


async def test_a_replica_that_judges_nothing_counts_what_soaks(stage: Stage) -> None:
    """A replica that does not judge counts the agents in their soak like the judge, and continues when they have
    lasted; a judge that loses shard 0 counts them too."""
    await stage.run("1")
    await stage.lasts(stage.rollouts("1"))
    leases = OneOfTwo()
    seen = {"judge": stage.rollouts("2", leases), "other": stage.rollouts("2", Onlooker())}
    for one in seen.values():
        await one.poll()
    await stage.run("2")
    for one in seen.values():
        await one.poll()
        assert one.soaking() == 6
    leases.first = Shard(1)
    stage.site.clock.now += 11.0
    for slug in stage.slugs:
        await stage.site.say(slug)
    for one in seen.values():
        assert await one.poll()
        assert one.soaking() == 0
    assert stage.events() == []


async def test_the_template_of_the_proven_version_is_kept(stage: Stage) -> None:
    """The way back has the text that the template had, although its file has another one now."""
    await stage.run("1")
    await stage.lasts(stage.rollouts("1"))
    stage.template.write_text("job { }")
    judge = stage.rollouts("2")
    await stage.run("2")
    await judge.poll()
    await stage.run("2", restarts=1)
    await judge.poll()
    assert (judge.halted(), judge.specs()["default"].version) == (set(), "1")
    assert judge.specs()["default"].text == "job {}"


async def test_the_agent_file_of_the_proven_version_is_kept(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is that of the control plane that proved the version, or that ran it last; after an upgrade the agents of that
    version are still started with it. An undo returns to the file of the version before."""

    def upgrade(file: str) -> None:
        monkeypatch.setattr(rollout_state.agent_zipapp, "checksum", lambda: file)

    upgrade("first")
    await stage.run("1")
    await stage.lasts(stage.rollouts("1"))
    upgrade("second")
    again = stage.rollouts("1")
    await again.poll()
    assert (again.specs()["default"].agent_file, again.state("default").agent_file) == (
        "",
        "second",
    )
    upgrade("third")
    judge = stage.rollouts("2")
    await judge.poll()
    await stage.run("2")
    await judge.poll()
    await stage.run("2", restarts=1)
    await judge.poll()
    assert judge.specs()["default"].version == "1"
    assert judge.specs()["default"].agent_file == "second"
    proved = judge.state("default").proved(stage.spec("2"))
    assert (proved.agent_file, proved.undone(stage.spec("2"), "").agent_file) == ("third", "second")


async def test_without_its_template_there_is_no_way_back(stage: Stage) -> None:
    """If the template of the previous version was too long to be stored and has a different text now, the roll-out
    stops where it is, and the event says so; a later version that lasts completes."""
    stage.template.write_bytes(base64.b64encode(os.urandom(20_000)))
    await stage.run("1")
    await stage.lasts(stage.rollouts("1"))
    stage.template.write_text("job { }")
    judge = stage.rollouts("2")
    await stage.run("2")
    await judge.poll()
    await stage.run("2", restarts=1)
    await judge.poll()
    assert (judge.halted(), judge.specs()["default"].version) == ({"default"}, "2")
    mended = stage.rollouts("3")
    await stage.run("3")
    await stage.lasts(mended)
    assert stage.events() == ["rollout.halted", "rollout.done"]
    assert GIVEN_UP not in stage.metrics.render().decode()


async def test_the_first_version_has_nothing_to_go_back_to(stage: Stage) -> None:
    """Restarts of agents of the very first version cause no rollback and no halt."""
    judge = stage.rollouts("1")
    for restarts in range(5):
        await stage.run("1", restarts=restarts)
        await judge.poll()
        stage.site.clock.now += 1.0
    assert (judge.halted(), judge.specs()["default"].version, stage.events()) == (set(), "1", [])


async def test_without_a_soak_nothing_is_judged_or_kept(stage: Stage) -> None:
    """With `rollout.soak` at 0 no class is ever halted, and no document is read or written."""
    stage.site.fleet.limits = Limits()
    judge = stage.rollouts("1")
    stage.site.fleet.records.registry = None  # type: ignore[assignment]  # whoever asks it fails
    await stage.run("1")
    await judge.poll()
    assert (judge.on, judge.halted(), judge.soaking()) == (False, set(), 0)

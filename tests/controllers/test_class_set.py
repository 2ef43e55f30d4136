"""The class specs in force, as the replicas of one registry decide, follow and report them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from nomad_watchdog.controllers.class_set import (
    READ_EVERY_S,
    ClassSetController,
    OwnClasses,
    unchanged,
)
from nomad_watchdog.errors import TransientError
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import SoleOwner
from tests.fleet.test_event_recorder import Site


def specs(version: str, *more: str) -> dict[str, AgentSpec]:
    return {
        name: AgentSpec(name, version, f"h{version}", settings={"version": version})
        for name in ("a", *more)
    }


@dataclass
class Leases(SoleOwner):
    """Leases of one replica; the test sets which other replicas exist."""

    config: str = ""

    async def announce(self, config: str) -> None:
        self.config = config


class Part:
    """One replica."""

    def __init__(self, site: Site, name: str, own: OwnClasses) -> None:
        self.leases = Leases(replica=name)
        self.metrics = Metrics()
        self.classes = ClassSetController(site.fleet, self.leases, self.metrics, own)

    async def look(self, others: list[Part]) -> None:
        self.leases.others = [one.leases.config for one in others]
        await self.classes.poll()

    @property
    def versions(self) -> dict[str, str]:
        return {name: spec.version for name, spec in self.classes.specs().items()}

    @property
    def reports(self) -> bool:
        return "nomad_watchdog_config_differs 1.0" in self.metrics.render().decode()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise()
    yield Site(registry)
    await registry.close()


def events(site: Site) -> list[str]:
    return [one.kind for one in site.fleet.events.own.recent() if one.kind.startswith("classes")]


async def test_a_follower_takes_all_but_its_own_places(site: Site) -> None:
    """A second replica with the older set follows the newer one, class by class, with its own addresses in it, and
    reports the difference once. When it is configured with the newer set, the report ends."""
    first = Part(site, "r1", OwnClasses(specs("1")))
    await first.look([])
    newer = Part(site, "r2", OwnClasses(specs("2", "b")))
    await newer.look([first])
    assert events(site) == ["classes.in_force"]

    def place(spec: AgentSpec) -> AgentSpec:
        return replace(spec, agent_config={"api": ["here"]})

    first.leases.others = [newer.leases.config]
    await first.classes.configure(OwnClasses(specs("1"), place=place), 0.0)
    for _ in range(3):
        site.clock.now += READ_EVERY_S
        await first.look([newer])
        await newer.look([first])
    assert first.versions == newer.versions == {"a": "2", "b": "2"}
    assert all(spec.agent_config == {"api": ["here"]} for spec in first.classes.specs().values())
    assert first.classes.differences() == ("a (version 2 → 1)", "b (removed)")
    assert (first.reports, newer.reports) == (True, False)
    assert events(site) == ["classes.in_force", "classes.differ"]
    status = site.fleet.views.status()["classes_in_force"]
    assert isinstance(status, dict)
    assert (status["number"], status["by"]) == (2, "r2")
    await first.classes.configure(OwnClasses(specs("2", "b")), 0.0)
    assert (first.classes.differs, first.reports) == (False, False)
    assert events(site) == ["classes.in_force", "classes.differ", "classes.agree"]


async def test_nothing_is_decided_before_the_others_are_known(site: Site) -> None:
    """A replica that does not know the others yet follows the set in force, and decides when it knows them."""
    first = Part(site, "r1", OwnClasses(specs("1")))
    await first.look([])
    second = Part(site, "r2", OwnClasses(specs("2")))
    second.leases.others = None  # type: ignore[assignment]
    await second.classes.start(0.0)
    assert (second.versions, second.reports) == ({"a": "1"}, False)
    await second.look([first])
    assert second.versions == {"a": "2"}


async def test_an_unreadable_class_keeps_what_is_in_force(site: Site) -> None:
    """A replica that lacks a template file changes nothing and reports no difference: it takes the class from the
    registry, unless it brought the class into force itself. Once it can read the file, it behaves normally."""
    first = Part(site, "r1", OwnClasses(specs("1", "b")))
    await first.look([])
    lacking = OwnClasses(specs("1"), {"b": "no such file"})
    second = Part(site, "r2", lacking)
    await second.look([first])
    assert second.versions == {"a": "1", "b": "1"}
    assert (second.classes.unreadable(), second.classes.differs) == ({}, False)
    await first.classes.configure(lacking, 0.0)
    assert first.versions == {"a": "1"}
    assert first.classes.unreadable() == {"b": "no such file"}
    assert not await first.classes.on_files_read(specs("1"), {"b": "no such file"})
    assert await first.classes.on_files_read(specs("1", "b"), {})
    assert (first.versions, first.classes.unreadable()) == ({"a": "1", "b": "1"}, {})
    assert events(site) == []


async def test_an_outage_of_the_registry_changes_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last set that was read stays in force, the reason is in the status, and decisions are made afterwards."""
    part = Part(site, "r1", OwnClasses(specs("1")))
    await part.look([])
    real = site.fleet.registry.document

    async def broken(_name: str) -> None:
        raise TransientError("no leader")

    monkeypatch.setattr(site.fleet.registry, "document", broken)
    await part.classes.configure(OwnClasses(specs("2"), place=unchanged), 0.0)
    assert (part.versions, part.classes.problem) == ({"a": "1"}, "no leader")
    monkeypatch.setattr(site.fleet.registry, "document", real)
    await part.look([])
    assert (part.versions, part.classes.problem) == ({"a": "2"}, "")


async def test_a_command_looks_without_deciding(site: Site) -> None:
    """A command uses the set that would be in force if a replica started with its configuration, and writes nothing."""
    first = Part(site, "r1", OwnClasses(specs("1")))
    await first.look([])
    command = Part(site, "plan", OwnClasses(specs("2")))
    command.leases.others = [first.leases.config]
    await command.classes.read_once(apply=False)
    assert command.versions == {"a": "2"}
    site.clock.now += READ_EVERY_S
    await first.look([])
    assert first.versions == {"a": "1"}
    await command.classes.read_once(apply=True)
    back = Part(site, "plan", OwnClasses(specs("1")))
    back.leases.others = ["another"]
    await back.classes.read_once(apply=False)
    assert back.versions == {"a": "1"}, "nobody who runs is configured with what is in force"

"""rollout.upgrades = "wait": a version that comes with another control plane begins when an operator says so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nomad_watchdog.controllers.rollout_words import announced
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy
from nomad_watchdog.errors import PreconditionError
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.controllers.staged_fleet import CLASS, StagedFleet
from tests.controllers.test_staged_rollout import rolling

WAITS = Strategy(steps=(RolloutStep(count=3, soak_s=20.0),), defers_upgrades=True)


class ChangedFleet(StagedFleet):
    """The user changes a setting with each spec "VERSION-CHANGE"; its version is "VERSION"."""

    def spec(self, version: str) -> AgentSpec:
        return replace(super().spec(version), version=version.partition("-")[0])


@pytest.mark.parametrize("what", ["resume", "promote"])
async def test_an_upgrade_waits_until_it_is_resumed(registry: SqliteRegistry, what: str) -> None:
    """Nothing is replaced, new devices get the proven version, and plan and state say why; a restart changes nothing.
    Once it is resumed or promoted it begins at its first step."""
    fleet = await rolling(registry, WAITS)
    new = fleet.add(2)
    for _ in range(5):
        await fleet.tick()
    assert dict.fromkeys(new, "1") == dict(fleet.started)
    fleet.restart_control_plane()
    for _ in range(30):
        await fleet.tick()
    assert len(fleet.with_version("1")) == 22
    assert (fleet.state(), fleet.step()) == ("paused", "step 1 of 2")
    (plan,) = announced(fleet.rollouts, lambda _name, _hash: "version 1 → 2")
    assert plan["text"] == (
        "class default: roll-out in steps, step 1 of 2, it waits for an operator, because the control plane was "
        "upgraded (rollout.upgrades): `nomad-watchdog rollouts resume default` begins it; version 1 → 2"
    )
    await fleet.requests.control(CLASS, what, "me")
    await fleet.until(lambda: fleet.state() == "soaking")
    assert len(fleet.with_version("2")) == 3
    assert fleet.step() == "step 1 of 2"
    await fleet.until(lambda: fleet.state() == "complete")


async def test_a_change_of_the_same_version_does_not_wait(registry: SqliteRegistry) -> None:
    """Only another version of the control plane is an upgrade; a class with a version of its own does not wait."""
    fleet = ChangedFleet(registry, WAITS)
    await fleet.begin()
    fleet.restart_control_plane("1-memory")
    await fleet.until(lambda: fleet.state() == "soaking")
    await fleet.until(lambda: fleet.state() == "complete")
    fleet.strategy = replace(fleet.strategy, defers_upgrades=False)
    fleet.restart_control_plane("2-memory")
    await fleet.until(lambda: fleet.state() == "soaking")


async def test_a_change_with_an_upgrade_waits_with_it_and_is_not_lost(
    registry: SqliteRegistry,
) -> None:
    """The user's change comes with the upgrade, and waits with it. A later change waits, too; once the version was
    resumed, changes of it begin by themselves."""
    fleet = ChangedFleet(registry, WAITS)
    await fleet.begin()
    for version in ("2-memory", "2-probe"):
        fleet.restart_control_plane(version)
        for _ in range(10):
            await fleet.tick()
        assert fleet.state() == "paused"
    await fleet.requests.control(CLASS, "resume", "me")
    await fleet.until(lambda: fleet.state() == "soaking")
    assert len(fleet.with_version("2-probe")) == 3
    fleet.configure("2-cpu")
    await fleet.until(lambda: len(fleet.with_version("2-cpu")) == 3)
    await fleet.until(lambda: fleet.state() == "complete")


async def test_an_upgrade_that_is_not_wanted_can_be_aborted(registry: SqliteRegistry) -> None:
    """Nothing was replaced for it, and the next version waits again."""
    fleet = await rolling(registry, WAITS)
    await fleet.until(lambda: fleet.kinds() != [])
    await fleet.requests.control(CLASS, "abort", "me")
    for _ in range(5):
        await fleet.tick()
    assert fleet.state() == "aborted"
    fleet.restart_control_plane("3")
    for _ in range(5):
        await fleet.tick()
    assert (fleet.state(), fleet.started) == ("paused", [])


async def test_before_it_is_stored_a_request_is_to_be_repeated(registry: SqliteRegistry) -> None:
    """It is displayed as paused as soon as the control plane has started; a request before its devices were heard is
    refused with the advice to try again."""
    fleet = await rolling(registry, WAITS)
    await fleet.rollouts.read()
    assert fleet.state() == "paused"
    with pytest.raises(PreconditionError, match="version 2 has not begun yet; try again in some"):
        await fleet.requests.control(CLASS, "resume", "me")
    await fleet.tick()
    await fleet.requests.control(CLASS, "resume", "me")
    await fleet.until(lambda: fleet.state() == "soaking")

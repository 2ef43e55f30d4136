"""What people read of roll-outs: one sentence for each device, and one line for each class."""

from __future__ import annotations

import pytest

from nomad_watchdog.api.status_page import _rendered
from nomad_watchdog.core.allowed_times import parse
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy
from nomad_watchdog.ids import Slug
from nomad_watchdog.registry.sqlite import SqliteRegistry
from tests.controllers.staged_fleet import CLASS, StagedFleet
from tests.controllers.test_staged_rollout import breaks, rolling

STEPS = (
    RolloutStep(count=3, soak_s=20.0),
    RolloutStep(pause=True),
    RolloutStep(fraction=0.5, soak_s=10.0),
)


def sentences(fleet: StagedFleet) -> dict[str, set[Slug]]:
    """Sentence → the devices that it is said of."""
    found: dict[str, set[Slug]] = {}
    for slug in fleet.fleet.records:
        found.setdefault(fleet.requests.of_device(slug), set()).add(slug)
    return found


async def test_a_device_that_waits_knows_its_step(registry: SqliteRegistry) -> None:
    """Each device says whether it has the version, and else which step it waits for and what that step waits for. When
    all have it there is nothing to say."""
    fleet = await rolling(registry, Strategy(steps=STEPS))
    await fleet.until(lambda: fleet.state() == "soaking")
    tried = fleet.with_version("2")
    said = sentences(fleet)
    assert {len(slugs) for slugs in said.values()} == {3, 7, 10}
    (words,) = (text for text, slugs in said.items() if slugs == tried)
    assert words.startswith("the agent runs version 2 on trial (step 1 of 4: 3 of 3 ")
    (words,) = (text for text, slugs in said.items() if len(slugs) == 7)
    assert words.startswith(
        "the device keeps version 1 until step 3 of 4 of the roll-out of version 2 (now step 1 of 4: "
    )
    assert any("until step 4 of 4" in text for text in said)

    await fleet.until(lambda: fleet.state() == "paused")
    item = fleet.requests.item(CLASS)
    assert item["next"] == "nothing until `nomad-watchdog rollouts promote default`"
    assert (item["ok"], item["failed"], item["waiting"]) == (3, 0, 17)
    assert any(
        "(now step 2 of 4: a pause that waits for an operator; nothing until `nomad-watchdog "
        in text
        for text in sentences(fleet)
    )
    await fleet.requests.control(CLASS, "promote", "me")
    assert any("as soon as the window has room" in text for text in sentences(fleet))
    await fleet.until(lambda: fleet.state() == "complete")
    assert set(sentences(fleet)) == {""}


async def test_a_device_says_who_paused_its_roll_out(registry: SqliteRegistry) -> None:
    """Devices whose turn it is name the user who paused the roll-out, and the command that continues it."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=5, soak_s=20.0),)))
    await fleet.until(lambda: len(fleet.with_version("2")) == 3)
    await fleet.requests.control(CLASS, "pause", "eve")
    then = "nothing until `nomad-watchdog rollouts resume default`"
    assert fleet.requests.item(CLASS)["next"] == then
    waits = f"the device waits for version 2 in step 1 of 2: paused by eve; {then}"
    assert len(sentences(fleet)[waits]) == 2


async def test_a_device_names_the_time_that_it_waits_for(registry: SqliteRegistry) -> None:
    """Outside of the allowed times a device whose turn it is says when the roll-out continues."""
    fleet = await rolling(registry, Strategy(steps=STEPS, allow=(parse("00:00-00:01"),)))
    fleet.site.clock.now += (12 * 3600 - fleet.site.clock.wall() % 86_400) % 86_400
    for _ in range(3):
        await fleet.tick()
    waits = "the device waits for version 2 in step 1 of 4: outside of rollout.allow (00:00-00:01); continues in 7"
    (found,) = (slugs for text, slugs in sentences(fleet).items() if text.startswith(waits))
    assert len(found) == 3


@pytest.mark.parametrize("back", [True, False])
async def test_a_device_says_that_its_version_was_given_up(
    registry: SqliteRegistry, back: bool
) -> None:
    """The devices that have it go back or keep it, the others stay where they are, and all name the reason."""
    strategy = Strategy(steps=STEPS, abort_min=3, abort_share=1.0, back=back)
    fleet = await rolling(registry, strategy, behaviour=breaks())
    given_up = {"aborted", "halted"}
    for _ in range(60):  # up to the poll that gives it up, before the pass after it
        await fleet.rollouts.poll()
        if fleet.state() in given_up:
            break
        await fleet.tick()
    tried, said = fleet.with_version("2"), sentences(fleet)
    assert (len(tried), len(said)) == (3, 2)
    for text, slugs in said.items():
        assert text.startswith("version 2 was given up (3 of 3 devices are not well since ")
        end = "goes back to version 1 as soon as the window has room" if back else "keeps it"
        assert (end in text) is (slugs == tried)
    then = "nothing until another version is configured or `nomad-watchdog rollouts retry default`"
    assert fleet.requests.item(CLASS)["next"] == then


async def test_the_page_has_a_line_for_each_roll_out(registry: SqliteRegistry) -> None:
    """Class, version, step, state, counts and what happens next, and for each device its sentence; without roll-outs
    neither."""
    fleet = await rolling(registry, Strategy(steps=STEPS))
    await fleet.until(lambda: fleet.state() == "soaking")
    page = await _rendered(fleet.fleet, fleet.requests)
    cells = ("default", "2", "soaking", "step 1 of 4", "3", "0", "17")
    line = "".join(f"<td><bdi>{cell}</bdi></td>" for cell in cells)
    assert f"<tr>{line}" in page
    assert page.count("the device keeps version 1 until step") == 17
    assert page.count("the agent runs version 2 on trial") == 3
    await fleet.requests.control(CLASS, "promote-all", "me")
    await fleet.until(lambda: fleet.state() == "complete")
    page = await _rendered(fleet.fleet, fleet.requests)
    assert "Roll-out" not in page

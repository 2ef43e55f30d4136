"""Roll-outs in steps, on a whole fleet in virtual time: order, judgement, requests, restarts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nomad_watchdog.controllers.rollout_requests import RolloutRequests
from nomad_watchdog.core.allowed_times import parse
from nomad_watchdog.core.goals import no_words
from nomad_watchdog.core.rollout_steps import RolloutStep, Strategy
from nomad_watchdog.errors import NotFoundError, PreconditionError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentState, Epoch, PlacementState, VerdictState
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.replicas.leases import SoleOwner
from tests.controllers.staged_fleet import CLASS, WINDOW, StagedFleet
from tests.controllers.test_rollout import Onlooker

STEPS = (
    RolloutStep(count=3, soak_s=20.0),
    RolloutStep(pause=True),
    RolloutStep(fraction=0.5, soak_s=10.0),
)


async def rolling(registry: SqliteRegistry, strategy: Strategy, **more: object) -> StagedFleet:
    """20 devices with version 1, and version 2 configured."""
    fleet = StagedFleet(registry, strategy)
    await fleet.begin()
    fleet.restart_control_plane("2")
    for name, value in more.items():
        setattr(fleet, name, value)
    fleet.started.clear()
    return fleet


async def test_steps_come_one_after_the_other(registry: SqliteRegistry) -> None:
    """Three devices first, then nothing until it is promoted, then half, then all. No more devices than the window has
    room are ever without a ready agent, and each device is replaced once."""
    fleet = await rolling(registry, Strategy(steps=STEPS))
    unready = []

    def watch(state: str) -> bool:
        unready.append(fleet.fleet.agents.unready())
        return fleet.state() == state

    await fleet.until(lambda: watch("soaking"))
    assert len(fleet.with_version("2")) == 3
    await fleet.until(lambda: watch("paused"))
    for _ in range(50):
        await fleet.tick()
    assert len(fleet.with_version("2")) == 3
    await fleet.requests.control(CLASS, "promote", "me")
    await fleet.until(lambda: fleet.step().startswith("step 4"))
    assert len(fleet.with_version("2")) == 10
    await fleet.until(lambda: watch("complete"))
    assert len(fleet.with_version("2")) == 20
    assert max(unready) <= WINDOW
    assert len(fleet.started) == len({slug for slug, _ in fleet.started}) == 20
    assert fleet.kinds() == ["rollout.started", *["rollout.step"] * 2, "rollout.done"]
    past = fleet.requests.history(CLASS)["items"]
    assert isinstance(past, list)
    assert [(one["version"], one["outcome"]) for one in past] == [("2", "done")]


async def test_no_start_joins_an_unproven_version(registry: SqliteRegistry) -> None:
    """While a step has its turn, new devices and devices whose agents are gone, with the new version or without it,
    start with the proven one."""
    fleet = await rolling(
        registry, Strategy(steps=(RolloutStep(count=3, soak_s=100.0),), abort_share=1.0)
    )
    await fleet.until(lambda: fleet.state() == "soaking")
    tried, old = min(fleet.with_version("2")), min(fleet.with_version("1"))
    fleet.started.clear()
    new = fleet.add(2)
    fleet.die(tried)
    fleet.die(old)
    await fleet.tick()
    assert sorted(fleet.started) == sorted([(slug, "1") for slug in (*new, tried, old)])
    await fleet.until(lambda: fleet.state() == "complete")
    assert len(fleet.with_version("2")) == 22


async def test_an_agent_that_is_starting_is_not_replaced_again(registry: SqliteRegistry) -> None:
    """Neither while its step goes on nor while it is paused: replacements in progress finish."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=2, soak_s=100.0),)))
    fleet.states = {"2": PlacementState.STARTING}
    for _ in range(10):
        await fleet.tick()
    await fleet.requests.control(CLASS, "pause", "me")
    for _ in range(10):
        await fleet.tick()
    assert [version for _, version in fleet.started] == ["2", "2"]
    fleet.restart_control_plane()
    for _ in range(10):
        await fleet.tick()
    assert len(fleet.started) == 2


async def test_an_agent_that_another_replica_has_started_is_not_waited_for(
    registry: SqliteRegistry,
) -> None:
    """A replica stops an agent for the roll-out, another one starts the next with the proven version, and that ends: it
    is an agent that is gone, and joins no unproven version."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=1, soak_s=100.0),)))
    await fleet.rollouts.poll()
    await fleet.rollouts.poll()
    (move,) = fleet.plan().actions
    fleet._apply(move)
    record = fleet.fleet.records[move.slug]
    fleet._place(record, fleet.spec("1"), Epoch(move.epoch + 1))
    fleet.die(move.slug)
    start = fleet.rollouts.spec_for(fleet.fleet.records[move.slug])
    assert start is not None
    assert start.version == "1"


async def test_time_without_a_look_is_no_soak(registry: SqliteRegistry) -> None:
    """Agents that have become ready since the last look, however long ago that was, begin their soak."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=2, soak_s=20.0),)))
    await fleet.until(lambda: len(fleet.with_version("2")) == 2)
    fleet.site.clock.now += 25.0
    await fleet.report()
    await fleet.tick()
    assert fleet.step().startswith("step 1")
    await fleet.until(lambda: fleet.step().startswith("step 2"), 22)


async def test_a_request_concerns_the_version_that_is_configured(registry: SqliteRegistry) -> None:
    """A request that comes before the roll-out of a new version has begun does not change the one before it."""
    fleet = await rolling(registry, Strategy(steps=STEPS))
    await fleet.until(lambda: fleet.state() == "soaking")
    fleet.configure("3")
    for what in ("pause", "promote"):
        with pytest.raises(PreconditionError, match="version 3 has not begun yet"):
            await fleet.requests.control(CLASS, what, "me")
    await fleet.tick()
    await fleet.requests.control(CLASS, "pause", "me")
    assert fleet.state() == "paused"


def breaks(*slugs: Slug, version: str = "2") -> object:
    """Agents of a version report these devices as offline (none given: all devices)."""

    def behaviour(now: str, slug: Slug) -> AgentState:
        bad = now == version and (not slugs or slug in slugs)
        return AgentState.OFFLINE if bad else AgentState.OK

    return behaviour


async def test_a_version_under_which_devices_turn_bad_goes_back(registry: SqliteRegistry) -> None:
    """Devices that were well, and are offline with the new version, end the roll-out in its first step. Their outages
    count with the roll-out, not as outages, until the version is taken back."""
    fleet = await rolling(
        registry, Strategy(steps=STEPS, abort_min=3, abort_share=1.0), behaviour=breaks()
    )
    seen: set[Slug] = set()

    def is_over() -> bool:
        bad = {
            slug
            for slug in fleet.fleet.records
            if fleet.fleet.verdicts.last(slug)[0].state is VerdictState.OFFLINE
        }
        # A poll learns of agents that the pass after the last one has started.
        assert fleet.state() != "running" or bad & seen <= fleet.fleet.trials.rollouts.keys()
        seen.update(bad)
        return fleet.state() == "aborted"

    await fleet.until(is_over)
    assert "3 of 3 devices are not well since they have it, and 0 of 17" in str(
        fleet.requests.item(CLASS)["reason"]
    )
    await fleet.until(lambda: not fleet.with_version("2"))
    assert len(seen) == 3
    assert not fleet.fleet.recorder.incidents.opened()
    assert fleet.kinds() == ["rollout.started", "rollout.rolled_back"]
    await fleet.tick()
    assert not fleet.fleet.trials.rollouts


async def test_agents_on_trial_do_not_repair_until_their_step_has_passed(
    registry: SqliteRegistry,
) -> None:
    """Also an agent that reports before its scheduler lists it; agents of the proven version repair as ever."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=3, soak_s=5.0),)))
    site, held = fleet.fleet, fleet.fleet.trials.holds_repairs
    await fleet.until(lambda: fleet.state() == "soaking")
    tried, old = fleet.with_version("2"), fleet.with_version("1")

    def holds(slug: Slug, more: int = 0) -> bool:
        epoch = Epoch(site.records[slug].epoch + more)
        return held(slug, epoch, site.placements[slug])

    assert all(holds(slug) for slug in tried)
    assert holds(min(tried), 1)
    assert not any(holds(slug) for slug in old)
    await fleet.until(lambda: fleet.step().startswith("step 2"))
    await fleet.tick()
    assert not any(holds(slug) for slug in tried)
    fleet.strategy = replace(fleet.strategy, repairs=True)
    fleet.restart_control_plane()
    await fleet.until(lambda: len(fleet.with_version("2")) > 6)
    assert not any(holds(slug) for slug in fleet.with_version("2"))


async def test_a_node_that_does_not_answer_holds_no_step_up(registry: SqliteRegistry) -> None:
    """A device of the step whose agent is on a lost node keeps it, and the step passes without it; it is replaced when
    the node is back."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=20, soak_s=5.0),)))
    lost = min(fleet.with_version("1"))
    (one,) = fleet.fleet.placements[lost]
    fleet.fleet.placements[lost] = (replace(one, state=PlacementState.LOST),)
    await fleet.until(lambda: len(fleet.with_version("2")) == 19)
    await fleet.until(lambda: fleet.state() == "complete")
    fleet.fleet.placements[lost] = (one,)
    await fleet.until(lambda: len(fleet.with_version("2")) == 20)


async def test_without_steps_any_more_no_outage_counts_with_the_roll_out(
    registry: SqliteRegistry,
) -> None:
    """When the steps are removed from the configuration in the middle, the version is rolled out without them, and
    outages count as any other."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=3, soak_s=500.0),)))
    await fleet.until(lambda: bool(fleet.fleet.trials.rollouts))
    fleet.rollouts.configure({CLASS: fleet.configured}, {})
    assert not fleet.fleet.trials.rollouts
    assert not fleet.fleet.trials.unrepaired
    await fleet.until(lambda: len(fleet.with_version("2")) == 20)


async def test_halt_leaves_what_is_there(registry: SqliteRegistry) -> None:
    """With `on_abort = "halt"` the devices tried keep the bad version, and no other device gets it."""
    strategy = Strategy(steps=STEPS, back=False)
    fleet = await rolling(registry, strategy, behaviour=breaks())
    await fleet.until(lambda: fleet.state() == "halted")
    tried = fleet.with_version("2")
    for _ in range(3):
        fleet.restart_control_plane()
        for _ in range(10):
            await fleet.tick()
    assert fleet.with_version("2") == tried
    assert 0 < len(tried) <= 3
    await fleet.requests.control(CLASS, "undo", "me")
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)


async def test_an_outage_of_all_devices_says_nothing(registry: SqliteRegistry) -> None:
    """When devices without the new version turn bad just as those with it, the version is not given up; nor when a
    device was bad before its agent got the version."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=3, soak_s=30.0),)))
    await fleet.until(lambda: fleet.state() == "soaking")
    fleet.behaviour = lambda _version, _slug: AgentState.OFFLINE
    for _ in range(10):
        await fleet.tick()
    fleet.behaviour = lambda _version, _slug: AgentState.OK
    await fleet.until(lambda: fleet.state() == "complete")


async def test_a_device_that_was_bad_before_is_no_evidence(registry: SqliteRegistry) -> None:
    """Six of twenty devices are offline before, and with the new version: it is rolled out."""
    fleet = StagedFleet(registry, Strategy(steps=(RolloutStep(count=20, soak_s=30.0),)))
    await fleet.begin()
    dead = set(list(fleet.fleet.records)[:6])
    fleet.behaviour = lambda _version, slug: AgentState.OFFLINE if slug in dead else AgentState.OK
    await fleet.tick()
    fleet.restart_control_plane("2")
    await fleet.until(lambda: fleet.state() == "complete")
    assert len(fleet.with_version("2")) == 20
    assert not dead & fleet.fleet.trials.rollouts.keys()


async def test_agents_that_never_get_ready_end_it_at_the_deadline(registry: SqliteRegistry) -> None:
    """The window is not what ends it, and a pause of any length does not count."""
    strategy = Strategy(steps=(RolloutStep(count=2, soak_s=5.0),), progress_deadline_s=60.0)
    fleet = await rolling(
        registry, strategy, behaviour=lambda version, _: None if version == "2" else AgentState.OK
    )
    await fleet.until(lambda: len(fleet.with_version("2")) == 2)
    await fleet.requests.control(CLASS, "pause", "me")
    fleet.site.clock.now += 1_000.0
    await fleet.tick()
    await fleet.requests.control(CLASS, "resume", "me")
    for _ in range(50):
        await fleet.tick()
    assert fleet.state() == "running"
    await fleet.until(lambda: fleet.state() == "aborted", 30)
    assert "no agent became ready for 60 s" in str(fleet.requests.item(CLASS)["reason"])
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)


async def test_agents_that_die_end_it(registry: SqliteRegistry) -> None:
    """Agents that were ready and end by themselves before their step has passed."""
    strategy = Strategy(steps=(RolloutStep(count=10, soak_s=60.0),), abort_share=0.3, abort_min=100)
    fleet = await rolling(registry, strategy)
    await fleet.until(lambda: fleet.state() == "soaking")
    for slug in sorted(fleet.with_version("2"))[:2]:
        fleet.die(slug)
        await fleet.tick()
    assert fleet.state() in ("soaking", "running")
    fleet.die(min(fleet.with_version("2")))
    await fleet.until(lambda: fleet.state() == "aborted", 3)
    assert "agents of 3 of 10 devices ended too soon" in str(fleet.requests.item(CLASS)["reason"])


async def test_a_spec_that_the_scheduler_refuses_ends_at_the_deadline(
    registry: SqliteRegistry,
) -> None:
    """No agent is replaced for it, and the reason has the words of the scheduler."""
    strategy = Strategy(steps=(RolloutStep(count=2),), progress_deadline_s=20.0)
    fleet = await rolling(registry, strategy, refused={"h2": "no such template"})
    await fleet.until(lambda: fleet.state() == "aborted", 40)
    assert "no such template" in str(fleet.requests.item(CLASS)["reason"])
    assert not fleet.started


@pytest.mark.parametrize("every", [3, 4, 5, 7])
async def test_it_survives_a_new_leader_at_any_moment(registry: SqliteRegistry, every: int) -> None:
    """A control plane that is restarted every few seconds ends where one that runs on does: step after step, each
    device replaced once, except for replacements that a restart interrupts."""
    fleet = await rolling(
        registry, Strategy(steps=(RolloutStep(count=3, soak_s=4.0), RolloutStep(fraction=0.5)))
    )
    seconds = 0

    def is_over() -> bool:
        nonlocal seconds
        seconds += 1
        if seconds % every == 0:
            fleet.restart_control_plane()
        tried = len(fleet.with_version("2"))
        if fleet.step().startswith("step 1"):
            assert tried <= 3
        if fleet.step().startswith("step 2"):
            assert tried <= 10
        return fleet.state() == "complete"

    await fleet.until(is_over)
    assert len(fleet.with_version("2")) == 20
    assert fleet.kinds() == ["rollout.started", *["rollout.step"] * 2, "rollout.done"]


async def test_a_bad_version_goes_back_under_a_new_leader_too(registry: SqliteRegistry) -> None:
    """The devices that were bad before the step are known to the next leader."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=6, soak_s=100.0),)))
    await fleet.until(lambda: fleet.state() == "soaking")
    fleet.restart_control_plane()
    fleet.behaviour = breaks()  # type: ignore[assignment]
    await fleet.until(lambda: fleet.state() == "aborted", 10)
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)


async def test_after_an_abort_nothing_starts_with_the_version(registry: SqliteRegistry) -> None:
    """Within one pass, with a full window and agents that die; `retry` goes on at the step where it was, and `undo`
    after its end returns to the version before."""
    fleet = await rolling(
        registry, Strategy(steps=(RolloutStep(count=3, soak_s=3.0), RolloutStep(fraction=0.5)))
    )
    await fleet.until(
        lambda: fleet.step().startswith("step 2") and len(fleet.with_version("2")) > 4
    )
    for slug in sorted(fleet.with_version("2"))[:2]:
        fleet.die(slug)
    await fleet.requests.control(CLASS, "abort", "me")
    fleet.started.clear()
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)
    assert {version for _, version in fleet.started} == {"1"}
    with pytest.raises(PreconditionError, match="given up already: aborted by me"):
        await fleet.requests.control(CLASS, "abort", "me")

    await fleet.requests.control(CLASS, "retry", "me")
    assert fleet.step().startswith("step 2")
    await fleet.until(lambda: fleet.state() == "complete")
    await fleet.requests.control(CLASS, "undo", "me")
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)
    assert fleet.state() == "aborted"
    outcomes = fleet.requests.history(CLASS)["items"]
    assert isinstance(outcomes, list)
    assert [one["outcome"] for one in outcomes] == ["aborted", "done", "undone"]
    with pytest.raises(PreconditionError, match="given up already"):
        await fleet.requests.control(CLASS, "undo", "me")


async def test_another_version_restarts_it_against_the_proven_one(
    registry: SqliteRegistry,
) -> None:
    """A change in the middle begins at step 1 again: devices with the version in between get the proven one or the
    newest, and in the end all have the newest."""
    fleet = await rolling(
        registry, Strategy(steps=(RolloutStep(count=3, soak_s=5.0), RolloutStep(fraction=0.5)))
    )
    await fleet.until(lambda: len(fleet.with_version("2")) >= 6)
    fleet.configure("3")
    await fleet.until(lambda: len(fleet.with_version("3")) == 3)
    assert fleet.step().startswith("step 1")
    await fleet.until(lambda: not fleet.with_version("2"))
    assert len(fleet.with_version("3")) <= 10
    await fleet.until(lambda: fleet.state() == "complete")
    assert len(fleet.with_version("3")) == 20


async def test_promote_all_skips_pauses_and_soaks(registry: SqliteRegistry) -> None:
    """A roll-out with a pause and a soak of 1,000 s is complete within a minute."""
    fleet = await rolling(registry, Strategy(steps=(*STEPS, RolloutStep(soak_s=1_000.0))))
    await fleet.tick()
    await fleet.requests.control(CLASS, "promote-all", "me")
    await fleet.until(lambda: fleet.state() == "complete", 60)


async def test_it_goes_site_by_site(registry: SqliteRegistry) -> None:
    """One value of the label after the other; devices without it last."""
    fleet = StagedFleet(registry, Strategy(steps=(RolloutStep(by="site", soak_s=5.0),)))
    sites = [*fleet.add(5, site="b"), *fleet.add(5, site="a"), *fleet.add(5)]
    order = {slug: "ba-"[place // 5] for place, slug in enumerate(sites)}
    await fleet.begin()
    fleet.restart_control_plane("2")
    fleet.started.clear()
    await fleet.until(lambda: fleet.state() == "complete")
    assert "".join(order[slug] for slug, _ in fleet.started) == "a" * 5 + "b" * 5 + "-" * 5


async def test_outside_of_the_allowed_times_nothing_is_replaced(registry: SqliteRegistry) -> None:
    """What was replaced stays, the state says when it goes on, and an abort does not wait for it."""
    fleet = await rolling(registry, Strategy(steps=STEPS, allow=(parse("00:00-00:01"),)))
    # the test's clock: move to noon, UTC
    fleet.site.clock.now += (12 * 3600 - fleet.site.clock.wall() % 86_400) % 86_400
    for _ in range(5):
        await fleet.tick()
    assert (fleet.state(), fleet.started) == ("waiting", [])
    item = fleet.requests.item(CLASS)
    assert item["reason"] == "outside of rollout.allow (00:00-00:01)"
    assert str(item["next"]).startswith("continues in 7")
    fleet.site.clock.now += 12 * 3600 - fleet.site.clock.wall() % 43_200
    await fleet.until(lambda: len(fleet.with_version("2")) == 3, 30)
    fleet.site.clock.now += 3600.0
    await fleet.requests.control(CLASS, "abort", "me")
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)


async def test_what_is_not_possible_is_said(registry: SqliteRegistry) -> None:
    """Each request that makes no sense is refused with its reason, and changes nothing."""
    fleet = StagedFleet(registry, Strategy(steps=STEPS))
    await fleet.begin()
    for what, why in (
        ("promote", "has no roll-out in steps in progress"),
        ("pause", "has no roll-out in steps in progress"),
        ("abort", "has no roll-out in progress; `undo` returns"),
        ("retry", "was not given up"),
        ("undo", "no version before 1 is known"),
    ):
        with pytest.raises(PreconditionError, match=why):
            await fleet.requests.control(CLASS, what, "me")
    with pytest.raises(NotFoundError, match="no agent class 'x'; known: default"):
        await fleet.requests.control("x", "pause", "me")
    fleet.restart_control_plane("2")
    await fleet.tick()
    with pytest.raises(PreconditionError, match="is not paused"):
        await fleet.requests.control(CLASS, "resume", "me")


async def test_fewer_steps_than_were_passed(registry: SqliteRegistry) -> None:
    """If steps are removed in the middle, the last one begins anew: no device gets its turn by that alone."""
    steps = (RolloutStep(count=2), RolloutStep(count=3), RolloutStep(count=4, soak_s=500.0))
    fleet = await rolling(registry, Strategy(steps=steps))
    await fleet.until(lambda: fleet.step().startswith("step 3") and fleet.state() == "soaking")
    fleet.strategy = replace(fleet.strategy, steps=(steps[0], RolloutStep(soak_s=500.0)))
    fleet.rollouts.configure({CLASS: fleet.configured}, {CLASS: fleet.strategy})
    fleet.strategy = replace(fleet.strategy, steps=(RolloutStep(count=5, soak_s=500.0),))
    fleet.restart_control_plane()
    for _ in range(20):
        await fleet.tick()
    assert (len(fleet.with_version("2")), fleet.step()) == (5, "step 1 of 1")


async def test_until_it_is_back_a_bad_version_repairs_nothing(registry: SqliteRegistry) -> None:
    """While more devices than the window has room wait for the way back, they are not repaired, and their outages count
    with the roll-out."""
    fleet = await rolling(
        registry, Strategy(steps=(RolloutStep(count=12, soak_s=60.0),)), behaviour=breaks()
    )
    fleet.fleet.configure(replace(fleet.fleet.limits, replace_at_once=12))
    await fleet.until(lambda: len(fleet.with_version("2")) == 12)
    fleet.fleet.configure(replace(fleet.fleet.limits, replace_at_once=2))
    await fleet.until(lambda: fleet.state() == "aborted")
    waiting = 0
    while bad := fleet.with_version("2"):
        waiting = max(waiting, len(bad))
        for slug in bad:
            record = fleet.fleet.records[slug]
            placements = fleet.fleet.placements[slug]
            assert fleet.fleet.trials.holds_repairs(slug, record.epoch, placements)
            assert fleet.fleet.trials.of(slug)
        await fleet.tick()
    assert waiting > 2


@pytest.mark.parametrize("state", [PlacementState.STARTING, PlacementState.RESTARTING])
async def test_agents_that_never_run_end_it_at_the_deadline(
    registry: SqliteRegistry, state: PlacementState
) -> None:
    """An image that can't be fetched, and an agent that its scheduler restarts again and again."""
    strategy = Strategy(steps=(RolloutStep(count=2),), progress_deadline_s=30.0)
    fleet = await rolling(registry, strategy, states={"2": state})
    await fleet.until(lambda: fleet.state() == "aborted", 60)
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)


async def test_what_another_replica_replaces_did_not_end_by_itself(
    registry: SqliteRegistry,
) -> None:
    """Agents on trial whose epochs go up, without an action of this replica, are no evidence against the version."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=6, soak_s=60.0),)))
    await fleet.until(lambda: fleet.state() == "soaking")
    for slug in sorted(fleet.with_version("2"))[:4]:
        fleet.site.change(slug, epoch=Epoch(fleet.fleet.records[slug].epoch + 1), instance="")
        fleet.die(slug)
        await fleet.tick()
    assert fleet.requests.item(CLASS)["died"] == 0
    await fleet.until(lambda: fleet.state() == "complete")


async def test_in_place_a_turn_ends_with_the_replacement(registry: SqliteRegistry) -> None:
    """Where a scheduler replaces agents in place, a device is not on its way for ever: an agent that is not ready for a
    while long after that does not end the roll-out."""
    strategy = Strategy(steps=(RolloutStep(count=4, soak_s=100.0),), progress_deadline_s=20.0)
    fleet = await rolling(registry, strategy, in_place=True)
    await fleet.until(lambda: fleet.state() == "soaking")
    for _ in range(40):
        await fleet.tick()
    shy = min(fleet.with_version("2"))
    fleet.behaviour = lambda _version, slug: None if slug == shy else AgentState.OK
    for _ in range(15):
        await fleet.tick()
    fleet.behaviour = lambda _version, _slug: AgentState.OK
    await fleet.until(lambda: fleet.state() == "complete")


async def test_the_next_leader_goes_on_with_the_soak(registry: SqliteRegistry) -> None:
    """A replica that followed all the time loses at most what is not stored."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=3, soak_s=100.0),)))
    standby, leases = fleet.controller(Onlooker()), SoleOwner()
    for _ in range(60):
        await fleet.tick()
        await standby.poll()
    fleet.rollouts, other = fleet.controller(leases), fleet.rollouts
    del other
    standby._leases = leases
    fleet.rollouts = standby
    fleet.requests = RolloutRequests(fleet.fleet, standby, no_words, lambda: None)
    await fleet.until(lambda: fleet.step().startswith("step 2"), 70)


async def test_promote_passes_one_site_at_a_time(registry: SqliteRegistry) -> None:
    """In the last step, too: the sites after it keep their soaks."""
    fleet = StagedFleet(registry, Strategy(steps=(RolloutStep(by="site", soak_s=500.0),)))
    for site in "abc":
        fleet.add(3, site=site)
    await fleet.begin()
    fleet.restart_control_plane("2")
    await fleet.until(lambda: len(fleet.with_version("2")) == 3)
    await fleet.requests.control(CLASS, "promote", "me")
    for _ in range(60):
        await fleet.tick()
    assert (len(fleet.with_version("2")), fleet.state()) == (6, "soaking")
    assert fleet.step() == "step 1 of 1 (site=b)"


async def test_a_version_that_comes_again_begins_again(registry: SqliteRegistry) -> None:
    """Version 2, back to version 1 in the middle, and version 2 again: at its first step."""
    steps = (RolloutStep(count=2), RolloutStep(count=5, soak_s=500.0))
    fleet = await rolling(registry, Strategy(steps=steps))
    await fleet.until(lambda: fleet.step().startswith("step 2"))
    fleet.configure("1")
    await fleet.until(lambda: fleet.state() == "complete")
    await fleet.until(lambda: len(fleet.with_version("1")) == 20)
    fleet.configure("2")
    await fleet.until(lambda: fleet.step() != "")
    assert fleet.step().startswith("step 1")


async def test_other_limits_in_the_middle_send_no_device_back(registry: SqliteRegistry) -> None:
    """A reload that changes only the strategy replaces no agent before the progress was read again."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=4, soak_s=500.0),)))
    await fleet.until(lambda: fleet.state() == "soaking")
    fleet.started.clear()
    strategy = replace(fleet.strategy, abort_min=9)
    fleet.rollouts.configure({CLASS: fleet.configured}, {CLASS: strategy})
    assert not fleet.plan().actions
    for _ in range(5):
        await fleet.tick()
    assert not fleet.started


async def test_a_new_process_knows_nothing_at_first_and_sends_no_device_back(
    registry: SqliteRegistry,
) -> None:
    """After a restart the documents are read before the records, and agents report later: until then nothing is
    replaced, and then devices with the version and without it count as before."""
    fleet = await rolling(registry, Strategy(steps=(RolloutStep(count=6, soak_s=500.0),)))
    await fleet.until(lambda: fleet.state() == "soaking")
    records, placements = dict(fleet.fleet.records), dict(fleet.fleet.placements)
    again = StagedFleet(registry, fleet.strategy)
    again.site.clock.now = fleet.site.clock.now
    again.restart_control_plane("2")
    again.fleet.readiness.event.clear()
    await again.rollouts.poll()
    assert again.state() == "waiting"
    again.fleet.records.reset(records, 1)
    again.fleet.placements.update(placements)
    assert not again.plan().actions
    again.fleet.readiness.event.set()
    for _ in range(5):
        await again.tick()
    assert not again.started
    again.behaviour = lambda _version, _slug: AgentState.OFFLINE
    for _ in range(5):
        await again.tick()
    assert again.state() == "soaking", "all devices are offline: the version is not the cause"
    again.behaviour = breaks()  # type: ignore[assignment]
    await again.until(lambda: again.state() == "aborted", 10)

"""An agent counts as gone only on a listing that was begun after its record was known (S8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.acceptance import AcceptanceKind
from nomad_watchdog.core.actions import Action, ActionKind
from nomad_watchdog.core.planner import NO_STOPS
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.fleet.listing_freshness import ListingFreshness
from nomad_watchdog.fleet.reconcile_loop import NoLoop
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, AgentState, DeviceRecord, Epoch, Limits, Report
from tests.core.world import placement, record
from tests.simulation.fakes import Cluster, FakeRegistry, FakeScheduler, Store

BOUND = record("cam", epoch=3, instance="i-1")


def start(of: DeviceRecord, epoch: int) -> Action:
    return Action(ActionKind.START, of.slug, of.device.id, "", Epoch(epoch))


def test_s8_a_listing_under_way_is_too_old() -> None:
    """A record that is learned while a listing is in progress blocks the next epoch until another
    listing."""
    fresh = ListingFreshness()
    fresh.begins()
    assert fresh.learned([BOUND]) == {BOUND.slug}
    fresh.listed(None)
    assert fresh.premature(start(BOUND, 4))
    fresh.begins()
    fresh.listed(None)
    assert not fresh.premature(start(BOUND, 4))


def test_s8_a_partial_listing_tells_of_its_own_devices_only() -> None:
    """A listing of other devices does not cover this one."""
    fresh = ListingFreshness()
    fresh.learned([BOUND])
    fresh.begins()
    fresh.listed({record("other").slug})
    assert fresh.is_behind(BOUND.slug)
    fresh.begins()
    fresh.listed({BOUND.slug})
    assert not fresh.is_behind(BOUND.slug)


def test_s8_a_rival_makes_what_was_listed_old_once() -> None:
    """A listing from before the rival was seen, or in progress then, may show the instance that it
    replaces."""
    fresh = ListingFreshness()
    fresh.learned([BOUND])
    fresh.begins()
    fresh.listed(None)
    fresh.begins()
    assert not fresh.is_behind(BOUND.slug)
    assert fresh.rivals(BOUND.slug, "i-2")
    fresh.listed(None)
    assert fresh.is_behind(BOUND.slug)
    assert not fresh.rivals(BOUND.slug, "i-2")
    fresh.begins()
    fresh.listed({BOUND.slug})
    assert not fresh.is_behind(BOUND.slug)
    assert not fresh.rivals(BOUND.slug, "i-2")
    assert fresh.rivals(BOUND.slug, "i-3")


def test_a_new_device_waits_for_no_listing() -> None:
    """A device that was never placed starts at once; a repetition of its own epoch does not."""
    fresh = ListingFreshness()
    new = record("new")
    assert fresh.learned([new]) == set()
    assert not fresh.premature(start(new, 1))
    fresh.learned([BOUND])
    assert fresh.premature(start(BOUND, 3))


@given(st.lists(st.sampled_from(["learn", "begin", "list", "forget"]), max_size=30))
def test_s8_never_fresh_without_a_listing_begun_after(steps: list[str]) -> None:
    """In any order of steps, fresh means that a listing was begun after the last change, and has
    arrived."""
    fresh = ListingFreshness()
    epoch = 0
    begun_after = came = True
    for step in steps:
        if step == "learn":
            epoch += 1
            fresh.learned([record("cam", epoch=epoch)])
            begun_after = came = False
        elif step == "begin":
            fresh.begins()
            begun_after = True
        elif step == "list":
            fresh.listed(None)
            came = begun_after
        else:
            fresh.forget({BOUND.slug})
        assert fresh.is_behind(BOUND.slug) is not came


async def test_s3_an_epoch_that_another_replica_committed_is_not_started_beside_the_old_agent() -> (
    None
):
    """The old agent runs, and the listing is older and shows none: the next epoch, which another
    replica's replacement has just committed, waits for a listing begun later."""
    store, cluster = Store(), Cluster()
    store.initialise("test")
    registry = FakeRegistry(store)
    fleet = Fleet(registry, Limits(), SystemClock())
    spec = AgentSpec(BOUND.device.agent_class, "1", "h")
    scheduler = FakeScheduler(cluster)
    reconciler = Reconciler(fleet, scheduler, {spec.agent_class: spec}, Metrics())
    await scheduler.prepare([spec])
    await reconciler.informer.read()  # shows no agent yet
    (old,) = await registry.commit([replace(BOUND, epoch=Epoch(5), instance="", index=0)])
    assert old is not None
    await scheduler.ensure(old, Epoch(5), spec)
    await registry.commit([replace(old, epoch=Epoch(6))])
    await reconciler.follower.read()

    def queued() -> list[ActionKind]:
        reconciler.reconcile()
        return [action.kind for _, action in reconciler.queue.take_nowait(9)]

    assert [a.epoch for a in reconciler.plan_builder.make(NO_STOPS).actions] == [6]
    assert queued() == []
    await reconciler.informer.read()
    assert queued() == [ActionKind.RETIRE]


class Behind(NoLoop):
    """A loop whose listing is as old as the test specifies."""

    def __init__(self, *, behind: bool, first: bool) -> None:
        self.behind, self.first = behind, first

    def is_behind(self, _slug: Slug) -> bool:
        return self.behind

    def is_new_rival(self, _slug: Slug, _instance: str) -> bool:
        return self.first


async def judged(
    *, behind: bool, first: bool = False, bound: str = "i-new", says: str = ""
) -> AcceptanceKind:
    """The result for a report of the only listed instance, or of `says`, while the registry has
    `bound`."""
    store = Store()
    store.initialise("test")
    fleet = Fleet(FakeRegistry(store), Limits(), SystemClock())
    (stored,) = await fleet.records.commit([replace(BOUND, instance=bound, index=0)])
    assert stored is not None
    fleet.records.learn([stored])
    fleet.attach(Behind(behind=behind, first=first))
    old = placement("cam", 3)
    fleet.apply_placements({old.slug: (old,)})
    report = Report(
        BOUND.device.id, BOUND.slug, Epoch(3), says or old.instances[0], 1, ready=True, state=AgentState.OK,
        was_ready=True, misses=0, confirmed=False, reason="", listen="", version="1",
    )  # fmt: skip
    return (await fleet.reports.receive(report)).kind


async def test_s1_an_old_listing_binds_no_instance_back() -> None:
    """The listed instance replaces the bound one on a young listing, and has to wait on an old
    one."""
    assert await judged(behind=False) is AcceptanceKind.ACCEPTED
    assert await judged(behind=True) is AcceptanceKind.UNSURE


async def test_s8_an_old_listing_refuses_no_instance() -> None:
    """An instance that the scheduler started in place of the accepted one waits until a younger
    listing shows it."""
    bound = placement("cam", 3).instances[0]
    late: dict[str, Any] = {"behind": False, "bound": bound, "says": "i-late"}
    assert await judged(first=True, **late) is AcceptanceKind.UNSURE
    assert await judged(first=False, **late) is AcceptanceKind.REFUSED

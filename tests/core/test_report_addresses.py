"""Which addresses agents receive, and which agents depend on a replica that is gone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.actions import ActionKind, Move
from nomad_watchdog.core.planner import plan
from nomad_watchdog.core.report_addresses import MOST, Reachability, is_at, living, stranded
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Limits, PlacementState
from nomad_watchdog.schedulers.agent_document import addressed, api_of
from tests.core.world import GOALS, OLD_SPEC, SPEC, World, placement, record

URLS = [f"http://10.0.0.{number}:9670" for number in range(1, 5)]
FILE = "/artifacts/watchdog-agent.pyz"
NARROW = Limits(replace_at_once=1, replace_fraction=0.0)

urls = st.sampled_from(URLS)
states = st.sampled_from(list(PlacementState))
ways = st.fixed_dictionaries(
    {
        "state": states,
        "source": st.one_of(st.just(""), urls.map(lambda url: url + FILE)),
        "api": st.lists(urls, max_size=3, unique=True).map(tuple),
        "spec_hash": st.sampled_from([SPEC, OLD_SPEC]),
    }
)
fleets = st.lists(st.tuples(ways, st.booleans()), max_size=6)


def world_of(fleet: list) -> tuple[World, frozenset[str]]:
    """Devices with one placement each at the registry's epoch, and those whose reports are missing."""
    names = [f"device-{number}" for number in range(len(fleet))]
    records = [record(name, epoch=1, instance="seen") for name in names]
    found = [
        replace(placement(name, 1), **way) for name, (way, _) in zip(names, fleet, strict=True)
    ]
    silent = {
        slug_of(DeviceId(name)) for name, (_, quiet) in zip(names, fleet, strict=True) if quiet
    }
    return World(records, found), frozenset(silent)


@given(st.lists(st.sampled_from([*URLS, "https://10.0.0.9:9670", ""]), max_size=20), urls)
def test_our_own_address_comes_first_and_the_order_does_not_depend_on_the_input(
    others: list[str], own: str
) -> None:
    """Every replica lists the same other addresses in the same order, each once, and never less secure ones."""
    found = living(own, others)
    assert found[0] == own
    assert list(found[1:]) == sorted(set(found[1:]))
    assert found == living(own, reversed(others))
    assert all(one.startswith("http://") for one in found)
    assert len(living(own, [f"{URLS[0]}{n}" for n in range(20)])) == MOST


@settings(deadline=None)
@given(fleets, st.frozensets(urls))
def test_only_agents_that_depend_on_a_replica_that_is_gone_are_replaced_for_it(
    fleet: list, there: frozenset[str]
) -> None:
    """An agent is never replaced if the replicas are unknown, if its reports arrive, or if it may run on a lost node;
    an agent that depends on a missing replica is replaced whatever the roll-out's window."""
    world, silent = world_of(fleet)
    made = plan(
        world.records, world.placements, replace(GOALS, reach=Reachability(there, silent)), NARROW
    )  # fmt: skip
    replaced = {action.slug for action in made.actions if action.move is Move.STRANDED}
    waiting = {
        PlacementState.PENDING,
        PlacementState.STARTING,
        PlacementState.RESTARTING,
    }
    for slug, (only,) in world.placements.items():
        lost_source = bool(only.source) and not is_at(only.source, there)
        deaf = slug in silent and bool(only.api) and not there & set(only.api)
        wanted = bool(there) and (
            (only.state in waiting and lost_source)
            or (only.state is PlacementState.RUNNING and deaf)
        )
        assert (slug in replaced) == wanted
    for action in made.actions:
        if action.move is Move.STRANDED:
            assert action.kind is ActionKind.REPLACE
            assert "no replica is at" in action.reason


@settings(deadline=None)
@given(fleets)
def test_without_the_list_of_replicas_the_plan_is_as_if_there_were_no_addresses(
    fleet: list,
) -> None:
    """A replica without a reliable list of replicas replaces no agent for its address."""
    world, silent = world_of(fleet)
    without = plan(world.records, world.placements, GOALS, NARROW)
    assert (
        plan(
            world.records,
            world.placements,
            replace(GOALS, reach=Reachability(silent=silent)),
            NARROW,
        )
        == without
    )


@settings(deadline=None)
@given(fleets, st.frozensets(urls, min_size=1))
def test_a_replacement_ends_the_dependence(fleet: list, there: frozenset[str]) -> None:
    """Once each device has an agent that was started with the living addresses, no action is left."""
    world, silent = world_of(fleet)
    for turn in range(20):
        quiet = silent if turn == 0 else frozenset()
        made = plan(
            world.records,
            world.placements,
            replace(GOALS, reach=Reachability(there, quiet)),
            Limits(),
        )
        for action in made.actions:
            world.apply(action)
        world.settle()
    assert (
        plan(
            world.records, world.placements, replace(GOALS, reach=Reachability(there)), Limits()
        ).actions
        == ()
    )


def test_the_reason_names_the_address() -> None:
    """The reason names the replica that an agent depends on."""
    waits = replace(placement("a", 1), state=PlacementState.STARTING, source=URLS[0] + FILE)
    assert URLS[0] in stranded(waits, Reachability(frozenset(URLS[1:])))
    assert stranded(waits, Reachability(frozenset(URLS))) == ""


def test_a_longer_port_is_another_address() -> None:
    """An address that merely starts like another one is a different address."""
    assert is_at(f"{URLS[0]}{FILE}", [URLS[0]])
    assert not is_at(f"{URLS[0]}1{FILE}", [URLS[0]])


def test_a_spec_is_told_the_addresses_and_keeps_its_hash() -> None:
    """Agents are not replaced because a replica joins or leaves."""
    from tests.schedulers.conftest import agent_spec  # its fixtures are not needed

    spec = agent_spec()
    told = addressed(spec, URLS)
    assert api_of(told) == tuple(URLS)
    assert told.spec_hash == spec.spec_hash
    assert addressed(told, URLS) is told
    assert addressed(told, ()) is told

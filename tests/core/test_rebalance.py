"""Which agents leave their hosts, until all hosts have about the same number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import presence, rebalance
from nomad_watchdog.core.host_balance import MovePlan, allowed, plan_moves, spread
from nomad_watchdog.core.pauses import Target
from nomad_watchdog.core.rebalance import AgentsByHost, Conditions, Rebalance, RebalanceState
from nomad_watchdog.errors import ConflictError, NotFoundError, PreconditionError
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Epoch, Placement, PlacementState, Presence, WallTime
from tests.core.world import placement, record

NEW = Rebalance("r", WallTime(0.0), "test")
Choose = Callable[[Random, Mapping[str, int], tuple[str, ...]], str]


def packs(_chance: Random, counts: Mapping[str, int], avoid: tuple[str, ...]) -> str:
    """The fullest host that is not to be avoided, as Nomad's bin packing does."""
    free = [host for host in counts if host not in avoid] or list(counts)
    return max(free, key=lambda host: (counts[host], host))


def anywhere(chance: Random, counts: Mapping[str, int], avoid: tuple[str, ...]) -> str:
    """Any host that is not to be avoided."""
    return chance.choice(sorted(host for host in counts if host not in avoid) or sorted(counts))


def deaf(chance: Random, counts: Mapping[str, int], avoid: tuple[str, ...]) -> str:
    """Packs, whatever is to be avoided."""
    return packs(chance, counts, ())


def never(_slug: Slug) -> bool:
    """No agent is stuck."""
    return False


def plan_of(view: AgentsByHost) -> MovePlan:
    return plan_moves(view.counts, view.movable, view.in_flight)


@dataclass
class Site:
    """Hosts with agents, and a scheduler that chooses among them."""

    hosts: dict[str, int]
    choose: Choose = packs
    chance: Random = field(default_factory=lambda: Random(0))
    records: dict[Slug, DeviceRecord] = field(default_factory=dict)
    placements: dict[Slug, tuple[Placement, ...]] = field(default_factory=dict)
    unwell: set[Slug] = field(default_factory=set)
    moves: Counter[Slug] = field(default_factory=Counter)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        for host, count in self.hosts.items():
            for number in range(count):
                name = f"{host}-{number}"
                one = record(name, epoch=1, instance="i")
                self.records[one.slug] = one
                self.placements[one.slug] = (replace(placement(name, 1), node=host),)

    def counts(self) -> dict[str, int]:
        found = dict.fromkeys(self.hosts, 0)
        for some in self.placements.values():
            for one in some:
                found[one.node] += one.state is PlacementState.RUNNING
        return found

    def view(self, now: Rebalance) -> AgentsByHost:
        conditions = Conditions(
            lambda one: one.slug not in self.unwell, lambda slug: slug not in self.unwell, never
        )
        return rebalance.survey(
            now, self.records, self.placements, self.hosts.keys(), (), conditions
        )

    def act(self, now: Rebalance) -> None:
        """Begin some of the requested moves, and let some of the agents that were moved start again."""
        for slug in sorted(rebalance.requested(now, self.records)):
            if self.chance.random() < 0.7:
                self.moves[slug] += 1
                (old,) = self.placements[slug]
                self.records[slug] = presence.advance(self.records[slug], Epoch(old.epoch + 1))
                self.placements[slug] = (replace(old, state=PlacementState.DEAD),)
        waiting = [
            slug for slug, (one,) in self.placements.items() if one.state is PlacementState.DEAD
        ]
        self.most_at_once = max(self.most_at_once, len(waiting))
        for slug in self.chance.sample(waiting, len(waiting)):
            if self.chance.random() < 0.7:
                one = self.records[slug]
                host = self.choose(self.chance, self.counts(), rebalance.avoided_by(now, one))
                made = placement(str(one.device.id), one.epoch)
                self.placements[slug] = (replace(made, node=host),)
                self.records[slug] = presence.bind(one, made.instances[0])

    def run(self, now: Rebalance, window: int) -> Rebalance:
        for _ in range(1_000):
            now = rebalance.step(now, self.view(now), window)
            if now.is_over and not now.going:
                return now
            self.act(now)
        raise AssertionError("it does not end")


fleets = st.dictionaries(
    st.sampled_from([f"h{n}" for n in range(6)]), st.integers(0, 25), min_size=1, max_size=6
)


@settings(max_examples=60, deadline=None)
@given(
    fleets,
    st.sampled_from([packs, anywhere]),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
def test_the_hosts_are_balanced_within_the_window(
    hosts: dict[str, int], choose: Choose, window: int, seed: int
) -> None:
    """Whichever host the scheduler chooses among those that it need not avoid: in the end the numbers differ by at most a
    tenth of the mean, or 1. No device moves twice, no more at a time than the window, and no more in total than needed."""
    site = Site(hosts, choose, Random(seed))
    needed = len(plan_of(site.view(NEW)).leave)
    over = site.run(NEW, window)
    counts = site.counts()
    mean = sum(counts.values()) / len(counts)
    assert over.state is RebalanceState.DONE
    assert max(counts.values()) - min(counts.values()) <= max(1, mean / 10)
    assert site.moves.total() == needed == over.useful == len(over.moved)
    assert set(site.moves.values()) <= {1}
    assert site.most_at_once <= window


@settings(max_examples=30, deadline=None)
@given(fleets, st.integers(1, 12), st.integers(0, 2**32))
def test_a_scheduler_that_does_not_move_agents_ends_it_soon(
    hosts: dict[str, int], window: int, seed: int
) -> None:
    """Agents go back to the fullest host: after a few, or a few more when empty hosts are left out, it ends with that
    reason. It never moves a device twice."""
    site = Site(hosts, deaf, Random(seed))
    was = spread(site.counts()) <= allowed(site.counts())
    over = site.run(NEW, window)
    balanced = spread(site.view(over).counts) <= allowed(site.view(over).counts)
    assert over.state is (RebalanceState.DONE if was or balanced else RebalanceState.ENDED)
    assert set(site.moves.values()) <= {1}
    assert site.moves.total() <= 2 * rebalance.TRIES


def test_it_moves_no_more_devices_than_asked() -> None:
    """With a maximum it ends after that many, whatever is left."""
    site = Site({"a": 20, "b": 0})
    over = site.run(replace(NEW, most=4), 3)
    assert (over.state, site.counts()) == (RebalanceState.DONE, {"a": 16, "b": 4})
    assert over.reason == (
        "4 devices have been moved, the maximum; 2 hosts have 4 to 16 agents each"
    )


def test_a_host_that_takes_no_agents_is_left_out() -> None:
    """Hosts that stay empty although the scheduler was to use them do not count, and the others are balanced."""

    def not_c(chance: Random, counts: Mapping[str, int], avoid: tuple[str, ...]) -> str:
        counts = {host: count for host, count in counts.items() if host != "c"}
        return packs(chance, counts, avoid)

    site = Site({"a": 20, "b": 4, "c": 0}, not_c)
    over = site.run(NEW, 2)
    assert (over.state, over.unusable) == (RebalanceState.DONE, {"c"})
    counts = site.counts()
    assert abs(counts["a"] - counts["b"]) <= 1


def test_only_devices_of_the_target_are_moved() -> None:
    """Agents of other devices count, and stay where they are."""
    site = Site({"a": 12, "b": 0})
    chosen = {f"a-{n}" for n in range(3)}
    over = site.run(replace(NEW, target=Target(devices=frozenset(chosen))), 5)
    assert over.state is RebalanceState.ENDED
    assert over.reason == "no other agent can be moved; 2 hosts have 3 to 9 agents each"
    assert {site.records[slug].device.id for slug in site.moves} == chosen


def test_an_unhealthy_device_is_waited_for_and_not_moved() -> None:
    """While it could be moved later, the rebalance goes on; after a while it ends without it."""
    site = Site({"a": 4, "b": 0})
    site.unwell = set(site.records)
    now = rebalance.step(NEW, site.view(NEW), 5)
    assert (now.state, now.going) == (RebalanceState.RUNNING, {})
    assert rebalance.step(NEW, site.view(NEW), 5, is_idle=True).state is RebalanceState.ENDED
    site.unwell.clear()
    now = rebalance.step(NEW, site.view(NEW), 5)
    assert len(now.going) == 2
    # One becomes unhealthy before its move has begun: it stays, and another one is chosen.
    first = min(now.going)
    site.unwell = {first}
    now = rebalance.step(now, site.view(now), 5)
    assert first not in now.going
    assert len(now.going) == 2


def test_a_closed_host_neither_gets_nor_gives_agents() -> None:
    """A drain empties it; a rebalance leaves its agents alone, and withdraws what it has requested there."""
    site = Site({"a": 6, "b": 0, "c": 0})
    now = rebalance.step(NEW, site.view(NEW), 5)
    assert {one.host for one in now.going.values()} == {"a"}
    conditions = Conditions(lambda _record: True, lambda _slug: True, never)

    def seen(closed: str) -> AgentsByHost:
        return rebalance.survey(
            now, site.records, site.placements, site.hosts.keys(), [closed], conditions
        )

    assert seen("a").dropped == now.going.keys()
    assert seen("c").counts.keys() == {"a", "b"}


def test_pause_and_abort_stop_new_moves_and_let_those_in_progress_finish() -> None:
    """What has begun keeps the hosts to avoid; what has not is asked for no more."""
    site = Site({"a": 9, "b": 0})
    now = rebalance.step(replace(NEW, useful=1), site.view(NEW), 3)
    first, *others = sorted(now.going)
    site.records[first] = presence.advance(site.records[first], Epoch(2))
    assert rebalance.requested(now, site.records).keys() == set(others)
    assert rebalance.avoided_by(now, site.records[first]) == ("a",)
    assert rebalance.avoided_by(now, site.records[others[0]]) == ()
    paused = rebalance.control(now, "pause")
    assert rebalance.requested(paused, site.records) == {}
    assert rebalance.step(paused, site.view(paused), 3) == paused
    assert rebalance.control(paused, "resume") == now
    aborted = rebalance.control(paused, "abort")
    aborted = rebalance.step(aborted, site.view(aborted), 3)
    assert (aborted.going.keys(), aborted.avoid) == ({first}, ("a",))
    (old,) = site.placements[first]
    site.placements[first] = (replace(old, epoch=Epoch(2)),)
    # The listing of a job that is updated in place may still have its earlier run.
    assert rebalance.step(aborted, site.view(aborted), 3) == aborted
    site.records[first] = presence.bind(site.records[first], "new")
    assert rebalance.step(aborted, site.view(aborted), 3) == aborted
    site.placements[first] = (replace(old, epoch=Epoch(2), node="b", instances=("new",)),)
    aborted = rebalance.step(aborted, site.view(aborted), 3)
    assert (aborted.going, aborted.avoid, aborted.useful) == ({}, (), 2)


def test_each_verb_is_refused_where_it_makes_no_sense() -> None:
    """A second one while one is in progress, and control of one that is over or not paused."""
    with pytest.raises(ConflictError, match="a rebalance is running"):
        rebalance.begin(NEW, NEW)
    over = rebalance.control(NEW, "abort")
    assert rebalance.begin(over, NEW) is NEW
    for what in ("pause", "resume", "abort"):
        for none in (None, over):
            with pytest.raises(NotFoundError, match="no rebalance"):
                rebalance.control(none, what)
    with pytest.raises(PreconditionError, match="not paused, it is running"):
        rebalance.control(NEW, "resume")


def test_a_device_that_leaves_is_forgotten() -> None:
    """Its move ends, and it does not count as one that helped."""
    site = Site({"a": 4, "b": 0})
    now = rebalance.step(NEW, site.view(NEW), 5)
    gone = min(now.going)
    site.records[gone] = replace(site.records[gone], presence=Presence.ABSENT)
    now = rebalance.step(now, site.view(now), 5)
    assert gone not in now.going
    assert (now.useful, now.useless) == (0, 0)


def test_a_large_fleet_takes_little_time() -> None:
    """What is computed for 10,000 agents and a new host in 100 contains the moves of a hundredth of them."""
    site = Site({**{f"h{n}": 100 for n in range(99)}, "new": 0})
    found = plan_of(site.view(NEW)).leave
    assert 90 <= len(found) <= 99

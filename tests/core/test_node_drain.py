"""What leaves a draining host, and when: inside the window, only while others have room, one replica at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.core.actions import Action, ActionKind, Move
from nomad_watchdog.core.goals import Goals
from nomad_watchdog.core.node_drain import (
    NO_OTHER,
    NOT_OUR_TURN,
    QUEUED_S,
    SCOUT_S,
    DrainDecision,
    DrainPlanner,
    DrainView,
    LeavingHost,
)
from nomad_watchdog.core.planner import plan
from nomad_watchdog.core.rollout import Readiness
from nomad_watchdog.fleet.serializers import plan_json
from nomad_watchdog.ids import DeviceId, Shard, Slug, shard_of, slug_of
from nomad_watchdog.model import (
    DeviceRecord,
    Epoch,
    Limits,
    Monotonic,
    Placement,
    PlacementState,
    Presence,
)
from tests.core.world import CLASS, SPEC, placement, record

OLD = LeavingHost("old", "draining", frozenset({"id-old"}))
OTHER_CLASS = "other"
HASHES = {CLASS: SPEC, OTHER_CLASS: SPEC}


NOW = Monotonic(0.0)


def on(name: str, host: str = "old", **more: object) -> Placement:
    """A running agent of a device on a host."""
    fields = {"node": host, "node_id": f"id-{host}", **more}
    return replace(placement(name, 1), **fields)  # type: ignore[arg-type]


def shard(slug: Slug) -> Shard:
    """Of four."""
    return shard_of(slug, 4)


ALL = frozenset(map(Shard, range(4)))


@dataclass
class Fleet:
    """Devices whose agents run on hosts, and the planners of some replicas."""

    agents: list[Placement]
    room: int = 100
    """How many more agents the other hosts take."""
    hosts: tuple[LeavingHost, ...] = (OLD,)
    replicas: tuple[frozenset[Shard], ...] = (ALL,)
    absent: frozenset[Slug] = frozenset()
    rests: frozenset[Slug] = frozenset()
    now: Monotonic = NOW
    records: dict[Slug, DeviceRecord] = field(default_factory=dict)
    left: list[Slug] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.records = {}
        for one in self.agents:
            kept = record(str(one.device_id), epoch=1, present=one.slug not in self.absent)
            device = replace(kept.device, agent_class=one.agent_class)
            self.records[one.slug] = replace(kept, device=device)
        self.placements = {one.slug: (one,) for one in self.agents}
        self.planners = [DrainPlanner() for _ in self.replicas]

    def decide(self, replica: int = 0, **more: object) -> DrainDecision:
        """What one replica decides now."""
        view = DrainView(
            self.hosts,
            self.records,
            self.placements,
            shard,
            self.replicas[replica],
            self.now,
            rests=self.rests.__contains__,
        )
        return self.planners[replica].decide(replace(view, **more))  # type: ignore[arg-type]

    def free(self, replica: int = 0, **more: object) -> set[Slug]:
        """The devices whose agents may leave now."""
        requested = self.decide(replica, **more).requested
        return {slug for slug, one in requested.items() if not one.waits_for}

    def unready(self) -> int:
        """Present devices without a running agent."""
        return sum(
            one.presence is Presence.PRESENT
            and not any(
                p.epoch == one.epoch and p.state is PlacementState.RUNNING
                for p in self.placements[slug]
            )
            for slug, one in self.records.items()
        )

    def round(self, limits: Limits) -> None:
        """Each replica looks, makes a pass and performs it, and then the scheduler does its part."""
        decisions = [self.decide(number) for number in range(len(self.replicas))]
        for ours, decision in zip(self.replicas, decisions, strict=True):
            made = plan(
                {s: r for s, r in self.records.items() if shard(s) in ours},
                {s: p for s, p in self.placements.items() if shard(s) in ours},
                Goals(HASHES, requested=decision.requested),
                limits,
                readiness=Readiness(self.unready()),
                resting=self.rests,
            )
            # The window of a pass is computed from the devices of the replica: `Limits` here gives a fixed number.
            for action in made.actions:
                self._apply(action)
        self._settle()
        self.now = Monotonic(self.now + QUEUED_S)

    def _apply(self, action: Action) -> None:
        kept = self.records[action.slug]
        if action.kind is ActionKind.START:
            if action.epoch > kept.epoch:
                self.records[action.slug] = presence.advance(kept, action.epoch)
            new = placement(str(action.device_id), action.epoch, PlacementState.PENDING)
            new = replace(new, agent_class=kept.device.agent_class, queued=True)
            self.placements[action.slug] = (*self.placements[action.slug], new)
            return
        assert action.move is Move.DRAIN
        self.left.append(action.slug)
        self.records[action.slug] = presence.advance(kept, Epoch(action.epoch + 1))
        stopping = [replace(p, state=PlacementState.STOPPING) for p in self.placements[action.slug]]
        self.placements[action.slug] = tuple(stopping)

    def _settle(self) -> None:
        for slug, found in self.placements.items():
            after = []
            for one in found:
                if one.state is PlacementState.STOPPING:
                    after.append(replace(one, state=PlacementState.DEAD))
                elif one.queued and self.room > 0:
                    self.room -= 1
                    running = PlacementState.RUNNING
                    after.append(
                        replace(one, state=running, queued=False, node="new", node_id="id-new")
                    )
                else:
                    after.append(one)
            self.placements[slug] = tuple(after)

    def there(self) -> set[Slug]:
        """Devices whose agent is on the draining host."""
        return {
            slug
            for slug, found in self.placements.items()
            if any(p.state is not PlacementState.DEAD and OLD.has(p) for p in found)
        }


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Agents on the draining host, on a host of the same name and on another one, of two classes."""
    names = draw(st.lists(st.integers(0, 40), min_size=1, max_size=24, unique=True))
    where = st.sampled_from([("old", "id-old"), ("old", "id-twin"), ("new", "id-new")])
    agents = []
    for number in names:
        host, node_id = draw(where)
        name = draw(st.sampled_from([CLASS, OTHER_CLASS]))
        agents.append(on(f"d{number}", host, node_id=node_id, agent_class=name))
    slugs = st.frozensets(st.sampled_from([one.slug for one in agents]), max_size=3)
    parts = draw(st.sampled_from([(ALL,), ({0, 2}, {1, 3}), ({0}, {1}, {2}, {3})]))
    return Fleet(
        agents,
        room=draw(st.integers(0, 30)),
        replicas=tuple(frozenset(map(Shard, part)) for part in parts),
        rests=draw(slugs),
    )


@settings(max_examples=60, deadline=None)
@given(fleets(), st.integers(1, 5))
def test_a_host_is_emptied_within_one_window_of_all_replicas(fleet: Fleet, most: int) -> None:
    """Never more than the window has no running agent, whatever number of replicas plans. Only agents on the node
    itself leave, each once; without room at most one agent per class is left without a place, and with enough room
    the host gets empty."""
    limits = Limits(replace_at_once=most, replace_fraction=0.0)
    before = fleet.there()
    must_leave, had_room = before - fleet.rests, fleet.room
    classes = {fleet.records[slug].device.agent_class for slug in must_leave}
    for _ in range(4 * len(fleet.agents) + 10):
        fleet.round(limits)
        assert fleet.unready() <= most
    assert len(fleet.left) == len(set(fleet.left))
    assert set(fleet.left) <= must_leave
    if had_room >= len(must_leave):
        assert fleet.there() == before & fleet.rests
        assert not fleet.unready()
    elif not had_room:
        assert len(fleet.left) <= len(classes)


@pytest.mark.parametrize("room", [0, 2])
def test_replicas_try_one_agent_of_a_class_together(room: int) -> None:
    """While the agent that one replica has moved is being stopped, no other replica moves one of its own."""
    each = tuple(frozenset({Shard(number)}) for number in sorted(ALL))
    every = [on(f"d{number}", "old", node_id="id-old") for number in range(40)]
    agents = list({shard(one.slug): one for one in every}.values())
    assert len(agents) == len(ALL)  # one of each replica
    fleet = Fleet(agents, room=room, replicas=each)
    for _ in range(40):
        fleet.round(Limits(replace_at_once=5, replace_fraction=0.0))
    assert len(fleet.left) == (1 if not room else room + 1)


@settings(max_examples=40, deadline=None)
@given(fleets())
def test_one_replica_moves_agents_at_a_time(fleet: Fleet) -> None:
    """At any moment, only one replica may have agents leave."""
    for _ in range(12):
        movers = [n for n in range(len(fleet.replicas)) if fleet.free(n)]
        assert len(movers) <= 1
        fleet.round(Limits(replace_at_once=1, replace_fraction=0.0))


def test_nothing_leaves_for_the_last_host() -> None:
    """While no other node takes agents nothing moves, and the host is reported at once."""
    fleet = Fleet([on("a"), on("b")], hosts=(replace(OLD, is_last=True),))
    found = fleet.decide()
    assert {one.waits_for for one in found.requested.values()} == {NO_OTHER}
    assert found.waits == {"old": NO_OTHER}
    fleet.hosts = (OLD,)
    assert not fleet.decide().waits
    assert len(fleet.free()) == 1


def test_one_agent_of_each_class_goes_first() -> None:
    """The agent of a healthy device goes first; the others of its class follow when it has a place."""
    agents = [on("a"), on("b"), on("c"), on("x", agent_class=OTHER_CLASS)]
    fleet = Fleet(agents)
    a, b, c, x = (one.slug for one in agents)
    order = sorted([a, b, c])
    unwell = {order[0]}.__contains__
    assert fleet.free(unwell=unwell) == {order[1], x}
    fleet.round(Limits(replace_at_once=2))
    assert set(fleet.left) == {order[1], x}
    assert fleet.free() == set()
    fleet.round(Limits())
    assert fleet.free() == {order[0], order[2]}


def test_a_class_whose_agent_waits_for_a_node_stays() -> None:
    """An agent that waits for a host stops the moves of its class only, and is reported when that lasts."""
    waiting = replace(on("w"), state=PlacementState.PENDING, queued=True, node="", reason="full")
    agents = [on("a"), on("x", agent_class=OTHER_CLASS), waiting]
    fleet = Fleet(agents)
    assert fleet.free() == {agents[1].slug}
    fleet.now = Monotonic(QUEUED_S)
    why = f"an agent of class {CLASS} waits for a node: full"
    assert fleet.decide().requested[agents[0].slug].waits_for == why
    assert not fleet.decide().waits
    del fleet.records[agents[1].slug]
    assert fleet.decide().waits == {"old": why}
    del fleet.placements[waiting.slug]
    assert not fleet.decide().waits


def test_a_full_scheduler_is_reported() -> None:
    """A scheduler without room, or a class that cannot be started, is why a host waits."""
    fleet = Fleet([on("a")])
    assert fleet.decide(no_room="20 agents wait").waits == {"old": "20 agents wait"}
    found = fleet.decide(blocked=lambda name: f"{name} is not configured")
    assert found.waits == {"old": f"{CLASS} is not configured"}


def test_a_placement_that_is_updated_in_place_is_left_once() -> None:
    """Its reference stays the same: with the next epoch it has moved."""
    agents = [on("a", ref="job-a"), on("b", ref="job-b")]
    fleet = Fleet(agents)
    (first,) = fleet.free()
    (old,) = fleet.placements[first]
    request = fleet.decide().requested[first]
    assert request.concerns(old)
    new = replace(old, epoch=Epoch(2), node="new", node_id="id-new")
    assert not request.concerns(new)
    fleet.records[first] = presence.advance(fleet.records[first], Epoch(2))
    fleet.placements[first] = (new,)
    assert fleet.free() == {one.slug for one in agents} - {first}


def test_a_short_queue_does_not_stop_a_class_that_has_room() -> None:
    """The scheduler takes a moment to place an agent. Once the class has found room, that is no reason to wait."""
    agents = [on(f"d{n}") for n in range(6)]
    fleet = Fleet(agents)
    fleet.round(Limits(replace_at_once=1))
    fleet.round(Limits(replace_at_once=1))
    waiting = replace(on("w"), state=PlacementState.PENDING, queued=True, node="")
    fleet.placements[waiting.slug] = (waiting,)
    assert fleet.free()
    del fleet.placements[waiting.slug]
    another = replace(waiting, slug=slug_of(DeviceId("v")))
    fleet.placements[another.slug] = (another,)
    fleet.now = Monotonic(fleet.now + QUEUED_S)
    assert fleet.free(), "each of them waits for a moment"
    fleet.now = Monotonic(fleet.now + QUEUED_S)
    assert not fleet.free()


def test_an_agent_that_waits_for_the_end_of_the_last_one_does_not_wait_for_a_host() -> None:
    """A Deployment at the next epoch has no pod before that of the last epoch is gone."""
    agents = [on(f"d{n}") for n in range(6)]
    fleet = Fleet(agents)
    fleet.round(Limits(replace_at_once=1))
    fleet.round(Limits(replace_at_once=1))
    stopping = replace(on("w"), state=PlacementState.STOPPING)
    successor = replace(stopping, epoch=Epoch(2), state=PlacementState.PENDING, queued=True)
    fleet.placements[stopping.slug] = (stopping, successor)
    assert fleet.free()
    fleet.now = Monotonic(fleet.now + QUEUED_S)
    assert fleet.free()


def test_another_agent_goes_first_if_one_gets_no_place() -> None:
    """An agent that went first and can't be started for a reason of its own does not keep the others for ever."""
    agents = [on("a"), on("b")]
    fleet = Fleet(agents)
    (first,) = fleet.free()
    fleet.placements[first] = ()
    assert fleet.free() == set()
    fleet.now = Monotonic(SCOUT_S + 1)
    assert fleet.free() == {one.slug for one in agents} - {first}


@pytest.mark.parametrize(
    "agent",
    [
        on("a", "new"),
        on("a", node_id="id-twin"),
        on("a", node_id=""),
        on("a", state=PlacementState.LOST),
        on("a", state=PlacementState.STOPPING),
        on("a", queued=True),
        on("a", epoch=Epoch(2)),
    ],
)
def test_what_must_not_leave(agent: Placement) -> None:
    """Agents elsewhere, on a node of the same name, lost or stopping ones, and those without a host."""
    assert not Fleet([agent]).decide().requested


def test_hosts_without_ids_are_known_by_name() -> None:
    """Where names are unique, a placement on a node of another scheduler with the same name stays."""
    kube, nomad = on("a", node_id=""), on("b")
    fleet = Fleet([kube, nomad], hosts=(LeavingHost("old", "cordoned"),))
    assert fleet.free() == {kube.slug}


def test_devices_that_left_are_not_moved() -> None:
    """Their agents are stopped for good by another rule."""
    gone = on("a")
    assert not Fleet([gone], absent=frozenset({gone.slug})).decide().requested


def test_the_holder_of_the_lowest_shard_moves_first() -> None:
    """The others wait for their turn, which is not reported as a wait of the host."""
    agents = [on(f"d{n}") for n in range(12)]
    halves = (frozenset({Shard(0), Shard(1)}), frozenset({Shard(2), Shard(3)}))
    fleet = Fleet(agents, replicas=halves)
    other = fleet.decide(1)
    assert {one.waits_for for one in other.requested.values()} == {NOT_OUR_TURN}
    assert not other.waits
    assert fleet.free(0)
    assert all(shard(slug) in halves[0] for slug in fleet.free(0))


def test_a_paused_device_does_not_keep_the_turn() -> None:
    """A replica whose agents can't leave does not hold up the others."""
    agents = [on(f"d{n}") for n in range(12)]
    halves = (frozenset({Shard(0), Shard(1)}), frozenset({Shard(2), Shard(3)}))
    paused = frozenset(one.slug for one in agents if shard(one.slug) in halves[0])
    assert Fleet(agents, replicas=halves, rests=paused).free(1)


def test_nothing_is_remembered_of_a_drain_that_is_over() -> None:
    """The next drain sends one agent first again."""
    fleet = Fleet([on("a"), on("b"), on("c")])
    fleet.round(Limits())
    fleet.round(Limits())
    assert len(fleet.free()) == 2
    fleet.hosts = ()
    assert not fleet.decide().requested
    fleet.hosts = (OLD,)
    assert len(fleet.free()) == 1


def test_a_plan_shows_a_drain_as_no_roll_out() -> None:
    """`plan` counts the agents that leave a host as replacements, and names no class as changed."""
    fleet = Fleet([on("a"), on("b")])
    goals = Goals(HASHES, requested=fleet.decide().requested)
    made = plan(fleet.records, fleet.placements, goals, Limits())
    shown = plan_json(made, 1, fleet.placements, window=5)
    assert shown["summary"] == "0 to start, 2 to replace (5 at a time), 0 to retire"
    assert shown["rollouts"] == []


def test_slugs_of_this_test_are_in_all_shards() -> None:
    """The tests above need devices in both halves."""
    assert {shard(slug_of(DeviceId(f"d{n}"))) for n in range(12)} == ALL

"""Limits on connections and on memory for bodies hold under any load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nomad_watchdog.api.body_memory import BodyMemory
from nomad_watchdog.api.connection_limits import (
    AcceptRate,
    ConnectionLimits,
    Place,
    Rank,
    network_of,
)
from nomad_watchdog.metrics.labels import Closing

MOST, PER_ADDRESS = 16, 8


@dataclass
class World:
    """The connections, and the result for each."""

    most: int = MOST
    per_address: int = PER_ADDRESS
    rate: float = 1_000.0
    now: float = 0.0
    closed: list[Place] = field(default_factory=list)
    reasons: list[Closing] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = ConnectionLimits(
            self.most,
            self.per_address,
            AcceptRate(self.rate),
            lambda: self.now,
            self.reasons.append,
        )

    def admit(self, address: str = "10.0.0.1", rank: Rank = Rank.UNAUTHENTICATED) -> Place | None:
        place = self.places.admit(address)
        if place is not None:
            place.close = lambda: self.closed.append(place)
            place.promote(rank)
        return place


class Any(RuleBasedStateMachine):
    """Any connections, in any order."""

    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.open: list[Place] = []

    @rule(target=places, host=st.integers(1, 4))
    def arrive(self, host: int) -> Place:
        self.world.now += 0.01
        place = self.world.admit(f"10.0.0.{host}")
        if place is None:
            return Place(None, "")
        self.open.append(place)
        return place

    @rule(place=places, rank=st.sampled_from(Rank))
    def rise(self, place: Place, rank: Rank) -> None:
        if not place.promote(rank):
            self.leave(place)  # its response is its last

    @rule(place=places, busy=st.booleans())
    def use(self, place: Place, busy: bool) -> None:
        if busy:
            place.work()
        else:
            place.rest()

    @rule(place=consumes(places))
    def leave(self, place: Place) -> None:
        place.leave()
        self.open = [one for one in self.open if one is not place]

    @invariant()
    def bounded(self) -> None:
        self.open = [one for one in self.open if one not in self.world.closed]
        places = self.world.places
        assert places.unauthenticated + places.authenticated == len(self.open) <= MOST
        for host in range(1, 5):
            assert sum(one.address == f"10.0.0.{host}" for one in self.open) <= PER_ADDRESS
        assert places.unauthenticated <= MOST // 8
        assert not any(one.busy for one in self.world.closed if one in self.open)


TestAny = Any.TestCase


def test_an_idle_connection_makes_room_and_operators_are_last() -> None:
    """Ten thousand silent new connections from two addresses close no idle connection of an operator or an agent, and
    none of a new client at another address."""
    world = World(most=64, per_address=64, rate=1e6)
    operator, agent = world.admit("10.1.0.1", Rank.OPERATOR), world.admit("10.1.0.2", Rank.KNOWN)
    for number in range(10_000):
        world.now += 0.001
        world.admit(f"10.0.0.{number % 2}")
        if number == 9_000:
            probe = world.admit("10.1.0.3")
    assert {operator, agent, probe}.isdisjoint(world.closed)
    assert world.places.unauthenticated == 8


def test_authenticated_connections_make_room_too() -> None:
    """An agent's credential that opens connections without end closes its own oldest idle ones and none of the
    operator's; a new operator connection still finds a place."""
    world = World(most=64, per_address=64, rate=1e6)
    operator = world.admit("10.1.0.1", Rank.OPERATOR)
    for number in range(500):
        world.admit(f"10.0.0.{number}", Rank.KNOWN)
    second = world.admit("10.1.0.1", Rank.OPERATOR)
    assert second is not None
    assert {operator, second}.isdisjoint(world.closed)
    assert world.places.authenticated <= 56


def test_a_busy_connection_is_not_closed() -> None:
    """While every connection is being served, a new one is refused and counted."""
    world = World()
    for number in range(MOST // 8):
        place = world.admit(f"10.0.0.{number}")
        assert place is not None
        place.work()
    assert world.admit("10.0.0.99") is None
    assert world.reasons == [Closing.FULL]
    assert world.closed == []


def test_an_idle_connection_of_another_address_makes_room() -> None:
    """If all connections of the address with the most are being served, the oldest idle one of another address is
    closed; if none is idle there is no room."""
    world = World(most=64, per_address=64)
    places = [world.admit(f"10.0.0.{host}") for host in (1, 1, 1, 1, 2, 3, 3, 3)]
    for host, place in enumerate(places):
        assert place is not None
        if host != 4:
            place.work()
    assert world.places.room()
    new = world.admit("10.0.0.4")
    assert new is not None
    assert world.closed == [places[4]]
    new.work()
    assert not world.places.room()
    assert world.admit("10.0.0.5") is None


def test_ten_thousand_agents_behind_one_nat_are_not_paced() -> None:
    """With the default settings, 10,000 simultaneous reports, 320 at a time, are all accepted without delay."""
    world = World(most=4096, per_address=3072, rate=500.0)
    waiting: list[Place] = []
    for _ in range(10_000):
        place = world.admit("192.0.2.1")
        assert place is not None
        assert place.wait_s == 0.0
        waiting.append(place)
        if len(waiting) == 320:
            for one in waiting:
                one.promote(Rank.KNOWN)
                one.leave()
            waiting.clear()
    assert world.closed == []
    assert world.reasons == []


def test_an_address_that_never_authenticates_is_paced() -> None:
    """Of 20,000 connections per second, an address gets its burst and its rate, each other address its own, and none
    waits for more than a second."""
    world = World(most=4096, per_address=4096, rate=100.0)
    served = 0
    for number in range(20_000):
        world.now = number / 20_000
        place = world.admit("192.0.2.1")
        if place is not None:
            assert place.wait_s <= 1.0
            served += 1
            place.leave()
    assert 500 <= served <= 600 + 1
    other = world.admit("192.0.2.2")
    assert other is not None
    assert other.wait_s == 0.0


def test_bodies_are_bounded_and_slow_ones_make_room() -> None:
    """Unauthenticated bodies get a quarter of the memory, operators all of it. A slow body is dropped to make room for
    another, and all memory is released."""
    world = World()
    bodies = BodyMemory(100, lambda: world.now)
    places = [Place(None, "", close=lambda: None) for _ in range(30)]
    stranger = Rank.UNAUTHENTICATED
    taken = [place for place in places[:10] if bodies.reserve(place, stranger, 5)]
    assert len(taken) == 5
    assert bodies.reserve(places[20], Rank.OPERATOR, 75)
    assert not bodies.reserve(places[21], Rank.OPERATOR, 5)
    bodies.release(places[20])
    world.now = 2.0
    assert bodies.reserve(places[22], stranger, 5)
    assert bodies.used == 25
    for place in places:
        bodies.release(place)
    assert bodies.used == 0


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("unknown", "unknown"),
    ],
)
def test_an_address_is_counted_as_its_network(text: str, network: str) -> None:
    """An IPv6 host counts as its whole /64 network."""
    assert network_of(text) == network


def test_connections_leave_room_for_other_files() -> None:
    """The soft limit of open files is raised to twice the number of connections. If the hard limit is too low, there
    are fewer connections (half of it, but at least 16) and a log line."""
    code = """\
import resource
from nomad_watchdog.api.acceptor import most_connections
for soft, hard in ((64, 4096), (64, 1000), (20, 20)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(most_connections(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == ["1000 2000", "500 1000", "16 20"]
    assert done.stderr.count("fewer connections") == 2

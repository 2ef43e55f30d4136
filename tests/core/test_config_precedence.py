"""Which of several replicas' configurations is in force, over any order of starts, reloads and crashes."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.config_precedence import MAX_SUPERSEDED, ConfigStanding, succeed, wins

NAMES = [f"r{n}" for n in range(4)]
DIGESTS = [f"c{n}" for n in range(4)]
STEPS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["crash", *DIGESTS])), max_size=16
)


@dataclass
class World:
    """Replicas that start or restart, reload and crash, one after the other."""

    living: dict[str, str] = field(default_factory=dict)
    standing: ConfigStanding | None = None
    changes: int = 0

    def start(self, name: str, own: str) -> None:
        """The rule treats a start and a reload alike."""
        others = [digest for other, digest in self.living.items() if other != name]
        if wins(own, self.standing, others):
            self.standing = succeed(self.standing, own)
            self.changes += 1
        self.living[name] = own

    def crash(self, name: str) -> None:
        self.living.pop(name, None)

    def play(self, steps: list[tuple[str, str]]) -> None:
        for name, what in steps:
            self.crash(name) if what == "crash" else self.start(name, what)

    @property
    def digest(self) -> str:
        assert self.standing is not None
        return self.standing.digest


def fleet(digest: str, count: int) -> World:
    """Replicas that are all configured with the same set, which is in force."""
    world = World()
    world.play([(name, digest) for name in NAMES[:count]])
    return world


@given(STEPS, st.sampled_from(NAMES), st.sampled_from(DIGESTS))
def test_a_lone_replica_has_its_way(steps: list[tuple[str, str]], name: str, own: str) -> None:
    """Whatever happened before, a replica that starts or reloads while no other is alive puts its own set in force."""
    world = World()
    world.play(steps)
    for other in NAMES:
        if other != name:
            world.crash(other)
    world.start(name, own)
    assert world.digest == own


@given(STEPS, st.sampled_from(NAMES), st.sampled_from(DIGESTS))
def test_replicas_that_agree_have_their_way(
    steps: list[tuple[str, str]], name: str, own: str
) -> None:
    """Once all living replicas have started or reloaded with one set, in any order, it is in force."""
    world = World()
    world.play(steps)
    for other in [*world.living, name]:
        world.start(other, own)
    assert world.digest == own


@given(STEPS, STEPS)
def test_only_a_start_or_a_reload_changes_anything(
    steps: list[tuple[str, str]], crashes: list[tuple[str, str]]
) -> None:
    """Crashes in any order and number do not change the set in force."""
    world = World()
    world.play(steps)
    before = world.standing
    for name, _ in crashes:
        world.crash(name)
    assert world.standing == before


@given(STEPS, st.sampled_from(NAMES))
def test_the_same_again_changes_nothing_while_another_agrees(
    steps: list[tuple[str, str]], name: str
) -> None:
    """A replica that restarts unchanged, while another is configured with the set in force, changes nothing, however
    often it restarts."""
    world = World()
    world.play(steps)
    others = [digest for other, digest in world.living.items() if other != name]
    if name not in world.living or world.standing is None or world.digest not in others:
        return
    before, own = world.standing, world.living[name]
    world.crash(name)
    world.start(name, own)
    assert world.standing == before


@given(st.integers(1, 4), st.permutations(NAMES), st.lists(st.sampled_from(NAMES), max_size=6))
def test_a_rolling_upgrade_changes_what_is_in_force_once(
    count: int, order: list[str], restarts: list[str]
) -> None:
    """The first replica puts the new set in force, and it stays, even if replicas that are not upgraded yet crash and
    restart meanwhile."""
    world = fleet("c0", count)
    turns = [name for name in order if name in world.living]
    for turn, name in enumerate(turns):
        world.start(name, "c1")
        assert world.digest == "c1"
        for other in restarts:
            if other in turns[turn + 1 :]:
                world.crash(other)
                world.start(other, "c0")
    assert (world.digest, world.changes) == ("c1", 2)


@given(st.integers(1, 4), st.permutations(NAMES))
def test_a_rollback_counts_with_the_last_replica(count: int, order: list[str]) -> None:
    """When rolling back to an earlier set, the newer one stays in force until the last replica is rolled back, and then
    the older one is in force; one change."""
    world = fleet("c0", count)
    for name in list(world.living):
        world.start(name, "c1")
    turns = [name for name in order if name in world.living]
    for name in turns[:-1]:
        world.start(name, "c0")
        assert world.digest == "c1"
    world.start(turns[-1], "c0")
    assert (world.digest, world.changes) == ("c0", 3)


@given(STEPS)
def test_what_is_remembered_is_bounded_and_makes_sense(steps: list[tuple[str, str]]) -> None:
    """The number increases by one with each change, the superseded sets never include the one in force, and contain no
    duplicates."""
    world = World()
    world.play(steps)
    if world.standing is None:
        return
    assert world.standing.number == world.changes
    assert world.digest not in world.standing.superseded
    assert len(set(world.standing.superseded)) == len(world.standing.superseded)


def test_the_oldest_is_forgotten_first() -> None:
    """If there are more sets than are remembered, the latest are kept."""
    standing = None
    for number in range(MAX_SUPERSEDED + 5):
        standing = succeed(standing, f"c{number}")
    assert standing is not None
    assert standing.superseded == tuple(f"c{n}" for n in range(4, MAX_SUPERSEDED + 4))


def test_a_replica_that_does_not_say_is_no_witness() -> None:
    """A replica of an older version that does not publish its set counts as configured differently."""
    standing = succeed(succeed(None, "c0"), "c1")
    assert wins("c0", standing, [""])
    assert not wins("c0", standing, ["", "c1"])

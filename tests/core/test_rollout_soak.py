"""A version is judged by its agents that became ready: whether they last or end too soon."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.rollout_soak import ObservedRun, Soak, SoakLimits
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, Monotonic

LIMITS = SoakLimits(soak_s=60.0, deaths=3)


def run(
    slug: str, life: int = 0, *, ready: bool = True, node: str = "n1", lost: bool = False
) -> ObservedRun:
    return ObservedRun(Slug(slug), Epoch(2), f"i{slug}", life, node, ready, lost)


def slugs(*names: str) -> set[Slug]:
    return {Slug(name) for name in names}


lives = st.lists(
    st.tuples(st.floats(0.5, 100.0), st.booleans()), min_size=1, max_size=6
)  # duration of each life, and whether the agent became ready


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdefgh"), lives, min_size=1))
def test_a_version_is_bad_exactly_when_enough_devices_lost_a_ready_agent_too_soon(
    fleet: dict[str, list[tuple[float, bool]]],
) -> None:
    """Each device's agent lives and is restarted as drawn, and is checked every second: the version is bad exactly when
    three devices (or all, if fewer) had an agent that was ready and ended within the soak."""
    soak = Soak(LIMITS)
    names = slugs(*fleet)
    ends = {
        name: [sum(s for s, _ in some[: n + 1]) for n in range(len(some))]
        for name, some in fleet.items()
    }
    last = max(one[-1] for one in ends.values())
    for second in range(int(last) + 3):
        now = Monotonic(float(second))
        runs = []
        for name, some in fleet.items():
            life = sum(end <= second for end in ends[name])
            ready = some[life][1] if life < len(some) else False
            runs.append(run(name, life, ready=ready))
        soak.look(runs, names, now)

    def too_soon(name: str) -> bool:
        began = 0.0
        for (_, ready), end in zip(fleet[name], ends[name], strict=True):
            first = next((s for s in range(int(last) + 3) if began <= s < end), None)
            gone = next(s for s in range(int(last) + 3) if s >= end)
            if ready and first is not None and gone - first < LIMITS.soak_s:
                return True
            began = end
        return False

    dead = {name for name in fleet if too_soon(name)}
    assert set(soak.died) == slugs(*dead)
    assert soak.is_bad(len(fleet)) is (len(dead) >= min(3, len(fleet)))


def test_what_has_lasted_is_good_and_leaves_the_window() -> None:
    """An agent takes room in the window from its first ready until the soak is over; then its version is good, and a
    later end proves nothing."""
    soak = Soak(LIMITS)
    soak.look([run("a"), run("b", ready=False)], slugs("a", "b"), Monotonic(0.0))
    assert soak.soaking() == 1
    soak.look([run("a"), run("b")], slugs("a", "b"), Monotonic(59.0))
    assert (soak.soaking(), soak.is_good(slugs("a", "b"))) == (2, False)
    soak.look([run("a"), run("b")], slugs("a", "b"), Monotonic(60.0))
    assert soak.soaking() == 1
    soak.look([run("a"), run("b")], slugs("a", "b"), Monotonic(119.0))
    assert (soak.soaking(), soak.is_good(slugs("a", "b"))) == (0, True)
    soak.look([run("a", 1), run("b", 1)], slugs("a", "b"), Monotonic(130.0))
    assert not soak.died


def test_what_was_told_to_end_is_no_death() -> None:
    """A device that leaves or gets another version does not count; nor does an agent whose node is lost."""
    soak = Soak(LIMITS)
    everybody = slugs("gone", "lost")
    soak.look([run("gone"), run("lost")], everybody, Monotonic(0.0))
    soak.look([run("gone"), run("lost", lost=True)], everybody, Monotonic(1.0))
    soak.look([run("lost", 1, node="n2")], slugs("lost"), Monotonic(2.0))
    assert not soak.died


def test_one_node_is_not_the_version() -> None:
    """If agents end on one node only, while others of the version run elsewhere, the version is not bad; if they end on
    a second node too, or there is only one node, it is."""
    names = [f"a{n}" for n in range(6)]
    soak, single = Soak(LIMITS), Soak(LIMITS)
    wanted = slugs(*names)
    soak.look([run(n, node=f"n{i % 2}") for i, n in enumerate(names)], wanted, Monotonic(0.0))
    single.look([run(n) for n in names], wanted, Monotonic(0.0))
    later = [run(n, 1 - i % 2, node=f"n{i % 2}") for i, n in enumerate(names)]
    soak.look(later, wanted, Monotonic(5.0))
    single.look([run(n, 1 - i % 2) for i, n in enumerate(names)], wanted, Monotonic(5.0))
    assert (soak.is_bad(6), single.is_bad(6)) == (False, True)
    soak.look([run(n, 1, node=f"n{i % 2}") for i, n in enumerate(names)], wanted, Monotonic(6.0))
    assert soak.is_bad(6)

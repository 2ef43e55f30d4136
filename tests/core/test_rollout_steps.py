"""Whose turn it is in a roll-out in steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.rollout_steps import Member, RolloutStep, complete, turns
from nomad_watchdog.ids import DeviceId, slug_of

LABELS = st.fixed_dictionaries(
    {}, optional={"ring": st.sampled_from(["early", "late"]), "site": st.sampled_from("abc")}
)
STEPS = st.lists(
    st.one_of(
        st.builds(RolloutStep, count=st.integers(1, 6)),
        st.builds(
            RolloutStep,
            fraction=st.sampled_from([0.05, 0.5, 1.0]),
            selector=st.sampled_from([{}, {"ring": "early"}, {"ring": "nowhere"}]),
            by=st.sampled_from(["", "site"]),
        ),
        st.just(RolloutStep(pause=True)),
    ),
    max_size=5,
)
FLEETS = st.lists(LABELS, max_size=20).map(
    lambda found: [
        Member(slug_of(DeviceId(f"d{number}")), labels) for number, labels in enumerate(found)
    ]
)


@given(STEPS, FLEETS)
def test_every_device_gets_its_turn_once(steps: list[RolloutStep], members: list[Member]) -> None:
    """From group to group and step to step, no device loses its turn, those that have it now did not have it before,
    and in the end all have had it."""
    whole = complete(steps)
    passed: frozenset[object] = frozenset()
    for number, step in enumerate(whole):
        groups = turns(whole, number, None, members).groups or (None,)
        for group in groups:
            now = turns(whole, number, group, members)
            assert now.passed == passed
            assert not now.current & now.passed
            assert not (step.pause and now.current)
            passed = now.passed | now.current
    assert turns(whole, len(whole), None, members).passed == passed
    assert not whole or passed == {one.slug for one in members}


@given(STEPS, FLEETS, st.randoms())
def test_the_order_of_the_devices_does_not_count(
    steps: list[RolloutStep], members: list[Member], chance: object
) -> None:
    """Every replica finds the same devices, in whatever order it has their records."""
    other = list(members)
    chance.shuffle(other)  # type: ignore[attr-defined]
    for number in range(len(steps) + 1):
        assert turns(steps, number, None, members) == turns(steps, number, None, other)


@given(FLEETS, st.integers(1, 6), st.sampled_from([0.05, 0.3, 1.0]))
def test_a_step_has_as_many_devices_as_it_says(
    members: list[Member], count: int, fraction: float
) -> None:
    """`count` devices, or all if there are fewer; a fraction of those that the selector matches, rounded up, so that a
    step of a class with devices is never empty."""
    assert len(turns([RolloutStep(count=count)], 0, None, members).current) == min(
        count, len(members)
    )
    early = [one for one in members if one.labels.get("ring") == "early"]
    found = turns(
        [RolloutStep(fraction=fraction, selector={"ring": "early"})], 0, None, members
    ).current
    assert found <= {one.slug for one in early}
    assert fraction * len(early) <= len(found) < fraction * len(early) + 1


def test_values_have_their_turn_one_after_the_other_and_devices_without_the_label_last() -> None:
    """Without a value, the first one has its turn."""
    sites = ["b", "a", None, "b"]
    members = [
        Member(slug_of(DeviceId(f"d{n}")), {"site": site} if site else {})
        for n, site in enumerate(sites)
    ]
    step = [RolloutStep(by="site")]
    found = [turns(step, 0, group, members) for group in ("a", "b", "")]
    assert found[0].groups == ("a", "b", "")
    assert turns(step, 0, None, members) == found[0]
    assert [len(one.current) for one in found] == [1, 2, 1]


def test_a_value_that_is_gone_sends_no_other_back() -> None:
    """When the devices of the value that has its turn leave, the next one has it, and those before have passed."""
    members = [Member(slug_of(DeviceId(site)), {"site": site}) for site in "abd"]
    now = turns([RolloutStep(by="site")], 0, "c", members)
    assert now.passed == {slug_of(DeviceId(site)) for site in "ab"}
    assert now.current == {slug_of(DeviceId("d"))}
    last = turns([RolloutStep(by="site")], 0, "z", members)
    assert last.current == {slug_of(DeviceId("d"))}

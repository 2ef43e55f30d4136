"""An agent counts as gone only on a listing that was begun after its record was known (S8)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.freshness import Freshness
from nomad_watchdog.model import Action, ActionKind, DeviceRecord, Epoch
from tests.core.world import record

BOUND = record("cam", epoch=3, instance="i-1")


def start(of: DeviceRecord, epoch: int) -> Action:
    return Action(ActionKind.START, of.slug, of.device.id, "", Epoch(epoch))


def test_s8_a_listing_under_way_is_too_old() -> None:
    """A record that is learned while a listing is under way blocks the next epoch until another one."""
    fresh = Freshness()
    fresh.begins()
    assert fresh.learned([BOUND]) == {BOUND.slug}
    fresh.listed(None)
    assert fresh.premature(start(BOUND, 4), BOUND)
    fresh.begins()
    fresh.listed(None)
    assert not fresh.premature(start(BOUND, 4), BOUND)


def test_s8_a_partial_listing_tells_of_its_own_devices_only() -> None:
    """A listing of other devices leaves this one unseen."""
    fresh = Freshness()
    fresh.learned([BOUND])
    fresh.begins()
    fresh.listed({record("other").slug})
    assert fresh.is_behind(BOUND.slug)
    fresh.begins()
    fresh.listed({BOUND.slug})
    assert not fresh.is_behind(BOUND.slug)


def test_a_new_device_waits_for_no_listing() -> None:
    """A device that was never placed starts at once, and so does a repetition of its own epoch."""
    fresh = Freshness()
    new = record("new")
    assert fresh.learned([new]) == set()
    assert not fresh.premature(start(new, 1), new)
    fresh.learned([BOUND])
    assert not fresh.premature(start(BOUND, 3), BOUND)


@given(st.lists(st.sampled_from(["learn", "begin", "list", "forget"]), max_size=30))
def test_s8_never_fresh_without_a_listing_begun_after(steps: list[str]) -> None:
    """In any order of steps, fresh means that a listing was begun after the last news, and came."""
    fresh = Freshness()
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

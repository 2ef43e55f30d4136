"""When to resync: every change is read in bounded time, and calm changes never delay urgent ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.resync_schedule import (
    CALM_S,
    NARROW,
    PRICE,
    QUIET_S,
    REST_S,
    URGENT_S,
    Read,
    ResyncSchedule,
)
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic

RESYNC_S = 60.0
AT = Monotonic(100.0)


def slugs(count: int, kind: str = "d") -> frozenset[Slug]:
    return frozenset(Slug(f"{kind}{n}") for n in range(count))


def looked(cost_s: float = 1.0, at: float = 100.0) -> ResyncSchedule:
    """A schedule whose last full read ended at `at` and took cost_s."""
    agenda = ResyncSchedule(RESYNC_S)
    look = agenda.take(Monotonic(at - cost_s))
    assert look is not None
    agenda.done(look, Monotonic(at - cost_s), Monotonic(at))
    return agenda


def due(agenda: ResyncSchedule, now: float) -> float:
    return now + agenda.wait_s(Monotonic(now))


def test_the_first_look_is_at_everything() -> None:
    """At the start nothing is known, so a read of some devices can't be the first."""
    agenda = ResyncSchedule(RESYNC_S)
    agenda.devices(slugs(1), Monotonic(0.0), calm=False)
    assert agenda.take(Monotonic(0.0)) == Read(None, "start")


def test_few_devices_are_looked_at_at_once() -> None:
    """A few changes are read narrowly and at once if some of them are urgent."""
    agenda = looked()
    agenda.devices(slugs(2), AT, calm=True)
    agenda.devices(slugs(1, "u"), AT, calm=False)
    assert agenda.take(Monotonic(100.0)) == Read(slugs(2) | slugs(1, "u"), "news")
    assert agenda.take(Monotonic(100.0)) is None


def test_the_first_starts_of_a_storm_are_not_worth_a_look() -> None:
    """Calm changes wait a moment: a few are read then, many are not read until it is quiet."""
    agenda = looked()
    agenda.devices(slugs(3), AT, calm=True)
    assert agenda.take(AT) is None
    assert agenda.wait_s(AT) == pytest.approx(REST_S)
    assert agenda.take(Monotonic(AT + REST_S)) == Read(slugs(3), "news")
    agenda.devices(slugs(NARROW + 1), AT, calm=True)
    assert agenda.take(Monotonic(AT + REST_S)) is None


def test_urgent_news_does_not_wait_for_a_storm_of_calm_news() -> None:
    """While thousands of starts are confirmed, an agent that ended is read at once, alone."""
    agenda = looked(cost_s=2.0)
    agenda.devices(slugs(5000), AT, calm=True)
    agenda.devices(slugs(1, "u"), AT, calm=False)
    assert agenda.take(Monotonic(100.0)) == Read(slugs(1, "u"), "news")
    assert due(agenda, 100.0) == 100.0 + CALM_S
    assert agenda.take(Monotonic(100.0 + CALM_S)) == Read(None, "news")
    assert agenda.take(Monotonic(100.0 + CALM_S)) is None


def test_a_storm_is_confirmed_when_it_is_over_or_lasts_long() -> None:
    """A full read for calm changes waits for a second of quiet, but not for ever."""
    agenda = looked(cost_s=0.01)
    for tenth in range(1000):
        now = Monotonic(100.0 + tenth / 10)
        if agenda.take(now) is not None:
            break
        agenda.devices(slugs(NARROW + 1 + tenth), now, calm=True)
    assert abs(now - 100.0 - CALM_S) < 0.2
    agenda.done(Read(None), now, now)
    agenda.devices(slugs(NARROW + 1), now, calm=True)
    assert abs(due(agenda, now) - now - QUIET_S) < 1e-6


def test_much_urgent_news_is_worth_a_full_look_soon() -> None:
    """More urgent devices than a narrow read takes wait at most five seconds, and less with a fast scheduler."""
    for cost_s, wait_s in ((2.0, URGENT_S), (0.1, PRICE * 0.1)):
        agenda = looked(cost_s)
        agenda.devices(slugs(NARROW + 1), AT, calm=False)
        assert agenda.take(Monotonic(100.0)) is None
        assert abs(due(agenda, 100.0) - 100.0 - wait_s) < 1e-6


def test_a_gap_is_looked_into_soon_and_at_once_in_a_hurry() -> None:
    """Missed events cause a full read; after taking a lease there is no wait at all."""
    agenda = looked(cost_s=2.0)
    agenda.everything("hint")
    assert due(agenda, 100.0) == 100.0 + URGENT_S
    agenda.everything("lease", hurry=True)
    assert agenda.take(Monotonic(100.0)) == Read(None, "hint")


def test_without_news_everything_is_looked_at_again() -> None:
    """The timer causes a full read, with the timer as its reason."""
    agenda = looked()
    assert agenda.take(Monotonic(100.0 + RESYNC_S - 1)) is None
    assert agenda.take(Monotonic(100.0 + RESYNC_S)) == Read(None, "timer")


def test_what_could_not_be_read_is_still_to_be_looked_at() -> None:
    """After a failure the devices of a narrow read are scheduled again, and so is a full read."""
    agenda = looked()
    agenda.devices(slugs(3), AT, calm=False)
    look = agenda.take(Monotonic(100.0))
    assert look is not None
    agenda.failed(look)
    assert agenda.take(Monotonic(100.0)) == Read(slugs(3), "news")
    assert agenda.take(Monotonic(100.0 + URGENT_S)) == Read(None, "error")


@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),
            st.frozensets(st.integers(0, 120), max_size=100),
            st.booleans(),
            st.floats(0, 3),
        ),
        max_size=30,
    )
)
def test_all_news_is_looked_at_in_bounded_time(
    news: list[tuple[float, frozenset[int], bool, float]],
) -> None:
    """Whatever happens, each device is in a read that starts after its change: an urgent one within 5 s of a full
    read's end, a calm one within 30 s; and waiting as long as the schedule states never misses one."""
    agenda = looked()
    now, owed = 100.0, dict[Slug, tuple[float, bool]]()
    full_at = 100.0
    pending = iter(news)
    todo = next(pending, None)
    for _ in range(200):
        look = agenda.take(Monotonic(now))
        if look is None:
            wait_s = agenda.wait_s(Monotonic(now))
            assert wait_s > 0
            if todo is None:
                now += wait_s
                if not owed:
                    break
                continue
            now += min(todo[0], wait_s)
            names = frozenset(Slug(f"d{n}") for n in todo[1])
            agenda.devices(names, Monotonic(now), calm=todo[2])
            for name in names:
                since, calm = owed.get(name, (now, True))
                owed[name] = (since, calm and todo[2])
            todo = next(pending, None)
            continue
        for name in list(owed):
            if look.only is None or name in look.only:
                since, calm = owed.pop(name)
                # a read in progress when the change arrived does not count against it
                assert now - max(since, full_at) <= (CALM_S if calm else URGENT_S) + 5.0
        cost_s = todo[3] if todo is not None else 1.0
        began, now = now, now + cost_s
        agenda.done(look, Monotonic(began), Monotonic(now))
        if look.only is None:
            full_at = now
    assert not owed

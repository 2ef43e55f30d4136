"""What is remembered of devices coming and going, over any history."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.core.acceptance import AcceptanceKind, accept
from nomad_watchdog.fleet.heartbeats import Heartbeats
from nomad_watchdog.model import Departure, Monotonic, Presence, PresenceRules, WallTime
from tests.core.world import record

NOW = WallTime(1.0)
RULES = PresenceRules(ttl_s=60.0, grace_s=30.0, flap_changes=4, flap_half_life_s=100.0)
steps = st.lists(
    st.tuples(st.floats(0, 120), st.sampled_from([*Departure, "register", "beat"])), max_size=40
)


@given(steps)
def test_damping_never_loses_the_last_wish(history: list[tuple[float, str]]) -> None:
    """A present or removed device is never kept, nor is one that left in another way once it is
    quiet: the planner acts on the last request."""
    attendance, stored, now = Heartbeats(RULES), record("a"), 0.0
    attendance.learned(None, stored, Monotonic(now))
    for gap, step in history:
        now += gap
        if step == "register":
            new = presence.register(stored, stored.device, NOW)
        elif step == "beat":
            new = presence.revive(stored, NOW)
        else:
            new = presence.deregister(stored, NOW, Departure(step))
        if new is not None:
            attendance.learned(stored, new, Monotonic(now))
            stored = new
        attendance.settle(Monotonic(now))
        if stored.presence is Presence.PRESENT or stored.left is Departure.REMOVED:
            assert not attendance.kept(Monotonic(now))
    quiet = Monotonic(now + RULES.grace_s + 2.001 * RULES.flap_half_life_s)
    assert not attendance.kept(quiet)
    attendance.settle(quiet)
    attendance.settle(Monotonic(quiet + 12 * RULES.flap_half_life_s))
    assert not attendance.leaving
    assert not attendance.flaps


@given(st.floats(0, 29.9))
def test_a_blink_within_the_grace_is_nothing(gap: float) -> None:
    """The agent is kept from the departure to the return, and its reports are accepted
    meanwhile."""
    attendance, stored = Heartbeats(RULES), record("a", epoch=1, instance="i")
    attendance.learned(None, stored, Monotonic(0.0))
    gone = presence.deregister(stored, NOW, Departure.EXPIRED)
    assert gone is not None
    attendance.learned(stored, gone, Monotonic(5.0))

    kept = bool(attendance.keeps(gone.slug, Monotonic(5.0 + gap)))
    assert kept
    assert accept(gone, gone.epoch, "i", (), kept=kept).kind is AcceptanceKind.ACCEPTED
    assert accept(gone, gone.epoch, "i", ()).kind is AcceptanceKind.REFUSED
    assert not attendance.keeps(gone.slug, Monotonic(35.1))


def test_a_report_of_an_expired_device_is_no_sign_of_life() -> None:
    """Whatever answers at the address of a device that has left may be another device."""
    attendance, stored = Heartbeats(RULES), record("a")
    attendance.learned(None, stored, Monotonic(0.0))
    attendance.answers(stored.slug, Monotonic(7.0))
    assert attendance.heard[stored.slug] == 7.0
    gone = presence.deregister(stored, NOW, Departure.EXPIRED)
    assert gone is not None
    attendance.learned(stored, gone, Monotonic(70.0))
    attendance.answers(stored.slug, Monotonic(71.0))

    assert stored.slug not in attendance.heard

"""S1: at most one (device, epoch, instance) is accepted."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.core.acceptance import AcceptanceKind, accept
from nomad_watchdog.model import Epoch
from tests.core.world import record

steps = st.lists(
    st.tuples(
        st.sampled_from(["report", "advance", "leave", "return"]),
        st.integers(1, 5),
        st.sampled_from(["i1", "i2", "i3"]),
        st.frozensets(st.sampled_from(["i1", "i2", "i3"])),
    ),
    max_size=30,
)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_s1_one_accepted_instance_at_a_time(history: list) -> None:
    """Through any history, a report is accepted only from the bound instance at the registry's epoch; an instance is
    unbound only when the scheduler no longer lists it; an agent receives `departed` exactly when its device has
    left."""
    rec = record("a", epoch=1)
    for kind, epoch, instance, live in history:
        if kind == "advance":
            rec = presence.advance(rec, Epoch(rec.epoch + 1))
        elif kind in ("leave", "return"):
            present = type(rec.presence)("present" if kind == "return" else "absent")
            rec = replace(rec, presence=present)
        else:
            answer = accept(rec, Epoch(epoch), instance, live)
            if answer.kind is AcceptanceKind.ACCEPTED:
                assert (epoch, instance) == (rec.epoch, rec.instance)
            if answer.kind is AcceptanceKind.BIND:
                assert epoch == rec.epoch
                assert not rec.instance or (rec.instance not in live and instance in live)
                rec = presence.bind(rec, instance)
            if epoch < rec.epoch or rec.presence.value == "absent":
                assert answer.kind is AcceptanceKind.REFUSED
            assert answer.departed is (rec.presence.value == "absent")


def test_a_newer_epoch_is_not_refused_by_an_old_view() -> None:
    """This replica may be behind: an agent with a newer epoch is asked to retry, never to stop."""
    assert accept(record("a", epoch=1), Epoch(2), "i", ()).kind is AcceptanceKind.UNSURE


def test_without_a_record_an_agent_is_neither_accepted_nor_told_to_stop() -> None:
    """A store that lost its records must not stop the fleet through answers to reports (S7)."""
    assert accept(None, Epoch(1), "i", ()).kind is AcceptanceKind.UNSURE


def test_the_one_that_stays_waits_for_the_accepted_one_that_stops() -> None:
    """Of two instances from a raced start, the one that reported first and is being stopped stays accepted until the
    scheduler no longer lists it; the other is asked to wait, and is bound then."""
    rec = presence.bind(record("a", epoch=1), "surplus")

    meanwhile = accept(rec, Epoch(1), "oldest", {"surplus", "oldest"}, stopping={"surplus"})
    afterwards = accept(rec, Epoch(1), "oldest", {"oldest"})

    assert meanwhile.kind is AcceptanceKind.UNSURE
    assert afterwards.kind is AcceptanceKind.BIND


def test_an_instance_that_is_stopping_itself_is_refused_beside_the_accepted_one() -> None:
    """Only an instance that is not stopping waits for the accepted one to end."""
    rec = presence.bind(record("a", epoch=1), "i1")

    answer = accept(rec, Epoch(1), "i2", {"i1", "i2"}, stopping={"i1", "i2"})

    assert answer.kind is AcceptanceKind.REFUSED

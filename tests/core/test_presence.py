"""How a new desired state changes a record: S5, and epochs that survive delete and re-add."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId, is_slug, parse_device_id, shard_of, slug_of
from nomad_watchdog.model import Departure, Device, Epoch, Presence, WallTime
from tests.core.world import record

NOW = WallTime(1.0)


def test_s5_registering_twice_changes_once() -> None:
    """Requesting the same state again gives nothing to write."""
    wish = Device(DeviceId("a"), "default", "127.0.0.1")
    first = presence.register(None, wish, NOW)

    assert first is not None
    assert presence.register(first, wish, NOW) is None


def test_s5_deregistering_twice_changes_once() -> None:
    """A tombstone is not changed."""
    gone = presence.deregister(record("a", epoch=3), NOW)

    assert gone is not None
    assert presence.deregister(gone, NOW) is None


def test_an_epoch_survives_delete_and_re_add() -> None:
    """A device that comes back keeps its epoch and gets a new generation."""
    rec = record("a", epoch=3)
    gone = presence.deregister(rec, NOW)
    assert gone is not None
    back = presence.register(gone, rec.device, NOW)

    assert back is not None
    assert (back.epoch, back.generation, back.presence) == (3, 3, Presence.PRESENT)


@given(st.lists(st.sampled_from([*Departure, "register", "beat"]), max_size=12))
def test_the_last_wish_stands_and_silence_never_overrules_a_word(steps: list[str]) -> None:
    """Whatever happened before: a registration makes a device present, a departure absent, a heartbeat brings back only
    an expired device, and a removed device is not marked as expired."""
    stored = record("a")
    for step in steps:
        was = stored
        if step == "register":
            stored = presence.register(stored, stored.device, NOW) or stored
            assert stored.presence is Presence.PRESENT
        elif step == "beat":
            stored = presence.revive(stored, NOW) or stored
            back = was.presence is Presence.ABSENT and was.left is Departure.EXPIRED
            assert (stored is not was) == back
            assert not back or stored.device == was.device
        else:
            stored = presence.deregister(stored, NOW, Departure(step)) or stored
            assert stored.presence is Presence.ABSENT
            if was.presence is Presence.ABSENT and was.left is Departure.REMOVED:
                assert stored is was
        assert stored.generation == was.generation + (stored is not was)
        assert stored.epoch == was.epoch


@given(st.integers(0, 10), st.integers(0, 10))
def test_s1_an_epoch_only_goes_up(old: int, new: int) -> None:
    """advance rejects every epoch that is not higher, and clears the accepted instance."""
    rec = record("a", epoch=old, instance="i")
    if new <= old:
        with pytest.raises(ValueError, match="must go up"):
            presence.advance(rec, Epoch(new))
    else:
        assert presence.advance(rec, Epoch(new)).instance == ""


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=140))
def test_s11_an_id_is_refused_or_becomes_a_safe_name(text: str) -> None:
    """Every accepted ID gives a slug of [a-z0-9-], at most 53 characters, always the same."""
    try:
        device_id = parse_device_id(text)
    except UserError as error:
        assert str(error).isprintable()
        return
    slug = slug_of(device_id)

    assert is_slug(slug)
    assert len(slug) <= 53
    assert slug == slug_of(device_id)
    assert 0 <= shard_of(slug, 7) < 7


@given(st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=20))
def test_s11_different_ids_have_different_slugs_and_none_is_a_prefix(texts: set[str]) -> None:
    """Case twins, prefix twins and look-alikes get names that do not collide or nest."""
    slugs = sorted(slug_of(DeviceId(text)) for text in texts)

    assert len(set(slugs)) == len(texts)
    assert not any(b.startswith(a) for a, b in zip(slugs, slugs[1:], strict=False))

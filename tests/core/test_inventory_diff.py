"""Changes that follow from a list of devices: they converge, and leave foreign devices alone."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core import presence
from nomad_watchdog.core.inventory_diff import compare
from nomad_watchdog.ids import DeviceId, Slug, slug_of
from nomad_watchdog.model import Departure, Device, DeviceRecord, Presence, WallTime

NOW = WallTime(1.0)
MINE, OTHER, OLD = "inventory:a", "inventory:b", "inventory:old"
names = st.sampled_from([f"d{n}" for n in range(8)])


def device(name: str, address: str = "127.0.0.1") -> Device:
    return Device(DeviceId(name), "default", address)


@st.composite
def stored(draw: st.DrawFn) -> dict[Slug, DeviceRecord]:
    records = {}
    for name in draw(st.sets(names)):
        made = presence.register(
            None, device(name, draw(st.sampled_from(["127.0.0.1", "::1"]))), NOW
        )
        assert made is not None
        made = replace(
            made,
            source=draw(st.sampled_from(["", MINE, OTHER, OLD])),
            presence=draw(st.sampled_from(Presence)),
        )
        if made.presence is Presence.ABSENT:
            made = replace(made, left=draw(st.sampled_from(Departure)))
        records[made.slug] = made
    return records


listed = st.sets(names, min_size=1).map(
    lambda found: {slug_of(DeviceId(n)): device(n) for n in found}
)


@given(listed, stored())
def test_one_round_is_enough_and_others_keep_their_devices(
    wanted: dict[Slug, Device], records: dict[Slug, DeviceRecord]
) -> None:
    """After the changes nothing is left to do, and no device of the API or of another configured file was changed or
    removed."""
    before = dict(records)
    found = compare(wanted, records, MINE, {MINE, OTHER})
    after = dict(records)
    for wish in found.register:
        slug = slug_of(wish.id)
        after[slug] = presence.register(after.get(slug), wish, NOW, MINE) or after[slug]
    for slug in found.depart:
        after[slug] = presence.deregister(after[slug], NOW) or after[slug]

    again = compare(wanted, after, MINE, {MINE, OTHER})
    assert (again.register, again.depart) == ((), frozenset())
    for slug, was in before.items():
        if was.presence is Presence.PRESENT and was.source in ("", OTHER):
            assert after[slug] == was
            assert (slug in wanted) == (was.device.id in found.conflicts)


@given(listed, stored())
def test_what_follows_does_not_depend_on_order(
    wanted: dict[Slug, Device], records: dict[Slug, DeviceRecord]
) -> None:
    """The same list and records in another order lead to the same changes."""
    one = compare(wanted, records, MINE, {MINE})
    two = compare(dict(reversed(wanted.items())), dict(reversed(records.items())), MINE, {MINE})

    assert {d.id for d in one.register} == {d.id for d in two.register}
    assert (one.depart, set(one.conflicts)) == (two.depart, set(two.conflicts))


def test_a_listed_device_that_expired_waits_for_its_heartbeat() -> None:
    """The file does not bring back a device that expired by its own TTL; it would flap for ever."""
    made = presence.register(None, device("a"), NOW, MINE)
    assert made is not None
    gone = presence.deregister(made, NOW, Departure.EXPIRED)
    assert gone is not None

    assert compare({made.slug: device("a")}, {made.slug: gone}, MINE, {MINE}).register == ()

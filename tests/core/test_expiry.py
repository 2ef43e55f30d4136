"""Which devices are overdue, and how many may leave at once (S7)."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from nomad_watchdog.core.expiry import overdue
from nomad_watchdog.core.holds import DEPARTURES, HoldDecision, decide
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import DeviceRecord, Limits, Monotonic, PresenceRules
from tests.core.world import CLASS, record

times = st.floats(0, 1000, allow_nan=False)
slugs = st.sets(st.integers(0, 40).map(lambda n: Slug(f"d{n}")), max_size=30)


def leased(name: str, ttl_s: float | None, *, present: bool = True) -> DeviceRecord:
    found = record(name, present=present)
    return replace(found, device=replace(found.device, ttl_s=ttl_s))


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(times, times), min_size=1),
    times,
)
def test_nobody_is_overdue_before_its_whole_ttl(
    world: dict[str, tuple[float, float]], now: float
) -> None:
    """A device is overdue exactly when it has a TTL and its last heartbeat is at least that old, and the next due time
    is no later than that of the first that is not overdue yet."""
    records = [leased(name, ttl) for name, (ttl, _) in world.items()]
    heard = {r.slug: Monotonic(world[str(r.device.id)][1]) for r in records}

    found = overdue(records, heard, PresenceRules(), Monotonic(now))

    for r in records:
        ttl, sign = world[str(r.device.id)]
        assert (r.slug in found.slugs) == (ttl > 0 and now - sign >= ttl)
        if ttl > 0 and r.slug not in found.slugs:
            assert found.next_at <= sign + ttl
    assert found.next_at >= now - 1e-6
    assert found == overdue(records[::-1], heard, PresenceRules(), Monotonic(now))


def test_who_was_never_heard_or_is_gone_is_not_overdue() -> None:
    """A device without a first heartbeat is not overdue, and a tombstone does not expire."""
    records = [leased("new", 1.0), leased("gone", 1.0, present=False)]
    heard = {records[1].slug: Monotonic(0.0)}

    found = overdue(records, heard, PresenceRules(), Monotonic(1e6))

    assert not found.slugs
    assert found.unheard == (records[0].slug,)
    assert found.next_at == float("inf")


def test_the_ttl_is_the_devices_then_its_classs_then_the_default() -> None:
    """Zero at any level disables expiry, and overrides the levels below it."""
    rules = PresenceRules(ttl_s=30.0, class_ttl_s={CLASS: 60.0})

    assert rules.ttl_of(leased("a", 5.0).device) == 5.0
    assert rules.ttl_of(leased("a", None).device) == 60.0
    assert rules.ttl_of(leased("a", 0.0).device) == 0.0
    assert rules.ttl_of(replace(leased("a", None).device, agent_class="other")) == 30.0


def keys(devices: set[Slug]) -> set[tuple[Slug]]:
    return {(slug,) for slug in devices}


def leave(
    wanted: set[Slug], confirmed: set[Slug], limits: Limits, *, present: int, recent: int
) -> HoldDecision[tuple[Slug]]:
    return decide(DEPARTURES, keys(wanted), keys(confirmed), limits, total=present, recent=recent)


@given(slugs, slugs, st.integers(0, 50), st.integers(0, 50))
def test_s7_who_leaves_is_within_the_limit_or_confirmed(
    wanted: set[Slug], confirmed: set[Slug], others: int, recent: int
) -> None:
    """Each requested departure goes or is held, and unconfirmed ones go only if all of them, including recent ones, are
    within the breaker's share."""
    limits = Limits()
    present = len(wanted) + others

    found = leave(wanted, confirmed, limits, present=present, recent=recent)

    assert found.go | found.held == keys(wanted)
    assert not found.go & found.held
    allowed = max(limits.breaker_min, int((present + recent) * limits.breaker_fraction))
    unasked = wanted - confirmed
    if found.go - keys(confirmed):
        assert len(unasked) + recent <= allowed
    assert keys(wanted & confirmed) <= found.go
    assert bool(found.reason) == bool(found.held)


def test_s7_a_trickle_is_one_outage() -> None:
    """Departures one at a time stop at the limit within the window."""
    limits = Limits()
    gone, present = 0, 100
    for n in range(50):
        found = leave({Slug(f"d{n}")}, set(), limits, present=present, recent=gone)
        gone += len(found.go)
        present -= len(found.go)

    assert gone == 10

"""Many devices with one cause are one incident; without a common cause there is none."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from nomad_watchdog.core.incidents import (
    Correlator,
    Group,
    GroupKind,
    IncidentLimits,
    IncidentStep,
    News,
)
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Monotonic

LIMITS = IncidentLimits(least=3, fraction=0.20, window_s=60.0)
NAMES = [Slug(f"d{n}") for n in range(12)]


def groups(host: str = "", site: str = "", kind: str = "default") -> tuple[Group, ...]:
    named = ((GroupKind.HOST, host), (GroupKind.SITE, site), (GroupKind.CLASS, kind))
    return tuple((group, name) for group, name in named if name)


class Fleet:
    """Devices by name, and the events published about them."""

    def __init__(self, limits: IncidentLimits = LIMITS) -> None:
        self.correlator = Correlator(limits)
        self.told: list[News] = []
        self.where: dict[str, tuple[Group, ...]] = {}
        self.ref = 0

    def add(self, count: int, host: str, *, site: str = "", kind: str = "default") -> list[str]:
        names = [f"{host}-{site}-{kind}-{n}" for n in range(count)]
        for name in names:
            self.where[name] = groups(host, site, kind)
            self.turn([name], bad=False, at=0.0)
        return names

    def turn(self, names: list[str], *, bad: bool, at: float) -> list[str]:
        found = []
        for name in names:
            self.ref += 1
            found.append(
                self.correlator.observe(
                    Slug(name), self.where[name], bad=bad, now=Monotonic(at), ref=self.ref
                )
            )
        return found

    def settle(self, at: float) -> list[News]:
        news = self.correlator.settle(Monotonic(at))
        self.told += news
        return news

    def steps(self) -> Counter[IncidentStep]:
        return Counter(news.step for news in self.told)


def test_a_thousand_devices_of_one_host_are_one_incident() -> None:
    """If a host with 1,000 of 10,000 devices dies and comes back, one incident of the host opens and closes."""
    fleet = Fleet()
    dead = fleet.add(1_000, "h0", site="s0")
    for number in range(1, 10):
        fleet.add(1_000, f"h{number}", site="s0")

    fleet.turn(dead, bad=True, at=10.0)
    (opened,) = fleet.settle(12.0)
    fleet.settle(300.0)
    fleet.turn(dead, bad=False, at=400.0)
    fleet.settle(402.0)

    assert fleet.steps() == {IncidentStep.OPENED: 1, IncidentStep.CLOSED: 1}
    assert (opened.incident.kind, opened.incident.group) == (GroupKind.HOST, "h0")
    assert opened.incident.count == 1_000
    assert len(opened.marks) == 1_000
    assert len(opened.incident.members) == len(opened.incident.subsumes) == 50


def test_a_host_of_many_sites_is_one_incident() -> None:
    """If a host's 20 sites each lose all their devices, there is one incident, not one per site."""
    fleet = Fleet()
    dead = [name for site in range(20) for name in fleet.add(10, "h0", site=f"s{site}")]
    fleet.add(500, "h1", site="elsewhere")

    fleet.turn(dead, bad=True, at=1.0)
    fleet.settle(2.0)

    assert [news.incident.group for news in fleet.told] == ["h0"]


def test_a_bad_class_is_told_as_a_class() -> None:
    """If all devices of a class on ten hosts fail while the hosts' others do not, the incident is that of the class."""
    fleet = Fleet()
    bad = [name for host in range(10) for name in fleet.add(10, f"h{host}", kind="camera")]
    for host in range(10):
        fleet.add(10, f"h{host}")

    fleet.turn(bad, bad=True, at=1.0)
    fleet.settle(2.0)

    assert [(n.incident.kind, n.incident.group) for n in fleet.told] == [
        (GroupKind.CLASS, "camera")
    ]


def test_two_devices_or_slow_ones_are_no_incident() -> None:
    """Two simultaneous failures are single devices, and so are twenty spread over an hour."""
    fleet = Fleet()
    names = fleet.add(20, "h0")
    fleet.turn(names[:2], bad=True, at=1.0)
    fleet.settle(2.0)
    for number, name in enumerate(names):
        fleet.turn([name], bad=True, at=100.0 + 180 * number)
        fleet.settle(101.0 + 180 * number)

    assert fleet.told == []


def test_a_device_that_turns_bad_again_counts_once() -> None:
    """The count never exceeds the size of the group, however often its devices come and go, and a growing group is
    counted at its current size."""
    fleet = Fleet()
    names = fleet.add(4, "h")
    fleet.turn(names, bad=True, at=1.0)
    ((incident),) = (news.incident for news in fleet.settle(2.0))
    for at in (3.0, 4.0, 5.0):
        fleet.turn(names[:2], bad=False, at=at)
        fleet.turn(names[:2], bad=True, at=at + 0.5)
    assert (incident.count, incident.bad, incident.size, len(incident.members)) == (4, 4, 4, 4)
    later = fleet.add(5, "h", site="s")
    fleet.turn(later, bad=True, at=6.0)
    assert (incident.count, incident.bad, incident.size) == (9, 9, 9)


def test_those_that_follow_join_and_are_told_by_doubling() -> None:
    """Devices that become unhealthy later get the ID at once, and a thousand of them cause few updates."""
    fleet = Fleet()
    names = fleet.add(1_000, "h0")
    fleet.turn(names[:200], bad=True, at=1.0)
    (opened,) = fleet.settle(2.0)
    joined = []
    for number in range(200, 1_000, 10):
        joined += fleet.turn(names[number : number + 10], bad=True, at=float(number))
        fleet.settle(float(number))

    assert set(joined) == {opened.incident.id}
    assert fleet.steps() == {IncidentStep.OPENED: 1, IncidentStep.UPDATED: 2}
    assert opened.incident.count == 1_000


def test_an_incident_ends_though_a_few_stay_bad() -> None:
    """An incident closes when fewer than half of the devices that opened it are unhealthy; the rest are single devices
    again."""
    fleet = Fleet()
    names = fleet.add(100, "h0")
    fleet.turn(names, bad=True, at=1.0)
    fleet.settle(2.0)
    fleet.turn(names[:95], bad=False, at=50.0)
    (closed,) = fleet.settle(51.0)

    assert closed.step is IncidentStep.CLOSED
    assert closed.incident.bad == 5
    assert fleet.correlator.incident_of(Slug(names[-1])) == ""


def test_a_fleet_that_was_bad_before_we_looked_has_not_turned() -> None:
    """After a restart of the control plane, devices that are already offline cause no incident."""
    fleet = Fleet()
    fleet.where = {name: groups("h0") for name in NAMES}
    fleet.turn(list(NAMES), bad=True, at=1.0)

    assert fleet.settle(2.0) == []


def test_a_change_costs_the_same_in_a_large_fleet() -> None:
    """In a group ten times as large a change costs at most five times as much (the cost is constant)."""
    cost = {}
    for size in (2_000, 20_000):
        fleet = Fleet()
        names = fleet.add(size, "h0", site="s0")
        best = float("inf")
        for turn in range(3):
            began = time.process_time()
            fleet.turn(names[:2_000], bad=turn % 2 == 0, at=1.0)
            best = min(best, time.process_time() - began)
        cost[size] = best

    assert cost[20_000] < 5 * cost[2_000]


moves = st.lists(
    st.tuples(
        st.sampled_from(["bad", "good", "move", "forget", "settle", "wait"]),
        st.sampled_from(NAMES),
        st.sampled_from(["h1", "h2", ""]),
        st.sampled_from(["s1", ""]),
    ),
    max_size=120,
)


@settings(max_examples=300, deadline=None)
@given(moves)
def test_books_are_kept_through_any_history(history: list) -> None:
    """Sizes, unhealthy counts and IDs match a plain recount, each incident opens and closes once, and opens only with
    as many devices as the limits require."""
    it, now = Correlator(LIMITS), 0.0
    where: dict[Slug, tuple[Group, ...]] = {}
    bad: dict[Slug, bool] = {}
    steps: dict[str, list[IncidentStep]] = {}
    for kind, slug, host, site in history:
        now += 1.0
        if kind == "settle":
            for news in it.settle(Monotonic(now)):
                steps.setdefault(news.incident.id, []).append(news.step)
                if news.step is IncidentStep.OPENED:
                    assert news.incident.count == len(news.marks) >= LIMITS.least
        elif kind == "wait":
            now += 30.0
        elif kind == "forget":
            it.forget(slug)
            where.pop(slug, None)
            bad.pop(slug, None)
        else:
            wish = groups(host, site) if kind == "move" or slug not in where else where[slug]
            is_bad = bad.get(slug, False) if kind == "move" else kind == "bad"
            if not (is_bad and bad.get(slug)):
                where[slug] = wish
            bad[slug] = is_bad
            it.observe(slug, wish, bad=is_bad, now=Monotonic(now), ref=int(now))
        sizes = Counter(group for found in where.values() for group in found)
        assert it._sizes == dict(sizes)
        for incident in it.opened.values():
            members = [s for s in bad if it.incident_of(s) == incident.id]
            assert len(members) == incident.bad
            assert all(bad[s] for s in members)
        for recent in it._recent.values():
            assert recent
            assert all(bad[s] and not it.incident_of(s) for s in recent)
    for found in steps.values():
        assert found[0] is IncidentStep.OPENED
        assert found.count(IncidentStep.OPENED) == 1
        assert found.count(IncidentStep.CLOSED) <= 1
        assert IncidentStep.CLOSED not in found[:-1]


def test_a_device_that_leaves_while_bad_is_no_part_of_a_later_incident() -> None:
    """If a device recovers by losing its groups, its failure no longer counts: no incident opens for devices that have
    left, nor when they are forgotten."""
    correlator = Correlator(LIMITS)
    for name in NAMES[:4]:
        correlator.observe(name, groups("n1"), bad=False, now=Monotonic(0.0))
        correlator.observe(name, groups("n1"), bad=True, now=Monotonic(1.0))
        correlator.observe(name, (), bad=False, now=Monotonic(2.0))
    assert correlator.settle(Monotonic(3.0)) == []
    for name in NAMES[:4]:
        correlator.forget(name)

    assert correlator.settle(Monotonic(4.0)) == []


def test_agents_that_can_not_ask_are_an_incident_of_their_host() -> None:
    """Ten unable agents of one host are one incident of the host, although all their devices are behind one gateway and
    of one class; it makes no difference that some were suspect before."""
    correlator = Correlator(LIMITS)
    where = ((GroupKind.GATEWAY, "g"), (GroupKind.HOST, "h"), (GroupKind.CLASS, "c"))
    for name in NAMES[:10]:
        correlator.observe(name, where, bad=False, now=Monotonic(0.0))
    for name in NAMES[:5]:
        correlator.observe(name, where, bad=True, now=Monotonic(1.0))
    for name in NAMES[:10]:
        correlator.observe(name, where, bad=True, now=Monotonic(2.0), only=GroupKind.HOST)

    (opened,) = correlator.settle(Monotonic(3.0))
    assert (opened.incident.kind, opened.incident.group) == (GroupKind.HOST, "h")
    assert opened.incident.count == 10
    for name in NAMES[:10]:
        correlator.observe(name, where, bad=False, now=Monotonic(4.0))
    (closed,) = correlator.settle(Monotonic(5.0))
    assert closed.step is IncidentStep.CLOSED
    assert not correlator._recent


def test_where_no_host_is_known_other_groups_explain_it() -> None:
    """Without a node, the site is what the devices have in common."""
    correlator = Correlator(LIMITS)
    where = ((GroupKind.SITE, "s"),)
    for name in NAMES[:5]:
        correlator.observe(name, where, bad=False, now=Monotonic(0.0))
        correlator.observe(name, where, bad=True, now=Monotonic(1.0), only=GroupKind.HOST)
    (opened,) = correlator.settle(Monotonic(2.0))
    assert opened.incident.kind is GroupKind.SITE

"""The detection benchmark is reproducible, and its figures depend on the faults."""

from __future__ import annotations

import random

from bench import detection
from nomad_watchdog.config.probes import ProbeSettings
from nomad_watchdog.model import Limits


def world(seed: int = 1) -> detection.World:
    return detection.World(random.Random(seed), Limits(), ProbeSettings(kind="tcp", port=80), 2.0)


def test_one_seed_gives_one_result() -> None:
    """Two runs print the same rows, and the small run misses no floor."""
    rows = detection.run(quick=True)

    assert rows == detection.run(quick=True)
    assert [row.name for row in rows if row.missed] == []


def test_an_outage_is_told_by_both_and_is_not_false() -> None:
    """A device that is off from 1,000 s to 1,400 s is correctly reported offline in time by both, by ours after 15 to
    30 s."""
    for judge in (detection.naive, detection.ours):
        known = detection.Faults([(1_000.0, 1_400.0, detection.DEVICE, True)])
        tally = detection.Tally()
        judge(world(), known, tally)

        assert (len(tally.took), tally.missed, tally.false) == (1, 0, 0)
        assert 15.0 <= tally.took[0] <= 45.0
    assert tally.took[0] <= 30.0


def test_a_long_stall_of_the_service_fools_the_naive_one_only() -> None:
    """If a service stalls for a minute while its host answers, only the naive judge reports it as offline."""
    found = {}
    for judge in (detection.naive, detection.ours):
        tally = detection.Tally()
        judge(world(), detection.Faults([(1_000.0, 1_060.0, detection.SERVICE, False)]), tally)
        found[judge] = tally.false

    assert found == {detection.naive: 1, detection.ours: 0}


def test_skipping_loses_as_much_as_going_step_by_step() -> None:
    """Over ten devices and a day, one percent of the exchanges is lost (0.9 to 1.1 %)."""
    lost = steps = 0
    it = world()
    none = detection.Faults([])
    for _ in range(10):
        now = 0.0
        while now < detection.DAY_S:
            then, is_lost = it.skip(none, now, 5.0)
            steps += round((then - now) / 5.0) + 1
            lost += is_lost
            now = then + 5.0

    assert 0.009 < lost / steps < 0.011


def test_a_watcher_that_cannot_ask_is_our_problem_and_no_outage() -> None:
    """Nothing can be probed for six minutes: the device is unwatched once and never offline; the naive judge is
    fooled."""
    found = {}
    for judge in (detection.naive, detection.ours):
        tally = detection.Tally()
        judge(world(), detection.Faults([(1_000.0, 1_360.0, detection.BLIND, False)]), tally)
        found[judge] = (tally.false, tally.unwatched)

    assert found == {detection.naive: (1, 0), detection.ours: (0, 1)}


def test_an_outage_whose_end_could_not_be_seen_is_not_claimed_again() -> None:
    """The device comes back while nothing can be probed: a lost probe after that is no evidence, in 50 worlds."""
    spans = [(1_000.0, 1_200.0, detection.DEVICE, True), (1_100.0, 1_400.0, detection.BLIND, False)]
    for seed in range(50):
        tally = detection.Tally()
        detection.ours(world(seed), detection.Faults(list(spans)), tally)
        assert (tally.false, len(tally.took)) == (0, 1)


def test_a_dead_service_is_degraded_and_no_suspicion_lasts() -> None:
    """A service that is dead for ten minutes while its host answers is degraded and never offline. During days with all
    kinds of faults, no device is suspect for longer than the documented 44 s."""
    tally = detection.Tally()
    dead = detection.Faults([(1_000.0, 1_600.0, detection.SERVICE, False)])
    detection.ours(world(), dead, tally)
    assert tally.degraded >= 1
    assert tally.false == 0
    it = world(7)
    for _ in range(40):
        detection.ours(it, detection.faults(it.chance), tally)
    assert tally.false == 0
    assert 0.0 < tally.suspect_s <= 44.0

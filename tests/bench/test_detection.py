"""The benchmark of detection gives the same figures each time, and could give others."""

from __future__ import annotations

import random

from bench import detection
from nomad_watchdog.config_probes import Probe
from nomad_watchdog.model import Limits


def world(seed: int = 1) -> detection.World:
    return detection.World(random.Random(seed), Limits(), Probe(kind="tcp", port=80), 2.0)


def test_one_seed_gives_one_result() -> None:
    """Two runs print the same rows, and all floors are kept in the small run too."""
    rows = detection.run(quick=True)

    assert rows == detection.run(quick=True)
    assert [row.name for row in rows if row.missed] == []


def test_an_outage_is_told_by_both_and_is_not_false() -> None:
    """A device that is off from 1,000 s to 1,400 s is called offline in time and rightly by both, by
    ours after 15 to 30 s."""
    for judge in (detection.naive, detection.ours):
        known = detection.Faults([(1_000.0, 1_400.0, detection.DEVICE, True)])
        tally = detection.Tally()
        judge(world(), known, tally)

        assert (len(tally.took), tally.missed, tally.false) == (1, 0, 0)
        assert 15.0 <= tally.took[0] <= 45.0
    assert tally.took[0] <= 30.0


def test_a_long_stall_of_the_service_fools_the_naive_one_only() -> None:
    """A service that stalls for a minute while its host answers is offline for the naive one."""
    found = {}
    for judge in (detection.naive, detection.ours):
        tally = detection.Tally()
        judge(world(), detection.Faults([(1_000.0, 1_060.0, detection.SERVICE, False)]), tally)
        found[judge] = tally.false

    assert found == {detection.naive: 1, detection.ours: 0}


def test_skipping_loses_as_much_as_going_step_by_step() -> None:
    """Over ten devices and a day, one exchange in a hundred is lost (0.9 to 1.1 %)."""
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

"""Probe interval, and consecutive misses that make a device suspect. Pure: no clock, no I/O.

A suspect device is probed more often, to detect a recovery sooner. This does not make it offline sooner:
the misses before `suspect` occur at the normal interval, and the two confirmations stay one interval apart (S6).
"""

from __future__ import annotations

FASTER = 4
MAX_QUICK = 40
"""Maximum consecutive probes at the quick interval, so that a device that never answers is not probed fast forever."""
ENOUGH = 20
"""Minimum number of earlier results before packet loss raises the threshold."""
MAX_LOSS = 0.3
"""Packet loss (0 to 1) above which the device counts as unhealthy, and the threshold is not raised."""
CHANCE = 0.001
"""Maximum probability that a run of misses is the normal packet loss of the path."""


def interval(interval_s: float, min_interval_s: float, state: str, quick: int) -> float:
    """Seconds between the starts of two probes; at most interval_s.

    `quick`: number of consecutive probes so far at the quick interval."""
    if state != "suspect" or quick >= MAX_QUICK:
        return interval_s
    return min(interval_s, max(min_interval_s, interval_s / FASTER))


def need(misses: int, seen: int, loss: float) -> int:
    """Consecutive misses that make the device suspect: `misses`, or up to twice as many on a path with packet loss.
    With `misses` = 1, always 1.

    `seen`: number of earlier results; `loss`: share of them lost (0 to 1). Both exclude the current run of misses."""
    if seen < ENOUGH or loss > MAX_LOSS or misses == 1:
        return misses
    wanted, chance = misses, loss**misses
    while wanted < 2 * misses and chance > CHANCE:
        wanted += 1
        chance *= loss
    return wanted

"""How soon the next probe, and how many misses make a device suspect. Pure: no clock, no I/O.

A suspected device is looked at more often, so that a recovery is seen soon. It is not accused sooner for it:
the misses before the suspicion come at the usual interval, and two confirmations stay an interval apart (S6).
"""

from __future__ import annotations

FASTER = 4
MAX_QUICK = 40
"""Quick probes in a row: a device that never answers is not asked at the quick pace for ever."""
ENOUGH = 20
"""Earlier results that a path must have before it is called lossy."""
MAX_LOSS = 0.3
"""A device that misses more than this is not well, whatever its path."""
CHANCE = 0.001
"""Maximum probability that a run of misses is the usual loss of the path."""


def interval(interval_s: float, min_interval_s: float, state: str, quick: int) -> float:
    """Seconds from the start of this probe to the start of the next; never more than interval_s.

    `quick`: quick probes in a row until now."""
    if state != "suspect" or quick >= MAX_QUICK:
        return interval_s
    return min(interval_s, max(min_interval_s, interval_s / FASTER))


def need(misses: int, seen: int, loss: float) -> int:
    """Misses in a row that make suspect: `misses`, and up to twice as many where the path is known to lose.
    With `misses` = 1 each miss counts.

    `seen` earlier results, of which the share `loss` was lost, leave out the run of misses at hand."""
    if seen < ENOUGH or loss > MAX_LOSS or misses == 1:
        return misses
    wanted, chance = misses, loss**misses
    while wanted < 2 * misses and chance > CHANCE:
        wanted += 1
        chance *= loss
    return wanted

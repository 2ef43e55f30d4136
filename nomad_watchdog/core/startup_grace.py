"""How long an agent may take to start before its device counts as unwatched: measured, not a constant.

Start times are approximately lognormal, with a tail that is rarely observed completely: 500 samples rarely contain
the slowest of a thousand starts. The grace is therefore the greater of two estimates of the p99.9: the observed one,
and that of the lognormal distribution through the median and the 90th percentile, which a few outliers do not change.
The second one is wider with fewer samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.model import Monotonic

MIN_S: Final = 0.05
MAX_S: Final = 7_200.0
"""Measured times are clamped to the range from MIN_S to MAX_S."""
STEP: Final = 1.12
"""Ratio of two neighbouring bins: an estimate is up to 12 % too high, never too low."""
BINS: Final = math.ceil(math.log(MAX_S / MIN_S) / math.log(STEP)) + 1
ENOUGH: Final = 30.0
"""Minimum number of samples. A class with fewer uses those of the fleet; a fleet with fewer, the setting."""
WINDOW: Final = 5_000.0
"""Maximum number of samples that count: new samples displace old ones."""
HALF_LIFE_S: Final = 12 * 3600.0
"""Time after which a sample counts half, in seconds. A slow site is forgotten within days."""
MAX_CLASSES: Final = 64
"""Maximum number of classes that are measured separately; the samples of others count for the fleet only."""
_Z90: Final = 1.2816
_Z999: Final = 3.0902
_MARGIN: Final = 1.25


@dataclass(frozen=True, slots=True)
class Grace:
    """The grace in force for a class, seconds, and where it comes from."""

    seconds: float
    samples: int
    source: str
    """class | fleet | setting"""


@dataclass(frozen=True, slots=True)
class GraceLimits:
    """`fallback_s` applies until there are enough samples; measured values are clamped to the other two."""

    fallback_s: float = 60.0
    least_s: float = 15.0
    most_s: float = 900.0


@dataclass(slots=True)
class _Times:
    """A histogram of times on a logarithmic scale, in which old samples fade."""

    bins: list[float] = field(default_factory=lambda: [0.0] * BINS)
    weight: float = 0.0
    faded_at: float = 0.0

    def add(self, took_s: float, now: Monotonic) -> None:
        keep = 0.5 ** (max(0.0, now - self.faded_at) / HALF_LIFE_S)
        keep *= min(1.0, (WINDOW - 1) / max(self.weight * keep, 1.0))
        # Fading iterates over the bins, so it is done only when it makes a difference.
        if keep < 0.99:
            self.bins = [weight * keep for weight in self.bins]
            self.weight = sum(self.bins)
            self.faded_at = now
        self.bins[_bin_of(took_s)] += 1.0
        self.weight += 1.0

    def quantile(self, share: float) -> float:
        """Upper edge of the bin that holds this share (0 to 1) of the weight."""
        left = share * self.weight
        for number, weight in enumerate(self.bins):
            left -= weight
            if left <= 1e-9:
                return MIN_S * STEP**number
        return MAX_S

    def slowest(self) -> float:
        """A conservative estimate of the p99.9 of start times, in seconds."""
        median, ninetieth = self.quantile(0.5), self.quantile(0.9)
        # The error of the spread falls with the square root of the samples; add three deviations.
        spread = math.log(ninetieth / median) / _Z90 * (1.0 + 3.0 / math.sqrt(self.weight))
        return _MARGIN * max(median * math.exp(_Z999 * spread), self.quantile(0.999))


@dataclass(slots=True)
class StartTimes:
    """Measured start times, by class and of the fleet. Memory is bounded."""

    limits: GraceLimits
    _fleet: _Times = field(default_factory=_Times)
    _classes: dict[str, _Times] = field(default_factory=dict)
    _known: dict[str, Grace] = field(default_factory=dict)

    def go_by(self, limits: GraceLimits) -> None:
        """Apply these limits from now on."""
        self.limits = limits
        self._known.clear()

    def add(self, agent_class: str, took_s: float, now: Monotonic) -> None:
        """Record the time in seconds from dispatch to ready of an agent of this class. Raises ValueError if it is
        negative or not finite."""
        if not math.isfinite(took_s) or took_s < 0:
            raise ValueError(f"a start took {took_s!r} s")
        self._fleet.add(took_s, now)
        times = self._classes.get(agent_class)
        if times is None and len(self._classes) < MAX_CLASSES:
            times = self._classes[agent_class] = _Times(faded_at=now)
        if times is not None:
            times.add(took_s, now)
        self._known.clear()

    def grace(self, agent_class: str) -> Grace:
        """The grace in force. Constant time between two samples."""
        known = self._known.get(agent_class)
        if known is None:
            known = self._grace(self._classes.get(agent_class))
            if len(self._known) < 2 * MAX_CLASSES:
                self._known[agent_class] = known
        return known

    def _grace(self, times: _Times | None) -> Grace:
        for source, found in (("class", times), ("fleet", self._fleet)):
            if found is not None and found.weight >= ENOUGH:
                held = min(max(found.slowest(), self.limits.least_s), self.limits.most_s)
                return Grace(held, int(found.weight), source)
        seen = int(times.weight) if times is not None else 0
        return Grace(self.limits.fallback_s, seen, "setting")


def _bin_of(took_s: float) -> int:
    if took_s <= MIN_S:
        return 0
    return min(BINS - 1, math.ceil(math.log(min(took_s, MAX_S) / MIN_S) / math.log(STEP) - 1e-9))

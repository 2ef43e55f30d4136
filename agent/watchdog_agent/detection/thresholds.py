"""Warnings for a probe that succeeds but is slow or loses too many runs. Loaded only if a probe has such a
threshold. Pure: no clock, no I/O.

`warn_time_s`: the warning begins after `misses` consecutive slow runs, and ends after as many fast ones.
`warn_loss`: a share (0 to 1) of the last 60 runs, evaluated from 20 runs on; the warning ends at half of it or less.
Outages are not loss: a run of misses that makes the device suspect clears the statistics.
"""

from __future__ import annotations

from watchdog_agent.detection import probe_interval
from watchdog_agent.detection.probe_stats import Stats

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.types import Outcome, Probe


class Thresholds:
    """The thresholds of `spec`, a checked probe of the configuration."""

    def __init__(self, spec: Probe) -> None:
        self.most_s: float | None = spec.get("warn_time_s")
        self.most_loss: float | None = spec.get("warn_loss")
        self.need = int(spec["misses"])
        self._slow = self._lossy = False
        self._streak = 0
        """Consecutive runs that contradict `_slow`."""
        self._stats = Stats()
        self._misses = 0

    def record(self, outcome: Outcome, took_s: float, need: int) -> str:
        """Record one result; return the exceeded thresholds in words, or "". `need`: misses that make suspect."""
        if outcome is None:
            return self._describe(took_s)
        self._misses = 0 if outcome else self._misses + 1
        if self._misses < need:
            self._stats.add(outcome, took_s)
        else:
            self._stats = Stats()
        loss = self._stats.loss()
        if self.most_loss is not None and (
            self._lossy or self._stats.count >= probe_interval.ENOUGH
        ):
            self._lossy = loss > (self.most_loss / 2 if self._lossy else self.most_loss)
        if self.most_s is not None and outcome:
            self._streak = self._streak + 1 if (took_s > self.most_s) != self._slow else 0
            if self._streak >= self.need:
                self._slow, self._streak = not self._slow, 0
        return self._describe(took_s)

    def _describe(self, took_s: float) -> str:
        found = []
        if self._slow:
            found.append(f"took {took_s:.3f} s (warn_time is {self.most_s:g} s)")
        if self._lossy:
            loss = self._stats.loss()
            found.append(
                f"{loss:.0%} of the last {self._stats.count} probes were lost "
                f"(warn_loss is {self.most_loss:g})"
            )
        return "; ".join(found)

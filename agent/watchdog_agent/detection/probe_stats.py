"""Loss and latency over the last results of one probe, in 240 bytes. Pure."""

from __future__ import annotations

from watchdog_agent.runtime.stdlib_light import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from watchdog_agent.runtime.status_types import ProbeStats

KEPT = 60
_LOST = 0xFFFFFFFF
_MAX_US = _LOST - 1


class Stats:
    """A ring buffer of the last KEPT results, in whole microseconds (at most 71 minutes)."""

    def __init__(self) -> None:
        self._ring = bytearray(4 * KEPT)
        self._next = 0
        self.count = 0
        """Number of results in the buffer, 0 to KEPT."""
        self.streak = 0
        """Number of consecutive losses up to now."""

    def add(self, ok: bool, took_s: float) -> None:  # as passed by a probe's callback
        """Add one result; replaces the oldest one when KEPT are stored."""
        value = min(_MAX_US, max(0, int(took_s * 1e6))) if ok else _LOST
        struct.pack_into("=I", self._ring, 4 * self._next, value)
        self._next = (self._next + 1) % KEPT
        self.count = min(KEPT, self.count + 1)
        self.streak = 0 if ok else self.streak + 1

    def _values(self) -> list[int]:
        return [v for v in struct.unpack_from(f"={self.count}I", self._ring) if v != _LOST]

    def loss(self) -> float:
        """Share of the kept results that were lost, 0 to 1."""
        return 1 - len(self._values()) / self.count if self.count else 0.0

    def earlier(self) -> tuple[int, float]:
        """(results, loss) without the current run of losses: the normal quality of the path."""
        before = self.count - min(self.streak, self.count)
        return (before, 1 - len(self._values()) / before) if before else (0, 0.0)

    def summary(self) -> ProbeStats:
        """For /status. Latencies in seconds, of successful results only; null without any."""
        values = sorted(self._values())
        loss = 1 - len(values) / self.count if self.count else 0.0
        count = len(values)
        return {
            "count": self.count,
            "loss": round(loss, 4),
            "min_s": _seconds(values[0]) if values else None,
            "mean_s": _seconds(sum(values) / count) if values else None,
            # Nearest-rank percentile: always a measured value, also with few results.
            "p50_s": _seconds(values[(count - 1) // 2]) if values else None,
            "p95_s": _seconds(values[-(-count * 19 // 20) - 1]) if values else None,
            "max_s": _seconds(values[-1]) if values else None,
        }


def _seconds(microseconds: float) -> float:
    return round(microseconds / 1e6, 6)

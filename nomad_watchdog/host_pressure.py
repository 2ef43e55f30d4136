"""The pressure of a host, as its kernel measures it and an agent reports it (pressure stall information).

https://docs.kernel.org/accounting/psi.html
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Resource(StrEnum):
    """What the tasks of a host wait for."""

    CPU = "cpu"
    MEMORY = "memory"
    IO = "io"


@dataclass(frozen=True, slots=True)
class Stall:
    """Share of the time in which at least one task of the host waited for a resource, percent, 0 to 100."""

    avg10: float
    """Over the last 10 seconds."""
    avg60: float
    """Over the last 60 seconds."""


@dataclass(frozen=True, slots=True)
class HostPressure:
    """One reading. None = the agent could not read this resource."""

    cpu: Stall | None = None
    memory: Stall | None = None
    io: Stall | None = None
    unreadable: str = ""
    """Why a resource could not be read; "" = all were read."""

    def of(self, resource: Resource) -> Stall | None:
        """The reading of one resource."""
        match resource:
            case Resource.CPU:
                return self.cpu
            case Resource.MEMORY:
                return self.memory
            case Resource.IO:
                return self.io

    @property
    def is_known(self) -> bool:
        """Whether at least one resource was read."""
        return self.cpu is not None or self.memory is not None or self.io is not None


@dataclass(frozen=True, slots=True)
class HostUsage:
    """How much of a host is in use by the statistics of its scheduler, percent of its capacity, 0 to 100. None = not
    known. It is no pressure: a host that is in use may let no task wait."""

    cpu: float | None = None
    memory: float | None = None

    def values(self) -> dict[Resource, float]:
        """Those that are known."""
        found = {Resource.CPU: self.cpu, Resource.MEMORY: self.memory}
        return {resource: value for resource, value in found.items() if value is not None}


def percent(part: float, whole: float) -> float | None:
    """The share of a capacity, within 0 and 100; None without a capacity."""
    return min(100.0, max(0.0, 100.0 * part / whole)) if whole > 0 else None

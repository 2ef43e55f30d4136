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

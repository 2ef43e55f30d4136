"""The pressure of a host in the report of an agent (watchdog_agent.wire)."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nomad_watchdog.host_pressure import HostPressure, Stall

UNREADABLE_CHARS: Final = 200
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


def _short(text: str) -> str:
    # As all texts of agents: displayed, so cut and sanitised, and its report is not lost.
    return "".join(c if c.isprintable() else "�" for c in text[:UNREADABLE_CHARS])


class StallIn(BaseModel):
    """The pressure on one resource."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    avg10: Percent
    avg60: Percent


class HostPressureIn(BaseModel):
    """One reading of a host. A resource that the agent cannot read is missing."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    cpu: StallIn | None = None
    memory: StallIn | None = None
    io: StallIn | None = None
    unreadable: Annotated[str, AfterValidator(_short)] = ""

    def pressure(self) -> HostPressure:
        """As `HostPressure`."""
        cpu, memory, io = (
            None if one is None else Stall(one.avg10, one.avg60)
            for one in (self.cpu, self.memory, self.io)
        )
        return HostPressure(cpu, memory, io, self.unreadable)

"""Settings of relief: when agents leave overloaded hosts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from nomad_watchdog.config.types import Block, Fraction, Positive, Seconds
from nomad_watchdog.core.host_load import PressureThresholds
from nomad_watchdog.core.relief import ReliefRules
from nomad_watchdog.host_pressure import Resource


class SignalSettings(Block):
    """The thresholds of the pressure on one resource."""

    kind: Literal["cpu", "memory", "io"]
    high: Annotated[Fraction, Field(gt=0)]
    low: Fraction
    usage_high: Annotated[Fraction, Field(gt=0)] | None = None
    usage_low: Fraction | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if (self.usage_high is None) is not (self.usage_low is None):
            raise ValueError("usage_high and usage_low must be set together")
        if self.usage_high is not None and self.usage_low is not None:
            if self.kind == "io":
                raise ValueError(
                    "schedulers have no statistics of io; remove usage_high and usage_low"
                )
            if self.usage_low >= self.usage_high:
                raise ValueError("usage_low must be less than usage_high")
        return self


class ReliefSettings(Block):
    """Relief of overloaded hosts; without the block no host is relieved."""

    signal: Annotated[tuple[SignalSettings, ...], Field(min_length=1, max_length=3)]
    looks: Annotated[int, Field(ge=1, le=100)] = 3
    stale: Annotated[Positive, Field(ge=10)] = 60.0
    per_host: Annotated[int, Field(ge=1, le=100)] = 1
    at_once: Annotated[int, Field(ge=1, le=1_000)] = 1
    min_age: Seconds = 600.0
    cooldown: Annotated[Positive, Field(ge=60)] = 300.0
    dry_run: bool = True

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len({one.kind for one in self.signal}) < len(self.signal):
            raise ValueError("there are two blocks signal of the same kind; keep one")
        return self

    def rules(self) -> ReliefRules:
        """As `ReliefRules`."""
        return ReliefRules(
            thresholds={
                Resource(one.kind): PressureThresholds(100 * one.high, 100 * one.low)
                for one in self.signal
            },
            usage={
                Resource(one.kind): PressureThresholds(100 * one.usage_high, 100 * one.usage_low)
                for one in self.signal
                if one.usage_high is not None and one.usage_low is not None
            },
            looks=self.looks,
            stale_s=self.stale,
            per_host=self.per_host,
            at_once=self.at_once,
            min_age_s=self.min_age,
            cooldown_s=self.cooldown,
            dry_run=self.dry_run,
        )

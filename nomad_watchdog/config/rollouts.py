"""Settings of roll-outs: the steps of a class's versions, and when a version is taken back."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from nomad_watchdog.config.types import Block, Fraction, Positive, Seconds, Text, Url
from nomad_watchdog.core import allowed_times, rollout_steps
from nomad_watchdog.core.rollout_analysis import Analysis
from nomad_watchdog.core.rollout_steps import Strategy


def checked_time(value: str) -> str:
    """A weekly time. Raises ValueError."""
    allowed_times.parse(value)
    return value


LabelPart = Annotated[str, Field(min_length=1, max_length=128)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class RolloutStepSettings(Block):
    """One step: the devices that get the new version, and how long its agents must be ready."""

    count: Annotated[int, Field(ge=1)] | None = None
    fraction: Share | None = None
    selector: dict[LabelPart, Text] = Field(default_factory=dict, max_length=32)
    by: LabelPart | None = None
    soak: Seconds = 0.0
    pause: bool = False

    @model_validator(mode="after")
    def _fits(self) -> RolloutStepSettings:
        if self.count is not None and self.fraction is not None:
            raise ValueError("give count or fraction, not both")
        if self.pause and (
            self.count is not None
            or self.fraction is not None
            or self.selector
            or self.by
            or self.soak
        ):
            raise ValueError(
                "a step with pause = true has no devices; put them in a step of their own"
            )
        return self

    def step(self) -> rollout_steps.RolloutStep:
        return rollout_steps.RolloutStep(
            count=self.count or 0,
            fraction=1.0 if self.fraction is None else self.fraction,
            selector=self.selector,
            by=self.by or "",
            soak_s=self.soak,
            pause=self.pause,
        )


class AnalysisSettings(Block):
    """A query of Prometheus that judges a version while a step has its turn."""

    url: Url
    query: Annotated[str, Field(max_length=1024, pattern=r"\S")]
    min: Annotated[float, Field(allow_inf_nan=False)] | None = None
    max: Annotated[float, Field(allow_inf_nan=False)] | None = None
    failures: Annotated[int, Field(ge=1, le=1000)] = 3
    interval: Annotated[Positive, Field(ge=1)] = 30.0
    timeout: Annotated[Positive, Field(le=60)] = 5.0
    token_file: Text = ""

    @model_validator(mode="after")
    def _fits(self) -> AnalysisSettings:
        if self.min is None and self.max is None:
            raise ValueError("analysis needs min or max: the limits of the query's value")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min ({self.min:g}) is more than max ({self.max:g})")
        if self.timeout > self.interval:
            raise ValueError(
                f"timeout ({self.timeout:g}s) must not be longer than interval ({self.interval:g}s)"
            )
        return self

    def rules(self) -> Analysis:
        return Analysis(
            url=self.url,
            query=self.query,
            minimum=-math.inf if self.min is None else self.min,
            maximum=math.inf if self.max is None else self.max,
            failures=self.failures,
            interval_s=self.interval,
            timeout_s=self.timeout,
            token_file=self.token_file,
        )


class RolloutStrategySettings(Block):
    """What a class may override."""

    step: Annotated[tuple[RolloutStepSettings, ...], Field(max_length=32)] = ()
    progress_deadline: Positive = 600.0
    abort_share: Share = 0.20
    abort_min: Annotated[int, Field(ge=1)] = 5
    verdict_margin: Fraction = 0.10
    well_before: Seconds = 600.0
    on_abort: Literal["back", "halt"] = "back"
    allow: Annotated[
        tuple[Annotated[str, AfterValidator(checked_time)], ...], Field(max_length=32)
    ] = ()
    repairs: bool = False
    upgrades: Literal["now", "wait"] = "now"
    analysis: AnalysisSettings | None = None

    @model_validator(mode="after")
    def _needs_steps(self) -> Self:
        if self.analysis is not None and not self.step and self.upgrades == "now":
            raise ValueError("analysis needs steps: add  step { fraction = 1.0 }")
        return self

    def strategy(self, *, own_version: bool, soak_s: float) -> Strategy:
        """`own_version`: the version of the class is that of the control plane. `soak_s`: soak of a class without steps
        that waits for an upgrade; it has one of all devices."""
        defers = own_version and self.upgrades == "wait"
        whole = [rollout_steps.RolloutStep(soak_s=soak_s)] if defers else []
        return Strategy(
            steps=rollout_steps.complete([one.step() for one in self.step] or whole),
            defers_upgrades=defers,
            analysis=None if self.analysis is None else self.analysis.rules(),
            progress_deadline_s=self.progress_deadline,
            abort_share=self.abort_share,
            abort_min=self.abort_min,
            verdict_margin=self.verdict_margin,
            well_before_s=self.well_before,
            back=self.on_abort == "back",
            allow=tuple(map(allowed_times.parse, self.allow)),
            repairs=self.repairs,
        )


class RolloutSettings(RolloutStrategySettings):
    at_once: Annotated[int, Field(ge=1)] = 5
    fraction: Fraction = 0.10
    soak: Seconds = 0.0
    deaths: Annotated[int, Field(ge=1)] = 3

"""(rules, what is seen, what was advised) → how many workers a pool should have, and why.

Proportional, as the HorizontalPodAutoscaler does it (Kubernetes, "Algorithm details"): so many workers
that each has `target` of the metric. What keeps that from swinging:

- tolerance: a metric close to its target moves nothing;
- hysteresis: a pool shrinks only to the most that was advised within `settle_s`, so a short lull costs
  no worker, and a fleet that is looked at for the first time loses none before it was watched for so long;
- cool-down: after a change, whoever made it, the next one waits until its effect can be seen;
- steps: one change moves at most so many workers;
- a metric that is missing, or is no number, changes nothing: an exporter that died is not an idle fleet.

Only the bounds go over all that, as they are the operator's word: a pool outside is moved inside at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from nomad_watchdog.model import Monotonic

_ROUNDING: Final = 1e-9
"""0.3 / 0.1 is 3.0000000000000004 workers of floating point, and 3 of anybody else."""


class Measure(StrEnum):
    """What the metric's number is of."""

    WORKER = "worker"
    """The average of one worker: CPU in percent, requests a second of each."""
    ALL = "all"
    """The whole, to be shared by the workers: the depth of a queue."""


class ScalingVerb(StrEnum):
    """What a decision comes to."""

    KEEP = "keep"
    UP = "up"
    DOWN = "down"


class ScalingReason(StrEnum):
    """What decided."""

    ON_TARGET = "on target"
    METRIC = "metric"
    BOUNDS = "bounds"
    NO_METRIC = "no metric"
    COOL_DOWN = "cool-down"
    SETTLING = "settling"


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """How one pool is scaled. Raises ValueError for rules that contradict each other."""

    minimum: int
    maximum: int
    target: float
    """Of the metric, for one worker; above 0."""
    measure: Measure
    tolerance: float = 0.1
    """Share of the target that the metric may be off, 0 to 1."""
    cooldown_up_s: float = 30.0
    cooldown_down_s: float = 120.0
    settle_s: float = 120.0
    step_up: int = 4
    step_down: int = 1
    dry_run: bool = False
    """Say what would be done, and do nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum or self.maximum < 1:
            raise ValueError(
                f"min ({self.minimum}) must be 0 to max ({self.maximum}), max 1 or more"
            )
        if self.minimum == 0 and self.measure is Measure.WORKER:
            raise ValueError("min must be 1 or more: without a worker there is no average of one")
        if not (0 < self.target < math.inf):
            raise ValueError(f"target ({self.target:g}) must be more than 0")
        if self.step_up < 1 or self.step_down < 1:
            raise ValueError("step_up and step_down must be 1 or more")


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is kept of a pool from one look to the next. Empty: it has never been looked at."""

    advised: tuple[tuple[Monotonic, int], ...] = ()
    """Pieces of advice, oldest first, that no later one exceeds: at most one a number of workers."""
    changed_at: Monotonic | None = None
    count: int | None = None
    """As last seen, so that a change by somebody else is noticed."""


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """`count`: how many there should be now; `advised`: what the metric alone asks for, within bounds."""

    count: int
    advised: int
    verb: ScalingVerb
    why: ScalingReason
    reason: str
    memory: ScalingState
    dry_run: bool = False

    @property
    def acts(self) -> bool:
        """Whether something is to be done about it."""
        return self.verb is not ScalingVerb.KEEP and not self.dry_run


def advise(rules: ScalingRules, count: int, value: float) -> int:
    """How many workers the metric asks for, by itself and within bounds. `value`: finite, 0 or more."""
    share = value / rules.target
    if rules.measure is Measure.ALL:
        wanted, ratio = share, share / count if count else math.inf
    else:
        wanted, ratio = share * count, share
    # Without a worker there is no ratio: anything that waits needs a first one, nothing needs none.
    if count and abs(ratio - 1.0) <= rules.tolerance:
        return _bounded(rules, count)
    return _bounded(rules, math.ceil(min(wanted, rules.maximum) - _ROUNDING))


def decide(
    rules: ScalingRules, count: int, value: float | None, memory: ScalingState, now: Monotonic
) -> ScalingDecision:
    """What to do about a pool of `count` workers whose metric is `value`; None = it could not be had.

    `now` may not run backwards; if it does, no time has passed. The caller keeps the decision's memory,
    and `changed` in its place when it acted."""
    memory = _seen(memory, count, now)
    if not rules.minimum <= count <= rules.maximum:
        goal = _bounded(rules, count)
        reason = f"{count} is outside {rules.minimum} to {rules.maximum}"
        return _decision(rules, count, goal, goal, ScalingReason.BOUNDS, reason, memory)
    if value is None or not math.isfinite(value) or value < 0:
        said = "no metric" if value is None else f"the metric is {value:g}"
        return _decision(
            rules, count, count, count, ScalingReason.NO_METRIC, f"{said}: no change", memory
        )
    advised = advise(rules, count, value)
    memory = _remember(memory, rules, count, advised, now)
    asked = f"metric {value:g}, {rules.target:g} a worker: {advised} advised"
    if advised == count:
        return _decision(rules, count, count, advised, ScalingReason.ON_TARGET, asked, memory)
    if advised < count:
        settled = min(count, max(number for _, number in memory.advised))
        if settled == count:
            reason = f"{asked}, {settled} within the last {rules.settle_s:g} s"
            return _decision(rules, count, count, advised, ScalingReason.SETTLING, reason, memory)
        goal = max(settled, count - rules.step_down)
    else:
        goal = min(advised, count + rules.step_up)
    wait_s = _wait_s(rules, memory, now, up=goal > count)
    if wait_s > 0:
        reason = f"{asked}, {wait_s:.0f} s of the cool-down are left"
        return _decision(rules, count, count, advised, ScalingReason.COOL_DOWN, reason, memory)
    return _decision(rules, count, goal, advised, ScalingReason.METRIC, asked, memory)


def changed(memory: ScalingState, count: int, now: Monotonic) -> ScalingState:
    """After the pool was told to have `count` workers: the cool-down begins."""
    return replace(memory, changed_at=now, count=count)


def _bounded(rules: ScalingRules, count: int) -> int:
    return max(rules.minimum, min(rules.maximum, count))


def _seen(memory: ScalingState, count: int, now: Monotonic) -> ScalingState:
    if memory.count is None or memory.count == count:
        return replace(memory, count=count)
    return changed(memory, count, now)  # by somebody else: that has to show its effect too


def _remember(
    memory: ScalingState, rules: ScalingRules, count: int, advised: int, now: Monotonic
) -> ScalingState:
    """With one more piece of advice; the first look counts as advice to stay as it is."""
    before = memory.advised or ((now, count),)
    kept = [(at, number) for at, number in before if now - at < rules.settle_s]
    while kept and kept[-1][1] <= advised:
        kept.pop()
    return replace(memory, advised=(*kept, (now, advised)))


def _wait_s(rules: ScalingRules, memory: ScalingState, now: Monotonic, *, up: bool) -> float:
    if memory.changed_at is None:
        return 0.0
    cooldown_s = rules.cooldown_up_s if up else rules.cooldown_down_s
    return cooldown_s - max(0.0, now - memory.changed_at)


def _decision(
    rules: ScalingRules,
    count: int,
    goal: int,
    advised: int,
    why: ScalingReason,
    reason: str,
    memory: ScalingState,
) -> ScalingDecision:
    verb = (
        ScalingVerb.KEEP if goal == count else ScalingVerb.UP if goal > count else ScalingVerb.DOWN
    )
    return ScalingDecision(goal, advised, verb, why, reason, memory, rules.dry_run)

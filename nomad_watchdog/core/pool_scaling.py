"""(rules, current values, earlier advice) → how many workers a pool should have, and why.

Proportional, like the HorizontalPodAutoscaler (Kubernetes, "Algorithm details"): the number of workers at which each
has `target` of the metric. These rules prevent oscillation:

- tolerance: a metric close to its target changes nothing;
- hysteresis: a pool shrinks only to the highest number advised within `settle_s`, so a short lull costs
  no worker, and a pool that is observed for the first time loses none before `settle_s` has passed;
- cool-down: after a change by any actor, the next one waits until its effect is visible;
- steps: the maximum number of workers that one change adds or removes;
- a metric that is missing, or is not a number, changes nothing: a failed exporter is not an idle fleet.

Only the bounds take precedence over these rules, because the operator sets them: a pool outside the bounds is moved
inside at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from nomad_watchdog.model import Monotonic

_ROUNDING: Final = 1e-9
"""Tolerance for floating-point errors: (0.1 + 0.2) / 0.1 is 3.0000000000000004, but means 3 workers."""


class Measure(StrEnum):
    """What the value of a metric refers to."""

    WORKER = "worker"
    """The average per worker, such as CPU in percent or requests per second."""
    ALL = "all"
    """The total that the workers share, such as the depth of a queue."""


class ScalingVerb(StrEnum):
    """The change that a decision makes."""

    KEEP = "keep"
    UP = "up"
    DOWN = "down"


class ScalingReason(StrEnum):
    """What determined a decision."""

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
    """Target value of the metric per worker; above 0."""
    measure: Measure
    tolerance: float = 0.1
    """Permitted deviation of the metric, as a share of the target, 0 to 1."""
    cooldown_up_s: float = 30.0
    cooldown_down_s: float = 120.0
    settle_s: float = 120.0
    step_up: int = 4
    step_down: int = 1
    dry_run: bool = False
    """Report decisions without acting on them."""

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
    """State of a pool between two decisions. Empty = no decision yet."""

    advised: tuple[tuple[Monotonic, int], ...] = ()
    """Advised numbers of workers, oldest first, that no later one reaches: each number at most once."""
    changed_at: Monotonic | None = None
    count: int | None = None
    """Number of workers at the last decision, to detect changes by other actors."""


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """`count`: number of workers that there should be now; `advised`: number from the metric alone, within the
    bounds."""

    count: int
    advised: int
    verb: ScalingVerb
    why: ScalingReason
    reason: str
    memory: ScalingState
    dry_run: bool = False

    @property
    def acts(self) -> bool:
        """Whether the decision requires an action."""
        return self.verb is not ScalingVerb.KEEP and not self.dry_run


def advise(rules: ScalingRules, count: int, value: float) -> int:
    """Number of workers from the metric alone, within the bounds. `value`: finite, 0 or more."""
    share = value / rules.target
    if rules.measure is Measure.ALL:
        wanted, ratio = share, share / count if count else math.inf
    else:
        wanted, ratio = share * count, share
    # Without workers there is no ratio: any load needs a first worker, and no load needs none.
    if count and abs(ratio - 1.0) <= rules.tolerance:
        return _bounded(rules, count)
    return _bounded(rules, math.ceil(min(wanted, rules.maximum) - _ROUNDING))


def decide(
    rules: ScalingRules, count: int, value: float | None, memory: ScalingState, now: Monotonic
) -> ScalingDecision:
    """Decide on a pool of `count` workers whose metric is `value`; None = not available.

    `now` must not go backwards; if it does, no time has passed. The caller keeps the `memory` of the decision, or the
    result of `changed` in its place if it acted."""
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
    """The state after the pool was set to `count` workers: the cool-down begins."""
    return replace(memory, changed_at=now, count=count)


def _bounded(rules: ScalingRules, count: int) -> int:
    return max(rules.minimum, min(rules.maximum, count))


def _seen(memory: ScalingState, count: int, now: Monotonic) -> ScalingState:
    if memory.count is None or memory.count == count:
        return replace(memory, count=count)
    return changed(memory, count, now)  # by another actor: the cool-down applies, too


def _remember(
    memory: ScalingState, rules: ScalingRules, count: int, advised: int, now: Monotonic
) -> ScalingState:
    """Add an advised number. The first decision also counts `count` as advised."""
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

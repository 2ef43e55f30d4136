"""How a roll-out in steps goes on: when a step has passed, and when the version is bad. Pure.

Each device is its own control: it was well before its agent got the new spec, and is not well after it, while devices
without the new spec stay well. Outages that hit both alike, dead gateways and agents that can't ask say nothing about
the version.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Final

from nomad_watchdog.core.rollout_steps import RolloutTurns, Strategy, current_group
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import WallTime

ENOUGH: Final = 0.9
"""Share of a step's agents that must be ready when `progress_deadline` is over, 0 to 1. A few devices without an agent
must not end a roll-out."""


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """How far the roll-out of one spec has come; stored in the registry."""

    spec: str
    """Hash of the spec."""
    version: str
    began: WallTime
    step: int = 0
    """Number of the step, 0 = the first; the number of steps = all have passed."""
    group: str | None = None
    """The label value that has its turn, "" = the devices without the label; None = the first, or the step has no
    label."""
    since: WallTime | None = None
    """When the step began; None = with the roll-out."""
    soaked_s: float = 0.0
    """Time for which all agents of the step have been ready, seconds."""
    paused_by: str = ""
    """Who paused it; "" = nobody."""
    promoted: bool = False
    """The rest is rolled out without further soak and pauses."""
    unwell: tuple[str, ...] = ()
    """Marks (`mark`) of devices of the step that were not well before it."""
    crowded: bool = False
    """There were more such devices than are stored: a later leader does not judge devices that have the spec already."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What the leader sees of the step that has its turn. Numbers of devices."""

    members: int = 0
    """Devices that have their turn, without those that nothing may be done for."""
    ready: int = 0
    """Of these: with a ready agent of the new spec."""
    tried: int = 0
    """Of these: that have or had an agent of the new spec."""
    died: int = 0
    """Of these: whose agent ended too soon."""
    bad: int = 0
    """Of these: well before, not well now."""
    judged: int = 0
    """Of these: well before."""
    control_bad: int = 0
    """Devices without the new spec that were well when the step began, and are not well now."""
    control: int = 0
    """Devices without the new spec that were well when the step began."""
    without_progress_s: float = 0.0
    """Since another agent of the step became ready, or the step was allowed to go on, whichever is later."""
    refused: str = ""
    """Why the scheduler can't be prepared for the spec."""
    query_bad: str = ""
    """Why the query of the analysis makes the version bad."""
    query_waits: str = ""
    """Why the step may not pass because of the query, in words; "" = it may."""


DEFERRED: Final = "rollout.upgrades"
"""`RolloutProgress.paused_by` of a version that came with another version of the control plane."""


def of_spec(
    stored: RolloutProgress | None,
    spec: str,
    version: str,
    steps: int,
    now: WallTime,
    *,
    defers: bool = False,
) -> RolloutProgress:
    """The progress of a spec (its hash): the stored one if it is of this spec, else one that begins now. `steps`:
    number of steps; the configuration may have fewer than when it was stored. `defers`: it begins paused, unless another
    spec of this version has begun."""
    if stored is None or stored.spec != spec:
        begun = stored is not None and stored.version == version and stored.paused_by != DEFERRED
        paused_by = DEFERRED if defers and not begun else ""
        return RolloutProgress(spec, version, began=now, paused_by=paused_by)
    last = max(steps - 1, 0)
    if stored.step <= last:
        return stored
    return replace(stored, step=last, group=None, soaked_s=0.0, unwell=(), crowded=True)


def mark(slug: Slug) -> str:
    """A short name of a device in `RolloutProgress.unwell`: 8 hexadecimal digits. Two devices with one mark are both left
    out of the judgement."""
    return hashlib.blake2b(slug.encode(), digest_size=4).hexdigest()


def why_bad(strategy: Strategy, seen: Observed) -> str:
    """Why the version is bad, in words; "" = it is not, as far as known."""
    if _enough(seen.died, seen.tried, strategy):
        return f"agents of {seen.died} of {seen.tried} devices ended too soon"
    if _enough(seen.bad, seen.judged, strategy):
        share = seen.bad / max(seen.judged, 1)
        control = seen.control_bad / max(seen.control, 1)
        if share - control >= strategy.verdict_margin:
            return (
                f"{seen.bad} of {seen.judged} devices are not well since they have it, "
                f"and {seen.control_bad} of {seen.control} devices without it"
            )
    if seen.query_bad:
        return seen.query_bad
    if seen.without_progress_s > strategy.progress_deadline_s and not _is_nearly_ready(seen):
        why = f": {seen.refused}" if seen.refused else ""
        return (
            f"no agent became ready for {strategy.progress_deadline_s:.0f} s (rollout.progress_deadline), "
            f"{seen.members - seen.ready} of {seen.members} are not{why}"
        )
    return ""


def _enough(number: int, tried: int, strategy: Strategy) -> bool:
    return number > 0 and (number >= strategy.abort_min or number >= strategy.abort_share * tried)


def _is_nearly_ready(seen: Observed) -> bool:
    return seen.ready >= ENOUGH * seen.members


def is_ready(strategy: Strategy, seen: Observed) -> bool:
    """Whether the agents of the step are ready: all, or nearly all when no other has become ready for long."""
    late = seen.without_progress_s > strategy.progress_deadline_s
    return seen.ready >= seen.members or (late and _is_nearly_ready(seen))


def advance(
    strategy: Strategy,
    progress: RolloutProgress,
    seen: Observed,
    groups: tuple[str, ...],
    lasted_s: float,
) -> RolloutProgress:
    """The progress `lasted_s` seconds later, if the version is not bad: more soak, or the next group or step with its
    soak at 0 (`since` is set by the caller)."""
    if progress.paused_by or progress.step >= len(strategy.steps):
        return progress
    step = strategy.steps[progress.step]
    if step.pause:
        return promoted(strategy, progress, groups) if progress.promoted else progress
    if not is_ready(strategy, seen):
        return replace(progress, soaked_s=0.0) if progress.soaked_s else progress
    soaked_s = progress.soaked_s + lasted_s
    if (soaked_s < step.soak_s or seen.query_waits) and not progress.promoted:
        return replace(progress, soaked_s=min(soaked_s, step.soak_s))
    return promoted(strategy, progress, groups)


def promoted(
    strategy: Strategy, progress: RolloutProgress, groups: tuple[str, ...]
) -> RolloutProgress:
    """The progress at the next group or step."""
    if following := next_group(progress, groups):
        return _at(progress, progress.step, following[0])
    return _at(progress, min(progress.step + 1, len(strategy.steps)), None)


def next_group(progress: RolloutProgress, groups: tuple[str, ...]) -> tuple[str, ...]:
    """The values that have their turn after the present one."""
    if not groups:
        return ()
    return groups[groups.index(current_group(groups, progress.group)) + 1 :]


def _at(progress: RolloutProgress, step: int, group: str | None) -> RolloutProgress:
    return replace(
        progress, step=step, group=group, soaked_s=0.0, unwell=(), crowded=False, paused_by=""
    )


def in_words(strategy: Strategy, progress: RolloutProgress, turns: RolloutTurns) -> str:
    """The step that has its turn, such as "step 2 of 4 (site=b)"."""
    number, total = progress.step + 1, len(strategy.steps)
    if number > total:
        return "all steps have passed"
    step = strategy.steps[progress.step]
    group = current_group(turns.groups, progress.group) if turns.groups else ""
    where = f" ({step.by}={group or 'none'})" if step.by else ""
    return f"step {number} of {total}{where}"

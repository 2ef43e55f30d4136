"""The steps of a roll-out, and which devices have their turn in each.

Devices are taken in the order of a hash of their slug, so that a step is a fair sample and every replica, before and after
a restart, finds the same devices. Pure.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from nomad_watchdog.core.allowed_times import WeeklyTime
from nomad_watchdog.core.rollout_analysis import Analysis
from nomad_watchdog.ids import Slug


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One step: which devices get the new spec, and what must hold before the next step."""

    count: int = 0
    """Number of devices; 0 = as `fraction`."""
    fraction: float = 1.0
    """Share of the devices that `selector` matches, above 0 to 1, rounded up."""
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that a device must have; empty = all devices."""
    by: str = ""
    """Name of a label: its values have their turn one after the other, each with its own soak; "" = all at once."""
    soak_s: float = 0.0
    """Time for which all agents of the step must be ready, seconds."""
    pause: bool = False
    """No devices: the roll-out waits until an operator promotes it."""

    @property
    def is_whole(self) -> bool:
        """Whether it covers every device."""
        return not (self.pause or self.count or self.selector) and self.fraction >= 1.0


@dataclass(frozen=True, slots=True)
class Strategy:
    """How the versions of one class are rolled out."""

    steps: tuple[RolloutStep, ...] = ()
    """The last one covers every device (`complete`). Empty: not in steps."""
    progress_deadline_s: float = 600.0
    """Maximum time without another agent becoming ready, seconds."""
    abort_share: float = 0.20
    """Share of the devices tried that make a version bad, above 0 to 1 …"""
    abort_min: int = 5
    """… or their number."""
    verdict_margin: float = 0.10
    """By how much the share of devices that became unwell must exceed that of the other devices, 0 to 1."""
    well_before_s: float = 600.0
    """Only devices count that were well for this time before their agent got the new spec, seconds."""
    back: bool = True
    """A bad version is taken back. False: nothing more is replaced, and what has it keeps it."""
    allow: tuple[WeeklyTime, ...] = ()
    """When agents may be replaced by it; empty = always."""
    repairs: bool = False
    """Agents of an unproven spec repair devices."""
    analysis: Analysis | None = None
    """A query that must be within its limits; None = none."""
    defers_upgrades: bool = False
    """The version is that of the control plane, and another one begins paused."""


AT_ONCE: Final = Strategy()


def complete(steps: Iterable[RolloutStep]) -> tuple[RolloutStep, ...]:
    """The steps, with a last one of all devices where they do not end with one. () stays ()."""
    found = tuple(steps)
    if not found or found[-1].is_whole:
        return found
    return (*found, RolloutStep(soak_s=found[-1].soak_s))


@dataclass(frozen=True, slots=True)
class Member:
    """A device of the class."""

    slug: Slug
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RolloutTurns:
    """Which devices of a class have had their turn, and which have it now."""

    passed: frozenset[Slug] = frozenset()
    current: frozenset[Slug] = frozenset()
    """Without those that passed."""
    groups: tuple[str, ...] = ()
    """Values of the label of the current step, in their order; () = it has none."""


def turns(
    steps: Sequence[RolloutStep], step: int, group: str | None, members: Iterable[Member]
) -> RolloutTurns:
    """The devices at step number `step` (0 = the first; at the number of steps all have passed). `group`: the label
    value that has its turn, None = the first, "" = the devices without the label."""
    ordered = sorted(members, key=lambda one: _rank(one.slug))
    passed: set[Slug] = set()
    for one in steps[:step]:
        passed |= {member.slug for member in _of_step(one, ordered)}
    if step >= len(steps):
        return RolloutTurns(frozenset(passed))
    found = _of_step(steps[step], ordered)
    groups = _groups(steps[step], found)
    if groups:
        label = steps[step].by
        now = current_group(groups, group)
        passed |= {m.slug for m in found if _place(m.labels.get(label, "")) < _place(now)}
        found = [m for m in found if m.labels.get(label, "") == now]
    return RolloutTurns(frozenset(passed), frozenset(m.slug for m in found) - passed, groups)


def first_steps(steps: Sequence[RolloutStep], members: Iterable[Member]) -> dict[Slug, int]:
    """Device → number of the first step that has it, 0 = the first."""
    ordered = sorted(members, key=lambda one: _rank(one.slug))
    found: dict[Slug, int] = {}
    for number, one in enumerate(steps):
        for member in _of_step(one, ordered):
            found.setdefault(member.slug, number)
    return found


def current_group(groups: Sequence[str], group: str | None) -> str:
    """The value that has its turn: the stored one, or the next one if no device has that any more. `groups`: not
    empty."""
    if group is None:
        return groups[0]
    return next((one for one in groups if _place(one) >= _place(group)), groups[-1])


def _place(value: str) -> tuple[bool, str]:
    """Sort key of the values of a label: devices without it are last."""
    return not value, value


def _of_step(step: RolloutStep, ordered: Sequence[Member]) -> list[Member]:
    if step.pause:
        return []
    wanted = step.selector.items()
    matched = [one for one in ordered if wanted <= one.labels.items()] if wanted else list(ordered)
    number = step.count or math.ceil(step.fraction * len(matched))
    return matched[:number]


def _groups(step: RolloutStep, found: Iterable[Member]) -> tuple[str, ...]:
    if not step.by:
        return ()
    values = {one.labels.get(step.by, "") for one in found}
    return tuple(sorted(values, key=_place))


@lru_cache(maxsize=65_536)
def _rank(slug: Slug) -> bytes:
    return hashlib.blake2b(slug.encode(), digest_size=8).digest()

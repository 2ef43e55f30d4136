"""Limits how many agents are replaced at a time, for whatever reason: the one window of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nomad_watchdog.core.actions import Action, Move
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Limits


@dataclass(frozen=True, slots=True)
class Readiness:
    """State of the fleet's agents, for a roll-out."""

    unready: int = 0
    """Number of present devices whose accepted agent is not ready, for whatever reason: a bad version that never gets
    ready fills the window and so stops its own roll-out."""
    stuck: Callable[[Slug], bool] = lambda _slug: False
    """Whether a device's agent is certainly not ready, and its startup time is over. Replacing it takes no ready agent
    away; otherwise the version that fixes it would wait forever for room in the window."""

    soaking: int = 0
    """Number of agents of new versions that are ready and have not proved themselves yet (`core.rollout_soak`)."""
    halted: frozenset[str] = frozenset()
    """Agent classes in which nothing is replaced."""
    ready: Callable[[Slug], bool] = lambda _slug: False
    """Whether a device has a ready agent, even if its placement is not running: one that its scheduler does not
    list."""
    turn: Callable[[Slug], bool] = lambda _slug: True
    """Whether a device that is to move to another scheduler may do so now (`core.migration.frontier`)."""
    in_work: Callable[[Slug], bool] = lambda _slug: False
    """Whether the replacement of a device's agent has begun: it has its room already."""
    leaving: frozenset[Slug] = frozenset()
    """Devices whose agent is being replaced, and is still ready: they take room, whether they should still be replaced
    or not."""
    unwell: Callable[[Slug], bool] = lambda _slug: False
    """Whether something is wrong with a device: its agent is replaced after those of healthy devices."""
    moving: int = 0
    """Number of devices that have been moved and whose agent is not ready yet."""
    moves_at_once: int = 0
    """Maximum of `moving`; 0 = as many as the window has."""


ALL_READY: Final = Readiness()


def window(fleet: int, limits: Limits) -> int:
    """Maximum number of devices without a ready agent that a roll-out may cause or find."""
    return max(limits.replace_at_once, int(fleet * limits.replace_fraction), 1)


def admit(
    candidates: Sequence[Action], readiness: Readiness, *, fleet: int, limits: Limits
) -> tuple[Action, ...]:
    """The replacements that may begin now, the most urgent reasons first (`Move`)."""
    ordered = sorted(
        (one for one in candidates if not one.waits_for and not _is_halted(one, readiness)),
        key=lambda one: (
            not readiness.in_work(one.slug),
            one.move,
            readiness.unwell(one.slug),
            one.slug,
        ),
    )
    most = window(fleet, limits)
    room = most - _taken(readiness, ordered)
    ways = (readiness.moves_at_once or most) - readiness.moving
    admitted = []
    for action in ordered:
        if action.home and (ways <= 0 or not readiness.turn(action.slug)):
            room -= action.slug in readiness.leaving
            continue
        stuck = readiness.stuck(action.slug)
        if stuck or room > 0:
            room -= not stuck
            ways -= bool(action.home)
            admitted.append(action)
    return tuple(admitted)


def give_up(
    candidates: Sequence[Action], readiness: Readiness, *, room: int, most: int
) -> tuple[Action, ...]:
    """The replacements of stalled placements that may begin now, at most `most`.

    A replacement that takes away a ready agent needs room in the window, as in a roll-out."""
    room -= _taken(readiness, candidates)
    admitted: list[Action] = []
    for action in sorted(candidates, key=lambda one: one.slug):
        ready = readiness.ready(action.slug)
        if len(admitted) < most and (room > 0 or not ready):
            room -= ready
            admitted.append(action)
    return tuple(admitted)


def _taken(readiness: Readiness, candidates: Sequence[Action]) -> int:
    """The room that is taken, without that of the candidates."""
    others = readiness.leaving - {one.slug for one in candidates}
    return readiness.unready + readiness.soaking + len(others)


def _is_halted(action: Action, readiness: Readiness) -> bool:
    """Whether the class of an agent is halted. A node is drained all the same: its agents would end there."""
    name = action.placement.agent_class if action.placement is not None else ""
    return name in readiness.halted and action.move is not Move.DRAIN

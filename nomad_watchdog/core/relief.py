"""Which agents leave overloaded hosts now, and what is remembered of earlier moves.

Only the leader decides; the state is one document in the registry, so that limits hold for the whole fleet and
survive the leader. The scheduler chooses the new host: a move is requested only while another host is calm, and its
effect is measured.

Rules: a host of unknown load is left alone. At most `at_once` moves are in progress, until their devices have a ready
agent again, and one per host. A reading moves at most `per_host` agents. After a move the host rests, and so does the
device; if the move did not help, the next rest of the host is twice as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, TypeVar

from nomad_watchdog.core.host_load import Load, LoadTrack, PressureThresholds
from nomad_watchdog.host_pressure import Resource
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import Epoch, WallTime

_NOT: Final = WallTime(0.0)
_ROUNDING_S: Final = 1.0
"""A rest that has just begun may be longer than its length by rounding."""
_K = TypeVar("_K")
MAX_DOUBLINGS: Final = 5
"""The longest rest is 32 cool-downs."""
BEGIN_S: Final = 300.0
"""Time within which a requested move has to begin; after that it is withdrawn. The fleet's window may be full."""
WITHDRAWN_S: Final = 60.0
"""Time for which a withdrawn move still counts as in progress: another replica may be beginning it."""
MAX_RESTS: Final = 500
"""Maximum number of devices, and of hosts, whose rests are remembered; the oldest are forgotten first."""


@dataclass(frozen=True, slots=True)
class ReliefRules:
    """The settings."""

    thresholds: Mapping[Resource, PressureThresholds]
    """Of the pressure."""
    looks: int = 3
    """Consecutive readings that change the load of a host."""
    stale_s: float = 60.0
    """Age at which a reading no longer counts."""
    per_host: int = 1
    """Maximum number of agents that one reading moves from a host."""
    at_once: int = 1
    """Maximum number of moves in progress, in the whole fleet."""
    min_age_s: float = 600.0
    """A younger agent stays."""
    cooldown_s: float = 300.0
    """First rest of a host and of a device."""
    dry_run: bool = True
    usage: Mapping[Resource, PressureThresholds] = field(default_factory=dict)
    """Of the use of a host whose pressure can't be read. Without any such a host is left alone."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An agent on an overloaded host whose device is healthy."""

    slug: Slug
    epoch: Epoch
    ref: str
    """`Placement.ref`."""
    age_s: float | None
    """Age of the placement; None = not known, and it stays."""


@dataclass(frozen=True, slots=True)
class ReliefMove:
    """A move in progress."""

    slug: Slug
    epoch: Epoch
    """The epoch that is left."""
    ref: str
    host: str
    """The host that is left."""
    reason: str
    since: WallTime
    withdrawn: WallTime = _NOT
    """When it was withdrawn, because it had not begun; 0 = it was not."""


@dataclass(frozen=True, slots=True)
class Rest:
    """When a host or a device may take part in the next move."""

    until: WallTime
    doublings: int = 0
    """Of a host: its consecutive moves that did not help. Of a device: its moves before this one."""
    judged: bool = True
    """Of a host: whether it is known if its last move helped."""
    host: str = ""
    """Of a device: the host that it left."""


@dataclass(frozen=True, slots=True)
class ReliefState:
    """What is remembered."""

    moves: tuple[ReliefMove, ...] = ()
    hosts: Mapping[str, Rest] = field(default_factory=dict)
    devices: Mapping[Slug, Rest] = field(default_factory=dict)


class ReliefProgress(StrEnum):
    """How far a move has come."""

    WAITING = "waiting"
    """It has not begun."""
    ON_WAY = "on_way"
    """The device has no ready agent yet."""
    ARRIVED = "arrived"
    RETURNED = "returned"
    """The scheduler has placed the new agent on the same host."""
    DEPARTED = "departed"
    """The device has left."""
    WITHDRAWN = "withdrawn"


Ended = tuple[ReliefMove, ReliefProgress]


def settle(
    state: ReliefState,
    progress: Callable[[ReliefMove], ReliefProgress],
    is_needed: Callable[[ReliefMove], bool],
    rules: ReliefRules,
    now: WallTime,
) -> tuple[ReliefState, tuple[Ended, ...]]:
    """Remove the moves that have ended, and withdraw those that have not begun and are needed no more."""
    kept: list[ReliefMove] = []
    ended: list[Ended] = []
    hosts = dict(state.hosts)
    for move in state.moves:
        found = progress(move)
        if found is ReliefProgress.ON_WAY:
            kept.append(move)
        elif found is not ReliefProgress.WAITING:
            ended.append((move, found))
            if found is ReliefProgress.RETURNED:
                hosts[move.host] = _not_helped(hosts.get(move.host), rules, now)
            elif found is ReliefProgress.DEPARTED:
                _judged(hosts, move.host)
        elif move.withdrawn:
            if 0 <= now - move.withdrawn < WITHDRAWN_S:
                kept.append(move)
            else:
                ended.append((move, ReliefProgress.WITHDRAWN))
                _judged(hosts, move.host)
        elif is_needed(move) and 0 <= now - move.since < BEGIN_S:
            kept.append(move)
        else:
            kept.append(replace(move, withdrawn=now))
    return replace(state, moves=tuple(kept), hosts=hosts), tuple(ended)


def _judged(hosts: dict[str, Rest], host: str) -> None:
    """Nothing can be learned from the last move of this host."""
    if (rest := hosts.get(host)) is not None:
        hosts[host] = replace(rest, judged=True)


def judge(
    state: ReliefState, tracks: Mapping[str, LoadTrack], rules: ReliefRules, now: WallTime
) -> tuple[ReliefState, tuple[str, ...]]:
    """Judge by the readings since then whether the last move of each host helped; the hosts where it did not."""
    moving = {move.host for move in state.moves}
    hosts = dict(state.hosts)
    failed: list[str] = []
    for host, rest in state.hosts.items():
        track = tracks.get(host)
        if rest.judged or host in moving or track is None or not track.readings:
            continue
        if not track.above:
            hosts[host] = replace(rest, judged=True, doublings=0)
        elif track.above >= rules.looks:
            hosts[host] = _not_helped(rest, rules, now)
            failed.append(host)
    return replace(state, hosts=hosts), tuple(failed)


def _not_helped(rest: Rest | None, rules: ReliefRules, now: WallTime) -> Rest:
    doublings = min(MAX_DOUBLINGS, 1 + (rest.doublings if rest is not None else 0))
    return Rest(WallTime(now + rest_s(rules, doublings)), doublings)


def rest_s(rules: ReliefRules, doublings: int) -> float:
    """The length of a rest, seconds."""
    return rules.cooldown_s * float(2 ** min(doublings, MAX_DOUBLINGS))


@dataclass(frozen=True, slots=True)
class Decision:
    """What begins now."""

    moves: tuple[ReliefMove, ...] = ()
    overloaded: tuple[str, ...] = ()
    """Hosts that are to be relieved, the most loaded one first."""
    no_calm_host: bool = False
    """Nothing moves, because no other host is calm."""


def decide(
    state: ReliefState,
    tracks: Mapping[str, LoadTrack],
    candidates: Mapping[str, Sequence[Candidate]],
    closed: Collection[str],
    rules: ReliefRules,
    now: WallTime,
) -> Decision:
    """The moves that begin now. `candidates`: by host. `closed`: hosts where the scheduler places nothing: agents of
    these are not relieved, and none moves there."""
    hosts = sources(tracks, closed, rules)
    if not hosts:
        return Decision()
    if not any(track.is_calm for host, track in tracks.items() if host not in closed):
        return Decision(overloaded=hosts, no_calm_host=True)
    room = rules.at_once - len(state.moves)
    busy = {move.host for move in state.moves}
    moving = {move.slug for move in state.moves}
    moves: list[ReliefMove] = []
    for host in hosts:
        rest = state.hosts.get(host)
        if host in busy or (rest is not None and (not rest.judged or now < rest.until)):
            continue
        fit = [
            one
            for one in candidates.get(host, ())
            if one.slug not in moving
            and one.age_s is not None
            and one.age_s >= rules.min_age_s
            and not _rests(state.devices.get(one.slug), now)
        ]
        fit.sort(key=lambda one: _rank(one.slug, host))
        reason = f"host {host} is overloaded: {tracks[host].worst}"
        chosen = fit[: max(0, min(rules.per_host, room))]
        moves += [ReliefMove(one.slug, one.epoch, one.ref, host, reason, now) for one in chosen]
        room -= len(chosen)
    return Decision(tuple(moves), hosts)


def sources(
    tracks: Mapping[str, LoadTrack], closed: Collection[str], rules: ReliefRules
) -> tuple[str, ...]:
    """The hosts that are to be relieved: overloaded, and above a high threshold in each of the last `looks` readings."""
    found = [
        host
        for host, track in tracks.items()
        if track.load is Load.OVERLOADED and track.above >= rules.looks and host not in closed
    ]
    return tuple(sorted(found, key=lambda host: (-tracks[host].excess, host)))


def _rests(rest: Rest | None, now: WallTime) -> bool:
    return rest is not None and now < rest.until


def _rank(slug: Slug, host: str) -> bytes:
    """The order in which agents leave a host: another one for each host, so that the same agents do not always move."""
    return hashlib.sha256(f"{slug} {host}".encode()).digest()


def begin(
    state: ReliefState, moves: Sequence[ReliefMove], rules: ReliefRules, now: WallTime
) -> ReliefState:
    """The state with these moves in progress. Their hosts and devices rest from now on."""
    hosts, devices = dict(state.hosts), dict(state.devices)
    for move in moves:
        before = hosts.get(move.host)
        doublings = 0 if before is None else before.doublings
        hosts[move.host] = Rest(WallTime(now + rest_s(rules, doublings)), doublings, judged=False)
        earlier = devices.get(move.slug)
        times = 0 if earlier is None else min(MAX_DOUBLINGS, earlier.doublings + 1)
        until = WallTime(now + rest_s(rules, times))
        devices[move.slug] = Rest(until, times, host=move.host)
    return ReliefState((*state.moves, *moves), hosts, devices)


def tidy(state: ReliefState, rules: ReliefRules, now: WallTime) -> ReliefState:
    """Forget the rests that have been over for as long as they lasted, and those of a clock that was set wrong."""
    moving = {move.host for move in state.moves} | {str(move.slug) for move in state.moves}

    def is_kept(name: str, rest: Rest) -> bool:
        length_s = rest_s(rules, rest.doublings) + _ROUNDING_S
        return name in moving or -length_s <= rest.until - now <= length_s

    hosts = {host: rest for host, rest in state.hosts.items() if is_kept(host, rest)}
    devices = {slug: rest for slug, rest in state.devices.items() if is_kept(slug, rest)}
    return replace(state, hosts=_newest(hosts), devices=_newest(devices))


def _newest(rests: dict[_K, Rest]) -> dict[_K, Rest]:
    if len(rests) <= MAX_RESTS:
        return rests
    ordered = sorted(rests.items(), key=lambda one: one[1].until)
    return dict(ordered[-MAX_RESTS:])

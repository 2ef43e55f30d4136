"""Explores every interleaving of a small world: two replicas, two devices, and all that may go
wrong.

Breadth first, so the first violation has the shortest trace. The decisions come from the real code
(`core.planner`, `core.presence`, `core.acceptance`, `breaker`); carrying them out is modelled
(`world`). States that differ only in names are merged (`packed`), and changes that only one replica
can see (a plan, a queue) are not separate steps.

``python -m tests.explorer --quick`` runs what the tests run, ``--deep`` more, and ``--without cas``
shows the shortest way to a broken promise when a guard is missing.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from tests.explorer import model
from tests.explorer.guards import Guard
from tests.explorer.model import BrokenError, Dev, Rep, State, View, check_devices
from tests.explorer.packed import Packed, PackedWorld
from tests.explorer.world import World

__all__ = ["DEEP", "QUICK", "Found", "Guard", "Scope", "explore"]

MAX_ROUNDS: Final = 60
"""L1: without faults a state is settled after this many fair rounds, or never."""


@dataclass(frozen=True, slots=True)
class Scope:
    """The size of a world."""

    devices: int = 2
    replicas: int = 2
    requests: int = 3
    faults: int = 1
    placed: bool = False
    """Begin with every device watched and known to both, instead of with nothing."""
    burials: int = 0
    """Number of tombstones that expire."""

    def first(self) -> State:
        """The initial state."""
        rec, jobs = ((1, 1, 1, 1), ((1, "R", 1),)) if self.placed else ((), ())
        device: Dev = (rec, jobs, (), (), int(self.placed))
        views: tuple[View, ...] = ((rec, jobs, 0, 0, ()),) * self.devices
        rep: Rep = (int(self.placed), int(self.placed), views, (), (), ())
        graves = (0, 0, self.burials, (0,) * self.devices)
        return (
            (device,) * self.devices,
            (rep,) * self.replicas,
            self.requests,
            self.faults,
            graves,
        )


QUICK: Final = (
    Scope(requests=2, faults=0),
    Scope(requests=1, faults=1),
    Scope(requests=2, faults=0, placed=True),
    Scope(requests=0, faults=1, placed=True),
    Scope(devices=1, requests=2, faults=1),
    Scope(devices=1, requests=1, faults=1, placed=True),
    Scope(devices=1, requests=3, faults=0, burials=1),
    Scope(devices=1, requests=2, faults=0, placed=True, burials=1),
    Scope(devices=1, replicas=1, requests=2, faults=1, placed=True, burials=1),
)
"""The scopes that every test run explores, within half a minute: two devices for what couples them
(a crash, a listing, the stop limit), one device for longer histories."""
DEEP: Final = (
    Scope(requests=3, faults=0, placed=True),
    Scope(requests=1, faults=1, placed=True),
    Scope(devices=1, requests=2, faults=1, placed=True),
    Scope(devices=1, requests=3, faults=1),
    Scope(devices=1, requests=1, faults=2),
    Scope(requests=2, faults=1),
    Scope(devices=1, requests=4, faults=0, placed=True, burials=2),
)
"""The additional scopes of `--deep`: some minutes and a GB. The second to last has two million
states."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of an exploration. `broken` = "" when every promise held in every state."""

    states: int
    broken: str = ""
    trace: tuple[str, ...] = ()
    complete: bool = True
    """Every state was reached; False if the state limit was hit."""

    def __str__(self) -> str:
        if not self.broken:
            return f"{self.states} states, all promises held"
        steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(self.trace, 1))
        return f"{self.broken}, after {len(self.trace)} steps ({self.states} states):\n{steps}"


class Settling:
    """L1: whether a state settles as requested without further faults."""

    def __init__(self, packed: PackedWorld) -> None:
        self._packed = packed
        self._good: set[Packed] = set()

    def check(self, state: Packed) -> None:
        """Repeatedly take the first possible one of the steps that must happen."""
        path = []
        state = self._packed.without_trouble(state)
        for _ in range(MAX_ROUNDS):
            if state in self._good:
                break
            path.append(state)
            following = self._next(state)
            if following is None:
                _check_settled(self._packed.devices(state))
                break
            state = following
        else:
            raise BrokenError("L1: it does not come to rest")
        self._good.update(path)

    def _next(self, state: Packed) -> Packed | None:
        try:
            calm = self._packed.following(state, calm=True)
            return next((new for new in calm if new != state), None)
        except BrokenError:
            raise _UnsafeError from None


class _UnsafeError(Exception):
    """The way to rest breaks another promise: the search finds that itself, on the shortest way."""


def _check_settled(devices: tuple[Dev, ...]) -> None:
    for d, (rec, jobs, zombies, _, _) in enumerate(devices):
        live = [job for job in jobs if job[1] != "D"]
        wanted = bool(rec and rec[0])
        good = [job for job in live if rec and job[0] == rec[2] and job[2] == rec[3]]
        if len(live) != int(wanted) or len(good) != len(live) or zombies:
            raise BrokenError(f"L1: {model.NAMES[d]} ends as {rec} with {live}")


def explore(
    scope: Scope = Scope(), without: frozenset[Guard] = frozenset(), most: int = 2_000_000
) -> Found:
    """Reach every state of the scope, at most `most`; the first broken promise with its trace."""
    with _no_collection():
        return _explore(scope, without, most)


@contextmanager
def _no_collection() -> Iterator[None]:
    """States are tuples without cycles: searching millions of them for garbage takes a sixth of the
    time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _explore(scope: Scope, without: frozenset[Guard], most: int) -> Found:
    world = World(without)
    packed = PackedWorld(world)
    settling = Settling(packed)
    first = packed.pack(scope.first())
    came: dict[Packed, Packed | None] = {first: None}
    level = [first]
    while level:
        following = []
        for state in level:
            try:
                check_devices(packed.devices(state))
                with suppress(_UnsafeError):
                    settling.check(state)
                for new in packed.following(state):
                    if new not in came:
                        came[new] = state
                        following.append(new)
            except BrokenError as error:
                trace, last = _trace(world, packed, scope.first(), _path(came, state))
                return Found(len(came), _named(world, last, error), trace)
            if len(came) > most:
                return Found(len(came), complete=False)
        level = following
    return Found(len(came))


def _path(came: dict[Packed, Packed | None], state: Packed) -> list[Packed]:
    path = [state]
    while (before := came[path[-1]]) is not None:
        path.append(before)
    return path[::-1]


def _trace(
    world: World, packed: PackedWorld, first: State, path: list[Packed]
) -> tuple[tuple[str, ...], State]:
    """The steps along a path, in the names of the first state, and their result."""
    said: list[str] = []
    at = first
    for wanted in path[1:]:
        for step, new in world.steps(at):
            if packed.pack(new) == wanted:
                said.append(step)
                at = new
                break
    return tuple(said), at


def _named(world: World, last: State, error: BrokenError) -> str:
    """The violation, in the same names."""
    try:
        check_devices(last[0])
        for _ in world.steps(last):
            pass
    except BrokenError as named:
        return str(named)
    return str(error)


def main(arguments: list[str] | None = None) -> int:
    """Explore one scope and print the result."""
    parser = argparse.ArgumentParser(prog="python -m tests.explorer")
    parser.add_argument("--quick", action="store_true", help="the scopes of every test run")
    parser.add_argument("--deep", action="store_true", help="the larger scopes")
    parser.add_argument("--devices", type=int, default=2, choices=(1, 2))
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--requests", type=int, default=3, help="how often somebody (de)registers")
    parser.add_argument("--faults", type=int, default=1, help="how much goes wrong on a path")
    parser.add_argument("--placed", action="store_true", help="begin with all devices watched")
    parser.add_argument("--burials", type=int, default=0, help="how many tombstones expire")
    parser.add_argument("--without", default="", choices=("", *Guard), help="leave a guard out")
    parser.add_argument("--most", type=int, default=2_000_000, help="states at most")
    options = parser.parse_args(arguments)
    one = Scope(
        options.devices,
        options.replicas,
        options.requests,
        options.faults,
        options.placed,
        options.burials,
    )
    scopes = (*(QUICK if options.quick else ()), *(DEEP if options.deep else ())) or (one,)
    without = frozenset({Guard(options.without)}) if options.without else frozenset()
    broken = False
    for scope in scopes:
        began = time.perf_counter()
        found = explore(scope, without, options.most)
        broken = broken or bool(found.broken)
        note = "" if found.complete else " (not complete)"
        print(f"{scope}: {found}{note}, {time.perf_counter() - began:.1f} s", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

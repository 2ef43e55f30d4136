"""States as small tuples of numbers, with their successor states cached.

Devices, replicas and graves are each represented by the number under which they were first seen, so
millions of states are compared and kept at the cost of a few integers. What a replica may do
depends on itself, on the devices and on what the others have in hand, and is computed once for all
states that agree in these, by `world.World`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, TypeVar

from tests.explorer import model
from tests.explorer.model import NO_VIEW, START, Dev, Graves, Rep, State, View
from tests.explorer.world import Step, World

Packed = tuple[int, tuple[int, ...], int, int, int]
"""Devices, replicas in ascending order, requests left, faults left, graves. Equal for states that
differ only in which replica, or which device, is which."""
Change = tuple[int, int, int, int]
"""The resulting devices and replica of a step, its cost in faults, and the resulting graves."""

_T = TypeVar("_T", bound=Hashable)
_NOBODY: Final = -1
"""A step of no replica."""


class _Numbers(Generic[_T]):
    """Numbers for values, in the order in which they are first seen."""

    def __init__(self) -> None:
        self._known: dict[_T, int] = {}
        self.values: list[_T] = []

    def of(self, value: _T) -> int:
        number = self._known.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number


class PackedWorld:
    """A world's states and steps by number."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._devices: _Numbers[tuple[Dev, ...]] = _Numbers()
        self._reps: _Numbers[Rep] = _Numbers()
        self._graves: _Numbers[Graves] = _Numbers()
        self._renamed: tuple[dict[int, int], dict[int, int], dict[int, int]] = ({}, {}, {})
        self._hands: dict[int, int] = {}
        self._changes: dict[tuple[object, ...], list[Change]] = {}

    def pack(self, state: State) -> Packed:
        devices, reps, requests, faults, graves = state
        return self._canonical(
            self._devices.of(devices),
            tuple(sorted([self._reps.of(rep) for rep in reps])),
            requests,
            faults,
            self._graves.of(graves),
        )

    def devices(self, packed: Packed) -> tuple[Dev, ...]:
        return self._devices.values[packed[0]]

    def without_trouble(self, packed: Packed) -> Packed:
        """The same without requests, faults or burials to come."""
        devices, reps, *_, graves = packed
        epoch, generation, _, buried = self._graves.values[graves]
        calm = self._graves.of((epoch, generation, 0, buried))
        return (
            (devices, reps, 0, 0, calm)
            if calm == graves
            else self._canonical(devices, reps, 0, 0, calm)
        )

    def following(self, packed: Packed, *, calm: bool = False) -> Iterator[Packed]:
        """All possible next states, some more than once; `calm`: only through steps that must
        happen in the end."""
        devices, reps, requests, faults, graves = packed
        worse = faults > 0
        at = (devices, worse, graves)
        for after, _, cost, below in self._from(self._environment, (calm, *at), at, calm=calm):
            yield self._canonical(after, reps, requests, faults - cost, below)
        for r, rep in enumerate(reps):
            others = reps[:r] + reps[r + 1 :]
            hands = tuple([self._hand(other) for other in others])
            key: tuple[object, ...] = (calm, *at, rep, hands)
            for after, new, cost, below in self._from(
                self._replica, key, at, (rep, *hands), calm=calm
            ):
                yield self._canonical(
                    after, tuple(sorted((new, *others))), requests, faults - cost, below
                )
            if requests and not calm:
                key = ("requests", *at, rep)
                for after, new, cost, below in self._from(self._requests, key, at, (rep,)):
                    yield self._canonical(
                        after, tuple(sorted((new, *others))), requests - 1, faults - cost, below
                    )

    # -- cached steps ---------------------------------------------------------------------------

    def _from(
        self,
        steps: Callable[..., Iterator[Step]],
        key: tuple[object, ...],
        at: tuple[int, bool, int],
        reps: tuple[int, ...] = (),
        *,
        calm: bool = False,
    ) -> list[Change]:
        """The changes of these steps; of the replicas, only the first is affected. `key`:
        everything they depend on."""
        found = self._changes.get(key)
        if found is None:
            devices, worse, graves = at
            state: State = (
                self._devices.values[devices],
                tuple([self._reps.values[rep] for rep in reps]),
                1,
                int(worse),
                self._graves.values[graves],
            )
            found = self._changes[key] = list(
                dict.fromkeys(
                    (
                        self._devices.of(after[0]),
                        self._reps.of(after[1][0]) if reps else _NOBODY,
                        worse - after[3],
                        self._graves.of(after[4]),
                    )
                    for _, after in steps(state, calm=calm)
                    if after != state
                )
            )
        return found

    def _environment(self, state: State, *, calm: bool) -> Iterator[Step]:
        for d in range(len(state[0])):
            yield from self._world.by_itself(state, d, calm=calm)

    def _replica(self, state: State, *, calm: bool) -> Iterator[Step]:
        yield from self._world.by_replica(state, 0, calm=calm)

    def _requests(self, state: State, *, calm: bool) -> Iterator[Step]:
        for d in range(len(state[0])):
            yield from self._world.requests(state, d)

    def _hand(self, rep: int) -> int:
        """A replica that has the same starts in hand, and nothing else."""
        found = self._hands.get(rep)
        if found is None:
            views: tuple[View, ...] = tuple(
                [
                    (*NO_VIEW[:4], view[4] if view[4] and view[4][0] == START else ())
                    for view in self._reps.values[rep][2]
                ]
            )
            found = self._hands[rep] = self._reps.of((0, 0, views, (), (), ()))
        return found

    # -- equal states ---------------------------------------------------------------------------

    def _canonical(
        self, devices: int, reps: tuple[int, ...], requests: int, faults: int, graves: int
    ) -> Packed:
        """`reps` in ascending order."""
        if len(self._devices.values[devices]) == 1:
            return (devices, reps, requests, faults, graves)
        swapped = self._swapped(0, devices)
        if swapped > devices:
            return (devices, reps, requests, faults, graves)
        others = tuple(sorted([self._swapped(1, rep) for rep in reps]))
        other = (swapped, others, requests, faults, self._swapped(2, graves))
        return min((devices, reps, requests, faults, graves), other)

    def _swapped(self, kind: int, number: int) -> int:
        """The state with its two devices swapped."""
        known = self._renamed[kind]
        found = known.get(number)
        if found is None:
            if kind == 0:
                found = self._devices.of(self._devices.values[number][::-1])
            elif kind == 1:
                found = self._reps.of(model.swapped(self._reps.values[number]))
            else:
                *floor, buried = self._graves.values[number]
                found = self._graves.of((*floor, buried[::-1]))  # type: ignore[arg-type]  # floor is the other three
            known[number], known[found] = found, number
        return found

"""Every interleaving of replicas with different class specs: one set is in force, and nothing
flaps.

The rule is the real one (`core.config_precedence`); carrying it out is modelled on
`in_force.ClassesInForce`: a replica that starts or reloads announces its configuration, waits until
its view of the others shows that, reads what is in force, decides once, and writes by
compare-and-set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from nomad_watchdog.core.config_precedence import ConfigStanding, succeed, wins

SETS = ("a", "b")


@dataclass(frozen=True, slots=True)
class Replica:
    own: str = ""
    """The configuration that it has and has announced; "" = it is not running."""
    view: tuple[str, ...] = ()
    """The announcements that it has read, by replica."""
    read: ConfigStanding | None = None
    open: bool = False
    """It has not decided yet whether its own set comes into force."""


@dataclass(frozen=True, slots=True)
class World:
    replicas: tuple[Replica, ...]
    standing: ConfigStanding | None = None
    starts: int = 0
    """Starts and reloads so far."""
    crashes: int = 0

    def put(self, r: int, one: Replica, **more: object) -> World:
        return replace(self, replicas=(*self.replicas[:r], one, *self.replicas[r + 1 :]), **more)  # type: ignore[arg-type]

    @property
    def settled(self) -> bool:
        """No decision is pending, and all running replicas have read what is in force."""
        there = [one for one in self.replicas if one.own]
        return all(not one.open and one.read == self.standing for one in there)


@dataclass(frozen=True, slots=True)
class Model:
    """Possible next steps. `once`, `waits`, `cas`: the guards, one of which a test leaves out."""

    starts: int = 4
    crashes: int = 1
    once: bool = True
    """A replica decides when it starts or reloads, and not again."""
    waits: bool = True
    """Its view is younger than its own announcement."""
    cas: bool = True

    def steps(self, world: World) -> Iterator[World]:
        for r, one in enumerate(world.replicas):
            if world.starts < self.starts:
                for own in SETS:  # a start, or a reload of a running one
                    view = () if self.waits else one.view
                    begun = Replica(own, view, one.read if one.own else None, open=True)
                    yield world.put(r, begun, starts=world.starts + 1)
            if not one.own:
                continue
            if world.crashes < self.crashes:
                yield world.put(r, Replica(), crashes=world.crashes + 1)
            yield world.put(r, replace(one, view=tuple(two.own for two in world.replicas)))
            yield world.put(r, replace(one, read=world.standing))
            if (one.open or not self.once) and one.view:
                yield from self._decide(world, r, one)

    def _decide(self, world: World, r: int, one: Replica) -> Iterator[World]:
        others = [own for n, own in enumerate(one.view) if own and n != r]
        closed = replace(one, open=False)
        if not wins(one.own, one.read, others):
            yield world.put(r, closed)
        elif not self.cas or one.read == world.standing:
            now = succeed(one.read, one.own)
            yield world.put(r, replace(closed, read=now), standing=now)


def broken(world: World) -> str:
    """The violation; "" = none."""
    if world.standing is not None and world.standing.number > world.starts:
        return "flaps: there were more changes than starts and reloads"
    there = [one for one in world.replicas if one.own]
    if not (world.settled and there):
        return ""
    if world.standing is None:
        return "nothing is in force"
    alike = len({one.own for one in there}) == 1 and (len(there) > 1 or not world.crashes)
    if alike and there[0].own != world.standing.digest:
        return "all are configured alike, and another set is in force"
    return ""


def explored(model: Model) -> tuple[int, str]:
    """The number of states, and the first violation."""
    first = World((Replica(), Replica()))
    seen, left = {first}, [first]
    while left:
        world = left.pop()
        for after in model.steps(world):
            if after.standing and world.standing and after.standing.number < world.standing.number:
                return len(seen), "the number went back"
            if after not in seen:
                if why := broken(after):
                    return len(seen), why
                seen.add(after)
                left.append(after)
    return len(seen), ""


def test_one_set_is_in_force_in_every_order() -> None:
    """In any order of starts, reloads and a crash of two replicas with two configurations, the set
    in force changes at most once per start or reload, and the set of replicas with equal
    configuration is in force."""
    states, why = explored(Model())
    assert not why
    assert states > 5_000


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Model(once=False), "flaps"),
        (Model(waits=False), "another set is in force"),
        (Model(cas=False), "went back|another set"),
    ],
)
def test_each_guard_is_needed(model: Model, words: str) -> None:
    """Each of these is detected: a replica that decides again, one whose view of the others
    predates its own announcement, and a write without compare-and-set."""
    _, why = explored(model)
    assert any(word in why for word in words.split("|")), why

"""The class specs that are in force for the whole fleet: read from the registry and followed by every replica.

Which set that is changes only when a replica starts or reads its configuration again, by the rule of
`core.config_precedence`. What each replica is configured with is known to the others by its registration (`leases`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from nomad_watchdog.config import class_set
from nomad_watchdog.config.class_set import ClassSetStore, InForce, in_words
from nomad_watchdog.core.config_precedence import succeed, wins
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.replicas.leases import Leases

log = logging.getLogger(__name__)

READ_EVERY_S: Final = 2.0
"""So late at most another replica goes by a set that has come into force."""
PATIENCE_S: Final = 5.0
"""So long a start or a reload waits until it is known who else is there. Who does not know goes by what is in force,
and asks again every second."""
_POLL_S: Final = 0.05
_TRIES: Final = 5

Specs = Mapping[str, AgentSpec]
Place = Callable[[AgentSpec], AgentSpec]


def as_it_is(spec: AgentSpec) -> AgentSpec:
    return spec


@dataclass(frozen=True, slots=True)
class OwnClasses:
    """What a replica is configured with."""

    specs: Specs
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Agent class → why its spec can't be made."""
    place: Place = as_it_is
    """Puts what is this replica's own into the spec of another one (`Settings.placer`)."""

    def whole(self, kept: InForce | None) -> Specs:
        """The specs, and those in force of classes that can't be read here."""
        there = kept.specs if kept is not None else {}
        borrowed = {name: there[name] for name in self.unreadable if name in there}
        return {**borrowed, **self.specs}

    def digest(self, kept: InForce | None) -> str:
        """Of the whole, see `class_set.digest`."""
        return class_set.digest(self.whole(kept))

    def in_force(self, kept: InForce | None, replica: str) -> Specs:
        """The specs to go by while `kept` is in force. `replica`: our own id."""
        if kept is None:
            return self.specs
        if kept.standing.digest != self.digest(kept):
            return {name: self.place(spec) for name, spec in kept.specs.items()}
        if kept.by == replica:
            # What we brought into force and can't read any more has to be fixed here.
            return self.specs
        return {n: self.specs.get(n) or self.place(spec) for n, spec in kept.specs.items()}

    def differences(self, kept: InForce | None) -> tuple[str, ...]:
        """The classes that are not as they are in force, with the change in words."""
        return () if kept is None else tuple(class_set.differences(kept.specs, self.whole(kept)))

    def wins(self, kept: InForce | None, others: Iterable[str]) -> bool:
        """See `core.in_force.wins`."""
        return wins(self.digest(kept), None if kept is None else kept.standing, others)


class ClassSetController:
    """One replica's view. `own`: what it starts with."""

    def __init__(self, fleet: Fleet, leases: Leases, metrics: Metrics, own: OwnClasses) -> None:
        self._fleet = fleet
        self._leases = leases
        self._metrics = metrics
        self._own = own
        self._store = ClassSetStore(fleet.registry)
        self._open = True
        """A start or a reload has not been decided yet."""
        self._read_at = float("-inf")
        self._announced = ""
        self._differing: tuple[str, ...] = ()
        self._specs: Specs = dict(own.specs)
        self.problem = ""
        """Why what is in force can't be read now; what was read before stands."""
        fleet.views.add_status(self.status)

    # -- what is in force -----------------------------------------------------------------------

    def specs(self) -> Specs:
        """Agent class → its spec in force, with what is this replica's own in it."""
        return self._specs

    @property
    def configured(self) -> Specs:
        """Agent class → its spec as it is configured here."""
        return self._own.specs

    def unreadable(self) -> dict[str, str]:
        """Classes that are configured here and in force nowhere, as their spec can't be made → why."""
        return {n: why for n, why in self._own.unreadable.items() if n not in self._specs}

    @property
    def differs(self) -> bool:
        """Whether another set than ours is in force, and that is no matter of the next second."""
        return bool(self._differing)

    def differences(self) -> tuple[str, ...]:
        """The classes that are configured differently here, with the change in words."""
        return self._differing

    def _settle(self) -> None:
        """See what follows from what was read."""
        self._specs = self._own.in_force(self._store.in_force, self._leases.replica)
        if not self._open:
            self._report()

    # -- deciding -------------------------------------------------------------------------------

    async def start(self, wait_s: float = PATIENCE_S) -> None:
        """Apply the rule to what we are configured with. Waits until it is known who else is there, or for
        `wait_s`; what can't be decided by then, `look` decides. Raises nothing that the registry raises."""
        clock, pause_s = self._fleet.clock, _POLL_S
        until = clock.monotonic() + wait_s
        await self._look()
        while self._open and clock.monotonic() < until:
            await asyncio.sleep(pause_s)
            if self._leases.configs() is not None:
                await self._look()
                pause_s = min(2 * pause_s, 1.0)

    async def look(self) -> bool:
        """Read what is in force, and decide what is still to be decided; whether the specs in force are others
        now. What the registry raises is told in `problem`."""
        before = self._specs
        now = self._fleet.clock.monotonic()
        if self._open or now - self._read_at >= READ_EVERY_S:
            await self._look()
            self._read_at = now
        return before != self._specs

    async def would_be(self, own: OwnClasses) -> Specs | None:
        """What would be in force if we were configured with this now; None = that can't be known now. Raises as the
        registry."""
        others = self._leases.configs()
        if others is None:
            return None
        kept = await self._store.read()
        if own.wins(kept, others):
            return own.specs
        return own.in_force(kept, self._leases.replica)

    async def go_by(self, own: OwnClasses, wait_s: float = PATIENCE_S) -> None:
        """We are configured with this from now on: apply the rule, as at a start."""
        self._own, self._open = own, True
        await self.start(wait_s)

    async def have_read(self, found: Specs, still: Mapping[str, str]) -> bool:
        """Files of classes were read again: `found` can be now, `still` can't and why. The classes that have come are
        a new configuration of ours; whether there are any."""
        own = self._own
        come = {name: spec for name, spec in found.items() if name in own.unreadable}
        left = {name: why for name, why in still.items() if name in own.unreadable}
        again = replace(own, specs={**own.specs, **come}, unreadable=left)
        if come:
            await self.go_by(again)
        else:
            self._own = again
        return bool(come)

    async def once(self, *, bring: bool) -> None:
        """For a command that looks once: what is in force, or would be if a replica started with our configuration.
        `bring`: as such a replica, bring it into force. Raises as the registry."""
        await self._store.read()
        if bring:
            await self._decide()
        kept, own = self._store.in_force, self._own
        if own.wins(kept, self._leases.configs() or ()):
            self._specs, self._differing = own.specs, ()
        else:
            self._specs = own.in_force(kept, self._leases.replica)
            self._differing = own.differences(kept)

    async def _look(self) -> None:
        try:
            await self._store.read()
            await self._announce()
            if self._open:
                await self._decide()
        except WatchdogError as error:
            if str(error) != self.problem:
                log.warning("classes in force not read", extra={"reason": str(error)})
            self.problem = str(error)
        else:
            self.problem = ""
        self._settle()

    async def _announce(self) -> None:
        if (now := self._own.digest(self._store.in_force)) != self._announced:
            await self._leases.announce(now)
            self._announced = now

    async def _decide(self) -> None:
        for _ in range(_TRIES):
            others = self._leases.configs()
            if others is None:
                return
            kept, own = self._store.in_force, self._own
            if not own.wins(kept, others):
                self._open = False
                return
            wanted = InForce(
                succeed(None if kept is None else kept.standing, own.digest(kept)),
                own.whole(kept),
                self._leases.replica,
                self._fleet.clock.wall(),
            )
            if await self._store.write(wanted):
                self._open = False
                self._say_changed(kept, wanted)
                return
            await self._store.read()

    # -- saying so ------------------------------------------------------------------------------

    def _say_changed(self, before: InForce | None, now: InForce) -> None:
        told = {"config": now.standing.digest, "number": now.standing.number}
        log.info("class specs in force", extra=told)
        if before is None:
            return
        changed = class_set.differences(before.specs, now.specs)
        who = self._leases.replica
        text = f"the class specs of replica {who} are in force for all: {in_words(changed)}"
        self._tell("classes.in_force", text, {**told, "changed": changed[:20]})

    def _report(self) -> None:
        """Say when we begin or end to be configured differently."""
        kept = self._store.in_force
        if kept is None:
            return
        now = self._own.differences(kept)
        was, self._differing = self._differing, now
        self._metrics.config_differs(differs=bool(now))
        if now == was:
            return
        told = {"config": self._own.digest(kept), "in_force": kept.standing.digest}
        if now:
            text = (
                f"replica {self._leases.replica} is configured differently from what is in force (in force → "
                f"its own file): {in_words(now)}"
            )
            log.warning(text, extra=told)
            self._tell("classes.differ", text, {**told, "changed": list(now[:20])})
        else:
            text = f"replica {self._leases.replica} is configured with what is in force"
            log.info(text, extra=told)
            self._tell("classes.agree", text, told)

    def _tell(self, kind: str, text: str, data: Mapping[str, object]) -> None:
        self._fleet.events.own.add(
            at=self._fleet.clock.wall(),
            kind=kind,
            device_id="",
            slug=Slug(""),
            text=text,
            data=dict(data),
        )

    def status(self) -> dict[str, object]:
        """Our part of the status."""
        kept = self._store.in_force
        if kept is None:
            return {"classes_in_force": {"problem": self.problem}} if self.problem else {}
        return {
            "classes_in_force": {
                "config": kept.standing.digest,
                "number": kept.standing.number,
                "by": kept.by,
                "since": kept.since,
                "own": self._own.digest(kept),
                "differs": list(self._differing),
                "unreadable": dict(self._own.unreadable),
                "problem": self.problem,
            }
        }

"""The class specs that are in force for the whole fleet: stored in the registry, and applied by every replica.

The set in force changes only when a replica starts or reloads its configuration, by the rule of
`core.config_precedence`. Each replica publishes which set it is configured with (`replicas/leases.py`).
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
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.replicas.leases import Leases

log = logging.getLogger(__name__)

READ_EVERY_S: Final = 2.0
"""Maximum time until another replica applies a set that has come into force."""
PATIENCE_S: Final = 5.0
"""Maximum time that a start or a reload waits until the other replicas are known. After it, the replica applies the set
in force, and decides later."""
_POLL_S: Final = 0.05
_TRIES: Final = 5

Specs = Mapping[str, AgentSpec]
Place = Callable[[AgentSpec], AgentSpec]


def unchanged(spec: AgentSpec) -> AgentSpec:
    return spec


@dataclass(frozen=True, slots=True)
class OwnClasses:
    """The configuration of one replica."""

    specs: Specs
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Agent class → why its spec can't be made."""
    place: Place = unchanged
    """Replaces what belongs to another replica in a spec by what belongs to this one (`Settings.placer`)."""

    def whole(self, stored: InForce | None) -> Specs:
        """The specs, including those in force of classes that can't be read here."""
        there = stored.specs if stored is not None else {}
        borrowed = {name: there[name] for name in self.unreadable if name in there}
        return {**borrowed, **self.specs}

    def digest(self, stored: InForce | None) -> str:
        """Of the whole, see `class_set.digest`."""
        return class_set.digest(self.whole(stored))

    def in_force(self, stored: InForce | None, replica: str) -> Specs:
        """The specs to apply while `stored` is in force. `replica`: our own ID."""
        if stored is None:
            return self.specs
        if stored.standing.digest != self.digest(stored):
            return {name: self.place(spec) for name, spec in stored.specs.items()}
        if stored.by == replica:
            # A class that we brought into force and can't read any more has to be fixed here.
            return self.specs
        return {n: self.specs.get(n) or self.place(spec) for n, spec in stored.specs.items()}

    def differences(self, stored: InForce | None) -> tuple[str, ...]:
        """The classes that are not as they are in force, with the change in words."""
        return (
            () if stored is None else tuple(class_set.differences(stored.specs, self.whole(stored)))
        )

    def wins(self, stored: InForce | None, others: Iterable[str]) -> bool:
        """See `core.config_precedence.wins`."""
        return wins(self.digest(stored), None if stored is None else stored.standing, others)


class ClassSetController:
    """The set in force, for one replica. `own`: its configuration at the start."""

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
        """Why the set in force can't be read now; what was read before stays in force."""
        fleet.views.add_status(self.status)

    # -- what is in force -----------------------------------------------------------------------

    def specs(self) -> Specs:
        """Agent class → its spec in force, adapted to this replica."""
        return self._specs

    @property
    def configured(self) -> Specs:
        """Agent class → its spec as configured here."""
        return self._own.specs

    def unreadable(self) -> dict[str, str]:
        """Classes that are configured here but not in force because their spec can't be made → why."""
        return {n: why for n, why in self._own.unreadable.items() if n not in self._specs}

    @property
    def differs(self) -> bool:
        """Whether a different set than ours is in force, and stays so."""
        return bool(self._differing)

    def differences(self) -> tuple[str, ...]:
        """The classes that are configured differently here, with the change in words."""
        return self._differing

    def _update(self) -> None:
        """Apply what was read."""
        self._specs = self._own.in_force(self._store.in_force, self._leases.replica)
        if not self._open:
            self._report_difference()

    # -- deciding -------------------------------------------------------------------------------

    async def start(self, wait_s: float = PATIENCE_S) -> None:
        """Apply the rule to our configuration. Waits for at most `wait_s` until the other replicas are known; what
        can't be decided by then, `poll` decides later. Errors of the registry are reported in `problem`."""
        clock, pause_s = self._fleet.clock, _POLL_S
        until = clock.monotonic() + wait_s
        await self._poll()
        while self._open and clock.monotonic() < until:
            await asyncio.sleep(pause_s)
            if self._leases.configs() is not None:
                await self._poll()
                pause_s = min(2 * pause_s, 1.0)

    async def poll(self) -> bool:
        """Read the set in force, and decide what is still undecided; whether the specs in force have changed. Errors of
        the registry are reported in `problem`."""
        before = self._specs
        now = self._fleet.clock.monotonic()
        if self._open or now - self._read_at >= READ_EVERY_S:
            await self._poll()
            self._read_at = now
        return before != self._specs

    async def preview(self, own: OwnClasses) -> Specs | None:
        """What would be in force if this were our configuration; None = not known now. Raises as the registry."""
        others = self._leases.configs()
        if others is None:
            return None
        stored = await self._store.read()
        if own.wins(stored, others):
            return own.specs
        return own.in_force(stored, self._leases.replica)

    async def configure(self, own: OwnClasses, wait_s: float = PATIENCE_S) -> None:
        """Make this our configuration: apply the rule, as at a start."""
        self._own, self._open = own, True
        await self.start(wait_s)

    async def on_files_read(self, found: Specs, still: Mapping[str, str]) -> bool:
        """Files of classes were read again: `found` are readable now, `still` are not, and why. Classes that became
        readable are a new configuration; whether there are any."""
        own = self._own
        come = {name: spec for name, spec in found.items() if name in own.unreadable}
        left = {name: why for name, why in still.items() if name in own.unreadable}
        again = replace(own, specs={**own.specs, **come}, unreadable=left)
        if come:
            await self.configure(again)
        else:
            self._own = again
        return bool(come)

    async def read_once(self, *, apply: bool) -> None:
        """For a command that decides once: read what is in force, or would be if a replica started with our
        configuration. `apply`: bring it into force, as such a replica. Raises as the registry."""
        await self._store.read()
        if apply:
            await self._decide()
        stored, own = self._store.in_force, self._own
        if own.wins(stored, self._leases.configs() or ()):
            self._specs, self._differing = own.specs, ()
        else:
            self._specs = own.in_force(stored, self._leases.replica)
            self._differing = own.differences(stored)

    async def _poll(self) -> None:
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
        self._update()

    async def _announce(self) -> None:
        if (now := self._own.digest(self._store.in_force)) != self._announced:
            await self._leases.announce(now)
            self._announced = now

    async def _decide(self) -> None:
        for _ in range(_TRIES):
            others = self._leases.configs()
            if others is None:
                return
            stored, own = self._store.in_force, self._own
            if not own.wins(stored, others):
                self._open = False
                return
            wanted = InForce(
                succeed(None if stored is None else stored.standing, own.digest(stored)),
                own.whole(stored),
                self._leases.replica,
                self._fleet.clock.wall(),
            )
            if await self._store.write(wanted, stored):
                self._open = False
                self._report_change(stored, wanted)
                return
            await self._store.read()

    # -- reporting ------------------------------------------------------------------------------

    def _report_change(self, before: InForce | None, now: InForce) -> None:
        fields = {"config": now.standing.digest, "number": now.standing.number}
        log.info("class specs in force", extra=fields)
        if before is None:
            return
        changed = class_set.differences(before.specs, now.specs)
        replica = self._leases.replica
        text = f"the class specs of replica {replica} are in force for all: {in_words(changed)}"
        self._emit("classes.in_force", text, {**fields, "changed": changed[:20]})

    def _report_difference(self) -> None:
        """Report when our configuration begins or ceases to differ from the set in force."""
        stored = self._store.in_force
        if stored is None:
            return
        now = self._own.differences(stored)
        was, self._differing = self._differing, now
        self._metrics.config_differs(differs=bool(now))
        if now == was:
            return
        fields = {"config": self._own.digest(stored), "in_force": stored.standing.digest}
        if now:
            text = (
                f"replica {self._leases.replica} is configured differently from what is in force (in force → "
                f"its own file): {in_words(now)}"
            )
            log.warning(text, extra=fields)
            self._emit("classes.differ", text, {**fields, "changed": list(now[:20])})
        else:
            text = f"replica {self._leases.replica} is configured with what is in force"
            log.info(text, extra=fields)
            self._emit("classes.agree", text, fields)

    def _emit(self, kind: str, text: str, data: Mapping[str, object]) -> None:
        self._fleet.events.note_fleet(kind, text, data)

    def status(self) -> dict[str, object]:
        """For the status."""
        stored = self._store.in_force
        if stored is None:
            return {"classes_in_force": {"problem": self.problem}} if self.problem else {}
        return {
            "classes_in_force": {
                "config": stored.standing.digest,
                "number": stored.standing.number,
                "by": stored.by,
                "since": stored.since,
                "own": self._own.digest(stored),
                "differs": list(self._differing),
                "unreadable": dict(self._own.unreadable),
                "problem": self.problem,
            }
        }

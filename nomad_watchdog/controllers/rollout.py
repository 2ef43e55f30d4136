"""Versions on their way: which spec each class has now, and back to the last good one when the new one dies.

What is kept of a class is one small document in the registry: the last spec that has proved itself, and the
hash of the one that was given up. Every replica goes by it and sees what soaks; the holder of shard 0 alone
judges and writes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Final

from pydantic import BeforeValidator, TypeAdapter

from nomad_watchdog.core.rollout_soak import ObservedRun, Soak, SoakLimits
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, PlacementState, Presence
from nomad_watchdog.registry.document import Document, DocumentFormat
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.replicas.ownership import is_leader
from nomad_watchdog.schedulers import job_templates
from nomad_watchdog.schedulers.agent_document import spec_fields, stored_spec

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
READ_EVERY_S: Final = 5.0
"""So late at most another replica goes by what the judge wrote."""
_UP: Final = (PlacementState.RUNNING, PlacementState.LOST)


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What the registry knows of a class."""

    good: Annotated[AgentSpec | None, BeforeValidator(spec_fields)] = None
    template: str = ""
    """Digest of the template that the good spec was made with: its text is not kept."""
    bad: str = ""
    """Hash of the spec that was given up."""
    why: str = ""


_STATE: Final = TypeAdapter(RolloutState)


class RolloutController:
    """The specs in force. `wished`: as they are configured."""

    def __init__(
        self, fleet: Fleet, wished: Mapping[str, AgentSpec], leases: Leases, metrics: Metrics
    ) -> None:
        self._fleet = fleet
        self._wished = dict(wished)
        self._leases = leases
        self._metrics = metrics
        self._limits = SoakLimits(fleet.limits.soak_s, fleet.limits.soak_deaths)
        self._documents: dict[str, Document[RolloutState]] = {}
        self._soaks: dict[str, Soak] = {}
        self._read_at = float("-inf")
        self._now = dict(wished)
        self._halted = frozenset(self._wished) if self.on else frozenset()
        """Until the documents have been read nobody knows which version was given up."""
        self.problem = ""
        """Why the documents can't be read now; what was read before stands."""
        fleet.views.add_status(self.status)

    @property
    def on(self) -> bool:
        """Whether versions are watched at all."""
        return self._limits.soak_s > 0

    def specs(self) -> dict[str, AgentSpec]:
        """Agent class → the spec in force."""
        return self._now

    @property
    def configured(self) -> Mapping[str, AgentSpec]:
        """Agent class → its spec as it is configured."""
        return self._wished

    def wished(self) -> dict[str, str]:
        """Agent class → the hash of its spec as it is configured."""
        return {name: spec.spec_hash for name, spec in self._wished.items()}

    def want(self, wished: Mapping[str, AgentSpec]) -> None:
        """Go by these configured specs, and the fleet's limits of this moment, from now on. Where versions
        are watched, a class that is new or changed waits until it is known which versions were given up."""
        changed = {n for n, spec in wished.items() if self._wished.get(n) != spec}
        self._wished = dict(wished)
        self._limits = SoakLimits(self._fleet.limits.soak_s, self._fleet.limits.soak_deaths)
        self._soaks = {n: s for n, s in self._soaks.items() if n in wished and n not in changed}
        self._read_at = float("-inf")
        if self.on:
            self._now = {n: self._now.get(n, spec) for n, spec in wished.items()}
            self._halted |= changed
        else:
            self._now, self._halted = dict(wished), frozenset()

    def halted(self) -> frozenset[str]:
        """Classes whose new version was given up and that have none to go back to."""
        return self._halted

    async def _settle(self) -> None:
        """See what follows from what is kept."""
        self._now = {name: await self._in_force(name, spec) for name, spec in self._wished.items()}
        self._halted = frozenset(
            name
            for name, spec in self._wished.items()
            if self._is_given_up(name) and self._now[name] is spec
        )
        self._metrics.rollouts_given_up(sum(map(self._is_given_up, self._wished)))

    async def _in_force(self, name: str, wished: AgentSpec) -> AgentSpec:
        kept = self._kept(name)
        back = kept.good if self._is_given_up(name) else None
        if back is None:
            return wished
        # Only what an older version of this program knows is kept: where the template is the same, its text is.
        for text in (wished.text, ""):
            one = replace(back, text=text if back.template == wished.template else "", on=wished.on)
            if await asyncio.to_thread(_digest, one) == kept.template:
                return one
        return wished

    def _is_given_up(self, name: str) -> bool:
        return self._kept(name).bad == self._wished[name].spec_hash

    def _kept(self, name: str) -> RolloutState:
        return self._document(name).value

    def _document(self, name: str) -> Document[RolloutState]:
        if name not in self._documents:
            self._documents[name] = Document(self._fleet.registry, document_format(name))
        return self._documents[name]

    def soaking(self) -> int:
        """Agents of new versions that are ready now and have not proved themselves yet. One that reports
        before the scheduler shows it counts: whoever is not known to run an older version."""
        return sum(
            slug not in soak.lasted
            and self._fleet.verdicts.has_ready_agent(slug)
            and not self._is_old(slug, self._wished[name])
            for name, soak in self._soaks.items()
            for slug in self._wanted(name)
        )

    def _is_old(self, slug: Slug, spec: AgentSpec) -> bool:
        record = self._fleet.records[slug]
        return any(
            one.epoch == record.epoch and one.spec_hash != spec.spec_hash
            for one in self._fleet.placements.get(slug, ())
        )

    def status(self) -> dict[str, object]:
        """For the status: what is on its way, and what was given up; nothing where none are watched."""
        if not self.on:
            return {}
        shown: dict[str, object] = {}
        for name, spec in self._wished.items():
            kept, soak = self._kept(name), self._soaks.get(name)
            if soak is None and not self._is_given_up(name):
                continue
            shown[name] = {
                "wished": spec.version,
                "in_force": self._now[name].version,
                "soaking": soak.soaking() if soak is not None else 0,
                "died": len(soak.died) if soak is not None else 0,
                "given_up": kept.why if self._is_given_up(name) else "",
            }
        return {"rollouts": shown}

    # -- what the registry keeps ----------------------------------------------------------------

    async def look(self) -> bool:
        """Read what is kept, look at the agents of new versions and, as the judge, say what follows; whether
        there may be more room in the window. What the registry raises is told in `problem`."""
        if not self.on:
            return False
        before = self._room()
        try:
            now = self._fleet.clock.monotonic()
            if now - self._read_at >= READ_EVERY_S:
                await self._read()
                self._read_at = now
            if self._fleet.readiness.ready:
                for name, spec in self._wished.items():
                    await self._watch(name, spec)
        except WatchdogError as error:
            if not self.problem:
                log.warning("roll-outs not judged", extra={"reason": str(error)})
            self.problem = str(error)
        else:
            self.problem = ""
        return before != self._room()

    def _room(self) -> tuple[frozenset[str], dict[str, int]]:
        """What changes when there is room for more."""
        return self._halted, {name: len(soak.lasted) for name, soak in self._soaks.items()}

    async def _read(self) -> None:
        for name in self._wished:
            await self._document(name).refresh()
        await self._settle()

    async def _write(self, name: str, kept: RolloutState) -> bool:
        if not await self._document(name).replace(kept):
            self._read_at = float("-inf")  # another leader was faster: read what it wrote
            return False
        await self._settle()
        return True

    # -- watching and judging -------------------------------------------------------------------

    async def _watch(self, name: str, spec: AgentSpec) -> None:
        kept = self._kept(name)
        settled = kept.good is not None and kept.good.spec_hash == spec.spec_hash
        if settled or self._is_given_up(name):
            self._soaks.pop(name, None)
            return
        wanted = frozenset(self._wanted(name))
        soak = self._soaks.setdefault(name, Soak(self._limits))
        soak.look(self._runs(spec, wanted), wanted, self._fleet.clock.monotonic())
        if is_leader(self._leases):
            await self._judge(spec, soak, wanted)

    async def _judge(self, spec: AgentSpec, soak: Soak, wanted: frozenset[Slug]) -> None:
        name = spec.agent_class
        kept = self._kept(name)
        # The first version of all has nothing before it: it is only waited for until it is good.
        if soak.is_bad(len(wanted)) and kept.good is not None:
            await self._give_up(name, spec, kept, soak)
        elif wanted and soak.is_good(wanted):
            proved = RolloutState(good=spec, template=await asyncio.to_thread(_digest, spec))
            if await self._write(name, proved) and kept.good is not None:
                self._tell(name, "rollout.done", f"version {spec.version} is on all devices")

    async def _give_up(self, name: str, spec: AgentSpec, kept: RolloutState, soak: Soak) -> None:
        why = (
            f"agents of {len(soak.died)} devices ended within {self._limits.soak_s:g} s after they "
            "were ready"
        )
        if not await self._write(name, replace(kept, bad=spec.spec_hash, why=why)):
            return
        back = self._now[name]
        if back is spec:
            self._tell(
                name,
                "rollout.halted",
                f"version {spec.version}: {why}; the template of the version before has changed, so "
                "that it can't be gone back to",
            )
        else:
            text = f"version {spec.version}: {why}; back to version {back.version}"
            self._tell(name, "rollout.rolled_back", text)

    def _tell(self, name: str, kind: str, text: str) -> None:
        log.warning(text, extra={"agent_class": name, "kind": kind})
        self._fleet.events.own.add(
            at=self._fleet.clock.wall(),
            kind=kind,
            device_id="",
            slug=Slug(""),
            text=f"class {name}, {text}",
            data={"class": name},
        )

    def _wanted(self, name: str) -> Iterator[Slug]:
        for slug, record in self._fleet.records.items():
            if record.presence is Presence.PRESENT and record.device.agent_class == name:
                yield slug

    def _runs(self, spec: AgentSpec, wanted: frozenset[Slug]) -> Iterator[ObservedRun]:
        fleet = self._fleet
        for slug in wanted:
            record = fleet.records[slug]
            for one in fleet.placements.get(slug, ()):
                if (
                    one.state in _UP
                    and one.epoch == record.epoch
                    and one.spec_hash == spec.spec_hash
                ):
                    yield ObservedRun(
                        slug,
                        one.epoch,
                        ",".join(one.instances),
                        one.restarts,
                        one.node,
                        ready=fleet.verdicts.has_ready_agent(slug),
                        lost=one.state is PlacementState.LOST,
                    )


def _digest(spec: AgentSpec) -> str:
    """Of the template's text; "" when it can't be read."""
    try:
        text = job_templates.load(spec.template, spec.text).text
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except WatchdogError:
        return ""


def document_format(agent_class: str) -> DocumentFormat[RolloutState]:
    """Of the document that stores the roll-out state of this class."""
    return DocumentFormat(
        name=f"rollout-{hashlib.sha256(agent_class.encode()).hexdigest()[:16]}",
        empty=RolloutState(),
        parse=_STATE.validate_python,
        serialize=_serialized,
        repair="the roll-out is judged without it",
        replaceable=True,
    )


def _serialized(state: RolloutState) -> dict[str, object]:
    # Older versions reject a spec with fields that they do not know.
    fields: dict[str, object] = _STATE.dump_python(state, mode="json", exclude={"good"})
    if state.good is None:
        return fields | {"good": None}
    unknown_before = ("settings", "text", "on")
    good = {
        name: value for name, value in stored_spec(state.good).items() if name not in unknown_before
    }
    return fields | {"good": good}

"""Roll-outs: which spec each class has now, and back to the last proven one when agents of the new one die.

The registry stores one small document per class: the last spec that was proven, and the hash of the one that was given
up. Every replica applies it and observes the agents of new versions; only the leader judges and writes.
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

POLL_S: Final = 1.0
READ_EVERY_S: Final = 5.0
"""Maximum time until another replica applies what the leader wrote."""
_UP: Final = (PlacementState.RUNNING, PlacementState.LOST)


@dataclass(frozen=True, slots=True)
class RolloutState:
    """What the registry stores for a class."""

    good: Annotated[AgentSpec | None, BeforeValidator(spec_fields)] = None
    template: str = ""
    """Digest of the template of the proven spec: its text is not stored."""
    bad: str = ""
    """Hash of the spec that was given up."""
    why: str = ""


_STATE: Final = TypeAdapter(RolloutState)


class RolloutController:
    """The specs in force. `configured`: as in the configuration."""

    def __init__(
        self, fleet: Fleet, configured: Mapping[str, AgentSpec], leases: Leases, metrics: Metrics
    ) -> None:
        self._fleet = fleet
        self._configured = dict(configured)
        self._leases = leases
        self._metrics = metrics
        self._limits = SoakLimits(fleet.limits.soak_s, fleet.limits.soak_deaths)
        self._documents: dict[str, Document[RolloutState]] = {}
        self._soaks: dict[str, Soak] = {}
        self._read_at = float("-inf")
        self._in_force_now = dict(configured)
        self._halted = frozenset(self._configured) if self.on else frozenset()
        """All classes until the documents have been read: until then it is not known which versions were given up."""
        self.problem = ""
        """Why the documents can't be read now; what was read before stays in force."""
        fleet.views.add_status(self.status)

    @property
    def on(self) -> bool:
        """Whether new versions have to prove themselves."""
        return self._limits.soak_s > 0

    def specs(self) -> dict[str, AgentSpec]:
        """Agent class → the spec in force."""
        return self._in_force_now

    @property
    def configured(self) -> Mapping[str, AgentSpec]:
        """Agent class → its configured spec."""
        return self._configured

    def configured_hashes(self) -> dict[str, str]:
        """Agent class → the hash of its configured spec."""
        return {name: spec.spec_hash for name, spec in self._configured.items()}

    def configure(self, configured: Mapping[str, AgentSpec]) -> None:
        """Apply these configured specs and the current limits of the fleet. Where new versions have to prove
        themselves, a class that is new or changed waits until it is known which versions were given up."""
        changed = {n for n, spec in configured.items() if self._configured.get(n) != spec}
        self._configured = dict(configured)
        self._limits = SoakLimits(self._fleet.limits.soak_s, self._fleet.limits.soak_deaths)
        self._soaks = {n: s for n, s in self._soaks.items() if n in configured and n not in changed}
        self._read_at = float("-inf")
        if self.on:
            self._in_force_now = {
                n: self._in_force_now.get(n, spec) for n, spec in configured.items()
            }
            self._halted |= changed
        else:
            self._in_force_now, self._halted = dict(configured), frozenset()

    def halted(self) -> frozenset[str]:
        """Classes whose new version was given up and that have no earlier one to go back to."""
        return self._halted

    async def _update(self) -> None:
        """Apply what was read."""
        self._in_force_now = {
            name: await self._in_force(name, spec) for name, spec in self._configured.items()
        }
        self._halted = frozenset(
            name
            for name, spec in self._configured.items()
            if self._is_given_up(name) and self._in_force_now[name] is spec
        )
        self._metrics.rollouts_given_up(sum(map(self._is_given_up, self._configured)))

    async def _in_force(self, name: str, configured: AgentSpec) -> AgentSpec:
        state = self._state(name)
        back = state.good if self._is_given_up(name) else None
        if back is None:
            return configured
        # The stored spec has only the fields that older versions know; the text of an equal template is ours.
        for text in (configured.text, ""):
            one = replace(
                back, text=text if back.template == configured.template else "", on=configured.on
            )
            if await asyncio.to_thread(_digest, one) == state.template:
                return one
        return configured

    def _is_given_up(self, name: str) -> bool:
        return self._state(name).bad == self._configured[name].spec_hash

    def _state(self, name: str) -> RolloutState:
        return self._document(name).value

    def _document(self, name: str) -> Document[RolloutState]:
        if name not in self._documents:
            self._documents[name] = Document(self._fleet.registry, document_format(name))
        return self._documents[name]

    def soaking(self) -> int:
        """Number of agents of new versions that are ready now and have not proved themselves yet. An agent that
        reports before the scheduler lists it counts, unless it is known to run an older version."""
        return sum(
            slug not in soak.lasted
            and self._fleet.agents.has_ready_agent(slug)
            and not self._is_old(slug, self._configured[name])
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
        """For the status: roll-outs in progress and versions that were given up; empty where `on` is false."""
        if not self.on:
            return {}
        rollouts: dict[str, object] = {}
        for name, spec in self._configured.items():
            state, soak = self._state(name), self._soaks.get(name)
            if soak is None and not self._is_given_up(name):
                continue
            rollouts[name] = {
                "wished": spec.version,
                "in_force": self._in_force_now[name].version,
                "soaking": soak.soaking() if soak is not None else 0,
                "died": len(soak.died) if soak is not None else 0,
                "given_up": state.why if self._is_given_up(name) else "",
            }
        return {"rollouts": rollouts}

    # -- the documents in the registry ----------------------------------------------------------------

    async def poll(self) -> bool:
        """Read the documents, observe the agents of new versions and, as the leader, judge them; whether there may be
        more room in the roll-out window. Errors of the registry are reported in `problem`."""
        if not self.on:
            return False
        before = self._room()
        try:
            now = self._fleet.clock.monotonic()
            if now - self._read_at >= READ_EVERY_S:
                await self._read()
                self._read_at = now
            if self._fleet.readiness.ready:
                for name, spec in self._configured.items():
                    await self._watch(name, spec)
        except WatchdogError as error:
            if not self.problem:
                log.warning("roll-outs not judged", extra={"reason": str(error)})
            self.problem = str(error)
        else:
            self.problem = ""
        return before != self._room()

    def _room(self) -> tuple[frozenset[str], dict[str, int]]:
        """Changes when there is room for more replacements."""
        return self._halted, {name: len(soak.lasted) for name, soak in self._soaks.items()}

    async def _read(self) -> None:
        for name in self._configured:
            await self._document(name).refresh()
        await self._update()

    async def _write(self, name: str, state: RolloutState) -> bool:
        if not await self._document(name).replace(state):
            self._read_at = float("-inf")  # another leader was faster: read what it wrote
            return False
        await self._update()
        return True

    # -- watching and judging -------------------------------------------------------------------

    async def _watch(self, name: str, spec: AgentSpec) -> None:
        state = self._state(name)
        settled = state.good is not None and state.good.spec_hash == spec.spec_hash
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
        state = self._state(name)
        # There is no version to go back to before the first one, so it is never given up.
        if soak.is_bad(len(wanted)) and state.good is not None:
            await self._give_up(name, spec, state, soak)
        elif wanted and soak.is_good(wanted):
            proved = RolloutState(good=spec, template=await asyncio.to_thread(_digest, spec))
            if await self._write(name, proved) and state.good is not None:
                self._report(name, "rollout.done", f"version {spec.version} is on all devices")

    async def _give_up(self, name: str, spec: AgentSpec, state: RolloutState, soak: Soak) -> None:
        why = (
            f"agents of {len(soak.died)} devices ended within {self._limits.soak_s:g} s after they "
            "were ready"
        )
        if not await self._write(name, replace(state, bad=spec.spec_hash, why=why)):
            return
        back = self._in_force_now[name]
        if back is spec:
            self._report(
                name,
                "rollout.halted",
                f"version {spec.version}: {why}; the template of the version before has changed, so "
                "there is no way back to it",
            )
        else:
            text = f"version {spec.version}: {why}; back to version {back.version}"
            self._report(name, "rollout.rolled_back", text)

    def _report(self, name: str, kind: str, text: str) -> None:
        log.warning(text, extra={"agent_class": name, "kind": kind})
        fleet = self._fleet
        fleet.events.note_fleet(kind, f"class {name}, {text}", {"class": name})

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
                        ready=fleet.agents.has_ready_agent(slug),
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

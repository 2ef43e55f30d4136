"""The soaks of versions that are rolled out without steps, and of first versions, of all classes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from nomad_watchdog.controllers.staged_rollout import runs
from nomad_watchdog.core.rollout_soak import Soak, SoakLimits
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import Slug
from nomad_watchdog.model import AgentSpec, Presence


class VersionSoaks:
    """By class: what is known about its new version (`core.rollout_soak`)."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._soaks: dict[str, Soak] = {}

    def of(self, name: str) -> Soak | None:
        """The soak of a class; None = its version is proven, or rolled out in steps."""
        return self._soaks.get(name)

    def keep(self, names: Collection[str]) -> None:
        """Forget those of all other classes."""
        self._soaks = {name: soak for name, soak in self._soaks.items() if name in names}

    def end(self, name: str) -> None:
        """Forget that of a class."""
        self._soaks.pop(name, None)

    def look(self, spec: AgentSpec, limits: SoakLimits) -> tuple[Soak, frozenset[Slug]]:
        """Observe the agents of a spec; its soak, and the devices that should have the spec."""
        fleet, name = self._fleet, spec.agent_class
        wanted = frozenset(self._wanted(name))
        soak = self._soaks.setdefault(name, Soak(limits))
        soak.look(runs(fleet, spec, wanted), wanted, fleet.clock.monotonic())
        return soak, wanted

    def lasted(self) -> dict[str, int]:
        """By class: number of devices with an agent that was ready for long enough."""
        return {name: len(soak.lasted) for name, soak in self._soaks.items()}

    def soaking(self, configured: Mapping[str, AgentSpec]) -> int:
        """Number of agents of new versions that are ready now and have not proved themselves yet. An agent that
        reports before the scheduler lists it counts, unless it is known to run an older version."""
        return sum(
            slug not in soak.lasted
            and self._fleet.agents.has_ready_agent(slug)
            and not self._is_old(slug, configured[name])
            for name, soak in self._soaks.items()
            for slug in self._wanted(name)
        )

    def _is_old(self, slug: Slug, spec: AgentSpec) -> bool:
        record = self._fleet.records[slug]
        return any(
            one.epoch == record.epoch and one.spec_hash != spec.spec_hash
            for one in self._fleet.placements.get(slug, ())
        )

    def _wanted(self, name: str) -> Iterator[Slug]:
        for slug, record in self._fleet.records.items():
            if record.presence is Presence.PRESENT and record.device.agent_class == name:
                yield slug

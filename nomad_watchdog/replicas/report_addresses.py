"""The addresses at which agents reach the running replicas."""

from __future__ import annotations

from nomad_watchdog.core import report_addresses
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.schedulers.agent_document import addressed


class ReportAddresses:
    """Adds the addresses to the specs of agents."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._addressed: dict[str, tuple[AgentSpec, tuple[str, ...], AgentSpec]] = {}

    def addresses(self) -> tuple[str, ...]:
        """As last seen; empty where our own address is not known."""
        leases = self._leases
        if not leases.advertise:
            return ()
        return report_addresses.living(leases.advertise, (one.address for one in leases.replicas()))

    def complete(self) -> frozenset[str] | None:
        """All addresses that agents may use now; None while not all replicas are known."""
        return frozenset(self.addresses()) or None if self._leases.knows_all_replicas() else None

    def adapt(self, spec: AgentSpec) -> AgentSpec:
        """The spec with these addresses in its agents' configuration; its hash does not cover them."""
        addresses = self.addresses()
        last = self._addressed.get(spec.agent_class)
        # The same object for the same spec: this is called at each start.
        if last is None or last[0] is not spec or last[1] != addresses:
            last = spec, addresses, addressed(spec, addresses)
            self._addressed[spec.agent_class] = last
        return last[2]

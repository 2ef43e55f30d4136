"""What agents are told of the control plane: where the replicas are that are there now."""

from __future__ import annotations

from nomad_watchdog.core import report_addresses
from nomad_watchdog.model import AgentSpec
from nomad_watchdog.replicas.leases import Leases
from nomad_watchdog.schedulers.agent_document import addressed


class ReportAddresses:
    """The reader of `leases` for one fleet."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._told: dict[str, tuple[AgentSpec, tuple[str, ...], AgentSpec]] = {}

    def addresses(self) -> tuple[str, ...]:
        """As last seen; empty where it is not known which address is our own."""
        leases = self._leases
        if not leases.advertise:
            return ()
        return report_addresses.living(leases.advertise, (one.address for one in leases.replicas()))

    def vouched(self) -> frozenset[str] | None:
        """All addresses that agents may use now; None while we can't know of all replicas."""
        return frozenset(self.addresses()) or None if self._leases.vouches() else None

    def told(self, spec: AgentSpec) -> AgentSpec:
        """The spec with these addresses in its agents' configuration; its hash does not cover them."""
        addresses = self.addresses()
        last = self._told.get(spec.agent_class)
        # The same object for the same spec: it is asked for at each start.
        if last is None or last[0] is not spec or last[1] != addresses:
            last = spec, addresses, addressed(spec, addresses)
            self._told[spec.agent_class] = last
        return last[2]

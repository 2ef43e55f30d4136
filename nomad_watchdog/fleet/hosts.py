"""Hosts on which the scheduler places no new agents: their line in `status`, and events when that begins and ends."""

from __future__ import annotations

from collections.abc import Mapping

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.model import PlacementState
from nomad_watchdog.schedulers import ClosedHost

_BEGAN = {True: "node.draining", False: "node.ineligible"}


class HostWatcher:
    """What the last full snapshot shows of the hosts of one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._closed: Mapping[str, ClosedHost] = {}
        self._kinds: dict[str, str] | None = None
        """Closed host → the kind of its last event. None: nothing has been read since the start."""
        fleet.views.add_status(self.status)

    @property
    def closed(self) -> Mapping[str, ClosedHost]:
        """By name."""
        return self._closed

    def status(self) -> dict[str, object]:
        """For the status: each of these hosts, its state, and the number of agents there."""
        return {
            "closed_nodes": [
                {"node": name, "state": host.state, "agents": self._agents(name)}
                for name, host in sorted(self._closed.items())
            ]
        }

    def seen(self, closed: Mapping[str, ClosedHost]) -> None:
        """Take the closed hosts of a full snapshot."""
        if self._kinds is None:
            self._kinds = self._published()
        self._closed = self._fleet.hosts.closed = closed
        for name, host in closed.items():
            kind = _BEGAN[host.draining]
            if self._kinds.get(name) != kind:
                self._kinds[name] = kind
                agents = self._agents(name)
                what = f"{agents} {'agent is' if agents == 1 else 'agents are'} there"
                text = f"node {name} is {host.state}: no new agent is placed on it, {what}"
                self._note(kind, name, text)
        for name in self._kinds.keys() - closed.keys():
            del self._kinds[name]
            self._note("node.open", name, f"node {name} takes new agents again")

    def _published(self) -> dict[str, str]:
        """What the stored events of an earlier run say, so that a restart publishes nothing again."""
        found: dict[str, str] = {}
        for event in self._fleet.events.all.recent():
            if event.kind.startswith("node."):
                found[str(event.data.get("node"))] = event.kind
        return {name: kind for name, kind in found.items() if kind != "node.open"}

    def _agents(self, name: str) -> int:
        return sum(
            one.node == name and one.state is not PlacementState.DEAD
            for found in self._fleet.placements.values()
            for one in found
        )

    def _note(self, kind: str, name: str, text: str) -> None:
        self._fleet.events.note_fleet(kind, text, {"node": name})

"""Hosts on which the scheduler places no new agents: their line in `status`, and events when that begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.model import PlacementState
from nomad_watchdog.schedulers import ClosedHost

_BEGAN = {True: "node.draining", False: "node.ineligible"}
WAITS: Final = "node.drain_waits"
GOES_ON: Final = "node.drain_resumed"


class HostWatcher:
    """What the last full snapshot shows of the hosts of one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._closed: Mapping[str, ClosedHost] = {}
        self._kinds: dict[str, str] | None = None
        """Closed host → the kind of its last event. None: nothing has been read since the start."""
        self._waits: dict[str, str] = {}
        """Host that agents should leave and cannot → why."""
        fleet.views.add_status(self.status)

    @property
    def closed(self) -> Mapping[str, ClosedHost]:
        """By name."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Number of hosts that agents should leave and none can leave."""
        return len(self._waits)

    def status(self) -> dict[str, object]:
        """For the status: each of these hosts, its state, the number of agents there, and why they do not leave."""
        return {
            "closed_nodes": [
                {"node": name, "state": host.state, "agents": self._agents(name)}
                | ({"waits": self._waits[name]} if name in self._waits else {})
                for name, host in sorted(self.closed.items())
            ]
        }

    def seen(self, closed: Mapping[str, ClosedHost]) -> None:
        """Take the closed hosts of a full snapshot."""
        kinds = self._known_kinds()
        self._closed = self._fleet.hosts.closed = closed
        for name, host in closed.items():
            kind = _BEGAN[host.draining]
            if kinds.get(name) != kind:
                kinds[name] = kind
                text = f"node {name} is {host.state}: no new agent is placed on it, {self._there(name)}"
                self._note(kind, name, text)
        for name in kinds.keys() - closed.keys():
            del kinds[name]
            self._waits.pop(name, None)
            self._note("node.open", name, f"node {name} takes new agents again")

    def waits(self, found: Mapping[str, str]) -> None:
        """Take the hosts that agents should leave and cannot, and why. Publishes when that begins and ends."""
        self._known_kinds()
        before, self._waits = self._waits, dict(found)
        for name in found.keys() - before.keys():
            text = f"no agent leaves node {name}: {found[name]}; {self._there(name)}"
            self._note(WAITS, name, text)
        for name in before.keys() - found.keys():
            self._note(GOES_ON, name, f"agents can leave node {name} again; {self._there(name)}")

    def _known_kinds(self) -> dict[str, str]:
        """`_kinds`, and at the first call what the stored events of an earlier run say, so that a restart publishes
        nothing again."""
        if self._kinds is not None:
            return self._kinds
        self._kinds = kinds = {}
        for event in self._fleet.events.all.recent():
            name = str(event.data.get("node"))
            if event.kind == WAITS:
                self._waits[name] = ""
            elif event.kind == GOES_ON:
                self._waits.pop(name, None)
            elif event.kind.startswith("node."):
                kinds[name] = event.kind
        for name in [name for name, kind in kinds.items() if kind == "node.open"]:
            del kinds[name]
        self._waits = {name: why for name, why in self._waits.items() if name in kinds}
        return kinds

    def _there(self, name: str) -> str:
        agents = self._agents(name)
        return f"{agents} {'agent is' if agents == 1 else 'agents are'} there"

    def _agents(self, name: str) -> int:
        return sum(
            one.node == name and one.state is not PlacementState.DEAD
            for found in self._fleet.placements.values()
            for one in found
        )

    def _note(self, kind: str, name: str, text: str) -> None:
        self._fleet.events.note_fleet(kind, text, {"node": name})

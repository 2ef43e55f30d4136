"""The nodes of a Nomad cluster: drains, and several nodes with the same name.

`Nodes` is pure; `NodeList` reads it. Reading needs the right `node { policy = "read" }`. Without it nodes are
unknown, and nothing is reported about them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.clients.nomad_rows import Allocation, NodeRow, StreamEvent
from nomad_watchdog.errors import DeniedError, WatchdogError
from nomad_watchdog.model import PlacementState
from nomad_watchdog.schedulers import ClosedHost

log = logging.getLogger(__name__)

RIGHT: Final = "node:read"
_SHORT: Final = 8
"""Number of characters of an id in the output of Nomad's CLI."""
_NO_TIME: Final = "0001-"


@dataclass(frozen=True, slots=True)
class Node:
    """One node as Nomad lists it."""

    id: str
    name: str
    status: str
    """ready, down, disconnected or initializing."""
    draining: bool = False
    eligible: bool = True
    deadline: str = ""
    """When its drain ends, RFC 3339; "" = no deadline, or unknown."""

    @property
    def takes_agents(self) -> bool:
        """Whether Nomad places new allocations on it."""
        return self.status == "ready" and self.eligible and not self.draining

    @property
    def state(self) -> str:
        """Short text for people."""
        if self.status != "ready":
            return self.status
        if self.draining:
            return f"draining until {self.deadline}" if self.deadline else "draining"
        return "ready" if self.eligible else "ineligible"

    @property
    def schedulability(self) -> tuple[str, bool, bool]:
        """The fields that an operator or a lost connection changes, and a heartbeat does not."""
        return self.status, self.draining, self.eligible

    @property
    def short_id(self) -> str:
        return self.id[:_SHORT]


def node_of(row: NodeRow, deadline: str = "") -> Node:
    """From a row of /v1/nodes (`Drain`), or from the node of an event (`DrainStrategy`)."""
    return Node(
        id=row["ID"],
        name=row.get("Name", ""),
        status=row.get("Status", ""),
        draining=bool(row.get("Drain") or row.get("DrainStrategy")),
        eligible=row.get("SchedulingEligibility", "eligible") == "eligible",
        deadline=deadline,
    )


def deadline_of(detail: Mapping[str, object]) -> str:
    """When the drain of a node ends (/v1/node/ID), RFC 3339 in whole seconds; "" = without a deadline."""
    drain = detail.get("DrainStrategy")
    until = str(drain.get("ForceDeadline") or "") if isinstance(drain, Mapping) else ""
    if not until or until.startswith(_NO_TIME):
        return ""
    return f"{until[:19]}Z" if until.endswith("Z") else until


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of a cluster, by id."""

    by_id: Mapping[str, Node] = field(default_factory=dict)
    by_name: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, nodes: Iterable[Node]) -> Nodes:
        """From the nodes in any order."""
        by_id = {one.id: one for one in nodes}
        names: dict[str, list[Node]] = defaultdict(list)
        for one in sorted(by_id.values(), key=lambda node: node.id):
            names[one.name].append(one)
        return cls(by_id, {name: tuple(some) for name, some in names.items()})

    def twins(self) -> list[str]:
        """A sentence for each name that several nodes have."""
        return [
            f"{len(some)} nodes are named {name}: "
            + ", ".join(f"{one.short_id} ({one.state})" for one in some)
            for name, some in sorted(self.by_name.items())
            if len(some) > 1
        ]

    def closed(self) -> dict[str, ClosedHost]:
        """The nodes that are draining or ineligible, by name; of several with one name, one of them."""
        found = {}
        is_last = not any(one.takes_agents for one in self.by_id.values())
        for name, some in self.by_name.items():
            shut = [one for one in some if one.draining or not one.eligible]
            if not shut:
                continue
            one = max(shut, key=lambda node: node.draining)
            state = one.state if one.status == "ready" else f"ineligible and {one.status}"
            among = f" (id {one.short_id}, one of {len(some)} nodes of this name)"
            found[name] = ClosedHost(
                one.draining,
                state + (among if len(some) > 1 else ""),
                {node.id: node.draining for node in shut},
                is_last,
            )
        return found

    def reason(self, alloc: Allocation | None, state: PlacementState, reason: str) -> str:
        """The reason of a placement, completed with what is known of the node of its newest allocation."""
        node = self.by_id.get(alloc.get("NodeID", "")) if alloc is not None else None
        if node is None:
            return reason
        if state is PlacementState.RUNNING and node.draining:
            return _drained(node)
        if state is not PlacementState.LOST:
            return reason
        others = [one for one in self.by_name[node.name] if one.id != node.id]
        if not others:
            return reason
        new = next((one for one in others if one.status == "ready"), others[0])
        return (
            f"{reason}; it is the node with id {node.short_id}. Another node of the same name "
            f"({new.short_id}, {new.state}) has registered: a Nomad client that has lost its data directory "
            "gets a new id"
        )


def _drained(node: Node) -> str:
    if node.deadline:
        return (
            f"node {node.name} is being drained: at {node.deadline} at the latest Nomad stops the agent, "
            "and it is started again on another node with room"
        )
    return (
        f"node {node.name} is being drained without a deadline: Nomad leaves the agent there; "
        "a deadline (`nomad node drain -enable -deadline 5m`) moves it to another node"
    )


class NodeList:
    """The nodes as they were read last. They are read again when the index of Nomad's table of nodes has changed;
    heartbeats of nodes do not change it."""

    def __init__(self, client: NomadClient) -> None:
        self._client = client
        self._index = 0
        self._denied = False
        self.now = Nodes()

    def retry_denied(self) -> None:
        """Read the nodes again although that was denied: the token may have the right now."""
        self._denied = False

    async def visible(self) -> bool:
        """Whether the token may read nodes. True when in doubt."""
        await self.changed()
        return not self._denied

    def is_news(self, event: StreamEvent) -> bool:
        """Whether an event of the topic Node changes a node since it was read last."""
        found = (event.get("Payload") or {}).get("Node")
        if event.get("Topic") != "Node" or not found:
            return False
        known = self.now.by_id.get(found["ID"])
        if event.get("Type") == "NodeDeregistration":
            return known is not None
        return known is None or known.schedulability != node_of(found).schedulability

    async def changed(self) -> bool:
        """Whether the nodes have changed since they were read; False while they cannot be read."""
        if self._denied:
            return False
        try:
            return (
                await self._client.get("/v1/nodes", RIGHT, {"per_page": "1"})
            ).index != self._index
        except DeniedError:
            self._denied = True
        except WatchdogError as error:
            log.debug("nodes not read", extra={"reason": str(error)})
        return False

    async def refresh(self) -> None:
        """Read the nodes if they have changed. If Nomad does not answer, the last view stays; never raises."""
        if not await self.changed():
            return
        try:
            found = await self._client.pages("/v1/nodes", RIGHT, {})
            self.now = Nodes.of(await self._with_deadlines(found.body))
            self._index = found.index
        except WatchdogError as error:
            log.debug("nodes not read", extra={"reason": str(error)})

    async def _with_deadlines(self, rows: Iterable[NodeRow]) -> list[Node]:
        rows = list(rows)
        drained = [row["ID"] for row in rows if row.get("Drain")]
        details = await asyncio.gather(
            *(self._client.get(f"/v1/node/{one}", RIGHT) for one in drained)
        )
        until = {
            one: deadline_of(detail.body) for one, detail in zip(drained, details, strict=True)
        }
        return [node_of(row, until.get(row["ID"], "")) for row in rows]

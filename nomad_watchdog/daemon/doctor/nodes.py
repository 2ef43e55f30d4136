"""Checks of Nomad's nodes: how many accept agents, why the others do not, duplicate names, and drivers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, cast

from nomad_watchdog.clients.nomad_rows import NodeRow
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus, mapping, objects
from nomad_watchdog.schedulers.nomad.nodes import Node, Nodes, deadline_of, node_of

Call = Callable[[str, str], Awaitable[tuple[int, object]]]
"""(method, path) → HTTP status and the parsed body."""

_DRIVERS: Final = ("raw_exec", "exec", "docker")
_MAX_NAMED: Final = 10
"""Nodes that one check names."""
_TWINS: Final = (
    "give each host its own `name` in the configuration of its Nomad agent; if a client has lost its data "
    "directory, end the processes that are left of the old node, then purge that node: "
    "`nomad operator api -X POST /v1/node/ID/purge`"
)


async def checks(call: Call) -> list[Check]:
    """The checks of the nodes. Raises what `call` raises."""
    status, answer = await call("GET", "/v1/nodes")
    if status != 200 or not isinstance(answer, list):
        fix = 'grant  node { policy = "read" }  to the token; without it no agent leaves a draining node'
        return [Check("nomad nodes", CheckStatus.WARN, f"HTTP {status}", fix)]
    rows, nodes = cast("list[NodeRow]", objects(answer)), []
    for row in rows:
        detail: object = None
        if row.get("Drain"):
            _, detail = await call("GET", f"/v1/node/{row['ID']}")
        nodes.append(node_of(row, deadline_of(mapping(detail))))
    found = [_states(nodes)]
    found += [
        Check("nomad node names", CheckStatus.WARN, text, _TWINS)
        for text in Nodes.of(nodes).twins()
    ]
    return [
        *found,
        _drivers([row for row, node in zip(rows, nodes, strict=True) if node.takes_agents]),
    ]


def _states(nodes: Sequence[Node]) -> Check:
    count = sum(one.takes_agents for one in nodes)
    others = sorted(f"{one.name} ({one.state})" for one in nodes if not one.takes_agents)
    text = f"{count} of {len(nodes)} take agents"
    if others:
        more = len(others) - _MAX_NAMED
        named = ", ".join(others[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        text += f"; the others: {named}"
    if count:
        return Check("nomad nodes", CheckStatus.OK, text, "")
    fix = "start a Nomad client, or end a drain: `nomad node drain -disable NODE`"
    return Check("nomad nodes", CheckStatus.FAIL, text, fix)


def _drivers(open_nodes: Sequence[Mapping[str, object]]) -> Check:
    counts = {
        name: sum(
            bool(mapping(mapping(row.get("Drivers")).get(name)).get("Healthy"))
            for row in open_nodes
        )
        for name in _DRIVERS
    }
    text = ", ".join(f"{name} on {count}" for name, count in counts.items() if count)
    if text:
        return Check("nomad drivers", CheckStatus.OK, text, "")
    fix = "start a client with one of these drivers enabled and healthy"
    return Check(
        "nomad drivers",
        CheckStatus.FAIL,
        f"no node that takes agents has {', '.join(_DRIVERS)}",
        fix,
    )

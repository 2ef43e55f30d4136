"""What `doctor` says about Nomad's nodes: how many take agents, why the others do not, names that several
nodes have, and drivers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from nomad_watchdog.schedulers.nomad.nodes import Node, Nodes, deadline_of, node_of

Found = tuple[str, str, str, str]
"""Name, status (ok, warn, fail), what was found, and how to fix it."""
Ask = Callable[[str, str], Awaitable[tuple[int, Any]]]
"""(method, path) → HTTP status and the parsed body."""

_DRIVERS: Final = ("raw_exec", "exec", "docker")
_MAX_NAMED: Final = 10
"""Nodes that one check names."""
_TWINS: Final = (
    "give each host its own `name` in the configuration of its Nomad agent; if a client has lost its data "
    "directory, end the processes that are left of the old node, then purge that node: "
    "`nomad operator api -X POST /v1/node/ID/purge`"
)


async def checks(ask: Ask) -> list[Found]:
    """The checks of the nodes. Raises what `ask` raises."""
    status, rows = await ask("GET", "/v1/nodes")
    if status != 200 or not isinstance(rows, list):
        mend = 'grant  node { policy = "read" }  to the token'
        return [("nomad nodes", "warn", f"HTTP {status}", mend)]
    nodes = []
    for row in rows:
        detail: Any = None
        if row.get("Drain"):
            _, detail = await ask("GET", f"/v1/node/{row['ID']}")
        nodes.append(node_of(row, deadline_of(detail if isinstance(detail, dict) else {})))
    found = [_states(nodes)]
    found += [("nomad node names", "warn", text, _TWINS) for text in Nodes.of(nodes).twins()]
    return [
        *found,
        _drivers([row for row, node in zip(rows, nodes, strict=True) if node.takes_agents]),
    ]


def _states(nodes: Sequence[Node]) -> Found:
    takers = sum(one.takes_agents for one in nodes)
    others = sorted(f"{one.name} ({one.state})" for one in nodes if not one.takes_agents)
    text = f"{takers} of {len(nodes)} take agents"
    if others:
        more = len(others) - _MAX_NAMED
        named = ", ".join(others[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        text += f"; the others: {named}"
    if takers:
        return "nomad nodes", "ok", text, ""
    mend = "start a Nomad client, or end a drain: `nomad node drain -disable NODE`"
    return "nomad nodes", "fail", text, mend


def _drivers(takers: Sequence[dict[str, Any]]) -> Found:
    counts = {
        name: sum(bool((row.get("Drivers") or {}).get(name, {}).get("Healthy")) for row in takers)
        for name in _DRIVERS
    }
    text = ", ".join(f"{name} on {count}" for name, count in counts.items() if count)
    if text:
        return "nomad drivers", "ok", text, ""
    mend = "start a client with one of these drivers enabled and healthy"
    return "nomad drivers", "fail", f"no node that takes agents has {', '.join(_DRIVERS)}", mend

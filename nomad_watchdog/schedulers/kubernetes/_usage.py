"""The use of nodes by the metrics API (metrics.k8s.io), which a metrics server provides. Reading it needs the right `list`
on `nodes`, and on `nodes` of that API."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from typing import Final

from nomad_watchdog.clients.kubernetes import KubernetesClient
from nomad_watchdog.clients.kubernetes_objects import NodeMetrics
from nomad_watchdog.clients.kubernetes_quantities import number
from nomad_watchdog.errors import WatchdogError
from nomad_watchdog.host_pressure import HostUsage, percent

log = logging.getLogger(__name__)

_PATH: Final = "/apis/metrics.k8s.io/v1beta1/nodes"
_TIMEOUT_S: Final = 10.0


async def read_usage(client: KubernetesClient, hosts: Collection[str]) -> Mapping[str, HostUsage]:
    """The use of these nodes; none without a metrics server or the rights."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            metrics = await client.call("GET", _PATH)
            nodes = await client.list("/api/v1/nodes")
    except (WatchdogError, TimeoutError) as error:
        log.debug("host statistics not read", extra={"reason": str(error)})
        return {}
    try:
        used: dict[str, NodeMetrics] = {
            one["metadata"]["name"]: one for one in metrics.get("items") or ()
        }
        return {
            name: usage_of(used[name], (node.get("status") or {}).get("capacity") or {})
            for node in nodes.items
            if (name := node["metadata"]["name"]) in used and name in hosts
        }
    except (AttributeError, KeyError, TypeError) as error:
        log.debug("host statistics of another form", extra={"reason": repr(error)})
        return {}


def usage_of(used: NodeMetrics, capacity: Mapping[str, str]) -> HostUsage:
    """From the metrics of a node and its capacity."""
    shares = []
    for name in ("cpu", "memory"):
        try:
            shares.append(percent(number(used["usage"][name]), number(capacity[name])))
        except (AttributeError, KeyError, TypeError, ValueError):
            shares.append(None)
    return HostUsage(*shares)

"""The configuration file of the demo."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CONFIG: Final = """\
backend  = "{backend}"
data_dir = "{root}/data"
resync   = "{pace.resync}"

api {{
  listen = "127.0.0.1:{api_port}"
}}

{backend_blocks}
agent_class "default" {{
  version      = "0.1.0"
  kill_timeout = "5s"
  beat         = "{pace.beat}"
{class_extra}
  probe "http" {{
    port     = {device_port}
    interval = "{pace.interval}"
    timeout  = "{pace.timeout}"
    misses   = 2
  }}
  # Loopback addresses always answer ICMP, so only TCP can confirm that a device is offline.
  confirm "tcp" {{
    port    = {device_port}
    timeout = "{pace.timeout}"
  }}
}}

agents {{
  startup_grace = "60s"
  report_stale  = "10s"
}}

log {{
  level  = "info"
  format = "json"
}}
"""
RAW_EXEC: Final = """\
  variables = {{
    python      = "{python}"
    consul_addr = "$${{meta.consul_http_addr}}"
  }}
"""
LOCAL_BLOCKS: Final = """\
registry {{
  kind = "sqlite"
  path = "{root}/registry.db"
}}

local {{
  directory = "{root}/agents"
}}
"""
NOMAD_BLOCKS: Final = """\
nomad {{
  address  = "{nomad}"
  strategy = "{strategy}"
}}

consul {{
  address = "{consul}"
}}

registry {{
  kind = "consul"
}}
"""
KUBERNETES_BLOCK: Final = """\
kubernetes {{
  kubeconfig = "{kubeconfig}"
}}

"""
ON_OTHERS: Final = """\
  on "kubernetes" {
  }
  on "local" {
  }
"""
KUBERNETES_BLOCKS: Final = (
    KUBERNETES_BLOCK
    + """\
consul {{
  address = "{consul}"
}}

registry {{
  kind = "consul"
}}
"""
)


@dataclass(frozen=True, slots=True)
class StagePace:
    """Probe interval and timeout, report interval, and full comparison interval, as in the configuration."""

    interval: str
    timeout: str
    beat: str
    resync: str


CALM: Final = StagePace(interval="1s", timeout="500ms", beat="2s", resync="5s")
BRISK: Final = StagePace(interval="500ms", timeout="400ms", beat="1s", resync="1s")
"""For few agents: steps converge sooner, nothing else differs."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Addresses of the servers of a stage; empty = it has none."""

    consul: str = ""
    nomad: str = ""
    kubeconfig: str = ""


def configuration(
    backend: str,
    root: Path,
    servers: Servers,
    *,
    api_port: int,
    device_port: int,
    strategy: str,
    pace: StagePace,
) -> str:
    """The configuration of a stage. A backend `nomad` with a kubeconfig can be migrated to Kubernetes."""
    blocks, extra = LOCAL_BLOCKS, ""
    if backend == "nomad":
        blocks, extra = NOMAD_BLOCKS, RAW_EXEC.format(python=sys.executable)
        if servers.kubeconfig:
            blocks, extra = NOMAD_BLOCKS + KUBERNETES_BLOCK, extra + ON_OTHERS
    elif backend == "kubernetes":
        blocks = KUBERNETES_BLOCKS
        if strategy != "dispatch":
            extra = f'  workload = "{strategy}"\n'
    filled = blocks.format(
        root=root,
        nomad=servers.nomad,
        consul=servers.consul,
        strategy=strategy,
        kubeconfig=servers.kubeconfig,
    )
    return CONFIG.format(
        backend=backend,
        root=root,
        api_port=api_port,
        device_port=device_port,
        backend_blocks=filled,
        class_extra=extra,
        pace=pace,
    )

"""Checks of this machine."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus

WANTED_FILES: Final = 1024


def check_machine(settings: Settings) -> list[Check]:
    checks = []
    folders = {"state directory": settings.registry_path.parent}
    if settings.backend == "local":
        folders["agents directory"] = settings.local_directory
    for name, folder in folders.items():
        there = next(place for place in (folder, *folder.parents) if place.exists())
        good = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        fix = "" if good else f"make {there} a directory that UID {os.getuid()} can write to"
        checks.append(Check(name, CheckStatus.OK if good else CheckStatus.FAIL, str(folder), fix))
    # The service raises its soft limit up to the hard limit.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(WANTED_FILES, 2 * settings.api.max_connections)
    enough = most == resource.RLIM_INFINITY or most >= wanted
    found = "unlimited" if most == resource.RLIM_INFINITY else str(most)
    fix = (
        "" if enough else f"ulimit -Hn {wanted} (systemd: LimitNOFILE=), twice api.max_connections"
    )
    checks.append(Check("open files", CheckStatus.OK if enough else CheckStatus.WARN, found, fix))
    if any(p.kind == "icmp" for c in settings.agent_class.values() for p in (*c.probe, *c.confirm)):
        checks.append(_ping())
    return checks


def _ping() -> Check:
    try:
        text = Path("/proc/sys/net/ipv4/ping_group_range").read_text(encoding="ascii")
        low, high = (int(part) for part in text.split())
    except (OSError, ValueError):
        return Check("icmp", CheckStatus.WARN, "net.ipv4.ping_group_range can't be read")
    groups = {os.getegid(), *os.getgroups()}
    if os.geteuid() == 0:
        return Check("icmp", CheckStatus.OK, "agents can ping: they run as root")
    if any(low <= group <= high for group in groups):
        return Check("icmp", CheckStatus.OK, f"agents can ping: ping_group_range {low} {high}")
    fix = 'sysctl -w net.ipv4.ping_group_range="0 2147483647", or give CAP_NET_RAW'
    return Check(
        "icmp",
        CheckStatus.WARN,
        f"agents can't ping: ping_group_range {low} {high} does not include their group",
        fix,
    )

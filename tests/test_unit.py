"""The systemd unit of the control plane: jobs/systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

WANTED = {
    "NoNewPrivileges": "true", "CapabilityBoundingSet": "", "UMask": "0077", "ProtectSystem": "strict",
    "ProtectHome": "true", "PrivateTmp": "true", "PrivateDevices": "true", "PrivateMounts": "true",
    "ProtectProc": "invisible", "ProtectClock": "true", "ProtectControlGroups": "true",
    "ProtectHostname": "true", "ProtectKernelLogs": "true", "ProtectKernelModules": "true",
    "ProtectKernelTunables": "true", "LockPersonality": "true", "MemoryDenyWriteExecute": "true",
    "RemoveIPC": "true", "RestrictNamespaces": "true", "RestrictRealtime": "true",
    "RestrictSUIDSGID": "true", "SystemCallArchitectures": "native",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX", "User": "nomad-watchdog",
}  # fmt: skip


@pytest.fixture
def unit(repository: Path) -> Path:
    return repository / "jobs" / "systemd" / "nomad-watchdog.service"


def test_the_unit_is_confined(unit: Path) -> None:
    """Each directive that confines it stands in the unit, and system calls are a list of those allowed."""
    pairs = re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)

    assert dict(pairs).items() >= WANTED.items()
    calls = [value for key, value in pairs if key == "SystemCallFilter"]
    assert calls == ["@system-service", "~@privileged @resources"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_rates_the_unit_at_most_2_5(unit: Path) -> None:
    """`systemd-analyze security` gives it at most 2.5 of 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for nomad-watchdog\.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr

    assert float(found[1]) <= 2.5

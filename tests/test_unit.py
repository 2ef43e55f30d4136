"""The systemd unit of the control plane: jobs/systemd."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nomad_watchdog.demo.process import Process
from servers.replica import ControlPlane

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
    """Each directive that confines it is in the unit, and system calls are an allowlist."""
    pairs = re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.MULTILINE)

    assert dict(pairs).items() >= WANTED.items()
    calls = [value for key, value in pairs if key == "SystemCallFilter"]
    assert calls == ["@system-service", "~@privileged @resources"]


@pytest.mark.systemd
def test_systemd_rates_the_unit_at_most_2_5(unit: Path) -> None:
    """`systemd-analyze security` rates it at most 2.5 of 10."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", unit],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    found = re.search(r"Overall exposure level for nomad-watchdog\.service: ([\d.]+)", done.stdout)
    assert found, done.stdout + done.stderr

    assert float(found[1]) <= 2.5


CONFIG = """\
backend  = "local"
data_dir = "{root}/data"
api {
  listen = "127.0.0.1:{port}"
}
consul {
  agent_address = ""
}
presence {
  grace = "0s"
}
agent_class "default" {
  beat = "1s"
  probe "tcp" {
    port     = DEVICE
    interval = "1s"
    timeout  = "500ms"
  }
  probe "command" {
    command  = ["/bin/sh", "-c", "exit 0"]
    interval = "1s"
    timeout  = "500ms"
  }
}
"""


class Confined(ControlPlane):
    """Runs under the unit's restrictions."""

    unit: Path

    async def start(self) -> None:
        run = [sys.executable, "-m", "nomad_watchdog", "--config", str(self.file), "run"]
        confined = Path(__file__).with_name("confined.py")
        argv = [sys.executable, "-P", str(confined), str(self.unit), *run]
        self._process = Process.start(argv, log=self.log, env=self._env)


@pytest.mark.systemd
@pytest.mark.slow_because("starts a control plane, then an agent, and waits until it is gone again")
async def test_local_agents_run_under_it(unit: Path, tmp_path: Path) -> None:
    """With the unit's capabilities, system calls, address families and memory rules, a control plane starts an agent as
    its child, whose TCP and command probes answer, and stops it; both are confined."""

    def facts(pid: int) -> dict[str, str]:
        return dict(
            re.findall(r"^(\w+):\s*(\S+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        )

    device = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    plane = Confined(
        tmp_path, "plane", CONFIG.replace("DEVICE", str(device.sockets[0].getsockname()[1]))
    )
    plane.unit = unit
    async with device, plane:
        await plane.register("pump-1")
        await plane.until("/v1/devices/pump-1", lambda one: one["verdict"] == "watched", 60.0)
        (kept,) = (plane.root / "data").glob("**/placement.json")
        agent = int(json.loads(kept.read_text())["pid"])
        for pid in (plane.process.pid, agent):
            found = facts(pid)
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
            assert int(found["CapEff"], 16) == 0
            assert int(found["CapBnd"], 16) == 0 or os.geteuid() != 0  # only root can drop it
        await plane.call("DELETE", "/v1/devices/pump-1")
        async with asyncio.timeout(60.0):
            while Path(f"/proc/{agent}").exists():
                await asyncio.sleep(0.05)

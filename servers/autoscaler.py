"""A real Nomad Autoscaler on this machine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from nomad_watchdog.demo.process import ServerProcess, free_port
from servers.binaries import find
from servers.ready import until_ok

_CONFIG: Final = """\
log_level = "DEBUG"
plugin_dir = "%(folder)s"

http {
  bind_address = "127.0.0.1"
  bind_port    = %(port)d
}

nomad {
  address = "%(nomad)s"
}

apm "prometheus" {
  driver = "prometheus"
  config = {
    address = "%(prometheus)s"
  }
}
"""


class NomadAutoscaler(ServerProcess):
    """``async with NomadAutoscaler(folder, nomad.http_addr, prometheus.url): …``.

    It scales each job in that Nomad whose `scaling` block has an enabled policy."""

    def __init__(self, data_dir: Path, nomad: str, prometheus: str) -> None:
        super().__init__(data_dir)
        self._port = free_port()
        self._settings = {"nomad": nomad, "prometheus": prometheus, "port": self._port}

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it, and wait until it responds. Raises TerminalError with the end of its log."""
        program = await asyncio.to_thread(find, "nomad-autoscaler")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        file = self.data_dir / "autoscaler.hcl"
        file.write_text(_CONFIG % {**self._settings, "folder": str(self.data_dir)})
        argv = [str(program), "agent", "-config", str(file)]
        process = self._launch(argv, "autoscaler.log")
        await until_ok(process, f"http://127.0.0.1:{self._port}/v1/health", timeout_s)

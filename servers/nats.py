"""A real queue on this machine: a NATS server with JetStream and its monitoring endpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nomad_watchdog.demo.process import ServerProcess, free_port
from servers.binaries import find
from servers.ready import until_ok


class NatsServer(ServerProcess):
    """``async with NatsServer(folder) as nats: … nats.url``."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._port, self._page = free_port(), free_port()
        self.url = f"nats://127.0.0.1:{self._port}"
        self.monitor = f"http://127.0.0.1:{self._page}"
        """URL whose `/jsz` reports the depth of the streams."""

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it, and wait until it responds. Raises TerminalError with the end of its log."""
        program = await asyncio.to_thread(find, "nats-server")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        argv = [str(program), "-a", "127.0.0.1", "-p", str(self._port), "-m", str(self._page)]
        argv += ["-js", "-sd", str(self.data_dir / "store")]
        process = self._launch(argv, "nats.log")
        await until_ok(process, f"{self.monitor}/healthz", timeout_s)

"""A real queue on this machine: a NATS server with JetStream and its monitoring page."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nomad_watchdog.dev.binaries import find
from nomad_watchdog.dev.process import Process, Running, clean_environment, free_port
from nomad_watchdog.dev.ready import until_ok


class NatsServer(Running):
    """``async with NatsServer(folder) as nats: … nats.url``."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._port, self._page = free_port(), free_port()
        self.url = f"nats://127.0.0.1:{self._port}"
        self.monitor = f"http://127.0.0.1:{self._page}"
        """Where `/jsz` tells how deep the streams are."""
        self._process: Process | None = None

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it, and wait until it answers. Raises TerminalError with the end of its log."""
        program = await asyncio.to_thread(find, "nats-server")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        argv = [str(program), "-a", "127.0.0.1", "-p", str(self._port), "-m", str(self._page)]
        argv += ["-js", "-sd", str(self.data_dir / "store")]
        self._process = Process.start(argv, log=self.data_dir / "nats.log", env=clean_environment())
        await until_ok(self._process, f"{self.monitor}/healthz", timeout_s)

    async def stop(self) -> None:
        """Graceful, idempotent."""
        if self._process is not None:
            await self._process.terminate()
            self._process = None

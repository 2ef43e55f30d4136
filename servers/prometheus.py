"""A real Prometheus on this machine, which scrapes the targets of a test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from nomad_watchdog.demo.process import ServerProcess, free_port
from servers.binaries import find
from servers.ready import until_ok


class PrometheusServer(ServerProcess):
    """``async with PrometheusServer(folder, ["127.0.0.1:9000"]) as prometheus: … prometheus.url``.

    It scrapes `/metrics` of each of `targets` (host:port) every second, or as `config` says: the content of a
    configuration file."""

    def __init__(
        self,
        data_dir: Path,
        targets: Sequence[str] = (),
        config: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(data_dir)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._listen = f"127.0.0.1:{port}"
        job = {"job_name": "test", "static_configs": [{"targets": list(targets)}]}
        every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        self._config = config or {"global": every, "scrape_configs": [job]}

    async def start(self, timeout_s: float = 30.0) -> None:
        """Start it, and wait until it responds. Raises TerminalError with the end of its log."""
        program = await asyncio.to_thread(find, "prometheus")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        file = self.data_dir / "prometheus.yml"
        file.write_text(json.dumps(self._config))  # JSON is YAML
        argv = [str(program), f"--config.file={file}", f"--web.listen-address={self._listen}"]
        argv += [f"--storage.tsdb.path={self.data_dir / 'tsdb'}", "--log.level=warn"]
        process = self._launch(argv, "prometheus.log")
        await until_ok(process, f"{self.url}/-/ready", timeout_s)

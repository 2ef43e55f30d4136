"""The metrics API (metrics.k8s.io) of a cluster on this machine, by a real metrics-server."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from nomad_watchdog.demo.process import ServerProcess, free_port
from nomad_watchdog.errors import WatchdogError
from servers.binaries import find
from servers.kubernetes import KubernetesCluster

_GROUP: Final = ("metrics.k8s.io", "v1beta1")


class MetricsServer(ServerProcess):
    """``async with MetricsServer(cluster, folder): …``. It polls the kubelets every 10 s, its minimum interval."""

    def __init__(self, cluster: KubernetesCluster, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._cluster = cluster

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start it, and wait until the API server reaches it. Raises TerminalError with the reason."""
        program = await asyncio.to_thread(find, "metrics-server")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        port = free_port()
        cert, key = await self._cluster.add_api(*_GROUP, port)
        who = str(self._cluster.kubeconfig)
        argv = [
            str(program), f"--kubeconfig={who}", f"--authentication-kubeconfig={who}",
            f"--authorization-kubeconfig={who}", "--bind-address=127.0.0.1",
            f"--secure-port={port}", f"--tls-cert-file={cert}", f"--tls-private-key-file={key}",
            "--metric-resolution=10s", "--kubelet-request-timeout=5s", "--kubelet-insecure-tls",
            "--kubelet-use-node-status-port", "--kubelet-preferred-address-types=InternalIP",
        ]  # fmt: skip
        process = self._launch(argv, "metrics-server.log")
        await self._cluster.until_served(*_GROUP, timeout_s, process)

    async def stop(self) -> None:
        """Stop it gracefully and remove the API. Idempotent."""
        await super().stop()
        with contextlib.suppress(WatchdogError):  # the API server may have ended first
            await self._cluster.remove_api(*_GROUP)

"""The cluster of jobs/cluster/ with the control plane on it, as a virtual machine's provisioning leaves it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from servers.cluster import Cluster

JOBS: Final = Path(__file__).resolve().parents[2] / "jobs"


class ScriptedCluster(Cluster):
    """``async with ScriptedCluster(folder) as cluster: …``: up, bootstrapped, the control plane submitted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, JOBS, clients=2)

    def environment(self) -> dict[str, str]:
        """How a caller on the host `ops` reaches the cluster (`make cluster-test` takes the same)."""
        return {
            "NOMAD_ADDR": self.nomad["s1"].http_addr,
            "NOMAD_CACERT": str(self.secrets / "ca.pem"),
            "NOMAD_TOKEN": self.secret("nomad-management"),
            "NOMAD_WATCHDOG_TOKEN_FILE": str(self.secrets / "api.token"),
        }

    async def start(self, timeout_s: float = 120.0) -> None:
        """By the scripts alone. Raises TerminalError with what a script said."""
        await super().start(timeout_s)
        async with self.telling():
            await self.script("s1", "submit.sh", str(self.jobs))

    async def provision_again(self) -> None:
        """Does no harm. Raises TerminalError with what a script said."""
        async with self.telling():
            await self.script("s1", "bootstrap.sh", str(self.jobs))
            await self.script("s1", "submit.sh", str(self.jobs))

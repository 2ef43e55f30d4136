"""The cluster of jobs/cluster/ with the control plane on it, as the provisioning of the virtual machines sets it up."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from servers.cluster import Cluster

JOBS: Final = Path(__file__).resolve().parents[2] / "jobs"


class ScriptedCluster(Cluster):
    """``async with ScriptedCluster(folder) as cluster: …``: running, bootstrapped, the control plane submitted."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, JOBS, clients=2)

    def environment(self) -> dict[str, str]:
        """Environment of a caller on the host `ops` (also used by `make cluster-test`)."""
        return {
            "NOMAD_ADDR": self.nomad["s1"].http_addr,
            "NOMAD_CACERT": str(self.secrets / "ca.pem"),
            "NOMAD_TOKEN": self.secret("nomad-management"),
            "NOMAD_WATCHDOG_TOKEN_FILE": str(self.secrets / "api.token"),
        }

    async def start(self, timeout_s: float = 120.0) -> None:
        """Start with the scripts only. Raises TerminalError with a script's output."""
        await super().start(timeout_s)
        async with self.telling():
            await self.script("s1", "submit.sh", str(self.jobs))

    async def provision_again(self) -> None:
        """Run the scripts again, which is harmless. Raises TerminalError with a script's output."""
        async with self.telling():
            await self.script("s1", "bootstrap.sh", str(self.jobs))
            await self.script("s1", "submit.sh", str(self.jobs))

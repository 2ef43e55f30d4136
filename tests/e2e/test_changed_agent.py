"""An agent file that was changed on its way to a Nomad client (H15)."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.schedulers import agent_zipapp
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.attacks.table import Attack
from tests.e2e.test_replicas import cli
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="session")]

CONFIG = """\
backend = "nomad"
data_dir = "{root}"
registry {
  kind = "sqlite"
}
resync = "2s"
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address    = "NOMAD"
  job_prefix = "changed"
}
agent_class "default" {
  beat      = "1s"
  variables = { python = "PYTHON" }
  probe "tcp" {
    port     = 9
    interval = "1s"
    timeout  = "500ms"
  }
}
"""


@pytest.mark.attack("H15", "a changed file at the address that Nomad clients fetch the agent from")
@pytest.mark.slow_because("Nomad tries to fetch the file several times before it gives up")
async def test_h15_a_changed_agent_file_is_not_run_on_nomad(
    nomad: NomadServer, tmp_path: Path, attack: Attack
) -> None:
    """If the file that Nomad fetches does not match the SHA-256 in the job, none of it is run, and
    `explain` gives the reason; once the right file is back, the agent starts."""
    ran = tmp_path / "ran"
    config = CONFIG.replace("NOMAD", nomad.http_addr).replace("PYTHON", sys.executable)
    async with ControlPlane(tmp_path, "plane", config) as plane:
        file = agent_zipapp.published(plane.root, agent_zipapp.checksum())
        original = file.read_bytes()
        with zipfile.ZipFile(file, "w") as hostile:
            hostile.writestr("__main__.py", f"open({str(ran)!r}, 'w').close()\n")
        await plane.call("PUT", "/v1/devices/pump-7", {"address": "127.0.0.1"})

        async def has_reason() -> bool:
            return "checksum" in (await cli(plane, "explain", "pump-7"))[1].lower()

        try:
            await eventually(has_reason, 120.0)
            jobs: Any = await nomad.request("GET", "/v1/jobs?prefix=changed/")
            assert jobs, "no child was dispatched"
            assert not ran.exists()
            file.write_bytes(original)
            started = lambda it: it["verdict"] not in ("unwatched", "failing")  # noqa: E731  # short
            await plane.until("/v1/devices/pump-7", started, 180.0)
            assert not ran.exists()
            parent: Any = await nomad.request("GET", "/v1/job/changed")
            (fetched,) = parent["TaskGroups"][0]["Tasks"][0]["Artifacts"]
            assert fetched["GetterOptions"] == {"checksum": f"sha256:{agent_zipapp.checksum()}"}
        finally:
            await plane.call("DELETE", "/v1/devices/pump-7")
    attack.tried = 1
    attack.result = (
        "0 lines of it run; `explain` names the checksum; the right file back, the agent starts"
    )

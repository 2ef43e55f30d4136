"""The provisioning scripts of the Vagrant cluster create a cluster that passes the smoke test."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster import smoke
from tests.cluster.namespaces import ScriptedCluster

pytestmark = [pytest.mark.servers, pytest.mark.long, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


async def test_five_hosts_with_tls_and_acls_run_the_control_plane_in_two_copies(
    tmp_path: Path,
) -> None:
    """secrets.sh, node.sh, bootstrap.sh and submit.sh on five network namespaces create a cluster that passes the smoke
    test from a sixth. A second run of the last two fails at nothing and creates what the first run left out. No secret
    is readable by others."""
    async with ScriptedCluster(tmp_path) as cluster:
        argv = [sys.executable, "-m", "tests.cluster.smoke"]
        env = cluster.environment() | {"PYTHONPATH": str(ROOT)}
        said = await cluster.run("ops", argv, env, 700.0)
        print(said)
        assert f"{len(smoke.STEPS)} passed, 0 failed" in said
        await scraped(cluster)
        # as a run that failed in the middle left it
        (cluster.secrets / "nomad-reconciler").write_text("")
        await cluster.provision_again()
        assert len(cluster.secret("nomad-reconciler")) == 36
        for file in cluster.secrets.iterdir():
            mode = stat.S_IMODE(file.stat().st_mode)
            assert mode == 0o600, (file.name, oct(mode))


async def scraped(cluster: ScriptedCluster) -> None:
    """The targets in Prometheus' configuration return metrics for the token in that configuration."""
    told = yaml.safe_load((cluster.etc("s1") / "prometheus.yml").read_text())
    (job,) = told["scrape_configs"]
    token = Path(job["authorization"]["credentials_file"]).read_text().strip()
    targets = job["static_configs"][0]["targets"]
    assert len(targets) == 2
    for target in targets:
        argv = ["curl", "-fsS", "-H", f"Authorization: Bearer {token}", f"http://{target}/metrics"]
        assert "nomad_watchdog_devices" in await cluster.run("s1", argv, {}, 20.0)

"""CPU use of the control plane for an idle fleet on Kubernetes with heartbeats: the measurement of `idle.py`
with agents that are already running.

The naive poller requests the Deployment of one device after another from the API server, in one thread, over a
persistent connection.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from bench.cluster import spaces
from bench.idle import GATEWAY, share, until_settled, while_beating
from bench.restart import Versions
from bench.rows import Row
from nomad_watchdog.demo.process import Process, clean_environment
from nomad_watchdog.schedulers.kubernetes import names
from servers.kubernetes import KubernetesCluster
from servers.replica import ControlPlane

API = """
api {
  listen = "127.0.0.1:{port}"
  rate   = 100000
  burst  = 100000
}
"""
NAIVE = """
import http.client, json, ssl, sys
server, pki, *collections = sys.argv[1:]
context = ssl.create_default_context(cafile=f"{pki}/ca.crt")
context.load_cert_chain(f"{pki}/admin.crt", f"{pki}/admin.key")
line = http.client.HTTPSConnection(server.removeprefix("https://"), context=context, timeout=15)
def ask(path):
    line.request("GET", path)
    return json.loads(line.getresponse().read())
every = [(path, one["metadata"]["name"]) for path in collections for one in ask(path)["items"]]
while True:
    for path, name in every:
        ask(f"{path}/{name}")
"""


async def rows_of(
    cluster: KubernetesCluster, file: Path, count: int, seconds: float, versions: Versions
) -> list[Row]:
    """Measure the fleet of the settings in `file`. `versions`: name → version; a version changes when its object is written."""
    devices = [f"device-{number}" for number in range(count)]
    async with ControlPlane(file.parent, "idle", file.read_text() + API) as plane:
        await until_settled(plane, count)
        await asyncio.sleep(10.0)
        before = await versions()
        ours = await while_beating(plane, devices, GATEWAY, seconds)
        touched = len(before.items() ^ (await versions()).items())
    lists = [names.collection(space, "deployment") for space in spaces("ours", count)]
    argv = [sys.executable, "-c", NAIVE, cluster.server, str(cluster.data_dir / "pki"), *lists]
    naive = Process.start(argv, log=file.parent / "naive.log", env=clean_environment())
    try:
        await asyncio.sleep(5.0)
        theirs = await share(naive.pid, seconds / 2)
        assert naive.returncode is None, naive.log_tail()
    finally:
        await naive.kill()
    return [
        Row(
            f"Kubernetes: idle, {count:,} devices beating by gateways, CPU ÷ naive poller",
            ours / theirs,
            "×",
            note=f"{ours:.1%} of a core against {theirs:.1%}",
        ),
        Row(
            "Kubernetes: idle, objects touched",
            touched,
            "",
            floor="≤ 0",
            aim="≤ 0",
            note=f"in {seconds:.0f} s",
        ),
    ]

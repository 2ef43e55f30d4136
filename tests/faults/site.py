"""Where rows run: real servers on this machine, or on hosts of their own."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from servers.cluster import Cluster
from servers.consul import ConsulServer
from servers.netns import LOCAL, Host
from servers.nomad import NomadServer

JOBS: Final = Path(__file__).resolve().parents[2] / "jobs"


class BrokenRowError(AssertionError):
    """The row itself failed: its fault did not happen, or a promise was broken."""


@dataclass(slots=True)
class Servers:
    """One Consul server with one agent per Nomad client, and one Nomad with two clients."""

    consul: ConsulServer
    nomad: NomadServer
    agents: list[ConsulServer]

    @property
    def root(self) -> Path:
        return self.nomad.data_dir


@dataclass(slots=True)
class Direct:
    """In place of a proxy: the control plane connects to the server itself."""

    url: str

    def clear(self) -> None:
        """Does nothing."""


@dataclass(slots=True)
class Site:
    """The servers and hosts of an installation."""

    root: Path
    """Agents have their folders below it."""
    consul: str
    nomad: str
    servers: Servers | None = None
    cluster: Cluster | None = None

    async def mend(self) -> None:
        """Undo whatever a row did: every server runs again, and all hosts reach each other."""
        if self.cluster is not None:
            await self.cluster.mend()
        if self.servers is not None:
            for consul in self.servers.agents:
                consul.resume()
                await consul.start()
            for index in range(2):
                self.servers.nomad.resume(index)
                await self.servers.nomad.restart(index)
            await self.servers.nomad.wait_ready()

    def session(self, timeout_s: float) -> aiohttp.ClientSession:
        """A session on the operator's host; if the servers require tokens, it has those that may do everything."""
        if self.cluster is not None:
            return self.cluster.session(timeout_s)
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout_s))

    def secret_file(self, name: str) -> Path | None:
        """A secret created by the cluster's scripts; None = no secret is needed here."""
        return None if self.cluster is None else self.cluster.secrets / name

    @property
    def control(self) -> Host:
        """Host of the control plane."""
        return self.cluster.net.hosts["p1"] if self.cluster else LOCAL

    @property
    def standby(self) -> Host:
        """Host of a second control plane."""
        return self.cluster.net.hosts["p2"] if self.cluster else LOCAL

    @property
    def ops(self) -> Host:
        """Host of the tests, and of the device."""
        return self.cluster.ops if self.cluster else LOCAL


@asynccontextmanager
async def open_site(root: Path) -> AsyncIterator[Site]:
    """One Consul and one Nomad on 127.0.0.1."""
    async with open_servers(root) as servers:
        yield Site(servers.root, servers.consul.http_addr, servers.nomad.http_addr, servers)


@asynccontextmanager
async def open_cluster(root: Path) -> AsyncIterator[Site]:
    """Three servers of each and three clients on their own hosts, as set up by `jobs/cluster`: TLS is on and ACLs deny
    by default. Replicas of the control plane on two more, with the rights of the shipped policies."""
    async with Cluster(root, JOBS, guests=("p1", "p2")) as cluster:
        consul, nomad = cluster.consul["s1"].http_addr, cluster.nomad["s1"].http_addr
        yield Site(cluster.data_dir, consul, nomad, cluster=cluster)


@asynccontextmanager
async def open_servers(root: Path) -> AsyncIterator[Servers]:
    """Servers on 127.0.0.1; removed at the end."""
    async with (
        ConsulServer(root / "consul") as consul,
        ConsulServer(root / "consul-1", node="node-1", join=consul) as beside,
        NomadServer(root / "nomad", [consul.http_addr, beside.http_addr], 2) as nomad,
    ):
        yield Servers(consul, nomad, [consul, beside])


async def until(test: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Wait for a condition; raises BrokenRowError on timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = test()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if time.monotonic() > deadline:
            raise BrokenRowError(f"not within {timeout_s:.0f} s: {what}")
        await asyncio.sleep(0.1)


@contextmanager
def limited_folder(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size, unmounted at the end. Needs root."""
    path.mkdir(parents=True, exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "nomad-watchdog-faults", str(path)]
    subprocess.run(argv, check=True, timeout=10)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, timeout=10)

"""The cluster of `jobs/cluster/` on this machine: three servers and some clients, each on its own host.

The hosts are network namespaces (`netns`): any of them can be cut off from any other. ``s1`` to ``s3`` have
a Consul server and a Nomad server, ``c1`` and so on a Consul client agent and a Nomad client. Nothing is configured
here: certificates, tokens, policies and configuration files are made by the same scripts as for virtual
machines, so TLS is enabled and ACLs deny by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from nomad_watchdog.demo.process import Process, Running, clean_environment
from nomad_watchdog.errors import TerminalError
from servers import nomad as one_nomad
from servers.binaries import find
from servers.netns import Host, Network

SERVERS: Final = ("s1", "s2", "s3")
_HTTPS: Final = {"consul": 8501, "nomad": 4646}
_POLL_S: Final = 0.2
_CALL_S: Final = 5.0
_SCRIPT_S: Final = 300.0
"""Timeout of a script. `bootstrap.sh` waits twice for 120 s."""

_found = cache(find)
"""Caches the result, so that each program's version is read once, not at each start."""


class Daemon:
    """Consul or Nomad on a host, started like the units of `machine.sh`."""

    def __init__(self, program: str, host: Host, folder: Path) -> None:
        self.host = host
        self.http_addr = f"https://{host.address}:{_HTTPS[program]}"
        self._program = program
        self._folder = folder
        self._process: Process | None = None

    @property
    def running(self) -> Process:
        """The process. Raises TerminalError if it was not started."""
        if self._process is None:
            raise TerminalError(f"{self._program} on {self.host.name} was not started")
        return self._process

    async def start(self) -> None:
        """Start it if it is not running. Does not wait for readiness."""
        if self._process is not None and self._process.returncode is None:
            return
        binary = await asyncio.to_thread(_found, self._program)
        flag = "-config-file" if self._program == "consul" else "-config"
        config = self._folder / "etc" / f"{self._program}.hcl"
        argv = self.host.argv([str(binary), "agent", f"{flag}={config}"])
        log = self._folder / f"{self._program}.log"
        self._process = Process.start(argv, log=log, env=clean_environment())

    async def kill(self) -> None:
        """Send SIGKILL, like a crash; tasks of a Nomad client keep running."""
        await self.running.kill()

    def pause(self) -> None:
        """Send SIGSTOP: connections stay open, and nothing is answered."""
        self.running.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.running.send(signal.SIGCONT)

    async def stop(self) -> None:
        """Stop it gracefully. Idempotent."""
        if self._process is not None:
            await self._process.terminate(15.0)

    def said(self) -> str:
        """The end of its log."""
        return "" if self._process is None else f"{self._process.log}:\n{self._process.log_tail(8)}"


class Cluster(Running):
    """``async with Cluster(folder, jobs) as cluster: …``. `jobs`: the directory of that name in the repository;
    `guests`: additional hosts without any processes."""

    def __init__(
        self, data_dir: Path, jobs: Path, *, clients: int = 3, guests: tuple[str, ...] = ()
    ) -> None:
        self.data_dir = data_dir.resolve()
        self.jobs = jobs
        self.secrets = self.data_dir / "secrets"
        self.clients = tuple(f"c{number}" for number in range(1, clients + 1))
        # The last host is for the tests: requests to the cluster come from it.
        self.net = Network([*SERVERS, *self.clients, *guests, "ops"])
        self.ops = self.net.hosts["ops"]
        self.consul = {name: self._daemon("consul", name) for name in (*SERVERS, *self.clients)}
        self.nomad = {name: self._daemon("nomad", name) for name in (*SERVERS, *self.clients)}
        self._http: aiohttp.ClientSession | None = None

    def _daemon(self, program: str, name: str) -> Daemon:
        return Daemon(program, self.net.hosts[name], self.data_dir / name)

    # -- starting and stopping ------------------------------------------------------------------

    async def start(self, timeout_s: float = 120.0) -> None:
        """Start the network, the servers and their ACLs, then the clients. `timeout_s`: for them to become
        ready at the end; each script has its own timeout. Raises TerminalError with the output of a script, or with the
        ends of all logs, if the cluster does not start."""
        await self.net.start()
        async with self.telling():
            await self._provision()
            await self._launch(SERVERS)
            await self.script("s1", "bootstrap.sh", str(self.jobs))
            # A client that registers before the keyring exists is rejected, and retries only after 15 s.
            await self._launch(self.clients)
            self._http = self.session(_CALL_S)
            await self.wait_ready(timeout_s)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """Append the ends of all logs to a TerminalError raised within."""
        try:
            yield
        except TerminalError as error:
            logs = [one.said() for one in (*self.consul.values(), *self.nomad.values())]
            raise TerminalError("\n".join([str(error), *filter(None, logs)])) from error

    async def _provision(self) -> None:
        hosts = self.net.hosts
        words = [f"server:{name}={hosts[name].address}" for name in SERVERS]
        words += [f"client:{name}={hosts[name].address}" for name in self.clients]
        await self.script("ops", "secrets.sh", str(self.secrets), *words)
        roles = dict.fromkeys(SERVERS, "server") | dict.fromkeys(self.clients, "client")
        await asyncio.gather(
            *(self.script(n, "node.sh", role, n, hosts[n].address) for n, role in roles.items())
        )

    async def _launch(self, names: tuple[str, ...]) -> None:
        await asyncio.gather(*(self.consul[name].start() for name in names))
        await asyncio.gather(*(self.nomad[name].start() for name in names))

    async def script(self, host: str, name: str, *argv: str) -> str:
        """Run a script of `jobs/cluster/` on a host; return its output. Raises TerminalError if it fails."""
        hosts = self.net.hosts
        beside = Path(sys.executable).with_name("nomad-watchdog")
        env = {
            "SECRETS": str(self.secrets),
            "SERVERS": " ".join(hosts[one].address for one in SERVERS),
            "CLIENTS": " ".join(hosts[one].address for one in self.clients),
            "ETC": str(self.etc(host)),
            "DATA": str(self.data_dir / host),
            "CONSUL": str(await asyncio.to_thread(_found, "consul")),
            "NOMAD": str(await asyncio.to_thread(_found, "nomad")),
            "WATCHDOG": str(beside),
            "PYTHON": sys.executable,
            "HOME": os.environ.get("HOME", "/"),
        }
        return await self.run(host, ["bash", str(self.jobs / "cluster" / name), *argv], env)

    async def run(
        self, host: str, argv: list[str], env: Mapping[str, str], timeout_s: float = _SCRIPT_S
    ) -> str:
        """Run a command on a host to its end; return its output. Raises TerminalError if it fails."""
        what = f"{' '.join(argv[:2])} on {host}"
        try:
            done = await asyncio.to_thread(
                subprocess.run,
                self.net.hosts[host].argv(argv),
                env=clean_environment() | dict(env),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = (error.output or b"").decode(errors="replace")
            raise TerminalError(
                f"{what} did not end within {timeout_s:.0f} s:\n{said[-4000:]}"
            ) from error
        said = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            raise TerminalError(f"{what} ended with {done.returncode}:\n{said[-4000:]}")
        return said

    async def stop(self) -> None:
        """Stop the tasks, then the processes, then the network."""
        await self.net.heal()
        for daemon in (*self.consul.values(), *self.nomad.values()):
            with contextlib.suppress(TerminalError):
                daemon.resume()
        if self._http is not None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, TerminalError):
                await self._stop_jobs()
            await self._http.close()
        await asyncio.gather(*(node.stop() for node in self.nomad.values()))
        await asyncio.gather(*(consul.stop() for consul in self.consul.values()))
        for name in self.nomad:
            await asyncio.to_thread(one_nomad.clean_up, self.data_dir / name)
        await self.net.stop()

    async def _stop_jobs(self) -> None:
        for job in await self.request("GET", "/v1/jobs?namespace=*"):
            await self.request("DELETE", f"/v1/job/{quote(job['ID'], safe='')}")

        async def ended() -> bool:
            allocs = await self.request("GET", "/v1/allocations?namespace=*&task_states=false")
            return all(one["ClientStatus"] not in {"pending", "running"} for one in allocs)

        await self.until(ended, time.monotonic() + 15.0, "all tasks have ended")

    # -- requests -------------------------------------------------------------------------------

    def etc(self, name: str) -> Path:
        """The configuration directory of a host."""
        return self.data_dir / name / "etc"

    def secret(self, name: str) -> str:
        """A secret created by `secrets.sh` or `bootstrap.sh`."""
        return (self.secrets / name).read_text().strip()

    def session(self, timeout_s: float) -> aiohttp.ClientSession:
        """An HTTP session from the host `ops`, with the management tokens."""
        trust = ssl.create_default_context(cafile=self.secrets / "ca.pem")
        return aiohttp.ClientSession(
            connector=self.ops.connector(trust),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            headers={
                "X-Consul-Token": self.secret("consul-management"),
                "X-Nomad-Token": self.secret("nomad-management"),
            },
        )

    async def until(self, test: Callable[[], Awaitable[bool]], deadline: float, what: str) -> None:
        """Wait for a condition on the cluster. Raises TerminalError at the deadline."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                if await test():
                    return
            if time.monotonic() > deadline:
                raise TerminalError(f"the cluster did not get there in time: {what}")
            await asyncio.sleep(_POLL_S)

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request to Nomad, to the first server that answers; return the parsed response."""
        assert self._http is not None
        error: Exception | None = None
        for name in SERVERS:
            url = self.nomad[name].http_addr + path
            try:
                async with self._http.request(method, url, json=body) as answer:
                    answer.raise_for_status()
                    return await answer.json(content_type=None)
            except (aiohttp.ClientError, TimeoutError, OSError) as caught:
                error = caught
        assert error is not None
        raise error

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until every client is ready with its driver, and every Consul agent knows the same leader."""
        deadline = time.monotonic() + timeout_s
        await self.until(self._all_ready, deadline, "every client is ready")
        await self.until(self._one_consul_leader, deadline, "Consul has a leader")

    async def mend(self) -> None:
        """Heal every partition, resume and start all processes, and wait until all is ready."""
        await self.net.heal()
        daemons = (*self.consul.values(), *self.nomad.values())
        for daemon in daemons:
            daemon.resume()
        await asyncio.gather(*(daemon.start() for daemon in daemons))
        await self.wait_ready()

    async def consul_leader(self) -> str:
        """The host of Consul's leader. Raises TerminalError if there is none."""
        for name in SERVERS:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                if leader := await self._consul_leader_by(name):
                    return leader
        raise TerminalError("Consul has no leader")

    async def nomad_leader(self) -> str:
        """The host of Nomad's leader. Raises TerminalError if there is none."""
        leader = self._server_at(await self.request("GET", "/v1/status/leader"))
        if not leader:
            raise TerminalError("Nomad has no leader")
        return leader

    def _server_at(self, address: str) -> str:
        host = address.rpartition(":")[0]
        return next((n for n in SERVERS if self.net.hosts[n].address == host), "")

    async def _consul_leader_by(self, name: str) -> str:
        assert self._http is not None
        async with self._http.get(f"{self.consul[name].http_addr}/v1/status/leader") as answer:
            answer.raise_for_status()
            return self._server_at(await answer.json())

    async def _one_consul_leader(self) -> bool:
        assert self._http is not None
        told = {await self._consul_leader_by(name) for name in self.consul}
        # A server that was unreachable is removed from the quorum, and returns only after 10 s.
        path = "/v1/operator/raft/configuration"
        async with self._http.get(self.consul["s1"].http_addr + path) as answer:
            voters = [one for one in (await answer.json())["Servers"] if one["Voter"]]
        return len(told) == 1 and "" not in told and len(voters) == len(SERVERS)

    async def _all_ready(self) -> bool:
        nodes = await self.request("GET", "/v1/nodes")
        ready = [
            node
            for node in nodes
            if node["Status"] == "ready"
            and (node["Drivers"] or {}).get("raw_exec", {}).get("Healthy")
        ]
        return len(ready) >= len(self.clients)

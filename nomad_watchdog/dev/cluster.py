"""Three Consul servers, three Nomad servers and some Nomad clients, each on a host of its own.

The hosts are network namespaces (`netns`): any of them can be cut off from any other. Hosts ``s1`` to
``s3`` have a Consul server and a Nomad server, ``c1`` … a Consul client agent and a Nomad client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from nomad_watchdog.dev import nomad as one_nomad
from nomad_watchdog.dev.binaries import find
from nomad_watchdog.dev.consul import ConsulServer
from nomad_watchdog.dev.netns import Host, Network
from nomad_watchdog.dev.process import Process, Running, clean_environment
from nomad_watchdog.errors import TerminalError

SERVERS: Final = ("s1", "s2", "s3")
_POLL_S: Final = 0.2
_CALL_S: Final = 5.0
_HTTP, _RPC, _SERF = 4646, 4647, 4648
_FIRST_PORT: Final = 20_000


class NomadNode:
    """One Nomad process on a host: a server or a client."""

    def __init__(self, host: Host, data_dir: Path, config: dict[str, Any]) -> None:
        self.host = host
        self.data_dir = data_dir
        self.http_addr = f"http://{host.address}:{_HTTP}"
        self._config = config
        self._process: Process | None = None

    @property
    def running(self) -> Process:
        """Raises TerminalError when it was not started."""
        if self._process is None:
            raise TerminalError(f"the Nomad on {self.host.name} was not started")
        return self._process

    async def start(self) -> None:
        """Start it if it does not run. Does not wait for readiness."""
        if self._process is not None and self._process.returncode is None:
            return
        program = await asyncio.to_thread(find, "nomad")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        config = self.data_dir / "nomad.json"
        config.write_text(json.dumps(self._config, indent=1))
        argv = self.host.argv([str(program), "agent", f"-config={config}"])
        self._process = Process.start(
            argv, log=self.data_dir / "nomad.log", env=clean_environment()
        )

    async def kill(self) -> None:
        """SIGKILL, as a crash would do it; tasks of a client run on."""
        await self.running.kill()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nothing is answered."""
        self.running.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.running.send(signal.SIGCONT)

    async def stop(self) -> None:
        """Graceful, idempotent."""
        if self._process is not None:
            await self._process.terminate(15.0)


class Cluster(Running):
    """``async with Cluster(folder) as cluster: …``. `guests`: further hosts, with nothing on them."""

    def __init__(self, data_dir: Path, *, clients: int = 3, guests: tuple[str, ...] = ()) -> None:
        self.data_dir = data_dir.resolve()
        self._clients = tuple(f"c{number}" for number in range(1, clients + 1))
        # the last host is ours: from there the cluster is asked
        self.net = Network([*SERVERS, *self._clients, *guests, "ops"])
        hosts = self.net.hosts
        self.ops = hosts["ops"]
        self.consul = {
            name: ConsulServer(self.data_dir / f"consul-{name}", node=name, host=hosts[name])
            for name in SERVERS
        }
        for server in self.consul.values():
            server.peers = list(self.consul.values())
        for name in self._clients:
            self.consul[name] = ConsulServer(
                self.data_dir / f"consul-{name}",
                node=name,
                host=hosts[name],
                join=self.consul["s1"],
            )
            self.consul[name].retry_join = [self.consul[s].serf_address for s in SERVERS]
        self.nomad = {name: self._node(name) for name in (*SERVERS, *self._clients)}
        self._http: aiohttp.ClientSession | None = None

    def _node(self, name: str) -> NomadNode:
        host = self.net.hosts[name]
        consul = self.consul[name].http_addr
        data_dir = self.data_dir / f"nomad-{name}"
        config = one_nomad.agent_config(
            name, data_dir / "data", (_HTTP, _RPC, _SERF), consul=consul, host=host
        )
        servers = [self.net.hosts[server].address for server in SERVERS]
        if name in SERVERS:
            join = [f"{address}:{_SERF}" for address in servers]
            config["server"] = one_nomad.server_config(len(SERVERS), join)
        else:
            rpc = [f"{address}:{_RPC}" for address in servers]
            config["client"] = one_nomad.client_config(rpc, _FIRST_PORT, consul=consul, host=host)
        return NomadNode(host, data_dir, config)

    async def start(self, timeout_s: float = 120.0) -> None:
        """The network, then the servers, then the clients. Raises TerminalError when one does not come up."""
        deadline = time.monotonic() + timeout_s
        await self.net.start()
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        self._http = aiohttp.ClientSession(connector=self.ops.connector(), timeout=timeout)
        await asyncio.gather(*(self.consul[name].start() for name in SERVERS))
        await asyncio.gather(*(self.nomad[name].start() for name in SERVERS))
        # a client that registers before there is a keyring is refused, and comes again only after 15 s
        await self.until(self._has_keyring, deadline, "Nomad's servers have a leader and a keyring")
        await asyncio.gather(*(self.consul[name].start() for name in self._clients))
        await asyncio.gather(*(self.nomad[name].start() for name in self._clients))
        await self.wait_ready(deadline - time.monotonic())

    async def stop(self) -> None:
        """The tasks, then the processes, then the network."""
        await self.net.heal()
        for node in self.nomad.values():
            with contextlib.suppress(TerminalError):
                node.resume()
        if self._http is not None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, TerminalError):
                await self._stop_jobs()
            await self._http.close()
        await asyncio.gather(*(node.stop() for node in self.nomad.values()))
        await asyncio.gather(*(consul.stop() for consul in self.consul.values()))
        for node in self.nomad.values():
            await asyncio.to_thread(one_nomad.clean_up, node.data_dir)
        await self.net.stop()

    async def _stop_jobs(self) -> None:
        for job in await self.request("GET", "/v1/jobs?namespace=*"):
            await self.request("DELETE", f"/v1/job/{quote(job['ID'], safe='')}")

        async def ended() -> bool:
            allocs = await self.request("GET", "/v1/allocations?namespace=*&task_states=false")
            return all(one["ClientStatus"] not in {"pending", "running"} for one in allocs)

        await self.until(ended, time.monotonic() + 15.0, "all tasks have ended")

    async def until(self, test: Callable[[], Awaitable[bool]], deadline: float, what: str) -> None:
        """Await a condition on the cluster. Raises TerminalError when it does not come."""
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                if await test():
                    return
            if time.monotonic() > deadline:
                raise TerminalError(f"the cluster did not get there in time: {what}")
            await asyncio.sleep(_POLL_S)

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """One call to Nomad, of the first server that answers: the parsed answer."""
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
        """Until every client is ready with its driver, and every Consul server has the same leader."""
        deadline = time.monotonic() + timeout_s
        await self.until(self._all_ready, deadline, "every client is ready")
        await self.until(self._one_consul_leader, deadline, "Consul has a leader")

    async def mend(self) -> None:
        """Heal every partition, wake and start whatever does not run, and wait until all is ready."""
        await self.net.heal()
        for consul in self.consul.values():
            consul.resume()
        for node in self.nomad.values():
            node.resume()
        await asyncio.gather(*(consul.start() for consul in self.consul.values()))
        await asyncio.gather(*(node.start() for node in self.nomad.values()))
        await self.wait_ready()

    async def consul_leader(self) -> str:
        """The host of Consul's leader; "" when there is none."""
        for name in SERVERS:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                return await self._consul_leader_by(name)
        return ""

    async def nomad_leader(self) -> str:
        """The host of Nomad's leader."""
        address = (await self.request("GET", "/v1/status/leader")).rpartition(":")[0]
        return next(n for n in SERVERS if self.net.hosts[n].address == address)

    async def _consul_leader_by(self, name: str) -> str:
        assert self._http is not None
        async with self._http.get(f"{self.consul[name].http_addr}/v1/status/leader") as answer:
            address = await answer.json()
        return next((n for n in SERVERS if self.consul[n].server_address == address), "")

    async def _one_consul_leader(self) -> bool:
        assert self._http is not None
        told = {await self._consul_leader_by(name) for name in SERVERS}
        # a server that was away is taken out of the quorum, and comes back into it after 10 s only
        path = "/v1/operator/raft/configuration"
        async with self._http.get(self.consul["s1"].http_addr + path) as answer:
            voters = [one for one in (await answer.json())["Servers"] if one["Voter"]]
        return len(told) == 1 and "" not in told and len(voters) == len(SERVERS)

    async def _has_keyring(self) -> bool:
        return bool(await self.request("GET", "/v1/operator/keyring/keys"))

    async def _all_ready(self) -> bool:
        nodes = await self.request("GET", "/v1/nodes")
        ready = [
            node
            for node in nodes
            if node["Status"] == "ready"
            and (node["Drivers"] or {}).get("raw_exec", {}).get("Healthy")
        ]
        return len(ready) >= len(self._clients)

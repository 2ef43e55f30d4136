"""A real Nomad on this machine: one process that is server and client, and more clients on request.

Without ``-dev``: that stores nothing, and its default telemetry distorts every measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import aiohttp

from nomad_watchdog.demo.process import (
    Process,
    Running,
    clean_environment,
    free_port,
    give_back,
    take_block,
)
from nomad_watchdog.errors import TerminalError
from servers.binaries import find

log = logging.getLogger(__name__)

_POLL_S: Final = 0.05
_CALL_S: Final = 5.0
_PORTS_EACH: Final = 900
_BLOCKS: Final = range(14_000, 20_000 - _PORTS_EACH, _PORTS_EACH)
"""Each client has a block of dynamic ports, below those of `free_port`, because Nomad does not check whether another
process uses a port that it chooses."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
_ALLOC_ID: Final = 36
"""Length of an allocation ID, with which the names of its control groups begin."""
_AT_ONCE: Final = 200
_NOBODY: Final = 65534
_DENIED: Final = "env_aws,env_gce,env_azure,env_digitalocean,vault"


class NomadServer(Running):
    """``async with NomadServer(folder) as nomad: … nomad.http_addr``.

    The first process is the server and a client; each further client is a separate process.
    `consul_addr` is one address, or one for each client (two Nomad clients on one Consul agent
    delete each other's services). Without `schedulers` nothing is placed: jobs wait forever. Ports stay the same across
    `stop_process` and `restart`. `unprivileged`: for thousands of allocations on one machine. As root, a client mounts
    two file systems for each, and each mount takes longer the more there are. No effect unless this process is root.
    """

    def __init__(
        self,
        data_dir: Path,
        consul_addr: str | Sequence[str] | None = None,
        clients: int = 1,
        *,
        acl: bool = False,
        schedulers: bool = True,
        unprivileged: bool = False,
    ) -> None:
        addresses = [consul_addr] if isinstance(consul_addr, str) else list(consul_addr or [])
        if len(addresses) > 1 and len(addresses) != clients:
            raise TerminalError(f"{len(addresses)} Consul addresses for {clients} clients")
        self.data_dir = data_dir.resolve()
        self.clients = clients
        self.token = ""
        """Bootstrap token if ACLs are enabled; secret."""
        self._acl = acl
        self._schedulers = schedulers
        self._user = _NOBODY if unprivileged and os.geteuid() == 0 else None
        self._consul = addresses
        self._client_enabled = True
        self._ports = [[free_port() for _ in range(3)] for _ in range(clients)]
        self._blocks: list[int] = []
        self._processes: list[Process | None] = [None] * clients
        self.http_addr = f"http://127.0.0.1:{self._ports[0][0]}"

    def pid(self, index: int = 0) -> int:
        return self._running(index).pid

    def log_file(self, index: int = 0) -> Path:
        return self.data_dir / f"nomad-{index}.log"

    async def start(self, timeout_s: float = 60.0) -> None:
        """Start all processes, and wait until every client is ready with its drivers.

        Raises TerminalError with the end of a log if it does not start."""
        deadline = time.monotonic() + timeout_s
        while len(self._blocks) < self.clients:
            self._blocks.append(take_block(_BLOCKS))
        if not (self.data_dir / "data-0").exists():
            await self._make_keyring(deadline)
        for index in range(self.clients):
            await self.restart(index)
        if self._acl and not self.token:
            await self._until(self._bootstrapped, deadline)
        await self._until(self._all_ready, deadline)

    async def _make_keyring(self, deadline: float) -> None:
        """Let a new server create its keyring before it has a client.

        A client that registers between leadership and keyring is rejected ("keyring has
        not been initialized yet", Nomad 1.11.3) and retries only after 15 to 30 s.
        """
        self._client_enabled = False
        await self.restart(0)
        if self._acl:
            await self._until(self._bootstrapped, deadline)
        await self._until(self._has_keyring, deadline)
        process = self._running(0)
        await process.terminate(10.0)
        self._client_enabled = True

    async def _has_keyring(self) -> bool:
        return bool(await self.request("GET", "/v1/operator/keyring/keys"))

    async def restart(self, index: int = 0) -> None:
        """Start process `index` (0 = the server) if it is not running. Does not wait for readiness."""
        process = self._processes[index]
        if process is not None and process.returncode is None:
            return
        program = await asyncio.to_thread(find, "nomad")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        config = self.data_dir / f"nomad-{index}.json"
        config.write_text(json.dumps(self._config(index), indent=1))
        if self._user is not None:
            program = await asyncio.to_thread(self._lend, program, self._user)
        argv = [str(program), "agent", f"-config={config}"]
        self._processes[index] = Process.start(
            argv, log=self.log_file(index), env=clean_environment(), user=self._user
        )

    def _lend(self, program: Path, user: int) -> Path:
        """A copy of the program that the other user may run, in a directory owned by that user."""
        copy = self.data_dir / program.name
        if not copy.exists():
            shutil.copy(program, copy)
            copy.chmod(0o755)
        for path in (self.data_dir, *self.data_dir.glob("*.json")):
            os.chown(path, user, user)
        return copy

    async def wait_ready(self, timeout_s: float = 60.0) -> None:
        await self._until(self._all_ready, time.monotonic() + timeout_s)

    async def kill(self, index: int = 0) -> None:
        """Send SIGKILL, like a crash; tasks of its client keep running."""
        await self._running(index).kill()

    def pause(self, index: int = 0) -> None:
        """Send SIGSTOP: connections stay open, and nothing is answered."""
        self._running(index).send(signal.SIGSTOP)

    def resume(self, index: int = 0) -> None:
        self._running(index).send(signal.SIGCONT)

    async def stop(self) -> None:
        """Stop all jobs if one has a process, then all Nomad processes, then remove the mounts and the directory."""
        alive = [one for one in self._processes if one is not None and one.returncode is None]
        for process in alive:
            process.send(signal.SIGCONT)
        has_tasks = await asyncio.to_thread(lambda: any(_left_behind(self.data_dir)))
        if self._processes[0] in alive and has_tasks:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, TerminalError):
                await self._stop_jobs()
        for process in reversed(alive):
            await process.terminate(15.0)
        await asyncio.to_thread(clean_up, self.data_dir)
        while self._blocks:
            give_back(self._blocks.pop())

    async def request(self, method: str, path: str, body: Any = None) -> Any:
        """Send one request for a test or a benchmark; return the parsed response.

        Raises aiohttp.ClientResponseError for any status other than 2xx."""
        headers = {"X-Nomad-Token": self.token} if self.token else {}
        timeout = aiohttp.ClientTimeout(total=_CALL_S)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as http,
            http.request(method, f"{self.http_addr}{path}", json=body) as answer,
        ):
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def _stop_jobs(self) -> None:
        jobs = await self.request("GET", "/v1/jobs?namespace=*")
        for job in jobs:
            space = quote(job["Namespace"], safe="")
            await self.request("DELETE", f"/v1/job/{quote(job['ID'], safe='')}?namespace={space}")

        async def ended() -> bool:
            allocs = await self.request("GET", "/v1/allocations?namespace=*&task_states=false")
            return all(one["ClientStatus"] not in {"pending", "running"} for one in allocs)

        await self._until(ended, time.monotonic() + 20.0)

    def _running(self, index: int) -> Process:
        process = self._processes[index]
        if process is None:
            raise TerminalError("this Nomad was not started")
        return process

    async def _bootstrapped(self) -> bool:
        answer = await self.request("POST", "/v1/acl/bootstrap", {})
        self.token = answer["SecretID"]
        return True

    async def _all_ready(self) -> bool:
        nodes = await self.request("GET", "/v1/nodes")
        ready = [
            node
            for node in nodes
            if node["Status"] == "ready"
            and (node["Drivers"] or {}).get("raw_exec", {}).get("Healthy")
        ]
        return len(ready) >= self.clients

    async def _until(self, test: Any, deadline: float) -> None:
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                if await test():
                    return
            for index, process in enumerate(self._processes):
                ended = process is not None and process.returncode is not None
                if ended or time.monotonic() > deadline:
                    tail = "" if process is None else process.log_tail()
                    raise TerminalError(
                        f"nomad did not get there; its log {self.log_file(index)} ends:\n{tail}"
                    )
            await asyncio.sleep(_POLL_S)

    def _config(self, index: int) -> dict[str, Any]:
        config = _agent_config(
            f"watchdog-nomad-{index}",
            self.data_dir / f"data-{index}",
            self._ports[index],
            consul=self._consul_address(index),
        )
        config["acl"] = {"enabled": self._acl}
        rpc = f"127.0.0.1:{self._ports[0][1]}"
        config["client"] = _client_config(
            [rpc], self._blocks[index], consul=self._consul_address(index)
        )
        config["client"]["enabled"] = self._client_enabled
        if index == 0:
            config["server"] = _server_config()
            if not self._schedulers:
                config["server"] |= {"num_schedulers": 0}
        return config

    def _consul_address(self, index: int) -> str:
        return self._consul[index % len(self._consul)] if self._consul else ""


def _agent_config(
    name: str, data_dir: Path, ports: Sequence[int], *, consul: str
) -> dict[str, Any]:
    """Settings of both servers and clients. `ports`: HTTP, RPC, gossip; `consul`: its address, "" = none."""
    return {
        "name": name,
        "data_dir": str(data_dir),
        "bind_addr": "127.0.0.1",
        "ports": dict(zip(("http", "rpc", "serf"), ports, strict=True)),
        "advertise": {
            what: f"127.0.0.1:{port}"
            for what, port in zip(("http", "rpc", "serf"), ports, strict=True)
        },
        "disable_update_check": True,
        "leave_on_terminate": False,
        "log_level": "INFO",
        "telemetry": {"disable_dispatched_job_summary_metrics": True},
        "plugin": [{"raw_exec": [{"config": [{"enabled": True}]}]}],
        # Without a Consul of its own, Nomad must not find another one on the default port.
        "consul": {
            "address": urlsplit(consul or "http://127.0.0.1:1").netloc,
            "auto_advertise": False,
            "server_auto_join": False,
            "client_auto_join": False,
        },
    }


def _server_config() -> dict[str, Any]:
    return {
        "enabled": True,
        "bootstrap_expect": 1,
        "heartbeat_grace": "2s",
        "min_heartbeat_ttl": "2s",
        "event_buffer_size": 10_000,
    }


def _client_config(servers: Sequence[str], first_port: int, *, consul: str) -> dict[str, Any]:
    """`servers`: their RPC addresses; `first_port`: first port of the dynamic range."""
    return {
        "enabled": True,
        "network_interface": "lo",
        "servers": list(servers),
        # More than the machine has, because agents reserve far more than they use.
        "cpu_total_compute": 1_000_000,
        "memory_total_mb": 1_000_000,
        "disk_total_mb": 1_000_000,
        "disk_free_mb": 1_000_000,
        "gc_max_allocs": 50_000,
        "gc_disk_usage_threshold": 99,
        "gc_inode_usage_threshold": 99,
        "min_dynamic_port": first_port,
        "max_dynamic_port": first_port + _PORTS_EACH - 1,
        "meta": {"consul_http_addr": consul},
        "options": {"fingerprint.denylist": _denied(with_consul=bool(consul))},
    }


def _denied(*, with_consul: bool) -> str:
    return _DENIED if with_consul else f"{_DENIED},consul"


def clean_up(folder: Path) -> None:
    """Kill tasks and executors of this Nomad, remove their control groups, unmount everything below its
    directory, and remove that. Blocking."""
    deadline = time.monotonic() + 5.0
    while (left := list(_left_behind(folder))) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)  # noqa: TID251  # runs in a separate thread
    _remove_cgroups({entry.name for entry in folder.glob("*/alloc/*")})
    mounts = sorted(_mounts(folder), reverse=True)
    for first in range(0, len(mounts), _AT_ONCE):  # each call reads the table of all mounts
        some = mounts[first : first + _AT_ONCE]
        subprocess.run(["umount", "-l", *some], check=False, capture_output=True, timeout=60)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("folder of nomad left behind", extra={"reason": str(folder)})


def _left_behind(folder: Path) -> Iterator[int]:
    """PIDs with NOMAD_TASK_DIR below `folder`, and of Nomad's own helpers with it in their arguments."""
    task_dir = f"NOMAD_TASK_DIR={folder}/".encode()
    named = f"{folder}/".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            argv = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        helper = len(argv) > 1 and argv[1] in {b"executor", b"logmon"}
        if any(one.startswith(task_dir) for one in environment) or (
            helper and any(named in one for one in argv)
        ):
            yield int(entry.name)


def _remove_cgroups(allocs: AbstractSet[str]) -> None:
    """Remove the control groups of these allocations. Nomad removes them when a task ends, but not when Nomad itself
    is stopped. The kernel uses 0.4 MB for each of them: 59,000 took 22 GB."""
    for parent in (*_CGROUPS.glob("*/nomad"), *_CGROUPS.glob("nomad.slice/*")):
        with contextlib.suppress(OSError):
            for entry in parent.iterdir():
                if entry.name[:_ALLOC_ID] in allocs and entry.is_dir():
                    with contextlib.suppress(OSError):
                        entry.rmdir()


def _mounts(folder: Path) -> list[str]:
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: no Nomad tmpfs either
        return []
    found = [line.split()[1].replace("\\040", " ") for line in lines]
    return [one for one in found if one.startswith(f"{folder}/")]

"""The environment of the demo: servers for the backend, a configuration, and `nomad-watchdog run`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypedDict
from urllib.parse import quote

import aiohttp
from watchdog_agent import wire

from nomad_watchdog.demo.configuration import BRISK, CALM, Servers, StagePace, configuration
from nomad_watchdog.demo.process import Process, clean_environment, free_port
from nomad_watchdog.demo.servers import _consul, _kubernetes, _servers
from nomad_watchdog.errors import TransientError
from nomad_watchdog.ids import parse_device_id, slug_of

if TYPE_CHECKING:
    from servers.kubelet.__main__ import Kubelet
    from servers.kubernetes import KubernetesCluster

CALL_TIMEOUT: Final = aiohttp.ClientTimeout(total=10.0)
__all__ = ["BRISK", "CALM", "Stage", "StageAgent", "StageDevice", "StagePace", "open_stage"]


class StageDevice(TypedDict):
    """A device as the API returns it, as far as the demo reads it."""

    id: str
    verdict: str
    epoch: int
    reason: str


class _Service(TypedDict):
    ID: str


class _ServiceEntry(TypedDict):
    """An instance of a service in Consul's health API."""

    Service: _Service


class StageAgent(NamedTuple):
    """A running agent process: the slug of its device, its pid and its backend."""

    slug: str
    pid: int
    backend: str


def began_to_shut_down(log: str) -> bool:
    """Whether an agent's log says that it shuts down because of a signal or an answer of 410."""
    ends = {f'"msg": {json.dumps(message)}' for message in (wire.LOG_SIGNALLED, wire.LOG_RETIRED)}
    return any(end in log for end in ends)


@dataclass(slots=True)
class Stage:
    """A running control plane, its servers and their addresses."""

    backend: str
    root: Path
    config: Path
    api: str
    session: aiohttp.ClientSession
    reconciler: Process | None = None
    consul: str = ""
    nomad: str = ""
    cluster: KubernetesCluster | None = None
    nodes: Sequence[Kubelet] = ()

    async def call(self, method: str, path: str, body: object = None) -> Any:
        """Call the API. Raises TransientError unless the status is 2xx."""
        try:
            async with self.session.request(method, self.api + path, json=body) as answer:
                if answer.status >= 300:
                    text = (await answer.text())[:300]
                    raise TransientError(f"{method} {path}: {answer.status} {text}")
                return await answer.json() if answer.status != 204 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransientError(f"{method} {path}: {error}") from error

    async def register(self, devices: Mapping[str, str]) -> None:
        """Register devices by name and address."""
        items = [
            {"id": name, "class": "default", "address": address}
            for name, address in devices.items()
        ]
        await self.call("POST", "/v1/devices:bulk", {"devices": items})

    async def deregister(self, name: str) -> None:
        """Deregister a device."""
        await self.call("DELETE", f"/v1/devices/{quote(name, safe='')}")

    async def items(self, *, presence: str = "any") -> list[StageDevice]:
        """Return all devices, from all pages of the API."""
        found: list[StageDevice] = []
        cursor = ""
        while True:
            query = f"?limit=1000&presence={presence}" + (f"&cursor={cursor}" if cursor else "")
            page = await self.call("GET", "/v1/devices" + query)
            found += page["items"]
            cursor = page["next"] or ""
            if not cursor:
                return found

    async def start_reconciler(self, patience_s: float = 30.0) -> None:
        """Start `nomad-watchdog run` as a user would, and wait until it is ready.

        `patience_s`: timeout in seconds. Raises TransientError if it exits, TimeoutError if it is not ready."""
        process = self.reconciler = Process.start(
            [sys.executable, "-P", "-m", "nomad_watchdog", "--config", str(self.config), "run"],
            log=self.root / "reconciler.log",
            env=clean_environment(),
        )
        async with asyncio.timeout(patience_s):
            while True:
                if process.returncode is not None:
                    raise TransientError(
                        f"the reconciler exited during start:\n{process.log_tail()}"
                    )
                try:
                    await self.call("GET", "/ready")
                except TransientError:
                    await asyncio.sleep(0.1)
                else:
                    return

    async def metric(self, name: str) -> float:
        """Sum of the series of the control plane whose names start with `name`, without `nomad_watchdog_`.

        Raises TransientError if there is none."""
        try:
            async with self.session.get(f"{self.api}/metrics") as answer:
                lines = (await answer.text()).splitlines()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TransientError(f"metrics: {error}") from error
        found = [line for line in lines if line.startswith(f"nomad_watchdog_{name}")]
        if not found:
            raise TransientError(f"there is no metric {name}")
        return sum(float(line.rpartition(" ")[2]) for line in found)

    async def passing(self) -> int:
        """Number of agents that pass their check in Consul."""
        return len(await self._in_consul("?passing&near=_agent"))

    async def _in_consul(self, query: str = "") -> list[_ServiceEntry]:
        path = "/v1/health/service/device-watchdog-agent" + query
        try:
            async with self.session.get(self.consul + path) as answer:
                answer.raise_for_status()
                found: list[_ServiceEntry] = await answer.json()
                return found
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise TransientError(f"Consul: {error}") from error

    @contextmanager
    def shutdown_of(self, slug: str) -> Iterator[Callable[[], Awaitable[bool]]]:
        """Enter before an agent is stopped; the value then returns whether it shut down gracefully.

        Only the agent itself deregisters from Consul at once (a killed one stays there for minutes). Without
        Consul its log is read, which is opened now because its folder is removed with the agent."""
        with ExitStack() as stack:
            log = None
            if not self.consul:
                log = stack.enter_context((self.root / "agents" / slug / "agent.log").open())

            async def was_graceful() -> bool:
                if log is None:
                    entries = await self._in_consul()
                    return all(entry["Service"]["ID"] != slug for entry in entries)
                log.seek(0)
                return began_to_shut_down(log.read())

            yield was_graceful

    def agent_pid(self, slug: str) -> int:
        """Pid of an agent. Raises TransientError when it is not running."""
        pid = self.agent_pids().get(slug)
        if pid is None:
            raise TransientError(f"the agent of {slug} is not running")
        return pid

    def agent_pids(self) -> dict[str, int]:
        """Slug -> pid. If a device has two agents, the one that was found last."""
        return {one.slug: one.pid for one in self.agents()}

    def agents(self) -> list[StageAgent]:
        """The agent processes that belong to our folder, from /proc."""
        found: list[StageAgent] = []
        mark = _pod_mark() if self.cluster is not None else b""
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environ = (entry / "environ").read_bytes().split(b"\0")
                arguments = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"watchdog" not in arguments or b"executor" in arguments:
                continue
            values = dict(pair.split(b"=", 1) for pair in environ if b"=" in pair)
            if values.get(mark, b"").decode(errors="replace").startswith(f"{self.root}/"):
                device = parse_device_id(values.get(b"DEVICE_ID", b"").decode())
                found.append(StageAgent(slug_of(device), int(entry.name), "kubernetes"))
                continue
            config = values.get(b"WATCHDOG_CONFIG", b"").decode(errors="replace") or _lock(entry)
            if not config.startswith(str(self.root)):
                continue
            slug = values.get(b"NOMAD_META_slug", b"").decode()
            backend = "nomad" if slug else "local"
            found.append(StageAgent(slug or Path(config).parent.name, int(entry.name), backend))
        return found


def _pod_mark() -> bytes:
    """Environment variable by which the simulated kubelet marks processes. The wheel does not have its module."""
    from servers.kubelet.spec import MARK

    return MARK.encode()


def _lock(process: Path) -> str:
    """Path of the lock file of a forked agent: /proc shows the environment of its parent, not its own."""
    try:
        held = str((process / "fd" / "3").readlink())
    except OSError:
        return ""
    return held if held.endswith("/lock") else ""


@asynccontextmanager
async def open_stage(
    backend: str,
    root: Path,
    device_port: int,
    *,
    strategy: str = "dispatch",
    clients: int = 1,
    pace: StagePace = CALM,
    beside: bool = False,
) -> AsyncIterator[Stage]:
    """Start everything; on exit stop it in reverse order and leave nothing running.

    `clients`: number of Nomad clients (each with its own Consul agent if there are several), or of Kubernetes
    nodes. `strategy`: the strategy on Nomad, or the workload on Kubernetes. `beside`: with Nomad, start
    Kubernetes as well, so that the fleet can be moved to it."""
    async with AsyncExitStack() as stack:
        consul = nomad = ""
        cluster: KubernetesCluster | None = None
        nodes: list[Kubelet] = []
        if backend == "nomad":
            consul, nomad = await _servers(stack, root, clients)
        elif backend == "kubernetes":
            consul = (await stack.enter_async_context(_consul(root))).http_addr
        if backend == "kubernetes" or (backend == "nomad" and beside):
            cluster, nodes = await _kubernetes(stack, root, clients)
        servers = Servers(consul, nomad, str(cluster.kubeconfig) if cluster else "")
        api_port = free_port()
        config = root / "nomad-watchdog.hcl"
        config.write_text(
            configuration(
                backend, root, servers,
                api_port=api_port, device_port=device_port, strategy=strategy, pace=pace,
            )
        )  # fmt: skip
        if consul:  # a SQLite registry is prepared by `run`
            await _command(config, "init")
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=CALL_TIMEOUT))
        stage = Stage(
            backend, root, config, f"http://127.0.0.1:{api_port}", session,
            consul=consul, nomad=nomad, cluster=cluster, nodes=nodes,
        )  # fmt: skip
        try:
            await stage.start_reconciler()
            yield stage
        finally:
            if stage.reconciler is not None:
                await stage.reconciler.terminate(10.0)
            if backend == "local" or beside:  # the fleet may have been moved there
                await stop_agents(stage)


async def _command(config: Path, *arguments: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "nomad_watchdog",
        "--config",
        str(config),
        *arguments,
        env=clean_environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await child.communicate()
    finally:
        if child.returncode is None:  # interrupted: it must not write into a folder that is removed
            child.kill()
            await child.wait()
    if child.returncode != 0:
        raise TransientError(f"nomad-watchdog {' '.join(arguments)}: {output.decode()[-2000:]}")


async def stop_agents(stage: Stage) -> None:
    """Stop local agents, which outlive their reconciler by design."""

    def local() -> list[int]:
        return [one.pid for one in stage.agents() if one.backend == "local"]

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in local():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        for _ in range(60):
            if not local():
                return
            await asyncio.sleep(0.1)

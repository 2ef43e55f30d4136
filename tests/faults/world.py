"""What a row of the matrix plays in: real servers, one installation on them, a gateway and a witness.

Servers are shared by rows that leave them as they were; an installation has its own job prefix, KV
prefix, service name and API token, so that rows know nothing of each other.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from nomad_watchdog.demo.stage import clean_environment
from nomad_watchdog.dev.cluster import Cluster
from nomad_watchdog.dev.consul import ConsulServer
from nomad_watchdog.dev.netns import LOCAL, Host
from nomad_watchdog.dev.nomad import NomadServer
from nomad_watchdog.dev.process import Process, free_port
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Presence
from tests.e2e import audit
from tests.faults.proxy import Proxy

CONVERGED_S = 60.0
"""L1, as docs/fault-matrix.md publishes it for this configuration: after the fault has ended and the
last wish was acknowledged."""
UP_S = 90.0
CONFIG = """\
backend  = "nomad"
data_dir = "{root}"
resync   = "{resync}"
api {{
  listen     = "{listen}"
  token_file = "{token_file}"
}}
nomad {{
  address    = "{nomad}"
  job_prefix = "{prefix}"
  {nomad_token}
}}
consul {{
  address = "{consul}"
  prefix  = "{prefix}"
  service = "{prefix}"
}}
registry {{
  kind = "{registry}"
}}
retry {{
  initial = "500ms"
  max     = "5s"
}}
presence {{
  startup_grace = "60s"
  report_stale  = "10s"
}}
log {{
  level = "debug"
}}
{classes}
"""
CLASS = """\
agent_class "{name}" {{
  version      = "{version}"
  kill_timeout = "5s"
  beat         = "2s"
  variables = {{
    python      = "{python}"
    consul_addr = "$${{meta.consul_http_addr}}"
  }}
  probe "tcp" {{
    port     = {port}
    interval = "1s"
    timeout  = "500ms"
    misses   = 2
  }}
}}
"""


MOCK_CLASS = """\
agent_class "default" {{
  template = "{template}"
  probe "icmp" {{}}
}}
"""


class BrokenRowError(AssertionError):
    """The row itself did not go as written: its fault did not happen, or a promise broke on the way."""


@dataclass(slots=True)
class Servers:
    """One Consul server with an agent a Nomad client, and one Nomad with two clients."""

    consul: ConsulServer
    nomad: NomadServer
    agents: list[ConsulServer]

    @property
    def root(self) -> Path:
        return self.nomad.data_dir


@dataclass(slots=True)
class Direct:
    """Stands where a proxy would, and is none: the control plane speaks to the server itself."""

    url: str

    def clear(self) -> None:
        """There is nothing to clear."""


@dataclass(slots=True)
class Site:
    """Where an installation finds everything."""

    root: Path
    """Agents have their folders below it."""
    consul: str
    nomad: str
    servers: Servers | None = None
    cluster: Cluster | None = None

    async def mend(self) -> None:
        """Whatever a row did: every server runs again, and everything passes between hosts."""
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

    @property
    def program(self) -> Host:
        """Where the control plane runs."""
        return self.cluster.net.hosts["p1"] if self.cluster else LOCAL

    @property
    def ops(self) -> Host:
        """Where we look from, and where the device is."""
        return self.cluster.ops if self.cluster else LOCAL


@asynccontextmanager
async def open_site(root: Path) -> AsyncIterator[Site]:
    """One Consul and one Nomad on 127.0.0.1."""
    async with open_servers(root) as servers:
        yield Site(servers.root, servers.consul.http_addr, servers.nomad.http_addr, servers)


@asynccontextmanager
async def open_cluster(root: Path) -> AsyncIterator[Site]:
    """Three servers of each and three clients on hosts of their own; the control plane on a seventh."""
    async with Cluster(root, guests=("p1",)) as cluster:
        consul, nomad = cluster.consul["s1"].http_addr, cluster.nomad["s1"].http_addr
        yield Site(cluster.data_dir, consul, nomad, cluster=cluster)


@asynccontextmanager
async def open_servers(root: Path) -> AsyncIterator[Servers]:
    """On 127.0.0.1; gone at the end."""
    async with (
        ConsulServer(root / "consul") as consul,
        ConsulServer(root / "consul-1", node="node-1", join=consul) as beside,
        NomadServer(root / "nomad", [consul.http_addr, beside.http_addr], 2) as nomad,
    ):
        yield Servers(consul, nomad, [consul, beside])


async def until(test: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """Await a condition; raises BrokenRowError when it does not come."""
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


@dataclass(slots=True)
class World:
    """One installation: the program, a gateway that says each wish until it hears a 2xx, and what
    must be true in the end."""

    name: str
    root: Path
    where: audit.Where
    session: aiohttp.ClientSession
    consul: Proxy
    nomad: Proxy
    site: Site
    listen: str
    device_port: int
    token: str
    registry: str = "consul"
    resync: str = "5s"
    version: str = "1"
    template: Path | None = None
    """Of a job that starts no agent; then nothing is registered in Consul either."""
    nomad_token: Path | None = None
    bad_python: str = ""
    """With it there is a second class, `bad`, whose agents are this program."""
    process: Process | None = None
    wanted: dict[str, bool] = field(default_factory=dict)
    """Device → whether it is to be watched, as acknowledged."""
    unsure: set[str] = field(default_factory=set)
    """Devices with a wish under way: it may be stored or not."""
    overlap_s: float = 0.0
    """S3: so long two processes of one device may be seen where the row says why."""
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _epochs: dict[str, int] = field(default_factory=dict)
    _doubled_since: dict[str, float] = field(default_factory=dict)
    epochs_may_fall: bool = False
    finish: Callable[[], Awaitable[None]] = field(init=False)
    """The audit. It follows every row by itself; one whose servers go before that calls it."""

    @property
    def servers(self) -> Servers:
        """Of a row that is played on this machine itself."""
        assert self.site.servers is not None
        return self.site.servers

    @property
    def cluster(self) -> Cluster:
        """Of a row that is played on many hosts."""
        assert self.site.cluster is not None
        return self.site.cluster

    # -- the program ----------------------------------------------------------------------------

    @property
    def api(self) -> str:
        return f"http://{self.listen}"

    @property
    def config(self) -> Path:
        return self.root / "nomad-watchdog.hcl"

    def configure(self) -> None:
        """Write the configuration file as things are now."""
        classes = CLASS.format(
            name="default", version=self.version, python=sys.executable, port=self.device_port
        )
        if self.bad_python:
            classes += CLASS.format(
                name="bad", version="1", python=self.bad_python, port=self.device_port
            )
        if self.template:
            classes = MOCK_CLASS.format(template=self.template)
        token_file = self.root / "api.token"
        token_file.write_text(self.token)
        self.config.write_text(
            CONFIG.format(
                root=self.root,
                resync=self.resync,
                listen=self.listen,
                token_file=token_file,
                nomad=self.nomad.url,
                consul=self.consul.url,
                nomad_token=f'token_file = "{self.nomad_token}"' if self.nomad_token else "",
                prefix=self.where.job_prefix,
                registry=self.registry,
                classes=classes,
            )
        )

    async def start(self, failpoint: str = "", *, module: str = "nomad_watchdog", wait: bool = True,
                    **environment: str) -> None:  # fmt: skip
        """`nomad-watchdog run`, until it is ready or (with a fail point) has died."""
        env = clean_environment() | environment
        if failpoint:
            env["NOMAD_WATCHDOG_FAILPOINT"] = failpoint
        argv = [sys.executable, "-m", module, "--config", str(self.config), "run"]
        argv = self.site.program.argv(argv)
        process = self.process = Process.start(argv, log=self.log, env=env)

        async def ready() -> bool:
            if process.returncode is not None:
                if failpoint:
                    return True
                raise BrokenRowError(f"the program ended:\n{process.log_tail()}")
            with suppress(aiohttp.ClientError, TimeoutError):
                return (await self.call("GET", "/ready"))[0] == 200
            return False

        if wait:
            await until(ready, 60.0, "the program is ready")

    @property
    def log(self) -> Path:
        return self.root / "program.log"

    async def command(self, *argv: str) -> None:
        """A verb of the command line; raises BrokenRowError when it fails."""
        words = [sys.executable, "-m", "nomad_watchdog", "--config", str(self.config), *argv]
        child = await asyncio.create_subprocess_exec(
            *self.site.program.argv(words),
            env=clean_environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await child.communicate()
        if child.returncode != 0:
            raise BrokenRowError(f"nomad-watchdog {' '.join(argv)}: {said.decode()[-1000:]}")

    @property
    def running(self) -> Process:
        assert self.process is not None
        return self.process

    async def killed(self, timeout_s: float = 60.0) -> None:
        """Wait until the program has been ended by SIGKILL: else the row proves nothing."""
        try:
            code = await self.running.wait(timeout_s)
        except TimeoutError:
            raise BrokenRowError("the fail point was never reached") from None
        if code != -signal.SIGKILL:
            raise BrokenRowError(f"the program ended with {code}:\n{self.running.log_tail()}")

    def kill_now(self) -> None:
        """SIGKILL the program, and return only when it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self.running.pid, signal.SIGKILL)
        self.running._popen.wait(10.0)

    # -- speaking to it -------------------------------------------------------------------------

    async def call(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and parsed answer."""
        headers = {"Authorization": f"Bearer {self.token}"}
        async with self.session.request(
            method, self.api + path, json=body, headers=headers
        ) as answer:
            text = await answer.text()
            with suppress(ValueError):
                return answer.status, json.loads(text)
            return answer.status, text

    async def wish(self, name: str, present: bool = True, *, kind: str = "default",
                   timeout_s: float = 120.0) -> None:  # fmt: skip
        """As any gateway: say it until the answer is a 2xx."""
        self.unsure.add(name)
        path = f"/v1/devices/{quote(name, safe='')}"
        deadline = time.monotonic() + timeout_s
        said: object = "nothing"
        while time.monotonic() < deadline:
            with suppress(aiohttp.ClientError, TimeoutError):
                if present:
                    body = {"address": self.site.ops.address, "class": kind}
                    status, said = await self.call("PUT", path, body)
                else:
                    status, said = await self.call("DELETE", path)
                if status < 300:
                    self.wanted[name] = present
                    self.unsure.discard(name)
                    return
                if status in {400, 401, 404, 413}:
                    raise BrokenRowError(f"{name} was refused: {said}")
            await asyncio.sleep(0.2)
        raise BrokenRowError(f"{name} was not acknowledged within {timeout_s:.0f} s: {said}")

    async def wishes(self, *names: str, present: bool = True, **how: Any) -> None:
        """Many at once."""
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(self.wish(name, present, **how))

    def names(self, count: int, what: str = "dev") -> list[str]:
        return [f"{self.name} {what} {n:02}" for n in range(count)]

    async def settle(self, timeout_s: float = UP_S) -> float:
        """Wait until every device is as it was wished, in words and in processes; the seconds that it
        took."""
        began = time.monotonic()
        running = {str(slug_of(DeviceId(name))) for name, wanted in self.wanted.items() if wanted}

        async def settled() -> bool:
            with suppress(aiohttp.ClientError, TimeoutError):
                status, page = await self.call("GET", "/v1/devices?limit=1000&presence=any")
                if status == 200:
                    verdicts = {item["id"]: item["verdict"] for item in page["items"]}
                    return running == {one.slug for one in self.agents()} and all(
                        verdicts.get(name) == ("watched" if wanted else "departed")
                        for name, wanted in self.wanted.items()
                    )
            return False

        await until(settled, timeout_s, "all devices are watched or departed")
        return time.monotonic() - began

    async def settle_from_outside(self, timeout_s: float = UP_S) -> float:
        """As `settle`, by the process table: one live agent a wanted device, whatever the program
        believes."""
        began = time.monotonic()
        wanted = {str(slug_of(DeviceId(name))) for name, present in self.wanted.items() if present}
        gone = {job["Meta"]["slug"] for job in await self.jobs() if job["Stop"]}

        async def settled() -> bool:
            live = {job["Meta"]["slug"] for job in await self.jobs() if not job["Stop"]}
            return gone <= live and {one.slug for one in self.agents()} == wanted

        await until(settled, timeout_s, "each device has a live job and an agent again")
        return time.monotonic() - began

    async def status(self) -> Any:
        return (await self.call("GET", "/v1/status"))[1]

    # -- looking at it from outside -------------------------------------------------------------

    def agents(self) -> list[audit.AgentProcess]:
        mine = self.where.job_prefix + "/"
        return [one for one in audit.processes(self.where.root) if one.job.startswith(mine)]

    def pids(self) -> set[int]:
        return {one.pid for one in self.agents()}

    async def jobs(self) -> list[Any]:
        url = f"{self.where.nomad}/v1/jobs?prefix={self.where.job_prefix}/&meta=true"
        return list(await audit.get(self.session, url))

    async def acknowledged_is_stored(self) -> None:
        """S4, at once: whatever was acknowledged is in the registry, whoever has died since."""
        stored = await audit.records(self.session, self.where)
        for name, present in self.wanted.items():
            if name in self.unsure:
                continue
            record = stored.get(slug_of(DeviceId(name)))
            if record is None or (record.presence is Presence.PRESENT) is not present:
                self.broken.append(f"S4: {name} was acknowledged and is not stored")

    def undisturbed(self, pids: set[int], promise: str = "S7", *, leaving: int = 0) -> None:
        """None of these agents was stopped or restarted, but for those whose devices leave."""
        gone = pids - self.pids()
        if len(gone) > leaving:
            self.broken.append(f"{promise}: {len(gone)} of {len(pids)} agents did not run through")

    async def witness(self) -> None:
        """Look twice a second for what must never be seen."""
        while True:
            self._look_at_processes()
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                await self._look_at_registry()
            with suppress(aiohttp.ClientError, TimeoutError):
                await self._look_at_verdicts()
            await asyncio.sleep(0.5)

    def _look_at_processes(self) -> None:
        now = time.monotonic()
        slugs = {one.slug for one in audit.doubled(self.where.root, self.where.job_prefix + "/")}
        self._doubled_since = {s: self._doubled_since.get(s, now) for s in slugs}
        for slug, since in self._doubled_since.items():
            if now - since >= self.overlap_s:
                self.broken.append(f"S3: two agents of {slug} at once")

    async def _look_at_registry(self) -> None:
        if self.registry != "consul":
            return
        async with asyncio.timeout(3.0):
            stored = await audit.records(self.session, self.where)
        for slug, record in stored.items():
            if record.epoch < self._epochs.get(slug, 0) and not self.epochs_may_fall:
                self.broken.append(f"S1: the epoch of {slug} went back to {record.epoch}")
            self._epochs[slug] = record.epoch

    async def _look_at_verdicts(self) -> None:
        async with asyncio.timeout(3.0):
            status, page = await self.call("GET", "/v1/devices?limit=1000&verdict=offline")
        for item in page["items"] if status == 200 else ():
            self.broken.append(f"S6: {item['id']} is called offline: {item['reason']}")

    async def examine(self) -> audit.Findings:
        """The audit that ends every row."""
        present = [name for name, wanted in self.wanted.items() if wanted]
        if self.registry == "consul":
            found = await audit.examine(self.session, self.where, present, self.wanted)
        else:
            found = audit.Findings()
        found.asked.update(["S1", "S3", "S6"])
        found.wrong += list(dict.fromkeys(self.broken))
        await self._events(found)
        await self._secrets(found)
        status = await self.status()
        found.expect(status["ready"] and not status["queue"], "L4", f"work is left: {status}")
        found.expect(not status["breaker"]["held"], "S7", f"stops are held: {status['breaker']}")
        return found

    async def _events(self, found: audit.Findings) -> None:
        _, page = await self.call("GET", "/v1/events?limit=1000")
        numbers = [event["seq"] for event in page["items"]]
        in_order = (
            numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        )
        found.expect(in_order, "S5", "the event log has a hole")
        for event in page["items"]:
            offline = event["kind"] == "verdict.offline"
            found.expect(not offline, "S6", f"{event['device']}: {event['text']}")

    async def _secrets(self, found: audit.Findings) -> None:
        """S10: the API's token is nowhere but in its file and in the environment of who may know."""
        texts = {"the log": self.log.read_text(errors="replace")}
        for path in ("/", "/metrics", "/v1/status", "/v1/events", "/v1/agents"):
            texts[path] = str((await self.call("GET", path))[1])
        texts["Nomad's jobs"] = json.dumps(await self.jobs())
        for job in (await self.jobs())[:3]:
            url = f"{self.where.nomad}/v1/job/{quote(job['ID'], safe='')}"
            texts[f"job {job['ID']}"] = json.dumps(await audit.get(self.session, url))
        url = f"{self.where.consul}/v1/catalog/service/{self.where.service}"
        texts["Consul's catalogue"] = json.dumps(await audit.get(self.session, url))
        texts["somebody's argv"] = "\n".join(_command_lines())
        coded = base64.b64encode(self.token.encode()).decode().rstrip("=")
        for place, text in texts.items():
            told = self.token in text or coded in text
            found.expect(not told, "S10", f"the API's token is in {place}")


def _command_lines() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                yield (entry / "cmdline").read_bytes().decode(errors="replace")


@contextmanager
def limited_folder(path: Path, size: str) -> Iterator[Path]:
    """A tmpfs of that size, unmounted at the end. Needs root."""
    import subprocess

    path.mkdir(parents=True, exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "nomad-watchdog-faults", str(path)]
    subprocess.run(argv, check=True, timeout=10)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, timeout=10)


@asynccontextmanager
async def open_world(
    name: str, root: Path, site: Site, settings: Mapping[str, Any], *, alone: bool
) -> AsyncIterator[World]:
    """An installation with nothing running yet; at the end its program and agents are gone, and, if
    nobody else uses them, all servers run."""
    root.mkdir(parents=True)
    tag = f"f{secrets.token_hex(3)}"
    device = await asyncio.start_server(lambda _r, w: w.close(), sock=site.ops.listener())
    timeout = aiohttp.ClientTimeout(total=10.0)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(device)
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=site.ops.connector(), timeout=timeout)
        )
        consul: Any
        nomad: Any
        if site.cluster is None:
            consul = await stack.enter_async_context(Proxy(site.consul))
            nomad = await stack.enter_async_context(Proxy(site.nomad))
        else:
            consul = Direct(site.cluster.consul["c1"].http_addr)
            nomad = Direct(site.cluster.nomad["c2"].http_addr)
        world = World(
            name=name,
            root=root,
            where=audit.Where(site.root, site.consul, site.nomad, tag, tag, tag),
            session=session,
            consul=consul,
            nomad=nomad,
            site=site,
            listen=f"{site.program.address}:{free_port()}",
            device_port=device.sockets[0].getsockname()[1],
            token=f"canary-{secrets.token_hex(16)}",
            **settings,
        )
        world.configure()
        try:
            await world.command("init")
            yield world
        finally:
            for proxy in (consul, nomad):
                proxy.clear()
            if world.process is not None:
                await world.process.terminate(10.0)
            if alone:
                await site.mend()
            await _clean(world)


async def _clean(world: World) -> None:
    """Stop the jobs of this installation, and wait until their processes have ended."""
    if world.where.nomad != world.site.nomad:  # its own Nomad took everything with it
        return
    jobs = [*await world.jobs(), {"ID": world.where.job_prefix, "Stop": False}]
    limit = asyncio.Semaphore(8)

    async def stop(job_id: str) -> None:
        async with limit:
            url = f"{world.where.nomad}/v1/job/{quote(job_id, safe='')}"
            async with world.session.delete(url) as answer:
                await answer.read()

    calls: list[Awaitable[None]] = [stop(job["ID"]) for job in jobs if not job.get("Stop")]
    await asyncio.gather(*calls)
    with suppress(BrokenRowError):
        await until(lambda: not world.agents(), 20.0, "agents end")
    for one in world.agents():
        with suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    url = f"{world.where.consul}/v1/kv/{world.where.kv_prefix}/?recurse"
    async with world.session.delete(url) as answer:
        await answer.read()

"""What a row of the matrix runs in: one installation on real servers, a gateway and a witness.

Servers are shared by rows that leave them as they were. An installation has its own job prefix, KV
prefix, service name and API token, so that rows do not affect each other.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from nomad_watchdog.demo.process import free_port
from nomad_watchdog.ids import DeviceId, slug_of
from nomad_watchdog.model import Presence
from servers.cluster import Cluster
from servers.netns import LOCAL
from tests.e2e import audit
from tests.faults import canary
from tests.faults.program import CLASS, CONFIG, MOCK_CLASS, PROBES, Program
from tests.faults.proxy import Proxy
from tests.faults.site import BrokenRowError, Direct, Servers, Site, until

CONVERGED_S = 60.0
"""L1, as docs/fault-matrix.md publishes it for this configuration: after the fault has ended and the last request was
acknowledged."""
UP_S = 90.0


@dataclass(slots=True)
class World:
    """One installation: the program, a gateway that repeats each request until it gets a 2xx, and the final
    conditions."""

    name: str
    root: Path
    where: audit.Where
    session: aiohttp.ClientSession
    consul: Proxy
    nomad: Proxy
    site: Site
    program: Program
    device_port: int
    token: str
    webhook_secrets: list[str]
    registry: str = "consul"
    resync: str = "5s"
    strategy: str = "dispatch"
    """How agents are started on Nomad."""
    version: str = "1"
    python: str = sys.executable
    """Program that runs the agents of the class `default`."""
    template: Path | None = None
    """Template of a job that starts no agent; then nothing is registered in Consul either."""
    nomad_token: Path | None = None
    bad_python: str = ""
    """If set, there is a second class, `bad`, whose agents are this program."""
    probes: str = ""
    """Probes, confirmation and escalation of the classes; "" = a TCP probe without confirmation."""
    api: dict[str, str] = field(default_factory=dict)
    """Further settings of the block `api`."""
    agent_settings: str = ""
    """Further settings of the block `agents`."""
    variables: str = ""
    """Further variables of the classes' templates."""
    more: str = ""
    """Further blocks of the configuration."""
    addresses: dict[str, str] = field(default_factory=dict)
    """Addresses of devices that have their own."""
    may_be_offline: set[str] = field(default_factory=set)
    """Dead devices, for which the verdict offline does not violate S6."""
    others: list[Program] = field(default_factory=list)
    """Further control planes of the same installation."""
    speaks_to: Program | None = None
    """The program that the gateway calls; None = the first, and for a request whichever answers."""
    wanted: dict[str, bool] = field(default_factory=dict)
    """Device → whether it should be watched, as acknowledged."""
    unsure: set[str] = field(default_factory=set)
    """Devices with a request in progress, which may be stored or not."""
    overlap_s: float = 0.0
    """S3: time during which two processes of one device are allowed, for the reason stated in the row."""
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _epochs: dict[str, int] = field(default_factory=dict)
    _doubled_since: dict[str, float] = field(default_factory=dict)
    epochs_may_fall: bool = False
    finish: Callable[[], Awaitable[None]] = field(init=False)
    """The audit. It follows every row automatically; a row whose servers end before that calls it itself."""

    @property
    def servers(self) -> Servers:
        """The servers of a row that runs on this machine."""
        assert self.site.servers is not None
        return self.site.servers

    @property
    def cluster(self) -> Cluster:
        """The cluster of a row that runs on many hosts."""
        assert self.site.cluster is not None
        return self.site.cluster

    # -- the program ----------------------------------------------------------------------------

    def configure(self) -> None:
        """Write the configuration files for the current settings."""
        self.token_file.write_text(self.token)
        self.secrets_file.write_text("".join(f"{one}\n" for one in self.webhook_secrets))
        for program in (self.program, *self.others):
            program.config.write_text(self._configuration(program))

    @property
    def token_file(self) -> Path:
        return self.root / "api.token"

    @property
    def secrets_file(self) -> Path:
        return self.root / "webhook.secrets"

    def _configuration(self, program: Program) -> str:
        token = self.site.secret_file("consul-watchdog")
        agents = {
            "probes": self.probes or PROBES.format(port=self.device_port),
            "agents_consul": f'consul_token_file = "{token}"'
            if token
            else 'consul_addr = "$${meta.consul_http_addr}"',
        }
        agents["agents_consul"] += f"\n    {self.variables}"
        classes = CLASS.format(name="default", version=self.version, python=self.python, **agents)
        if self.bad_python:
            classes += CLASS.format(name="bad", version="1", python=self.bad_python, **agents)
        if self.template:
            classes = MOCK_CLASS.format(template=self.template)
        return CONFIG.format(
            root=program.root,
            resync=self.resync,
            listen=program.listen,
            token_file=self.token_file,
            secrets_file=self.secrets_file,
            nomad=self.nomad.url,
            consul=self.consul.url if program is self.program else self.standby_consul,
            nomad_access=self._access(
                self.nomad_token or self.site.secret_file("nomad-reconciler")
            ),
            consul_access=self._consul_access(),
            strategy=self.strategy,
            job_prefix=self.where.job_prefix,
            kv_prefix=self.where.kv_prefix,
            service=self.where.service,
            registry=self.registry,
            agents=self.agent_settings,
            classes=classes + self.more,
            api="\n  ".join(f'{name} = "{value}"' for name, value in self.api.items()),
        )

    def _access(self, token: Path | None) -> str:
        lines = [] if token is None else [f'token_file = "{token}"']
        if (authority := self.site.secret_file("ca.pem")) is not None:
            lines.append(f'ca_cert = "{authority}"')
        return "\n  ".join(lines)

    def _consul_access(self) -> str:
        access = self._access(self.site.secret_file("consul-reconciler"))
        # agents register with the Consul of their own host, which listens there for its processes only
        own = f'agent_address = "http://{LOCAL.address}:8500"' if self.site.cluster else ""
        return f"{access}\n  {own}"

    @property
    def standby_consul(self) -> str:
        """The Consul agent of a second control plane."""
        cluster = self.site.cluster
        return self.consul.url if cluster is None else cluster.consul["c3"].http_addr

    async def replicate(self) -> Program:
        """Start a second control plane of the same installation; returns when it is ready."""
        other = Program(
            self.root / "standby",
            f"{self.site.standby.address}:{free_port()}",
            self.site.standby,
            self.session,
        )
        other.root.mkdir()
        self.others.append(other)
        self.configure()
        await other.start()
        return other

    # -- requests to it -------------------------------------------------------------------------

    async def call(
        self, method: str, path: str, body: object = None, *, to: Program | None = None
    ) -> tuple[int, Any]:
        """Status and parsed answer."""
        headers = {"Authorization": f"Bearer {self.token}"}
        base = (to or self.speaks_to or self.program).api
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = io.BytesIO(json.dumps(body).encode())  # sent like a large body
        async with self.session.request(method, base + path, data=data, headers=headers) as answer:
            text = await answer.text()
            with suppress(ValueError):
                return answer.status, json.loads(text)
            return answer.status, text

    async def wish(self, name: str, present: bool = True, *, kind: str = "default",
                   timeout_s: float = 120.0) -> None:  # fmt: skip
        """Like any gateway: repeat the request until the answer is a 2xx."""
        self.unsure.add(name)
        path = f"/v1/devices/{quote(name, safe='')}"
        deadline = time.monotonic() + timeout_s
        said: object = "nothing"
        doors = cycle([self.speaks_to] if self.speaks_to else [self.program, *self.others])
        while time.monotonic() < deadline:
            served_api = next(doors)
            with suppress(aiohttp.ClientError, TimeoutError):
                if present:
                    address = self.addresses.get(name, self.site.ops.address)
                    body = {"address": address, "class": kind}
                    status, said = await self.call("PUT", path, body, to=served_api)
                else:
                    status, said = await self.call("DELETE", path, to=served_api)
                if status < 300:
                    self.wanted[name] = present
                    self.unsure.discard(name)
                    return
                if status in {400, 401, 404, 413}:
                    raise BrokenRowError(f"{name} was refused: {said}")
            await asyncio.sleep(0.2)
        raise BrokenRowError(f"{name} was not acknowledged within {timeout_s:.0f} s: {said}")

    async def wishes(self, *names: str, present: bool = True, **how: Any) -> None:
        """Many requests at once."""
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(self.wish(name, present, **how))

    def names(self, count: int, what: str = "dev") -> list[str]:
        return [f"{self.name} {what} {n:02}" for n in range(count)]

    async def settle(self, timeout_s: float = UP_S) -> float:
        """Wait until every device is as requested, in its verdict and in its processes. Returns the seconds that it
        took."""
        began = time.monotonic()
        running = {str(slug_of(DeviceId(name))) for name, wanted in self.wanted.items() if wanted}
        left: Mapping[str, Any] = {}

        async def settled() -> bool:
            nonlocal left
            with suppress(aiohttp.ClientError, TimeoutError):
                status, page = await self.call("GET", "/v1/devices?limit=1000&presence=any")
                if status != 200:
                    left = {"the API": (status, page)}
                    return False
                shown = {item["id"]: (item["verdict"], item["reason"]) for item in page["items"]}
                left = {
                    name: shown.get(name)
                    for name, wanted in self.wanted.items()
                    if shown.get(name, ("",))[0] != ("watched" if wanted else "departed")
                }
                return not left and running == {one.slug for one in self.agents()}
            return False

        try:
            await until(settled, timeout_s, "all devices are watched or departed")
        except BrokenRowError as error:
            ran = {one.slug for one in self.agents()}
            detail = f"{left}; without an agent {running - ran}, not wanted {ran - running}"
            raise BrokenRowError(f"{error}: {detail}") from None
        return time.monotonic() - began

    async def settle_from_outside(self, timeout_s: float = UP_S) -> float:
        """Like `settle`, but by the process table: one live agent per wanted device, whatever the program reports."""
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

    # -- observing it from outside --------------------------------------------------------------

    def agents(self) -> list[audit.AgentProcess]:
        prefix = self.where.job_prefix
        return [one for one in audit.processes(self.where.root) if audit.is_of(one.job, prefix)]

    def pids(self) -> set[int]:
        return {one.pid for one in self.agents()}

    async def jobs(self) -> list[Any]:
        return await audit.agents_jobs(self.session, self.where)

    async def acknowledged_is_stored(self) -> None:
        """S4, immediately: whatever was acknowledged is in the registry, even if a process has died since."""
        stored = await audit.records(self.session, self.where)
        for name, present in self.wanted.items():
            if name in self.unsure:
                continue
            record = stored.get(slug_of(DeviceId(name)))
            if record is None or (record.presence is Presence.PRESENT) is not present:
                self.broken.append(f"S4: {name} was acknowledged and is not stored")

    def undisturbed(self, pids: set[int], promise: str = "S7", *, leaving: int = 0) -> None:
        """None of these agents was stopped or restarted, except those whose devices leave."""
        gone = pids - self.pids()
        if len(gone) > leaving:
            self.broken.append(f"{promise}: {len(gone)} of {len(pids)} agents did not run through")

    async def witness(self) -> None:
        """Check twice per second for states that must never occur."""
        while True:
            self._look_at_processes()
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                await self._look_at_registry()
            with suppress(aiohttp.ClientError, TimeoutError):
                await self._look_at_verdicts()
            await asyncio.sleep(0.5)

    def _look_at_processes(self) -> None:
        now = time.monotonic()
        slugs = {one.slug for one in audit.doubled(self.where.root, self.where.job_prefix)}
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
            if item["id"] in self.may_be_offline:
                continue
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
        await canary.search(self, found)
        status = await self.status()
        found.expect(status["ready"] and not status["queue"], "L4", f"work is left: {status}")
        found.expect(not status["breaker"]["held"], "S7", f"stops are held: {status['breaker']}")
        return found

    async def _events(self, found: audit.Findings) -> None:
        _, page = await self.call("GET", "/v1/events?limit=1000")
        numbers = [event["seq"] for event in page["items"]]
        # a crash may leave a gap, and gives no number twice
        in_order = numbers == sorted(set(numbers))
        found.expect(in_order, "S5", "an event has another's number")
        for event in page["items"]:
            offline = event["kind"] == "verdict.offline"
            offline = offline and event["device"] not in self.may_be_offline
            found.expect(not offline, "S6", f"{event['device']}: {event['text']}")


def webhook_secret() -> str:
    """A new secret, as a line of the secrets file."""
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


@asynccontextmanager
async def open_world(
    name: str, root: Path, site: Site, settings: Mapping[str, Any], *, alone: bool
) -> AsyncIterator[World]:
    """An installation with nothing running yet. At the end its program and agents are removed, and, if no other row
    uses the servers, all of them run."""
    root.mkdir(parents=True)
    tag = f"f{secrets.token_hex(3)}"
    device = await asyncio.start_server(lambda _r, w: w.close(), sock=site.ops.listener())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(device)
        session = await stack.enter_async_context(site.session(10.0))
        consul: Any
        nomad: Any
        where = audit.Where(site.root, site.consul, site.nomad, tag, tag, tag)
        if site.cluster is None:
            consul = await stack.enter_async_context(Proxy(site.consul))
            nomad = await stack.enter_async_context(Proxy(site.nomad))
        else:
            consul = Direct(site.cluster.consul["c1"].http_addr)
            nomad = Direct(site.cluster.nomad["c2"].http_addr)
            # within what the shipped policies allow
            shipped = audit.Where(site.root, site.consul, site.nomad, tag)
            where = replace(shipped, kv_prefix=f"{shipped.kv_prefix}/{tag}")
        world = World(
            name=name,
            root=root,
            where=where,
            session=session,
            consul=consul,
            nomad=nomad,
            site=site,
            program=Program(root, f"{site.control.address}:{free_port()}", site.control, session),
            device_port=device.sockets[0].getsockname()[1],
            token=f"canary-{secrets.token_hex(16)}",
            webhook_secrets=[webhook_secret()],
            **settings,
        )
        world.configure()
        try:
            await world.program.command("init")
            yield world
        finally:
            for proxy in (consul, nomad):
                proxy.clear()
            async with (
                AsyncExitStack() as ending
            ):  # completes all of its steps, even when the task is cancelled
                ending.push_async_callback(_clean, world)
                if alone:
                    ending.push_async_callback(site.mend)
                for program in (world.program, *world.others):
                    ending.push_async_callback(program.stop)


async def _clean(world: World) -> None:
    """Stop the jobs of this installation, and wait until their processes have ended."""
    if world.where.nomad != world.site.nomad:  # its own Nomad ended everything
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

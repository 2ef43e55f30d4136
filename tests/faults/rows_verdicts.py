"""Rows 37 to 41: verdicts of devices whose agents can't report, are refused or can't probe, and outages that outlive
agents and control planes."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from aiohttp import web

from tests.faults.devices import Device, NameServer, open_devices, open_name_server
from tests.faults.matrix import row
from tests.faults.proxy import Exchange, Fault, Proxy
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError, until
from tests.faults.world import World

INCIDENT = 3
"""`incident.min`: number of devices of a host that make an incident."""
STALE_S = 10.0
"""`agents.report_stale` in these worlds."""
TOLD_S = 30.0
"""A verdict must be correct within this time, even on a loaded machine."""
MOVED_S = 1.5
"""Tolerance for the start of an outage: ages are rounded, and clocks of two processes are compared."""
CONFIRMED = """\
probe "tcp" {{
    port     = {0}
    interval = "1s"
    timeout  = "500ms"
    misses   = 2
  }}
  confirm "http" {{
    port    = {1}
    timeout = "500ms"
  }}
"""
"""A device is dead when both of its ports are closed."""
SERVICE = """\
probe "http" {{
    port     = {0}
    interval = "1s"
    timeout  = "500ms"
    misses   = 2
  }}
  confirm "icmp" {{
    timeout = "500ms"
  }}
  escalate {{
    degraded = true
    by       = ["class"]
    gather   = "1s"
    sink "webhook" {{
      url = "{1}"
    }}
  }}
"""
"""As in README; the webhook's receiver is the row itself."""


# -- what is told ---------------------------------------------------------------------------------


async def told(world: World) -> dict[str, Any]:
    """Every device as listed by the API, by ID."""
    status, page = await world.call("GET", "/v1/devices?limit=1000")
    if status != 200:
        raise BrokenRowError(f"the list of devices is answered with {status}: {page}")
    return {item["id"]: item for item in page["items"]}


async def all_are(
    world: World, names: Collection[str], verdict: str, *words: str, timeout_s: float = TOLD_S
) -> float:
    """Wait until each device has this verdict, and all the words in its reason. Returns the seconds that it took."""
    began = time.monotonic()
    shown: list[tuple[str, str]] = []

    async def so() -> bool:
        with suppress(aiohttp.ClientError, TimeoutError):
            items = await told(world)
            shown[:] = [(items[name]["verdict"], items[name]["reason"]) for name in names]
            return all(
                state == verdict and all(word in reason for word in words)
                for state, reason in shown
            )
        return False

    try:
        await until(so, timeout_s, f"{len(names)} devices are {verdict}")
    except BrokenRowError as error:
        raise BrokenRowError(f"{error} {words}; they are {shown}") from None
    return time.monotonic() - began


async def events(world: World, kind: str, names: Collection[str]) -> None:
    """Wait until each of these devices has an event of this kind."""

    async def there() -> bool:
        _, page = await world.call("GET", "/v1/events?limit=1000")
        return set(names) <= {e["device"] for e in page["items"] if e["kind"] == kind}

    await until(there, 10.0, f"an event {kind} of each device")


async def metric(world: World, series: str, value: float) -> None:
    """Wait until this series has this value."""

    async def so() -> bool:
        _, text = await world.call("GET", "/metrics")
        found = [line for line in text.splitlines() if line.startswith(f"{series} ")]
        return any(float(line.rpartition(" ")[2]) == value for line in found)

    await until(so, 10.0, f"{series} is {value}")


async def own_devices(world: World, devices: Sequence[Device]) -> list[str]:
    """Register each device with its own address, and wait until they are watched."""
    names = world.names(len(devices))
    world.addresses.update(zip(names, (one.address for one in devices), strict=True))
    return await watched(world, len(devices))


# -- 37: deaf agents ------------------------------------------------------------------------------


def _closed(_over: asyncio.Event) -> Fault:
    async def fault(exchange: Exchange) -> web.StreamResponse:
        return exchange.abort()

    return fault


def _mute(over: asyncio.Event) -> Fault:
    async def fault(exchange: Exchange) -> web.StreamResponse:
        await over.wait()
        return exchange.abort()

    return fault


@asynccontextmanager
async def _advertised(world: World) -> AsyncIterator[Proxy]:
    """A proxy in front of the API, as the address that agents report to."""
    async with Proxy(world.program.api) as served_api:
        world.api["advertise"] = served_api.url
        world.configure()
        yield served_api
        await world.finish()
        served_api.clear()


async def _deaf(world: World, served_api: Proxy, fault: Fault) -> None:
    names = await watched(world, 4)
    before = world.pids()
    rule = served_api.when("*", ".", fault)
    took_s = await all_are(world, names, "unwatched", "no report has reached this control plane")
    if not rule.hits:
        raise BrokenRowError("no agent has tried to report")
    if took_s < STALE_S - 4.0:  # the last report may be one interval old
        world.broken.append(f"L3: agents are called unheard after {took_s:.0f} s")
    world.notes.append(f"all were unwatched {took_s:.0f} s after the port was lost to agents")
    await events(world, "agent.unheard", names)
    await metric(world, 'nomad_watchdog_unheard_agents{reason="silent"}', len(names))
    await asyncio.sleep(5.0)
    await all_are(world, names, "unwatched", timeout_s=0.0)
    world.undisturbed(before, "L3")
    rule.off()


def _add(name: str, words: str, fault: Any) -> None:
    @row(f"37-{name}", f"the API port that agents are told {words}", stake="S6 L3")
    async def play(world: World) -> None:
        over = asyncio.Event()
        async with _advertised(world) as served_api:
            try:
                await _deaf(world, served_api, fault(over))
            finally:
                over.set()
            before = world.pids()
            await world.settle()
            await events(world, "agent.heard", list(world.wanted))
            world.undisturbed(before, "L3")


_add("closed", "breaks off every connection, until all are unwatched and longer", _closed)
_add("mute", "takes connections and answers nothing, until all are unwatched and longer", _mute)


# -- 38: a replaced key ---------------------------------------------------------------------------


@row("38-key", "the key of agents' credentials is replaced in place, and a device dies; the old key comes back",
     stake="S6 L3")  # fmt: skip
async def replaced_key(world: World) -> None:
    key = world.root / "agents.key"
    old = secrets.token_hex(32)
    key.write_text(old)
    world.api["agent_key_file"] = str(key)
    async with open_devices(4, ports=2) as devices:
        world.probes = CONFIRMED.format(*devices[0].ports)
        world.configure()
        names = await own_devices(world, devices)
        before = world.pids()
        key.write_text(secrets.token_hex(32))
        refused = ("the agent's reports are refused", "HTTP 401")
        took_s = await all_are(world, names, "unwatched", *refused)
        world.notes.append(f"all were unwatched {took_s:.0f} s after the key was replaced")
        await devices[0].down()
        await events(world, "agent.unheard", names)
        await metric(world, 'nomad_watchdog_unheard_agents{reason="refused"}', len(names))
        await asyncio.sleep(6.0)  # its agent has found it dead, and no report of that arrives
        await all_are(world, names, "unwatched", *refused, timeout_s=0.0)
        world.undisturbed(before, "L3")
        world.may_be_offline.add(names[0])
        key.write_text(old)
        await all_are(world, names[:1], "offline")
        await all_are(world, names[1:], "watched")
        await devices[0].up()
        await world.settle()
        world.undisturbed(before, "L3")
        await world.finish()


# -- 39: a failing resolver -----------------------------------------------------------------------


def _with_resolver(world: World, server: str) -> Path:
    """A program for agents: Python in its own mount namespace, whose resolver queries this server."""
    settings = world.root / "resolv.conf"
    settings.write_text(f"nameserver {server}\noptions timeout:5 attempts:1\n")
    path = world.root / "agent"
    path.write_text(
        "#!/bin/sh\n"
        f"exec unshare --mount sh -c 'mount --bind {settings} /etc/resolv.conf && "
        f'exec {sys.executable} "$@"\' agent "$@"\n'
    )
    path.chmod(0o755)
    return path


@asynccontextmanager
async def _named(world: World, count: int) -> AsyncIterator[NameServer]:
    """This many devices that are registered by name, and the name server of their agents."""
    async with open_devices(count, ports=2) as devices:
        zone = {f"dev-{n}.watchdog.test": one.address for n, one in enumerate(devices)}
        async with open_name_server(zone) as server:
            world.python = str(_with_resolver(world, server.address))
            world.probes = CONFIRMED.format(*devices[0].ports)
            world.configure()
            world.addresses.update(zip(world.names(count), zone, strict=True))
            yield server


@row("39-resolver", "the resolver of the agents' host fails, and devices with names go on answering",
     stake="S6")  # fmt: skip
async def failing_resolver(world: World) -> None:
    async with _named(world, 6) as server:
        names = await watched(world, 6)
        if not server.asked:
            raise BrokenRowError("no agent has asked the name server")
        before = world.pids()
        server.down()
        took_s = await all_are(world, names, "unwatched", "resolve")
        world.notes.append(f"all were unwatched {took_s:.0f} s after the resolver failed")
        await _host_incidents(world, names)
        world.undisturbed(before, "L3")
        await server.up()
        await world.settle()
        world.undisturbed(before, "L3")
        await world.finish()


@row("39-slow", "the resolver of the agents' host answers later than every timeout of their probes for 12 s",
     stake="S6 L3")  # fmt: skip
async def slow_resolver(world: World) -> None:
    async with _named(world, 4) as server:
        await watched(world, 4)
        before, asked = world.pids(), server.asked
        server.late_s = 1.2
        await asyncio.sleep(12.0)
        if server.asked - asked < 4:
            raise BrokenRowError("hardly an agent has asked the slow name server")
        server.late_s = 0.0
        world.undisturbed(before, "L3")
        await world.settle()
        await world.finish()


async def _host_incidents(world: World, names: Collection[str]) -> None:
    """One incident per host with enough such devices, and none of another kind."""
    items = await told(world)
    agents = Counter(items[name]["node"] for name in names)
    hosts = {node for node, count in agents.items() if count >= INCIDENT}
    if not hosts:
        raise BrokenRowError("no host has agents of three devices")
    shown: list[Any] = []

    async def opened() -> bool:
        _, page = await world.call("GET", "/v1/incidents")
        shown[:] = [(one["kind"], one["group"]) for one in page["items"] if one["open"]]
        return len(shown) >= len(hosts)

    await until(opened, 20.0, "an incident of the host is opened")
    if sorted(shown) != sorted(("host", node) for node in hosts):
        world.broken.append(f"S6: a failed resolver of {hosts} makes incidents of {shown}")


# -- 40: a dead service on a live host ------------------------------------------------------------


@row("40-service", "the web service of four devices dies, and their hosts answer pings", stake="S6")
async def dead_service(world: World) -> None:
    async with open_devices(4) as devices, open_devices(1) as (people,):
        told_at = f"http://{people.address}:{people.ports[0]}/alerts"
        world.probes = SERVICE.format(devices[0].ports[0], told_at)
        world.configure()
        names = await own_devices(world, devices)
        before = world.pids()
        for device in devices:
            await device.down()
        took_s = await all_are(world, names, "degraded", "but icmp answers")
        world.notes.append(f"all were degraded {took_s:.0f} s after their service had died")
        await events(world, "verdict.degraded", names)
        await metric(world, 'nomad_watchdog_devices{verdict="degraded"}', len(names))
        await until(lambda: _alerted(people) == set(names), TOLD_S, "people are told of each")
        await asyncio.sleep(5.0)
        await all_are(world, names, "degraded", timeout_s=0.0)
        for device in devices:
            await device.up()
        await world.settle()
        await until(lambda: _ended(people), TOLD_S, "people are told that it is over")
        world.undisturbed(before, "L3")
        await world.finish()


def _alerted(people: Device) -> set[str]:
    """Devices that were named in an alert."""
    alerts = [one for one in people.posted if one["status"] != "resolved"]
    return {device for one in alerts if one["kind"] == "degraded" for device, _ in one["devices"]}


def _ended(people: Device) -> bool:
    """Whether every alert has been resolved."""
    over = {one["episode"] for one in people.posted if one["status"] == "resolved"}
    return {one["episode"] for one in people.posted} == over


# -- 41: an outage during a roll-out --------------------------------------------------------------


class Outage:
    """Checks twice per second that these devices stay offline since the same moment."""

    def __init__(self, world: World, names: Collection[str]) -> None:
        self.world, self.names = world, names
        self.began: dict[str, tuple[float, float]] = {}
        """Each outage began between these two times, according to all reads so far."""
        self.looks = 0

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Check until the end of the block."""
        watching = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
        if not self.looks:
            raise BrokenRowError("no look at the outage succeeded")
        self.world.notes.append(
            f"{self.looks} looks found {len(self.names)} dead devices in {len(self.world.wanted)}"
        )

    async def _watch(self) -> None:
        while True:
            with suppress(aiohttp.ClientError, TimeoutError, BrokenRowError):
                asked_at = time.time()
                self._look(await told(self.world), asked_at, time.time())
            await asyncio.sleep(0.5)

    def _look(self, items: dict[str, Any], asked_at: float, answered_at: float) -> None:
        self.looks += 1
        for name in self.names:
            item = items[name]
            if item["verdict"] != "offline":
                self.world.broken.append(
                    f"L2: {name} is dead and called {item['verdict']}: {item['reason']}"
                )
                continue
            now = (asked_at - item["since_s"], answered_at - item["since_s"])
            before = self.began.get(name, now)
            begins, ends = max(now[0], before[0]), min(now[1], before[1])
            if begins > ends + MOVED_S:
                self.world.broken.append(
                    f"L2: the outage of {name} has moved by {begins - ends:.0f} s"
                )
                continue
            self.began[name] = (begins, ends)


@row("41-roll-out", "devices are dead while their class rolls out and the control plane is killed (-9) in between",
     stake="S6 L2", more="rollout {\n  at_once = 2\n}\n")  # fmt: skip
async def outage_in_roll_out(world: World) -> None:
    async with open_devices(10, ports=2) as devices:
        world.probes = CONFIRMED.format(*devices[0].ports)
        world.configure()
        names = await own_devices(world, devices)
        dead, alive = names[:2], names[2:]
        world.may_be_offline.update(dead)
        for device in devices[:2]:
            await device.down()
        await all_are(world, dead, "offline")
        async with Outage(world, dead).watched():
            await _roll_out_and_die(world, len(names))
            await all_are(world, alive, "watched")
            await _confirmed_anew(world, dead)
        for device in devices[:2]:
            await device.up()
        await world.settle()
        await world.finish()


async def _roll_out_and_die(world: World, count: int) -> None:
    """The class changes; the control plane dies when some agents are replaced, and is restarted."""
    before = world.pids()
    world.version = "2"
    world.configure()
    world.program.running.send(signal.SIGHUP)
    await until(lambda: len(world.pids() - before) >= 3, TOLD_S, "some agents are replaced")
    left = len(before & world.pids())
    world.program.kill_now()
    if not left:
        raise BrokenRowError("the roll-out was over before the control plane was killed")
    await world.program.start()

    def replaced() -> bool:
        now = world.pids()
        return not before & now and len(now) == count

    await until(replaced, 90.0, "every agent is replaced")


async def _confirmed_anew(world: World, names: Collection[str]) -> None:
    """The agents that run now have confirmed themselves that these devices are dead."""
    shown: dict[str, Any] = {}

    async def confirmed() -> bool:
        for name in names:
            path = f"/v1/devices/{quote(name, safe='')}/explain"
            _, shown[name] = await world.call("GET", path)
        return all(_is_confirmed(one) for one in shown.values())

    try:
        await until(confirmed, TOLD_S, "the new agents confirm the outage")
    except BrokenRowError as error:
        raise BrokenRowError(f"{error}: {shown}") from None


def _is_confirmed(shown: dict[str, Any]) -> bool:
    report = shown["report"]
    new = report is not None and report["epoch"] == shown["desired"]["epoch"]
    return bool(new and report["state"] == "offline" and report["confirmed"])

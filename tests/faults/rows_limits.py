"""Rows that use up what servers limit (connections, disk), and roll-outs of versions that don't work."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from servers.consul import ConsulServer
from servers.nomad import NomadServer
from tests.faults import proxy
from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.rows_own import MOCK
from tests.faults.site import BrokenRowError, Direct, limited_folder, until
from tests.faults.world import World

# -- connections ----------------------------------------------------------------------------------


def _hold(url: str, most: int = 400) -> list[socket.socket]:
    """Open connections until the server refuses one, like a client on this host that leaks them."""
    place = urlsplit(url)
    held: list[socket.socket] = []
    for _ in range(most):
        one = socket.create_connection((place.hostname, place.port or 80), timeout=2.0)
        held.append(one)
        one.settimeout(0.02)
        with suppress(TimeoutError):
            if b" 429 " in one.recv(64):
                return held
    raise BrokenRowError(f"{url} takes {most} connections and refuses none")


async def _crowded(world: World, url: str) -> None:
    """For 15 s, while devices are added and leave, every new connection from this host is answered with 429."""
    names = sorted(world.wanted)
    before = world.pids()
    held = await asyncio.to_thread(_hold, url)
    refused = 0
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(world.wishes(*world.names(4, "new")))
            group.create_task(world.wish(names[0], present=False))
            for _ in range(15):
                # take connections again that were freed meanwhile (such as a closed one of the control plane)
                with suppress(OSError, BrokenRowError):
                    held += await asyncio.to_thread(_hold, url)
                    refused += 1
                await asyncio.sleep(1.0)
            world.undisturbed(before, "L3", leaving=1)
            for one in held:
                one.close()
            held = []
    finally:
        for one in held:
            one.close()
    world.notes.append(f"{refused} of 15 looks found the server refusing connections")
    if refused < 10:
        raise BrokenRowError("the server hardly ever refused a connection")
    await world.settle()


@row("22-nomad-full", "all connections that Nomad allows a host are taken for 15 s (real 429)",
     stake="S9 L1 L3", lane="alone")  # fmt: skip
async def nomad_full(world: World) -> None:
    world.nomad = Direct(world.site.nomad)  # type: ignore[assignment]  # the limit counts real connections
    world.configure()
    await watched(world, 4)
    await _crowded(world, world.site.nomad)


@row("22-consul-full", "all connections that Consul allows a host are taken for 15 s (real 429)",
     stake="S4 S9 L3", lane="alone")  # fmt: skip
async def consul_full(world: World) -> None:
    world.consul = Direct(world.site.consul)  # type: ignore[assignment]
    world.configure()
    await watched(world, 4)
    await _crowded(world, world.site.consul)


@row("22-fleet", "Nomad answers everything with 500 for 20 s to 300 devices that want something",
     stake="S9", registry="sqlite", template=MOCK)  # fmt: skip
async def fleet_in_storm(world: World) -> None:
    async with NomadServer(world.root / "nomad") as nomad:
        world.where = replace(world.where, root=nomad.data_dir, nomad=nomad.http_addr)
        world.nomad.upstream = nomad.http_addr
        world.configure()
        await world.program.start()
        world.nomad.when("*", r".", proxy.instead(500, b"too much of it"))
        names = world.names(300)
        body = {"devices": [{"id": n, "class": "default", "address": "127.0.0.1"} for n in names]}
        asked, began = world.nomad.requests, time.monotonic()
        status, said = await world.call("POST", "/v1/devices:bulk", body)
        if status >= 300:
            raise BrokenRowError(f"a bulk of wishes is answered with {status}: {str(said)[:200]}")
        await asyncio.sleep(20.0)
        rate = (world.nomad.requests - asked) / (time.monotonic() - began)
        world.notes.append(f"{rate:.1f} calls a second were made into the storm for 300 devices")
        # Seven devices may make 1.5 each (`22-500`); more would mean that calls grow with the fleet.
        if rate > 10.5:
            world.broken.append(f"S9: {rate:.0f} calls a second into the storm for 300 devices")
        world.nomad.clear()

        async def placed() -> bool:
            return len({job["Meta"]["device_id"] for job in await world.jobs()}) == len(names)

        await until(placed, 90.0, "each device has a child")
        await world.finish()
        await world.program.running.terminate()


# -- disks ----------------------------------------------------------------------------------------


@asynccontextmanager
async def _full(folder: Path) -> AsyncIterator[Callable[[], None]]:
    """Fill this file system. The yielded function also takes what a server has freed meanwhile."""
    ballast = folder / "ballast"

    def fill() -> None:
        with ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    await asyncio.to_thread(fill)
    try:
        yield fill
    finally:
        ballast.unlink()


async def _with_full_disk(world: World, folder: Path, mend: Callable[[], Awaitable[None]]) -> None:
    names = await watched(world, 4)
    before = world.pids()
    async with asyncio.TaskGroup() as group:
        async with _full(folder) as fill:
            group.create_task(world.wishes(*world.names(3, "new")))
            group.create_task(world.wish(names[0], present=False))
            # the server's logs and stores grow through this, so that it notices
            for _ in range(15):
                await asyncio.sleep(1.0)
                await asyncio.to_thread(fill)
                stats = os.statvfs(folder)
                if stats.f_bavail * stats.f_frsize > 1 << 20:
                    raise BrokenRowError("the disk was not full")
            world.undisturbed(before, "L3", leaving=1)
        await mend()
    await world.acknowledged_is_stored()
    await world.settle()


@row("24-consul", "the disk of Consul's own data is full for 15 s", stake="S4 L3")
async def consul_disk(world: World) -> None:
    folder = world.root / "small"
    with limited_folder(folder, "256m"):
        async with (
            ConsulServer(folder / "consul") as consul,
            NomadServer(world.root / "nomad", consul.http_addr) as nomad,
        ):
            _move(world, nomad, consul.http_addr)
            await world.program.command("init")

            async def mend() -> None:
                """Restart a server that the full disk has ended, as a supervisor would."""
                await consul.start()

            await _with_full_disk(world, folder, mend)
            await world.finish()
            await world.program.running.terminate()


@row("24-nomad", "the disk of Nomad's own data, its client's too, is full for 15 s", stake="L1 L3")
async def nomad_disk(world: World) -> None:
    folder = world.root / "small"
    with limited_folder(folder, "256m"):
        async with NomadServer(folder / "nomad", world.site.consul) as nomad:
            _move(world, nomad, world.site.consul)

            async def mend() -> None:
                """Restart a server that the full disk has ended, as a supervisor would."""
                await nomad.restart()
                await nomad.wait_ready()

            await _with_full_disk(world, folder, mend)
            await world.finish()
            await world.program.running.terminate()


def _move(world: World, nomad: NomadServer, consul: str) -> None:
    world.where = replace(world.where, root=nomad.data_dir, nomad=nomad.http_addr, consul=consul)
    world.nomad.upstream = nomad.http_addr
    world.consul.upstream = consul
    world.configure()


# -- versions that don't work ---------------------------------------------------------------------

FLEET = 12
WINDOW = 5
"""`rollout.at_once`; more than a tenth of the fleet."""


async def _roll_out_bad(world: World, program: Path) -> None:
    """A version whose agents never get ready stops at its window, and the next version fixes it."""
    await watched(world, FLEET)
    before = world.pids()
    good_python = world.python
    await world.program.running.terminate()
    world.version, world.python = "2", str(program)
    world.configure()
    await world.program.start()

    async def stopped() -> bool:
        return bool((await world.status())["waiting_rollout"] == FLEET - WINDOW)

    await until(stopped, 60.0, "the roll-out stops at its window")
    await asyncio.sleep(15.0)
    world.undisturbed(before, "S7", leaving=WINDOW)
    waiting = (await world.status())["waiting_rollout"]
    world.notes.append(f"{waiting} of {FLEET} agents kept the version that works")
    await world.program.running.terminate()
    world.version, world.python = "3", good_python
    world.configure()
    await world.program.start()
    world.notes.append(f"the next version was everywhere after {await world.settle():.0f} s")


def _program(world: World, text: str) -> Path:
    path = world.root / "agent-2"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


@row("33-never", "a version is rolled out whose agents never get ready", stake="S7 L1")
async def never_ready(world: World) -> None:
    await _roll_out_bad(world, _program(world, "exec sleep 3600"))


@row("33-dies", "a version is rolled out whose agents die at once", stake="S7 S9 L1")
async def dies_at_once(world: World) -> None:
    await _roll_out_bad(world, _program(world, "exit 1"))

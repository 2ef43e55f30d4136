"""Rows that need their own Nomad: ten thousand devices, a revoked token."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

from servers.nomad import NomadServer
from tests.faults.matrix import row
from tests.faults.rows_crash import watched
from tests.faults.site import BrokenRowError, Direct, until
from tests.faults.world import World

MANY = 10_000
CLIENTS = 24
"""Nomad's cost of placing one more job grows with what its node runs: with 8 nodes, the last of 10,000 take Nomad 1.6.3
140 ms each, with 24 nodes 40 ms (`nomad.worker.invoke_scheduler.batch`)."""
MOCK = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"


async def live(world: World) -> Counter[str]:
    """Devices by their live children; a device with two ends the row."""
    found: Counter[str] = Counter()
    following = ""
    while True:
        path = f"/v1/jobs?prefix={world.where.job_prefix}/&meta=true&per_page=1000"
        url = f"{world.where.nomad}{path}&next_token={quote(following)}"
        async with world.session.get(url) as answer:
            answer.raise_for_status()
            jobs: list[Any] = await answer.json()
            following = answer.headers.get("X-Nomad-NextToken", "")
        found.update(job["Meta"]["device_id"] for job in jobs if not job["Stop"])
        if not following:
            break
    twice = [name for name, count in found.items() if count > 1]
    if twice:
        raise BrokenRowError(f"S2: {len(twice)} devices have two live children, {twice[0]} for one")
    return found


async def all_at_once(world: World, names: list[str], *, present: bool) -> float:
    """Send one request for all of them; returns the seconds until Nomad matches it."""
    began = time.monotonic()
    for first in range(0, MANY, 1000):
        part = names[first : first + 1000]
        wishes = [{"id": n, "class": "default", "address": "127.0.0.1"} for n in part]
        body = {"devices": wishes} if present else {"delete": part}

        async def acknowledged(body: object = body) -> bool:
            with suppress(aiohttp.ClientError, TimeoutError):  # sent again, as by any gateway
                status, said = await world.call("POST", "/v1/devices:bulk", body)
                if status >= 300:
                    raise BrokenRowError(
                        f"a bulk of wishes is answered with {status}: {str(said)[:200]}"
                    )
                return True
            return False

        await until(acknowledged, 60.0, "a bulk of wishes is answered")
    wanted = MANY if present else 0
    cost_s = 0.1

    async def done() -> bool:
        nonlocal cost_s
        await asyncio.sleep(max(2.0, 20.0 * cost_s))  # listing ten thousand jobs is expensive
        asked = time.monotonic()
        found = -1
        with suppress(aiohttp.ClientError, TimeoutError):  # no answer in time: poll again
            found = len(await live(world))
        cost_s = time.monotonic() - asked
        return found == wanted

    await until(done, 600.0, f"{wanted} devices have a child each")
    return time.monotonic() - began


@row(
    "31-mass",
    "10,000 devices come, vanish at once, and return at once",
    stake="S2 S7 L4",
    lane="mass",
    deadline_s=1800.0,
    registry="sqlite",
    template=MOCK,
)
async def mass(world: World) -> None:
    memory = Path("/dev/shm")  # the disk is not under test, and a client writes a lot
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        Path(folder).chmod(0o755)
        async with NomadServer(Path(folder) / "nomad", clients=CLIENTS, unprivileged=True) as nomad:
            await come_and_go(world, nomad)


async def come_and_go(world: World, nomad: NomadServer) -> None:
    world.where = replace(world.where, root=nomad.data_dir, nomad=nomad.http_addr)
    world.nomad = Direct(nomad.http_addr)  # type: ignore[assignment]
    world.configure()
    await world.program.start()
    names = [f"{world.name} {number:05}" for number in range(MANY)]
    took = [await all_at_once(world, names, present=present) for present in (True, False, True)]
    world.notes.append(
        f"all placed after {took[0]:.0f} s, all stopped after {took[1]:.0f} s, all placed again "
        f"after {took[2]:.0f} s"
    )
    _, text = await world.call("GET", "/metrics")
    holds = "nomad_watchdog_breaker_holds_total "
    count = float(next(x for x in text.splitlines() if x.startswith(holds)).split()[-1])
    if count < 1:
        world.broken.append("S7: 10,000 stops were not held for a second read")
    await world.finish()
    await world.program.running.terminate()


@row("35-token", "Nomad's token is revoked while devices come, and another is put in its file 15 s later",
     stake="S9 L1 L3")  # fmt: skip
async def token_revoked(world: World) -> None:
    consul = world.servers.consul.http_addr
    async with NomadServer(world.root / "nomad", consul, acl=True) as nomad:
        world.where = replace(world.where, root=nomad.data_dir, nomad=nomad.http_addr)
        world.nomad.upstream = nomad.http_addr
        world.session.headers["X-Nomad-Token"] = nomad.token
        world.nomad_token = world.root / "nomad.token"
        policy = Path(__file__).parents[2] / "jobs" / "policies" / "nomad-reconciler.hcl"
        rules = {"Name": "reconciler", "Rules": policy.read_text()}
        await nomad.request("PUT", "/v1/acl/policy/reconciler", rules)
        made = {"Name": "reconciler", "Type": "client", "Policies": ["reconciler"]}
        token = await nomad.request("PUT", "/v1/acl/token", made)
        world.nomad_token.write_text(token["SecretID"])
        world.configure()
        names = await watched(world, 3)
        before = world.pids()
        await nomad.request("DELETE", f"/v1/acl/token/{token['AccessorID']}")
        asked, began = world.nomad.requests, time.monotonic()
        await world.wishes(*world.names(3, "new"))
        await world.wish(names[0], present=False)
        await asyncio.sleep(15.0)
        rate = (world.nomad.requests - asked) / (time.monotonic() - began)
        world.notes.append(f"{rate:.1f} calls a second were made without a right to any")
        if rate > 10.0:
            world.broken.append(f"S9: {rate:.0f} calls a second into a server that denies them")
        world.undisturbed(before, "L3", leaving=1)
        fresh = await nomad.request("PUT", "/v1/acl/token", made)
        world.nomad_token.write_text(fresh["SecretID"])
        await world.settle()
        await world.finish()
        await world.program.running.terminate()

"""The smoke test of any running cluster: `make cluster-test`.

From the environment: NOMAD_ADDR, NOMAD_CACERT, NOMAD_TOKEN (it may read and stop jobs) and
NOMAD_WATCHDOG_TOKEN_FILE (the operator's). All devices that it registers are removed at the end."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp

DEVICES = [f"smoke-{number}" for number in range(6)]
SLOW_S = 120.0


class Cluster:
    """Calls to Nomad and to the control planes."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http
        self.nomad_addr = os.environ["NOMAD_ADDR"]
        self.nomad_token = {"X-Nomad-Token": os.environ["NOMAD_TOKEN"]}
        token = Path(os.environ["NOMAD_WATCHDOG_TOKEN_FILE"]).read_text().strip()
        self.token = {"Authorization": f"Bearer {token}"}

    async def nomad(self, path: str, method: str = "GET") -> Any:
        url = self.nomad_addr + path
        async with self.http.request(method, url, headers=self.nomad_token) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None)

    async def planes(self) -> dict[str, str]:
        """Allocation → API of each running control plane."""
        found = {}
        for row in await self.nomad("/v1/job/nomad-watchdog/allocations"):
            if row["ClientStatus"] == "running" and row["DesiredStatus"] == "run":
                shown = await self.nomad(f"/v1/allocation/{row['ID']}")
                (port,) = shown["AllocatedResources"]["Shared"]["Ports"]
                found[row["ID"]] = f"http://{port['HostIP']}:{port['Value']}"
        return found

    async def call(self, method: str, api: str, path: str, body: object = None) -> Any:
        async with self.http.request(method, api + path, json=body, headers=self.token) as answer:
            answer.raise_for_status()
            return await answer.json(content_type=None) if answer.status != 204 else None

    async def any_plane(self) -> str:
        return next(iter((await self.planes()).values()))


async def until(what: str, test: Callable[[], Awaitable[Any]], timeout_s: float = SLOW_S) -> Any:
    """The result of the test once it is true. Raises AssertionError with the last result if it never is."""
    deadline = time.monotonic() + timeout_s
    last: object = None
    while time.monotonic() < deadline:
        try:
            if last := await test():
                return last
        except (aiohttp.ClientError, TimeoutError, OSError, KeyError, StopIteration) as error:
            last = repr(error)
        await asyncio.sleep(0.5)
    raise AssertionError(f"{what}: not within {timeout_s:g} s; last: {last}")


async def nomad_is_whole_and_guarded(cluster: Cluster) -> None:
    """Three servers, at least two clients, TLS only, and no access without a token."""
    assert cluster.nomad_addr.startswith("https://"), cluster.nomad_addr
    assert len(await cluster.nomad("/v1/status/peers")) >= 3
    nodes = await cluster.nomad("/v1/nodes")
    assert sum(node["Status"] == "ready" for node in nodes) >= 2, nodes
    async with cluster.http.get(f"{cluster.nomad_addr}/v1/jobs") as answer:
        assert answer.status == 403 or await answer.json() == [], answer.status
    plain = cluster.nomad_addr.replace("https://", "http://")
    try:
        async with cluster.http.get(f"{plain}/v1/status/leader") as answer:
            assert answer.status == 400, answer.status
    except aiohttp.ClientError:
        pass  # refused is as good


async def two_control_planes_share_the_shards(cluster: Cluster) -> None:
    """Two replicas on two hosts know each other and hold every shard between them."""

    async def shared() -> Any:
        apis = set((await cluster.planes()).values())
        if len(apis) != 2:
            return None
        leases = await cluster.call("GET", min(apis), "/v1/leases")
        held = {one["holder"] for one in leases["shards"]}
        known = {one["api"] for one in leases["replicas"]}
        return apis <= known and "" not in held and leases

    await until("two replicas that hold all shards", shared)


async def the_door_is_shut(cluster: Cluster) -> None:
    """Without a token the API answers 401 to a change and to a read."""
    api = await cluster.any_plane()
    for method, path in (("PUT", "/v1/devices/x"), ("GET", "/v1/devices")):
        async with cluster.http.request(
            method, api + path, json={"address": "127.0.0.1"}
        ) as answer:
            assert answer.status == 401, (method, answer.status)


async def devices_are_watched_by_one_agent_each(cluster: Cluster) -> None:
    """Six simulated devices become watched, each with one running child in Nomad."""
    api = await cluster.any_plane()
    for number, name in enumerate(DEVICES):
        wish = {"address": f"127.18.0.{number + 1}"}
        await cluster.call("PUT", api, f"/v1/devices/{name}", wish)
    await until("all devices are watched", lambda: watched(cluster, DEVICES))
    running = await children(cluster)
    assert all(running[name] == 1 for name in DEVICES), running


async def watched(cluster: Cluster, names: list[str]) -> dict[str, int] | None:
    """Device → epoch when all are watched, as reported by each control plane."""
    epochs: dict[str, int] = {}
    for api in (await cluster.planes()).values():
        for name in names:
            shown = await cluster.call("GET", api, f"/v1/devices/{name}")
            if shown["verdict"] != "watched":
                return None
            epochs[name] = shown["epoch"]
    return epochs or None


async def children(cluster: Cluster) -> dict[str, int]:
    """Device → number of its children that run in Nomad."""
    found = dict.fromkeys(DEVICES, 0)
    jobs = await cluster.nomad("/v1/jobs?meta=true&prefix=device-watchdog")
    for job in jobs:
        name = (job.get("Meta") or {}).get("device_id", "")
        if name in found and job["Status"] != "dead":
            allocs = await cluster.nomad(f"/v1/job/{quote(job['ID'], safe='')}/allocations")
            found[name] += sum(one["ClientStatus"] == "running" for one in allocs)
    return found


async def consul_knows_the_agents(cluster: Cluster) -> None:
    """The control plane has a fresh view of Consul's health checks, with its own token."""

    async def seen() -> Any:
        api = await cluster.any_plane()
        async with cluster.http.get(f"{api}/metrics", headers=cluster.token) as answer:
            lines = (await answer.text()).splitlines()
        name = "nomad_watchdog_consul_view_age_seconds "
        ages = [float(line.split()[1]) for line in lines if line.startswith(name)]
        return ages and ages[0] < 60.0

    await until("a fresh view of Consul", seen)


async def a_lost_control_plane_is_replaced_and_touches_no_agent(cluster: Cluster) -> None:
    """The holder of shard 0 is stopped: the other replica takes over, Nomad starts a new one, and no epoch changes."""
    before = await watched(cluster, DEVICES)
    assert before, "not all are watched"
    planes = await cluster.planes()
    leases = await cluster.call("GET", next(iter(planes.values())), "/v1/leases")
    holder = next(one["api"] for one in leases["shards"] if one["shard"] == 0)
    (lost,) = (alloc for alloc, api in planes.items() if api == holder)
    await cluster.nomad(f"/v1/allocation/{lost}/stop", "POST")

    async def replaced() -> bool:
        return lost not in await cluster.planes()

    await until("the stopped one is gone", replaced)
    await two_control_planes_share_the_shards(cluster)
    after = await until("all devices are watched again", lambda: watched(cluster, DEVICES))
    assert after == before, (before, after)


async def a_pool_is_scaled(cluster: Cluster) -> None:
    """The pool `spare` is scaled up by one worker and down again with only the shipped policies."""

    async def has(count: int) -> bool:
        rows = (await cluster.call("GET", await keeper(cluster), "/v1/pools"))["items"]
        row = next(row for row in rows if row["name"] == "spare")
        return bool(row["count"] == row["running"] == count)

    async def scaled(count: int) -> bool:
        await cluster.call("POST", await keeper(cluster), "/v1/pools/spare/scale", {"count": count})
        return True

    for count in (2, 1):
        await until(f"scale to {count} is taken", lambda count=count: scaled(count))
        await until(f"{count} workers run", lambda count=count: has(count))


async def keeper(cluster: Cluster) -> str:
    for api in (await cluster.planes()).values():
        if (await cluster.call("GET", api, "/v1/pools"))["keeper"]:
            return api
    raise TimeoutError("nobody keeps the pools now")


async def devices_that_leave_have_no_agent(cluster: Cluster) -> None:
    """After a deregistration no child of the device runs."""
    api = await cluster.any_plane()
    for name in DEVICES:
        await cluster.call("DELETE", api, f"/v1/devices/{name}")

    async def gone() -> bool:
        return not any((await children(cluster)).values())

    await until("no agent runs", gone)


async def no_control_plane_has_crashed(cluster: Cluster) -> None:
    """Both replicas still run, and Nomad never had to restart one."""
    planes = await cluster.planes()
    assert len(planes) == 2, planes
    for alloc in planes:
        shown = await cluster.nomad(f"/v1/allocation/{alloc}")
        (task,) = shown["TaskStates"].values()
        events = [event["DisplayMessage"] for event in task["Events"]]
        assert task["Restarts"] == 0, events


STEPS = (
    nomad_is_whole_and_guarded,
    two_control_planes_share_the_shards,
    the_door_is_shut,
    devices_are_watched_by_one_agent_each,
    consul_knows_the_agents,
    a_lost_control_plane_is_replaced_and_touches_no_agent,
    a_pool_is_scaled,
    devices_that_leave_have_no_agent,
    no_control_plane_has_crashed,
)


async def main() -> int:
    wanted = ("NOMAD_ADDR", "NOMAD_CACERT", "NOMAD_TOKEN", "NOMAD_WATCHDOG_TOKEN_FILE")
    if missing := [name for name in wanted if not os.environ.get(name)]:
        print(f"cluster-test: set {', '.join(missing)}; see docs/cluster.md", file=sys.stderr)
        return 64
    tls = ssl.create_default_context(cafile=os.environ["NOMAD_CACERT"])
    connector = aiohttp.TCPConnector(ssl=tls)
    timeout = aiohttp.ClientTimeout(total=10.0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        cluster = Cluster(http)
        for number, step in enumerate(STEPS):
            began = time.monotonic()
            said = (step.__doc__ or "").split("\n")[0]
            try:
                await step(cluster)
            except (AssertionError, aiohttp.ClientError, TimeoutError, OSError) as error:
                print(f"FAILED  {said}\n        {type(error).__name__}: {error}")
                print(f"{number} passed, 1 failed")
                return 1
            print(f"ok  {time.monotonic() - began:5.1f} s  {said}", flush=True)
    print(f"{len(STEPS)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

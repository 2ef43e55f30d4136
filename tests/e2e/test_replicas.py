"""Several control plane processes on one Nomad and one Consul: which one acts, and which one takes
over.

Agents use Nomad's mock driver: the tests check which replica dispatches, and that no start is
dispatched twice.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.consul import ConsulAccess, ConsulClient
from nomad_watchdog.demo.process import clean_environment
from nomad_watchdog.errors import TransientError
from nomad_watchdog.registry.consul import ConsulRegistry
from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]

TEMPLATE = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"
CONFIG = """\
backend   = "nomad"
shards    = SHARDS
lease_ttl = "2s"
data_dir  = "{root}"
api {
  listen = "127.0.0.1:{port}"
}
nomad {
  address    = "NOMAD"
  job_prefix = "PREFIX"
}
consul {
  address       = "CONSUL"
  prefix        = "PREFIX"
  agent_address = ""
}
agent_class "default" {
  template = "TEMPLATE"
  probe "icmp" {}
}
"""


@dataclass(frozen=True, slots=True)
class World:
    nomad: NomadServer
    prefix: str
    planes: tuple[ControlPlane, ...]

    async def jobs(self) -> list[dict[str, Any]]:
        """All children that were ever dispatched, including stopped ones."""
        found = await self.nomad.request("GET", f"/v1/jobs?prefix={self.prefix}&meta=true")
        return [job for job in found if job.get("ParentID")]

    async def placed(self) -> Counter[tuple[str, str]]:
        jobs = await self.jobs()
        return Counter((job["Meta"]["device_id"], job["Meta"]["epoch"]) for job in jobs)

    async def devices(self) -> set[str]:
        return {name for name, _ in await self.placed()}

    async def holder(self) -> ControlPlane:
        """The replica that holds shard 0, once there is one."""

        async def one() -> ControlPlane | None:
            for plane in self.planes:
                if plane.process.returncode is None and 0 in await plane.held():
                    return plane
            return None

        found = await eventually(one, 60.0)
        assert isinstance(found, ControlPlane)
        return found

    def other(self, one: ControlPlane) -> ControlPlane:
        return next(plane for plane in self.planes if plane is not one)


@asynccontextmanager
async def replicas(
    folder: Path, nomad: NomadServer, consul: ConsulServer, *names: str, shards: int = 1
) -> AsyncIterator[World]:
    prefix = f"r{uuid.uuid4().hex[:8]}"
    config = CONFIG
    for word, value in {
        "SHARDS": str(shards),
        "NOMAD": nomad.http_addr,
        "CONSUL": consul.http_addr,
        "PREFIX": prefix,
        "TEMPLATE": str(TEMPLATE),
    }.items():
        config = config.replace(word, value)
    client = ConsulClient(ConsulAccess(address=consul.http_addr))
    try:
        await ConsulRegistry(client=client, prefix=prefix).initialise()
    finally:
        await client.close()
    async with AsyncExitStack() as stack:
        planes = [
            await stack.enter_async_context(ControlPlane(folder, name, config)) for name in names
        ]
        yield World(nomad, prefix, tuple(planes))


async def test_every_replica_takes_wishes_and_one_dispatches(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """A device registered with a replica that holds nothing is dispatched once, by the other
    replica."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        holder = await world.holder()
        standby = world.other(holder)
        await standby.register("pump")
        await eventually(world.jobs)
        assert await world.placed() == {("pump", "1"): 1}
        status = await standby.call("GET", "/v1/status")
        assert status["holds"] == "0 of 1 shards"
        leases = await standby.call("GET", "/v1/leases")
        assert leases["shards"][0]["api"] == holder.api
        assert {one["api"] for one in leases["replicas"]} == {holder.api, standby.api}
        why = await standby.call("GET", "/v1/devices/pump/explain")
        assert why["next"].startswith(f"decided by {leases['shards'][0]['holder']}")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_l2_who_is_left_goes_on(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer, end: signal.Signals
) -> None:
    """However the holder ends, the other replica dispatches what comes next, and touches nothing
    else. Its events report which replica left, who took over its shard, and that the other joined
    when it comes back."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        holder = await world.holder()
        heir = world.other(holder)
        for number in range(5):
            await holder.register(f"before {number}")

        async def all_up() -> bool:
            return len(await world.devices()) == 5

        await eventually(all_up, 60.0)
        gone = (await holder.call("GET", "/v1/leases"))["replica"]
        # The successor reads the members every quarter of a second: a replica that it has never
        # seen can't be missed.
        await eventually(
            lambda: gone in heir.process.log.read_text().partition("replicas are known")[2], 60.0
        )
        left = (await heir.call("GET", "/v1/leases"))["replica"]
        holder.process.send(end)
        await heir.register("after")

        async def taken_over() -> bool:
            return "after" in await world.devices()

        await eventually(taken_over, 60.0)
        assert await heir.held() == {0}
        assert set((await world.placed()).values()) == {1}
        assert not any(job["Stop"] for job in await world.jobs())

        async def told(kind: str) -> list[str]:
            found = (await heir.call("GET", f"/v1/events?kind={kind}"))["items"]
            return [event["text"] for event in found]

        async def all_told() -> bool:
            return bool(await told("replica.gone") and await told("shards.taken"))

        await eventually(all_told, 60.0)
        assert await told("replica.gone") == [
            f"replica {gone} ({holder.api}) is gone; it held shard 0"
        ]
        assert await told("shards.taken") == [f"replica {left} took over shard 0 from {gone}"]
        await holder.process.wait()
        await holder.start()

        async def joined() -> bool:
            return any(
                f"({holder.api}) has joined" in text for text in await told("replica.joined")
            )

        await eventually(joined, 60.0)


async def test_s2_a_frozen_holder_wakes_up_to_nothing(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """The holder is suspended with requests pending; its successor carries them out; once resumed
    it adds nothing."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        holder = await world.holder()
        heir = world.other(holder)
        holder.pause()
        try:
            for number in range(8):
                await heir.register(f"d {number}")

            async def all_up() -> bool:
                return len(await world.devices()) == 8

            await eventually(all_up, 60.0)
        finally:
            holder.resume()
        await holder.until("/v1/leases", lambda said: said["shards"][0]["api"] == heir.api)
        await holder.register("last")

        async def last_up() -> bool:
            return "last" in await world.devices()

        await eventually(last_up, 60.0)
        assert set((await world.placed()).items()) == {
            ((name, "1"), 1) for name in [*(f"d {n}" for n in range(8)), "last"]
        }
        assert await holder.held() == set()


@pytest.mark.slow_because("starts several control planes as programs")
async def test_shards_are_shared_and_each_device_is_dispatched_once(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """Four shards over two replicas, two each; forty devices are placed once each, by both
    together."""
    async with replicas(tmp_path, nomad, consul, "a", "b", shards=4) as world:

        async def even() -> bool:
            return sorted([len(await plane.held()) for plane in world.planes]) == [2, 2]

        await eventually(even, 60.0)
        await asyncio.gather(
            *(world.planes[n % 2].register(f"device {n}") for n in range(40)),
        )

        async def all_up() -> bool:
            return len(await world.devices()) == 40

        await eventually(all_up, 40.0)
        assert set((await world.placed()).values()) == {1}
        parents = {job["ParentID"] for job in await world.jobs()}
        assert parents == {f"{world.prefix}-s{n}" for n in range(4)}


@pytest.mark.slow_because("starts several control planes as programs")
async def test_what_an_agent_says_to_one_replica_all_know(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """A report that one replica accepts makes the device watched at the other one too; a report of
    an old epoch is refused by both, whichever receives it first (S1)."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        one, two = world.planes
        await one.register("pump")
        await eventually(world.jobs)
        said = {
            "v": 1,
            "device_id": "pump",
            "epoch": 1,
            "instance": "i-1",
            "sequence": 1,
            "ready": True,
            "state": "ok",
            "was_ready": True,
            "misses": 0,
            "confirmed": False,
            "version": "7",
        }
        await one.until("/v1/devices/pump", lambda device: device["epoch"] == 1)
        accepted = await one.call("POST", "/v1/agents/report", said)
        assert accepted["accepted"] is True
        assert sorted(accepted["api"]) == sorted([one.api, two.api])
        # the other one may see the job later than the report
        device = await two.until("/v1/devices/pump", lambda device: device["verdict"] == "watched")
        assert (device["version"], device["instance"]) == ("7", "i-1")
        for plane in world.planes:
            with pytest.raises(TransientError, match="410"):
                await plane.call("POST", "/v1/agents/report", said | {"epoch": 0})
        heard = await two.call("POST", "/v1/peers/reports", {"reports": [said | {"instance": "x"}]})
        assert heard == {"taken": 0}


async def cli(plane: ControlPlane, *argv: str) -> tuple[int, str]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "nomad_watchdog", "--config", str(plane.file), *argv,
        env=clean_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(120.0):
        out, err = await child.communicate()
    assert child.returncode is not None
    return child.returncode, (out + err).decode()


@pytest.mark.slow_because("starts several control planes as programs")
async def test_s7_each_replica_holds_the_stops_of_its_own_shards(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """When all records vanish, no agent is stopped. `stops ls` of any replica shows the stops on
    hold at both, and each id approves its own replica's stops."""
    async with replicas(tmp_path, nomad, consul, "a", "b", shards=2) as world:

        async def even() -> bool:
            return sorted([len(await plane.held()) for plane in world.planes]) == [1, 1]

        await eventually(even, 60.0)
        for number in range(40):
            await world.planes[number % 2].register(f"d {number}")

        async def running() -> int:
            return sum(job["Status"] == "running" for job in await world.jobs())

        async def all_up() -> bool:
            return await running() == 40

        await eventually(all_up, 40.0)
        client = ConsulClient(ConsulAccess(address=consul.http_addr))
        folder = f"{world.prefix}/devices/"
        _, rows = await client.kv_tree(folder)
        gone = [{"Verb": "delete", "Key": row.key} for row in rows if row.key != f"{folder}meta"]
        await client.txn(gone)
        await client.close()

        async def both_hold() -> Any:
            code, said = await cli(world.planes[0], "stops", "ls", "-o", "json")
            assert code == 0, said
            found = json.loads(said)
            return found["count"] == 40 and len(found.get("held", [])) == 2 and found

        held = await eventually(both_hold, 40.0)
        assert await running() == 40
        code, said = await cli(world.planes[1], "leader")
        assert (code, world.planes[0].api in said, world.planes[1].api in said) == (0, True, True)
        first, second = held["held"]
        code, said = await cli(world.planes[1], "stops", "confirm", first["id"])
        assert (code, said) == (0, f"{first['count']} stops confirmed\n")

        async def some_left() -> bool:
            return await running() == second["count"]

        await eventually(some_left, 40.0)
        code, said = await cli(world.planes[0], "stops", "confirm", second["id"])
        assert code == 0, said

        async def none_left() -> bool:
            return await running() == 0

        await eventually(none_left, 40.0)


@pytest.mark.slow_because("starts several control planes as programs")
async def test_each_change_is_one_event_on_every_replica_also_after_a_crash(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """Three replicas see devices come and go, and the publishing one is killed in between. Both
    remaining ones have the same events, each change once, from before, during and after the crash,
    and requests to any replica are included with their author."""
    async with replicas(tmp_path, nomad, consul, "a", "b", "c") as world:
        holder = await world.holder()
        left = [plane for plane in world.planes if plane is not holder]
        for number, plane in enumerate((holder, *left)):
            await plane.register(f"pump-{number}")
        await asyncio.sleep(1.0)
        holder.process.send(signal.SIGKILL)
        await left[0].register("pump-3")
        await left[1].call("DELETE", "/v1/devices/pump-0")

        async def told(plane: ControlPlane) -> list[dict[str, Any]]:
            items = (await plane.call("GET", "/v1/events?limit=1000"))["items"]
            return [item for item in items if item["device"]]

        async def agreed() -> list[dict[str, Any]]:
            one, other = [await told(plane) for plane in left]
            wishes = Counter(item["kind"] for item in one if item["kind"] in ("present", "absent"))
            whole = wishes == {"present": 4, "absent": 1}
            audits = Counter(item["kind"] for item in one if item["kind"].startswith("audit"))
            same = [item["id"] for item in one] == [item["id"] for item in other]
            return one if whole and same and sum(audits.values()) == 5 else []

        events = await eventually(agreed, 60.0)
        assert len({item["id"] for item in events}) == len(events)
        for number in range(4):
            verdicts = [
                item["kind"]
                for item in events
                if item["device"] == f"pump-{number}" and item["kind"].startswith("verdict")
            ]
            assert all(one != other for one, other in itertools.pairwise(verdicts)), verdicts
        tellers = {
            (await plane.call("GET", "/v1/status"))["event_feed"]["teller"] for plane in left
        }
        assert len(tellers) == 1

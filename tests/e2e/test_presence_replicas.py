"""Presence with several control planes, on a real Nomad and a real Consul."""

from __future__ import annotations

from pathlib import Path

import pytest

from servers.consul import ConsulServer
from servers.nomad import NomadServer
from tests.e2e.test_replicas import replicas
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]


@pytest.mark.slow_because("three leases pass in real time")
async def test_a_device_may_beat_to_any_replica_and_expires_once(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """A device whose heartbeats go to the replica without the shard outlives three ttls. A silent
    one is released by the holder alone, and a heartbeat to the other replica brings it back."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        holder = await world.holder()
        standby = world.other(holder)
        for name in ("beats", "silent"):
            await standby.register(name, ttl="4s")
            await holder.until(f"/v1/devices/{name}", bool)

        async def silent_left_and_came_back(times: int) -> bool:
            await standby.call("POST", "/v1/heartbeats", {"ids": ["beats"]})
            gone = await holder.call("GET", "/v1/devices/silent")
            if gone["presence"] == "absent":
                assert gone["left"] == "expired"
                await standby.call("POST", "/v1/devices/silent/heartbeat")
            events = (await holder.call("GET", "/v1/events"))["items"]
            expired = [e["device"] for e in events if e["kind"] == "expired"]
            assert "beats" not in expired
            return expired.count("silent") >= times

        await eventually(lambda: silent_left_and_came_back(3), 120.0)
        item = await standby.call("GET", "/v1/devices/beats")
        assert (item["presence"], item["generation"]) == ("present", 1)


@pytest.mark.slow_because("a replica takes over when the other's lease has ended")
async def test_a_pause_made_at_one_replica_holds_at_the_other(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """The holder dispatches nothing for a device that was paused at the standby, nor does the
    standby after it took over; once resumed, the device gets its agent."""
    async with replicas(tmp_path, nomad, consul, "a", "b") as world:
        holder = await world.holder()
        standby = world.other(holder)
        made = await standby.call("POST", "/v1/pauses", {"labels": {"site": "x"}})
        await holder.until("/v1/pauses", lambda found: len(found["items"]) == 1)
        await standby.register("held", labels={"site": "x"})
        await standby.register("free")
        await eventually(world.devices)
        await holder.until("/v1/devices/held", lambda item: item["paused"] == made["id"])
        assert await world.devices() == {"free"}

        holder.process.send(9)
        await standby.until("/v1/status", lambda status: status["holds"] == "1 of 1 shards", 60.0)
        await standby.register("late")

        async def late() -> bool:
            return "late" in await world.devices()

        await eventually(late, 60.0)
        assert await world.devices() == {"free", "late"}
        await standby.call("POST", "/v1/pauses:resume", {"labels": {"site": "x"}})

        async def all_three() -> bool:
            return await world.devices() == {"free", "late", "held"}

        await eventually(all_three, 60.0)

"""`apply` with several replicas: one configuration is in force, and all replicas carry it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from servers.consul import ConsulServer
from servers.nomad import NomadServer
from servers.replica import ControlPlane
from tests.e2e.test_replicas import World, cli, replicas
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]

SHORT = 'agents {\n  startup_grace = "6s"\n  startup_grace_min = "5s"\n}\napi {'
NAMES = [f"pump {number}" for number in range(4)]


def change(plane: ControlPlane, old: str, new: str) -> None:
    text = plane.file.read_text()
    assert old in text
    plane.file.write_text(text.replace(old, new))


async def hashes(world: World) -> dict[str, str]:
    """Device → the spec hash of its running agent."""
    return {
        job["Meta"]["device_id"]: job["Meta"]["spec_hash"]
        for job in await world.jobs()
        if job["Status"] == "running" and not job["Stop"]
    }


@pytest.mark.slow_because("replaces agents that never report, after their start-up grace")
async def test_w3_apply_has_all_replicas_go_by_the_new_configuration(
    tmp_path: Path, nomad: NomadServer, consul: ConsulServer
) -> None:
    """After a change in the file of one replica, `apply` returns 0 when the agents of both
    replicas' shards are replaced. The other replica reports that it is configured differently, and
    its file reverts nothing. With the change in its file, too, nothing is left to do and nothing is
    replaced again."""
    async with replicas(tmp_path, nomad, consul, "a", "b", shards=2) as world:
        one, two = world.planes
        for plane in world.planes:
            change(plane, "api {", SHORT)
            change(plane, 'probe "icmp" {}', 'kill_timeout = "2s"\n  probe "icmp" {}')
            await plane.call("POST", "/v1/config:reload")

        async def shared() -> bool:
            return sorted([len(await plane.held()) for plane in world.planes]) == [1, 1]

        await eventually(shared)
        for name in NAMES:
            await one.register(name)

        async def all_up() -> bool:
            return len(await hashes(world)) == len(NAMES)

        await eventually(all_up)
        before = await hashes(world)

        change(one, 'probe "icmp" {}', 'memory = "80Mi"\n  probe "icmp" {}')
        code, said = await cli(one, "apply", "--auto-approve")
        assert (code, "4 to replace" in said) == (0, True), said
        after = await hashes(world)
        assert (after.keys(), len(set(after.values()))) == (before.keys(), 1)
        assert set(after.values()).isdisjoint(before.values())

        async def differs(plane: ControlPlane, *names: str) -> None:
            def shows(status: dict[str, Any]) -> bool:
                found = status["classes_in_force"]["differs"]
                return [one.partition(" ")[0] for one in found] == list(names)

            await plane.until("/v1/status", shows)

        await differs(one)
        await differs(two, "default")
        code, said = await cli(two, "apply", "--auto-approve")
        assert (code, "not in force, as other replicas are configured differently" in said) == (
            0,
            True,
        )

        change(two, 'probe "icmp" {}', 'memory = "80Mi"\n  probe "icmp" {}')
        await two.call("POST", "/v1/config:reload")
        await differs(two)
        assert await hashes(world) == after
        for plane in world.planes:
            assert (await plane.call("GET", "/v1/plan"))["actions"] == []

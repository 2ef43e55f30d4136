"""Pools on a real Nomad: its count is authoritative, the bounds are the pool's, and its Autoscaler gets the policy."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.config.pools import PoolSettings
from nomad_watchdog.errors import ConflictError, NotFoundError, UserError
from nomad_watchdog.pools.nomad import NomadPools, scaling_block, used
from servers.nomad import NomadServer
from tests.pools.shared import a_pool_of_another_is_left_alone

NAP = (sys.executable, "-c", "import time; time.sleep(600)")


def pool(**more: object) -> PoolSettings:
    return PoolSettings.model_validate(
        {"command": NAP, "max": 4, "scaler": "none", "kill_timeout": 2.0, "memory": "64Mi"} | more
    )


@pytest.fixture
def prefix() -> str:
    return f"t{secrets.token_hex(4)}"


@pytest.fixture
async def pools(nomad: NomadServer, prefix: str) -> AsyncIterator[NomadPools]:
    """A driver with its own jobs, which are stopped at the end."""
    driver = NomadPools(
        NomadClient(NomadAccess(address=nomad.http_addr)), installation="me", prefix=prefix
    )
    yield driver
    for name in await driver.list_pools():
        await driver.remove(name)
    await driver.close()


async def running(driver: NomadPools, name: str, count: int) -> None:
    async with asyncio.timeout(40.0):
        while (found := (await driver.list_pools()).get(name)) is None or found.running != count:
            await asyncio.sleep(0.2)


async def scaled(driver: NomadPools, name: str, count: int) -> None:
    """Scale like the pool controller: retry while a deployment is in progress."""
    async with asyncio.timeout(40.0):
        while True:
            try:
                await driver.scale(name, count, "because")
            except ConflictError:
                await asyncio.sleep(0.2)
            else:
                return


async def test_a_pool_is_a_job_whose_count_is_scaled(pools: NomadPools) -> None:
    """One worker, then three, then two: requested from Nomad, and running there."""
    await pools.ensure("p", pool())
    await running(pools, "p", 1)
    await scaled(pools, "p", 3)
    await running(pools, "p", 3)
    await scaled(pools, "p", 2)
    await running(pools, "p", 2)

    assert (await pools.list_pools())["p"].count == 2


async def test_nomad_itself_refuses_what_is_out_of_bounds(pools: NomadPools) -> None:
    """Even with the policy disabled, Nomad allows no more than the maximum and no fewer than the minimum."""
    await pools.ensure("p", pool(min=1, max=2))
    with pytest.raises(UserError, match="maximum"):
        await scaled(pools, "p", 3)
    with pytest.raises(UserError, match="minimum"):
        await scaled(pools, "p", 0)


async def test_a_changed_pool_keeps_its_count_and_an_unchanged_one_is_not_registered(
    pools: NomadPools, nomad: NomadServer, prefix: str
) -> None:
    """Another `ensure` writes nothing; with another environment it writes, and three workers stay three."""
    await pools.ensure("p", pool())
    await scaled(pools, "p", 3)
    path = f"/v1/job/{prefix}.pool.p"
    first = await nomad.request("GET", path)
    await pools.ensure("p", pool())
    same = await nomad.request("GET", path)
    await pools.ensure("p", pool(env={"A": "1"}))
    changed = await nomad.request("GET", path)

    assert same["JobModifyIndex"] == first["JobModifyIndex"]
    assert changed["JobModifyIndex"] > first["JobModifyIndex"]
    assert changed["TaskGroups"][0]["Count"] == 3
    assert changed["TaskGroups"][0]["Tasks"][0]["Env"]["A"] == "1"


async def test_bounds_that_moved_move_the_count(pools: NomadPools) -> None:
    """Three workers become two if the maximum becomes 2."""
    await pools.ensure("p", pool(min=3))
    await pools.ensure("p", pool(min=1, max=2))

    assert (await pools.list_pools())["p"].count == 2


async def test_a_pool_that_somebody_stopped_is_started_again(
    pools: NomadPools, nomad: NomadServer, prefix: str
) -> None:
    """`nomad job stop` of a configured pool does not last (L1)."""
    await pools.ensure("p", pool())
    await nomad.request("DELETE", f"/v1/job/{prefix}.pool.p")
    assert "p" not in await pools.list_pools()
    await pools.ensure("p", pool())

    await running(pools, "p", 1)


async def test_a_job_of_somebody_else_is_left_alone(
    pools: NomadPools, nomad: NomadServer, prefix: str
) -> None:
    """Another installation's pool with that name is not listed, changed or stopped."""
    client = NomadClient(NomadAccess(address=nomad.http_addr))
    other = NomadPools(client, installation="other", prefix=prefix)
    await a_pool_of_another_is_left_alone(pools, other, pool())


async def test_a_removed_pool_is_gone(pools: NomadPools) -> None:
    """It is no longer listed, can't be scaled, and a second removal is no error."""
    await pools.ensure("p", pool())
    await pools.remove("p")
    await pools.remove("p")

    assert "p" not in await pools.list_pools()
    with pytest.raises(NotFoundError):
        await pools.scale("p", 2, "")


@pytest.mark.slow_because("Nomad measures once in a second, and some measurements are needed")
async def test_what_workers_use_is_measured_or_not_known_and_never_0(
    pools: NomadPools, nomad: NomadServer
) -> None:
    """Where Nomad measures (control groups v2), a worker that uses all the CPU it can has CPU and memory. Where it
    answers 0 for everything (v1), usage is unknown, so that no pool shrinks because of it."""
    burn = pool(command=(sys.executable, "-c", "while True: pass"), cpu=500)
    await pools.ensure("burn", burn)
    await running(pools, "burn", 1)
    (node,) = await nomad.request("GET", "/v1/nodes?os=true")
    attributes = (await nomad.request("GET", f"/v1/node/{node['ID']}"))["Attributes"]
    found = []
    for _ in range(20):
        found.append(await pools.usage("burn", burn))
        await asyncio.sleep(0.5)

    if attributes.get("os.cgroups.version") == "2":
        assert any(one is not None and one.cpu > 20 and 1 < one.memory < 100 for one in found)
    assert all(one is None or one.memory > 0 for one in found)
    assert await pools.usage("nobody", burn) is None


def stats(measured: list[str] | None, ticks: float, memory: int) -> dict[str, Any]:
    cpu = {"Measured": measured, "TotalTicks": ticks}
    return {"ResourceUsage": {"CpuStats": cpu, "MemoryStats": {"RSS": 0, "Usage": memory}}}


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        (stats(["Percent"], 250.0, 32 * 1024 * 1024), (50.0, 50.0)),
        (stats(None, 0.0, 0), None),
        (stats(["Percent"], 0.0, 0), None),
        ({"ResourceUsage": None}, None),
        ({}, None),
    ],
)
def test_an_answer_without_a_measurement_is_no_use_of_0(
    answer: dict[str, Any], share: tuple[float, float] | None
) -> None:
    """Ticks and bytes become percent of the worker's share; zeros without a measurement become None."""
    assert used(answer, pool(cpu=500)) == share


async def test_a_pool_without_room_says_so(pools: NomadPools) -> None:
    """More memory than any node has is reported as a problem, and is no error."""
    await pools.ensure("p", pool(memory="2000Gi"))
    async with asyncio.timeout(20):
        while not (found := (await pools.list_pools())["p"]).problem:
            await asyncio.sleep(0.2)

    assert "no node has room" in found.problem


TASK = 'task "t" {\n driver = "raw_exec"\n }\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'type = "batch"\n group "a" {{\n {TASK} }}\n', "service"),
        (f'group "a" {{\n {TASK} }}\n group "b" {{\n {TASK} }}\n', "2 groups"),
        (f'meta {{\n pool = "z"\n }}\n group "a" {{\n {TASK} }}\n', "the control plane sets it"),
    ],
)
async def test_a_template_that_can_be_no_pool_is_refused(
    pools: NomadPools, tmp_path: Path, text: str, said: str
) -> None:
    """An error in a custom template is reported before anything is registered."""
    file = tmp_path / "own.nomad.hcl"
    names = ("pool", "cpu", "memory", "kill_timeout")
    file.write_text(
        "".join(f'variable "{name}" {{ type = string }}\n' for name in names)
        + f'job "x" {{\n {text} }}\n'
    )
    with pytest.raises(UserError, match=said):
        await pools.ensure("p", pool(template=str(file)))

    assert await pools.list_pools() == {}


EXTERNAL = """
job "x" {
  group "g" {
    scaling {
      enabled = true
      min     = 1
      max     = 4
      policy {
        cooldown             = "120s"
        cooldown_on_scale_up = "30s"
        evaluation_interval  = "10s"
        check "%s" {
          source = "%s"
          query  = "%s"
          strategy %s
        }
      }
    }
    task "t" {
      driver = "raw_exec"
    }
  }
}
"""


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (
            {"kind": "cpu", "target": 70.0},
            (
                "cpu",
                "nomad-apm",
                "avg_cpu-allocated",
                '"target-value" {\n target = 70\n threshold = 0.1\n}',
            ),
        ),
        (
            {"kind": "prometheus", "url": "http://p:9090", "query": "sum(q)", "target": 5.0},
            ("prometheus", "prometheus", "ceil((sum(q)) / 5)", '"pass-through" {}'),
        ),
    ],
)
async def test_the_policy_for_nomad_autoscaler_is_what_nomad_makes_of_hcl(
    nomad: NomadServer, metric: dict[str, object], words: tuple[str, ...]
) -> None:
    """The block that this program writes is, value for value, the one that Nomad's parser makes of a `scaling` block
    written as the Autoscaler documents it."""
    client = NomadClient(NomadAccess(address=nomad.http_addr))
    try:
        parsed = await client.parse(EXTERNAL % words, "")
    finally:
        await client.close()
    (group,) = parsed["TaskGroups"]
    ours = scaling_block(pool(scaler="external", metric=(metric,)))

    assert ours["Policy"] == group["Scaling"]["Policy"]
    assert all(ours[key] == group["Scaling"][key] for key in ("Min", "Max", "Enabled"))


async def test_an_external_pool_offers_its_policy_to_the_autoscaler(
    pools: NomadPools, nomad: NomadServer, prefix: str
) -> None:
    """It is in Nomad's list of scaling policies, enabled; the policy of the built-in scaler is not."""
    cpu = ({"kind": "cpu", "target": 70.0},)
    await pools.ensure("ext", pool(scaler="external", metric=cpu))
    await pools.ensure("own", pool(scaler="builtin", metric=cpu))
    listed = await nomad.request("GET", "/v1/scaling/policies")
    enabled = {
        row["Target"]["Job"]: row["Enabled"] for row in listed if prefix in row["Target"]["Job"]
    }

    assert enabled == {f"{prefix}.pool.ext": True, f"{prefix}.pool.own": False}

"""The rows of the fault matrix that fit into `make test`; `make faults` plays all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults import collect
from tests.faults.matrix import ROWS, Result, Row, play, play_all
from tests.faults.site import open_site
from tests.faults.world import World

collect()
QUICK = sorted((r for r in ROWS.values() if r.quick), key=lambda r: int(r.name.partition("-")[0]))
pytestmark = [
    pytest.mark.servers,
    pytest.mark.long,
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    """What came of the rows that are to be tested, a few of which are played at a time."""
    items = [getattr(item, "callspec", None) for item in request.session.items]
    asked = {spec.params["name"] for spec in items if spec is not None and "name" in spec.params}
    rows = [one for one in QUICK if one.name in asked]
    return {one.row.name: one for one in await play_all(rows, tmp_path_factory.mktemp("faults"))}


@pytest.mark.parametrize("name", [one.name for one in QUICK])
async def test_the_promises_hold_through_the_fault(name: str, results: dict[str, Result]) -> None:
    """After the fault of this row the audit finds nothing within the published time, nor later."""
    result = results[name]

    assert result.wrong == []
    assert result.audited


async def test_the_audit_bites(tmp_path: Path) -> None:
    """A second agent started by hand beside the first, and a wish that the registry does not have, are
    found, each under the promise that it breaks."""

    async def spoil(world: World) -> None:
        await world.program.start()
        await world.wishes(*world.names(2))
        await world.settle()
        (job, *_) = await world.jobs()
        nomad = world.servers.nomad
        detail = await nomad.request("GET", f"/v1/job/{job['ID'].replace('/', '%2F')}")
        meta = {key: value for key, value in job["Meta"].items() if key in detail["Meta"]}
        keys = ("device_id", "slug", "epoch", "spec_hash", "agent_class", "shard")
        body = {
            "Meta": {key: meta[key] for key in keys},
            "Payload": detail["Payload"],
            "IdPrefixTemplate": "intruder",
        }
        await nomad.request("POST", f"/v1/job/{world.where.job_prefix}/dispatch", body)
        world.wanted["never heard of"] = True

    spoiled = Row("0-spoiled", "", "", spoil, False, 240.0, False, False, {})
    async with open_site(tmp_path / "one") as site:
        result = await play(spoiled, site, tmp_path)

    assert {line.partition(":")[0] for line in result.wrong} >= {"S2", "S4", "S11", "L1"}

"""The rows of the fault matrix that fit into `make test`; `make faults` plays all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults import collect
from tests.faults.matrix import ROWS, Row, play
from tests.faults.world import Site, World, open_site

collect()
QUICK = sorted((r for r in ROWS.values() if r.quick), key=lambda r: int(r.name.partition("-")[0]))
pytestmark = [
    pytest.mark.servers,
    pytest.mark.long,
    pytest.mark.faults,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """One Consul and one Nomad for all rows."""
    async with open_site(tmp_path_factory.mktemp("faults")) as one:
        yield one


@pytest.mark.parametrize("one", QUICK, ids=lambda one: one.name)
async def test_the_promises_hold_through_the_fault(one: Row, site: Site, tmp_path: Path) -> None:
    """After the fault of this row the audit finds nothing within the published time, nor later."""
    result = await play(one, site, tmp_path)

    assert result.wrong == []
    assert {"S1", "S2", "S3", "S4", "S6", "S10", "L1"} <= {*result.audited} or one.settings


async def test_the_audit_bites(site: Site, tmp_path: Path) -> None:
    """A second agent started by hand beside the first, a device that nobody asked for, and a wish that
    the registry does not have are each found, under the promise that they break."""

    async def spoil(world: World) -> None:
        await world.start()
        await world.wishes(*world.names(2))
        await world.settle()
        (job, *_) = await world.jobs()
        meta = {key: value for key, value in job["Meta"].items() if key != "installation"}
        parent = f"/v1/job/{world.where.job_prefix}/dispatch"
        detail = f"/v1/job/{job['ID'].replace('/', '%2F')}"
        payload = (await world.servers.nomad.request("GET", detail))["Payload"]
        body = {"Meta": meta, "Payload": payload, "IdPrefixTemplate": "intruder"}
        await world.servers.nomad.request("POST", parent, body)
        world.wanted["never heard of"] = True

    spoiled = Row("0-spoiled", "", "", spoil, False, 240.0, False, {})
    result = await play(spoiled, site, tmp_path)

    assert {line.partition(":")[0] for line in result.wrong} >= {"S2", "S4", "S11", "L1"}

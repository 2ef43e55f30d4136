"""All rows of the fault matrix, as run by `make faults`. One worker runs all rows of a site."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.e2e import audit
from tests.faults import collect
from tests.faults.matrix import ROWS, Result, Row, play, play_all, sites_of
from tests.faults.proxy import instead
from tests.faults.site import open_site, until
from tests.faults.table import ordered
from tests.faults.world import World

collect()
SITES = sites_of([ROWS[name] for name in ordered()])
LASTS_S = {"shared": 620.0, "alone": 600.0, "cluster": 400.0, "mass": 600.0}
"""Approximate total duration of the rows of one site, in seconds, by lane."""
pytestmark = [
    pytest.mark.servers,
    pytest.mark.long,
    pytest.mark.faults,
    pytest.mark.timeout(2400),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest.fixture(scope="module")
def played() -> dict[str, Result]:
    """Results of the rows that have run already."""
    return {}


@pytest.mark.parametrize(
    ("site", "name"),
    [
        pytest.param(
            site,
            one.name,
            id=one.name,
            marks=(
                pytest.mark.busy
                if one.lane == "mass"
                else pytest.mark.xdist_group(f"faults-{site}"),
                pytest.mark.lasts(LASTS_S[one.lane] / len(rows)),
            ),
        )
        for site, rows in SITES.items()
        for one in rows
    ],
)
async def test_the_promises_hold_through_the_fault(
    site: str, name: str, played: dict[str, Result], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """After the fault of this row the audit finds nothing within the published time, nor later."""
    if name not in played:  # the first test of a site runs all selected rows of that site
        items = [getattr(item, "callspec", None) for item in request.session.items]
        asked = {one.params["name"] for one in items if one is not None and "name" in one.params}
        rows = [one for one in SITES[site] if one.name in asked]
        played.update({one.row.name: one for one in await play_all({site: rows}, tmp_path)})
    result = played[name]

    assert result.wrong == []
    assert result.audited


@pytest.mark.xdist_group("faults-alone-1")
async def test_the_audit_bites(tmp_path: Path) -> None:
    """A second agent started manually beside the first, and a desired device that the registry lacks, are found, each
    under the promise that it breaks: by the witness while both agents exist, which are frozen and can't be stopped
    until it has seen them; by the audit at the end, if Nomad protects against two jobs of one start."""
    expected = {"S3", "S4", "S11", "L1"}

    async def spoil(world: World) -> None:
        if await audit.protected(world.session, world.where):
            expected.add("S2")
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
        stops = world.nomad.when("DELETE", "^/v1/job/", instead(503))
        await nomad.request("POST", f"/v1/job/{world.where.job_prefix}/dispatch", body)
        both = await until(lambda: audit.doubled(world.where.root), 60.0, "both agents run")
        for one in both:
            os.kill(one.pid, signal.SIGSTOP)
        await until(
            lambda: any(one.startswith("S3") for one in world.broken), 60.0, "the witness sees both"
        )
        for one in both:
            os.kill(one.pid, signal.SIGCONT)
        stops.off()
        world.wanted["never heard of"] = True

    spoiled = Row("0-spoiled", "", "", spoil, "shared", 240.0, {})
    async with open_site(tmp_path / "one") as site:
        result = await play(spoiled, site, tmp_path)

    assert {line.partition(":")[0] for line in result.wrong} >= expected

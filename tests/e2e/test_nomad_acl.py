"""The shipped Nomad policy is sufficient, and doctor reports what a weaker token lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor.base import Check, CheckStatus
from nomad_watchdog.daemon.doctor.checks import examine
from nomad_watchdog.errors import DeniedError
from nomad_watchdog.model import AgentSpec, PlacementState
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.testing.rig import record_of
from servers.nomad import NomadServer
from tests.schedulers.conftest import eventually

pytestmark = [pytest.mark.servers, pytest.mark.asyncio(loop_scope="module")]
READ_ONLY = 'namespace "default" { capabilities = ["list-jobs", "read-job"] }'
MOCK = Path(__file__).parents[1] / "schedulers" / "mock.nomad.hcl"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[NomadServer]:
    """A Nomad that denies everything that no policy grants."""
    async with NomadServer(tmp_path_factory.mktemp("guarded"), acl=True) as server:
        yield server


async def token_for(server: NomadServer, name: str, rules: str) -> str:
    policy = {"Name": name, "Rules": rules}
    await server.request("PUT", f"/v1/acl/policy/{name}", body=policy)
    made = {"Name": name, "Type": "client", "Policies": [name]}
    answer = await server.request("PUT", "/v1/acl/token", body=made)
    return str(answer["SecretID"])


async def checks_with(server: NomadServer, token: str, folder: Path) -> dict[str, Check]:
    settings = Settings.model_validate(
        {
            "backend": "nomad",
            "data_dir": str(folder),
            "nomad": {"address": server.http_addr},
            "registry": {"kind": "sqlite"},
            "consul": {"agent_address": ""},
        }
    )
    return {check.name: check for check in await examine(settings, {"NOMAD_TOKEN": token})}


@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_the_shipped_policy_is_enough(
    guarded: NomadServer, repository: Path, strategy: str
) -> None:
    """Parents, starts, reads, hints, stops and sweeps all work with the policy in jobs/."""
    rules = (repository / "jobs/policies/nomad-reconciler.hcl").read_text()
    token = await token_for(guarded, "reconciler", rules)
    settings = NomadAccess(address=guarded.http_addr, token=token)
    prefix = f"acl-{strategy}"
    scheduler = NomadScheduler(settings=settings, strategy=strategy, prefix=prefix)  # type: ignore[arg-type]
    spec = AgentSpec("default", "1", "h1", template=str(MOCK))
    record = record_of("guarded")
    try:
        await scheduler.prepare([spec])
        hints = scheduler.watch()
        assert (await anext(hints)).slugs is None
        await scheduler.ensure(record, record.epoch, spec)
        # a dispatch of Nomad 1.6 is two writes, so the stream may seem to begin too late: a resync
        hint = await anext(hints)
        while not hint.slugs:
            hint = await anext(hints)
        assert record.slug in hint.slugs
        await hints.aclose()  # type: ignore[attr-defined]

        async def running() -> bool:
            placed = (await scheduler.snapshot()).placements.get(record.slug, ())
            return [one.state for one in placed] == [PlacementState.RUNNING]

        await eventually(running, 60.0)
        assert (await scheduler.capacity()).room
        (placed,) = (await scheduler.snapshot([record.slug])).placements[record.slug]
        await scheduler.retire(placed, 1.0)
        await scheduler.sweep([placed])
    finally:
        await scheduler.close()


async def test_doctor_is_content_with_it(
    guarded: NomadServer, repository: Path, tmp_path: Path
) -> None:
    """No check fails; what the token may not read is a warning that says what to grant."""
    rules = (repository / "jobs/policies/nomad-reconciler.hcl").read_text()
    token = await token_for(guarded, "reconciler", rules)
    checks = await checks_with(guarded, token, tmp_path)
    assert [c for c in checks.values() if c.status is CheckStatus.FAIL] == []
    assert checks["nomad jobs"].status is CheckStatus.OK
    assert checks["nomad nodes"].found == "1 of 1 take agents"
    assert "agent" in checks["nomad limits"].fix


async def test_doctor_names_what_a_token_lacks(guarded: NomadServer, tmp_path: Path) -> None:
    """For a read-only token each missing capability is reported; nothing was changed."""
    token = await token_for(guarded, "reader", READ_ONLY)
    check = (await checks_with(guarded, token, tmp_path))["nomad jobs"]
    assert check.status is CheckStatus.FAIL
    for capability in ("dispatch-job", "submit-job", "parse-job"):
        assert capability in check.fix
    assert (await checks_with(guarded, "", tmp_path))["nomad jobs"].status is CheckStatus.FAIL
    assert await guarded.request("GET", "/v1/jobs?prefix=device-watchdog") == []


async def test_a_denied_call_says_which_right_is_missing(guarded: NomadServer) -> None:
    """The error of a dispatch without permission names the capability."""
    token = await token_for(guarded, "reader", READ_ONLY)
    client = NomadClient(NomadAccess(address=guarded.http_addr, token=token))
    try:
        with pytest.raises(DeniedError, match="dispatch-job"):
            await client.dispatch("nobody", {})
    finally:
        await client.close()


async def test_a_token_that_nomad_does_not_know_is_not_explained_as_lacking_rights(
    guarded: NomadServer, tmp_path: Path
) -> None:
    """After a token was deleted, the errors of a call and of doctor name the token, and no
    capability."""
    body = {"Name": "short", "Type": "management"}
    made = await guarded.request("PUT", "/v1/acl/token", body=body)
    await guarded.request("DELETE", f"/v1/acl/token/{made['AccessorID']}")
    client = NomadClient(NomadAccess(address=guarded.http_addr, token=made["SecretID"]))
    try:
        with pytest.raises(
            DeniedError, match=r"Nomad does not know this token; check nomad\.token_file"
        ):
            await client.dispatch("nobody", {})
    finally:
        await client.close()
    checks = await checks_with(guarded, made["SecretID"], tmp_path)
    assert checks["nomad token"].fix == "check nomad.token_file (or NOMAD_TOKEN)"
    assert "nomad jobs" not in checks


async def test_doctor_with_full_sight_counts_drivers(guarded: NomadServer, tmp_path: Path) -> None:
    """With a token that may read nodes and the agent, version, drivers and connections are
    checked."""
    checks = await checks_with(guarded, guarded.token, tmp_path)
    assert "raw_exec on 1" in checks["nomad drivers"].found
    assert checks["nomad version"].status is CheckStatus.OK
    assert checks["nomad clock"].status is CheckStatus.OK

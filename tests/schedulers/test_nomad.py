"""Nomad-specific behaviour of the backend on a real Nomad, with templates and settings."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import pytest_asyncio

from nomad_watchdog.clients.nomad import NomadAccess, NomadClient, translate
from nomad_watchdog.clock import SystemClock
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.core.agent_token import TokenClaim, issue
from nomad_watchdog.errors import (
    ConflictError,
    DeniedError,
    NotFoundError,
    TerminalError,
    TransientError,
    UnpreparedError,
    UserError,
)
from nomad_watchdog.fleet.fleet import Fleet
from nomad_watchdog.ids import DeviceId, Shard, slug_of
from nomad_watchdog.metrics import Metrics
from nomad_watchdog.model import AgentSpec, Device, Epoch, Limits, PlacementState
from nomad_watchdog.registry.sqlite import SqliteRegistry
from nomad_watchdog.schedulers import job_templates
from nomad_watchdog.schedulers.credentialed import TokenIssuingScheduler
from nomad_watchdog.schedulers.nomad import NomadScheduler
from nomad_watchdog.secret_files import SecretFile, read_keys
from nomad_watchdog.testing.conformance import record_of
from servers.nomad import NomadServer

pytestmark = pytest.mark.asyncio(loop_scope="session")
MOCK = str(Path(__file__).with_name("mock.nomad.hcl"))


@pytest_asyncio.fixture(loop_scope="session")
async def scheduler(nomad: NomadServer) -> AsyncIterator[NomadScheduler]:
    one = NomadScheduler(
        settings=NomadAccess(address=nomad.http_addr),
        prefix=f"t-{uuid.uuid4().hex[:8]}",
        installation="test",
        blocked_limit=2,
    )
    yield one
    await one.close()


def mock_spec(**variables: str) -> AgentSpec:
    return AgentSpec("default", "1", "h", template=MOCK, variables=variables)


async def until(test: Callable[[], Awaitable[Any]], timeout_s: float = 60.0) -> Any:
    async with asyncio.timeout(timeout_s):
        while not (found := await test()):
            await asyncio.sleep(0.05)
        return found


async def states(scheduler: NomadScheduler, slug: Any) -> list[PlacementState]:
    return [one.state for one in (await scheduler.snapshot()).placements.get(slug, ())]


async def test_token_reaches_nomad(nomad: NomadServer, scheduler: NomadScheduler) -> None:
    """Two dispatches with one token create one child."""
    await scheduler.prepare([mock_spec()])
    record = record_of("twice")
    for _ in range(2):
        await scheduler.ensure(record, Epoch(1), mock_spec())
    jobs = await nomad.request("GET", f"/v1/jobs?prefix={scheduler._names.prefix}/dispatch-")
    assert len(jobs) == 1


async def test_a_parent_is_written_by_its_holder_and_only_when_it_names_no_living_replica(
    nomad: NomadServer, scheduler: NomadScheduler
) -> None:
    """Another replica's address in a parent job is kept while that replica lives, and replaced by
    our own when it is gone. A replica that does not hold the shard writes nothing; an address that
    is no replica's belongs to the spec."""
    ours, theirs = "http://10.0.0.1:9670", "http://10.0.0.2:9670"
    path = f"/v1/job/{scheduler._names.prefix}"

    async def parent_after(source: str, *living: str, shards: tuple[Shard, ...]) -> tuple[int, str]:
        spec = AgentSpec(
            "default",
            "1",
            "h",
            variables={"agent_source": f"{source}/artifacts/watchdog-agent.pyz"},
            agent_config={"v": 1, "api": list(living)},
        )
        assert await scheduler.prepare([spec], shards=shards) == {}
        job = await nomad.request("GET", path)
        return job["JobModifyIndex"], job["Meta"]["agent_source"]

    mine, nothing = (Shard(0),), ()
    first, source = await parent_after(theirs, theirs, ours, shards=mine)
    assert source.startswith(theirs)
    assert (first, source) == await parent_after(ours, ours, theirs, shards=mine)
    assert (first, source) == await parent_after(ours, ours, shards=nothing)
    second, source = await parent_after(ours, ours, shards=mine)
    assert second > first
    assert source.startswith(ours)
    third, source = await parent_after("https://files.example", ours, shards=mine)
    assert third > second
    assert source == ""
    assert (third, source) == await parent_after("https://files.example", theirs, shards=mine)


@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_s10_a_credential_is_in_the_document_and_nowhere_else(
    nomad: NomadServer, tmp_path: Path, strategy: str
) -> None:
    """A child's job, evaluations and allocations contain the agent's credential only in its
    document: not in the meta, the arguments or the job's id. A repeated start still gives the same
    child."""
    (tmp_path / "keys").write_text("k" * 40)
    keys = SecretFile("keys", tmp_path / "keys", read_keys).required()
    settings, prefix = NomadAccess(address=nomad.http_addr), f"t-{uuid.uuid4().hex[:8]}"
    inner = NomadScheduler(settings=settings, prefix=prefix, installation="test", strategy=strategy)
    scheduler = TokenIssuingScheduler(inner, keys, SystemClock())
    record, spec = record_of("guarded"), mock_spec()
    credential = issue(b"k" * 40, TokenClaim(record.slug, Epoch(1)))
    try:
        await scheduler.prepare([spec])
        for _ in range(2):
            await scheduler.ensure(record, Epoch(1), spec)
        jobs = await nomad.request("GET", f"/v1/jobs?prefix={prefix}")
        (child,) = [job for job in jobs if record.slug in job["ID"]]
        path = f"/v1/job/{quote(child['ID'], safe='')}"
        job = await nomad.request("GET", path)
        document = job.pop("Payload") if strategy == "dispatch" else _environment(job)
        assert json.loads(base64.b64decode(document))["credential"] == credential
        around = [job, jobs]
        around += [
            await nomad.request("GET", f"{path}/{what}") for what in ("evaluations", "summary")
        ]
        assert "wda1." not in str(around)
        assert (await scheduler.snapshot()).placements[record.slug][0].epoch == 1
    finally:
        await scheduler.close()


def _environment(job: dict[str, Any]) -> str:
    (text,) = [task["Env"].pop("WATCHDOG_CONFIG_B64") for task in job["TaskGroups"][0]["Tasks"]]
    return str(text)


async def test_drained_agent_is_placed_again(nomad: NomadServer, scheduler: NomadScheduler) -> None:
    """A drained agent runs again. Nomad 1.6 moves it at the same epoch, which is not a restart;
    newer versions end the job, and the next epoch runs."""
    await scheduler.prepare([mock_spec()])
    record = record_of("drained")
    await scheduler.ensure(record, Epoch(1), mock_spec())

    async def are(*allowed: list[PlacementState]) -> bool:
        return await states(scheduler, record.slug) in allowed

    await until(lambda: are([PlacementState.RUNNING]))
    node = (await nomad.request("GET", "/v1/nodes"))[0]["ID"]
    spec = {"Deadline": -1, "IgnoreSystemJobs": False}
    await nomad.request("POST", f"/v1/node/{node}/drain", {"DrainSpec": spec})
    try:
        await until(lambda: are([PlacementState.DEAD], [PlacementState.RESTARTING]))
        (ended,) = (await scheduler.snapshot()).placements[record.slug]
    finally:
        eligible = {"DrainSpec": None, "MarkEligible": True}
        await nomad.request("POST", f"/v1/node/{node}/drain", eligible)
    if ended.state is PlacementState.DEAD:
        await scheduler.ensure(record, Epoch(2), mock_spec())
        await until(lambda: are([PlacementState.DEAD, PlacementState.RUNNING]))
        return
    assert "no node can run it" in ended.reason
    await until(lambda: are([PlacementState.RUNNING]))
    (moved,) = (await scheduler.snapshot()).placements[record.slug]
    assert (moved.ref, moved.epoch, moved.restarts) == (ended.ref, Epoch(1), 0)
    assert moved.instances != ended.instances


@pytest.mark.parametrize("strategy", ["dispatch", "register"])
async def test_what_an_agent_really_got_counts_as_its_spec(
    nomad: NomadServer, strategy: Any
) -> None:
    """A child dispatched for one version from the parent job of another is an agent of neither,
    whichever of the two is in force. With its own parent job it counts."""
    settings, prefix = NomadAccess(address=nomad.http_addr), f"t-{uuid.uuid4().hex[:8]}"
    scheduler = NomadScheduler(settings=settings, prefix=prefix, strategy=strategy)
    old, new = mock_spec(), replace(mock_spec(), spec_hash="new")
    record = record_of("mixed")
    try:
        await scheduler.prepare([old])
        for epoch in (1, 2):
            await scheduler.ensure(record, Epoch(epoch), new)
            placements = (await scheduler.snapshot()).placements[record.slug]
            (found,) = [one for one in placements if one.epoch == epoch]
            mixed = epoch == 1 and strategy == "dispatch"
            assert found.spec_hash == ("new/h" if mixed else "new")
            await scheduler.retire(found, 1.0)
            await scheduler.prepare([new])
    finally:
        await scheduler.close()


async def test_exit_zero_is_dead(scheduler: NomadScheduler, tmp_path: Path) -> None:
    """An agent that exits 0 is not restarted by Nomad, and the snapshot reports DEAD."""
    script = tmp_path / "done.py"
    script.write_text("")
    spec = AgentSpec(
        "default", "1", "h", variables={"python": sys.executable, "agent_path": str(script)}
    )
    await scheduler.prepare([spec])
    record = record_of("done")
    await scheduler.ensure(record, Epoch(1), spec)

    async def dead() -> bool:
        return await states(scheduler, record.slug) == [PlacementState.DEAD]

    await until(dead)


async def test_purged_parent_is_terminal_and_prepare_mends(
    nomad: NomadServer, scheduler: NomadScheduler
) -> None:
    """Without its parent, whether stopped or purged, a dispatch raises UnpreparedError until
    prepare registers the parent again."""
    for number, purge in enumerate(("true", "false")):
        record = record_of(f"orphan {number}")
        await scheduler.prepare([mock_spec()])
        await nomad.request("DELETE", f"/v1/job/{scheduler._names.prefix}?purge={purge}")
        with pytest.raises(UnpreparedError):
            await scheduler.ensure(record, Epoch(1), mock_spec())
        await scheduler.prepare([mock_spec()])
        assert await scheduler.ensure(record, Epoch(1), mock_spec()) > 0


async def test_w6_a_device_added_while_the_parent_is_stopped_is_started_with_the_repair(
    nomad: NomadServer, scheduler: NomadScheduler, tmp_path: Path
) -> None:
    """It does not wait for its own back-off (here minutes) or for the next resync (an hour)."""
    registry = SqliteRegistry(path=tmp_path / "registry.db")
    await registry.initialise("test")
    limits = Limits(backoff_initial_s=300.0, resync_s=3600.0)
    fleet = Fleet(registry, limits, SystemClock())
    reconciler = Reconciler(fleet, scheduler, {"default": mock_spec()}, Metrics())
    task = asyncio.ensure_future(reconciler.run())
    try:
        await asyncio.wait_for(fleet.readiness.event.wait(), 20.0)
        await nomad.request("DELETE", f"/v1/job/{scheduler._names.prefix}")
        device = Device(DeviceId("late"), "default", "127.0.0.1")
        await fleet.records.register([device])

        async def runs() -> bool:
            return PlacementState.RUNNING in await states(scheduler, slug_of(device.id))

        await until(runs)
        assert [event.kind for event in fleet.events.own.of_device(slug_of(device.id))].count(
            "error"
        )
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await registry.close()


async def test_purged_child_is_absent(nomad: NomadServer, scheduler: NomadScheduler) -> None:
    """A child that an operator purged is in no snapshot."""
    await scheduler.prepare([mock_spec()])
    record = record_of("purged")
    await scheduler.ensure(record, Epoch(1), mock_spec())
    (one,) = (await scheduler.snapshot()).placements[record.slug]
    await nomad.request("DELETE", f"/v1/job/{one.ref.replace('/', '%2F')}?purge=true")
    assert record.slug not in (await scheduler.snapshot()).placements


async def test_unplaceable_is_pending_with_a_reason(scheduler: NomadScheduler) -> None:
    """Agents that no node takes are PENDING with a reason, and there is no capacity."""
    spec = AgentSpec("default", "1", "h", variables={"memory": "9000000"})
    await scheduler.prepare([spec])
    records = [record_of("big-1"), record_of("big-2")]
    for record in records:
        await scheduler.ensure(record, Epoch(1), spec)

    async def refused() -> bool:
        return not (await scheduler.capacity()).room

    await until(refused)
    seen = await scheduler.snapshot()
    (one,) = seen.placements[records[0].slug]
    assert one.state is PlacementState.PENDING
    assert "no node can run it" in one.reason
    full = await scheduler.capacity()
    assert full.reason == f"2 agents wait for a node: {one.reason}; starts continue below 2"
    for record in records:
        await scheduler.retire(seen.placements[record.slug][0], 1.0)


async def test_watch_resyncs_first_then_hints(scheduler: NomadScheduler) -> None:
    """The first hint is a resync; a dispatch is hinted with its slug."""
    await scheduler.prepare([mock_spec()])
    record = record_of("watched")
    async with aclosing(scheduler.watch()) as hints, asyncio.timeout(20):  # type: ignore[type-var]
        assert (await anext(hints)).slugs is None
        await scheduler.ensure(record, Epoch(1), mock_spec())
        async for hint in hints:
            if hint.slugs and record.slug in hint.slugs:
                break


async def test_hints_of_a_start_are_calm_and_those_of_an_end_are_not(
    scheduler: NomadScheduler, tmp_path: Path
) -> None:
    """Until an agent runs, every hint of its device is calm; when it exits by itself, at least one
    is not."""
    gone = tmp_path / "gone"
    script = tmp_path / "agent.py"
    script.write_text(
        f"import pathlib, time\nwhile not pathlib.Path({str(gone)!r}).exists(): time.sleep(0.05)\n"
    )
    variables = {"python": sys.executable, "agent_path": str(script)}
    spec = AgentSpec("default", "1", "h", variables=variables)
    await scheduler.prepare([spec])
    record = record_of("calm")
    calm: list[bool] = []
    urgent = asyncio.Event()

    async def listen() -> None:
        async for hint in scheduler.watch():
            if hint.slugs and record.slug in hint.slugs:
                calm.append(hint.calm)
                if not hint.calm:
                    urgent.set()

    async def runs() -> bool:
        return bool(calm) and await states(scheduler, record.slug) == [PlacementState.RUNNING]

    async with asyncio.TaskGroup() as group:
        listening = group.create_task(listen())
        await scheduler.ensure(record, Epoch(1), spec)
        await until(runs)
        assert all(calm)
        gone.touch()
        async with asyncio.timeout(20):
            await urgent.wait()
        listening.cancel()


async def test_oversized_payload_is_refused(scheduler: NomadScheduler) -> None:
    """A document over 16 KiB raises a UserError before it is sent to Nomad."""
    spec = AgentSpec("default", "1", "h", template=MOCK, agent_config={"x": "y" * 17000})
    with pytest.raises(UserError, match="16384"):
        await scheduler.ensure(record_of("large"), Epoch(1), spec)


@pytest.mark.parametrize("name", ["device-watchdog", "device-watchdog-docker"])
async def test_builtin_templates_have_no_finding(nomad: NomadServer, name: str) -> None:
    """The shipped templates pass our own lint and Nomad's validation."""
    client = NomadClient(NomadAccess(address=nomad.http_addr))
    try:
        job = await client.parse(job_templates.load(name).text, "")
        await client.validate(job)
    finally:
        await client.close()
    assert job_templates.lint(job) == []


async def test_hostile_variables_stay_text(nomad: NomadServer) -> None:
    """A variable that contains HCL is returned by Nomad's parser as the same text; a text value of
    a bool variable is read as a bool."""
    value = 'a"b\\c ${upper("x")} %{ if true }y%{ endif } \n\t機'
    client = NomadClient(NomadAccess(address=nomad.http_addr))
    try:
        text = job_templates.load("").text
        job = await client.parse(text, job_templates.variables_text({"agent_path": value}))
        variables = {"agent_path": value, "isolated": "false"}
        open_job = await client.parse(text, job_templates.variables_text(variables))
    finally:
        await client.close()
    assert args_of(job) == ["-I", "-S", value]
    assert args_of(open_job) == ["-P", value]


def args_of(job: dict[str, Any]) -> list[str]:
    args: list[str] = job["TaskGroups"][0]["Tasks"][0]["Config"]["args"]
    return args


async def test_lint_names_what_is_missing() -> None:
    """A bare service job is rejected for type, parameterized and reschedule."""
    found = job_templates.lint({"Type": "service", "TaskGroups": [{"Name": "a", "Tasks": []}]})
    errors = " ".join(str(one) for one in found if one.level == "error")
    assert all(word in errors for word in ("type", "parameterized", "reschedule"))


async def test_lint_warns_of_disks_that_are_migrated() -> None:
    """Only `migrate` causes the warning: an agent that was moved from a purged node would stay
    pending."""
    for disk, expected in (({"Sticky": True}, []), ({"Migrate": True}, ["warning"])):
        group = {"Name": "a", "Tasks": [], "EphemeralDisk": {"SizeMB": 20, **disk}}
        found = job_templates.lint({"Type": "batch", "TaskGroups": [group]})
        assert [one.level for one in found if "migrate" in str(one)] == expected


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (403, "Permission denied", DeniedError),
        (404, "job not found", NotFoundError),
        (429, "too many", TransientError),
        (500, "No cluster leader", TransientError),
        (500, "parameterized job not found", TerminalError),
        (500, 'Specified job "x" is stopped', TerminalError),
        (500, "Enforcing job modify index 0: job already exists", ConflictError),
        (400, "bad base64", UserError),
    ],
)
async def test_answers_become_our_errors(status: int, text: str, kind: type[Exception]) -> None:
    """Each known answer of Nomad maps to the error that says what to do next."""
    assert type(translate(status, text, "dispatch-job")) is kind


async def test_explicit_beats_environment() -> None:
    """An explicit address takes precedence over NOMAD_ADDR, and a token never appears in a repr."""
    env = {"NOMAD_ADDR": "http://other:4646", "NOMAD_TOKEN": "secret-1"}
    found = NomadAccess.from_env(env, address="http://127.0.0.1:1")
    assert (found.address, found.token) == ("http://127.0.0.1:1", "secret-1")
    assert "secret-1" not in repr(found)


async def test_a_snapshot_of_a_quiet_nomad_holds(scheduler: NomadScheduler) -> None:
    """If nothing is new, the last snapshot still holds. A snapshot with an agent that has just
    ended holds only after a second check: its verdict changes even though nothing is new in
    Nomad."""
    spec = mock_spec()
    await scheduler.prepare([spec])
    record = record_of("quiet")
    await scheduler.ensure(record, Epoch(1), spec)

    async def in_state(state: PlacementState) -> Any:
        seen = await scheduler.snapshot()
        (found,) = seen.placements[record.slug]
        return found if found.state is state and await scheduler.unchanged_since(seen) else None

    placement = await until(lambda: in_state(PlacementState.RUNNING))
    seen = await scheduler.snapshot()
    assert await scheduler.unchanged_since(seen)
    await scheduler.retire(placement, 1.0)
    assert not await scheduler.unchanged_since(seen)
    await until(lambda: in_state(PlacementState.DEAD))

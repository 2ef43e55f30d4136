"""The API and the command line of migrations, over a real server and registry; schedulers in memory."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.api.context import CONTEXT
from nomad_watchdog.cli.main import _code
from nomad_watchdog.config.load import load
from nomad_watchdog.controllers.agents.reconciler import Reconciler
from nomad_watchdog.controllers.migration_requests import MigrationRequests
from nomad_watchdog.core.migration import NEVER_MIGRATED
from nomad_watchdog.errors import UserError
from nomad_watchdog.ids import DeviceId
from nomad_watchdog.model import AgentSpec, Device
from nomad_watchdog.schedulers import agent_zipapp
from nomad_watchdog.schedulers.multi import MultiScheduler
from tests.api.conftest import ServedApi, served
from tests.simulation.fakes import Cluster, FakeScheduler

SPEC = AgentSpec("default", "1", "h")


class Plane:
    """The loop over two sites, and the API on top of it."""

    def __init__(self, served_api: ServedApi) -> None:
        self.served_api = served_api
        self.sites = {"north": Cluster(), "south": Cluster()}
        self.reconciler = Reconciler(
            served_api.fleet,
            MultiScheduler("north", self._made),
            {"default": SPEC},
            served_api.metrics,
        )
        served_api.app[CONTEXT].migrations = MigrationRequests(
            served_api.fleet, self.reconciler.migrations
        )

    def _made(self, name: str) -> FakeScheduler:
        if name not in self.sites:
            raise UserError(f"no scheduler backend {name!r}")
        return FakeScheduler(self.sites[name])

    async def post(self, path: str, **body: object) -> tuple[int, Any]:
        return await self.served_api.ask("POST", path, json=body)

    async def newest(self) -> dict[str, Any]:
        _, answer = await self.served_api.ask("GET", "/v1/migration")
        found: dict[str, Any] = answer["items"][-1]
        return found


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    async with served(tmp_path) as served_api:
        one = Plane(served_api)
        devices = [
            Device(DeviceId(f"d{n}"), "default", "127.0.0.1", {"part": "ab"[n % 2]})
            for n in range(6)
        ]
        await served_api.fleet.records.register(devices)
        running = asyncio.ensure_future(one.reconciler.run())
        try:
            async with asyncio.timeout(10.0):
                while len(one.sites["north"].processes) < 6:
                    await asyncio.sleep(0.02)
            yield one
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running


async def test_what_makes_no_sense_is_refused_before_anything_is_written(plane: Plane) -> None:
    """Equal ends, a scheduler that does not exist or does not answer, an invalid shard, an unconfigured class, no
    matching device, and verbs without a migration each have their own status, and nothing is stored."""
    begin = "/v1/migration"
    way = {"from": "north", "to": "south"}
    plane.sites["south"].broken = True
    assert (await plane.post(begin, **way))[0] == 503
    plane.sites["south"].broken = False
    for body, text in (
        ({"from": "north", "to": "north"}, "same"),
        ({"from": "north", "to": "west"}, "no scheduler backend"),
        ({"from": "north", "to": "../x"}, "to"),
        (way | {"shards": [1]}, "there is no shard 1"),
        (way | {"class": "camera"}, "unknown agent class 'camera'"),
        (way | {"devices": ["d0"], "labels": {"part": "b"}}, "no device of this migration"),
    ):
        status, answer = await plane.post(begin, **body)
        assert status in (400, 422), (body, answer)
        assert text in json.dumps(answer)
    for word in ("pause", "resume", "undo"):
        assert (await plane.post(f"{begin}:{word}"))[0] == 404
    assert (await plane.served_api.ask("GET", begin))[1]["items"] == []
    assert (await plane.served_api.fleet.registry.document("migration")).index == 0
    assert set(plane.reconciler.migrations.scheduler().parts) == {"north"}


async def test_a_dry_run_says_what_would_move_and_moves_nothing(plane: Plane) -> None:
    """Counts of the matching devices by class and shard, and nothing is stored."""
    status, answer = await plane.post(
        "/v1/migration",
        **{"from": "north", "to": "south", "dry_run": True, "labels": {"part": "a"}},
    )
    assert (status, answer["to_move"], answer["by_class"], answer["by_shard"]) == (
        200, 3, {"default": 3}, {"0": 3},
    )  # fmt: skip
    assert plane.sites["south"].jobs == {}
    assert plane.reconciler.migrations.homes() is NEVER_MIGRATED


async def test_a_move_is_paused_resumed_and_undone_by_the_api(plane: Plane) -> None:
    """Each verb has its state, is refused where it does not apply, and creates an event."""
    status, answer = await plane.post("/v1/migration", **{"from": "north", "to": "south"})
    assert (status, answer["state"], answer["to_move"]) == (201, "running", 6)
    again = await plane.post("/v1/migration", **{"from": "south", "to": "north"})
    assert (again[0], "let it end" in json.dumps(again[1])) == (409, True)
    assert (await plane.post("/v1/migration:resume"))[0] == 409
    assert (await plane.post("/v1/migration:pause"))[1]["state"] == "paused"
    assert (await plane.post("/v1/migration:resume"))[1]["state"] == "running"
    assert (await plane.post("/v1/migration:undo"))[1]["state"] == "undoing"
    assert (await plane.post("/v1/migration:undo"))[0] == 409
    # no agent has ever reported here, so the migration can't be over
    assert (await plane.newest())["ready"] == 0
    kinds = [event.kind for event in plane.served_api.fleet.events.own.recent()]
    assert [kind for kind in kinds if kind.startswith("migration.")] == [
        "migration.started", "migration.paused", "migration.resumed", "migration.undoing",
    ]  # fmt: skip
    assert plane.served_api.metrics.render().count(b"nomad_watchdog_migration_devices{") == 3


async def test_the_command_line_says_the_same(
    plane: Plane, capsys: pytest.CaptureFixture[str]
) -> None:
    """`migrate` and its verbs print tables and JSON, and exit with the code of the error."""

    async def verb(*words: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(_code, ["--address", plane.served_api.base, *words])
        out = capsys.readouterr()
        return code, out.out, out.err

    assert (await verb("migrate"))[0] == 64
    assert "no migrations" in (await verb("migrate", "status"))[1]
    code, out, _ = await verb("migrate", "--from", "north", "--to", "south", "--dry-run")
    assert (code, out.splitlines()[0]) == (0, "6 of 6 devices would move from north to south")
    code, out, _ = await verb(
        "migrate", "--from", "north", "--to", "south", "--selector", "part=a", "-o", "json"
    )
    assert (code, json.loads(out)["target"]["labels"]) == (0, {"part": "a"})
    assert (await verb("migrate", "--from", "north", "--to", "south"))[0] == 75
    code, out, _ = await verb("migrate", "pause")
    assert (code, out) == (0, "north to south: paused\n")
    assert "part=a" in (await verb("migrate", "status"))[1]
    assert (await verb("migrate", "resume", "-o", "json"))[0] == 0
    assert (await verb("migrate", "--from", "north", "undo"))[0] == 64
    code, _, err = await verb("migrate", "--device", "d0", "--wait", "undo")
    assert (code, "--device, --wait" in err) == (64, True)
    assert (await plane.newest())["back"] is False
    assert (await verb("migrate", "undo"))[0] == 0


async def test_waiting_for_what_somebody_undoes_is_no_success(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--wait` exits as for a conflict if the migration that it started, or found in progress toward its goal, is
    undone; waiting for an undo succeeds when the undo has ended."""
    said = io.StringIO()
    monkeypatch.setattr("sys.stderr", said)
    migrations = plane.reconciler.migrations

    def waiting(*words: str) -> asyncio.Task[int]:
        argv = ["--address", plane.served_api.base, "migrate", *words, "--wait"]
        return asyncio.create_task(asyncio.to_thread(_code, argv))

    async def end() -> None:
        # No agent has reported here, so the controller never reports the end itself.
        over = [replace(one, done=True) for one in migrations.state.moves]
        await migrations.change(lambda kept: replace(kept, moves=tuple(over)))

    async def told(state: str, by: int) -> None:
        """This many waiting commands have printed that the migration is in this state."""
        while said.getvalue().count(f"{state}: ") < by:
            await asyncio.sleep(0.02)

    async with asyncio.timeout(30.0):
        begun = waiting("--from", "north", "--to", "south")
        await told("running", 1)
        found = waiting("status")
        await told("running", 2)
        assert (await plane.post("/v1/migration:undo"))[0] == 200
        undoing = waiting("status")
        await told("undoing", 3)
        assert not any(one.done() for one in (begun, found, undoing))
        await end()
        assert [await one for one in (begun, found, undoing)] == [75, 75, 0]
    assert said.getvalue().count("was undone meanwhile") == 2


def test_a_proven_version_keeps_its_agent_file_on_nomad(tmp_path: Path) -> None:
    """Agents that are started with it after an upgrade fetch the program that it was proven with, as long as that is
    published here, unless the class names one of its own."""
    old = "0" * 64
    settings = load(None).model_copy(update={"data_dir": str(tmp_path)})
    spec = replace(settings.specs()["default"], agent_file=old)
    own = settings.spec_on("nomad", spec).variables["agent_checksum"]
    assert own == f"sha256:{agent_zipapp.checksum()}"
    file = agent_zipapp.published(tmp_path, old)
    file.parent.mkdir()
    file.touch()
    there = settings.spec_on("nomad", spec).variables
    assert there["agent_checksum"] == f"sha256:{old}"
    assert there["agent_source"].endswith(f"/artifacts/{old}/watchdog-agent.pyz")
    elsewhere = replace(spec, variables={"agent_source": "http://files/agent.pyz"})
    assert "agent_checksum" not in settings.spec_on("nomad", elsewhere).variables
    file.unlink()
    assert settings.spec_on("nomad", spec).variables["agent_checksum"] == own


def test_a_class_is_something_else_on_another_backend(tmp_path: Path) -> None:
    """There, an `on` block replaces template, driver, workload and variables. It changes no hash, and is validated like
    the rest."""
    file = tmp_path / "nomad-watchdog.hcl"
    plain = 'agent_class "a" {\n driver = "docker"\n probe "tcp" {\n  port = 1\n }\n}\n'
    file.write_text(plain)
    before = load(file).specs()["a"]
    on = ' on "kubernetes" {\n  workload = "pod"\n  variables = {\n   image = "x"\n  }\n }\n'
    file.write_text(plain.replace(" probe", on + " probe"))
    settings = load(file)
    spec = settings.specs()["a"]
    assert spec.spec_hash == before.spec_hash
    assert settings.spec_on("kubernetes", spec).variables == {"image": "x", "workload": "pod"}
    there = settings.spec_on("nomad", spec).variables
    assert there["driver"] == "docker"
    sha256 = there["agent_checksum"].removeprefix("sha256:")
    assert there["agent_source"].endswith(f"/artifacts/{sha256}/watchdog-agent.pyz")
    assert settings.spec_on("local", spec).variables == {"driver": "docker"}
    wrong = plain.replace(" probe", ' on "mars" {\n  template = "./none.yaml"\n }\n probe')
    file.write_text(wrong)
    with pytest.raises(UserError, match=r"mars.*is not installed"):
        load(file)

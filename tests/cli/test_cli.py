"""The command line: start-up, exit codes, output, hostile values, against a real HTTP server."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from aiohttp import web

from nomad_watchdog.cli.main import VERBS, LazyGroup, _code, cli
from nomad_watchdog.config.load import load
from nomad_watchdog.daemon.factory import open_registry
from nomad_watchdog.registry import RegistryDocument
from nomad_watchdog.terminal import clean
from nomad_watchdog.units import age

DOCS = Path(__file__).parents[2] / "docs"
HOSTILE = "gate\x1b[31m\u202e[bold]way"


class StandIn:
    """The API's routes on a real socket; devices are stored in memory."""

    def __init__(self) -> None:
        self.devices: dict[str, dict[str, Any]] = {}
        self.address = ""
        self.token = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/devices", self.list)
        app.router.add_post("/v1/devices:bulk", self.bulk)
        app.router.add_put("/v1/devices/{id}", self.put)
        app.router.add_get("/v1/devices/{id}", self.get)
        app.router.add_delete("/v1/devices/{id}", self.delete)
        app.router.add_get("/v1/events", self.events)
        app.router.add_get("/v1/status", self.status)
        return app

    async def list(self, request: web.Request) -> web.Response:
        first = int(request.query.get("cursor", "0"))
        items = list(self.devices.values())[first : first + 2]
        following = str(first + 2) if first + 2 < len(self.devices) else None
        return web.json_response({"items": items, "next": following, "index": 7})

    async def put(self, request: web.Request) -> web.Response:
        device = request.match_info["id"]
        self.devices[device] = {
            "id": device,
            "presence": "present",
            "verdict": "watched",
            "since_s": 300,
            "reason": HOSTILE,
            "class": "default",
            **await request.json(),
        }
        return web.json_response(self.devices[device])

    async def get(self, request: web.Request) -> web.Response:
        item = self.devices.get(request.match_info["id"])
        if item is None:
            return web.json_response(
                {"error": {"code": "not_found", "message": f"no device {HOSTILE}"}}, status=404
            )
        return web.json_response(item)

    async def delete(self, request: web.Request) -> web.Response:
        self.devices.pop(request.match_info["id"], None)
        return web.json_response({})

    async def bulk(self, request: web.Request) -> web.Response:
        body = await request.json()
        for item in body["devices"]:
            self.devices[item["id"]] = item
        results = [{"id": item["id"], "status": 200, "error": None} for item in body["devices"]]
        return web.json_response({"results": results})

    async def events(self, request: web.Request) -> web.Response:
        return web.json_response({"items": [{"seq": 1, "device": HOSTILE}], "next": 1})

    async def status(self, request: web.Request) -> web.Response:
        answers = {"busy": 503, "denied": 403, "moved": 409}
        if self.token in answers:
            return web.json_response({"error": {"message": "no"}}, status=answers[self.token])
        return web.json_response({"devices": 3, "verdicts": {"watched": 3}})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    stand_in, started, loop = StandIn(), threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(stand_in.app())
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stand_in.address = "http://{}:{}".format(*runner.addresses[0])
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOMAD_WATCHDOG_ADDR", stand_in.address)
    yield stand_in
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def command(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nomad_watchdog", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **env},
    )


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    """`--help` starts without importing pydantic, aiohttp, rich, consul, nomad or hcl2."""
    code = (
        "import sys\nfrom nomad_watchdog.cli.main import _code\n_code(['--help'])\n"
        "heavy={'pydantic','aiohttp','rich','consul','nomad','hcl2','asyncio'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    "argv",
    [
        *(
            ["nonsense"],
            ["devices", "add"],
            ["status", "-o", "yaml"],
            ["demo", "--devices", "x"],
            [],
        ),
        *(
            ["--address", f"http://{place}", "status"]
            for place in (
                "127.0.0.1:99999",
                "127.0.0.1:abc",
                "127.0.0.1:-1",
                "[::1",
                f"h:{'9' * 5000}",
            )
        ),
    ],
)
def test_wrong_usage_exits_64(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage exits with 64, never with click's 2, and is reported only on stderr."""
    assert _code(argv) == 64
    assert capsys.readouterr().out == ""


def test_every_verb_has_its_help() -> None:
    """Each verb of the table can be imported, and prints its help with exit code 0."""
    for verb in VERBS:
        assert _code([verb, "--help"]) == 0, verb


def test_docs_name_every_verb_and_no_other() -> None:
    """docs/cli.md has a row for each verb, and no other rows."""
    assert isinstance(cli, LazyGroup)
    context = click.Context(cli)
    verbs: set[str] = set()
    for name in VERBS:
        found = cli.get_command(context, name)
        inner = list(found.commands) if isinstance(found, click.Group) else []
        verbs |= {f"{name} {verb}" for verb in inner} or {name}
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z -]+)` \|", text, re.MULTILINE)) == verbs


def test_docs_name_every_exit_code() -> None:
    """docs/cli.md lists the exit code of each error class."""
    from nomad_watchdog import errors

    tree = [e for e in vars(errors).values() if isinstance(e, type)]
    codes = {e.exit_code for e in tree if issubclass(e, errors.WatchdogError)}
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert codes | {0, 2, 130} <= {int(c) for c in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_that_names_the_program(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The completion script of each shell names the program and its variable."""
    assert _code(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "nomad-watchdog" in out
    assert "_NOMAD_WATCHDOG_COMPLETE" in out


def test_devices_can_be_added_listed_exported_imported_and_removed(
    api: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fleet is exported and imported again, including IDs with slashes."""
    names = ["a/b c", "über", "x?y#z"]
    for name in names:
        assert _code(["devices", "add", name, "--address", "127.0.0.9", "--label", "k=v"]) == 0
    assert sorted(api.devices) == sorted(names)
    capsys.readouterr()
    assert _code(["devices", "ls", "-o", "json"]) == 0
    items = json.loads(capsys.readouterr().out)["items"]
    assert sorted(item["id"] for item in items) == sorted(names)
    assert _code(["devices", "ls", "--limit", "1", "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 1
    assert _code(["devices", "export"]) == 0
    file = tmp_path / "fleet.ndjson"
    file.write_text(capsys.readouterr().out)
    assert _code(["devices", "rm", *names]) == 0
    assert api.devices == {}
    assert _code(["devices", "import", str(file)]) == 0
    assert sorted(api.devices) == sorted(names)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"id": "a"}',
        '{"id": "\\u0007", "address": "x"}',
        '{"id":"a","address":"x","y":1}',
    ],
)
def test_a_wrong_line_imports_nothing(
    api: StandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """One invalid line is reported by its number, and no line of the file is sent."""
    file = tmp_path / "fleet.ndjson"
    file.write_text('{"id": "good", "address": "127.0.0.9"}\n' + line + "\n")
    assert _code(["devices", "import", str(file)]) == 64
    assert "line 2" in capsys.readouterr().err
    assert api.devices == {}


def test_hostile_values_reach_the_terminal_escaped(
    api: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """No control character of a device or an error reaches the terminal (S11)."""
    assert _code(["devices", "add", "d", "--address", "127.0.0.9"]) == 0
    for argv in (
        ["devices", "ls"],
        ["devices", "ls", "-o", "wide"],
        ["devices", "get", "d"],
        ["events"],
        ["events", "-o", "json"],
        ["devices", "get", "other"],
    ):
        _code(argv)
        found = capsys.readouterr()
        text = found.out + found.err
        assert all(c.isprintable() or c == "\n" for c in text), argv
        assert "[31m" in text
        assert "[bold]" in text, "markup is data"


def test_exit_codes_follow_the_answer(api: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """404 exits with 66; 503 and 409 with 75; 403 with 77; no answer with 69."""
    assert _code(["devices", "get", "other"]) == 66
    for answer, code in (("busy", 75), ("moved", 75), ("denied", 77), ("", 0)):
        api.token = answer
        assert _code(["status"]) == code
    assert _code(["--address", "http://127.0.0.1:1", "status"]) == 69
    assert _code(["--address", "file:///etc/passwd", "status"]) == 64
    assert "passwd" in capsys.readouterr().err


def test_config_check_exits_64_with_every_mistake(tmp_path: Path) -> None:
    """`config check` of an invalid file exits with 64 and prints all errors on stderr."""
    file = tmp_path / "wrong.hcl"
    file.write_text('shards = 0\nresync = "5"\n')
    found = command("config", "check", str(file))
    assert (found.returncode, found.stdout) == (64, "")
    assert len(found.stderr.splitlines()) == 2
    file.write_text("shards = 2\n")
    assert command("config", "check", str(file)).returncode == 0
    shown = command("config", "show", "-o", "json", NOMAD_WATCHDOG_CONFIG=str(file))
    assert json.loads(shown.stdout)["shards"] == 2


def test_run_refuses_an_inventory_that_is_not_there(tmp_path: Path) -> None:
    """The service does not start; it reports which file is missing and what to do, and creates no registry."""
    file = tmp_path / "w.hcl"
    missing = tmp_path / "devices.hcl"
    file.write_text(
        f'backend = "local"\ndata_dir = "{tmp_path / "data"}"\ninventory = "{missing}"\n'
        'agent_class "default" {\n  probe "icmp" {}\n}\n'
    )
    done = command("--config", str(file), "run")
    assert done.returncode == 64
    assert f'inventory "{missing}": No such file' in done.stderr
    assert "create the file, or remove it from `inventory`" in done.stderr
    assert not (tmp_path / "data").exists()


def test_doctor_tells_what_fails_and_exits_69(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`doctor` passes on a plain machine, and exits with 69 and a fix if Nomad does not answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert _code(["doctor", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setenv("NOMAD_ADDR", "http://127.0.0.1:1")
    monkeypatch.setenv("NOMAD_WATCHDOG_REGISTRY_KIND", "sqlite")
    monkeypatch.setenv("NOMAD_WATCHDOG_CONSUL_AGENT_ADDRESS", "http://127.0.0.1:1")
    assert _code(["--backend", "nomad", "doctor", "-o", "json"]) == 69
    checks = json.loads(capsys.readouterr().out)["checks"]
    failed = {check["name"]: check["fix"] for check in checks if check["status"] == "fail"}
    assert set(failed) == {"nomad reachable", "consul reachable"}
    assert all(failed.values())
    assert not list(tmp_path.iterdir()), "doctor only looks"


def test_doctor_tells_an_unreadable_migration_from_an_unreadable_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A migrations document written by another version fails under its own name, and the registry passes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    async def written() -> None:
        async with open_registry(load(None, os.environ)) as registry:
            await registry.initialise()
            await registry.commit_document("migration", RegistryDocument(b'{"v": 9}'))

    asyncio.run(written())
    assert _code(["doctor", "-o", "json"]) == 69
    checks = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["registry"]["status"] == "ok"
    assert checks["migration"]["status"] == "fail"
    assert "version 9" in checks["migration"]["found"]


def test_clean_and_age() -> None:
    """Unprintable characters become escapes; ages have one unit, and hostile ones are empty."""
    assert clean("a\x1b\u202e\ud800b\n") == "a\\x1b\\u202e\\ud800b\\n"
    assert [age(x) for x in (5, 300, 90000, -1, float("nan"), "x", None)] == [
        "5s", "5m", "25h", "0s", "", "", "",
    ]  # fmt: skip

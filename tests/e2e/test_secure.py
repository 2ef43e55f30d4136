"""API security from the operator's view: the real program over TLS, real agents with their
credentials."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import stat
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme

from nomad_watchdog.cli.main import main
from nomad_watchdog.ids import DeviceId, slug_of
from tests.api.test_api import _report
from tests.e2e.test_program import Program
from tests.schedulers.conftest import directory, eventually, pids_of

__all__ = ["directory"]

CONFIG = """\
data_dir = "{root}"
api {{
  listen         = "127.0.0.1:{port}"
  tls_cert       = "{root}/server.cert"
  tls_key        = "{root}/server.key"
  ca_cert        = "{root}/ca.pem"
  token_file     = "{root}/token"
  agent_key_file = "{root}/keys"
  token "grafana" {{
    role = "viewer"
    file = "{root}/viewer"
  }}
}}
agent_class "default" {{
  beat = "1s"
  probe "tcp" {{
    port     = {device_port}
    interval = "500ms"
    timeout  = "200ms"
  }}
}}
"""
TOKEN, VIEWER, KEY = "operators-s3cret-token", "viewers-s3cret-token", "s3cret-key-" * 4


@pytest.fixture
async def device() -> Any:
    """A port that accepts connections."""
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
def program(tmp_path: Path, directory: Path, device: int) -> Program:
    """The program with all security settings on; `directory` stops the agents that it leaves
    running."""
    program = Program(tmp_path)
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    pair.private_key_pem.write_to_path(tmp_path / "server.key")
    (tmp_path / "server.cert").write_bytes(b"".join(pem.bytes() for pem in pair.cert_chain_pems))
    for name, secret in (("token", TOKEN), ("viewer", VIEWER), ("keys", KEY)):
        (tmp_path / name).write_text(f"{secret}\n")
    values = {"root": tmp_path, "port": program.port, "device_port": device}
    program.file.write_text(CONFIG.format(**values))
    return program


async def test_agents_report_over_tls_with_credentials_of_their_own(
    program: Program, directory: Path, tmp_path: Path
) -> None:
    """A device is watched by a real agent over TLS. Its credential is valid for no other device,
    for no other instance (S1) and not after its epoch, and appears only in its document (S10). A
    SIGHUP reloads the certificates and ends nothing."""
    trust = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    api = f"https://127.0.0.1:{program.port}"
    path = "/v1/agents/report"
    log = tmp_path / "service.log"
    process = await program.start("run")
    assert process.stderr is not None
    drained = asyncio.create_task(process.stderr.read())
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session:

        async def ask(method: str, where: str, token: str, **options: Any) -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {token}"}
            url = api + where
            async with session.request(
                method, url, ssl=trust, headers=headers, **options
            ) as answer:
                return answer.status, await answer.text()

        async def serves() -> bool:
            return (await program("status"))[0] == 0

        async def shown(name: str) -> dict[str, Any]:
            return json.loads((await ask("GET", f"/v1/devices/{name}", TOKEN))[1])

        async def watched(name: str) -> Any:
            found = await shown(name)
            return found["verdict"] == "watched" and found

        try:
            await eventually(serves, 60.0)
            process.send_signal(signal.SIGHUP)
            await program.import_devices("pump-1", "pump-2")
            await eventually(lambda: watched("pump-1"), 40.0)
            await eventually(lambda: watched("pump-2"), 40.0)

            home = directory / slug_of(DeviceId("pump-1"))
            document = home / "config.json"
            assert stat.S_IMODE(document.stat().st_mode) == 0o600
            credential = json.loads(document.read_text())["credential"]
            own = _report(device_id="pump-1", epoch=1)
            for changed in ({"device_id": "pump-2"}, {"epoch": 2}):
                status, _ = await ask("POST", path, credential, json=own | changed)
                assert status == 403

            async def refused() -> bool:
                status, _ = await ask("POST", path, credential, json=own)
                assert status in (
                    409,
                    410,
                )  # wait until a listing shows that no agent is replaced
                return status == 410

            await eventually(refused, 60.0)
            assert (await ask("GET", "/v1/status", credential))[0] == 403
            assert (await ask("DELETE", "/v1/devices/pump-2", VIEWER))[0] == 403
            seen = [
                (await ask("GET", where, VIEWER))[1]
                for where in ("/v1/devices/pump-1/explain", "/v1/events?limit=1000", "/metrics")
            ]
            seen += [(home / name).read_text() for name in ("placement.json", "agent.log")]
            for pid in pids_of(directory):
                seen += [Path(f"/proc/{pid}/{what}").read_text() for what in ("cmdline", "environ")]

            # A device that comes back gets a new epoch, and its agent a new credential.
            await program("devices", "rm", "pump-1")
            await eventually(lambda: len(pids_of(directory)) == 1, 60.0)
            await program.import_devices("pump-1")
            again = await eventually(lambda: watched("pump-1"), 40.0)
            assert again["epoch"] == 2
            assert json.loads(document.read_text())["credential"] != credential
            assert (await ask("POST", path, credential, json=own))[0] == 410
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 20.0)
            log.write_bytes(await drained)
    seen.append(log.read_text())
    for secret in (TOKEN, VIEWER, KEY, credential, credential.rpartition(".")[2]):
        assert not any(secret in text for text in seen)
    assert "changed through the API" in log.read_text()
    assert "certificates reloaded" in log.read_text()


@pytest.mark.parametrize(
    ("api", "words"),
    [
        ('listen = "0.0.0.0:1"', "can be reached from other machines"),
        ('listen = ":1"', "open = true"),
        ('listen = "[::]:1"', "token_file"),
        ('open = true\n token_file = "/x"', "exclude each other"),
        ('tls_cert = "/x"', "go together"),
        ('client_ca = "/x"', "need TLS"),
        ('tls_cert = "/x"\n tls_key = "/x"\n client_ca = "/x"', "set agent_key_file"),
        ('token "a" {\n role = "admin"\n file = "/x"\n }', "viewer"),
        ('token "a" {\n file = "/x"\n }', "is missing"),
        ('token "a" {\n role = "viewer"\n file = "/x"\n id_prefix = "y"\n }', "device only"),
        ('token "a" {\n role = "agent"\n file = "/x"\n labels = { s = "y" }\n }', "device only"),
        ("rate = 0", "greater than 0"),
    ],
)
def test_an_open_door_is_refused_unless_it_is_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], api: str, words: str
) -> None:
    """`config check` and `run` exit 64 for an unprotected or unusable API, with a fix."""
    for argv in (("config", "check"), ("run",)):
        assert exit_code(tmp_path, api, *argv) == 64
        said = capsys.readouterr().err
        assert words in said
        assert "nomad-watchdog.hcl:" in said


def exit_code(folder: Path, api: str, *argv: str) -> object:
    """Exit code of the program in this process, with this `api` block: a process for each would
    cost half a minute of CPU."""
    file = folder / "nomad-watchdog.hcl"
    file.write_text(f"api {{\n {api}\n}}\n")
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), *argv])
    return ended.value.code


@pytest.mark.parametrize(
    "api",
    [
        "",
        'listen = "127.0.0.1:1"',
        'listen = "127.9.9.9:1"',
        'listen = "[::1]:1"',
        'listen = "localhost:1"',
        'listen = ":1"\n open = true',
        'listen = ":1"\n token_file = "{token}"',
        'listen = ":1"\n token "a" {\n role = "viewer"\n file = "{token}"\n }',
    ],
)
def test_a_guarded_or_local_door_is_accepted(tmp_path: Path, api: str) -> None:
    """On a loopback address no token is needed; elsewhere a token or `open = true` is enough."""
    (tmp_path / "token").write_text("a-long-and-random-token")
    api = api.replace("{token}", str(tmp_path / "token"))
    assert exit_code(tmp_path, api, "config", "check") == 0


async def test_a_token_in_the_environment_is_not_taken_for_a_setting(tmp_path: Path) -> None:
    """NOMAD_WATCHDOG_API_TOKEN does not exist: its name is reported, and its value is never printed
    (S10)."""
    program = Program(tmp_path)
    process = await program.start("config", "show", NOMAD_WATCHDOG_API_TOKEN="a-s3cret")
    out, err = await process.communicate()
    assert process.returncode == 64
    assert b"NOMAD_WATCHDOG_API_TOKEN: no such variable" in err
    assert b"a-s3cret" not in out + err
    assert "NOMAD_WATCHDOG_API_TOKEN" not in os.environ

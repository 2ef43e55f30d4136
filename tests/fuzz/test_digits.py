"""Numbers of 5,000 digits wherever users and devices can enter them (H6), on the real programs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code
from servers.replica import ControlPlane
from tests.agent.world import a_world, probe, says
from tests.attacks.table import Attack
from tests.schedulers.conftest import directory

__all__ = ["directory"]

MANY = "9" * 5000
CONFIG = """\
data_dir = "{root}"
inventory = ["{root}/fleet.hcl"]
resync = "1s"
local {
  directory = "AGENTS"
}
api {
  listen = "127.0.0.1:{port}"
}
agent_class "default" {
  probe "tcp" {
    port = 9
  }
}
"""
FILES = {
    "resync": f"resync = {MANY}\n",
    "shards": f"shards = {MANY}\n",
    "api.listen": f'api {{\n  listen = "127.0.0.1:{MANY}"\n}}\n',
    "memory": f'agent_class "default" {{\n  memory = "{MANY}Mi"\n  probe "tcp" {{\n    port = 1\n  }}\n}}\n',
    "port": f'agent_class "default" {{\n  probe "tcp" {{\n    port = {MANY}\n  }}\n}}\n',
    "fraction": "presence {\n  breaker_fraction = 1e999\n}\n",
}
ANSWERS = {
    "a status": f"HTTP/1.1 {MANY} OK\r\n\r\n",
    "a length": f"HTTP/1.1 200 OK\r\nContent-Length: {MANY}\r\n\r\nok",
    "a chunk": f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{MANY}\r\nok\r\n0\r\n\r\n",
    "digits of another script": "HTTP/1.1 ٢٠٠ OK\r\n\r\n",
}


@pytest.mark.attack(
    "H6", "numbers of 5,000 digits and infinite ones in the configuration and the environment"
)
def test_h6_the_configuration(
    tmp_path: Path,
    attack: Attack,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each setting is rejected with exit code 64 and a line that names it, like any wrong value, without a
    traceback."""
    file = tmp_path / "nomad-watchdog.hcl"
    for setting, text in FILES.items():
        file.write_text(text)
        assert _code(["--config", str(file), "config", "check"]) == 64, setting
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert len(said) < 2000, setting
    file.write_text("")
    for variable in ("NOMAD_WATCHDOG_SHARDS", "NOMAD_WATCHDOG_RESYNC", "NOMAD_WATCHDOG_API_LISTEN"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, MANY)
            assert _code(["--config", str(file), "config", "check"]) == 64, variable
        assert variable in capsys.readouterr().err
    for argv in (
        ["events", "--since", MANY],
        ["devices", "ls", "--limit", MANY],
        ["agents", "logs", "a", "-n", MANY],
    ):
        assert _code(argv) == 64, argv[:2]
    attack.tried = len(FILES) + 6
    attack.result = "each refused with exit 64 and the name of the setting"


@pytest.mark.attack(
    "H6",
    "numbers of 5,000 digits in the HCL inventory and the bodies and queries of a running control plane",
)
async def test_h6_a_running_control_plane(
    tmp_path: Path, directory: Path, attack: Attack, capsys: pytest.CaptureFixture[str]
) -> None:
    """The inventory is rejected and changes nothing, each request gets 400, and the control plane continues."""
    root = tmp_path / "plane"
    root.mkdir()
    good = 'device "a" {\n  address = "127.0.0.1"\n}\n'
    (root / "fleet.hcl").write_text(good)
    tried = 0
    async with ControlPlane(tmp_path, "plane", CONFIG.replace("AGENTS", str(directory))) as plane:
        await plane.until("/v1/devices/a", lambda it: it["id"] == "a")
        for line in (
            f"ttl = {MANY}",
            f'ttl = "{MANY}s"',
            f"labels = {{ a = {MANY} }}",
            f"port = {MANY}",
        ):
            (root / "fleet.hcl").write_text(good.replace("}\n", f"  {line}\n}}\n"))
            check = ["--config", str(plane.file), "config", "check"]
            assert await asyncio.to_thread(_code, check) == 64
            said = capsys.readouterr().err
            assert "fleet.hcl" in said
            assert "Traceback" not in said
            tried += 1
        assert plane._session is not None
        for method, path, body in (
            ("PUT", "/v1/devices/b", f'{{"address": "127.0.0.1", "ttl": {MANY}}}'),
            ("POST", "/v1/agents/report", f'{{"v": 1, "epoch": {MANY}}}'),
            ("POST", "/v1/agents/report", '{"v": 1, "state_age_s": 1e999}'),
            ("POST", "/v1/devices:bulk", "[" * 5000),
            ("GET", f"/v1/devices?limit={MANY}", None),
            ("GET", "/v1/events?since=%D9%A3", None),
        ):
            kind = {"Content-Type": "application/json"}
            async with plane._session.request(
                method, plane.api + path, data=body, headers=kind
            ) as answer:
                assert answer.status == 400, (path[:40], await answer.text())
            tried += 1
        assert (await plane.call("GET", "/v1/devices/a"))["presence"] == "present"
        assert plane.process.returncode is None
    attack.tried, attack.result = tried, "each refused; the control plane and its devices stay"


@pytest.mark.attack("H6", "numbers of 5,000 digits in the HTTP responses of a device")
@pytest.mark.parametrize("what", ANSWERS)
async def test_h6_a_device(tmp_path: Path, attack: Attack, what: str) -> None:
    """The agent counts a missed probe with a readable reason, and continues."""
    async with a_world(tmp_path) as world:
        world.device.speak = says(ANSWERS[what].encode())
        agent = await world.started(probes=[probe(world.device.port, expect_body="hello")])
        status = await agent.is_in("suspect", state="suspect")
        assert any(
            word in json.dumps(status)
            for word in ("not HTTP", "a number was expected", "chunk size")
        )
    attack.tried, attack.result = 1, f"{what}: a missed probe with a reason; the agent goes on"

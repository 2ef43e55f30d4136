"""How `doctor` checks the path from agents to the control plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor import api as doctor_api
from nomad_watchdog.demo.process import free_port
from tests.agent.world import Listener, says


def settings(**api: Any) -> Settings:
    return Settings.model_validate({"api": api})


def answer(status: str, body: str) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def test_a_control_plane_that_does_not_run_is_no_mistake_of_the_settings() -> None:
    """No answer at all is a warning. If the control plane runs and agents can't reach it, that is a failure that names
    the setting."""
    port, nowhere = free_port(), free_port()
    chosen = settings(listen=f"127.0.0.1:{port}", advertise=f"http://127.0.0.1:{nowhere}")
    ((name, status, found, _),) = await doctor_api.checks(chosen)
    assert (name, status) == ("api.advertise", "warn")
    assert "does not run (connection refused)" in found

    listener = Listener(says(b""))
    await listener.start()
    try:
        chosen = settings(
            listen=f"127.0.0.1:{listener.port}", advertise=f"http://127.0.0.1:{nowhere}"
        )
        ((_, status, _, mend),) = await doctor_api.checks(chosen)
        assert status == "fail"
        assert "set api.advertise" in mend
    finally:
        await listener.stop()


async def test_a_key_that_is_not_believed_is_a_failure(tmp_path: Path) -> None:
    """Another program at the address, and a control plane with another key, are distinguished."""
    key = tmp_path / "keys"
    key.write_text("k" * 64)
    other = Listener(says(answer("200 OK", "{}")))
    refusing = Listener(says(answer("401 Unauthorized", '{"ready": true}')))
    await other.start()
    await refusing.start()
    try:
        at = f"127.0.0.1:{other.port}"
        ((_, status, found, _),) = await doctor_api.checks(settings(listen=at))
        assert (status, "is not a control plane" in found) == ("fail", True)
        at = f"127.0.0.1:{refusing.port}"
        checks = await doctor_api.checks(settings(listen=at, agent_key_file=str(key)))
        assert [(name, status) for name, status, _, _ in checks] == [
            ("api.advertise", "ok"),
            ("agents' credentials", "fail"),
            ("agents heard", "warn"),
        ]
    finally:
        await other.stop()
        await refusing.stop()


async def test_a_restored_registry_is_named() -> None:
    """A restore detected by the running control plane is a warning of its own; without one there is no such line."""
    text = "2026-11-30 05:00 UTC: the registry went back in time"
    for restored, expected in ((text, [("registry restored", "warn", text)]), ("", [])):
        body = f'{{"ready": true, "unheard": {{}}, "registry_restored": "{restored}"}}'
        plane = Listener(says(answer("200 OK", body)))
        await plane.start()
        try:
            checks = await doctor_api.checks(settings(listen=f"127.0.0.1:{plane.port}"))
        finally:
            await plane.stop()
        heard, *rest = [one[:3] for one in checks if one[0] != "api.advertise"]
        assert heard == ("agents heard", "ok", "the reports of all running agents arrive")
        assert rest == expected

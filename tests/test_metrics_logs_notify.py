from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
from io import StringIO
from pathlib import Path

import pytest

from nomad_watchdog import logs
from nomad_watchdog.daemon import systemd
from nomad_watchdog.metrics import Metrics

DOC = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_metrics_and_their_page_agree() -> None:
    """Every metric is on the page, and the page names no other metric."""
    assert (
        set(re.findall(r"^\| `(nomad_watchdog_\w+)", DOC.read_text(), re.MULTILINE))
        == Metrics().names()
    )


def test_metrics_start_at_zero_and_take_no_new_label_values() -> None:
    """All series exist before anything has happened, and an unknown value creates no new one."""
    metrics = Metrics()
    before = metrics.render().count(b"\n")
    assert b'nomad_watchdog_devices{verdict="offline"} 0.0' in metrics.render()
    metrics.action("start", "strange")
    metrics.report("strange")
    metrics.request("/strange", 200)
    assert metrics.render().count(b"\n") == before
    assert b'dispatches_total{outcome="other"} 1.0' in metrics.render()


@pytest.mark.parametrize("style", ["json", "text"])
def test_s10_logs_hold_no_secret_and_no_control_character(style: logs.Format) -> None:
    """Secrets are hidden, control characters are escaped, and each record is one line of limited length."""
    out = StringIO()
    stop = logs.setup("info", style, out)
    try:
        facts = {
            "token": "canary1",
            "headers": {"Authorization": "Bearer canary2"},
            "url": "http://u:canary3@host/?token=canary4",
            "device": "a\x1b[2J\nb",
            "big": "x" * 100_000,
        }
        logging.getLogger("t").warning("said Bearer canary5", extra=facts)
        try:
            raise ValueError("password=canary6")  # noqa: TRY301 # a trace is what is wanted
        except ValueError:
            logging.getLogger("t").exception("failed")
    finally:
        stop()
    text = out.getvalue()
    assert "canary" not in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) < 20_000
    if style == "json":
        line = json.loads(lines[0])
        assert list(line)[:4] == ["ts", "level", "logger", "msg"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
        assert line["device"] == r"a\x1b[2J\nb"


def test_notify_speaks_to_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The states arrive at a path and at an abstract socket, and nothing is sent without a socket."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.ready()
    abstract = f"@nomad-watchdog-test-{tmp_path.name}-{id(tmp_path)}"
    for name in (str(tmp_path / "n"), abstract):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.settimeout(2)
            listener.bind("\0" + name[1:] if name.startswith("@") else name)
            monkeypatch.setenv("NOTIFY_SOCKET", name)
            assert systemd.ready()
            assert systemd.watchdog()
            assert systemd.stopping()
            got = [listener.recv(64) for _ in range(3)]
            assert got == [b"READY=1", b"WATCHDOG=1", b"STOPPING=1"]
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert systemd.watchdog_interval_s() == 5.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert systemd.watchdog_interval_s() is None


async def test_s9_trouble_in_the_loop_is_told_once_in_a_while(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A thousand failed accepts are one line. Another kind of error is logged as well, and at most a hundred kinds are
    remembered."""
    loop, told = asyncio.get_running_loop(), logs.LoopErrors()
    for number in range(1000):
        message = f"socket.accept() out of system resource\nsocket {number}"
        told(loop, {"message": message, "exception": OSError(24, "Too many open files")})
    told(loop, {"message": "Task exception was never retrieved", "exception": ValueError("x")})
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    for number in range(1000):
        told(loop, {"message": f"kind {number}"})
    assert len(caplog.records) == logs.MAX_KINDS

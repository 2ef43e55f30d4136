"""The certificates of a control plane for tests and the demo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nomad_watchdog.errors import TerminalError
from servers.certificates import Authority


async def test_an_openssl_that_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An openssl process that waits for a missing configuration is stopped after its timeout, and
    named in the error."""
    os.mkfifo(tmp_path / "openssl.cnf")
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
    with pytest.raises(TerminalError, match=r"openssl req gave nothing within 0\.5 s"):
        await Authority(tmp_path / "pki", timeout_s=0.5).make()

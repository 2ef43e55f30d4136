"""What makes the certificates of a control plane for tests and the demo."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nomad_watchdog.dev import _certificates
from nomad_watchdog.errors import TerminalError


async def test_an_openssl_that_hangs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that never ends is stopped, and named, after its time."""
    program = tmp_path / "openssl"
    program.write_text("#!/bin/sh\nexec sleep 30\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(_certificates, "_OPENSSL_S", 0.2)
    with pytest.raises(TerminalError, match="openssl req gave nothing within"):
        await _certificates.Authority(tmp_path / "pki").make()

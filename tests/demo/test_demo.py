"""Which servers `demo` finds on PATH or has built, and how long it takes to build the others."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code
from nomad_watchdog.demo.process import clean_environment
from servers import binaries


def program(at: Path, text: str) -> None:
    """A program that prints its version, like the servers."""
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_text(f"#!/bin/sh\necho {text}\n")
    at.chmod(0o755)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without servers: only the shell is on PATH, and the cache is empty."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("NOMAD_WATCHDOG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(binaries, "found", {})
    return tmp_path


def test_build_minutes_counts_what_is_not_here(bare: Path) -> None:
    """A recent enough program on PATH or in the cache needs no build, an older one does; the query builds nothing."""
    both = binaries.build_minutes("nomad", "consul")
    nomad = binaries.build_minutes("nomad")
    assert both is not None
    assert nomad is not None
    assert both > nomad > 0

    program(bare / "bin/consul", "Consul v99.0.0")
    assert binaries.build_minutes("nomad", "consul") == nomad
    program(bare / "bin/nomad", "Nomad v0.1.0")
    assert binaries.build_minutes("nomad", "consul") == nomad
    assert not (bare / "cache").exists()

    program(bare / "cache/build/nomad", "Nomad v99.0.0")
    assert binaries.build_minutes("nomad", "consul") == 0


def test_build_minutes_without_a_checkout(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the sources nothing can be built, but programs on PATH are still found."""
    monkeypatch.setattr(binaries, "SERVERS", bare / "nowhere")
    assert binaries.build_minutes("nomad", "consul") is None

    program(bare / "bin/consul", "Consul v99.0.0")
    assert binaries.build_minutes("consul") == 0


def test_unknown_backend_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    """An unsupported backend is rejected with a list of the supported ones."""
    assert _code(["--backend", "swarm", "demo"]) == 64
    assert "expected one of local, nomad, kubernetes" in capsys.readouterr().err


def test_the_demo_is_imported_without_a_checkout() -> None:
    """The wheel does not contain `servers`, and the demo on local processes does not need it."""
    code = "import sys; sys.modules['servers'] = None; import nomad_watchdog.demo"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cache_is_private_whatever_the_umask(tmp_path: Path) -> None:
    """The folder holds programs that the demo runs, so that no other user may write to it."""
    code = "import os; os.umask(0); from nomad_watchdog.demo.process import free_port; free_port()"
    cache = tmp_path / "above" / "cache"
    environment = {**clean_environment(), "NOMAD_WATCHDOG_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    modes = [
        stat.S_IMODE(one.stat().st_mode) for one in (cache.parent, cache, cache / "ports.lock")
    ]
    assert modes == [0o700, 0o700, 0o600]

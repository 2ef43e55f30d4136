"""The agent as a single file, which a Nomad artifact or a shell can run with only Python."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import marshal
import os
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Final

import watchdog_agent

from nomad_watchdog import private_files

MAX_KEPT: Final = 4
"""Maximum number of published agent files. An agent that is restarted after an upgrade of the control plane downloads
the file of the version that it was first started with."""
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)
_SHA256: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)
_COMPILE: Final = """\
import marshal, sys
found = marshal.loads(sys.stdin.buffer.read())
codes = [(n, compile(s, n, "exec", dont_inherit=True, optimize=0)) for n, s in found]
sys.stdout.buffer.write(marshal.dumps([(name, marshal.dumps(code)) for name, code in codes]))
"""
_COMPILE_S: Final = 120.0
_MAIN: Final = b"from watchdog_agent.main import main\nmain()\n"


def build_agent(path: Path, mode: int = 0o755) -> str:
    """Write the agent as one executable file and return its SHA-256. The same sources and Python result in the same
    bytes.

    The file is replaced atomically. Raises OSError when it cannot be written."""
    _write(path, _own(), mode)
    return checksum()


def publish(folder: Path) -> str:
    """Write the agent as `watchdog-agent.pyz` and under its SHA-256, where `published` finds it. Returns the SHA-256.

    The last MAX_KEPT files of all versions stay. Raises OSError."""
    shelf = folder / "agent-files"
    private_files.folder(shelf)
    build_agent(folder / "watchdog-agent.pyz", private_files.FILE)
    own = published(folder, checksum())
    _write(own, _own(), private_files.FILE)
    os.utime(own)
    newest = sorted(shelf.glob("*.pyz"), key=lambda one: one.stat().st_mtime_ns, reverse=True)
    for old in newest[MAX_KEPT:]:
        old.unlink(missing_ok=True)
    return checksum()


def published(folder: Path, sha256: str) -> Path:
    """Path of the file with this SHA-256, which may not exist."""
    return folder / "agent-files" / f"{sha256}.pyz"


def keep(folder: Path, sha256: str, body: bytes) -> bool:
    """Store a file that another replica has published. False if its SHA-256 differs. Raises OSError."""
    if hashlib.sha256(body).hexdigest() != sha256:
        return False
    _write(published(folder, sha256), body, private_files.FILE)
    return True


def is_checksum(text: str) -> bool:
    """Whether a text has the form of a SHA-256."""
    return _SHA256.fullmatch(text) is not None


@cache
def checksum() -> str:
    """The SHA-256 of the agent file of this version and Python. The first call takes a third of a second."""
    return hashlib.sha256(_own()).hexdigest()


class Installed:
    """The agent's installed files, which local agents run, and their SHA-256 at the start of the control plane."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(watchdog_agent.__file__).resolve().parent
        self._seen = self._signature()
        self._sha256 = self._digest()

    def problem(self) -> str:
        """How the files have changed since the start; "" = not at all. Raises OSError."""
        seen = self._signature()
        if seen == self._seen:
            return ""
        if (found := self._digest()) != self._sha256:
            return (
                f"agent not started: its files in {self._folder} have changed (SHA-256 {found[:12]}…, expected"
                f" {self._sha256[:12]}…); if that was an upgrade, restart the control plane"
            )
        self._seen = seen
        return ""

    def _files(self) -> list[Path]:
        # Python prefers an extension module (.so) to a source of the same name. It writes its caches itself.
        found = (one for one in self._folder.rglob("*") if one.parent.name != "__pycache__")
        return sorted(one for one in found if one.is_file())

    def _signature(self) -> list[tuple[str, int, int, int, int]]:
        found = ((str(file), file.stat()) for file in self._files())
        return [(n, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in found]

    def _digest(self) -> str:
        sums = [
            (str(file.relative_to(self._folder)), hashlib.sha256(file.read_bytes()).hexdigest())
            for file in self._files()
        ]
        return hashlib.sha256(repr(sums).encode()).hexdigest()


@cache
def _own() -> bytes:
    return _archive(Path(watchdog_agent.__file__).parent)


def _write(path: Path, body: bytes, mode: int) -> None:
    if path.exists() and path.read_bytes() == body:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(body)
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _archive(folder: Path) -> bytes:
    """The agent in folder as a zip file that a Unix shell can run.

    It contains each source and its code for this Python, which saves 20 ms per start and 0.7 MB per device
    (bench/agent.py). Another version of Python ignores the code and uses the source."""
    entries = {
        f"watchdog_agent/{file.relative_to(folder)}": file.read_bytes()
        for file in folder.rglob("*.py")
    }
    entries["__main__.py"] = _MAIN
    # In a separate process: the bytes of compiled code depend on what a process has imported before.
    compiled = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _COMPILE],
        input=marshal.dumps(sorted(entries.items())),
        check=True,
        capture_output=True,
        timeout=_COMPILE_S,
    )
    for name, code in marshal.loads(compiled.stdout):  # noqa: S302  # of our own child
        entries[f"{name}c"] = _head(entries[name]) + code
    buffer = io.BytesIO()
    # Stored, not deflated: the agent need not load zlib, and the bytes do not depend on the version of zlib.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, entries[name])
    return b"#!/usr/bin/env python3\n" + buffer.getvalue()


def _head(source: bytes) -> bytes:
    """Header of a .pyc file that Python does not compare with its source (PEP 552)."""
    unchecked = (1).to_bytes(4, "little")
    return importlib.util.MAGIC_NUMBER + unchecked + importlib.util.source_hash(source)


if __name__ == "__main__":
    print(build_agent(Path(sys.argv[1])))  # noqa: T201  # the output of this command

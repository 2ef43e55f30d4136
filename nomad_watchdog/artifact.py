"""The single-file agent: what a Nomad artifact or a shell can run with nothing but Python."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import watchdog_agent

_EPOCH = (1980, 1, 1, 0, 0, 0)
_MAIN = "from watchdog_agent.main import main\nmain()\n"


def build_agent(path: Path) -> str:
    """Write the agent as one executable file; its SHA-256. Same sources, same bytes.

    Raises OSError when it can't be written."""
    folder = Path(watchdog_agent.__file__).parent
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        entries = {f"watchdog_agent/{file.name}": file.read_text() for file in folder.glob("*.py")}
        for name, text in sorted({**entries, "__main__.py": _MAIN}.items()):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, text, zipfile.ZIP_DEFLATED)
    body = b"#!/usr/bin/env python3\n" + buffer.getvalue()
    if not path.exists() or path.read_bytes() != body:
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(body)
        temporary.chmod(0o755)
        temporary.replace(path)
    return hashlib.sha256(body).hexdigest()


if __name__ == "__main__":
    print(build_agent(Path(sys.argv[1])))  # noqa: T201

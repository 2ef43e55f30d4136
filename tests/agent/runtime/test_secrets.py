"""How the agent reads a secret from a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from watchdog_agent.runtime import secrets


def test_a_secret_that_is_not_safe_is_not_used(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that everyone can write, or that belongs to another user, is not used; the reason is logged once, without
    the secret. A file changed in place is read again."""
    path = tmp_path / "token"
    path.write_text("a-token\n")
    path.chmod(0o644)  # as in a Kubernetes Secret
    assert secrets.token(str(path)) == "a-token"
    path.write_text("b-token\n")
    assert secrets.token(str(path)) == "b-token"
    path.chmod(0o666)
    assert [secrets.token(str(path)) for _ in range(3)] == ["", "", ""]
    with pytest.raises(OSError, match=r"can be written by everybody \(mode 0666\)"):
        secrets.read(str(path))
    if os.geteuid() == 0:
        path.chmod(0o600)
        os.chown(path, 65534, 65534)
        assert secrets.token(str(path)) == ""
        with pytest.raises(OSError, match="belongs to user 65534, not to 0 or root"):
            secrets.read(str(path))
    said = capfd.readouterr().err
    assert said.count("a token is not used") == (2 if os.geteuid() == 0 else 1)
    assert "-token" not in said.replace(str(path), "")


def test_what_is_no_file_is_no_secret(tmp_path: Path) -> None:
    """A missing file, a folder, a pipe without a writer, and bytes that are not allowed in a header give no secret."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (
        "",
        str(tmp_path / "none"),
        str(tmp_path),
        str(tmp_path / "fifo"),
        str(tmp_path / "bytes"),
    ):
        assert secrets.token(path) == ""

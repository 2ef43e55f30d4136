"""`plan` without the service reports what inventory files add; an unusable file is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code

CONFIG = """\
backend   = "local"
data_dir  = "{root}"
inventory = ["{root}/devices.json", "{root}/more.hcl"]
consul {{
  agent_address = ""
}}
agent_class "default" {{
  probe "tcp" {{
    port = 80
  }}
}}
"""


def test_plan_counts_what_inventories_add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line per file states how many devices the service will register. All errors of all files are printed at once,
    with exit code 64; `apply` does the same."""
    (tmp_path / "nomad-watchdog.hcl").write_text(CONFIG.format(root=tmp_path))
    monkeypatch.chdir(tmp_path)
    first, second = tmp_path / "devices.json", tmp_path / "more.hcl"
    first.write_text('{"id": "a", "address": "::1"}\n{"id": "b", "address": "::1"}\n')
    second.write_text('device "c" {\n  address = "::1"\n}\n')
    assert _code(["init"]) == 0
    capsys.readouterr()
    assert _code(["plan"]) == 0
    told = capsys.readouterr().out
    assert f"inventory {first}: 2 devices to register and 0 to remove, not counted here" in told
    assert f"inventory {second}: 1 devices" in told
    assert _code(["plan", "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["inventory"]
    assert [(one["file"], one["to_register"], one["to_remove"]) for one in found] == [
        (str(first), 2, 0),
        (str(second), 1, 0),
    ]

    first.write_text('{"id": "a", "address": "::1"\n')
    second.unlink()
    for argv in (["plan"], ["plan", "--detailed-exitcode"], ["apply", "--auto-approve"]):
        assert _code(argv) == 64
        told = capsys.readouterr().err
        assert "line 1: not a JSON object" in told
        assert "more.hcl" in told

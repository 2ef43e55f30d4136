"""`config check` and `doctor` read the same files, templates, variables and classes as `run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code

CLASS = 'agent_class "camera" {\n  probe "tcp" { port = 80 }\n}\n'
GOOD = 'data_dir = "/nowhere"\n' + CLASS


def checked(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and message of `config check`."""
    file = folder / "w.hcl"
    file.write_text(text, encoding="utf-8")
    code = _code(["config", "check", str(file)])
    return code, capsys.readouterr().err.replace(str(folder), "DIR")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOMAD_TOKEN", "CONSUL_HTTP_TOKEN", "NOMAD_ADDR", "CONSUL_HTTP_ADDR"):
        monkeypatch.delenv(name, raising=False)


def test_every_missing_file_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing tokens, keys, certificates, inventories and templates are all reported in one run (C9), also in a folder
    with a long name."""
    tmp_path /= "a-folder-with-a-name-of-some-length"
    tmp_path.mkdir()
    text = f"""\
backend = "nomad"
data_dir = "{tmp_path}"
inventory = ["{tmp_path}/none.json"]
api {{
  token_file           = "{tmp_path}/none.token"
  agent_key_file       = "{tmp_path}/none.keys"
  webhook_secrets_file = "{tmp_path}/none.secrets"
  token "gateway" {{
    role = "device"
    file = "{tmp_path}/none.gateway"
  }}
}}
nomad {{
  token_file = "{tmp_path}/none.nomad"
}}
consul {{
  address = "https://127.0.0.1:8501"
  token_file = "{tmp_path}/none.consul"
  client_cert = "{tmp_path}/none.pem"
  client_key = "{tmp_path}/none.key"
}}
agent_class "camera" {{
  template = "{tmp_path}/none.hcl"
  probe "tcp" {{ port = 80 }}
}}
"""
    code, said = checked(tmp_path, text, capsys)
    assert code == 64
    for line, name in [
        (3, "none.json"),
        (5, "none.token"),
        (6, "none.keys"),
        (7, "none.secrets"),
        (10, "none.gateway"),
        (13, "none.nomad"),
        (16, "none.consul"),
        (16, "none.pem"),
        (23, "none.hcl"),
    ]:
        assert any(
            f"w.hcl:{line}: " in row and name in row and "No such file" in row
            for row in said.splitlines()
        ), (line, name, said)
    assert "api > token_file: 'DIR/none.token': No such file or directory" in said
    assert "api > token \"gateway\" > file: 'DIR/none.gateway': No such file or directory" in said


@pytest.mark.parametrize(
    ("name", "inventory", "words"),
    [
        ("i.json", '{"id": "a", "address": "10.0.0.1", "class": "camra"}\n',
         'line 1: device "a": no agent class "camra"; did you mean camera? configured: camera'),
        ("i.hcl", ('device "a" {\n  address = "10.0.0.1"\n  class = "camera"\n}\n'
         'device "b" {\n  address = "10.0.0.2"\n}\n'), 'line 5: device "b": no agent class "default"'),
        ("i.json", ('[{"id": "a", "address": "10.0.0.1", "class": "camera"},'
         ' {"id": "b", "address": "10.0.0.2", "class": "cameras"}]'), 'line 1: device "b"'),
        ("i.json", "", "lists no device"),
        ("i.json", f'{{"id": "a", "address": "10.0.0.1", "ttl": {"9" * 5000}}}\n',
         "line 1: not a JSON object: a number has too many digits"),
        ("i.hcl", f'device "a" {{\n  address = "10.0.0.1"\n  ttl = {"9" * 5000}\n}}\n', "too many digits"),
        ("i.hcl", 'device "a" {\n  address = "10.0.0.1"\ndevice "b" {\n}\n', 'block `device "a"` (line 1)'),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_inventory_is_told_before_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, inventory: str, words: str
) -> None:
    """Unknown classes, invalid text and numbers of 5,000 digits (C9, H6)."""
    (tmp_path / name).write_text(inventory)
    code, said = checked(tmp_path, f'inventory = "{tmp_path}/{name}"\n{GOOD}', capsys)
    assert code == 64
    assert "w.hcl:1: inventory: " in said
    assert words in said
    assert "Exceeds" not in said


@pytest.mark.parametrize("backend", ["nomad", "kubernetes", "local"])
def test_a_misspelt_template_variable_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    """A variable that the template does not have would be silently ignored (C6)."""
    word, meant = {
        "nomad": ("pyhton", "python"),
        "kubernetes": ("imgae", "image"),
        "local": ("comand", "command"),
    }[backend]
    text = (
        f'backend = "{backend}"\nagent_class "camera" {{\n  probe "tcp" {{ port = 80 }}\n'
        f'  variables = {{ {word} = "x" }}\n}}\n'
    )
    code, said = checked(tmp_path, text, capsys)
    assert code == 64
    assert 'w.hcl:4: agent_class "camera" > variables' in said
    assert f"did you mean {meant}?" in said


def test_what_is_there_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Readable files, with a byte order mark too, and known classes pass."""
    (tmp_path / "i.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"id": "a", "address": "10.0.0.1", "class": "camera"}).encode()
    )
    (tmp_path / "token").write_bytes(b"\xef\xbb\xbfa-long-token-of-16\n")
    text = f'inventory = "{tmp_path}/i.json"\napi {{\n  token_file = "{tmp_path}/token"\n}}\n{GOOD}'
    assert checked(tmp_path, text, capsys) == (0, "")


def test_doctor_names_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`doctor` has a finding for each of them, and continues with its other checks."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "w.hcl"
    file.write_text(
        f'data_dir = "{tmp_path}"\ninventory = "{tmp_path}/none.json"\n'
        f'api {{\n  token_file = "{tmp_path}/none.token"\n}}\n{CLASS}'
    )
    assert _code(["--config", str(file), "doctor", "-o", "json"]) == 69
    checks = {one["name"]: one for one in json.loads(capsys.readouterr().out)["checks"]}
    assert "none.json" in checks["inventory"]["found"]
    assert "none.token" in checks["api.token_file"]["found"]
    assert "open files" in checks


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("NOMAD_NAMESPACE", "*", "means all namespaces"),
        ("CONSUL_HTTP_ADDR", "unix:///run/consul.sock", "Unix socket"),
        ("NOMAD_WATCHDOG_RESINC", "5s", "did you mean NOMAD_WATCHDOG_RESYNC?"),
    ],
)
def test_doctor_names_each_wrong_variable(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    words: str,
) -> None:
    """A value that the control plane can't use is a failure in `doctor`, which does not ignore it (C5)."""
    monkeypatch.setenv(variable, value)
    assert _code(["doctor", "-o", "json"]) == 69
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert (check["name"], check["status"]) == ("config", "fail")
    assert variable in check["found"]
    assert words in check["found"]

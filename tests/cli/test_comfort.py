"""What makes the command line pleasant: completion, options in any position, suggestions."""

from __future__ import annotations

import ast
import socket
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

import nomad_watchdog
from nomad_watchdog.cli._complete import KINDS
from nomad_watchdog.cli.main import VERBS, _code, cli


def completed(words: str) -> list[str]:
    """What a shell offers for the last word."""
    *before, last = words.split(" ")
    found = ShellComplete(cli, {}, "nomad-watchdog", "_NOMAD_WATCHDOG_COMPLETE")
    return [one.value for one in found.get_completions(before, last)]


def test_ids_verdicts_and_kinds_are_completed(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the service that the typed or configured address names, wherever its option is."""
    for name in ("cam-1", "cam-2", "gate"):
        assert _code(["devices", "add", name, "--address", "127.0.0.9"]) == 0
    assert completed("explain ca") == ["cam-1", "cam-2"]
    assert completed("explain cam-1") == ["cam-1"]
    assert completed("devices rm cam-1 g") == ["gate"]
    assert completed("events --device cam-2") == ["cam-2"]
    assert completed("explain ") == ["cam-1", "cam-2", "gate"]
    assert completed("devices ls --verdict un") == ["unwatched"]
    assert completed("events --kind ver") == ["verdict"]
    assert completed("sta") == ["status"]
    monkeypatch.delenv("NOMAD_WATCHDOG_ADDR")
    assert completed("explain cam") == []
    assert completed(f"--address {served} explain cam-1") == ["cam-1"]
    assert completed(f"explain --address {served} cam-1") == ["cam-1"]


def test_other_ids_with_the_same_text_hide_none(served: str) -> None:
    """IDs are listed from the typed text on, not those that contain it."""
    from nomad_watchdog.cli import _complete

    for n in range(5):
        assert _code(["devices", "add", f"a-pump-{n}", "--address", "127.0.0.9"]) == 0
    assert _code(["devices", "add", "pump-1", "--address", "127.0.0.9"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_complete, "MAX_SHOWN", 3)
        assert completed("explain pump-") == ["pump-1"]


def test_a_key_stroke_sends_no_token_to_a_device(served: str) -> None:
    """The option `--address` of `devices add` is a device's: nothing is asked there, whatever is completed."""
    with socket.create_server(("127.0.0.1", 0)) as device:
        device.settimeout(0.2)
        address = f"127.0.0.1:{device.getsockname()[1]}"
        completed(f"devices add x --address {address} --class d")
        with pytest.raises(TimeoutError):
            device.accept()


def test_without_a_service_nothing_is_completed(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither an error nor a traceback disturbs the prompt, whatever is wrong."""
    assert completed("--address 127.0.0.1:1 explain c") == []
    assert completed("explain --address file:///x c") == []
    assert completed("explain --address http://x..y:1 c") == []
    monkeypatch.delenv("NOMAD_WATCHDOG_ADDR")
    (tmp_path / "nomad-watchdog.hcl").write_text('prob "icmp" {}\n')
    assert completed("explain c") == []
    assert capsys.readouterr() == ("", "")


def test_an_address_without_a_value_is_an_error(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--address $UNSET` after a command must not mean the default service."""
    for argv in (["status", "--address"], ["devices", "ls", "--config"], ["--address"]):
        assert _code(argv) == 64
        assert "requires an argument" in capsys.readouterr().err
    assert _code(["status", "--address", "http://x..y:1"]) == 69


def test_every_kind_of_event_is_completed() -> None:
    """KINDS has the first part of each kind that the program writes as a literal."""
    written: set[str] = set()
    for path in Path(nomad_watchdog.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in {"note", "note_fleet", "_note", "_add_event"}:
                kinds = (one.value for one in node.args[:2] if isinstance(one, ast.Constant))
                written |= {str(kind).partition(".")[0] for kind in kinds if " " not in str(kind)}
    assert {"agent", "registry", "incident"} < written
    assert written <= set(KINDS)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["status", "--address", "{}"], 0),
        (["devices", "ls", "--address", "{}"], 0),
        (["devices", "--address", "{}", "ls", "--no-color"], 0),
        (["rebalance", "--address", "{}", "status"], 66),  # this service has no scheduler
        (["--address", "127.0.0.1:1", "events", "--address", "{}"], 0),
        (["events", "--address", "127.0.0.1:1"], 69),
    ],
)
def test_the_programs_own_options_may_come_later(
    served: str, argv: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a command or a subcommand; what comes last counts."""
    monkeypatch.delenv("NOMAD_WATCHDOG_ADDR")
    assert _code([one.format(served) for one in argv]) == code


def test_an_option_of_the_command_itself_stays_its_own(served: str) -> None:
    """`devices add --address` is the address of the device, not of the service."""
    assert _code(["devices", "add", "cam", "--address", "127.0.0.9"]) == 0


@pytest.mark.parametrize("word", ["statsu", "device", "roll-outs"])
def test_a_misspelt_command_is_answered_with_the_right_one(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names a command that exists."""
    assert _code([word]) == 64
    told = capsys.readouterr().err
    assert "Did you mean" in told
    assert any(f"'{name}'" in told.partition("Did you mean")[2] for name in VERBS)

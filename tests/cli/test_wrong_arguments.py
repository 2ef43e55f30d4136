"""Wrong command-line arguments are named, and nothing is done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code


@pytest.mark.parametrize(
    "argv",
    [
        ["pause", "--selector", "site=south", "--selector", "site=north", "--for", "5m"],
        ["resume", "--selector", "site=south", "--selector", "site=north"],
        ["maintenance", "add", "--selector", "site=a", "--selector", "site=b", "--for", "5m"],
        [
            "migrate",
            "--from",
            "local",
            "--to",
            "nomad",
            "--selector",
            "site=a",
            "--selector",
            "site=",
        ],
        ["rebalance", "--selector", "site=a", "--selector", "site="],
        ["devices", "ls", "--label", "site=south", "--label", "site=north"],
        ["devices", "add", "cam", "--address", "::1", "--label", "site=a", "--label", "site=b"],
    ],
)
def test_a_label_with_two_values_is_a_contradiction(
    served: str, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    """Every command that takes KEY=VALUE exits with 64, names the key, and sends nothing."""
    assert _code(argv) == 64
    told = capsys.readouterr().err
    assert "'site' is given twice" in told
    assert _code(["maintenance", "ls", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == []
    assert _code(["devices", "get", "cam"]) == 66


def test_the_same_label_twice_is_no_contradiction(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repeated identical pair, and values that contain "=", are accepted."""
    labels = ["--label", "site=a=b", "--label", "site=a=b", "--label", "rack="]
    assert _code(["devices", "add", "cam", "--address", "::1", *labels]) == 0
    capsys.readouterr()
    assert _code(["devices", "ls", *labels, "-o", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["items"]
    assert found["labels"] == {"site": "a=b", "rack": ""}


def test_departed_devices_are_listed_by_their_verdict(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`devices ls --verdict departed` lists as many devices as `status` counts, and the plain list none of them."""
    assert _code(["devices", "add", "cam", "--address", "::1"]) == 0
    assert _code(["devices", "add", "pump", "--address", "::1"]) == 0
    assert _code(["devices", "rm", "cam"]) == 0
    capsys.readouterr()
    assert _code(["devices", "ls", "--verdict", "departed", "-o", "json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["items"]] == ["cam"]
    assert _code(["devices", "ls", "-o", "json"]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)["items"]] == ["pump"]
    assert _code(["status", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"]["departed"] == 1


def test_import_names_every_wrong_line_and_sends_none(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Errors in syntax, fields, addresses, and duplicate IDs are all found before the first line is sent."""
    file = tmp_path / "fleet.ndjson"
    lines = [
        '{"id": "a", "address": "127.0.0.9"}',
        '{"id": "b"',
        "",
        '{"id": "c", "address": "http://x/"}',
        '{"id": "a", "address": "127.0.0.8"}',
        '{"id": "d", "address": "::1", "colour": "red"}',
        '{"id": "e", "address": "::1", "labels": {"k": "1", "k": "2"}}',
    ]
    file.write_text("\n".join(lines))
    assert _code(["devices", "import", str(file)]) == 64
    told = capsys.readouterr().err
    for number in (2, 4, 5, 6, 7):
        assert f"error: line {number}: " in told
    assert "device 'a' is listed twice, first: line 1" in told.replace('"a"', "'a'")
    assert told.endswith("error: nothing was sent\n")
    assert _code(["devices", "get", "a"]) == 66
    file.write_text("\n".join('{"id": "\\u0007", "address": "::1"}' for _ in range(60)))
    assert _code(["devices", "import", str(file)]) == 64
    assert "and 10 more" in capsys.readouterr().err
    file.write_bytes(b"\xff\xfe")
    assert _code(["devices", "import", str(file)]) == 64
    assert "not UTF-8 text at byte 0" in capsys.readouterr().err
    file.write_text("\ufeff" + '[{"id": "x", "address": "::1"}, {"id": "y", "address": "::1"}]')
    assert _code(["devices", "import", str(file)]) == 0
    assert "2 devices registered" in capsys.readouterr().err


def test_removing_unknown_devices_names_similar_ones_once(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each unknown device is one error, with the ID that was probably meant; the others are removed; exit code 66."""
    for name in ("web-1", "web-2"):
        assert _code(["devices", "add", name, "--address", "::1"]) == 0
    capsys.readouterr()
    assert _code(["devices", "rm", "nope"]) == 66
    assert capsys.readouterr().err.count("nope") == 1
    assert _code(["devices", "rm", "wbe-1", "web-2", "web-99"]) == 66
    told = capsys.readouterr()
    assert told.out == "web-2: removed\n"
    first, second = told.err.splitlines()
    assert "did you mean 'web-1'?" in first
    assert "did you mean 'web-" in second


def test_an_empty_token_file_is_named(
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file without a token, or with only blanks, is reported as an error of the file and not of the token."""
    for text in ("", " \n"):
        (tmp_path / "empty").write_text(text)
        monkeypatch.setenv("NOMAD_WATCHDOG_TOKEN_FILE", str(tmp_path / "empty"))
        assert _code(["status"]) == 64
        assert 'empty" is empty' in capsys.readouterr().err


def test_a_pause_of_nothing_is_a_warning(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A selector without a match may be meant for future devices: the pause is stored, with a warning."""
    assert _code(["pause", "--selector", "site=nope", "--for", "5m"]) == 0
    assert "warning: no registered device matches" in capsys.readouterr().err
    assert _code(["devices", "add", "cam", "--address", "::1", "--label", "site=nope"]) == 0
    capsys.readouterr()
    assert _code(["pause", "--selector", "site=nope", "--for", "6m"]) == 0
    assert capsys.readouterr().err == ""


def test_errors_of_a_window_speak_of_a_window(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`maintenance add` and `pause` report errors in their own terms."""
    assert _code(["devices", "add", "cam", "--address", "::1"]) == 0
    for verb, what in ((["maintenance", "add"], "maintenance window"), (["pause"], "pause")):
        for end, words in (
            ("2020-01-01T00:00", f"the {what} would end before it begins"),
            ("2099-01-01T00:00", f"a {what} may begin and end at most 366 days from now"),
        ):
            assert _code([*verb, "cam", "--until", end]) == 64
            assert words in capsys.readouterr().err


def test_a_ttl_is_shown_in_the_unit_of_what_is_left_of_it(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-o wide` displays 300s as 5m; JSON and `export` keep the form that the API takes."""
    for name, ttl in (("a", "300s"), ("b", "90s"), ("c", "36h"), ("d", "1500ms")):
        assert _code(["devices", "add", name, "--address", "::1", "--ttl", ttl]) == 0
    capsys.readouterr()
    assert _code(["devices", "ls", "-o", "wide"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, ttl in zip(lines, ("5m", "90s", "36h", "1500ms"), strict=True):
        assert f" {ttl} " in line
    assert _code(["devices", "get", "a", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["ttl"] == "300s"

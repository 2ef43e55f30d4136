"""The verbs against the project's own API, on a real socket and a real registry."""

import json
import re
from pathlib import Path

import pytest

from nomad_watchdog.cli.main import _code


def test_every_looking_verb_understands_the_real_api(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A device that was added appears in `ls`, `get`, `explain`, `export`, `status`, `agents` and `events`."""
    assert _code(["devices", "add", "gate/1 ü", "--address", "127.0.0.9", "--label", "k=v"]) == 0
    assert _code(["devices", "add", "gate2", "--address", "127.0.0.8"]) == 0
    capsys.readouterr()
    for argv in (["devices", "ls"], ["devices", "get", "gate/1 ü"], ["explain", "gate/1 ü"]):
        assert _code([*argv, "-o", "json"]) == 0, argv
        assert "gate/1 \\u00fc" in capsys.readouterr().out
        assert _code(argv) == 0, argv
        assert "127.0.0.9" in capsys.readouterr().out
    assert _code(["devices", "ls", "--label", "k=v", "-o", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["items"]) == 1
    for argv in (["status"], ["agents", "ls"], ["agents", "ls", "-o", "json"], ["events"]):
        assert _code(argv) == 0, argv
    capsys.readouterr()
    assert _code(["devices", "export"]) == 0
    file = tmp_path / "fleet.ndjson"
    file.write_text(capsys.readouterr().out)
    assert _code(["devices", "rm", "gate2"]) == 0
    assert _code(["devices", "import", str(file)]) == 0
    assert "2 devices registered" in capsys.readouterr().err
    assert _code(["devices", "get", "nobody"]) == 66


def test_people_read_times_and_durations(
    served: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`events` prints local times and sentences, `explain` ages with a unit; `agents ls` names the device."""
    assert _code(["devices", "add", "cam", "--address", "127.0.0.9"]) == 0
    capsys.readouterr()
    assert _code(["events"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d  cam  \w", line) for line in lines)
    assert _code(["explain", "cam"]) == 0
    told = capsys.readouterr().out
    first = told.splitlines()[:4]
    assert first[0].startswith("verdict: cam is ")
    assert re.fullmatch(r"since:   \d+s ago\.", first[1])
    assert (first[2][:9], first[3][:9]) == ("why:     ", "next:    ")
    assert not re.search(r"\d{10}|None|[{}]", lines[0] + told)

    class Answers:
        def pages(self, _path: str) -> list[dict[str, object]]:
            return [{"id": "cam", "slug": "cam-x", "class": "gate", "epoch": 1, "state": "ok"}]

    monkeypatch.setattr("nomad_watchdog.cli.agents.api_of", lambda _ctx: Answers())
    assert _code(["agents", "ls"]) == 0
    assert capsys.readouterr().out.split() == [
        "ID",
        "CLASS",
        "EPOCH",
        "STATE",
        "cam",
        "gate",
        "1",
        "ok",
    ]


def test_an_invalid_file_does_not_hide_the_running_service(
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a rejected reload the file is still invalid: commands use its `api` block and say so in one line. If that
    block can't be read, the error names `--address`, which works."""
    file = tmp_path / "bad.hcl"
    api = f'api {{\n  advertise = "{served}"\n}}\n'
    file.write_text(f'{api}agent_class "a" {{\n  prob "icmp" {{}}\n}}\n')
    monkeypatch.setenv("NOMAD_WATCHDOG_CONFIG", str(file))
    monkeypatch.delenv("NOMAD_WATCHDOG_ADDR")
    for argv in (["status"], ["devices", "ls"], ["events"]):
        assert _code(argv) == 0
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("warning: only the api block is used: ")
        assert "did you mean probe?" in told
    for text in (api.replace("advertise", "advertize"), api[:-2], api + "x {\n"):
        file.write_text(text)
        assert _code(["status"]) == 64
        (told,) = capsys.readouterr().err.splitlines()
        assert told.startswith("error: ")
        assert "--address URL" in told
    assert _code(["--address", served, "status"]) == 0


def test_an_invalid_file_does_not_loosen_where_a_token_is_sent(
    served: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file that merely lies in the working directory, valid or not, gets no token from the environment."""
    api = f'api {{\n  advertise = "{served}"\n}}\n'
    monkeypatch.delenv("NOMAD_WATCHDOG_ADDR")
    for more in ("", 'backend = "nomed"\n'):
        (tmp_path / "nomad-watchdog.hcl").write_text(api + more)
        assert _code(["status"]) == 64
        assert "a token is sent only to an address from its own source" in capsys.readouterr().err
    (tmp_path / "nomad-watchdog.hcl").chmod(0o666)
    assert _code(["status"]) == 64
    assert "it is not read" in capsys.readouterr().err


def test_events_and_incidents_take_their_options(
    served: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The filters of `events` reach the API, an age counts from now, an invalid filter is rejected with the allowed
    values, and `incidents` reports that there are none."""
    for name in ("a", "b"):
        assert _code(["devices", "add", name, "--address", "127.0.0.9"]) == 0
    capsys.readouterr()

    def devices(*options: str) -> list[str]:
        assert _code(["events", "-o", "json", *options]) == 0, options
        return [json.loads(line)["device"] for line in capsys.readouterr().out.splitlines()]

    # each request makes two events: its audit event, and the new desired state
    assert devices() == ["a", "a", "b", "b"]
    assert devices("--since", "2") == ["b", "b"]
    assert devices("--since", "1h") == ["a", "a", "b", "b"]
    assert devices("--device", "a") == ["a", "a"]
    assert devices("--kind", "audit") == ["a", "b"]
    assert devices("--kind", "present", "--since", "1m") == ["a", "b"]
    assert devices("--kind", "verdict", "--verdict", "offline") == []
    assert _code(["events", "--since", "soon"]) == 64
    assert "1h" in capsys.readouterr().err
    assert _code(["events", "--verdict", "gone"]) == 64
    assert "offline" in capsys.readouterr().err
    assert _code(["incidents"]) == 0
    assert capsys.readouterr().out == "no incidents\n"
    assert _code(["incidents", "--open", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"items": []}


def test_a_wrong_token_exits_77_and_is_not_shown(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token that the API rejects exits with 77, and no token is printed (S10)."""
    (tmp_path / "token").write_text("wrong-token")
    assert _code(["status"]) == 77
    found = capsys.readouterr()
    assert "wrong-token" not in found.out + found.err


def test_w2_impossible_requests_exit_64_and_66(
    served: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown class exits with 64 and a hint; `pause`, `events` and `agents logs` of an unknown device exit with 66
    and a hint; an import names the line of each item that the API rejects."""
    assert _code(["devices", "add", "cam-1", "--address", "127.0.0.9"]) == 0
    capsys.readouterr()
    (tmp_path / "nomad-watchdog.hcl").write_text(
        f'data_dir = "{tmp_path}"\napi {{ advertise = "{served}" }}\n'
    )
    for argv, code, word in (
        (["devices", "add", "x", "--address", "127.0.0.9", "--class", "gatway"], 64, "gateway?"),
        (["devices", "add", "x", "--address", "127.0.0.9", "--class", ""], 64, "class"),
        (["pause", "cam-2"], 66, "did you mean 'cam-1'?"),
        (["pause", "--class", "gatway"], 64, "did you mean gateway?"),
        (["maintenance", "add", "cam-2", "--for", "1h"], 66, "did you mean 'cam-1'?"),
        (["events", "--device", "cam-2"], 66, "did you mean 'cam-1'?"),
        (["events", "-f", "--device", "cam-2"], 66, "did you mean 'cam-1'?"),
        (["agents", "logs", "cam-2"], 66, "did you mean 'cam-1'?"),
        (["agents", "exec-probe", "cam-2"], 66, "did you mean 'cam-1'?"),
        (["agents", "logs", "cam-1"], 66, "does its agent run on this machine"),
        (["explain", "cam-2"], 66, "did you mean 'cam-1'?"),
    ):
        assert _code(argv) == code, argv
        assert word in capsys.readouterr().err, argv
    file = tmp_path / "fleet.ndjson"
    lines = [{"id": f"d{n}", "address": "127.0.0.9"} for n in range(3)]
    lines[1]["class"] = "gatway"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert _code(["devices", "import", str(file)]) == 64
    told = capsys.readouterr().err
    assert "2 devices registered" in told
    assert "line 3: 'd1': class: unknown agent class 'gatway'; did you mean gateway?" in told

"""``hosts ls``: a table for people, JSON for programs."""

from __future__ import annotations

import json

import pytest

from nomad_watchdog.cli._answers import HostsAnswer
from nomad_watchdog.cli.main import _code

ITEM = {
    "host": "no\x1b[2Jrth",
    "agents": 7,
    "state": "draining",
    "pressure": {"cpu": {"avg10": 1.25, "avg60": 0.5}, "memory": None, "io": None},
    "age_s": 12.0,
    "unreadable": "",
}
BLIND = {**ITEM, "host": "south", "state": "open", "pressure": None, "age_s": None}


class Answers:
    def __init__(self, *items: object) -> None:
        self.answer = {"items": list(items)}

    def get(self, path: str, kind: object) -> object:
        assert (path, kind) == ("/v1/hosts", HostsAnswer)
        return self.answer


def run(monkeypatch: pytest.MonkeyPatch, answers: Answers, *argv: str) -> None:
    monkeypatch.setattr("nomad_watchdog.cli.hosts.api_of", lambda _ctx: answers)
    assert _code(["hosts", "ls", *argv]) == 0


def test_hosts_are_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line has the agents, the state, both averages of each resource, and the age of the reading. What is not known
    is `unknown`, and the name of a host cannot control the terminal."""
    run(monkeypatch, Answers(ITEM, {**BLIND, "unreadable": "no such file"}))
    head, north, south = capsys.readouterr().out.splitlines()
    assert head.split() == ["HOST", "AGENTS", "STATE", "CPU", "MEMORY", "IO", "READ", "PROBLEM"]
    assert north.split() == [
        "no\\x1b[2Jrth", "7", "draining", "1.2%", "0.5%", "unknown", "unknown", "12s", "ago",
    ]  # fmt: skip
    assert south.split()[3:] == ["unknown", "unknown", "unknown", "no", "such", "file"]


def test_without_pressure_the_usage_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scheduler's statistics are marked, so that nobody takes them for pressure."""
    run(monkeypatch, Answers({**BLIND, "usage": {"cpu": 12.34, "memory": None}}))
    _, south = capsys.readouterr().out.splitlines()
    assert south.split()[3:] == ["12.3%", "used", "unknown", "unknown"]


def test_hosts_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is the answer of the API; an empty list is stated in the table."""
    run(monkeypatch, Answers(ITEM), "-o", "json")
    assert json.loads(capsys.readouterr().out) == {"items": [ITEM]}
    run(monkeypatch, Answers())
    assert capsys.readouterr().out.strip() == "no hosts"

"""Repairs in the configuration file: what is rejected, what reaches the agent, and whose hash changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from watchdog_agent import wire
from watchdog_agent.config import document as agent_config

from nomad_watchdog.config.load import load
from nomad_watchdog.errors import UserError

CLASS = 'agent_class "a" {\n  probe "tcp" { port = 22 }\n  confirm "icmp" {}\n%s\n}\n'


def spec(folder: Path, body: str) -> Any:
    file = folder / "nomad-watchdog.hcl"
    file.write_text(CLASS % body)
    return load(file).specs()["a"]


def document(folder: Path, body: str) -> dict[str, Any]:
    part = dict(spec(folder, body).agent_config)
    return wire.agent_config(part, device_id="d", slug="d", epoch=1, address="127.0.0.1", labels={})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('repair "mqtt" { topic = "a" }', "mqtt needs broker"),
        ('repair "mqtt" {\n topic = "a/#"\n broker = "b:1"\n}', "without blanks, + and #"),
        ('repair "wake" {\n mac = "00:11:22:33:44:55"\n method = "GET"\n}', "wake knows no method"),
        ('repair "unit" {\n unit = "a"\n probe = "http:80"\n}', "the probes are tcp:22"),
        ('repair "unit" {\n unit = "a"\n timeout = "11m"\n}', "from 0.01s to 600s"),
        ('repair "unit" {\n unit = "a"\n when = "ok"\n}', "when"),
        ('repair "mqtt" {\n topic = "a"\n broker = "b"\n ca_cert = "/x"\n}', "needs tls = true"),
        ('repair "http" {\n url = "http://a/"\n tls = true\n}', "http knows no tls"),
        ('repair "plugin" {}', "plugin needs plugin"),
        ('repair "unit" {\n unit = "a"\n tries = 65\n}', "from 1 to 64"),
        (
            'repair "unit" {\n unit = "a"\n tries = 40\n}\nrepair "unit" {\n unit = "b"\n tries = 40\n}',
            "64 at most",
        ),
        ('repair "mqtt" {\n topic = "a"\n broker = "b:0"\n}', "is not HOST or HOST:PORT"),
    ],
)
def test_wrong_repairs_are_refused(tmp_path: Path, body: str, words: str) -> None:
    """What no agent could do is rejected with what is allowed."""
    with pytest.raises(UserError, match=words.replace("+", r"\+")):
        spec(tmp_path, body)


def test_every_kind_of_step_is_taken_by_the_agent(tmp_path: Path) -> None:
    """A document that the control plane makes of each kind, with all its settings, passes the agent's own check."""
    body = """
      repair "interface" { interface = "eth0" }
      repair "http" {
        url    = "http://10.0.0.9/x"
        method = "GET"
      }
      repair "mqtt" {
        topic         = "a/b"
        broker        = "10.0.0.9:1884"
        payload       = "{}"
        tls           = true
        server_name   = "broker.example"
        user          = "u"
        password_file = "/run/secrets/mqtt"
      }
      repair "unit" {
        unit    = "modem.service"
        when    = "degraded"
        probe   = "tcp:22"
        tries   = 2
        verify  = "1m"
        dry_run = true
        even_behind_gateway = true
      }
      repair "command" { command = ["reboot-modem", "--now"] }
      repair "wake" {
        mac = "00:11:22:aa:bb:cc"
        to  = "10.0.0.255:9"
      }
      repair "plugin" { plugin = "mender" }
      repair_dry_run        = true
      repair_accepted_beats = 2
      repair_alone          = "0s"
    """
    checked = agent_config.check(document(tmp_path, body))
    assert len(checked["repairs"]) == 7
    unit = checked["repairs"][3]
    assert (unit["when"], unit["probe"], unit["tries"], unit["verify_s"], unit["dry_run"]) == (
        "degraded",
        "tcp:22",
        2,
        60.0,
        True,
    )
    assert unit["even_behind_gateway"] is True
    assert checked["repair_policy"] == {"dry_run": True, "accepted_beats": 2, "alone_s": 0.0}


def test_what_is_not_set_is_not_sent(tmp_path: Path) -> None:
    """A step that an older version supported is sent unchanged, so that no agent is replaced for it."""
    sent = document(tmp_path, 'repair "unit" { unit = "a" }')
    assert sent["repairs"] == [
        {
            "kind": "unit",
            "unit": "a",
            "budget": 3,
            "window_s": 3600.0,
            "cooldown_s": 30.0,
            "timeout_s": 10.0,
        }
    ]
    assert "repair_policy" not in sent
    checked = agent_config.check(sent)["repairs"][0]
    assert (checked["when"], checked["tries"], checked["verify_s"]) == ("suspect", 1, 30.0)
    same = spec(tmp_path, "").spec_hash
    assert spec(tmp_path, 'repair_alone = "1h"').spec_hash == same

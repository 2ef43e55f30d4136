"""Probes and gateways in the configuration of a class."""

from __future__ import annotations

from pathlib import Path

import pytest
from watchdog_agent.config.document import check

from nomad_watchdog.config.load import load
from nomad_watchdog.errors import UserError

ALL = """
agent_class "a" {
  gateway {
    address = "10.0.0.1"
    kind    = "tcp"
    port    = 22
  }
  probe "http" {
    port          = 80
    expect_status = [200, 204]
    expect_body   = "well"
    max_time      = "1s"
    jitter        = 0.2
    min_interval  = "1s"
    warn_loss     = 0.05
  }
  probe "https" {
    server_name = "pump.example"
    verify      = false
  }
  probe "tls" {
    warn_days = 7
    warn_time = "500ms"
  }
  probe "dns" {
    name           = "pump.example"
    server         = "10.0.0.53"
    type           = "AAAA"
    expect_address = "fd00::1"
  }
  probe "command" { command = ["/usr/bin/check", "--now"] }
  probe "file" {
    file        = "/var/log/pump.log"
    forbid_text = "ERROR"
    max_age     = "1h"
  }
  probe "mqtt" {
    tls           = true
    verify        = false
    server_name   = "broker.example"
    user          = "ann"
    password_file = "/etc/pump/password"
  }
  probe "snmp" { community_file = "/etc/pump/community" }
  probe "plugin" {
    plugin   = "modbus"
    settings = { unit = "7" }
  }
  confirm "icmp" {}
}
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "nomad-watchdog.hcl"
    file.write_text(text)
    return file


def test_every_kind_reaches_the_agent_as_it_takes_it(tmp_path: Path) -> None:
    """Whatever the control plane accepts of each kind, the agent's own check accepts too, with all settings."""
    spec = load(written(tmp_path, ALL)).specs()["a"]
    told = dict(spec.agent_config)
    got = check({**told, "device_id": "d", "slug": "d-1", "epoch": 1, "address": "10.0.0.7"})
    by_kind = {probe["kind"]: probe for probe in got["probes"]}
    assert len(by_kind) == 9
    assert by_kind["http"]["expect_status"] == [200, 204]
    # `max_time` is the old name of `warn_time`.
    assert (by_kind["http"]["warn_time_s"], by_kind["http"]["min_interval_s"]) == (1.0, 1.0)
    assert by_kind["http"]["warn_loss"] == 0.05
    assert (by_kind["tls"]["warn_days"], by_kind["tls"]["warn_time_s"]) == (7, 0.5)
    assert (by_kind["https"]["port"], by_kind["https"]["verify"]) == (443, False)
    assert (by_kind["mqtt"]["port"], by_kind["mqtt"]["tls"]) == (8883, True)
    assert by_kind["file"]["max_age_s"] == 3600.0
    assert by_kind["plugin"]["settings"] == {"unit": "7"}
    assert (got["gateway"]["address"], got["gateway"]["port"]) == ("10.0.0.1", 22)


def test_a_class_that_sets_nothing_new_keeps_its_hash(tmp_path: Path) -> None:
    """The hash of an existing class stays the same: the upgrade replaces no agent."""
    text = """
agent_class "a" {
  version = "1"
  probe "http" { port = 80 }
  probe "tcp"  { port = 22 }
  confirm "icmp" {}
}
"""
    assert load(written(tmp_path, text)).specs()["a"].spec_hash == "e58195c37f91"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            'probe "tcp" {\n port = 1\n expect_body = "x"\n}',
            "tcp knows no expect_body; known to: http, https",
        ),
        ('probe "dns" {}', "dns needs a name"),
        ('probe "file" { file = "/x" }', "needs one of"),
        (
            'probe "dns" {\n name = "a"\n expect_address = "fd00::1"\n}',
            "not an address of an A record",
        ),
        ('probe "icmp" { jitter = 0.9 }', "expected a number from 0 to 0.5"),
        ('probe "http" {\n port = 1\n max_time = "9s"\n}', "max_time must be shorter than timeout"),
        ('probe "icmp" { warn_time = "2s" }', "warn_time must be shorter than timeout"),
        ('probe "icmp" { warn_loss = 5 }', "expected a number from 0.001 to 1"),
        ('probe "icmp" { warn_days = 5 }', "icmp knows no warn_days; known to: tls"),
        (
            'probe "tls" {\n min_days = 5\n warn_days = 7\n}',
            "min_days is the old name of warn_days",
        ),
        (
            'probe "http" {\n port = 1\n max_time = "1s"\n warn_time = "1s"\n}',
            "max_time is the old name of warn_time",
        ),
        ('probe "tcp" { port = 1 }\n gateway { kind = "tcp" }', "tcp needs a port"),
        (
            'probe "tcp" { port = 1 }\n confirm "command" { command = ["x"] }',
            "confirm must ask the device",
        ),
        ('probe "mqtt" { verify = false }', "verify of mqtt needs tls = true"),
        ('probe "tls" { client_key = "/k" }', "client_key needs client_cert"),
        ('probe "pigeon" {}', '"snmp", "plugin"'),
    ],
)
def test_what_does_not_fit_is_refused_in_words(tmp_path: Path, block: str, words: str) -> None:
    """A setting that a kind does not know, or a missing required one, is reported with what is allowed."""
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, f'agent_class "a" {{\n {block}\n}}\n'))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("interval", "confirm", "wanted"),
    [
        ("5s", "2s", 120.0),
        ("60s", "2s", 4 * (60 * 1.05 + 2 + 2)),
        ("30s", "29s", 4 * (31.5 + 2 + 29)),
    ],
)
def test_a_suspicion_may_last_as_long_as_the_slowest_probe_needs(
    tmp_path: Path, interval: str, confirm: str, wanted: float
) -> None:
    """`agents.suspect_max` is never shorter than four rounds of a class's probe and its confirmation."""
    file = tmp_path / "x.hcl"
    file.write_text(
        f'agent_class "slow" {{\n  probe "http" {{\n    port = 80\n    interval = "{interval}"\n  }}\n'
        f'  confirm "icmp" {{\n    timeout = "{confirm}"\n    interval = "60s"\n  }}\n}}\n'
    )
    assert load(file, {}).limits().suspect_max_s == pytest.approx(wanted)

"""The class settings for escalation by agents."""

from __future__ import annotations

from pathlib import Path

import pytest
from watchdog_agent.config.document import check
from watchdog_agent.runtime.http import Url

from nomad_watchdog.config.load import load
from nomad_watchdog.errors import UserError
from tests.agent.world import document

FILE = """\
agent_class "default" {
  probe "tcp" {
    port = 80
  }
%s
}
"""
ALL = """\
  state = "consul"
  escalate {
    window   = "1m"
    by       = ["site"]
    degraded = true
    sink "webhook" {
      url        = "http://127.0.0.1:9000/hook"
      token_file = "/etc/hook.token"
    }
    sink "consul_event" {}
  }
  loki {
    url = "http://127.0.0.1:3100"
  }
"""


def spec_of(folder: Path, more: str) -> tuple[str, dict]:
    """(hash, document) of the class with these settings."""
    file = folder / "w.hcl"
    consul = 'consul {\n  agent_address = "http://127.0.0.1:8500"\n}\n'
    file.write_text(FILE % more + consul)
    spec = load(file).specs()["default"]
    return spec.spec_hash, dict(spec.agent_config)


def test_what_the_class_says_is_what_the_agent_takes(tmp_path: Path) -> None:
    """The agent's own check accepts what the control plane makes of the blocks, and keeps the values."""
    _, made = spec_of(tmp_path, ALL)
    taken = check(document(**made | {"device_id": "pump", "slug": "pump", "epoch": 1}))
    assert taken["escalate"]["window_s"] == 60.0
    assert taken["escalate"]["by"] == ["site"]
    assert taken["escalate"]["degraded"] is True
    assert [sink["kind"] for sink in taken["escalate"]["sinks"]] == ["webhook", "consul_event"]
    assert taken["escalate"]["sinks"][0]["token_file"] == "/etc/hook.token"
    assert (taken["loki"]["url"], taken["state"]) == ("http://127.0.0.1:3100", "consul")
    assert taken["prefix"] == "nomad-watchdog"


def test_a_class_without_keeps_its_hash_and_its_document(tmp_path: Path) -> None:
    """A class without escalation has none of the keys, and the hash that it had before they existed."""
    digest, made = spec_of(tmp_path, "")
    assert not {"escalate", "loki", "state", "prefix"} & made.keys()
    assert spec_of(tmp_path, '  state = "folder"')[0] == digest
    assert spec_of(tmp_path, ALL)[0] != digest


def test_a_bell_without_a_consul_is_refused_before_an_agent_is_started(tmp_path: Path) -> None:
    """A Consul event for agents without Consul, and without an address for it, is an error in the file."""
    file = tmp_path / "w.hcl"
    file.write_text('backend = "local"\n' + FILE % 'escalate {\n sink "consul_event" {}\n }')
    with pytest.raises(UserError, match="agent_address is empty"):
        load(file)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("escalate {}", "sink"),
        ('escalate {\n sink "pager" {}\n }', "webhook"),
        ('escalate {\n sink "webhook" {}\n }', "needs a url"),
        ('escalate {\n by = ["rack"]\n sink "consul_event" {}\n }', "gateway"),
        ('escalate {\n gather = "2m"\n sink "consul_event" {}\n }', "longer than window"),
        ('escalate {\n session_ttl = "5s"\n sink "consul_event" {}\n }', "10"),
        ('state = "disk"', "folder"),
    ],
)
def test_wrong_settings_are_refused_with_what_is_allowed(
    tmp_path: Path, wrong: str, said: str
) -> None:
    """An invalid block is rejected, and the message names the place and what is allowed."""
    with pytest.raises(UserError, match=said):
        spec_of(tmp_path, wrong)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("http://[::1]:9093", "::1", 9093),
        ("https://[fd00::7]/alerts", "fd00::7", 443),
        ("http://[fe80::1%25eth0]:9093", "fe80::1%eth0", 9093),
        ("http://[fe80::1%eth0]", "fe80::1%eth0", 80),
        ("https://alerts.test.:8443", "alerts.test.", 8443),
    ],
)
def test_receivers_at_ipv6_addresses(tmp_path: Path, url: str, host: str, port: int) -> None:
    """An IPv6 address of a sink or of Loki, with or without a zone, is connected to as written."""
    blocks = f'escalate {{ sink "alertmanager" {{ url = "{url}" }} }}\n  loki {{ url = "{url}" }}'
    _, made = spec_of(tmp_path, blocks)
    taken = check(document(**made | {"device_id": "pump", "slug": "pump", "epoch": 1}))
    for told in (taken["escalate"]["sinks"][0]["url"], taken["loki"]["url"]):
        found = Url(told, tls=True)
        assert (found.host, found.port) == (host, port)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://::1:9093", r"write http://\[::1\]:9093"),
        ("http://fd00::7", r"write http://\[fd00::7\]"),
        ("http://[::1]x:9093", "is not an address"),
        ("http://[::1", "is not an address"),
        ("http://[fe80::1]:9093", r"write http://\[fe80::1%25eth0\]:9093"),
    ],
)
def test_receivers_at_no_address(tmp_path: Path, url: str, words: str) -> None:
    """An address that no agent could connect to is rejected with what to write instead, for a sink and for Loki."""
    for block in (
        f'escalate {{ sink "webhook" {{ url = "{url}" }} }}',
        f'loki {{ url = "{url}" }}',
    ):
        with pytest.raises(UserError, match=words):
            spec_of(tmp_path, block)

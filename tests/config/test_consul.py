"""Agents' settings for a Consul that serves https."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nomad_watchdog.config.load import load
from nomad_watchdog.errors import UserError

PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
CLASS = 'agent_class "default" {\n  probe "tcp" { port = 1 }\n}\n'


def told(folder: Path, consul: str) -> tuple[dict[str, Any], str]:
    """The agents' document, and its hash."""
    file = folder / "nomad-watchdog.hcl"
    file.write_text(f'backend = "nomad"\nconsul {{\n{consul}\n}}\n{CLASS}')
    (spec,) = load(file, {}).specs().values()
    return dict(spec.agent_config), spec.spec_hash


def test_over_https_agents_get_the_authority_and_the_places_of_their_certificate(
    tmp_path: Path,
) -> None:
    """Agents get the CA as text, and certificate and key as paths on their host; no agent is replaced for it."""
    (tmp_path / "ca.pem").write_text(PEM)
    plain, before = told(tmp_path, 'address = "http://10.0.0.1:8500"')
    assert "consul_tls" not in plain
    document, after = told(
        tmp_path,
        'address = "https://10.0.0.1:8501"\n'
        f'ca_cert = "{tmp_path}/ca.pem"\n'
        'agent_client_cert = "/etc/consul/agent.pem"\n'
        'agent_client_key = "/etc/consul/agent.key"',
    )
    assert document["consul"] == "https://10.0.0.1:8501"
    assert document["consul_tls"] == {
        "ca_cert": PEM,
        "client_cert": "/etc/consul/agent.pem",
        "client_key": "/etc/consul/agent.key",
    }
    assert before == after


def test_agents_beside_a_plain_consul_of_their_own_are_told_nothing(tmp_path: Path) -> None:
    """The control plane uses https, while the agents use the Consul of their host over http."""
    document, _ = told(
        tmp_path, 'address = "https://10.0.0.1:8501"\nagent_address = "http://127.0.0.1:8500"'
    )
    assert "consul_tls" not in document


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('agent_client_key = "/k"', "agent_client_key needs agent_client_cert"),
        ('agent_client_cert = "k"', "agent_client_cert"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    """A key without its certificate, and a relative path, are rejected."""
    with pytest.raises(UserError) as caught:
        told(tmp_path, setting)
    assert message in str(caught.value)


def test_a_key_in_the_authorities_file_reaches_no_agent(tmp_path: Path) -> None:
    """`consul.ca_cert` goes to every agent: other contents of the file must not (S10)."""
    (tmp_path / "ca.pem").write_text(PEM + "-----BEGIN PRIVATE KEY-----\nsecret\n")
    with pytest.raises(UserError) as caught:
        told(tmp_path, f'address = "https://c:1"\nca_cert = "{tmp_path}/ca.pem"')
    assert "consul.ca_cert" in str(caught.value)
    assert "secret" not in str(caught.value)

"""Validation of the agent's configuration, and what a start may import."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watchdog_agent import wire
from watchdog_agent.config import document as config
from watchdog_agent.consul.registration import place

from nomad_watchdog.ids import slug_of
from tests.agent.world import AGENT, document, probe

PRINTABLE = st.text(min_size=1, max_size=30).filter(
    lambda t: t.isprintable() and t == t.strip() and len(t.encode()) <= 128
)


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.defpath, "PYTHONPATH": str(AGENT), **environment}
    return subprocess.run(
        [sys.executable, "-P", "-m", "watchdog_agent"],
        env=env,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def refused(raw: bytes, **environment: str) -> str:
    done = run(WATCHDOG_CONFIG_B64=base64.b64encode(raw).decode(), **environment)
    assert done.returncode == 64, done.stderr
    (line,) = done.stderr.splitlines()
    said = json.loads(line)
    assert said["msg"] == "bad configuration"
    # RFC 3339, as in the control plane's log
    at = datetime.fromisoformat(said["ts"].removesuffix("Z") + "+00:00")
    assert said["ts"].endswith("Z")
    assert abs((datetime.now(UTC) - at).total_seconds()) < 600.0
    return said["reason"]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b" ", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b"[]", "must be an object"),
        (b'{"v": 2}', "v is 2"),
        (b'{"v": 1}', "device_id"),
    ],
)
def test_documents_that_are_none(raw: bytes, words: str) -> None:
    """Anything but a version 1 document ends the start with exit code 64 and a one-line reason."""
    assert words in refused(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device_id": ""}, "device_id"),
        ({"device_id": 5}, "device_id"),
        ({"slug": "../../etc"}, "slug may hold"),
        ({"address": "a b"}, "printable ASCII"),
        ({"address": "h\r\nX: y"}, "printable ASCII"),
        ({"address": "例え.jp"}, "xn--"),
        ({"epoch": 0}, "epoch is 0"),
        ({"epoch": True}, "epoch is True"),
        ({"epoch": "3"}, "epoch is '3'"),
        ({"api": "http://x"}, "must be a list"),
        ({"api": ["ftp://x"]}, "not an http:// or https:// address"),
        ({"api": [5]}, "not an http:// or https:// address"),
        ({"api": ["http://x:99999"]}, "not an http:// or https:// address"),
        ({"consul": "ftp://x"}, "not an http:// or https:// address"),
        ({"beat_s": 0}, "beat_s is 0; allowed are 0.1 to 3600"),
        ({"beat_s": float("nan")}, "out of range"),
        ({"beat_s": "1"}, "beat_s is '1'"),
        ({"version": 1}, "version is 1"),
        ({"probes": []}, "at least one"),
        ({"probes": [5]}, "allowed are tcp, http, icmp"),
        ({"probes": [{"kind": "exec"}]}, "kind is 'exec'"),
        ({"probes": [{"kind": "tcp"}]}, "tcp: port is None"),
        ({"probes": [{"kind": "tcp", "port": 70000}]}, "1 to 65535"),
        ({"probes": [{"kind": "http", "port": 1, "path": "/\r\nX: y"}]}, "path is"),
        ({"probes": [{"kind": "http", "port": 1, "path": "x"}]}, "path is 'x'"),
        (
            {"probes": [{"kind": "http", "port": 1, "expect_status": "200"}]},
            "expect_status is '200'",
        ),
        ({"probes": [{"kind": "icmp", "timeout_s": 0}]}, "timeout_s is 0"),
        ({"probes": [{"kind": "icmp", "misses": 0}]}, "misses is 0"),
        ({"probes": [{"kind": "icmp"}] * 33}, "at most 32"),
        ({"confirm": [{"kind": "smtp"}]}, "confirm: kind is 'smtp'"),
    ],
    ids=str,
)
def test_bad_values(change: dict[str, Any], words: str) -> None:
    """A wrong value is rejected with a message that names it and what is allowed."""
    with pytest.raises(config.ConfigError) as caught:
        config.load(_environment({**document(probes=[probe(80)]), **change}))
    assert words in str(caught.value)


def test_a_bad_value_ends_the_process_with_64() -> None:
    """The process prints the same message as the check and exits with 64."""
    raw = json.dumps(document(probes=[probe(80)], epoch=-1)).encode()
    assert "epoch is -1" in refused(raw)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "set WATCHDOG_CONFIG"),
        ({"WATCHDOG_CONFIG": "/nonexistent"}, "no such file"),
        ({"WATCHDOG_CONFIG_B64": "*"}, "not base64"),
    ],
)
def test_no_document(environment: dict[str, str], words: str) -> None:
    """Without a readable document the start ends with 64 and explains how to provide one."""
    done = run(**environment)
    assert done.returncode == 64
    assert words in json.loads(done.stderr)["reason"]


@pytest.mark.parametrize(
    "listen", ["8080", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:²", "h:70000", "h:" + "9" * 5000]
)
def test_bad_listen(listen: str) -> None:
    """A listen address that is not host:port is rejected with 64."""
    raw = json.dumps(document(probes=[probe(80)])).encode()
    assert "WATCHDOG_LISTEN" in refused(raw, WATCHDOG_LISTEN=listen)


def test_consul_of_the_environment_wins() -> None:
    """CONSUL_HTTP_ADDR overrides the document, with and without its scheme."""
    for text in ("http://10.0.0.1:8500", "10.0.0.1:8500"):
        environment = {**_environment(document(probes=[probe(80)])), "CONSUL_HTTP_ADDR": text}
        assert config.load(environment)["consul"] == "http://10.0.0.1:8500"


@pytest.mark.parametrize(
    ("environment", "address", "tls"),
    [
        ({"CONSUL_HTTP_SSL": "true"}, "https://10.0.0.2:8500", {}),
        ({"CONSUL_HTTP_ADDR": "http://c:1", "CONSUL_HTTP_SSL": "1"}, "https://c:1", {}),
        ({"CONSUL_HTTP_ADDR": "c:1", "CONSUL_HTTP_SSL": "F"}, "http://c:1", None),
        (
            {
                "CONSUL_HTTP_ADDR": "https://c/below",
                "CONSUL_HTTP_SSL_VERIFY": "false",
                "CONSUL_TLS_SERVER_NAME": "consul.dc1",
            },
            "https://c/below",
            {"verify": False, "server_name": "consul.dc1"},
        ),
    ],
)
def test_consuls_variables_mean_what_they_mean_to_its_own_command(
    environment: dict[str, str], address: str, tls: dict[str, object] | None
) -> None:
    """TLS that is requested is never dropped, and the variable sets the certificate's name."""
    made = {**_environment(document(probes=[probe(80)], consul="http://10.0.0.2:8500"))}
    read = config.load(made | environment)
    assert read["consul"] == address
    assert (read.get("consul_tls") is None) == (tls is None)
    assert (tls or {}).items() <= read.get("consul_tls", {}).items()


def test_consul_without_a_port_is_asked_on_that_of_the_scheme() -> None:
    """The port defaults to 80 or 443, and the path of a reverse proxy is kept, as in Consul's own command."""
    for text, port in (("http://c/below", 80), ("https://c", 443), ("http://c:8500", 8500)):
        url = place(config.check(document(probes=[probe(80)], consul=text)))
        assert (url.host, url.port, url.base) == ("c", port, "/below" if "below" in text else "")


def test_a_consul_variable_that_is_no_boolean_is_refused() -> None:
    """A wrong value does not count as false: the token would be sent in clear text."""
    raw = json.dumps(document(probes=[probe(80)], consul="http://c:1")).encode()
    assert "write true or false" in refused(raw, CONSUL_HTTP_SSL="yes")


@given(PRINTABLE, st.dictionaries(PRINTABLE, PRINTABLE, max_size=3), st.integers(1, 2**53))
def test_document_round_trip(device_id: str, labels: dict[str, str], epoch: int) -> None:
    """What the control plane writes is what the agent reads, and what its report contains."""
    made = wire.agent_config(
        {"probes": [probe(80)], "agent_class": "c", "version": "v"},
        device_id=device_id,
        slug=slug_of(device_id),
        epoch=epoch,
        address="10.0.0.1",
        labels=labels,
    )
    read = config.load(_environment(made))
    assert made.items() <= {**read, "probes": made["probes"]}.items()
    told = wire.report(
        read,
        instance="i",
        sequence=1,
        ready=True,
        state="ok",
        was_ready=True,
        misses=0,
        confirmed=False,
        reason="",
        listen="h:1",
        dropped=0,
    )
    again = json.loads(json.dumps(told))
    assert (again["device_id"], again["epoch"]) == (device_id, epoch)
    assert (again["agent_class"], again["version"]) == ("c", "v")


def test_start_imports_nothing_heavy() -> None:
    """Importing everything a start needs loads none of the large modules."""
    heavy = ["asyncio", "ssl", "http.client", "logging", "argparse", "urllib.request", "threading"]
    heavy += ["typing", "random", "base64", "subprocess", "traceback", "dataclasses"]
    code = f"import watchdog_agent.main, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(AGENT)},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def _environment(value: dict[str, Any]) -> dict[str, str]:
    return {"WATCHDOG_CONFIG_B64": base64.b64encode(json.dumps(value).encode()).decode()}

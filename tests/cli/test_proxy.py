"""Proxy variables: no request to the local machine uses a proxy, and messages name the proxy that was used."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.cli._proxy import proxy_for
from nomad_watchdog.errors import DeniedError, TerminalError, UserError


class Recorder:
    """An HTTP server that answers with one status and keeps the request heads."""

    def __init__(self, status: int = 200) -> None:
        self.heads: list[str] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the library's name
                recorder.heads.append(f"{self.requestline}\n{self.headers}")
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def proxy() -> Iterator[Recorder]:
    one = Recorder()
    yield one
    one.close()


@pytest.fixture
def api() -> Iterator[Recorder]:
    one = Recorder()
    yield one
    one.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3"])
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_a_loopback_address_is_called_directly(
    proxy: Recorder, api: Recorder, host: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator's token reaches the API and never the proxy, even without `no_proxy` (C4)."""
    for one in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(one, raising=False)
    monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    client = ApiClient(f"http://{host}:{api.port}", "operators-token")
    if host == "127.1.2.3":
        with pytest.raises(TerminalError, match=r"no answer from the API at http://127\.1\.2\.3"):
            client.get("/v1/status")
    else:
        client.get("/v1/status")
        assert "Bearer operators-token" in api.heads[0]
    assert proxy.heads == []


def test_another_address_goes_through_the_proxy(proxy: Recorder) -> None:
    """The proxy is used for other addresses, even for a name that only the proxy can resolve."""
    env = {"http_proxy": f"127.0.0.1:{proxy.port}"}
    ApiClient("http://watchdog.invalid:9670", "t", env=env).get("/v1/status")
    assert proxy.heads[0].startswith("GET http://watchdog.invalid:9670/v1/status")


def test_a_failure_names_the_proxy_and_not_its_password() -> None:
    """A dead proxy and one that refuses are distinguished from the API itself."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        env = {"HTTP_PROXY": f"http://joe:s3cret@127.0.0.1:{port}"}
        with pytest.raises(TerminalError) as caught:
            ApiClient("http://watchdog.invalid:9670", "t", env=env).get("/v1/status")
    said = str(caught.value)
    assert f"through the proxy http://127.0.0.1:{port} (from HTTP_PROXY)" in said
    assert "name the API's host in no_proxy" in said
    assert "s3cret" not in said
    refusing = Recorder(403)
    try:
        env = {"http_proxy": f"http://127.0.0.1:{refusing.port}"}
        with pytest.raises(DeniedError, match="through the proxy http://127"):
            ApiClient("http://watchdog.invalid:9670", "t", env=env).get("/v1/status")
    finally:
        refusing.close()


PROXIES = {"http_proxy": "http://p:1", "https_proxy": "http://p:2"}


@pytest.mark.parametrize(
    ("address", "exempt", "url"),
    [
        ("http://127.0.0.1:9670", "", None),
        ("https://127.9.9.9", "", None),
        ("http://[::1]:9670", "", None),
        ("http://[::ffff:127.0.0.1]:9670", "", None),
        ("http://localhost:9670", "", None),
        ("http://LOCALHOST.:9670", "", None),
        ("http://dev.localhost", "", None),
        ("http://0.0.0.0:9670", "", None),
        ("http://10.0.0.5:9670", "", "http://p:1"),
        ("https://10.0.0.5:9670", "", "http://p:2"),
        ("http://10.0.0.5:9670", "10.0.0.0/8", None),
        ("http://10.0.0.5:9670", "192.168.0.0/16, 10.0.0.5", None),
        ("http://10.0.0.5:9670", "10.0.0.50", "http://p:1"),
        ("http://[fd00::5]:9670", "fd00::/8", None),
        ("http://[fd00::5]:9670", "[fd00::5]", None),
        ("http://watchdog.example.com", "example.com", None),
        ("http://watchdog.example.com", ".example.com", None),
        ("http://watchdog.example.com", "*.example.com", None),
        ("http://watchdog.example.com", "EXAMPLE.com", None),
        ("http://notexample.com", "example.com", "http://p:1"),
        ("http://watchdog.example.com:9670", "example.com:9670", None),
        ("http://watchdog.example.com:9671", "example.com:9670", "http://p:1"),
        ("http://watchdog.example.com", "*", None),
        ("http://watchdog.example.com", "other.org,,", "http://p:1"),
    ],
)
def test_no_proxy_is_honoured(address: str, exempt: str, url: str | None) -> None:
    """Names with and without a dot, ports, addresses, networks and "*", read as by curl."""
    for name in ("no_proxy", "NO_PROXY"):
        found = proxy_for(address, {**PROXIES, name: exempt})
        assert (found.url if found else None) == url


@pytest.mark.parametrize("value", ["socks5://p:1080", "https://p:1", "http://p:x", "http://"])
def test_a_proxy_that_is_not_supported_is_named(value: str) -> None:
    """A proxy of an unsupported kind is an error that names its variable; it is not bypassed."""
    with pytest.raises(UserError, match=r"^http_proxy "):
        proxy_for("http://10.0.0.1", {"http_proxy": value})


def test_a_header_is_not_taken_for_a_proxy() -> None:
    """In a CGI program, HTTP_PROXY comes from the caller (httpoxy)."""
    env = {"HTTP_PROXY": "http://p:1", "REQUEST_METHOD": "GET"}
    assert proxy_for("http://10.0.0.1", env) is None

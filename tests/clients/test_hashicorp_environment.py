"""Nomad's and Consul's variables: requests of this program compared with those of the vendors' command lines."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from nomad_watchdog.clients import hashicorp_environment
from nomad_watchdog.clients.consul import ConsulClient
from nomad_watchdog.clients.nomad import NomadClient
from nomad_watchdog.config.load import load
from nomad_watchdog.daemon.factory import consul_settings, nomad_settings
from nomad_watchdog.errors import UserError, WatchdogError
from servers import binaries
from servers.certificates import Authority


@dataclass(frozen=True)
class Arrival:
    """What a server sees of the first request."""

    scheme: str
    path: str = ""
    query: tuple[tuple[str, str], ...] = ()
    token: str = ""


@dataclass
class Listener:
    """Records requests on 127.0.0.1 and ::1, plain at `port` and over TLS at `tls_port`."""

    port: int = 0
    tls_port: int = 0
    seen: list[Arrival] = field(default_factory=list)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scheme: str
    ) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                if (first := await reader.readexactly(1)) == b"\x16":
                    self.seen.append(Arrival("https"))  # a TLS handshake at the plain port
                    return
                head = (first + await reader.readuntil(b"\r\n\r\n")).decode()
                self.seen.append(_arrival(scheme, head))
                body = "404 Not Found\r\nContent-Length: 0"
                if "/v1/jobs" in head:
                    body = "200 OK\r\nContent-Type: application/json\r\nContent-Length: 2"
                said = f"HTTP/1.1 {body}\r\nX-Nomad-Index: 1\r\nConnection: close\r\n\r\n"
                writer.write((said + ("[]" if "200" in body else "")).encode())
                await writer.drain()
        finally:
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()


def _arrival(scheme: str, head: str) -> Arrival:
    line, *rest = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (r.partition(":") for r in rest)}
    target = urlsplit(line.split(" ")[1])
    asked = parse_qs(target.query)
    token = headers.get("x-consul-token") or headers.get("x-nomad-token") or ""
    told = tuple((name, asked[name][0]) for name in ("region", "namespace") if name in asked)
    if "x-consul-namespace" in headers:
        told = (("namespace", headers["x-consul-namespace"]),)
    return Arrival(scheme, target.path.rstrip("/"), told, token)


@asynccontextmanager
async def listening(certificate: tuple[Path, Path] | None = None) -> AsyncIterator[Listener]:
    found = Listener()
    async with AsyncExitStack() as stack:
        for scheme in ("http", "https") if certificate else ("http",):
            context = None
            if scheme == "https" and certificate:
                context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                context.load_cert_chain(*certificate)

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, scheme: str = scheme
            ) -> None:
                await found._serve(reader, writer, scheme)

            server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
            await stack.enter_async_context(server)
            port = server.sockets[0].getsockname()[1]
            six = await asyncio.start_server(serve, "::1", port, ssl=context)
            await stack.enter_async_context(six)
            if scheme == "https":
                found.tls_port = port
            else:
                found.port = port
        yield found


async def vendor(program: str, env: Mapping[str, str]) -> str:
    """The output of the vendor's own command line."""
    argv = ["kv", "get", "probe"] if program == "consul" else ["job", "status"]
    child = await asyncio.create_subprocess_exec(
        binaries.find(program), *argv, env=dict(env),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await child.communicate()
    return (out + err).decode(errors="replace")


async def ours(program: str, env: Mapping[str, str]) -> None:
    """Send a request as the control plane does, with the settings that it derives from the environment."""
    settings = load(None, {"HOME": "/nowhere", **env})
    if program == "consul":
        consul = ConsulClient(consul_settings(settings, env))
        try:
            with suppress(WatchdogError):
                await consul.kv_get("probe")
        finally:
            await consul.close()
        return
    nomad = NomadClient(nomad_settings(settings, env))
    try:
        with suppress(WatchdogError):
            await nomad.get("/v1/jobs", "list-jobs", {"prefix": ""})
    finally:
        await nomad.close()


FORMS: list[tuple[str, dict[str, str]]] = [
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{port}"}),
    ("consul", {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{port}"}),
    ("consul", {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{port}/below/consul"}),
    ("consul", {"CONSUL_HTTP_ADDR": "[::1]:{port}"}),
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{port}", "CONSUL_HTTP_SSL": "true"}),
    ("consul", {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{port}", "CONSUL_HTTP_SSL": "1"}),
    ("consul", {"CONSUL_HTTP_ADDR": "http://127.0.0.1:{port}", "CONSUL_HTTP_SSL": "False"}),
    ("consul", {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{port}", "CONSUL_HTTP_SSL": "false"}),
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{port}", "CONSUL_HTTP_TOKEN": "t0ken"}),
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{port}", "CONSUL_HTTP_TOKEN": "t0ken",
                "CONSUL_HTTP_TOKEN_FILE": "{folder}/token"}),
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{port}", "CONSUL_HTTP_TOKEN": "t0ken",
                "CONSUL_HTTP_TOKEN_FILE": "{folder}/empty"}),
    ("consul", {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{tls}", "CONSUL_CACERT": "{ca}"}),
    ("consul", {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{tls}", "CONSUL_CAPATH": "{folder}/trust"}),
    ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.1:{tls}", "CONSUL_HTTP_SSL": "true",
                "CONSUL_HTTP_SSL_VERIFY": "false"}),
    ("consul", {"CONSUL_HTTP_ADDR": "https://[::1]:{tls}", "CONSUL_CACERT": "{ca}",
                "CONSUL_TLS_SERVER_NAME": "localhost"}),
    ("consul", {"CONSUL_HTTP_ADDR": "https://127.0.0.1:{tls}"}),
    ("nomad", {"NOMAD_ADDR": "http://127.0.0.1:{port}"}),
    ("nomad", {"NOMAD_ADDR": "http://127.0.0.1:{port}/"}),
    ("nomad", {"NOMAD_ADDR": "http://127.0.0.1:{port}/below"}),
    ("nomad", {"NOMAD_ADDR": "http://[::1]:{port}"}),
    ("nomad", {"NOMAD_ADDR": "https://127.0.0.1:{port}"}),
    ("nomad", {"NOMAD_ADDR": "http://127.0.0.1:{port}", "NOMAD_REGION": "south",
               "NOMAD_NAMESPACE": "apps", "NOMAD_TOKEN": "t0ken"}),
    ("nomad", {"NOMAD_ADDR": "https://127.0.0.1:{tls}", "NOMAD_CACERT": "{ca}"}),
    ("nomad", {"NOMAD_ADDR": "https://127.0.0.1:{tls}", "NOMAD_CAPATH": "{folder}/trust"}),
    ("nomad", {"NOMAD_ADDR": "https://127.0.0.1:{tls}", "NOMAD_SKIP_VERIFY": "T"}),
    ("nomad", {"NOMAD_ADDR": "https://[::1]:{tls}", "NOMAD_CACERT": "{ca}",
               "NOMAD_TLS_SERVER_NAME": "localhost"}),
    ("nomad", {"NOMAD_ADDR": "https://127.0.0.1:{tls}"}),
]  # fmt: skip


@pytest.mark.servers
@pytest.mark.slow_because("starts each vendor's program for each form of its variables")
async def test_what_arrives_is_what_the_vendors_programs_send(tmp_path: Path) -> None:
    """For each form of the variables, scheme, path, region, namespace and token are the same as those of `consul` and
    `nomad`, and a server that they do not trust receives nothing from this program either."""
    certificates = Authority(tmp_path / "ca")
    await certificates.make()
    pair = await certificates.issue("server", "/CN=localhost", san="DNS:localhost,IP:127.0.0.1")
    (tmp_path / "trust").mkdir()
    (tmp_path / "trust" / "any-name.txt").write_bytes(certificates.cert.read_bytes())
    (tmp_path / "token").write_text("from-file\n")
    (tmp_path / "empty").write_text("\n")
    async with listening(pair) as listener:
        known = {
            "port": listener.port,
            "tls": listener.tls_port,
            "ca": certificates.cert,
            "folder": tmp_path,
        }
        for program, form in FORMS:
            env = {name: text.format(**known) for name, text in form.items()}
            said = await vendor(program, env)
            expected, listener.seen = listener.seen[:1], []
            await ours(program, env)
            found, listener.seen = listener.seen[:1], []
            if program == "nomad" and expected and not expected[0].query:
                # the CLI omits the server's default
                found = [Arrival(one.scheme, one.path, (), one.token) for one in found]
            assert found == expected, (program, form, said)


@pytest.mark.servers
@pytest.mark.parametrize(
    ("program", "env"),
    [
        ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.77"}),
        ("consul", {"CONSUL_HTTP_ADDR": "https://127.0.0.77"}),
        ("consul", {"CONSUL_HTTP_ADDR": "127.0.0.77", "CONSUL_HTTP_SSL": "true"}),
        ("nomad", {"NOMAD_ADDR": "http://127.0.0.77"}),
        ("nomad", {"NOMAD_ADDR": "https://127.0.0.77"}),
    ],
)
async def test_a_missing_port_is_the_one_that_the_vendors_program_dials(
    program: str, env: dict[str, str]
) -> None:
    """Without a port the clients of `doctor` and of the registry both connect to the scheme's own port, 80 or 443."""
    dialled = re.search(r"127\.0\.0\.77:(\d+)", await vendor(program, env))
    assert dialled is not None
    settings = load(None, {"HOME": "/nowhere", **env})
    address = getattr(settings, program).address
    assert hashicorp_environment.host_and_port(address) == ("127.0.0.77", int(dialled[1]))


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"CONSUL_HTTP_ADDR": "unix:///run/consul.sock"}, "is a Unix socket, which is not supported"),
        ({"NOMAD_ADDR": "unix:///run/nomad.sock"}, "is a Unix socket, which is not supported"),
        ({"CONSUL_HTTP_ADDR": "http://::1:8500"}, "needs brackets: write http://[::1]:8500,"),
        ({"CONSUL_HTTP_ADDR": "::1:8500"}, "needs brackets: write http://[::1]:8500,"),
        ({"NOMAD_ADDR": "https://fd00::7:443"}, "needs brackets: write https://[fd00::7]:443,"),
        ({"CONSUL_HTTP_ADDR": "::1"}, "needs brackets: write http://[::1],"),
        ({"CONSUL_HTTP_ADDR": "fd00::12"}, "needs brackets: write http://[fd00::12],"),
        ({"CONSUL_HTTP_ADDR": "fe80::1"}, "needs brackets: write http://[fe80::1]"),
        ({"NOMAD_ADDR": "http://2001:db8::7:4646"}, "needs brackets"),
        ({"CONSUL_HTTP_ADDR": "ftp://h:1"}, "is not an address"),
        ({"CONSUL_HTTP_ADDR": "h:99999"}, "is not an address"),
        ({"CONSUL_HTTP_ADDR": "http://u:p@h"}, "not contain a user, password"),
        ({"CONSUL_HTTP_SSL": "yes"}, 'environment CONSUL_HTTP_SSL: consul > address: "yes" is not'),
        ({"NOMAD_SKIP_VERIFY": "maybe"}, "is not a boolean; write true or false"),
        ({"CONSUL_HTTP_SSL_VERIFY": "on"}, "is not a boolean; write true or false"),
        ({"NOMAD_NAMESPACE": "*"}, "means all namespaces, and agents run in one; name it"),
        ({"NOMAD_NAMESPACE": "a b"}, "is not a namespace"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused_in_words(env: dict[str, str], words: str) -> None:
    """An invalid vendor variable is named, with what to write instead."""
    with pytest.raises(UserError) as caught:
        load(None, {"HOME": "/nowhere", **env})
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"environment {next(iter(env))}: ")


@pytest.mark.parametrize(
    ("variable", "block"),
    [("CONSUL_HTTP_AUTH", "consul"), ("CONSUL_PARTITION", "consul"), ("NOMAD_HTTP_AUTH", "nomad")],
)
def test_what_the_vendors_know_and_we_do_not_is_refused(variable: str, block: str) -> None:
    """A variable that would change where a request goes is not silently ignored."""
    settings = load(None, {"HOME": "/nowhere"})
    with pytest.raises(UserError, match=f"{variable}: .* is not supported; unset it"):
        {"consul": consul_settings, "nomad": nomad_settings}[block](settings, {variable: "x"})


def test_a_slash_at_the_end_changes_nothing() -> None:
    """Consul's CLI drops the /v1 of its paths in this case; this program requests the same path as without the
    slash."""
    env = {"HOME": "/nowhere", "CONSUL_HTTP_ADDR": "http://127.0.0.1:8500/"}
    assert load(None, env).consul.address == "http://127.0.0.1:8500"


def test_ssl_asked_for_is_never_dropped(tmp_path: Path) -> None:
    """CONSUL_HTTP_SSL turns the default address, and that of the file, into https, as in Consul's CLI."""
    home = {"HOME": "/nowhere", "CONSUL_HTTP_SSL": "true"}
    assert load(None, home).consul.address == "https://127.0.0.1:8500"
    file = tmp_path / "a.hcl"
    file.write_text('consul {\n  address = "http://c.example:8500"\n}\n')
    assert load(file, home).consul.address == "https://c.example:8500"
    assert load(file, home | {"CONSUL_HTTP_SSL": "f"}).consul.address == "http://c.example:8500"


def test_our_variables_take_precedence_over_the_vendors() -> None:
    """NOMAD_WATCHDOG_* takes precedence if both are set, even if its value is false."""
    env = {"NOMAD_SKIP_VERIFY": "true", "NOMAD_WATCHDOG_NOMAD_TLS_SKIP_VERIFY": "false"}
    settings = load(None, {"HOME": "/nowhere", **env})
    assert nomad_settings(settings, env).tls_skip_verify is False

"""Which configuration the CLI reads, and where it sends a token: over real sockets."""

from __future__ import annotations

import os
import secrets
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nomad_watchdog.cli._api_client import ApiClient
from nomad_watchdog.cli.main import _code
from nomad_watchdog.config.load import load
from nomad_watchdog.errors import TerminalError, UserError
from tests.attacks.table import Attack

STRANGER = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")


class Thief:
    """A server that records what it receives, and answers like the API."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        body = b'{"items": [], "devices": 0, "verdicts": {}}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(10)
                if not (got := connection.recv(65536)):
                    return
                self.heads.append(got)
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def close(self) -> None:
        socket.create_connection(self._listener.getsockname()[:2]).close()
        self._thread.join(10)
        self._listener.close()

    def knows(self, token: str) -> bool:
        return any(token.encode() in head for head in self.heads)


@pytest.fixture
def thief() -> Iterator[Thief]:
    it = Thief()
    yield it
    it.close()


@pytest.fixture
def token(tmp_path: Path) -> str:
    """The caller's own token, in a file that only the caller can read."""
    text = secrets.token_hex(20)
    (tmp_path / "mine").write_text(text)
    (tmp_path / "mine").chmod(0o600)
    return text


@pytest.fixture
def bait(tmp_path: Path, thief: Thief, token: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration that sends the caller's token to the thief; it is the working directory."""
    folder = tmp_path / "shared"
    folder.mkdir()
    file = folder / "nomad-watchdog.hcl"
    file.write_text(
        f'api {{\n  advertise = "{thief.url}"\n  token_file = "{tmp_path}/mine"\n}}\n'
        f'nomad {{\n  address = "{thief.url}"\n}}\n'
    )
    file.chmod(0o644)
    monkeypatch.chdir(folder)
    for name in ("NOMAD_WATCHDOG_TOKEN", "NOMAD_WATCHDOG_TOKEN_FILE", "NOMAD_WATCHDOG_ADDR"):
        monkeypatch.delenv(name, raising=False)
    return file


def _of_a_stranger(file: Path) -> None:
    os.chown(file, STRANGER, STRANGER)


def _for_everybody(file: Path) -> None:
    file.chmod(0o666)


def _for_a_group(file: Path) -> None:
    os.chown(file, 0, STRANGER)
    file.chmod(0o664)


def _link_of_a_stranger(file: Path) -> None:
    real = file.with_name("of-root.hcl")
    file.rename(real)
    file.symlink_to(real)
    os.chown(file, STRANGER, STRANGER, follow_symlinks=False)


@root_only
@pytest.mark.attack(
    "H10", "a stranger's nomad-watchdog.hcl in the folder names our token file and its own address"
)
def test_h10_a_strangers_configuration_gets_no_token(
    bait: Path, thief: Thief, token: str, capfd: pytest.CaptureFixture[str], attack: Attack
) -> None:
    """Whatever makes the file another user's, no verb reads it, and nothing at all is sent to its address."""
    argvs = (
        ["status"],
        ["devices", "ls"],
        ["explain", "x"],
        ["plan"],
        ["doctor"],
        ["config", "show"],
    )
    content = bait.read_text()
    ways: tuple[Callable[[Path], None], ...]
    ways = (_of_a_stranger, _for_everybody, _for_a_group, _link_of_a_stranger)
    for spoil in ways:
        spoil(bait)
        for argv in argvs:
            assert _code(argv) != 0, (spoil.__name__, argv)
            attack.tried += 1
        said = capfd.readouterr()
        assert "it is not read" in said.out + said.err
        bait.unlink()
        bait.write_text(content)
        bait.chmod(0o644)
    _of_a_stranger(bait)
    program = subprocess.run(
        [sys.executable, "-m", "nomad_watchdog", "status"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (program.returncode, b"belongs to user" in program.stderr) == (64, True)
    attack.tried += 1
    assert not thief.heads
    attack.result = f"refused {attack.tried} of {attack.tried} times; 0 bytes sent to its address"


def test_our_own_file_is_read(bait: Path, thief: Thief, token: str) -> None:
    """The caller's own file, or an explicitly named one, may set where its token is sent."""
    _code(["status"])
    assert thief.knows(token)


def test_a_named_file_is_the_callers_word(bait: Path, thief: Thief, token: str) -> None:
    """An explicitly named file is trusted."""
    bait.chmod(0o666)
    _code(["--config", bait.name, "status"])
    assert thief.knows(token)


@pytest.mark.attack(
    "H10", "a token of the environment, and an address in the folder's nomad-watchdog.hcl"
)
def test_h10_a_token_of_the_environment_goes_to_no_address_of_a_file(
    bait: Path,
    thief: Thief,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    attack: Attack,
) -> None:
    """Even if the file is the caller's own; with an address from the environment as well, the token is sent."""
    other = secrets.token_hex(20)
    (tmp_path / "other").write_text(other)
    bait.write_text(bait.read_text().replace(f'token_file = "{tmp_path}/mine"', ""))
    for kind, value in (("TOKEN", other), ("TOKEN_FILE", str(tmp_path / "other"))):
        with monkeypatch.context() as patched:
            patched.setenv(f"NOMAD_WATCHDOG_{kind}", value)
            for argv in (["status"], ["devices", "ls"], ["explain", "x"]):
                assert _code(argv) == 64
                attack.tried += 1
            assert "from its own source" in capsys.readouterr().err
            assert not thief.heads
            patched.setenv("NOMAD_WATCHDOG_ADDR", thief.url)
            _code(["status"])
            assert thief.knows(other)
            thief.heads.clear()
    attack.result = f"refused {attack.tried} of {attack.tried} times; 0 bytes sent to its address"


@pytest.mark.attack(
    "H10", "a token of the folder's nomad-watchdog.hcl, and an address of the environment or a flag"
)
def test_h10_a_token_of_a_file_goes_to_no_address_of_the_environment(
    bait: Path, thief: Thief, token: str, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    """The file is not read: the request is made without the token, whoever owns the file, and whether it is named or
    not."""
    for way in ([], ["--config", bait.name]):
        for argv in (["status"], ["devices", "ls"], ["explain", "x"]):
            _code([*way, "--address", thief.url, *argv])
            with monkeypatch.context() as patched:
                patched.setenv("NOMAD_WATCHDOG_ADDR", thief.url)
                _code([*way, *argv])
            attack.tried += 2
    assert len(thief.heads) >= attack.tried
    assert not thief.knows(token)
    attack.result = f"the token was sent 0 of {attack.tried} times"


@pytest.mark.parametrize(
    ("block", "env"),
    [
        ('nomad { address = "http://192.0.2.1:4646" }', {"NOMAD_TOKEN": "x" * 36}),
        ('consul { address = "http://192.0.2.1:8500" }', {"CONSUL_HTTP_TOKEN_FILE": "/x"}),
        ('consul { token_file = "/x" }', {"CONSUL_HTTP_ADDR": "http://192.0.2.1:8500"}),
        ('nomad { token_file = "/x" }', {"NOMAD_WATCHDOG_NOMAD_ADDRESS": "http://192.0.2.1:4646"}),
    ],
)
def test_a_token_of_nomad_or_consul_goes_to_an_address_of_its_own_source(
    block: str, env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an address and a token come from different sources, one from the folder and one from the environment, they are
    rejected unless the file is named."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "nomad-watchdog.hcl"
    file.write_text(block + '\nagent_class "default" {\n  probe "tcp" { port = 80 }\n}\n')
    env = {"HOME": str(tmp_path), **env}
    with pytest.raises(UserError, match="from its own source"):
        load(None, env)
    assert load(file, env)


def test_a_crash_of_a_command_shows_no_secret(
    bait: Path, token: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bug prints a traceback without the token, and exits with the code for an internal error."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError(f"header was Bearer {token}")

    monkeypatch.setattr("nomad_watchdog.cli._api_client.ApiClient.get", broken)
    assert _code(["status"]) == 70
    said = capsys.readouterr().err
    assert token not in said
    assert "header was Bearer [redacted]" in said


def test_a_token_for_https_is_not_sent_to_a_replica_in_plain_text(token: str) -> None:
    """The API names the addresses of replicas, which come from Consul: whoever can write there must not get the token
    without a certificate."""
    api = ApiClient("https://127.0.0.1:1", token, tls=ssl.create_default_context)
    assert api.at("https://127.0.0.2:1").address == "https://127.0.0.2:1"
    for address in ("http://127.0.0.2:1", "127.0.0.2:1"):
        with pytest.raises(TerminalError, match="without TLS"):
            api.at(address)
    assert ApiClient("http://127.0.0.1:1", token).at("http://127.0.0.2:1")

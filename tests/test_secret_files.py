"""Secrets in files: allowed owners and modes, minimum length, and detection of changes."""

from __future__ import annotations

import asyncio
import base64
import errno
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

import pytest
from watchdog_agent.runtime import secrets as agent_secret

from nomad_watchdog import private_files, secret_file_rules, text_files
from nomad_watchdog.api.auth import authenticator_of
from nomad_watchdog.config.api import ApiSettings
from nomad_watchdog.config.settings import Settings
from nomad_watchdog.daemon.doctor.checks import examine
from nomad_watchdog.errors import UserError
from nomad_watchdog.model import Monotonic
from nomad_watchdog.secret_files import SecretFile, read_keys, read_token, read_webhook_secrets
from tests.api.conftest import served
from tests.attacks.table import Attack

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")


def whsec() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def changed_in_place(file: Path, text: str) -> None:
    """Write new content with the same size, inode and times to the nanosecond."""
    before = file.stat()
    with file.open("r+") as stream:
        stream.write(text)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ino,
    )


@pytest.mark.attack("H14", "a secret changed in place, with the same size and modification time")
async def test_h14_a_change_in_place_is_noticed(tmp_path: Path, attack: Attack) -> None:
    """For a token over HTTP, and for every kind of secret: the old one becomes invalid, the new one valid."""
    kinds = (
        (read_token, secrets.token_hex),
        (read_keys, lambda: secrets.token_hex(32)),
        (read_webhook_secrets, whsec),
    )
    for number, (reader, make) in enumerate(kinds):
        path = tmp_path / str(number)
        path.write_text(make())
        file = SecretFile("x", path, reader).required()
        old = file.now(Monotonic(0.0))
        new = make()
        changed_in_place(path, new)
        assert file.now(Monotonic(0.5)) == old  # read once per second
        assert file.now(Monotonic(1.5)) == reader(new) != old
        attack.tried += 1

    old, new = secrets.token_hex(20), secrets.token_hex(20)
    path = tmp_path / "token"
    path.write_text(old)
    async with served(
        tmp_path, authenticator=authenticator_of(ApiSettings(token_file=str(path)))
    ) as served_api:

        async def status(token: str) -> int:
            headers = {"Authorization": f"Bearer {token}"}
            return (await served_api.ask("GET", "/v1/status", headers=headers))[0]

        assert await status(old) == 200
        loop = asyncio.get_running_loop()
        changed_in_place(path, new)
        begun = loop.time()
        async with asyncio.timeout(60):
            while await status(new) != 200:
                await asyncio.sleep(0.05)
        took_s = loop.time() - begun
        assert await status(old) == 401
    attack.tried += 1
    attack.result = f"noticed {attack.tried} of {attack.tried} times; the old token was refused after {took_s:.1f} s"


def _for_a_group(path: Path, mode: int) -> None:
    os.chown(path, -1, 65534)
    path.chmod(mode)


def _foreign(path: Path) -> None:
    os.chown(path, 65534, 65534)


@root_only
def test_a_secret_of_the_own_group_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that the process's own group or root's can write, or that another group can only read, is used, by the
    service and by the agent."""
    path = tmp_path / "secret"
    path.write_text("0123456789abcdef")
    for group, mode in ((0, 0o660), (os.getegid(), 0o664), (65534, 0o640), (65534, 0o440)):
        os.chown(path, -1, group)
        path.chmod(mode)
        assert secret_file_rules.read(path, 99) == agent_secret.read(str(path)) == path.read_bytes()
    _for_a_group(path, 0o620)
    with pytest.raises(OSError, match="its group"):
        agent_secret.read(str(path))
    monkeypatch.setenv("SUDO_GID", "65534")
    assert secret_file_rules.read(path, 99)


@root_only
@pytest.mark.attack(
    "H14", "a secret file that others can write, of another user, or with a short token"
)
def test_h14_unsafe_and_short_secrets_are_refused(tmp_path: Path, attack: Attack) -> None:
    """By the service and by every reader of a token, with a message that names the fix."""
    long = secrets.token_hex(20)
    path = tmp_path / "secret"
    unsafe = (
        (lambda: path.chmod(0o666), r"can be written by everybody \(mode 0666\); chmod 600"),
        (lambda: path.chmod(0o602), r"can be written by everybody \(mode 0602\)"),
        (
            lambda: _for_a_group(path, 0o620),
            r"can be written by its group \(mode 0620\); chmod 600",
        ),
        (lambda: _for_a_group(path, 0o660), r"can be written by its group \(mode 0660\)"),
        (lambda: _foreign(path), r"belongs to user nobody, not to root or root; chown root"),
    )
    for spoil, words in unsafe:
        path.write_text(long)
        path.chmod(0o600)
        spoil()
        for read in (
            lambda: authenticator_of(ApiSettings(token_file=str(path))),
            lambda: authenticator_of(ApiSettings(agent_key_file=str(path))),
            lambda: text_files.token("nomad.token_file", path),
        ):
            with pytest.raises(UserError, match=words) as caught:
                read()
            assert long not in str(caught.value)
            attack.tried += 1
        path.unlink()
    for short in ("x", "0123456789abcde", "  y \n"):
        path.write_text(short)
        path.chmod(0o600)
        with pytest.raises(UserError, match=r"can be guessed; it needs at least 16 \(openssl"):
            authenticator_of(ApiSettings(token_file=str(path)))
        attack.tried += 1
    path.write_text(long[:16])
    assert authenticator_of(ApiSettings(token_file=str(path))).guarded
    attack.result = f"refused {attack.tried} of {attack.tried} times, with the fix in words"


def test_a_service_that_runs_lets_go_of_a_secret_that_became_unsafe(tmp_path: Path) -> None:
    """Like one whose file is gone; with a safe mode it is valid again."""
    path = tmp_path / "token"
    path.write_text(secrets.token_hex(20))
    file = SecretFile("x", path, read_token).required()
    path.chmod(0o666)
    assert file.now(Monotonic(2.0)) == ()
    path.chmod(0o600)
    assert file.now(Monotonic(4.0)) != ()


def test_mounted_secrets_and_pipes_are_read(tmp_path: Path) -> None:
    """A Secret as mounted by the kubelet (links through ..data to files of mode 0644) is neither rejected nor reported,
    and a command reads a token from a pipe. A folder, a device and a FIFO are not valid secrets in a service."""
    token = secrets.token_hex(20)
    volume = tmp_path / "..2026_01_01"
    volume.mkdir()
    (volume / "token").write_text(token)
    (volume / "token").chmod(0o644)
    (tmp_path / "..data").symlink_to(volume.name)
    (tmp_path / "token").symlink_to("..data/token")
    mounted = tmp_path / "token"
    assert authenticator_of(ApiSettings(token_file=str(mounted))).own_token() == token
    assert secret_file_rules.exposed(mounted) == ""

    reading, writing = os.pipe()
    try:
        os.write(writing, f"{token}\n".encode())
        os.close(writing)
        assert text_files.token("token file", f"/dev/fd/{reading}") == token
    finally:
        os.close(reading)
    os.mkfifo(tmp_path / "fifo", 0o600)
    for odd, words in (
        (tmp_path / "fifo", "not a regular file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(UserError, match=words):
            SecretFile("x", odd, read_token).required()


async def test_doctor_names_what_is_not_private_and_its_fix(tmp_path: Path) -> None:
    """A secret that others can read is a warning, and one that they can write a failure. A data folder that is open to
    others, and a configuration that they can write, are warnings. Each has the command that fixes it."""
    read, written = tmp_path / "read", tmp_path / "written"
    for file, mode in ((read, 0o644), (written, 0o666)):
        file.write_text(secrets.token_hex(20))
        file.chmod(mode)
    data, config = tmp_path / "data", tmp_path / "nomad-watchdog.hcl"
    data.mkdir()
    data.chmod(0o755)
    config.write_text("")
    config.chmod(0o666)
    settings = Settings.model_validate(
        {
            "data_dir": str(data),
            "api": {
                "listen": "127.0.0.1:1",
                "token_file": str(read),
                "agent_key_file": str(written),
            },
        }
    )
    checks = await examine(settings, {}, config)
    found = {(check.name, str(check.status)): f"{check.found} | {check.fix}" for check in checks}
    for key, words in (
        (("api.token_file", "warn"), f"can be read by everybody (mode 0644) | chmod 600 {read}"),
        (("api.agent_key_file", "fail"), "can be written by everybody (mode 0666) | chmod 600"),
        (("data_dir", "warn"), f"is open to other users (mode 0755) | chmod 700 {data}"),
        (("config", "warn"), f"chmod go-w {config}"),
    ):
        assert words in found[key], found


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o277])
def test_files_and_folders_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """Each created folder is 0700 and each file 0600. An existing folder keeps its mode, and one of our files that was
    open to others is made private."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old").chmod(0o755)
    (tmp_path / "old" / "db").touch()
    for name in ("db", "db-wal", "db-shm"):
        (tmp_path / "old" / name).touch()
        (tmp_path / "old" / name).chmod(0o644)
    before = os.umask(umask)
    try:
        private_files.folder(tmp_path / "a" / "b")
        private_files.file(tmp_path / "a" / "b" / "db")
        private_files.folder(tmp_path / "old")
        private_files.file(tmp_path / "old" / "db")
    finally:
        os.umask(before)
    assert modes([tmp_path / "a", tmp_path / "a" / "b"]) == {0o700}
    assert modes((tmp_path / "a" / "b").iterdir()) == {0o600}
    assert modes((tmp_path / "old").iterdir()) == {0o600}
    assert modes([tmp_path / "old"]) == {0o755}


def modes(paths: Iterable[Path]) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in paths}


@pytest.mark.parametrize(
    ("code", "kept"), [(errno.EMFILE, 1), (errno.ENFILE, 1), (errno.EACCES, 0)]
)
def test_a_process_without_descriptors_keeps_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kept: int
) -> None:
    """A file that can't be opened for lack of descriptors revokes no token; one that may not be read does."""
    path = tmp_path / "token"
    path.write_text("a-token-of-twenty-4")
    path.chmod(0o600)
    file = SecretFile("api.token_file", path, read_token).required()

    def refused(*_: object, **__: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(secret_file_rules, "read", refused)
    assert len(file.now(Monotonic(10.0))) == kept

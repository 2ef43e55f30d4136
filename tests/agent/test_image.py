"""The image of the agent, built by buildah without a registry, and run as a container engine would.

The base is this machine's own Python; the default base of the Dockerfile comes from a registry. Needs root
and Debian's package buildah: `make image`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nomad_watchdog.dev.process import free_port
from tests.agent.world import World, document, probe, until

pytestmark = [pytest.mark.image, pytest.mark.long]
LEFT_OUT = ("site-packages", "test", "__pycache__", "idlelib", "tkinter", "ensurepip", "config-*")


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("buildah")
        assert program, "install buildah: apt-get install --no-install-recommends buildah"
        self.base = [program, f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}",
                     "--storage-driver=vfs"]  # fmt: skip

    def __call__(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [*self.base, *arguments], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def needed_by(files: list[Path]) -> set[Path]:
    """The shared libraries that these programs and libraries load."""
    said = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return {Path(found) for found in re.findall(r"(?:=> |^\s+)(/[^ :]+)", said, re.MULTILINE)}


def a_root(root: Path) -> None:
    """A root file system with the Python that runs this, a shell, and what both load."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = Path(sys.base_prefix)
    library = home / "lib" / version
    inside = root / library.relative_to("/")
    shutil.copytree(library, inside, ignore=shutil.ignore_patterns(*LEFT_OUT))
    programs = [home / "bin" / version, Path("/bin/sh").resolve()]
    for file in {*programs, *needed_by([*programs, *library.glob("lib-dynload/*.so")])}:
        target = root / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for name in ("bin", "tmp", "proc", "dev", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/python3").symlink_to(programs[0])
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to(programs[1])


@pytest.fixture
def image(tmp_path: Path, repository: Path) -> Iterator[tuple[dict[str, object], Path]]:
    """(configuration, mounted root) of the image that agent/Dockerfile makes."""
    buildah = Buildah(tmp_path)
    a_root(tmp_path / "base")
    container = buildah("from", "scratch")
    buildah("copy", "-q", container, tmp_path / "base", "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
    buildah("commit", "-q", container, "localhost/base")
    buildah("bud", "-q", "--isolation=chroot", "--build-arg=BASE=localhost/base",
            "-t", "agntup/watchdog-agent", repository / "agent")  # fmt: skip
    told = json.loads(buildah("inspect", "--type=image", "agntup/watchdog-agent"))
    running = buildah("from", "--pull-never", "localhost/agntup/watchdog-agent")
    try:
        yield told["OCIv1"]["config"], Path(buildah("mount", running))
    finally:
        buildah("umount", running)


async def test_the_image_serves_with_a_read_only_root_and_without_root(
    image: tuple[dict[str, object], Path], world: World, tmp_path: Path
) -> None:
    """Started as its configuration says, by nobody on a root that can't be written, it is healthy, reports,
    and ends on SIGTERM."""
    config, root = image
    assert (config["User"], config["ExposedPorts"]) == ("65534:65534", {"8080/tcp": {}})
    listed = config["Env"]
    assert isinstance(listed, list)
    assert "WATCHDOG_LISTEN=0.0.0.0:8080" in listed
    entrypoint = config["Entrypoint"]
    assert isinstance(entrypoint, list)
    listen = f"127.0.0.1:{free_port()}"
    told = document(probes=[probe(world.device.port)], api=[f"http://127.0.0.1:{world.peer.port}"])
    encoded = base64.b64encode(json.dumps(told).encode()).decode()
    program = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec chroot "$@"'
    said = tmp_path / "stderr"
    log = said.open("wb")
    process = await asyncio.create_subprocess_exec(
        "unshare", "--mount", "sh", "-c", program,
        str(root), f"--userspec={config['User']}", str(root),
        "/usr/local/bin/python3", *entrypoint[1:],
        env={**dict(one.split("=", 1) for one in listed), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
             "WATCHDOG_CONFIG_B64": encoded, "WATCHDOG_LISTEN": listen},
        stderr=log,
    )  # fmt: skip
    log.close()
    try:
        ready = {"ready": True, "state": "ok"}
        await until(
            lambda: ready.items() <= world.peer.last.items() or process.returncode, "ready", 20.0
        )
        assert process.returncode is None, said.read_text()
        host, port = listen.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")
        writer.close()
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(r"^Uid:\s+65534\s+65534\s+65534\s+65534$", status, re.MULTILINE)
        mounts = Path(f"/proc/{process.pid}/mountinfo").read_text()
        roots = [fields for line in mounts.splitlines() if (fields := line.split())[4] == "/"]
        assert roots[-1][5].split(",")[0] == "ro", mounts
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.returncode is not None, "its end", 5.0)
        assert process.returncode == 128 + signal.SIGTERM
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()

"""Images built by buildah without a registry, and run like in a container engine.

The base is this machine's own Python; the default base of the Dockerfiles comes from a registry. Needs root
and Debian's package buildah: `make image`.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEFT_OUT = ("site-packages", "test", "__pycache__", "idlelib", "tkinter", "ensurepip", "config-*")
BASE = "localhost/base"
MOUNTS = (
    'root="$1"; shift; while [ "$1" != -- ]; do mount --bind "$1" "$root$2" || exit 1; shift 2; done; '
    'shift; mount --bind "$root" "$root" -o rbind && mount -o remount,ro,bind "$root" && '
    'exec chroot "$@"'
)


class Buildah:
    """buildah with its own storage."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("buildah")
        assert program, "install buildah: apt-get install --no-install-recommends buildah"
        self.base = [program, f"--root={folder / 'storage'}", f"--runroot={folder / 'run'}",
                     "--storage-driver=vfs"]  # fmt: skip

    def __call__(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [*self.base, *arguments], capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout.strip()


def needed_by(files: Iterable[Path]) -> set[Path]:
    """The shared libraries that these programs and libraries load."""
    said = subprocess.run(["ldd", *files], capture_output=True, text=True, check=False).stdout
    return {Path(found) for found in re.findall(r"(?:=> |^\s+)(/[^ :]+)", said, re.MULTILINE)}


def a_root(root: Path, *, packages: Sequence[str] = (), libraries: Iterable[Path] = ()) -> None:
    """Create a root file system with the Python that runs this, a shell, some of the packages that are installed here,
    and the shared libraries that these programs and `libraries` load."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    home = Path(sys.base_prefix)
    library = home / "lib" / version
    inside = root / library.relative_to("/")
    shutil.copytree(library, inside, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for name in packages:
        found = Path(sys.prefix) / "lib" / version / "site-packages" / name
        shutil.copytree(found, inside / "site-packages" / name)
    programs = [home / "bin" / version, Path("/bin/sh").resolve()]
    for file in {*programs, *needed_by([*programs, *library.glob("lib-dynload/*.so"), *libraries])}:
        target = root / file.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for name in ("bin", "tmp", "proc", "dev", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "usr/local/bin/python3").symlink_to(programs[0])
    if not (root / "bin/sh").exists():
        (root / "bin/sh").symlink_to(programs[1])


def a_base(buildah: Buildah, root: Path) -> None:
    """Create the image BASE from a folder made by `a_root`."""
    container = buildah("from", "scratch")
    buildah("copy", "-q", container, root, "/")
    buildah("config", "--env", "PATH=/usr/local/bin:/usr/bin:/bin", container)
    buildah("commit", "-q", container, BASE)


@dataclass(frozen=True, slots=True)
class Image:
    """An image's configuration, and the mount point of its root."""

    config: Mapping[str, Any]
    root: Path

    @property
    def env(self) -> dict[str, str]:
        return dict(one.split("=", 1) for one in self.config["Env"])

    async def start(
        self,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str],
        log: Path,
        mounts: Mapping[str, Path] | None = None,
    ) -> asyncio.subprocess.Process:
        """Run its entry point, as its user, on its read-only root. `mounts`: path inside → folder or file here."""
        for path, source in (mounts or {}).items():
            place = self.root / path.lstrip("/")
            if source.is_dir():
                place.mkdir(parents=True, exist_ok=True)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
        words = [word for path, source in (mounts or {}).items() for word in (str(source), path)]
        program, *rest = self.config["Entrypoint"]
        assert program == "python3"
        with log.open("wb") as out:
            return await asyncio.create_subprocess_exec(
                "unshare", "--mount", "sh", "-c", MOUNTS, "sh", str(self.root), *words, "--",
                f"--userspec={self.config['User']}", str(self.root), "/usr/local/bin/python3",
                *rest, *arguments,
                env={**self.env, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env},
                stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip

    async def execute(self, pid: int, arguments: Sequence[str], *, env: Mapping[str, str]) -> str:
        """Output of a program in the container of the process `pid`, as `kubectl exec` would run it."""
        child = await asyncio.create_subprocess_exec(
            "nsenter", f"--target={pid}", "--mount", "--root", "--wd=/",
            "--setuid=65534", "--setgid=65534", *arguments,
            env={**self.env, **env}, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await child.communicate()
        assert child.returncode == 0, said.decode()
        return said.decode()


@contextmanager
def opened(buildah: Buildah, name: str) -> Iterator[Image]:
    """A built image, as a mounted container."""
    told = json.loads(buildah("inspect", "--type=image", name))
    running = buildah("from", "--pull-never", f"localhost/{name}")
    try:
        image = Image(told["OCIv1"]["config"], Path(buildah("mount", running)))
        try:
            yield image
        finally:
            kill_all(image)
    finally:
        buildah("umount", running)


def kill_all(image: Image) -> None:
    """Kill everything that runs on its root, including agents, which outlive their control plane."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "root").readlink() == image.root:
                os.kill(int(entry.name), signal.SIGKILL)


def assert_confined(pid: int) -> None:
    """It runs as `nobody`, and its root is read-only."""
    status = Path(f"/proc/{pid}/status").read_text()
    assert re.search(r"^Uid:\s+65534\s+65534\s+65534\s+65534$", status, re.MULTILINE), status
    mounts = Path(f"/proc/{pid}/mountinfo").read_text()
    roots = [fields for line in mounts.splitlines() if (fields := line.split())[4] == "/"]
    assert roots[-1][5].split(",")[0] == "ro", mounts

